"""First Finish Search: what a race costs against the definition, who counts as finished, and the pilot's
statistics."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Plan, Sampling
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedBranch, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.search._samples import seed_of
from thrifty.methods.search.first_finish_search import (
    FirstFinishSearch,
    normal_minimum,
    p_correct_normal,
    p_correct_shortest,
)

BARE = PROVIDES - {"branch"}


class Watched(ScriptedEngine):
    """Remembers its branches. Its replies are given by row: the row's seed says which."""

    def __init__(self, rows: list[str | Reply], seed: int = 3, **options: object) -> None:
        self.by_seed = {seed_of(seed, i): row for i, row in enumerate(rows)}
        super().__init__(self.row, **options)  # type: ignore[arg-type]
        self.branches: list[ScriptedBranch] = []

    def row(self, call: Call, draw: Draw) -> str | Reply:
        return self.by_seed[call.sampling.seed]

    async def open(self, call: Call) -> ScriptedBranch:
        branch = await super().open(call)
        self.branches.append(branch)
        fork = branch.fork

        def watched(seed: int | None = None) -> ScriptedBranch:
            twin = fork(seed)
            self.branches.append(twin)
            return twin

        branch.fork = watched  # type: ignore[method-assign]
        return branch


def words(n: int, end: str = "") -> str:
    return " ".join(["w"] * (n - 1) + [end or "end"])


def world(  # type: ignore[no-untyped-def]
    rows: list[str | Reply],
    budget: Budget | None = None,
    on_exceed: str = "degrade",
    branches: bool = True,
    **knobs: object,
):
    engine = Watched(rows, capabilities=PROVIDES if branches else BARE)
    knobs.setdefault("samples", len(rows))
    plan = Plan("ffs", (FirstFinishSearch(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build(engine), Account("t", ledger=MemoryLedger())


async def ask(pipeline, account, **sampling: object):  # type: ignore[no-untyped-def]
    return await pipeline.ask("one two three", account, sampling=Sampling(seed=3, **sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [(9, 4, 7), (4, 4, 4), (1, 5, 5), (12, 11, 10, 2, 30)])
async def test_a_race_stops_at_the_shortest_and_bills_n_times_it(lengths: tuple[int, ...]) -> None:
    engine, pipeline, account = world([words(n, f"r{i}") for i, n in enumerate(lengths)])
    answer = await ask(pipeline, account)
    n, shortest = len(lengths), min(lengths)
    assert answer.text == words(shortest, f"r{lengths.index(shortest)}")
    assert answer.spend.output == n * shortest
    assert answer.spend.input == n * 3 and answer.spend.cached == (n - 1) * 3
    receipt = answer.receipts[-1]
    assert receipt.fired and receipt.detail == {
        "sequential": shortest,
        "total": n * shortest,
        "lengths": [shortest] * n,
    }
    assert answer.spend == account.settled and not account.held
    assert len(engine.branches) == n and all(branch.closed for branch in engine.branches)


@given(st.lists(st.integers(1, 25), min_size=2, max_size=6), st.data())
@settings(max_examples=30, deadline=None)
async def test_ffs_at_k_bills_each_row_up_to_the_kth_finish(lengths: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(lengths)))
    engine, pipeline, account = world([words(n, f"#### {i % 2}") for i, n in enumerate(lengths)], finishers=k)
    answer = await ask(pipeline, account)
    kth = sorted(lengths)[k - 1]
    extra = 1  # "#### 0" is two words
    assert answer.spend.output == sum(min(n + extra, kth + extra) for n in lengths)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))[:k]
    votes = [i % 2 for i in order]
    best = max(votes.count(v) for v in votes)
    winner = next(v for v in votes if votes.count(v) == best)
    assert answer.text.endswith(f"#### {winner}")


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("false_finish", [Reply("w w", finish="length"), Reply("", thinking="hm hm"), Reply("  ")])
async def test_what_is_no_finish(branches: bool, false_finish: Reply) -> None:
    """A truncated row, one that ends inside its thinking, one that says nothing."""
    engine, pipeline, account = world([false_finish, words(9, "yes"), words(30)], branches=branches)
    answer = await ask(pipeline, account)
    assert answer.text == words(9, "yes") and answer.finish == "stop"
    assert answer.receipts[-1].fired and "1 finished" in answer.receipts[-1].reason


@pytest.mark.parametrize("branches", [True, False])
async def test_when_none_finishes_the_first_row_is_returned(branches: bool) -> None:
    engine, pipeline, account = world([words(20, "a"), words(30, "b")], branches=branches)
    answer = await ask(pipeline, account, max_tokens=6)
    assert answer.text == "w w w w w w" and answer.finish == "length"
    assert not answer.receipts[-1].fired and "none ended properly" in answer.receipts[-1].reason
    assert answer.spend.output == 12


async def test_a_race_to_the_end_of_thinking() -> None:
    rows: list[str | Reply] = [
        "<think> a a a a a a </think> long #### 1",
        "<think> a </think> the winner then writes this alone #### 2",
        "<think> a a a </think> #### 3",
    ]
    engine, pipeline, account = world(rows, finish="thinking")
    answer = await ask(pipeline, account)
    assert answer.text.endswith("#### 2") and answer.thinking.strip() == "a"
    winner = len(rows[1].split())  # type: ignore[union-attr]
    assert answer.spend.output == winner + 3 + 3  # the losers stop when the winner has closed its block


async def test_engines_without_branches_cancel_the_losers() -> None:
    engine, pipeline, account = world([words(400), words(5, "first"), words(300)], branches=False)
    answer = await ask(pipeline, account)
    assert answer.text == words(5, "first")
    assert answer.spend == account.settled and answer.spend.calls == 3
    assert 5 <= answer.spend.output < 60  # cancelled soon after, and what they produced is counted
    assert not account.held
    assert sum(answer.receipts[-1].detail["lengths"]) == answer.spend.output


@pytest.mark.parametrize("branches", [True, False])
async def test_majority_of_k_calls(branches: bool) -> None:
    rows: list[str | Reply] = [
        words(3, "#### 1"),
        words(5, "#### 2"),
        words(7, "#### 2"),
        words(90, "#### 1"),
    ]
    engine, pipeline, account = world(rows, finishers=3, branches=branches)
    answer = await ask(pipeline, account)
    assert answer.text == words(5, "#### 2")


async def test_seeds_temperature_and_top_p_of_the_rows() -> None:
    engine, pipeline, account = world([words(3), words(4)], branches=False)
    await ask(pipeline, account, temperature=0.0)
    assert {(c.sampling.temperature, c.sampling.top_p) for c in engine.calls} == {(0.6, 0.95)}
    assert [c.sampling.seed for c in engine.calls] == [3, seed_of(3, 1)]


# -- budgets -------------------------------------------------------------------------------------------------


async def test_fewer_rows_race_when_the_budget_holds_no_more() -> None:
    rows: list[str | Reply] = [words(9), words(8), words(2), words(2)]
    engine, pipeline, account = world(rows, Budget(input=6))
    answer = await ask(pipeline, account)
    assert answer.text == words(8) and answer.spend.input == 6
    assert "no more than 2 of 4" in answer.receipts[-1].reason
    engine, strict, account = world(rows, Budget(input=6), "refuse")
    with pytest.raises(BudgetExceeded):
        await ask(strict, account)
    assert account.settled.input == 6 and not account.held and all(b.closed for b in engine.branches)


async def test_refuse_raises_when_a_fork_does_not_fit() -> None:
    engine, pipeline, account = world([words(9), words(8)], Budget(output=300), "refuse")
    with pytest.raises(BudgetExceeded):
        await ask(pipeline, account, max_tokens=200)
    assert not account.held and all(branch.closed for branch in engine.branches)


async def test_the_race_ends_early_and_leaves_the_first_row_its_answer() -> None:
    """400 tokens, 4 rows of 300: alone together they would starve at 100 each, none with an answer."""
    rows: list[str | Reply] = [words(n, "done") for n in (150, 300, 300, 300)]
    engine, pipeline, account = world(rows, Budget(output=400))
    answer = await ask(pipeline, account)
    assert answer.text == words(150, "done") and answer.finish == "stop"
    assert "the race ended early" in answer.receipts[-1].reason
    assert answer.spend.output <= 400 and not account.held
    engine, pipeline, account = world(rows, Budget(output=400), keep=0)
    assert (await ask(pipeline, account)).finish == "budget"


async def test_one_row_is_no_race() -> None:
    engine, pipeline, account = world([words(9), words(2)], Budget(output=70))
    answer = await ask(pipeline, account)
    assert answer.text == words(9) and not answer.receipts[-1].fired
    assert "the budget holds no race" in answer.receipts[-1].reason


def test_more_finishers_than_rows_are_refused() -> None:
    with pytest.raises(InvalidInput, match="finishers = 5 is above samples = 4"):
        FirstFinishSearch(finishers=5)


# -- the pilot -----------------------------------------------------------------------------------------------

trace = st.tuples(st.integers(1, 6), st.booleans())


@given(st.lists(trace, min_size=1, max_size=7), st.data())
@settings(deadline=None)
def test_shortest_of_n_by_trying_every_choice(traces: list[tuple[int, bool]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(traces)))
    chances, lengths = [], []
    for chosen in itertools.combinations(traces, n):
        shortest = min(length for length, _ in chosen)
        tied = [correct for length, correct in chosen if length == shortest]
        chances.append(sum(tied) / len(tied))
        lengths.append(shortest)
    pilot = p_correct_shortest(traces, n)
    assert pilot.sequential == pytest.approx(np.mean(lengths))
    assert pilot.total == pytest.approx(n * np.mean(lengths))
    assert pilot.correct == pytest.approx(np.mean(chances))


def test_one_sample_is_the_mean_and_too_many_are_refused() -> None:
    pilot = p_correct_shortest([(5, True), (5, False), (9, True), (9, False)], 1)
    assert (pilot.correct, pilot.sequential, pilot.total) == (0.5, 7, 7)
    for n in (0, 5):
        with pytest.raises(InvalidInput, match="from 1 to 4"):
            p_correct_shortest([(1, True)] * 4, n)


@pytest.mark.parametrize(
    ("n", "exact"),
    [
        (1, 0.0),
        (2, -1 / math.sqrt(math.pi)),
        (3, -1.5 / math.sqrt(math.pi)),
        (4, -1.0293753730),
        (5, -1.1629644736),
    ],
)
def test_the_minimum_of_normals_from_tables(n: int, exact: float) -> None:
    assert normal_minimum(n) == pytest.approx(exact, abs=1e-9)


def test_the_minimum_of_many_normals_against_quadrature() -> None:
    for n in (8, 64, 256):
        mean, _ = integrate.quad(lambda x, n=n: n * x * stats.norm.pdf(x) * stats.norm.sf(x) ** (n - 1), -12, 12)
        assert normal_minimum(n) == pytest.approx(mean, abs=1e-8)


@pytest.mark.parametrize(
    ("p", "right", "wrong"),
    [
        (0.6, (100, 20), (130, 20)),
        (0.5, (100, 10), (110, 60)),
        (0.2, (300, 50), (200, 5)),
        (0.9, (50, 5), (50, 5)),
    ],
)
def test_the_resampled_pilot_meets_the_normal_law(
    p: float, right: tuple[float, float], wrong: tuple[float, float]
) -> None:
    rng = np.random.default_rng(1)
    correct = rng.random(20_000) < p
    lengths = np.where(correct, rng.normal(*right, 20_000), rng.normal(*wrong, 20_000))
    traces = list(zip(lengths.tolist(), correct.tolist(), strict=True))
    for n in (1, 4, 8):
        assert p_correct_normal(p, right, wrong, n) == pytest.approx(p_correct_shortest(traces, n).correct, abs=0.025)


def test_equal_laws_give_no_gain_and_wide_wrong_lengths_a_loss() -> None:
    for n in (1, 2, 7, 32):
        assert p_correct_normal(0.37, (80, 9), (80, 9), n) == pytest.approx(0.37, abs=1e-9)
    wide = [p_correct_normal(0.7, (100, 10), (110, 80), n) for n in (1, 4, 16)]
    assert wide == sorted(wide, reverse=True) and wide[0] == pytest.approx(0.7)
    gain = [p_correct_normal(0.5, (100, 20), (160, 20), n) for n in (1, 4, 16)]
    assert gain == sorted(gain)


async def test_a_race_with_equal_length_laws_is_as_right_as_one_sample() -> None:
    """Over 200 seeds the winner is right as often as a single sample, within four standard errors."""
    right: dict[str, int] = defaultdict(int)
    for seed in range(200):
        engine = ScriptedEngine(lambda c, d: words(d.randint(3, 9), "#### " + ("yes" if d.random() < 0.6 else "no")))
        pipeline = Plan("ffs", (FirstFinishSearch(),)).build(engine)
        answer = await pipeline.ask("q", sampling=Sampling(seed=random.Random(seed).getrandbits(30)))
        right[answer.text.split()[-1]] += 1
    assert abs(right["yes"] / 200 - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 200)
