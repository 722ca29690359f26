"""Answers read from a trace that is still running: forks of it close their thinking at growing depths and go on alone.

Invariants: the trace itself is never changed by being read, and is paid for once; every branch is closed when the
reader is; a fork reads what the trace has written as cached input, as the contract bills it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thrifty.budget import Account
from thrifty.call import Answer, Branch, advance
from thrifty.engines.settling import TRANCHE
from thrifty.methods.search._branches import to_the_end, without_shared
from thrifty.methods.search._samples import seed_of


@dataclass(frozen=True, slots=True)
class Cell:
    """One prediction: of trace `trace`, cut at `depth` of H (H: not cut)."""

    trace: int
    depth: int
    answer: Answer


class RunningTrace:
    """One branch that thinks, and its forks. `closing` is forced to end a fork's thinking; a fork draws at most
    `tokens` tokens after that."""

    def __init__(self, row: Branch, account: Account, closing: str, tokens: int, seed: int) -> None:
        self.row, self.account = row, account
        self._closing, self._tokens, self._seed = closing, tokens, seed
        self._rows: list[Branch] = [row]

    @property
    def thought(self) -> int:
        """Tokens of thinking so far."""
        return self.row.spend.reasoning

    @property
    def thinks(self) -> bool:
        """Whether it is inside its thinking."""
        return self.row.finish is None and bool(getattr(getattr(self.row, "shape", None), "inside", False))

    async def to(self, thought: float) -> bool:
        """Goes on to so many tokens of thinking; False when thinking ended before (or never began)."""

        def there(rows: Sequence[Branch]) -> bool:
            return self.thought >= thought or (self.thought > 0 and not self.thinks)

        if not there(self._rows):
            await advance([self.row], there)
        return self.thinks

    def affords(self, n: int) -> bool:
        """Whether the account holds n forks now, each with some output, and as much for the trace itself."""
        left, spent = self.account.remaining(), self.row.spend
        size = n * (spent.input + spent.output)
        out = (n + 1) * TRANCHE
        needs = {"calls": n, "input": size, "output": out, "tokens": size + out}
        return all(left[r] >= need for r, need in needs.items() if r in left)

    async def read(self, n: int, first: int) -> list[Answer]:
        """n answers from here, numbered from `first`. Raises BudgetExceeded."""
        twins = self._fork(n, first)
        for twin in twins:
            await twin.append(self._closing)
        await advance([twin for twin in twins if twin.finish is None], self._tokens)
        return [self._own(await twin.finish_up()) for twin in twins]

    async def end(self, n: int, first: int) -> list[Answer]:
        """The trace's own answer, and n - 1 others from the end of its thinking. Raises BudgetExceeded."""
        await self.to(float("inf"))
        rows = [self.row, *(self._fork(n - 1, first) if self.row.finish is None else [])]
        await to_the_end(rows)
        answers = [await row.finish_up() for row in rows]
        return [answers[0], *map(self._own, answers[1:])]

    async def stop(self) -> Answer:
        """Ends the trace where it is: what it wrote, for its receipts."""
        return await self.row.finish_up()

    def close(self) -> None:
        """Closes whatever is open. Idempotent."""
        for row in self._rows:
            row.close()

    def _fork(self, n: int, first: int) -> list[Branch]:
        for i in range(n):
            self._rows.append(self.row.fork(seed_of(self._seed, first + i)))
        return self._rows[len(self._rows) - n :] if n else []

    def _own(self, answer: Answer) -> Answer:
        """A fork's answer, without what it has from the trace; one that was cut at `tokens` has no end of its own."""
        finish = "length" if answer.finish == "cancelled" else answer.finish
        return replace(without_shared(answer, self.row.call), finish=finish)
