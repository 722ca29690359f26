"""The laws that every registered method keeps, as a table: a name, whom it applies to, and a check that
raises.

`applies` gives None, or the reason why a law says nothing about a method; the reasons are collected for the
catalogue. `check(method, kind)` runs on one kind of engine and raises AssertionError when the law is broken,
so that the mutation check can run the same table over broken copies."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from world import CAPABLE, PASSAGES, QUESTION, SETTINGS, TINY, World, conversation, turns

from thrifty import Answer, Budget, BudgetExceeded, InvalidInput, Method, Plan, PlanError, Receipt, registry
from thrifty.call import Call, text_of
from thrifty.method import Range


@dataclass(frozen=True)
class Law:
    """One law. `once`: it does not depend on the engine. `model`: it also runs on the tiny model."""

    name: str
    check: Callable[[type[Method], str], Awaitable[None]]
    applies: Callable[[type[Method]], str | None] = lambda method: None
    once: bool = False
    model: bool = False


# -- identity and repeatability ------------------------------------------------------------------------------


def _has_identity(method: type[Method]) -> str | None:
    return None if method.identity is not None else f"no identity: {method.no_identity or 'NO REASON GIVEN'}"


async def identity(method: type[Method], kind: str) -> None:
    """With its identity's knobs, the answer and what it cost are those of the plan without it."""
    assert method.identity is not None
    base = {k: v for k, v in SETTINGS.get(method.name, {}).items() if k not in method.identity}
    with_it, without = World(method, kind, {**base, **method.identity}), World(method, kind, without=True)
    a, b = await with_it.ask(), await without.ask()
    assert (a.text, a.thinking, a.finish, a.tokens, a.parsed) == (
        b.text,
        b.thinking,
        b.finish,
        b.tokens,
        b.parsed,
    )
    assert a.spend == b.spend and with_it.entered() == without.entered()
    assert replace(a.work, engine_seconds=0) == replace(b.work, engine_seconds=0)
    assert [r.fired for r in with_it.receipts(a)] == [False]


def told(answer: Answer) -> list[Receipt]:
    """An answer's receipts, without the seconds they took."""
    return [replace(r, work=replace(r.work, engine_seconds=0)) for r in answer.receipts]


async def explained(method: type[Method], kind: str) -> None:
    """It has an identity, or says why it has none; and it names its paper and what its engine needs."""
    assert (method.identity is None) == bool(method.no_identity)
    assert method.paper and method.__doc__ and "text" in method.needs


async def repeatable(method: type[Method], kind: str) -> None:
    """The same seed twice: the same answer and the same Spend; where the method remembers, the second time may
    cost less."""
    world, other = World(method, kind), World(method, kind)
    first, second, third = await world.ask(), await world.ask(), await other.ask()
    for again in (second, third):
        assert (again.text, again.thinking, again.finish) == (first.text, first.thinking, first.finish)
        if again is second and method.remembers:
            assert again.spend.tokens <= first.spend.tokens and again.spend.usd <= first.spend.usd
            _sums_of_two(world, first, second)
        else:
            assert again.spend == first.spend and told(again) == told(first)


# -- receipts and the ledger ---------------------------------------------------------------------------------


async def receipt(method: type[Method], kind: str) -> None:
    """One receipt with a reason, whether it could act or not; and it does act on the call made for it."""
    world = World(method, kind)
    answer = await world.ask()
    own = world.receipts(answer)
    assert len(own) == 1 and own[0].reason
    if method.remembers:  # there is nothing to remember before the first call
        own = world.receipts(await world.ask())
        assert len(own) == 1 and own[0].reason
    assert own[0].fired, f"{method.name} did not fire ({own[0].reason}): give world.SETTINGS knobs with which it does"
    bare = World(method, kind)
    own = bare.receipts(await bare.ask(messages=({"role": "user", "content": "Hi"},), context=None))
    assert len(own) == 1 and own[0].reason


async def sums(method: type[Method], kind: str) -> None:
    """What the receipt says was spent in the method's name is what the ledger has under it; all entries are
    the answer's Spend."""
    world = World(method, kind)
    _sums(world, await world.ask())


async def sums_stacked(method: type[Method], kind: str) -> None:
    """The same in a plan with each method that may stand above or below it."""
    tried = 0
    for name in registry.names():
        cls = registry.get(name)
        other = cls.from_settings(SETTINGS.get(name, {}))
        if name == method.name or not cls.needs <= CAPABLE[kind]:
            continue
        for place in ("above", "below"):
            try:
                world = World(method, kind, **{place: (other,)})
            except PlanError:
                continue
            answer = await world.ask()
            assert {name, method.name} <= {r.method for r in answer.receipts}, f"{place} {name}: a receipt is missing"
            if not _loses_receipts(world):
                _sums(world, answer)
            tried += 1
    assert tried


def _loses_receipts(world: World) -> bool:
    """A race without branches cancels calls; what methods below it spent on those has no receipt, only
    entries."""
    names = [m.name for m in world.plan.methods]
    return names[0] == "first-finish-search" and world.kind == "scripted without branches"


def _sums(world: World, answer: Answer) -> None:
    assert world.entered() == answer.spend == world.account.settled
    for method in world.plan.methods:
        said = sum((r.spend for r in answer.receipts if r.method == method.name), start=type(answer.spend)())
        assert world.entered(method.name) == said, (
            f"{method.name}: entries {world.entered(method.name)}, receipt {said}"
        )
    assert not world.account.held


def _sums_of_two(world: World, first: Answer, second: Answer) -> None:
    assert world.entered() == first.spend + second.spend == world.account.settled
    own = [r.spend for answer in (first, second) for r in world.receipts(answer)]
    assert world.entered(world.method.name) == sum(own, start=type(first.spend)())
    assert not world.account.held


# -- budgets -------------------------------------------------------------------------------------------------


async def budgets(method: type[Method], kind: str) -> None:
    """Budgets of 0, of 1, and of some more: BudgetExceeded, or an answer within; never beyond, nothing left
    held."""
    limits = (0, 1, 2, 30, 120, 200, 400, 1000) if kind != TINY else (0, 1, 7, 1000)
    resources = ("tokens", "input", "output", "calls", "reasoning") if kind != TINY else ("tokens", "output")
    for resource in resources:
        for limit in limits:
            for on_exceed in ("degrade", "refuse"):
                world = World(method, kind, budget=Budget(**{resource: limit}), on_exceed=on_exceed)
                try:
                    answer = await world.ask(sampling=replace(world.call().sampling, max_tokens=40))
                except BudgetExceeded as error:
                    assert error.resource == resource and error.limit <= limit
                else:
                    assert world.entered() == answer.spend
                    assert len(world.receipts(answer)) == 1
                    assert resource not in ("tokens", "input", "calls") or limit > 0
                spent = world.account.settled
                assert getattr(spent, resource) <= limit, f"{resource} {limit}: {spent}"
                assert not world.account.held and not world.account.overdraft


async def degrades(method: type[Method], kind: str) -> None:
    """With room for the plain call and nothing more, a plan that degrades answers."""
    plain = World(method, kind, without=True)
    needed = (await plain.ask()).spend
    for resource in ("input", "output", "calls", "tokens"):
        world = World(method, kind, budget=Budget(**{resource: getattr(needed, resource)}))
        before = world.engine.count(world.call())
        try:
            answer = await world.ask()
        except BudgetExceeded as error:
            # a prompt method's own words are input, and input cannot be cut: only that may refuse
            grows = await _prompt_grows(method, kind, before)
            assert error.resource == resource and resource in ("input", "tokens") and grows
        else:
            assert getattr(answer.spend, resource) <= getattr(needed, resource)


async def _prompt_grows(method: type[Method], kind: str, before: int) -> bool:
    world = World(method, kind)
    await world.ask()
    return any(world.engine.count(c) > before for c in world.engine.calls if not c.labels.method)


# -- bad input and interruption ------------------------------------------------------------------------------


async def empty(method: type[Method], kind: str) -> None:
    """An empty call is refused and costs nothing; an empty message is refused or answered."""
    world = World(method, kind)
    with pytest.raises(InvalidInput):
        await world.ask(messages=(), context=None)
    with pytest.raises(InvalidInput):
        await world.pipeline.ask("  ")
    assert not world.entered() and not world.account.held
    try:
        answer = await world.ask(messages=({"role": "user", "content": ""},), context=())
    except InvalidInput:
        assert not world.account.held
    else:
        _sums(world, answer)


async def cancelled(method: type[Method], kind: str) -> None:
    """Cancelled at many moments: nothing stays held or runs on, and what was produced is settled once."""
    seen_midway = False
    for wait in (1, 2, 3, 5, 8, 13, 21, 34, 55):
        world = World(method, kind)
        task = asyncio.ensure_future(world.ask())
        await turns(wait, kind)
        midway = bool(world.account.held)
        seen_midway = seen_midway or midway
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            # the model may not have begun on its prompt: then nothing was produced
            assert not midway or kind == TINY or world.entered(), "what was produced was not settled"
        assert not world.account.held, f"still held after a cancel at turn {wait}: {world.account.held}"
        before = world.entered()
        await turns(80, kind)
        assert world.entered() == before == world.account.settled, "something ran on after the cancel"
    assert seen_midway


# -- settings ------------------------------------------------------------------------------------------------


def _variants(method: type[Method]) -> Iterator[dict[str, Any]]:
    """Settings with one knob moved to each end of its range, or to each choice, where that makes a method."""
    for name, (default, allowed) in method.knobs().items():
        ends = list(allowed.choices) or [x for x in (allowed.low, allowed.high) if x is not None]
        if isinstance(default, bool):
            ends = [True, False]
        if isinstance(default, tuple):
            ends = [[x] * len(default) for x in ends]
        elif isinstance(default, int) and not isinstance(default, bool):
            ends = [int(x) for x in ends]
        for value in ends:
            try:
                method.from_settings({name: value})
            except InvalidInput:
                continue  # two knobs that exclude each other
            yield {name: value}


async def toml(method: type[Method], kind: str) -> None:
    """Settings survive TOML: an equal plan with an equal hash; another value has another hash."""
    default = Plan("a", (method(),))
    for settings in ({}, SETTINGS.get(method.name, {}), *_variants(method)):
        plan = Plan("a", (method.from_settings(settings),), Budget(output=9, usd=123_000_000))
        again = Plan.from_toml(plan.to_toml())
        assert again == plan and again.hash == plan.hash and again.to_toml() == plan.to_toml()
        changed = method.from_settings(settings) != method()
        assert (Plan("b", (method.from_settings(settings),)).hash != default.hash) == changed


def _has_knobs(method: type[Method]) -> str | None:
    return None if method.knobs() else "it has no knobs"


async def unknown_knob(method: type[Method], kind: str) -> None:
    """A misspelt knob is refused, and the right name offered."""
    for name in method.knobs():
        with pytest.raises(InvalidInput, match=f"did you mean '{name}'"):
            method.from_settings({name + "q": 1})


async def ranges(method: type[Method], kind: str) -> None:
    """Every knob has a range and help, its default lies within, and what lies outside is refused by name."""
    method()
    for name, (default, allowed) in method.knobs().items():
        assert isinstance(allowed, Range) and allowed.help
        for value in _outside(default, allowed):
            with pytest.raises(InvalidInput) as refused:
                method.from_settings({name: value})
            assert method.name in str(refused.value) and name in str(refused.value), str(refused.value)
    fields = {f.name for f in dataclasses.fields(method)}
    assert fields == set(method.knobs()), "a field without a range cannot be written in TOML or searched"


def _outside(default: Any, allowed: Range) -> list[Any]:
    wrong: list[Any] = [{}]
    if allowed.choices:
        return [*wrong, "no such choice"]
    if isinstance(default, tuple):
        wrong += [7, [7 if isinstance(x, str) else "x" for x in default]]
    elif isinstance(default, str):
        wrong += [7]
    else:
        wrong += ["seven", float("nan"), [1]]
    if isinstance(default, int) and not isinstance(default, bool):
        wrong += [True, 1.5]
    ends = [allowed.low - 1] if allowed.low is not None else []
    ends += [allowed.high + 1] if allowed.high is not None else []
    whole = isinstance(default, int) or (isinstance(default, tuple) and isinstance(default[0], int))
    ends = [int(x) if whole else x for x in ends]
    return wrong + [[x] * len(default) if isinstance(default, tuple) else x for x in ends]


# -- what passes through, and streams ------------------------------------------------------------------------


def unmarked(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Messages or tools without cache breakpoints, which are no content; a text that became a part to carry one is a
    plain text again."""

    def bare(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [bare(x) for x in value]
        if not isinstance(value, dict):
            return value
        plain = {k: bare(v) for k, v in value.items() if k != "cache_control"}
        parts = value.get("content")
        if isinstance(parts, list) and len(parts) == 1 and set(parts[0]) == {"type", "text", "cache_control"}:
            plain["content"] = parts[0]["text"]
        return plain

    return tuple(bare(item) for item in items)


async def passes_through(method: type[Method], kind: str) -> None:
    """Images, tools and unknown fields reach the engine untouched, in every call that is made for the
    answer."""
    world = World(method, kind)
    call = world.rich_call()
    await world.pipeline(call)
    sent = [c for c in world.engine.calls if not c.labels.method]
    assert sent
    for made in sent:
        assert unmarked(made.tools) == call.tools and made.extra == call.extra
        message = unmarked(made.messages)[-1]
        original = call.messages[-1]
        assert {k: v for k, v in message.items() if k != "content"} == {
            k: v for k, v in original.items() if k != "content"
        }
        images = [p for p in message["content"] if p.get("type") != "text"]
        assert images == [p for p in original["content"] if p.get("type") != "text"]
        assert QUESTION in text_of(message)


async def pairs_whole(method: type[Method], kind: str) -> None:
    """In a conversation with tools, a call goes with its results and a result with its call, and the question stays."""
    world = World(method, kind)
    await world.ask(messages=conversation())
    for made in [c for c in world.engine.calls if not c.labels.method]:
        called = [c["id"] for m in made.messages for c in m.get("tool_calls", ())]
        assert called == [m["tool_call_id"] for m in made.messages if m["role"] == "tool"]
        assert any(QUESTION in text_of(m) for m in made.messages)


async def caller_unchanged(method: type[Method], kind: str) -> None:
    """The caller's own messages, context and plan are never written to."""
    world = World(method, kind)
    call = world.rich_call()
    before = (repr(call.messages), call.context, repr(world.plan))
    await world.pipeline(call)
    assert before == (repr(call.messages), call.context, repr(world.plan))


async def streamed(method: type[Method], kind: str) -> None:
    """Streamed = whole: the deltas joined are the answer, which ends the stream, once, with receipts and
    Spend."""
    world, quiet = World(method, kind), World(method, kind)
    answer, whole = await world.ask(emit=world.emit), await quiet.ask()
    assert (answer.text, answer.spend, told(answer)) == (whole.text, whole.spend, told(whole))
    assert "".join(d.text for d in world.deltas) == answer.text
    assert "".join(d.thinking for d in world.deltas) == answer.thinking
    assert [d.finish for d in world.deltas if d.finish is not None] == [answer.finish]
    last = world.deltas[-1].answer
    assert last is not None
    assert (last.text, last.spend, last.receipts) == (answer.text, answer.spend, answer.receipts)


async def concurrent(method: type[Method], kind: str) -> None:
    """Calls at the same time through one plan do not mix: each answer is the one it gets alone."""
    together, alone = World(method, kind), World(method, kind)
    seeds = (1, 2, 3)
    calls = [together.call(sampling=replace(together.call().sampling, seed=s)) for s in seeds]
    answers = await asyncio.gather(*(together.pipeline(c) for c in calls))
    for seed, answer in zip(seeds, answers, strict=True):
        single = await alone.ask(sampling=replace(alone.call().sampling, seed=seed))
        assert (answer.text, answer.spend, told(answer)) == (single.text, single.spend, told(single))
    assert sum((a.spend for a in answers), start=type(answers[0].spend)()) == together.entered()


def _opens(method: type[Method]) -> str | None:
    return None if method.kind in ("rewrite", "policy") else f"a {method.kind} has no open"


async def opened(method: type[Method], kind: str) -> None:
    """A branch opened through it and stepped to its end is the whole answer, with the same receipts."""
    world, whole = World(method, kind), World(method, kind)
    if "branch" not in world.engine.capabilities:
        return
    branch = await world.pipeline.open(world.call())
    while await branch.step() is not None:
        pass
    answer, called = await branch.finish_up(), await whole.ask()
    assert (answer.text, answer.thinking, answer.finish) == (called.text, called.thinking, called.finish)
    assert told(answer) == told(called)
    assert world.entered() == whole.entered() and not world.account.held


# -- families ------------------------------------------------------------------------------------------------


def _context_family(method: type[Method]) -> str | None:
    if registry.sources()[method.name].family != "context":
        return "not a context method"
    return None if "over" in method.knobs() else "it works on messages or tools, not on passages"


async def passages_kept(method: type[Method], kind: str) -> None:
    """What a context method leaves are the caller's own passages, each at most once, and the question's
    bytes."""
    for changes in ({}, {"context": (), "messages": _long()}):
        world = World(method, kind, {**SETTINGS.get(method.name, {}), "over": 10})
        await world.ask(**changes)
        sent = next(c for c in world.engine.calls if not c.labels.method)
        if changes:
            rest = iter(_long()[0]["content"].split("\n\n"))
            assert all(piece in rest for piece in sent.messages[0]["content"].split("\n\n"))
            assert sent.messages[0]["content"].endswith(QUESTION)
            assert len(sent.messages[0]["content"]) < len(_long()[0]["content"])
        else:
            assert set(sent.context) < set(PASSAGES) and len(set(sent.context)) == len(sent.context)
            assert sent.messages == world.call().messages


def _long() -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": "\n\n".join([*PASSAGES, QUESTION])},)


def _prompt_family(method: type[Method]) -> str | None:
    return None if registry.sources()[method.name].family == "prompt" else "not a prompt method"


async def words_kept(method: type[Method], kind: str) -> None:
    """A prompt method leaves context, and every word of the caller's messages, in their order."""
    world = World(method, kind)
    system = {"role": "system", "content": "Be kind."}
    messages = (
        system,
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        *world.call().messages,
    )
    await world.ask(messages=messages)
    sent: list[Call] = [c for c in world.engine.calls if not c.labels.method]
    for made in sent:
        assert made.context == PASSAGES
        assert text_of(made.messages[0]).startswith("Be kind.")
        made_of = unmarked(made.messages)
        assert [m for m in made_of if m in messages[1:]] == list(messages[1:])
        assert made_of[-1] == messages[-1]


LAWS: tuple[Law, ...] = (
    Law("identity", identity, _has_identity, model=True),
    Law("explained", explained, once=True),
    Law("same seed twice", repeatable, model=True),
    Law("always a receipt", receipt, model=True),
    Law("receipt sums to the ledger", sums, model=True),
    Law("receipts sum in every stack", sums_stacked),
    Law("budgets 0 and 1", budgets, model=True),
    Law("degrades to the plain call", degrades, model=True),
    Law("an empty call", empty, model=True),
    Law("cancelled in the middle", cancelled, model=True),
    Law("settings through TOML", toml, once=True),
    Law("unknown knob", unknown_knob, _has_knobs, once=True),
    Law("knob ranges", ranges, once=True),
    Law("images, tools, unknown fields", passes_through),
    Law("tool calls keep their results", pairs_whole),
    Law("the caller's call unchanged", caller_unchanged),
    Law("streamed = whole", streamed, model=True),
    Law("calls do not mix", concurrent, model=True),
    Law("opened = called", opened, _opens, model=True),
    Law("context: only whole passages", passages_kept, _context_family, model=True),
    Law("prompt: the caller's words stay", words_kept, _prompt_family, model=True),
)
"""White-box laws (padding and chunks, kept set = brute force, forked = unforked) join here with their
families, each with an `applies` that names them."""


def failures(method: type[Method], kind: str, laws: tuple[Law, ...] = LAWS) -> dict[str, str]:
    """Every law that a method breaks on one kind of engine, with how."""
    broken: dict[str, str] = {}
    for law in laws:
        if law.applies(method) is None:
            try:
                asyncio.run(law.check(method, kind))
            except (AssertionError, pytest.fail.Exception) as error:
                broken[law.name] = str(error)
    return broken
