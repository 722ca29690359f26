"""What methods with a scorer share: asking it within the budget, and cutting its tokens where a text may be cut."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from thrifty.call import Call
from thrifty.engine import Scores, TokenScores, score
from thrifty.methods.context._graphemes import cuts_at
from thrifty.methods.context._passages import _leaving_room

NEAR = 0.99
"""Of the tokens that are allowed: the search for what fits ends there."""

ROUNDS = 40
"""Of that search, at most: each counts the tokens of one candidate."""


async def scored(call: Call, method: str, texts: Sequence[str], context: str | Sequence[str] = "") -> Scores:
    """Log-probabilities of texts by the engine of the role `scorer`, in one request billed under the method's name.

    When the call as it stands still fits into its account, scoring must leave it that room; where it does not, a
    shorter prompt is its only chance, and scoring may take what there is. Raises BudgetExceeded."""
    labels = replace(call.labels, method=method, role="scorer")
    account = call.account.child(method, _leaving_room(call))
    return await score(call.engines["scorer"], list(texts), account, labels, context)


@dataclass(frozen=True, slots=True)
class Atom:
    """Characters [start, stop) that stay or go together: one token, or those that share a character."""

    start: int
    stop: int
    value: float
    """the mean of its tokens' values"""
    tokens: int


def atoms(text: str, spans: Any, values: Sequence[float], edges: Sequence[int] = ()) -> list[Atom]:
    """The atoms of a text in order, which cover it: tokens are joined until nothing is torn between two; `edges` are
    places between which nothing is joined. A value that is NaN is infinite: such a token is no loss to keep."""
    given = sorted({0, *edges, len(text)})
    found: list[Atom] = []
    i, n = 0, len(spans)
    for first, last in zip(given, given[1:], strict=False):
        start, mine = first, list[float]()
        while i < n and spans[i][0] < last:
            here = max(first, int(spans[i][0]))
            if here > start and mine and cuts_at(text, here):
                found.append(Atom(start, here, sum(mine) / len(mine), len(mine)))
                start, mine = here, []
            mine.append(math.inf if math.isnan(values[i]) else float(values[i]))
            i += 1
        if last > start:
            found.append(Atom(start, last, sum(mine) / len(mine) if mine else 0.0, max(1, len(mine))))
    return found


def mean_nll(scores: TokenScores) -> float:
    """The mean of -log p over a text's tokens, those without a score left out; 0 for none."""
    known = [-float(x) for x in scores.logprobs if not math.isnan(x)]
    return math.fsum(known) / len(known) if known else 0.0


def most_that_fit(weights: Sequence[float], most: int, size: Callable[[int], int]) -> int:
    """The k in [0, n] for which size(k) <= most and near it. The size of the first k of n things is guessed from their
    weights, and what a guess is found to have corrects the next. 0 where nothing fits.

    >>> most_that_fit([1.0] * 100, 50, lambda k: 3 * k)
    16
    """
    totals = list(accumulate(weights, initial=0.0))
    low, high = 0, len(weights) + 1  # `low` fits, `high` does not
    ratio = 1.0
    for turn in range(ROUNDS):
        if high - low <= 1:
            break
        guess = bisect_right(totals, most / ratio) - 1 if turn < ROUNDS // 3 else (low + high) // 2
        k = min(max(guess, low + 1), high - 1)
        found = size(k)
        if found > most:
            high = k
        else:
            low = k
            if found >= NEAR * most:
                break
        ratio = max(1, found) / max(1e-9, totals[k])
    return low
