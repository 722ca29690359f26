"""Drift: an e-process that watches whether the mean loss in production is still at most what was certified.

A gambler bets against "the mean loss, given all that came before, is at most alpha". Each bet of a fixed size b in
(0, 1 / alpha) multiplies its stake by 1 + b (loss - alpha), so under that hypothesis no stake grows on average, and by
Ville's inequality the total capital, which starts at 1, ever reaches 1 / epsilon with a chance of at most epsilon. One
may therefore look after every request, for all time, with no correction for looking.

Two things are mixed, for neither is known before: how large the loss becomes (a fixed set of bets), and when it does.
Most of the capital is kept in reserve and put in play bit by bit: after t losses the reserve is 1 / log2(t + 2). A
drift after 10,000 good answers is thus found nearly as soon as one at the start, where bets that had been in play all
the time would have lost everything by then.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 2024), section 4,
for the bets; Podkopaev and Ramdas, "Tracking the risk of a deployed model and detecting harmful distribution shifts"
(ICLR 2022), for the use; the mixture over starting times is the e-detector's of Shin, Ramdas and Rinaldo (2022), with
weights that sum to 1, so that the chance of any false alarm is bounded and not only their rate.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.errors import InvalidInput, ThriftyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BETS = 16
"""How many sizes of bets are mixed."""

_BOLDEST = 0.95  # the largest mean loss that a bet is sized for; at 1 one good answer would end it
_FINEST = 0.05  # the smallest, as a share of the way from alpha to `_BOLDEST`
_FADE = 0.95
_LARGEST = 1e200  # of a stake in a study, which bets on after an alarm and would run over
_VERSION = 1


@lru_cache(maxsize=64)
def bets(alpha: float) -> tuple[float, ...]:
    """The sizes of the bets: for a mean loss of m the best is (m - alpha) / (alpha (1 - alpha)), below 1 / alpha.

    >>> [round(b, 2) for b in (bets(0.1)[0], bets(0.1)[-1])]
    [0.47, 9.44]
    """
    top = max(_BOLDEST, (1 + alpha) / 2)  # above alpha, whatever it is
    ratio = (1 / _FINEST) ** (1 / (BETS - 1))
    return tuple((top - alpha) * _FINEST * ratio**k / (alpha * (1 - alpha)) for k in range(BETS))


def reserve(t: int) -> float:
    """The share of the capital that is not in play yet after `t` losses: 1 at first, falling to 0 without end."""
    return 1 / math.log2(t + 2)


@dataclass(frozen=True)
class EProcess:
    """The gambler's state; `observe` returns the next one. `capital` is the e-value now, `alarm` stays once it is set.

    Values in [0, 1]. `epsilon`: the chance of a false alarm, ever, at most.

    >>> watch = EProcess(alpha=0.1, epsilon=0.05)
    >>> for loss in (1, 1, 1, 1):
    ...     watch = watch.observe(loss)
    >>> watch.alarm, watch.samples, watch.mean
    (True, 4, 1.0)
    """

    alpha: float
    epsilon: float
    stakes: tuple[float, ...] = (0.0,) * BETS
    samples: int = 0
    total: float = 0.0
    lately_total: float = 0.0
    """the same with each loss counting `_FADE` times less with every later one"""
    peak: float = 1.0
    alarm: bool = False

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("epsilon", self.epsilon)):
            if not 0 < value < 1:  # false for NaN as well
                raise InvalidInput(f"{name} = {value}: a number strictly between 0 and 1 is needed to watch for drift")

    @property
    def capital(self) -> float:
        """The e-value: what is in reserve and what is in play."""
        return reserve(self.samples) + math.fsum(self.stakes) / BETS

    @property
    def mean(self) -> float:
        """The mean of the losses seen; NaN without any."""
        return self.total / self.samples if self.samples else math.nan

    @property
    def lately(self) -> float:
        """The mean of about the last 20 losses (older ones count less and less); NaN without any."""
        return self.lately_total * (1 - _FADE) / (1 - _FADE**self.samples) if self.samples else math.nan

    def observe(self, loss: float) -> EProcess:
        """The state after one loss more. After an alarm only the losses are still counted: the capital stays.

        Raises: InvalidInput for a loss that is not a number in [0, 1].
        """
        if not 0 <= loss <= 1:
            raise InvalidInput(f"a loss of {loss}: what is watched for drift lies in [0, 1]")
        added = reserve(self.samples) - reserve(self.samples + 1)
        sizes = (0.0,) * BETS if self.alarm else bets(self.alpha)
        stakes = tuple(
            (stake + added) * (1 + size * (loss - self.alpha)) for stake, size in zip(self.stakes, sizes, strict=True)
        )
        after = replace(
            self,
            stakes=stakes,
            samples=self.samples + 1,
            total=self.total + loss,
            lately_total=self.lately_total * _FADE + loss,
        )
        if self.alarm:
            return after
        capital = after.capital
        return replace(after, peak=max(self.peak, capital), alarm=capital >= 1 / self.epsilon)


def e_values(losses: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """The capital after each loss of many streams: [streams, T] in, the same out. The same bets as `EProcess`, which
    stops betting at its alarm; for studies of validity and power."""
    import numpy as np

    sizes = np.array(bets(alpha))
    stakes = np.zeros((len(losses), BETS))
    result = np.empty(losses.shape)
    for t in range(losses.shape[1]):
        stakes += reserve(t) - reserve(t + 1)
        stakes *= 1 + sizes * (losses[:, t, None] - alpha)
        np.minimum(stakes, _LARGEST, out=stakes)
        result[:, t] = reserve(t + 1) + stakes.mean(axis=1)
    return result


class DriftMonitor:
    """An `EProcess` in a file, for all threads and processes that serve one certificate.

    Every observation is one transaction: read, bet, write. Nothing is lost by a restart, and observations of several
    processes make one sequence. `observe` blocks for a disk sync; coroutines call it in a thread.

    Raises: InvalidInput for a file of another kind, or one that watches for another certificate, alpha or epsilon.
    """

    def __init__(self, path: str | Path, certificate: str, *, alpha: float, epsilon: float) -> None:
        fresh = EProcess(alpha, epsilon)
        self.path = Path(path)
        self._lock = threading.Lock()
        self._last: EProcess | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise InvalidInput(f"{self.path}: cannot be opened to watch for drift: {error}") from error
        try:
            self._database.execute("PRAGMA synchronous = FULL")
            with self._transaction():
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS drift (id INTEGER PRIMARY KEY CHECK (id = 1), state TEXT NOT NULL)"
                )
                head = {"version": _VERSION, "certificate": certificate, "alpha": alpha, "epsilon": epsilon}
                known = self._read()
                if known is None:
                    self._write(head, fresh)
                elif {name: known[0].get(name) for name in head} != head:
                    raise InvalidInput(
                        f"{self.path}: watches for another certificate, alpha or epsilon: name another file"
                    )
                self._head = head
        except sqlite3.Error as error:
            self._database.close()
            raise InvalidInput(f"{self.path}: is no file of a drift monitor: {error}") from error
        except BaseException:
            self._database.close()
            raise

    @property
    def state(self) -> EProcess:
        """The state as it is in the file; after `close`, as it was then."""
        with self._lock:
            if self._last is not None:
                return self._last
            found = self._read()
        if found is None:
            raise ThriftyError(f"{self.path}: the state of the drift monitor is gone: it was changed from outside")
        return found[1]

    def observe(self, *losses: float) -> EProcess:
        """Bets on losses, in their order, and returns the state after them, which is then on disk.

        Raises: InvalidInput for a loss outside [0, 1], ThriftyError when the file cannot be written. Nothing is
        counted then.
        """
        try:
            with self._transaction():
                found = self._read()
                if found is None:
                    raise ThriftyError(f"{self.path}: the state of the drift monitor is gone: it was changed")
                state = found[1]
                for loss in losses:
                    state = state.observe(loss)
                self._write(self._head, state)
        except sqlite3.Error as error:
            raise ThriftyError(f"{self.path}: the drift monitor cannot write: {error}") from error
        return state

    def close(self) -> None:
        """Closes the file. Idempotent."""
        with self._lock:
            if self._last is not None:
                return
            with suppress(sqlite3.Error, InvalidInput):
                found = self._read()
                self._last = None if found is None else found[1]
            self._database.close()

    # -- details -------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _read(self) -> tuple[dict[str, Any], EProcess] | None:
        row = self._database.execute("SELECT state FROM drift WHERE id = 1").fetchone()
        if row is None:
            return None
        try:
            data = json.loads(row[0])
            state = data.pop("state")
            stakes = tuple(float(stake) for stake in state["stakes"])
            if len(stakes) != BETS or not all(stake >= 0 for stake in stakes):
                raise ValueError("its stakes are no stakes")
            process = EProcess(
                float(data["alpha"]),
                float(data["epsilon"]),
                stakes,
                int(state["samples"]),
                float(state["total"]),
                float(state["lately_total"]),
                float(state["peak"]),
                bool(state["alarm"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{self.path}: the state of the drift monitor is damaged: {error}") from error
        return data, process

    def _write(self, head: dict[str, Any], state: EProcess) -> None:
        body = {
            "stakes": list(state.stakes),
            "samples": state.samples,
            "total": state.total,
            "lately_total": state.lately_total,
            "peak": state.peak,
            "alarm": state.alarm,
        }
        written = {**head, "state": body, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        self._database.execute(
            "INSERT INTO drift VALUES (1, ?) ON CONFLICT (id) DO UPDATE SET state = excluded.state",
            (json.dumps(written),),
        )


def delay(alpha: float, mean: float, epsilon: float, good: int = 0) -> int:
    """About how many sampled requests it takes to notice 0/1 losses of mean `mean` after `good` ones at mean 0.

    A forecast: log(1 / epsilon) and the price of not knowing the start and the size, over the growth rate
    kl(mean, alpha) of the best bet.

    Raises: InvalidInput for a mean of at most alpha, which is no drift.
    """
    if not alpha < mean <= 1:
        raise InvalidInput(f"a mean loss of {mean} is no drift from at most {alpha}: give one above it")
    growth = mean * math.log(mean / alpha) + (math.log((1 - mean) / (1 - alpha)) * (1 - mean) if mean < 1 else 0.0)
    window = 1 / growth
    put = reserve(good) - reserve(good + math.ceil(window))
    return math.ceil((math.log(1 / epsilon) + math.log(BETS / put)) / growth)
