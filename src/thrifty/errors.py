"""Every error Thrifty raises on purpose: one small hierarchy.

A message is one line that says what was given, what is allowed and what to do. `exit_code` is what the command
line exits with, so that programs can tell the kinds apart:

======  ==================================================================
code    meaning
======  ==================================================================
1       an unexpected failure, or a file that cannot be written
2       bad input: an unknown name, a knob out of range, a broken file
3       a budget refused the call
4       an engine failed: down, hung, cut, or answered nonsense
5       the ledger or a certificate does not verify
6       tuning ended, and no plan could be certified
130     interrupted; the run can be resumed
======  ==================================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thrifty.spend import Spend, Work


class ThriftyError(Exception):
    """Base of every error that Thrifty raises on purpose."""

    exit_code = 1


class InvalidInput(ThriftyError):
    """What the caller gave cannot be used: an unknown name, a value out of range, a broken file."""

    exit_code = 2


class PlanError(InvalidInput):
    """A plan cannot be built: an order, a need or a combination that the check refuses."""


class BudgetExceeded(ThriftyError):
    """A hold, a growth or a memory claim would pass a limit.

    Attributes: `account` (its path), `resource`, `limit`, `settled`, `held` and `asked`, all in the resource's unit.
    """

    exit_code = 3

    def __init__(self, account: str, resource: str, limit: float, settled: float, held: float, asked: float) -> None:
        self.account, self.resource, self.limit = account, resource, limit
        self.settled, self.held, self.asked = settled, held, asked
        super().__init__(
            f"account {account!r} allows {limit:,} {resource}; {settled:,} are settled and {held:,} held, "
            f"so {asked:,} more do not fit: raise the limit or ask for less"
        )


class EngineError(ThriftyError):
    """An engine failed. What had been spent is settled and is in `spend` and `work` (None when nothing was).

    `status` is the HTTP status that a server gave, `wait` the seconds it asks to wait, `timed_out` whether we gave up.
    """

    exit_code = 4

    def __init__(
        self,
        message: str,
        spend: Spend | None = None,
        work: Work | None = None,
        *,
        status: int | None = None,
        wait: float | None = None,
        timed_out: bool = False,
    ) -> None:
        super().__init__(message)
        self.spend, self.work = spend, work
        self.status, self.wait, self.timed_out = status, wait, timed_out


class Unsupported(InvalidInput):
    """A model or an engine lacks what was asked of it; the message says what is supported."""


class LedgerError(ThriftyError):
    """The ledger cannot be opened, read or written."""


class CacheError(ThriftyError):
    """A response cache's file cannot be opened, read or written."""


class LedgerChanged(LedgerError):
    """The ledger is damaged, or shows that it was changed."""

    exit_code = 5


def nearest(given: str, known: Iterable[str], kind: str) -> str:
    """One line that refuses an unknown name and offers the nearest known ones.

    >>> nearest("adaptve-k", ["adaptive-k", "fixed-k"], "method")
    "unknown method 'adaptve-k': did you mean 'adaptive-k'? known: adaptive-k, fixed-k"
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"unknown {kind} {given!r}: {guess}known: {listed or 'none'}"
