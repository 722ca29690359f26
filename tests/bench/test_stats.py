"""Statistics against scipy, brute force, closed forms and simulation."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.bench import stats
from thrifty.errors import InvalidInput


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Intervals against scipy.


@pytest.mark.parametrize("successes, n", [(0, 1), (0, 20), (7, 20), (20, 20), (311, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_equals_scipy(successes: int, n: int, level: float) -> None:
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    ours = stats.wilson(successes, n, level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    as_mean = stats.mean([1] * successes + [0] * (n - successes), rng(), level=level)
    assert (as_mean.value, as_mean.low, as_mean.high, as_mean.method) == (ours.value, ours.low, ours.high, "Wilson")


def _scipy_percentile(
    data: tuple[np.ndarray, ...], statistic: object, n: int, level: float = 0.95
) -> tuple[float, float]:
    """scipy's percentile bootstrap at the level that the expansion asks for, with scipy's own t."""
    z = math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.5 + level / 2, n - 1)
    result = scipy.stats.bootstrap(data, statistic, paired=True, vectorized=True, method="percentile", batch=500,
                                   n_resamples=20_000, confidence_level=1 - 2 * scipy.stats.norm.sf(z),
                                   rng=rng(99))  # fmt: skip
    return result.confidence_interval.low, result.confidence_interval.high


@pytest.mark.parametrize("n", [12, 150])
def test_a_mean_equals_scipys_bootstrap(n: int) -> None:
    values = rng(1).beta(2, 1, n)
    low, high = _scipy_percentile((values,), lambda v, axis: v.mean(axis=axis), n)
    ours = stats.mean(values, rng(2), support=(-math.inf, math.inf), resamples=20_000)
    width = high - low
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.03 * width)


@pytest.mark.parametrize("n", [12, 150])
def test_a_saving_equals_scipys_bootstrap(n: int) -> None:
    reference = rng(3).lognormal(4, 1, n)
    plan = reference * rng(4).uniform(0.2, 0.9, n)
    low, high = _scipy_percentile((plan, reference), lambda p, r, axis: 1 - p.sum(axis=axis) / r.sum(axis=axis), n)
    ours = stats.saving(plan, reference, rng(5), resamples=20_000)
    assert ours.value == pytest.approx(1 - plan.sum() / reference.sum())
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_a_difference_equals_scipys_bootstrap() -> None:
    plan, reference = (rng(6).random(200) < 0.7).astype(float), (rng(7).random(200) < 0.6).astype(float)
    low, high = _scipy_percentile((plan - reference,), lambda v, axis: v.mean(axis=axis), 200)
    ours = stats.difference(plan, reference, rng(8), resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.006)


def test_grouped_examples_are_drawn_together() -> None:
    """Every example copied five times in a group of its own says no more than one copy."""
    plan, reference = rng(1).random(60), rng(2).random(60)
    once = stats.difference(plan, reference, rng(3), resamples=20_000)
    groups = list(np.repeat(np.arange(60), 5))
    five = stats.difference(plan.repeat(5), reference.repeat(5), rng(4), groups=groups, resamples=20_000)
    blind = stats.difference(plan.repeat(5), reference.repeat(5), rng(5), resamples=20_000)
    assert five.n == 60 and blind.n == 300
    assert (five.low, five.high) == pytest.approx((once.low, once.high), abs=0.01)
    assert (blind.high - blind.low) == pytest.approx((once.high - once.low) / math.sqrt(5), rel=0.08)


# Coverage.


def _coverage(draw: object, interval: object, truth: float, repeats: int = 800) -> tuple[float, float]:
    """How often the true value lies below and above the interval."""
    generator = rng(11)
    below = above = 0
    for _ in range(repeats):
        found = interval(draw(generator), generator)  # type: ignore[operator]
        below += truth < found.low
        above += truth > found.high
    return below / repeats, above / repeats


@pytest.mark.parametrize("n", [15, 40, 200])
def test_a_difference_of_rare_flips_is_covered(n: int) -> None:
    """Plan and reference differ on 10% of examples, mostly losses: the case where a plain bootstrap fails."""

    def draw(g: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        u = g.random(n)
        plan = (u > 0.08) & (g.random(n) < 0.9)
        reference = np.where(u < 0.08, True, np.where(u > 0.98, False, plan))
        return plan.astype(float), reference.astype(float)

    truth = -0.08 + 0.02 * 0.9
    below, above = _coverage(draw, lambda d, g: stats.difference(*d, g, resamples=500), truth)
    assert below <= 0.06 and above <= 0.06  # 2.5% each, within what n = 15 and 800 repeats allow


def test_a_saving_is_covered() -> None:
    def draw(g: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        reference = g.lognormal(3, 0.7, 40)
        return reference * g.beta(2, 3, 40), reference

    below, above = _coverage(draw, lambda d, g: stats.saving(*d, g, resamples=500), 0.6)
    assert below + above <= 0.08


def test_grouped_means_are_covered_and_ungrouped_ones_are_not() -> None:
    groups = list(np.repeat(np.arange(30), 8))

    def draw(g: np.random.Generator) -> np.ndarray:
        centre = g.beta(4, 4, 30).repeat(8)
        return np.clip(centre + g.uniform(-0.05, 0.05, 240), 0, 1)

    grouped = _coverage(draw, lambda v, g: stats.mean(v, g, groups=groups, resamples=500), 0.5, 400)
    blind = _coverage(draw, lambda v, g: stats.mean(v, g, resamples=500), 0.5, 400)
    assert sum(grouped) <= 0.085
    assert sum(blind) >= 0.3


# What was not seen.


@pytest.mark.parametrize("n", [1, 10, 100])
def test_equal_results_prove_no_equality(n: int) -> None:
    found = stats.difference([1.0] * n, [1.0] * n, rng())
    bound = scipy.stats.beta.ppf(0.975, 1, n)  # Clopper and Pearson's upper end for 0 of n
    assert (found.low, found.high) == pytest.approx((-bound, bound), abs=1e-9)


def test_losses_alone_do_not_exclude_a_win() -> None:
    plan, reference = np.ones(20), np.ones(20)
    plan[:3] = 0  # the sign test says p = 0.25
    found = stats.difference(plan, reference, rng())
    assert found.value == pytest.approx(-0.15)
    assert 0 < found.high == pytest.approx(-0.15 + scipy.stats.beta.ppf(0.975, 1, 20))


def test_a_single_cost_has_no_bounds() -> None:
    found = stats.saving([3.0], [4.0], rng())
    assert found.value == 0.25 and (found.low, found.high) == (-math.inf, math.inf)


# McNemar.


@settings(max_examples=60, deadline=None)
@given(up=st.integers(0, 60), down=st.integers(0, 60), both=st.integers(1, 5))
def test_mcnemar_equals_the_binomial_test(up: int, down: int, both: int) -> None:
    plan = [1] * up + [0] * down + [1] * both
    reference = [0] * up + [1] * down + [1] * both
    found = stats.mcnemar(plan, reference)
    assert (found.plan_only, found.reference_only) == (up, down)
    if up + down == 0:
        assert found.exact == found.mid_p == 1
        return
    assert found.exact == pytest.approx(scipy.stats.binomtest(up, up + down, 0.5).pvalue, abs=1e-10)
    pmf = scipy.stats.binom.pmf(np.arange(up + down + 1), up + down, 0.5)
    tail = pmf[: min(up, down)].sum() + pmf[min(up, down)] / 2  # mid-p: half of what was observed counts
    assert found.mid_p == pytest.approx(min(1.0, 2 * tail) if up != down else 1 - pmf[up] / 2, abs=1e-10)


def test_mcnemar_with_many_pairs_stays_exact() -> None:
    plan, reference = np.zeros(40_000), np.zeros(40_000)
    plan[:10_200] = 1
    reference[10_200:20_000] = 1
    expected = scipy.stats.binomtest(10_200, 20_000, 0.5).pvalue
    assert stats.mcnemar(plan, reference).exact == pytest.approx(expected, rel=1e-8)


# Power.


@pytest.mark.parametrize("n, groups", [(40, None), (300, None), (400, 50)])
def test_the_smallest_detectable_difference_is_found_8_times_of_10(n: int, groups: int | None) -> None:
    g = rng(21)
    label = None if groups is None else list(np.arange(n) % groups)

    def draw(shift: float) -> np.ndarray:
        noise = g.normal(0, 0.3, n)
        if groups is not None:
            noise += g.normal(0, 0.2, groups)[np.arange(n) % groups]
        return noise + shift

    sizes = [stats.smallest_detectable(draw(0), np.zeros(n), groups=label) for _ in range(200)]
    size = float(np.mean(sizes))
    found = 0
    for _ in range(2000):
        d = draw(size)
        units = d if groups is None else d.reshape(-1, groups).mean(axis=0)
        found += scipy.stats.ttest_1samp(units, 0).pvalue < 0.05
    assert found / 2000 == pytest.approx(0.8, abs=0.035)


def test_without_differences_the_bound_is_the_stated_one() -> None:
    n = 100
    share = 1 - 0.05 ** (1 / n)
    expected = (scipy.stats.t.ppf(0.975, 99) + scipy.stats.t.ppf(0.8, 99)) * math.sqrt(share / n)
    assert stats.smallest_detectable([1] * n, [1] * n) == pytest.approx(expected, rel=1e-4)
    assert stats.smallest_detectable([1], [1]) == math.inf


@pytest.mark.parametrize("freedom", [5, 9, 30, 1000])
@pytest.mark.parametrize("probability", [0.8, 0.95, 0.975])
def test_t_quantiles(freedom: int, probability: float) -> None:
    assert stats._t(probability, freedom) == pytest.approx(scipy.stats.t.ppf(probability, freedom), rel=5e-3)


# Frontiers.

_POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25)


@settings(max_examples=200, deadline=None)
@given(points=_POINTS)
def test_the_frontier_equals_brute_force(points: list[tuple[int, int]]) -> None:
    scores, costs = zip(*points, strict=True)
    beaten = {
        i for i, (s, c) in enumerate(points) if any(s2 >= s and c2 <= c and (s2 > s or c2 < c) for s2, c2 in points)
    }
    kept = stats.frontier(scores, costs)
    assert set(kept) == set(range(len(points))) - beaten
    assert [costs[i] for i in kept] == sorted(costs[i] for i in kept)


@settings(max_examples=100, deadline=None)
@given(points=_POINTS, reference=st.integers(1, 8))
def test_the_area_equals_a_sum_over_budgets(points: list[tuple[int, int]], reference: int) -> None:
    scores = [s / 6 for s, _ in points]
    costs = [c for _, c in points]
    # Costs are whole, so the best score is constant between whole budgets: take it in the middle of each.
    best = [max([s for s, c in zip(scores, costs, strict=True) if c <= b + 0.5], default=0.0) for b in range(reference)]
    assert stats.frontier_area(scores, costs, reference) == pytest.approx(sum(best) / reference)


# Interaction.


def test_interaction_of_known_effects() -> None:
    none = rng(1).lognormal(4, 0.5, 300)
    independent = stats.interaction(none, 0.5 * none, 0.8 * none, 0.4 * none, rng(2))
    assert independent.log_ratio is not None
    assert independent.log_ratio.value == pytest.approx(0, abs=1e-12)
    same = stats.interaction(none, 0.5 * none, 0.8 * none, 0.5 * none, rng(2))  # B saves nothing that A had not saved
    assert same.log_ratio is not None
    assert same.log_ratio.value == pytest.approx(math.log(1 / 0.8)) and same.log_ratio.low > 0
    assert same.additive.value == pytest.approx((0.5 - 0.5 - 0.8 + 1) * none.mean())
    assert stats.interaction([1, 0], [0, 0], [1, 1], [1, 0], rng()).log_ratio is None


def test_interaction_equals_scipys_bootstrap() -> None:
    four = tuple(rng(k).lognormal(3, 0.4, 80) for k in range(4))
    found = stats.interaction(*four, rng(9), resamples=20_000)
    low, high = _scipy_percentile(four, lambda n, a, b, ab, axis: (ab - a - b + n).mean(axis=axis), 80)
    assert (found.additive.low, found.additive.high) == pytest.approx((low, high), abs=0.03 * (high - low))
    low, high = _scipy_percentile(
        four, lambda n, a, b, ab, axis: np.log(ab.sum(axis) * n.sum(axis) / (a.sum(axis) * b.sum(axis))), 80
    )
    assert found.log_ratio is not None
    assert (found.log_ratio.low, found.log_ratio.high) == pytest.approx((low, high), abs=0.03 * (high - low))


# Manners.


def test_the_same_seed_gives_the_same_interval() -> None:
    values = rng(1).random(50)
    assert stats.mean(values, rng(7)) == stats.mean(values, rng(7)) != stats.mean(values, rng(8))


def test_memory_is_bounded_by_the_block() -> None:
    values = rng(1).random(20_000)
    stats.mean(values, rng(2), resamples=100)
    tracemalloc.start()
    stats.mean(values, rng(2), resamples=2_000)  # 40 million draws, 320 MB at once
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.mean([], rng()),
        lambda: stats.mean([0.5, math.nan], rng()),
        lambda: stats.mean([0.5, 1.5], rng()),
        lambda: stats.mean([0.5, 0.6], rng(), level=95),
        lambda: stats.mean([0.5, 0.6], rng(), groups=["a"]),
        lambda: stats.mean([0.5, 0.6], rng(), resamples=3),
        lambda: stats.difference([1, 0], [1], rng()),
        lambda: stats.difference([100.0], [200.0], rng()),
        lambda: stats.saving([1, 2], [0, 0], rng()),
        lambda: stats.saving([-1, 2], [1, 2], rng()),
        lambda: stats.mcnemar([0.5], [1]),
        lambda: stats.wilson(3, 2),
        lambda: stats.frontier([0.5], [math.inf]),
        lambda: stats.frontier_area([0.5], [1], 0),
        lambda: stats.frontier_area([2.0], [1], 1),
        lambda: stats.smallest_detectable([1, 0], [0, 0], power=1.0),
        lambda: stats.interaction([1], [1], [1], [1, 2], rng()),
    ],
)
def test_bad_input_is_refused_in_one_line(call: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
