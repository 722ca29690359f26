"""RCR-Router: routing against brute force and an exact knapsack, importance by hand, turns that stay whole."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Budget, InvalidInput, Plan
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context._memory import Item, Weights, ages, importance, read_item, route
from thrifty.methods.context.rcr_router import RcrRouter, turns

WORDS = ["ash", "bay", "cod", "dew", "elm", "fog", "gum", "hay", "ivy", "jet", "kin", "log"]
sized = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=9)


# -- routing -------------------------------------------------------------------------------------------------


@given(sized, st.integers(0, 40))
def test_greedy_by_score_is_that_of_the_definition(items: list[tuple[int, int]], most: int) -> None:
    scores, sizes = [float(s) for s, _ in items], [t for _, t in items]
    left, room, expected = set(range(len(items))), most, []
    while left:
        best = max(left, key=lambda i: (scores[i], -i))
        left.remove(best)
        if sizes[best] <= room:
            expected.append(best)
            room -= sizes[best]
    assert route(scores, sizes, most) == sorted(expected)


@given(sized, st.integers(0, 40))
def test_density_is_at_least_half_of_the_exact_knapsack(items: list[tuple[int, int]], most: int) -> None:
    scores, sizes = [float(s) for s, _ in items], [t for _, t in items]
    subsets = (c for n in range(len(items) + 1) for c in itertools.combinations(range(len(items)), n))
    exact = max(sum(scores[i] for i in c) for c in subsets if sum(sizes[i] for i in c) <= most)
    kept = route(scores, sizes, most, "density")
    assert sum(sizes[i] for i in kept) <= most and kept == sorted(set(kept))
    assert sum(scores[i] for i in kept) >= exact / 2


def test_importance_by_hand() -> None:
    item = Item("We plan each step of the task.", "decision", "ann", 3, frozenset({"coder"}), frozenset({"plan"}))
    w = Weights(role=2.0, stage=3.0, recency=5.0, semantic=7.0, decision=11.0, plan=13.0, decay=0.5)
    got = importance(item, 2, 0.25, "planner", "plan", w)
    assert got == pytest.approx(2 * 0.3 + 3 * 1.0 + 5 * math.exp(-1.0) + 7 * 0.25 + 11)  # plan, step, task
    got = importance(item, 0, -0.5, "coder", "review", w)
    assert got == pytest.approx(2 * 1.0 + 3 * 0.5 + 5 + 11)  # named; a decision helps at a review; unlike counts as 0
    assert importance(Item("x"), 0, 0.0, "", "", Weights()) == pytest.approx(0.3)


def test_items() -> None:
    item = read_item("[type=Fact author=Ann round=2 roles=coder,planner stages=plan] The port is 80.")
    assert (item.type, item.author, item.round) == ("fact", "ann", 2)
    assert item.roles == {"coder", "planner"} and item.stages == {"plan"}
    text = json.dumps({"type": "plan", "round": 4, "roles": ["Coder"], "text": "Go."})
    assert read_item(text) == Item(text, "plan", "", 4, frozenset({"coder"}))
    for text in ("[see below] x", "{broken", '{"a": 1}', "[1] x", "[a=b] x", "", "[" * 5000, '{"round": 1e999}'):
        assert replace(read_item(text), round=None) == Item(text)
    assert read_item('{"round": -3, "roles": 7}') == Item('{"round": -3, "roles": 7}')
    assert ages([]) == []


# -- the method ----------------------------------------------------------------------------------------------


def world(method: RcrRouter, embed: bool = False, budget: Budget | None = None) -> Any:
    engine = ScriptedEngine("fine")
    roles = {"embedder": ScriptedEngine("", dimensions=4096)} if embed else {}
    pipeline = Plan("r", (method,), budget or Budget()).build({"answer": engine, **roles})
    return engine, pipeline, Account("t", ledger=MemoryLedger())


async def routed(method: RcrRouter, context: tuple[str, ...], prompt: Any = "So?", **fields: Any) -> tuple[Any, Any]:
    engine, pipeline, account = world(method)
    answer = await pipeline(replace(pipeline.call(prompt, account, context=context), **fields))
    return engine.calls[-1], answer.receipts[0]


def memory(rng: random.Random, n: int) -> tuple[str, ...]:
    made = []
    for i in range(n):
        head = f"[type={rng.choice(['fact', 'plan', 'decision'])} round={i} roles={rng.choice(['coder', 'planner'])}]"
        made.append(f"{head} {' '.join(rng.choices(WORDS, k=rng.randint(1, 20)))}")
    return tuple(made)


@settings(max_examples=60, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(0, 120),
    st.integers(0, 60),
    st.sampled_from(["score", "density"]),
    st.sampled_from(["coder", "planner", ""]),
)
async def test_what_is_routed_never_passes_the_roles_tokens(
    rng: random.Random, base: int, bonus: int, by: str, role: str
) -> None:
    context = memory(rng, 8)
    method = RcrRouter(base=base, bonus=f"coder={bonus}", by=by, role=role)
    made, receipt = await routed(method, context, "ash bay cod")
    most = base + (bonus if role == "coder" else 0)
    assert len("\n\n".join(made.context).split()) <= most
    assert [p for p in context if p in made.context] == list(made.context)
    assert receipt.fired == (len("\n\n".join(context).split()) > most)


async def test_roles_get_different_items_and_the_planted_fact() -> None:
    hits = whole = sent = 0
    for seed in range(40):
        rng = random.Random(seed)
        gold = {
            role: f"[type=fact round=1 roles={role}] The secret of the {role} is {seed}."
            for role in ("coder", "planner")
        }
        noise = [f"[type=fact round=9 roles=reviewer] {' '.join(rng.choices(WORDS, k=12))}" for _ in range(12)]
        context = [*noise, *gold.values()]
        rng.shuffle(context)
        got = {}
        for role in gold:
            made, receipt = await routed(RcrRouter(base=40, weight_semantic=0.0, role=role), tuple(context))
            got[role] = set(made.context)
            hits += gold[role] in got[role]
            sent += int(receipt.after)
            whole += int(receipt.before)
        assert got["coder"] != got["planner"]
    assert hits > 0.95 * 80 and sent < whole / 2


async def test_where_role_and_stage_come_from() -> None:
    context = tuple(f"[roles={r}] {' '.join(WORDS)}" for r in ("coder", "planner", "critic"))
    named = [{"role": "user", "name": "Critic", "content": "So?"}]
    cases: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({"role": "planner"}, {"extra": {"metadata": {"role": "coder"}}}, 1),
        ({}, {"extra": {"metadata": {"role": "coder"}}}, 0),
        ({}, {"extra": {"metadata": 7}}, 2),
        ({}, {}, 2),
    ]
    for knobs, fields, expected in cases:
        made, receipt = await routed(RcrRouter(base=14, **knobs), context, named, **fields)
        assert made.context == (context[expected],), (knobs, fields)
        assert made.messages == tuple(named) and made.extra == fields.get("extra", {})
    staged = tuple(f"[stages={s}] {' '.join(WORDS)}" for s in ("plan", "review"))
    for stage, expected in (("plan", 0), ("review", 1)):
        made, _ = await routed(RcrRouter(base=14), staged, "So?", extra={"metadata": {"stage": stage}})
        assert made.context == (staged[expected],)


def talk(n: int) -> list[dict[str, Any]]:
    """n turns, the even ones with a tool's call and its result; a system message first and one in the middle."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}]
    for i in range(n):
        messages.append({"role": "user", "content": f"turn {i} " + " ".join(WORDS[:6])})
        if i % 2 == 0:
            call = {"id": f"c{i}", "type": "function", "function": {"name": "look", "arguments": "{}"}}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"c{i}", "content": f"result {i} here"})
        messages.append({"role": "assistant", "content": f"answer {i}"})
        if i == n // 2:
            messages.append({"role": "system", "content": "Be brief."})
    return [*messages, {"role": "user", "content": "turn 1?"}]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 90))
async def test_turns_go_whole_and_roles_alternate(n: int, base: int) -> None:
    messages = talk(n)
    made, receipt = await routed(RcrRouter(base=base), (), messages)
    kept = [m for m in messages if m in made.messages]
    assert kept == list(made.messages) and kept[-1] == messages[-1]
    assert [m for m in kept if m["role"] == "system"] == [m for m in messages if m["role"] == "system"]
    calls = [c["id"] for m in kept for c in m.get("tool_calls", ())]
    assert [m["tool_call_id"] for m in kept if m["role"] == "tool"] == calls
    users = [m["role"] for m in kept if m["role"] in ("user", "assistant")]
    assert all(a != b or a == "assistant" for a, b in itertools.pairwise(users))
    older = [m for m in kept[:-1] if m["role"] != "system"]
    words = sum(len((m["content"] or "").split()) + bool(m.get("tool_calls")) for m in older)
    assert words <= base
    for i in range(n):  # all of a turn, or nothing
        assert (f"answer {i}" in str(kept)) == (f"turn {i} " in str(kept))
    assert ("cache_broken" in receipt.detail) == receipt.fired


def test_turns() -> None:
    assert turns(talk(2)) == [(1, 5), (5, 7)]
    assert turns([{"role": "user"}]) == turns([]) == turns([{"role": "tool", "tool_call_id": "x"}]) == []


async def test_a_turn_with_the_context_mark_stays_and_memory_can_be_one_kind() -> None:
    messages = [
        {"role": "user", "content": "See {context} " + " ".join(WORDS)},
        {"role": "assistant", "content": "Seen."},
        {"role": "user", "content": "Go on, " + " ".join(WORDS)},
        {"role": "assistant", "content": "Gone."},
        {"role": "user", "content": "So?"},
    ]
    context = ("ash " * 20, "bay " * 20)
    made, _ = await routed(RcrRouter(base=0), context, messages)
    assert made.messages == (*messages[:2], messages[-1]) and made.context == ()
    made, _ = await routed(RcrRouter(base=0, memory="context"), context, messages)
    assert made.messages == tuple(messages) and made.context == ()
    made, _ = await routed(RcrRouter(base=0, memory="turns"), context, messages)
    assert made.messages == (*messages[:2], messages[-1]) and made.context == context


async def test_likeness_is_the_embedders_where_the_budget_holds_it() -> None:
    context = tuple(" ".join(rng) for rng in (WORDS[:4] * 2, WORDS[4:8] * 2, WORDS[8:12] * 2))
    for budget, note in ((Budget(), ""), (Budget(input=30), "the budget holds no embedding (input)")):
        engine, pipeline, account = world(RcrRouter(base=8, weight_recency=0.0), True, budget)
        answer = await pipeline.ask("fog gum", account, context=context)
        assert engine.calls[-1].context == (context[1],) and note in answer.receipts[0].reason
        assert answer.receipts[0].spend.calls == (0 if note else 1) and account.settled == answer.spend


@pytest.mark.parametrize("bonus", ["coder", "coder=", "coder=-1", "coder=1=2", "a b=3"])
def test_a_bonus_that_cannot_be_read(bonus: str) -> None:
    with pytest.raises(InvalidInput, match="role=tokens"):
        RcrRouter(bonus=bonus)
