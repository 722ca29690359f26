"""Losses: how much worse a plan answers, one number a group, with the range that a bound may count on.

Three kinds, each measured on the same examples as the reference:

- `error`: 1 - score, in [0, 1]; the reference is not looked at;
- `drop`: the reference's score minus the plan's, in [-1, 1]; its signed mean is bounded, so gains make up for losses;
- `disagree`: 1 where the plan's final answer differs from the reference's, else 0. It needs no gold answer, so it can
  be watched in production; it asks for a reference that answers the same each time.

Related examples share a group. A group counts once: its loss is the mean of its examples' losses, and n is the number
of groups. What is not a pair, not a number or outside [0, 1] is refused by the example's name: a hole in the data would
silently become a hole in the guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from thrifty.errors import InvalidInput, nearest

LossKind = Literal["error", "drop", "disagree"]

KINDS: tuple[LossKind, ...] = get_args(LossKind)


@dataclass(frozen=True)
class Scored:
    """One example's result under one plan.

    `score` is in [0, 1]. `answer` is the normalised final answer, or None where none was found; only `disagree` looks
    at it. `group` is the example's own id where it is related to no other.
    """

    example: str
    group: str
    score: float
    answer: str | None = None


@dataclass(frozen=True, eq=False)
class Losses:
    """A plan's losses by group: `values` [n] within [`low`, `high`], in the order of `groups` (sorted, each once).

    Raises: InvalidInput for a value that is not finite or outside the range, and for groups that are not sorted or
    occur twice.
    """

    kind: LossKind
    values: NDArray[np.float64]
    low: float
    high: float
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise InvalidInput(f"losses need low < high, not [{self.low:g}, {self.high:g}]")
        values = np.array(self.values, dtype=np.float64)  # a copy of our own: what is certified must not change later
        values.flags.writeable = False
        object.__setattr__(self, "values", values)
        if values.ndim != 1 or len(values) != len(self.groups):
            raise InvalidInput(f"{len(self.groups)} groups need one loss each, not an array of shape {values.shape}")
        if any(a >= b for a, b in zip(self.groups, self.groups[1:], strict=False)):
            raise InvalidInput("the groups of losses must be sorted, each of them once")
        outside = ~((values >= self.low) & (values <= self.high))  # true for NaN as well
        if outside.any():
            at = int(outside.argmax())
            raise InvalidInput(
                f"group {self.groups[at]!r} has a loss of {values[at]:g}: "
                f"a loss of kind {self.kind!r} lies in [{self.low:g}, {self.high:g}]"
            )

    @property
    def n(self) -> int:
        """The number of groups, which is what the bounds count."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The mean loss over groups, from the exact sum; NaN without any."""
        return math.fsum(self.values) / self.n if self.n else math.nan


def range_of(kind: LossKind) -> tuple[float, float]:
    """The lowest and the highest value of a loss of this kind.

    >>> range_of("drop")
    (-1.0, 1.0)
    """
    if kind not in KINDS:
        raise InvalidInput(nearest(str(kind), KINDS, "loss"))
    return (-1.0, 1.0) if kind == "drop" else (0.0, 1.0)


def losses_of(kind: LossKind, plan: Sequence[Scored], reference: Sequence[Scored]) -> Losses:
    """The losses of a plan against the reference, by group.

    The two may come in any order; `error` does not look at the reference, which may then be empty. For `disagree` an
    answer that was not found agrees with nothing, not even with another one that was not found: where nothing can be
    compared, the loss takes the worse case.

    Raises: InvalidInput for an unknown kind, an example that occurs twice, has no partner, or is in another group
    there, and for a score that is not a number in [0, 1].

    >>> plan = [Scored("a", "a", 1.0), Scored("b1", "b", 0.5), Scored("b2", "b", 0.0)]
    >>> reference = [Scored("a", "a", 1.0), Scored("b1", "b", 1.0), Scored("b2", "b", 1.0)]
    >>> losses = losses_of("drop", plan, reference)
    >>> losses.groups, losses.values.tolist(), losses.mean
    (('a', 'b'), [0.0, 0.75], 0.375)
    """
    low, high = range_of(kind)
    ours = _by_example("the plan", plan)
    theirs = {} if kind == "error" else _by_example("the reference", reference)
    if kind != "error":
        _check_pairs(ours, theirs)
    members: dict[str, list[float]] = {}
    for example, scored in ours.items():
        if kind == "error":
            loss = 1.0 - scored.score
        elif kind == "drop":
            loss = theirs[example].score - scored.score
        else:
            loss = float(scored.answer is None or scored.answer != theirs[example].answer)
        members.setdefault(scored.group, []).append(loss)
    groups = tuple(sorted(members))
    values = np.array([math.fsum(members[g]) / len(members[g]) for g in groups], dtype=np.float64)
    return Losses(kind, values, low, high, groups)


def _by_example(side: str, results: Sequence[Scored]) -> dict[str, Scored]:
    found: dict[str, Scored] = {}
    for scored in results:
        if scored.example in found:
            raise InvalidInput(f"example {scored.example!r} occurs twice in {side}: give each example once")
        if not 0.0 <= scored.score <= 1.0:  # false for NaN as well
            raise InvalidInput(
                f"example {scored.example!r} has the score {scored.score} in {side}: a loss needs a number in [0, 1]"
            )
        found[scored.example] = scored
    return found


def _check_pairs(ours: Mapping[str, Scored], theirs: Mapping[str, Scored]) -> None:
    for here, there, one, other in ((ours, theirs, "plan", "reference"), (theirs, ours, "reference", "plan")):
        missing = sorted(here.keys() - there.keys())
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise InvalidInput(
                f"example {missing[0]!r}{more} has a result of the {one} and none of the {other}: run both on the same"
            )
    for example, scored in ours.items():
        if scored.group != theirs[example].group:
            raise InvalidInput(
                f"example {example!r} is in group {scored.group!r} in the plan's results "
                f"and in {theirs[example].group!r} in the reference's: an example has one group"
            )
