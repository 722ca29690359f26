"""Sharing of generations between plans: charged in full, paid once, and only where nothing differs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from thrifty import Account, Budget, BudgetExceeded, Call, EngineError, Labels, Receipt, Sampling, Spend
from thrifty.bench.cache import CachingEngine, GenerationCache, Tally
from thrifty.engines.scripted import ScriptedEngine
from thrifty.policy import CONTINUE, DecodePolicy, Stop, Verdict


class Bench:
    """A run's account, and plans that answer one example on it."""

    def __init__(self, engine: ScriptedEngine, budget: Budget | None = None) -> None:
        self.engine, self.run, self.cache = engine, Account("run", budget or Budget()), GenerationCache()

    def plan(self, budget: Budget | None = None, **scope: int) -> tuple[CachingEngine, Account, Tally]:
        tally = Tally(self.run)
        account = Account("example", ledger=tally).child("plan", budget)
        return CachingEngine(self.engine, self.cache, tally, **scope), account, tally


def drawing() -> ScriptedEngine:
    """Says another number at every draw."""
    return ScriptedEngine(lambda call, draw: f"number {draw.randrange(10**9)}")


def call(account: Account, text: str = "Say a number", **changes: object) -> Call:
    return replace(Call(({"role": "user", "content": text},), account, sampling=Sampling(seed=1)), **changes)


async def test_the_same_call_of_another_plan_is_charged_and_not_paid() -> None:
    bench = Bench(drawing())
    first, a, tally_a = bench.plan()
    second, b, tally_b = bench.plan()
    one, two = await first.generate(call(a)), await second.generate(call(b))
    assert two.text == one.text and two.spend == one.spend
    assert len(bench.engine.calls) == 1 and bench.cache.hits == 1
    assert tally_a.spend() == tally_b.spend() == a.settled == b.settled == Spend(input=3, output=2, calls=1)
    assert tally_a.work() == tally_b.work() and tally_b.work()
    assert tally_a.paid()[0] == tally_a.spend() and tally_b.paid()[0] == Spend()
    assert bench.run.settled == tally_a.spend() and bench.run.held == {}


async def test_a_plans_own_repeats_are_draws_of_their_own() -> None:
    bench = Bench(ScriptedEngine(lambda call, draw: f"draw {draw.index}"))
    first, a, _ = bench.plan()
    second, b, _ = bench.plan()
    texts = [(await first.generate(call(a))).text for _ in range(3)]
    assert texts == ["draw 0", "draw 1", "draw 2"]
    again = [(await second.generate(call(b))).text for _ in range(4)]
    assert again == [*texts, "draw 3"], "the n-th repeat of one plan is the n-th of the other"
    assert len(bench.engine.calls) == 4


@pytest.mark.parametrize("scope", [{"sample": 1}, {"seed": 1}])
async def test_samples_and_seeds_are_not_shared(scope: dict[str, int]) -> None:
    bench = Bench(ScriptedEngine(lambda call, draw: f"draw {draw.index}"))
    first, a, _ = bench.plan()
    second, b, _ = bench.plan(**scope)
    assert (await first.generate(call(a))).text == "draw 0"
    assert (await second.generate(call(b))).text == "draw 1"


class Short(DecodePolicy):
    """Stops after so many tokens."""

    method = "short"

    def __init__(self, most: int) -> None:
        self.most = most

    def after(self, branch: object, token: int) -> Verdict:
        return Stop() if len(branch.tokens) >= self.most else CONTINUE  # type: ignore[attr-defined]

    def receipt(self, branch: object) -> Receipt:
        return Receipt("short", True, f"at {self.most}")


CHANGES = {
    "message": {"messages": ({"role": "user", "content": "Say a Number"},)},
    "image": {
        "messages": (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Say a number"},
                    {"type": "image_url", "image_url": {"url": "data:,x"}},
                ],
            },
        )
    },
    "context": {"context": ("A passage.",)},
    "prefix": {"prefix": "It is"},
    "tools": {"tools": ({"type": "function", "function": {"name": "f"}},)},
    "extra": {"extra": {"user": "x"}},
    "seed": {"sampling": Sampling(seed=2)},
    "max_tokens": {"sampling": Sampling(seed=1, max_tokens=1)},
    "temperature": {"sampling": Sampling(seed=1, temperature=0.7)},
    "policy": {"policies": (Short(1),)},
    "another policy": {"policies": (Short(2),)},
    "keep": {"keep": 3},
    "on_exceed": {"on_exceed": "refuse"},
}


@pytest.mark.parametrize("name", CHANGES)
async def test_a_call_that_differs_is_not_shared(name: str) -> None:
    bench = Bench(drawing())
    first, a, _ = bench.plan()
    second, b, _ = bench.plan()
    await first.generate(call(a))
    if name == "another policy":
        await first.generate(call(a, policies=(Short(1),)))
    before = len(bench.engine.calls)
    await second.generate(call(b, **CHANGES[name]))
    assert len(bench.engine.calls) == before + 1 and bench.cache.hits == 0


async def test_what_the_budget_allows_is_part_of_the_key() -> None:
    bench = Bench(drawing())
    for budget, paid in ((Budget(output=50), 1), (Budget(output=50), 0), (Budget(output=49), 1), (None, 1)):
        engine, account, tally = bench.plan(budget)
        before = len(bench.engine.calls)
        await engine.generate(call(account))
        assert len(bench.engine.calls) - before == paid, budget
        assert account.settled == Spend(input=3, output=2, calls=1)


async def test_what_a_budget_cut_or_a_deadline_may_cut_is_not_shared() -> None:
    for budget in (Budget(output=1), Budget(deadline=60.0)):
        bench = Bench(drawing())
        for _ in range(2):
            engine, account, _ = bench.plan(budget)
            answer = await engine.generate(call(account))
        assert len(bench.engine.calls) == 2, (budget, answer.finish)


async def test_receipts_are_the_callers_own_and_the_policies() -> None:
    bench = Bench(drawing())
    first, a, _ = bench.plan()
    second, b, _ = bench.plan()
    mine, other = Receipt("mine", True, "here"), Receipt("other", False, "there")
    one = await first.generate(call(a, policies=(Short(1),), receipts=(mine,)))
    two = await second.generate(call(b, policies=(Short(1),), receipts=(other, other)))
    assert bench.cache.hits == 1
    assert [r.method for r in one.receipts] == ["mine", "short"]
    assert [r.method for r in two.receipts] == ["other", "other", "short"]


async def test_plans_that_ask_at_once_wait_for_one_generation() -> None:
    engine = ScriptedEngine("a b c", delay=0.005)
    bench = Bench(engine)
    plans = [bench.plan() for _ in range(4)]
    answers = await asyncio.gather(*(e.generate(call(a)) for e, a, _ in plans))
    assert {a.text for a in answers} == {"a b c"}
    assert len(engine.calls) == 1 and bench.run.settled == Spend(input=3, output=3, calls=1)


async def test_when_the_first_fails_or_is_cancelled_the_others_ask_themselves() -> None:
    engine = ScriptedEngine("a b c", delay=0.01)
    bench = Bench(engine)
    (first, a, _), (second, b, _) = bench.plan(), bench.plan()
    one = asyncio.create_task(first.generate(call(a)))
    await asyncio.sleep(0.005)
    two = asyncio.create_task(second.generate(call(b)))
    await asyncio.sleep(0.005)
    one.cancel()
    assert (await two).text == "a b c"
    with pytest.raises(asyncio.CancelledError):
        await one
    assert bench.run.held == {} and bench.run.settled == a.settled + b.settled

    engine.fail_after = 1
    third, c, tally = bench.plan()
    with pytest.raises(EngineError):
        await third.generate(call(c, "Something else"))
    assert bench.run.held == {} and tally.paid()[0] == c.settled


async def test_embeddings_are_shared_and_keep_their_role() -> None:
    bench = Bench(drawing())
    labels = Labels(role="embedder", method="adaptive-k")
    sums = []
    for _ in range(2):
        engine, account, tally = bench.plan()
        found = await engine.embed(["one two", "three"], account, labels)
        sums.append((found.vectors.tolist(), tally.by_role(), tally.paid()[0]))
    assert sums[0][0] == sums[1][0]
    assert sums[0][1] == sums[1][1] == {"embedder": Spend(input=3, calls=1)}
    assert [paid for _, _, paid in sums] == [Spend(input=3, calls=1), Spend()]
    engine, account, tally = bench.plan()
    await engine.embed(["one two", "four"], account, labels)
    assert tally.paid()[0] == Spend(input=3, calls=1)


async def test_branches_and_their_forks_are_counted_and_not_shared() -> None:
    bench = Bench(ScriptedEngine("a b c"), Budget(tokens=100))
    for _ in range(2):
        engine, account, tally = bench.plan()
        branch = await engine.open(call(account, sampling=Sampling(max_tokens=10)))
        assert bench.run.held["tokens"] == 13
        await branch.step()
        twin = branch.fork()
        await engine.advance([branch, twin], 10)
        first, second = await branch.finish_up(), await twin.finish_up()
        assert first.text == second.text == "a b c"
        assert tally.spend() == account.settled == tally.paid()[0]
        assert bench.run.held == {}
    assert bench.run.settled == Spend(input=14, cached=8, output=10, calls=4)


async def test_the_runs_refusal_is_told_apart_from_the_plans() -> None:
    bench = Bench(ScriptedEngine("a b c"), Budget(output=2))
    engine, account, tally = bench.plan()
    answer = await engine.generate(call(account, sampling=Sampling(max_tokens=3)))
    assert answer.finish == "budget" and answer.spend.output == 2
    assert tally.refused is not None and tally.refused.account == "run"
    assert bench.run.settled.output == 2 and bench.run.held == {} and bench.run.overdraft == {}

    engine, account, tally = bench.plan()
    with pytest.raises(BudgetExceeded) as refused:
        await engine.generate(call(account, sampling=Sampling(max_tokens=3)))
    assert tally.refused is not None and refused.value.account == "run"
    assert account.held == {} and bench.run.held == {}

    for budget in (Budget(calls=0), Budget(input=2)):
        engine, account, tally = bench.plan(budget)
        with pytest.raises(BudgetExceeded):
            await engine.generate(call(account, sampling=Sampling(max_tokens=0)))
        assert tally.refused is None, "the plan's own budget refused it"
        assert bench.run.held == {}


async def test_forks_stay_within_the_runs_budget() -> None:
    bench = Bench(ScriptedEngine("a b c"), Budget(tokens=17))
    engine, account, tally = bench.plan()
    branch = await engine.open(call(account, sampling=Sampling(max_tokens=4)))
    await branch.step()
    twin = branch.fork()
    with pytest.raises(BudgetExceeded):
        branch.fork()
    assert tally.refused is not None and tally.refused.account == "run"
    await engine.advance([branch, twin], 10)
    await branch.finish_up()
    await twin.finish_up()
    assert bench.run.settled == tally.spend() == account.settled
    assert bench.run.settled.tokens <= 17 and bench.run.overdraft == {} and bench.run.held == {}


async def test_what_is_settled_after_the_example_is_over_still_counts() -> None:
    bench = Bench(ScriptedEngine("a b c"))
    engine, account, tally = bench.plan()
    branch = await engine.open(call(account))
    await branch.step()
    tally.close()
    assert bench.run.held == {}
    branch.close()
    assert bench.run.settled == account.settled == Spend(input=3, output=1, calls=1)
    assert bench.run.held == {}
