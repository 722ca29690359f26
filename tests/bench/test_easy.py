"""The easy set: its answers are right, checked by another way than they were made."""

from __future__ import annotations

import re

import pytest

from thrifty import InvalidInput, Spend
from thrifty.bench.easy import KINDS, Overthinking, easy_set, overthinking
from thrifty.bench.store import Result
from thrifty.meter.overthinking import Score


def test_answers_are_right() -> None:
    tasks = easy_set(400, seed=3)
    for task in tasks:
        question, kind = str(task.messages[0]["content"]), task.extra["kind"]
        if kind == "math":
            a, sign, b = re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", question).groups()  # type: ignore[union-attr]
            assert int(task.gold) == {"plus": int(a) + int(b), "minus": int(a) - int(b)}[sign]
        if kind == "code":
            assert int(task.gold) == _run(question.partition("? ")[2])
        if kind == "task":
            words = question.replace(",", "").replace(".", "").split()
            assert all(word in words for word in str(task.gold).split())
            place = {"first": -3, "second": -2, "third": -1}.get(words[2])
            assert place is None or words[place] == task.gold
    assert len({str(t.messages[0]["content"]) for t in tasks}) == 400
    assert [t.extra["kind"] for t in tasks[:4]] == list(KINDS)


def _run(line: str) -> int:
    added = re.fullmatch(r"print\((\d+) \+ (\d+)\)", line)
    if added:
        return int(added[1]) + int(added[2])
    return len(re.fullmatch(r"print\(len\('(\w+)'\)\)", line)[1])  # type: ignore[index]


def test_same_seed_same_tasks_and_bad_sizes() -> None:
    assert easy_set(12, 1) == easy_set(12, 1) != easy_set(12, 2)
    for n in (0, 100_000):
        with pytest.raises(InvalidInput, match="n = "):
            easy_set(n)


def result(plan: str, question: str, tokens: int, score: float | None, sample: int = 0, suite: str = "easy") -> Result:
    return Result(
        f"{suite}/{plan}/{question}/{sample}",
        suite,
        plan,
        plan,
        (),
        "engine",
        question,
        question,
        score,
        sample=sample,
        spend=Spend(input=50, output=tokens),
    )


def test_overthinking_of_plans_is_told_from_their_results() -> None:
    """Worked by hand: the least right answers take 4 (q) and 10 (r); nobody is right about s, and one run failed."""
    results = [
        *(result("long", "q", 20, 1.0), result("long", "q", 30, 1.0, 1)),  # 25 - 4 = 21, spread 10
        result("short", "q", 4, 1.0),  # 0, spread 0
        *(result("long", "r", 10, 1.0), result("short", "r", 2, 0.0)),  # 0 and -8, spread 0 each
        *(result("long", "s", 9, 0.0), result("short", "s", 3, 0.5)),
        result("short", "t", 99, None),
    ]
    assert overthinking(results) == {
        "long": Overthinking(beyond=Score(10.5, 2, 1), spread=Score(10 / 3, 3)),
        "short": Overthinking(beyond=Score(-4.0, 2, 1), spread=Score(0.0, 3)),
    }


def test_overthinking_of_nothing_or_of_two_suites_is_refused() -> None:
    for given in ([], [result("a", "q", 1, 1.0), result("a", "q", 1, 1.0, suite="hard")]):
        with pytest.raises(InvalidInput, match="exactly one"):
            overthinking(given)
