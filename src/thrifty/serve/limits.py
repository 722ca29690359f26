"""Limits over periods, as policies and keys name them: `usd=5/day`, `tokens=2_000_000/month`, `calls=60/60s`.

A limit is a resource of `Budget`, an amount, and the period in which it may be spent: `hour`, `day` and `month` are
those of the calendar (UTC); `60s`, `24h`, `30d` roll; without one the amount is for all time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from thrifty.budget import RESOURCES
from thrifty.errors import InvalidInput, nearest
from thrifty.limits import Budget

CALENDAR = ("minute", "hour", "day", "month")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FOREVER = "total"
_MOST_SECONDS = 400 * 86400


@dataclass(frozen=True, slots=True)
class Period:
    """A stretch of time: one of the calendar, one that rolls (`seconds`), or all time (`total`)."""

    name: str
    seconds: int = 0

    @classmethod
    def parse(cls, text: str) -> Period:
        """Reads `day`, `24h`, ... Raises InvalidInput.

        >>> Period.parse("24h").seconds, Period.parse("day").seconds
        (86400, 0)
        """
        name = text.strip().lower()
        if name in (*CALENDAR, _FOREVER):
            return cls(name)
        found = re.fullmatch(r"(\d{1,7})([smhd])", name)
        seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
        if not 1 <= seconds <= _MOST_SECONDS:
            raise InvalidInput(
                f"period {text!r}: minute, hour, day, month (calendar, UTC), or a rolling length such as 60s, 24h, "
                "30d (at most 400d) is needed"
            )
        return cls(name, seconds)

    @property
    def rolls(self) -> bool:
        """Whether it is a rolling length rather than a stretch of the calendar."""
        return self.seconds > 0

    def bounds(self, now: float) -> tuple[float, float]:
        """Start and end (Unix seconds) of the stretch that `now` is in; a rolling one ends now.

        >>> Period("day").bounds(90000.0)
        (86400.0, 172800.0)
        """
        if self.name == _FOREVER:
            return 0.0, float("inf")
        if self.rolls:
            return now - self.seconds, now
        at = datetime.fromtimestamp(now, UTC).replace(second=0, microsecond=0)
        if self.name == "minute":
            return at.timestamp(), (at + timedelta(minutes=1)).timestamp()
        at = at.replace(minute=0)
        if self.name == "hour":
            return at.timestamp(), (at + timedelta(hours=1)).timestamp()
        at = at.replace(hour=0)
        if self.name == "day":
            return at.timestamp(), (at + timedelta(days=1)).timestamp()
        at = at.replace(day=1)
        return at.timestamp(), (at + timedelta(days=32)).replace(day=1).timestamp()


@dataclass(frozen=True, slots=True)
class Limit:
    """So much of a resource in a period. `amount` is in the resource's unit: usd in 1e-9 USD."""

    resource: str
    amount: float
    period: Period

    @classmethod
    def parse(cls, text: Any) -> Limit:
        """Reads `usd=5/day`. Raises InvalidInput.

        >>> str(Limit.parse("usd = 2.50 / month")), Limit.parse("calls=60/60s").amount
        ('usd=2.5/month', 60)
        """
        if not isinstance(text, str):
            raise InvalidInput(f"limit {text!r}: text such as 'usd=5/day' is needed")
        name, equals, rest = (part.strip() for part in text.partition("="))
        amount, _, period = (part.strip() for part in rest.partition("/"))
        known = [r for r in RESOURCES if r != "kv_bytes_peak"]
        if not equals or not amount:
            raise InvalidInput(f"limit {text!r}: RESOURCE=AMOUNT/PERIOD is needed, such as usd=5/day")
        if name not in known:
            raise InvalidInput(nearest(name, known, "resource in a limit"))
        try:
            number = float(amount.replace("_", "").replace(",", ""))
            value: Any = int(number) if number.is_integer() and name != "usd" else number
        except (ValueError, OverflowError) as error:
            raise InvalidInput(f"limit {text!r}: {amount!r} is no number") from error
        budget = Budget.from_dict({name: value})
        return cls(name, budget.limits()[name], Period.parse(period or _FOREVER))

    def __str__(self) -> str:
        amount = Budget(**{self.resource: self.amount}).to_dict()[self.resource]  # type: ignore[arg-type]
        tail = "" if self.period.name == _FOREVER else f"/{self.period.name}"
        return f"{self.resource}={amount:g}{tail}" if amount < 1e6 else f"{self.resource}={amount:.0f}{tail}"


def parse_limits(texts: Iterable[Any], where: str = "limits") -> tuple[Limit, ...]:
    """Several limits. Raises InvalidInput for a resource that is limited twice over one period."""
    limits = tuple(Limit.parse(text) for text in texts)
    seen: set[tuple[str, str]] = set()
    for limit in limits:
        name = (limit.resource, limit.period.name)
        if name in seen:
            raise InvalidInput(f"{where}: {limit.resource} is limited twice a {limit.period.name}: give one limit")
        seen.add(name)
    return limits
