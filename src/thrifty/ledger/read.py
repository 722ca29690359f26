"""Reading a ledger file: entries, summaries, open holds and heads, also while other processes write it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from thrifty.errors import LedgerChanged, LedgerError
from thrifty.ledger.chain import Anchor, Checkpoint, Key, KeySource, load_key
from thrifty.ledger.columns import COLUMNS, NUMBERS, entry_of, unpack_hold
from thrifty.ledger.entry import Entry, HoldRecord
from thrifty.ledger.query import By, Row, Selection, When, groups
from thrifty.ledger.schema import CHAINS, CHECKPOINTS, ENTRIES, HOLDS, META, connect
from thrifty.spend import SPEND_FIELDS, Spend, Work

_MAXIMA = ("kv_bytes_peak", "kv_bytes_mean")  # Work adds these by maximum
_BATCH = 1000


class Reader:
    """A ledger file open for reading. Every query opens a connection of its own and sees one moment of the ledger;
    a long `entries` iteration keeps the moment at which it began.

    Raises InvalidInput for a file that is no ledger, LedgerError when it cannot be read.
    """

    def __init__(self, path: str | Path, busy_seconds: float = 30.0) -> None:
        self.path = Path(path).absolute()
        self._busy_seconds = busy_seconds
        self._engine = sa.create_engine(
            "sqlite://",
            creator=lambda: connect(self.path, readonly=True, busy_seconds=busy_seconds),
            poolclass=sa.pool.NullPool,
        )
        with self._connected() as connection:
            name = connection.execute(sa.select(META.c.value).where(META.c.name == "ledger")).scalar()
        if name is None:
            raise LedgerChanged(f"ledger {self.path} has lost its identifier: it is damaged, restore a copy")
        self._ledger = str(name)

    def entries(
        self, since: When = None, until: When = None, where: Mapping[str, str] | None = None
    ) -> Iterator[Entry]:
        """The chosen entries in the order of their commits, streamed: memory does not grow with the ledger."""
        selection = Selection.of(since, until, where)
        query = sa.select(*(ENTRIES.c[name] for name in COLUMNS)).where(*_conditions(selection)).order_by(ENTRIES.c.id)
        self.flush()
        return (entry_of(row) for row in self._stream(query))

    def records(
        self, since: When = None, until: When = None, where: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Like `entries`, as flat rows: chain name, number, hash in hexadecimal, then COLUMNS."""
        selection = Selection.of(since, until, where)
        query = (
            sa.select(CHAINS.c.name, ENTRIES.c.seq, ENTRIES.c.hash, *(ENTRIES.c[name] for name in COLUMNS))
            .join_from(ENTRIES, CHAINS, CHAINS.c.id == ENTRIES.c.chain)
            .where(*_conditions(selection))
            .order_by(ENTRIES.c.id)
        )
        self.flush()
        return ((row[0], row[1], row[2].hex(), *row[3:]) for row in self._stream(query))

    def summary(
        self, by: By = "plan", since: When = None, until: When = None, where: Mapping[str, str] | None = None
    ) -> list[Row]:
        """Sums by one or more fields, in the order of their values."""
        names = groups(by)
        selection = Selection.of(since, until, where)
        keys = [_key(name).label(f"key_{name}") for name in names]
        sums = [(sa.func.max if n in _MAXIMA else sa.func.sum)(ENTRIES.c[n]) for n in NUMBERS]
        at = ENTRIES.c.at
        query = sa.select(*keys, sa.func.count(), sa.func.min(at), sa.func.max(at), *sums)
        query = query.where(*_conditions(selection)).group_by(*keys).order_by(*keys)
        self.flush()
        return [_row(names, row) for row in self._stream(query) if row[len(names)]]

    def holds(self) -> dict[str, HoldRecord]:
        """The holds that are open now, this process's and others', by identifier."""
        self.flush()
        found = {}
        for hold, record in self._stream(sa.select(HOLDS.c.id, HOLDS.c.record)):
            entry = unpack_hold(record, 0)
            found[hold] = HoldRecord(entry.account, entry.opened, entry.spend, entry.work, entry.labels)
        return found

    def __len__(self) -> int:
        self.flush()
        with self._connected() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(ENTRIES)).scalar_one())

    def __bool__(self) -> bool:
        return True  # an empty ledger is a ledger

    def flush(self) -> None:
        """Nothing to write."""

    def close(self) -> None:
        """Nothing is kept open. Idempotent."""

    def anchor(self, path: str | Path, key: KeySource | None = None) -> Anchor:
        """Writes the heads of all chains to a file, signed with `key` if one is given. Keep it where the writers of
        the ledger cannot write."""
        return self._write_anchor(Path(path), None if key is None else load_key(key))

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # -- details -------------------------------------------------------------------------------------------------

    def _write_anchor(self, path: Path, key: Key | None) -> Anchor:
        with self._connected() as connection:
            heads = connection.execute(sa.select(CHAINS.c.name, CHAINS.c.seq, CHAINS.c.hash).order_by(CHAINS.c.id))
            found = tuple((str(name), int(seq), bytes(head).hex()) for name, seq, head in heads)
            last = connection.execute(sa.select(CHECKPOINTS).order_by(CHECKPOINTS.c.id.desc()).limit(1)).first()
        checkpoint = None if last is None else Checkpoint(*last)
        anchor = Anchor(
            self._ledger,
            time.time_ns(),
            found,
            0 if checkpoint is None else checkpoint.number,
            "" if checkpoint is None else checkpoint.hash,
        )
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(anchor.dump(key))
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise LedgerError(f"anchor {path} cannot be written: {error.strerror or error}") from error
        return anchor

    def _stream(self, query: sa.Select[Any]) -> Iterator[Any]:
        with self._connected() as connection:
            yield from connection.execution_options(stream_results=True, yield_per=_BATCH).execute(query)

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("BEGIN")  # one moment for all that is read
                yield connection
        except DBAPIError as error:
            raise LedgerError(f"ledger {self.path} cannot be read: {error.orig}") from error


def _conditions(selection: Selection) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if selection.since is not None:
        found.append(ENTRIES.c.at >= selection.since)
    if selection.until is not None:
        found.append(ENTRIES.c.at < selection.until)
    for name, wanted in selection.where.items():
        column = ENTRIES.c[name]
        if name == "account":  # '0' is what follows '/': the range holds exactly the texts that begin with 'wanted/'
            found.append((column == wanted) | ((column > f"{wanted}/") & (column < f"{wanted}0")))
        else:
            found.append(column == wanted)
    return found


def _key(name: str) -> sa.ColumnElement[Any]:
    if name == "day":
        return sa.func.strftime("%Y-%m-%d", ENTRIES.c.at // 1_000_000_000, "unixepoch")
    return ENTRIES.c[name]


def _row(by: tuple[str, ...], row: Any) -> Row:
    width = len(by)
    count, first, last = row[width : width + 3]
    sums = row[width + 3 :]
    prefill, kv_reads, target, draft, engine_ns, peak, mean = sums[len(SPEND_FIELDS) :]
    return Row(
        by,
        tuple(row[:width]),
        count,
        Spend(*sums[: len(SPEND_FIELDS)]),
        Work(prefill, kv_reads, target, draft, engine_ns / 1e9, peak, float(mean)),
        first,
        last,
    )
