"""Scores a plan on a few examples: item response theory in the search's service (see `irt`).

Some pilot plans, the reference among them, answer all examples, and the items are fitted on those responses. Every
other plan then answers only the examples that tell most about it for their cost (the pilots' mean spend on them, never
its own), and its mean score over all examples is predicted. What it spends on all of them is estimated from its ratio
to the reference on the examples that both answered.

Predictions serve the search only; whatever is chosen by them is measured on all examples before it is ranked beside
measured plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from thrifty.instrument import Instrument
from thrifty.plan import Plan
from thrifty.tune.irt import AdaptiveTest, Floats, Items, fit, mean_costs
from thrifty.tune.measured import Measured

INSTRUMENT = Instrument(
    name="adaptive-item-selection",
    kind="evaluation",
    paper="Cost-Efficient Estimation of General Abilities Across Benchmarks (WILD)",
    runs="thrifty tune --items adaptive",
)


@dataclass(frozen=True)
class Estimate:
    """What a plan is thought to score and spend on all groups; `sd` of the score is 0 where it was measured."""

    score: float
    axis: float
    sd: float
    groups: int
    """that it answered"""


@dataclass
class Adaptive:
    """Estimates plans. `most`: groups that one plan is asked at most; `gamma`: how much cost counts (see irt)."""

    measured: Measured
    reference: Plan
    most: int = 16
    gamma: float = 0.5
    step: int = 4
    """groups asked at a time: fewer follow the answers more closely, more run side by side"""
    items: Items | None = field(default=None, init=False)
    costs: Floats = field(init=False)

    async def calibrate(self, pilots: Sequence[Plan]) -> bool:
        """Runs the pilots, the reference among them, on everything and fits the items. False when it was stopped
        before there was anything to fit."""
        await self.measured.run(pilots, self.measured.groups)
        scores, costs = self.measured.tables(pilots)
        some = ~np.isnan(scores).all(axis=1)
        if not some.any():
            return False
        self.items = fit(scores[some], dimensions_for(int(some.sum()))).items
        self.costs = mean_costs(costs[some], least=1e-9)
        return self.measured.stopped is None

    async def estimate(self, plans: Sequence[Plan]) -> list[Estimate | None]:
        """One estimate a plan; None for those that the account left without any answer."""
        assert self.items is not None
        groups = self.measured.groups
        tests = [AdaptiveTest(self.items, self.costs, self.gamma, self.most) for _ in plans]
        going = True
        while going:
            going = False
            wanted: dict[tuple[int, ...], list[int]] = {}
            for i, test in enumerate(tests):
                if chosen := test.next(self.step):
                    wanted.setdefault(tuple(sorted(chosen)), []).append(i)
            for picked, who in wanted.items():  # plans that want the same examples run together and share
                if not await self.measured.run([plans[i] for i in who], [groups[g] for g in picked]):
                    break
                scores, _ = self.measured.tables([plans[i] for i in who], [groups[g] for g in picked])
                for row, i in zip(scores, who, strict=True):
                    for g, score in zip(picked, row, strict=True):
                        if not math.isnan(score):
                            tests[i].record(g, float(score))
                            going = True
            if self.measured.stopped is not None:
                break
        return self._estimates(plans, tests)

    def _estimates(self, plans: Sequence[Plan], tests: Sequence[AdaptiveTest]) -> list[Estimate | None]:
        _, costs = self.measured.tables([self.reference, *plans])
        base = costs[0]
        found: list[Estimate | None] = []
        for row, test in zip(costs[1:], tests, strict=True):
            both = ~np.isnan(row) & ~np.isnan(base)
            if not test.asked or not both.any():
                found.append(None)
                continue
            guess = test.prediction()
            there = ~np.isnan(row)
            ratio = row[both].sum() / base[both].sum() if base[both].sum() > 0 else math.nan
            rest = ~there & ~np.isnan(base)
            # The reference's own spend where it was not asked, times how it compares where it was.
            axis = row[there].mean() if math.isnan(ratio) else (row[there].sum() + ratio * base[rest].sum())
            if not math.isnan(ratio):
                axis /= there.sum() + rest.sum()
            found.append(Estimate(guess.mean, float(axis), guess.sd, len(test.asked)))
        return found


def dimensions_for(pilots: int) -> int:
    """Ability dimensions that so many pilots can tell apart: one for eight, at most four.

    With more, predictions from a dozen pilots get worse: each dimension that they leave open draws predictions towards
    the middle.
    """
    return max(1, min(4, pilots // 8))
