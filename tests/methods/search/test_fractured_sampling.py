"""Fractured Sampling: pass@k and the axes against counting all subsets; every cell asked for, billed and counted."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Plan, Sampling
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.search.fractured_sampling import (
    FracturedSampling,
    axis_points,
    chosen_depths,
    cut_words,
    pass_at_k,
)

BARE = PROVIDES - {"branch"}
THOUGHT = "one two three four five six seven eight"


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_counts_all_subsets(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_axes_are_means_over_traces(n: int, depths: int, m: int, rng) -> None:  # type: ignore[no-untyped-def]
    correct = [[[rng.random() < 0.4 for _ in range(m)] for _ in range(depths)] for _ in range(n)]
    solutions = [[[rng.randint(1, 9) for _ in range(m)] for _ in range(depths)] for _ in range(n)]
    thinking = [rng.randint(5, 50) for _ in range(n)]
    points = {(p.axis, p.size): p for p in axis_points(correct, thinking, solutions)}
    assert len(points) == n + depths + m
    one = sum(t + s[-1][0] for t, s in zip(thinking, solutions, strict=True)) / n
    for k in range(1, n + 1):
        groups = list(itertools.combinations(range(n), k))
        assert points["n", k].passed == pytest.approx(
            sum(any(correct[i][-1][0] for i in g) for g in groups) / len(groups)
        )
        assert points["n", k].tokens == pytest.approx(k * one)
    assert (points["H", 1].tokens, points["H", 1].passed) == (points["m", 1].tokens, points["m", 1].passed)
    assert points["H", depths].tokens == pytest.approx(
        sum(t + sum(row[0] for row in s) for t, s in zip(thinking, solutions, strict=True)) / n
    )
    assert points["m", m].passed == pytest.approx(sum(any(c[-1]) for c in correct) / n)
    passed = [points["m", size].passed for size in range(1, m + 1)]
    assert passed == sorted(passed)


@given(st.integers(1, 40), st.data())
def test_depths_end_with_the_whole_trace_and_prefixes_grow(depths: int, data: st.DataObject) -> None:
    h = data.draw(st.integers(1, depths))
    chosen = chosen_depths(depths, h)
    assert chosen[-1] == depths - 1 and len(set(chosen)) == h and chosen[0] >= 0
    cuts = [cut_words(THOUGHT, d, depths) for d in range(1, depths + 1)]
    assert cuts[-1] == THOUGHT and all(b.startswith(a) for a, b in itertools.pairwise(cuts))
    assert [len(c.split()) for c in cuts] == [d * 8 // depths for d in range(1, depths + 1)]


def think(call: Call, draw: Draw) -> Reply:
    """Thinks eight words; from a cut it says how many words of it there were."""
    if call.prefix:
        words = call.prefix.removeprefix("<think>").removesuffix("</think>\n\n").split()
        return Reply(f"#### {len(words)}")
    return Reply("#### 8", thinking=THOUGHT)


def world(
    budget: Budget | None = None,
    forks: bool = True,
    script: object = think,
    capabilities: frozenset[str] = PROVIDES,
    on_exceed: str = "degrade",
    **knobs: object,
):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine(script, capabilities=capabilities if forks else capabilities - {"branch"})  # type: ignore[arg-type]
    plan = Plan("frac", (FracturedSampling(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return (
        engine,
        plan.build({"answer": engine, "scorer": ScriptedEngine("Is the solution correct? yes")}),
        Account("t", ledger=MemoryLedger()),
    )


async def ask(pipeline, account, **sampling: object):  # type: ignore[no-untyped-def]
    return await pipeline.ask("one two three", account, sampling=Sampling(seed=3, **sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize(("n", "depths", "m"), [(2, 4, 1), (1, 2, 3), (3, 1, 2), (2, 3, 2), (4, 1, 1)])
async def test_every_cell_is_drawn_once_and_thinking_is_output_once(forks: bool, n: int, depths: int, m: int) -> None:
    engine, pipeline, account = world(forks=forks, traces=n, depths=depths, solutions=m)
    answer = await ask(pipeline, account)
    assert answer.receipts[-1].after == n * depths * m
    assert answer.spend.output == n * 8 + n * depths * m * 2  # "#### 8" is two words
    assert answer.spend.reasoning == n * 8
    assert answer.spend == account.settled and not account.held
    cut = [c.prefix for c in engine.calls if c.prefix]
    expected = {f"<think>{cut_words(THOUGHT, d, depths)}</think>\n\n" for d in range(1, depths + 1)}
    assert set(cut) == (expected if m > 1 else {p for p in expected if THOUGHT not in p})


async def test_majority_over_the_cells() -> None:
    engine, pipeline, account = world(traces=1, depths=4, solutions=2)
    answer = await ask(pipeline, account)
    assert answer.text == "#### 8" and answer.receipts[-1].detail["votes"] == [
        2,
        2,
        2,
        2,
    ]  # the trace's own comes first

    def early(call: Call, draw: Draw) -> Reply:
        return Reply("#### 5") if call.prefix else Reply("#### 8", thinking=THOUGHT)

    engine, pipeline, account = world(traces=1, depths=4, script=early)
    answer = await ask(pipeline, account)
    assert answer.text == "#### 5" and answer.thinking == "one two"  # what the winner had thought


async def test_agreement_stops_the_drawing() -> None:
    def sure(call: Call, draw: Draw) -> Reply:
        return Reply("#### 8", thinking="" if call.prefix else THOUGHT)

    engine, pipeline, account = world(traces=2, depths=16, script=sure, agree=4)
    answer = await ask(pipeline, account)
    assert answer.receipts[-1].after == 4 and "4 cells agree" in answer.receipts[-1].reason


@pytest.mark.parametrize("case", ["no thinking", "no continue"])
async def test_where_nothing_can_be_cut_traces_remain_and_the_receipt_says_so(case: str) -> None:
    script = "#### 8" if case == "no thinking" else think
    capabilities = PROVIDES - {"continue"} if case == "no continue" else PROVIDES
    engine, pipeline, account = world(script=script, capabilities=capabilities, traces=2, depths=4)
    answer = await ask(pipeline, account)
    assert answer.receipts[-1].after == 2
    assert ("no thinking to cut" if case == "no thinking" else "traces only") in answer.receipts[-1].reason


async def test_a_verifier_may_choose() -> None:
    engine, pipeline, account = world(traces=1, depths=2, select="verifier")
    answer = await ask(pipeline, account)
    assert answer.receipts[-1].detail["verified"] == 2 and answer.receipts[-1].spend
    assert answer.spend == account.settled


@pytest.mark.parametrize("forks", [True, False])
@given(
    st.sampled_from(["tokens", "output", "input", "calls"]), st.integers(0, 200), st.sampled_from(["degrade", "refuse"])
)
@settings(max_examples=50, deadline=None)
async def test_no_budget_is_exceeded(forks: bool, resource: str, limit: int, on_exceed: str) -> None:
    limit = limit // 12 if resource == "calls" else limit
    engine, pipeline, account = world(
        Budget(**{resource: limit}), forks, on_exceed=on_exceed, traces=2, depths=3, solutions=2
    )
    try:
        answer = await ask(pipeline, account, max_tokens=30)
    except BudgetExceeded as error:
        assert error.resource == resource
    else:
        assert answer.spend == account.settled
    assert getattr(account.settled, resource) <= limit and not account.held and not account.overdraft


def test_bad_input() -> None:
    for knobs in ({"traces": 0}, {"depths": 0}, {"solutions": 0}, {"opening": ""}):
        with pytest.raises(InvalidInput, match=next(iter(knobs))):
            FracturedSampling(**knobs)  # type: ignore[arg-type]
    for bad in ((0, 0, 1), (3, 4, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(InvalidInput):
            pass_at_k(*bad)
    with pytest.raises(InvalidInput):
        axis_points([[[True]]], [1, 2], [[[1]]])
