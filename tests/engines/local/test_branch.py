"""Branches: forks against unforked runs, forced text, every verdict of a policy, policies of every kind, memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, EngineError, InvalidInput, Sampling, advance
from thrifty.call import Branch, Receipt
from thrifty.engines.local.engine import LocalEngine
from thrifty.ledger.entry import Entry
from thrifty.policy import (
    CONTINUE,
    AttentionPolicy,
    CachePolicy,
    DecodePolicy,
    Feed,
    Force,
    LayerView,
    Probe,
    Stop,
    Verdict,
)
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
        raise AssertionError("local engines hold in memory")

    def drop_hold(self, hold: str) -> None: ...


def ask(text: str = "tell me", *policies: Any, budget: Budget | None = None, book: Any = None, **sampling: Any) -> Call:
    sampling.setdefault("max_tokens", 24)
    account = Account("t", budget or Budget(), ledger=book)
    return Call(({"role": "user", "content": text},), account, sampling=Sampling(**sampling), policies=policies)


class Once(DecodePolicy):
    """Gives `verdict` after the nth token, once."""

    def __init__(self, n: int, verdict: Any, method: str = "once") -> None:
        self.n, self.verdict, self.method = n, verdict, method

    def after(self, branch: Branch, token: int) -> Verdict:
        if len(branch.tokens) == self.n:
            self.n = -1
            return self.verdict
        return CONTINUE


class Ban(DecodePolicy):
    """Forbids tokens, and counts how often it had to."""

    def __init__(self, *banned: int) -> None:
        self.banned, self.method, self.times = list(banned), "ban", 0

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.times += int(logits.argmax()) in self.banned
        logits[self.banned] = -torch.inf
        return logits

    def receipt(self, branch: Branch) -> Receipt:
        return Receipt("ban", self.times > 0, f"{self.times} times", len(branch.tokens), len(branch.tokens))


def stock_logits(stock: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return stock(torch.tensor([list(ids)])).logits[0, -1]


# -- forks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize("text", ["short", "long " * 40])
async def test_a_fork_goes_on_as_its_parent_would_have(
    tiny_engine: LocalEngine, temperature: float | None, text: str
) -> None:
    call = ask(text, temperature=temperature, seed=11)
    whole = await tiny_engine.generate(call)
    for at in (0, 1, 7):
        branch = await tiny_engine.open(call)
        await tiny_engine.advance([branch], at)
        twin = branch.fork()
        answers = []
        for one in (twin, branch):
            await tiny_engine.advance([one], 1000)
            answers.append(await one.finish_up())
        assert [a.tokens for a in answers] == [whole.tokens] * 2
        assert [a.finish for a in answers] == [whole.finish] * 2


async def test_a_fork_with_a_seed_goes_its_own_way_and_leaves_its_parent_alone(tiny_engine: LocalEngine) -> None:
    call = ask("sampled", temperature=2.0, seed=5)
    alone = await tiny_engine.generate(call)
    branch = await tiny_engine.open(call)
    await branch.step()
    forks = [branch.fork(seed) for seed in (1, 2, 3)]
    for fork in forks:
        await tiny_engine.advance([fork], 10)
        await fork.append("!")
        fork.close()
    await tiny_engine.advance([branch], 100)
    assert (await branch.finish_up()).tokens == alone.tokens
    assert len({tuple(f.tokens) for f in forks}) == 3
    assert all(f.tokens[0] == branch.tokens[0] for f in forks)


async def test_eight_forks_of_a_prompt_bill_it_as_the_contract_says(tiny_engine: LocalEngine) -> None:
    book = Book()
    call = ask("a prompt to be shared " * 8, book=book, temperature=1.0)
    branch = await tiny_engine.open(call)
    n = branch.spend.input
    branches = [branch, *(branch.fork(seed) for seed in range(7))]
    await advance(branches, 4)
    for one in branches:
        one.close()
    settled = call.account.settled
    assert settled == Spend(input=8 * n, cached=7 * n, output=32, calls=8)
    assert call.account.work.prefill == n
    assert sum(e.spend.input for e in book.entries) == 8 * n and len(book.entries) == 8
    assert call.account.held == {}


async def test_a_fork_outlives_the_branches_before_it(tiny_engine: LocalEngine, stock: Any) -> None:
    first = await tiny_engine.open(ask("x"))
    prompt = tiny_engine.prompter(first.call).tokens
    second = first.fork()
    third = second.fork()
    second.close()
    first.close()
    assert await third.step() == int(stock_logits(stock, prompt).argmax())
    assert await third.step() == int(stock_logits(stock, [*prompt, *third.tokens[:1]]).argmax())
    third.close()


async def test_a_later_fork_is_billed_for_all_that_it_shares(tiny_engine: LocalEngine) -> None:
    branch = await tiny_engine.open(ask("x"))
    n = branch.spend.input
    await tiny_engine.advance([branch], 5)
    twin = branch.fork()
    await tiny_engine.advance([twin], 3)
    assert twin.spend == Spend(input=n + 5, cached=n + 5, output=3, calls=1)
    assert branch.spend == Spend(input=n, output=5, calls=1)
    twin.close()
    twin.close()
    branch.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(st.tuples(st.sampled_from(["step", "fork", "append", "close"]), st.integers(0, 9)), max_size=14))
async def test_any_history_equals_a_fresh_reading_of_its_tokens(tiny_parts: Any, stock: Any, script: Any) -> None:
    """Whatever was stepped, forked and forced: the next greedy token is what stock says of prompt + tokens."""
    engine = LocalEngine(*tiny_parts, "tiny")
    call = ask("history", max_tokens=None, budget=Budget(output=4000))
    prompt = engine.prompter(call).tokens
    branches = [await engine.open(call)]
    for act, which in script:
        live = [b for b in branches if b.finish is None]
        if not live:
            break
        branch = live[which % len(live)]
        if act == "step":
            await branch.step()
        elif act == "fork" and len(branches) < 6:
            branches.append(branch.fork())
        elif act == "append":
            await branch.append("word" * (which % 4))
        elif act == "close" and len(live) > 1:
            branch.close()
    for branch in [b for b in branches if b.finish is None]:
        past = prompt + branch.tokens
        expected = stock_logits(stock, past).log_softmax(-1)
        token = await branch.step()
        assert token is not None
        assert float(expected[token]) == pytest.approx(float(expected.max()), abs=1e-3), "up to a tie"
        assert branch.logprobs[-1] == pytest.approx(float(expected.max()), abs=1e-3)
    for branch in branches:
        branch.close()
    assert call.account.held == {}
    await engine.aclose()


async def test_branches_of_different_lengths_advance_in_one_batch_as_alone(tiny_engine: LocalEngine) -> None:
    calls = [ask("q" * n, temperature=1.0, seed=n) for n in (1, 30, 90, 140, 260)]
    alone = [(await tiny_engine.generate(c)).tokens for c in calls]
    branches = [await tiny_engine.open(c) for c in calls]
    steps = tiny_engine.scheduler.steps
    await advance(branches, 10)
    assert [len(b.tokens) for b in branches] == [10] * 5
    assert tiny_engine.scheduler.steps - steps <= 12, "they share their steps"
    await advance(branches, lambda bs: all(b.finish for b in bs))
    assert [(await b.finish_up()).tokens for b in branches] == alone


async def test_until_is_asked_after_each_step(tiny_engine: LocalEngine) -> None:
    branches = [await tiny_engine.open(ask(t)) for t in "ab"]
    asked: list[int] = []

    def until(bs: Sequence[Branch]) -> bool:
        asked.append(len(bs[0].tokens))
        return len(asked) == 4

    await advance(branches, until)
    assert asked == [1, 2, 3, 4]
    for b in branches:
        b.close()


async def test_append_is_output_and_is_read(tiny_engine: LocalEngine, stock: Any) -> None:
    branch = await tiny_engine.open(ask("x"))
    first = await branch.step()
    await branch.append("so the answer is")
    forced = tiny_engine.codec.encode("so the answer is")
    token = await branch.step()
    prompt = tiny_engine.prompter(branch.call).tokens
    assert token == int(stock_logits(stock, [*prompt, first, *forced]).argmax())
    assert branch.spend.output == 2 + len(forced)
    answer = await branch.finish_up()
    assert "so the answer is" in answer.text


# -- decode policies -----------------------------------------------------------------------------------------------


async def test_a_banned_token_never_comes_and_the_next_best_does(tiny_engine: LocalEngine, stock: Any) -> None:
    free = await tiny_engine.generate(ask("ban"))
    banned = (free.tokens or ())[0]
    answer = await tiny_engine.generate(ask("ban", Ban(banned, 0)))
    prompt = tiny_engine.prompter(ask("ban")).tokens
    ids: list[int] = []
    for _ in range(24):
        logits = stock_logits(stock, prompt + ids)
        logits[[banned, 0]] = -torch.inf
        ids.append(int(logits.argmax()))
    assert list(answer.tokens or ()) == ids
    assert [(r.method, r.fired) for r in answer.receipts] == [("ban", True)]


async def test_logits_policies_run_in_plan_order(tiny_engine: LocalEngine) -> None:
    class Write(DecodePolicy):
        def __init__(self, token: int) -> None:
            self.token = token

        def logits(self, branch: Branch, logits: Any) -> Any:
            return torch.nn.functional.one_hot(torch.tensor(self.token), len(logits)).float()

    answer = await tiny_engine.generate(ask("order", Write(40), Write(41), max_tokens=3))
    assert answer.tokens == (41, 41, 41)


async def test_stop_wins_over_force_and_force_over_the_rest(tiny_engine: LocalEngine) -> None:
    force, stop, probe = Once(3, Force("F"), "f"), Once(3, Stop("enough"), "s"), Once(3, Probe("?", 1, Stop), "p")
    answer = await tiny_engine.generate(ask("v", force, stop, probe))
    assert (answer.finish, answer.spend.output) == ("enough", 3)
    overruled = {r.method: r for r in answer.receipts}
    assert set(overruled) == {"f", "p"}
    assert all(r.reason == "overruled" and r.detail["overruled_by"] == ["s"] for r in overruled.values())


async def test_forced_text_is_read_before_the_next_token(tiny_engine: LocalEngine, stock: Any) -> None:
    answer = await tiny_engine.generate(ask("v", Once(2, Force("Wait, "))))
    tokens = list(answer.tokens or ())
    forced = tiny_engine.codec.encode("Wait, ")
    assert tokens[2 : 2 + len(forced)] == forced
    prompt = tiny_engine.prompter(ask("v")).tokens
    at = 2 + len(forced)
    assert tokens[at] == int(stock_logits(stock, prompt + tokens[:at]).argmax())
    assert len(tokens) == 24


async def test_forcing_takes_back_an_end_of_the_models_choosing(tiny_engine: LocalEngine, stock: Any) -> None:
    class EndNow(DecodePolicy):
        method = "end"

        def __init__(self) -> None:
            self.waits = 0

        def logits(self, branch: Branch, logits: Any) -> Any:
            if len(branch.tokens) == 2:
                logits[0] = 1e9
            return logits

        def after(self, branch: Branch, token: int) -> Verdict:
            if token == 0 and not self.waits:
                self.waits += 1
                return Force("Wait")
            return CONTINUE

    answer = await tiny_engine.generate(ask("v", EndNow()))
    tokens = list(answer.tokens or ())
    forced = tiny_engine.codec.encode("Wait")
    assert tokens[2:][: 1 + len(forced)] == [0, *forced]
    prompt = tiny_engine.prompter(ask("v")).tokens
    # the end token was drawn and billed, but never read
    assert tokens[3 + len(forced)] == int(stock_logits(stock, prompt + tokens[:2] + forced).argmax())
    assert answer.finish in ("length", "stop") and answer.spend.output == len(tokens)


async def test_fed_mixtures_are_embedded(tiny_engine: LocalEngine, stock: Any) -> None:
    weights = torch.zeros(320)
    weights[[30, 31]] = torch.tensor([0.25, 0.75])
    answer = await tiny_engine.generate(ask("v", Once(1, Feed(weights)), max_tokens=2))
    prompt = tiny_engine.prompter(ask("v")).tokens
    table = stock.get_input_embeddings().weight
    embeds = torch.cat([table[prompt], (weights @ table)[None]])[None]
    with torch.no_grad():
        expected = int(stock(inputs_embeds=embeds).logits[0, -1].argmax())
    assert (answer.tokens or ())[1] == expected
    one_hot = torch.nn.functional.one_hot(torch.tensor((answer.tokens or ())[0]), 320).float()
    plain = await tiny_engine.generate(ask("v", max_tokens=8))
    same = await tiny_engine.generate(ask("v", Once(1, Feed(one_hot)), max_tokens=8))
    assert same.tokens == plain.tokens
    with pytest.raises(EngineError, match="320 finite weights"):
        await tiny_engine.generate(ask("v", Once(1, Feed(torch.ones(3)))))


async def test_a_probe_runs_first_and_changes_nothing_but_the_verdict(tiny_engine: LocalEngine, stock: Any) -> None:
    book = Book()
    heard: list[str] = []

    def then(text: str) -> Verdict:
        heard.append(text)
        return CONTINUE

    plain = await tiny_engine.generate(ask("probe me", temperature=1.0, seed=3))
    call = ask("probe me", Once(5, Probe(" so", 4, then), "asker"), book=book, temperature=1.0, seed=3)
    answer = await tiny_engine.generate(call)
    assert answer.tokens == plain.tokens
    prompt = tiny_engine.prompter(call).tokens
    ids = prompt + list(plain.tokens or ())[:5] + tiny_engine.codec.encode(" so")
    start = len(ids)
    for _ in range(4):
        ids.append(int(stock_logits(stock, ids).argmax()))
    assert heard == [tiny_engine.codec.decode(ids[start:])]
    shared = len(prompt) + 5
    cost = Spend(input=shared, cached=shared, output=4 + len(tiny_engine.codec.encode(" so")), calls=1)
    assert [(e.labels.method, e.spend) for e in book.entries] == [("asker", cost), ("", answer.spend)]
    assert [(r.method, r.fired, r.spend) for r in answer.receipts] == [("asker", True, cost)]


async def test_a_probes_verdict_counts(tiny_engine: LocalEngine) -> None:
    stopped = await tiny_engine.generate(ask("p", Once(4, Probe("?", 2, lambda text: Stop("sure")))))
    assert (stopped.finish, stopped.spend.output) == ("sure", 4)
    again = Probe("!", 1, lambda text: Force("OK"))
    forced = await tiny_engine.generate(ask("p", Once(4, Probe("?", 2, lambda text: again))))
    assert list(forced.tokens or ())[4:6] == tiny_engine.codec.encode("OK")
    assert forced.receipts[0].spend.calls == 2


async def test_a_probe_that_does_not_fit_is_reported_and_passed_over(tiny_engine: LocalEngine) -> None:
    call = ask("p", Once(4, Probe("?", 2, lambda text: Stop("never")), "asker"))
    n = tiny_engine.count(call)
    poor = replace(call, account=Account("t", Budget(input=n + 1)))
    answer = await tiny_engine.generate(poor)
    assert answer.finish in ("length", "stop") and answer.spend.output > 4
    assert [(r.method, r.fired, r.reason) for r in answer.receipts] == [
        ("asker", False, "probe refused: input ran out")
    ]


async def test_hidden_states_are_given_where_they_are_needed(tiny_engine: LocalEngine, stock: Any) -> None:
    seen: list[torch.Tensor] = []

    class Look(DecodePolicy):
        needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

        def after(self, branch: Any, token: int) -> Verdict:
            seen.append(branch.hidden)
            return CONTINUE

    answer = await tiny_engine.generate(ask("h", Look(), max_tokens=3))
    prompt = tiny_engine.prompter(ask("h")).tokens
    for i, states in enumerate(seen):
        ids = torch.tensor([prompt + list(answer.tokens or ())[:i]])
        with torch.no_grad():
            expected = torch.stack([h[0, -1] for h in stock(ids, output_hidden_states=True).hidden_states])
        assert states.shape == expected.shape
        assert torch.allclose(states, expected, atol=1e-4)


async def test_a_policy_that_fails_ends_its_own_row_only(tiny_engine: LocalEngine) -> None:
    class Bad(DecodePolicy):
        def after(self, branch: Branch, token: int) -> Verdict:
            raise ZeroDivisionError("oops")

    class Empty(DecodePolicy):
        method = "empty"

        def logits(self, branch: Branch, logits: Any) -> Any:
            return torch.full_like(logits, -torch.inf)

    good, bad, empty = ask("good"), ask("bad", Bad()), ask("empty", Empty())
    results = await asyncio.gather(*map(tiny_engine.generate, (good, bad, empty)), return_exceptions=True)
    assert not isinstance(results[0], BaseException)
    assert isinstance(results[1], EngineError) and "ZeroDivisionError: oops" in str(results[1])
    assert isinstance(results[1].__cause__, ZeroDivisionError)
    assert isinstance(results[2], EngineError) and "left no token" in str(results[2])
    assert bad.account.held == {} and bad.account.settled.output == 1


async def test_policies_are_copied_for_each_branch(tiny_engine: LocalEngine) -> None:
    class Count(DecodePolicy):
        method = "count"

        def __init__(self) -> None:
            self.seen: list[int] = []

        def after(self, branch: Branch, token: int) -> Verdict:
            self.seen.append(token)
            return CONTINUE

        def receipt(self, branch: Branch) -> Receipt:
            return Receipt("count", True, "", len(self.seen), len(self.seen))

    policy = Count()
    branch = await tiny_engine.open(ask("c", policy))
    await branch.step()
    twin = branch.fork()
    await twin.step()
    await twin.step()
    counts = [(await b.finish_up()).receipts[0].after for b in (branch, twin)]
    assert counts == [1, 3] and policy.seen == []


# -- cache and attention policies --------------------------------------------------------------------------------------


class LastN(CachePolicy):
    """Keeps the last n entries of the prompt."""

    parts = frozenset({"scores", "counts"})
    method = "last-n"

    def __init__(self, n: int) -> None:
        self.n = n

    def scores(self, view: LayerView) -> Any:
        return view.positions[:, None].expand(-1, view.keys.shape[1], -1).float()

    def counts(self, total: int, layers: int, stats: Any) -> Sequence[int]:
        return [min(self.n, total)] * layers

    def receipt(self, branch: Any) -> Receipt:
        return Receipt("last-n", branch.evicted > 0, "", unit="entries", after=branch.store.kept())


async def test_keep_the_last_entries(tiny_engine: LocalEngine) -> None:
    text = "long prompt " * 20
    plain = await tiny_engine.generate(ask(text))
    same = await tiny_engine.generate(ask(text, LastN(10_000)))
    assert same.tokens == plain.tokens
    answer = await tiny_engine.generate(ask(text, LastN(40)))
    assert answer.tokens != plain.tokens
    assert answer.receipts[0].fired and answer.receipts[0].after == 40 + answer.spend.output - 1
    assert answer.work.kv_reads < plain.work.kv_reads
    assert answer.work.kv_bytes_mean < plain.work.kv_bytes_mean


async def test_skip_a_layer(tiny_engine: LocalEngine, stock: Any) -> None:
    class Skip(AttentionPolicy):
        def skip(self, layer: int, layers: int) -> bool:
            return layer == 1

    answer = await tiny_engine.generate(ask("skip", Skip()))
    attention = stock.model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]), *out[1:]))
    try:
        ids = tiny_engine.prompter(ask("skip")).tokens
        expected: list[int] = []
        while len(expected) < 24 and (not expected or expected[-1] != 0):
            expected.append(int(stock_logits(stock, ids + expected).argmax()))
    finally:
        handle.remove()
    assert list(answer.tokens or ()) == expected
    assert answer.tokens != (await tiny_engine.generate(ask("skip"))).tokens


# -- memory and misuse ---------------------------------------------------------------------------------------------


async def test_memory_is_claimed_shared_and_given_back(tiny_engine: LocalEngine) -> None:
    call = ask("m" * 200)
    account = call.account
    entry = tiny_engine.entry_nbytes
    branch = await tiny_engine.open(call)
    n = branch.spend.input
    assert account._bytes == pytest.approx(n * entry, rel=0.05)
    forks = [branch.fork() for _ in range(3)]
    await advance([branch, *forks], 2)
    assert account._bytes == pytest.approx((n + 4 * 128) * entry, rel=0.05), "the prompt is held once"
    for b in (branch, *forks):
        b.close()
    assert account._bytes == 0
    assert account.work.kv_bytes_peak == pytest.approx((n + 4 * 128) * entry, rel=0.05)


async def test_a_fork_that_does_not_fit_in_memory_is_refused(tiny_engine: LocalEngine) -> None:
    entry = tiny_engine.entry_nbytes
    call = ask("m", budget=Budget(kv_bytes_peak=int(2.5 * 128 * entry)))
    branch = await tiny_engine.open(call)
    twin = branch.fork()
    with pytest.raises(BudgetExceeded, match="kv_bytes_peak"):
        branch.fork()
    await advance([branch, twin], 3)
    assert [len(b.tokens) for b in (branch, twin)] == [3, 3]
    twin.close()
    branch.close()
    assert call.account.held == {} and call.account._bytes == 0


async def test_misuse_is_one_clear_line(tiny_engine: LocalEngine) -> None:
    branch = await tiny_engine.open(ask("x"))
    step = asyncio.create_task(branch.step())
    await asyncio.sleep(0)
    with pytest.raises(InvalidInput, match="awaited"):
        branch.fork()
    await step
    branch.close()
    assert await branch.step() is None
    with pytest.raises(InvalidInput, match="closed"):
        branch.fork()
    other = LocalEngine(tiny_engine.runner, tiny_engine.codec.tokenizer, "other")
    with pytest.raises(InvalidInput, match="one engine"):
        await other.advance([branch], 1)
    await other.aclose()
