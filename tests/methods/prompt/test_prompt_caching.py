"""Prompt caching against caches that are simulated from what is sent: block by block, word by word."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

import pytest

from thrifty import Account, Answer, Call, Plan, Receipt
from thrifty.call import text_of
from thrifty.engines.openai import OpenAIEngine
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.prompt._prefix import PrefixMemory, prefix_of
from thrifty.methods.prompt.prompt_caching import PromptCaching

MARK = {"type": "ephemeral"}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def message(role: str, words: str) -> dict[str, Any]:
    """A message whose text begins with a space, so that the words of messages can be counted one by one."""
    return {"role": role, "content": " " + words}


def world(method: PromptCaching, model: str = "scripted"):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine("fine", model=model)
    return engine, Plan("cached", (method,)).build(engine), Account("ann")


def own(answer: Answer) -> Receipt:
    (receipt,) = [r for r in answer.receipts if r.method == "prompt-caching"]
    return receipt


def marks(call: Call) -> list[str]:
    """Where breakpoints were sent."""
    found = [f"tool {t['function']['name']}" for t in call.tools if "cache_control" in t]
    for i, m in enumerate(call.messages):
        parts = m["content"] if isinstance(m["content"], list) else []
        found += [f"{m['role']} {i}" for p in parts if "cache_control" in p]
    return found


# -- a simulated server ----------------------------------------------------------------------------------------


class Anthropic:
    """A cache of prefixes in blocks: written up to each breakpoint, read up to the longest one found."""

    def __init__(self) -> None:
        self.written: set[tuple[str, ...]] = set()

    def read(self, call: Call) -> int:
        """Words read from the cache for one request, which is then written."""
        blocks = [(repr(_plain(t)), "cache_control" in t, 0) for t in call.tools]
        for m in sorted(call.messages, key=lambda m: m["role"] != "system"):
            content = m["content"]
            for p in content if isinstance(content, list) else [{"type": "text", "text": content}]:
                blocks.append((m["role"] + repr(_plain(p)), "cache_control" in p, len(p["text"].split())))
        texts = tuple(text for text, _, _ in blocks)
        ends = [i for i, (_, marked, _) in enumerate(blocks, start=1) if marked]
        assert len(ends) <= 4
        best = 0
        for end in ends:
            for back in range(end, max(0, end - 20), -1):
                if texts[:back] in self.written:
                    best = max(best, sum(words for _, _, words in blocks[:back]))
        self.written |= {texts[:end] for end in ends}
        return best


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in item.items() if k != "cache_control"}


async def test_expected_is_what_a_simulated_server_reads() -> None:
    rng = random.Random(4)
    server = Anthropic()
    engine, pipeline, account = world(PromptCaching(provider="anthropic", minimum=5))
    systems = [message("system", " ".join(f"s{k}w{i}" for i in range(12))) for k in range(2)]
    hits = 0
    for _ in range(6):
        talk = [rng.choice(systems)]
        for turn in range(rng.randint(1, 5)):
            talk.append(message("user", " ".join(rng.choices("abc", k=rng.randint(1, 3))) + f" t{turn}"))
            answer = await pipeline.ask(talk, account)
            read = server.read(engine.calls[-1])
            receipt = own(answer)
            assert receipt.detail["expected"] == read and receipt.after == receipt.before - read
            hits += read > 0
            talk.append(message("assistant", "fine"))
    assert hits > 10


async def test_shared_is_the_common_beginning_up_to_a_piece() -> None:
    rng = random.Random(2)
    engine, pipeline, account = world(PromptCaching(provider="automatic", minimum=20, step=8))
    sent: list[list[str]] = []
    for _ in range(30):
        stem = rng.choice(sent)[: rng.randint(1, 60)] if sent and rng.random() < 0.8 else []
        words = [*stem, *(rng.choice(["alpha", "beta", "gamma"]) for _ in range(rng.randint(5, 40)))]
        receipt = own(await pipeline.ask(" ".join(words), account))
        common = max([_common(words, other) for other in sent], default=0)
        shared = receipt.detail["shared"]
        assert common - 64 / 5 - 1 <= shared <= common + 1  # a piece is at most 13 words; its last one may be cut
        assert receipt.detail["expected"] == (shared // 8 * 8 if shared >= 20 else 0)
        assert not receipt.fired and receipt.after == receipt.before - receipt.detail["expected"]
        sent.append(words)


def _common(a: list[str], b: list[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# -- where breakpoints go --------------------------------------------------------------------------------------

LONG = " ".join(["word"] * 30)
TURNS = (
    message("system", LONG),
    message("user", "one"),
    message("assistant", "two"),
    message("user", "three"),
    message("assistant", "four"),
    message("user", "five"),
)


@pytest.mark.parametrize(
    ("settings", "messages", "tools", "expected"),
    [
        ({}, TURNS, (), ["system 0", "user 3", "user 5"]),
        ({"turns": "never"}, TURNS, (), ["system 0"]),
        ({}, TURNS[:2], (), ["system 0"]),
        ({"turns": "always"}, TURNS[:2], (), ["system 0", "user 1"]),
        ({}, TURNS[:2], (tool("a"), tool("b")), ["system 0"]),
        ({"turns": "always"}, (message("user", LONG),), (tool("a"), tool("b")), ["user 0"]),
        ({"minimum": 1}, (message("user", LONG),), (tool("a"), tool("b")), ["tool b"]),
        ({"minimum": 33}, TURNS, (), ["user 3", "user 5"]),
        ({"minimum": 500}, TURNS, (), []),
        ({}, (message("user", LONG),), (), []),
        ({}, (*TURNS[:5], message("system", "now"), message("user", "five")), (), ["system 0", "user 3", "user 6"]),
        (
            {},
            (*TURNS[:2], {"role": "assistant", "content": None, "tool_calls": []}, message("tool", "found")),
            (),
            ["system 0", "user 1", "tool 3"],
        ),
        ({"turns": "always"}, (message("system", LONG), message("user", "  ")), (), ["system 0"]),
        ({"turns": "always"}, (message("system", LONG), {"role": "user", "content": []}), (), ["system 0"]),
    ],
)
async def test_breakpoints(settings: Any, messages: Any, tools: Any, expected: list[str]) -> None:
    engine, pipeline, account = world(PromptCaching(**{"provider": "anthropic", "minimum": 20, **settings}))
    answer = await pipeline.ask(messages, account, tools=tools)
    sent = engine.calls[-1]
    assert marks(sent) == expected and own(answer).fired == bool(expected)
    assert [text_of(m) for m in sent.messages] == [text_of(m) for m in messages]
    assert own(answer).detail["breakpoints"] == len(expected)


async def test_a_breakpoint_stands_on_the_last_part_and_lasts_an_hour_when_asked() -> None:
    engine, pipeline, account = world(PromptCaching(provider="anthropic", minimum=1, turns="always", hour=True))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    await pipeline.ask(({"role": "user", "content": [{"type": "text", "text": "what is this"}, image]},), account)
    text, marked = engine.calls[-1].messages[0]["content"]
    assert "cache_control" not in text and marked == {**image, "cache_control": {"type": "ephemeral", "ttl": "1h"}}


@pytest.mark.parametrize(
    "given",
    [
        {"messages": (message("system", LONG), {"role": "user", "content": "hi", "cache_control": MARK})},
        {"messages": ({"role": "user", "content": [{"type": "text", "text": LONG, "cache_control": MARK}]},)},
        {
            "messages": (message("system", LONG), message("user", "hi")),
            "tools": ({**tool("a"), "cache_control": MARK},),
        },
        {
            "messages": (message("system", LONG), message("user", "hi")),
            "tools": ({"type": "function", "function": {"name": "a", "cache_control": MARK}},),
        },
    ],
)
async def test_the_callers_own_breakpoints_stay_alone(given: Any) -> None:
    engine, pipeline, account = world(PromptCaching(provider="anthropic", minimum=1, turns="always"))
    answer = await pipeline.ask(given["messages"], account, tools=given.get("tools", ()))
    sent = engine.calls[-1]
    assert sent.messages == given["messages"] and sent.tools == given.get("tools", ())
    assert not own(answer).fired and "of its own" in own(answer).reason


@pytest.mark.parametrize(
    ("model", "marked"), [("claude-sonnet-4-5", True), ("anthropic/Claude-x", True), ("gpt-5", False), ("qwen3", False)]
)
async def test_auto_goes_by_the_model(model: str, marked: bool) -> None:
    engine, pipeline, account = world(PromptCaching(minimum=1, turns="always"), model)
    answer = await pipeline.ask("hello there", account)
    assert bool(marks(engine.calls[-1])) == marked == own(answer).fired
    assert marked or "by itself" in own(answer).reason


async def test_sorted_tools_and_a_key() -> None:
    engine, pipeline, account = world(PromptCaching(tools="sorted", key="support", minimum=1, step=1))
    first = await pipeline.ask(" hello there", account, tools=(tool("b"), tool("a")))
    again = await pipeline.ask(
        " hello there", account, tools=(tool("a"), tool("b")), extra={"prompt_cache_key": "mine"}
    )
    assert [t["function"]["name"] for t in engine.calls[-1].tools] == ["a", "b"]
    assert [c.extra["prompt_cache_key"] for c in engine.calls] == ["support", "mine"]
    assert own(first).fired and "sorted" in own(first).reason and not own(again).fired
    assert own(first).detail["shared"] == 0 and own(again).detail["shared"] > 2
    plain, other, _ = world(PromptCaching(minimum=1, step=1))
    await other.ask(" hello there", account, tools=(tool("b"), tool("a")))
    shuffled = await other.ask(" hello there", account, tools=(tool("a"), tool("b")))
    assert own(shuffled).detail["shared"] == 0, "another order of tools shares nothing"


async def test_context_is_part_of_the_prompt_and_stays_where_it_is() -> None:
    engine, pipeline, account = world(PromptCaching(provider="anthropic", minimum=1, turns="always"))
    first = await pipeline.ask(" what is it", account, context=(LONG,))
    again = await pipeline.ask(" what is it", account, context=(LONG,))
    other = await pipeline.ask(" what is it", account, context=(" ".join(["other"] * 30),))
    assert own(first).detail["expected"] == own(other).detail["expected"] == 0
    assert own(again).detail["expected"] == own(again).before and engine.calls[-1].context is not None


async def test_other_accounts_and_old_prefixes_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    _, pipeline, account = world(PromptCaching(minimum=1, step=1, seconds=300))
    await pipeline.ask(LONG, account)
    assert own(await pipeline.ask(LONG, Account("bob"))).detail["shared"] == 0
    now += 299
    assert own(await pipeline.ask(LONG, account)).detail["shared"] == 30
    now += 299
    assert own(await pipeline.ask(LONG, account)).detail["shared"] == 30, "a use refreshes it"
    now += 301
    assert own(await pipeline.ask(LONG, account)).detail["shared"] == 0


def test_the_memory_is_bounded_and_forgets_ends_before_beginnings() -> None:
    memory = PrefixMemory(most=10)
    call = Call(({"role": "user", "content": "x" * 64 * 8},), Account("a"))
    other = Call(({"role": "user", "content": "y" * 64 * 6},), Account("a"))
    memory.add(prefix_of(call), [8], 0.0)
    assert memory.shared(prefix_of(call), 1.0, 10.0, [8]) == (8, 8)
    assert memory.shared(prefix_of(call), 1.0, 10.0, [7]) == (8, 0), "nothing looks behind the last mark"
    memory.add(prefix_of(other), [], 0.0)
    assert memory.shared(prefix_of(call), 1.0, 10.0) == (4, 0)
    assert memory.shared(prefix_of(other), 1.0, 10.0) == (6, 0)


async def test_breakpoints_reach_the_wire() -> None:
    """What the OpenAI-compatible engine would send has the marks on parts and tools."""
    import orjson

    from thrifty.engines.openai import wire

    method = PromptCaching(provider="anthropic", minimum=1, turns="always")
    call = Call((message("user", "hello"),), Account("a"), tools=(tool("a"),))
    changed = await method.rewrite(call)
    engine = OpenAIEngine("http://127.0.0.1:9/v1", "claude-x")
    try:
        body = orjson.loads(engine._exchange.format.body(wire.prompt(changed, changed.messages), 5, False))
    finally:
        await engine.aclose()
    assert body["messages"][0]["content"] == [{"type": "text", "text": " hello", "cache_control": MARK}]
    assert body["tools"][0]["cache_control"] == MARK
