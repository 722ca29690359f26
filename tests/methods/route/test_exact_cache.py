"""The exact cache: what is equal and what is not, whose answers they are, what is never kept, and what a hit costs."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, Delta, Method, Plan, Receipt, Sampling, Spend
from thrifty.call import Draft
from thrifty.engines.scripted import Draw, Reply, ScriptedEngine
from thrifty.errors import EngineError, InvalidInput
from thrifty.ledger import MemoryLedger
from thrifty.meter.prices import PriceTable
from thrifty.methods.prompt.budget_prompt import BudgetPrompt
from thrifty.methods.route._replay import pieces
from thrifty.methods.route.exact_cache import ExactCache
from thrifty.methods.search.self_consistency import SelfConsistency

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}


def counting(call: Call, draw: Draw) -> Reply:
    """A model that never says the same twice."""
    counting.said += 1  # type: ignore[attr-defined]
    return Reply(f"answer {counting.said}  of\nmany words, and more", thinking="hm hm")  # type: ignore[attr-defined]


class Asking:
    """One plan with a cache, on an engine that never says the same twice."""

    def __init__(self, method: Method | None = None, script: Any = counting, *below: Method, **options: Any) -> None:
        counting.said = 0  # type: ignore[attr-defined]
        self.engine = ScriptedEngine(script, prices=PriceTable.local())
        self.ledger = MemoryLedger()
        self.account = Account("ann", ledger=self.ledger)
        self.pipeline = Plan("cached", (method or ExactCache(), *below), **options).build(self.engine)

    async def ask(self, prompt: str = "What is it?", account: Account | None = None, **changes: Any) -> Answer:
        return await self.pipeline.ask(prompt, account or self.account, **changes)

    @property
    def calls(self) -> int:
        return len(self.engine.calls)


def own(answer: Answer) -> Receipt:
    (receipt,) = [r for r in answer.receipts if r.method == "exact-cache"]
    return receipt


async def test_an_equal_call_gets_the_same_answer_and_spends_nothing() -> None:
    world = Asking()
    first, second, third = await world.ask(), await world.ask(), await world.ask()
    assert world.calls == 1
    assert second == third or own(third).detail["hits"] == 2
    assert replace(second, receipts=(), spend=first.spend, work=first.work) == replace(first, receipts=())
    assert second.spend == Spend() and world.account.settled == first.spend and len(world.ledger) == 1
    assert not own(first).fired and "kept" in own(first).reason
    assert own(second).fired and (own(second).before, own(second).after) == (first.spend.tokens, 0)
    assert Spend.from_dict(own(second).detail["saved"]) == first.spend and first.spend.usd > 0


CHANGES: dict[str, Callable[[Call], Call]] = {
    "a word": lambda c: replace(c, messages=({"role": "user", "content": "What is it ?"},)),
    "a system prompt": lambda c: replace(c, messages=({"role": "system", "content": "x"}, *c.messages)),
    "a message's field": lambda c: replace(c, messages=({**c.messages[0], "name": "bob"},)),
    "an image": lambda c: replace(
        c,
        messages=(
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                ],
            },
        ),
    ),
    "context": lambda c: replace(c, context=("a passage",)),
    "an empty context": lambda c: replace(c, context=()),
    "a tool": lambda c: replace(c, tools=(TOOL,)),
    "a prefix": lambda c: replace(c, prefix="It is"),
    "a draft": lambda c: replace(c, draft=Draft()),
    "temperature": lambda c: c.with_sampling(temperature=0.0),
    "seed": lambda c: c.with_sampling(seed=1),
    "max_tokens": lambda c: c.with_sampling(max_tokens=100),
    "stop": lambda c: c.with_sampling(stop=("zzz",)),
    "logprobs": lambda c: c.with_sampling(logprobs=True),
    "an unknown field": lambda c: replace(c, extra={"reasoning_effort": "low"}),
    "a user": lambda c: replace(c, extra={"user": "bob"}),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_whatever_changes_the_answer_is_asked_again(change: str) -> None:
    world = Asking()
    call = world.pipeline.call("What is it?", world.account)
    await world.pipeline(call)
    changed = CHANGES[change](call)
    await world.pipeline(changed)
    assert world.calls == 2, change
    await world.pipeline(changed)
    await world.pipeline(call)
    assert world.calls == 2, "both are known now"


async def test_fields_that_change_no_answer_are_ignored() -> None:
    world = Asking()
    for extra in ({}, {"metadata": {"trace": "1"}}, {"metadata": {"trace": "2"}, "store": True}):
        await world.ask(extra=extra)
    assert world.calls == 1


async def test_another_plan_engine_or_order_of_keys(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.db")
    counting.said = 0  # type: ignore[attr-defined]
    plans = [
        Plan("a", (ExactCache(path=path),)),
        Plan("renamed", (ExactCache(path=path),)),
        Plan("a", (ExactCache(path=path), BudgetPrompt(words=5))),
        Plan("a", (ExactCache(path=path), BudgetPrompt(words=6))),
        Plan("a", (ExactCache(path=path),), Budget(output=50)),
    ]
    asked = []
    for plan in plans:
        engine = ScriptedEngine(counting)
        await plan.build(engine).ask("What is it?", Account("ann"))
        asked.append(len(engine.calls))
    assert asked == [1, 0, 1, 1, 1], "a plan's name changes nothing, its methods and budget do"
    other = ScriptedEngine(counting, model="other")
    await plans[0].build(other).ask("What is it?", Account("ann"))
    assert len(other.calls) == 1
    again = ScriptedEngine(counting)
    await plans[0].build(again).ask(({"content": "What is it?", "role": "user"},), Account("ann"))
    assert not again.calls, "the order of keys is no difference"


# -- whose answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "calls"), [("account", 3), ("root", 2), ("all", 1)])
async def test_tenants_share_what_scope_says(scope: str, calls: int) -> None:
    world = Asking(ExactCache(scope=scope))
    gateway = Account("gateway")
    for account in (gateway.child("ann"), gateway.child("bob"), Account("elsewhere"), gateway.child("ann")):
        await world.ask(account=account)
    assert world.calls == calls


async def test_accounts_that_searches_open_below_the_plan_are_the_same_tenant() -> None:
    search, cache = SelfConsistency(samples=3, confidence=1.0), ExactCache()
    engine = ScriptedEngine(counting)
    counting.said = 0  # type: ignore[attr-defined]
    pipeline = Plan("voted", (search, cache)).build(engine)
    for _ in range(2):
        await pipeline.ask("What is it?", Account("ann"), sampling=Sampling(seed=3))
    assert len(engine.calls) == 3, "three samples with three seeds, asked once each"
    await pipeline.ask("What is it?", Account("bob"), sampling=Sampling(seed=3))
    assert len(engine.calls) == 6


async def test_samples_without_a_seed_are_new_draws() -> None:
    engine = ScriptedEngine(counting)
    pipeline = Plan("voted", (SelfConsistency(samples=3, confidence=1.0), ExactCache())).build(engine)
    await pipeline.ask("What is it?")
    assert len(engine.calls) == 3


# -- what is never kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "fields", "budget", "why"),
    [
        ("one two three", {"sampling": Sampling(max_tokens=2)}, Budget(), "'length'"),
        ("one two three", {"sampling": Sampling(max_tokens=9)}, Budget(output=2), "budget"),
        ("one two three", {}, Budget(output=2), "budget"),
        (Reply("", tool_calls=(TOOL_CALL,), finish="tool_calls"), {"tools": (TOOL,)}, Budget(), "calls tools"),
        (Reply("fine", raw={"object": object()}), {}, Budget(), "JSON"),
        (Reply("fine", raw={"big": "x" * 20_000}), {}, Budget(), "more than the cache may have"),
    ],
)
async def test_not_kept(script: Any, fields: dict[str, Any], budget: Budget, why: str) -> None:
    world = Asking(ExactCache(megabytes=0.01), script, budget=budget)
    for _ in range(2):
        answer = await world.ask(account=Account("ann"), **fields)
        assert not own(answer).fired and "not kept" in own(answer).reason and why in own(answer).reason
    assert world.calls == 2


async def test_errors_and_what_was_cancelled_are_not_kept() -> None:
    world = Asking()
    world.engine.fail_after = 2
    with pytest.raises(EngineError):
        await world.ask()
    world.engine.fail_after, world.engine.delay = None, 0.01
    task = asyncio.ensure_future(world.ask())
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    world.engine.delay = 0.0
    assert (await world.ask()).finish == "stop" and world.calls == 3
    await world.ask()
    assert world.calls == 3 and not world.account.held


async def test_a_call_that_asks_for_a_new_draw_or_cannot_be_written_passes() -> None:
    world = Asking()
    for fields in ({"sampling": Sampling(temperature=0.7)}, {"extra": {"object": object()}}):
        for _ in range(2):
            answer = await world.ask(**fields)
            assert not own(answer).fired and "kept" not in own(answer).reason
    assert world.calls == 4
    bold = Asking(ExactCache(sampled=True))
    for _ in range(2):
        await bold.ask(sampling=Sampling(temperature=0.7))
    assert bold.calls == 1


async def test_tool_calls_are_kept_when_asked_for() -> None:
    script = Reply("", tool_calls=(TOOL_CALL,), finish="tool_calls")
    world = Asking(ExactCache(tool_calls=True), script)
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    await world.ask(tools=(TOOL,))
    answer = await world.ask(tools=(TOOL,), emit=emit)
    assert world.calls == 1 and answer.finish == "tool_calls" and answer.tool_calls == (TOOL_CALL,)
    assert [d.tool_calls for d in deltas if d.tool_calls] == [(TOOL_CALL,)]


# -- streams, budgets, time ------------------------------------------------------------------------------------


async def test_a_hit_streams_as_an_engine_does() -> None:
    world = Asking()
    for _ in range(2):
        deltas: list[Delta] = []

        async def emit(delta: Delta, deltas: list[Delta] = deltas) -> None:
            deltas.append(delta)

        answer = await world.ask(emit=emit, sampling=Sampling(logprobs=True))
        assert "".join(d.text for d in deltas) == answer.text
        assert "".join(d.thinking for d in deltas) == answer.thinking != ""
        assert len([d for d in deltas if d.text]) > 1, "in pieces"
        assert sum((d.logprobs for d in deltas), ()) == (answer.logprobs or ())
        assert [d.finish for d in deltas if d.finish] == ["stop"] and deltas[-1].answer == answer
    assert world.calls == 1 and own(answer).fired


@pytest.mark.parametrize("text", ["", " ", "one", "a  b\n\nc d e f g\t", "\u3053\u3093\u306b\u3061\u306f", "x" * 5000])
def test_pieces_are_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text


async def test_a_stream_that_nobody_reads_to_its_end_is_kept_all_the_same_only_when_it_is_whole() -> None:
    world = Asking()

    async def hang_up(delta: Delta) -> None:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await world.ask(emit=hang_up)
    await world.ask()
    assert world.calls == 2 and not world.account.held


async def test_an_answer_is_free_where_the_budget_is_spent_but_not_after_the_deadline() -> None:
    world = Asking()
    first = await world.ask(account=(tight := Account("ann", Budget(output=60))))
    tight.hold(Spend(output=60 - first.spend.output))
    assert (await world.ask(account=tight)).text == first.text
    with pytest.raises(BudgetExceeded):
        await world.ask("Something else", account=tight)
    late = Account("ann", Budget(deadline=0.01))
    await asyncio.sleep(0.02)
    with pytest.raises(BudgetExceeded, match="deadline"):
        await world.ask(account=late)


async def test_old_answers_and_those_least_used_go(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    world = Asking(ExactCache(seconds=60, entries=2))
    await world.ask("a")
    now += 59
    assert own(await world.ask("a")).detail["age"] == 59
    now += 2
    assert not own(await world.ask("a")).fired, "a use does not make it younger"
    await world.ask("b")
    await world.ask("a")
    await world.ask("c")  # b was used longest ago
    assert world.calls == 4
    await world.ask("a")
    assert world.calls == 4
    await world.ask("b")
    assert world.calls == 5


async def test_each_method_object_has_its_own_memory() -> None:
    one, two = Asking(), Asking()
    await one.ask()
    await two.ask()
    assert two.calls == 1 and one.pipeline.plan == two.pipeline.plan
    off = Asking(ExactCache(entries=0))
    for _ in range(2):
        await off.ask()
    assert off.calls == 2


# -- files -----------------------------------------------------------------------------------------------------


async def test_a_file_serves_the_next_process(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.db")
    first = Asking(ExactCache(path=path))
    answer = await first.ask(sampling=Sampling(logprobs=True))
    second = Asking(ExactCache(path=path))
    again = await second.ask(sampling=Sampling(logprobs=True))
    assert second.calls == 0 and (again.text, again.thinking, again.tokens, again.logprobs, again.parsed) == (
        answer.text,
        answer.thinking,
        answer.tokens,
        answer.logprobs,
        answer.parsed,
    )


async def test_a_file_that_is_no_cache_fails_before_anything_is_spent(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("milk " * 1000)
    world = Asking(ExactCache(path=str(file)))
    with pytest.raises(InvalidInput, match="no response cache"):
        await world.ask()
    assert not world.calls and not world.account.settled


async def test_a_file_that_breaks_while_the_engine_works_costs_only_the_keeping(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"

    def breaking(call: Call, draw: Draw) -> Reply:
        with sqlite3.connect(path) as db:
            db.execute("DROP TABLE answers")
        db.close()
        return Reply("fine")

    world = Asking(ExactCache(path=str(path)), breaking)
    answer = await world.ask()
    assert answer.text == "fine" and "not kept" in own(answer).reason and "no such table" in own(answer).reason
    world.engine.script = "again"
    answer = await world.ask()
    assert answer.text == "again" and not own(answer).fired and "no such table" in own(answer).reason
