"""An account whose limits hold in periods: what was spent in a period that is over no longer counts.

The account itself counts for all time. A window knows what had been settled when it began (`base`), so a limit of
`amount` in it means: settled in all at most `base + amount`. The account's limit for a resource is the least of those
of its windows; it is set anew when a window rolls, so holding and settling cost nothing extra. What is held when a
period ends is settled in the next.

A rolling window keeps the sums at the ends of `BUCKETS` slices: it frees what is older than its length, at most one
slice late, never early.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thrifty.budget import Account
from thrifty.limits import Budget
from thrifty.serve.limits import Limit

BUCKETS = 60
"""Slices of a rolling window."""

Used = Callable[[str, float], float]
"""What was settled of a resource since a time (Unix seconds), as the ledger has it."""


@dataclass(slots=True)
class Window:
    """One limit over one stretch of time. `ends` is when it must be looked at again."""

    limit: Limit
    base: float = 0.0
    starts: float = 0.0
    ends: float = 0.0
    history: deque[tuple[float, float]] = field(default_factory=deque)
    """of a rolling one: (end of a slice, settled in all by then), oldest first"""

    @property
    def slice(self) -> float:
        """Seconds of one slice."""
        return self.limit.period.seconds / BUCKETS

    @property
    def bound(self) -> float:
        """What may be settled in all."""
        return self.base + self.limit.amount

    def begin(self, now: float, settled: float, used: Used) -> None:
        """Starts counting; what was used before this process began counts too."""
        period, resource = self.limit.period, self.limit.resource
        self.starts, self.ends = period.bounds(now)
        if not period.rolls:
            self.base = settled - used(resource, self.starts)
            return
        since = [used(resource, now - period.seconds + i * self.slice) for i in range(BUCKETS)]
        self.history.extend((now - period.seconds + i * self.slice, settled - s) for i, s in enumerate(since))
        self.base = settled - since[0]
        self.ends = now + self.slice

    def roll(self, now: float, settled: float) -> None:
        """Moves on to the stretch that `now` is in."""
        period = self.limit.period
        if not period.rolls:
            self.starts, self.ends = period.bounds(now)
            self.base = settled
            return
        self.history.append((now, settled))
        self.starts = now - period.seconds
        while self.history and self.history[0][0] <= self.starts:
            self.base = self.history.popleft()[1]
        self.ends = now + self.slice

    def frees(self, amount: float, now: float) -> float:
        """Seconds until `amount` more than `bound` could be settled; infinite where that never comes."""
        if amount > self.limit.amount:
            return math.inf
        if not self.limit.period.rolls:
            return max(0.0, self.ends - now)
        for end, settled in self.history:
            if settled - self.base >= amount:
                return max(0.0, end + self.limit.period.seconds + self.slice - now)
        return self.limit.period.seconds + self.slice


class Meter:
    """An account and its windows. The account carries what the ledger has of it; `used` says how much of that is
    younger than a time."""

    def __init__(
        self,
        account: Account,
        limits: Sequence[Limit],
        used: Used = lambda resource, since: 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.account, self._clock, self._used = account, clock, used
        self.windows: list[Window] = []
        self.next = math.inf
        self.limit(limits)

    def limit(self, limits: Sequence[Limit]) -> None:
        """Takes these limits from now on. Windows that stay keep what was spent in them."""
        now = self._clock()
        old = {(w.limit.resource, w.limit.period): w for w in self.windows}
        windows: list[Window] = []
        for limit in limits:
            kept = old.get((limit.resource, limit.period))
            window = Window(limit)
            if kept is not None:
                window = kept
                window.limit = limit
            else:
                window.begin(now, self._settled(limit.resource), self._before)
            windows.append(window)
        self.windows = windows
        self._bind()

    def roll(self) -> None:
        """Moves windows that are over on. Cheap when none is."""
        now = self._clock()
        if now < self.next:
            return
        for window in self.windows:
            if now >= window.ends:
                window.roll(now, self._settled(window.limit.resource))
        self._bind()

    def binding(self, resource: str) -> Window | None:
        """The window that limits a resource now."""
        mine = [w for w in self.windows if w.limit.resource == resource]
        return min(mine, key=lambda w: w.bound, default=None)

    def frees(self, resource: str, asked: float) -> float:
        """Seconds until `asked` of a resource may fit again: the longest wait of its windows; inf for never."""
        now, settled = self._clock(), self._settled(resource)
        waits = [
            w.frees(settled + asked - w.bound, now)
            for w in self.windows
            if w.limit.resource == resource and settled + asked > w.bound
        ]
        return max(waits, default=0.0)

    def state(self) -> list[dict[str, float | str | None]]:
        """Every window as dashboards show it: the limit, what was spent in it, when it ends (None: it rolls)."""
        return [
            {
                "limit": str(w.limit),
                "resource": w.limit.resource,
                "amount": w.limit.amount,
                "spent": self._settled(w.limit.resource) - w.base,
                "period": w.limit.period.name,
                "ends": None if w.limit.period.rolls or math.isinf(w.ends) else w.ends,
            }
            for w in self.windows
        ]

    def _before(self, resource: str, since: float) -> float:
        """Settled since then, never more than in all."""
        return min(self._used(resource, since), self._settled(resource))

    def _settled(self, resource: str) -> float:
        return self.account.total(resource)

    def _bind(self) -> None:
        least: dict[str, float] = {}
        for window in self.windows:
            resource = window.limit.resource
            least[resource] = min(least.get(resource, math.inf), window.bound)
        whole = {k: v if k == "engine_seconds" else int(v) for k, v in least.items()}
        self.account.limit(Budget(**whole))  # type: ignore[arg-type]
        self.next = min((w.ends for w in self.windows), default=math.inf)
