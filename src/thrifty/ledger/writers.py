"""Which writer processes are alive: each holds an exclusive flock on `<ledger>.writers/<chain>.lock`.

The kernel drops the lock when the process ends, however it ends. A lock that can be taken, or a file that is missing,
means that its writer is dead. Chain names are never used twice, so a dead writer's file may be removed at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


class WriterLock:
    """This process's own lock. Raises OSError when the folder cannot be written."""

    def __init__(self, database: Path, chain: str) -> None:
        self.path = _lock_path(database, chain)
        handle: int | None = None
        while handle is None:
            self.path.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another writer's `release` removed the folder just now
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._handle: int | None = handle
        fcntl.flock(handle, fcntl.LOCK_EX)

    def release(self) -> None:
        """Says that this writer is gone. Idempotent."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            self.forget()
            with contextlib.suppress(OSError):  # other writers' files are still there, or it was removed
                self.path.parent.rmdir()

    def forget(self) -> None:
        """Closes this process's handle: in a forked child, else the lock would live as long as the child."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def is_dead(database: Path, chain: str) -> bool:
    """Whether the writer of a chain has ended; removes what it left."""
    path = _lock_path(database, chain)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _lock_path(database: Path, chain: str) -> Path:
    return database.with_name(f"{database.name}.writers") / f"{chain}.lock"
