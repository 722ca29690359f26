"""Bounds against scipy, MAPIE, exact arithmetic, and the exact chance of a wrong certificate by full enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy import stats

from thrifty.errors import InvalidInput
from thrifty.tune import bounds
from thrifty.tune.bounds import BOUNDS, best_bound, examples_needed, p_value, upper_bound
from thrifty.tune.losses import Losses, LossKind

GENERAL = ("hoeffding-bentkus", "betting")


def losses(values: Sequence[float] | np.ndarray, kind: LossKind = "error") -> Losses:
    return Losses(kind, np.asarray(values), -1.0 if kind == "drop" else 0.0, 1.0, names(len(values)))


def names(n: int) -> tuple[str, ...]:
    return tuple(f"{i:07}" for i in range(n))


def ones(k: int, n: int) -> Losses:
    return losses([1.0] * k + [0.0] * (n - k))


def exact_binomial_cdf(k: int, n: int, alpha: Fraction) -> Fraction:
    return sum((math.comb(n, i) * alpha**i * (1 - alpha) ** (n - i) for i in range(k + 1)), Fraction(0))


# Clopper-Pearson against scipy.


@pytest.mark.parametrize("k, n", [(0, 1), (0, 40), (3, 40), (39, 40), (40, 40), (25, 500)])
def test_clopper_pearson_equals_scipys_exact_test_and_interval(k: int, n: int) -> None:
    for alpha in (0.01, 0.1, 0.5):
        theirs = stats.binomtest(k, n, alpha, alternative="less").pvalue
        assert p_value("clopper-pearson", ones(k, n), alpha) == pytest.approx(theirs, rel=1e-10)
    for delta in (0.01, 0.1):
        interval = stats.binomtest(k, n, alternative="less").proportion_ci(1 - delta, method="exact")
        assert upper_bound("clopper-pearson", ones(k, n), delta) == pytest.approx(interval.high, rel=1e-9)
        quantile = 1.0 if k == n else stats.beta.ppf(1 - delta, k + 1, n - k)
        assert upper_bound("clopper-pearson", ones(k, n), delta) == pytest.approx(quantile, rel=1e-9)


def test_clopper_pearson_refuses_what_is_not_0_or_1() -> None:
    with pytest.raises(InvalidInput, match="group '0000001' has a loss of 0.5"):
        p_value("clopper-pearson", losses([0, 0.5, 1]), 0.1)
    with pytest.raises(InvalidInput, match="kind 'drop'"):
        upper_bound("clopper-pearson", losses([0, 1], "drop"), 0.1)
    with pytest.raises(InvalidInput, match="kind 'drop'"):
        examples_needed("clopper-pearson", "drop", 0.1, 0.1)


# Hoeffding-Bentkus against exact arithmetic and MAPIE.


def test_seven_errors_in_a_hundred() -> None:
    exact = math.e * float(exact_binomial_cdf(7, 100, Fraction(1, 10)))
    assert p_value("hoeffding-bentkus", ones(7, 100), 0.1) == pytest.approx(exact, rel=1e-12)
    assert exact == pytest.approx(0.5601, abs=5e-5)


@pytest.mark.parametrize("value, n", [(0.1, 30), (1 - 0.9, 30), (1 / 3, 60), (0.2, 55), (1 - 0.8, 200), (1 - 0.7, 10)])
def test_a_whole_sum_stays_whole_whatever_the_rounding(value: float, n: int) -> None:
    total = Fraction(value).limit_denominator(20) * n
    assert total.denominator == 1
    alpha = Fraction(value).limit_denominator(20) * 2
    tail = math.e * float(exact_binomial_cdf(int(total), n, alpha))
    mean = float(total / n)
    kl = mean * math.log(mean / alpha) + (1 - mean) * math.log((1 - mean) / (1 - alpha))
    assert p_value("hoeffding-bentkus", losses([value] * n), float(alpha)) == pytest.approx(
        min(math.exp(-n * kl), tail, 1), rel=1e-9
    )


def test_a_sum_between_two_counts_takes_the_upper_one() -> None:
    values = [0.9] + [1.0] * 3 + [0.0] * 96  # the sum is 3.9: Bentkus counts 4
    tail = math.e * float(exact_binomial_cdf(4, 100, Fraction(1, 10)))
    assert p_value("hoeffding-bentkus", losses(values), 0.1) == pytest.approx(tail, rel=1e-12)


@pytest.mark.parametrize("n", [10, 97, 400])
def test_hoeffding_bentkus_equals_mapie_on_the_same_losses(n: int) -> None:
    rng = np.random.default_rng(n)
    alphas = np.array([0.05, 0.1, 0.3])
    for values in (rng.beta(1, 9, n), rng.uniform(0, 1, n), (rng.random(n) < 0.04).astype(float), np.zeros(n)):
        theirs = compute_hoeffding_bentkus_p_value(np.array([values.mean()]), n, alphas)[0]
        ours = [p_value("hoeffding-bentkus", losses(values), alpha) for alpha in alphas]
        assert ours == pytest.approx(np.minimum(theirs, 1), rel=1e-9)


@pytest.mark.parametrize("k, n", [(0, 50), (4, 50), (6, 300)])
def test_clopper_pearson_equals_mapies_bound_for_0_and_1(k: int, n: int) -> None:
    theirs = compute_hoeffding_bentkus_p_value(np.array([k / n]), n, np.array([0.12]), binary=True)[0, 0]
    assert p_value("clopper-pearson", ones(k, n), 0.12) == pytest.approx(theirs, rel=1e-9)


# The exact chance of a wrong certificate.


@pytest.mark.parametrize("bound", ["hoeffding-bentkus", "clopper-pearson"])
@pytest.mark.parametrize("n", [1, 7, 23, 60])
def test_wrong_certificates_for_0_and_1_are_at_most_delta_exactly(bound: bounds.Bound, n: int) -> None:
    worst = 0.0
    for alpha in (0.03, 0.1, 0.35, 0.8):
        p = np.array([p_value(bound, ones(k, n), alpha) for k in range(n + 1)])
        for truth in np.linspace(alpha, 1, 12):
            chances = stats.binom.pmf(np.arange(n + 1), n, truth)
            for delta in (0.01, 0.05, 0.1, 0.3):
                wrong = float(chances[p <= delta].sum())
                assert wrong <= delta + 1e-12
                worst = max(worst, wrong / delta)
    assert n < 23 or worst > (0.85 if bound == "clopper-pearson" else 0.2)  # not by never certifying


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("n", [1, 6, 9])
def test_the_upper_bound_covers_exactly(bound: bounds.Bound, n: int) -> None:
    sequences = [np.array(s, dtype=float) for s in itertools.product((0, 1), repeat=n)]
    for delta in (0.05, 0.2):
        upper = np.array([upper_bound(bound, losses(s), delta) for s in sequences])
        counts = np.array([s.sum() for s in sequences])
        for truth in np.linspace(0.02, 0.98, 25):
            chances = truth**counts * (1 - truth) ** (n - counts)
            assert float(chances[upper >= truth].sum()) >= 1 - delta - 1e-12


THREE = [  # the chances of the three values, for losses of 0, 1/2, 1 and for drops of -1, 0, 1
    (0.5, 0.5, 0.0), (0.8, 0.0, 0.2), (0.6, 0.3, 0.1), (0.05, 0.9, 0.05), (0.0, 1.0, 0.0)
]  # fmt: skip


@pytest.mark.parametrize("bound", GENERAL)
@pytest.mark.parametrize("kind", ["error", "drop"])
def test_wrong_certificates_for_three_values_are_at_most_delta_exactly(bound: bounds.Bound, kind: LossKind) -> None:
    n = 7
    values = np.array([0, 0.5, 1] if kind == "error" else [-1, 0, 1])
    for chances in THREE:
        alpha = float(np.dot(chances, values)) - 1e-9  # the truth is just above alpha
        rejected: dict[float, float] = dict.fromkeys((0.02, 0.1, 0.3, 0.6), 0.0)
        for picks in itertools.product(range(3), repeat=n):
            chance = math.prod(chances[i] for i in picks)
            if chance:
                p = p_value(bound, losses(values[list(picks)], kind), alpha)
                for delta in rejected:
                    rejected[delta] += chance * (p <= delta)
        assert all(wrong <= delta + 1e-12 for delta, wrong in rejected.items()), (chances, rejected)


# Betting.


def test_capital_by_hand() -> None:
    """n = 40, alpha = 0.2, 2 log 10 = 4.60517; three imagined losses of mean 1/2 and variance 1/4.

    First bet: sqrt(4.60517 / (40 * 0.25)) = 0.678614; the loss 0 makes 1 + 0.678614 * 0.2 = 1.135723.
    Then mean 1.5 / 4 = 0.375, variance (0.75 + 0.375^2) / 4 = 0.222656, bet sqrt(4.60517 / (40 * 0.222656)) =
    0.719082; the loss 1 leaves 1.135723 * (1 - 0.719082 * 0.8) = 0.482387.
    """
    capital = np.exp(bounds._Bets(np.array([0.0, 1.0] + [0.0] * 38)).log_capital(0.2))
    assert capital[:2] == pytest.approx([1.135723, 0.482387], abs=2e-6)


@pytest.mark.parametrize(
    "chances, values",
    [((0.7, 0.3), (0, 1)), ((0.6, 0.3, 0.1), (0, 0.5, 1)), ((0.9, 0.1), (0.45, 0.95))],
)
def test_a_gambler_who_cannot_see_ahead_neither_wins_nor_loses(
    chances: tuple[float, ...], values: tuple[float, ...]
) -> None:
    """At a mean of exactly alpha the expected capital is 1 after every loss: every sequence is enumerated."""
    n, alpha = 8, float(np.dot(chances, values))
    expected = np.zeros(n)
    for picks in itertools.product(range(len(values)), repeat=n):
        capital = np.exp(bounds._Bets(np.array([values[i] for i in picks], dtype=float)).log_capital(alpha))
        expected += math.prod(chances[i] for i in picks) * capital
    assert expected == pytest.approx(np.ones(n), rel=1e-12)


def test_the_order_of_betting_has_nothing_to_do_with_the_ids() -> None:
    """Ids that sort by difficulty would put all zeros first and win against a true null."""
    hardest_last = ones(0, 90).values.tolist() + [1.0] * 20  # mean 0.18
    assert np.exp(bounds._Bets(np.array(hardest_last)).log_capital(0.15).max()) > 100
    shuffled = np.array(hardest_last)[bounds._order(names(110))]
    assert np.exp(bounds._Bets(shuffled).log_capital(0.15).max()) < 10
    assert p_value("betting", losses(hardest_last), 0.2) == bounds._Bets(shuffled).p(0.2)
    order = bounds._order(names(1000))
    assert sorted(order) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert bounds._order(("a", "b", "c", "d")).tolist() == [1, 2, 3, 0]  # what was certified once can be recomputed


def test_no_bound_denies_the_mean_that_was_measured() -> None:
    in_order = np.argsort(bounds._order(names(60)))  # the betting order puts these zeros first, and then the ones
    sample = losses(np.array([0.0] * 40 + [1.0] * 20)[in_order])
    assert np.exp(bounds._Bets(np.sort(sample.values)).log_capital(0.2).max()) > 100
    assert p_value("betting", sample, 0.2) == 1
    assert upper_bound("betting", sample, 0.1) == pytest.approx(sample.mean, abs=1e-9)


def test_betting_is_tight_where_losses_vary_little() -> None:
    no_change = losses(np.zeros(200), "drop")
    assert upper_bound("betting", no_change, 0.1) < 0.02
    assert upper_bound("hoeffding-bentkus", no_change, 0.1) > 0.1


def test_betting_is_nearly_as_good_as_the_exact_test_on_0_and_1() -> None:
    rng = np.random.default_rng(5)
    tables = [losses((rng.random(300) < 0.05).astype(float)) for _ in range(100)]
    exact = np.mean([upper_bound("clopper-pearson", t, 0.1) - t.mean for t in tables])
    betting = np.mean([upper_bound("betting", t, 0.1) - t.mean for t in tables])
    assert betting < 1.5 * exact


# All bounds.


@pytest.mark.parametrize("bound", BOUNDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_p_values_fall_with_alpha_and_the_upper_bound_inverts_them(bound: bounds.Bound, data: st.DataObject) -> None:
    kind: LossKind = "error" if bound == "clopper-pearson" else data.draw(st.sampled_from(["error", "drop"]))
    low = -1.0 if kind == "drop" else 0.0
    value = st.sampled_from([0.0, 1.0]) if bound == "clopper-pearson" else st.floats(low, 1)
    sample = losses(data.draw(st.lists(value, min_size=1, max_size=40)), kind)
    alphas = sorted(data.draw(st.lists(st.floats(low + 1e-3, 0.999), min_size=2, max_size=5)))
    p = [p_value(bound, sample, alpha) for alpha in alphas]
    assert all(0 <= x <= 1 for x in p)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(p))
    delta = data.draw(st.floats(0.001, 0.4))
    upper = upper_bound(bound, sample, delta)
    assert sample.mean <= upper + 1e-12 and upper <= 1
    assert upper == 1 or p_value(bound, sample, upper) <= delta
    if upper > low + 1e-6:
        assert p_value(bound, sample, upper - 1e-6 * (upper - low)) > delta


@pytest.mark.parametrize("bound", GENERAL)
def test_a_drop_is_bounded_as_the_error_it_is_rescaled_to(bound: bounds.Bound) -> None:
    values = np.random.default_rng(0).integers(-4, 5, 80) / 4
    drop, error = losses(values, "drop"), losses((values + 1) / 2)
    assert p_value(bound, drop, 0.25) == pytest.approx(p_value(bound, error, 0.625), rel=1e-12)
    assert upper_bound(bound, drop, 0.1) == pytest.approx(2 * upper_bound(bound, error, 0.1) - 1, rel=1e-9)


@pytest.mark.parametrize("bound", BOUNDS)
def test_extremes(bound: bounds.Bound) -> None:
    nothing = losses([])
    assert p_value(bound, nothing, 0.1) == 1 and upper_bound(bound, nothing, 0.1) == 1
    assert p_value(bound, ones(50, 50), 0.5) == 1 and upper_bound(bound, ones(50, 50), 0.1) == 1
    assert p_value(bound, ones(0, 500), 0.1) < 1e-9
    many = ones(5_800, 200_000)
    assert p_value(bound, many, 0.031) < 1e-3 and p_value(bound, many, 0.028) > 0.5
    assert 0.029 < upper_bound(bound, many, 0.01) < 0.0305


@pytest.mark.parametrize("bound", BOUNDS)
def test_what_is_refused(bound: bounds.Bound) -> None:
    for alpha in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(InvalidInput, match="alpha"):
            p_value(bound, ones(1, 9), alpha)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidInput, match="delta"):
            upper_bound(bound, ones(1, 9), delta)
        with pytest.raises(InvalidInput, match="delta"):
            examples_needed(bound, "error", 0.1, delta)
    with pytest.raises(InvalidInput, match="alpha 1.0"):
        p_value("betting", losses([0.0], "drop"), 1.0)
    assert p_value("betting", losses([0.0] * 9, "drop"), -0.1) == 1  # a drop may be bounded below 0


def test_an_unknown_bound_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'betting'"):
        p_value("beting", ones(1, 9), 0.1)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="unknown bound"):
        examples_needed("", "error", 0.1, 0.1)  # type: ignore[arg-type]


def test_the_bound_is_chosen_before_losses_are_seen() -> None:
    assert best_bound("disagree", zero_one=True) == "clopper-pearson"
    assert best_bound("error", zero_one=False) == "betting"
    assert best_bound("drop", zero_one=True) == "betting"
    with pytest.raises(InvalidInput, match="unknown loss"):
        best_bound("errors", zero_one=True)  # type: ignore[arg-type]


# How many examples.


@pytest.mark.parametrize("alpha, delta", [(0.05, 0.1), (0.1, 0.05), (0.01, 0.01)])
def test_examples_needed_without_any_loss_in_closed_form(alpha: float, delta: float) -> None:
    closed = math.ceil(math.log(delta) / math.log(1 - alpha))
    assert examples_needed("clopper-pearson", "error", alpha, delta) == closed
    assert examples_needed("hoeffding-bentkus", "disagree", alpha, delta) == closed


@pytest.mark.parametrize("bound", ["clopper-pearson", "hoeffding-bentkus"])
@pytest.mark.parametrize("mean", [0.01, 0.05, 0.2])
def test_examples_needed_is_the_first_that_would_do(bound: bounds.Bound, mean: float) -> None:
    alpha, delta = mean + 0.05, 0.1
    found = examples_needed(bound, "error", alpha, delta, mean)
    share = Fraction(mean).limit_denominator(100)
    p = [p_value(bound, ones(math.ceil(n * share), n), alpha) for n in range(1, found + 1)]
    assert p[-1] <= delta < min(p[:-1])


def test_examples_needed_for_a_drop() -> None:
    unchanged = examples_needed("betting", "drop", 0.05, 0.1)
    assert p_value("betting", losses(np.zeros(unchanged), "drop"), 0.05) <= 0.1
    assert p_value("betting", losses(np.zeros(unchanged - 1), "drop"), 0.05) > 0.1
    assert examples_needed("betting", "drop", 0.05, 0.1, mean=-0.02) < unchanged
    by_sum = examples_needed("hoeffding-bentkus", "drop", 0.05, 0.1)
    assert p_value("hoeffding-bentkus", losses(np.zeros(by_sum), "drop"), 0.05) <= 0.1
    assert p_value("hoeffding-bentkus", losses(np.zeros(by_sum - 1), "drop"), 0.05) > 0.1


def test_examples_needed_from_an_earlier_sample() -> None:
    pilot = losses(np.tile([1, -1] + [0] * 18, 2), "drop")
    needed = examples_needed("betting", "drop", 0.05, 0.1, like=pilot)
    assert needed > examples_needed(
        "betting", "drop", 0.05, 0.1
    )  # a pilot that varies needs more than one that does not
    rng, hits = np.random.default_rng(3), 0
    for _ in range(100):
        hits += p_value("betting", losses(rng.choice(pilot.values, 2 * needed), "drop"), 0.05) <= 0.1
    assert hits > 60  # twice the forecast is usually enough
    with pytest.raises(InvalidInput, match="losses of that kind"):
        examples_needed("betting", "error", 0.05, 0.1, like=pilot)


def test_no_number_of_examples_certifies_what_is_not_below_alpha() -> None:
    with pytest.raises(InvalidInput, match="no number of examples certifies a mean loss of 0.1 at alpha 0.1"):
        examples_needed("betting", "error", 0.1, 0.1, mean=0.1)
    for bound in BOUNDS:
        with pytest.raises(InvalidInput, match="more than 4,194,304 examples"):
            examples_needed(bound, "error", 0.5, 0.1, mean=0.4999)
