"""Accounts: budgets in use. What may be spent, what is held, what is settled.

Accounts nest: a hold on a leaf is checked and taken at every level, from the root to the leaf, under one lock that
the whole tree shares. So for every resource that adds, at every moment and at every level,

    settled + held <= limit + overdraft

where overdraft is what was settled beyond a limit because a provider billed more than was held. Amounts are
integers (seconds are counted in nanoseconds), so nothing drifts. Nothing here waits, so accounts serve threads and
asyncio alike; only `Hold.settle` and durable holds may block, until a durable ledger has committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from thrifty.allocate import allocate
from thrifty.errors import BudgetExceeded, InvalidInput, nearest
from thrifty.hold import Hold
from thrifty.ledger.entry import NO_LABELS, HoldRecord, Labels, LedgerLike
from thrifty.limits import Budget, tightest
from thrifty.resources import (
    INDEX,
    NO_WORK,
    OUTPUT,
    RESOURCES,
    TOKENS,
    Amounts,
    amounts_of,
    shown,
    units,
    without,
)
from thrifty.spend import SPEND_FIELDS, Spend, Work

__all__ = ["RESOURCES", "Account", "Budget", "Hold", "tightest"]

_SIZE = len(RESOURCES)
_PREFILL, _DRAFT = INDEX["prefill"], INDEX["draft_passes"]
_NOTHING = Spend()


@dataclass(slots=True, eq=False)
class Account:
    """A Budget in use. Make the root with `Account("name", Budget(...), ledger=...)`, the others with `child`,
    `reserve` and `split`."""

    name: str
    budget: Budget = field(default_factory=Budget)
    ledger: LedgerLike | None = None
    parent: Account | None = None
    path: str = field(default="", init=False)
    """the names from the root to this account, joined by '/'"""
    _lock: Any = field(init=False, repr=False)
    _chain: tuple[Account, ...] = field(init=False, repr=False)
    """this account and those above it, leaf first"""
    _down: tuple[Account, ...] = field(init=False, repr=False)
    """the same, root first"""
    _timed: tuple[Account, ...] = field(init=False, repr=False)
    """those of them that have a deadline"""
    _bound: tuple[tuple[int, int], ...] = field(init=False, repr=False)
    """the limits that are set: resource and amount"""
    _settled: list[int] = field(default_factory=lambda: [0] * _SIZE, init=False, repr=False)
    _held: list[int] = field(default_factory=lambda: [0] * _SIZE, init=False, repr=False)
    _overdraft: list[int] = field(default_factory=lambda: [0] * _SIZE, init=False, repr=False)
    _reserved: Amounts = field(default_factory=dict, init=False, repr=False)
    """of a reserve: what was taken from the account above"""
    _backed: bool = field(default=False, init=False, repr=False)
    """whether this account or one above it is a reserve"""
    _seconds: float = field(default=0.0, init=False, repr=False)
    _bytes: int = field(default=0, init=False, repr=False)
    _bytes_peak: int = field(default=0, init=False, repr=False)
    _opened: float = field(default_factory=time.monotonic, init=False, repr=False)
    _closed: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise InvalidInput(f"account name {self.name!r}: a non-empty name without '/' is needed")
        if self.parent is None:
            self._lock, self.path, self._chain = threading.Lock(), self.name, (self,)
        else:
            self.ledger, self._lock, self._backed = self.parent.ledger, self.parent._lock, self.parent._backed
            self.path, self._chain = f"{self.parent.path}/{self.name}", (self, *self.parent._chain)
        self._down = self._chain[::-1]
        self._timed = tuple(a for a in self._down if a.budget.deadline is not None)
        self._bind()

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def settled(self) -> Spend:
        """What was spent, by this account and those below it."""
        with self._lock:
            return Spend(*self._settled[1 : 1 + len(SPEND_FIELDS)])

    @property
    def work(self) -> Work:
        """The Work settled; `kv_bytes_peak` is the highest sum claimed at once."""
        with self._lock:
            prefill, kv_reads, target, draft = self._settled[_PREFILL : _DRAFT + 1]
            return Work(prefill, kv_reads, target, draft, self._seconds, kv_bytes_peak=self._bytes_peak)

    @property
    def held(self) -> dict[str, float]:
        """What is held now, by resource; only what is not zero."""
        with self._lock:
            return {RESOURCES[i]: shown(i, amount) for i, amount in enumerate(self._held) if amount}

    @property
    def overdraft(self) -> dict[str, float]:
        """What was settled beyond the limits, by resource; only what is not zero."""
        with self._lock:
            return {RESOURCES[i]: shown(i, amount) for i, amount in enumerate(self._overdraft) if amount}

    def remaining(self) -> dict[str, float]:
        """What could still be held, for every resource that this account or one above it limits."""
        with self._lock:
            return {RESOURCES[i]: shown(i, amount) for i, amount in self._remaining().items()}

    def room(self, resource: str) -> float | None:
        """What of one resource could still be held; None when nothing limits it."""
        if resource not in INDEX:
            raise InvalidInput(nearest(resource, RESOURCES, "resource"))
        return self.remaining().get(resource)

    def total(self, resource: str) -> float:
        """What is settled of one resource, seconds included. Raises InvalidInput for an unknown one."""
        if resource not in INDEX:
            raise InvalidInput(nearest(resource, RESOURCES, "resource"))
        i = INDEX[resource]
        with self._lock:
            return shown(i, self._settled[i])

    # -- changing ----------------------------------------------------------------------------------------------

    def limit(self, budget: Budget) -> None:
        """Takes these limits from now on, whatever was settled or is held. Raises InvalidInput for a reserve, whose
        limits were taken from the account above."""
        if self._reserved:
            raise InvalidInput(f"account {self.path!r} is a reserve: close it and reserve anew")
        with self._lock:
            self.budget = budget
            self._bind()

    def carry(self, spend: Spend, work: Work = NO_WORK) -> None:
        """Counts what was settled before this account was opened, by another process: here alone, with no entry."""
        with self._lock:
            for i, amount in amounts_of(spend, work).items():
                self._settled[i] += amount

    # -- spending ----------------------------------------------------------------------------------------------

    def hold(
        self,
        ask: Spend = _NOTHING,
        work: Work = NO_WORK,
        *,
        keep: int = 0,
        labels: Labels = NO_LABELS,
        durable: bool = False,
    ) -> Hold:
        """Sets `ask` (and `work`) aside at every level, or raises BudgetExceeded and changes nothing.

        `keep` output tokens must still be free afterwards: they are what the answer itself will need. `durable` writes
        the hold to the ledger first, so that a crash cannot lose a call that a provider will bill.
        """
        amounts = amounts_of(ask, work)
        with self._lock:
            self._take(amounts, keep)
        hold = Hold(self, amounts, keep, labels, time.time_ns())
        if durable and self.ledger is not None:
            try:
                hold.record = self.ledger.open_hold(HoldRecord(self.path, hold.opened, ask, work, labels))
            except BaseException:
                hold.release()
                raise
        return hold

    def claim(self, nbytes: int) -> None:
        """Takes KV memory (negative: gives it back), or raises BudgetExceeded for `kv_bytes_peak`."""
        with self._lock:
            if nbytes > 0:
                for account in self._down:
                    limit = account.budget.kv_bytes_peak
                    if limit is not None and account._bytes + nbytes > limit:
                        raise BudgetExceeded(account.path, "kv_bytes_peak", limit, 0, account._bytes, nbytes)
            for account in self._chain:
                account._bytes += nbytes
                account._bytes_peak = max(account._bytes_peak, account._bytes)

    def check_deadline(self) -> None:
        """Raises BudgetExceeded when the deadline of this account or of one above it has passed."""
        for account in self._timed:
            deadline, spent = account.budget.deadline, time.monotonic() - account._opened
            if deadline is not None and spent > deadline:
                raise BudgetExceeded(account.path, "seconds before the deadline", deadline, round(spent, 3), 0, 0)

    # -- nesting -----------------------------------------------------------------------------------------------

    def child(self, name: str, budget: Budget | None = None) -> Account:
        """An account below this one. Its budget is a limit and reserves nothing."""
        self._refuse_closed()
        return Account(name, budget or Budget(), parent=self)

    def reserve(self, name: str, budget: Budget) -> Account:
        """A child whose limits are taken from this account now, until `close`. Raises BudgetExceeded."""
        return self._reserve([(name, budget)])[0]

    def split(self, weights: Sequence[float], names: Sequence[str] | None = None) -> list[Account]:
        """Reserves all that remains, in parts that sum to it exactly (see `allocate`), one account a weight."""
        names = names or [f"part{i}" for i in range(len(weights))]
        if len(names) != len(weights):
            raise InvalidInput(f"{len(names)} names for {len(weights)} weights: give one a part")
        with self._lock:
            parts = {i: allocate(amount, weights) for i, amount in self._remaining().items()}
            limits = [{RESOURCES[i]: shown(i, parts[i][n]) for i in parts} for n in range(len(names))]
            budgets = [Budget(**limit) for limit in limits]  # type: ignore[arg-type]  # whole but for seconds
            return self._reserve_locked(list(zip(names, budgets, strict=True)))

    def close(self) -> None:
        """Gives back what `reserve` took and was not spent. Idempotent; open holds keep what they have."""
        with self._lock:
            if self._closed:
                return
            before = self._cover()
            self._closed = True
            if self.parent is not None:
                self.parent._move(_change(before, self._cover()), {})

    def __enter__(self) -> Account:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _bind(self) -> None:
        limits = [(i, getattr(self.budget, name)) for i, name in enumerate(RESOURCES)]
        self._bound = tuple((i, units(i, limit)) for i, limit in limits if limit is not None)

    # -- details: every function below runs under the lock -------------------------------------------------------

    def _refuse_closed(self) -> None:
        for account in self._chain:
            if account._closed:
                raise InvalidInput(f"account {account.path!r} is closed: open a new one")

    def _reserve(self, wanted: list[tuple[str, Budget]]) -> list[Account]:
        with self._lock:
            return self._reserve_locked(wanted)

    def _reserve_locked(self, wanted: list[tuple[str, Budget]]) -> list[Account]:
        """Takes all that is wanted, or nothing."""
        children = [Account(name, budget, parent=self) for name, budget in wanted]
        total: Amounts = {}
        for child in children:
            for i, limit in child._bound:
                total[i] = total.get(i, 0) + limit
        self._take(total, 0)
        for child in children:
            child._reserved = dict(child._bound)
            child._backed = self._backed or bool(child._reserved)
        return children

    def _take(self, ask: Amounts, keep: int) -> None:
        """Checks `ask` from the root to the leaf, then holds it at every level that sees it."""
        for account in self._chain:
            if account._closed:
                self._refuse_closed()
        if self._timed:
            self.check_deadline()
        if self._backed:
            self._take_backed(ask, keep)
            return
        for account in self._down:
            if keep:
                account._check(ask, keep, keep)
                continue
            settled, held = account._settled, account._held
            for i, limit in account._bound:
                if i in ask and settled[i] + held[i] + ask[i] > limit:
                    account._check(ask, 0, 0)  # raises
        changes = ask.items()
        for account in self._chain:
            held = account._held
            for i, asked in changes:
                held[i] += asked

    def _take_backed(self, ask: Amounts, keep: int) -> None:
        """`_take` where a level is a reserve: what it limits was taken above already, room to keep included."""
        seen, kept = ask, {TOKENS: keep, OUTPUT: keep}
        checks = []
        for account in self._chain:
            checks.append((account, seen, kept.get(TOKENS, 0), kept.get(OUTPUT, 0)))
            seen, kept = without(seen, account._reserved), without(kept, account._reserved)
        for account, asked, tokens, output in reversed(checks):
            account._check(asked, tokens, output)
        self._move(ask, {})

    def _check(self, ask: Amounts, keep_tokens: int, keep_output: int) -> None:
        settled, held = self._settled, self._held
        for i, limit in self._bound:
            more = ask.get(i, 0)
            if i == TOKENS:
                more += keep_tokens
            elif i == OUTPUT:
                more += keep_output
            if more and settled[i] + held[i] + more > limit:
                amounts = (shown(i, x) for x in (limit, settled[i], held[i], more))
                raise BudgetExceeded(self.path, RESOURCES[i], *amounts)

    def _give(self, amounts: Amounts) -> None:
        """Takes a hold back without settling anything."""
        self._move({i: -amount for i, amount in amounts.items()}, {})

    def _settle(self, held: Amounts, actual: Amounts, seconds: float) -> dict[str, float]:
        """Turns a hold into what was really spent, at every level; returns the new overdraft of the worst level."""
        if self._backed:
            if seconds:
                for account in self._chain:
                    account._seconds += seconds
            return self._move({i: -amount for i, amount in held.items()}, actual)
        worst: dict[str, float] = {}
        freed, spent = held.items(), actual.items()
        for account in self._chain:  # what `_move` does, for the common case without reserves
            mine, settled, overdraft = account._held, account._settled, account._overdraft
            for i, amount in freed:
                mine[i] -= amount
            for i, amount in spent:
                settled[i] += amount
            account._seconds += seconds
            for i, limit in account._bound:
                if settled[i] + mine[i] - limit > overdraft[i]:
                    account._note_overdraft(worst)
        return worst

    def _move(self, held: Amounts, settled: Amounts) -> dict[str, float]:
        """Adds to what is held (or takes from it) and to what is settled, from here to the root.

        Above a reserve, what is held for it changes only as far as its cover does. Returns the new overdraft.
        """
        worst: dict[str, float] = {}
        for account in self._chain:
            before = account._cover() if account._reserved else None
            mine = account._held
            for i, amount in held.items():
                mine[i] += amount
            if settled:
                mine = account._settled
                for i, amount in settled.items():
                    mine[i] += amount
                account._note_overdraft(worst)
            if before is not None:
                held = without(held, account._reserved) | _change(before, account._cover())
        return worst

    def _note_overdraft(self, worst: dict[str, float]) -> None:
        for i, limit in self._bound:
            over = self._settled[i] + self._held[i] - limit
            if over > self._overdraft[i]:
                worst[RESOURCES[i]] = max(worst.get(RESOURCES[i], 0), shown(i, over - self._overdraft[i]))
                self._overdraft[i] = over

    def _cover(self) -> Amounts:
        """What the account above holds for this reserve: all that is not settled, and open holds in any case (they
        may be more, after an overdraft). Once it is closed, open holds only."""
        settled, held = self._settled, self._held
        if self._closed:
            return {i: held[i] for i in self._reserved}
        return {i: max(limit - settled[i], held[i]) for i, limit in self._reserved.items()}

    def _remaining(self) -> Amounts:
        left: Amounts = {}
        covered: set[int] = set()
        for account in self._chain:
            for i, limit in account._bound:
                if i not in covered:
                    room = max(0, limit - account._settled[i] - account._held[i])
                    left[i] = min(room, left.get(i, room))
            covered.update(account._reserved)
        return left


def _change(before: Amounts, after: Amounts) -> Amounts:
    return {i: after[i] - before[i] for i in before if after[i] != before[i]}
