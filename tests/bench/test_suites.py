"""The built-in suites: their plans are read, can be told apart, and fit their tasks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from thrifty import InvalidInput, registry
from thrifty.bench.study import Item, item_of, study, study_from
from thrifty.bench.suites import SUITES, find, names
from thrifty.engines.scripted import ScriptedEngine


@pytest.mark.parametrize("name", SUITES)
def test_plans_are_valid_and_distinct_and_begin_with_the_engine_alone(name: str) -> None:
    plans = SUITES[name].plans()
    assert plans[0].name == "plain" and plans[0].methods == ()
    assert len({p.hash for p in plans}) == len({p.name for p in plans}) == len(plans) >= 6
    assert any(len(p.methods) == 2 for p in plans), "one stack"
    for plan in plans:
        assert all(m.name in registry.names() for m in plan.methods)


def test_arithmetic_asks_for_at_most_96_new_tokens() -> None:
    assert all(task.max_tokens is not None and task.max_tokens <= 96 for task in SUITES["arithmetic"].make(8))


def test_names_are_refused_with_the_nearest() -> None:
    assert [s.name for s in find("demo")] == ["retrieval", "arithmetic"]
    assert set(names()) == {"retrieval", "arithmetic", "thinker", "demo"}
    with pytest.raises(InvalidInput, match="unknown suite 'retrival': did you mean 'retrieval'"):
        find("retrival")


def reader() -> ScriptedEngine:
    """Finds the sentence that begins as the answer should, as a model that reads would."""

    def say(call: Any, draw: Any) -> str:
        text = "\n".join(str(m["content"]) for m in call.messages)
        found = re.search(re.escape(call.prefix or "?") + r" (\w+)", text) if call.prefix else None
        return f"{found[1]}." if found else "It is 7"

    return ScriptedEngine(say)


def test_the_whole_job_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = reader()
    engines = {"answer": engine, "embedder": engine}
    items = [item_of(suite, engines, n=6) for suite in find("demo")]
    done = study(items, engines, tmp_path, axis="tokens", command="thrifty frontier demo", console=Console(width=170))
    assert done.complete and [f.suite for f in done.frontiers] == ["retrieval", "arithmetic"]
    for path in (done.results, done.picture, done.page):
        assert path is not None and path.stat().st_size > 1000
    plain = done.frontiers[0].reference
    assert plain.score.value > 0.5
    shown = capsys.readouterr().out
    assert "truncation-400" in shown and "could have shown" in shown

    engine.calls.clear()
    again = study(items, engines, tmp_path, axis="tokens", console=Console(width=170))
    assert engine.calls == []
    assert [o.resumed for o in again.outcomes] == [36, 36]
    assert "retrieval: resumed 36 of 36" in capsys.readouterr().err
    assert [f.to_dict() for f in again.frontiers] == [f.to_dict() for f in done.frontiers]
    assert [f.to_dict() for f in study_from(tmp_path / "results.jsonl", axis="tokens").frontiers] == [
        f.to_dict() for f in done.frontiers
    ]


def test_lengths_are_in_the_engines_own_tokens() -> None:
    engine = reader()
    (task, *_) = item_of(SUITES["retrieval"], {"answer": engine}, n=1).tasks
    words = len(engine.words.split("\n\n".join(task.context)))
    assert 300 < words <= 500


def test_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no suite"):
        study([], {"answer": reader()}, tmp_path)
    item = Item("sums", SUITES["arithmetic"].plans(), SUITES["arithmetic"].make(1), axis="tokns")
    with pytest.raises(InvalidInput, match="unknown axis 'tokns': did you mean 'tokens'"):
        study([item], {"answer": reader()}, tmp_path)
