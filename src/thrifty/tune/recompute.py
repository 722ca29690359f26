"""A certificate computed again from its recorded losses, by the same functions that the tuning run called.

What is compared: the plan's hash with its text, the number and order of what was tested with what was frozen, the mean
loss, the p value or corrected risk, and whether the test certifies the plan. With the examples at hand also that they
are those: their hash and their groups.

The losses themselves are believed: who doubts them runs the plan on the examples again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.bench.task import Task
from thrifty.errors import InvalidInput
from thrifty.tune.bounds import p_value
from thrifty.tune.certificate import Certificate
from thrifty.tune.crc import conformal_risk_control
from thrifty.tune.ltt import fixed_sequence
from thrifty.tune.splits import data_hash, groups_of, split

_TOLERANCE = 1e-9  # relative: other processors and libraries round otherwise


@dataclass(frozen=True)
class Recomputed:
    """What came out, and in what it contradicts the certificate (nothing: `ok`).

    `certified` counts the tested plans that the procedure certifies.
    """

    problems: tuple[str, ...]
    value: float | None = None
    p_value: float | None = None
    corrected: float | None = None
    certified: int = 0

    @property
    def ok(self) -> bool:
        """Whether the certificate follows from its losses."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ok": self.ok,
            "problems": list(self.problems),
            "value": self.value,
            "p_value": self.p_value,
            "corrected": self.corrected,
            "certified": self.certified,
        }


def recompute(certificate: Certificate, *, figures: bool = True) -> Recomputed:
    """Redoes the statistics. `figures=False` leaves out the comparison with the figures that it states."""
    c = certificate
    problems = _check_plan(c) + _check_shape(c)
    at = next((i for i, tested in enumerate(c.tested) if tested.plan == c.plan_hash), None)
    if at is None:
        problems.append(f"plan {c.plan_hash} is not among the plans that were tested")
    if problems or at is None:
        return Recomputed(tuple(problems))
    try:
        losses = [c.losses(tested) for tested in c.tested]
        value = losses[at].mean
        if c.claim.procedure == "conformal-risk-control":
            import numpy as np

            table = np.stack([each.values for each in losses], axis=1)
            result = conformal_risk_control(table, c.claim.alpha, losses[0].low, losses[0].high)
            certified = 0 if result.index is None else result.index + 1
            found = Recomputed((), value, None, float(result.corrected[at]), certified)
        else:
            bound, delta = c.claim.bound, c.delta
            if bound is None or delta is None:
                return Recomputed(("learn-then-test needs a bound and a delta",))
            p_values = [p_value(bound, each, c.claim.alpha) for each in losses]
            found = Recomputed((), value, p_values[at], None, fixed_sequence(p_values, delta))
    except InvalidInput as error:
        return Recomputed((str(error),))
    if at >= found.certified:
        problems.append(_not_certified(c, at, found))
    if figures:
        problems += [
            f"{what} is stated as {stated} and comes out as {computed}"
            for what, stated, computed in (
                ("the mean loss", c.value, found.value),
                ("the p value", c.p_value, found.p_value),
                ("the corrected risk", c.corrected, found.corrected),
            )
            if not _same(stated, computed)
        ]
    return Recomputed(tuple(problems), found.value, found.p_value, found.corrected, found.certified)


def check_data(certificate: Certificate, tasks: Sequence[Task]) -> list[str]:
    """In what these examples are not those of the certificate: the calibration part, or the whole file it was cut from.

    Raises: InvalidInput for no examples and for an id that occurs twice.
    """
    c, given = certificate, data_hash(tasks)
    if given != c.data_hash:
        if c.split is None or given != c.split.data_hash:
            wanted = c.data_hash if c.split is None else c.split.data_hash
            return [f"the examples are not those that were used: their hash is {given}, not {wanted}"]
        try:
            tasks = split(tasks, shares=c.split.shares, seed=c.split.seed).calibration
        except InvalidInput as error:
            return [f"the examples cannot be cut as the certificate says: {error}"]
        if data_hash(tasks) != c.data_hash:
            return ["the calibration part, cut as the certificate says, is not the one it names"]
    if groups_of(tasks) != c.groups:
        return ["the losses are of other groups than those of the examples"]
    return []


# Details.


def _check_plan(c: Certificate) -> list[str]:
    try:
        plan = c.plan
    except InvalidInput as error:
        return [f"the plan cannot be read here: {error}"]
    if plan.hash != c.plan_hash:
        return [
            f"the plan's text has the hash {plan.hash} here, not {c.plan_hash}: it was changed, or this Thrifty has "
            "other versions of its methods"
        ]
    return []


def _check_shape(c: Certificate) -> list[str]:
    problems = []
    if c.n != len(c.groups):
        problems.append(f"n is stated as {c.n}, and there are {len(c.groups)} groups")
    for tested in c.tested:
        if len(tested.losses) != len(c.groups):
            problems.append(f"plan {tested.plan} has {len(tested.losses)} losses for {len(c.groups)} groups")
    hashes = [tested.plan for tested in c.tested]
    if len(set(hashes)) != len(hashes):
        problems.append("a plan was tested twice")
    frozen = [plan for plan in c.order if plan != c.reference_hash]
    others = [plan for plan in hashes if plan != c.reference_hash]
    if others != frozen[: len(others)]:
        problems.append("the plans were not tested in the order that was frozen")
    if c.claim.delta is None:
        if c.delta is not None:
            problems.append("conformal risk control has no delta, and one is stated")
        if c.uses != 1:
            problems.append(f"conformal risk control may use examples once, and this is use {c.uses}")
    elif c.delta is None or not 0 < c.delta <= c.claim.delta:
        problems.append(f"it was tested at delta {c.delta}, and {c.claim.delta:g} was asked for")
    elif c.uses < 1 or c.spent is None or c.spent < c.delta * (1 - _TOLERANCE):
        problems.append(f"use {c.uses} of these examples states {c.spent} as the sum of all deltas")
    return problems


def _not_certified(c: Certificate, at: int, found: Recomputed) -> str:
    if c.claim.procedure == "conformal-risk-control":
        return (
            f"the corrected risk of plan {c.plan_hash} is {found.corrected:.4g}, above alpha {c.claim.alpha:g}: it is "
            "not certified"
        )
    if at > found.certified:
        return (
            f"plan {c.plan_hash} stands behind plan {c.tested[found.certified].plan} in the test, which failed: it is "
            "not certified"
        )
    return f"the p value of plan {c.plan_hash} is {found.p_value:.4g}, above delta {c.delta}: it is not certified"


def _same(stated: float | None, computed: float | None) -> bool:
    if stated is None or computed is None:
        return stated is computed
    return math.isclose(stated, computed, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
