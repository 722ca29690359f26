"""One plan on one suite: means, intervals, what it saved beside the reference, and how often its methods
fired.

Examples that share a group, and the seeds and samples of one example, are resampled together.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thrifty.bench import stats
from thrifty.bench.stats import Interval, McNemar
from thrifty.bench.store import Result
from thrifty.errors import InvalidInput, nearest
from thrifty.meter.efficiency import e3
from thrifty.spend import NANO, SPEND_FIELDS, WORK_FIELDS

AXES: tuple[str, ...] = ("tokens", *SPEND_FIELDS, *WORK_FIELDS)
"""What an axis can be: every field of Spend and Work, and `tokens`, their input plus output."""

LEVEL = 0.95
POWER = 0.8
BUDGET_RECEIPT = "budget"
"""Receipts under this name say that a budget cut an answer; they belong to no method."""


@dataclass(frozen=True, slots=True)
class Fired:
    """How often one method of a plan fired, and what it said when it did not."""

    method: str
    fired: int
    calls: int
    """results that have its receipt"""
    why_not: tuple[tuple[str, int], ...]
    """reasons given when it did not fire, the commonest first"""

    @property
    def share(self) -> float:
        """Of the calls that have its receipt."""
        return self.fired / self.calls if self.calls else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One plan. Means are per example; `input` is the answering engine's, `other_input` that of all other
    roles."""

    plan: str
    hash: str
    methods: tuple[str, ...]
    n: int
    score: Interval
    input: float
    other_input: float
    cached: float
    output: float
    axis: Interval
    saving: Interval | None
    """share of the axis saved beside the reference, paired"""
    difference: Interval | None
    """of the score, paired"""
    mcnemar: McNemar | None
    """for scores of 0 and 1, one an example"""
    paired: int
    """examples that it shares with the reference"""
    smallest: float | None
    """difference that this n could have shown, with 80% power"""
    fired: tuple[Fired, ...]
    e3: float | None
    undominated: bool
    refused: int
    """results that a budget refused or cut"""
    failed: int
    """results that failed and are missing"""
    estimated: int
    means: Mapping[str, float]
    """of every axis"""

    @property
    def note(self) -> str:
        """What a reader of the table must know."""
        notes = []
        idle = [f.method for f in self.fired if not f.fired]
        if idle:
            notes.append(f"{', '.join(idle)} never fired")
        if self.refused:
            notes.append(f"{self.refused} cut or refused by the budget")
        if self.failed:
            notes.append(f"{self.failed} failed")
        if self.estimated:
            notes.append(f"{self.estimated} estimated")
        if self.difference is not None and self.paired < self.n:
            notes.append(f"compared on {self.paired}")
        return "; ".join(notes)


def check_axis(axis: str) -> str:
    """The axis, or InvalidInput with the nearest known one."""
    if axis not in AXES:
        raise InvalidInput(nearest(axis, AXES, "axis"))
    return axis


def value(result: Result, axis: str) -> float:
    """What a result spent on an axis; `usd` in dollars."""
    if axis == "usd":
        return result.spend.usd / NANO
    return float(getattr(result.spend if axis == "tokens" or axis in SPEND_FIELDS else result.work, axis))


def example_of(result: Result) -> tuple[str, int, int]:
    """What pairs results of different plans: example, seed and sample."""
    return result.task_hash, result.seed, result.sample


def groups_of(results: Sequence[Result]) -> list[str] | None:
    """What is resampled together; None when every result stands for itself."""
    groups = [r.task_hash if r.group is None else f"group {r.group}" for r in results]
    return None if len(set(groups)) == len(groups) else groups


def row_of(
    results: Sequence[Result],
    base: Mapping[tuple[str, int, int], Result] | None,
    axis: str,
    failed: int,
    rng: np.random.Generator,
) -> Row:
    """The row of one plan from its finished results. `base`: the reference's, by example; None for the
    reference."""
    first, n = results[0], len(results)
    groups = groups_of(results)
    points = [float(r.score or 0.0) for r in results]
    saving = difference = test = smallest = None
    both: list[tuple[Result, Result]] = []
    if base is not None:
        both = [(r, base[example_of(r)]) for r in results if example_of(r) in base]
    if both:
        ours, theirs = [r for r, _ in both], [r for _, r in both]
        pairs = groups_of(ours)
        a, b = [float(r.score or 0.0) for r in ours], [float(r.score or 0.0) for r in theirs]
        costs, base_costs = [value(r, axis) for r in ours], [value(r, axis) for r in theirs]
        difference = stats.difference(a, b, rng, groups=pairs)
        smallest = stats.smallest_detectable(a, b, groups=pairs, power=POWER)
        if sum(base_costs) > 0:
            saving = stats.saving(costs, base_costs, rng, groups=pairs)
        if pairs is None and set(a) | set(b) <= {0.0, 1.0}:
            test = stats.mcnemar(a, b)
    score = stats.mean(points, rng, groups=groups)
    output = _mean([r.spend.output for r in results])
    answer_input = _mean([r.roles["answer"].input if "answer" in r.roles else r.spend.input for r in results])
    return Row(
        plan=first.plan,
        hash=first.plan_hash,
        methods=first.methods,
        n=n,
        score=score,
        input=answer_input,
        other_input=_mean([r.spend.input for r in results]) - answer_input,
        cached=_mean([r.spend.cached for r in results]),
        output=output,
        axis=stats.mean([value(r, axis) for r in results], rng, groups=groups, support=(-math.inf, math.inf)),
        saving=saving,
        difference=difference,
        mcnemar=test,
        paired=len(both),
        smallest=smallest,
        fired=_fired(results),
        e3=e3(score.value, output) if output > 0 else None,
        undominated=False,
        refused=sum(r.finish == "budget" or r.error is not None for r in results),
        failed=failed,
        estimated=sum(r.estimated for r in results),
        means={name: _mean([value(r, name) for r in results]) for name in AXES},
    )


# -- details -------------------------------------------------------------------------------------------------


def _fired(results: Sequence[Result]) -> tuple[Fired, ...]:
    calls: Counter[str] = Counter()
    fired: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for result in results:
        for receipt in result.receipts:
            method = str(receipt.get("method", ""))
            if method == BUDGET_RECEIPT:
                continue
            calls[method] += 1
            if receipt.get("fired"):
                fired[method] += 1
            else:
                reasons.setdefault(method, Counter())[str(receipt.get("reason", "no reason given"))] += 1
    names = dict.fromkeys([*results[0].methods, *calls])
    for method in names:
        if not calls[method] and any(r.error is None for r in results):
            # A method that leaves no receipt is the silent no-op that receipts exist to show.
            reasons[method] = Counter({"left no receipt": len(results)})
    return tuple(Fired(m, fired[m], calls[m], _alike(reasons.get(m, Counter()))) for m in names)


def _alike(reasons: Counter[str]) -> tuple[tuple[str, int], ...]:
    """Reasons counted together where they differ in their numbers only, which then read N; the commonest
    first."""
    total: Counter[str] = Counter()
    wordings: dict[str, set[str]] = {}
    for reason, count in reasons.items():
        shape = re.sub(r"\d+(?:[.,]\d+)*", "N", reason)
        total[shape] += count
        wordings.setdefault(shape, set()).add(reason)
    return tuple(
        (shape if len(wordings[shape]) > 1 else next(iter(wordings[shape])), count)
        for shape, count in total.most_common(8)
    )


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)
