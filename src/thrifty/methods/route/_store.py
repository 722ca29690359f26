"""Where response caches keep answers: one SQLite table, in memory or in a file, bounded, least recently used out first.

A store knows bytes, keys and vectors, and nothing of calls. `key` names one answer; `part` groups those that may stand
in for each other, whose vectors `near` compares. Thread-safe; a file may be used by several processes at once, each
write being one transaction, and must be on a local disk (WAL). A new file is readable by its owner alone.

Invariants, after every `put`: at most `entries` answers, at most `most_bytes` bytes of bodies, vectors and questions,
and nothing that has expired; what was used last goes last.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from thrifty.errors import CacheError, InvalidInput

APPLICATION_ID = 0x54485243  # "THRC"
VERSION = 1
T = TypeVar("T")

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, part BLOB NOT NULL, vector BLOB,
    question BLOB NOT NULL, body BLOB NOT NULL, size INTEGER NOT NULL, made REAL NOT NULL, expires REAL NOT NULL,
    used INTEGER NOT NULL, hits INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX by_part ON answers (part);
CREATE INDEX by_use ON answers (used);
CREATE INDEX by_end ON answers (expires);
CREATE TABLE total (entries INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0, 0);
CREATE TRIGGER added AFTER INSERT ON answers BEGIN
    UPDATE total SET entries = entries + 1, bytes = bytes + new.size;
END;
CREATE TRIGGER dropped AFTER DELETE ON answers BEGIN
    UPDATE total SET entries = entries - 1, bytes = bytes - old.size;
END;
"""
_FIELDS = "id, body, made, hits"
_NEXT_USE = "(SELECT COALESCE(MAX(used), 0) + 1 FROM answers)"


@dataclass(frozen=True, slots=True)
class Found:
    """One answer that was kept. `made` in Unix seconds; `hits`: how often it had been used before."""

    id: int
    body: bytes
    made: float
    hits: int


@dataclass(frozen=True, slots=True)
class Near:
    """One answer whose question is near: its id, the cosine, and that question."""

    id: int
    cosine: float
    question: str


class AnswerStore:
    """See the top of the module. `path` None keeps answers in memory, for as long as the store lives.

    Raises InvalidInput for a file that is no response cache, CacheError for one that cannot be opened.
    """

    def __init__(self, path: str | Path | None, *, entries: int, most_bytes: int) -> None:
        self.path = None if path is None else Path(path).expanduser().absolute()
        self.entries, self.most_bytes = entries, most_bytes
        self._lock = threading.Lock()
        self._db = _connect(self.path)
        self.close = weakref.finalize(self, self._db.close)
        """closes it; so does the end of the store's life, or of the program. Idempotent"""

    async def run(self, work: Callable[[], T]) -> T:
        """`work`, which uses this store: in a thread where that may wait for a disk. Raises CacheError."""
        return work() if self.path is None else await asyncio.to_thread(work)

    def get(self, key: bytes, now: float, seconds: float) -> Found | None:
        """The answer kept under `key` and made at most `seconds` before `now` (Unix time); counted as a use."""
        with self._transaction() as db:
            row = db.execute(
                f"SELECT {_FIELDS} FROM answers WHERE key = ? AND expires > ? AND made > ?", (key, now, now - seconds)
            ).fetchone()
            return self._used(db, row)

    def near(
        self, part: bytes, vector: bytes, threshold: float, now: float, seconds: float, most: int = 8
    ) -> list[Near]:
        """The answers of `part` whose cosine is `threshold` or more, at most `most`, nearest first (of
        equals the older).

        Vectors are float32 of length 1. All of the part are compared: D multiplications for each.
        """
        import numpy as np

        with self._transaction(write=False) as db:
            rows = db.execute(
                "SELECT id, vector FROM answers WHERE part = ? AND vector IS NOT NULL AND expires > ? AND made > ? "
                "ORDER BY id",
                (part, now, now - seconds),
            ).fetchall()
            rows = [row for row in rows if len(row[1]) == len(vector)]
            if not rows:
                return []
            theirs = np.frombuffer(b"".join(row[1] for row in rows), dtype=np.float32).reshape(len(rows), -1)  # [N, D]
            cosines = theirs @ np.frombuffer(vector, dtype=np.float32)
            best = [int(i) for i in np.argsort(-cosines, kind="stable")[:most] if cosines[i] >= threshold]
            found = [
                (i, db.execute("SELECT question FROM answers WHERE id = ?", (rows[i][0],)).fetchone()) for i in best
            ]
        return [Near(rows[i][0], float(cosines[i]), asked.decode("utf-8", "surrogatepass")) for i, (asked,) in found]

    def take(self, id: int) -> Found | None:
        """The answer with this id, counted as a use; None when it has gone meanwhile."""
        with self._transaction() as db:
            return self._used(db, db.execute(f"SELECT {_FIELDS} FROM answers WHERE id = ?", (id,)).fetchone())

    def put(
        self,
        key: bytes,
        body: bytes,
        now: float,
        seconds: float,
        *,
        part: bytes = b"",
        vector: bytes | None = None,
        question: str = "",
    ) -> bool:
        """Keeps an answer, in the place of one with the same key. False where it is larger than the whole store."""
        asked = question.encode("utf-8", "surrogatepass")  # SQLite's text holds no half of a surrogate pair
        size = len(body) + len(vector or b"") + len(asked)
        if size > self.most_bytes or self.entries < 1:
            return False
        with self._transaction() as db:
            db.execute("DELETE FROM answers WHERE key = ? OR expires <= ?", (key, now))
            db.execute(
                "INSERT INTO answers (key, part, vector, question, body, size, made, expires, used) "
                f"VALUES (?, ?, ?, ?, ?, ?, ?, ?, {_NEXT_USE})",
                (key, part, vector, asked, body, size, now, now + seconds),
            )
            while True:
                entries, nbytes = db.execute("SELECT entries, bytes FROM total").fetchone()
                if entries <= self.entries and nbytes <= self.most_bytes:
                    return True
                db.execute("DELETE FROM answers WHERE id = (SELECT id FROM answers ORDER BY used LIMIT 1)")

    def size(self) -> tuple[int, int]:
        """Answers kept, and the bytes that count against `most_bytes`."""
        with self._transaction(write=False) as db:
            entries, nbytes = db.execute("SELECT entries, bytes FROM total").fetchone()
        return int(entries), int(nbytes)

    # -- details -------------------------------------------------------------------------------------------------

    def _used(self, db: sqlite3.Connection, row: tuple[Any, ...] | None) -> Found | None:
        if row is None:
            return None
        db.execute(f"UPDATE answers SET used = {_NEXT_USE}, hits = hits + 1 WHERE id = ?", (row[0],))
        return Found(*row)

    def _transaction(self, write: bool = True) -> _Transaction:
        return _Transaction(self, write)


class _Transaction:
    """One transaction under the store's lock; SQLite's errors come out as CacheError."""

    def __init__(self, store: AnswerStore, write: bool) -> None:
        self.store, self.begin = store, "BEGIN IMMEDIATE" if write else "BEGIN"

    def __enter__(self) -> sqlite3.Connection:
        self.store._lock.acquire()
        try:
            self.store._db.execute(self.begin)
        except sqlite3.Error as error:
            self.store._lock.release()
            raise self._failed(error) from error
        return self.store._db

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.store._db.execute("COMMIT" if error is None else "ROLLBACK")
        except sqlite3.Error as broken:
            if error is None:
                raise self._failed(broken) from broken
        finally:
            self.store._lock.release()
        if isinstance(error, sqlite3.Error):
            raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error) -> CacheError:
        return CacheError(f"response cache {self.store.path or 'in memory'}: {error}")


def _connect(path: Path | None) -> sqlite3.Connection:
    try:
        if path is not None:
            if path.is_dir():
                raise InvalidInput(f"response cache {path}: a folder; give the path of a file")
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        db = sqlite3.connect(path or ":memory:", timeout=30.0, isolation_level=None, check_same_thread=False)
    except (sqlite3.Error, OSError) as error:
        raise CacheError(f"response cache {path} cannot be opened: {error}") from error
    try:
        _prepare(db, path)
    except sqlite3.DatabaseError as error:
        db.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise InvalidInput(f"{path} is no response cache: it is no SQLite database; give another path") from error
        raise CacheError(f"response cache {path} cannot be opened: {error}") from error
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path | None) -> None:
    """Makes the tables of a new file; refuses a database that is something else."""
    if path is not None:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last answers, and never breaks the file
    db.execute("PRAGMA secure_delete = ON")  # answers are people's texts: what is dropped is gone
    db.execute("BEGIN IMMEDIATE")
    try:
        (app,), (version,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
        (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables == 0 and app == 0:
            for statement in _statements(_SCHEMA):
                db.execute(statement)
        elif app != APPLICATION_ID:
            raise InvalidInput(f"{path} is no response cache: it is another database; give another path")
        elif version != VERSION:
            raise InvalidInput(
                f"response cache {path}: its schema is version {version}, and this program knows {VERSION}: "
                "give another path"
            )
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _statements(script: str) -> list[str]:
    """The script's statements one by one: `executescript` would end the transaction."""
    found, begun = [], ""
    for piece in script.split(";"):
        begun += piece + ";"
        if sqlite3.complete_statement(begun):
            found.append(begun)
            begun = ""
    return [statement for statement in found if statement.strip(" \n;")]
