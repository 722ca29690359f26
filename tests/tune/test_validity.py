"""Validity in simulation, on problems with known true losses; what is broken on purpose must turn it red.

The simulation is the benchmark's own (benchmarks/certify.py), so what is printed there is what is checked here.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from thrifty.tune.bounds import _Bets, p_value
from thrifty.tune.losses import Losses


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "certify.py"
    spec = importlib.util.spec_from_file_location("certify", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["certify"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


certify = load()
CASES = [("0/1", "clopper-pearson")] + [(s, b) for s in certify.SHAPES for b in ("hoeffding-bentkus", "betting")]


def test_true_losses_are_what_they_are_said_to_be() -> None:
    rng = np.random.default_rng(0)
    risks = np.array([0.03, 0.2, 0.11])
    for shape in certify.SHAPES:
        for related in (0.0, 0.95):
            losses = certify.sample(rng, shape, risks, 40_000, related, 0.07)
            assert losses.mean(axis=0) == pytest.approx(risks, abs=0.01)
            correlation = np.corrcoef(losses.T)[0, 1]
            assert (correlation > 0.2) == (related > 0.5)


def test_problems_are_not_monotone() -> None:
    rng = np.random.default_rng(1)
    problems = [certify.draw(rng, "0/1", False) for _ in range(200)]
    assert sum((np.diff(p.risks[p.order]) < 0).any() for p in problems) > 60
    assert all((np.diff(p.costs[p.order]) <= 0).all() for p in problems)


@pytest.mark.parametrize("shape, bound", CASES)
def test_learn_then_test_is_wrong_with_at_most_delta(shape: str, bound: str) -> None:
    row = certify.learn_then_test(functools.partial(p_value, bound), shape, bound, 300, 1)
    assert not row.red, row


@pytest.mark.parametrize("shape", certify.SHAPES)
@pytest.mark.parametrize("rising", [True, False])
def test_risk_control_keeps_the_mean_loss_below_alpha(shape: str, rising: bool) -> None:
    row = certify.risk_control(certify.controlled, shape, rising, "crc", 300, 1)
    assert not row.red, row


def best_of_twenty_orders(losses: Losses, alpha: float) -> float:
    """Betting in twenty orders, and the best one is reported."""
    rng = np.random.default_rng(0)
    return min(_Bets(rng.permutation(losses.values)).p(alpha) for _ in range(20))


def normal(losses: Losses, alpha: float) -> float:
    """The central limit theorem, with half of the standard error."""
    spread = max(float(losses.values.std()), 1e-9) / math.sqrt(losses.n)
    return 0.5 * math.erfc((alpha - losses.mean) / spread)


def all_of_them(p_values: Iterable[float], delta: float) -> int:
    """No stopping: every plan is tested at the full delta, and all up to the last one rejected are taken."""
    return max((i + 1 for i, p in enumerate(p_values) if p <= delta), default=0)


@pytest.mark.parametrize("bound", ["clopper-pearson", "hoeffding-bentkus", "betting"])
def test_a_bound_at_one_and_a_half_alpha_is_red(bound: str) -> None:
    def broken(losses: Losses, alpha: float) -> float:
        return p_value(bound, losses, 1.5 * alpha)  # type: ignore[arg-type]

    assert certify.learn_then_test(broken, "0/1", "broken", 300, 1).red


@pytest.mark.parametrize("broken", [best_of_twenty_orders, normal])
def test_a_bound_that_is_broken_is_red(broken: Any) -> None:
    assert certify.learn_then_test(broken, "0/1", "broken", 300, 1).red


def test_testing_all_plans_at_the_full_delta_is_red() -> None:
    test = functools.partial(p_value, "clopper-pearson")
    assert certify.learn_then_test(test, "0/1", "broken", 300, 1, sequence=all_of_them).red


def test_risk_control_without_its_correction_is_red() -> None:
    assert certify.risk_control(certify.uncorrected, "0/1", True, "broken", 600, 1).red


@pytest.mark.slow
def test_two_thousand_problems() -> None:
    """Validity, and what it costs: also that the simulation comes near to delta and alpha, so that it can see."""
    first, second = certify.rows(2000, 0)
    by_name = {(row.shape, row.bound): row for row in first}
    *sound, broken = first
    assert not any(row.red for row in sound) and broken.red
    for bound in ("clopper-pearson", "betting"):
        assert by_name["0/1", bound].edge_wrong / by_name["0/1", bound].edge_problems > 0.05
    for row in sound:
        assert row.cost_oracle < row.cost < row.cost_hoeffding
        if row.bound == "betting" and row.shape != "0/1":
            assert row.saved > by_name[row.shape, "hoeffding-bentkus"].saved
    assert by_name["0/1", "clopper-pearson"].saved > by_name["0/1", "hoeffding-bentkus"].saved
    *sound_crc, broken_crc = second
    assert not any(row.red for row in sound_crc) and broken_crc.red
    assert sound_crc[0].excess > -0.02  # 0/1, rising: nearly alpha
