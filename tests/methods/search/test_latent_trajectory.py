"""Latent-Trajectory: the signals against loops and hand-made paths, states against a stock model; the rule; budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Plan, PlanError, Sampling
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.search._trajectory import Signals, Trajectory, auc, choose_threshold, signals_of
from thrifty.methods.search.latent_trajectory import LatentTrajectory, best_of


def by_hand(s: np.ndarray) -> tuple[float, float, float]:
    """Net, cumulative, aligned of [N, L, D] by loops."""
    n, layers, _ = s.shape
    net = cumulative = aligned = 0.0
    for layer in range(layers):
        u = s[n - 1, layer] - s[0, layer]
        net += np.linalg.norm(u) / n / layers
        for i in range(1, n):
            v = s[i, layer] - s[i - 1, layer]
            cumulative += np.linalg.norm(v) / layers
            aligned += float(v @ u) / (np.linalg.norm(v) * np.linalg.norm(u)) / (n - 1) / layers
    return net, cumulative, aligned


@given(st.integers(2, 7), st.integers(1, 4), st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_the_signals_token_by_token_are_those_of_the_formula(n: int, layers: int, size: int, k: int, seed: int) -> None:
    states = np.random.default_rng(seed).normal(size=(n * k + k // 2, layers, size))
    online = Trajectory(k)
    for state in states:
        online.add(torch.from_numpy(state))
    segments = states[: n * k].reshape(n, k, layers, size).mean(1)
    found = online.signals()
    assert found is not None and found.segments == n  # an unfinished segment does not count
    assert (found.net, found.cumulative, found.aligned) == pytest.approx(by_hand(segments), abs=1e-5)


def test_a_straight_line_a_closed_loop_and_no_way_at_all() -> None:
    step = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    straight = signals_of(torch.stack([step * i for i in range(5)]))
    assert straight is not None and straight.aligned == pytest.approx(1)
    assert straight.cumulative == pytest.approx(float((4 * step).norm(dim=-1).mean()))  # as long as the drift
    loop = signals_of(torch.stack([step * 0, step, -step, step * 0]))
    assert loop is not None and loop.net == 0 and loop.aligned == 0 and loop.cumulative > 0
    still = signals_of(torch.stack([step, step]))
    assert still == Signals(0.0, 0.0, 0.0, 2)
    assert signals_of(step[None]) is None


def test_choice_threshold_and_auc() -> None:
    signals = [None, Signals(1, 5, 0.2, 3), Signals(2, 9, 0.1, 3), Signals(2, 4, 0.2, 3)]
    scores = [[None if x is None else x.score(s) for x in signals] for s in ("net", "cumulative", "aligned")]
    assert [best_of(row) for row in scores] == [2, 3, 1]
    assert best_of([None, None]) == 0
    questions = [([(0.2, False), (0.9, True)], False), ([(0.8, True), (0.1, False)], False), ([(0.3, False)] * 2, True)]
    assert choose_threshold(questions) == (0.8, 1.0, (2 + 1 + 2) / 3)
    with pytest.raises(InvalidInput):
        choose_threshold([])
    with pytest.raises(InvalidInput):
        auc([1.0], [True])


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_auc_is_the_area_under_the_curve(rows: list[tuple[int, bool]]) -> None:
    positive, negative = sum(c for _, c in rows), sum(not c for _, c in rows)
    if not positive or not negative:
        return
    cuts = sorted({s for s, _ in rows} | {9}, reverse=True)
    tpr = [sum(c and s >= t for s, c in rows) / positive for t in cuts]
    fpr = [sum(not c and s >= t for s, c in rows) / negative for t in cuts]
    assert auc([s for s, _ in rows], [c for _, c in rows]) == pytest.approx(float(np.trapezoid(tpr, fpr)))


# -- on a model ------------------------------------------------------------------------------------------------


async def run(
    engine: Any, budget: Budget | None = None, on_exceed: str = "degrade", max_tokens: int = 21, **knobs: object
):  # type: ignore[no-untyped-def]
    account = Account("t", ledger=MemoryLedger())
    knobs = {"segment": 4, "samples": 3, "keep": 8, "temperature": 1.5, **knobs}
    plan = Plan("lt", (LatentTrajectory(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    answer = await plan.build(engine).ask("hello", account, sampling=Sampling(seed=4, max_tokens=max_tokens))
    return answer, account


def score_of(stock: Any, engine: Any, tokens: tuple[int, ...], k: int, signal: str) -> float:
    """From the stock model's states of all tokens but the last, embeddings left out."""
    prompt = engine.prompter(Call(({"role": "user", "content": "hello"},), Account("p"))).tokens
    with torch.no_grad():
        hidden = stock(torch.tensor([prompt + list(tokens)]), output_hidden_states=True).hidden_states[1:]
    states = torch.stack([h[0, len(prompt) : -1] for h in hidden], 1).double().numpy()
    n = len(states) // k
    net, cumulative, aligned = by_hand(states[: n * k].reshape(n, k, *states.shape[1:]).mean(1))
    return {"net": net, "cumulative": -cumulative, "aligned": aligned}[signal]


@pytest.mark.parametrize("signal", ["net", "cumulative", "aligned"])
async def test_the_first_that_reaches_the_threshold_is_accepted(searched: Any, stock: Any, signal: str) -> None:
    none, _ = await run(searched, signal=signal, threshold=1e6)
    scores = none.receipts[-1].detail["scores"]
    assert len(scores) == 3 and "their majority" in none.receipts[-1].reason
    assert none.tokens is not None
    expected = score_of(stock, searched, none.tokens, 4, signal)
    assert scores[none.receipts[-1].detail["chosen"]] == pytest.approx(expected, abs=1e-3)
    for threshold in scores:
        at = next(i for i, s in enumerate(scores) if s >= threshold - 1e-6)
        answer, account = await run(searched, signal=signal, threshold=threshold - 1e-6)
        assert answer.receipts[-1].detail["scores"] == pytest.approx(scores[: at + 1])
        assert answer.receipts[-1].fired and answer.receipts[-1].detail["chosen"] == at
        assert answer.spend == account.settled and answer.spend.output == 21 * (at + 1) and not account.held


async def test_early_selection_finishes_only_the_best(searched: Any, stock: Any) -> None:
    answer, account = await run(searched, mode="early", prefix=9, signal="net")
    detail = answer.receipts[-1].detail
    assert detail["scores"][detail["chosen"]] == max(detail["scores"])
    assert answer.tokens is not None and len(answer.tokens) == 21
    # after 9 tokens the states of the first 8 are known: what a trace cut there would score
    assert max(detail["scores"]) == pytest.approx(score_of(stock, searched, answer.tokens[:9], 4, "net"), abs=1e-3)
    assert answer.spend.output == 21 + 2 * 9 and answer.spend == account.settled and not account.held


async def test_traces_too_short_for_a_signal_are_told(searched: Any) -> None:
    for mode in ("accept", "early"):
        answer, _ = await run(searched, mode=mode, segment=500)
        receipt = answer.receipts[-1]
        assert not receipt.fired and "0 with a signal" in receipt.reason and receipt.detail["scores"] == [None] * 3


@pytest.mark.parametrize("mode", ["accept", "early"])
async def test_no_budget_is_exceeded(searched: Any, mode: str) -> None:
    for resource in ("tokens", "output", "input", "calls"):
        for limit in (0, 1, 2, 3, 30, 90, 160):
            for on_exceed in ("degrade", "refuse"):
                try:
                    answer, account = await run(
                        searched, Budget(**{resource: limit}), on_exceed, mode=mode, threshold=9
                    )
                except BudgetExceeded as error:
                    assert error.resource == resource
                    continue
                assert answer.spend == account.settled and getattr(account.settled, resource) <= limit
                assert not account.held and not account.overdraft


def test_bad_input() -> None:
    for knobs in ({"samples": 0}, {"segment": 0}, {"prefix": 0}, {"signal": "speed"}):
        with pytest.raises(InvalidInput, match=next(iter(knobs))):
            LatentTrajectory(**knobs)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="hidden"):
        Plan("p", (LatentTrajectory(),)).build(ScriptedEngine("a"))
