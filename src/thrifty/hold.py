"""A Hold: an amount set aside on an account until it is settled or released, once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from thrifty.errors import ThriftyError
from thrifty.ledger.entry import Entry, Labels, Ticket
from thrifty.resources import NO_WORK, Amounts, amounts_of
from thrifty.spend import Spend, Work

if TYPE_CHECKING:
    from thrifty.budget import Account

_NOTHING = Spend()


@dataclass(slots=True, eq=False)
class Hold:
    """An amount set aside on an account until it is settled or released. Leaving its `with` block releases it."""

    account: Account
    amounts: Amounts
    keep: int
    labels: Labels
    opened: int
    record: str | None = None
    closed: bool = False

    def grow(self, ask: Spend = _NOTHING, work: Work = NO_WORK, *, keep: int | None = None) -> None:
        """Sets more aside, or raises BudgetExceeded and changes nothing. `keep` defaults to the hold's own."""
        more = amounts_of(ask, work)
        with self.account._lock:
            self._refuse_closed()
            self.account._take(more, self.keep if keep is None else keep)
            for i, amount in more.items():
                self.amounts[i] = self.amounts.get(i, 0) + amount

    def book(
        self, actual: Spend, work: Work = NO_WORK, *, estimated: bool = False, labels: Labels | None = None
    ) -> tuple[Entry, Ticket | None]:
        """Settles what was really spent, frees the rest and queues the ledger entry, without waiting for the disk.

        Raises ThriftyError when the hold was settled or released before: what was spent is settled once.
        """
        amounts = amounts_of(actual, work)
        account = self.account
        with account._lock:
            self._refuse_closed()
            self.closed = True
            overdraft = account._settle(self.amounts, amounts, work.engine_seconds)
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
        self, actual: Spend, work: Work = NO_WORK, *, estimated: bool = False, labels: Labels | None = None
    ) -> Entry:
        """`book`, and return when the ledger has committed. Blocks the thread; coroutines await `settle_async`."""
        entry, ticket = self.book(actual, work, estimated=estimated, labels=labels)
        if ticket is not None:
            ticket.wait()
        return entry

    async def settle_async(
        self, actual: Spend, work: Work = NO_WORK, *, estimated: bool = False, labels: Labels | None = None
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ThriftyError(f"a hold on {self.account.path!r} was settled or released before: open a new one")
