"""The easy set: its answers are right, checked by another way than they were made."""

from __future__ import annotations

import re

import pytest

from thrifty import InvalidInput
from thrifty.bench.easy import KINDS, easy_set


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
