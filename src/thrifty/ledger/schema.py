"""The ledger's file: its tables, how it is opened, and how a file that is not one is refused.

A ledger is a SQLite database in WAL mode. `application_id` says that it is one, `user_version` which schema it has.
Several processes may write at once: every write is one BEGIN IMMEDIATE transaction, and waiting is SQLite's busy
time-out. WAL needs shared memory, so the file must be on a local disk.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from thrifty.errors import InvalidInput, LedgerError
from thrifty.ledger.columns import COLUMNS, TEXTS

APPLICATION_ID = 0x54485246  # "THRF"
VERSION = 1

METADATA = sa.MetaData()

META = sa.Table(
    "meta",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
"""`ledger`: a random identifier, so that an anchor of another ledger is recognised."""

CHAINS = sa.Table(
    "chains",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("opened", sa.Integer, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("covered", sa.Integer, nullable=False),
    sqlite_autoincrement=True,
)
"""One row a writer: its head (`seq`, `hash`), and up to where checkpoints cover it."""

ENTRIES = sa.Table(
    "entries",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("chain", sa.Integer, nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("prev", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    *(sa.Column(name, sa.Text if name in TEXTS else sa.Integer, nullable=False) for name in COLUMNS),
    sa.UniqueConstraint("chain", "seq"),
    sa.Index("entries_at", "at"),
)
"""`id` is the order of commits. `hash` = SHA-256(prev + the JSON array of COLUMNS)."""

HOLDS = sa.Table(
    "holds",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("chain", sa.Integer, nullable=False),
    sa.Column("record", sa.Text, nullable=False),
)
"""Holds that are open now, each as the JSON row of the entry that it would become."""

CHECKPOINTS = sa.Table(
    "checkpoints",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("algorithm", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("signature", sa.Text, nullable=False),
)
"""Signed heads, each with the hash of the checkpoint before it."""


def connect(path: Path, *, readonly: bool, busy_seconds: float = 30.0, full: bool = False) -> sqlite3.Connection:
    """A connection to an existing or (unless read-only) new ledger. `full` syncs every commit to the disk.

    Raises InvalidInput for a file that is not a ledger or has a newer schema, LedgerError when it cannot be opened.
    """
    try:
        if readonly and not path.is_file():
            raise InvalidInput(f"no ledger at {path}: give the path of an existing one, or open it for writing")
        if path.is_dir():
            raise InvalidInput(f"{path} is a folder: give the path of a ledger file")
        if not readonly:
            path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            _address(path, readonly),
            uri=True,
            timeout=busy_seconds,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(f"ledger {path} cannot be opened: {error}") from error
    try:
        _prepare(connection, path, readonly, busy_seconds, full)
    except sqlite3.DatabaseError as error:
        connection.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise InvalidInput(f"{path} is not a Thrifty ledger: it is no SQLite database") from error
        raise LedgerError(f"ledger {path} cannot be opened: {error}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _address(path: Path, readonly: bool) -> str:
    address = f"file:{quote(str(path.absolute()))}"
    if not readonly:
        return f"{address}?mode=rwc"
    # SQLite writes beside a WAL database even to read it. Where it may not, and there is no WAL, nothing can change.
    if not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists():
        return f"{address}?immutable=1"
    return f"{address}?mode=ro"


def _prepare(connection: sqlite3.Connection, path: Path, readonly: bool, busy_seconds: float, full: bool) -> None:
    if readonly:
        connection.execute("PRAGMA query_only=ON")
    elif _is_new(connection, path):
        _enter_wal(connection, busy_seconds)
        _create(connection, path)
    if _is_new(connection, path):
        raise InvalidInput(f"{path} is not a Thrifty ledger: it is empty")
    if not readonly:
        _enter_wal(connection, busy_seconds)
        connection.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
        connection.execute("PRAGMA wal_autocheckpoint=8000")  # pages: syncing the file seldom keeps commits short
        connection.execute("PRAGMA journal_size_limit=67108864")


def _is_new(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the database is empty. Raises InvalidInput when it is something else than a ledger of this version."""
    outside = not connection.in_transaction
    if outside:
        connection.execute("BEGIN")  # the three must be of one moment: another process may be creating the ledger
    application, version, tables = (
        connection.execute(question).fetchone()[0]
        for question in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if outside:
        connection.execute("COMMIT")
    if application != APPLICATION_ID:
        if application or version or tables:
            raise InvalidInput(f"{path} is not a Thrifty ledger: it is another program's SQLite database")
        return True
    if version > VERSION:
        raise InvalidInput(
            f"{path} is a ledger of schema {version}, of a newer Thrifty; this one reads up to {VERSION}: upgrade"
        )
    return False


def _enter_wal(connection: sqlite3.Connection, busy_seconds: float) -> None:
    # Two processes that open a new file at once may find it locked here, and SQLite does not wait for this pragma.
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            if mode != "wal":
                raise LedgerError(f"this disk allows no write-ahead log (journal mode {mode}): use a local disk")
            return


def _create(connection: sqlite3.Connection, path: Path) -> None:
    dialect = sqlite.dialect()
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _is_new(connection, path):  # else another process was faster
            for table in METADATA.sorted_tables:
                connection.execute(str(sa.schema.CreateTable(table).compile(dialect=dialect)))
                for index in table.indexes:
                    connection.execute(str(sa.schema.CreateIndex(index).compile(dialect=dialect)))
            connection.execute("INSERT INTO meta VALUES ('ledger', ?)", (secrets.token_hex(16),))
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
