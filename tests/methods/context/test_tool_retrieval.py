"""Tool retrieval: the nearest by brute force, who always stays, what the model is told, and what a new set costs."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from thrifty import Account, Budget, BudgetExceeded, InvalidInput, Plan
from thrifty.call import Call, text_of
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context.tool_retrieval import ToolRetrieval, card, choose, tool_name

WORDS = ["ash", "bay", "cod", "dew", "elm", "fog", "gum", "hay", "ivy", "jet"]


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def catalogue(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [tool(f"t{i}", " ".join(rng.choices(WORDS, k=rng.randint(3, 8))) + " filler" * 30) for i in range(n)]


def cosine(a: str, b: str) -> float:
    """Cosine of two bags of words, by hand."""
    x, y = (Counter(re.findall(r"\w+", t.lower())) for t in (a, b))
    return sum(x[w] * y[w] for w in x) / math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))


def user(*texts: str) -> list[dict[str, Any]]:
    """Users' messages with an assistant's between."""
    out: list[dict[str, Any]] = []
    for text in texts:
        out += [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return out[:-1]


async def sent(
    method: ToolRetrieval,
    tools: list[dict[str, Any]],
    messages: list[dict[str, Any]],
    budget: Budget | None = None,
    on_exceed: str = "degrade",
    **fields: Any,
) -> tuple[Call, Any, Account]:
    engine, embedder = ScriptedEngine("fine"), ScriptedEngine("", model="bag", dimensions=65536)
    plan = Plan("t", (method,), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    pipeline = plan.build({"answer": engine, "embedder": embedder})
    account = Account("t", ledger=MemoryLedger())
    call = replace(pipeline.call("x", account), messages=tuple(messages), tools=tuple(tools), **fields)
    answer = await pipeline(call)
    return engine.calls[-1], answer, account


def names(call: Call) -> list[str]:
    return [tool_name(t) for t in call.tools]


@pytest.mark.parametrize("k", [1, 3, 9])
async def test_the_k_nearest_by_brute_force(k: int) -> None:
    tools, query = catalogue(20, k), "ash bay cod elm"
    made, answer, _ = await sent(ToolRetrieval(k=k), tools, user(query))
    scores = [round(cosine(query, card(t)), 6) for t in tools]
    best = sorted(range(20), key=lambda i: (-scores[i], i))[:k]
    assert sorted(round(cosine(query, card(t)), 6) for t in made.tools) == sorted(scores[i] for i in best)
    assert [t for t in tools if t in made.tools] == list(made.tools), "the catalogue's order"
    receipt = answer.receipts[0]
    assert receipt.fired and receipt.after == answer.spend.input - receipt.spend.input < receipt.before
    assert receipt.spend.calls == 1 and receipt.detail["kept"] == names(made)


def test_choice_against_every_subset_rule() -> None:
    """Pinned, then the newest query's best, then older ones', within the tokens; by a loop over ranks."""
    rng = random.Random(1)
    for _ in range(200):
        n, q, k, most = rng.randint(1, 12), rng.randint(1, 3), rng.randint(1, 5), rng.choice([0, 10, 30])
        scores = [[rng.random() for _ in range(n)] for _ in range(q)]
        sizes = [rng.randint(1, 9) for _ in range(n)]
        pinned = rng.sample(range(n), rng.randint(0, min(2, n)))
        got = choose(scores, sizes, pinned, k=k, most=most)
        tops = [set(sorted(range(n), key=lambda i: -row[i])[:k]) for row in scores]  # noqa: B023
        assert set(pinned) <= set(got) <= set(pinned).union(*tops)
        if not most:
            assert set(got) == set(pinned).union(*tops)
        elif sum(sizes[i] for i in pinned) <= most:
            assert sum(sizes[i] for i in got) <= most


async def test_who_always_stays() -> None:
    tools = [*catalogue(12), {"type": "web_search"}]
    tools[5]["function"]["description"] = "ash " * 9
    called = {"id": "c", "type": "function", "function": {"name": "t2", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "ash"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c", "content": "recall #t9"},
    ]
    choice = {"type": "function", "function": {"name": "t7"}}
    made, answer, _ = await sent(ToolRetrieval(k=1, always="t4, t11"), tools, messages, extra={"tool_choice": choice})
    assert names(made) == ["t2", "t4", "t5", "t7", "t11", ""], "called, always, nearest, demanded, the provider's own"
    assert made.extra == {"tool_choice": choice}
    with pytest.raises(InvalidInput, match="did you mean 't7'"):
        await sent(ToolRetrieval(k=1), tools, messages, extra={"tool_choice": {"function": {"name": "t7_"}}})
    # a call to a tool that nobody knows is history like any other
    messages[1]["tool_calls"] = [{**called, "function": {"name": "gone", "arguments": "{}"}}]
    made, _, _ = await sent(ToolRetrieval(k=1, always="nobody"), tools, messages)
    assert names(made) == ["t5", ""]


async def test_those_left_out_are_named_and_come_back() -> None:
    tools = catalogue(8)
    system = {"role": "system", "content": "Be kind."}
    made, _, _ = await sent(ToolRetrieval(k=2), tools, [system, *user("ash bay")])
    told = text_of(made.messages[0])
    assert told.startswith("Be kind.\n\n") and made.messages[1:] == tuple(user("ash bay"))
    assert {f"t{i}" for i in range(8)} == set(names(made)) | set(re.findall(r"t\d", told))
    missing = next(f"t{i}" for i in range(8) if f"t{i}" not in names(made))
    asked = [system, *user("ash bay"), {"role": "assistant", "content": f"recall #{missing}."}, *user("go on")]
    made, _, _ = await sent(ToolRetrieval(k=2), tools, asked)
    assert missing in names(made)
    made, _, _ = await sent(ToolRetrieval(k=2, reversible=False), tools, asked)
    assert made.messages == tuple(asked)
    made, _, _ = await sent(ToolRetrieval(k=2), tools, user("ash bay"))
    assert made.messages[0]["role"] == "system" and made.messages[1:] == tuple(user("ash bay"))


async def test_tokens_of_schemas_are_a_limit() -> None:
    tools = catalogue(20)
    size = ScriptedEngine("").words
    for most in (70, 150, 400):
        made, answer, _ = await sent(ToolRetrieval(k=20, tokens=most), tools, user("ash bay"))
        taken = sum(len(size.split(json.dumps(t, sort_keys=True, separators=(",", ":")))) for t in made.tools)
        assert 0 < taken <= most < 20 * 31 and "take" not in answer.receipts[0].reason
    made, answer, _ = await sent(ToolRetrieval(k=20, tokens=20, always="t1,t2"), tools, user("ash bay"))
    assert names(made) == ["t1", "t2"] and "always stay take" in answer.receipts[0].reason


async def test_a_set_that_stays_keeps_the_cached_prefix_and_a_new_one_breaks_it() -> None:
    tools = [tool(f"t{i}", word + " filler" * 40) for i, word in enumerate(WORDS)]
    method = ToolRetrieval(k=1, reversible=False)
    first, _, _ = await sent(method, tools, user("ash"))
    same, answer, _ = await sent(method, tools, user("ash", "ash again"))
    assert same.tools == first.tools and answer.receipts[0].detail["cache_broken"] == 0
    other, answer, _ = await sent(method, tools, user("ash", "bay"))
    assert names(other) == ["t0", "t1"] and "breaks" in answer.receipts[0].reason
    detail = answer.receipts[0].detail
    assert detail["cached_after"] == 0 and detail["cache_broken"] == _words(first)
    # the same turns with the last message alone: the old tool goes
    last, _, _ = await sent(replace(method, query="last"), tools, user("ash", "bay"))
    assert names(last) == ["t1"]
    # long talk, few tools: the discount lost is more than what was left out
    talk = [*user("ash " + "word " * 900), {"role": "assistant", "content": "yes"}, *user("bay")]
    _, answer, _ = await sent(method, tools, talk)
    receipt = answer.receipts[0]
    saved = receipt.before - receipt.after
    assert receipt.detail["net_saved"] == pytest.approx(saved - 0.9 * receipt.detail["cached_before"])
    assert receipt.detail["net_saved"] < 0 and "loss" in receipt.reason


def _words(call: Call) -> int:
    """Words of tools, each as JSON, and of messages."""
    words = ScriptedEngine("").words
    tools = sum(len(words.split(json.dumps(t, sort_keys=True, separators=(",", ":")))) for t in call.tools)
    return tools + sum(len(words.split(text_of(m))) for m in call.messages)


async def test_nothing_is_embedded_where_nothing_can_go() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for tools, messages, why in (
        (catalogue(8), user("ash"), "covers all 8"),
        ([], user("ash"), "no tools"),
        (catalogue(20), [{"role": "user", "content": [image]}], "no user message"),
        (catalogue(20), [{"role": "tool", "tool_call_id": "c", "content": "ash"}], "no user message"),
    ):
        made, answer, _ = await sent(ToolRetrieval(), tools, messages)
        assert answer.spend.calls == 1 and why in answer.receipts[0].reason
        assert made.tools == tuple(tools) and made.messages == tuple(messages)


async def test_a_budget_that_cannot_hold_the_embedding() -> None:
    tools, messages = catalogue(20), user("ash bay")
    plain, answer, _ = await sent(ToolRetrieval(k=100), tools, messages)
    limit = Budget(input=answer.spend.input)
    made, answer, account = await sent(ToolRetrieval(k=2), tools, messages, limit)
    assert made.tools == plain.tools and "all kept" in answer.receipts[0].reason
    with pytest.raises(BudgetExceeded):
        await sent(ToolRetrieval(k=2), tools, messages, limit, "refuse")


def test_cards_of_all_kinds_of_tools() -> None:
    flat = {"name": "getUserName", "description": "Names a user.", "input_schema": {"properties": {"id": {}}}}
    assert card(flat) == "get User Name: Names a user. (id)" and tool_name(flat) == "getUserName"
    assert card({"type": "custom", "custom": {"name": "run-it"}}) == "run it: "
    assert tool_name({"type": "web_search"}) == ""
    assert card(tool("x", "y", properties=None)) and card({"function": {"name": "a", "parameters": None}}) == "a: "
