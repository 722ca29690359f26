"""What one generation holds and settles: its prompt and a tranche of output, grown as it goes, settled once.

A `Tab` is the open bill of one branch. Invariants: no output token is drawn that is not held (so engines that keep to
their tabs never overdraw); a refused tranche is asked for again in halves, so a branch ends only when not one token
more fits; `settle` books exactly once, and everything not spent is free again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from thrifty.budget import Account, Hold
from thrifty.call import Receipt
from thrifty.errors import BudgetExceeded, ThriftyError
from thrifty.ledger.entry import Entry, Labels, Ticket
from thrifty.spend import Spend, Work

TRANCHE = 64
"""Output tokens held at a time."""

DEGRADED = "budget"
"""The name that receipts about a budget's own cuts carry."""


class Prices(Protocol):
    """What an engine needs of a price table."""

    def with_price(self, spend: Spend, model: str, role: str = "answer") -> Spend:
        """The same Spend with its `usd`."""


Bound = Callable[[int], Work]
"""The most Work that a generation with n output tokens can take, its prompt included."""


def no_work(output: int) -> Work:
    """A bound for engines whose Work nobody limits."""
    return Work()


@dataclass(slots=True)
class Tab:
    """One generation's open bill. Make it with `Tab.open`."""

    account: Account
    labels: Labels
    prompt: Spend
    """the input side, `calls` included"""
    prices: Prices | None = None
    bound: Bound = no_work
    tranche: int = TRANCHE
    held: int = 0
    """output tokens that are held"""
    thinking: int = 0
    """reasoning tokens that are held"""
    refusal: BudgetExceeded | None = None
    """why the last growth was refused"""
    entry: Entry | None = None
    ticket: Ticket | None = None
    _hold: Hold | None = None
    _usd: int = 0
    _work: Work = field(default_factory=Work)
    _timed: bool = False

    @classmethod
    def open(
        cls,
        account: Account,
        prompt: Spend,
        *,
        labels: Labels,
        limit: int | None = None,
        keep: int = 0,
        on_exceed: Literal["refuse", "degrade"] = "degrade",
        prices: Prices | None = None,
        bound: Bound = no_work,
        tranche: int = TRANCHE,
    ) -> Tab:
        """Holds the prompt and a first tranche. `limit` is the call's max_tokens.

        On "degrade" the tranche shrinks to what fits, down to one token; on "refuse" all of `limit` is held at once.
        Raises BudgetExceeded when the prompt and one token do not fit, or on "refuse" when `limit` does not.
        """
        tab = cls(account, labels, prompt, prices, bound, tranche)
        tab._timed = any(a.budget.deadline is not None for a in account._chain)
        whole = on_exceed == "refuse" and limit is not None
        first = limit if whole and limit is not None else tranche if limit is None else min(tranche, limit)
        least = first if whole else min(1, first)
        amount = _largest(least, first, lambda n: tab._begin(n, keep))
        tab.held = amount
        return tab

    def spend(self, output: int, reasoning: int = 0, tool_calls: int = 0) -> Spend:
        """The bill for what was produced so far, priced."""
        bill = replace(self.prompt, output=output, reasoning=reasoning, tool_calls=tool_calls)
        return bill if self.prices is None else self.prices.with_price(bill, self.labels.model, self.labels.role)

    def amend(self, prompt: Spend) -> None:
        """Corrects the input side once it is known exactly. Raises BudgetExceeded when it is more than was held."""
        more = Spend(input=max(0, prompt.input - self.prompt.input), visual=max(0, prompt.visual - self.prompt.visual))
        if self._hold is not None and more:
            self._hold.grow(more)
        self.prompt = prompt

    def cover(self, output: int, reasoning: int = 0, limit: int | None = None) -> bool:
        """True when `output` tokens, `reasoning` of them thinking, are held or could be. False: not one more fits.

        Grows by a tranche, never past `limit`. Also False once the deadline has passed.
        """
        try:
            if self._timed:
                self.account.check_deadline()
            if output > self.held:
                most = self.held + max(self.tranche, output - self.held)
                self._grow(output, max(output, most if limit is None else min(most, limit)))
            if reasoning > self.thinking:
                most = min(self.thinking + self.tranche, max(self.held, reasoning))
                self._think(reasoning, max(reasoning, most))
        except BudgetExceeded as refusal:
            self.refusal = refusal
            return False
        return True

    def cover_work(self, work: Work) -> bool:
        """True when Work that cannot be bounded beforehand (engine seconds) is held; grows a little ahead of it."""
        short = work.engine_seconds - self._work.engine_seconds
        if short <= 0 or self._hold is None:
            return True
        ask = short + max(0.02, work.engine_seconds * 0.1)
        try:
            self._hold.grow(Spend(), Work(engine_seconds=ask))
        except BudgetExceeded as refusal:
            self.refusal = refusal
            return False
        self._work = replace(self._work, engine_seconds=self._work.engine_seconds + ask)
        return True

    def cover_tools(self, calls: int) -> bool:
        """True when that many tool calls are held."""
        try:
            if self._hold is not None:
                self._hold.grow(Spend(tool_calls=calls))
        except BudgetExceeded as refusal:
            self.refusal = refusal
            return False
        return True

    def settle(self, spend: Spend, work: Work, *, estimated: bool = False) -> None:
        """Books what was spent and frees the rest. A second call does nothing. The ledger's promise is in `ticket`."""
        hold, self._hold = self._hold, None
        if hold is not None:
            self.entry, self.ticket = hold.book(spend, work, estimated=estimated, labels=self.labels)

    def release(self) -> None:
        """Gives everything back: nothing was computed."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()

    async def done(self) -> None:
        """Returns when the ledger has committed the entry."""
        if self.ticket is not None:
            await self.ticket.done()

    def receipt(self, asked: int | None, produced: int) -> Receipt:
        """Says that the budget cut this generation short, and which resource did."""
        refusal = self.refusal
        why = f"the budget's {refusal.resource} ran out" if refusal else "the budget ran out"
        detail: dict[str, Any] = {}
        if refusal is not None:
            detail = {"resource": refusal.resource, "limit": refusal.limit, "account": refusal.account}
        return Receipt(DEGRADED, True, f"{why}: the answer was cut short", asked, produced, detail=detail)

    # -- details -----------------------------------------------------------------------------------------------

    def _begin(self, output: int, keep: int) -> None:
        ask, work = self.spend(output), self.bound(output)
        self._hold = self.account.hold(ask, work, keep=keep, labels=self.labels)
        self._usd, self._work = ask.usd, work

    def _grow(self, least: int, most: int) -> None:
        def attempt(total: int) -> None:
            if self._hold is None:
                raise ThriftyError("this generation was settled before: open a new one")
            usd, work = self.spend(total).usd, self.bound(total)
            ask = Spend(output=total - self.held, usd=max(0, usd - self._usd))
            self._hold.grow(ask, _beyond(work, self._work))
            self._usd = max(self._usd, usd)
            self._work = replace(_most(work, self._work), engine_seconds=self._work.engine_seconds)

        self.held = _largest(least, most, attempt)

    def _think(self, least: int, most: int) -> None:
        def attempt(total: int) -> None:
            if self._hold is not None:
                self._hold.grow(Spend(reasoning=total - self.thinking))

        self.thinking = _largest(least, most, attempt)


def _largest(least: int, most: int, attempt: Callable[[int], None]) -> int:
    """The first of most, then ever smaller steps towards `least`, for which `attempt` does not raise."""
    amount = most
    while True:
        try:
            attempt(amount)
        except BudgetExceeded:
            if amount <= least:
                raise
            amount = least + (amount - least) // 2
        else:
            return amount


def _beyond(work: Work, before: Work) -> Work:
    return Work(
        max(0, work.prefill - before.prefill),
        max(0, work.kv_reads - before.kv_reads),
        max(0, work.target_passes - before.target_passes),
        max(0, work.draft_passes - before.draft_passes),
    )


def _most(a: Work, b: Work) -> Work:
    return Work(
        max(a.prefill, b.prefill),
        max(a.kv_reads, b.kv_reads),
        max(a.target_passes, b.target_passes),
        max(a.draft_passes, b.draft_passes),
    )
