"""The verifier's recipe: chains against the slips that were made, the filter against spoilt chains, training that goes
on where it stopped, figures against brute force, and a model that the methods take as their scorer."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinker_recipe import recipe

from thrifty import Account, Answer, Call
from thrifty.lab.steps import Step, label
from thrifty.lab.tasks import FAMILIES, make
from thrifty.lab.traces import Habits, write
from thrifty.methods.search._verifier import Verdict
from thrifty.methods.search._wording import LINES, wording_for

FOLDER = Path(__file__).parents[2] / "recipes" / "think_prm"
sys.path.append(str(FOLDER))
import think_prm_data as data  # noqa: E402
import think_prm_measure as measure  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer() -> Any:
    name = "think_prm_train"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / "train.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def traced(name: str, seed: int, slip: float, difficulty: int = 2) -> tuple[data.Solution, int]:
    """A solution and the number of its slips."""
    rng = random.Random(seed)
    habits = Habits(slip=slip, careful=slip / 2, direct=0.0, cut=0.0)
    trace = write(make(name, rng, difficulty), rng, habits)
    return data.solution_of(trace.problem, trace.text), trace.slips


@pytest.fixture
def settings_(tiny: dict[str, Any]) -> dict[str, Any]:
    """The recipe's configuration, small enough to train in a second."""
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    config["data"] |= {"traces": 6, "held_out": 4, "samples": 2, "longest": 300}
    config["training"] |= {"steps": 10, "tokens": 512, "chunk": 512, "every_log": 5, "emphasis": 2.0}
    return config


@pytest.fixture
def base(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """A tiny thinker's folder, untrained."""
    return Path(recipe("train").Run(tiny, tmp_path / "thinker", bf16=False).export())


# --- chains ---


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 5), st.integers(0, 10**9), st.booleans())
@settings(max_examples=120, deadline=None)
def test_a_kept_chain_says_of_every_line_what_the_exact_labels_say(
    name: str, difficulty: int, seed: int, cut: bool
) -> None:
    solution, slips = traced(name, seed, 0.06, difficulty)
    if cut:
        solution = data.beginning(solution, random.Random(seed))
    chain = data.chain_of(solution)
    if not data.agrees(chain, solution):
        assert slips, "only a trace that went another way than the writer's can disagree"
        return
    gold = label(name, solution.problem.question, solution.text)
    reading = LINES.read(chain, solution.text)
    assert all(told in (None, step.right) for told, step in zip(reading.labels, gold, strict=True))
    firsts = [i for i, step in enumerate(gold) if not step.right]
    assert reading.first_error == (firsts[0] if firsts else None)
    if not cut:
        answer = solution.text.rpartition("Answer: ")[2]
        assert reading.correct == FAMILIES[name].check(solution.problem.question, answer)
    elif not slips:
        assert reading.correct is True


def test_the_filter_drops_a_chain_with_any_label_turned_round() -> None:
    dropped = 0
    for seed in range(30):
        solution, _ = traced(sorted(FAMILIES)[seed % 6], seed, 0.05)
        chain = data.chain_of(solution)
        assert data.agrees(chain, solution) or "not" in chain
        for old, new in ((" right", " not"), (" not", " right"), ("Answer: Yes", "Answer: No"), ("Answer: No", "")):
            if old in chain and data.agrees(chain, solution):
                assert not data.agrees(chain.replace(old, new, 1), solution)
                dropped += 1
    assert dropped > 50


def test_a_way_of_its_own_that_is_right_is_left_out() -> None:
    problem = make("arithmetic", random.Random(1), 1)
    start, *terms = re.findall(r"[+-]?\d+", problem.question)
    order, total, lines = [terms[1], terms[0], *terms[2:]], int(start), []
    for term in order:
        lines.append(f"{total}{term}={total + int(term)}")
        total += int(term)
    text = "\n".join([*lines, f"So {problem.answer}.", "", f"Answer: {problem.answer}"])
    solution = data.Solution(problem, text)
    assert all(step.right for step in solution.steps()) and not data.agrees(data.chain_of(solution), solution)


def test_only_the_chain_is_learned_and_examples_are_drawn_as_set(settings_: dict[str, Any]) -> None:
    own = [traced(name, seed, 0.05)[0] for seed in range(20) for name in sorted(FAMILIES)]
    settings_["data"] |= {"written": 0.0, "mistaken": 0.5, "beginnings": 0.25}
    chains = data.Chains(settings_, own)
    rng = random.Random(0)
    drawn = [chains.draw(rng, 0) for _ in range(400)]
    assert {s.problem.question for s in drawn} <= {s.problem.question for s in own}
    whole = [s for s in drawn if s.whole]
    assert abs(len(whole) / 400 - 0.75) < 0.09
    assert abs(sum(not all(x.right for x in s.steps()) for s in whole) / len(whole) - 0.5) < 0.12
    ids, labels = chains.encode(drawn[0], rng)
    learned = [i for i in labels if i != data.IGNORED]
    text = chains.tokenizer.decode(learned, skip_special_tokens=True)
    assert text == data.chain_of(drawn[0]) and ids[-len(learned) :] == learned and learned[-1] == chains.end


def test_lines_that_are_not_right_weigh_more(settings_: dict[str, Any]) -> None:
    chains = data.Chains(settings_, [])
    text = "27+5=32 right\n32-8=24 not\n\nWait right\nSo 3 not\n\nAnswer: No"
    ids = chains._ids(text)
    weights = chains.weights(torch.tensor([[data.IGNORED, *ids, data.IGNORED]]), 3.0)[0].tolist()
    heavy = chains.tokenizer.decode([i for i, w in zip(ids, weights[1:], strict=False) if w == 3.0])
    assert heavy == "32-8=24 notSo 3 not" and set(weights) == {1.0, 3.0} and weights[0] == weights[-1] == 1.0


# --- training ---


def test_a_run_that_was_stopped_ends_as_an_unbroken_one(settings_: dict[str, Any], base: Path, tmp_path: Path) -> None:
    train, own = trainer(), [traced("counting", seed, 0.1, 1)[0] for seed in range(8)]
    before = (base / "model.safetensors").read_bytes()
    whole = train.Run(settings_, base, own, tmp_path / "whole", bf16=False)
    assert train.thinker.train(whole)
    first = train.Run(settings_, base, own, tmp_path / "parts", bf16=False)
    assert not train.thinker.train(first, lambda: first.step >= 4)
    second = train.Run(settings_, base, own, tmp_path / "parts", bf16=False)
    assert second.step == 4 and train.thinker.train(second)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (base / "model.safetensors").read_bytes() == before
    with pytest.raises(SystemExit, match="another configuration"):
        train.Run(settings_, base, own[1:], tmp_path / "parts", bf16=False)


async def test_sampling_goes_on_where_it_stopped_and_what_is_measured_was_never_seen(
    settings_: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thrifty.engines.local.engine import LocalEngine

    train, file = trainer(), tmp_path / "traces.jsonl"
    monkeypatch.setattr(train, "WAVE", 2)
    monkeypatch.setattr(train.measure, "LIMIT", 8)
    waves: list[int] = []
    engine = LocalEngine.load(base, dtype="float32")
    try:
        await train.sample(engine, settings_, file, lambda: waves.append(0) is None and len(waves) > 2)
        half = file.read_text(encoding="utf-8")
        assert len(half.splitlines()) == 4
        await train.sample(engine, settings_, file)
    finally:
        await engine.aclose()
    assert file.read_text(encoding="utf-8").startswith(half) and len(file.read_text().splitlines()) == 6
    seen = {p.question for p in train.problems(settings_, 6)}
    held = train.problems(settings_, 4, True)
    assert len(held) == 4 and not seen & {p.question for p in held}
    settings_["seed"] += 1
    with pytest.raises(SystemExit, match="another configuration"):
        await train.sample(None, settings_, file)


async def test_what_it_exports_is_asked_in_its_own_wording_and_measured(
    settings_: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way on a model that can do nothing: every verdict is unread, the gates fail, the card says so."""
    from thrifty.engines.local.engine import LocalEngine

    train = trainer()
    run = train.Run(settings_, base, [], tmp_path / "run", bf16=False)
    folder = run.export()
    engine = LocalEngine.load(folder, dtype="float32")
    try:
        assert wording_for(engine) is LINES
        call = Call(({"role": "user", "content": "Compute 1+2"},), Account("t"))
        assert "verifier" not in engine.codec.decode(engine.prompter(call).tokens)
    finally:
        await engine.aclose()
    monkeypatch.setattr(train.measure, "LIMIT", 12)
    monkeypatch.setattr(train.measure, "CHAIN", 4)
    found = await train.measure.measure(base, folder, settings_, train.problems(settings_, 4, True))
    assert found["traces"] == 8 and found["unread"] == 8 and not found["gates"]["readable"]["passed"]
    told = {"seed": 1, "base": "ab" * 32, "parameters": 9, "steps": 1, "tokens": 1, "threads": 1}
    told |= {"machine": "m", "torch": "2", "seconds": {"training": 1.0}}
    told |= {"traces": {"sampled": 6, "ended": 5, "kept": 4, "with_an_error": 1}}
    text = train.card.card(settings_, {"run": told, **found})
    assert "**fail**" in text and "8 of 8 verdicts could not be read" in text
    train.card.draw(found, [{"tokens": 1, "loss": 1.0}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG" and "unread" in train.card.table(found)


# --- figures ---


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.booleans()), min_size=1, max_size=12))
@settings(deadline=None)
def test_auc_and_f1_are_what_counting_gives(rows: list[tuple[float, bool]]) -> None:
    scores, right = [s for s, _ in rows], [r for _, r in rows]
    good, bad = [s for s, r in rows if r], [s for s, r in rows if not r]
    wins = [1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad]
    assert measure.auc(scores, right) == (pytest.approx(sum(wins) / len(wins)) if wins else None)
    trials = [measure.f1(right, [s > cut for s in scores]) for cut in (0.0, 0.1, 0.5, 0.9)]
    assert measure.best_f1(right, scores) == pytest.approx(max(trials))
    told = [s > 0.5 for s in scores]
    hits = sum(not r and not t for r, t in zip(right, told, strict=True))
    if hits:
        precision, recall = hits / told.count(False), hits / right.count(False)
        assert measure.f1(right, told) == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert measure.f1(right, told) == 0


def test_a_step_has_the_probabilities_of_its_own_tokens() -> None:
    gold = (Step("ab", 0, "line", True, 0), Step("ab", 3, "line", True, 0))
    assert measure.step_logprobs(["<", "a", "b\n", "ab"], [-9.0, -1.0, -2.0, -4.0], gold, "<ab\nab") == [-1.5, -4.0]


def judged(right: bool, score: float, text: str, understood: int = 1, labels: tuple[bool | None, ...] = ()) -> Any:
    problem = make("counting", random.Random(0), 1)
    gold = (Step("x", 0, "line", right, 0), Step(text, 2, "answer", right, 0))
    answer = Answer(text, logprobs=(-score,))
    verdict = Verdict(score, understood, 1, None, labels or (right, right))
    return measure.Judged(problem, answer, gold, right, verdict, (-1.0, -1.0))


def test_picks_and_gates_on_outcomes_that_are_made_up() -> None:
    groups = [
        [judged(False, 0.2, "5"), judged(False, 0.1, "5"), judged(True, 0.9, "6")],
        [judged(True, 0.8, "1"), judged(True, 0.7, "1"), judged(False, 0.3, "2")],
    ]
    found = measure.judge([row for group in groups for row in group], 3)
    accuracy = {name: row["accuracy"] for name, row in found["best_of"].items() if name != "n"}
    wanted = {"first": 0.5, "majority": 0.5, "verifier": 1.0, "oracle": 1.0, "log-probability": 0.0}
    assert {name: accuracy[name] for name in wanted} == wanted
    assert found["best_of"]["verifier"]["against_majority"][0] == 0.5
    assert found["steps"]["verifier"]["f1"] == 1 and found["answers"]["auc"]["verifier"] == 1
    assert found["process_bench"] == 1 and all(gate["passed"] for gate in found["gates"].values())
    gap, low, high = found["answers"]["auc_gap"]
    assert gap == 1 - measure.auc([-0.2, -0.1, -0.9, -0.8, -0.7, -0.3], [False, False, True, True, True, False])
    assert low <= gap <= high
    silent = [judged(False, 0.5, "5", understood=0), judged(True, 0.5, "6", understood=0)]
    worse = measure.judge(silent, 2)
    assert worse["steps"]["verifier"]["f1"] == 0 and not any(gate["passed"] for gate in worse["gates"].values())


def test_after_a_wrong_line_the_rest_of_its_derivation_counts_as_wrong() -> None:
    steps = [Step("a", 0, "line", True, 0), Step("b", 2, "line", True, 0), Step("w", 4, "turn", True, 1)]
    steps += [Step("c", 6, "line", True, 1), Step("d", 8, "answer", True, 1)]
    assert data.predicted([False, None, None, True, True], steps) == [False, False, True, True, True]
    assert data.predicted([None] * 5, steps) == [True] * 5
