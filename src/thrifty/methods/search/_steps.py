"""Partial solutions that grow step by step: paused branches where what is below can be opened, else calls that continue
a prefix.

A step ends with the delimiter, at a number of tokens, or with the solution. Invariants: growing a Partial consumes it
(its first child is the same generation, gone further); everything stands on one account below the call's; a branch that
is dropped is closed at once, and billed; while a budget limits the search, it stops growing before the last `keep`
output tokens, which are for the one solution that is then finished alone.

A continuing call is told to stop at the delimiter, and engines do not say whether a model stopped there or for good:
such a solution counts as ended when its continuation is empty. Where the caller has stop strings of its own, steps of
calls end at the number of tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Receipt, advance
from thrifty.engines.settling import TRANCHE
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Next
from thrifty.methods.search._branches import can_branch, short_of, to_the_end, without_shared
from thrifty.methods.search._samples import COMPLETE, conclude, room_for, sample_call, seed_of, side_by_side
from thrifty.thinking import CLOSING, OPENING, left_open, split


@dataclass(eq=False, slots=True)
class Partial:
    """The beginning of a solution."""

    text: str = ""
    """all output so far, thinking with its tags included"""
    depth: int = 0
    """steps"""
    finish: str | None = None
    """why it ended; None while it can grow"""
    logprobs: list[float] = field(default_factory=list)
    """of all its tokens"""
    written: int = 0
    """output tokens on its path"""
    branch: Branch | None = None
    answer: Answer | None = None

    @property
    def complete(self) -> bool:
        """Whether the model itself ended it."""
        return self.finish in COMPLETE


@dataclass(frozen=True, slots=True)
class Pace:
    """Where a step ends, and what is left for the end."""

    delimiter: str
    tokens: int
    """of one step, at most"""
    keep: int
    """output tokens that the search leaves for the solution it ends with"""
    temperature: float


class Steps(Protocol):
    """Grows partial solutions of one call."""

    account: Account
    tight: bool
    """the budget held no more: finish one solution now"""

    async def root(self) -> Partial:
        """The empty beginning. Raises BudgetExceeded when the budget does not even hold that."""

    async def grow(self, wanted: Sequence[tuple[Partial, int]]) -> list[list[Partial]]:
        """For each beginning and number: that many children, one step further, with equal texts once; at least one.
        Fewer when the budget holds fewer. Raises BudgetExceeded where the plan says refuse."""

    def drop(self, partial: Partial) -> None:
        """Gives a beginning up."""

    async def end(self, partial: Partial) -> None:
        """Writes one beginning to its end, in one go."""

    async def conclude(self, partial: Partial, own: Receipt, others: Sequence[Account] = ()) -> Answer:
        """The solution as the search's Answer, with the Spend of all that was tried."""

    def close(self) -> None:
        """Ends what is still open. Idempotent."""


def check_delimiter(method: str, delimiter: str) -> None:
    """Raises InvalidInput for a delimiter at which every token would end a step."""
    if not delimiter:
        raise InvalidInput(f"{method}: knob delimiter is empty: text that ends a step is needed, such as a blank line")


def steps_for(call: Call, next: Next, pace: Pace, logprobs: bool) -> Steps | None:
    """The way to grow a call's solutions; None: its engine neither branches nor continues answers, or the call drafts
    first where only calls could be made."""
    if can_branch(call, next):
        return BranchSteps(call, next, pace)
    engine = call.engines.get("answer")
    if engine is None or "continue" not in engine.capabilities or call.draft is not None:
        return None
    return CallSteps(call, next, pace, logprobs)


NO_STEPS = "the engine neither branches nor continues an answer that was begun: one plain answer"
"""For the receipt, where `steps_for` gives None."""


class _Base:
    def __init__(self, call: Call, next: Next, pace: Pace) -> None:
        self.call, self.next, self.pace = call, next, pace
        self.account = call.account.child("steps")
        self.tight = False
        self._seeds = 0

    def _seed(self) -> int:
        """A new number for each sample that is drawn."""
        self._seeds += 1
        return self._seeds

    def _short(self) -> bool:
        return self.call.on_exceed != "refuse" and short_of(self.account, max(1, self.pace.keep))


class BranchSteps(_Base):
    """Beginnings are branches, which share their past and advance together."""

    def __init__(self, call: Call, next: Next, pace: Pace) -> None:
        super().__init__(call, next, pace)
        self._all: list[Branch] = []

    async def root(self) -> Partial:
        branch = await self.next.open(sample_call(self.call, 0, self.account, self.pace.temperature))
        self._all.append(branch)
        return Partial(branch=branch, finish=branch.finish)

    async def grow(self, wanted: Sequence[tuple[Partial, int]]) -> list[list[Partial]]:
        rows: list[list[Branch]] = []
        for partial, n in wanted:
            branch = _open(partial)
            rows.append([branch])
            if partial.finish is None:
                for _ in range(self._room(branch, n - 1)):
                    try:
                        fork = branch.fork(seed_of(self.call.sampling.seed or 0, self._seed()))
                    except BudgetExceeded:
                        if self.call.on_exceed == "refuse":
                            raise
                        break
                    rows[-1].append(fork)
                    self._all.append(fork)
        await self._advance([row for group in rows for row in group])
        grown = []
        for (partial, _), group in zip(wanted, rows, strict=True):
            children = _distinct([_of(row, partial.depth + 1) for row in group])
            for row in group:
                if all(child.branch is not row for child in children):
                    row.close()
            grown.append(children)
        return grown

    def drop(self, partial: Partial) -> None:
        _open(partial).close()

    async def end(self, partial: Partial) -> None:
        branch = _open(partial)
        await to_the_end([branch])
        ended = _of(branch, partial.depth)
        partial.text, partial.finish = ended.text, ended.finish
        partial.logprobs, partial.written = ended.logprobs, ended.written

    async def conclude(self, partial: Partial, own: Receipt, others: Sequence[Account] = ()) -> Answer:
        answers = [await branch.finish_up() for branch in self._all]
        first = self._all[0].call
        told = [answers[0], *(without_shared(a, first) for a in answers[1:])]
        winner = told[self._all.index(_open(partial))]
        return conclude(self.call, winner, told, [self.account, *others], own)

    def close(self) -> None:
        for branch in self._all:
            branch.close()
        self.account.close()

    def _room(self, branch: Branch, n: int) -> int:
        """How many forks of a branch, n at most, the account holds beside what is kept for the end."""
        left = self.account.remaining()
        if not left or self.call.on_exceed == "refuse":
            return n
        shared, keep = branch.spend.tokens, self.pace.keep
        needs = {"calls": 1, "input": shared, "output": TRANCHE, "tokens": shared + TRANCHE}
        free = {r: left[r] - (keep if r in ("output", "tokens") else 0) for r in needs if r in left}
        return max(0, min([n, *(int(amount // needs[r]) for r, amount in free.items() if needs[r])]))

    async def _advance(self, rows: Sequence[Branch]) -> None:
        starts = {id(row): (len(row.text), len(row.tokens)) for row in rows}

        def over(row: Branch) -> bool:
            text, tokens = starts[id(row)]
            return (
                row.finish is not None
                or len(row.tokens) - tokens >= self.pace.tokens
                or self.pace.delimiter in row.text[text:].lstrip()
            )

        running = [row for row in rows if not over(row)]
        while running:
            if len(rows) > 1 and self._short():
                self.tight = True
                return
            await advance(running, lambda now: any(map(over, now)) or (len(rows) > 1 and self._short()))
            running = [row for row in running if not over(row)]


class CallSteps(_Base):
    """Beginnings are texts, and each step of each is a call that continues one."""

    def __init__(self, call: Call, next: Next, pace: Pace, logprobs: bool) -> None:
        super().__init__(call, next, pace)
        self._logprobs = logprobs or call.sampling.logprobs
        self._came: list[Answer] = []

    async def root(self) -> Partial:
        return Partial(finish="length" if self.call.sampling.max_tokens == 0 else None)

    async def grow(self, wanted: Sequence[tuple[Partial, int]]) -> list[list[Partial]]:
        most = max((n for _, n in wanted), default=0)
        asked = [i for k in range(most) for i, (p, n) in enumerate(wanted) if k < n and p.finish is None]
        fits = self._room(wanted, asked)
        if fits < len(asked):
            self.tight = True
        asked = asked[:fits]
        calls = [self._step(wanted[i][0], self._seed() - 1) for i in asked]
        grown: list[list[Partial]] = [[] for _ in wanted]
        if calls:
            try:
                answers = await side_by_side(self.next, calls, lambda came: False)
            except BudgetExceeded:
                if self.call.on_exceed == "refuse":
                    raise
                answers = []
            for i, answer in zip(asked, answers, strict=False):
                if answer is None:
                    self.tight = True
                    continue
                self._came.append(answer)
                grown[i].append(self._child(wanted[i][0], answer))
            self.tight = self.tight or not answers
        return [_distinct(g) or [p] for g, (p, _) in zip(grown, wanted, strict=True)]

    def drop(self, partial: Partial) -> None:
        return None

    async def end(self, partial: Partial) -> None:
        if partial.finish is not None:
            return
        try:
            answer = await self.next(self._continuing(partial, 0 if not partial.depth else self._seed(), end=True))
        except BudgetExceeded:
            if self.call.on_exceed == "refuse" or partial.answer is None:
                raise
            partial.finish = "budget"
            return
        self._came.append(answer)
        self._add(partial, answer)
        partial.finish = answer.finish

    async def conclude(self, partial: Partial, own: Receipt, others: Sequence[Account] = ()) -> Answer:
        text, thinking = partial.text, ""
        if any(a.thinking for a in self._came):
            thinking, text = split(partial.text, inside=left_open(self.call.prefix))
        logprobs = tuple(partial.logprobs) if self.call.sampling.logprobs else None
        winner = replace(
            partial.answer or Answer(""),
            text=text,
            thinking=thinking,
            finish=partial.finish or "stop",
            parsed=None,
            tokens=None,
            logprobs=logprobs,
        )
        return conclude(self.call, winner, self._came, [self.account, *others], own)

    def close(self) -> None:
        self.account.close()

    def _room(self, wanted: Sequence[tuple[Partial, int]], asked: Sequence[int]) -> int:
        """How many of the asked calls the account holds beside the one that ends a solution."""
        if not asked or self.call.on_exceed == "refuse":
            return len(asked)
        longest = max((wanted[i][0] for i in asked), key=lambda p: p.written)
        one = self._step(longest, 0)
        return max(0, room_for(one, len(asked) + 1, max(self.pace.tokens, self.pace.keep)) - 1)

    def _continuing(self, partial: Partial, sample: int, end: bool = False) -> Call:
        call = sample_call(self.call, sample, self.account, self.pace.temperature)
        limit = self.call.sampling.max_tokens
        rest = None if limit is None else max(1, limit - partial.written)
        prefix = (call.prefix or "") + partial.text or None
        sampling = replace(call.sampling, max_tokens=rest, logprobs=self._logprobs)
        if not end:
            most = self.pace.tokens if rest is None else min(rest, self.pace.tokens)
            sampling = replace(sampling, max_tokens=most, stop=sampling.stop or (self.pace.delimiter,))
        return replace(call, prefix=prefix, sampling=sampling)

    def _step(self, partial: Partial, sample: int) -> Call:
        return self._continuing(partial, sample)

    def _child(self, parent: Partial, answer: Answer) -> Partial:
        child = Partial(parent.text, parent.depth + 1, None, list(parent.logprobs), parent.written)
        said = bool(answer.text.strip() or answer.thinking.strip())
        self._add(child, answer)
        limit = self.call.sampling.max_tokens
        if limit is not None and child.written >= limit and answer.finish != "stop":
            child.finish = "length"
        elif answer.finish == "stop" and (self.call.sampling.stop or not said):
            child.finish = "stop"
            child.text = child.text if said else parent.text.removesuffix(self.pace.delimiter)
        elif answer.finish == "stop":
            child.text += self.pace.delimiter
        elif answer.finish != "length":
            child.finish = answer.finish
        return child

    def _add(self, partial: Partial, answer: Answer) -> None:
        piece = answer.text
        if answer.thinking:
            inside = left_open((self.call.prefix or "") + partial.text)
            piece = ("" if inside else OPENING) + answer.thinking + (CLOSING + answer.text if answer.text else "")
        partial.text += piece
        partial.logprobs += answer.logprobs or ()
        partial.written += answer.spend.output if answer.tokens is None else len(answer.tokens)
        partial.answer = answer


def _open(partial: Partial) -> Branch:
    if partial.branch is None:
        raise TypeError("a beginning of calls was given to a search over branches")
    return partial.branch


def _of(branch: Branch, depth: int) -> Partial:
    return Partial(branch.text, depth, branch.finish, list(branch.logprobs), len(branch.tokens), branch)


def _distinct(children: Sequence[Partial]) -> list[Partial]:
    """The first of those with equal texts."""
    seen: dict[str, Partial] = {}
    for child in children:
        seen.setdefault(child.text, child)
    return list(seen.values())
