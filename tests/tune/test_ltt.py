"""Fixed-sequence testing by hand and against MAPIE; the exact chance of any wrong certificate on a small problem."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control import control_fwer

from thrifty.errors import InvalidInput
from thrifty.tune.bounds import p_value
from thrifty.tune.losses import Losses
from thrifty.tune.ltt import fixed_sequence


def test_stops_at_the_first_that_is_not_rejected() -> None:
    assert fixed_sequence([0.05, 0.01, 0.06, 0.0], 0.05) == 2
    assert fixed_sequence([0.2, 0.0], 0.1) == 0
    assert fixed_sequence([0.0, 0.1], 0.1) == 2
    assert fixed_sequence([], 0.1) == 0


def test_plans_behind_the_first_failure_are_not_asked_for() -> None:
    asked = []

    def run() -> Iterator[float]:
        for plan, p in enumerate([0.01, 0.5, 0.01]):
            asked.append(plan)
            yield p

    assert fixed_sequence(run(), 0.1) == 1
    assert asked == [0, 1]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_equals_mapies_fixed_sequence(p_values: list[float], delta: float) -> None:
    theirs = control_fwer(np.array(p_values), delta, "fixed_sequence")
    assert theirs.tolist() == list(range(fixed_sequence(p_values, delta)))


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_what_is_no_p_value_is_refused(bad: float) -> None:
    with pytest.raises(InvalidInput, match="hypothesis 1 "):
        fixed_sequence([0.0, bad], 0.1)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_is_a_chance(delta: float) -> None:
    with pytest.raises(InvalidInput, match="delta"):
        fixed_sequence([0.0], delta)


@pytest.mark.parametrize("shared", [True, False])
def test_any_wrong_certificate_has_a_chance_of_at_most_delta_exactly(shared: bool) -> None:
    """Three plans of true loss 0.05, 0.4, 0.4 at alpha 0.3, on eight examples: every outcome of the plans' totals.

    Plans either fail on the same examples as far as they can, or independently.
    """
    n, alpha, delta, truth = 8, 0.3, 0.1, (0.05, 0.4, 0.4)
    groups = tuple(f"{i}" for i in range(n))
    p = [p_value("clopper-pearson", Losses("error", np.arange(n) < k, 0.0, 1.0, groups), alpha) for k in range(n + 1)]
    wrong = 0.0
    if shared:  # an example is failed by all, by the last two, or by none
        for all_fail, two_fail in itertools.product(range(n + 1), repeat=2):
            if (none := n - all_fail - two_fail) < 0:
                continue
            ways = math.comb(n, all_fail) * math.comb(n - all_fail, two_fail)
            chance = ways * 0.05**all_fail * 0.35**two_fail * 0.6**none
            wrong += chance * (fixed_sequence([p[all_fail], p[all_fail + two_fail], p[all_fail + two_fail]], delta) > 1)
    else:
        for totals in itertools.product(range(n + 1), repeat=3):
            chance = math.prod(math.comb(n, k) * t**k * (1 - t) ** (n - k) for k, t in zip(totals, truth, strict=True))
            wrong += chance * (fixed_sequence([p[k] for k in totals], delta) > 1)
    assert 0 < wrong <= delta
