"""Fractured Sampling: traces cut at several depths, several solutions from each cut, one answer of all."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from thrifty.budget import Account
from thrifty.call import Answer, Call, Receipt
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Next, Search, knob
from thrifty.methods.search._branches import can_branch
from thrifty.methods.search._draw import draw_samples
from thrifty.methods.search._running import Cell, RunningTrace
from thrifty.methods.search._samples import conclude, counts, sample_call, tell, vote_of, votes_of, winner_of
from thrifty.methods.search._scoring import ROLES
from thrifty.methods.search._verifier import Verifier
from thrifty.methods.search.best_of_n import choose
from thrifty.spend import Spend, Work
from thrifty.thinking import CLOSING, OPENING, check_tags, left_open


@dataclass(frozen=True, kw_only=True)
class FracturedSampling(Search):
    """Draws `traces` whole answers; cuts the thinking of each at `depths` depths i/H (the last is the whole of it),
    closes it there, and draws `solutions` solutions from each cut (at the full depth, the trace's own is the first).
    The answer is the majority of all cells, or, with `select = "verifier"`, the cell that the engine in the role
    `scorer` rates highest. `agree` > 0 stops drawing cells once an answer has that many votes.

    Thinking is drawn once and is output once; a cut is sent back as the beginning of the answer, so it is input again
    for each depth (the solutions of one depth share it where the engine has branches). Depths are measured in words,
    because few engines show the tokens of their thinking. A trace without a thinking block, an engine that cannot
    continue an answer, or a call that drafts first leaves the axis of traces alone, and the receipt says so.

    `every` > 0 reads traces while they run, one after another, on an engine with branches: at each `every` tokens of
    thinking, `depths` - 1 times at most, forks of the trace close it there and answer, and the trace goes on untouched.
    With `agree` that is the paper's early stop: once an answer has that many votes the trace is stopped and paid as far
    as it went, and no further one begins. How far apart the depths of a trace of unknown length are, and that traces
    vote together, is ours. `depths = solutions = 1` is plain sampling with a vote."""

    name = "fractured-sampling"
    paper = "Fractured Chain-of-Thought Reasoning (Liao et al. 2025, arXiv:2505.12992)"
    needs = frozenset({"text", "sampling"})
    identity = {"traces": 1, "depths": 1, "solutions": 1}

    traces: int = knob(2, "n: whole answers", low=1, high=256, log=True)
    depths: int = knob(4, "H: depths at which each trace is cut", low=1, high=256, log=True)
    solutions: int = knob(1, "m: solutions from each cut", low=1, high=256, log=True)
    solution_tokens: int = knob(2048, "tokens of a solution at most", low=1, high=1_000_000, log=True)
    temperature: float = knob(0.6, "of all samples", low=0.01, high=10.0)
    top_p: float = knob(0.95, "of all samples", low=0.01, high=1.0)
    select: str = knob("majority", "who chooses among the cells", choices=("majority", "verifier"))
    agree: int = knob(0, "votes for one answer after which no more is drawn; 0: draw all", low=0, high=100_000)
    every: int = knob(0, "tokens between the depths of a running trace; 0: whole ones are cut", low=0, high=1_000_000)
    check_tokens: int = knob(1024, "tokens of one check by the verifier", low=1, high=100_000, log=True)
    opening: str = knob(OPENING, "what opens a thinking block")
    closing: str = knob(CLOSING, "what closes it")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tags(self.name, self.opening, self.closing)
        object.__setattr__(self, "roles", ROLES["verifier" if self.select == "verifier" else "confidence"])

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.traces == self.depths == self.solutions == 1:
            return await next(call.with_receipt(Receipt(self.name, False, "one cell: plain sampling", 1, 1, "samples")))
        asked = call.with_sampling(top_p=self.top_p)
        run = await (self._follow if self._follows(call, next) else self._draw)(asked, next)
        answers = [cell.answer for cell in run.cells]
        chosen = winner_of(votes_of(answers))
        spend, work = Spend(), Work()
        detail: dict[str, object] = {}
        if self.select == "verifier" and len(answers) > 1:
            verifier = Verifier(self.name, call, tokens=self.check_tokens, soft=True)
            run.accounts.append(verifier.account)
            scores = [(await verifier.verdict(a)).score for a in answers]
            chosen = choose(answers, scores, "best")
            run.notes += [note] if (note := verifier.note()) else []
            detail |= verifier.detail()
            spend, work = verifier.account.settled, verifier.account.work
        planned = self.traces * self.depths * self.solutions
        cell = run.cells[chosen]
        said = f"{len(answers)} of {planned} cells, from trace {cell.trace} at depth {cell.depth} of {self.depths}"
        detail |= {
            "traces": run.begun,
            "cut": len(answers) - run.whole,
            "votes": sorted(counts(votes_of(answers)).values(), reverse=True),
        }
        own = Receipt(
            self.name,
            len(answers) > 1,
            "; ".join([said, *run.notes]),
            planned,
            len(answers),
            "samples",
            spend=spend,
            work=work,
            detail=detail,
        )
        return await tell(call, conclude(call, cell.answer, [*answers, *run.stopped], run.accounts, own))

    # -- traces that run ---------------------------------------------------------------------------------------

    def _follows(self, call: Call, next: Next) -> bool:
        return self.every > 0 and self.depths > 1 and call.draft is None and can_branch(call, next)

    async def _follow(self, call: Call, next: Next) -> _Run:
        """Reads each trace while it runs, until answers agree."""
        account = call.account.child("running")
        run = _Run([], [account])
        seed = random.getrandbits(31) if call.sampling.seed is None else call.sampling.seed
        for _ in range(self.traces):
            if self._agreed(run):
                break
            try:
                row = await next.open(sample_call(call, run.begun, account, self.temperature))
            except BudgetExceeded as error:
                if call.on_exceed == "refuse" or not run.begun:
                    raise
                run.notes.append(f"the budget ({error.resource}) held no more")
                break
            trace = RunningTrace(row, account, f"{self.closing}\n\n", self.solution_tokens, seed)
            try:
                await self._read(call, trace, run)
            finally:
                trace.close()
        if self._agreed(run):
            run.notes.append(f"{self.agree} cells agree")
        return run

    async def _read(self, call: Call, trace: RunningTrace, run: _Run) -> None:
        """The cells of one trace, to its end or until answers agree."""
        index, run.begun = run.begun, run.begun + 1
        for depth in range(1, self.depths):
            if not await trace.to(depth * self.every):
                break
            found = await self._cells(call, trace, run, self.solutions)
            if found is None:
                break
            run.cells += [Cell(index, depth, a) for a in found]
            if self._agreed(run):
                run.notes.append(f"trace {index} was stopped at depth {depth}, after {trace.thought} thinking tokens")
                run.stopped.append(await trace.stop())
                return
        more = self.solutions - 1
        more = more if trace.affords(more) or call.on_exceed == "refuse" else 0
        try:
            found = await trace.end(1 + more, self.traces + len(run.cells))
        except BudgetExceeded:
            if call.on_exceed == "refuse":
                raise
            found = await trace.end(1, 0)
        run.cells += [Cell(index, self.depths, a) for a in found]
        run.whole += 1

    async def _cells(self, call: Call, trace: RunningTrace, run: _Run, n: int) -> list[Answer] | None:
        """n answers from where a trace is; None, with a note, where the budget has no more room for them."""
        if call.on_exceed == "degrade" and not trace.affords(n):
            run.notes.append("what was left of the budget is the trace's own")
            return None
        try:
            return await trace.read(n, self.traces + len(run.cells))
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            run.notes.append(f"the budget ({error.resource}) held no more forks")
            return None

    # -- whole traces ------------------------------------------------------------------------------------------

    async def _draw(self, call: Call, next: Next) -> _Run:
        """Draws whole traces and cuts them."""
        drawn = await draw_samples(call, next, self.traces, self.temperature)
        run = _Run([Cell(i, self.depths, a) for i, a in enumerate(drawn.answers)], list(drawn.accounts))
        run.begun = run.whole = len(run.cells)
        if self.every and self.depths > 1:
            run.notes.append("no trace was read while it ran: what is below has no branches, or drafts first")
        await self._cut(call, next, run)
        return run

    async def _cut(self, call: Call, next: Next, run: _Run) -> None:
        """Draws the cells of every trace that are not its own answer, shallow ones first."""
        if self.depths * self.solutions == 1:
            return
        engine = call.engines.get("answer")
        if call.draft is not None or engine is None or "continue" not in engine.capabilities:
            run.notes.append("traces only: the answer drafts first, or the engine continues none")
            return
        whole = list(run.cells)
        silent = [cell for cell in whole if not cell.answer.thinking.strip()]
        if silent:
            run.notes.append(f"{len(silent)} of {len(whole)} traces have no thinking to cut")
        account = call.account.child("cells")
        run.accounts.append(account)
        number = len(whole)
        for cell in whole:
            if cell in silent:
                continue
            for depth in range(1, self.depths + 1):
                n = self.solutions - (depth == self.depths)
                if self._agreed(run):
                    run.notes.append(f"{self.agree} cells agree")
                    return
                if not n:
                    continue
                cut = self._prefix(call, cell.answer.thinking, depth)
                try:
                    found = await draw_samples(
                        self._solving(replace(call, account=account), cut), next, n, self.temperature, first=number
                    )
                except BudgetExceeded as error:
                    if call.on_exceed == "refuse":
                        raise
                    run.notes.append(f"the budget ({error.resource}) held no more")
                    return
                number += n
                thinking = cut_words(cell.answer.thinking, depth, self.depths)
                run.cells += [Cell(cell.trace, depth, replace(a, thinking=thinking)) for a in found.answers]

    def _agreed(self, run: _Run) -> bool:
        tally = counts([vote_of(cell.answer) for cell in run.cells]) if self.agree else {}
        return max(tally.values(), default=0) >= max(1, self.agree)

    def _prefix(self, call: Call, thinking: str, depth: int) -> str:
        begun = call.prefix or ""
        if not left_open(begun, self.opening, self.closing):
            begun += self.opening
        return f"{begun}{cut_words(thinking, depth, self.depths)}{self.closing}\n\n"

    def _solving(self, call: Call, prefix: str) -> Call:
        limit = call.sampling.max_tokens
        most = self.solution_tokens if limit is None else min(limit, self.solution_tokens)
        return replace(call, prefix=prefix, sampling=replace(call.sampling, max_tokens=most))


@dataclass(slots=True)
class _Run:
    cells: list[Cell]
    accounts: list[Account]
    notes: list[str] = field(default_factory=list)
    begun: int = 0
    """traces begun"""
    whole: int = 0
    """of them those that ran to their end, whose own answer is a cell"""
    stopped: list[Answer] = field(default_factory=list)
    """what traces had written that were stopped early"""


def cut_words(text: str, depth: int, depths: int) -> str:
    """The first floor(depth * W / depths) of a text's W words, with the white space before each; all of it at the last
    depth.

    >>> cut_words("a b  c d", 3, 4), cut_words("a b", 1, 4), cut_words("a b ", 4, 4)
    ('a b  c', '', 'a b ')
    """
    if depth >= depths:
        return text
    words = re.findall(r"\s*\S+", text)
    return "".join(words[: depth * len(words) // depths])


# -- measuring: pass@k against tokens along each axis ----------------------------------------------------------


def pass_at_k(n: int, right: int, k: int) -> float:
    """P(at least one of k of n samples is right), of which `right` are: 1 - C(n - right, k) / C(n, k), exactly.

    Raises InvalidInput unless 0 <= right <= n and 1 <= k <= n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise InvalidInput(f"pass@{k} of {n} samples, {right} right: 1 <= k <= n and 0 <= right <= n are needed")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def chosen_depths(depths: int, h: int) -> list[int]:
    """Which h of H depths (from 0) to use: evenly spaced from the end, so that the whole trace is always one.

    >>> chosen_depths(16, 4), chosen_depths(5, 1)
    ([3, 7, 11, 15], [4])
    """
    if not 1 <= h <= depths:
        raise InvalidInput(f"{h} of {depths} depths: from 1 to {depths} is needed")
    last, first = depths - 1, depths // h - 1
    return [last] if h == 1 else sorted(int(last + (first - last) * i / (h - 1)) for i in range(h))


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of one axis: expected output tokens of one question, and pass@k."""

    axis: str
    size: int
    tokens: float
    passed: float


def axis_points(
    correct: Sequence[Sequence[Sequence[bool]]],
    thinking: Sequence[int],
    solutions: Sequence[Sequence[Sequence[int]]],
) -> list[Point]:
    """pass@k against tokens along each of the three axes, from one question's full grid.

    `correct` and `solutions` (tokens of each solution) are [n, H, m], `thinking` [n]. Along `n`, k whole traces are
    drawn; along `H` and `m`, one trace, whose cells count as right if any is. Thinking is counted once a trace. Raises
    InvalidInput when the shapes differ or are empty.
    """
    n = len(correct)
    shapes = {
        (len(c), len(row), len(s), len(t))
        for c, s in zip(correct, solutions, strict=False)
        for row, t in zip(c, s, strict=False)
    }
    if not n or len(solutions) != n or len(thinking) != n or len(shapes) != 1:
        raise InvalidInput("a grid needs n traces of H depths of m solutions, all of one size, and n thinking lengths")
    depths, m, same, also = shapes.pop()
    if (depths, m) != (same, also) or not depths or not m:
        raise InvalidInput(f"correct is [n, {depths}, {m}] and solutions [n, {same}, {also}]: the same size is needed")
    last = depths - 1
    full = sum(correct[i][last][0] for i in range(n))
    whole = sum(thinking[i] + solutions[i][last][0] for i in range(n)) / n
    points = [Point("n", k, k * whole, pass_at_k(n, full, k)) for k in range(1, n + 1)]
    for h in range(1, depths + 1):
        cells = [(d, 0) for d in chosen_depths(depths, h)]
        points.append(_one_trace("H", h, cells, correct, thinking, solutions))
    for size in range(1, m + 1):
        points.append(_one_trace("m", size, [(last, j) for j in range(size)], correct, thinking, solutions))
    return points


def _one_trace(
    axis: str,
    size: int,
    cells: Sequence[tuple[int, int]],
    correct: Sequence[Sequence[Sequence[bool]]],
    thinking: Sequence[int],
    solutions: Sequence[Sequence[Sequence[int]]],
) -> Point:
    n = len(correct)
    right = sum(any(correct[i][d][j] for d, j in cells) for i in range(n))
    tokens = sum(thinking[i] + sum(solutions[i][d][j] for d, j in cells) for i in range(n))
    return Point(axis, size, tokens / n, right / n)
