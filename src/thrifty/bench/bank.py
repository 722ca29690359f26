"""One account for many processes: the run's account stays in one place, workers hold and settle there.

`Bank` is that place. `Leased` is an account in a worker: whatever is held, given back or settled on it is held,
given back or settled on the run's account too, so the total of all workers never passes the run's budget, and a
refusal says what the run's own account says. What a worker held when it died is settled in full: nobody knows
what of it was spent, and the budget must hold. Workers reach the bank through a `Teller`; all that crosses is JSON.

A run whose account has no limit asks nothing before it spends; it only tells what it settled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, Protocol

from thrifty.budget import Account, Budget
from thrifty.errors import ThriftyError
from thrifty.ledger.entry import Entry, HoldRecord, Labels, Ticket
from thrifty.resources import SECONDS, Amounts, shown
from thrifty.spend import SPEND_FIELDS, Spend, Work

Pairs = list[list[int]]
"""Amounts as JSON has them: pairs of resource and amount."""


class Teller(Protocol):
    """A worker's way to the bank."""

    def ask(self, do: str, **args: Any) -> Any:
        """Waits for the bank's reply. Raises what the bank raises."""

    def tell(self, do: str, **args: Any) -> None:
        """Does not wait."""

    def start(self, do: str, **args: Any) -> Future[Any]:
        """The reply as it will come."""


# -- where the account is --------------------------------------------------------------------------------------


class Bank:
    """The run's account, and its ledger for workers that cannot open one, on behalf of workers by name."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._before = account.settled
        self._held: dict[str, Amounts] = {}
        self._records: dict[str, dict[str, HoldRecord]] = {}
        self._gone: set[str] = set()

    @property
    def paid(self) -> Spend:
        """What was settled since the bank opened."""
        now = self.account.settled
        return Spend(*(getattr(now, name) - getattr(self._before, name) for name in SPEND_FIELDS))

    @property
    def workers(self) -> set[str]:
        """Those that have held something."""
        return {*self._held, *self._records}

    def serve(self, worker: str, do: str, args: Mapping[str, Any]) -> Any:
        """What a worker's teller asks for. Raises BudgetExceeded, and ThriftyError for what is not served."""
        served: dict[str, Callable[..., Any]] = {
            "take": self._take,
            "give": self._give,
            "settle": self._settle,
            "room": self._room,
            "sync": self._sync,
            "append": self._append,
            "open_hold": self._open_hold,
            "drop_hold": self._drop_hold,
        }
        if do not in served:
            raise ThriftyError(f"the bank does not know {do!r}")
        return served[do](worker, **args)

    def lost(self, worker: str) -> None:
        """A worker has ended: settles in full what it still held. What it tells later is ignored."""
        self._gone.add(worker)
        held = self._held.pop(worker, {})
        with self.account._lock:
            self.account._settle(held, held, shown(SECONDS, held.get(SECONDS, 0)))
        ledger = self.account.ledger
        for hold, record in self._records.pop(worker, {}).items():
            if ledger is not None:
                ledger.append(_orphan(record), hold).wait()

    # -- what tellers ask ------------------------------------------------------------------------------------------

    def _take(self, worker: str, ask: Pairs, keep: int) -> None:
        if worker in self._gone:
            raise ThriftyError(f"worker {worker} was given up: it may spend nothing more")
        amounts = _amounts(ask)
        with self.account._lock:
            self.account._take(amounts, keep)
        self._hold(worker, amounts, 1)

    def _give(self, worker: str, amounts: Pairs) -> None:
        if worker in self._gone:
            return
        with self.account._lock:
            self.account._give(_amounts(amounts))
        self._hold(worker, _amounts(amounts), -1)

    def _settle(self, worker: str, held: Pairs, actual: Pairs, seconds: float) -> dict[str, float]:
        if worker in self._gone:
            return {}
        with self.account._lock:
            over = self.account._settle(_amounts(held), _amounts(actual), seconds)
        self._hold(worker, _amounts(held), -1)
        return over

    def _room(self, worker: str) -> dict[str, float]:
        self.account.check_deadline()
        return self.account.remaining()

    def _sync(self, worker: str) -> None:
        """Served when all is that the worker told before."""

    def _hold(self, worker: str, amounts: Amounts, sign: int) -> None:
        held = self._held.setdefault(worker, {})
        for i, amount in amounts.items():
            held[i] = held.get(i, 0) + sign * amount

    # -- the ledger ------------------------------------------------------------------------------------------------

    def _append(self, worker: str, entry: Mapping[str, Any], hold: str | None) -> None:
        if self.account.ledger is None or (hold is not None and worker in self._gone):
            return  # what a lost worker held is in the ledger already
        self._records.get(worker, {}).pop(hold or "", None)
        self.account.ledger.append(entry_of(entry), hold).wait()

    def _open_hold(self, worker: str, record: Mapping[str, Any]) -> str:
        if self.account.ledger is None:
            return ""
        written = _record(record)
        hold = self.account.ledger.open_hold(written)
        self._records.setdefault(worker, {})[hold] = written
        return hold

    def _drop_hold(self, worker: str, hold: str) -> None:
        if self.account.ledger is not None and self._records.get(worker, {}).pop(hold, None) is not None:
            self.account.ledger.drop_hold(hold)


def limited(account: Account) -> bool:
    """Whether the account, or one above it, limits anything that is held, or has a deadline."""
    return bool(account._timed) or any(a._bound for a in account._chain)


def state_of(account: Account) -> dict[str, Any]:
    """An account as JSON, for a bank elsewhere: its limits, what of them is settled, the age that its deadline
    counts from."""
    alone = account.parent is None
    limits = account.budget.limits() if alone else dict(account.remaining())
    age = time.monotonic() - account._opened
    if not alone and account._timed:
        limits["deadline"] = min(
            age + max(0.0, (a.budget.deadline or 0.0) - (time.monotonic() - a._opened)) for a in account._timed
        )
    with account._lock:
        settled = list(account._settled) if alone else []
    return {"path": account.path, "limits": limits, "settled": settled, "age": age}


def account_of(state: Mapping[str, Any], ledger: Any = None) -> Account:
    """The opposite of `state_of`."""
    path = str(state["path"])
    account = Account(path.rpartition("/")[2], Budget(**state["limits"]), ledger=ledger)
    account.path = path
    account._opened = time.monotonic() - state["age"]
    with account._lock:
        account._settle({}, {i: n for i, n in enumerate(state["settled"]) if n}, 0.0)
    return account


# -- in the worker -----------------------------------------------------------------------------------------------


class Leased(Account):
    """The run's account as a worker has it. `asks`: whether the run has limits, so that holds need the bank."""

    teller: Teller
    asks: bool

    @classmethod
    def open(cls, path: str, ledger: Any, teller: Teller, asks: bool) -> Leased:
        """The root of a worker; `path` is that of the run's account, so that entries name it."""
        account = cls(path.rpartition("/")[2], ledger=ledger)
        account.path, account.teller, account.asks = path, teller, asks
        return account

    def child(self, name: str, budget: Budget | None = None) -> Account:
        """An account below this one, whose holds go to the bank too."""
        self._refuse_closed()
        child = Leased(name, budget or Budget(), parent=self)
        child.teller, child.asks = self.teller, self.asks
        return child

    def remaining(self) -> dict[str, float]:
        """What the run's account has left; a limit of this one counts too. Raises BudgetExceeded when the run's
        deadline has passed."""
        left = super().remaining()
        if self.asks:
            for name, room in self.teller.ask("room").items():
                left[name] = min(room, left.get(name, room))
        return left

    def _take(self, ask: Amounts, keep: int) -> None:
        super()._take(ask, keep)
        if self.asks:
            try:
                self.teller.ask("take", ask=_pairs(ask), keep=keep)
            except BaseException:
                super()._give(ask)
                raise

    def _give(self, amounts: Amounts) -> None:
        super()._give(amounts)
        if self.asks:
            self.teller.tell("give", amounts=_pairs(amounts))

    def _settle(self, held: Amounts, actual: Amounts, seconds: float) -> dict[str, float]:
        over = super()._settle(held, actual, seconds)
        told = {"held": _pairs(held if self.asks else {}), "actual": _pairs(actual), "seconds": seconds}
        if self.asks and any(amount > held.get(i, 0) for i, amount in actual.items()):
            for name, more in self.teller.ask("settle", **told).items():  # it may be more than the budget has
                over[name] = max(more, over.get(name, 0))
        else:
            self.teller.tell("settle", **told)
        return over


class BankLedger:
    """The run's ledger as a worker has it that cannot open the file: entries go to the bank."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller

    def append(self, entry: Entry, hold: str | None = None) -> Ticket:
        """Sends an entry; its ticket is done when the run's ledger has committed it."""
        return _Sent(self._teller.start("append", entry=asdict(entry), hold=hold))

    def open_hold(self, record: HoldRecord) -> str:
        """Returns when the run's ledger has committed the hold."""
        return str(self._teller.ask("open_hold", record=asdict(record)))

    def drop_hold(self, hold: str) -> None:
        """Does not wait: after a crash in between, the bank settles it as an orphan."""
        self._teller.tell("drop_hold", hold=hold)


class _Sent:
    """The bank's word that an entry is committed."""

    def __init__(self, reply: Future[Any]) -> None:
        self._reply = reply

    def wait(self) -> None:
        """Blocks until the commit."""
        self._reply.result()

    async def done(self) -> None:
        """`wait` for coroutines."""
        await asyncio.wrap_future(self._reply)


# -- JSON --------------------------------------------------------------------------------------------------------


def _pairs(amounts: Amounts) -> Pairs:
    return [[i, amount] for i, amount in amounts.items()]


def _amounts(pairs: Pairs) -> Amounts:
    return {i: amount for i, amount in pairs}


def entry_of(data: Mapping[str, Any]) -> Entry:
    """A ledger entry from its JSON (`dataclasses.asdict`)."""
    fields = dict(data)
    fields["spend"], fields["work"] = Spend(**data["spend"]), Work(**data["work"])
    return Entry(**{**fields, "labels": Labels(**data["labels"])})


def _record(data: Mapping[str, Any]) -> HoldRecord:
    fields = dict(data)
    fields["spend"], fields["work"] = Spend(**data["spend"]), Work(**data["work"])
    return HoldRecord(**{**fields, "labels": Labels(**data["labels"])})


def _orphan(record: HoldRecord) -> Entry:
    return Entry(
        record.account, record.opened, time.time_ns(), record.spend, record.work, record.labels, status="unknown"
    )
