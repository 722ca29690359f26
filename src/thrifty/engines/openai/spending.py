"""What a remote call may spend: the hold before it, and the max_tokens that the hold covers.

The input is counted before it is sent, so a hold covers the count plus max_tokens, one call, and their price. Under
a limit, max_tokens is always sent and never above what the hold covers; where no limit binds, none is sent unless the
call asks for it, and `default_max_tokens` is what the ledger would settle if the process died.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from thrifty.budget import Account, Hold
from thrifty.call import Call, Receipt
from thrifty.engines.settling import Prices
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.ledger.entry import Labels
from thrifty.spend import Spend, Work

Price = Callable[[Spend], Spend]
"""The same Spend with its `usd`."""

_SHRINKS = frozenset({"output", "tokens", "usd", "reasoning"})
"""Limits that a smaller max_tokens can respect."""


@dataclass(frozen=True, slots=True)
class Held:
    """A hold, the max_tokens it covers (None: not sent), and the receipt of what the budget changed."""

    hold: Hold
    max_tokens: int | None
    receipt: Receipt | None
    lowered: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request needs: its input, what it forces into the output, how much it wants to generate."""

    input: Spend
    """calls, input, visual and tool_calls; no output"""
    wanted: int | None
    default: int
    keep: int = 0
    forced: int = 0
    """tokens of the input that count as output"""

    def spend(self, output: int, price: Price) -> Spend:
        """What is held for `output` generated tokens. Priced as the server bills it: forced tokens are its input."""
        return forced(price(replace(self.input, output=output)), self.forced)


async def take(call: Call, ask: Ask, labels: Labels, price: Price) -> Held:
    """Holds what a request needs on the call's account.

    With on_exceed="degrade" (or where the call asks for no max_tokens) the output is lowered to what is left, at least
    1 token; else raises BudgetExceeded. Raises it too for an input that does not fit, or no call left.
    """
    account = call.account
    left = account.remaining()
    if left.get("engine_seconds", 1) <= 0:
        raise BudgetExceeded(account.path, "engine_seconds", 0, 0, 0, 1)
    yielding = call.on_exceed == "degrade" or ask.wanted is None
    work = Work(prefill=ask.input.input) if "prefill" in left else Work()
    target = ask.default if ask.wanted is None else ask.wanted
    for _ in range(100):
        left = account.remaining()
        room, which = _room(left, ask, price, target)
        output = max(1, min(target, room)) if yielding and room is not None else target
        spend = ask.spend(output, price)
        if "reasoning" in left:
            spend = replace(spend, reasoning=output)
        if ask.input.tool_calls and "tool_calls" not in left:
            spend = replace(spend, tool_calls=0)
        try:
            hold = await _durably(account, spend, work, ask.keep, labels)
        except BudgetExceeded as refused:
            # others took what was left between the look and the hold: look again
            if yielding and output > 1 and refused.resource in _SHRINKS:
                continue
            raise
        sent = ask.wanted if room is None else output
        lowered = output < target
        receipt = None
        if lowered:
            asked = "no max_tokens was asked" if ask.wanted is None else f"max_tokens {ask.wanted} was asked"
            receipt = Receipt(
                "budget",
                True,
                f"{asked}, {output} sent: that is what {which} of account {account.path!r} leaves",
                before=target,
                after=output,
            )
        return Held(hold, sent, receipt, lowered)
    raise BudgetExceeded(account.path, "tokens", 0, 0, 0, target)


def seconds_left(account: Account) -> float | None:
    """Seconds until the first deadline of this account or of one above it; None without one."""
    left: float | None = None
    now = time.monotonic()
    level: Account | None = account
    while level is not None:
        if level.budget.deadline is not None:
            here = level.budget.deadline - (now - level._opened)
            left = here if left is None else min(left, here)
        level = level.parent
    return left


def check_prices(account: Account, prices: Prices | None, model: str) -> None:
    """Raises InvalidInput where usd is limited and nothing says what a token costs: the limit would never bind."""
    if prices is None and "usd" in account.remaining():
        raise InvalidInput(
            f"account {account.path!r} limits usd, and engine {model!r} has no prices: give it a price table "
            "(--prices FILE)"
        )


def forced(spend: Spend, tokens: int) -> Spend:
    """`tokens` of the input counted as output: they were forced into the answer."""
    moved = min(tokens, spend.input)
    rest = spend.input - moved
    return replace(
        spend,
        input=rest,
        cached=min(spend.cached, rest),
        visual=min(spend.visual, rest),
        output=spend.output + moved,
    )


def _room(left: dict[str, float], ask: Ask, price: Price, target: int) -> tuple[int | None, str]:
    """The largest output that every limit allows (may be negative), and the limit that says so; None: no limit."""
    rooms: dict[str, int] = {}
    if "output" in left:
        rooms["output"] = int(left["output"]) - ask.keep - ask.forced
    if "tokens" in left:
        rooms["tokens"] = int(left["tokens"]) - ask.input.input - ask.keep
    if "reasoning" in left:
        rooms["reasoning"] = int(left["reasoning"])
    if "usd" in left:
        rooms["usd"] = _affordable(int(left["usd"]), ask, price, target)
    if not rooms:
        return None, ""
    which = min(rooms, key=lambda name: rooms[name])
    return rooms[which], which


def _affordable(usd: int, ask: Ask, price: Price, target: int) -> int:
    """The largest output up to `target` whose price fits, by bisection: prices may have steps."""
    low, high = 0, target
    while low < high:
        middle = (low + high + 1) // 2
        if ask.spend(middle, price).usd <= usd:
            low = middle
        else:
            high = middle - 1
    return low


async def _durably(account: Account, spend: Spend, work: Work, keep: int, labels: Labels) -> Hold:
    """A hold that is in the ledger before this returns. The wait for the disk is in a thread; a task cancelled
    meanwhile leaves no hold behind."""
    if account.ledger is None:
        return account.hold(spend, work, keep=keep, labels=labels)
    lock = threading.Lock()
    kept: list[Hold] = []
    gone = False

    def hold() -> Hold | None:
        taken = account.hold(spend, work, keep=keep, labels=labels, durable=True)
        with lock:
            if not gone:
                kept.append(taken)
                return taken
        taken.release()
        return None

    try:
        taken = await asyncio.to_thread(hold)
    except asyncio.CancelledError:
        with lock:
            gone = True
        for late in kept:
            late.release()
        raise
    if taken is None:
        raise asyncio.CancelledError
    return taken
