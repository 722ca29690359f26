"""Spend (what is billed) and Work (what it took): the two amounts that budgets limit and ledgers record.

Both are immutable and add field by field. `cached` and `visual` are parts of `input`, `reasoning` is a part of
`output`, so `tokens` = input + output counts nothing twice. Money is an integer of 1e-9 USD: sums stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from thrifty.errors import InvalidInput, nearest

NANO = 1_000_000_000
"""Units of `usd` in one US dollar."""


@dataclass(frozen=True, slots=True)
class Spend:
    """What a provider bills. All fields are non-negative integers.

    >>> Spend(input=10, cached=4) + Spend(input=5, output=2, calls=1)
    Spend(input=15, cached=4, visual=0, output=2, reasoning=0, calls=1, tool_calls=0, usd=0)
    """

    input: int = 0
    """input tokens, cached and visual ones included"""
    cached: int = 0
    """input tokens that the provider had cached (a part of `input`)"""
    visual: int = 0
    """input tokens that stand for images (a part of `input`)"""
    output: int = 0
    """output tokens, forced and reasoning ones included"""
    reasoning: int = 0
    """output tokens spent thinking (a part of `output`)"""
    calls: int = 0
    """requests to an engine"""
    tool_calls: int = 0
    """tool calls that the model made"""
    usd: int = 0
    """price in 1e-9 USD"""

    @property
    def tokens(self) -> int:
        """Input plus output tokens."""
        return self.input + self.output

    def __add__(self, other: Spend) -> Spend:
        return Spend(
            self.input + other.input,
            self.cached + other.cached,
            self.visual + other.visual,
            self.output + other.output,
            self.reasoning + other.reasoning,
            self.calls + other.calls,
            self.tool_calls + other.tool_calls,
            self.usd + other.usd,
        )

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in SPEND_FIELDS)

    def to_dict(self) -> dict[str, int]:
        """Only the fields that are not zero."""
        return {name: value for name in SPEND_FIELDS if (value := getattr(self, name))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spend:
        """The opposite of `to_dict`. Raises InvalidInput for an unknown field or a value that is not a count."""
        return cls(**_counts(data, SPEND_FIELDS, "Spend field"))


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine did. The first five fields add; `kv_bytes_peak` combines by maximum, `kv_bytes_mean` by
    maximum too (it is reported, never limited)."""

    prefill: int = 0
    """tokens whose keys and values were computed from a prompt"""
    kv_reads: int = 0
    """key-value entries read by attention, summed over the steps: one entry is one position in one layer"""
    target_passes: int = 0
    """forward passes of the answering model"""
    draft_passes: int = 0
    """forward passes of a draft model"""
    engine_seconds: float = 0.0
    """seconds in which the engine computed for this generation"""
    kv_bytes_peak: int = 0
    """largest sum of KV bytes over branches alive at once"""
    kv_bytes_mean: float = 0.0
    """KV bytes averaged over decode steps"""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.prefill + other.prefill,
            self.kv_reads + other.kv_reads,
            self.target_passes + other.target_passes,
            self.draft_passes + other.draft_passes,
            self.engine_seconds + other.engine_seconds,
            max(self.kv_bytes_peak, other.kv_bytes_peak),
            max(self.kv_bytes_mean, other.kv_bytes_mean),
        )

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in WORK_FIELDS)

    def to_dict(self) -> dict[str, float]:
        """Only the fields that are not zero."""
        return {name: value for name in WORK_FIELDS if (value := getattr(self, name))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Work:
        """The opposite of `to_dict`. Raises InvalidInput for an unknown field or a negative value."""
        return cls(**_counts(data, WORK_FIELDS, "Work field", real=("engine_seconds", "kv_bytes_mean")))


SPEND_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Spend))
WORK_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Work))
WORK_ADDING: tuple[str, ...] = WORK_FIELDS[:5]
"""Work's fields that add, and so can be held and settled."""


def total_spend(parts: Iterable[Spend]) -> Spend:
    """The sum of any number of Spends; zero for none."""
    total = Spend()
    for part in parts:
        total = total + part
    return total


def total_work(parts: Iterable[Work]) -> Work:
    """The sum of any number of Works; zero for none."""
    total = Work()
    for part in parts:
        total = total + part
    return total


def _counts(data: Mapping[str, Any], known: tuple[str, ...], kind: str, real: tuple[str, ...] = ()) -> dict[str, Any]:
    for name, value in data.items():
        if name not in known:
            raise InvalidInput(nearest(name, known, kind))
        good = (int, float) if name in real else (int,)
        if isinstance(value, bool) or not isinstance(value, good) or not 0 <= value < math.inf:
            raise InvalidInput(f"{kind} {name} = {value!r}: a number of at least 0 is needed")
    return dict(data)
