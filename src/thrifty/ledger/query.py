"""What a ledger tells: entries chosen by time and labels, and their sums by plan, method, model, day and so on.

This module knows no database. `Selection` is what is asked for, `Row` is what a summary answers, and `summarise` sums
entries in memory; `sqlite.py` says the same in SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

from thrifty.errors import InvalidInput
from thrifty.ledger.columns import FILTERS, LABELS, check_names, moment
from thrifty.ledger.entry import Entry
from thrifty.spend import Spend, Work

GROUPS: tuple[str, ...] = (*FILTERS, "day")
"""What summaries can be made by. Days are UTC days of the settlement."""

When: TypeAlias = "int | str | datetime | None"
"""Unix nanoseconds, ISO text or a datetime (both UTC unless they say otherwise), or no bound."""

By: TypeAlias = "str | Sequence[str]"


@dataclass(frozen=True, slots=True)
class Selection:
    """Entries settled at `since` or later and before `until`, whose labels equal `where`. An account in `where` stands
    for itself and all accounts below it."""

    since: int | None = None
    until: int | None = None
    where: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, since: When, until: When, where: Mapping[str, str] | None) -> Selection:
        """Raises InvalidInput for a field that entries cannot be chosen by, or a time that is none."""
        where = dict(where or {})
        check_names(list(where), FILTERS, "ledger field")
        return cls(moment(since), moment(until), where)

    def __contains__(self, entry: Entry) -> bool:
        if (self.since is not None and entry.at < self.since) or (self.until is not None and entry.at >= self.until):
            return False
        for name, wanted in self.where.items():
            value = key_of(entry, name)
            if value != wanted and not (name == "account" and value.startswith(f"{wanted}/")):
                return False
        return True


@dataclass(frozen=True, slots=True)
class Row:
    """The sums of one group. `first` and `last` are the times of its first and last settlement, Unix nanoseconds."""

    by: tuple[str, ...]
    key: tuple[str, ...]
    """the group's values, one for each of `by`"""
    entries: int
    spend: Spend
    work: Work
    first: int
    last: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the group's fields by name, then the sums."""
        named = dict(zip(self.by, self.key, strict=True))
        sums = {"entries": self.entries, "spend": self.spend.to_dict(), "work": self.work.to_dict()}
        return {**named, **sums, "first": self.first, "last": self.last}


def groups(by: By) -> tuple[str, ...]:
    """The fields to group by, checked. No fields: one row for all."""
    names = (by,) if isinstance(by, str) else tuple(by)
    check_names(names, GROUPS, "ledger field")
    if len(set(names)) != len(names):
        raise InvalidInput(f"summary by {', '.join(names)}: name each field once")
    return names


def key_of(entry: Entry, name: str) -> str:
    """The value of a field that entries are grouped or chosen by."""
    if name == "day":
        return datetime.fromtimestamp(entry.at // 1_000_000_000, UTC).strftime("%Y-%m-%d")
    return str(getattr(entry.labels if name in LABELS else entry, name))


def summarise(entries: Iterable[Entry], by: tuple[str, ...]) -> list[Row]:
    """Sums entries by group, in the order of the keys."""
    rows: dict[tuple[str, ...], Row] = {}
    for entry in entries:
        key = tuple(key_of(entry, name) for name in by)
        old = rows.get(key)
        if old is None:
            rows[key] = Row(by, key, 1, entry.spend, entry.work, entry.at, entry.at)
        else:
            rows[key] = Row(
                by,
                key,
                old.entries + 1,
                old.spend + entry.spend,
                old.work + entry.work,
                min(old.first, entry.at),
                max(old.last, entry.at),
            )
    return [rows[key] for key in sorted(rows)]
