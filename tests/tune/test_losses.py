"""Losses by hand, by group, and everything that is refused, by the example's name."""

from __future__ import annotations

import math

import numpy as np
import pytest

from thrifty.errors import InvalidInput
from thrifty.tune.losses import KINDS, Losses, Scored, losses_of, range_of


def scored(*scores: float, answers: tuple[str | None, ...] | None = None) -> list[Scored]:
    """Examples a, b, c, ... each in a group of its own."""
    found = answers or tuple(None for _ in scores)
    return [Scored(chr(97 + i), chr(97 + i), s, a) for i, (s, a) in enumerate(zip(scores, found, strict=True))]


def test_the_three_losses_by_hand() -> None:
    plan = scored(1.0, 0.0, 0.25, answers=("4", "5", "6"))
    reference = scored(0.0, 1.0, 0.5, answers=("4", "7", None))
    assert losses_of("error", plan, reference).values.tolist() == [0.0, 1.0, 0.75]
    assert losses_of("drop", plan, reference).values.tolist() == [-1.0, 1.0, 0.25]
    assert losses_of("disagree", plan, reference).values.tolist() == [0.0, 1.0, 1.0]
    assert losses_of("drop", plan, reference).mean == 0.25 / 3


def test_ranges() -> None:
    assert [range_of(kind) for kind in KINDS] == [(0, 1), (-1, 1), (0, 1)]
    for kind in KINDS:
        losses = losses_of(kind, scored(1.0), scored(1.0))
        assert (losses.kind, losses.low, losses.high) == (kind, *range_of(kind))


def test_an_answer_that_was_not_found_agrees_with_nothing() -> None:
    both_missing = losses_of("disagree", scored(0.0, 1.0, answers=(None, "x")), scored(0.0, 1.0, answers=(None, "x")))
    assert both_missing.values.tolist() == [1.0, 0.0]


def test_a_group_counts_once_with_the_mean_of_its_examples() -> None:
    plan = [Scored("1", "z", 1.0), Scored("2", "a", 0.0), Scored("3", "z", 0.0), Scored("4", "z", 0.0)]
    reference = [Scored("4", "z", 1.0), Scored("3", "z", 1.0), Scored("2", "a", 0.5), Scored("1", "z", 1.0)]
    losses = losses_of("drop", plan, reference)
    assert losses.groups == ("a", "z")  # sorted, whatever the order of the results
    assert losses.values.tolist() == pytest.approx([0.5, 2 / 3], abs=1e-15)
    assert losses.n == 2
    assert losses.mean == pytest.approx((0.5 + 2 / 3) / 2)


def test_the_sum_is_exact() -> None:
    losses = Losses("error", np.array([0.1] * 10), 0.0, 1.0, tuple("abcdefghij"))
    assert losses.mean == 0.1  # sum([0.1] * 10) is 0.9999999999999999


def test_no_examples_are_no_losses() -> None:
    losses = losses_of("error", [], [])
    assert losses.n == 0 and math.isnan(losses.mean)


def test_losses_do_not_change_afterwards() -> None:
    values = np.zeros(2)
    losses = Losses("error", values, 0.0, 1.0, ("a", "b"))
    values[0] = 1.0
    assert losses.values.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="read-only"):
        losses.values[0] = 1.0


def test_error_needs_no_reference() -> None:
    assert losses_of("error", scored(0.5), []).values.tolist() == [0.5]


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.01, 1.01])
@pytest.mark.parametrize("side", ["plan", "reference"])
def test_a_score_out_of_range_is_refused_by_name(score: float, side: str) -> None:
    good, bad = scored(0.0, 1.0), scored(0.0, score)
    with pytest.raises(InvalidInput, match=f"example 'b' .* in the {side}"):
        losses_of("drop", *((bad, good) if side == "plan" else (good, bad)))


def test_missing_pairs_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"example 'b' \(and 1 more\) has a result of the plan and none of the ref"):
        losses_of("drop", scored(0, 0, 0), scored(0))
    with pytest.raises(InvalidInput, match="example 'b' has a result of the reference and none of the plan"):
        losses_of("disagree", scored(0), scored(0, 0))


def test_an_example_given_twice_or_in_two_groups_is_refused() -> None:
    with pytest.raises(InvalidInput, match="example 'a' occurs twice in the plan"):
        losses_of("error", scored(0) * 2, [])
    with pytest.raises(InvalidInput, match="example 'a' is in group 'g' .* 'a' in the reference"):
        losses_of("drop", [Scored("a", "g", 0.0)], scored(0))


def test_an_unknown_loss_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'drop'"):
        losses_of("drops", scored(0), scored(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[0.0, 1.5], [0.0, math.nan], [0.0, -0.1]])
def test_recorded_losses_out_of_range_are_refused_by_group(values: list[float]) -> None:
    with pytest.raises(InvalidInput, match="group 'b' has a loss of"):
        Losses("error", np.array(values), 0.0, 1.0, ("a", "b"))


@pytest.mark.parametrize("groups", [("b", "a"), ("a", "a"), ("a",)])
def test_recorded_groups_must_be_sorted_and_match(groups: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match="groups"):
        Losses("error", np.zeros(2), 0.0, 1.0, groups)
