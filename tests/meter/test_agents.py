"""Agent statistics: planted shares and ratios are found again; scipy and hand computation are the oracles."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter import agents
from thrifty.meter.agent_report import report
from thrifty.meter.agents import Run, cost_accuracy, decompose, foresight, interior_peak, pearson, spearman, variability
from thrifty.meter.prices import PriceTable, Rate
from thrifty.meter.usage_log import CallRecord
from thrifty.spend import Spend


def agent(turns: int, prompt: int = 100, answer: int = 20, seen: int = 80) -> tuple[Spend, ...]:
    """A scripted agent that sends its whole history each turn, to which a turn adds an answer and what a tool said."""
    step = answer + seen
    return tuple(Spend(input=prompt + step * t, output=answer, calls=1) for t in range(turns))


def test_a_history_that_is_sent_again_grows_with_the_square() -> None:
    found = decompose([Run("t", "1", "m", agent(50))])
    assert found.total.input == 50 * 100 + 100 * 50 * 49 // 2  # n p + s n (n - 1) / 2
    again = sum(100 + 100 * t + 20 for t in range(49))
    assert found.resent == pytest.approx(again / found.total.input)
    double = decompose([Run("t", "1", "m", agent(100))]).total.input
    assert 3.9 < double / found.total.input < 4
    assert found.input_to_output == pytest.approx(found.total.input / (50 * 20))


def test_runs_add_up_to_the_bill() -> None:
    records = [
        CallRecord("t", "1", "m", Spend(input=10, cached=4, output=2, calls=1), tools=("grep",)),
        CallRecord("u", "1", "m", Spend(input=7, output=1, calls=1), success=False),
        CallRecord(
            "t",
            "1",
            "m",
            Spend(input=20, cached=9, output=3, reasoning=1, calls=1),
            tools=("edit", "grep"),
            success=True,
        ),
    ]
    found = agents.runs(records)
    assert [(r.task, len(r.turns), r.tokens, r.success, r.tools) for r in found] == [
        ("t", 2, 35, True, ("grep", "edit", "grep")),
        ("u", 1, 8, False, ()),
    ]
    parts = decompose(found)
    assert parts.total == sum((r.spend for r in records), Spend())
    assert (parts.fresh, parts.tools) == (37 - 13, {"grep": 2, "edit": 1})


def test_variance_shares_are_those_that_were_planted() -> None:
    draw = random.Random(0)
    tasks = {}
    for task in range(600):
        mean = 10_000 + draw.gauss(0, 1_000)  # variance 1e6 between tasks, 3e6 within
        tasks[str(task)] = [mean + draw.gauss(0, math.sqrt(3) * 1_000) for _ in range(4)]
    found = variability(tasks)
    assert found.between == pytest.approx(0.25, abs=0.04) and found.within == pytest.approx(0.75, abs=0.04)
    assert found.between + found.within == pytest.approx(1)


def test_variability_by_hand() -> None:
    found = variability({"a": [10, 30], "b": [100, 100], "alone": [7]})
    # means 20 and 100; inside 200 / 2, outside 2 x 40^2 x 2 / 1; component (6400 - 100) / 2
    assert (found.tasks, found.runs, found.max_ratio, found.median_ratio) == (2, 4, 3.0, 2.0)
    assert found.between == pytest.approx(3150 / 3250)
    assert found.median_cv == pytest.approx(math.sqrt(200) / 20 / 2)
    with pytest.raises(InvalidInput, match="two are needed"):
        variability({"a": [1, 2], "b": [3]})
    with pytest.raises(InvalidInput, match="above 0"):
        variability({"a": [1, 0], "b": [3, 4]})


def test_success_by_cost() -> None:
    tokens = [5, 1, 4, 2, 3, 6, 7]
    success = [t in (3, 4, 5) for t in tokens]
    bins = cost_accuracy(tokens, success, 3)
    assert [(b.low, b.high, b.runs, b.success) for b in bins] == [(1, 2, 2, 0.0), (3, 4, 2, 1.0), (5, 7, 3, 1 / 3)]
    assert interior_peak(bins)
    assert not interior_peak(cost_accuracy([1, 2, 3], [False, True, True], 3))
    with pytest.raises(InvalidInput):
        cost_accuracy([1], [True], 2)


NUMBERS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=40)


@settings(deadline=None)
@given(NUMBERS)
def test_correlations_are_scipys(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert pearson(x, y) is None and spearman(x, y) is None
        return
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def test_foresight_by_hand() -> None:
    found = foresight([50, 100, 400], [100, 100, 100 * 2])
    assert (found.ratio, found.under) == (1.0, 1 / 3)
    assert found.factor == pytest.approx(4 ** (1 / 3))  # halved, right, doubled
    assert foresight([2, 4, 8], [10, 20, 40]).log_pearson == pytest.approx(1)
    with pytest.raises(InvalidInput, match="above 0"):
        foresight([0, 1], [1, 1])


def test_baselines_never_see_the_run_they_predict() -> None:
    assert agents.median_baseline([1, 2, 30]) == [16, 15.5, 1.5]
    power = [(x, 3 * x**2) for x in (1, 2, 4, 8, 16)]  # a straight line on logarithms
    found = agents.length_baseline([x for x, _ in power], [y for _, y in power])
    assert found == pytest.approx([y for _, y in power])
    wrong = agents.length_baseline([1, 2, 4, 8], [3, 12, 48, 1])
    assert wrong[3] == pytest.approx(3 * 8**2)  # its own outcome is not in its line
    assert agents.length_baseline([5, 5, 5], [1, 4, 16]) == pytest.approx([8, 4, 2])


def test_models_are_compared_in_pairs() -> None:
    first = {str(t): 1000.0 * t + 50 for t in range(30)}
    second = {str(t): 1000.0 * t for t in range(10, 40)}
    gap = agents.model_gap(first, second)
    assert (gap.tasks, gap.mean) == (20, 50) and gap.low <= 50 <= gap.high and gap.high - gap.low < 1
    with pytest.raises(InvalidInput, match="two are needed"):
        agents.model_gap(first, {"0": 1.0})


def test_a_report_of_everything() -> None:
    draw = random.Random(1)
    records = []
    for task in range(12):
        for run in range(3):
            for model in ("big", "small"):
                turns = agent(draw.randint(2, 6) + task, answer=40 if model == "big" else 20)
                told = {"success": bool(draw.random() < 0.5), "difficulty": float(task), "predicted": 900.0 + task}
                records += [CallRecord(str(task), str(run), model, spend, **told) for spend in turns]  # type: ignore[arg-type]
    table = PriceTable("t", "2026-11-25", {m: Rate.per_million(1, 4) for m in ("big", "small")})
    found = report(records, 4, table)
    assert not found.missing
    assert found.decomposition.total == sum((r.spend for r in records), Spend())
    assert found.usd is not None and sum(found.usd.values()) == table.price(found.decomposition.total, "big")
    assert set(found.variability) == set(found.bins) == {"big", "small"}
    assert found.gaps["big against small"].low > 0  # it answers at twice the length
    assert found.difficulty is not None and found.difficulty > 0.8  # harder tasks were given more turns
    assert set(found.foresight) == {
        "the agents' predictions",
        "the median of the other runs",
        "a line on the first prompt",
    }
    assert found.to_dict()["turns"] == len(records) and any("success by tokens" in line for line in found.lines())


def test_a_report_says_what_a_log_lacks() -> None:
    found = report([CallRecord("t", "1", "m", Spend(input=5, output=1, calls=1))])
    assert len(found.missing) == 4 and not found.variability and not found.foresight
    with pytest.raises(InvalidInput, match="no runs"):
        report([])
    with pytest.raises(InvalidInput, match="--bins 0"):
        report([], 0)
