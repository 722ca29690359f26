"""Perplexity compression: the count that was asked for, the order of the text, what is marked, what it costs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import regex

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, InvalidInput, Plan, PlanError
from thrifty.engine import score
from thrifty.engines.scripted import PROVIDES, ScriptedEngine
from thrifty.ledger.entry import Labels
from thrifty.methods.context._documents import parsed
from thrifty.methods.context.perplexity_compression import PerplexityCompression, recall

NAMES = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath")
NAMES += ("inlet", "jetty", "knoll", "lagoon", "marsh", "nook", "oasis", "pond")
PROSE = "".join(
    f"The {name} of the {i}th day was {'very ' * (i % 4)}quiet. Its keeper, number {i * 7}, said so in a letter.\n"
    + ("\n" if i % 3 == 0 else "")
    for i, name in enumerate(NAMES * 4)
)
QUESTION = "Who is the keeper of the fjord?"


def values(word: str, context: str, before: str) -> float:
    """Longer words are more surprising, and a word of the context is hardly any."""
    core = word.strip(" .,?\n")
    return -0.1 if core and core in context else -float(len(core)) - (len(before) % 7) / 100


async def ask(
    knobs: dict[str, Any], scorer: ScriptedEngine | None = None, budget: Budget | None = None, **call: Any
) -> tuple[Answer, Call]:
    """The answer, and the call that the answering engine got."""
    engine = ScriptedEngine("fine")
    scorer = scorer or ScriptedEngine("", model="small", logprob=values)
    plan = Plan("t", (PerplexityCompression(**knobs),), budget or Budget())
    pipeline = plan.build({"answer": engine, "scorer": scorer})
    made = pipeline.call(QUESTION, Account("t"), **{k: v for k, v in call.items() if k == "context"})
    if "messages" in call:
        made = Call(call["messages"], made.account)
    return await pipeline(made), engine.calls[-1]


def words(text: str) -> list[str]:
    return text.split()


def subsequence(part: str, whole: str) -> bool:
    """Characters of `part` but white space, in the order of `whole`."""
    rest = iter(whole)
    return all(c in rest for c in part if not c.isspace())


def bare(sent: Call) -> str:
    """The context as sent, without the mark."""
    return regex.sub(r"\[shortened[^\]]*\]\n?", "", "\n\n".join(sent.context or ()))


@pytest.mark.parametrize("level", ["sentence", "token"])
@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("contrastive", [False, True])
async def test_the_count_is_met_and_the_order_kept(level: str, ratio: float, contrastive: bool) -> None:
    knobs = {"ratio": ratio, "level": level, "contrastive": contrastive}
    answer, sent = await ask(knobs, context=(PROSE, PROSE[:500]))
    whole = len(words(PROSE + "\n" + PROSE[:500]))
    left = len(words("\n\n".join(sent.context or ())))
    assert ratio * whole * 0.98 - 1 <= left <= ratio * whole
    assert subsequence(bare(sent), PROSE + PROSE[:500])
    receipt = answer.receipts[0]
    assert receipt.fired and receipt.after == answer.spend.input - receipt.spend.input == left + len(words(QUESTION))
    assert sent.messages[-1]["content"] == QUESTION


async def test_tokens_instead_of_a_share() -> None:
    _, sent = await ask({"tokens": 100}, context=(PROSE,))
    assert 98 <= len(words((sent.context or ("",))[0])) <= 100
    answer, sent = await ask({"tokens": 5000}, context=(PROSE,))
    assert sent.context == (PROSE,) and not answer.receipts[0].fired and not answer.receipts[0].spend


async def test_at_token_level_the_most_surprising_stay_as_brute_force_has_them() -> None:
    scorer = ScriptedEngine("", logprob=values)
    text = PROSE[:600]
    found = (await score(scorer, [text], Account("s"), Labels())).texts[0]
    _, sent = await ask({"ratio": 0.5, "level": "token", "reversible": False}, context=(text,))
    kept = words(bare(sent))
    pieces = [text[a:b].strip() for a, b in found.spans]
    order = sorted(range(len(pieces)), key=lambda i: (found.logprobs[i], i))
    best = [pieces[i] for i in sorted(order[: len(kept)])]
    assert kept == [p for p in best if p]


async def test_at_sentence_level_the_best_sentences_stay_and_one_is_cut() -> None:
    sentences = ["aa bb cc dd ee. ", "longer words stand here. ", "f g h i jj. ", "middling words are now. "]
    text = "".join(sentences)
    _, sent = await ask({"tokens": 10, "reversible": False}, context=(text,))
    kept = bare(sent)
    assert "longer words stand here." in kept and "middling words are now." in kept
    assert "f g h" not in kept and len(words("".join(sent.context or ()))) in (9, 10)


async def test_contrastive_keeps_what_the_question_explains() -> None:
    text = "".join(f"The {name} has a lamp of its own, and somebody tends it. " for name in NAMES)
    plain, asked = [
        (await ask({"ratio": 0.2, "contrastive": c, "reversible": False}, context=(text,)))[1] for c in (False, True)
    ]
    assert "fjord" in bare(asked) and "lagoon" in bare(plain)
    assert "fjord" not in bare(plain)


async def test_the_scorer_reads_the_text_once_and_twice_where_contrastive() -> None:
    for contrastive, texts in ((False, 1), (True, 2)):
        answer, _ = await ask({"contrastive": contrastive}, context=(PROSE,))
        n = len(words(PROSE))
        extra = len(words(QUESTION)) if contrastive else 0
        assert n * texts <= answer.receipts[0].work.prefill <= (n + extra) * texts + 40
        assert answer.receipts[0].spend.calls == 1 and answer.spend.calls == 2


async def test_without_a_question_contrastive_is_plain_and_says_so() -> None:
    message = ({"role": "user", "content": "aaa bbbb cc " * 400},)
    answer, _ = await ask({"contrastive": True}, messages=message)
    assert "1 without a question by plain perplexity" in answer.receipts[0].reason


# -- long messages, marks, recall ----------------------------------------------------------------------------


def conversation(*behind: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return ({"role": "system", "content": "Be kind."}, {"role": "user", "content": PROSE + "\n\n" + QUESTION}, *behind)


async def test_a_long_message_keeps_its_question_and_a_short_one_all() -> None:
    answer, sent = await ask({"ratio": 0.4, "least": 100}, messages=conversation())
    assert sent.messages[0]["content"] == "Be kind." and sent.messages[1]["content"].endswith(QUESTION)
    assert len(words(sent.messages[1]["content"])) <= 0.4 * len(words(PROSE)) + len(words(QUESTION))
    answer, sent = await ask({"ratio": 0.4, "least": 100_000}, messages=conversation())
    assert sent.messages == conversation() and answer.receipts[0].reason == "0 long texts, none to shorten"


async def test_what_was_cut_is_marked_and_comes_back_when_asked_for() -> None:
    knobs = {"ratio": 0.4, "least": 100}
    answer, sent = await ask(knobs, messages=conversation())
    (ref,) = answer.receipts[0].detail["refs"]
    assert f"recall #{ref}" in sent.messages[1]["content"].split("\n")[0]
    assert recall(conversation(), "#" + ref).rstrip() == PROSE.rstrip()
    again = conversation({"role": "assistant", "content": f"I must recall #{ref}."}, {"role": "user", "content": "Do."})
    answer, sent = await ask(knobs, messages=again)
    assert sent.messages == again and "1 of them asked back" in answer.receipts[0].reason
    with pytest.raises(InvalidInput, match="names no long text"):
        recall(conversation(), "00000000")
    answer, sent = await ask({**knobs, "reversible": False}, messages=conversation())
    assert "recall" not in sent.messages[1]["content"] and "[shortened]" in sent.messages[1]["content"]


async def test_the_prefix_stays_from_turn_to_turn_and_the_receipt_says_what_a_change_costs() -> None:
    knobs = {"ratio": 0.4, "least": 100}
    _, first = await ask(knobs, messages=conversation())
    later = conversation({"role": "assistant", "content": "Number 35."}, {"role": "user", "content": "Sure?"})
    answer, second = await ask(knobs, messages=later)
    assert second.messages[: len(first.messages)] == first.messages
    detail = answer.receipts[0].detail
    assert detail["cache_broken"] == 0
    assert detail["cached_before"] == len(words("".join(m["content"] + " " for m in conversation())))
    assert detail["cached_after"] == len(words("".join(m["content"] + " " for m in first.messages)))


async def test_a_context_that_is_ranked_by_the_question_breaks_the_cache() -> None:
    messages = (
        {"role": "user", "content": "{context}\n\nWho is it?"},
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": QUESTION},
    )
    for contrastive, broken in ((False, False), (True, True)):
        engine, scorer = ScriptedEngine("fine"), ScriptedEngine("", logprob=values)
        plan = Plan("t", (PerplexityCompression(ratio=0.4, contrastive=contrastive),))
        pipeline = plan.build({"answer": engine, "scorer": scorer})
        answer = await pipeline(Call(messages, Account("t"), context=(PROSE,)))
        assert bool(answer.receipts[0].detail["cache_broken"]) == broken


# -- what must not break -------------------------------------------------------------------------------------

DATA = {"rows": [{"id": i, "name": NAMES[i % 16], "note": "x y " * 20} for i in range(60)]}
CODE = "".join(f"def f{i}(x):\n    y = x + {i}\n    z = y * 2\n    print(z)\n    return z\n\n\n" for i in range(12))


async def test_json_and_code_parse_afterwards() -> None:
    text = f"{PROSE}\n```python\n{CODE}```\n\n{json.dumps(DATA, indent=1)}\n\n{PROSE}"
    answer, sent = await ask({"ratio": 0.5}, context=(text, json.dumps(DATA, indent=2), CODE))
    first, data, code = sent.context or ("", "", "")
    assert len(words("\n\n".join((first, data, code)))) <= 0.5 * len(
        words("\n\n".join((text, json.dumps(DATA, indent=2), CODE)))
    )
    assert "rows" in json.loads(data) and len(data) < len(json.dumps(DATA, indent=2))
    tree = parsed(code)
    assert tree is not None and len(code) < len(CODE)
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert names and names == [f"f{i}" for i in range(len(names))]
    fenced = first.split("```python\n")[1].split("```")[0]
    assert parsed(fenced) is not None and len(fenced) < len(CODE)
    inner = regex.search(r"\{\"rows\".*\}", first, regex.S)
    assert inner is not None and "rows" in json.loads(inner[0])


async def test_data_alone_says_itself_how_it_is_asked_back() -> None:
    answer, sent = await ask({"ratio": 0.3}, context=(json.dumps(DATA, indent=1),))
    (ref,) = answer.receipts[0].detail["refs"]
    assert f"recall #{ref}" in json.dumps(json.loads((sent.context or ("",))[0]))
    assert not answer.receipts[0].spend, "nothing was to be scored"


async def test_data_that_cannot_be_shortened_is_told_as_over_the_limit() -> None:
    code = "```\nno known language " + "here " * 100 + "\n```\n"
    answer, sent = await ask({"tokens": 50}, context=(code, "One two three. " * 40))
    left = len(ScriptedEngine("").words.split(code))  # the line's end is one
    assert f"leave 1 of them over their limit by {left - 50} tokens" in answer.receipts[0].reason
    assert sent.context == (code,)


GRAPHEMES = "👩‍👩‍👧 naïve e\u0301t\u0301e 🇳🇴🇩🇰 각 क्षि 👍🏽 שלום לכולם עليكم السلام 漢字かな交じり文。次の文です。"


@pytest.mark.parametrize("level", ["sentence", "token"])
async def test_no_character_is_cut_apart_by_a_byte_level_scorer(tiny: Any, level: str) -> None:
    plan = Plan("t", (PerplexityCompression(ratio=0.5, level=level, reversible=False),))
    engine = ScriptedEngine("fine")
    pipeline = plan.build({"answer": tiny, "scorer": tiny})
    call = pipeline.call("Why?", Account("t"), context=(GRAPHEMES * 6,))
    changed = await plan.methods[0].rewrite(
        Call(call.messages, call.account, context=call.context, engines=ROLES(tiny))
    )
    left = bare(changed)
    known = regex.findall(r"\X", GRAPHEMES)
    assert changed.receipts[-1].fired and left
    rest = iter(known * 6)
    assert all(any(c == k for k in rest) for c in regex.findall(r"\X", left) if not c.isspace())
    n = tiny.codec.encode("\n\n".join(changed.context or ()))
    assert (
        0.98 * 0.5 * len(tiny.codec.encode(GRAPHEMES * 6)) - 4 <= len(n) <= 0.5 * len(tiny.codec.encode(GRAPHEMES * 6))
    )
    del engine


def ROLES(engine: Any) -> dict[str, Any]:
    return {"answer": engine, "scorer": engine}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer and a random model: most characters take several tokens."""
    import sys

    sys.path.append(str(Path(__file__).parents[2] / "engines" / "local"))
    from tiny_chat import make_folder

    from thrifty.engines.local.engine import LocalEngine

    return LocalEngine.load(make_folder(tmp_path_factory.mktemp("ppl") / "m", positions=1024), dtype="float32")


async def test_on_a_model_the_scorer_computes_each_token_once(tiny: Any) -> None:
    method = PerplexityCompression(ratio=0.4)
    text = PROSE * 2  # more than one window
    call = Call(({"role": "user", "content": QUESTION},), Account("t"), context=(text,), engines=ROLES(tiny))
    receipt = (await method.rewrite(call)).receipts[-1]
    n = len(tiny.codec.encode(text))
    assert n > 2000 and n <= receipt.work.prefill <= 1.1 * n
    assert 0.98 * 0.4 * n <= receipt.after - (receipt.before - n) <= 0.4 * n + 2


# -- bad input and budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["a" * 1_000_000, "\ud800 broken \udfff utf " * 300, "שלום עולם " * 400, "漢字の文章です。" * 500, "\n" * 5000],
    ids=["megabyte", "surrogates", "rtl", "cjk", "newlines"],
)
async def test_odd_texts_pass_or_are_shortened(text: str) -> None:
    for level in ("sentence", "token"):
        answer, sent = await ask({"ratio": 0.5, "level": level}, context=(text,))
        assert answer.text == "fine" and subsequence(bare(sent), text)
        if answer.receipts[0].fired:
            assert len(words("".join(sent.context or ()))) <= 0.5 * len(words(text)) + 1


async def test_an_image_only_message_and_no_message_have_nothing_to_shorten() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer, sent = await ask({"least": 1}, messages=({"role": "user", "content": [image]},))
    assert not answer.receipts[0].fired and sent.messages[0]["content"] == [image]


async def test_nothing_may_stay_of_the_context() -> None:
    _, sent = await ask({"ratio": 0.0}, context=(PROSE,))
    assert not sent.context


async def test_a_budget_below_the_system_prompt_is_refused_and_nothing_is_overdrawn() -> None:
    messages = ({"role": "system", "content": "be good " * 50}, *conversation()[1:])
    for limit in (0, 1, 20):
        account = Account("t", Budget(input=limit))
        plan = Plan("t", (PerplexityCompression(least=100),))
        pipeline = plan.build({"answer": ScriptedEngine("fine"), "scorer": ScriptedEngine("")})
        with pytest.raises(BudgetExceeded):
            await pipeline(Call(messages, account))
        assert account.settled.input <= limit and not account.held


async def test_where_the_budget_cannot_hold_the_scoring_all_stays_or_it_is_refused() -> None:
    whole = len(words(PROSE)) + len(words(QUESTION))
    answer, sent = await ask({}, budget=Budget(input=whole + 10), context=(PROSE,))
    assert sent.context == (PROSE,) and "cannot hold the scoring of 1 texts (input)" in answer.receipts[0].reason
    engine = ScriptedEngine("fine")
    plan = Plan("t", (PerplexityCompression(),), Budget(input=whole + 10), on_exceed="refuse")
    with pytest.raises(BudgetExceeded):
        await plan.build({"answer": engine, "scorer": ScriptedEngine("")}).ask(QUESTION, context=(PROSE,))


async def test_a_plan_without_a_scorer_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="'scorer' with score"):
        Plan("t", (PerplexityCompression(),)).build(ScriptedEngine("x"))
    deaf = ScriptedEngine("x", capabilities=PROVIDES - {"score"})
    with pytest.raises(
        PlanError, match="needs score, which engine scripted:scripted lacks; engines that have it: scripted"
    ):
        Plan("t", (PerplexityCompression(),)).build({"answer": ScriptedEngine("x"), "scorer": deaf})
