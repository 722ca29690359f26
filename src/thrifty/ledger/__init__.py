"""The ledger: the durable, append-only list of settled entries.

    ledger = open_ledger("runs.db")          # SQLite; open_ledger(None) is one in memory
    account = Account("me", Budget(output=1000), ledger=ledger)
    ...
    for row in ledger.summary(by="plan"):
        print(row.key, row.spend)

Importing this package opens nothing and imports no database: the SQLite ledger comes in when one is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, overload

from thrifty.errors import InvalidInput
from thrifty.ledger.entry import NO_LABELS, Entry, HoldRecord, Labels, LedgerLike, Status, Ticket
from thrifty.ledger.memory import MemoryLedger
from thrifty.ledger.query import By, Row, When

if TYPE_CHECKING:
    from thrifty.ledger.chain import KeySource
    from thrifty.ledger.check import Report
    from thrifty.ledger.read import Reader
    from thrifty.ledger.sqlite import Durability, OrphanPolicy, SQLiteLedger

__all__ = [
    "NO_LABELS",
    "Entry",
    "HoldRecord",
    "Labels",
    "Ledger",
    "LedgerLike",
    "MemoryLedger",
    "Row",
    "Status",
    "Ticket",
    "open_ledger",
    "verify",
]


class Ledger(LedgerLike, Protocol):
    """What every ledger that is open for writing can do."""

    @property
    def path(self) -> Path | None:
        """Its file; None in memory."""

    def entries(
        self, since: When = None, until: When = None, where: Mapping[str, str] | None = None
    ) -> Iterator[Entry]:
        """The chosen entries in the order of their commits."""

    def summary(
        self, by: By = "plan", since: When = None, until: When = None, where: Mapping[str, str] | None = None
    ) -> list[Row]:
        """Sums by one or more of plan, method, engine, model, role, prices, account, status, day."""

    def holds(self) -> dict[str, HoldRecord]:
        """The open durable holds by identifier."""

    def __len__(self) -> int:
        """How many entries are committed."""

    def flush(self) -> None:
        """Returns when all that was queued is committed."""

    def unsaved(self) -> list[Entry]:
        """Entries whose commit failed so far."""

    def close(self) -> None:
        """Commits what is queued and closes. Idempotent."""


@overload
def open_ledger(path: None = None) -> MemoryLedger: ...


@overload
def open_ledger(
    path: str | Path,
    *,
    readonly: Literal[False] = False,
    durability: Durability = "process",
    key: KeySource | None = None,
    orphans: OrphanPolicy = "settle",
) -> SQLiteLedger: ...


@overload
def open_ledger(path: str | Path, *, readonly: Literal[True]) -> Reader: ...


def open_ledger(
    path: str | Path | None = None,
    *,
    readonly: bool = False,
    durability: Durability = "process",
    key: KeySource | None = None,
    orphans: OrphanPolicy = "settle",
) -> MemoryLedger | SQLiteLedger | Reader:
    """Opens the ledger at `path`, making it if it is new; without a path, one in memory.

    `readonly` opens an existing file for queries while others write it. `durability`: `process` survives kill -9,
    `power` also a power cut. `key` (bytes or a key file) signs checkpoints. `orphans`: holds of dead writers are
    settled at their full amount (`settle`) or given up (`release`).

    Raises InvalidInput for a file that is no ledger or one of a newer version, LedgerError when it cannot be opened.
    """
    if path is None:
        if readonly or key is not None:
            raise InvalidInput("a ledger in memory can be neither read-only nor signed: give the path of a file")
        return MemoryLedger()
    if readonly:
        if key is not None:
            raise InvalidInput("a read-only ledger signs nothing: give the key to verify or anchor instead")
        from thrifty.ledger.read import Reader

        return Reader(path)
    from thrifty.ledger.sqlite import SQLiteLedger

    return SQLiteLedger(path, durability=durability, key=key, orphans=orphans)


def verify(path: str | Path, key: KeySource | None = None, anchor: str | Path | None = None) -> Report:
    """Checks a ledger file for edits, deletions, truncation and reordering; see `thrifty.ledger.check`."""
    from thrifty.ledger import check

    return check.verify(path, key, anchor)
