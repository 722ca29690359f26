"""ThoughtTerminator: interrupts and deadline against the closed form, early answers, the schedule, budgets."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking import Say

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, InvalidInput, Plan, Sampling
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedEngine
from thrifty.methods.decode.thought_terminator import ThoughtTerminator, deadline_of, interval

ASK = ({"role": "user", "content": "Why?"},)
BLACK = PROVIDES - {"branch"}
LINE = "\n\nI have used {used} tokens, and I have {left} tokens left to answer. To continue:\n"


def own(answer: Answer) -> Any:
    return next(r for r in answer.receipts if r.method == "thought-terminator")


async def ask(engine: Any, method: ThoughtTerminator, *policies: Any, **fields: Any) -> Answer:
    account = fields.pop("account", None) or Account("t")
    call = Call(ASK, account, policies=policies, sampling=Sampling(max_tokens=fields.pop("max_tokens", None)), **fields)
    answer = await Plan("t", (method,)).build(engine)(call)
    assert answer.spend == account.settled and not account.held
    return answer


def endless(call: Call, draw: Draw) -> Reply:
    """Thinks until it is told to answer."""
    if "</think>" in (call.prefix or ""):
        return Reply(" 42")
    return Reply("42", thinking="hm " * 400)


@pytest.mark.parametrize("black", [False, True])
@pytest.mark.parametrize(("deadline", "every"), [(1, 250), (2, 250), (9, 3), (10, 3), (20, 250), (21, 4)])
async def test_interrupts_and_deadline_are_the_closed_form(deadline: int, every: int, black: bool) -> None:
    engine = ScriptedEngine(endless, capabilities=BLACK if black else PROVIDES)
    method = ThoughtTerminator(deadline=deadline, every=every, begin="prefix", keep=1)
    answer = await ask(engine, method)
    n = interval(deadline, every)
    count = math.ceil(deadline / n) - 1
    assert answer.thinking.split().count("hm") == deadline
    lines = [LINE.replace("{used}", str(i * n)).replace("{left}", str(deadline - i * n)) for i in range(1, count + 1)]
    at = -1
    for line in lines:
        at = answer.thinking.index(line.strip(), at + 1)
    assert answer.thinking.count("To continue:") == count == own(answer).detail["interrupts"]
    assert "out of time" in answer.thinking and answer.text.startswith("Final Answer:")
    assert own(answer).fired and f"deadline of {deadline}" in own(answer).reason
    words = len(engine.words.split("".join(lines) + method.last_words)) + 6
    assert answer.spend.output <= deadline + words + method.answer_tokens


async def test_an_answer_that_is_marked_in_the_models_own_words_ends_thinking(thinker: Any) -> None:
    say = "<think>easy \\boxed{4} but let me check it all again and again, as I always do</think>\n\n4"
    answer = await ask(thinker, ThoughtTerminator(deadline=1000, every=20, keep=1), Say(say), max_tokens=300)
    assert answer.thinking.strip().startswith("easy \\boxed{4}") and "always" not in answer.thinking
    assert "an answer already" in own(answer).reason and own(answer).detail["interrupts"] == 0


async def test_the_prompts_examples_are_no_answer(thinker: Any) -> None:
    """What stands in the prompt, or in a forced line, is not the model's answer."""
    method = ThoughtTerminator(deadline=40, every=10, keep=1, interrupt="\nNo \\boxed{x} yet, {left} left.\n")
    call = Call(({"role": "user", "content": "e.g. \\boxed{3}"},), Account("t"), policies=(Say("<think>" + "x" * 99),))
    answer = await Plan("t", (method,)).build(thinker)(call)
    assert own(answer).detail["interrupts"] == 3 and "deadline of 40" in own(answer).reason


async def test_the_answer_after_the_deadline_is_capped(thinker: Any) -> None:
    method = ThoughtTerminator(deadline=10, answer_tokens=5, keep=1, cue="")
    answer = await ask(thinker, method, Say("<think>" + "x" * 60), max_tokens=300)
    assert answer.finish == "length" and answer.text == "x" * 5


async def test_the_deadline_is_named_in_the_system_message() -> None:
    engine = ScriptedEngine("42")
    answer = await ask(engine, ThoughtTerminator(deadline=77))
    assert engine.calls[0].messages[0] == {"role": "system", "content": "Think for at most 77 tokens."}
    assert engine.calls[0].messages[1:] == ASK and "did not think" in own(answer).reason
    call = Call(({"role": "system", "content": "Be kind."}, *ASK), Account("t"))
    await Plan("t", (ThoughtTerminator(deadline=77),)).build(engine)(call)
    assert engine.calls[1].messages[0]["content"] == "Be kind.\n\nThink for at most 77 tokens."


@pytest.mark.parametrize(("said", "deadline"), [("About 12 tokens.", 12), ("none at all", 30), ("9,000", 30), ("0", 1)])
@pytest.mark.parametrize("black", [False, True])
async def test_the_model_may_set_the_deadline(said: str, deadline: int, black: bool) -> None:
    def script(call: Call, draw: Draw) -> Reply:
        return Reply(said) if "How many tokens" in call.question() else endless(call, draw)

    engine = ScriptedEngine(script, capabilities=BLACK if black else PROVIDES)
    answer = await ask(engine, ThoughtTerminator(schedule="asked", deadline=30, begin="prefix", keep=1))
    receipt = own(answer)
    assert receipt.detail["deadline"] == deadline and receipt.spend.calls == 1
    assert answer.thinking.split().count("hm") == deadline
    assert ("no number" in receipt.reason) == (said == "none at all")


def test_bins_map_difficulty_to_a_deadline() -> None:
    assert [deadline_of(d / 10, [10, 20, 30, 40, 50]) for d in range(11)] == [
        10,
        10,
        20,
        20,
        30,
        30,
        40,
        40,
        50,
        50,
        50,
    ]
    for bad in ((0.5, []), (1.5, [1])):
        with pytest.raises(InvalidInput, match="difficulty"):
            deadline_of(*bad)


@settings(max_examples=100, deadline=None)
@given(
    black=st.booleans(),
    deadline=st.integers(1, 30),
    every=st.integers(1, 10),
    keep=st.integers(0, 5),
    limit=st.one_of(st.none(), st.integers(0, 60)),
    output=st.one_of(st.none(), st.integers(0, 60)),
    tokens=st.one_of(st.none(), st.integers(0, 200)),
    calls=st.one_of(st.none(), st.integers(0, 4)),
    schedule=st.sampled_from(["fixed", "asked"]),
)
def test_no_budget_is_ever_exceeded(
    black: bool, deadline: int, every: int, keep: int, limit: Any, output: Any, tokens: Any, calls: Any, schedule: str
) -> None:
    engine = ScriptedEngine(endless, capabilities=BLACK if black else PROVIDES, tranche=3)
    account = Account("t", Budget(output=output, tokens=tokens, calls=calls))
    method = ThoughtTerminator(deadline=deadline, every=every, keep=keep, begin="prefix", schedule=schedule)
    try:
        answer = asyncio.run(ask(engine, method, account=account, max_tokens=limit))
    except BudgetExceeded:
        answer = None
    spent = account.settled
    assert output is None or spent.output <= output
    assert tokens is None or spent.input + spent.output <= tokens
    assert calls is None or spent.calls <= calls
    assert not account.held and not account.overdraft
    if answer is not None:
        assert limit is None or answer.spend.output - own(answer).spend.output <= limit
        assert own(answer).reason
