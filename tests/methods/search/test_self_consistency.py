"""Self-consistency: stop rules against scipy and Monte Carlo, and what a plan with it spends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from thrifty import Account, Budget, BudgetExceeded, Plan, Sampling
from thrifty.engines.scripted import Reply, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.search._samples import seed_of
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


def world(replies: list[str | Reply], budget: Budget | None = None, on_exceed: str = "degrade", **knobs: object):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine(replies)
    plan = Plan("sc", (SelfConsistency(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build(engine), Account("t", ledger=MemoryLedger())


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
async def test_when_it_stops(votes: str, knobs: dict[str, object], drawn: int, winner: str) -> None:
    if votes.startswith("99998"):
        votes, drawn = "9999998888", 6
    engine, pipeline, account = world([f"so #### {v}" for v in votes], **knobs)
    answer = await pipeline.ask("?", account)
    assert len(engine.calls) == drawn and answer.text == f"so #### {winner}"
    assert answer.spend == account.settled and answer.spend.calls == drawn
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


async def test_each_sample_has_its_seed_and_the_temperature() -> None:
    engine, pipeline, account = world(["1", "2", "3"], samples=3, temperature=0.9)  # type: ignore[arg-type]
    await pipeline.ask("?", account, sampling=Sampling(seed=11, temperature=0.0))
    assert [c.sampling.seed for c in engine.calls] == [seed_of(11, i) for i in range(3)]
    assert {c.sampling.temperature for c in engine.calls} == {0.9}


async def test_waves_run_together_and_stop_between() -> None:
    engine, pipeline, account = world(["#### 8"] * 9, samples=9, wave=3)
    answer = await pipeline.ask("?", account)
    assert len(engine.calls) == 6  # 3 agree: 0.9375; 6: sure
    assert answer.spend == account.settled


async def test_a_wave_shares_the_budget_in_equal_parts() -> None:
    engine, pipeline, account = world(["w " * 50] * 3, Budget(output=30), samples=3, wave=3)
    answer = await pipeline.ask("?", account)
    assert [e.spend.output for e in account.ledger.entries()] == [10, 10, 10]
    assert answer.spend.output == 30 and not account.held


@pytest.mark.parametrize("wave", [1, 4])
async def test_the_budget_ends_the_sampling(wave: int) -> None:
    replies: list[str | Reply] = ["#### 8", "#### 9", "#### 9", "#### 9"]
    engine, pipeline, account = world(replies, Budget(calls=3), samples=4, wave=wave)
    answer = await pipeline.ask("?", account)
    assert answer.text == "#### 9" and answer.spend.calls == 3
    assert "budget (calls) held no more" in answer.receipts[-1].reason
    _, strict, account = world(replies, Budget(calls=3), "refuse", samples=4, wave=wave)
    with pytest.raises(BudgetExceeded):
        await strict.ask("?", account)
    assert account.settled.calls == 3 and not account.held
