"""A Budget: limits on Spend and Work, checked when it is made.

Whole numbers, but for seconds. What can be held is in `resources.py`; `kv_bytes_peak` is checked when memory is
taken and `deadline` whenever something is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from thrifty.errors import InvalidInput, nearest
from thrifty.spend import NANO

_MOST = 2**62  # above this, sums of limits could leave 64-bit integers


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on Spend and Work. None means unlimited.

    `tokens` limits input + output; `usd` is in 1e-9 USD (`from_dict`, and so TOML, takes dollars). `kv_bytes_peak` is
    checked when memory is taken. `deadline` is in seconds of wall clock after the account was opened; it is checked at
    every hold and growth, not held.

    >>> Budget(output=100)
    Budget(output=100)
    """

    tokens: int | None = None
    input: int | None = None
    cached: int | None = None
    visual: int | None = None
    output: int | None = None
    reasoning: int | None = None
    calls: int | None = None
    tool_calls: int | None = None
    usd: int | None = None
    prefill: int | None = None
    kv_reads: int | None = None
    target_passes: int | None = None
    draft_passes: int | None = None
    engine_seconds: float | None = None
    kv_bytes_peak: int | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            real = name in ("engine_seconds", "deadline")
            kinds = (int, float) if real else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= _MOST:
                kind = "number" if real else "whole number"
                raise InvalidInput(f"budget {name} = {value!r}: a {kind} from 0 to {_MOST:,} is needed")

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{k}={v!r}' for k, v in self.limits().items())})"

    def limits(self) -> dict[str, float]:
        """Only the limits that are set."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def to_dict(self) -> dict[str, float]:
        """As TOML has it: only what is limited, usd in dollars."""
        limits = self.limits()
        if "usd" in limits:
            limits["usd"] = float(Decimal(int(limits["usd"])) / NANO)
        return limits

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Reads what `to_dict` writes; raises InvalidInput for an unknown resource or an absurd value.

        >>> Budget.from_dict({"usd": 0.25, "output": 96})
        Budget(output=96, usd=250000000)
        """
        known = [f.name for f in fields(cls)]
        values = dict(data)
        for name in values:
            if name not in known:
                raise InvalidInput(nearest(name, known, "budget resource"))
        if "usd" in values:
            values["usd"] = _nano(values["usd"])
        return cls(**values)


def tightest(budgets: Iterable[Budget]) -> Budget:
    """The budget that allows only what each of them allows."""
    limits: dict[str, Any] = {}
    for budget in budgets:
        for name, limit in budget.limits().items():
            limits[name] = min(limit, limits.get(name, limit))
    return replace(Budget(), **limits)


def _nano(dollars: Any) -> int:
    try:
        if isinstance(dollars, bool):
            raise InvalidOperation
        exact = Decimal(str(dollars)) * NANO
        amount = int(exact.to_integral_value())
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise InvalidInput(f"budget usd = {dollars!r}: an amount in dollars is needed, such as 0.25") from error
    if amount < 0 or (exact and not amount):
        raise InvalidInput(f"budget usd = {dollars!r}: 0, or at least 0.000000001 dollars, is needed")
    return amount
