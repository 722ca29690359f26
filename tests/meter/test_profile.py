"""Stage profiles against a hand-made example, and sums that must be whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter.prices import PriceTable, Rate
from thrifty.meter.profile import CHATDEV, capped, iterations, profile, repeated_input
from thrifty.meter.usage_log import CallRecord
from thrifty.spend import Spend


def call(
    task: str, phase: str, got: int, made: int, thought: int = 0, run: str = "1", turn: int | None = None
) -> CallRecord:
    spend = Spend(input=got, output=made, reasoning=thought, calls=1)
    return CallRecord(task, run, "m", spend, phase, iteration=turn)


# A small task and one ten times its size: design 20 of 100 and 100 of 1000, coding 30 and 100, review 50 and 800.
CALLS = [
    call("a", "DemandAnalysis", 15, 5, 2),
    call("a", "Coding", 20, 10, 10),
    call("a", "CodeReviewComment", 15, 5),
    call("a", "CodeReviewModification", 10, 20),
    call("b", "LanguageChoose", 60, 40),
    call("b", "Coding", 50, 50),
    call("b", "CodeReviewComment", 100, 20),
    call("b", "CodeReviewModification", 200, 80, 30),
    call("b", "CodeReviewComment", 150, 50),
    call("b", "CodeReviewModification", 150, 50),
]


def test_by_hand() -> None:
    found = profile(CALLS, CHATDEV)
    rows = {row.stage: row for row in found.stages}
    assert [row.stage for row in found.stages] == ["code review", "coding", "design"]
    assert rows["code review"].mean_share == pytest.approx((50 / 100 + 800 / 1000) / 2)
    assert rows["code review"].pooled_share == pytest.approx(850 / 1100)
    assert rows["design"].mean_share == pytest.approx((0.2 + 0.1) / 2)
    assert (rows["coding"].spend.output, rows["coding"].spend.reasoning, rows["coding"].visible) == (60, 10, 50)
    assert rows["code review"].rounds == 2 and rows["design"].rounds == 1
    assert rows["coding"].input_to_output == pytest.approx(70 / 60)
    assert (found.total.tokens, found.tasks, found.repeated) == (1100, 2, None)


def test_a_cap_saves_exactly_the_later_rounds() -> None:
    assert capped(CALLS, "code review", 1, CHATDEV) == (Spend(input=300, output=100, calls=2), 1)
    assert capped(CALLS, "code review", 2, CHATDEV) == (Spend(), 0)
    saved, runs = capped(CALLS, "code review", 0, CHATDEV)
    assert (saved.tokens, runs) == (850, 2)
    with pytest.raises(InvalidInput, match="did you mean 'code review'"):
        capped(CALLS, "code reviw", 1, CHATDEV)
    with pytest.raises(InvalidInput, match="from 0"):
        capped(CALLS, "coding", -1, CHATDEV)


def test_rounds_are_those_of_the_log_where_it_says_them() -> None:
    assert iterations([call("a", "x", 1, 1, turn=4), call("a", "x", 1, 1)]) == [4, 1]
    assert iterations([call("a", "x", 1, 1), call("a", "x", 1, 1, run="2"), call("a", "y", 1, 1)]) == [1, 1, 1]


def test_money() -> None:
    table = PriceTable("t", "2026-11-25", {"m": Rate.per_million(1, 4)})
    found = profile(CALLS, CHATDEV, table)
    assert found.total.usd == sum(row.spend.usd for row in found.stages) == 770 * 1000 + 330 * 4000


def test_repeats_are_by_run_and_by_characters() -> None:
    a, b, c = (b"a", 30), (b"b", 10), (b"c", 60)
    first = CallRecord("t", "1", "m", Spend(input=40, calls=1), messages=(a, b))
    second = CallRecord("t", "1", "m", Spend(input=200, calls=1), messages=(a, b, c))
    other = CallRecord("t", "2", "m", Spend(input=10, calls=1), messages=(a,))
    assert repeated_input([first, second, other]) == pytest.approx(200 * 40 / 100 / 250)
    assert profile([first, second]).repeated == pytest.approx(80 / 240)


PHASES = st.sampled_from(["", "Coding", "CodeReview", "CodeReviewComment", "other"])


@given(st.lists(st.builds(call, st.sampled_from("abc"), PHASES, st.integers(0, 99), st.integers(0, 99)), min_size=1))
def test_the_matrix_sums_to_the_bill(calls: list[CallRecord]) -> None:
    found = profile(calls, CHATDEV)
    assert sum((row.spend for row in found.stages), Spend()) == found.total == sum((c.spend for c in calls), Spend())
    if found.total.tokens:
        assert sum(row.mean_share for row in found.stages) == pytest.approx(1)
        assert sum(row.pooled_share for row in found.stages) == pytest.approx(1)
    for row in found.stages:
        assert capped(calls, row.stage, 0, CHATDEV)[0] == row.spend
        assert capped(calls, row.stage, row.rounds, CHATDEV)[0] == Spend()


def test_no_calls() -> None:
    with pytest.raises(InvalidInput, match="no calls"):
        profile([])
