"""The router of Sketch-of-Thought: its fit against scikit-learn and numerical derivatives, its files, its words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thrifty import InvalidInput
from thrifty.methods.prompt._sketch_router import PARADIGMS, SHIPPED, Router, by_words, fit, read_router

np = pytest.importorskip("numpy")
RECIPE = Path(__file__).parents[3] / "recipes" / "sketch_router"


def cloud(n: int, d: int, seed: int = 0) -> tuple[Any, list[int]]:
    """Unit vectors near one of three directions, with some of them on the wrong side."""
    rng = np.random.default_rng(seed)
    labels = [int(i) for i in rng.integers(0, 3, n)]
    labels[:3] = [0, 1, 2]
    x = rng.normal(size=(3, d))[labels] + 1.5 * rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def probabilities(router: Router, x: Any) -> Any:
    return np.array([router.probabilities(row.tolist()) for row in x])


@pytest.mark.parametrize(("n", "d", "penalty"), [(40, 6, 1.0), (40, 6, 30.0), (25, 80, 1.0), (300, 12, 0.1)])
def test_the_fit_is_scikit_learns(n: int, d: int, penalty: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = cloud(n, d)
    oracle = linear.LogisticRegression(C=penalty, tol=1e-12, max_iter=20_000).fit(x, y)
    router = fit(x, y, ["m"], penalty=penalty)
    assert np.array(router.weights) == pytest.approx(oracle.coef_, abs=2e-4)
    new, _ = cloud(50, d, seed=1)
    assert probabilities(router, new) == pytest.approx(oracle.predict_proba(new), abs=2e-4)


def test_the_fit_is_a_minimum() -> None:
    """Numerical derivatives of the loss, written out again, vanish in every direction."""
    x, y = cloud(30, 50)
    router = fit(x, y, ["m"], penalty=2.0)

    def loss(w: Any, b: Any) -> float:
        logits = x @ w.T + b
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return float(-log_p[range(len(y)), y].sum() + (w**2).sum() / 4)

    w, b = np.array(router.weights), np.array(router.bias)
    rng = np.random.default_rng(3)
    for _ in range(20):
        dw, db = rng.normal(size=w.shape), rng.normal(size=b.shape)
        up, down = loss(w + 1e-4 * dw, b + 1e-4 * db), loss(w - 1e-4 * dw, b - 1e-4 * db)
        assert abs(up - down) / 2e-4 < 1e-5 and up > loss(w, b) < down
    assert fit(x, y, ["m"], penalty=2.0) == router


def test_what_cannot_be_fitted_is_refused() -> None:
    x, y = cloud(9, 4)
    for bad in ((x, [0, 1] * 4 + [0]), (x[0], [0]), (x, y[:-1]), (x, [*y[:-1], 3])):
        with pytest.raises(InvalidInput, match="fitting needs"):
            fit(*bad, ["m"])
    with pytest.raises(InvalidInput, match="penalty"):
        fit(x, y, ["m"], penalty=0.0)


def test_probabilities_by_hand() -> None:
    router = Router(("m",), ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)), (0.0, 0.0, 0.0))
    e = 2.718281828459045
    assert router.probabilities([1.0, 0.0]) == pytest.approx([e / (e + 2), 1 / (e + 2), 1 / (e + 2)])
    with pytest.raises(InvalidInput, match="vectors of 2 numbers, not 3"):
        router.probabilities([1.0, 0.0, 0.0])
    huge = Router(("m",), ((1e6,), (0.0,), (-1e6,)), (0.0, 0.0, 0.0))
    assert huge.probabilities([1.0]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("model", "suits"),
    [
        ("minilm", True),
        ("sentence-transformers/all-MiniLM-L6-v2", True),
        ("local:minilm", True),
        ("C:\\models\\all-MiniLM-L6-v2", True),
        ("all-MiniLM-L12-v2", False),
        ("embedder", False),
        ("", False),
    ],
)
def test_the_embedders_it_suits(model: str, suits: bool) -> None:
    assert read_router(SHIPPED).suits(model) == suits


def test_the_shipped_router_and_its_file(tmp_path: Path) -> None:
    router = read_router(SHIPPED)
    assert router.dimensions == 384 and SHIPPED.stat().st_size < 20_000
    (tmp_path / "r.json").write_text(router.to_json(), encoding="utf-8")
    assert read_router(tmp_path / "r.json") == router == read_router(tmp_path / "r.json")
    changed = Router(("mine",), router.weights, router.bias)
    (tmp_path / "r.json").write_text(changed.to_json() + " ", encoding="utf-8")
    assert read_router(tmp_path / "r.json") == changed  # a file that changed is read again


def _broken() -> Iterator[tuple[str, str]]:
    good = json.loads(SHIPPED.read_text(encoding="utf-8"))
    yield "not JSON", "{"
    yield "a list", "[]"
    yield "no weights", json.dumps({k: v for k, v in good.items() if k != "weights"})
    yield "two rows", json.dumps({**good, "weights": good["weights"][:2]})
    yield "rows of two lengths", json.dumps({**good, "weights": [[1.0], [1.0, 2.0], [1.0]]})
    yield "no numbers", json.dumps({**good, "bias": ["x", 0, 0]})
    yield "not finite", json.dumps({**good, "bias": [float("nan"), 0, 0]})
    yield "other paradigms", json.dumps({**good, "paradigms": ["a", "b", "c"]})
    yield "too large", " " * 4_000_001


@pytest.mark.parametrize(("what", "text"), [pytest.param(*b, id=b[0]) for b in _broken()])
def test_a_broken_file_is_refused_by_name(what: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "router.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"router\.json") as refused:
        read_router(file)
    assert "\n" not in str(refused.value)
    with pytest.raises(InvalidInput, match="none.json"):
        read_router(tmp_path / "none.json")


# -- by words ------------------------------------------------------------------------------------------------


def questions(split: str) -> list[tuple[str, str]]:
    lines = (RECIPE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [(r["question"], r["label"]) for r in map(json.loads, lines) if r["split"] == split]


def test_the_words_route_well_above_chance() -> None:
    """Chance is a third; the rule was not fitted on the held-out questions."""
    held = questions("test")
    right = sum(by_words(q) == label for q, label in held)
    assert len(held) == 60 and right / len(held) > 0.7
    for paradigm in PARADIGMS:
        of = [by_words(q) for q, label in held if label == paradigm]
        assert of.count(paradigm) / len(of) > 0.4, paradigm  # technical words: 9 of 20, for no list has them all


def test_no_question_is_in_both_splits() -> None:
    train, test = questions("train"), questions("test")
    assert len(train) == 150 and not {q for q, _ in train} & {q for q, _ in test}
    assert {label for _, label in train} == {label for _, label in test} == set(PARADIGMS)


ODD = {
    "empty": "",
    "blank": " \n",
    "marks": "=?" * 500_000,
    "1 MB without a space": "a" * 1_000_000,
    "capitals": "A" * 1_000_000 + "b",
    "digits": "1" * 1_000_000 + "x",
    "numbers": "1,2." * 250_000,
    "broken and reversed": "\udcff\u202e\u05d0",
    "CJK": "\u6570\u5b66" * 1000,
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in ODD.items()])
@pytest.mark.timeout(20)
def test_odd_questions_are_routed_too(text: str) -> None:
    """In linear time: a rule that backtracks would not come back from these."""
    assert by_words(text) in PARADIGMS
