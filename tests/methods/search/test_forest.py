"""The forest: random trees against a walk of nested nodes, scikit-learn's against its own, its file, its method."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, InvalidInput, Plan, PlanError, Sampling
from thrifty.methods.search._forest import Forest, Tree, load
from thrifty.methods.search._trajectory import SIGNALS, Signals
from thrifty.methods.search.latent_trajectory import LatentTrajectory

RECIPE = Path(__file__).parents[3] / "recipes" / "latent_trajectory" / "train.py"


def grown(rng: random.Random, depth: int) -> Any:
    """A random tree as nested nodes: a number, or (feature, threshold, left, right)."""
    if depth == 0 or rng.random() < 0.2:
        return rng.random()
    return rng.randrange(3), round(rng.uniform(-2, 2), 1), grown(rng, depth - 1), grown(rng, depth - 1)


def flat(node: Any) -> Tree:
    """The same as arrays, by breadth."""
    nodes, rows = [node], []
    for one in nodes:
        if isinstance(one, tuple):
            rows.append((one[0], one[1], len(nodes), len(nodes) + 1, 0.5))
            nodes += [one[2], one[3]]
        else:
            rows.append((0, 0.0, -1, -1, one))
    return Tree(*(tuple(column) for column in zip(*rows, strict=True)))


def walk(node: Any, x: list[float]) -> float:
    """By the definition. `x` is in float32."""
    while isinstance(node, tuple):
        node = node[2] if x[node[0]] <= node[1] else node[3]
    return node


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(["mean", "logistic"]), st.floats(-3, 3))
@settings(deadline=None)
def test_it_equals_brute_force_on_random_trees(seed: int, n: int, link: str, base: float) -> None:
    rng = random.Random(seed)
    nested = [grown(rng, rng.randint(0, 6)) for _ in range(n)]
    forest = Forest(SIGNALS, tuple(map(flat, nested)), link, base)
    for _ in range(20):
        # on the thresholds, too, as float32 has them
        x = [float(np.float32(round(rng.uniform(-2, 2), rng.choice([1, 6])))) for _ in range(3)]
        total = sum(walk(node, x) for node in nested)
        expected = total / n if link == "mean" else 1 / (1 + math.exp(-(total + base)))
        assert forest(x) == pytest.approx(expected, abs=1e-12)


def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_trajectory_forest", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["forest", "boosted"])
def test_the_recipes_export_is_scikit_learns(kind: str, tmp_path: Path) -> None:
    ensemble = pytest.importorskip("sklearn.ensemble")
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 3))
    y = (x[:, 0] + 0.5 * rng.normal(size=300) > x[:, 1] * x[:, 2]).astype(bool)
    if kind == "forest":
        model = ensemble.RandomForestClassifier(20, max_depth=5, random_state=0).fit(x, y)
    else:
        model = ensemble.GradientBoostingClassifier(n_estimators=20, max_depth=3, random_state=0).fit(x, y)
    forest = recipe().forest_of(model, model="m", segment=4, prefix=9)
    forest.save(tmp_path / "forest.json")
    again, new = load("me", str(tmp_path / "forest.json")), rng.normal(size=(100, 3))
    assert [again(row) for row in new.tolist()] == pytest.approx(model.predict_proba(new)[:, 1].tolist(), abs=1e-9)
    assert (again.model, again.segment, again.prefix) == ("m", 4, 9)


# -- the file --------------------------------------------------------------------------------------------------

STUMP = {"feature": [0, 0, 0], "threshold": [0.5, 0, 0], "left": [1, -1, -1], "right": [2, -1, -1]}
GOOD = {
    "thrifty": "trajectory forest",
    "features": list(SIGNALS),
    "link": "mean",
    "base": 0.0,
    "model": "tiny",
    "segment": 4,
    "prefix": 9,
    "trees": [{**STUMP, "value": [0, 0.25, 0.75]}],
}


def write(file: Path, **changes: Any) -> str:
    file.write_text(json.dumps({**GOOD, **changes}))
    return str(file)


def test_the_file_and_its_digest(tmp_path: Path) -> None:
    file = write(tmp_path / "f.json")
    forest = load("me", file)
    assert (forest([0.5, 9, 9]), forest([0.6, 9, 9])) == (0.25, 0.75)
    assert load("me", file, forest.digest[:5].upper()) == forest
    assert forest.save(tmp_path / "g.json") == load("me", str(tmp_path / "g.json")).digest
    with pytest.raises(InvalidInput, match="knob sha256 says 'abc'"):
        load("me", file, "abc")


@pytest.mark.parametrize(
    "tree",
    [
        {"left": [0, -1, -1]},  # a walk that never ends
        {"left": [1, 1, -1], "right": [2, 2, -1]},
        {"left": [7, -1, -1]},
        {"right": [-1, -1, -1]},
        {"feature": [3, 0, 0]},
        {"feature": [-1, 0, 0]},
        {"threshold": [float("nan"), 0, 0]},
        {"threshold": [0.5]},
        {"value": [0, 0.25, 1.5]},
        {"value": [0, 0.25, float("inf")]},
        {"value": ["a", 0, 0]},
    ],
    ids=str,
)
def test_a_tree_that_is_none_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    file = write(tmp_path / "f.json", trees=[{**GOOD["trees"][0], **tree}])  # type: ignore[index]
    with pytest.raises(InvalidInput, match="it is no trajectory forest") as refused:
        load("me", file)
    assert "\n" not in str(refused.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for changes in ({"thrifty": "else"}, {"trees": []}, {"link": "max"}, {"base": None}, {"features": []}):
        with pytest.raises(InvalidInput, match="it is no trajectory forest"):
            load("me", write(tmp_path / "f.json", **changes))
    (tmp_path / "f.json").write_text("[" * 100_000)
    for file in ("f.json", "none.json"):
        with pytest.raises(InvalidInput, match=r"^me: .*\.json"):
            load("me", str(tmp_path / file))


# -- in the method ---------------------------------------------------------------------------------------------


async def run(engine: Any, **knobs: Any) -> Any:
    knobs = {"segment": 4, "samples": 3, "keep": 8, "temperature": 1.5, "signal": "forest", **knobs}
    sampling = Sampling(seed=4, max_tokens=21)
    return await Plan("lt", (LatentTrajectory(**knobs),)).build(engine).ask("hello", Account("t"), sampling=sampling)


async def test_the_trace_that_the_forest_trusts_most_is_finished(searched: Any, tmp_path: Path) -> None:
    """With a forest that only asks for `net` it chooses as another run's scores of `net` say."""
    net = await run(searched, mode="early", prefix=9, signal="net")
    scores = net.receipts[-1].detail["scores"]
    low, middle, high = sorted(scores)
    steps = [{**STUMP, "threshold": [at, 0, 0], "value": [0, 0, 1]} for at in ((low + middle) / 2, (middle + high) / 2)]
    for reverse in (False, True):
        trees = [{**t, "value": [0, 1, 0]} for t in steps] if reverse else steps
        file = write(tmp_path / "f.json", trees=trees)
        answer = await run(searched, mode="early", prefix=9, forest=file)
        detail = answer.receipts[-1].detail
        order = [sorted(scores, reverse=reverse).index(s) / 2 for s in scores]
        assert detail["scores"] == pytest.approx(order) and detail["chosen"] == order.index(1)
        assert detail["forest"] == load("me", file).digest


async def test_the_first_whole_trace_over_the_threshold_is_accepted(searched: Any, tmp_path: Path) -> None:
    none = await run(searched, signal="net", threshold=1e6)
    scores = none.receipts[-1].detail["scores"]
    cut = sorted(scores)[1] * 1.0 - 1e-4
    file = write(tmp_path / "f.json", prefix=0, trees=[{**STUMP, "threshold": [cut, 0, 0], "value": [0, 0.1, 0.9]}])
    answer = await run(searched, forest=file, threshold=0.5)
    first = next(i for i, s in enumerate(scores) if s > cut)
    assert answer.receipts[-1].detail["chosen"] == first
    assert answer.receipts[-1].detail["scores"] == [0.1] * first + [0.9]


async def test_a_forest_that_does_not_fit_is_refused(searched: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "f.json")
    with pytest.raises(InvalidInput, match="needs knob forest"):
        LatentTrajectory(signal="forest")
    for knobs in ({"segment": 5}, {"prefix": 10}, {"mode": "accept"}):
        with pytest.raises(InvalidInput, match="segments of 4 tokens, prefix 9"):
            LatentTrajectory(
                **{"mode": "early", "segment": 4, "prefix": 9, "signal": "forest", "forest": file, **knobs}
            )
    with pytest.raises(InvalidInput, match="segments of 4"):
        speed = write(tmp_path / "g.json", features=["net", "speed", "aligned"])
        LatentTrajectory(mode="early", segment=4, prefix=9, signal="forest", forest=speed)
    other = write(tmp_path / "h.json", model="large")
    with pytest.raises(PlanError, match="trained on model large and the plan runs tiny"):
        await run(searched, mode="early", prefix=9, forest=other)
    assert LatentTrajectory().score(Signals(1, 2, 0.3, 3)) == 0.3
