"""Intervals, tests and frontiers: what a set of paired results can and cannot show.

Every quantity here is a function of totals over examples (a mean, a paired difference, a saving, an
interaction), so one engine serves all: resample examples, or whole groups where examples are related, add up,
apply the function.

The interval is the expanded percentile one (Hesterberg, "What Teachers Should Know about the Bootstrap", The
American Statistician 2015): percentiles, moved outwards as Student's t and the n - 1 in a variance ask,
because plain percentile and BCa intervals are too narrow on few examples. Simulated on skewed costs and on
differences of 0/1 scores, n of 10 to 50, it covered as often as BCa or more; on the mean of a log-normal
value BCa did better by 1 to 2 points, and both stayed at 90% or below.

A bootstrap knows no value that the data lack: three losses and no win would exclude a gain, and equal results
would prove equality. So where values have a known range, no end of an interval is nearer than what n examples
can hide (`_unseen`). A share of 0/1 scores gets Wilson's interval. numpy only: the normal distribution is in
the standard library.

All randomness comes from the generator passed in. Arrays are 1-D, one entry an example, in the same order
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thrifty.errors import InvalidInput

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # totals [R, K] -> values [R]

RESAMPLES = 10_000
_NORMAL = NormalDist()
_BLOCK = 1_000_000  # drawn indices alive at once: 8 MB, and as much for what they gather


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval at `level`; `n` counts the units resampled (groups, if there are any)."""

    value: float
    low: float
    high: float
    level: float
    n: int
    method: str

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


# Means and differences.


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson, "Probable Inference", JASA 1927).

    >>> print(wilson(9, 10))
    0.9 [0.5958, 0.9821]
    """
    if not 0 <= successes <= n or n < 1:
        raise InvalidInput(f"a share needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    z = _NORMAL.inv_cdf(0.5 + _level(level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(share, low, high, level, n, "Wilson")


def mean(
    values: ArrayLike,
    rng: np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    support: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean of `values` [n]: Wilson's interval for ungrouped 0/1 values, else the bootstrap.

    `support` is the range that a value can take; give (-inf, inf) where there is none, as for token counts.

    Raises: InvalidInput for no values, a NaN, or a value outside the support.
    """
    v = _values("values", values)
    if groups is None and bool(np.isin(v, (0.0, 1.0)).all()) and support == (0.0, 1.0):
        return wilson(int(v.sum()), len(v), level)
    if v.min() < support[0] or v.max() > support[1]:
        raise InvalidInput(f"values must lie in {list(support)}, not between {v.min():g} and {v.max():g}")
    totals, _ = _by_group([v, np.ones_like(v)], groups)
    return _unseen(bootstrap(totals, _ratio, rng, level=level, resamples=resamples), totals, support)


def difference(
    plan: ArrayLike,
    reference: ArrayLike,
    rng: np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean of the paired differences plan - reference [n] of scores in [0, 1], by the paired bootstrap.

    Equal results on every example do not prove equality, and the interval says so.
    """
    p, r = _pair(plan, reference)
    if min(p.min(), r.min()) < 0 or max(p.max(), r.max()) > 1:
        raise InvalidInput("a difference of scores needs scores in [0, 1]: use `saving` for costs")
    totals, _ = _by_group([p - r, np.ones_like(p)], groups)
    return _unseen(bootstrap(totals, _ratio, rng, level=level, resamples=resamples), totals, (-1.0, 1.0))


def saving(
    plan: ArrayLike,
    reference: ArrayLike,
    rng: np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The share of spend saved, 1 - sum(plan) / sum(reference), by the paired bootstrap.

    Negative where the plan costs more.

    Raises: InvalidInput for a negative cost or a reference that costs nothing.
    """
    p, r = _pair(plan, reference)
    if p.min() < 0 or r.min() < 0 or r.sum() <= 0:
        raise InvalidInput("a saving needs costs of at least 0 and a reference that cost something")
    totals, _ = _by_group([p, r], groups)
    return bootstrap(totals, lambda t: 1.0 - _ratio(t), rng, level=level, resamples=resamples)


def bootstrap(
    totals: Floats,
    statistic: Statistic,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The expanded percentile interval of a function of totals.

    A single unit, which shows no variation, gives no bounds.

    Args:
        totals: [G, K], for each unit that is drawn (an example or a group) what it adds to each of K totals.
        statistic: maps totals [R, K] to values [R]. If one of them is NaN there are no bounds either.
    """
    alpha = 1 - _level(level)
    count = len(totals)
    value = float(statistic(totals.sum(axis=0, keepdims=True))[0])
    if count < 2:
        return Interval(value, -math.inf, math.inf, level, count, "none: one unit shows no variation")
    drawn = np.sort(_resample(totals, statistic, rng, resamples))
    if np.isnan(drawn[-1]) or not math.isfinite(value):  # sort puts NaN last
        return Interval(value, -math.inf, math.inf, level, count, "none: not defined on every resample")
    z = math.sqrt(count / (count - 1)) * _t(1 - alpha / 2, count - 1)
    # a resample whose total is 0 makes a ratio infinite: between such values there is nothing to interpolate
    how = "linear" if np.isfinite(drawn[[0, -1]]).all() else "inverted_cdf"
    low, high = np.quantile(drawn, (_NORMAL.cdf(-z), _NORMAL.cdf(z)), method=how)  # type: ignore[call-overload]
    return Interval(value, float(low), float(high), level, count, "percentile bootstrap")


# Tests and power.


@dataclass(frozen=True)
class McNemar:
    """Paired 0/1 results: examples only the plan got right, only the reference; two-sided p values."""

    plan_only: int
    reference_only: int
    exact: float
    mid_p: float


def mcnemar(plan: ArrayLike, reference: ArrayLike) -> McNemar:
    """McNemar's test on 0/1 scores: the exact p, and the mid-p, which is closer to its level.

    Source: Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data: mid-p and
    asymptotic are better than exact conditional", 2013.

    >>> found = mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1])
    >>> found.plan_only, found.reference_only, round(found.exact, 5), round(found.mid_p, 5)
    (5, 1, 0.21875, 0.125)
    """
    p, r = _pair(plan, reference)
    if not (np.isin(p, (0, 1)).all() and np.isin(r, (0, 1)).all()):
        raise InvalidInput("McNemar's test takes scores of 0 and 1 only: use `difference` for others")
    up, down = int((p > r).sum()), int((p < r).sum())
    n, k = up + down, min(up, down)
    if n == 0:
        return McNemar(0, 0, 1.0, 1.0)
    i = np.arange(k)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - i) / (i + 1)))]) - n * math.log(2)
    at_most, at = float(np.exp(logs).sum()), float(np.exp(logs[-1]))
    if up == down:
        return McNemar(up, down, 1.0, 1.0 - at / 2)
    exact = min(1.0, 2 * at_most)
    return McNemar(up, down, exact, 2 * at_most - at)


def smallest_detectable(
    plan: ArrayLike,
    reference: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    power: float = 0.8,
    level: float = 0.95,
) -> float:
    """The smallest true mean difference that a paired test on this n finds with the given power.

    (t(1 - alpha/2) + t(power)) * se, with the standard error of the observed paired differences (between
    groups where examples are related) and t quantiles at n - 1 degrees of freedom. Where no difference was
    observed, at most a share b = 1 - alpha^(1/n) of examples differs, with confidence 1 - alpha, and a
    difference of scores is at most 1, so sd <= sqrt(b) is taken. Infinite for a single unit; a figure above 1
    says that this n could have shown nothing.
    """
    p, r = _pair(plan, reference)
    d = p - r
    totals, units = _by_group([d, np.ones_like(d)], groups)
    if units < 2:
        return math.inf
    if np.ptp(d) == 0:
        error = math.sqrt((1 - (1 - _level(level)) ** (1 / units)) / units)
    else:
        centred = totals[:, 0] - d.mean() * totals[:, 1]
        error = math.sqrt(float((centred**2).sum()) * units / (units - 1)) / len(d)
    return (_t(0.5 + _level(level) / 2, units - 1) + _t(power, units - 1)) * error


# Frontiers.


def frontier(scores: ArrayLike, costs: ArrayLike) -> list[int]:
    """The plans that no other one beats: none scores at least as much for at most the cost, with one of the
    two better.

    Returns their indices, cheapest first (equal ones in the order given). Plans equal in both are all kept.

    >>> frontier([0.9, 0.5, 0.8, 0.9], [10, 1, 12, 11])
    [1, 0]
    """
    s, c = _pair(scores, costs)
    kept: list[int] = []
    best, best_cost = -math.inf, math.nan
    for i in np.lexsort((np.arange(len(s)), -s, c)):
        if s[i] > best or (s[i] == best and c[i] == best_cost):
            kept.append(int(i))
            best, best_cost = float(s[i]), float(c[i])
    return kept


def frontier_area(scores: ArrayLike, costs: ArrayLike, reference_cost: float) -> float:
    """The area under the frontier's staircase, in [0, 1].

    It is the best mean score within a budget, averaged over budgets from 0 to `reference_cost` (normally the
    unmodified engine's). Costs are divided by the reference cost and cut at 1; a score is 0 below the
    cheapest plan. So 1 needs a perfect plan that is free, and a plan that costs as much as the reference adds
    nothing.

    >>> frontier_area([0.5, 0.8], [25, 50], reference_cost=100)  # 0 to 25: 0, to 50: 0.5, to 100: 0.8
    0.525
    """
    s, c = _pair(scores, costs)
    if not (reference_cost > 0 and math.isfinite(reference_cost)):
        raise InvalidInput(f"the reference cost must be above 0, not {reference_cost}")
    if c.min() < 0 or s.min() < 0 or s.max() > 1:
        raise InvalidInput("a frontier's area needs costs of at least 0 and scores in [0, 1]")
    area = 0.0
    steps = [(min(float(c[i]) / reference_cost, 1.0), float(s[i])) for i in frontier(s, c)]
    for (start, score), (end, _) in zip(steps, [*steps[1:], (1.0, 0.0)], strict=True):
        area += (end - start) * score
    return area


# Stacked methods.


@dataclass(frozen=True)
class Interaction:
    """What two stacked methods do beyond what each does alone.

    `additive` is (AB - none) - (A - none) - (B - none), in the unit of the values: 0 means that gains add.
    `log_ratio` is log(AB * none / (A * B)) of totals: 0 means that savings multiply; above 0 the stack costs
    more than that (they save the same tokens), below 0 less. None where some total is not above 0.
    """

    additive: Interval
    log_ratio: Interval | None


def interaction(
    none: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    ab: ArrayLike,
    rng: np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interaction:
    """The interaction of methods A and B on scores or costs [n] of the same examples, by the paired bootstrap."""
    columns = [_values(name, v) for name, v in (("none", none), ("a", a), ("b", b), ("ab", ab))]
    if len({len(column) for column in columns}) != 1:
        raise InvalidInput(f"the four results differ in length: {[len(column) for column in columns]}")
    totals, _ = _by_group([*columns, np.ones_like(columns[0])], groups)

    def additive(t: Floats) -> Floats:
        return (t[:, 3] - t[:, 1] - t[:, 2] + t[:, 0]) / t[:, 4]

    def log_ratio(t: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(t[:, :4])
            return logs[:, 3] + logs[:, 0] - logs[:, 1] - logs[:, 2]

    first = bootstrap(totals, additive, rng, level=level, resamples=resamples)
    if totals[:, :4].sum(axis=0).min() <= 0 or totals[:, :4].min() < 0:
        return Interaction(first, None)
    return Interaction(first, bootstrap(totals, log_ratio, rng, level=level, resamples=resamples))


# Details.


def _ratio(totals: Floats) -> Floats:
    """Column 0 over column 1; NaN where a resample drew only zeros below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[:, 0] / totals[:, 1]


def _resample(totals: Floats, statistic: Statistic, rng: np.random.Generator, resamples: int) -> Floats:
    """The statistic on `resamples` draws of units with replacement [R], in blocks of bounded size."""
    if resamples < 100:
        raise InvalidInput(f"at least 100 resamples are needed, not {resamples}")
    count, kinds = totals.shape
    columns = np.ascontiguousarray(totals.T)
    values = np.empty(resamples)
    step = max(1, _BLOCK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, count, size=(rows, count), dtype=np.int64)
        sums = np.empty((rows, kinds))
        for k in range(kinds):
            # A column of equal numbers (usually the count of examples) needs no gathering.
            same = bool((columns[k] == columns[k, 0]).all())
            sums[:, k] = columns[k, 0] * count if same else columns[k].take(drawn).sum(axis=1)
        values[start : start + rows] = statistic(sums)
    return values


def _unseen(interval: Interval, totals: Floats, support: tuple[float, float]) -> Interval:
    """Move each end out to what the data cannot exclude: values beyond the largest (smallest) one seen.

    If a share q of units lay beyond it, none of n would show it with chance (1 - q)^n; so with confidence 1 -
    alpha/2, q is at most 1 - (alpha/2)^(1/n), and they may lie as far as the end of the support. Units are
    taken as equally large.
    """
    seen = totals[:, 0] / totals[:, 1]
    hidden = 1 - ((1 - interval.level) / 2) ** (1 / interval.n)
    low, high = interval.low, interval.high
    if math.isfinite(support[0]):
        reach = interval.value - hidden * (float(seen.min()) - support[0])
        low = max(support[0], min(low, reach) if math.isfinite(low) else reach)
    if math.isfinite(support[1]):
        reach = interval.value + hidden * (support[1] - float(seen.max()))
        high = min(support[1], max(high, reach) if math.isfinite(high) else reach)
    return replace(interval, low=low, high=high)


def _by_group(columns: Sequence[Floats], groups: Sequence[Any] | None) -> tuple[Floats, int]:
    """What each unit adds to each total [G, K], and the number of units."""
    table = np.stack(columns, axis=1)
    if groups is None:
        return table, len(table)
    if len(groups) != len(table):
        raise InvalidInput(f"{len(groups)} groups were given for {len(table)} examples")
    numbers: dict[Any, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    totals = np.zeros((len(numbers), table.shape[1]))
    np.add.at(totals, index, table)
    return totals, len(numbers)


def _t(probability: float, freedom: int) -> float:
    """A quantile of Student's t, by the expansion in 1 / degrees of freedom around the normal one.

    Abramowitz and Stegun 26.7.5; from 5 degrees of freedom on it is within 0.5% at the probabilities used
    here.
    """
    if not 0 < probability < 1:
        raise InvalidInput(f"a probability must lie between 0 and 1, not {probability}")
    z = _NORMAL.inv_cdf(probability)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


def _values(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InvalidInput(f"{name} must be a list of at least one number, not of shape {array.shape}")
    if not np.isfinite(array).all():
        raise InvalidInput(f"{name} has an entry that is not a finite number, at {int(np.argmin(np.isfinite(array)))}")
    return array


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    a, b = _values("the first list", first), _values("the second list", second)
    if len(a) != len(b):
        raise InvalidInput(f"paired results differ in length: {len(a)} and {len(b)}")
    return a, b


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise InvalidInput(f"a level must lie between 0 and 1, not {level}")
    return level
