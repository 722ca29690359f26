"""Refiner: what comes out stands in the passages, byte for byte; the form survives being read; two hops stay together
without a model; the budget is never passed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Plan
from thrifty.call import Call, text_of
from thrifty.engines.scripted import Draw, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context._sections import Quote, Sources, checked, parse, render, within
from thrifty.methods.context.refiner import Refiner, names

WORDS = ["ash", "bay", "cod", "dew", "elm", "fog", "gum", "hay", "ivy", "jet", "kin", "log"]
PASSAGES = (
    "Arrival\nArrival is a film of 2016. It was directed by Jane Roe. Critics liked its music a great deal.",
    "Jane Roe\nJane Roe was born in Oslo. She studied law, and gave it up after a year.",
    "Whales\nThe blue whale eats krill. It sings at night, far from any coast.",
    "Bread\nRye bread keeps for a week. Wheat bread is best on its first day.",
)
QUESTION = "Where was the director of Arrival born?"


async def sent(
    method: Refiner, judge: Any = "", passages: tuple[str, ...] = PASSAGES, question: str = QUESTION, embed: bool = True
) -> tuple[Any, Any, Any]:
    engine, asked = ScriptedEngine("fine"), ScriptedEngine(judge, model="judge")
    roles = {"embedder": ScriptedEngine("", dimensions=4096)} if embed else {}
    pipeline = Plan("r", (method,)).build({"answer": engine, "judge": asked, **roles})
    account = Account("t", ledger=MemoryLedger())
    answer = await pipeline.ask(question, account, context=passages)
    assert answer.spend == account.settled
    return engine.calls[-1].context, asked.calls, answer.receipts[0]


# -- the form ------------------------------------------------------------------------------------------------

line = st.text(alphabet=st.sampled_from("abc XY1,'?"), min_size=1, max_size=20).map(str.strip).filter(bool)


@given(st.lists(st.tuples(st.integers(1, 5), line, st.lists(line, min_size=1, max_size=3)), max_size=8))
def test_the_form_survives_being_read(drawn: list[tuple[int, str, list[str]]]) -> None:
    quotes = [Quote(s, title, "\n".join(text)) for s, title, text in drawn]
    numbers = {s: i + 1 for i, s in enumerate(dict.fromkeys(q.section for q in quotes))}
    expected = sorted((Quote(numbers[q.section], q.title, q.text) for q in quotes), key=lambda q: q.section)
    read = parse(render(quotes))
    assert read == expected and render(read) == render(quotes)


def test_forms_that_models_write() -> None:
    assert parse("Here you are:\n\n**1.1. ## Oslo**\nIt snows.\n1.2 Bergen: It rains.\n\n2. Turku\nIt thaws.") == [
        Quote(1, "Oslo", "It snows."),
        Quote(1, "Bergen", "It rains."),
        Quote(2, "Turku", "It thaws."),
    ]
    assert parse("It snows in Oslo.") == parse("") == parse("1.1. ## Nothing below") == []


def test_only_what_stands_there_passes() -> None:
    sources = Sources(PASSAGES)
    said = [
        Quote(1, "Jane Roe", "jane roe was born in Oslo! She ate a whale."),  # case and marks; an invention
        Quote(1, "Arrival", "It was directed by Jane Roe."),
        Quote(1, "Nobody's title", "The blue whale eats much krill."),  # one word too many
        Quote(2, "Bread", "Rye bread never keeps, and Jane lives on it in Turku."),
        Quote(2, "Jane Roe", "Jane Roe was born in Oslo."),  # again
    ]
    kept, thrown = checked(said, sources, 0.9)
    assert kept == [
        Quote(1, "Jane Roe", "Jane Roe was born in Oslo.", 1),
        Quote(1, "Arrival", "It was directed by Jane Roe.", 0),
        Quote(1, "Whales", "The blue whale eats krill.", 2),
    ]
    assert thrown == 2
    assert len(checked(said, sources, 1.0)[0]) == 2


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.floats(0.5, 1.0))
def test_every_sentence_let_through_is_a_slice_of_its_passage(rng: random.Random, near: float) -> None:
    texts = [_text(rng) for _ in range(3)]
    said = []
    for _ in range(5):
        words = rng.choice(texts).split()
        start = rng.randrange(len(words))
        piece = words[start : start + rng.randint(1, 6)]
        if rng.random() < 0.5:
            piece[rng.randrange(len(piece))] = rng.choice(WORDS)
        said.append(Quote(rng.randint(1, 2), "x", " ".join(piece)))
    kept, thrown = checked(said, Sources(texts), near)
    for quote in kept:
        squeezed = " ".join(texts[quote.source].split())
        rest = quote.text
        while rest:  # slices, joined by a space
            size = max(n for n in range(len(rest) + 1) if rest[:n] in squeezed)
            assert size, f"{rest!r} stands nowhere in {squeezed!r}"
            rest = rest[size:].lstrip()
    assert thrown <= sum(q.text.count(".") + 1 for q in said)


def _text(rng: random.Random) -> str:
    told = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))).capitalize() for _ in range(rng.randint(1, 4))]
    return ". ".join(told) + "."


@given(
    st.lists(st.tuples(st.integers(1, 3), st.lists(st.sampled_from(WORDS), min_size=1, max_size=9)), max_size=6),
    st.integers(0, 40),
)
def test_within_never_passes_the_limit(drawn: list[tuple[int, list[str]]], most: int) -> None:
    quotes = [Quote(s, "T", ". ".join(words) + ".") for s, words in drawn]

    def count(text: str) -> int:
        return len(text.split())

    kept = within(quotes, most, count)
    assert count(render(kept)) <= most
    assert len(kept) == len(quotes) or count(render(quotes[: len(kept) + 1])) > most
    assert [q.title for q in kept] == ["T"] * len(kept) and kept[:-1] == quotes[: max(0, len(kept) - 1)]


# -- with a model --------------------------------------------------------------------------------------------


async def test_what_the_model_copies_takes_the_place_of_the_passages() -> None:
    said = (
        "1.1. ## Arrival\nIt was directed by Jane Roe.\n\n1.2. ## Jane Roe\nJane Roe was born in Oslo.\n\n"
        "2.1. ## Whales\nWhales are born in Oslo too."
    )
    context, calls, receipt = await sent(Refiner(tokens=40), said)
    assert context == ("1.1. ## Arrival\nIt was directed by Jane Roe.\n\n1.2. ## Jane Roe\nJane Roe was born in Oslo.",)
    assert receipt.fired and receipt.detail["thrown"] == 1 and receipt.detail["sources"] == [0, 1]
    prompt = text_of(calls[0].messages[0])
    assert all(p.split("\n")[1] in prompt for p in PASSAGES) and QUESTION in prompt
    assert calls[0].sampling.max_tokens == 40 + 64


async def test_none_leaves_no_passage_and_silence_does_not() -> None:
    context, _, receipt = await sent(Refiner(tokens=40), "None.".upper())
    assert context == () and receipt.fired and "nothing relevant" in receipt.reason
    context, _, receipt = await sent(Refiner(tokens=40), "I have none of these.")
    assert context and "no quote of the passages, taken by similarity" in receipt.reason


async def test_a_cut_message_keeps_its_other_paragraphs() -> None:
    engine, judge = ScriptedEngine("fine"), ScriptedEngine("1.1. ## Jane Roe\nJane Roe was born in Oslo.", model="j")
    pipeline = Plan("r", (Refiner(tokens=20, chunk_over=5),)).build({"answer": engine, "judge": judge})
    await pipeline.ask("\n\n".join([*PASSAGES, QUESTION]))
    assert engine.calls[-1].messages[0]["content"] == f"1.1. ## Jane Roe\nJane Roe was born in Oslo.\n\n{QUESTION}"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 3), st.booleans(), st.randoms(use_true_random=False))
async def test_never_more_than_asked_for(tokens: int, kind: int, embed: bool, rng: random.Random) -> None:
    passages = tuple(_text(rng) for _ in range(6))

    def copy(call: Call, draw: Draw) -> str:
        return "\n\n".join(f"1.{i}. ## Document {i}\n{p}" for i, p in enumerate(passages, 1))

    judge = (copy, "so", "NONE", "")[kind]
    context, _, receipt = await sent(Refiner(tokens=tokens), judge, passages, " ".join(WORDS[:4]), embed)
    size = len("\n\n".join(context).split())
    assert size <= tokens or not receipt.fired
    if not receipt.fired:
        assert context == passages
        assert sum(len(p.split()) for p in passages) <= tokens or "save nothing" in receipt.reason


# -- without a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("embed", [True, False])
async def test_both_hops_stand_in_one_section_at_a_fifth_of_the_tokens(embed: bool) -> None:
    total = sum(len(p.split()) for p in PASSAGES)
    noise = tuple(
        f"Note {i}\nNobody was seen at the {w} in winter. Nothing else happened there." for i, w in enumerate(WORDS)
    )
    total += sum(len(p.split()) for p in noise)
    context, calls, receipt = await sent(
        Refiner(tokens=total // 5, by="sentences"), "", (*PASSAGES, *noise), embed=embed
    )
    assert not calls and len("\n\n".join(context).split()) <= total // 5
    sections = [text for text in parse("\n\n".join(context)) if "Jane Roe" in text.text]
    assert any("directed by Jane Roe" in q.text for q in sections) and any("born in Oslo" in q.text for q in sections)
    assert len({q.section for q in sections}) == 1


async def test_nothing_in_common_leaves_nothing() -> None:
    context, _, receipt = await sent(Refiner(tokens=20, by="sentences"), "", PASSAGES, "zebra xylophone")
    assert context == () and receipt.fired and "0 quotes" in receipt.reason


def test_names() -> None:
    assert names("She saw McCoy in 1999, 3 times; élan of Éva.") == {"mccoy", "1999", "éva", "saw"} - {"saw"}
