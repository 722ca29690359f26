"""A study refuses tasks whose judge is missing before anything is spent; `unsafe` reaches the code scorer."""

from __future__ import annotations

from pathlib import Path

import pytest

from thrifty import Account, Answer, InvalidInput, Plan
from thrifty.bench.scoring import score
from thrifty.bench.study import Item, study
from thrifty.bench.task import Task
from thrifty.engines.scripted import ScriptedEngine

ASK = ({"role": "user", "content": "Is water wet?"},)


def test_a_judge_that_is_missing_is_told_before_anything_is_spent(tmp_path: Path) -> None:
    engine = ScriptedEngine("yes")
    item = Item("mine", [Plan("plain")], [Task(id="wet", messages=ASK, gold="yes", scorer="judge")])
    with pytest.raises(InvalidInput, match="'wet' is scored by a judge.*--judge"):
        study([item], {"answer": engine}, tmp_path / "out", progress=False)
    assert engine.calls == [] and not (tmp_path / "out").exists()


def test_a_judge_scores(tmp_path: Path) -> None:
    item = Item("mine", [Plan("plain")], [Task(id="wet", messages=ASK, gold="yes", scorer="judge")])
    engines = {"answer": ScriptedEngine("yes"), "judge": ScriptedEngine("10")}
    found = study([item], engines, tmp_path / "out", progress=False)
    assert found.frontiers[0].reference.score.value == 1.0


async def test_unsafe_reaches_the_scorers_that_run_code() -> None:
    task = Task(id="add", messages=ASK, gold="assert add(2, 3) == 5", scorer="code")
    answer = Answer("def add(a, b):\n    return a + b\n")
    assert await score(task, answer, {}, Account("t"), unsafe=True) == 1.0
    assert await score(task, Answer("def add(a, b):\n    return a * b\n"), {}, Account("t"), unsafe=True) == 0.0
