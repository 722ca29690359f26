"""Self-certainty against the paper's sum over a stock model's distributions; the choice; budgets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thrifty import Account, Budget, BudgetExceeded, InvalidInput, Plan, PlanError, Sampling
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.search.self_certainty import SelfCertainty, certainty, certainty_of

NEVER = "\x00never\x00"


def brute_force(logits: np.ndarray) -> float:
    """-(1/V) sum_j log(V p_j), from probabilities."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return float(-np.mean(np.log(len(p) * p)))


@given(hnp.arrays(np.float64, st.integers(2, 50), elements=st.floats(-15, 15)))
def test_the_stable_form_equals_the_sum(logits: np.ndarray) -> None:
    expected = brute_force(logits)
    assert certainty(torch.from_numpy(logits)) == pytest.approx(expected, abs=1e-9)
    assert expected >= -1e-12
    masked = torch.cat([torch.from_numpy(logits), torch.tensor([-math.inf, -math.inf])])
    assert certainty(masked) == pytest.approx(expected, abs=1e-9)  # masked ids are no part of V


def test_uniform_is_zero_and_anything_else_is_more() -> None:
    assert certainty(torch.full((320,), 3.0)) == 0.0
    assert certainty(torch.tensor([0.0, 0.0, 0.1])) > 0
    assert certainty_of([[0.5, 0.5], [0.9, 0.1]]) == pytest.approx((0 - (math.log(1.8) + math.log(0.2)) / 2) / 2)


async def run(
    engine: Any, budget: Budget | None = None, on_exceed: str = "degrade", max_tokens: int = 24, **knobs: object
):  # type: ignore[no-untyped-def]
    account = Account("t", ledger=MemoryLedger())
    knobs = {"delimiter": NEVER, "step_tokens": 6, "keep": 8, "temperature": 1.5, **knobs}
    plan = Plan("sc", (SelfCertainty(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    answer = await plan.build(engine).ask("hello", account, sampling=Sampling(seed=4, max_tokens=max_tokens))
    return answer, account


def spans(stock: Any, engine: Any, tokens: tuple[int, ...], step: int) -> list[float]:
    """The certainty of each step of an answer, from the stock model's probabilities by the paper's sum."""
    from thrifty import Call

    prompt = engine.prompter(Call(({"role": "user", "content": "hello"},), Account("p"))).tokens
    with torch.no_grad():
        logits = stock(torch.tensor([prompt + list(tokens)])).logits[0].double()
    rows = torch.softmax(logits[len(prompt) - 1 : -1], -1)
    return [certainty_of(rows[i : i + step].tolist()) for i in range(0, len(tokens), step)]


async def test_what_it_kept_has_the_certainty_that_the_stock_model_gives_it(searched: Any, stock: Any) -> None:
    answer, account = await run(searched, candidates=3)
    told = answer.receipts[-1].detail["certainty"]
    assert answer.tokens is not None and len(told) == 4
    assert told == pytest.approx(spans(stock, searched, answer.tokens, 6), abs=1e-3)
    assert answer.receipts[-1].fired and answer.spend == account.settled and not account.held
    assert answer.spend.output > len(answer.tokens)  # rejected thoughts are billed


async def test_more_candidates_choose_the_surest_of_them(searched: Any, stock: Any) -> None:
    """One guided step: the chosen thought's certainty is the highest of those that a plain sampler draws."""
    answer, _ = await run(searched, candidates=5, guided=1, max_tokens=6)
    from thrifty.methods.search._samples import seed_of

    branch_seeds = [4, *(seed_of(4, i) for i in range(1, 5))]
    alone = []
    for seed in branch_seeds:
        drawn = (
            await Plan("p").build(searched).ask("hello", sampling=Sampling(seed=seed, temperature=1.5, max_tokens=6))
        )
        alone.append(spans(stock, searched, drawn.tokens, 6)[0])
    assert answer.receipts[-1].detail["certainty"][0] == pytest.approx(max(alone), abs=1e-3)
    assert max(alone) > min(alone)


async def test_after_the_guided_steps_the_answer_is_written_freely(searched: Any) -> None:
    answer, _ = await run(searched, candidates=3, guided=2, max_tokens=30)
    assert len(answer.receipts[-1].detail["certainty"]) == 2 and len(answer.tokens or ()) == 30
    assert answer.spend.output <= 30 + 2 * 2 * 6


async def test_no_budget_is_exceeded(searched: Any) -> None:
    for resource in ("tokens", "output", "input", "calls"):
        for limit in (0, 1, 2, 3, 30, 90, 160):
            for on_exceed in ("degrade", "refuse"):
                try:
                    answer, account = await run(searched, Budget(**{resource: limit}), on_exceed, candidates=3)
                except BudgetExceeded as error:
                    assert error.resource == resource
                    continue
                assert answer.spend == account.settled and getattr(account.settled, resource) <= limit
                assert not account.held and not account.overdraft and len(answer.receipts) >= 1


def test_bad_input() -> None:
    for knobs in ({"candidates": 0}, {"delimiter": ""}, {"step_tokens": 0}):
        with pytest.raises(InvalidInput, match=next(iter(knobs))):
            SelfCertainty(**knobs)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="logits"):
        Plan("p", (SelfCertainty(),)).build(ScriptedEngine("a"))
