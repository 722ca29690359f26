"""What a ledger records: entries, holds that must survive a crash, and the shape every ledger has.

This module is the part of the ledger that budgets know. It opens no file and imports no database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from thrifty.spend import Spend, Work

Status = Literal["settled", "estimated", "unknown"]
"""`estimated`: the server gave no usage, so tokens were counted here. `unknown`: a crash orphaned the hold, and its
full amount was settled."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What an entry says about its cause, beside the account."""

    plan: str = ""
    """hash of the plan"""
    method: str = ""
    """the method that asked for the generation; empty for the answer itself"""
    engine: str = ""
    model: str = ""
    role: str = "answer"
    """the engine's role in the plan: answer, draft, scorer, embedder, judge"""
    prices: str = ""
    """name and date of the price table that `usd` was computed with"""


NO_LABELS = Labels()


@dataclass(frozen=True, slots=True)
class Entry:
    """One settled generation. Times are Unix nanoseconds."""

    account: str
    opened: int
    at: int
    spend: Spend
    work: Work = Work()
    labels: Labels = NO_LABELS
    status: Status = "settled"
    overdraft: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HoldRecord:
    """A hold written before a remote call: what would be settled if the process died now."""

    account: str
    opened: int
    spend: Spend
    work: Work = Work()
    labels: Labels = NO_LABELS


class Ticket(Protocol):
    """A promise that an entry will be committed. Entries that are committed together share one."""

    def wait(self) -> None:
        """Blocks until the commit. Raises LedgerError when it failed."""

    def done(self) -> Awaitable[None]:
        """`wait` for coroutines: to be awaited once, on the event loop where it was called."""


class LedgerLike(Protocol):
    """What an account needs of a ledger."""

    def append(self, entry: Entry, hold: str | None = None) -> Ticket:
        """Queues an entry, closing the hold it came from in the same transaction. Never blocks on the disk."""

    def open_hold(self, record: HoldRecord) -> str:
        """Writes a hold, waits until it is committed, and returns its identifier."""

    def drop_hold(self, hold: str) -> None:
        """Removes a hold that was released: nothing was spent."""
