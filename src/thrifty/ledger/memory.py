"""A ledger in memory: for tests, for single runs, and wherever nothing must outlive the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thrifty.errors import LedgerError
from thrifty.ledger.entry import Entry, HoldRecord
from thrifty.ledger.query import By, Row, Selection, When, groups, summarise


class MemoryLedger:
    """A list of entries with the interface and the queries of a durable ledger. It has no chain and nothing to
    verify; a hold that is open when the process ends is gone with it."""

    path: Path | None = None

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._holds: dict[str, HoldRecord] = {}
        self._opened = 0
        self._lock = threading.Lock()
        self._closed = False

    def append(self, entry: Entry, hold: str | None = None) -> Committed:
        """Records an entry and closes the hold it came from. Raises LedgerError after `close`."""
        if self._closed:
            raise LedgerError("the ledger is closed: open it again to append")
        with self._lock:
            self._entries.append(entry)
            if hold is not None:
                self._holds.pop(hold, None)
        return _COMMITTED

    def open_hold(self, record: HoldRecord) -> str:
        """Records a hold and returns its identifier. Raises LedgerError after `close`."""
        if self._closed:
            raise LedgerError("the ledger is closed: open it again to hold")
        with self._lock:
            self._opened += 1
            hold = f"memory:{self._opened}"
            self._holds[hold] = record
        return hold

    def drop_hold(self, hold: str) -> None:
        """Forgets a hold: nothing was spent."""
        with self._lock:
            self._holds.pop(hold, None)

    def holds(self) -> dict[str, HoldRecord]:
        """The open holds by identifier."""
        with self._lock:
            return dict(self._holds)

    def entries(
        self, since: When = None, until: When = None, where: Mapping[str, str] | None = None
    ) -> Iterator[Entry]:
        """The chosen entries in the order of their commits; those appended later do not appear."""
        selection = Selection.of(since, until, where)
        with self._lock:
            entries = self._entries[:]
        return (entry for entry in entries if entry in selection)

    def summary(
        self, by: By = "plan", since: When = None, until: When = None, where: Mapping[str, str] | None = None
    ) -> list[Row]:
        """Sums by one or more fields, in the order of their values."""
        return summarise(self.entries(since, until, where), groups(by))

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return True  # an empty ledger is a ledger

    def flush(self) -> None:
        """Does nothing: every entry is where it will stay."""

    def unsaved(self) -> list[Entry]:
        """Always empty."""
        return []

    def close(self) -> None:
        """Refuses further entries; what is there can still be read. Idempotent."""
        self._closed = True

    def __enter__(self) -> MemoryLedger:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


class Committed:
    """The ticket of an entry that needs no waiting."""

    __slots__ = ()

    def wait(self) -> None:
        """Returns at once."""

    async def done(self) -> None:
        """Returns at once."""


_COMMITTED = Committed()
