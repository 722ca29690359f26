"""The scripted engine: exact counts, every limit, streams, branches, policies, races, failures."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, Draft, EngineError, InvalidInput, Sampling, Unsupported
from thrifty.call import Branch, Delta, Receipt
from thrifty.engine import Engine
from thrifty.engines.scripted import IMAGE_TOKENS, Draw, Reply, ScriptedEngine, Words
from thrifty.ledger.entry import Entry, Labels
from thrifty.policy import CONTINUE, CachePolicy, Continue, DecodePolicy, Force, Probe, Stop, Verdict
from thrifty.spend import Spend


class Book:
    """A ledger that remembers."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def append(self, entry: Entry, hold: str | None = None) -> Any:
        self.entries.append(entry)
        return self

    def wait(self) -> None: ...

    async def done(self) -> None: ...

    def open_hold(self, record: Any) -> str:
        raise AssertionError("engines on this machine hold in memory")

    def drop_hold(self, hold: str) -> None: ...


def ask(text: str = "say it", budget: Budget | None = None, book: Book | None = None, **fields: Any) -> Call:
    return Call(({"role": "user", "content": text},), Account("t", budget or Budget(), ledger=book), **fields)


class EveryToken(DecodePolicy):
    """Says `verdict` after the nth token, once."""

    def __init__(self, n: int, verdict: Verdict, method: str = "p") -> None:
        self.n, self.verdict, self.method = n, verdict, method

    def after(self, branch: Branch, token: int) -> Verdict:
        if len(branch.tokens) == self.n:
            self.n = -1
            return self.verdict
        return CONTINUE


def test_it_is_an_engine() -> None:
    assert isinstance(ScriptedEngine("x"), Engine)


@given(st.text())
def test_words_are_reversible(text: str) -> None:
    words = Words()
    assert words.decode(words.encode(text)) == text


async def test_a_whole_answer_is_billed_exactly() -> None:
    book = Book()
    call = ask("one two three", book=book, tools=({"a": 1},))
    answer = await ScriptedEngine("four five  six\n").generate(call)
    assert answer.text == "four five  six\n"
    assert answer.finish == "stop"
    assert answer.spend == Spend(input=5, output=4, calls=1)
    assert [e.spend for e in book.entries] == [answer.spend]
    assert book.entries[0].labels.engine == "scripted"
    assert call.account.settled == answer.spend and call.account.held == {}


async def test_count_is_what_is_billed() -> None:
    engine = ScriptedEngine("ok")
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    call = replace(
        ask("where is it?"),
        messages=({"role": "user", "content": [{"type": "text", "text": "look here"}, image]},),
        context=("a b", "c d"),
        prefix="It is",
    )
    answer = await engine.generate(call)
    assert answer.spend.input == engine.count(call) == 2 + 4 + 2 + IMAGE_TOKENS
    assert answer.spend.visual == IMAGE_TOKENS


async def test_scripts_of_every_kind() -> None:
    async def said(script: Any, *questions: str) -> list[str]:
        engine = ScriptedEngine(script)
        return [(await engine.generate(ask(q))).text for q in questions]

    assert await said({"red": "1", "blue": "2", "": "3"}, "a blue one", "a red one", "none") == ["2", "1", "3"]
    assert await said(["x", Reply("y")], "q", "q") == ["x", "y"]
    assert await said(lambda call, draw: f"{call.question()}{draw.index}", "q", "q", "r") == ["q0", "q1", "r0"]
    with pytest.raises(EngineError, match="used up"):
        await said(["x"], "q", "q")
    with pytest.raises(EngineError, match="no reply"):
        await said({"red": "1"}, "blue")


async def test_a_seed_gives_the_same_draw_again() -> None:
    def script(call: Call, draw: Draw) -> str:
        return str(draw.random())

    engine = ScriptedEngine(script)
    seeded = [(await engine.generate(ask(sampling=Sampling(seed=s)))).text for s in (1, 1, 2)]
    engine = ScriptedEngine(script)
    free = [(await engine.generate(ask())).text for _ in range(2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert free[0] != free[1]
    assert [(await ScriptedEngine(script).generate(ask())).text] == free[:1]


async def test_max_tokens_and_stop_strings() -> None:
    engine = ScriptedEngine("a b c d e f")
    short = await engine.generate(ask(sampling=Sampling(max_tokens=3)))
    assert (short.text, short.finish, short.spend.output) == ("a b c", "length", 3)
    stopped = await engine.generate(ask(sampling=Sampling(stop=("d e", "zz"))))
    assert (stopped.text, stopped.finish, stopped.spend.output) == ("a b c ", "stop", 5)
    exact = await engine.generate(ask(sampling=Sampling(max_tokens=6)))
    assert (exact.finish, exact.spend.output) == ("stop", 6)
    nothing = await engine.generate(ask(sampling=Sampling(max_tokens=0)))
    assert (nothing.text, nothing.finish, nothing.spend.output) == ("", "length", 0)


async def test_a_prefix_is_input_and_not_repeated() -> None:
    answer = await ScriptedEngine("The number is 42.").generate(ask(prefix="The number is"))
    assert answer.text == " 42."
    assert answer.spend == Spend(input=2 + 3, output=1, calls=1)


async def test_a_draft_runs_to_its_separator_then_the_prefix_is_forced() -> None:
    engine = ScriptedEngine("20 - 12 = 8 #### 8 apples")
    answer = await engine.generate(ask(prefix="Answer:", draft=Draft()))
    assert answer.text == "20 - 12 = 8 #### Answer: 8 apples"
    assert answer.parsed == "Answer: 8 apples"
    assert answer.spend == Spend(input=2, output=9, calls=1)


async def test_a_draft_is_cut_and_the_separator_forced() -> None:
    engine = ScriptedEngine("20 - 12 = 8 #### 8 apples")
    answer = await engine.generate(ask(prefix="Answer:", draft=Draft(max_tokens=2)))
    assert answer.text == "20 -\n#### Answer: 8 apples"
    assert answer.parsed == "Answer: 8 apples"
    assert answer.spend.output == 6
    assert answer.raw["draft"] == {"tokens": 2, "cut": True}


async def test_a_draft_without_a_separator_still_gets_its_prefix() -> None:
    answer = await ScriptedEngine("no idea").generate(ask(prefix="Answer:", draft=Draft()))
    assert answer.text == "no idea\n#### Answer:"
    plain = await ScriptedEngine("no idea").generate(ask(draft=Draft()))
    assert (plain.text, plain.parsed, plain.final) == ("no idea", None, "no idea")


async def test_stop_strings_wait_until_the_draft_is_over() -> None:
    engine = ScriptedEngine("a;\nb #### c;\nd")
    answer = await engine.generate(ask(draft=Draft(), sampling=Sampling(stop=("\n",))))
    assert (answer.text, answer.parsed) == ("a;\nb #### c;", "c;")


async def test_a_draft_leaves_room_for_the_answer() -> None:
    engine = ScriptedEngine("w " * 50 + "#### yes")
    answer = await engine.generate(ask(prefix="It is", draft=Draft(), sampling=Sampling(max_tokens=24)))
    assert answer.parsed == "It is yes"
    assert answer.spend.output <= 24


async def test_thinking_is_split_and_counted_as_reasoning() -> None:
    answer = await ScriptedEngine(Reply("it is 4", thinking="two and two")).generate(ask())
    assert (answer.thinking, answer.text) == ("two and two", "it is 4")
    assert (answer.spend.output, answer.spend.reasoning) == (6, 3)
    tagged = await ScriptedEngine("<think>two and two</think>\n\nit is 4").generate(ask())
    assert (tagged.thinking, tagged.text) == ("two and two", "it is 4")
    assert tagged.spend.output == 6


async def test_a_stream_is_the_whole_answer() -> None:
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    script = Reply("a sto stop b", thinking="hm hm")
    answer = await ScriptedEngine(script).generate(ask(emit=emit, sampling=Sampling(stop=("stop b",), logprobs=True)))
    assert "".join(d.text for d in deltas) == answer.text == "a sto "
    assert "".join(d.thinking for d in deltas) == answer.thinking == "hm hm"
    assert [d.answer is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].finish == answer.finish == "stop"
    assert tuple(x for d in deltas for x in d.logprobs) == answer.logprobs
    assert len(deltas) > 3


@pytest.mark.parametrize(
    "budget", [Budget(output=0), Budget(tokens=2), Budget(input=1), Budget(calls=0), Budget(tokens=0)]
)
async def test_a_budget_too_small_for_one_token_is_refused(budget: Budget) -> None:
    call = ask(budget=budget)
    with pytest.raises(BudgetExceeded):
        await ScriptedEngine("a b c").generate(call)
    assert call.account.settled == Spend() and call.account.held == {}


async def test_a_small_budget_cuts_the_answer_and_says_so() -> None:
    call = ask(budget=Budget(tokens=5))
    answer = await ScriptedEngine("a b c d e f").generate(call)
    assert (answer.text, answer.finish) == ("a b c", "budget")
    assert answer.receipts == (
        Receipt("budget", True, "the budget's tokens ran out: the answer was cut short", None, 3,
                detail={"resource": "tokens", "limit": 5, "account": "t"}),
    )  # fmt: skip
    assert call.account.settled.tokens == 5 and call.account.overdraft == {}


async def test_refuse_holds_the_whole_call_first() -> None:
    call = ask(budget=Budget(output=5), on_exceed="refuse", sampling=Sampling(max_tokens=6))
    with pytest.raises(BudgetExceeded):
        await ScriptedEngine("a").generate(call)
    fits = ask(budget=Budget(output=6), on_exceed="refuse", sampling=Sampling(max_tokens=6))
    assert (await ScriptedEngine("a").generate(fits)).text == "a"


async def test_keep_leaves_tokens_free() -> None:
    call = ask(budget=Budget(output=10), keep=4)
    answer = await ScriptedEngine("a " * 20).generate(call)
    assert answer.spend.output == 6 and answer.finish == "budget"


async def test_a_reasoning_limit_is_kept() -> None:
    call = ask(budget=Budget(reasoning=2))
    answer = await ScriptedEngine(Reply("x", thinking="a b c d")).generate(call)
    assert answer.finish == "budget" and answer.spend.reasoning == 2
    assert call.account.overdraft == {}
    free = ask(budget=Budget(reasoning=0))
    assert (await ScriptedEngine("a b").generate(free)).finish == "stop"


async def test_tool_calls_are_counted_and_limited() -> None:
    reply = Reply("", tool_calls=({"name": "f"}, {"name": "g"}), finish="tool_calls")
    answer = await ScriptedEngine(reply).generate(ask())
    assert (answer.finish, len(answer.tool_calls), answer.spend.tool_calls) == ("tool_calls", 2, 2)
    poor = ask(budget=Budget(tool_calls=1))
    cut = await ScriptedEngine(reply).generate(poor)
    assert (cut.finish, cut.tool_calls, poor.account.overdraft) == ("budget", (), {})


@dataclass
class Table:
    label: str = "table 1"

    def with_price(self, spend: Spend, model: str, role: str) -> Spend:
        return replace(spend, usd=2 * spend.input + 10 * spend.output)


async def test_prices_are_held_and_settled() -> None:
    book = Book()
    call = ask(budget=Budget(usd=2 * 2 + 10 * 3), book=book)
    answer = await ScriptedEngine("a b c d", prices=Table()).generate(call)
    assert (answer.spend.usd, answer.finish) == (34, "budget")
    assert book.entries[0].labels.prices == "table 1"
    assert call.account.overdraft == {}


async def test_cancelling_settles_what_was_produced_once() -> None:
    book = Book()
    call = ask(book=book)
    task = asyncio.create_task(ScriptedEngine("a " * 1000, delay=0.001).generate(call))
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(book.entries) == 1
    assert 0 < book.entries[0].spend.output < 1000
    assert call.account.settled == book.entries[0].spend and call.account.held == {}


async def test_a_failure_settles_and_carries_its_spend() -> None:
    call = ask()
    with pytest.raises(EngineError, match="after 3 tokens") as caught:
        await ScriptedEngine("a b c d e", fail_after=3).generate(call)
    assert caught.value.spend == Spend(input=2, output=3, calls=1) == call.account.settled
    assert call.account.held == {}


async def test_a_fork_has_the_past_and_bills_it_as_cached() -> None:
    engine = ScriptedEngine("a b c d")
    branch = await engine.open(ask("p q r"))
    assert isinstance(branch, Branch)
    await branch.step()
    await branch.step()
    twin = branch.fork()
    rest = await twin.finish_up()
    assert rest.text == "a b"
    assert twin.spend == Spend(input=5, cached=5, output=0, calls=1)
    await engine.advance([branch], 10)
    answer = await branch.finish_up()
    assert (answer.text, answer.spend) == ("a b c d", Spend(input=3, output=4, calls=1))


async def test_a_fork_goes_on_as_its_parent_or_with_a_seed_on_its_own() -> None:
    engine = ScriptedEngine(lambda call, draw: f"a {draw.randrange(10**9)} z")
    branch = await engine.open(ask())
    await branch.step()
    twin, other = branch.fork(), branch.fork(seed=7)
    await engine.advance([branch, twin, other], lambda branches: False)
    texts = [(await b.finish_up()).text for b in (branch, twin, other)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[2].startswith("a ")


async def test_advance_counts_steps_and_asks() -> None:
    engine = ScriptedEngine(lambda call, draw: "x " * (3 + 5 * draw.index))
    branches = [await engine.open(ask()) for _ in range(3)]
    await engine.advance(branches, 2)
    assert [len(b.tokens) for b in branches] == [2, 2, 2]
    await engine.advance(branches, lambda bs: any(b.finish for b in bs))
    assert [b.finish for b in branches] == ["stop", None, None]
    for b in branches:
        b.close()
        b.close()


async def test_append_counts_as_output() -> None:
    branch = await ScriptedEngine("a b").open(ask())
    await branch.step()
    await branch.append(" forced words")
    await branch.step()
    assert branch.text == "a forced words b"
    assert (await branch.finish_up()).spend.output == 4


async def test_stop_and_force_and_overruling() -> None:
    engine = ScriptedEngine("a b c d")
    policies = (EveryToken(2, Force(" F"), "f"), EveryToken(2, Stop("enough"), "s"), EveryToken(3, Force(" G"), "g"))
    answer = await engine.generate(ask(policies=policies))
    assert (answer.text, answer.finish) == ("a b", "enough")
    assert [(r.method, r.fired, r.reason, r.detail["overruled_by"]) for r in answer.receipts] == [
        ("f", False, "overruled", ["s"])
    ]
    forced = await engine.generate(ask(policies=(EveryToken(4, Force(" wait"), "f"),)))
    assert (forced.text, forced.spend.output) == ("a b c d wait", 5)
    assert policies[0].n == 2, "a branch works on copies of its call's policies"


async def test_a_probe_runs_on_a_fork_under_its_methods_name() -> None:
    book = Book()
    heard: list[str] = []

    def then(text: str) -> Verdict:
        heard.append(text)
        return Stop("sure")

    engine = ScriptedEngine({"the answer is": " 7, I think", "": "a b c d"})
    probe = Probe(" so the answer is", 2, then)
    answer = await engine.generate(ask("p q", book=book, policies=(EveryToken(2, probe, "asker"),)))
    assert heard == [" 7, I"]
    assert (answer.text, answer.finish) == ("a b", "sure")
    assert answer.spend == Spend(input=2, output=2, calls=1)
    aside = Spend(input=4, cached=4, output=4 + 2, calls=1)
    assert [(e.labels.method, e.spend) for e in book.entries] == [("asker", aside), ("", answer.spend)]
    assert [(r.method, r.fired, r.spend) for r in answer.receipts] == [("asker", True, aside)]


async def test_a_probe_that_the_budget_refuses_is_reported() -> None:
    engine = ScriptedEngine("a b c d", tranche=2)
    probe = Probe(" is it", 8, lambda text: Stop("never"))
    call = ask("p q", budget=Budget(input=3), policies=(EveryToken(2, probe, "asker"),))
    answer = await engine.generate(call)
    assert (answer.text, answer.finish) == ("a b c d", "stop")
    assert [(r.method, r.fired) for r in answer.receipts] == [("asker", False)]


async def test_what_it_cannot_do_is_refused() -> None:
    class Ban(DecodePolicy):
        def logits(self, branch: Branch, logits: Any) -> Any:
            return logits

    for policy in (Ban(), CachePolicy()):
        with pytest.raises(Unsupported, match="local"):
            await ScriptedEngine("x").generate(ask(policies=(policy,)))
    with pytest.raises(Unsupported):
        await ScriptedEngine("x", capabilities={"text"}).open(ask())
    with pytest.raises(InvalidInput, match="did you mean 'branch'"):
        ScriptedEngine("x", capabilities={"brnch"})
    with pytest.raises(InvalidInput, match="temperature"):
        await ScriptedEngine("x").generate(ask(sampling=Sampling(temperature=float("nan"))))
    with pytest.raises(InvalidInput, match="empty prompt"):
        await ScriptedEngine("x").generate(replace(ask(), messages=()))
    assert isinstance(CONTINUE, Continue)


async def test_embeddings_are_unit_vectors_of_shared_words() -> None:
    account = Account("t")
    texts = ["red apples", "Red apples!", "slow trains"]
    found = await ScriptedEngine("x").embed(texts, account, Labels(role="embedder"))
    similarity = found.vectors @ found.vectors.T
    assert similarity.diagonal() == pytest.approx([1, 1, 1])
    assert similarity[0, 1] == pytest.approx(1) and similarity[0, 2] < 0.5
    assert found.spend == Spend(input=6, calls=1) == account.settled


async def test_races_end_when_they_are_won() -> None:
    engine = ScriptedEngine(lambda call, draw: " w" * (5 if draw.index == 3 else 500), delay=0.001)
    call = ask()
    tasks = [asyncio.create_task(engine.generate(call)) for _ in range(6)]
    done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    assert [t.result().spend.output for t in done] == [5]
    assert call.account.held == {} and call.account.settled.output < 6 * 100
    assert call.account.settled.calls == 6
