"""PET-Select: complexities counted by hand, gradients against torch's autograd, the ranking against sorting by hand,
a selector between the one that draws and the one that knows, and what each technique asks and spends."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thrifty import Budget, BudgetExceeded, InvalidInput, Plan
from thrifty.call import text_of
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.prompt import _mlp
from thrifty.methods.prompt._code_complexity import Complexity, complexity, scores
from thrifty.methods.prompt._techniques import ASKING, STATED, TECHNIQUES
from thrifty.methods.prompt.pet_select import (
    PetSelect,
    Selector,
    best,
    complexities,
    fit,
    ranking_scores,
    report,
    triplet_gradient,
    triplet_projection,
)

# -- complexity, by hand -------------------------------------------------------------------------------------


def test_a_function_counted_by_hand() -> None:
    # operators: def ( : return + [once each]; operands: f x x 1 -> N = 9, n = 8
    got = complexity("def f(x):\n    # a comment\n    return x + 1\n")
    assert (got.lines, got.cyclomatic, got.cognitive) == (2, 1, 0)
    assert got.halstead == pytest.approx(9 * math.log2(8))
    expected = (171 - 5.2 * math.log(27) - 0.23 - 16.2 * math.log(2)) / 1.71
    assert got.maintainability == pytest.approx(expected)


CASES = [
    ("x = 1", 1, 0),
    ("if a:\n    b\nelif c:\n    d\nelse:\n    e", 3, 3),
    ("for a in b:\n    if a and c and d:\n        e", 5, 1 + 2 + 1),
    ("for a in b:\n    while c:\n        if d:\n            e", 4, 1 + 2 + 3),
    ("try:\n    a\nexcept B:\n    c\nexcept D:\n    e", 3, 2),
    ("x = a if b else c", 2, 1),
    ("x = a and b or c and d", 4, 3),
    ("x = [a for a in b if c]", 3, 0),
    ("def f(n):\n    return f(n - 1) if n else 0", 2, 1 + 1),
    ("def f():\n    def g():\n        if a:\n            b\n    return g", 2, 2),
    ("for a in b:\n    c\nelse:\n    d", 2, 2),
    ("match a:\n    case 1:\n        b\n    case _:\n        c", 2, 1),
    ("assert a", 2, 0),
]


@pytest.mark.parametrize(("code", "cyclomatic", "cognitive"), CASES)
def test_branches_and_nesting_counted_by_hand(code: str, cyclomatic: int, cognitive: int) -> None:
    got = complexity(code)
    assert (got.cyclomatic, got.cognitive) == (cyclomatic, cognitive)


def test_comments_docstrings_and_blank_lines_add_nothing() -> None:
    bare = "def f(x):\n    return x\n"
    told = '"""What it is.\n\nLong."""\n\n# why\ndef f(x):\n    """Returns x."""\n\n    return x  # it\n'
    assert complexity(told) == complexity(bare)


@pytest.mark.parametrize("code", ["def", "x = (", "a\x00b"])
def test_what_is_no_python_is_refused(code: str) -> None:
    with pytest.raises(InvalidInput):
        complexity(code)


def test_complexities_of_solutions_are_scores_of_their_measures() -> None:
    codes = ["x = 1", "for a in b:\n    if a:\n        c", "def f(n):\n    return n"]
    got = complexities(codes)
    assert got == scores([complexity(c) for c in codes]) and max(got) == got[1] and min(got) == got[0]


def test_scores_scale_each_measure_over_the_set() -> None:
    low, mid, high = Complexity(1, 1, 10, 0, 90), Complexity(2, 1, 20, 5, 60), Complexity(3, 1, 50, 10, 30)
    # lines 1/2, cyclomatic the same everywhere, volume 1/4, cognitive 1/2, maintainability 1/2
    assert scores([low, mid, high]) == pytest.approx([0.0, (0.5 + 0 + 0.25 + 0.5 + 0.5) / 5, 0.8])
    assert scores([low, mid, high], (1, 0, 0, 0, 0)) == pytest.approx([0.0, 0.5, 1.0])
    with pytest.raises(InvalidInput):
        scores([low], (0, 0, 0, 0, 0))


# -- training ------------------------------------------------------------------------------------------------


def test_gradients_are_autograds() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    network = _mlp.MLP.fresh((6, 5, 4, 3), seed=1)
    x, y, of = rng.normal(size=(7, 6)), rng.integers(0, 3, 7), np.array([1.0, 0.5, 2.0])
    weights, biases = network.gradients(x, lambda out: _mlp.cross_entropy(y, of)(out, np.arange(7)))
    ws = [torch.tensor(w, requires_grad=True) for w in network.weights]
    bs = [torch.tensor(b, requires_grad=True) for b in network.biases]
    h = torch.tensor(x)
    for i in range(3):
        h = h @ ws[i] + bs[i]
        h = h.relu() if i < 2 else h
    torch.nn.functional.cross_entropy(h, torch.tensor(y), weight=torch.tensor(of)).backward()
    for mine, theirs in zip([*weights, *biases], [*ws, *bs], strict=True):
        np.testing.assert_allclose(mine, theirs.grad.numpy(), atol=1e-12)

    w = torch.tensor(rng.normal(size=(6, 4)), requires_grad=True)
    a, p, n = (torch.tensor(rng.normal(size=(9, 6))) for _ in range(3))
    loss = torch.nn.functional.triplet_margin_loss(a @ w, p @ w, n @ w, margin=1.0, eps=0.0)
    loss.backward()
    mine = triplet_gradient(w.detach().numpy(), a.numpy(), p.numpy(), n.numpy())
    np.testing.assert_allclose(mine, w.grad.numpy(), atol=1e-12)


def test_adam_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    value, g = np.array([1.0, -2.0, 3.0]), [np.array([0.1, -4.0, 0.0]), np.array([2.0, 1.0, -1.0])]
    theirs = torch.tensor(value.copy(), requires_grad=True)
    adam, other = _mlp.Adam([value], 0.05), torch.optim.Adam([theirs], lr=0.05)
    for step in g:
        adam.step([step])
        theirs.grad = torch.tensor(step)
        other.step()
    np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=1e-12)


def planted(n: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Queries whose embedding shows, with noise, whether they are complex. A simple one passes under every technique;
    a complex one only under self-planning and self-debug, which cost 5 and 9 times zero-shot."""
    rng = np.random.default_rng(seed)
    hard = rng.random(n) < 0.4
    vectors = rng.normal(size=(n, 16))
    vectors[:, 3] += np.where(hard, 2.2, -2.2)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    costs = np.array([100, 130, 300, 420, 120, 500, 800, 850, 900])
    tokens = np.round(costs * rng.uniform(0.9, 1.1, (n, 1)))
    solves = np.isin(np.array(TECHNIQUES), ["self-planning", "self-debug"])
    passed = ~hard[:, None] | solves[None]
    return vectors, hard.astype(float), passed, tokens


def test_the_triplet_loss_separates_two_planted_classes() -> None:
    vectors, hard, _, _ = planted(200, 1)

    def ratio(x: Any) -> float:
        centres = [x[hard == c].mean(axis=0) for c in (0, 1)]
        within = np.mean([np.linalg.norm(x[hard == c] - centres[c], axis=1).mean() for c in (0, 1)])
        return float(np.linalg.norm(centres[0] - centres[1]) / within)

    trained = vectors @ triplet_projection(vectors, hard > 0, 8, epochs=60)
    assert ratio(trained) > 2 * ratio(vectors)


def test_a_selector_lies_between_drawing_and_knowing_and_saves_tokens() -> None:
    train, test = planted(400, 1), planted(300, 2)
    selector = fit(*train, size=8, epochs=60)
    got = report(selector.chances(test[0]), test[2], test[3])
    assert got.random.passed < got.selector.passed <= got.oracle.passed == 1.0
    low, high = got.always["zero-shot"], got.always["self-planning"]
    assert got.selector.passed > 0.9 and low.passed < 0.7
    share = (got.selector.passed - low.passed) / (high.passed - low.passed)
    mixed = low.tokens + share * (high.tokens - low.tokens)  # drawing between the two at the same pass rate
    assert got.selector.tokens < 0.75 * mixed and got.selector.tokens < got.random.tokens
    assert 0.85 < got.mrr < 1 and 0.5 < got.ndcg <= 1 and 0.7 < got.macro_recall < 1
    again = fit(*train, size=8, epochs=60)
    np.testing.assert_array_equal(again.chances(test[0]), selector.chances(test[0]))


def test_the_ranking_puts_what_passes_first_and_the_cheaper_before() -> None:
    passed = [[True, True, False, False], [False, False, False, False], [True, False, True, True]]
    tokens = [[90, 40, 10, 1], [7, 5, 5, 9], [8, 1, 8, 30]]
    got = ranking_scores(passed, tokens)
    assert got[0] == pytest.approx([0.0, math.log(90 / 40), -math.log(10), 0.0])
    for row, ok, cost in zip(got, passed, tokens, strict=True):
        for i in range(4):
            for j in range(4):
                if ok[i] and not ok[j]:
                    assert row[i] >= row[j]
                elif ok[i] == ok[j] and cost[i] < cost[j]:
                    assert row[i] > row[j]
    assert list(best(passed, tokens)) == [1, 1, 0]


def test_the_report_of_two_queries_by_hand() -> None:
    passed, tokens = [[True, True], [False, True]], [[1, 3], [1, 5]]
    got = report([[0.4, 0.6], [0.3, 0.7]], passed, tokens, ("zero-shot", "persona"))
    assert (got.selector.passed, got.selector.tokens) == (1.0, 4.0)
    assert (got.random.passed, got.random.tokens) == (0.75, 2.5)
    assert (got.oracle.passed, got.oracle.tokens) == (1.0, 3.0)
    assert (got.always["zero-shot"].passed, got.always["persona"].tokens) == (0.5, 4.0)
    assert got.mrr == pytest.approx((0.5 + 1) / 2) and got.macro_recall == pytest.approx(0.5)
    # gains 1 and 0: found second it is worth 1 / log2 3
    assert got.ndcg == pytest.approx((1 / math.log2(3) + 1) / 2)


# -- in a plan -----------------------------------------------------------------------------------------------

TASK = "Write add(a, b)."


def world(settings: dict[str, Any], *replies: str, budget: Budget | None = None, on_exceed: str = "degrade"):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine(list(replies))
    plan = Plan("pet", (PetSelect.from_settings(settings),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build({"answer": engine, "embedder": ScriptedEngine("", model="embedder", dimensions=16)})


@pytest.mark.parametrize("technique", [t for t in STATED if t != "zero-shot"])
async def test_a_technique_of_one_call_is_a_text_before_the_task(technique: str) -> None:
    engine, pipeline = world({"technique": technique}, "def add")
    answer = await pipeline.ask(TASK)
    assert [text_of(m) for m in engine.calls[0].messages] == [STATED[technique], TASK]
    assert answer.receipts[0].fired and not answer.receipts[0].spend


def test_our_examples_do_what_their_tasks_say() -> None:
    found: dict[str, Any] = {}
    for text in STATED["few-shot"].split("Code:\n")[1:]:
        exec(text.split("\n\nTask:")[0], found)  # noqa: S102 - our own text
    assert found["second_largest"]([3, 1, 3]) == 1 and found["second_largest"]([3, 3]) is None
    assert found["count_vowels"]("Eve is") == 3
    assert found["rotate"]([1, 2, 3], 4) == [3, 1, 2] and found["rotate"]([], 2) == []


CONVERSATIONS = {
    "self-planning": (["1. plan"], ["1. plan"]),
    "self-refine": (["draft one", "too short"], ["draft one", "too short"]),
    "self-debug": (["draft one", "it adds"], ["draft one", "it adds"]),
    "progressive-hint": (["draft one", "draft  one"], ["draft  one"]),
}


@pytest.mark.parametrize("technique", list(ASKING))
async def test_a_technique_of_several_calls_answers_with_the_last(technique: str) -> None:
    said, shown = CONVERSATIONS[technique]
    engine, pipeline = world({"technique": technique, "rounds": 5}, *said, "final")
    answer = await pipeline.ask(TASK)
    assert answer.text == "final"
    receipt = answer.receipts[0]
    assert receipt.spend.calls == len(said) and answer.spend.calls == len(said) + 1
    assert [c.labels.method for c in engine.calls] == ["pet-select"] * len(said) + [""]
    assert all(TASK in text_of(c.messages[-1]) for c in engine.calls)
    system = text_of(engine.calls[-1].messages[0])
    assert all(text in system for text in shown)
    assert engine.calls[-1].messages[-1] == {"role": "user", "content": TASK}


async def test_hints_go_on_until_two_drafts_agree_or_the_rounds_are_over() -> None:
    engine, pipeline = world({"technique": "progressive-hint", "rounds": 3}, "a", "b", "c", "final")
    await pipeline.ask(TASK)
    assert len(engine.calls) == 4
    assert [text_of(c.messages[-1]).rpartition("\n")[2] for c in engine.calls[:3]] == [TASK, "a", "b"]


async def test_a_task_of_braces_is_asked_as_it_is() -> None:
    engine, pipeline = world({"technique": "self-refine"}, "{draft} {0}", "{task}", "final")
    await pipeline.ask("Format {x!r} and {context}.")
    assert "Format {x!r} and {context}." in text_of(engine.calls[1].messages[0])
    assert "{draft} {0}" in text_of(engine.calls[2].messages[0])


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A selector over the scripted embedder's 16 buckets: queries with the word "hard" get self-planning."""
    number = ScriptedEngine("").words.number("hard") % 16
    projection = np.zeros((16, 1))
    projection[number] = 1.0
    network = _mlp.MLP((np.array([[-9.0, 9.0]]),), (np.array([1.0, -1.0]),))
    file = tmp_path / "selector.json"
    Selector(("zero-shot", "self-planning"), projection, network).save(file)
    return str(file)


async def test_the_trained_selector_chooses_by_the_query(trained: str) -> None:
    engine, pipeline = world({"selector": trained}, "easy answer", "1. plan", "hard answer")
    simple, complex_ = await pipeline.ask("qq"), await pipeline.ask("hard")
    assert (simple.text, complex_.text) == ("easy answer", "hard answer")
    first, second = simple.receipts[0], complex_.receipts[0]
    assert (first.fired, first.detail["technique"]) == (False, "zero-shot")
    assert (second.fired, second.detail["technique"]) == (True, "self-planning")
    assert first.spend.calls == 1 and second.spend.calls == 2  # the embedding, and the plan
    assert simple.spend.calls == 2 and complex_.spend.calls == 3
    assert sum(second.detail["chances"].values()) == pytest.approx(1)


async def test_in_a_conversation_what_it_breaks_is_told(trained: str) -> None:
    talk = (
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "hard"},
    )
    _, pipeline = world({"selector": trained}, "1. plan", "x")
    assert (await pipeline.ask(talk)).receipts[0].detail["breaks_cached"] == 4
    engine, pipeline = world({"selector": trained, "place": "turn"}, "1. plan", "x")
    assert (await pipeline.ask(talk)).receipts[0].detail["breaks_cached"] == 0
    assert engine.calls[-1].messages[:2] == talk[:2]


async def test_budgets_too_small_for_it_leave_the_query_as_it_is(trained: str) -> None:
    for budget, why in ((Budget(calls=1), "embedding"), (Budget(calls=2), "calls of self-planning")):
        engine, pipeline = world({"selector": trained}, "x", budget=budget)
        answer = await pipeline.ask("hard")
        assert answer.text == "x" and why in answer.receipts[0].reason and not answer.receipts[0].fired
        _, strict = world({"selector": trained}, "x", budget=budget, on_exceed="refuse")
        with pytest.raises(BudgetExceeded):
            await strict.ask("hard")
    engine, pipeline = world({"technique": "few-shot"}, "x", budget=Budget(input=20))
    answer = await pipeline.ask(TASK)
    assert "prompt of few-shot" in answer.receipts[0].reason and len(engine.calls[0].messages) == 1


async def test_a_file_is_told_by_its_content(trained: str, tmp_path: Path) -> None:
    digest = (await world({"selector": trained}, "x")[1].ask("qq")).receipts[0].detail["selector"]
    PetSelect(selector=trained, sha256=digest)
    with pytest.raises(InvalidInput, match="SHA-256"):
        PetSelect(selector=trained, sha256="0" * 16)
    data = json.loads(Path(trained).read_text())
    for change in (
        {"thrifty": "other"},
        {"techniques": ["zero-shot", "no-such"]},
        {"techniques": ["zero-shot"]},
        {"projection": [[1.0, float("nan")]] * 16},
        {"projection": [[1.0], [1.0, 2.0]]},
        {"layers": []},
        {"layers": [{"weights": [[1.0, 2.0]], "biases": [1.0]}]},
        {"layers": [{"weights": [[1.0]], "biases": [1.0]}, *data["layers"], {"weights": [[1.0]], "biases": [1.0]}]},
    ):
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps({**data, **change}))
        with pytest.raises(InvalidInput, match="bad.json"):
            PetSelect(selector=str(bad))
    with pytest.raises(InvalidInput, match="cannot be read"):
        PetSelect(selector=str(tmp_path / "none.json"))


async def test_an_embedder_of_another_name_is_refused(trained: str, tmp_path: Path) -> None:
    chosen = Selector.from_dict(json.loads(Path(trained).read_text()))
    for name in ("embedder", "minilm"):
        replace(chosen, embedder=name).save(tmp_path / f"{name}.json")
    assert (await world({"selector": str(tmp_path / "embedder.json")}, "plan", "x")[1].ask("hard")).receipts[0].fired
    with pytest.raises(InvalidInput, match="'minilm'"):
        await world({"selector": str(tmp_path / "minilm.json")}, "x")[1].ask("hard")


async def test_another_embedder_is_refused(trained: str) -> None:
    plan = Plan("pet", (PetSelect(selector=trained),))
    pipeline = plan.build({"answer": ScriptedEngine("x"), "embedder": ScriptedEngine("", dimensions=8)})
    with pytest.raises(InvalidInput, match="16 numbers"):
        await pipeline.ask("hard")


@pytest.mark.parametrize("shape", [(3, 2), (2, 3)])
def test_outcomes_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput):
        fit(np.ones((2, 4)), [0, 1], np.ones((2, 2)), np.ones(shape), ("zero-shot", "persona"))


HOSTILE = {
    "an image alone": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},),
    "a tool result first": (
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "user", "content": "hard"},
    ),
    "no user": ({"role": "assistant", "content": "hard"},),
    "no space": ({"role": "user", "content": "x" * 1_000_000},),
    "broken text": ({"role": "user", "content": "hard \ud800 \x00"},),
    "other scripts": ({"role": "user", "content": "מה זה? 這是什麼？ hard"},),
}


@pytest.mark.parametrize("messages", HOSTILE.values(), ids=list(HOSTILE))
async def test_hostile_conversations_are_answered_with_a_receipt(messages: Any, trained: str) -> None:
    engine, pipeline = (
        world({"selector": trained}, "plan", "x")
        if "hard" in str(messages[-1]) and messages[-1]["role"] == "user"
        else world({"selector": trained}, "x")
    )
    answer = await pipeline.ask(messages)
    assert len(answer.receipts) == 1 and answer.receipts[0].reason
    assert [m for m in engine.calls[-1].messages if m.get("role") != "system"] == list(messages)
