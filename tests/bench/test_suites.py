"""The built-in suites: their plans are read, can be told apart, and fit their tasks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from thrifty import InvalidInput, registry
from thrifty.bench.store import read
from thrifty.bench.study import Item, item_of, study, study_from
from thrifty.bench.suites import SUITES, find, names
from thrifty.bench.task import suite as tasks_of
from thrifty.engines.scripted import ScriptedEngine

THINKERS = ("thinker", "thinker-catalogue", "thinker-pairs")
WAITING = ("budget-guidance", "recursive-speculative-decoding")
"""Methods whose plans wait for what they need: a trained predictor, a draft model."""


@pytest.mark.parametrize("name", SUITES)
def test_plans_are_valid_and_distinct_and_begin_with_the_engine_alone(name: str) -> None:
    plans = SUITES[name].plans()
    assert plans[0].name == "plain" and plans[0].methods == ()
    assert len({p.hash for p in plans}) == len({p.name for p in plans}) == len(plans) >= 6
    assert name in ("thinker", "thinker-catalogue") or any(len(p.methods) == 2 for p in plans), "one stack"
    for plan in plans:
        assert all(m.name in registry.names() for m in plan.methods)


def on_the_thinker() -> set[str]:
    """Methods that a thinking model without passages, tools and images can show."""
    families = {name: registry.sources()[name].family for name in registry.names()}
    return {name for name, family in families.items() if family in ("decode", "search")} - set(WAITING)


@pytest.mark.parametrize(("suite", "settings"), [("thinker", 1), ("thinker-catalogue", 3)])
def test_every_method_that_applies_has_its_settings(suite: str, settings: int) -> None:
    used = [plan.methods[0].name for plan in SUITES[suite].plans()[1:]]
    assert all(len(plan.methods) == 1 for plan in SUITES[suite].plans()[1:])
    assert {name: used.count(name) for name in used} == dict.fromkeys(on_the_thinker() | {"no-thinking"}, settings)


def test_pairs_are_of_two_families_and_stand_beside_their_parts() -> None:
    plans = SUITES["thinker-pairs"].plans()
    pairs = [plan for plan in plans if len(plan.methods) == 2]
    singles = {plan.methods for plan in plans if len(plan.methods) == 1}
    assert len(pairs) >= 6
    for plan in pairs:
        assert len({method.family for method in plan.methods}) == 2
    assert singles == {(method,) for plan in pairs for method in plan.methods}, "their parts, and nothing else"


def test_one_name_is_one_plan_in_all_suites_whose_results_are_kept_together() -> None:
    hashes: dict[str, set[str]] = {}
    for suite in THINKERS:
        assert SUITES[suite].kept_as == "thinker"
        for plan in SUITES[suite].plans():
            hashes.setdefault(plan.name, set()).add(plan.hash)
    assert all(len(found) == 1 for found in hashes.values())
    assert len({h for found in hashes.values() for h in found}) == len(hashes)


def test_what_one_suite_measured_serves_another_that_stands_on_it(tmp_path: Path) -> None:
    engine = ScriptedEngine("Answer: 7")
    engines = {"answer": engine, "scorer": engine}
    for suite, resumed in (("thinker", 0), ("thinker-pairs", 8)):
        item = item_of(SUITES[suite], engines, n=4)
        assert item.axis == "output" and item.sampling.temperature == 1.0
        sampled = [p for p in item.plans if {m.name for m in p.methods} <= {"self-consistency"}]
        assert len(sampled) == 2
        done = study([replace(item, plans=sampled)], engines, tmp_path, progress=False)
        assert done.outcomes[0].resumed == resumed
    heads = read(tmp_path / "results.jsonl").heads
    assert [head["concurrency"] for head in heads] == [SUITES["thinker"].concurrency]


def test_a_study_keeps_as_many_in_flight_as_it_is_told(tmp_path: Path) -> None:
    item = item_of(SUITES["easy"], {"answer": reader()}, n=1)
    for told, kept in ((None, 8), (3, 3)):
        study([replace(item, plans=item.plans[:1])], {"answer": reader()}, tmp_path / str(told), concurrency=told)
        assert [h["concurrency"] for h in read(tmp_path / str(told) / "results.jsonl").heads] == [kept]


def test_the_easy_questions_are_a_suite() -> None:
    tasks = SUITES["easy"].make(8, 3)
    assert [t.messages for t in tasks] == [t.messages for t in tasks_of("easy", 8, 3)]
    assert {t.extra["kind"] for t in tasks} == {"math", "chat", "code", "task"}


def test_arithmetic_asks_for_at_most_96_new_tokens() -> None:
    assert all(task.max_tokens is not None and task.max_tokens <= 96 for task in SUITES["arithmetic"].make(8))


def test_names_are_refused_with_the_nearest() -> None:
    assert [s.name for s in find("demo")] == ["retrieval", "arithmetic"]
    assert set(names()) == {"retrieval", "arithmetic", "easy", *THINKERS, "demo"}
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
