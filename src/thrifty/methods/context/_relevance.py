"""REALM's model of relevance: a Gaussian a document, updated by preferences, and the search for the k best by pivots.

Pure but for the comparisons, which are awaited. Invariants: a variance only falls by an update from a sure preference,
and never reaches 0; the order returned is a permutation; no comparison is asked for after `prefer` gave None."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

MU = 25.0
SIGMA = MU / 3
BETA = SIGMA / 2
"""TrueSkill's usual scale: the prior's mean and deviation, and the deviation of one performance"""
RANK_STEP = 0.001
"""by which the prior's mean falls from rank to rank of the first stage"""
SETTLED = 0.95
"""Kendall's tau from which a round changed too little to go on"""


@dataclass(frozen=True, slots=True)
class Rating:
    """What is believed of one document's relevance."""

    mu: float = MU
    sigma: float = SIGMA


def update(rating: Rating, other: Rating, p: float, beta: float = BETA) -> Rating:
    """The rating after it was preferred to `other` with probability p.

    The exact posteriors of a sure win and of a sure loss (TrueSkill without draws and without drift), mixed with
    weights p and 1 - p, and matched by a Gaussian in mean and variance.

    >>> update(Rating(), Rating(), 0.5).mu
    25.0
    """
    win, loss = _won(rating, other, beta, 1.0), _won(rating, other, beta, -1.0)
    mu = p * win[0] + (1 - p) * loss[0]
    variance = p * (win[1] + (win[0] - mu) ** 2) + (1 - p) * (loss[1] + (loss[0] - mu) ** 2)
    return Rating(mu, math.sqrt(max(variance, 1e-9)))


def combined(ratings: Sequence[Rating]) -> Rating:
    """One rating from several of the same document that are not independent, being updates of one prior: the mean
    weighed by precision, and the harmonic mean of the variances (so no number of comparisons makes it surer than the
    surest of them)."""
    precision = [r.sigma**-2 for r in ratings]
    mu = sum(r.mu * w for r, w in zip(ratings, precision, strict=True)) / sum(precision)
    return Rating(mu, math.sqrt(len(ratings) / sum(precision)))


def preference(score: float, other: float, temperature: float = 1.0) -> float:
    """P(one is preferred to the other) from two scores of the same reply.

    >>> preference(1.0, 1.0), round(preference(2.0, 0.0, 2.0), 4)
    (0.5, 0.7311)
    """
    return 1.0 / (1.0 + math.exp(min(700.0, max(-700.0, (other - score) / temperature))))


Prefer = Callable[[Sequence[int]], Awaitable[Sequence[float | None] | None]]
"""Compares documents, the pivot last: of each of the others the probability that it is preferred to the pivot, None
where nothing is known of it; None for all: no more comparisons."""


async def best(n: int, k: int, prefer: Prefer, size: int = 3) -> tuple[list[int], list[Rating]]:
    """Documents 0 to n - 1 in order, of which the first k are the best, and what is believed of each; as far as it was
    known when comparisons ended, or when a whole round told nothing.

    Quickselect with pivots: the document of which most is known (the first of equals) is compared with all others of
    its part, `size` - 1 at a time; the part is ordered by mean, and the search goes on in what lies before the pivot if
    more than k are there, behind it for what is missing of k. It ends where k are settled, and in a part whose order a
    round left nearly as it was, if its preferences were of three strengths at least: those of two say nothing of the
    order on either side of the pivot, and a pivot that beats all would end the search. With a comparator that makes no
    mistake and sure preferences the k best are found."""
    order = list(range(n))
    ratings = [Rating(MU - RANK_STEP * i) for i in range(n)]
    parts = [(0, n)]
    while parts:
        low, high = parts.pop()
        if high - low < 2 or high <= k or low >= k:
            continue
        part = order[low:high]
        pivot = min(part, key=lambda d: ratings[d].sigma)
        place = {d: i for i, d in enumerate(part)}
        told = await _compare(part, pivot, ratings, prefer, size)
        order[low:high] = sorted(part, key=lambda d: (-ratings[d].mu, place[d]))
        if not told:
            break
        at = order.index(pivot, low, high)
        if len(set(told)) < 3 or kendall(part, order[low:high]) <= SETTLED:
            parts += [(at + 1, high), (low, at)]
    return order, ratings


async def _compare(
    part: Sequence[int], pivot: int, ratings: list[Rating], prefer: Prefer, size: int
) -> list[float] | None:
    """One round: all others with the pivot, each against the pivot as it was before. What was told; None where
    comparisons have ended, after what was learnt is in the ratings."""
    others = [d for d in part if d != pivot]
    before, views, ended = ratings[pivot], [], False
    ps: list[float] = []
    for i in range(0, len(others), size - 1):
        group = others[i : i + size - 1]
        told = await prefer([*group, pivot])
        if told is None:
            ended = True
            break
        for document, p in zip(group, told, strict=True):
            if p is not None:
                ps.append(p)
                views.append(update(before, ratings[document], 1 - p))
                ratings[document] = update(ratings[document], before, p)
    if views:
        ratings[pivot] = combined(views)
    return None if ended else ps


def kendall(a: Sequence[int], b: Sequence[int]) -> float:
    """Kendall's tau of two orders of the same things: 1 for equal ones, -1 for one the reverse of the other.

    >>> kendall([1, 2, 3], [1, 2, 3]), kendall([1, 2, 3], [3, 2, 1])
    (1.0, -1.0)
    """
    place = {x: i for i, x in enumerate(b)}
    n = len(a)
    pairs = n * (n - 1) // 2
    if not pairs:
        return 1.0
    return 1 - 2 * _inversions([place[x] for x in a])[1] / pairs


def _inversions(values: Sequence[int]) -> tuple[list[int], int]:
    """Values sorted, and how many pairs were out of order; n log n, for a thousand documents are none too many."""
    if len(values) < 2:
        return list(values), 0
    middle = len(values) // 2
    (left, a), (right, b) = _inversions(values[:middle]), _inversions(values[middle:])
    merged: list[int] = []
    count, i = a + b, 0
    for x in right:
        while i < len(left) and left[i] <= x:
            merged.append(left[i])
            i += 1
        count += len(left) - i
        merged.append(x)
    return merged + left[i:], count


def _won(rating: Rating, other: Rating, beta: float, sign: float) -> tuple[float, float]:
    """Mean and variance after a sure win (sign 1) or loss (-1)."""
    own = rating.sigma**2
    c = math.sqrt(2 * beta**2 + own + other.sigma**2)
    t = sign * (rating.mu - other.mu) / c
    v = _v(t)
    return rating.mu + sign * own / c * v, own * (1 - own / c**2 * v * (v + t))


def _v(t: float) -> float:
    """phi(t) / Phi(t); by its series far below 0, where both underflow."""
    if t < -30:
        return -t - 1 / t
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi) / (0.5 * math.erfc(-t / math.sqrt(2)))
