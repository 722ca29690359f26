"""Overthinking scores against hand-computed tables and a brute-force definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import InvalidInput
from thrifty.meter.overthinking import Run, Score, difficulty, envelope, global_overthinking, least

# two models, three questions, two samples each; nobody solves "hard"
TABLE = [
    Run("easy", "a", 10, True),
    Run("easy", "a", 30, True),
    Run("easy", "b", 100, True),
    Run("easy", "b", 200, False),
    Run("mid", "a", 50, False),
    Run("mid", "a", 70, True),
    Run("mid", "b", 60, True),
    Run("mid", "b", 60, True),
    Run("hard", "a", 500, False),
    Run("hard", "a", 900, False),
    Run("hard", "b", 400, False),
    Run("hard", "b", 400, False),
]


def test_a_table_by_hand() -> None:
    assert difficulty(TABLE) == {"easy": 0.25, "mid": 0.25, "hard": 1.0}
    assert least(TABLE) == {"easy": 10, "mid": 60, "hard": None}
    # a: easy 20 - 10, mid 60 - 60; b: easy 150 - 10, mid 60 - 60
    assert global_overthinking(TABLE) == {"a": Score(5.0, 2, 1), "b": Score(70.0, 2, 1)}
    # a: 20, 20, 400; b: 100, 0, 0
    assert envelope(TABLE) == {"a": Score(440 / 3, 3), "b": Score(100 / 3, 3)}
    # of correct runs: a: 20, 0; b: 0, 0
    assert envelope(TABLE, correct_only=True) == {"a": Score(10.0, 2, 1), "b": Score(0.0, 2, 1)}


RUNS = st.lists(
    st.builds(Run, st.sampled_from("qrs"), st.sampled_from("ab"), st.integers(0, 50), st.booleans()), max_size=20
)


@given(RUNS)
def test_brute_force(runs: list[Run]) -> None:
    scores = global_overthinking(runs)
    for model, score in scores.items():
        gaps = []
        for q in {r.question for r in runs if r.model == model}:
            right = [r.tokens for r in runs if r.question == q and r.correct]
            mine = [r.tokens for r in runs if r.question == q and r.model == model]
            if right:
                gaps.append(sum(mine) / len(mine) - min(right))
        assert score.questions == len(gaps)
        assert score.tokens == pytest.approx(sum(gaps) / len(gaps) if gaps else 0.0)


@given(RUNS)
def test_deterministic_runs_have_no_envelope(runs: list[Run]) -> None:
    same = [Run(r.question, r.model, ord(r.question) % 50 + ord(r.model), r.correct) for r in runs]
    assert all(score.tokens == 0 for score in envelope(same).values())


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at least 0"):
        difficulty([Run("q", "a", -1, True)])
