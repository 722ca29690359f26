"""Conformal risk control against exact fractions, split conformal, MAPIE, and its law over every test item."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control.methods import find_best_predict_param, get_r_hat_plus

from thrifty.errors import InvalidInput
from thrifty.tune.crc import conformal_risk_control, examples_needed


def by_fractions(tenths: np.ndarray, alpha: Fraction, high: int) -> int | None:
    """The definition, setting by setting, for losses in tenths."""
    n, m = tenths.shape
    best = None
    for j in range(m):
        total = sum(Fraction(max(int(tenths[i, k]) for k in range(j + 1)), 10) for i in range(n))
        if total + high <= alpha * (n + 1):
            best = j
    return best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_equals_the_definition_in_exact_fractions(data: st.DataObject) -> None:
    low = data.draw(st.sampled_from([0, -10]))
    n, m = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tenths = np.sort(rng.choice([low, 0, 0, 0, 1, 2, 10], (n, m)), axis=data.draw(st.sampled_from([0, 1])))
    alpha = Fraction(data.draw(st.integers(1, 9)), 10)
    found = conformal_risk_control(tenths / 10, float(alpha), low / 10, 1.0)
    assert found.index == by_fractions(tenths, alpha, 1)
    assert (np.diff(found.corrected) >= 0).all()


@pytest.mark.parametrize("n, k", [(9, 0), (19, 1), (29, 2), (69, 6), (699, 69)])
def test_equality_is_feasible_though_floats_miss_it(n: int, k: int) -> None:
    table = np.zeros((n, 2))
    table[:k, 1] = 1
    assert conformal_risk_control(table, 0.1, 0.0, 1.0).index == 1  # k + 1 = 0.1 (n + 1)
    table[k, 1] = 1e-6
    assert conformal_risk_control(table, 0.1, 0.0, 1.0).index == 0


def test_a_setting_answers_for_all_safer_ones() -> None:
    """The supremum runs over safer settings: a bump in setting 1 stays with 2; one in 2 does not reach back to 1."""
    bump = np.zeros((9, 3))
    bump[:, 1] = 1
    assert conformal_risk_control(bump, 0.2, 0.0, 1.0).index == 0
    late = np.zeros((9, 3))
    late[:, 2] = 1
    assert conformal_risk_control(late, 0.2, 0.0, 1.0).index == 1
    assert conformal_risk_control(bump, 0.2, 0.0, 1.0).corrected.tolist() == [0.1, 1.0, 1.0]


def test_none_and_all_feasible() -> None:
    assert conformal_risk_control(np.ones((50, 3)), 0.2, 0.0, 1.0).index is None
    assert conformal_risk_control(np.zeros((8, 3)), 0.1, 0.0, 1.0).index is None  # 1 / 9 > 0.1
    assert conformal_risk_control(np.zeros((9, 3)), 0.1, 0.0, 1.0).index == 2
    assert conformal_risk_control(np.zeros((0, 3)), 0.1, 0.0, 1.0).index is None


@pytest.mark.parametrize("n, alpha", [(19, 0.1), (50, 0.1), (99, 0.05), (137, 0.2)])
def test_miscoverage_gives_the_split_conformal_quantile(n: int, alpha: float) -> None:
    scores = np.random.default_rng(n).normal(size=n)
    thresholds = np.sort(scores)[::-1]
    found = conformal_risk_control(scores[:, None] > thresholds, alpha, 0.0, 1.0)
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    assert found.index is not None
    assert thresholds[found.index] == np.sort(scores)[rank - 1]


def test_equals_mapie_where_both_apply() -> None:
    rng = np.random.default_rng(1)
    for n in (30, 200):
        table = np.sort(rng.beta(1, 6, (n, 12)), axis=1)
        lambdas = np.arange(12)
        _, theirs = get_r_hat_plus(table, lambdas, "crc", None, None, None)
        for alpha in (0.1, 0.15, 0.3):
            ours = conformal_risk_control(table, alpha, 0.0, 1.0)
            assert ours.corrected == pytest.approx(theirs, rel=1e-12)
            assert ours.index == find_best_predict_param(lambdas, theirs, np.array([alpha]))[0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_the_law_holds_exactly_over_every_choice_of_the_test_item(data: st.DataObject) -> None:
    """For any n + 1 rows, each in turn left out as the next example: the mean of its loss is at most alpha.

    That is the theorem with the expectation over an exchangeable sample written out. The first setting is one whose
    loss is 0, which is used where nothing is feasible.
    """
    n, m = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rate = data.draw(st.floats(0, 0.6))
    rows = np.hstack([np.zeros((n + 1, 1)), rng.uniform(0, 1, (n + 1, m)) * (rng.random((n + 1, m)) < rate)])
    if data.draw(st.booleans()):
        rows = np.ceil(rows)
    alpha = data.draw(st.sampled_from([0.05, 0.1, 0.25, 0.5]))
    realised = []
    for i in range(n + 1):
        found = conformal_risk_control(np.delete(rows, i, axis=0), alpha, 0.0, 1.0)
        realised.append(rows[i, found.index or 0])
    assert np.mean(realised) <= alpha + 1e-12


def test_examples_needed_is_the_first_that_is_feasible() -> None:
    """n r + 1 <= a (n + 1) exactly when n >= (1 - a) / (a - r): every alpha and mean in hundredths."""
    for a in range(1, 40):
        for r in range(a):
            exact = math.ceil(Fraction(100 - a, a - r))
            assert examples_needed(a / 100, mean=r / 100) == exact, (a, r)
            if exact < 500 and r == 0:
                assert conformal_risk_control(np.zeros((exact, 1)), a / 100, 0.0, 1.0).index == 0
                assert conformal_risk_control(np.zeros((exact - 1, 1)), a / 100, 0.0, 1.0).index is None


def test_what_is_refused() -> None:
    with pytest.raises(InvalidInput, match="row 1 has a loss of 2 in setting 0"):
        conformal_risk_control([[0.0], [2.0]], 0.1, 0.0, 1.0)
    with pytest.raises(InvalidInput, match="row 0 has a loss of nan"):
        conformal_risk_control([[math.nan]], 0.1, 0.0, 1.0)
    for shape in ((3,), (3, 0)):
        with pytest.raises(InvalidInput, match="groups, settings"):
            conformal_risk_control(np.zeros(shape), 0.1, 0.0, 1.0)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidInput, match="alpha"):
            conformal_risk_control([[0.0]], alpha, 0.0, 1.0)
    with pytest.raises(InvalidInput, match="no number of examples"):
        examples_needed(0.1, mean=0.1)
