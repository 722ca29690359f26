"""Self-consistency: stop rules against scipy and Monte Carlo, and what a plan with it spends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, Delta, EngineError, Method, Plan, Sampling, Spend
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedBranch, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.method import Next, Whole
from thrifty.methods.prompt.budget_prompt import BudgetPrompt
from thrifty.methods.search._samples import seed_of
from thrifty.methods.search.first_finish_search import FirstFinishSearch
from thrifty.methods.search.self_consistency import SelfConsistency, beta_confidence, dirichlet_confidence


@given(st.integers(0, 60), st.integers(0, 60))
def test_beta_against_scipy(first: int, second: int) -> None:
    assert beta_confidence(first, second) == pytest.approx(stats.beta.sf(0.5, first + 1, second + 1), rel=1e-10)


@given(st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_dirichlet_of_two_answers_is_beta(first: int, second: int) -> None:
    if first >= 1:
        assert dirichlet_confidence([first, second]) == pytest.approx(beta_confidence(first, second), abs=1e-6)


@pytest.mark.parametrize("votes", [[3, 1, 1], [5, 4, 2, 1], [2, 2, 2], [12, 6, 1]])
def test_dirichlet_against_monte_carlo(votes: list[int]) -> None:
    draws = np.random.default_rng(0).dirichlet(np.array(votes) + 1, size=200_000)
    leads = float((draws.argmax(axis=1) == 0).mean())
    assert dirichlet_confidence(votes) == pytest.approx(leads, abs=5 * 0.5 / 200_000**0.5)


def test_one_vote_is_not_certain() -> None:
    assert dirichlet_confidence([1]) == pytest.approx(beta_confidence(1, 0)) == 0.75


BARE = PROVIDES - {"branch"}
both = pytest.mark.parametrize("branches", [True, False], ids=["branches", "calls"])


def world(  # type: ignore[no-untyped-def]
    replies: object,
    budget: Budget | None = None,
    on_exceed: str = "degrade",
    branches: bool = True,
    below: Sequence[Method] = (),
    fail_after: int | None = None,
    **knobs: object,
):
    capabilities = PROVIDES if branches else BARE
    engine = ScriptedEngine(replies, capabilities=capabilities, fail_after=fail_after)  # type: ignore[arg-type]
    plan = Plan("sc", (SelfConsistency(**knobs), *below), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build(engine), Account("t", ledger=MemoryLedger())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedBranch]:
    """Every branch that is made, calls' own included."""
    seen: list[ScriptedBranch] = []
    init = ScriptedBranch.__init__

    def watched(self: ScriptedBranch, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        seen.append(self)

    monkeypatch.setattr(ScriptedBranch, "__init__", watched)
    return seen


@pytest.mark.parametrize(
    ("votes", "knobs", "drawn", "winner"),
    [
        ("8888888888", {}, 4, "8"),  # sure by 0.969
        ("8888888888", {"confidence": 0.9}, 3, "8"),
        ("8888888888", {"confidence": 1.0}, 5, "8"),  # 3 left cannot overtake 5
        ("8989898988", {}, 8, "8"),  # equal votes: said first
        ("9889898999", {"samples": 3}, 3, "8"),
        (
            "9999888888",
            {"samples": 10, "confidence": 0.99},
            6,
            "9",
        ),  # 0.992 for 6 votes to 0 is never reached
        ("8888888888", {"rule": "dirichlet"}, 4, "8"),
    ],
)
@both
async def test_when_it_stops(votes: str, knobs: dict[str, object], drawn: int, winner: str, branches: bool) -> None:
    if votes.startswith("99998"):
        votes, drawn = "9999998888", 6
    engine, pipeline, account = world([f"so #### {v}" for v in votes], branches=branches, **knobs)
    answer = await pipeline.ask("?", account)
    samples = knobs.get("samples", 8)
    ready = branches and drawn < samples  # type: ignore[operator]
    assert len(engine.calls) == (1 if branches else drawn) and answer.text == f"so #### {winner}"
    assert answer.spend == account.settled and answer.spend.calls == drawn + ready
    assert answer.receipts[-1].detail.get("unused_forks", 0) == ready
    assert (answer.receipts[-1].before, answer.receipts[-1].after) == (knobs.get("samples", 8), drawn)


async def test_the_answer_is_the_first_that_won_and_votes_are_normalised() -> None:
    replies = ["It is 7.", "So 1,200 dollars", "x = 1200.0", "Answer: 1200", "Hm 3"]
    engine, pipeline, account = world(replies, samples=5)  # type: ignore[arg-type]
    answer = await pipeline.ask("?", account)
    assert answer.text == "So 1,200 dollars"
    assert answer.receipts[-1].detail["votes"][0] == 3


async def test_cut_samples_abstain_and_all_cut_samples_still_answer() -> None:
    cut = Reply("I think 3 or 4", finish="length")
    engine, pipeline, account = world([cut, cut, "#### 9"], samples=3)
    assert (await pipeline.ask("?", account)).text == "#### 9"
    other = Reply("Maybe 5", finish="length")
    engine, pipeline, account = world([other, cut, Reply("so 4", finish="length")], samples=3)
    answer = await pipeline.ask("?", account)
    assert answer.text == cut.text and answer.receipts[-1].detail == {"votes": [2, 1], "abstained": 0}
    engine, pipeline, account = world(["", ""], samples=2)
    assert (await pipeline.ask("?", account)).receipts[-1].detail == {"votes": [], "abstained": 2}


@both
async def test_each_sample_has_its_seed_and_the_temperature(branches: bool) -> None:
    asked: list[Sampling] = []

    def reply(call: Call, draw: Draw) -> str:
        asked.append(call.sampling)
        return str(len(asked))

    engine, pipeline, account = world(reply, branches=branches, samples=3, wave=2, temperature=0.9)
    await pipeline.ask("?", account, sampling=Sampling(seed=11, temperature=0.0))
    assert [s.seed for s in asked] == [seed_of(11, i) for i in range(3)]
    assert {s.temperature for s in asked} == {0.9}


async def test_forks_without_a_seed_do_not_repeat_each_other() -> None:
    engine, pipeline, account = world(lambda call, draw: f"#### {draw.getrandbits(40)}", samples=5, wave=5)
    answer = await pipeline.ask("?", account)
    assert answer.receipts[-1].detail["votes"] == [1] * 5


@both
async def test_waves_run_together_and_stop_between(branches: bool) -> None:
    engine, pipeline, account = world(["#### 8"] * 9, branches=branches, samples=9, wave=3)
    answer = await pipeline.ask("?", account)
    assert answer.receipts[-1].after == 6  # 3 agree: 0.9375; 6: sure
    assert answer.spend == account.settled


@both
async def test_a_wave_shares_the_budget_in_equal_parts(branches: bool) -> None:
    engine, pipeline, account = world(["w " * 50] * 3, Budget(output=30), branches=branches, samples=3, wave=3)
    answer = await pipeline.ask("?", account)
    assert [e.spend.output for e in account.ledger.entries()] == [10, 10, 10]
    assert answer.spend.output == 30 and not account.held


@both
@pytest.mark.parametrize("wave", [1, 4])
async def test_the_budget_ends_the_sampling(wave: int, branches: bool) -> None:
    replies: list[str | Reply] = ["#### 8", "#### 9", "#### 9", "#### 9"]
    engine, pipeline, account = world(replies, Budget(calls=3), branches=branches, samples=4, wave=wave)
    answer = await pipeline.ask("?", account)
    assert answer.text == "#### 9" and answer.spend.calls == 3
    assert "budget (calls) held no more" in answer.receipts[-1].reason
    _, strict, account = world(replies, Budget(calls=3), "refuse", branches=branches, samples=4, wave=wave)
    with pytest.raises(BudgetExceeded):
        await strict.ask("?", account)
    assert account.settled.calls == 3 and not account.held


# -- one prefill for all samples -----------------------------------------------------------------------------

PROMPT = "one two three four five"
DIFFER = [f"so #### {i}" for i in range(20)]


@pytest.mark.parametrize(("samples", "wave"), [(2, 1), (3, 1), (4, 4), (7, 3), (5, 9)])
async def test_n_samples_cost_one_prefill(samples: int, wave: int, made: list[ScriptedBranch]) -> None:
    engine, pipeline, account = world(DIFFER, samples=samples, wave=wave)
    answer = await pipeline.ask(PROMPT, account)
    n, prompt, output = samples, 5, 3
    spend, work = answer.spend, answer.work
    assert (spend.input, spend.cached, spend.output, spend.calls) == (n * prompt, (n - 1) * prompt, n * output, n)
    assert work.prefill == prompt and work.target_passes == n * output
    assert spend == account.settled and not account.held
    assert [(e.spend.input, e.spend.cached) for e in account.ledger.entries()].count((prompt, 0)) == 1
    assert len(made) == n and all(branch.closed for branch in made)
    assert "unused_forks" not in answer.receipts[-1].detail


async def test_a_fork_that_is_not_needed_is_billed_as_cached_and_told(made: list[ScriptedBranch]) -> None:
    engine, pipeline, account = world(["so #### 8"] * 9)
    answer = await pipeline.ask(PROMPT, account)
    assert (answer.spend.input, answer.spend.cached, answer.spend.calls) == (5 * 5, 4 * 5, 5)
    assert answer.spend.output == 4 * 3 and answer.work.prefill == 5
    receipt = answer.receipts[-1]
    assert (receipt.before, receipt.after, receipt.detail["unused_forks"]) == (8, 4, 1)
    assert receipt.reason.endswith("1 fork kept ready and not needed")
    assert len(made) == 5 and all(branch.closed for branch in made) and not account.held


async def test_samples_are_the_same_by_forks_and_by_calls_and_only_the_answer_streams() -> None:
    said: dict[bool, dict[int | None, str]] = {True: {}, False: {}}
    for branches, mine in said.items():

        def reply(call: Call, draw: Draw, mine: dict[int | None, str] = mine) -> str:
            return mine.setdefault(call.sampling.seed, f"so #### {draw.getrandbits(40)}")

        deltas: list[Delta] = []

        async def emit(delta: Delta, deltas: list[Delta] = deltas) -> None:
            deltas.append(delta)

        engine, pipeline, account = world(reply, branches=branches, samples=6, wave=2)
        answer = await pipeline.ask("?", account, sampling=Sampling(seed=4), emit=emit)
        assert answer.text == mine[4] and "".join(d.text for d in deltas) == answer.text
        assert [d.finish for d in deltas if d.finish] == ["stop"] and deltas[-1].answer == answer
    assert said[True] == said[False] and len(said[True]) == 6


async def test_what_a_rewrite_below_says_is_told_once() -> None:
    engine, pipeline, account = world(DIFFER, below=(BudgetPrompt(),), samples=4, wave=3)
    answer = await pipeline.ask(PROMPT, account)
    assert [r.method for r in answer.receipts] == ["budget-prompt", "self-consistency"]
    _, single, other = world(DIFFER, below=(BudgetPrompt(),), samples=1)
    alone = await single.ask(PROMPT, other)
    told = next(r for r in alone.receipts if r.method == "budget-prompt")
    assert answer.receipts[0] == told and answer.spend.input == 4 * alone.spend.input


class Passing(Whole):
    """Hands on what is below it, whole."""

    name = "passing"

    async def __call__(self, call: Call, next: Next) -> Answer:
        return await next(call)


@pytest.mark.parametrize("below", [Passing(), FirstFinishSearch(samples=1)], ids=["whole", "search"])
async def test_above_what_cannot_be_opened_samples_are_calls(below: Method) -> None:
    engine, pipeline, account = world(DIFFER, below=(BudgetPrompt(), below), samples=3)
    answer = await pipeline.ask(PROMPT, account)
    assert len(engine.calls) == 3 and answer.spend.cached == 0 and answer.spend.calls == 3


# -- a spare fork and a tight budget ---------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [40, 90, 206, 207, 400])
@pytest.mark.parametrize("resource", ["output", "tokens"])
async def test_the_first_sample_may_have_all_that_it_had_without_a_spare(
    resource: str, limit: int, made: list[ScriptedBranch]
) -> None:
    engine, pipeline, account = world(["w " * 999] * 9, Budget(**{resource: limit}))
    answer = await pipeline.ask(PROMPT, account)
    spent = getattr(answer.spend, resource)
    spare = answer.spend.cached
    assert len(answer.tokens or ()) == limit - (5 + spare if resource == "tokens" else 0)
    assert spent == limit and answer.finish == "budget" and not account.held
    assert spare == (5 if limit >= (192 if resource == "output" else 207) else 0) and all(
        branch.closed for branch in made
    )
    assert "held no more" in answer.receipts[-1].reason


async def test_when_the_spare_had_to_go_the_next_wave_opens_anew() -> None:
    replies = ["w " * 300 + "#### 1", "#### 2", "w #### 2", "#### 2"]
    engine, pipeline, account = world(replies, Budget(output=330), samples=3)
    answer = await pipeline.ask(PROMPT, account)
    assert answer.spend.output == 302 + 3 + 2 and answer.receipts[-1].after == 3
    assert answer.receipts[-1].detail["unused_forks"] == 1
    assert answer.spend.input - answer.spend.cached == 3 * 5  # too little was left for a tranche each


class Dear:
    """Ten a token of the prompt, one a token of output."""

    def with_price(self, spend: Spend, model: str, role: str) -> Spend:
        return replace(spend, usd=10 * spend.input + spend.output)


async def test_a_refused_fork_leaves_a_smaller_wave(made: list[ScriptedBranch]) -> None:
    """Money is not foreseen: 120 hold a prompt of 50 and 64 tokens, and then no fork."""
    for on_exceed in ("degrade", "refuse"):
        engine = ScriptedEngine(DIFFER, prices=Dear())
        plan = Plan("sc", (SelfConsistency(samples=4, wave=4),), Budget(usd=120), on_exceed=on_exceed)  # type: ignore[arg-type]
        account = Account("t", ledger=MemoryLedger())
        if on_exceed == "refuse":
            with pytest.raises(BudgetExceeded, match="usd"):
                await plan.build(engine).ask(PROMPT, account)
        else:
            answer = await plan.build(engine).ask(PROMPT, account)
            assert (answer.spend.calls, answer.spend.cached, answer.spend.usd) == (2, 0, 2 * 53)
            assert "2 of 4 samples" in answer.receipts[-1].reason and "(usd) held no more" in answer.receipts[-1].reason
        assert not account.held and not account.overdraft and all(branch.closed for branch in made)


async def test_cancelled_at_any_moment_every_branch_is_closed(made: list[ScriptedBranch]) -> None:
    midway = 0
    for wait in range(1, 60, 3):
        made.clear()
        engine, pipeline, account = world(["w w w w #### " + str(i) for i in range(9)], samples=9, wave=2)
        task = asyncio.ensure_future(pipeline.ask(PROMPT, account))
        for _ in range(wait):
            await asyncio.sleep(0)
        midway += bool(account.held)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert all(branch.closed for branch in made) and not account.held
        assert account.settled.calls == len(made)
    assert midway > 5


async def test_an_engine_that_fails_leaves_nothing_open(made: list[ScriptedBranch]) -> None:
    engine, pipeline, account = world(["w w w w"] * 9, fail_after=2, wave=2)
    with pytest.raises(EngineError):
        await pipeline.ask(PROMPT, account)
    assert len(made) == 3 and all(branch.closed for branch in made) and not account.held
    assert account.settled.calls == 3 and account.settled.output == 4
