"""Budget forcing: exact texts on a model that says what it is told, the black-box form on a model of a few lines,
budgets by property."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking import Say

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, InvalidInput, Plan, PlanError, Sampling
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedEngine
from thrifty.methods.decode.budget_forcing import NO_LIMIT, BudgetForcing, flips

ASK = ({"role": "user", "content": "Why?"},)
BLACK = PROVIDES - {"branch"}


async def ask(
    engine: Any, method: BudgetForcing, *policies: Any, budget: Budget | None = None, **fields: Any
) -> Answer:
    sampling = fields.pop("sampling", None) or Sampling(max_tokens=fields.pop("max_tokens", 300))
    pipeline = Plan("t", (method,)).build(engine)
    return await pipeline(Call(ASK, Account("t", budget or Budget()), policies=policies, sampling=sampling, **fields))


def own(answer: Answer) -> Any:
    return next(r for r in answer.receipts if r.method == "budget-forcing")


# -- as a policy, on a model that says what a test wants -----------------------------------------------------


async def test_thinking_is_cut_at_the_limit_and_the_answer_is_asked_for(thinker: Any) -> None:
    answer = await ask(thinker, BudgetForcing(most=10, keep=0), Say("<think>" + "x" * 50 + "</think>no"), max_tokens=60)
    # the tenth thinking token is the last; the newline before the tag belongs to the block
    assert answer.thinking == "x" * 10 + "\n" and answer.text.startswith("Final Answer:")
    receipt = own(answer)
    assert receipt.fired and receipt.after == answer.spend.reasoning
    assert "10 thinking tokens were used" in receipt.reason


async def test_a_closing_tag_is_replaced_by_wait_as_often_as_asked(thinker: Any) -> None:
    say = Say("<think>a</think>b</think>c</think>d")
    answer = await ask(thinker, BudgetForcing(waits=2, most=500), say)
    assert (answer.thinking, answer.text) == ("aWaitbWaitc", "d")
    assert own(answer).detail["waits"] == 2 and own(answer).fired
    # the word's tokens are thinking, and none of the suppressed tags was drawn or billed
    assert own(answer).after == answer.spend.reasoning == len(thinker.codec.encode("aWaitbWaitc")) + 1
    assert answer.spend.output == answer.spend.reasoning + 1 + len(thinker.codec.encode("d")) + 1


async def test_m1_puts_a_blank_before_the_word_where_there_is_none(thinker: Any) -> None:
    say = Say("<think>a</think>b \n</think>c</think>d")
    answer = await ask(thinker, BudgetForcing(waits=2, variant="m1"), say)
    assert (answer.thinking, answer.text) == ("a Waitb \nWaitc", "d")


async def test_an_end_of_the_text_inside_thinking_is_an_end_of_thinking(thinker: Any) -> None:
    class Ends(Say):
        """After each part the model ends its text."""

        def logits(self, branch: Any, logits: Any) -> Any:
            if self._ids is None:
                super().logits(branch, logits.clone())
                self._ids = [t if t != 10_000 else 0 for t in self._encoded(branch)]
                self._at = 0
            return super().logits(branch, logits)

        def _encoded(self, branch: Any) -> list[int]:
            parts = [branch.codec.encode(p) for p in self.text.split("|")]
            return [t for i, p in enumerate(parts) for t in ([0] if i else []) + p]

    answer = await ask(thinker, BudgetForcing(waits=1), Ends("<think>a|b|d|"))
    assert (answer.thinking.strip(), answer.text) == ("aWaitb", "d")
    assert "extended 1 times" in own(answer).reason and "ended inside its thinking" in own(answer).reason


@pytest.mark.parametrize(("most", "waits"), [(5, 0), (6, 1)])
async def test_a_word_that_would_reach_the_limit_is_left_out(thinker: Any, most: int, waits: int) -> None:
    n = len(thinker.codec.encode("Wait"))
    say = Say("<think>a</think>b</think>c")
    answer = await ask(thinker, BudgetForcing(waits=9, most=1 + n + (0 if most == 5 else 1)), say)
    assert own(answer).detail["waits"] == waits
    assert answer.thinking.startswith("a" if not waits else "aWait")


async def test_below_stops_extending_longer_thinking(thinker: Any) -> None:
    say = Say("<think>abc</think>def</think>g")
    answer = await ask(thinker, BudgetForcing(waits=9, below=4), say)
    assert (answer.thinking, answer.text) == ("abcWaitdef", "g")


async def test_draws_are_those_without_it_where_no_tag_is_drawn(thinker: Any) -> None:
    """With waits left and a temperature, looking ahead changes no draw."""
    sampling = Sampling(max_tokens=40, temperature=1.3, top_p=0.95, seed=3)
    plain = await thinker.generate(Call(ASK, Account("p"), prefix="<think>\n", sampling=sampling))
    forced = await ask(thinker, BudgetForcing(waits=3, keep=0, begin="prefix"), sampling=sampling)
    assert forced.tokens == plain.tokens and not own(forced).fired


async def test_the_answer_keeps_its_room(thinker: Any) -> None:
    answer = await ask(thinker, BudgetForcing(keep=20), Say("<think>" + "x" * 100), max_tokens=60)
    closing = len(thinker.codec.encode("\n</think>\n\nFinal Answer:"))
    assert answer.finish == "length" and answer.spend.output == 60
    assert answer.thinking.strip() == "x" * (60 - 20 - closing - 1)  # the opening tag is a token too
    assert "what was left is the answer's" in own(answer).reason


async def test_no_thinking_at_all_and_none_allowed(thinker: Any) -> None:
    answer = await ask(thinker, BudgetForcing(), Say("plain"))
    assert answer.text == "plain" and not own(answer).fired and "did not think" in own(answer).reason
    answer = await ask(thinker, BudgetForcing(most=0), Say(" 4"))
    assert answer.thinking == "" and answer.text == " 4" and own(answer).fired
    assert own(answer).after == 0 == answer.spend.reasoning


async def test_a_model_without_tags_is_an_error_that_names_the_knobs(thinker_parts: Any) -> None:
    from transformers import AutoTokenizer

    from thrifty.engines.local.engine import LocalEngine

    runner, tokenizer = thinker_parts
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    engine = LocalEngine(runner, plain, "tagless")
    try:
        with pytest.raises(PlanError, match="opening and closing") as refused:
            await ask(engine, BudgetForcing())
        assert "tagless" in str(refused.value)
        skipped = await ask(engine, BudgetForcing(unknown="skip"), max_tokens=4)
        assert not own(skipped).fired and "does not think" in own(skipped).reason
        forced = await ask(engine, BudgetForcing(unknown="force", begin="prefix", most=3), max_tokens=60)
        assert own(forced).fired
        waits = await ask(engine, BudgetForcing(unknown="force", begin="prefix", most=9, waits=1), max_tokens=60)
        assert "not one token" in own(waits).reason
    finally:
        await engine.aclose()


async def test_it_works_below_a_search_that_opens_branches() -> None:
    from thrifty.methods.search.first_finish_search import FirstFinishSearch

    engine = ScriptedEngine(Reply("42", thinking="hm " * 30))
    plan = Plan("t", (FirstFinishSearch(samples=2), BudgetForcing(most=5, cue="")))
    answer = await plan.build(engine).ask("Why?")
    assert len(answer.thinking.split()) == 5 and answer.text == "42"
    assert own(answer).fired


# -- by calls, on a server that continues ---------------------------------------------------------------------

MARK = "</think>"


def trace(call: Call, draw: Draw) -> Reply:
    """A model that thinks ten words after the opening tag and five after each Wait, then closes and says how many
    words it thought. As a server without a thinking mode, it writes its tags into the text."""
    written = call.prefix or ""
    rest = ""
    if "<think>" not in written:
        rest += "<think>"
    if MARK not in written:
        thought = (written + rest).partition("<think>")[2]
        last = thought.rpartition("Wait")[2]
        goal = 5 if "Wait" in thought else 10
        rest += " hm" * max(0, goal - last.count("hm")) + MARK
    if "words" not in written:
        rest += f" {(written + rest).count('hm')} words"
    return Reply(written + rest)


class Raw(ScriptedEngine):
    """Leaves tags in the text, and stops at any stop string: a server without a thinking mode."""

    async def generate(self, call: Call) -> Answer:
        said = self.reply(call, Draw(0, 0)).text.removeprefix(call.prefix or "")
        found = [said.find(s) for s in call.sampling.stop if s in said]
        words = self.words.split(said[: min(found)] if found else said)
        limit = call.sampling.max_tokens
        inner = ScriptedEngine(_masked("".join(words[:limit])), capabilities=BLACK)
        inner.name = self.name
        self.calls.append(call)
        answer = await inner.generate(replace(call, prefix=_masked(call.prefix or "")))
        cut = limit is not None and len(words) > limit and answer.finish == "stop"
        text = answer.text.replace("<T>", "<think>").replace("<C>", MARK)
        return replace(answer, text=text, finish="length" if cut else answer.finish)


def _masked(text: str) -> str:
    return text.replace("<think>", "<T>").replace(MARK, "<C>")


@pytest.fixture(params=["raw", "split"])
def server(request: pytest.FixtureRequest) -> ScriptedEngine:
    """Servers with and without a thinking mode of their own."""
    kind = Raw if request.param == "raw" else ScriptedEngine
    return kind(trace, capabilities=BLACK)


@pytest.mark.parametrize("begin", ["model", "prefix"])
async def test_by_calls_thinking_is_cut_and_answered(server: ScriptedEngine, begin: str) -> None:
    answer = await ask(server, BudgetForcing(most=4, begin=begin, cue="So:"))
    # the scripted tokenizer makes "<think> hm" a word of its own after the tag
    assert 3 <= answer.thinking.split().count("hm") <= 4
    assert answer.text.startswith("So:") and answer.text.endswith("words")
    assert own(answer).fired and "cut" in own(answer).reason and len(server.calls) == 2
    assert own(answer).after <= 4 + (begin == "model")  # where the model writes the tag it may be counted as thought


@pytest.mark.parametrize("waits", [0, 1, 3])
async def test_by_calls_it_waits_as_often_as_asked(server: ScriptedEngine, waits: int) -> None:
    answer = await ask(server, BudgetForcing(waits=waits, begin="prefix", variant="m1"))
    assert answer.thinking.count("Wait") == waits
    assert answer.thinking.count("hm") == 10 + 5 * waits
    assert answer.text.strip() == f"{10 + 5 * waits} words"
    assert own(answer).fired == (waits > 0)
    assert answer.finish == "stop"


async def test_by_calls_the_bill_is_the_sum_of_the_calls(server: ScriptedEngine) -> None:
    seen: list[Any] = []

    async def emit(delta: Any) -> None:
        seen.append(delta)

    account = Account("t")
    call = Call(ASK, account, sampling=Sampling(max_tokens=100), emit=emit)
    answer = await Plan("t", (BudgetForcing(most=4, begin="prefix"),)).build(server)(call)
    assert answer.spend == account.settled and answer.spend.calls == 2
    assert "".join(d.text for d in seen) == answer.text and seen[-1].answer == answer


async def test_by_calls_a_model_that_does_not_think_is_left_alone() -> None:
    engine = ScriptedEngine("It is four because it is.", capabilities=BLACK)
    answer = await ask(engine, BudgetForcing(most=3))
    assert answer.text == "It is four because it is." and answer.finish == "stop"
    assert not own(answer).fired and "begin" in own(answer).reason


async def test_by_calls_too_small_a_budget_is_one_plain_call(server: ScriptedEngine) -> None:
    answer = await ask(server, BudgetForcing(most=9), budget=Budget(calls=1))
    assert len(server.calls) == 1 and "budget's calls" in own(answer).reason and not own(answer).fired
    answer = await ask(server, BudgetForcing(most=9, keep=8), max_tokens=5)
    assert answer.spend.output <= 5 and "max_tokens" in own(answer).reason


@settings(max_examples=120, deadline=None)
@given(
    black=st.booleans(),
    most=st.integers(0, 20),
    waits=st.integers(0, 3),
    keep=st.integers(0, 6),
    limit=st.one_of(st.none(), st.integers(0, 40)),
    output=st.one_of(st.none(), st.integers(0, 40)),
    tokens=st.one_of(st.none(), st.integers(0, 120)),
    calls=st.one_of(st.none(), st.integers(0, 3)),
    begin=st.sampled_from(["model", "prefix"]),
)
def test_no_budget_is_ever_exceeded(
    black: bool,
    most: int,
    waits: int,
    keep: int,
    limit: int | None,
    output: int | None,
    tokens: int | None,
    calls: int | None,
    begin: str,
) -> None:
    engine = ScriptedEngine(trace, capabilities=BLACK if black else PROVIDES, tranche=3)
    account = Account("t", Budget(output=output, tokens=tokens, calls=calls))
    method = BudgetForcing(most=most, waits=waits, keep=keep, begin=begin)
    pipeline = Plan("t", (method,)).build(engine)
    try:
        answer = asyncio.run(pipeline(Call(ASK, account, sampling=Sampling(max_tokens=limit))))
    except BudgetExceeded:
        answer = None
    spent = account.settled
    assert output is None or spent.output <= output
    assert tokens is None or spent.input + spent.output <= tokens
    assert calls is None or spent.calls <= calls
    assert not account.held and not account.overdraft
    if answer is not None:
        assert limit is None or answer.spend.output <= limit
        receipt = own(answer)
        assert receipt.reason
        # as a policy the closing text and the cue count as thinking, as the engine counts them: three words
        assert receipt.after is None or receipt.after <= most + 3 or "no room" in receipt.reason


def test_knobs() -> None:
    with pytest.raises(InvalidInput, match="opening"):
        BudgetForcing(opening="")
    with pytest.raises(InvalidInput, match="most"):
        BudgetForcing(most=-1)
    assert BudgetForcing(most=NO_LIMIT).settings()["most"] == NO_LIMIT


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_flips_sum_to_the_change(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    gained, lost = flips(before, after)
    assert gained - lost == sum(after) - sum(before) and gained + lost == sum(a != b for a, b in pairs)
