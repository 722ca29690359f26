"""Fixed-k: the k nearest by brute force, ties to the earlier passage, order, and no embedding where none is
needed."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest

from thrifty import Account, Budget, BudgetExceeded, Plan
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context.fixed_k import FixedK


def cosine(a: str, b: str) -> float:
    """Cosine of two bags of words, by hand."""
    x, y = (Counter(re.findall(r"\w+", t.lower())) for t in (a, b))
    return sum(x[w] * y[w] for w in x) / math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))


def world(method: FixedK, budget: Budget | None = None, on_exceed: str = "degrade"):  # type: ignore[no-untyped-def]
    answering, embedder = ScriptedEngine("fine"), ScriptedEngine("", model="bag", dimensions=65536)
    plan = Plan("k", (method,), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return (
        answering,
        plan.build({"answer": answering, "embedder": embedder}),
        Account("t", ledger=MemoryLedger()),
    )


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("order", ["document", "rank"])
async def test_the_k_nearest_by_brute_force(k: int, order: str) -> None:
    rng = random.Random(k)
    words = ["ash", "bay", "cod", "dew", "elm", "fog", "gum", "hay"]
    passages = tuple(" ".join(rng.choices(words, k=rng.randint(1, 6))) + f" n{i}" for i in range(12))
    query = "ash bay cod"
    engine, pipeline, account = world(FixedK(k=k, order=order))
    await pipeline.ask(query, account, context=passages)
    scores = [round(cosine(query, p), 6) for p in passages]  # equal scores differ in float noise otherwise
    nearest = sorted(range(12), key=lambda i: (-scores[i], i))[:k]
    got = engine.calls[-1].context
    assert sorted(round(cosine(query, p), 6) for p in got) == sorted(scores[i] for i in nearest)
    if order == "document":
        assert list(got) == [p for p in passages if p in got]
    else:
        falling = [cosine(query, p) for p in got]
        assert falling == pytest.approx(sorted(falling, reverse=True))


async def test_equal_scores_go_to_the_earlier_passage() -> None:
    engine, pipeline, account = world(FixedK(k=2))
    await pipeline.ask("ash", account, context=("bay", "ash cod", "cod ash", "ash dew"))
    assert engine.calls[-1].context == ("ash cod", "cod ash")


async def test_k_or_fewer_embed_nothing() -> None:
    engine, pipeline, account = world(FixedK(k=3))
    answer = await pipeline.ask("ash", account, context=("a", "b", "c"))
    assert answer.spend.calls == 1 and not answer.receipts[0].fired and engine.calls[-1].context == ("a", "b", "c")


async def test_a_budget_without_room_keeps_all_or_refuses() -> None:
    passages = ("ash bay", "cod dew", "elm fog")
    engine, pipeline, account = world(FixedK(k=1), Budget(calls=1))
    answer = await pipeline.ask("ash", account, context=passages)
    assert engine.calls[-1].context == passages and "(calls)" in answer.receipts[0].reason
    _, strict, account = world(FixedK(k=1), Budget(calls=1), "refuse")
    with pytest.raises(BudgetExceeded):
        await strict.ask("ash", account, context=passages)
