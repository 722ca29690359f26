"""How agents spend, how much the same task varies, and how well the spending can be foreseen.

Source: "How Do AI Agents Spend Your Money? Analyzing and Predicting Token Consumption in Agentic Coding Tasks". Its
abstract was at hand, not its text: the statistics below are the usual ones for what it reports. A `Run` is one attempt
of one model at one task; its calls are turns, each of which sends the history again.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thrifty.errors import InvalidInput
from thrifty.instrument import Instrument
from thrifty.meter.usage_log import CallRecord
from thrifty.spend import Spend

INSTRUMENT = Instrument(
    name="agent-spending",
    kind="analysis",
    paper="How Do AI Agents Spend Your Money? Analyzing and Predicting Token Consumption in Agentic Coding Tasks",
    runs="thrifty meter agents",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt at a task: the Spend of its turns in order, and what is known about it."""

    task: str
    run: str
    model: str
    turns: tuple[Spend, ...]
    tools: tuple[str, ...] = ()
    success: bool | None = None
    difficulty: float | None = None
    predicted: float | None = None

    @property
    def spend(self) -> Spend:
        """Sum of the turns."""
        return sum(self.turns, Spend())

    @property
    def tokens(self) -> int:
        """Input and output tokens."""
        return sum(t.tokens for t in self.turns)


def runs(records: Iterable[CallRecord]) -> list[Run]:
    """Calls of one task, run and model together, in the order of their first. What a run succeeded in, its difficulty
    and its prediction are the last that its calls say."""
    calls: dict[tuple[str, str, str], list[CallRecord]] = defaultdict(list)
    for record in records:
        calls[record.task, record.run, record.model].append(record)

    def last(of: list[CallRecord], name: str) -> Any:
        return next((value for c in reversed(of) if (value := getattr(c, name)) is not None), None)

    return [
        Run(
            *key,
            turns=tuple(c.spend for c in of),
            tools=tuple(t for c in of for t in c.tools),
            success=last(of, "success"),
            difficulty=last(of, "difficulty"),
            predicted=last(of, "predicted"),
        )
        for key, of in calls.items()
    ]


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Where the tokens of runs go. `fresh` input is billed at the full rate; `resent`: the share of input that the turn
    before had sent or received already, were the history sent whole; `tools`: calls by tool."""

    runs: int
    turns: int
    total: Spend
    resent: float
    tools: Mapping[str, int] = field(default_factory=dict)

    @property
    def fresh(self) -> int:
        """Input tokens that were not cached."""
        return self.total.input - self.total.cached

    @property
    def input_to_output(self) -> float | None:
        """Input tokens for each output token; None without output."""
        return self.total.input / self.total.output if self.total.output else None


def decompose(of: Sequence[Run]) -> Decomposition:
    """Sums the runs. `resent` of a run with turns (input i_t, output o_t) is the sum of min(i_t, i_t-1 + o_t-1) over
    its input. Raises InvalidInput without runs."""
    if not of:
        raise InvalidInput("no runs")
    again = sum(
        min(now.input, before.input + before.output)
        for run in of
        for before, now in zip(run.turns, run.turns[1:], strict=False)
    )
    total = sum((run.spend for run in of), Spend())
    tools: dict[str, int] = defaultdict(int)
    for run in of:
        for tool in run.tools:
            tools[tool] += 1
    named = dict(sorted(tools.items(), key=lambda pair: (-pair[1], pair[0])))
    turns = sum(len(run.turns) for run in of)
    return Decomposition(len(of), turns, total, again / total.input if total.input else 0.0, named)


@dataclass(frozen=True, slots=True)
class Variability:
    """How much runs of one task differ. Over tasks with two runs or more: the largest and the median ratio of a task's
    dearest to its cheapest run, the median coefficient of variation, and the share of the variance that lies between
    tasks (`between`) and within them (`within`), which sum to 1; None where all runs cost the same."""

    tasks: int
    runs: int
    max_ratio: float
    median_ratio: float
    median_cv: float
    between: float | None
    within: float | None


def variability(tokens: Mapping[str, Sequence[float]]) -> Variability:
    """Of tasks, each with the tokens of its runs. Tasks with one run say nothing and are left out.

    The shares are those of one-way ANOVA's variance components, which correct the spread between the tasks' means for
    what their few runs add to it; a negative component counts as 0. Raises InvalidInput for fewer than two tasks with
    two runs, or tokens that are not above 0.

    >>> v = variability({"a": [10, 30], "b": [100, 100]})
    >>> v.max_ratio, v.median_ratio
    (3.0, 2.0)
    """
    groups = [list(map(float, g)) for g in tokens.values() if len(g) > 1]
    if len(groups) < 2:
        raise InvalidInput(f"{len(groups)} tasks with two runs or more: two are needed")
    if not all(0 < x < math.inf for g in groups for x in g):
        raise InvalidInput("tokens of runs must be above 0")
    n, k = sum(map(len, groups)), len(groups)
    grand = sum(map(sum, groups)) / n
    means = [statistics.fmean(g) for g in groups]
    inside = sum((x - m) ** 2 for g, m in zip(groups, means, strict=True) for x in g) / (n - k)
    outside = sum(len(g) * (m - grand) ** 2 for g, m in zip(groups, means, strict=True)) / (k - 1)
    size = (n - sum(len(g) ** 2 for g in groups) / n) / (k - 1)
    component = max(0.0, (outside - inside) / size)
    whole = component + inside
    ratios = [max(g) / min(g) for g in groups]
    spreads = [statistics.stdev(g) / m for g, m in zip(groups, means, strict=True)]
    return Variability(
        k,
        n,
        max(ratios),
        statistics.median(ratios),
        statistics.median(spreads),
        component / whole if whole else None,
        inside / whole if whole else None,
    )


@dataclass(frozen=True, slots=True)
class CostBin:
    """Runs of one range of cost: from and to how many tokens, how many runs, and the share that succeeded."""

    low: float
    high: float
    runs: int
    success: float


def cost_accuracy(tokens: Sequence[float], success: Sequence[bool], bins: int = 5) -> tuple[CostBin, ...]:
    """Success by cost: runs sorted by tokens and cut into `bins` of sizes that differ by one at most.

    Raises InvalidInput for lists of different lengths or fewer runs than bins.
    """
    if len(tokens) != len(success) or not 1 <= bins <= len(tokens):
        raise InvalidInput(
            f"{len(tokens)} costs, {len(success)} outcomes, {bins} bins: as many, and a run a bin at least"
        )
    order = sorted(range(len(tokens)), key=lambda i: tokens[i])
    edges = [len(order) * b // bins for b in range(bins + 1)]
    found = []
    for start, end in zip(edges, edges[1:], strict=False):
        inside = order[start:end]
        share = sum(bool(success[i]) for i in inside) / len(inside)
        found.append(CostBin(tokens[inside[0]], tokens[inside[-1]], len(inside), share))
    return tuple(found)


def interior_peak(bins: Sequence[CostBin]) -> bool:
    """Whether success is highest at neither the cheapest nor the dearest end: spending more stops paying."""
    best = max((b.success for b in bins), default=0.0)
    return bool(bins) and bins[0].success < best and bins[-1].success < best


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of paired differences in tokens, first less second model, over tasks that both attempted, with its
    interval."""

    tasks: int
    mean: float
    low: float
    high: float


def model_gap(first: Mapping[str, float], second: Mapping[str, float], seed: int = 0) -> Difference:
    """How many tokens more the first model takes for the same tasks: each task's mean tokens, compared in pairs, with a
    95% bootstrap interval over tasks. Raises InvalidInput for fewer than two common tasks."""
    import numpy as np

    from thrifty.bench import stats

    common = sorted(set(first) & set(second))
    if len(common) < 2:
        raise InvalidInput(f"{len(common)} tasks that both attempted: two are needed")
    gaps = [first[t] - second[t] for t in common]
    found = stats.mean(gaps, np.random.default_rng(seed), support=(-math.inf, math.inf))
    return Difference(len(common), found.value, found.low, found.high)


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None where one side does not vary. Raises InvalidInput for fewer than two pairs.

    >>> pearson([1, 2, 3], [2, 4, 6]), pearson([1, 1], [1, 2])
    (1.0, None)
    """
    if len(x) != len(y) or len(x) < 2:
        raise InvalidInput(f"{len(x)} and {len(y)} values: as many, and two at least, are needed")
    if min(x) == max(x) or min(y) == max(y):
        return None
    return statistics.correlation(list(map(float, x)), list(map(float, y)))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one side does not vary."""
    return pearson(_ranks(x), _ranks(y))


@dataclass(frozen=True, slots=True)
class Foresight:
    """How good predictions of tokens are. `ratio`: the median of predicted / actual; `under`: the share of predictions
    below the actual; `factor`: the typical factor they are off by, exp of the mean |ln(predicted / actual)|. The raw
    correlation alone misleads on heavy tails, so that of logarithms stands beside it."""

    n: int
    pearson: float | None
    log_pearson: float | None
    spearman: float | None
    ratio: float
    under: float
    factor: float


def foresight(predicted: Sequence[float], actual: Sequence[float]) -> Foresight:
    """Scores predictions made before the runs. Raises InvalidInput for fewer than two, or numbers not above 0."""
    if len(predicted) != len(actual) or len(actual) < 2:
        raise InvalidInput(f"{len(predicted)} predictions of {len(actual)} runs: as many, and two at least, are needed")
    if not all(0 < v < math.inf for v in (*predicted, *actual)):
        raise InvalidInput("predicted and actual tokens must be above 0")
    logs = [math.log(p) for p in predicted], [math.log(a) for a in actual]
    ratios = [p / a for p, a in zip(predicted, actual, strict=True)]
    return Foresight(
        len(actual),
        pearson(predicted, actual),
        pearson(*logs),
        spearman(predicted, actual),
        statistics.median(ratios),
        sum(r < 1 for r in ratios) / len(ratios),
        math.exp(statistics.fmean(abs(math.log(r)) for r in ratios)),
    )


def median_baseline(actual: Sequence[float]) -> list[float]:
    """What one would predict knowing nothing of a run: the median of the others. Raises InvalidInput for fewer than
    two."""
    if len(actual) < 2:
        raise InvalidInput("two runs are needed")
    return [statistics.median([*actual[:i], *actual[i + 1 :]]) for i in range(len(actual))]


def length_baseline(first_input: Sequence[float], actual: Sequence[float]) -> list[float]:
    """What the prompt's length alone predicts: each run from a line through the others, on logarithms. Raises
    InvalidInput for fewer than three, or numbers not above 0."""
    if len(first_input) != len(actual) or len(actual) < 3 or not all(v > 0 for v in (*first_input, *actual)):
        raise InvalidInput("three runs with a prompt and tokens above 0 are needed")
    x, y = [math.log(v) for v in first_input], [math.log(v) for v in actual]
    predictions = []
    for i in range(len(y)):
        others = [j for j in range(len(y)) if j != i]
        xs, ys = [x[j] for j in others], [y[j] for j in others]
        if min(xs) == max(xs):
            predictions.append(math.exp(statistics.fmean(ys)))
        else:
            slope, start = statistics.linear_regression(xs, ys)
            predictions.append(math.exp(start + slope * x[i]))
    return predictions


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            ranks[i] = (start + end) / 2 + 1
        start = end + 1
    return ranks
