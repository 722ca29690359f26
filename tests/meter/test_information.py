"""InfoGain by hand and by scipy; HSIC against the double sums of its definition and against independence."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from thrifty import InvalidInput
from thrifty.meter.information import entropy, hsic, info_bias, info_gain, normalised_hsic

CHANCES = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda q: sum(q) > 1e-6)


@settings(deadline=None)
@given(steps=st.lists(CHANCES, min_size=2, max_size=6), tokens=st.integers(1, 1000))
def test_gains_telescope_and_entropies_are_scipys(steps: list[list[float]], tokens: int) -> None:
    gain = info_gain(steps, tokens)
    assert gain.entropies == pytest.approx([scipy_entropy(q, base=2) for q in steps], abs=1e-9)
    assert sum(gain.gains) == pytest.approx(gain.entropies[0] - gain.entropies[-1], abs=1e-9)
    assert gain.per_step * len(gain.gains) == pytest.approx(gain.total) == pytest.approx(gain.per_token * tokens)


def by_definition(x: np.ndarray, y: np.ndarray, b: float) -> float:
    """The biased estimator as sums over pairs, triples and quadruples: E[kl] + E[k]E[l] - 2 E[E[k]E[l]]."""
    n = len(x)

    def kernel(a: np.ndarray, i: int, j: int) -> float:
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a[i], a[j], strict=True)) / (2 * b * b))

    pairs = list(itertools.product(range(n), repeat=2))
    both = sum(kernel(x, i, j) * kernel(y, i, j) for i, j in pairs) / n**2
    apart = sum(kernel(x, i, j) for i, j in pairs) * sum(kernel(y, i, j) for i, j in pairs) / n**4
    cross = sum(kernel(x, i, j) * kernel(y, i, k) for i, j in pairs for k in range(n)) / n**3
    return (both + apart - 2 * cross) * n**2 / (n - 1) ** 2


@pytest.mark.parametrize("b", [0.5, 1.0, 3.0])
def test_hsic_is_its_definition(b: float) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 2))
    assert hsic(x, y, b) == pytest.approx(by_definition(x, y, b), rel=1e-9)
    assert hsic(x, y, b) == pytest.approx(hsic(y, x, b))


def test_dependence_is_large_for_equal_samples_and_small_for_independent_ones() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 2)), rng.normal(size=(400, 2))
    for measure in (hsic, lambda a, b: hsic(a, b, None), lambda a, b: normalised_hsic(a, b, ridge=1e-2)):
        assert measure(x, x) > 10 * measure(x, y) >= 0
    assert hsic(x, y) < 2e-3 < hsic(x, x) / 20
    order = rng.permutation(400)
    assert hsic(x[order], (x**2)[order]) == pytest.approx(hsic(x, x**2))
    assert hsic(x, x**2) > 20 * hsic(x, x[order] ** 2)


def test_the_normalised_form_is_the_sum_over_eigenvectors() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(9, 4))
    y = np.concatenate([x[:, :1], rng.normal(size=(9, 2))], axis=1)
    n, ridge, centre = 9, 1e-3, np.eye(9) - 1 / 9
    parts = []
    for a in (x, y):
        k = np.array([[math.exp(-((p - q) @ (p - q)) / (2 * 2.0**2)) for q in a] for p in a])
        values, vectors = np.linalg.eigh(centre @ k @ centre)
        parts.append((values / (values + ridge * n), vectors))
    (u, p), (v, q) = parts
    expected = sum(u[i] * v[j] * (p[:, i] @ q[:, j]) ** 2 for i in range(n) for j in range(n))
    assert normalised_hsic(x, y, 2.0, ridge) == pytest.approx(expected, rel=1e-8)
    assert normalised_hsic(x, x, None, 1e-12) == pytest.approx(n - 1, rel=1e-4)


def test_bias_is_least_where_a_token_says_most_about_the_reference() -> None:
    assert info_bias([4.0, 2.0, 1.0], [4, 4, 4]) == pytest.approx([0, 2 / 3, 1])
    assert info_bias([3.0, 3.0], [5, 5]) == [1.0, 1.0] and info_bias([], []) == []


def test_bad_input_is_named() -> None:
    for bad in ([], [0, 0], [1, -1], [math.nan, 1]):
        with pytest.raises(InvalidInput, match="chances"):
            entropy(bad)
    with pytest.raises(InvalidInput, match="distributions"):
        info_gain([[1, 1]], 5)
    with pytest.raises(InvalidInput, match="shapes"):
        hsic(np.zeros((3, 2)), np.zeros((4, 2)))
    with pytest.raises(InvalidInput, match="bandwidth"):
        hsic(np.zeros((3, 2)), np.zeros((3, 2)), 0.0)
    with pytest.raises(InvalidInput, match="lengths"):
        info_bias([1.0], [0])
