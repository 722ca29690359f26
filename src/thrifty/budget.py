"""Budgets and accounts: what may be spent, what is held, what is settled.

An Account is a Budget in use, and accounts nest: a hold on a leaf is checked and taken at every level, from the
root to the leaf, under one lock that the whole tree shares. So for every resource that adds, at every moment and at
every level,

    settled + held <= limit + overdraft

where overdraft is what was settled beyond a limit because a provider billed more than was held. Nothing here waits,
so accounts serve threads and asyncio alike; only `Hold.settle` may block, until a durable ledger has committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from types import TracebackType
from typing import Any

from thrifty.allocate import allocate
from thrifty.errors import BudgetExceeded, InvalidInput, ThriftyError, nearest
from thrifty.ledger.entry import NO_LABELS, Entry, HoldRecord, Labels, LedgerLike, Ticket
from thrifty.spend import NANO, SPEND_FIELDS, WORK_ADDING, Spend, Work

RESOURCES: tuple[str, ...] = ("tokens", *SPEND_FIELDS, *WORK_ADDING)
"""What can be held and settled, in the order of the vectors below."""

_INDEX = {name: i for i, name in enumerate(RESOURCES)}
_TOKENS, _OUTPUT, _SIZE = _INDEX["tokens"], _INDEX["output"], len(RESOURCES)
_NOTHING = Spend()
_NO_WORK = Work()
_MOST = 2**62  # above this, sums of limits could leave SQLite's and Parquet's 64-bit integers


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on Spend and Work. None means unlimited.

    `tokens` limits input + output; `usd` is in 1e-9 USD (`from_dict`, and so TOML, takes dollars). `kv_bytes_peak` is
    checked when memory is taken. `deadline` is in seconds of wall clock after the account was opened; it is checked at
    every hold and growth, not held.

    >>> Budget(output=100)
    Budget(output=100)
    """

    tokens: int | None = None
    input: int | None = None
    cached: int | None = None
    visual: int | None = None
    output: int | None = None
    reasoning: int | None = None
    calls: int | None = None
    tool_calls: int | None = None
    usd: int | None = None
    prefill: int | None = None
    kv_reads: int | None = None
    target_passes: int | None = None
    draft_passes: int | None = None
    engine_seconds: float | None = None
    kv_bytes_peak: int | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            real = name in ("engine_seconds", "deadline")
            kinds = (int, float) if real else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= _MOST:
                kind = "number" if real else "whole number"
                raise InvalidInput(f"budget {name} = {value!r}: a {kind} from 0 to {_MOST:,} is needed")

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{k}={v!r}' for k, v in self.limits().items())})"

    def limits(self) -> dict[str, float]:
        """Only the limits that are set."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def to_dict(self) -> dict[str, float]:
        """As TOML has it: only what is limited, usd in dollars."""
        limits = self.limits()
        if "usd" in limits:
            limits["usd"] = float(Decimal(int(limits["usd"])) / NANO)
        return limits

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Reads what `to_dict` writes; raises InvalidInput for an unknown resource or an absurd value.

        >>> Budget.from_dict({"usd": 0.25, "output": 96})
        Budget(output=96, usd=250000000)
        """
        known = [f.name for f in fields(cls)]
        values = dict(data)
        for name in values:
            if name not in known:
                raise InvalidInput(nearest(name, known, "budget resource"))
        if "usd" in values:
            values["usd"] = _nano(values["usd"])
        return cls(**values)


@dataclass(slots=True)
class Account:
    """A Budget in use. Make the root with `Account("name", Budget(...), ledger=...)`, the others with `child`,
    `reserve` and `split`."""

    name: str
    budget: Budget = field(default_factory=Budget)
    ledger: LedgerLike | None = None
    parent: Account | None = None
    _lock: Any = field(default=None, repr=False)
    _limits: list[float | None] = field(default_factory=list, repr=False)
    _bound: tuple[int, ...] = field(default=(), repr=False)
    _settled: list[float] = field(default_factory=lambda: [0] * _SIZE, repr=False)
    _held: list[float] = field(default_factory=lambda: [0] * _SIZE, repr=False)
    _overdraft: list[float] = field(default_factory=lambda: [0] * _SIZE, repr=False)
    _backing: dict[int, float] = field(default_factory=dict, repr=False)
    _chain: tuple[Account, ...] = field(default=(), repr=False)
    path: str = field(default="", init=False)
    """the names from the root to this account, joined by '/'"""
    _bytes: int = field(default=0, repr=False)
    _bytes_peak: int = field(default=0, repr=False)
    _opened: float = field(default_factory=time.monotonic, repr=False)
    _closed: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise InvalidInput(f"account name {self.name!r}: a non-empty name without '/' is needed")
        if self.parent is not None:
            self.ledger = self.parent.ledger
        self._lock = threading.Lock() if self.parent is None else self.parent._lock
        self._limits = [getattr(self.budget, name) for name in RESOURCES]
        self._bound = tuple(i for i, limit in enumerate(self._limits) if limit is not None)
        self._chain = (self,) if self.parent is None else (self, *self.parent._chain)  # leaf first
        self.path = self.name if self.parent is None else f"{self.parent.path}/{self.name}"

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def settled(self) -> Spend:
        """What was spent, by this account and those below it."""
        with self._lock:
            return Spend(*(int(x) for x in self._settled[1 : 1 + len(SPEND_FIELDS)]))

    @property
    def work(self) -> Work:
        """The Work settled; `kv_bytes_peak` is the highest sum claimed at once."""
        with self._lock:
            adding = self._settled[1 + len(SPEND_FIELDS) :]
            return Work(*(int(x) for x in adding[:4]), float(adding[4]), kv_bytes_peak=self._bytes_peak)

    @property
    def held(self) -> dict[str, float]:
        """What is held now, by resource; only what is not zero."""
        with self._lock:
            return {name: self._held[i] for i, name in enumerate(RESOURCES) if self._held[i]}

    @property
    def overdraft(self) -> dict[str, float]:
        """What was settled beyond the limits, by resource; only what is not zero."""
        with self._lock:
            return {name: self._overdraft[i] for i, name in enumerate(RESOURCES) if self._overdraft[i]}

    def remaining(self) -> dict[str, float]:
        """What could still be held, for every resource that this account or one above it limits."""
        with self._lock:
            return self._remaining()

    def room(self, resource: str) -> float | None:
        """What of one resource could still be held; None when nothing limits it."""
        if resource not in _INDEX:
            raise InvalidInput(nearest(resource, RESOURCES, "resource"))
        return self.remaining().get(resource)

    # -- spending ----------------------------------------------------------------------------------------------

    def hold(
        self,
        ask: Spend = _NOTHING,
        work: Work = _NO_WORK,
        *,
        keep: int = 0,
        labels: Labels = NO_LABELS,
        durable: bool = False,
    ) -> Hold:
        """Sets `ask` (and `work`) aside at every level, or raises BudgetExceeded and changes nothing.

        `keep` output tokens must still be free afterwards: they are what the answer itself will need. `durable` writes
        the hold to the ledger first, so that a crash cannot lose a call that a provider will bill.
        """
        vector = _vector(ask, work)
        with self._lock:
            self._take(vector, keep)
        hold = Hold(self, vector, keep, labels, time.time_ns())
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
                for account in reversed(self._chain):
                    limit = account.budget.kv_bytes_peak
                    if limit is not None and account._bytes + nbytes > limit:
                        raise BudgetExceeded(account.path, "kv_bytes_peak", limit, 0, account._bytes, nbytes)
            for account in self._chain:
                account._bytes += nbytes
                account._bytes_peak = max(account._bytes_peak, account._bytes)

    def check_deadline(self) -> None:
        """Raises BudgetExceeded when the deadline of this account or of one above it has passed."""
        now = time.monotonic()
        for account in self._chain:
            deadline = account.budget.deadline
            if deadline is not None and now - account._opened > deadline:
                spent = round(now - account._opened, 3)
                raise BudgetExceeded(account.path, "seconds before the deadline", deadline, spent, 0, 0)

    # -- nesting -----------------------------------------------------------------------------------------------

    def child(self, name: str, budget: Budget | None = None) -> Account:
        """An account below this one. Its budget is a limit and reserves nothing."""
        self._refuse_closed()
        return Account(name, budget or Budget(), parent=self)

    def reserve(self, name: str, budget: Budget) -> Account:
        """A child whose limits are taken from this account now, until `close`. Raises BudgetExceeded."""
        vector: list[float] = [0] * _SIZE
        child = Account(name, budget, parent=self)
        for i in child._bound:
            vector[i] = child._limits[i] or 0
        with self._lock:
            self._take(vector, 0)
            child._backing = {i: vector[i] for i in child._bound}
        return child

    def split(self, weights: Sequence[float], names: Sequence[str] | None = None) -> list[Account]:
        """Reserves all that remains, in parts that sum to it exactly (see `allocate`), one account a weight."""
        names = names or [f"part{i}" for i in range(len(weights))]
        if len(names) != len(weights):
            raise InvalidInput(f"{len(names)} names for {len(weights)} weights: give one a part")
        whole = {k: int(v) for k, v in self.remaining().items() if k != "engine_seconds"}
        parts = {k: allocate(max(0, v), weights) for k, v in whole.items()}
        return [self.reserve(name, Budget(**{k: parts[k][i] for k in parts})) for i, name in enumerate(names)]

    def close(self) -> None:
        """Gives back what `reserve` took and was not spent. Idempotent; open holds keep what they have."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._backing and self.parent is not None:
                rest: list[float] = [0] * _SIZE
                for i, left in self._backing.items():
                    give = left - self._held[i]
                    if give > 0:
                        rest[i] = give
                        self._backing[i] = left - give
                self.parent._give(rest)

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # -- details: every function below runs under the lock -------------------------------------------------------

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InvalidInput(f"account {self.path!r} is closed: open a new one")

    def _take(self, ask: list[float], keep: int) -> None:
        """Checks `ask` from the root to the leaf, then holds it at every level that sees it."""
        self._refuse_closed()
        self.check_deadline()
        seen = self._seen(ask)
        for account, amounts in reversed(seen):
            limits, settled, held = account._limits, account._settled, account._held
            for i in account._bound:
                asked = amounts[i]
                more = asked + keep if keep and (i == _OUTPUT or i == _TOKENS) else asked
                limit = limits[i]
                if more and limit is not None and settled[i] + held[i] + more > limit:
                    raise BudgetExceeded(account.path, RESOURCES[i], limit, settled[i], held[i], more)
        for account, amounts in seen:
            held = account._held
            for i, asked in enumerate(amounts):
                if asked:
                    held[i] += asked

    def _seen(self, ask: list[float]) -> list[tuple[Account, list[float]]]:
        """What each level sees of an ask, leaf first: a reserved part was taken above already."""
        seen = []
        for account in self._chain:
            seen.append((account, ask))
            if account._backing:
                ask = list(ask)
                for i in account._backing:
                    ask[i] = 0
        return seen

    def _give(self, amounts: list[float]) -> None:
        """Takes a hold back without settling anything."""
        for account, part in self._seen(amounts):
            for i, amount in enumerate(part):
                if amount:
                    account._held[i] -= amount
                    if account._closed and i in account._backing and account.parent is not None:
                        self._return_backing(account, i)

    def _return_backing(self, account: Account, i: int) -> None:
        """A closed reserve gives back what its last holds leave over."""
        give = account._backing[i] - account._held[i]
        if give > 0 and account.parent is not None:
            account._backing[i] -= give
            rest: list[float] = [0] * _SIZE
            rest[i] = give
            account.parent._give(rest)

    def _settle(self, held: list[float], actual: list[float]) -> dict[str, float]:
        """Turns a hold into what was really spent, at every level; returns the new overdraft of the worst level."""
        worst: dict[str, float] = {}
        for account in self._chain:
            for i, amount in enumerate(actual):
                if held[i]:
                    account._held[i] -= held[i]
                if amount:
                    account._settled[i] += amount
            for i in account._bound:
                limit = account._limits[i] or 0
                over = account._settled[i] + account._held[i] - limit - account._overdraft[i]
                if over > 0:
                    account._overdraft[i] += over
                    worst[RESOURCES[i]] = max(worst.get(RESOURCES[i], 0), over)
            if account._backing:
                held = list(held)
                for i, left in account._backing.items():
                    held[i] = min(actual[i], left)
                    account._backing[i] = left - held[i]
        for account in self._chain:
            if account._closed and account._backing:
                for i in account._backing:
                    self._return_backing(account, i)
        return worst

    def _remaining(self) -> dict[str, float]:
        left: dict[str, float] = {}
        covered: set[int] = set()
        for account in self._chain:
            for i in account._bound:
                limit = account._limits[i]
                if i not in covered and limit is not None:
                    room = max(0, limit - account._settled[i] - account._held[i])
                    left[RESOURCES[i]] = min(room, left.get(RESOURCES[i], room))
            covered.update(account._backing)
        return left


@dataclass(slots=True)
class Hold:
    """An amount set aside on an account until it is settled or released. Leaving its `with` block releases it."""

    account: Account
    amounts: list[float]
    keep: int
    labels: Labels
    opened: int
    record: str | None = None
    closed: bool = False

    def grow(self, ask: Spend = _NOTHING, work: Work = _NO_WORK, *, keep: int | None = None) -> None:
        """Sets more aside, or raises BudgetExceeded and changes nothing. `keep` defaults to the hold's own."""
        more = _vector(ask, work)
        with self.account._lock:
            self._refuse_closed()
            self.account._take(more, self.keep if keep is None else keep)
            self.amounts = [a + b for a, b in zip(self.amounts, more, strict=True)]

    def book(
        self, actual: Spend, work: Work = _NO_WORK, *, estimated: bool = False, labels: Labels | None = None
    ) -> tuple[Entry, Ticket | None]:
        """Settles what was really spent, frees the rest and queues the ledger entry, without waiting for the disk.

        Raises ThriftyError when the hold was settled or released before: what was spent is settled once.
        """
        vector = _vector(actual, work)
        account = self.account
        with account._lock:
            self._refuse_closed()
            self.closed = True
            overdraft = account._settle(self.amounts, vector)
        entry = Entry(
            account.path,
            self.opened,
            time.time_ns(),
            actual,
            work,
            labels or self.labels,
            "estimated" if estimated else "settled",
            overdraft,
        )
        return entry, None if account.ledger is None else account.ledger.append(entry, self.record)

    def settle(
        self, actual: Spend, work: Work = _NO_WORK, *, estimated: bool = False, labels: Labels | None = None
    ) -> Entry:
        """`book`, and return when the ledger has committed. Blocks the thread; coroutines await `settle_async`."""
        entry, ticket = self.book(actual, work, estimated=estimated, labels=labels)
        if ticket is not None:
            ticket.wait()
        return entry

    async def settle_async(
        self, actual: Spend, work: Work = _NO_WORK, *, estimated: bool = False, labels: Labels | None = None
    ) -> Entry:
        """`settle` for coroutines. All is booked and queued before the first await, so a cancelled task loses
        nothing."""
        entry, ticket = self.book(actual, work, estimated=estimated, labels=labels)
        if ticket is not None:
            await ticket.done()
        return entry

    def release(self) -> None:
        """Gives everything back; nothing was spent. Does nothing on a closed hold."""
        with self.account._lock:
            if self.closed:
                return
            self.closed = True
            self.account._give(self.amounts)
        if self.record is not None and self.account.ledger is not None:
            self.account.ledger.drop_hold(self.record)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ThriftyError(
                f"a hold on {self.account.path!r} was settled or released before: open a new one"
            )


def tightest(budgets: Iterable[Budget]) -> Budget:
    """The budget that allows only what each of them allows."""
    limits: dict[str, Any] = {}
    for budget in budgets:
        for name, limit in budget.limits().items():
            limits[name] = min(limit, limits.get(name, limit))
    return replace(Budget(), **limits)


def _vector(spend: Spend, work: Work) -> list[float]:
    return [
        spend.input + spend.output,
        spend.input,
        spend.cached,
        spend.visual,
        spend.output,
        spend.reasoning,
        spend.calls,
        spend.tool_calls,
        spend.usd,
        work.prefill,
        work.kv_reads,
        work.target_passes,
        work.draft_passes,
        work.engine_seconds,
    ]


def _nano(dollars: Any) -> int:
    try:
        if isinstance(dollars, bool):
            raise InvalidOperation
        return int((Decimal(str(dollars)) * NANO).to_integral_value())
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise InvalidInput(
            f"budget usd = {dollars!r}: an amount in dollars is needed, such as 0.25"
        ) from error
