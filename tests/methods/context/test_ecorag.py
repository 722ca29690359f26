"""ECoRAG: the loop against a replay by hand, on bags of words and a judge that knows the gold sentence."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Plan, PlanError
from thrifty.call import Call, text_of
from thrifty.engines.scripted import PROVIDES, Draw, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context._judging import Said
from thrifty.methods.context._sentences import Cut, sentences
from thrifty.methods.context.ecorag import Ecorag, label, p_enough
from thrifty.methods.context.fixed_k import FixedK

WORDS = ["ash", "bay", "cod", "dew", "elm", "fog", "gum", "hay", "ivy", "jet", "kin", "log", "oak", "pea", "rye"]
HARD = PROVIDES - {"logprobs"}


def judge_that_knows(gold: str) -> Any:
    """Says yes where the gold sentence stands in the evidence."""

    def script(call: Call, draw: Draw) -> str:
        evidence = text_of(call.messages[0]).split("<evidence>")[1].split("</evidence>")[0]
        return "Yes." if gold in evidence else "no"

    return script


def world(method: Any, judge: Any) -> Any:
    engine = ScriptedEngine("fine")
    asked = ScriptedEngine(judge, model="judge", capabilities=HARD)
    embedder = ScriptedEngine("", model="bag", dimensions=4096)
    pipeline = Plan("e", (method,)).build({"answer": engine, "judge": asked, "embedder": embedder})
    return engine, asked, pipeline, Account("t", ledger=MemoryLedger())


async def sent(method: Ecorag, judge: Any, question: str, passages: tuple[str, ...]) -> tuple[Any, Any, Any]:
    engine, asked, pipeline, account = world(method, judge)
    answer = await pipeline.ask(question, account, context=passages)
    return engine.calls[-1].context, asked.calls, answer.receipts[0]


def corpus(rng: random.Random, n: int = 6) -> tuple[str, ...]:
    """Passages of a few sentences, every word random."""
    made = []
    for _ in range(n):
        told = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))).capitalize() + "." for _ in range(rng.randint(1, 4))]
        made.append(" ".join(told))
    return tuple(made)


def by_cosine(question: str, texts: list[str]) -> list[int]:
    """Sentences by cosine of counted words, computed here."""
    bags = [[t.lower().replace(".", " ").split().count(w) for w in WORDS] for t in [question, *texts]]
    rows = np.array([[float(x) for x in bag] for bag in bags], dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = [float(x) for x in rows[1:] @ rows[0]]
    return sorted(range(len(texts)), key=lambda i: (-round(cosine[i], 5), i))


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 40), st.integers(1, 3), st.sampled_from([1.0, 2.0]))
async def test_the_loop_is_that_of_a_replay(rng: random.Random, tokens: int, step: int, growth: float) -> None:
    passages, question = corpus(rng), " ".join(rng.sample(WORDS, 3))
    units = [(i, s.strip()) for i, p in enumerate(passages) for s in p.replace(". ", ".|").split("|")]
    order = by_cosine(question, [s for _, s in units])
    gold = units[rng.choice(order)][1]
    method = Ecorag(tokens=tokens, step=step, growth=growth, rounds=5)
    kept, calls, receipt = await sent(method, judge_that_knows(gold), question, passages)
    fitting = 0
    while fitting < len(order) and sum(len(units[u][1].split()) for u in order[: fitting + 1]) <= tokens:
        fitting += 1
    if fitting == len(order):
        assert not receipt.fired and kept == passages and not calls
        return
    n, more, enough, asked = min(1, fitting), float(step), False, 0
    for _ in range(5 if n else 0):
        asked += 1
        if any(units[u][1] == gold or gold in units[u][1] for u in order[:n]) or gold in _shown(units, order[:n]):
            enough = True
            break
        if n == fitting:
            break
        n, more = min(fitting, n + int(more)), more * growth
    chosen = order[:n] if enough else order[:fitting]
    assert kept == tuple(_shown(units, chosen).split("\n\n") if chosen else ())
    assert len(calls) == asked == receipt.detail["judgements"] and receipt.detail["enough"] == enough
    assert sum(len(k.split()) for k in kept) <= tokens


def _shown(units: list[tuple[int, str]], chosen: list[int]) -> str:
    by_passage: dict[int, list[str]] = {}
    for u in sorted(chosen):
        by_passage.setdefault(units[u][0], []).append(units[u][1])
    return "\n\n".join(" ".join(texts) for texts in by_passage.values())


async def test_it_stops_at_the_gold_sentence_and_uses_fewer_tokens_than_fixed_k() -> None:
    """A fact among distractors that share the question's words to different degrees."""
    rng, spent = random.Random(1), {"ecorag": 0, "fixed": 0}
    for trial in range(10):
        gold = f"The velvet harbour ledger opened in 19{trial}0."
        noise = [f"A {w} harbour was painted, and a ledger {v}." for w, v in zip(WORDS, WORDS[1:], strict=False)]
        passages = [*noise[:8], gold]
        rng.shuffle(passages)
        question = "When was the velvet harbour ledger opened?"
        engine, asked, pipeline, account = world(Ecorag(tokens=70), judge_that_knows(gold))
        await pipeline.ask(question, account, context=tuple(passages))
        assert gold in engine.calls[-1].context
        spent["ecorag"] += engine.count(engine.calls[-1])
        engine, _, pipeline, account = world(FixedK(k=5), "no")
        await pipeline.ask(question, account, context=tuple(passages))
        assert gold in engine.calls[-1].context
        spent["fixed"] += engine.count(engine.calls[-1])
    assert spent["ecorag"] < spent["fixed"] / 2


@pytest.mark.parametrize("said", ["yes", "no"])
async def test_a_judge_of_one_mind(said: str) -> None:
    """Always yes leaves one sentence; always no leaves what fits."""
    passages = ("Ash bay cod. Dew elm.", "Fog gum hay. Ivy jet kin log.", "Oak pea. Rye ash bay.")
    kept, calls, receipt = await sent(Ecorag(tokens=9, rounds=20), said, "ivy jet kin log", passages)
    if said == "yes":
        assert kept == ("Ivy jet kin log.",) and len(calls) == 1 and receipt.detail["enough"]
    else:
        assert sum(len(k.split()) for k in kept) in (7, 8, 9) and "never judged enough" in receipt.reason


async def test_more_judging_than_saving_is_told() -> None:
    passages = ("Ash bay cod. Dew elm.", "Fog gum hay.")
    _, _, receipt = await sent(Ecorag(tokens=6, rounds=20), "no", "ash bay", passages)
    assert "more than was saved" in receipt.reason and receipt.spend.tokens > receipt.before - receipt.after


@pytest.mark.parametrize("order", ["document", "rank"])
async def test_order_units_and_headings(order: str) -> None:
    passages = ("Fog\nGum hay elm. Ivy jet.", "Ash bay cod. Dew elm.", "Oak pea rye.")
    method = Ecorag(tokens=8, rounds=0, order=order)
    kept, calls, receipt = await sent(method, "no", "ash bay cod ivy", passages)
    assert not calls and kept == (
        ("Fog\nIvy jet.", "Ash bay cod.") if order == "document" else ("Ash bay cod.", "Fog\nIvy jet.")
    )
    kept, _, receipt = await sent(Ecorag(tokens=6, rounds=0, unit="passage"), "no", "ash bay cod", passages)
    assert kept == (passages[1],) and receipt.detail["units"] == 3


async def test_nothing_fits() -> None:
    kept, calls, receipt = await sent(Ecorag(tokens=1), "yes", "ash", ("Ash bay cod.", "Dew elm."))
    assert kept == () and receipt.fired and not calls and receipt.after == 1


def test_probabilities_and_labels() -> None:
    for yes, no in ((-0.2, -3.0), (-3.0, -0.2), (-1.0, -1.0)):
        expected = math.exp(yes) / (math.exp(yes) + math.exp(no))
        assert p_enough(Said("no", {"yes": yes, "no": no})) == pytest.approx(expected)
    assert p_enough(Said("", {"yes": -800.0, "no": 0.0})) == pytest.approx(0.0, abs=1e-300)
    # by the paper's definitions, with a scripted reader: who is right with which sentences before him
    reader = {"": False, "strong": True, "weak": False, "bad": False, "strong+weak": True, "strong+bad": False}
    assert label(reader[""], reader["strong"], None) == "strong"
    assert label(reader[""], reader["weak"], reader["strong+weak"]) == "weak"
    assert label(reader[""], reader["bad"], reader["strong+bad"]) == "distractor"


async def test_logprobs_are_compared_with_the_threshold() -> None:
    """A scripted engine's log-probability of a word is made up but known; the other label has what is left."""
    engine, embedder = ScriptedEngine("yes"), ScriptedEngine("", dimensions=512)
    probe = await engine.generate(Call(({"role": "user", "content": "x"},), Account("t")).with_sampling(logprobs=True))
    assert probe.logprobs
    p = math.exp(probe.logprobs[0])
    for threshold, enough in ((p - 0.01, True), (p + 0.01, False)):
        method = Ecorag(tokens=5, rounds=1, threshold=threshold)
        pipeline = Plan("e", (method,)).build({"answer": engine, "embedder": embedder})
        answer = await pipeline.ask("ash", context=("Ash bay cod.", "Dew elm. Fog."))
        assert answer.receipts[0].detail["enough"] == enough


def test_it_needs_an_embedder() -> None:
    with pytest.raises(PlanError, match="embedder"):
        Plan("e", (Ecorag(),)).build(ScriptedEngine("a"))


# -- sentences -----------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.sampled_from("aB. \n?!。“)1\t"), max_size=60))
def test_sentences_and_cuts_lose_nothing(text: str) -> None:
    assert "".join(sentences(text)) == text
    cut = Cut.of(text)
    assert cut.heading + "".join(cut.sentences) == text
    every = list(range(len(cut.sentences)))
    assert cut.keep(every) == (text if every else "") and cut.keep([]) == ""
    for i in every:
        assert cut.keep([i]).split() == (cut.heading + cut.sentences[i]).split()


def test_sentences() -> None:
    assert sentences('It cost 3.50 in the U.S. Army store. "Why?" he said.') == [
        "It cost 3.50 in the U.S. Army store. ",
        '"Why?" ',
        "he said.",
    ]
    wrapped = "This line is long enough to have been wrapped by an editor at some\ncolumn. Next."
    assert len(sentences(wrapped)) == 2 and len(sentences("- one\n- two\n- three")) == 3
    assert sentences("今天下雨。明天呢？") == ["今天下雨。", "明天呢？"]
    assert len(sentences("A. " * 100_000)) == 1  # initials, and no quadratic time
