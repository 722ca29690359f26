"""The durable ledger: a SQLite file that several processes may write at once, each with a hash chain of its own.

`append` queues and returns; one writer thread commits groups (`group.py`). A ticket is done when its entry is
committed: with durability `process` it then survives the death of the process (kill -9 included), with `power` also a
power cut, at the price of a disk sync a group.

Holds are rows that live until their entry is committed, in the same transaction. Whoever opens the ledger settles
the holds of writers that died (`writers.py`) as `unknown` entries at their full amount, exactly once.
"""

from __future__ import annotations

import atexit
import itertools
import os
import secrets
import socket
import sqlite3
import time
import weakref
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from thrifty.errors import InvalidInput, LedgerError
from thrifty.ledger.chain import Anchor, Checkpoint, Head, Key, KeySource, genesis, link, load_key, make_checkpoint
from thrifty.ledger.columns import COLUMNS, Flat, canonical, entry_of, flat, pack_hold, unpack_hold
from thrifty.ledger.entry import Entry, HoldRecord
from thrifty.ledger.group import Group, GroupTicket, GroupWriter, Orphans
from thrifty.ledger.read import Reader
from thrifty.ledger.schema import connect
from thrifty.ledger.writers import WriterLock, is_dead

Durability = Literal["process", "power"]
OrphanPolicy = Literal["settle", "release"]

CHECKPOINT_ENTRIES = 10_000
CHECKPOINT_SECONDS = 60.0
_CLOSED = "the ledger is closed: open it again to append"
_FORKED = "the ledger was opened before a fork: open it again in the child process"
_ENTRY_COLUMNS = ("chain", "seq", "prev", "hash", *COLUMNS)


class SQLiteLedger(Reader):
    """A ledger file open for writing. Use it in a `with` block, or `close` it.

    `key` signs checkpoints (every 10,000 entries, every minute in which something is appended, and at the end).
    `orphans` says what becomes of dead writers' holds: settled as `unknown` at their full amount, or released.
    `most_waiting` bounds the queue: beyond it `append` blocks until the disk has caught up.

    Raises InvalidInput for a file that is no ledger, LedgerError when it cannot be opened.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        durability: Durability = "process",
        key: KeySource | None = None,
        orphans: OrphanPolicy = "settle",
        busy_seconds: float = 30.0,
        most_waiting: int = 100_000,
    ) -> None:
        if durability not in ("process", "power") or orphans not in ("settle", "release"):
            raise InvalidInput(
                f"durability {durability!r}, orphans {orphans!r}: process or power, and settle or release, are allowed"
            )
        if most_waiting < 1 or busy_seconds < 0:
            raise InvalidInput(f"most_waiting {most_waiting}, busy_seconds {busy_seconds}: at least 1 and 0 are needed")
        self._key: Key | None = None if key is None else load_key(key)
        if self._key is not None:
            self._key.sign(b"")  # a public key is refused here, not at the first checkpoint
        path = Path(path).absolute()
        self._connection = connect(path, readonly=False, busy_seconds=busy_seconds, full=durability == "power")
        super().__init__(path, busy_seconds)
        self._closed = False
        self._forked = False
        self._gone = ""
        self._release = orphans == "release"
        self._holds = itertools.count(1)
        self._checkpointed = -CHECKPOINT_SECONDS  # the first commit signs: then a signature is always there
        self._uncovered = 0
        self.chain = secrets.token_hex(8)
        """the name of this writer's chain"""
        self._lock_file: WriterLock | None = None
        try:
            self._lock_file = WriterLock(path, self.chain)
            self._file = _identity(path)
            self._register()
        except (sqlite3.Error, OSError) as error:
            self._let_go()
            raise LedgerError(f"ledger {path} cannot be opened: {error}") from error
        except BaseException:
            self._let_go()
            raise
        self._writer = GroupWriter(self._commit, most_waiting)
        _OPEN.add(self)
        atexit.register(self._at_exit)
        try:
            self.settle_orphans()
        except BaseException:
            self.close()
            raise

    # -- writing -------------------------------------------------------------------------------------------------

    def append(self, entry: Entry, hold: str | None = None) -> GroupTicket:
        """Queues an entry, closing the hold it came from in the same transaction. Blocks only when `most_waiting`
        entries wait. Raises InvalidInput for an entry that cannot be recorded, LedgerError after `close`."""
        return self._writer.add(flat(entry), hold)

    def open_hold(self, record: HoldRecord) -> str:
        """Writes a hold, waits until it is committed, and returns its identifier."""
        hold, ticket = self.queue_hold(record)
        ticket.wait()
        return hold

    def queue_hold(self, record: HoldRecord) -> tuple[str, GroupTicket]:
        """`open_hold` without waiting: for coroutines, which await the ticket before they call a provider."""
        text = pack_hold(record)
        hold = f"{self.chain}:{next(self._holds)}"
        return hold, self._writer.open_hold(hold, text)

    def drop_hold(self, hold: str) -> None:
        """Removes a hold that was released. Returns at once: after a crash in between, the hold is an orphan."""
        self._writer.drop_hold(hold)

    def flush(self) -> None:
        """Returns when all that was queued is committed, what failed before included. Raises LedgerError."""
        self._refuse_forked()
        if not self._closed:
            self._writer.flush().wait()

    def unsaved(self) -> list[Entry]:
        """Entries whose commit failed, oldest first. They are tried again with every commit and by `flush`."""
        return [entry_of(row) for row, _ in self._writer.unsaved()]

    def settle_orphans(self) -> int:
        """Closes the holds of dead writers, exactly once however many processes try; returns how many it closed.

        Called when the ledger is opened; a program that runs for weeks may call it now and then.
        """
        self._refuse_forked()
        with closing(connect(self.path, readonly=False, busy_seconds=self._busy_seconds)) as connection:
            found = connection.execute("SELECT DISTINCT c.id, c.name FROM holds h JOIN chains c ON c.id = h.chain")
            dead = [id for id, name in found.fetchall() if name != self.chain and is_dead(self.path, name)]
        if not dead:
            return 0
        orphans = Orphans(dead)
        self._writer.close_orphans(orphans).wait()
        return orphans.found

    def anchor(self, path: str | Path, key: KeySource | None = None) -> Anchor:
        """Writes the heads of all chains to a file, signed with `key` or else the ledger's own. Keep it where the
        writers of the ledger cannot write. Raises LedgerError when it cannot be written."""
        self.flush()
        return self._write_anchor(Path(path), self._key if key is None else load_key(key))

    def close(self) -> None:
        """Commits what is queued, signs a last checkpoint, and closes the file. Idempotent.

        Raises LedgerError when entries could not be committed: `unsaved()` still has them.
        """
        if self._closed:
            return
        self._closed = True
        if self._forked:
            return
        atexit.unregister(self._at_exit)
        _OPEN.discard(self)
        self._writer.close(_CLOSED)
        self._let_go()
        lost = len(self._writer.unsaved())
        if lost:
            raise LedgerError(f"ledger {self.path} closed with {lost:,} entries not committed: see unsaved()")

    def __enter__(self) -> SQLiteLedger:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # -- details: the transaction ----------------------------------------------------------------------------------

    def _commit(self, group: Group) -> None:
        """Writes one group in one transaction; the writer thread's only task."""
        sign = self._key is not None and self._due(group)
        if not (group.entries or group.opened or group.closed or group.orphans or sign):
            return
        if self._gone:
            raise LedgerError(self._gone)
        cursor = self._connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            if group.opened:
                values = [value for hold, record in group.opened for value in (hold, self._id, record)]
                _insert(cursor, "holds", ("id", "chain", "record"), values)
            entries = group.entries
            for orphans in group.orphans:
                entries = entries + self._take_orphans(cursor, orphans)
            seq, head = self._link(cursor, entries)
            if group.closed:
                # one statement: with one a hold, this thread would wait for the GIL after each
                closed = canonical(group.closed).decode()
                cursor.execute("DELETE FROM holds WHERE id IN (SELECT value FROM json_each(?))", (closed,))
            if sign:
                self._sign(cursor)
            cursor.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                cursor.execute("ROLLBACK")
            raise
        if _identity(self.path) != self._file:
            self._gone = f"{self.path} was removed or replaced while it was open: save what unsaved() gives"
            raise LedgerError(self._gone)
        self._uncovered = 0 if sign else self._uncovered + len(entries)
        if sign:
            self._checkpointed = time.monotonic()
        self._seq, self._head = seq, head

    def _take_orphans(self, cursor: sqlite3.Cursor, orphans: Orphans) -> list[tuple[Flat, bytes]]:
        """Removes dead writers' holds and returns the entries they become; who comes second finds none."""
        chains = canonical(orphans.chains).decode()
        which = "WHERE chain IN (SELECT value FROM json_each(?))"
        found = cursor.execute(f"SELECT record FROM holds {which} ORDER BY rowid", (chains,)).fetchall()
        cursor.execute(f"DELETE FROM holds {which}", (chains,))
        orphans.found = len(found)
        now = time.time_ns()
        return [] if self._release else [flat(unpack_hold(record, now)) for (record,) in found]

    def _link(self, cursor: sqlite3.Cursor, entries: Sequence[tuple[Flat, bytes]]) -> tuple[int, bytearray]:
        """Adds entries to this writer's chain and moves its head; returns the new one."""
        number, seq, head = self._id, self._seq, self._head
        if not entries:
            return seq, head
        values: list[Any] = []
        for row, data in entries:
            seq += 1
            # bytearrays: sqlite3 binds them without looking for an adapter, which it does for bytes
            after = bytearray(link(head, data))
            values += (number, seq, head, after)
            values += row
            head = after
        _insert(cursor, "entries", _ENTRY_COLUMNS, values)
        cursor.execute("UPDATE chains SET seq = ?, hash = ? WHERE id = ?", (seq, head, number))
        return seq, head

    def _due(self, group: Group) -> bool:
        waiting = self._uncovered + len(group.entries)
        late = time.monotonic() - self._checkpointed >= CHECKPOINT_SECONDS
        return group.last or (waiting > 0 and (waiting >= CHECKPOINT_ENTRIES or late))

    def _sign(self, cursor: sqlite3.Cursor) -> None:
        """Signs the heads that no checkpoint covers yet, this writer's and others'."""
        grown: list[Head] = [
            (name, seq, bytes(head).hex())
            for name, seq, head in cursor.execute("SELECT name, seq, hash FROM chains WHERE seq > covered ORDER BY id")
        ]
        if not grown or self._key is None:
            return
        last = cursor.execute(
            "SELECT id, body, algorithm, key, signature FROM checkpoints ORDER BY id DESC LIMIT 1"
        ).fetchone()
        number, before = (0, "") if last is None else (last[0], Checkpoint(*last).hash)
        made = make_checkpoint(self._key, self._ledger, number + 1, before, time.time_ns(), grown)
        cursor.execute(
            "INSERT INTO checkpoints (id, body, algorithm, key, signature) VALUES (?, ?, ?, ?, ?)",
            (made.number, made.body, made.algorithm, made.key, made.signature),
        )
        cursor.execute("UPDATE chains SET covered = seq WHERE seq > covered")

    # -- details: opening and closing --------------------------------------------------------------------------------

    def _register(self) -> None:
        """Starts this writer's chain."""
        opened, host, pid = time.time_ns(), socket.gethostname(), os.getpid()
        start = genesis(self._ledger, self.chain, opened, host, pid)
        cursor = self._connection.execute(
            "INSERT INTO chains (name, opened, host, pid, seq, hash, covered) VALUES (?, ?, ?, ?, 0, ?, 0)",
            (self.chain, opened, host, pid, start),
        )
        self._id, self._seq, self._head = int(cursor.lastrowid or 0), 0, bytearray(start)

    def _refuse_forked(self) -> None:
        if self._forked:
            raise LedgerError(_FORKED)

    def _let_go(self) -> None:
        self._connection.close()
        if self._lock_file is not None:
            self._lock_file.release()

    def _at_exit(self) -> None:
        if not self._forked:
            self.close()

    def _after_fork(self) -> None:
        """In the child: the writer thread is gone, and SQLite's connections and locks must not be used."""
        self._forked = True
        self._writer.abandon(_FORKED)
        _INHERITED.append(self._connection)  # closing it here could disturb the parent
        if self._lock_file is not None:
            self._lock_file.forget()


_OPEN: weakref.WeakSet[SQLiteLedger] = weakref.WeakSet()
_INHERITED: list[sqlite3.Connection] = []


def _after_fork() -> None:
    for ledger in list(_OPEN):
        ledger._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another that takes its place; None when it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


_MOST_ROWS = 1024  # 30 columns a row: below SQLite's 32,766 variables a statement


def _insert(cursor: sqlite3.Cursor, table: str, columns: tuple[str, ...], values: list[Any]) -> None:
    """Inserts rows, given as one flat list, in statements of 1024, 512, ... 1 rows.

    Not `executemany`: it gives up the GIL once a row, and each time a busy main thread keeps it for 5 ms.
    """
    width, start = len(columns), 0
    rows, size = len(values) // width, _MOST_ROWS
    while rows:
        while size > rows:
            size //= 2
        stop = start + size * width
        cursor.execute(_insertion(table, columns, size), values[start:stop])
        start, rows = stop, rows - size


@lru_cache(maxsize=64)
def _insertion(table: str, columns: tuple[str, ...], rows: int) -> str:
    names = ", ".join(f'"{name}"' for name in columns)
    one = f"({', '.join('?' * len(columns))})"
    return f'INSERT INTO "{table}" ({names}) VALUES {", ".join([one] * rows)}'
