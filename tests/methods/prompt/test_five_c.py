"""5C contracts: the choice of wordings against every combination, lines read back, contradictions and lengths read by
hand, and what reaches the engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Plan
from thrifty.call import text_of
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.prompt.five_c import (
    FIELDS,
    Contract,
    FiveC,
    Length,
    adherence,
    choose,
    contradictions,
    lengths,
    parse,
    render,
    renderings,
)

OPTIONS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 9).map(float)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


@given(OPTIONS, st.one_of(st.none(), st.integers(-1, 45)))
def test_the_choice_is_that_of_every_combination_tried(
    groups: list[list[tuple[int, float]]], limit: int | None
) -> None:
    fitting = []
    for picked in itertools.product(*(range(len(g)) for g in groups)):
        tokens = sum(g[i][0] for g, i in zip(groups, picked, strict=True))
        worth = sum(g[i][1] for g, i in zip(groups, picked, strict=True))
        if limit is None or tokens <= limit:
            fitting.append((-worth, tokens, list(picked)))
    got = choose(groups, limit)
    if not fitting:
        assert got is None
        return
    assert got is not None
    tokens = sum(g[i][0] for g, i in zip(groups, got, strict=True))
    worth = sum(g[i][1] for g, i in zip(groups, got, strict=True))
    assert (-worth, tokens) == min(fitting)[:2]


PLAIN = st.text(st.characters(categories=["L", "N", "Zs"]), max_size=30)


@given(PLAIN.filter(str.strip), PLAIN.filter(str.strip), PLAIN, PLAIN, PLAIN)
def test_lines_are_read_back(cause: str, constraint: str, a: str, b: str, c: str) -> None:
    try:
        contract = Contract(cause=cause, constraint=constraint, character=a, contingency=b, calibration=c)
    except InvalidInput:  # two fields drew the same sentence, or two lengths
        return
    assert parse(render(contract)) == contract
    assert len(render(contract).splitlines()) == sum(bool(getattr(contract, f)) for f in FIELDS)


def test_a_field_may_look_like_another() -> None:
    contract = Contract(cause="Cause: none\nConstraint: x", constraint="Be brief: always.")
    assert contract.cause == "Cause: none Constraint: x"
    assert parse(render(contract)) == contract


@pytest.mark.parametrize("text", ["Cause: a\nCause: b\nConstraint: c", "Cause: a", "hello", "Cause: a\nConstraint: \n"])
def test_what_is_no_contract_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Use at most 50 words.", [Length("word", None, 50)]),
        ("Under 50 words, in one line", [Length("word", None, 49), Length("line", None, 1)]),
        ("50–100 words", [Length("word", 50, 100)]),
        ("Between 2 to 4 sentences", [Length("sentence", 2, 4)]),
        ("more than 1,000 characters", [Length("character", 1001, None)]),
        ("exactly three bullets of at most 9 words each", [Length("bullet", 3, 3)]),
        ("Three bullets; 20 words per bullet", [Length("bullet", 3, 3)]),
        ("No numbers here, many words.", []),
    ],
)
def test_lengths_read_by_hand(text: str, expected: list[Length]) -> None:
    assert lengths(text) == expected


@pytest.mark.parametrize(
    ("a", "b", "sound"),
    [
        ("At most 50 words.", "Write at least 80 words.", False),
        ("At most 50 words.", "Use at most 60 words.", False),
        ("At most 50 words.", "Write at least 40 words.", True),
        ("At most 50 words.", "At most 3 sentences.", True),
        ("Be kind. Be brief.", "Be brief!", False),
        ("Be kind.", "Be brief.", True),
        ("At most 50 words, at least 60 words.", "x", False),
    ],
)
def test_contradictions(a: str, b: str, sound: bool) -> None:
    assert (not contradictions({"constraint": [a], "calibration": [b]})) == sound
    if not sound:
        with pytest.raises(InvalidInput, match="keep one"):
            FiveC(constraint=(a,), calibration=(b,))


def test_wordings_of_one_field_may_differ() -> None:
    wordings = ("At most 50 words, no lists.", "At most 50 words.")
    assert FiveC(constraint=wordings).settings()["constraint"] == list(wordings)


@pytest.mark.parametrize("name", ["cause", "constraint"])
def test_cause_and_constraint_must_be_there(name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        FiveC.from_settings({name: [" "]})
    with pytest.raises(InvalidInput, match="word"):
        FiveC.from_settings({name: ["so " * 26]})


def test_fewer_tokens_than_the_same_said_in_other_forms() -> None:
    for contract in (
        Contract(cause="Teach fractions.", constraint="At most 90 words."),
        Contract("Sell the tea.", "One line.", "A shop keeper.", "If no price is given, ask.", "Warm in tone."),
    ):
        counted = {form: len(text.split()) for form, text in renderings(contract).items()}
        assert counted["contract"] == min(counted.values())
        assert all(contract.cause in text for text in renderings(contract).values())


def test_adherence_of_answers_checked_by_hand() -> None:
    contract = Contract(cause="x", constraint="At most 5 words, exactly 2 bullets", calibration="at least two lines")
    assert adherence(contract, "- one\n- two") == {
        "words at most 5": True,
        "bullets exactly 2": True,
        "lines at least 2": True,
    }
    assert not any(adherence(contract, "one two three four five six").values())
    js = Contract(cause="x", constraint="JSON only")
    assert adherence(js, '{"a": 1}') == {"JSON": True} and adherence(js, "a: 1") == {"JSON": False}


# -- in a plan: the scripted engine counts words -----------------------------------------------------------


async def sent(method: FiveC, budget: Budget | None = None, on_exceed: str = "degrade"):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine("ok")
    pipeline = Plan("p", (method,), budget or Budget(), on_exceed=on_exceed).build(engine)  # type: ignore[arg-type]
    answer = await pipeline.ask("Why is the sky blue?")
    return engine.calls[0].messages, answer.receipts[0], answer


SMALL = {
    "character": ["You teach."],
    "cause": ["Explain it to a child.", "Explain."],
    "constraint": ["Use at most 40 words.", "40 words."],
    "contingency": ["If unsure say so."],
    "calibration": ["Be warm."],
}


async def test_the_task_stays_last_and_the_contract_is_five_lines() -> None:
    messages, receipt, answer = await sent(FiveC.from_settings(SMALL))
    assert text_of(messages[0]).splitlines() == [
        "Character: You teach.",
        "Cause: Explain it to a child.",
        "Constraint: Use at most 40 words.",
        "Contingency: If unsure say so.",
        "Calibration: Be warm.",
    ]
    assert messages[-1] == {"role": "user", "content": "Why is the sky blue?"}
    assert receipt.fired and receipt.after - receipt.before == 3 + 6 + 6 + 5 + 3 == sum(
        receipt.detail["tokens"].values()
    )
    assert answer.spend.input == 5 + 23


@pytest.mark.parametrize(
    ("limit", "lines"),
    [
        (23, [3, 6, 6, 5, 3]),
        (22, [3, 6, 6, 5]),  # calibration is worth least
        (19, [6, 6, 5]),
        (16, [3, 6, 6]),
        (14, [6, 6]),  # worth 24; so is Cause, the short Constraint and Contingency, but that takes 14
        (5, [2, 3]),
    ],
)
async def test_a_limit_drops_what_is_worth_least(limit: int, lines: list[int]) -> None:
    messages, receipt, _ = await sent(FiveC.from_settings({**SMALL, "tokens": limit}))
    assert [len(line.split()) for line in text_of(messages[0]).splitlines()] == lines
    assert receipt.fired and receipt.after - receipt.before == sum(lines) <= limit


async def test_a_limit_below_cause_and_constraint_leaves_it_out() -> None:
    messages, receipt, _ = await sent(FiveC.from_settings({**SMALL, "tokens": 4}))
    assert len(messages) == 1 and not receipt.fired and "5 tokens" in receipt.reason


async def test_the_account_limits_it_too() -> None:
    messages, receipt, answer = await sent(FiveC.from_settings(SMALL), Budget(input=5 + 11))
    assert receipt.fired and answer.spend.input <= 16
    messages, receipt, _ = await sent(FiveC.from_settings(SMALL), Budget(input=6))
    assert len(messages) == 1 and not receipt.fired
    with pytest.raises(BudgetExceeded):
        await sent(FiveC.from_settings(SMALL), Budget(input=6), on_exceed="refuse")


async def test_without_an_engine_it_still_renders() -> None:
    call = Call(({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}), Account("t"))
    changed = await FiveC().rewrite(call)
    assert text_of(changed.messages[0]).startswith("Be kind.\n\nCharacter: ")


HOSTILE = {
    "an image alone": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},),
    "a tool result first": (
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "user", "content": "hard"},
    ),
    "no user": ({"role": "assistant", "content": "hard"},),
    "no space": ({"role": "user", "content": "x" * 1_000_000},),
    "broken text": ({"role": "user", "content": "hard \ud800 \x00"},),
    "other scripts": ({"role": "user", "content": "מה זה? 這是什麼？ hard"},),
}


@pytest.mark.parametrize("messages", HOSTILE.values(), ids=list(HOSTILE))
async def test_hostile_conversations_are_answered_with_a_receipt(messages: Any) -> None:
    engine = ScriptedEngine("ok")
    pipeline = Plan("p", (FiveC(),)).build(engine)
    answer = await pipeline.ask(messages)
    assert len(answer.receipts) == 1 and answer.receipts[0].reason
    assert [m for m in engine.calls[-1].messages if m.get("role") != "system"] == list(messages)
