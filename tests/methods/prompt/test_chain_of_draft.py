"""Chain of Draft: the words of the prompt, the draft it asks an engine for, and the count of compliance by
hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Budget, Call, Draft, InvalidInput, Plan, Sampling
from thrifty.engines.scripted import Reply, ScriptedEngine
from thrifty.methods.prompt.chain_of_draft import (
    EXEMPLARS,
    ChainOfDraft,
    Compliance,
    compliance,
    system_prompt,
)


async def rewritten(method: ChainOfDraft, **fields: object) -> Call:
    call = Call(({"role": "user", "content": "What is 2 + 2?"},), Account("t"), **fields)  # type: ignore[arg-type]
    return await method.rewrite(call)


def test_the_papers_system_prompt() -> None:
    assert system_prompt() == (
        "Think step by step, but only keep a minimum draft for each thinking step, with 5 words at most. "
        "Return the answer at the end of the response after a separator ####."
    )


async def test_prompt_then_exemplars_then_question() -> None:
    call = await rewritten(ChainOfDraft(words=3, shots=2))
    system, user = call.messages
    assert user == {"role": "user", "content": "What is 2 + 2?"}
    first, second = (f"Q: {q}\nA: {a.format(s='####')}" for q, a in EXEMPLARS["arithmetic"][:2])
    assert system == {"role": "system", "content": "\n\n".join([system_prompt(3), first, second])}
    assert call.draft == Draft("####", 256)


async def test_exemplars_as_turns() -> None:
    call = await rewritten(ChainOfDraft(shots=1, form="turns", exemplars="reading"))
    question, answer = EXEMPLARS["reading"][0]
    assert [m["role"] for m in call.messages] == ["system", "user", "assistant", "user"]
    assert call.messages[1]["content"] == f"Q: {question}"
    assert call.messages[2]["content"] == f"A: {answer.format(s='####')}"


@pytest.mark.parametrize("content", ["Be kind.", [{"type": "text", "text": "Be kind."}]])
async def test_a_system_message_stays(content: object) -> None:
    call = Call(({"role": "system", "content": content, "x": 1}, {"role": "user", "content": "Hi"}), Account("t"))
    system = (await ChainOfDraft(shots=0).rewrite(call)).messages[0]
    told = system_prompt()
    expected = f"Be kind.\n\n{told}" if isinstance(content, str) else [*content, {"type": "text", "text": told}]  # type: ignore[misc]
    assert system == {"role": "system", "content": expected, "x": 1}


@pytest.mark.parametrize("kind", list(EXEMPLARS))
def test_our_exemplars_keep_to_what_they_teach(kind: str) -> None:
    for _, answer in EXEMPLARS[kind]:
        assert answer.count("{s}") == 1
        assert compliance(answer.format(s="####"), 5).within == 1


@pytest.mark.parametrize(
    ("draft", "words", "expected"),
    [
        ("20 - x = 12; x = 20 - 12 = 8. #### 8", 5, Compliance(2, 1.0, 3.5)),
        ("20-x=12; x=20-12=8. #### 8", 5, Compliance(2, 1.0, 3.5)),
        ("one two three four five six\nseven", 5, Compliance(2, 0.5, 3.5)),
        ("Ruth's well-known goat. It ate 3.5 kg", 3, Compliance(2, 0.5, 3.5)),
        ("9:10 then 1,000.25; ((x)) + y2", 2, Compliance(2, 0.5, 2.5)),
        ("a #### b #### c", 5, Compliance(1, 1.0, 2.0)),
        ("", 5, Compliance(0, 0.0, 0.0)),
        (";;\n. #### 8", 5, Compliance(0, 0.0, 0.0)),
    ],
)
def test_compliance_counted_by_hand(draft: str, words: int, expected: Compliance) -> None:
    assert compliance(draft, words) == expected


@given(st.lists(st.lists(st.sampled_from(["12", "x", "eggs", "left"]), min_size=1, max_size=8), min_size=1, max_size=6))
def test_compliance_of_drafts_whose_counts_are_known(steps: list[list[str]]) -> None:
    draft = "; ".join(" + ".join(step) for step in steps) + " #### 8"
    counts = [len(step) for step in steps]
    got = compliance(draft, 4)
    assert got.steps == len(counts)
    assert got.within == pytest.approx(sum(c <= 4 for c in counts) / len(counts))
    assert got.mean == pytest.approx(sum(counts) / len(counts))
    assert compliance(draft.replace(" + ", "+"), 4) == got  # spaces around operators change nothing


async def test_a_task_with_an_answer_prefix_drafts_first() -> None:
    """The engine writes the draft, forces the prefix after the separator, and the answer stands behind it."""
    engine = ScriptedEngine("north gate is 4471. #### The code is 4471")
    pipeline = Plan("cod", (ChainOfDraft(exemplars="reading"),)).build(engine)
    answer = await pipeline.ask("What is the code?", prefix="The code is")
    assert answer.text == "north gate is 4471. #### The code is 4471"
    assert answer.parsed == "The code is 4471"
    assert answer.spend.output == len(answer.tokens or ())


async def test_a_draft_that_runs_on_is_cut_and_the_prefix_forced() -> None:
    engine = ScriptedEngine("so " * 50 + "#### It is 9")
    pipeline = Plan("cod", (ChainOfDraft(draft_tokens=6),)).build(engine)
    answer = await pipeline.ask("What?", prefix="It is", sampling=Sampling(max_tokens=40))
    assert answer.text.count("so") == 6
    assert (answer.parsed or "").startswith("It is")


async def test_the_draft_is_spent_within_the_budget() -> None:
    engine = ScriptedEngine(Reply("so " * 50 + "#### 9"))
    pipeline = Plan("cod", (ChainOfDraft(),), Budget(output=10)).build(engine)
    answer = await pipeline.ask("What?")
    assert answer.finish == "budget" and answer.spend.output <= 10


def test_an_empty_separator_is_refused() -> None:
    with pytest.raises(InvalidInput, match="separator"):
        ChainOfDraft(separator=" ")
