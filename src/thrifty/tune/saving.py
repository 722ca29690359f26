"""What a certified plan spends beside the reference, what that is worth a month, and what the tuning itself cost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thrifty.bench import stats
from thrifty.bench.row import AXES, LEVEL, value
from thrifty.bench.store import Result, Store
from thrifty.errors import InvalidInput
from thrifty.plan import Plan
from thrifty.spend import Spend, total_spend
from thrifty.tune.certificate import Figure, Saving
from thrifty.tune.cost import scaled
from thrifty.tune.losses import Losses
from thrifty.tune.paired import Part
from thrifty.tune.splits import Splits, group_of

DAYS = 30.44
"""Of a month: a year has 12."""

_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0, "week": 604800.0, "month": DAYS * 86400.0}


@dataclass(frozen=True)
class Beside:
    """Plan and reference on the same `n` examples, calibration and holdout together: nothing was searched on them, and
    the plan was chosen without a look at what it spends there. `means`: reference and plan, a request, by axis;
    `shares`: what is saved of an axis."""

    n: int
    means: Mapping[str, tuple[float, float]]
    shares: Mapping[str, Figure]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "n": self.n,
            "axes": {
                axis: {
                    "reference": base,
                    "plan": plan,
                    "saving": None
                    if axis not in self.shares
                    else {name: getattr(self.shares[axis], name) for name in ("value", "low", "high", "level")},
                }
                for axis, (base, plan) in self.means.items()
            },
        }


def beside(parts: Sequence[Part], plan: Plan, reference: Plan, seed: int = 0) -> Beside | None:
    """Compares costs on the examples that both have; None where there are none."""
    pairs: list[tuple[Result, Result, str]] = []
    for part in parts:
        base = {r.task_hash: r for r in part.results(reference)}
        groups = {task.hash(): group_of(task) for task in part.tasks}
        pairs += [(r, base[r.task_hash], groups[r.task_hash]) for r in part.results(plan) if r.task_hash in base]
    if not pairs:
        return None
    names = [group for _, _, group in pairs]
    means: dict[str, tuple[float, float]] = {}
    shares: dict[str, Figure] = {}
    for axis in AXES:
        ours, theirs = [value(r, axis) for r, _, _ in pairs], [value(b, axis) for _, b, _ in pairs]
        if not any(theirs) and not any(ours):
            continue
        means[axis] = (math.fsum(theirs) / len(pairs), math.fsum(ours) / len(pairs))
        if sum(theirs) > 0 and len(set(names)) > 1:
            found = stats.saving(ours, theirs, np.random.default_rng(seed), groups=names, level=LEVEL)
            if math.isfinite(found.low) and math.isfinite(found.high):
                shares[axis] = Figure(found.value, found.low, found.high, LEVEL, found.n)
    return Beside(len(pairs), means, shares)


def saving_of(compared: Beside, axis: str) -> Saving | None:
    """The saving that a certificate states; None where it has no interval."""
    if axis not in compared.shares:
        return None
    base, plan = compared.means[axis]
    return Saving(axis, compared.shares[axis], base, plan)


def figure(losses: Losses, seed: int = 0) -> Figure:
    """The mean loss with its interval, over groups; the whole range where so few say nothing."""
    found = stats.mean(losses.values, np.random.default_rng(seed), support=(losses.low, losses.high), level=LEVEL)
    low = found.low if math.isfinite(found.low) else losses.low
    high = found.high if math.isfinite(found.high) else losses.high
    return Figure(losses.mean, low, high, LEVEL, losses.n)


def naive_grid(store: Store, splits: Splits, plans: int) -> tuple[Spend, Spend]:
    """What was paid for the results of these examples, earlier runs included, and what a grid would have cost: every
    plan of the space on every example, each as if it ran alone. A plan that was not tried, or only on some examples, is
    taken to cost what was seen of it, or the mean of those that were."""
    tasks = {task.hash() for part in splits.parts().values() for task in part}
    own = [r for r in store.results.values() if r.task_hash in tasks]
    paid = total_spend([*(r.incurred for r in own), *(r.judged for r in own)])
    by_plan: dict[str, list[Result]] = {}
    for result in own:
        if result.score is not None:
            by_plan.setdefault(result.plan_hash, []).append(result)
    if not by_plan:
        return paid, Spend()
    whole = [scaled(total_spend(r.spend for r in rs), len(tasks) / len(rs)) for rs in by_plan.values()]
    known = total_spend(whole)
    return paid, known if plans <= len(whole) else scaled(known, plans / len(whole))


@dataclass(frozen=True)
class Traffic:
    """Requests a month.

    >>> Traffic.parse("100000/month").requests, round(Traffic.parse("1/second").requests)
    (100000.0, 2630016)
    """

    requests: float

    @classmethod
    def parse(cls, text: str) -> Traffic:
        """`N/second`, `/minute`, `/hour`, `/day`, `/week` or `/month`; a bare number is a month's. Raises
        InvalidInput."""
        match = re.fullmatch(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*(?:/\s*([a-z]+)\s*)?", text.lower())
        per = None if match is None else (match[2] or "month").removesuffix("s")
        if match is None or per not in _SECONDS:
            raise InvalidInput(
                f"traffic {text!r}: a number by second, minute, hour, day, week or month is needed, as 100000/month"
            )
        count = float(match[1].replace("_", "").replace(",", ""))
        if not 0 < count < 1e15:
            raise InvalidInput(f"traffic {text!r}: above 0 requests, and below 1e15, are needed")
        return cls(count * _SECONDS["month"] / _SECONDS[per])


@dataclass(frozen=True)
class Monthly:
    """What a month costs in dollars: with the reference, with the plan, and the saving with its interval."""

    reference: float
    plan: float
    saved: Figure


def monthly(compared: Beside | None, traffic: Traffic) -> Monthly | None:
    """What is saved a month; None where nothing has a price."""
    if compared is None or "usd" not in compared.shares:
        return None
    base, plan = (each * traffic.requests for each in compared.means["usd"])
    share = compared.shares["usd"]
    return Monthly(base, plan, replace(share, value=share.value * base, low=share.low * base, high=share.high * base))
