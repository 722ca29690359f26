"""Exact division: integers that sum to the total, within bounds, monotone in the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from thrifty.errors import InvalidInput


def allocate(
    total: int,
    weights: Sequence[float],
    low: Sequence[int] | int = 0,
    high: Sequence[int] | int | None = None,
) -> list[int]:
    """Splits `total` in proportion to `weights` [n], each part in [low, high], the parts summing to it exactly.

    Proportional shares are clamped to their bounds and what that frees is shared again among the others; fractions
    are then rounded down and the left-over units go to the largest fractions, ties to the lower index (the
    largest-remainder rule of Hamilton). Among parts with the same bounds a larger weight never gets less. All-zero
    weights count as equal. Arithmetic is rational, so no share is one off because of a rounded product.

    Raises InvalidInput when there are no parts, a weight is negative or not finite, or the total does not fit.

    >>> allocate(10, [1, 1, 1])
    [4, 3, 3]
    >>> allocate(100, [5, 3, 2], low=25)
    [47, 28, 25]
    """
    n = len(weights)
    lows = [low] * n if isinstance(low, int) else list(low)
    highs = [total] * n if high is None else [high] * n if isinstance(high, int) else list(high)
    _check(total, weights, lows, highs)
    shares = [Fraction(w) for w in weights]
    if not any(shares):
        shares = [Fraction(1)] * n
    exact = _clamped(total, shares, lows, highs)
    parts = [math.floor(x) for x in exact]
    by_fraction = sorted(range(n), key=lambda i: (parts[i] - exact[i], i))
    left = total - sum(parts)
    for i in by_fraction[:left]:
        parts[i] += 1
    return parts


def _clamped(total: int, weights: list[Fraction], lows: list[int], highs: list[int]) -> list[Fraction]:
    """Shares t * w clamped to their bounds, with t such that they sum to the total (t found on its breakpoints)."""

    def at(t: Fraction) -> list[Fraction]:
        return [min(max(t * w, Fraction(lo)), Fraction(hi)) for w, lo, hi in zip(weights, lows, highs, strict=True)]

    breaks = sorted({Fraction(b) / w for w, lo, hi in zip(weights, lows, highs, strict=True) if w for b in (lo, hi)})
    below, above = Fraction(0), None
    lo_i, hi_i = 0, len(breaks) - 1
    while lo_i <= hi_i:
        mid = (lo_i + hi_i) // 2
        if sum(at(breaks[mid])) <= total:
            below, lo_i = breaks[mid], mid + 1
        else:
            above, hi_i = breaks[mid], mid - 1
    start = at(below)
    missing = total - sum(start, Fraction(0))
    if not missing:
        return start
    if above is None:  # every weighted part is full: the rest goes to parts of weight zero, in order
        return _fill(start, missing, highs)
    # Between two breakpoints the sum is linear in t, with the slope of the parts that no bound stops.
    rising = [w for w, lo, hi in zip(weights, lows, highs, strict=True) if w and lo <= below * w < hi]
    slope = sum(rising, Fraction(0))
    return at(below + missing / slope)


def _fill(start: list[Fraction], missing: Fraction, highs: list[int]) -> list[Fraction]:
    parts = list(start)
    for i, high in enumerate(highs):
        more = min(missing, high - parts[i])
        parts[i] += more
        missing -= more
    return parts


def _check(total: int, weights: Sequence[float], lows: Sequence[int], highs: Sequence[int]) -> None:
    n = len(weights)
    if not n or len(lows) != n or len(highs) != n:
        raise InvalidInput(
            f"{n} weights, {len(lows)} lower and {len(highs)} upper bounds: one of each a part is needed"
        )
    bad = next((w for w in weights if not math.isfinite(w) or w < 0), None)
    if bad is not None:
        raise InvalidInput(f"weight {bad!r}: finite numbers of at least 0 are needed")
    if total < 0 or any(lo > hi or lo < 0 for lo, hi in zip(lows, highs, strict=True)):
        raise InvalidInput(f"total {total}, bounds {list(lows)} to {list(highs)}: 0 <= low <= high is needed")
    if not sum(lows) <= total <= sum(highs):
        raise InvalidInput(f"total {total} does not fit: the bounds allow {sum(lows)} to {sum(highs)}")
