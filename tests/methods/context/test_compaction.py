"""Compaction: the engine's own record of what was sent is the oracle. Tool pairs stay whole, the prefix holds from
turn to turn, what was cut comes back when asked for, and bad conversations are handled as documented."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, InvalidInput, Plan, registry
from thrifty.call import Call, text_of
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context.compaction import Compaction, cut_at, recall

WORDS = ["ash", "bay", "cod", "dew", "elm", "fog", "gum", "hay", "ivy", "jet", "kin", "log"]


def message(role: str, n: int, tag: str = "", **fields: Any) -> dict[str, Any]:
    """A message of n words."""
    return {"role": role, "content": " ".join([tag, *[WORDS[i % 12] for i in range(n - bool(tag))]]).strip(), **fields}


def tool_turn(i: int, n: int = 20, results: int = 1) -> list[dict[str, Any]]:
    """An assistant's calls and their results."""
    ids = [f"c{i}-{j}" for j in range(results)]
    calls = [{"id": x, "type": "function", "function": {"name": "look", "arguments": "{}"}} for x in ids]
    answers = [message("tool", n, f"r{i}", tool_call_id=x) for x in ids]
    return [{"role": "assistant", "content": None, "tool_calls": calls}, *answers]


def world(method: Compaction, script: Any = "fine", budget: Budget | None = None, on_exceed: str = "degrade") -> Any:
    engine = ScriptedEngine(script)
    plan = Plan("c", (method,), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build({"answer": engine}), Account("t", ledger=MemoryLedger())


async def sent(method: Compaction, messages: list[dict[str, Any]], **fields: Any) -> tuple[Call, Any]:
    engine, pipeline, account = world(method)
    answer = await pipeline(replace(pipeline.call("x", account), messages=tuple(messages), **fields))
    return engine.calls[-1], answer


def check_pairs(before: Any, after: Any) -> None:
    """By hand: each result sent stands behind a call of its id, and each call has the results it had."""
    announced: set[str] = set()
    for m in after:
        announced |= {c["id"] for c in m.get("tool_calls", ())}
        if m["role"] == "tool" and m["tool_call_id"] != "orphan":
            assert m["tool_call_id"] in announced
    answered = {m["tool_call_id"] for m in before if m["role"] == "tool"}
    assert announced & answered <= {m["tool_call_id"] for m in after if m["role"] == "tool"}


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    """Users, assistants, tool turns with one to three results, a system message or none, an orphan or none."""
    out: list[dict[str, Any]] = []
    if draw(st.booleans()):
        out.append(message("system", draw(st.integers(1, 30)), "sys"))
    if draw(st.booleans()):
        out.append(message("tool", 5, tool_call_id="orphan"))
    for i in range(draw(st.integers(1, 12))):
        out.append(message("user", draw(st.integers(1, 60)), f"u{i}"))
        for j in range(draw(st.integers(0, 3))):
            out += tool_turn(100 * i + j, draw(st.integers(1, 40)), draw(st.integers(1, 3)))
        out.append(message("assistant", draw(st.integers(1, 60)), f"a{i}"))
    return [*out, message("user", draw(st.integers(1, 30)), "last")]


KNOBS = st.fixed_dictionaries(
    {
        "tokens": st.integers(20, 400),
        "target": st.sampled_from([0.2, 0.5, 1.0]),
        "first": st.integers(0, 2),
        "recent": st.integers(1, 5),
        "older": st.sampled_from(["drop", "outline"]),
        "note": st.sampled_from([32, 64]),
    }
)


@settings(max_examples=60, deadline=None)
@given(conversations(), KNOBS)
async def test_pairs_system_question_and_order_stay(messages: list[dict[str, Any]], knobs: dict[str, Any]) -> None:
    made, answer = await sent(Compaction(**knobs), messages)
    check_pairs(messages, made.messages)
    kept = [m for m in made.messages if m in messages]
    assert kept == [m for m in messages if m in kept], "in another order"
    assert [m for m in made.messages if m["role"] == "system"] == [m for m in messages if m["role"] == "system"]
    assert messages[-1]["content"] in text_of(made.messages[-1])
    receipt = answer.receipts[0]
    assert answer.spend.input <= receipt.before and receipt.fired == (made.messages != tuple(messages))
    if receipt.fired:
        assert receipt.after == answer.spend.input < receipt.before


@settings(max_examples=40, deadline=None)
@given(conversations(), KNOBS)
async def test_roles_alternate_where_they_did(messages: list[dict[str, Any]], knobs: dict[str, Any]) -> None:
    def twice(ms: Any) -> int:
        roles = [m["role"] for m in ms]
        return sum(a == b and a in ("user", "system") for a, b in zip(roles, roles[1:], strict=False))

    made, _ = await sent(Compaction(**knobs), messages)
    assert twice(made.messages) == twice(messages) == 0


@pytest.mark.parametrize("older", ["drop", "outline"])
@pytest.mark.parametrize("seed", range(4))
async def test_the_prefix_holds_from_turn_to_turn_and_what_breaks_is_reported(older: str, seed: int) -> None:
    """A conversation grows; what one turn and the next really sent begin alike as the receipts say."""
    rng = random.Random(seed)
    method = Compaction(tokens=300, target=0.5, recent=2, older=older, note=40)
    engine, pipeline, account = world(method)
    messages: list[dict[str, Any]] = [message("system", 10, "sys")]
    last: tuple[Any, ...] = ()
    broke = turns = 0
    for turn in range(30):
        steps = [[message("user", rng.randint(5, 40), f"u{turn}")]]
        steps += [tool_turn(10 * turn + i, rng.randint(5, 40)) for i in range(rng.randint(0, 2))]
        for step in steps:  # the model is asked after each
            messages += step
            answer = await pipeline(replace(pipeline.call("x", account), messages=tuple(messages)))
            now, receipt = engine.calls[-1].messages, answer.receipts[0]
            shared = 0
            while shared < min(len(last), len(now)) and last[shared] == now[shared]:
                shared += 1
            assert answer.spend.input == engine.count(engine.calls[-1]) or receipt.fired
            if receipt.fired:
                words = engine.count(replace(engine.calls[-1], messages=now[:shared])) if shared else 0
                calls = sum(bool(m.get("tool_calls")) for m in now[:shared])  # one word each, in JSON
                assert receipt.detail["cached_after"] == words + calls
                assert (receipt.detail["cache_broken"] > 0) == (shared < len(last))
                broke += shared < len(last)
            else:
                assert shared == len(last)
            last, turns = now, turns + 1
        messages.append(message("assistant", rng.randint(5, 40), f"a{turn}"))
    assert 1 <= broke <= turns / 3, f"{broke} of {turns} turns broke the prefix"


async def test_a_loss_of_the_discount_is_shown_as_one() -> None:
    """900 cached tokens at a tenth of the price are cheaper than 400 new ones."""
    messages = [message("user", 100, "task")]
    for i in range(8):
        messages += [message("assistant", 50, f"a{i}"), message("user", 50, f"u{i}")]
    method = Compaction(tokens=880, target=0.7, recent=2, older="drop")
    _, answer = await sent(method, messages)
    receipt = answer.receipts[0]
    cut = receipt.before - receipt.after
    assert receipt.detail["cached_before"] == 800 and receipt.detail["cached_after"] < 120
    expected = cut - 0.9 * (800 - receipt.detail["cached_after"])
    assert receipt.detail["net_saved"] == pytest.approx(expected) and expected < 0
    assert "loss" in receipt.reason
    free = (await sent(replace(method, cached_price=1.0), messages))[1].receipts[0]
    assert free.detail["net_saved"] == cut and "loss" not in free.reason


async def test_what_was_cut_comes_back_when_asked_for() -> None:
    messages = [message("user", 10, "task")]
    for i in range(10):
        messages += [message("assistant", 30, f"a{i}"), message("user", 30, f"u{i}")]
    method = Compaction(tokens=200, recent=2, older="drop")
    made, answer = await sent(method, messages)
    ref = answer.receipts[0].detail["refs"][0]
    marks = [text_of(m) for m in made.messages if "left out" in text_of(m)]
    assert len(marks) == 1 and f'write "recall #{ref}"' in marks[0]
    missing = [m for m in messages[1:] if m not in made.messages]
    back = list(recall(messages, ref))
    assert back == missing and len(back) > 5
    asked = [*messages, {"role": "assistant", "content": f"I need more: recall #{ref}."}, message("user", 1, "go")]
    made, answer = await sent(method, asked)
    assert all(m in made.messages for m in back) and answer.receipts[0].detail["recalled"]
    made, _ = await sent(replace(method, reversible=False), asked)
    assert not all(m in made.messages for m in back) and "recall" not in text_of(made.messages[0])
    assert not any('write "recall' in text_of(m) for m in made.messages)
    with pytest.raises(InvalidInput, match="names no messages"):
        recall(messages, "00000000")
    # what a tool printed asks for nothing
    tool = [*messages, *tool_turn(99)]
    tool[-1]["content"] = f"recall #{ref}"
    made, answer = await sent(method, tool)
    assert not answer.receipts[0].detail["recalled"]


async def test_an_outline_tells_who_said_what_within_its_tokens() -> None:
    messages = [message("user", 5, "task")]
    for i in range(12):
        messages += [*tool_turn(i, 40), message("assistant", 20, f"say{i}"), message("user", 20, f"ask{i}")]
    made, answer = await sent(Compaction(tokens=300, recent=2, note=400), messages)
    note = next(text_of(m) for m in made.messages if "left out" in text_of(m))
    assert "say0" in note and "ask0" in note and "calls look (1 result)" in note and "r0" not in note
    for most in (32, 64, 128):
        made, _ = await sent(Compaction(tokens=300, recent=2, note=most), messages)
        note = next(text_of(m) for m in made.messages if "left out" in text_of(m)).removeprefix(messages[0]["content"])
        assert len(note.split()) <= most and note.endswith("]")


async def test_a_summary_is_asked_for_and_billed() -> None:
    def script(call: Call, draw: Any) -> str:
        return "They spoke of ash." if "Summarise" in text_of(call.messages[0]) else "fine"

    messages = [message("user", 10, "task")]
    for i in range(10):
        messages += [message("assistant", 30, f"a{i}"), message("user", 30, f"u{i}")]
    method = Compaction(tokens=200, recent=2, older="summary", note=40)
    engine, pipeline, account = world(method, script)
    answer = await pipeline(replace(pipeline.call("x", account), messages=tuple(messages)))
    asked, made = engine.calls
    assert asked.labels.method == "compaction" and "a0" in text_of(asked.messages[0])
    assert any("Summary: They spoke of ash." in text_of(m) for m in made.messages)
    receipt = answer.receipts[0]
    assert receipt.spend.input == engine.count(asked) and receipt.spend.output == 4
    assert answer.spend == account.settled and "more than was saved" in receipt.reason
    # with the plan's own engine for it
    small = ScriptedEngine("Short.", model="small")
    pipeline = Plan("c", (method,)).build({"answer": ScriptedEngine("fine"), "summariser": small})
    account = Account("t", ledger=(ledger := MemoryLedger()))
    await pipeline(replace(pipeline.call("x", account), messages=tuple(messages)))
    assert len(small.calls) == 1
    assert [(e.labels.model, e.labels.role) for e in ledger.entries()][0] == ("small", "summariser")
    # without any engine, as in a program that compacts by itself: an outline
    alone = Call(tuple(messages), Account("alone"))
    changed = await method.rewrite(alone)
    assert len(changed.messages) < len(messages) and "has no engine" in changed.receipts[0].reason
    # without room for it: an outline, or a refusal
    tight = Budget(input=300)
    engine, pipeline, account = world(method, script, tight)
    answer = await pipeline(replace(pipeline.call("x", account), messages=tuple(messages)))
    assert "outlined" in answer.receipts[0].reason and len(engine.calls) == 1
    engine, pipeline, account = world(method, script, tight, "refuse")
    with pytest.raises(BudgetExceeded):
        await pipeline(replace(pipeline.call("x", account), messages=tuple(messages)))
    assert not account.held and not account.settled


async def test_a_budget_smaller_than_the_prompt_cuts_on_and_what_cannot_fit_is_refused() -> None:
    messages = [message("system", 20, "sys")]
    for i in range(10):
        messages += [message("user", 30, f"u{i}"), message("assistant", 30, f"a{i}")]
    messages.append(message("user", 10, "last"))
    for resource in ("input", "tokens"):
        method = Compaction(older="drop")
        engine, pipeline, account = world(method, budget=Budget(**{resource: 150}))
        answer = await pipeline(replace(pipeline.call("x", account), messages=tuple(messages)))
        assert answer.spend.input <= 150 and answer.receipts[0].fired
        assert engine.calls[-1].messages[-1]["content"].endswith(messages[-1]["content"])
    engine, pipeline, account = world(Compaction(), budget=Budget(input=19))
    with pytest.raises(BudgetExceeded):
        await pipeline(replace(pipeline.call("x", account), messages=tuple(messages)))
    assert not account.held and not engine.calls
    made, answer = await sent(Compaction(tokens=5, recent=1), messages)
    assert "must stay" in answer.receipts[0].reason
    assert made.messages[0] == messages[0] and messages[-1]["content"] in text_of(made.messages[-1])


async def test_strange_conversations() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    cases: dict[str, list[dict[str, Any]]] = {
        "begins with a result": [message("tool", 50, tool_call_id="orphan"), *_talk()],
        "only an image": [*_talk(), {"role": "user", "content": [image]}],
        "no space in a megabyte": [{"role": "user", "content": "x" * 1_000_000}, *_talk()],
        "lone surrogates": [{"role": "user", "content": "bad \udcff byte " * 30}, *_talk()],
        "right to left and CJK": [{"role": "user", "content": "שלום עולם مرحبا 你好世界 " * 20}, *_talk()],
        "an unanswered call": [*_talk(), tool_turn(1)[0], message("user", 5)],
        "an id used twice": [*tool_turn(1), *tool_turn(1), *_talk()],
        "an empty message": [{"role": "assistant", "content": ""}, *_talk()],
    }
    for name, messages in cases.items():
        for older in ("drop", "outline"):
            made, answer = await sent(Compaction(tokens=60, recent=1, first=0, older=older, note=32), messages)
            assert answer.receipts[0].fired, name
            check_pairs(messages, made.messages)
            assert made.messages[-1]["role"] == "user"
    made, _ = await sent(Compaction(tokens=60, recent=1), cases["only an image"])
    assert made.messages[-1]["content"][-1] == image


def _talk() -> list[dict[str, Any]]:
    talk: list[dict[str, Any]] = []
    for i in range(6):
        talk += [message("user", 20, f"u{i}"), message("assistant", 20, f"a{i}")]
    return [*talk, message("user", 5, "last")]


def test_replayed_cuts_are_those_of_a_client_that_remembers() -> None:
    """A client that keeps its window between turns cuts where the replay of the whole conversation does."""
    rng = random.Random(3)
    for _ in range(50):
        sizes = [rng.randint(1, 20) for _ in range(40)]
        most, recent, note = rng.randint(20, 120), rng.randint(1, 4), rng.randint(0, 10)
        window: list[int] = []
        gone = 0
        for end in range(1, 41):
            window.append(sizes[end - 1])
            if sum(window) + (note if gone else 0) > most:
                while len(window) > recent and sum(window) + (note if gone else 0) > most // 2:
                    window.pop(0)
                    gone += 1
            got = cut_at(sizes[:end], set(), range(1, end + 1), most=most, target=most // 2, recent=recent, note=note)
            assert got == gone


def test_registered() -> None:
    assert registry.get("compaction") is Compaction
