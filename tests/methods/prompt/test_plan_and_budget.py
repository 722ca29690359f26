"""Plan-and-Budget: allocation against definitions and brute force, the calls it makes, and what it does when
they fail."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Plan, Sampling, Spend
from thrifty.call import text_of
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.prompt.plan_and_budget import (
    DIRECT,
    SCHEDULES,
    Outline,
    PlanAndBudget,
    allocate_tokens,
    bam,
    decay,
    parse_credits,
    parse_outline,
    parse_steps,
    solve_prompt,
)

# -- schedules and allocation --------------------------------------------------------------------------------


def test_decays_by_hand() -> None:
    assert decay("constant", 3) == [1, 1, 1]
    assert decay("linear", 3) == [3, 2, 1]
    assert decay("polynomial", 3) == [9, 4, 1]
    assert decay("exponential", 3) == pytest.approx([1, 0.9, 0.81])
    assert decay("cosine", 3) == pytest.approx([1.1, 0.6, 0.1])
    assert all(decay(s, 1) == [1] for s in SCHEDULES)


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=6).filter(any),
    st.integers(0, 5000),
    st.sampled_from(SCHEDULES),
)
def test_parts_are_floors_and_the_rest_goes_to_the_largest_shares(
    credits: list[int], total: int, schedule: str
) -> None:
    parts = allocate_tokens(credits, total, schedule)
    assert sum(parts) == total
    # the definition again, in exact arithmetic on the same weights
    weights = [Fraction(c) * Fraction(d) for c, d in zip(credits, decay(schedule, len(credits)), strict=True)]
    shares = [total * w / sum(weights) for w in weights]
    for part, share in zip(parts, shares, strict=True):
        assert part in (math.floor(share), math.ceil(share), math.floor(share) + 1)
    given_one = [s for p, s in zip(parts, shares, strict=True) if p > s + Fraction(1, 10**6)]
    kept_floor = [s for p, s in zip(parts, shares, strict=True) if p < s - Fraction(1, 10**6)]
    assert not given_one or not kept_floor or min(given_one) >= max(kept_floor) - Fraction(1, 10**6)


@given(st.integers(1, 8), st.integers(0, 5000), st.sampled_from(SCHEDULES))
def test_equal_credits_never_rise(n: int, total: int, schedule: str) -> None:
    parts = allocate_tokens([1] * n, total, schedule)
    assert parts == sorted(parts, reverse=True)


def test_whole_shares_lose_nothing_to_rounding() -> None:
    for n, total in itertools.product(range(1, 7), range(0, 700, 7)):
        assert allocate_tokens([100 / n] * n, total * n, "constant") == [total] * n
    assert allocate_tokens([29, 71], 100, "constant") == [
        29,
        71,
    ]  # 0.29 * 100 is 28.999999999999996 in floats


def test_allocation_refuses_nonsense() -> None:
    for credits, total in (([], 5), ([0, 0], 5), ([-1, 2], 5), ([1], -1)):
        with pytest.raises(InvalidInput):
            allocate_tokens(credits, total)
    with pytest.raises(InvalidInput, match="sideways"):
        decay("sideways", 3)


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=5), st.floats(0.2, 3), st.floats(1, 5000))
def test_bam_with_one_exponent_is_the_closed_form(c: list[float], a: float, total: float) -> None:
    roots = [(a * x) ** (1 / (a + 1)) for x in c]
    assert bam(c, [a] * len(c), total) == pytest.approx([total * r / sum(roots) for r in roots], rel=1e-9)


def test_bam_equals_a_brute_force_grid() -> None:
    c, a, total = [3.0, 1.0, 8.0], [0.5, 1.0, 2.0], 60

    def loss(b: tuple[float, ...]) -> float:
        return sum(x / y**e for x, y, e in zip(c, b, a, strict=True))

    grid = [(i / 4, j / 4, total - (i + j) / 4) for i in range(1, 4 * total) for j in range(1, 4 * total - i)]
    best = min(grid, key=loss)
    ours = bam(c, a, total)
    assert sum(ours) == pytest.approx(total)
    assert loss(tuple(ours)) <= loss(best) + 1e-12
    assert ours == pytest.approx(best, abs=0.3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0.2, 20), st.floats(0.2, 3)), min_size=2, max_size=4), st.floats(10, 500))
def test_bam_with_mixed_exponents_against_a_numeric_optimum(parts: list[tuple[float, float]], total: float) -> None:
    c, a = [p[0] for p in parts], [p[1] for p in parts]
    ours = bam(c, a, total)
    assert sum(ours) == pytest.approx(total) and min(ours) > 0
    # at the optimum all marginal gains a c / b^(a+1) are equal
    gains = [e * x / b ** (e + 1) for x, e, b in zip(c, a, ours, strict=True)]
    assert max(gains) == pytest.approx(min(gains), rel=1e-6)

    def loss(logits: list[float]) -> float:
        top = max(logits)
        w = [math.exp(z - top) for z in logits]
        return sum(x / (total * y / sum(w)) ** e for x, y, e in zip(c, w, a, strict=True))

    found = minimize(loss, [0.0] * len(c), method="BFGS")
    mine = sum(x / b**e for x, e, b in zip(c, a, ours, strict=True))
    assert mine <= found.fun * (1 + 1e-6)


# -- reading replies -----------------------------------------------------------------------------------------


def test_steps_are_the_numbered_lines() -> None:
    assert parse_steps("Plan:\n1. A? (x)\n 2) B?\nthen\n3.C\n10. D") == ("A? (x)", "B?", "D")
    assert parse_steps("no plan") == ()
    assert len(parse_steps("\n".join(f"{i}. s" for i in range(1, 9)))) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"level": 3, "credits": [50, 50]}', (3, (50.0, 50.0))),
        ('```json\n{"level": 1, "credits": [1, 3]}\n``` {', (1, (25.0, 75.0))),
        ('{oops {"level": 1, "credits": [1, 3]}', (1, (25.0, 75.0))),
        ('{"level": 9, "credits": [50, 50]}', None),
        ('{"level": true, "credits": [50, 50]}', None),
        ('{"level": 3, "credits": [50, 25, 25]}', None),
        ('{"level": 3, "credits": [0, 0]}', None),
        ('{"level": 3, "credits": [-1, 2]}', None),
        ('{"level": 3, "credits": [NaN, 2]}', None),
        ('{"level": 3}', None),
        ("[1, 2]", None),
        ("{" * 5000, None),
    ],
)
def test_credits(text: str, expected: object) -> None:
    assert parse_credits(text, 2) == expected


def test_the_one_call_outline() -> None:
    good = '{"level": 2, "steps": [{"ask": "a\\n b", "credit": 1}, {"ask": "c", "credit": 3}]}'
    assert parse_outline(good) == Outline(2, ("a b", "c"), (25.0, 75.0))
    for bad in ('{"level": 2}', '{"level": 2, "steps": []}', '{"level": 2, "steps": [{"ask": ""}]}', "hello"):
        assert parse_outline(bad) is None


def test_the_solving_prompt_says_each_budget() -> None:
    said = solve_prompt(Outline(4, ("Add.", "Halve."), (50, 50)), [12, 1])
    assert "difficulty 4 of 5" in said
    assert (
        "1. Add. Think little: use at most 12 words for this step.\n2. Halve. Think little: use at most 1 word" in said
    )


# -- in a plan -----------------------------------------------------------------------------------------------

PLAN = "1. How many eggs? (count)\n2. How many break? (read)"
CREDITS = '{"level": 1, "credits": [75, 25]}'
BOTH = '{"level": 1, "steps": [{"ask": "How many eggs?", "credit": 75}, {"ask": "How many break?", "credit": 25}]}'


def world(*replies: str, budget: Budget | None = None, on_exceed: str = "degrade", **knobs: object):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine(list(replies))
    plan = Plan("pab", (PlanAndBudget(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build(engine), Account("t", ledger=MemoryLedger())


async def test_two_planning_calls_then_one_answer() -> None:
    engine, pipeline, account = world(PLAN, CREDITS, "12", schedule="constant")
    answer = await pipeline.ask("How many eggs are left?", account, sampling=Sampling(seed=4))
    plan, rate, solve = engine.calls
    assert [c.labels.method for c in engine.calls] == ["plan-and-budget", "plan-and-budget", ""]
    assert (plan.sampling.temperature, plan.sampling.top_p, plan.sampling.max_tokens) == (0.1, 0.9, 256)
    assert "How many eggs? (count)" in text_of(rate.messages[0])
    assert solve.messages[0]["content"] == solve_prompt(
        Outline(1, ("How many eggs? (count)", "How many break? (read)"), (75.0, 25.0)), [150, 50]
    )
    assert solve.messages[1] == {"role": "user", "content": "How many eggs are left?"}
    receipt = answer.receipts[-1]
    assert receipt.fired and receipt.detail["budgets"] == [150, 50]
    assert receipt.spend.calls == 2 and answer.spend.calls == 3 and answer.spend == account.settled


async def test_one_planning_call_says_the_same() -> None:
    engine, pipeline, account = world(BOTH, "12", schedule="constant", planning="one")
    answer = await pipeline.ask("How many eggs are left?", account)
    assert answer.receipts[-1].detail["budgets"] == [150, 50] and answer.spend.calls == 2


async def test_no_planning_call() -> None:
    engine, pipeline, account = world("12", planning="none", level=2)
    answer = await pipeline.ask("How many?", account)
    assert answer.receipts[-1].detail == {"level": 2, "credits": [100.0], "budgets": [250]}
    assert answer.receipts[-1].spend == Spend() and answer.spend.calls == 1


@pytest.mark.parametrize(
    ("replies", "knobs", "steps", "reason"),
    [
        (
            ("I can't.", '{"level": 5, "credits": [100]}', "12"),
            {},
            [600],
            "the plan could not be read: one step",
        ),
        (
            (PLAN, "no", "12"),
            {"schedule": "constant"},
            [175, 175],
            "the credits could not be read: equal ones at level 3",
        ),
        (
            ("no", "no", "12"),
            {},
            [350],
            "the plan could not be read: one step; the credits could not be read",
        ),
        (("no", "12"), {"planning": "one"}, [350], "the plan could not be read: one step"),
    ],
)
async def test_what_cannot_be_read_falls_back_and_is_told(
    replies: tuple[str, ...], knobs: dict[str, object], steps: list[int], reason: str
) -> None:
    engine, pipeline, account = world(*replies, **knobs)
    answer = await pipeline.ask("How many?", account)
    assert answer.text == "12" and reason in answer.receipts[-1].reason
    assert answer.receipts[-1].detail["budgets"] == steps
    assert len(steps) > 1 or DIRECT in text_of(engine.calls[-1].messages[0])


async def test_the_total_is_lowered_to_what_is_left() -> None:
    engine, pipeline, account = world(PLAN, CREDITS, "12", budget=Budget(output=200), unit="tokens")
    answer = await pipeline.ask("How many?", account)
    spent = answer.receipts[-1].spend.output
    assert sum(answer.receipts[-1].detail["budgets"]) == 200 - spent
    engine, pipeline, account = world(PLAN, CREDITS, "12")
    answer = await pipeline.ask("How many?", account, sampling=Sampling(max_tokens=39))
    assert sum(answer.receipts[-1].detail["budgets"]) == 30  # 39 tokens are 30 words
    assert "lowered from 200 to 30 words" in answer.receipts[-1].reason


async def test_planning_leaves_the_answer_its_room() -> None:
    """With 70 output tokens and 64 kept, planning has 6, and the answer gets its 64."""
    engine, pipeline, account = world("1. a b c d e f g h", "so " * 80, budget=Budget(output=70))
    answer = await pipeline.ask("How many?", account)
    planned, cut = answer.receipts
    assert planned.spend.output == 6 and "no budget (output) to ask for credits" in planned.reason
    assert cut.method == "budget" and answer.spend.output == 70 and len(answer.tokens or ()) == 64


@pytest.mark.parametrize("limit", [Budget(output=64), Budget(calls=1), Budget(input=30), Budget(tokens=66)])
async def test_no_room_to_plan(limit: Budget) -> None:
    engine, pipeline, account = world("12", budget=limit)
    answer = await pipeline.ask("How many?", account)
    assert answer.text == "12" and not answer.receipts[0].fired and "not planned" in answer.receipts[0].reason
    _, strict, account = world("12", budget=limit, on_exceed="refuse")
    with pytest.raises(BudgetExceeded):
        await strict.ask("How many?", account)
    assert not account.held


async def test_the_second_planning_call_is_refused() -> None:
    """Steps with equal credits, and what the first call cost is in receipt, answer and ledger."""
    engine, pipeline, account = world(PLAN, "12", budget=Budget(calls=2), schedule="constant")
    answer = await pipeline.ask("How many?", account)
    receipt = answer.receipts[0]
    assert receipt.fired and receipt.spend.calls == 1 and receipt.detail["budgets"] == [175, 175]
    assert answer.spend == account.settled and answer.spend.calls == 2
    _, strict, account = world(PLAN, "12", budget=Budget(calls=2), on_exceed="refuse")
    with pytest.raises(BudgetExceeded):
        await strict.ask("How many?", account)
    assert account.settled.calls == 1 and not account.held


def test_levels_must_be_five_and_rise() -> None:
    for levels in ((1, 2, 3), (5, 4, 3, 2, 1)):
        with pytest.raises(InvalidInput, match="five budgets, ascending"):
            PlanAndBudget(levels=levels)
    with pytest.raises(InvalidInput, match="levels"):
        PlanAndBudget.from_settings({"levels": [1, 2, 3, 4, 0]})


async def test_a_question_full_of_braces_is_asked_as_it_is() -> None:
    engine, pipeline, account = world(PLAN, CREDITS, "12")
    await pipeline.ask("What is {x} in {question}?", account)
    call: Call = engine.calls[0]
    assert "What is {x} in {question}?" in text_of(call.messages[0])
