"""The semantic cache: nearness by cosines computed by hand, the guard, what must be equal, and the bill."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest

from thrifty import Account, Answer, Budget, BudgetExceeded, Delta, Plan, Receipt, Sampling, Spend
from thrifty.engines.scripted import Draw, Reply, ScriptedEngine
from thrifty.errors import EngineError
from thrifty.ledger import MemoryLedger
from thrifty.meter.prices import PriceTable
from thrifty.methods.route.exact_cache import ExactCache
from thrifty.methods.route.semantic_cache import SemanticCache, differs


def cosine(a: str, b: str) -> float:
    """Cosine of two bags of words, by hand: what the scripted embedder's vectors have."""
    x, y = (Counter(re.findall(r"\w+", t.lower())) for t in (a, b))
    return sum(x[w] * y[w] for w in x) / math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))


class Asking:
    """A plan with a semantic cache above an engine that numbers its answers."""

    def __init__(self, *methods: Any, **options: Any) -> None:
        self.said = 0
        self.engine = ScriptedEngine(self._say, prices=PriceTable.local())
        self.embedder = ScriptedEngine("", model="bag", dimensions=65536, prices=PriceTable.local())
        self.ledger = MemoryLedger()
        self.account = Account("ann", ledger=self.ledger)
        plan = Plan("cached", methods or (SemanticCache(threshold=0.7),), **options)
        self.pipeline = plan.build({"answer": self.engine, "embedder": self.embedder})

    def _say(self, call: Any, draw: Draw) -> Reply:
        self.said += 1
        return Reply(f"answer {self.said}")

    async def ask(self, prompt: Any, **fields: Any) -> Answer:
        return await self.pipeline.ask(prompt, fields.pop("account", self.account), **fields)


def own(answer: Answer) -> Receipt:
    (receipt,) = [r for r in answer.receipts if r.method == "semantic-cache"]
    return receipt


KNOWN = ("how can i reset my password", "when does the shop open on monday", "what is the price of a ticket")


@pytest.mark.parametrize(
    "question",
    [
        "how do i reset my password",
        "when does the shop open on monday please",
        "what is the price of one ticket",
        "how do i change my address",
        "when does the train leave",
    ],
)
async def test_the_nearest_by_hand(question: str) -> None:
    world = Asking(SemanticCache(threshold=0.7, guard=False))
    answers = {known: (await world.ask(known)).text for known in KNOWN}
    best = max(KNOWN, key=lambda known: cosine(question, known))
    answer = await world.ask(question)
    if cosine(question, best) >= 0.7:
        assert answer.text == answers[best] and own(answer).fired
        assert own(answer).detail["cosine"] == pytest.approx(cosine(question, best), abs=1e-4)
    else:
        assert answer.text not in answers.values() and not own(answer).fired


async def test_a_hit_costs_its_embedding_alone_and_the_same_words_nothing() -> None:
    world = Asking()
    first = await world.ask("how can i reset my password")
    near = await world.ask("how do i reset my password")
    same = await world.ask("how can i reset my password")
    assert first.text == near.text == same.text and world.said == 1
    assert own(first).spend == Spend(input=6, calls=1, usd=own(first).spend.usd) and own(first).spend.usd > 0
    assert near.spend == own(near).spend and near.spend.input == 6 and near.spend.calls == 1
    assert same.spend == own(same).spend == Spend()
    assert Spend.from_dict(own(near).detail["saved"]) == first.spend.__class__(
        **{**first.spend.to_dict(), **{"input": 6, "calls": 1, "usd": first.spend.usd - own(first).spend.usd}}
    ), "what the answer itself had cost, without the embedding"
    entries = list(world.ledger.entries())
    assert [e.labels.role for e in entries] == ["embedder", "answer", "embedder"]
    assert {e.labels.method for e in entries if e.labels.role == "embedder"} == {"semantic-cache"}
    assert world.account.settled == first.spend + near.spend + same.spend


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ("What was revenue in Q1 2024?", "What was revenue in Q1 2023?", "numbers"),
        ("Sum 3 and 12", "Sum 12 and 3", "numbers"),
        ("Is it safe to mix bleach and vinegar?", "Is it not safe to mix bleach and vinegar?", "negation"),
        ("Why does it start?", "Why doesn't it start?", "negation"),
        ("Why doesn\u2019t it start?", "Why doesn't it start?", ""),
        ("flights from Paris to London", "flights from London to Paris", "the order of words"),
        ("flights from Paris to London", "flights to Paris from London", "the order of words"),
        ("Did Alice pay Bob?", "Did Bob pay Alice?", "the order of words"),
        ("How do I reset my password?", "How can I reset my password?", ""),
        ("What is the capital of France?", "Tell me the capital of France.", ""),
        ("How do I cancel my subscription?", "I want to cancel my subscription, how do I do that?", ""),
        ("", "", ""),
    ],
)
def test_the_guard(a: str, b: str, why: str) -> None:
    assert differs(a, b) == differs(b, a) == why
    assert differs(a, a) == ""


async def test_a_guarded_neighbour_does_not_hide_the_next_one() -> None:
    world = Asking(SemanticCache(threshold=0.5))
    await world.ask("flights from rome to london today")
    good = await world.ask("cheap flights from london to rome today please")
    answer = await world.ask("flights from london to rome today")
    assert own(answer).fired and answer.text == good.text
    lone = Asking(SemanticCache(threshold=0.5))
    await lone.ask("flights from rome to london")
    refused = await lone.ask("flights from london to rome")
    assert not own(refused).fired and "the order of words" in own(refused).reason and lone.said == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ({"role": "system", "content": "Be rude."}, {"role": "user", "content": "how do i reset it"})},
        {"prompt": ({"role": "user", "content": "how do i reset it", "name": "bob"},)},
        {"context": ("a passage",)},
        {"sampling": Sampling(max_tokens=50)},
        {"sampling": Sampling(seed=1)},
        {"extra": {"user": "bob"}},
        {"account": Account("bob")},
        {
            "prompt": (
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "how do i reset it"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                    ],
                },
            )
        },
    ],
)
async def test_the_surroundings_must_be_equal(fields: dict[str, Any]) -> None:
    world = Asking()
    await world.ask("how can i reset it")
    await world.ask(**{"prompt": "how do i reset it", **fields})
    assert world.said == 2
    await world.ask("how would i reset it")
    assert world.said == 2, "the plain question is still there"


async def test_a_conversation_ends_with_the_question() -> None:
    world = Asking()
    turns = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"})
    await world.ask((*turns, {"role": "user", "content": "how can i reset it"}))
    near = await world.ask((*turns, {"role": "user", "content": "how do i reset it"}))
    assert own(near).fired
    tool = ({"role": "user", "content": "look"}, {"role": "tool", "tool_call_id": "1", "content": "found"})
    for _ in range(2):
        answer = await world.ask(tool)
        assert not own(answer).fired and not own(answer).spend


async def test_long_questions_are_matched_exactly_only() -> None:
    world = Asking(SemanticCache(threshold=0.5, longest=5))
    for question, embedded in (("a b c d e", True), ("a b c d e f", True), ("w" * 60, False)):
        first = await world.ask(question)
        assert bool(own(first).spend) == embedded
        assert own(await world.ask(question)).fired
    near = await world.ask("a b c d e f g")
    assert not own(near).fired and "longer than 5 tokens" in own(near).reason
    assert own(await world.ask("a b c d z")).fired, "five words are near five words"


async def test_where_the_budget_holds_no_embedding_the_words_must_be_the_same() -> None:
    world = Asking(budget=Budget(calls=1))
    first = await world.ask("how can i reset it")
    assert not own(first).fired and "cannot hold an embedding" in own(first).reason and not own(first).spend
    assert own(await world.ask("how can i reset it")).fired
    refusing = Asking(budget=Budget(calls=1), on_exceed="refuse")
    with pytest.raises(BudgetExceeded):
        await refusing.ask("how can i reset it")


@pytest.mark.parametrize(
    "question",
    ["\ud83d half a pair", "\u05de\u05d4 \u05e9\u05dc\u05d5\u05de\u05da", "\u4f60\u597d\u5417", "w" * 1_000_000],
)
async def test_any_text_can_be_asked_twice(question: str) -> None:
    world = Asking()
    await world.ask(question)
    assert own(await world.ask(question)).fired and world.said == 1


async def test_an_embedder_that_is_down_takes_no_answer_with_it() -> None:
    world = Asking()

    async def down(*args: Any) -> Any:
        raise EngineError("the embedder is down", Spend(input=3, calls=1))

    world.embedder.embed = down  # type: ignore[method-assign]
    answer = await world.ask("how can i reset it")
    assert answer.text == "answer 1" and "is down" in own(answer).reason and own(answer).spend.input == 3
    assert own(await world.ask("how can i reset it")).fired


async def test_the_exact_cache_above_answers_first_and_streams() -> None:
    world = Asking(ExactCache(), SemanticCache(threshold=0.7))
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    await world.ask("how can i reset it")
    near = await world.ask("how do i reset it", emit=emit)
    assert own(near).fired and deltas[-1].answer == near and "".join(d.text for d in deltas) == near.text
    again = await world.ask("how do i reset it")
    assert not [r for r in again.receipts if r.method == "semantic-cache"] and again.spend == Spend()
    assert world.said == 1
