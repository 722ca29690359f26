"""First Finish Search: race n samples of one prompt, answer with the first to finish, cancel the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from thrifty.call import Answer, Branch, Call, Receipt, Until, advance
from thrifty.errors import InvalidInput
from thrifty.method import Next, Search, knob
from thrifty.methods.search._branches import add_forks, short_of, to_the_end, without_shared
from thrifty.methods.search._samples import (
    COMPLETE,
    conclude,
    how_many_fit,
    sample_call,
    shares,
    side_by_side,
    tell,
    votes_of,
    winner_of,
)


@dataclass(frozen=True, kw_only=True)
class FirstFinishSearch(Search):
    """Races `samples` samples and returns the first that ends properly; with `finishers` k > 1, waits for the
    first k and answers with their majority (FFS@k; equal votes go to the earlier finisher).

    Ending properly is stopping by itself with an answer: a row cut by max_tokens or by the budget is no
    finish, nor is one that ends inside its thinking block. With `finish = "thinking"` the race is to the end
    of the thinking block, and the winner then writes its answer alone. When no row ends properly the first
    row is returned, and the receipt says so.

    On an engine with branches the prompt is prefilled once and the rows advance together, so n rows cost n
    times the shortest; the losers are closed, and their tokens are in the Answer's Spend. On other engines n
    calls run at the same time and the losers are cancelled. When the account cannot hold n rows, fewer race;
    when it has less than `keep` tokens left, the race ends, and the lowest row goes on with what is there.

    The paper is for models that reason at length, where shorter traces are right more often; models that do
    not reason may finish first with short wrong answers. `p_correct_shortest` and `p_correct_normal` tell
    from a pilot whether that is so. Written from the paper's abstract and description: the race's details,
    `keep` and the order of votes are ours."""

    name = "first-finish-search"
    paper = "First Finish Search: Efficient Test-Time Scaling in Large Language Models (2025, arXiv:2505.18149)"
    needs = frozenset({"text", "sampling"})
    opens = True
    identity = {"samples": 1}

    samples: int = knob(4, "rows in the race", low=1, high=256, log=True)
    finishers: int = knob(1, "k of FFS@k: how many finishers vote", low=1, high=256)
    temperature: float = knob(0.6, "of the samples", low=0.01, high=10.0)
    top_p: float = knob(0.95, "of the samples", low=0.01, high=1.0)
    finish: str = knob("answer", "what ends the race", choices=("answer", "thinking"))
    closing: str = knob("</think>", "what closes a thinking block")
    keep: int = knob(64, "tokens that the race leaves for the winner's answer", low=0, high=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finishers > self.samples:
            raise InvalidInput(
                f"first-finish-search: finishers = {self.finishers} is above samples = {self.samples}: "
                "as many at most are needed"
            )

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.samples == 1:
            return await next(call.with_receipt(Receipt(self.name, False, "one sample: no race", 1, 1, "samples")))
        n = how_many_fit(call, self.samples, max(1, self.keep))
        call_to_race = call.with_sampling(top_p=self.top_p)
        engine = call.engines.get("answer")
        if engine is not None and "branch" in engine.capabilities:
            return await tell(call, await self._race_branches(call_to_race, next, n))
        return await tell(call, await self._race_calls(call_to_race, next, n))

    # -- on an engine with branches --------------------------------------------------------------------------

    async def _race_branches(self, call: Call, next: Next, n: int) -> Answer:
        account = call.account.child("race")
        root = await next.open(sample_call(call, 0, account, self.temperature))
        rows: list[Branch] = [root]
        try:
            add_forks(rows, call, 1, n - 1, call.sampling.seed or 0)
            race = _Race(self, rows, call)
            crossed = await race.run()
            for row in rows:
                if row not in crossed:
                    row.close()
            await to_the_end(crossed)
            answers = [await row.finish_up() for row in rows]
        finally:
            for row in rows:
                row.close()
        answers = [answers[0], *(without_shared(a, root.call) for a in answers[1:])]
        finished = [answers[rows.index(row)] for row in crossed]
        finished = [a for a in finished if proper(a)] or finished or answers[:1]
        chosen = finished[winner_of(votes_of(finished))] if self.finishers > 1 else finished[0]
        lengths = [len(a.tokens or ()) for a in answers]
        own = self._receipt(len(rows), [a for a in finished if proper(a)], lengths, race.note)
        return conclude(call, chosen, answers, [account], own)

    # -- on other engines ------------------------------------------------------------------------------------

    async def _race_calls(self, call: Call, next: Next, n: int) -> Answer:
        accounts = shares(call, 0, n)
        finished: list[Answer] = []

        def enough(came: list[Answer]) -> bool:
            finished[:] = [a for a in came if proper(a)]
            return len(finished) >= self.finishers

        try:
            calls = [sample_call(call, i, account, self.temperature) for i, account in enumerate(accounts)]
            results = await side_by_side(next, calls, enough)
        finally:
            for account in accounts:
                account.close()
        came = [a for a in results if a is not None]
        finished = finished[: self.finishers]
        pool = finished or came[:1]
        chosen = pool[winner_of(votes_of(pool))] if self.finishers > 1 else pool[0]
        lengths = [account.settled.output for account in accounts]
        note = "" if self.finish == "answer" else "raced to the end of the answer: the engine has no branches"
        return conclude(call, chosen, came, accounts, self._receipt(n, finished, lengths, note))

    def _receipt(self, rows: int, finished: Sequence[Answer], lengths: Sequence[int], note: str) -> Receipt:
        parts = [f"{rows} rows raced, {len(finished)} finished"]
        if rows == 1:
            parts = ["one row: the budget holds no race"]
        if not finished:
            parts.append("none ended properly: the first row is returned")
        if rows < self.samples and rows > 1:
            parts.append(f"the budget holds no more than {rows} of {self.samples}")
        parts += [note] if note else []
        detail = {"sequential": max(lengths), "total": sum(lengths), "lengths": list(lengths)}
        fired = rows > 1 and bool(finished)
        return Receipt(self.name, fired, "; ".join(parts), self.samples, rows, "samples", detail=detail)


class _Race:
    """Advances rows together until enough of them have crossed the line."""

    def __init__(self, method: FirstFinishSearch, rows: Sequence[Branch], call: Call) -> None:
        self.method, self.rows, self.call = method, rows, call
        self.note = ""

    async def run(self) -> list[Branch]:
        """The rows that crossed, in order; those of one step by index. Empty when none did."""
        crossed: list[Branch] = []
        racing = list(self.rows)
        while racing and len(crossed) < self.method.finishers:
            alone = len(racing) + len(crossed) == 1
            if not alone and self._short():
                survivor = crossed or racing[:1]
                self.note = f"under {self.method.keep} tokens were left: the race ended early"
                return survivor
            await advance(racing, self._until(alone))
            over = [row for row in racing if self._over(row)]
            for row in over:
                racing.remove(row)
                if row.finish is None or proper(await row.finish_up()):
                    crossed.append(row)
        return crossed[: self.method.finishers]

    def _until(self, alone: bool) -> Until:
        return lambda rows: any(map(self._over, rows)) or (not alone and self._short())

    def _over(self, row: Branch) -> bool:
        if row.finish is not None:
            return True
        return self.method.finish == "thinking" and self.method.closing in row.text

    def _short(self) -> bool:
        """Whether the account has less left than the winner may need."""
        return short_of(self.call.account, self.method.keep)


def proper(answer: Answer) -> bool:
    """Whether an answer ended by itself, and with more than an unclosed thinking block."""
    return answer.finish in COMPLETE and bool(answer.text.strip() or answer.tool_calls)


# -- the pilot: should this model race at all? ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pilot:
    """What a race of n would do on one question: how often the answer is right, and its expected tokens."""

    correct: float
    sequential: float
    """tokens of the shortest row: what the user waits for"""
    total: float
    """tokens of all rows: what is billed"""


def p_correct_shortest(traces: Sequence[tuple[float, bool]], n: int) -> Pilot:
    """From stored traces (length, correct) of one question: what the shortest of n would have been.

    The mean over all choices of n different traces, in closed form: with traces sorted by length, the r-th
    (from 0) of N is the shortest of C(N-1-r, n-1) of the C(N, n) choices. Traces of equal length win equally
    often. Raises InvalidInput unless 1 <= n <= N.

    >>> p_correct_shortest([(10, True), (20, False)], 2)
    Pilot(correct=1.0, sequential=10.0, total=20.0)
    """
    size = len(traces)
    if not 1 <= n <= size:
        raise InvalidInput(f"n = {n} of {size} traces: from 1 to {size} is needed")
    ordered = sorted(traces, key=lambda t: t[0])
    right: dict[float, list[bool]] = {}
    for length, correct in ordered:
        right.setdefault(length, []).append(correct)
    choices = math.comb(size, n)
    chance, expected, rank = 0.0, 0.0, 0
    for length, group in right.items():
        p = sum(math.comb(size - 1 - r, n - 1) for r in range(rank, rank + len(group))) / choices
        chance += p * sum(group) / len(group)
        expected += p * length
        rank += len(group)
    return Pilot(chance, expected, n * expected)


def normal_minimum(n: int) -> float:
    """E[min of n standard normals], exactly (by quadrature, error below 1e-9): -1.029 at n = 4, where the
    asymptotic -sqrt(2 ln n) says -1.665.

    >>> round(normal_minimum(4), 6)
    -1.029375
    """
    if n < 1:
        raise InvalidInput(f"n = {n}: at least 1 is needed")
    unit = NormalDist()
    return _simpson(lambda x: n * x * unit.pdf(x) * unit.cdf(-x) ** (n - 1), -10.0, 10.0)


def p_correct_normal(p: float, right: tuple[float, float], wrong: tuple[float, float], n: int) -> float:
    """P(the shortest of n is correct), when a sample is correct with probability p, and lengths are normal:
    `right` and `wrong` are (mean, standard deviation).

    n times the integral of p f1(x) [p (1 - F1(x)) + (1 - p) (1 - F2(x))]^(n-1). With equal laws it is p for
    every n; when wrong traces vary clearly more, it may fall as n grows.

    >>> round(p_correct_normal(0.6, (100, 20), (100, 20), 8), 6)
    0.6
    """
    if n < 1 or not 0 <= p <= 1 or min(right[1], wrong[1]) <= 0:
        raise InvalidInput(
            f"n = {n}, p = {p}, deviations {right[1]}, {wrong[1]}: n >= 1, p in [0, 1], deviations above 0"
        )
    one, two = NormalDist(*right), NormalDist(*wrong)

    def longer(x: float) -> float:
        return p * one.cdf(2 * one.mean - x) + (1 - p) * two.cdf(2 * two.mean - x)

    low, high = one.mean - 10 * one.stdev, one.mean + 10 * one.stdev
    return _simpson(lambda x: n * p * one.pdf(x) * longer(x) ** (n - 1), low, high)


def _simpson(f: Callable[[float], float], low: float, high: float, panels: int = 4000) -> float:
    step = (high - low) / panels
    inner = math.fsum((4 if i % 2 else 2) * f(low + i * step) for i in range(1, panels))
    return (f(low) + f(high) + inner) * step / 3
