"""Racing: p values against exact ones, the promised level by simulation, and what must never be dropped."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from thrifty import InvalidInput
from thrifty.bench.stats import mcnemar
from thrifty.tune.racing import cuts, means, p_less, race


def test_p_values_are_the_sign_tests_on_single_scores() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 2, 14), rng.integers(0, 2, 14)
        (p,) = p_less((a - b).astype(float)[None])
        found = mcnemar(a, b)
        if found.plan_only < found.reference_only:
            assert p == pytest.approx(found.exact / 2)
        down, up = found.reference_only, found.plan_only
        assert p == pytest.approx(sum(math.comb(up + down, k) for k in range(up + 1)) / 2 ** (up + down))


def test_p_values_are_students_on_other_numbers_and_never_below_what_signs_can_show() -> None:
    rng = np.random.default_rng(1)
    d = rng.normal(-0.3, 1.0, size=(6, 15))
    assert p_less(d) == pytest.approx([stats.ttest_1samp(row, 0, alternative="less").pvalue for row in d])
    assert p_less(np.full((1, 6), -7.5)).tolist() == [0.5**6], "a constant difference"
    assert p_less(np.full((1, 6), 7.5)).tolist() == [1.0]
    assert p_less(np.zeros((1, 6)) + 0.0).tolist() == [1.0]
    tight = -5 + 1e-3 * rng.normal(size=(1, 5))
    # The exact sign-flip test has one sign pattern of 32 that is as extreme.
    sums = [np.dot(signs, tight[0]) for signs in product((1, -1), repeat=5)]
    assert p_less(tight)[0] == pytest.approx(np.mean(np.array(sums) <= tight.sum() + 1e-12))


def test_what_is_missing_is_left_out_of_a_pair() -> None:
    rng = np.random.default_rng(2)
    d = rng.normal(-0.5, 1.0, size=12)
    holes = np.insert(d, [0, 5, 12], math.nan)
    assert p_less(holes[None]) == pytest.approx(p_less(d[None]))
    assert p_less(np.array([[math.nan, -3.0]])).tolist() == [1.0]
    assert p_less(np.full((1, 3), math.nan)).tolist() == [1.0]
    assert means(np.array([[1.0, math.nan, 3.0]])).tolist() == [2.0]


def test_a_plan_that_is_worse_and_dearer_is_dropped_and_told_by_which() -> None:
    n = 20
    scores = np.array([np.ones(n), np.ones(n), np.zeros(n), np.zeros(n)])
    costs = np.array([np.full(n, 10.0), np.full(n, 5.0), np.full(n, 8.0), np.full(n, 1.0)])
    (drop,) = race(scores, costs, [0, 1, 2, 3], level=0.05, looks=2)
    assert (drop.plan, drop.by, drop.groups) == (2, 1, n)
    assert drop.p_score == drop.p_axis == 0.5**n
    assert race(scores[:, :6], costs[:, :6], [0, 1, 2, 3], level=0.05, looks=2) == [], "2^-6 > 0.05 / (2 * 3)"
    assert race(scores[:, :7], costs[:, :7], [0, 1, 2, 3], level=0.05, looks=2), "2^-7 < 0.05 / (2 * 3)"
    assert race(scores, costs, [0, 1, 3], level=0.05, looks=2) == []


def test_the_reference_is_never_dropped() -> None:
    n = 30
    scores, costs = np.array([np.zeros(n), np.ones(n)]), np.array([np.full(n, 9.0), np.ones(n)])
    assert race(scores, costs, [0, 1], level=0.05, looks=1) == []
    assert [d.plan for d in race(scores, costs, [0, 1], level=0.05, looks=1, keep=())] == [0]


def test_a_dearer_plan_that_is_not_better_by_the_slack_goes_too() -> None:
    rng = np.random.default_rng(3)
    n = 400
    base = rng.random(n) * 0.5
    scores, costs = np.array([base, base + 0.01, base + 0.3]), np.array([np.ones(n), np.full(n, 2.0), np.full(n, 3.0)])
    scores += 0.02 * rng.random((3, n))
    assert race(scores, costs, [0, 1, 2], level=0.05, looks=1, keep=()) == []
    assert [d.plan for d in race(scores, costs, [0, 1, 2], level=0.05, looks=1, slack=0.1, keep=())] == [1]


@pytest.mark.parametrize("binary", [True, False])
def test_undominated_plans_are_seldom_dropped(binary: bool) -> None:
    """Eight plans of equal mean score and cost: none is dominated. Three looks, 400 races; the promise is 5% a plan,
    and the two tests must both fail at once, so far fewer are lost."""
    rng = np.random.default_rng(4)
    lost = 0
    for _ in range(400):
        scores = rng.integers(0, 2, (8, 32)).astype(float) if binary else rng.beta(2, 2, (8, 32))
        costs = rng.gamma(4.0, 10.0, (8, 32))
        alive = list(range(8))
        for end in (8, 16, 32):
            gone = {d.plan for d in race(scores[:, :end], costs[:, :end], alive, level=0.05, looks=3)}
            alive = [i for i in alive if i not in gone]
        lost += 8 - len(alive)
    assert lost <= 0.05 * 400 * 7


def test_on_the_edge_of_dominance_the_level_is_kept() -> None:
    """One rival that costs clearly less and scores the same: only the score's test protects the plan."""
    rng = np.random.default_rng(5)
    lost = 0
    for _ in range(800):
        scores = rng.integers(0, 2, (2, 32)).astype(float)
        costs = np.array([np.ones(32), np.full(32, 5.0)])
        for end in (8, 16, 32):
            if race(scores[:, :end], costs[:, :end], [0, 1], level=0.15, looks=3, keep=()):
                lost += 1
                break
    assert 0.02 * 800 < lost <= 0.15 * 800


def test_rounds_grow_and_end_with_all() -> None:
    assert cuts(50, 8, 2.0) == [8, 16, 32, 50]
    assert cuts(8, 8, 2.0) == cuts(8, 20, 2.0) == [8]
    assert cuts(9, 8, 2.0) == [9], "a last round of one group is not worth a look"
    for groups in range(1, 200):
        ends = cuts(groups, 4, 1.5)
        assert ends[-1] == groups and ends == sorted(set(ends))
    with pytest.raises(InvalidInput, match="growth = 1"):
        cuts(5, 2, 1)


def test_settings_out_of_range_are_refused() -> None:
    table = np.zeros((2, 3))
    for bad in ({"level": 0.0, "looks": 1}, {"level": 0.1, "looks": 0}, {"level": 0.1, "looks": 1, "slack": -1}):
        with pytest.raises(InvalidInput, match="level"):
            race(table, table, [0, 1], **bad)  # type: ignore[arg-type]
