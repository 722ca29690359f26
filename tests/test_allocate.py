"""Allocation against brute force over all divisions of small totals."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from thrifty.allocate import allocate
from thrifty.errors import InvalidInput

weights_of = st.one_of(st.integers(0, 6).map(float), st.floats(0, 1e6), st.sampled_from([0.1, 0.2, 0.3, 1e-300, 1e300]))


def proportional(total: int, weights: list[float]) -> list[Fraction]:
    exact = [Fraction(w) for w in weights]
    if not any(exact):
        exact = [Fraction(1)] * len(weights)
    return [total * w / sum(exact) for w in exact]


@given(st.integers(0, 10**12), st.lists(weights_of, min_size=1, max_size=9))
def test_without_bounds_no_part_is_a_unit_off(total: int, weights: list[float]) -> None:
    parts = allocate(total, weights)
    assert sum(parts) == total
    for part, exact in zip(parts, proportional(total, weights), strict=True):
        assert abs(part - exact) < 1


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 12), st.lists(st.integers(0, 5).map(float), min_size=1, max_size=4))
def test_without_bounds_no_division_is_nearer(total: int, weights: list[float]) -> None:
    exact = proportional(total, weights)

    def distance(parts: Any) -> Fraction:
        return sum(((p - x) ** 2 for p, x in zip(parts, exact, strict=True)), Fraction(0))

    best = min(distance(p) for p in product(range(total + 1), repeat=len(weights)) if sum(p) == total)
    assert distance(allocate(total, weights)) == best


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_with_bounds_no_division_is_nearer_to_proportion(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    weights = data.draw(st.lists(st.integers(1, 5).map(float), min_size=n, max_size=n))
    lows = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    highs = [low + data.draw(st.integers(0, 8)) for low in lows]
    total = data.draw(st.integers(sum(lows), sum(highs)))
    parts = allocate(total, weights, lows, highs)
    assert sum(parts) == total
    assert all(lo <= p <= hi for lo, p, hi in zip(lows, parts, highs, strict=True))

    # Proportion within bounds is the minimum of sum((part - total * share)^2 / weight): its conditions say that all
    # parts that no bound stops have the same part / weight. The whole numbers must be within one unit of that.
    def cost(division: Any) -> Fraction:
        return sum((Fraction(p) ** 2 / Fraction(w) for p, w in zip(division, weights, strict=True)), Fraction(0))

    for i, j in product(range(n), repeat=2):  # no unit can be moved from i to j with both getting nearer than a unit
        if parts[i] > lows[i] and parts[j] < highs[j]:
            assert Fraction(parts[i] - 1) / Fraction(weights[i]) <= Fraction(parts[j] + 1) / Fraction(weights[j])
    ranges = [range(lo, hi + 1) for lo, hi in zip(lows, highs, strict=True)]
    best = min((d for d in product(*ranges) if sum(d) == total), key=cost)
    assert all(abs(p - b) <= 1 for p, b in zip(parts, best, strict=True))


@given(st.data())
def test_a_larger_weight_never_gets_less(data: st.DataObject) -> None:
    weights = data.draw(st.lists(weights_of, min_size=2, max_size=7))
    low = data.draw(st.integers(0, 5))
    high = data.draw(st.none() | st.integers(low, 50))
    n = len(weights)
    total = data.draw(st.integers(low * n, 500 if high is None else high * n))
    assume(total >= low * n)
    parts = allocate(total, weights, low, high)
    assert sum(parts) == total
    assert all(p >= low and (high is None or p <= high) for p in parts)
    for (w1, p1), (w2, p2) in product(zip(weights, parts, strict=True), repeat=2):
        if w1 > w2:
            assert p1 >= p2


@given(st.integers(0, 100), st.lists(weights_of, min_size=1, max_size=6))
def test_scaling_the_weights_changes_nothing(total: int, weights: list[float]) -> None:
    assume(all(w == 0 or 1e-290 < w < 1e290 for w in weights))
    assert allocate(total, [w * 4 for w in weights]) == allocate(total, weights)


def test_known_cases() -> None:
    assert allocate(7, [1]) == [7]
    assert allocate(0, [3, 1]) == [0, 0]
    assert allocate(5, [0, 0]) == [3, 2]
    assert allocate(10, [0, 1]) == [0, 10]
    assert allocate(10, [0, 1], high=6) == [4, 6]
    assert allocate(100, [5, 3, 2], low=25) == [47, 28, 25]
    assert allocate(10, [9, 1, 1], high=[4, 10, 10]) == [4, 3, 3]
    assert allocate(3, [0.1] * 3) == [1, 1, 1]
    assert sum(allocate(10**18, [1 / 3, 1 / 7, 1 / 11])) == 10**18


@pytest.mark.parametrize(
    "arguments",
    [
        (5, []),
        (5, [1, -1]),
        (5, [1, float("nan")]),
        (5, [1, float("inf")]),
        (-1, [1]),
        (5, [1, 1], 3),
        (5, [1, 1], 0, 2),
        (5, [1, 1], [0], None),
        (5, [1, 1], 3, 2),
        (5, [1, 1], -1),
    ],
)
def test_what_cannot_be_divided_is_refused(arguments: Any) -> None:
    with pytest.raises(InvalidInput):
        allocate(*arguments)
