"""The result file of a batch job: lines of JSON, appended, each whole.

Invariants: nothing is ever removed from a file but a torn last line of our own, left by a crash; a file that is not
ours is refused and stays as it is; one run writes at a time (the file is locked); a line that could not be written
whole (a full disk) leaves no part of itself behind.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from thrifty.errors import InvalidInput, ThriftyError

_MAX_LINE = 256_000_000
"""Bytes of one result line; a longer one is not ours."""

_BEGINS = re.compile(rb'\{"id": "(?:[^"\\]|\\.)*", "key": "[0-9a-f]{24}"')
"""How our lines begin, as far as a line that is the only one must have come to be taken as torn."""


class Results:
    """A result file, open and locked for one run. `finished` are the keys that have an answer.

    Opening raises InvalidInput for a path that cannot be written, a file of another kind, and one that another run
    writes to. `append` raises ThriftyError when the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: set[str] = set()
        self._fd = -1

    def __enter__(self) -> Results:
        self._fd = self._open()
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one line, whole or not at all."""
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
        self._write(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            os.fsync(self._fd)
        except OSError as failed:
            if error is None:
                raise self._failed(failed) from failed
        finally:
            os.close(self._fd)

    # -- details -------------------------------------------------------------------------------------------------

    def _open(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a pipe or a device that is opened for reading and writing without waiting is recognised, not waited for
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise InvalidInput(f"{self.path}: cannot be written: {why}: name another output") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidInput(f"{self.path}: is no plain file, and results are resumed from it: name another output")
        return fd

    def _lock(self) -> None:
        import fcntl  # not on every system, and only this needs it

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInput(f"{self.path}: another run writes to it: wait for it, or name another output") from error
        except OSError as error:
            raise InvalidInput(f"{self.path}: cannot be locked: {error.strerror}: name another output") from error

    def _read(self) -> None:
        """Takes up the keys that have an answer; cuts a torn last line off, completes a last line without its end."""
        end = 0
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            while raw := file.readline(_MAX_LINE + 1):
                if not raw.endswith(b"\n"):
                    self._mend(raw, end)
                    return
                if raw.strip():
                    self._take(_object(raw))
                end += len(raw)

    def _mend(self, raw: bytes, start: int) -> None:
        """The last line has no end. It is ours and torn, ours and whole, or not ours."""
        line = _object(raw)
        if line is not None:
            self._take(line)
            self._write(b"\n")
        elif _BEGINS.match(raw) or (start and raw[:7] == b'{"id": '[: len(raw)]):  # below whole lines of ours
            os.ftruncate(self._fd, start)
        else:
            self._refuse()

    def _take(self, line: Any) -> None:
        if not isinstance(line, dict) or not isinstance(line.get("id"), str) or not isinstance(line.get("key"), str):
            self._refuse()
        elif "text" in line:
            self.finished.add(line["key"])
        elif "error" not in line:
            self._refuse()

    def _refuse(self) -> None:
        raise InvalidInput(f"{self.path}: is no result file of this command: name another output")

    def _write(self, data: bytes) -> None:
        before = os.fstat(self._fd).st_size
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            os.ftruncate(self._fd, before)
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ThriftyError:
        return ThriftyError(
            f"{self.path}: cannot be written: {error.strerror}: what was written is whole; make room and run the same "
            "command again"
        )


def _object(raw: bytes) -> Any:
    """A line as JSON; None where it is none."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
