"""What searches share: seeds, votes, shares of an account, and calls side by side."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, EngineError
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.search._samples import (
    how_many_fit,
    last_number,
    marked_answer,
    normal,
    seed_of,
    shares,
    side_by_side,
    vote_of,
    winner_of,
)


def test_seeds_differ_and_fit_into_31_bits() -> None:
    seeds = [seed_of(123, i) for i in range(200)]
    assert seeds[0] == 123 and len(set(seeds)) == 200
    assert all(isinstance(s, int) and 0 <= s < 2**31 for s in seeds[1:])
    assert seed_of(124, 1) != seed_of(123, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x #### 12 apples\nbye", "12 apples"),
        ("a #### 1 #### 2", "2"),
        (r"so \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{3}", "3"),
        ("The answer is 7.\nIndeed.", "7."),
        ("Answer: Paris", "Paris"),
        ("answer is 3, no, the final answer is 4", "4"),
        ("I have no answers today", None),
        ("", None),
    ],
)
def test_marked_answers(text: str, expected: str | None) -> None:
    assert marked_answer(text) == expected


@pytest.mark.parametrize(
    "same",
    [
        ["1200", "1,200", "$1,200.00.", " 1200.0 ", "+1200"],
        ["Paris", "paris.", " **Paris** ", "PARIS!"],
        ["0.5", ".5", "0.50"],
        ["0", "-0", "0.0"],
        ["50", "50%"],
    ],
)
def test_normal_forms_that_agree(same: list[str]) -> None:
    assert len({normal(text) for text in same}) == 1


@given(st.integers(-(10**12), 10**12))
def test_whole_numbers_keep_their_value(value: int) -> None:
    assert normal(f"{value:,}.00") == normal(str(value)) == str(value)
    assert last_number(f"first 3, then x = {value:,}.") == str(value)


def test_numbers_that_are_not_there() -> None:
    assert last_number("v1.2.x no") is None or last_number("none") is None
    assert last_number("none") is None
    assert normal("-") == "-"


@pytest.mark.parametrize(
    ("answer", "parse", "vote"),
    [
        (Answer("a #### 8"), "auto", "8"),
        (Answer("long text", parsed="8.0"), "auto", "8"),
        (Answer("so 6 * 7 is 42"), "auto", "42"),
        (Answer("so 6 * 7 is 42", finish="length"), "auto", None),
        (Answer("#### 42 and", finish="length"), "auto", "42"),
        (Answer("so 6 * 7 is 42", finish="length"), "number", "42"),
        (Answer("#### $1,200 per month."), "auto", "1200"),
        (Answer("#### 12 or 13"), "auto", "12 or 13"),
        (Answer("The answer is 12 apples."), "auto", "12"),
        (Answer("Red."), "auto", "red"),
        (Answer("Red 5."), "text", "red 5"),
        (Answer(""), "auto", None),
        (Answer(""), "text", None),
        (Answer("", tool_calls=({"id": "x", "function": {"name": "f"}},)), "auto", '[{"name": "f"}]'),
    ],
)
def test_votes(answer: Answer, parse: str, vote: str | None) -> None:
    assert vote_of(answer, parse) == vote


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9))
def test_the_winner_by_counting(votes: list[str | None]) -> None:
    said = [v for v in votes if v is not None]
    at = winner_of(votes)
    if not said:
        assert at == 0
        return
    most = max(said.count(v) for v in said)
    leaders = [v for v in said if said.count(v) == most]
    assert votes[at] == leaders[0] and at == votes.index(leaders[0])


def call_on(budget: Budget, script: str = "one two three", **engine: object) -> Call:
    account = Account("t", budget)
    scripted = ScriptedEngine(script, **engine)  # type: ignore[arg-type]
    return Call(({"role": "user", "content": "a b c d"},), account, engines={"answer": scripted})


@pytest.mark.parametrize(
    ("budget", "fits"),
    [
        (Budget(), 8),
        (Budget(calls=3), 3),
        (Budget(input=11), 2),
        (Budget(output=25), 2),
        (Budget(tokens=45), 3),
        (Budget(output=1), 1),
        (Budget(usd=5), 8),
    ],
)
def test_how_many_samples_of_ten_tokens_fit(budget: Budget, fits: int) -> None:
    assert how_many_fit(call_on(budget), 8, 10) == fits


def test_a_plan_that_refuses_asks_for_all() -> None:
    assert how_many_fit(replace(call_on(Budget(calls=1)), on_exceed="refuse"), 8) == 8


def test_shares_are_equal_and_come_back() -> None:
    call = call_on(Budget(output=10, calls=3))
    parts = shares(call, 0, 3)
    assert [p.budget.output for p in parts] == [4, 3, 3] and call.account.remaining()["output"] == 0
    for part in parts:
        part.close()
    assert call.account.remaining() == {"output": 10, "calls": 3} and not call.account.held


class Below:
    """The layer below, over one engine."""

    def __init__(self, call: Call) -> None:
        self.engine = call.engines["answer"]

    async def __call__(self, call: Call) -> Answer:
        return await self.engine.generate(call)

    async def open(self, call: Call):  # type: ignore[no-untyped-def]
        return await self.engine.open(call)


async def test_side_by_side_cancels_the_rest_and_settles_them() -> None:
    call = call_on(Budget())
    engine = ScriptedEngine(lambda c, d: "w " * (5 if c.sampling.seed == 1 else 500))
    call = Call(call.messages, call.account, engines={"answer": engine})
    calls = [call.with_sampling(seed=s) for s in (0, 1, 2)]
    results = await side_by_side(Below(call), calls, lambda came: len(came) == 1)
    assert [r is None for r in results] == [True, False, True]
    assert not call.account.held and call.account.settled.calls == 3
    assert call.account.settled.output < 60


async def test_side_by_side_raises_what_is_not_a_budget() -> None:
    call = call_on(Budget(), fail_after=2)
    with pytest.raises(EngineError):
        await side_by_side(Below(call), [call, call], lambda came: False)
    assert not call.account.held


async def test_side_by_side_keeps_what_the_budget_allowed() -> None:
    call = call_on(Budget(calls=1))
    results = await side_by_side(Below(call), [call, call], lambda came: False)
    assert sorted(r is None for r in results) == [False, True]
    with pytest.raises(BudgetExceeded):
        await side_by_side(Below(call), [call], lambda came: False)


async def test_side_by_side_leaves_nothing_running_when_cancelled() -> None:
    call = call_on(Budget(), "w " * 1000)
    task = asyncio.ensure_future(side_by_side(Below(call), [call, call], lambda came: False))
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not call.account.held and call.account.settled.calls == 2
