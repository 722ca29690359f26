"""What LongCodeZip computes: where blocks end, how much of each function stays, and which blocks are worth most."""

from __future__ import annotations

import math
from collections.abc import Sequence

EXACT_ITEMS = 100
EXACT_CAPACITY = 2000
"""More items than that, or more room, are chosen greedily."""


def spikes(values: Sequence[float], k: float = 0.2) -> list[int]:
    """Indices of lines whose log2-perplexity jumps: no lower than those of both neighbours, and above one of them by at
    least mean + k * standard deviation of all (population; 0.5 for fewer than three values above 0, as released).

    >>> spikes([0.5, 0.5, 9.0, 0.5, 0.5])
    [2]
    """
    known = [v for v in values if math.isfinite(v) and v > 0]
    threshold = 0.5
    if len(known) >= 3:
        mean = math.fsum(known) / len(known)
        threshold = mean + k * math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known))
    found = []
    for i in range(1, len(values) - 1):
        here = values[i]
        if not math.isfinite(here):
            continue
        jumps = [here - v if math.isfinite(v) else 0.0 for v in (values[i - 1], values[i + 1])]
        if min(jumps) >= 0 and max(jumps) >= threshold:
            found.append(i)
    return found


def rates(sizes: Sequence[int], importance: Sequence[float], target: float, beta: float, small: int) -> list[float]:
    """The share in [0, 1] of each function that stays, for `target` of all their sum: functions smaller than `small`
    stay whole, the others get the global rate g, tilted by their importance: g * (1 + beta * (2 z - 1)), with z its
    min-max normalised importance; then all of these are scaled once to meet the target, unless it is within one.

    >>> rates([3, 10, 10], [0.0, 1.0, 0.0], 13, 0.5, 5)
    [1.0, 0.75, 0.25]
    """
    large = [i for i, size in enumerate(sizes) if size >= small]
    shares = [1.0] * len(sizes)
    total = sum(sizes[i] for i in large)
    left = max(0.0, target - (sum(sizes) - total))
    if not total:
        return shares
    least, most = min(importance[i] for i in large), max(importance[i] for i in large)
    for i in large:
        z = (importance[i] - least) / (most - least) if most > least else 0.5
        shares[i] = min(1.0, max(0.0, left / total * (1 + beta * (2 * z - 1))))
    actual = sum(shares[i] * sizes[i] for i in large)
    if actual > 0 and abs(actual - left) > 1:
        for i in large:
            shares[i] = min(1.0, shares[i] * left / actual)
    return shares


def knapsack(weights: Sequence[int], values: Sequence[float], capacity: int) -> list[int]:
    """Indices, ascending, of the items of the greatest total value whose weights sum to at most `capacity`: exact for
    up to EXACT_ITEMS and EXACT_CAPACITY, else by value per weight. What has no value above 0 is never taken.

    >>> knapsack([3, 4, 5], [4.0, 5.0, 6.0], 7)
    [0, 1]
    """
    items = [i for i, value in enumerate(values) if value > 0 and weights[i] <= capacity]
    if len(items) > EXACT_ITEMS or capacity > EXACT_CAPACITY:
        return _greedy(items, weights, values, capacity)
    best = [0.0] * (capacity + 1)
    took: list[list[bool]] = []
    for i in items:
        weight, value = weights[i], values[i]
        row = [False] * (capacity + 1)
        for room in range(capacity, weight - 1, -1):
            if best[room - weight] + value > best[room]:
                best[room], row[room] = best[room - weight] + value, True
        took.append(row)
    chosen, room = [], capacity
    for i, row in zip(reversed(items), reversed(took), strict=True):
        if row[room]:
            chosen.append(i)
            room -= weights[i]
    return sorted(chosen)


def _greedy(items: Sequence[int], weights: Sequence[int], values: Sequence[float], capacity: int) -> list[int]:
    chosen = []
    for i in sorted(items, key=lambda i: (-values[i] / max(1, weights[i]), i)):
        if weights[i] <= capacity:
            chosen.append(i)
            capacity -= weights[i]
    return sorted(chosen)
