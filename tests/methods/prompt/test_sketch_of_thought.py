"""Sketch-of-Thought: what the model is shown, what the examples hold to, how a paradigm is chosen and paid for."""

from __future__ import annotations

import ast
import operator
import re
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Plan
from thrifty.call import Draft, text_of
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.prompt._sketch_kits import KITS, Exemplar
from thrifty.methods.prompt._sketch_router import PARADIGMS, SHIPPED, by_words, fit, read_router
from thrifty.methods.prompt.sketch_of_thought import SketchOfThought, break_even, format_rule

NAME = SketchOfThought.name
QUESTION = "How many seconds are in 3 minutes and 20 seconds?"
REPLY = "<think>\nt = 3 * 60 + 20 = 200\n</think>\n\\boxed{200}"


def world(
    reply: str = REPLY,
    model: str = "minilm",
    dimensions: int = 384,
    budget: Budget | None = None,
    on_exceed: str = "degrade",
    **knobs: object,
):  # type: ignore[no-untyped-def]
    engine, embedder = ScriptedEngine(reply), ScriptedEngine("", model=model, dimensions=dimensions)
    plan = Plan("s", (SketchOfThought(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    pipeline = plan.build({"answer": engine, "embedder": embedder})
    return engine, pipeline, Account("t", ledger=MemoryLedger())


# -- what is shown -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paradigm", PARADIGMS)
async def test_rule_then_turns_then_the_question(paradigm: str) -> None:
    engine, pipeline, account = world(paradigm=paradigm)
    answer = await pipeline.ask(QUESTION, account)
    system, *turns, last = engine.calls[0].messages
    assert system == {"role": "system", "content": f"{KITS[paradigm].rule}\n{format_rule()}"}
    assert [m["role"] for m in turns] == ["user", "assistant"] * 3
    assert last == {"role": "user", "content": QUESTION} and engine.calls[0].draft is None
    for (asked, said), e in zip(zip(turns[::2], turns[1::2], strict=True), KITS[paradigm].exemplars, strict=True):
        assert asked["content"] == e.question
        assert said["content"] == f"<think>\n{e.sketch}\n</think>\n\\boxed{{{e.answer}}}"
    assert answer.receipts[0].detail == {"paradigm": paradigm, "shots": 3, "breaks_cached": 0}


async def test_sketch_and_answer_are_told_apart() -> None:
    from thrifty.bench.scorers import final_answer

    _, pipeline, account = world()
    answer = await pipeline.ask(QUESTION, account)
    assert answer.thinking.strip() == "t = 3 * 60 + 20 = 200" and final_answer(answer.text) == "200"
    assert 0 < answer.spend.reasoning < answer.spend.output
    for kit in KITS.values():  # what the examples show is read the same way
        for e in kit.exemplars:
            assert final_answer(f"\\boxed{{{e.answer}}}") == e.answer


async def test_examples_in_the_system_message() -> None:
    engine, pipeline, account = world(paradigm="conceptual_chaining", form="text", shots=2)
    await pipeline.ask(QUESTION, account)
    system, user = engine.calls[0].messages
    assert user["content"] == QUESTION
    assert system["content"].count("\n\nQ: ") == 2 == system["content"].count("\nA: <think>\n")


async def test_the_separator_form_drafts() -> None:
    engine, pipeline, account = world("t = 200 ==> 200", answer="separator", separator="==>", draft_tokens=40)
    answer = await pipeline.ask(QUESTION, account)
    assert engine.calls[0].draft == Draft("==>", 40) and answer.parsed == "200"
    shown = "\n".join(text_of(m) for m in engine.calls[0].messages)
    assert "<think>" not in shown and "\\boxed" not in shown and shown.count("==>") == 1 + 3


async def test_an_answer_prefix_follows_the_sketch() -> None:
    engine, pipeline, account = world("t = 200\n#### They are 200", shots=0)
    answer = await pipeline.ask(QUESTION, account, prefix="They are")
    assert engine.calls[0].draft == Draft("####", 256) and "answer prefix" in answer.receipts[0].reason
    assert answer.parsed == "They are 200"


@pytest.mark.parametrize("content", ["Be kind.", [{"type": "text", "text": "Be kind."}]])
async def test_a_system_message_stays(content: object) -> None:
    engine, pipeline, account = world(shots=0)
    await pipeline.ask([{"role": "system", "content": content, "x": 1}, {"role": "user", "content": QUESTION}], account)
    assert text_of(engine.calls[0].messages[0]).startswith("Be kind.") and engine.calls[0].messages[0]["x"] == 1


# -- the examples keep to what they teach --------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(text: str) -> Fraction:
    """A sum, product, ... of numbers, exactly."""

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant)
        return Fraction(str(node.value))

    return walk(ast.parse(text, mode="eval").body)


def test_equations_hold_and_come_one_a_line() -> None:
    for e in KITS["chunked_symbolism"].exemplars:
        for line in e.sketch.split("\n"):
            name, *sides = line.split("=")
            assert re.fullmatch(r"\d*[a-z]", name.strip()) and 1 <= len(sides) <= 2
            numbers = [value(re.sub(r"\s(?:km/h|km|h)\s*$", "", side).strip()) for side in sides]
            assert len(set(numbers)) == 1, line


def test_chains_are_of_key_terms() -> None:
    for e in KITS["conceptual_chaining"].exemplars:
        terms = e.sketch.split(" → ")
        assert len(terms) >= 2 and all(1 <= len(t.split()) <= 3 for t in terms) and "." not in e.sketch


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_no_sketch_is_a_sentence_or_restates_its_question(paradigm: str) -> None:
    for e in KITS[paradigm].exemplars:
        assert not re.search(r"\b(?:the|is|are|was|we|it)\b", e.sketch), e.sketch
        words = set(re.findall(r"[a-z]{4,}", e.question.lower()))
        assert len(words & set(re.findall(r"[a-z]{4,}", e.sketch.lower()))) <= 2
        if " B) " in e.question:
            assert re.fullmatch(r"[A-D]", e.answer)


# -- choosing ------------------------------------------------------------------------------------------------


async def test_the_router_reads_the_embedding() -> None:
    """The embedder is the scripted one under MiniLM's name: its vectors mean nothing, and the sums must still hold."""
    np = pytest.importorskip("numpy")
    engine, pipeline, account = world(shots=1)
    answer = await pipeline.ask(QUESTION, account)
    (receipt,) = answer.receipts
    vector = (await ScriptedEngine("", dimensions=384).embed([QUESTION], Account("x"), engine.calls[0].labels)).vectors
    router = read_router(SHIPPED)
    logits = np.array(router.weights) @ vector[0] + np.array(router.bias)
    p = np.exp(logits) / np.exp(logits).sum()
    assert receipt.detail["paradigm"] == PARADIGMS[int(p.argmax())]
    assert receipt.detail["probability"] == pytest.approx(float(p.max()), abs=6e-5)
    assert receipt.spend.input == len(QUESTION.split()) and receipt.spend.calls == 1
    own = [e for e in account.ledger.entries() if e.labels.method == NAME]
    assert [e.labels.role for e in own] == ["embedder"] and own[0].spend == receipt.spend
    assert answer.spend == account.settled and receipt.after > receipt.before


@pytest.mark.parametrize(
    ("model", "knobs", "why"),
    [
        ("other-embedder", {}, "not for other-embedder"),
        ("minilm", {"router": "words"}, "chosen by words"),
        ("minilm", {"paradigm": "expert_lexicons"}, "as set"),
    ],
)
async def test_what_needs_no_embedding_makes_none(model: str, knobs: dict[str, object], why: str) -> None:
    _, pipeline, account = world(model=model, **knobs)
    answer = await pipeline.ask(QUESTION, account)
    assert why in answer.receipts[0].reason and answer.spend.calls == 1
    assert answer.receipts[0].detail["paradigm"] == knobs.get("paradigm", by_words(QUESTION))


async def test_an_image_alone_is_chained() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    engine, pipeline, account = world()
    answer = await pipeline.ask([{"role": "user", "content": [image]}], account)
    assert answer.receipts[0].detail["paradigm"] == "conceptual_chaining" and "no text" in answer.receipts[0].reason
    assert engine.calls[0].messages[-1]["content"] == [image]


async def test_a_router_for_another_embedder(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    x = np.eye(8)[[0, 1, 2]]
    file = tmp_path / "mine.json"
    file.write_text(fit(x, [0, 1, 2], ["mine"]).to_json(), encoding="utf-8")
    _, pipeline, account = world(model="mine", dimensions=8, weights=str(file))
    assert "probability" in (await pipeline.ask(QUESTION, account)).receipts[0].detail
    _, pipeline, account = world(model="mine", dimensions=9, weights=str(file))
    with pytest.raises(InvalidInput, match="vectors of 8 numbers, not 9"):
        await pipeline.ask(QUESTION, account)
    with pytest.raises(InvalidInput, match="none.json"):
        SketchOfThought(weights=str(tmp_path / "none.json"))
    with pytest.raises(InvalidInput, match="separator"):
        SketchOfThought(separator=" ")


async def test_what_it_breaks_of_the_cached_prefix() -> None:
    turns = [
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": "four five"},
        {"role": "user", "content": QUESTION},
    ]
    _, pipeline, account = world()
    answer = await pipeline.ask(turns, account)
    assert answer.receipts[0].detail["breaks_cached"] == 5 and "5 cached tokens" in answer.receipts[0].reason
    _, pipeline, account = world(paradigm="chunked_symbolism")
    assert (await pipeline.ask(turns, account)).receipts[0].detail["breaks_cached"] == 0


# -- budgets -------------------------------------------------------------------------------------------------


async def test_every_budget_is_kept_and_more_of_it_shows_more_examples() -> None:
    shown = []
    for limit in range(10, 300):
        _, pipeline, account = world(paradigm="chunked_symbolism", budget=Budget(input=limit))
        answer = await pipeline.ask(QUESTION, account)
        (receipt,) = answer.receipts
        assert answer.spend.input <= limit
        shown.append(receipt.detail["shots"] if receipt.fired else -1)
    assert shown == sorted(shown) and set(shown) == {-1, 0, 1, 2, 3}


async def test_a_budget_too_small_to_embed_routes_by_words() -> None:
    for limit in (Budget(calls=1), Budget(tokens=120), Budget(input=100)):
        _, pipeline, account = world(budget=limit)
        answer = await pipeline.ask(QUESTION, account)
        assert "no budget" in answer.receipts[0].reason and answer.spend.calls == 1
        _, strict, account = world(budget=limit, on_exceed="refuse")
        with pytest.raises(BudgetExceeded):
            await strict.ask(QUESTION, account)
        assert not account.held and not account.settled


# -- templates that cut thinking -----------------------------------------------------------------------------

CUTTING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("cuts", [True, False])
async def test_a_template_that_cuts_thinking_gets_the_examples_as_text(cuts: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    sys.path.append(str(Path(__file__).parents[2] / "engines" / "local"))
    from tiny_chat import TEMPLATE, make_folder

    from thrifty.engines.local.engine import LocalEngine

    engine = LocalEngine.load(make_folder(tmp_path / "m", CUTTING if cuts else TEMPLATE, 4096), dtype="float32")
    call = Call(({"role": "user", "content": QUESTION},), Account("t"), engines={"answer": engine})
    changed = await SketchOfThought(paradigm="conceptual_chaining").rewrite(call)
    assert [m["role"] for m in changed.messages] == (["system", "user"] if cuts else ["system", *TURNED, "user"])
    assert ("template cuts thinking" in changed.receipts[0].reason) == cuts
    assert (
        "".join(text_of(m) for m in changed.messages).count("→") == 3 + 2 + 2 + 1
    )  # every sketch, and the rule's arrow
    separated = await SketchOfThought(paradigm="conceptual_chaining", answer="separator").rewrite(
        replace(call, receipts=())
    )
    assert len(separated.messages) == 8  # no tags, nothing to cut
    await engine.aclose()


TURNED = ["user", "assistant"] * 3


# -- when it pays --------------------------------------------------------------------------------------------

price = st.integers(0, 40).map(lambda n: n / 8)


@given(st.integers(0, 60), st.integers(-5, 40).map(lambda n: n / 2), price, price, price)
def test_break_even_by_counting_the_calls(added: int, saved: float, full: float, cached: float, output: float) -> None:
    first = None
    for n in range(1, 3000):
        if n * saved * output > added * full + (n - 1) * added * cached:
            first = n
            break
    found = break_even(added, saved, input=full, cached=cached, output=output)
    if found is not None and found >= 3000:
        assert first is None
    elif saved * output > added * cached:
        assert found == first
    else:
        assert found is None  # each later call loses: it does not pay for good


def test_break_even_refuses_nonsense() -> None:
    for bad in ({"added": -1}, {"saved": float("nan")}, {"input": -1.0}, {"output": float("inf")}):
        with pytest.raises(InvalidInput):
            break_even(**{"added": 10, "saved": 5.0, **bad})  # type: ignore[arg-type]


def test_kits_are_complete() -> None:
    assert set(KITS) == set(PARADIGMS)
    assert all(isinstance(e, Exemplar) and len(k.exemplars) == 3 for k in KITS.values() for e in k.exemplars)
