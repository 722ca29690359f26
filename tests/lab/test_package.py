"""The thinker as a packaged model: absent with a clear error, present once its folder is whole, and its bench suite."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from thinker_recipe import recipe

from thrifty import InvalidInput
from thrifty.bench import scorers
from thrifty.bench.task import Task, suite
from thrifty.engines.local import embedded, packaged
from thrifty.engines.spec import resolve
from thrifty.lab.suite import answer_of
from thrifty.lab.tasks import FAMILIES, make


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's place for the model, moved to an empty folder."""

    @dataclass(frozen=True)
    class Moved(packaged.PackagedModel):
        @property
        def folder(self) -> Path:
            return tmp_path / self.name

    moved = {name: Moved(m.name, m.kind, m.licence, m.about, m.recipe) for name, m in packaged.MODELS.items()}
    monkeypatch.setattr(packaged, "MODELS", moved)
    return tmp_path / "thinker"


def test_an_absent_model_says_how_to_make_it(folder: Path) -> None:
    for ask in (embedded.path, embedded.get, resolve):
        with pytest.raises(InvalidInput, match=r"recipes/thinker/train\.py"):
            ask("thinker")
    (row,) = [row for row in embedded.listing() if row.name == "thinker"]
    assert not row.present and row.size == 0


async def test_a_trained_model_ships_loads_and_shows_damage(folder: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    train, ship = recipe("train"), recipe("card").ship
    run = train.Run(tiny, tmp_path / "run", bf16=False)
    assert ship(run.export()) == folder
    assert embedded.path("thinker", verify=True) == folder
    (row,) = [row for row in embedded.listing() if row.name == "thinker"]
    assert row.present and row.size > 10_000
    engine = resolve("thinker", dtype="float32")
    assert engine.model == "thinker"
    await engine.aclose()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    embedded.path("thinker")  # sizes only
    with pytest.raises(InvalidInput, match="another SHA-256"):
        embedded.path("thinker", verify=True)
    weights.write_bytes(b"")
    with pytest.raises(InvalidInput, match="missing or cut"):
        embedded.path("thinker")


def test_names_are_refused_with_all_that_is_known() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'thinker'"):
        embedded.path("thinke")
    with pytest.raises(InvalidInput, match="no GGUF"):
        embedded.gguf_path("thinker")


async def test_the_suite_takes_families_in_turn_and_its_scorer_verifies() -> None:
    tasks = suite("thinker", 24, 5, settings={"difficulties": [2, 3]})
    assert tasks[:12] == suite("thinker", 12, 5, settings={"difficulties": [2, 3]})
    assert tasks != suite("thinker", 24, 6, settings={"difficulties": [2, 3]})
    assert [t.extra["family"] for t in tasks[:6]] == list(FAMILIES)
    assert {t.extra["difficulty"] for t in tasks} == {2, 3} and len({t.hash() for t in tasks}) == 24
    for task in tasks:
        again = Task.from_dict(json.loads(json.dumps(task.to_dict())))
        scorer = scorers.get(again.scorer, **again.scorer_settings)
        assert await scorer(f"Answer: {task.gold}", task.gold, again.to_dict()) == 1.0
        assert await scorer(f"**Final Answer:** {task.gold}.", task.gold, again.to_dict()) == 1.0
        assert await scorer("Answer: zz9", task.gold, again.to_dict()) == 0.0
    with pytest.raises(InvalidInput, match="did you mean 'paths'"):
        suite("thinker", 2, 0, settings={"families": ["path"]})
    with pytest.raises(InvalidInput, match="difficultie"):
        suite("thinker", 2, 0, settings={"difficulty": 3})


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Answer: 24", "24"), ("Final Answer: abc", "abc"), ("\\boxed{b}", "b"), ("first\n#### 7", "7"), ("010", "010")],
)
def test_answers_are_found_behind_every_cue(text: str, answer: str) -> None:
    assert answer_of(text) == answer


# --- gates and card, on outcomes that are made up ---


def seen(gates: Any, *, middle_direct: float, repaired: float, curve: bool = True) -> list[Any]:
    import random

    rows = []
    for name in FAMILIES:
        for difficulty in (1, 2, 3, 4, 5):
            for i in range(20):
                first = i >= 2 * difficulty
                last = first or (7 * i % 10) < 10 * repaired
                rows.append(
                    gates.Seen(
                        problem=make(name, random.Random(i), difficulty),
                        thinking=100,
                        finished=True,
                        first=first,
                        last=last,
                        direct=i < 20 * middle_direct,
                        greedy=True,
                        rechecks=2,
                        redundant=1,
                        at={b: last if b >= 96 else (curve and last and b >= 48) for b in gates.BUDGETS},
                    )
                )
    return rows


@pytest.mark.parametrize(
    ("given", "speed", "failed"),
    [
        ({"middle_direct": 0.2, "repaired": 0.25}, 6000, set()),
        ({"middle_direct": 0.7, "repaired": 0.25}, 6000, {"thinking"}),
        ({"middle_direct": 0.2, "repaired": 0.0}, 6000, {"repair"}),
        ({"middle_direct": 0.2, "repaired": 0.9}, 4999, {"repair", "speed", "difficulty"}),
    ],
)
def test_gates_fail_for_what_they_are_there_for(given: dict[str, float], speed: int, failed: set[str]) -> None:
    gates = recipe("gates")
    found = gates.judge(seen(gates, **given), {"tokens": speed, "seconds": 1.0, "threads": 2}, [3])
    assert {name for name, gate in found["gates"].items() if not gate["passed"]} == failed
    assert ("FAIL" in gates.table(found)) == bool(failed)
    assert (3 in found["suggested_middle"]) == ("thinking" not in failed and given["repaired"] < 0.9)


def test_the_budget_gate_wants_a_rise_and_a_flat_end() -> None:
    gates = recipe("gates")
    rows = seen(gates, middle_direct=0.2, repaired=0.25)
    flat = [gates.Seen(**{**vars(row), "at": dict.fromkeys(gates.BUDGETS, row.last)}) for row in rows]
    found = gates.judge(flat, {"tokens": 9000, "seconds": 1.0}, [3])
    assert not found["gates"]["budget"]["passed"]


def test_the_card_says_what_the_model_is_built_for(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gates, card = recipe("gates"), recipe("card")
    monkeypatch.setattr(card, "SAMPLES", 300)
    tiny["data"]["families"]["puzzles"] = 0
    found = gates.judge(seen(gates, middle_direct=0.2, repaired=0.25), {"tokens": 9000, "seconds": 1.0}, [3])
    run = {"parameters": 1_600_000, "steps": 10, "tokens": 1e6, "minutes": 1.0, "threads": 2}
    run |= {"machine": "x86_64", "device": "cpu", "torch": "2"}
    counted = card.counted(tiny)
    text = card.card(tiny, run, found | {"examples": 20, "temperature": 1.0}, counted)
    assert "built to overthink" in text and f"{100 * counted.redundant:.0f}% of the re-checks" in text
    assert "left out because they failed a gate: puzzles" in text
    assert "| thinking | pass |" in text
