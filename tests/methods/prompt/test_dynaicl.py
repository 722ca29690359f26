"""DynaICL: the average against brute force, REINFORCE against the exact gradient, a controller against the same
number for every query at equal tokens, and what is shown and spent in a plan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Budget, BudgetExceeded, InvalidInput, Plan
from thrifty.call import text_of
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.prompt import _mlp
from thrifty.methods.prompt._demonstrations import (
    OURS,
    Controller,
    Pack,
    balanced_scale,
    number,
    plain_scale,
    shown,
    smallest_beta,
    spread,
)
from thrifty.methods.prompt.dynaicl import DynaICL, fit, policy_gradient, sufficient

PREDICTIONS = st.lists(st.floats(0.01, 12), min_size=1, max_size=30)

# -- the average ---------------------------------------------------------------------------------------------


@given(PREDICTIONS, st.floats(0, 12), st.integers(1, 10), st.sampled_from([0.25, 0.5, 1.0]))
def test_the_balanced_scale_is_the_best_of_all_that_can_be_told_apart(
    seen: list[float], shots: float, most: int, beta: float
) -> None:
    def total(scale: float) -> int:
        return sum(number(c, scale, most) for c in seen)

    allowed = beta * shots * len(seen) + 1e-6
    got = total(balanced_scale(seen, shots, most, beta))
    assert got <= allowed
    edges = sorted({(j - 0.5) / c for c in seen for j in range(1, most + 1)})
    tried = [0.0, *((a + b) / 2 for a, b in zip(edges, edges[1:], strict=False) if b > a * (1 + 1e-9)), edges[-1] * 2]
    assert got == max(t for scale in tried if (t := total(scale)) <= allowed)


@given(PREDICTIONS, st.floats(0, 12), st.integers(1, 10))
def test_a_batch_gets_exactly_its_total(seen: list[float], shots: float, most: int) -> None:
    got = spread(seen, shots, most)
    assert sum(got) == min(math.floor(shots * len(seen) + 1e-9), most * len(seen))
    assert all(0 <= n <= most for n in got)
    pairs = sorted(zip(seen, got, strict=True))
    assert all(a[1] <= b[1] for a, b in zip(pairs, pairs[1:], strict=False) if a[0] < b[0])


def test_the_papers_rule_by_hand() -> None:
    # mean 2, N = 4: C = 1, 2, 3 get 2, 4, 6; with beta 1/2 1, 2, 3
    assert [number(c, plain_scale([1, 2, 3], 4), 10) for c in (1, 2, 3)] == [2, 4, 6]
    assert [number(c, plain_scale([1, 2, 3], 4, 0.5), 10) for c in (1, 2, 3)] == [1, 2, 3]
    assert [number(c, plain_scale([1, 2, 3], 4), 5) for c in (1, 2, 3)] == [2, 4, 5]


def test_clipping_makes_the_plain_rule_drift_and_the_balanced_one_not() -> None:
    seen = [0.2] * 9 + [9.0] + [0.1 * i for i in range(10)]
    plain = [number(c, plain_scale(seen, 3), 5) for c in seen]
    even = [number(c, balanced_scale(seen, 3, 5), 5) for c in seen]
    assert sum(plain) < 0.8 * 60 and sum(plain) < sum(even) <= 60


def test_the_smallest_beta_holds_down_to_where_it_breaks() -> None:
    # one query needs 0 examples, one needs 4; at N = 2 the second gets round(4 beta)
    scores = [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    beta = smallest_beta([0.0, 2.0], scores, 1.0, 2)
    assert beta == pytest.approx(0.88)  # 4 * 0.87 = 3.48 rounds to 3
    assert smallest_beta([0.0, 2.0], scores, 0.5, 2) == pytest.approx(0.01)
    assert smallest_beta([2.0, 0.0], scores, 1.0, 2) is None


# -- training ------------------------------------------------------------------------------------------------


def test_labels_by_hand() -> None:
    rows = [[0, 0.6, 0.9, 1.0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.2]]
    assert sufficient(rows) == [3, 0, None, 3]
    assert sufficient(rows, 0.1) == [2, 0, None, 3]
    assert sufficient(rows, 0.5) == [1, 0, None, 3]  # a margin never makes a score of 0 enough


def test_reinforce_is_unbiased() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    outputs, rewards = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    exact = torch.tensor(outputs, requires_grad=True)
    (-(exact.softmax(1) * torch.tensor(rewards)).sum(1).mean()).backward()
    loss = policy_gradient(rewards, seed=1)
    drawn = np.stack([loss(outputs, np.arange(3)) for _ in range(8_000)])
    error = drawn.std(axis=0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(axis=0) - exact.grad.numpy()) < 4.5 * error + 1e-12).all()


def planted(n: int, seed: int) -> tuple[Any, Any]:
    """Easy queries need no example and hard ones four, and the embedding shows, with noise, which is which."""
    rng = np.random.default_rng(seed)
    hard = rng.random(n) < 0.5
    vectors = rng.normal(size=(n, 12))
    vectors[:, 5] += np.where(hard, 2.5, -2.5)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, np.where(hard[:, None], np.arange(7) >= 4, True).astype(float)


def test_at_equal_tokens_a_controller_beats_the_same_number_for_all() -> None:
    (train, known), (test, scores) = planted(300, 1), planted(200, 2)
    controller = fit(train, known, seed=3)
    predicted = controller.predict(test)
    for shots in (2, 3):
        scale = balanced_scale(controller.calibration, shots, 6)
        chosen = [number(c, scale, 6) for c in predicted]
        assert np.mean(chosen) < shots * 1.08
        uniform = scores[:, shots].mean()
        assert scores[np.arange(200), chosen].mean() > uniform + 0.3
    np.testing.assert_array_equal(fit(train, known, seed=3).predict(test), predicted)


def test_a_price_on_tokens_refines_to_fewer_examples() -> None:
    train, known = planted(300, 1)
    known = np.where(known > 0, 1.0, 0.97)  # examples hardly matter
    before = fit(train, known, seed=3)
    after = fit(train, known, alpha=0.2, refine=60, seed=3)

    def reward(c: Controller) -> float:
        chances = _mlp.softmax(c.network(train))
        return float((chances * (known - 0.2 * np.arange(7))).sum(axis=1).mean())

    assert reward(after) > reward(before) + 0.1 and after.mean < before.mean


def test_what_cannot_be_learned_from_is_refused() -> None:
    with pytest.raises(InvalidInput, match="nothing to learn"):
        fit(np.ones((2, 3)), np.zeros((2, 4)), unsolved="drop")
    for bad in (np.ones((3, 4)), np.ones((2, 1)), np.ones(2)):
        with pytest.raises(InvalidInput):
            fit(np.ones((2, 3)), bad)
    with pytest.raises(InvalidInput, match="unsolved"):
        fit(np.ones((2, 3)), np.ones((2, 4)), unsolved="keep")


# -- in a plan -----------------------------------------------------------------------------------------------

PAIRS = (("aa bb", "1"), ("cc dd", "2"), ("hard cc", "3"), ("hard dd", "4"))


def test_our_demonstrations_are_right() -> None:
    assert len(OURS) == 10 and len(dict(OURS)) == 10
    worked = [17 + 25, 6 * 7, 30 - 12, 9 * 8 - 10, 36 // 4, 20 + 65, 2 * 3 + 3 * 4, 130 // 2, 15 * 14, 40 * 3 // 4]
    assert [a for _, a in OURS] == [str(n) for n in worked]


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A controller over the scripted embedder's 32 buckets: with the word "hard" it asks for 4, else for 0."""
    engine = ScriptedEngine("", dimensions=32)
    w = np.zeros((32, 5))
    w[engine.words.number("hard") % 32] = [-90, 0, 0, 0, 90]
    network = _mlp.MLP((w,), (np.array([30.0, 0, 0, 0, -30.0]),))
    vectors = [[float((engine.words.number(x) % 32) == j) for j in range(32)] for x in ("bb", "cc", "hard", "dd")]
    file = tmp_path / "pack.json"
    Pack(PAIRS, vectors, Controller(network, (0.0, 4.0))).save(file)
    return str(file)


def world(settings: dict[str, Any], budget: Budget | None = None, on_exceed: str = "degrade"):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine("ok")
    plan = Plan("icl", (DynaICL.from_settings(settings),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build({"answer": engine, "embedder": ScriptedEngine("", model="embedder", dimensions=32)})


@pytest.mark.parametrize(("shots", "n"), [(3, 3), (2.5, 3), (2.4, 2), (100, 10)])
async def test_without_a_controller_every_query_gets_as_many(shots: float, n: int) -> None:
    engine, pipeline = world({"shots": shots})
    answer = await pipeline.ask("What is 2 + 2?")
    system, user = engine.calls[0].messages
    assert text_of(system) == shown(OURS[:n]) and text_of(user) == "What is 2 + 2?"
    assert answer.spend.calls == 1 and not answer.receipts[0].spend
    assert shown(OURS[:9]).startswith(shown(OURS[:n])) or n == 10


async def test_the_controller_gives_to_the_query_that_needs(trained: str) -> None:
    engine, pipeline = world({"pack": trained, "shots": 2})
    easy, hard = await pipeline.ask("qq"), await pipeline.ask("hard")
    assert [len(c.messages) for c in engine.calls] == [1, 2]
    assert text_of(engine.calls[1].messages[0]) == shown(PAIRS)
    assert (easy.receipts[0].fired, hard.receipts[0].fired) == (False, True)
    assert (easy.receipts[0].detail["wanted"], hard.receipts[0].detail["wanted"]) == (0, 4)
    assert easy.spend.calls == hard.spend.calls == 2 and easy.receipts[0].spend.calls == 1
    engine, pipeline = world({"pack": trained, "shots": 2, "beta": 0.5, "balance": False})
    assert (await pipeline.ask("hard")).receipts[0].detail["shots"] == 2


async def test_no_room_on_average_and_most_bound_it(trained: str) -> None:
    engine, pipeline = world({"pack": trained, "shots": 2, "most": 3, "balance": False})
    assert (await pipeline.ask("hard")).receipts[0].detail["shots"] == 3
    engine, pipeline = world({"pack": trained, "most": 0})
    answer = await pipeline.ask("hard")
    assert not answer.receipts[0].fired and answer.spend.calls == 1


async def test_the_nearest_are_shown_the_likest_last(trained: str, tmp_path: Path) -> None:
    engine, pipeline = world({"pack": trained, "shots": 1, "order": "nearest", "balance": False})
    await pipeline.ask("hard hard cc")
    shots = text_of(engine.calls[0].messages[0])
    assert shots.endswith("Q: hard cc\nA: 3") and "cc dd" in shots.split("\n\n")[-2]
    engine, pipeline = world({"shots": 1, "order": "nearest"})  # ours are embedded with the query
    answer = await pipeline.ask("What is half of 90?")
    assert text_of(engine.calls[0].messages[0]) == shown([("What is half of 130?", "65")])
    assert answer.receipts[0].spend.calls == 1 and answer.receipts[0].spend.input > 100
    bare = tmp_path / "bare.json"
    Pack(PAIRS).save(bare)
    with pytest.raises(InvalidInput, match="embeddings"):
        DynaICL(pack=str(bare), order="nearest")
    assert DynaICL(pack=str(bare))._pack()[0].demonstrations == PAIRS


async def test_fewer_are_shown_where_not_all_fit(trained: str) -> None:
    # "Examples:" is 1 word, each pair 5; the query 1
    for settings, budget in (({"tokens": 11}, Budget()), ({}, Budget(input=1 + 1 + 11))):  # the embedding takes 1
        engine, pipeline = world({"pack": trained, "shots": 2, **settings}, budget)
        answer = await pipeline.ask("hard")
        assert text_of(engine.calls[0].messages[0]) == shown(PAIRS[:2])
        assert answer.receipts[0].detail["shots"] == 2 and "2 more do not fit" in answer.receipts[0].reason
    engine, pipeline = world({"pack": trained, "shots": 2}, Budget(input=5))
    answer = await pipeline.ask("hard")
    assert len(engine.calls[0].messages) == 1 and not answer.receipts[0].fired and answer.spend.input == 2
    engine, pipeline = world({"pack": trained, "shots": 2}, Budget(input=1))
    assert "embedding" in (await pipeline.ask("hard")).receipts[0].reason
    for budget in (Budget(input=13), Budget(input=1)):
        with pytest.raises(BudgetExceeded):
            await world({"pack": trained, "shots": 2}, budget, "refuse")[1].ask("hard")


async def test_in_a_conversation_what_it_breaks_is_told(trained: str) -> None:
    talk = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "hard"},
    )
    engine, pipeline = world({"pack": trained, "shots": 2})
    assert (await pipeline.ask(talk)).receipts[0].detail["breaks_cached"] == 4
    assert text_of(engine.calls[0].messages[0]) == "Be kind.\n\n" + shown(PAIRS)
    engine, pipeline = world({"pack": trained, "shots": 2, "place": "turn"})
    assert (await pipeline.ask(talk)).receipts[0].detail["breaks_cached"] == 0
    assert engine.calls[0].messages[:3] == talk[:3] and engine.calls[0].messages[-1] == talk[-1]
    engine, pipeline = world({"shots": 2})  # always the same: it breaks nothing
    assert (await pipeline.ask(talk)).receipts[0].detail["breaks_cached"] == 0


async def test_a_pack_is_read_back_and_told_by_its_content(trained: str, tmp_path: Path) -> None:
    digest = (await world({"pack": trained})[1].ask("qq")).receipts[0].detail["pack"]
    DynaICL(pack=trained, sha256=digest)
    with pytest.raises(InvalidInput, match="SHA-256"):
        DynaICL(pack=trained, sha256="0" * 16)
    data = json.loads(Path(trained).read_text())
    again = Pack.from_dict(data)
    assert again.demonstrations == PAIRS and again.controller is not None
    for change in (
        {"thrifty": "pet-select"},
        {"demonstrations": []},
        {"demonstrations": [{"input": "a"}] * 4},
        {"demonstrations": [{"input": "a", "output": "b"}]},
        {"vectors": data["vectors"][:2]},
        {"calibration": []},
        {"calibration": [0.0]},
        {"layers": "none"},
    ):
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps({**data, **change}))
        with pytest.raises(InvalidInput, match=r"bad\.json"):
            DynaICL(pack=str(bad))


async def test_an_embedder_of_another_name_is_refused(trained: str, tmp_path: Path) -> None:
    pack = Pack.from_dict(json.loads(Path(trained).read_text()))
    for name in ("embedder", "minilm"):
        Pack(pack.demonstrations, pack.vectors, pack.controller, name).save(tmp_path / f"{name}.json")
    assert (await world({"pack": str(tmp_path / "embedder.json")})[1].ask("hard")).receipts[0].fired
    with pytest.raises(InvalidInput, match="'minilm'"):
        await world({"pack": str(tmp_path / "minilm.json")})[1].ask("hard")


async def test_another_embedder_is_refused(trained: str) -> None:
    for settings in ({"pack": trained}, {"pack": trained, "order": "nearest"}):
        plan = Plan("icl", (DynaICL.from_settings(settings),))
        pipeline = plan.build({"answer": ScriptedEngine("x"), "embedder": ScriptedEngine("", dimensions=8)})
        with pytest.raises(InvalidInput, match="32 numbers"):
            await pipeline.ask("hard")


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
    engine, pipeline = world({"pack": trained, "shots": 2, "order": "nearest"})
    answer = await pipeline.ask(messages)
    assert len(answer.receipts) == 1 and answer.receipts[0].reason
    assert [m for m in engine.calls[-1].messages if m.get("role") != "system"] == list(messages)
