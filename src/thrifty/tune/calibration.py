"""Calibration data that can be used once: opened only with what was frozen, and counted before they are seen.

A bound holds for hypotheses that were fixed before the data were looked at. So a `Calibration` gives its examples out
only against the hash of a frozen search and a `Claim`, and writes that use to a log first: a crash afterwards has
counted, never the other way round.

A use is the same one again where data, search and claim are the same: a run that resumes. Otherwise it is the k-th use
of these examples, and either refused, or made with delta / 2^k. What counts is every earlier use that shares an example
with this one, whatever else was in it. So for every example: the uses it was in, made this way, have deltas that sum to
at most delta.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from thrifty.bench.task import Task
from thrifty.errors import InvalidInput, ThriftyError, nearest
from thrifty.tune import crc
from thrifty.tune.bounds import BOUNDS, Bound, p_value
from thrifty.tune.losses import KINDS, Losses, LossKind, range_of
from thrifty.tune.splits import content_hash, data_hash, groups_of

Procedure = Literal["learn-then-test", "conformal-risk-control"]
PROCEDURES: tuple[Procedure, ...] = get_args(Procedure)

Reuse = Literal["refuse", "split"]


@dataclass(frozen=True)
class Claim:
    """What is to be certified: mean loss of this kind at most `alpha`, wrong with a chance of at most `delta`.

    Conformal risk control bounds an expectation: it has neither `delta` nor `bound`.

    Raises: InvalidInput for an alpha or delta not strictly between 0 and 1, unknown names, and what does not go
    together.
    """

    loss: LossKind
    alpha: float
    delta: float | None
    procedure: Procedure = "learn-then-test"
    bound: Bound | None = None

    def __post_init__(self) -> None:
        for name, known, kind in ((self.loss, KINDS, "loss"), (self.procedure, PROCEDURES, "procedure")):
            if name not in known:
                raise InvalidInput(nearest(str(name), known, kind))
        if not _within(self.alpha):
            raise InvalidInput(
                f"alpha {self.alpha}: the mean loss that is allowed lies strictly between 0 and 1, such as 0.05"
            )
        if self.procedure == "conformal-risk-control":
            if self.delta is not None or self.bound is not None:
                raise InvalidInput("conformal risk control bounds an expectation: it takes no delta and no bound")
            return
        if self.delta is None or not _within(self.delta):
            raise InvalidInput(
                f"delta {self.delta}: the chance of a wrong certificate lies strictly between 0 and 1, such as 0.1"
            )
        if self.bound not in BOUNDS:
            raise InvalidInput(nearest(str(self.bound), BOUNDS, "bound"))
        if self.bound == "clopper-pearson" and self.loss == "drop":
            raise InvalidInput("clopper-pearson is exact for losses of 0 and 1 only, and a drop may be -1: use betting")

    def check_n(self, n: int, delta: float | None) -> None:
        """Refuses a number of groups with which this could not be certified whatever the losses are.

        Raises: InvalidInput that says how many are needed.
        """
        if self.procedure == "conformal-risk-control":
            needed = crc.examples_needed(self.alpha)
            if n < needed:
                raise InvalidInput(_TOO_FEW.format(n=n, what=f"alpha {self.alpha:g}", needed=needed))
            return
        if delta is None or self.bound is None or _best(self, self.bound, n) <= delta:
            return
        low, high = n, 2 * n + 1
        while _best(self, self.bound, high) > delta:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _best(self, self.bound, middle) <= delta else (middle, high)
        raise InvalidInput(_TOO_FEW.format(n=n, what=f"alpha {self.alpha:g} and delta {delta:g}", needed=high))


_TOO_FEW = (
    "{n} groups of calibration examples are too few for any bound at {what}, even if none of them lost anything: give "
    "at least {needed}, or allow more"
)


@dataclass(frozen=True)
class Use:
    """One counted use of calibration data. `delta` is what this use may spend, `spent` what all uses that share an
    example with it may spend together, itself included; both None for conformal risk control."""

    k: int
    data_hash: str
    search_hash: str
    claim: Claim
    reuse: Reuse
    delta: float | None
    spent: float | None
    at: str
    resumed: bool = False

    def __str__(self) -> str:
        if self.k == 1:
            told = f"first use of these calibration examples, at delta {self.delta:g}" if self.delta else "first use"
        else:
            told = (
                f"use {self.k} of these calibration examples, at delta {self.delta:g}; all uses together may be wrong "
                f"with a chance of {self.spent:g}"
            )
        return f"{told} (resumed)" if self.resumed else told


class UseLog:
    """The durable record of uses: one small SQLite file, safe under several processes.

    `take` counts a use in one transaction that is on disk when it returns. The examples themselves are not stored, only
    hashes of them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise InvalidInput(f"{self.path}: cannot be used as the log of calibration uses: {error}") from error

    def take(self, tasks: Sequence[Task], search_hash: str, claim: Claim, reuse: Reuse = "refuse") -> Use:
        """Counts a use of these examples, or finds the same one again.

        Raises: InvalidInput for a further use where `reuse` is "refuse", and for one of conformal risk control, which
        has no delta to split; ThriftyError when the log cannot be written. Nothing is counted then.
        """
        if reuse not in get_args(Reuse):
            raise InvalidInput(nearest(str(reuse), get_args(Reuse), "way to treat a further use"))
        data, examples = data_hash(tasks), sorted({content_hash(task) for task in tasks})
        groups = len(groups_of(tasks))
        frozen = _frozen(search_hash, claim)
        try:
            with self._open() as database:
                database.execute("BEGIN IMMEDIATE")
                row = database.execute("SELECT use FROM uses WHERE data = ? AND frozen = ?", (data, frozen)).fetchone()
                if row is not None:
                    database.execute("ROLLBACK")
                    return _use(row[0], claim)
                earlier = _sharing(database, examples)
                use = _next(earlier, data, search_hash, claim, reuse)
                claim.check_n(groups, use.delta)
                cursor = database.execute(
                    "INSERT INTO uses (data, frozen, use) VALUES (?, ?, ?)", (data, frozen, _packed(use))
                )
                database.executemany(
                    "INSERT INTO examples (example, use) VALUES (?, ?)", [(e, cursor.lastrowid) for e in examples]
                )
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise ThriftyError(f"{self.path}: the use of calibration data cannot be counted: {error}") from error
        return use

    def uses(self, tasks: Sequence[Task]) -> int:
        """How many uses share an example with these."""
        try:
            with self._open() as database:
                return len(_sharing(database, sorted({content_hash(task) for task in tasks})))
        except sqlite3.Error as error:
            raise ThriftyError(f"{self.path}: the log of calibration uses cannot be read: {error}") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = EXTRA")  # a use that was given out is counted, power cut or not
            yield database


def default_log() -> Path:
    """Where uses are counted unless told otherwise: `thrifty/calibration-uses.db` in the user's folder for state."""
    base = os.environ.get("XDG_STATE_HOME") or ""
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state"
    return folder / "thrifty" / "calibration-uses.db"


class Calibration:
    """Calibration examples under lock: `open` gives them out once, after their use was counted.

    `data_hash`, `n` (groups) and `examples` (how many) may be known before.

    Raises: InvalidInput for no examples, and for an id that occurs twice.
    """

    def __init__(self, tasks: Sequence[Task], log: UseLog, *, reuse: Reuse = "refuse") -> None:
        self.data_hash = data_hash(tasks)
        self.n = len(groups_of(tasks))
        self.examples = len(tasks)
        self.reuse: Reuse = reuse
        self._log = log
        self._tasks: tuple[Task, ...] | None = tuple(tasks)

    def open(self, search_hash: str, claim: Claim) -> tuple[tuple[Task, ...], Use]:
        """The examples, and the use that was counted for them.

        `search_hash` fixes what was frozen: the plans, their order, prompts, exemplars, routers and thresholds.

        Raises: InvalidInput when they were given out before, without a search hash, for a further use where that is
        refused, and for fewer groups than could certify anything; ThriftyError when the use cannot be counted.
        """
        if not search_hash.strip():
            raise InvalidInput("calibration examples are given out against a frozen search: its hash is empty")
        if self._tasks is None:
            raise InvalidInput("these calibration examples were given out before: what was frozen is tested once")
        use = self._log.take(self._tasks, search_hash, claim, self.reuse)
        tasks, self._tasks = self._tasks, None
        return tasks, use


# Details.

_SCHEMA = """
CREATE TABLE IF NOT EXISTS uses (id INTEGER PRIMARY KEY, data TEXT NOT NULL, frozen TEXT NOT NULL, use TEXT NOT NULL,
    UNIQUE (data, frozen));
CREATE TABLE IF NOT EXISTS examples (example TEXT NOT NULL, use INTEGER NOT NULL REFERENCES uses (id),
    PRIMARY KEY (example, use)) WITHOUT ROWID;
"""
_MOST_NAMES = 500  # in one query


def _within(value: float) -> bool:
    return 0 < value < 1  # false for NaN as well


def _best(claim: Claim, bound: Bound, n: int) -> float:
    """The p value where every group has the lowest loss there is."""
    low, high = range_of(claim.loss)
    groups = tuple(f"{i:09}" for i in range(n))
    return p_value(bound, Losses(claim.loss, np.full(n, low), low, high, groups), claim.alpha)


def _frozen(search_hash: str, claim: Claim) -> str:
    body = json.dumps([search_hash, asdict(claim)], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def _sharing(database: sqlite3.Connection, examples: Sequence[str]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for start in range(0, len(examples), _MOST_NAMES):
        part = examples[start : start + _MOST_NAMES]
        query = (
            "SELECT DISTINCT uses.id, uses.use FROM examples JOIN uses ON uses.id = examples.use "
            f"WHERE example IN ({','.join('?' * len(part))})"
        )
        found.update((number, json.loads(use)) for number, use in database.execute(query, part))
    return [use for _, use in sorted(found.items(), key=lambda item: item[0])]


def _next(earlier: Sequence[dict[str, Any]], data: str, search_hash: str, claim: Claim, reuse: Reuse) -> Use:
    k = len(earlier) + 1
    at = datetime.now(UTC).isoformat(timespec="seconds")
    if k > 1:
        known = "these calibration examples were" if earlier[-1]["data_hash"] == data else "some of the examples were"
        before = f"{known} used before ({k - 1} time{'s' if k > 2 else ''}, last on {earlier[-1]['at']})"
        if claim.delta is None:
            raise InvalidInput(f"{before}, and conformal risk control has no delta to split: give fresh examples")
        if reuse == "refuse":
            raise InvalidInput(
                f"{before}: give fresh examples, resume the same search with the same claim, or allow a further use "
                f"at delta {claim.delta / 2**k:g}"
            )
    delta = claim.delta if reuse == "refuse" or claim.delta is None else claim.delta / 2**k
    spent = None if delta is None else min(1.0, delta + sum(use["delta"] or 0.0 for use in earlier))
    return Use(k, data, search_hash, claim, reuse, delta, spent, at)


def _packed(use: Use) -> str:
    return json.dumps({n: v for n, v in asdict(use).items() if n not in ("claim", "resumed")}, sort_keys=True)


def _use(text: str, claim: Claim) -> Use:
    return Use(**json.loads(text), claim=claim, resumed=True)
