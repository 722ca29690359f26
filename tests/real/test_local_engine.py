"""The local engine with SmolLM2-135M-Instruct: it finds a needle, eight at once, and forks share their prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import pytest

from thrifty import Account, Budget, Call, Sampling, advance
from thrifty.errors import ThriftyError

pytestmark = pytest.mark.real

TEXT = "\n\n".join(topics[key] for key in ("assignment", "calls", "class", "for", "try"))
HAY = [p.strip() for p in TEXT.split("\n\n") if p.strip()]
TOWNS = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Dublin", "Lima", "Tunis")


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    from thrifty.engines.local import embedded
    from thrifty.engines.local.engine import LocalEngine

    try:
        embedded.path("smollm2")
    except ThriftyError as error:
        pytest.skip(str(error))
    engine = LocalEngine.load("smollm2")
    yield engine
    asyncio.run(engine.aclose())


def needle(town: str, number: int, account: Account, passages: int = 12) -> Call:
    half, planted = passages // 2, f"The special magic number for {town} is {number}."
    context = [*HAY[:half], planted, *HAY[half:passages]]
    question = f"What is the special magic number for {town}?"
    return Call(
        ({"role": "user", "content": question},),
        account,
        context=tuple(context),
        prefix=f"The special magic number for {town} is",
        sampling=Sampling(max_tokens=12),
    )


def test_it_finds_a_needle_that_the_prefix_asks_for(engine: Any) -> None:
    account = Account("t", Budget(tokens=10_000))
    call = needle("Kyoto", 48213, account)
    answer = asyncio.run(engine.generate(call))
    assert "48213" in answer.text.replace(",", "")
    assert answer.spend.input == engine.count(call) > 500
    assert account.settled == answer.spend and account.held == {}


def test_eight_at_once_find_their_own(engine: Any) -> None:
    async def run() -> None:
        account = Account("t")
        calls = [needle(town, 10_000 + 4321 * i, account, passages=6 + i) for i, town in enumerate(TOWNS)]
        steps, rows = engine.scheduler.steps, engine.scheduler.rows
        answers = await asyncio.gather(*map(engine.generate, calls))
        found = [str(10_000 + 4321 * i) in a.text.replace(",", "") for i, a in enumerate(answers)]
        assert sum(found) >= 7, [a.text for a in answers]
        assert engine.scheduler.rows - rows > engine.scheduler.steps - steps, "they shared steps"
        assert account.held == {} and account.settled.calls == 8

    asyncio.run(run())


def test_forks_share_the_prompt_and_differ_by_their_seeds(engine: Any) -> None:
    async def run() -> None:
        account = Account("t")
        call = needle("Riga", 77001, account).with_sampling(temperature=1.0, seed=1, max_tokens=6)
        branch = await engine.open(call)
        forks = [branch.fork(seed) for seed in range(2, 5)]
        await advance([branch, *forks], 6)
        again = await engine.open(call)
        await advance([again], 6)
        n = branch.spend.input
        answers = [await b.finish_up() for b in (branch, *forks, again)]
        assert len({a.tokens for a in answers[:4]}) > 1
        assert account.settled.input == 5 * n and account.settled.cached == 3 * n
        assert account.work.prefill == 2 * n

    asyncio.run(run())
