"""Item response theory against dense linear algebra, numeric integrals and simulated plans."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import approx_fprime, minimize
from scipy.special import expit

from thrifty import InvalidInput
from thrifty.tune.irt import AdaptiveTest, Items, Posterior, fit, gains, mean_costs, predict, rank_one


def simulated(seed: int, plans: int, items: int, dimensions: int = 2) -> tuple[Items, np.ndarray, np.ndarray]:
    """True items, abilities [M, D] and 0/1 responses [M, J]."""
    rng = np.random.default_rng(seed)
    strength = rng.lognormal(0.0, 0.7, size=(items, 1))
    direction = np.abs(rng.normal(size=(items, dimensions)))
    a = strength * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    d = rng.normal(0.0, 1.0, size=items)
    theta = rng.normal(size=(plans, dimensions))
    y = (rng.random((plans, items)) < expit(theta @ a.T + d)).astype(float)
    return Items(a, d), theta, y


# -- the posterior -------------------------------------------------------------------------------------------


def test_a_hundred_rank_one_updates_equal_the_dense_inverse() -> None:
    rng = np.random.default_rng(0)
    cov, precision = np.eye(6), np.eye(6)
    for _ in range(100):
        a, w = rng.normal(size=6), rng.random() / 4
        cov, precision = rank_one(cov, a, w), precision + w * np.outer(a, a)
        assert np.abs(cov - np.linalg.inv(precision)).max() < 1e-8


@pytest.mark.parametrize("y", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("strength", [0.01, 1.0, 40.0])
def test_an_update_is_the_mode_that_a_general_optimiser_finds_and_its_curvature(y: float, strength: float) -> None:
    rng = np.random.default_rng(3)
    root = rng.normal(size=(3, 3))
    before = Posterior(rng.normal(size=3), root @ root.T + np.eye(3))
    a, d = strength * rng.normal(size=3), 0.4
    inverse = np.linalg.inv(before.cov)

    def minus_log(theta: np.ndarray) -> float:
        z, gap = float(a @ theta) + d, theta - before.mean
        return float(np.logaddexp(0, z) - y * z + gap @ inverse @ gap / 2)

    found = minimize(
        minus_log, before.mean, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13, "maxfev": 9999}
    )
    after = before.update(a, d, y)
    assert minus_log(after.mean) <= found.fun + 1e-9
    assert np.abs(approx_fprime(after.mean, minus_log, 1e-7)).max() < 1e-3 * max(1.0, strength)
    p = float(expit(a @ after.mean + d))
    dense = np.linalg.inv(inverse + p * (1 - p) * np.outer(a, a))
    assert np.abs(after.cov - dense).max() < 1e-8


def test_gains_are_the_growth_of_the_log_determinant() -> None:
    items, theta, _ = simulated(1, 1, 12, 3)
    posterior = Posterior(theta[0], np.diag([0.5, 1.0, 2.0]))
    p = items.chance(posterior.mean)
    for j, gain in enumerate(gains(items, posterior)):
        after = np.linalg.inv(posterior.cov) + p[j] * (1 - p[j]) * np.outer(items.a[j], items.a[j])
        assert gain == pytest.approx(np.linalg.slogdet(after)[1] + np.linalg.slogdet(posterior.cov)[1], abs=1e-10)


def test_the_probit_correction_is_near_the_integral() -> None:
    items = Items(np.array([[1.3], [0.4], [2.0]]), np.array([0.2, -1.0, 1.5]))
    posterior = Posterior(np.array([0.5]), np.array([[0.8]]))
    density = lambda t: math.exp(-((t - 0.5) ** 2) / 1.6) / math.sqrt(1.6 * math.pi)  # noqa: E731
    exact = np.mean(
        [quad(lambda t, j=j: expit(items.a[j, 0] * t + items.d[j]) * density(t), -8, 9)[0] for j in range(3)]
    )
    assert predict(items, posterior).mean == pytest.approx(exact, abs=0.01)
    seen = predict(items, posterior, [1.0, math.nan, 0.0])
    assert seen.mean == pytest.approx((1.0 + predict(Items(items.a[1:2], items.d[1:2]), posterior).mean) / 3)
    assert seen.sd < predict(items, posterior).sd
    assert predict(items, posterior, [1.0, 0.0, 0.0]).sd == 0.0


# -- the fit -------------------------------------------------------------------------------------------------


def test_a_fit_recovers_the_chances_and_ranks_the_plans() -> None:
    items, theta, y = simulated(5, 80, 120)
    rng = np.random.default_rng(1)
    holes = np.where(rng.random(y.shape) < 0.3, math.nan, y)
    found = fit(holes, 2)
    assert found.converged
    true, got = expit(theta @ items.a.T + items.d), expit(found.theta @ found.items.a.T + found.items.d)
    hidden = np.isnan(holes)
    base = np.nanmean(holes, axis=0)
    # On responses that it has not seen it is nearer to the truth than the examples' means are.
    assert np.abs(got - true)[hidden].mean() < 0.75 * np.abs(base - true)[hidden].mean()
    assert np.corrcoef(got.mean(axis=1), true.mean(axis=1))[0, 1] > 0.95


def test_a_fit_is_a_stationary_point_of_the_stated_objective() -> None:
    _, _, y = simulated(2, 10, 8, 1)
    y[0, 3] = math.nan
    found = fit(y, 1, spread=1.5, easiness_spread=2.5)

    def objective(a: np.ndarray, d: np.ndarray, theta: np.ndarray) -> float:
        total = 0.0
        for i in range(10):
            for j in range(8):
                if not math.isnan(y[i, j]):
                    p = 1 / (1 + math.exp(-(float(a[j] @ theta[i]) + d[j])))
                    total -= y[i, j] * math.log(p) + (1 - y[i, j]) * math.log(1 - p)
        return total + (theta**2).sum() / 2 + (a**2).sum() / (2 * 1.5**2) + (d**2).sum() / (2 * 2.5**2)

    best = objective(found.items.a, found.items.d, found.theta)
    assert best == pytest.approx(found.loss)
    rng = np.random.default_rng(0)
    for _ in range(40):
        moved = [x + 0.01 * rng.normal(size=x.shape) for x in (found.items.a, found.items.d, found.theta)]
        assert objective(*moved) > best - 1e-6


def test_fractions_are_fitted_as_means() -> None:
    y = np.tile([[0.2, 0.5, 0.9]], (30, 1))
    found = fit(y, 1, easiness_spread=100)
    assert expit(found.items.d) == pytest.approx([0.2, 0.5, 0.9], abs=0.01)


@pytest.mark.parametrize(
    ("responses", "words"),
    [([], "table"), ([[1.5, 0.0]], r"\[0, 1\]"), ([[math.nan, math.nan], [1, 0]], "plan 0 has no response")],
)
def test_what_cannot_be_fitted_is_refused(responses: list[list[float]], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        fit(responses)


# -- choosing ------------------------------------------------------------------------------------------------


def errors(items: Items, y: np.ndarray, goal: np.ndarray, pick: str, most: int, seed: int = 0) -> np.ndarray:
    """|predicted - true mean score| of each plan after 1..most examples, [plans, most]."""
    rng = np.random.default_rng(seed)
    rows = []
    for answers, true in zip(y, goal, strict=True):
        test = AdaptiveTest(items, most=most)
        order = rng.permutation(len(items))
        row = []
        for n in range(most):
            j = test.next()[0] if pick == "adaptive" else int(order[n])
            test.record(j, answers[j])
            row.append(abs(predict(items, test.posterior).mean - true))
        rows.append(row)
    return np.array(rows)


def needed(table: np.ndarray, tolerance: float) -> int:
    """Examples until the mean absolute error over the plans is within the tolerance."""
    within = table.mean(axis=0) <= tolerance
    return int(np.argmax(within)) + 1 if within.any() else len(within) + 1


def test_d_optimal_choice_needs_fewer_examples_than_chance_does() -> None:
    """Twenty simulated worlds: items fitted on 60 plans, tested on 20 others; the median is compared."""
    adaptive, random = [], []
    for seed in range(20):
        items, theta, y = simulated(seed, 80, 150)
        known = fit(y[:60], 2, iterations=200).items
        goal = expit(theta[60:] @ items.a.T + items.d).mean(axis=1)
        adaptive.append(needed(errors(known, y[60:], goal, "adaptive", 40), 0.06))
        random.append(needed(errors(known, y[60:], goal, "random", 40, seed), 0.06))
    assert np.median(adaptive) <= 0.6 * np.median(random), (adaptive, random)


def test_counting_cost_reaches_the_same_error_for_less() -> None:
    paid: dict[float, list[float]] = {0.0: [], 1.0: []}
    for seed in range(20):
        items, theta, y = simulated(100 + seed, 80, 150)
        known = fit(y[:60], 2, iterations=200).items
        costs = np.random.default_rng(seed).lognormal(5.0, 1.0, size=150)  # independent of what an example tells
        goal = expit(theta[60:] @ items.a.T + items.d).mean(axis=1)
        for gamma, totals in paid.items():
            tests = [AdaptiveTest(known, costs, gamma, most=60) for _ in goal]
            total = 0.0
            while np.mean([abs(predict(known, t.posterior).mean - g) for t, g in zip(tests, goal, strict=True)]) > 0.06:
                for test, answers in zip(tests, y[60:], strict=True):
                    (j,) = test.next()
                    test.record(j, answers[j])
                    total += costs[j]
            totals.append(total)
    assert np.median(paid[1.0]) < 0.7 * np.median(paid[0.0])


def test_it_stops_at_each_of_its_limits() -> None:
    items, _, _ = simulated(0, 1, 30)
    costs = np.full(30, 10.0)
    assert len(AdaptiveTest(items, most=5).next(9)) == 5
    assert len(AdaptiveTest(items, costs, most_cost=35.0, most=30).next(9)) == 3
    assert AdaptiveTest(items, trace=2.0).next() == []
    test = AdaptiveTest(items, most=30)
    chosen = test.next(30)
    assert sorted(chosen) == list(range(30)), "never one twice"
    assert chosen[0] == int(np.argmax(gains(items, Posterior.prior(2))))
    test.record(chosen[0], 1.0)
    with pytest.raises(InvalidInput, match="already"):
        test.record(chosen[0], 1.0)
    with pytest.raises(InvalidInput, match=r"\[0, 1\]"):
        test.record(chosen[1], 2.0)


def test_equal_examples_go_by_index() -> None:
    items = Items(np.ones((4, 1)), np.zeros(4))
    assert AdaptiveTest(items, most=3).next(3) == [0, 1, 2]


def test_costs_come_from_who_was_asked() -> None:
    table = [[10.0, math.nan, math.nan], [30.0, 0.0, math.nan]]
    assert mean_costs(table).tolist() == [20.0, 1.0, 10.0]
