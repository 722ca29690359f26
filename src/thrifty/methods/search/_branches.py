"""Samples that share one prefill: forks of one opened branch, made before it steps and stepped together.

Invariants: a fork is made from a branch that has drawn nothing, so samples share their prompt and nothing
else; `Tree` leaves no branch open once it is closed; every branch that it made is billed, as the contract has
it: the prompt in full for the one that was opened, as input and cached alike for each fork, also for one that
was kept ready and never drew."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, advance
from thrifty.engines.settling import TRANCHE
from thrifty.errors import BudgetExceeded
from thrifty.method import Next
from thrifty.methods.search._samples import how_many_fit, room_for, sample_call, seed_of

_TO_THE_END = 2**40
"""Steps that no generation takes."""


def can_branch(call: Call, next: Next) -> bool:
    """Whether what is below can be opened: the engine has branches, and no method on the way needs whole
    answers or may choose another engine."""
    engine = call.engines.get("answer")
    if engine is None or "branch" not in engine.capabilities:
        return False
    below: Any = next
    while (method := getattr(below, "method", None)) is not None:  # a plan's layers tell their method
        if method.kind in ("whole", "search") or "route" in method.parts:
            return False
        below = below.below
    return True


def add_forks(rows: list[Branch], call: Call, first: int, n: int, seed: int) -> None:
    """Appends n forks of `rows[0]` to `rows`, with the seeds of the samples from `first` on (a fork without a
    seed would repeat its parent's draws). Fewer when the budget refuses one; raises BudgetExceeded then where
    the plan says refuse."""
    for i in range(first, first + n):
        try:
            rows.append(rows[0].fork(seed_of(seed, i)))
        except BudgetExceeded:
            if call.on_exceed == "refuse":
                raise
            break


async def to_the_end(rows: Sequence[Branch]) -> None:
    """Steps branches together until all have ended."""
    await advance([row for row in rows if row.finish is None], _TO_THE_END)


def short_of(account: Account, tokens: int) -> bool:
    """Whether the account has fewer output tokens left than that."""
    left = account.remaining()
    return any(left[r] < tokens for r in ("output", "tokens") if r in left)


def without_shared(answer: Answer, opened: Call) -> Answer:
    """A fork's answer without the receipts of the call that was opened for all: they are told once."""
    return replace(answer, receipts=answer.receipts[len(opened.receipts) :])


class Tree:
    """Draws samples of one call in waves. One more branch than a wave needs is kept, not stepped: the `spare`,
    which is the first sample of the next wave and is forked for the others of it. All are on one account.

    The spare goes when what it holds is needed, or is not made where the budget has no room for it; the next
    wave then opens anew."""

    def __init__(self, call: Call, next: Next, temperature: float) -> None:
        self.call, self.next, self.temperature = call, next, temperature
        self.account = call.account.child("branches")
        self.unused = 0
        """branches that were billed and drew nothing"""
        self._spare: Branch | None = None
        self._way: Call | None = None
        """the call that the last opened branch came down as"""
        self._told = False
        seed = call.sampling.seed
        self._seed = random.getrandbits(31) if seed is None else seed

    def rows(self, most: int, left: int) -> int:
        """How many of at most `most` samples to draw now as branches, of `left` in all. 0: the budget is so
        tight that each should have a part of its own, so make calls; or one call is all there is to do."""
        if self._spare is not None:
            return most if self.call.on_exceed == "refuse" else 1 + room_for(self.call, most - 1, TRANCHE)
        n = how_many_fit(self.call, most)
        useful = min(n + 1, left)
        return n if useful > 1 and room_for(self.call, useful, TRANCHE) >= max(2, n) else 0

    async def wave(self, first: int, n: int, more: bool) -> list[Answer]:
        """The answers of n samples, numbered from `first`; fewer when the budget refuses one, never none.
        `more`: another wave may come. Raises BudgetExceeded when it refuses the first, or where the plan says
        refuse."""
        if self._spare is None:
            opened = await self.next.open(sample_call(self.call, first, self.account, self.temperature))
            self._way, self._told = opened.call, False
        else:
            opened, self._spare = self._spare, None
        rows = [opened]
        try:
            add_forks(rows, self.call, first + 1, n - 1, self._seed)
            if more and len(rows) == n:
                self._keep_spare(opened, first + n, len(rows))
            await self._run(rows)
            return [self._once(await row.finish_up()) for row in rows]
        finally:
            for row in rows:
                row.close()

    async def done(self) -> None:
        """Closes the spare, if one is left, and waits for its entry."""
        spare = self._spare
        if spare is not None:
            self._forget()
            await spare.finish_up()

    def close(self) -> None:
        """The same without waiting. Idempotent."""
        if self._spare is not None:
            self._forget()
        self.account.close()

    def _keep_spare(self, opened: Branch, sample: int, rows: int) -> None:
        """Forks the spare, where the budget holds it and would hold a further sample for each row: the prompt
        of a spare is not got back when its room is needed."""
        left = self.account.remaining()
        prompt = opened.spend.input
        needs = {"output": TRANCHE * (rows + 1), "tokens": (prompt + TRANCHE) * (rows + 1)}
        if all(left[r] >= need for r, need in needs.items() if r in left):
            with suppress(BudgetExceeded):  # then the next wave opens anew, or hears the same
                self._spare = opened.fork(seed_of(self._seed, sample))

    def _forget(self) -> None:
        if self._spare is not None:
            self.unused += 1
            self._spare.close()
            self._spare = None

    async def _run(self, rows: Sequence[Branch]) -> None:
        """To the end; while a budget limits the rows, only as far as they cannot starve beside the spare."""
        while self._spare is not None and self.account.remaining():
            alive = [row for row in rows if row.finish is None]
            if not alive:
                return
            if short_of(self.account, TRANCHE * len(alive)):
                self._forget()
            else:
                await advance(alive, TRANCHE)
        await to_the_end(rows)

    def _once(self, answer: Answer) -> Answer:
        if self._told and self._way is not None:
            return without_shared(answer, self._way)
        self._told = True
        return answer
