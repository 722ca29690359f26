"""TCRA's semantic compression: impacts and removal against leaving out each word by brute force, on bags of words."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Budget, Plan
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context import tcra
from thrifty.methods.context.tcra import Tcra, protected, split_words

WORDS = ["ash", "bay", "cod", "dew", "elm", "fog", "gum", "hay", "ivy", "jet", "kin", "log"]


async def sent(method: Tcra, passages: tuple[str, ...], budget: Budget | None = None) -> tuple[Any, Any, Any]:
    engine, embedder = ScriptedEngine("fine"), ScriptedEngine("", model="bag", dimensions=4096)
    pipeline = Plan("t", (method,), budget or Budget()).build({"answer": engine, "embedder": embedder})
    account = Account("t", ledger=MemoryLedger())
    answer = await pipeline.ask("So?", account, context=passages)
    assert answer.spend == account.settled
    return engine.calls[-1].context, answer.receipts[0], answer


def bag(words: list[str]) -> Any:
    row = np.array([float(words.count(w)) for w in WORDS])
    return row / np.linalg.norm(row)


def impacts(sentence: list[str]) -> list[float]:
    """How far the embedding moves without each word, by brute force."""
    whole = bag(sentence)
    rest = [sentence[:i] + sentence[i + 1 :] for i in range(len(sentence))]
    return [float(np.linalg.norm(whole - bag(r))) if r else 2.0 for r in rest]


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([0.1, 0.2, 0.5, 0.75, 0.9]))
async def test_the_least_words_go_as_brute_force_has_it(rng: random.Random, ratio: float) -> None:
    told = [[rng.choice(WORDS) for _ in range(rng.randint(2, 7))] for _ in range(rng.randint(1, 4))]
    passage = " ".join(" ".join(s).capitalize() + "." for s in told)
    kept, receipt, _ = await sent(Tcra(ratio=ratio), (passage,))
    n = sum(map(len, told))
    scores = [x for s in told for x in impacts(s)]
    order = sorted(range(n), key=lambda i: (round(scores[i], 5), i))
    most = int(n * (1 - ratio) + 1e-9)
    gone = set(order[: n - most])
    words = passage.split()
    expected = " ".join(w for i, w in enumerate(words) if i not in gone)
    assert kept == ((expected,) if expected else ())
    assert receipt.fired == bool(gone)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet=st.sampled_from("ab 1.\n'不 notT"), max_size=50), min_size=1, max_size=3),
    st.floats(0.0, 0.99),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["sentence", "passage"]),
)
async def test_a_subsequence_of_words_within_the_ratio(
    texts: list[str], ratio: float, group: int, rounds: int, protect: bool, unit: str
) -> None:
    method = Tcra(ratio=ratio, group=group, rounds=rounds, protect=protect, unit=unit)
    kept, receipt, _ = await sent(method, tuple(texts))
    if not receipt.fired:
        assert kept == tuple(texts)
        return
    left = list(kept)
    count = lambda t: len(t.split())  # noqa: E731  tokens of the scripted engine, here
    for text in texts:
        most = int(count(text) * (1 - ratio) + 1e-9)
        if left and is_subsequence(split_words(left[0]), split_words(text)) and count(left[0]) <= most:
            left.pop(0)
        else:
            assert not text.strip() or most == 0 or group > 1 or not spaced(text)
    assert not left


def is_subsequence(few: list[str], many: list[str]) -> bool:
    rest = iter(w.strip() for w in many)
    return all(w.strip() in rest for w in few)


def spaced(text: str) -> bool:
    """Whether a token is a word: not so where characters of Chinese stand in a row."""
    return len(split_words(text.strip())) == len(text.split())


async def test_nothing_at_ratio_0_and_nearly_nothing_left_at_099() -> None:
    text = "Ash bay cod. Dew elm fog."
    kept, receipt, answer = await sent(Tcra(ratio=0.0), (text,))
    assert kept == (text,) and answer.spend.calls == 1 and not receipt.fired
    kept, receipt, _ = await sent(Tcra(ratio=0.99), (text, "Gum " * 200))
    assert kept == ("Gum Gum ",) and receipt.detail["emptied"] == 1 and "no word left" in receipt.reason


async def test_numbers_and_negations_go_last() -> None:
    text = "Do not ever take 40 pills of the red box without water"
    for ratio in (0.2, 0.5, 0.7):
        kept, _, _ = await sent(Tcra(ratio=ratio), (text,))
        assert {"not", "40", "without"} <= set(kept[0].split()) and len(kept[0].split()) <= 12 * (1 - ratio)
    kept, _, _ = await sent(Tcra(ratio=0.9), (text,))
    assert len(kept[0].split()) == 1 and kept[0] in ("not", "40", "without")
    said = "no never Nothing can't cannot won’t neither unless 7th (not) nor"
    assert all(map(protected, said.split()))
    assert not any(map(protected, ["knot", "note", "another", "nothingness", "ant", "want"]))


async def test_rounds_measure_anew() -> None:
    """Two of the same word: each alone hardly matters, so one look takes both; a second look sees that one is left."""
    text = "ash ash bay cod dew elm fog gum"
    once, first, _ = await sent(Tcra(ratio=0.25), (text,))
    twice, second, _ = await sent(Tcra(ratio=0.25, rounds=2), (text,))
    assert once[0].split().count("ash") == 0 or twice[0].split().count("ash") >= once[0].split().count("ash")
    assert second.spend.input > first.spend.input and len(twice[0].split()) == len(once[0].split()) == 6
    # by brute force: the second removal is the least of what was left after the first
    words = text.split()
    for _ in range(2):
        scores = impacts(words)
        words.pop(min(range(len(words)), key=lambda i: (round(scores[i], 5), i)))
    assert twice[0].split() == words


async def test_words_in_groups_and_lines_that_still_end() -> None:
    kept, _, _ = await sent(Tcra(ratio=0.5, group=2), ("ash bay cod dew elm fog gum hay",))
    left = kept[0].split()
    assert len(left) == 4 and all(
        left[i : i + 2] in (["ash", "bay"], ["cod", "dew"], ["elm", "fog"], ["gum", "hay"]) for i in (0, 2)
    )
    kept, _, _ = await sent(Tcra(ratio=0.3, unit="passage"), ("one 1 bay\ntwo 2 bay\nsix 6 bay",))
    assert [line[:3] for line in kept[0].split("\n") if line.strip()] and kept[0].count("\n") == 2


async def test_what_is_read_is_told_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """n words in a sentence: the sentence once and n times without a word. In requests of at most BATCH texts and the
    last sentence's; long sentences are embedded in pieces."""
    words = [f"w{i}" for i in range(10)]
    _, receipt, _ = await sent(Tcra(ratio=0.2), (" ".join(words),))
    assert receipt.spend.input == 10 + 10 * 9 and receipt.spend.calls == 1
    assert f"read {receipt.spend.input} tokens" in receipt.reason
    monkeypatch.setattr(tcra, "BATCH", 8)
    kept, batched, _ = await sent(Tcra(ratio=0.2), tuple(" ".join(words) + f" x{i}" for i in range(3)))
    assert batched.spend.calls == 3
    monkeypatch.setattr(tcra, "PIECE_WORDS", 5)
    _, pieces, _ = await sent(Tcra(ratio=0.2), (" ".join(words),))
    assert pieces.spend.input == 2 * (5 + 5 * 4)


async def test_a_budget_without_room_for_the_embedding() -> None:
    words = " ".join(f"w{i}" for i in range(10))
    kept, receipt, answer = await sent(Tcra(ratio=0.2), (words,), Budget(input=60))
    assert kept == (words,) and not receipt.fired and "all kept" in receipt.reason and answer.spend.input == 11
    # the first of two rounds is paid, the second is not: what the first took is gone
    kept, receipt, answer = await sent(Tcra(ratio=0.4, rounds=2), (words,), Budget(input=130))
    assert receipt.fired and "so fewer went" in receipt.reason and len(kept[0].split()) == 8
    assert answer.spend.input == 100 + 9


@given(st.text(alphabet=st.sampled_from("ab \n不.ぁ"), max_size=40))
def test_words_joined_are_the_text(text: str) -> None:
    assert "".join(split_words(text)) == text
