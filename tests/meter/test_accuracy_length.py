"""Accuracy against length: a known slope under confounding, an optimiser as the oracle, tables by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from thrifty import InvalidInput
from thrifty.meter.accuracy_length import Run, accuracy_at_cap, bins, median_tokens, regress, wasted_tokens


def simulated(n: int, slope: float, seed: int, repeats: int = 1) -> list[Run]:
    """Harder tiers take longer and are missed more often; within a tier the logit falls by `slope` a 1,000 tokens."""
    rng = np.random.default_rng(seed)
    runs = []
    for i in range(n):
        tier = int(rng.integers(0, 4))
        for _ in range(repeats):
            tokens = int(rng.gamma(4, 300 + 700 * tier))
            logit = 3.0 - 1.6 * tier + slope * tokens / 1000
            runs.append(Run("m", f"q{i}", tokens, bool(rng.random() < 1 / (1 + np.exp(-logit))), str(tier), "d"))
    return runs


def test_the_controlled_slope_is_the_true_one_and_the_raw_one_is_not() -> None:
    found = regress(simulated(6000, -0.35, 1))["m"]
    assert found.slope == pytest.approx(-0.35, abs=0.06)
    assert found.low < -0.35 < found.high
    assert found.raw < -0.6  # what difficulty adds


def test_no_effect_is_found_where_there_is_none() -> None:
    covered = sum(s.low < 0 < s.high for s in (regress(simulated(400, 0.0, seed))["m"] for seed in range(40)))
    assert covered >= 34  # 38 expected


def test_clustered_intervals_are_wider_when_runs_of_a_question_repeat() -> None:
    runs = simulated(300, -0.3, 3)
    once, four = regress(runs)["m"], regress(runs * 4)["m"]
    assert four.slope == pytest.approx(once.slope, abs=1e-3)
    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.01)  # copies say nothing new


def test_the_estimate_is_the_optimisers_and_its_effect_the_difference_of_probabilities() -> None:
    runs = simulated(250, -0.5, 7)
    x = np.array([r.tokens / 1000 for r in runs])
    y = np.array([float(r.correct) for r in runs])
    tiers = np.array([[float(r.tier == t) for t in "123"] for r in runs])
    design = np.column_stack([x, np.ones(len(x)), tiers])

    def loss(b):  # type: ignore[no-untyped-def]
        eta = design @ b
        return np.logaddexp(0, eta).sum() - y @ eta + 0.5e-4 * (b[2:] @ b[2:])

    best = optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8}).x
    found = regress(runs)["m"]
    assert found.slope == pytest.approx(best[0], abs=1e-4)
    shift = np.zeros_like(design)
    shift[:, 0] = 1e-4
    p = [1 / (1 + np.exp(-((design + s) @ best))) for s in (-shift, shift)]
    assert found.effect == pytest.approx((p[1] - p[0]).mean() / 2e-4, abs=1e-4)
    assert found.effect_low < found.effect < found.effect_high


def test_capped_runs_are_left_out_and_counted() -> None:
    runs = simulated(300, -0.3, 5)
    cut = [Run("m", f"c{i}", 99_999, False, capped=True) for i in range(20)]
    found, plain = regress(runs + cut)["m"], regress(runs)["m"]
    assert found.slope == plain.slope and (found.runs, found.capped) == (300, 20)


def test_a_tier_that_is_never_solved_has_no_say() -> None:
    runs = simulated(400, -0.4, 2)
    more = runs + [Run("m", f"h{i}", 5000 + i, False, "impossible") for i in range(50)]
    assert regress(more)["m"].slope == pytest.approx(regress(runs)["m"].slope, abs=0.03)


def test_wasted_tokens_against_a_table_by_hand() -> None:
    low = [Run("l", "a", 100, True), Run("l", "b", 200, False), Run("l", "c", 300, False), Run("l", "d", 50, True)]
    high = [Run("h", "a", 160, True), Run("h", "b", 300, True), Run("h", "c", 900, False), Run("h", "d", 40, False)]
    found = wasted_tokens(low, [*high, Run("h", "e", 7, True)])
    assert found.questions == {"both": 1, "only_high": 1, "only_low": 1, "none": 1}
    assert found.extra == 60 + 100 + 600 and found.wasted == 60
    assert found.wasted_share == pytest.approx(60 / 760)
    assert found.ratio == {"both": 1.6, "only_high": 1.5, "only_low": 0.8, "none": 3.0}


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=30))
def test_accuracy_never_falls_as_the_cap_rises_and_bins_hold_every_run(rows: list[tuple[int, bool]]) -> None:
    runs = [Run("m", str(i), tokens, right) for i, (tokens, right) in enumerate(rows)]
    curve = [accuracy_at_cap(runs, cap) for cap in range(-1, 52)]
    assert curve == sorted(curve) and curve[0] == 0
    assert curve[-1] == sum(r.correct for r in runs) / len(runs)
    parts = bins(runs, 4)
    assert sum(b.runs for b in parts) == len(runs) and max(b.runs for b in parts) - min(b.runs for b in parts) <= 1
    assert sum(b.accuracy * b.runs for b in parts) == pytest.approx(sum(r.correct for r in runs))
    assert all(a.high <= b.low for a, b in zip(parts, parts[1:], strict=False))


def test_medians_and_bad_input() -> None:
    runs = [Run("m", "a", 1, True), Run("m", "b", 3, True), Run("m", "c", 9, False)]
    assert median_tokens(runs) == {("m", True): 2, ("m", False): 9}
    for bad in ([runs[0]], runs[:2] + runs[:2], [Run("m", str(i), 5, i > 1) for i in range(4)]):
        with pytest.raises(InvalidInput, match="model 'm'"):
            regress(bad)
    with pytest.raises(InvalidInput):
        regress(runs, confidence=1)
    with pytest.raises(InvalidInput):
        wasted_tokens(runs, [Run("h", "z", 1, True)])
    with pytest.raises(InvalidInput):
        wasted_tokens([runs[0], runs[0]], runs)
    for call in (lambda: accuracy_at_cap([], 1), lambda: bins([], 2), lambda: bins(runs, 0)):
        with pytest.raises(InvalidInput):
            call()
