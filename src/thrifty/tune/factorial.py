"""Designs over the factors of a space: one factor at a time, and the full factorial.

One factor at a time (OFAT) starts from the baseline, sweeps the first factor with all others fixed, keeps its best
level, goes on with the second, and so on. With L_f levels of factor f it makes sum(L_f) - F + 1 runs, because every
sweep shares one run with what was run before; the full factorial makes prod(L_f). Where factors act additively both
find the best; where two interact OFAT can miss it. Source: "Problem Solved? Information Extraction Design Space for
Layout-Rich Documents using LLMs" (LayIE-LLM), which compares the two by their best score and their total tokens.

Factors that do not count under the choice at hand (knobs of a method that is not in the plan) are not swept.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from thrifty.instrument import Instrument
from thrifty.tune.space import Factor

INSTRUMENT = Instrument(
    name="one-factor-at-a-time",
    kind="analysis",
    paper="Problem Solved? Information Extraction Design Space for Layout-Rich Documents using LLMs (LayIE-LLM)",
    runs="thrifty tune --strategy ofat",
)

Choice: TypeAlias = Mapping[str, Any]
Value: TypeAlias = tuple[float, ...]
"""What is maximised: compared entry by entry, so that a later one breaks ties."""
Evaluate: TypeAlias = Callable[[Sequence[Choice]], Awaitable[Sequence[Value | None]]]
"""Values of choices; None for one that cannot be run."""
Active: TypeAlias = Callable[[Choice], Sequence[Factor]]


@dataclass(frozen=True)
class Walk:
    """What a walk tried, in order; `value` is None when nothing could be run."""

    best: Choice
    value: Value | None
    tried: tuple[tuple[Choice, Value | None], ...]

    @property
    def runs(self) -> int:
        """Choices that were evaluated, each once."""
        return len(self.tried)


def ofat_runs(factors: Sequence[Factor]) -> int:
    """Runs of a walk over factors that all count: sum of levels - factors + 1.

    >>> ofat_runs([Factor("a", (1, 2, 3)), Factor("b", (1, 2))])
    4
    """
    return sum(len(f.levels) for f in factors) - len(factors) + 1


def factorial_runs(factors: Sequence[Factor]) -> int:
    """Runs of the full factorial over factors that all count: product of levels."""
    return math.prod(len(f.levels) for f in factors)


async def one_at_a_time(baseline: Choice, factors: Sequence[Factor], active: Active, evaluate: Evaluate) -> Walk:
    """The walk. `factors` in the order of their sweeps; `active(choice)` are those that count; levels that equal the
    incumbent's value keep the incumbent. Each sweep is one call of `evaluate`, so that its runs can share work.

    An incumbent that cannot be run loses against any level that can.
    """
    best: dict[str, Any] = dict(baseline)
    (value,) = await evaluate([best])
    tried: list[tuple[Choice, Value | None]] = [(dict(best), value)]
    for factor in factors:
        if factor.name not in {f.name for f in active(best)}:
            continue
        others = [{**best, factor.name: level} for level in factor.levels if level != best[factor.name]]
        found = await evaluate(others) if others else []
        for choice, other in zip(others, found, strict=True):
            tried.append((choice, other))
            if other is not None and (value is None or other > value):
                best, value = choice, other
    return Walk(best, value, tuple(tried))
