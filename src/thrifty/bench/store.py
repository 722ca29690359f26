"""Results on disk: one JSON line each, appended, so that a run can be cut at any moment and go on.

Invariants: a line is written whole by one `write` as soon as its example is done, and a batch is synced to
the disk; a torn end is dropped and measured again, a finished result is never lost; one process writes,
others are refused by a lock that dies with its holder. Lines are results, or the head of a run (`{"run":
...}`): what was run, on what, how.

A later line with the same key replaces an earlier one: that is how a failed example is redone.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from thrifty.errors import InvalidInput
from thrifty.spend import Spend, Work

BATCH = 16
"""Results between two syncs."""

SYNC_SECONDS = 2.0
"""Longest time that a written result waits for its sync, while results keep coming."""

MAX_BYTES = 2 * 1024**3
"""Largest results file, unpacked, that is read."""


@dataclass(frozen=True, slots=True)
class Result:
    """One plan on one example."""

    key: str
    suite: str
    plan: str
    plan_hash: str
    methods: tuple[str, ...]
    """names, outermost first"""
    engine: str
    """digest of the answering engine's identity; the run's head spells it out"""
    task: str
    task_hash: str
    score: float | None
    """in [0, 1]; None when the example failed and has to be run again"""
    group: str | None = None
    seed: int = 0
    sample: int = 0
    finish: str = "stop"
    spend: Spend = Spend()
    """as if this plan ran alone"""
    work: Work = Work()
    incurred: Spend = Spend()
    """what this run paid: less than `spend` where plans shared a generation"""
    incurred_work: Work = Work()
    roles: Mapping[str, Spend] = field(default_factory=dict)
    """`spend` by the role of the engine"""
    judged: Spend = Spend()
    """what scoring cost; no part of `spend`"""
    receipts: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0
    error: str | None = None
    """a budget's refusal (the score is 0) or a failure (the score is None): class and message"""
    estimated: bool = False
    text: str | None = None
    """what the model wrote; kept in local files only, and only on request"""
    final: str | None = None
    """the final answer that a method parsed; kept with the text"""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; empty fields left out."""
        data: dict[str, Any] = {
            "key": self.key,
            "suite": self.suite,
            "plan": self.plan,
            "plan_hash": self.plan_hash,
            "methods": list(self.methods),
            "engine": self.engine,
            "task": self.task,
            "task_hash": self.task_hash,
            "score": self.score,
            "finish": self.finish,
        }
        for name in ("group", "error", "text", "final"):
            if (value := getattr(self, name)) is not None:
                data[name] = value
        for name in ("seed", "sample", "estimated"):
            if value := getattr(self, name):
                data[name] = value
        for name in ("spend", "work", "incurred", "incurred_work", "judged"):
            if amount := getattr(self, name):
                data[name] = amount.to_dict()
        if self.roles:
            data["roles"] = {role: spend.to_dict() for role, spend in self.roles.items()}
        if self.receipts:
            data["receipts"] = [dict(receipt) for receipt in self.receipts]
        data["seconds"] = round(self.seconds, 4)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The opposite of `to_dict`. Raises InvalidInput for a line that is not one."""
        values = dict(data)
        try:
            for name in ("spend", "incurred", "judged"):
                if name in values:
                    values[name] = Spend.from_dict(values[name])
            for name in ("work", "incurred_work"):
                if name in values:
                    values[name] = Work.from_dict(values[name])
            if "roles" in values:
                values["roles"] = {role: Spend.from_dict(spend) for role, spend in values["roles"].items()}
            for name in ("methods", "receipts"):
                if name in values:
                    values[name] = tuple(values[name])
            result = cls(**values)
        except (TypeError, AttributeError) as error:
            raise InvalidInput(f"no result line: {error}") from error
        score = result.score
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1):
            raise InvalidInput(f"no result line: score {score!r} is not in [0, 1]")
        return result


@dataclass(frozen=True, slots=True)
class Contents:
    """A results file as read: the last line of every key, in order of first appearance, and the heads of
    runs."""

    results: tuple[Result, ...]
    heads: tuple[Mapping[str, Any], ...]
    torn: int = 0
    """bytes at the end that are no whole line"""


def read(path: str | Path) -> Contents:
    """Reads a results file, plain or `.gz`, without locking it. A torn end is left out and told.

    Raises InvalidInput when there is no such file or a line before the end is broken (with file and line).
    """
    file = Path(path)
    try:
        if file.suffix == ".gz":
            with gzip.open(file) as packed:
                data = packed.read(MAX_BYTES + 1)
        else:
            data = file.read_bytes() if file.stat().st_size <= MAX_BYTES else b" " * (MAX_BYTES + 1)
    except (OSError, EOFError) as error:
        raise InvalidInput(f"results {file}: cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"results {file}: more than {MAX_BYTES:,} bytes: split it by suite")
    return _parse(data, str(file))[0]


class Store:
    """The results file of a run, open for appending. Use it as a context manager.

    >>> import tempfile, pathlib
    >>> with Store(pathlib.Path(tempfile.mkdtemp()) / "results.jsonl") as store:
    ...     len(store.done)
    0
    """

    def __init__(self, path: str | Path) -> None:
        """Opens or creates the file. Raises InvalidInput when another process writes it or a line is
        broken."""
        self.path = Path(path)
        if self.path.suffix == ".gz":
            raise InvalidInput(f"results {self.path}: a packed file is read only: give a .jsonl file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InvalidInput(f"results {self.path}: cannot be written: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._lock)
            raise InvalidInput(
                f"results {self.path}: process {holder} is writing it: wait for it, or give another file"
            ) from error
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._open_contents()
        except OSError as error:
            os.close(self._lock)
            raise InvalidInput(f"results {self.path}: cannot be written: {error}") from error
        except BaseException:
            os.close(self._lock)
            raise
        self._unsynced, self._synced = 0, time.monotonic()
        self._closed = False

    def _open_contents(self) -> None:
        size = os.fstat(self._file).st_size
        data = self.path.read_bytes() if size else b""
        contents, good = _parse(data, str(self.path))
        if good < len(data):
            os.ftruncate(self._file, good)
        if good and data[good - 1 : good] != b"\n":
            os.write(self._file, b"\n")  # the last line is whole and lacks only its end
        os.fsync(self._file)
        self.torn = contents.torn
        """bytes of a torn end that were dropped"""
        self.results: dict[str, Result] = {r.key: r for r in contents.results}
        self.heads: list[Mapping[str, Any]] = list(contents.heads)

    @property
    def done(self) -> dict[str, Result]:
        """Finished results by key; those that failed are not among them."""
        return {key: r for key, r in self.results.items() if r.score is not None}

    def append(self, result: Result) -> None:
        """Writes one result. It survives the process at once, and the machine after the next sync."""
        self._write(result.to_dict())
        self.results[result.key] = result

    def head(self, facts: Mapping[str, Any]) -> None:
        """Writes what is about to be run, for reports."""
        self._write({"run": dict(facts)})
        self.heads.append(dict(facts))

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        if self._unsynced:
            os.fsync(self._file)
        self._unsynced, self._synced = 0, time.monotonic()

    def close(self) -> None:
        """Syncs, closes, and lets others write. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.sync()
        finally:
            os.close(self._file)
            os.close(self._lock)  # and with it the lock

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write(self, data: Mapping[str, Any]) -> None:
        line = orjson.dumps(data) + b"\n"
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._unsynced += 1
        if self._unsynced >= BATCH or time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()


def encode(results: Sequence[Result], heads: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    """The lines of a results file."""
    for head in heads:
        yield orjson.dumps({"run": dict(head)}) + b"\n"
    for result in results:
        yield orjson.dumps(result.to_dict()) + b"\n"


# -- details -------------------------------------------------------------------------------------------------


def _parse(data: bytes, name: str) -> tuple[Contents, int]:
    """What a file holds, and how many of its bytes are whole lines."""
    results: dict[str, Result] = {}
    heads: list[Mapping[str, Any]] = []
    good = start = number = 0
    broken: tuple[int, str] | None = None
    while start < len(data):
        end = data.find(b"\n", start)
        stop = len(data) if end < 0 else end + 1
        line = data[start:stop].strip()
        number += 1
        if line:
            try:
                row = orjson.loads(line)
                if not isinstance(row, dict):
                    raise InvalidInput("no result line: an object is needed")
                if isinstance(row.get("run"), dict):
                    heads.append(row["run"])
                else:
                    result = Result.from_dict(row)
                    results[result.key] = result
            except (orjson.JSONDecodeError, InvalidInput) as error:
                # Allowed at the end only, where a crash can have torn it: so wait for what follows.
                broken = broken or (number, str(error))
            else:
                if broken is not None:
                    raise InvalidInput(
                        f"{name}:{broken[0]}: {broken[1]}: remove that line (its example is run again), "
                        "or start a new file"
                    )
                good = stop
        elif broken is None:
            good = stop
        start = stop
    if not good and data and not _looks_ours(data):
        raise InvalidInput(f"{name}:1: {broken[1] if broken else 'empty'}: not a results file; give another path")
    return Contents(tuple(results.values()), tuple(heads), len(data) - good), good


def _looks_ours(data: bytes) -> bool:
    """Whether a file without one whole line can be the torn beginning of a results file: never cut other
    people's."""
    torn = data.rstrip(b"\0")
    return not torn or any(torn[:7].startswith(head[: len(torn)]) for head in (b'{"run":', b'{"key":'))
