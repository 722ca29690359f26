"""REALM: the update against quadrature of the posterior, the search against sorting and against all pairs with a
comparator that errs, the method with a judge that knows the true order."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import kendalltau

from thrifty import Account, Budget, Plan
from thrifty.call import Call, text_of
from thrifty.engines.scripted import PROVIDES, Draw, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context._judging import Said
from thrifty.methods.context._relevance import BETA, MU, SIGMA, Rating, best, combined, kendall, preference, update
from thrifty.methods.context.realm import LETTERS, Realm, preferences, read_order

HARD = PROVIDES - {"logprobs"}

# -- the update ----------------------------------------------------------------------------------------------


def moments(rating: Rating, other: Rating, p: float) -> tuple[float, float]:
    """Mean and deviation of the mixture of the posteriors of a win and of a loss, by quadrature: the prior times the
    chance that one noisy performance is above the other's."""
    spread = math.sqrt(2 * BETA**2 + other.sigma**2)
    low, high = rating.mu - 12 * rating.sigma, rating.mu + 12 * rating.sigma

    def integral(sign: float, power: int) -> float:
        def density(x: float) -> float:
            z = (x - rating.mu) / rating.sigma
            wins = 0.5 * math.erfc(-sign * (x - other.mu) / spread / math.sqrt(2))
            return x**power * math.exp(-z * z / 2) * wins

        return quad(density, low, high, limit=100, points=(rating.mu,))[0]

    mean = square = 0.0
    for sign, weight in ((1.0, p), (-1.0, 1 - p)):
        mass = integral(sign, 0)
        mean += weight * integral(sign, 1) / mass
        square += weight * integral(sign, 2) / mass
    return mean, math.sqrt(square - mean**2)


@settings(max_examples=12, deadline=None)
@given(st.floats(10.0, 40.0), st.floats(1.0, SIGMA), st.floats(10.0, 40.0), st.floats(1.0, SIGMA), st.floats(0.0, 1.0))
def test_the_update_is_the_posterior(mu: float, sigma: float, other_mu: float, other_sigma: float, p: float) -> None:
    got = update(Rating(mu, sigma), Rating(other_mu, other_sigma), p)
    mean, deviation = moments(Rating(mu, sigma), Rating(other_mu, other_sigma), p)
    assert got.mu == pytest.approx(mean, abs=1e-5) and got.sigma == pytest.approx(deviation, abs=1e-5)


def test_certain_and_empty_preferences() -> None:
    even = update(Rating(), Rating(), 0.5)
    win, loss = update(Rating(), Rating(), 1.0), update(Rating(), Rating(), 0.0)
    assert even.mu == MU and win.mu - MU == pytest.approx(MU - loss.mu) and win.mu > MU
    # closed form for equals: phi(0) / Phi(0) = sqrt(2 / pi), c^2 = 2 beta^2 + 2 sigma^2
    c = math.sqrt(2 * BETA**2 + 2 * SIGMA**2)
    v = math.sqrt(2 / math.pi)
    assert win.mu == pytest.approx(MU + SIGMA**2 / c * v)
    assert win.sigma**2 == pytest.approx(SIGMA**2 * (1 - SIGMA**2 / c**2 * v * v))
    for p in (0.0, 1.0):  # a surprise of 100 deviations: no underflow, no deviation at or below 0
        far = update(Rating(1000.0, 1.0), Rating(0.0, 1.0), p)
        assert math.isfinite(far.mu) and 0 < far.sigma <= 1.0001


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 9)), min_size=1, max_size=6))
def test_joined_views_are_no_surer_than_the_surest(views: list[tuple[float, float]]) -> None:
    ratings = [Rating(*v) for v in views]
    got = combined(ratings)
    assert min(r.sigma for r in ratings) <= got.sigma * (1 + 1e-9) <= max(r.sigma for r in ratings) * (1 + 1e-8)
    assert min(r.mu for r in ratings) - 1e-9 <= got.mu <= max(r.mu for r in ratings) + 1e-9


@given(st.permutations(list(range(9))), st.permutations(list(range(9))))
def test_kendall_is_that_of_scipy(a: list[int], b: list[int]) -> None:
    ranks = [[order.index(i) for i in range(9)] for order in (a, b)]
    assert kendall(a, b) == pytest.approx(kendalltau(*ranks).statistic)


# -- the search ----------------------------------------------------------------------------------------------


class Comparator:
    """Compares true relevances, each with fresh noise, and counts. `sure`: says only which is above the pivot."""

    def __init__(self, relevance: Sequence[float], noise: float, rng: random.Random, sure: bool = True) -> None:
        self.relevance, self.noise, self.rng, self.sure = relevance, noise, rng, sure
        self.calls = 0
        self.seen: list[Sequence[int]] = []

    async def __call__(self, group: Sequence[int]) -> list[float]:
        self.calls += 1
        self.seen.append(group)
        scores = [self.relevance[d] + self._drawn() for d in group]
        return [(1.0 if s > scores[-1] else 0.0) if self.sure else preference(s, scores[-1], 0.5) for s in scores[:-1]]

    def pair(self, i: int, j: int) -> bool:
        return self.relevance[i] + self._drawn() > self.relevance[j] + self._drawn()

    def _drawn(self) -> float:
        return self.rng.gauss(0, self.noise) if self.noise else 0.0


def top(relevance: Sequence[float], k: int) -> set[int]:
    return set(sorted(range(len(relevance)), key=lambda i: -relevance[i])[:k])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(2, 6), st.randoms(use_true_random=False))
async def test_without_noise_the_k_best_are_found(n: int, k: int, size: int, rng: random.Random) -> None:
    relevance = [float(x) for x in rng.sample(range(1000), n)]
    compare = Comparator(relevance, 0.0, rng)
    order, ratings = await best(n, k, compare, size)
    assert sorted(order) == list(range(n)) and len(ratings) == n
    assert set(order[:k]) == top(relevance, min(k, n))
    assert all(2 <= len(g) <= size and len(set(g)) == len(g) for g in compare.seen)


async def test_without_noise_every_order_of_six_is_selected_from() -> None:
    for relevance in itertools.permutations(map(float, range(6))):
        for k, size in ((1, 3), (2, 2), (3, 4)):
            order, _ = await best(6, k, Comparator(relevance, 0.0, random.Random(0)), size)
            assert set(order[:k]) == top(relevance, k)


async def test_with_noise_it_is_as_good_as_all_pairs_at_a_fraction_of_the_calls() -> None:
    n, k, noise, trials = 60, 10, 0.1, 12
    found = exhaustive = calls = 0.0
    for seed in range(trials):
        rng = random.Random(seed)
        relevance = [rng.gauss(0, 1) for _ in range(n)]
        compare = Comparator(relevance, noise, rng)
        order, _ = await best(n, k, compare, 3)
        found += len(set(order[:k]) & top(relevance, k)) / k / trials
        calls += compare.calls / trials
        wins = [0] * n
        for i in range(n):
            for j in range(i):
                wins[i if compare.pair(i, j) else j] += 1
        exhaustive += len(top([float(w) for w in wins], k) & top(relevance, k)) / k / trials
    assert found >= exhaustive - 0.03, f"recall {found:.3f}, of all pairs {exhaustive:.3f}"
    assert calls < n * (n - 1) / 2 / 15, f"{calls:.0f} calls"


async def test_graded_preferences_need_fewer_calls() -> None:
    calls = {True: 0, False: 0}
    recall = 0.0
    for seed in range(10):
        rng = random.Random(seed)
        relevance = [rng.gauss(0, 1) for _ in range(100)]
        for sure in calls:
            compare = Comparator(relevance, 0.0, rng, sure)
            order, _ = await best(100, 10, compare, 3)
            calls[sure] += compare.calls
        recall += len(set(order[:10]) & top(relevance, 10)) / 100
    assert calls[False] < calls[True] and recall > 0.9


async def test_it_stops_when_told_and_keeps_what_it_learnt() -> None:
    asked = 0

    async def once(group: Sequence[int]) -> list[float] | None:
        nonlocal asked
        asked += 1
        return [1.0] * (len(group) - 1) if asked == 1 else None

    order, _ = await best(6, 2, once, 3)
    assert asked == 2 and order[:2] == [1, 2] and sorted(order) == list(range(6))

    async def silent(group: Sequence[int]) -> list[float | None]:
        nonlocal asked
        asked += 1
        return [None] * (len(group) - 1)

    asked = 0
    order, ratings = await best(50, 5, silent, 3)
    assert order == list(range(50)) and asked == 25 and {r.sigma for r in ratings} == {SIGMA}


# -- the method ----------------------------------------------------------------------------------------------


def judge_that_knows(call: Call, draw: Draw) -> str:
    """Says the letters in the order of the numbers in the passages, the highest first."""
    shown = re.findall(r"<passage (\w)>\n\D*(\d+)", text_of(call.messages[0]))
    return ", ".join(letter for letter, _ in sorted(shown, key=lambda x: -int(x[1])))


def world(method: Realm, judge: Any, budget: Budget | None = None, capabilities: Any = HARD) -> Any:
    engine, asked = ScriptedEngine("fine"), ScriptedEngine(judge, model="judge", capabilities=capabilities)
    pipeline = Plan("r", (method,), budget or Budget()).build({"answer": engine, "judge": asked})
    return engine, asked, pipeline, Account("t", ledger=MemoryLedger())


@settings(max_examples=15, deadline=None)
@given(st.permutations(list(range(14))), st.integers(1, 6), st.integers(2, 5), st.sampled_from(["document", "rank"]))
async def test_the_k_best_are_kept(numbers: list[int], k: int, size: int, order: str) -> None:
    engine, judge, pipeline, account = world(Realm(k=k, set_size=size, order=order), judge_that_knows)
    passages = tuple(f"note number {n}" for n in numbers)
    answer = await pipeline.ask("Which?", account, context=passages)
    best_numbers = sorted(numbers, reverse=True)[:k]
    kept = [int(p.split()[-1]) for p in engine.calls[-1].context]
    assert sorted(kept, reverse=True) == best_numbers
    assert order == "rank" or kept == [n for n in numbers if n in best_numbers]
    assert answer.receipts[0].detail["comparisons"] == len(judge.calls) and answer.spend == account.settled


async def test_limits_of_calls_and_of_patience() -> None:
    passages = tuple(f"note number {n}" for n in range(20))
    for calls in (0, 1, 5):
        engine, judge, pipeline, account = world(Realm(k=3, calls=calls), judge_that_knows)
        answer = await pipeline.ask("Which?", account, context=passages)
        assert len(judge.calls) == calls and len(engine.calls[-1].context) == 3
        assert "no more were allowed" in answer.receipts[0].reason
    engine, judge, pipeline, account = world(Realm(k=3), "well, it depends")
    answer = await pipeline.ask("Which?", account, context=passages)
    assert len(judge.calls) == 3 and engine.calls[-1].context == passages[:3]
    assert answer.receipts[0].detail["unread"] == 3
    assert "more than" in answer.receipts[0].reason


async def test_labels_change_places_and_passages_are_cut_to_the_excerpt() -> None:
    passages = tuple(f"note number {n} " + "long " * 50 for n in range(9))
    engine, judge, pipeline, account = world(Realm(k=2, excerpt=7), judge_that_knows)
    await pipeline.ask("Which?", account, context=passages)
    shown = [re.findall(r"<passage \w>\n([^\n]*)", text_of(c.messages[0])) for c in judge.calls]
    assert {len(text.split()) for texts in shown for text in texts} == {7}
    pivot_places = [[t.split()[2] for t in texts].index("0") for texts in shown[:4]]  # 0 is the first pivot
    assert len(set(pivot_places)) == 3
    assert all(len(p.split()) == 53 for p in engine.calls[-1].context)


async def test_the_budget_ends_the_comparisons() -> None:
    passages = tuple(f"note number {n}" for n in range(20))
    free, judge, pipeline, account = world(Realm(k=3), judge_that_knows)
    await pipeline.ask("Which?", account, context=passages)
    one = max(judge.count(c) for c in judge.calls)
    engine, judge, pipeline, account = world(Realm(k=3), judge_that_knows, Budget(input=2 * one + 1 + 9))
    answer = await pipeline.ask("Which?", account, context=passages)
    assert 1 <= len(judge.calls) <= 2 and "the budget holds no more of it (input)" in answer.receipts[0].reason
    assert len(engine.calls[-1].context) == 3 and answer.spend.input <= 2 * one + 10


def test_replies() -> None:
    assert preferences(Said("B"), "ABC", 2, 1.0, 0.8) == [None, 0.8, None]  # of A and C it says nothing
    assert preferences(Said("C"), "ABC", 2, 1.0, 1.0) == [0.0, 0.0, None]
    scores = {"A": -1.0, "B": -2.0, "C": -3.0}
    soft = preferences(Said("?", scores), "ABC", 1, 2.0, 1.0)
    assert soft[1] is None and soft[0] == pytest.approx(1 / (1 + math.exp(-0.5))) == pytest.approx(1 - soft[2])  # type: ignore[operator]
    assert read_order("The best is B; then D, B and a.", "ABC") == ["B"]
    assert read_order("I'd say [A]>[C]", LETTERS[:3]) == ["A", "C"]


@pytest.mark.slow
async def test_the_logits_of_labels_are_read_as_stock_gives_them() -> None:
    """A tiny random model: the scores are the log-softmax of its stock forward at the labels' first tokens."""
    torch = pytest.importorskip("torch")
    import sys
    import tempfile
    from pathlib import Path

    sys.path.append(str(Path(__file__).parents[2] / "engines" / "local"))
    from tiny_chat import TEMPLATE, make_folder

    from thrifty.engines.local.engine import LocalEngine
    from thrifty.methods.context._judging import Judge

    with tempfile.TemporaryDirectory() as folder:
        path = make_folder(Path(folder) / "tiny", TEMPLATE, positions=1024)
        engine = LocalEngine.load(path, dtype="float32", deterministic=True)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        stock, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    account = Account("t")
    call = Call(({"role": "user", "content": "x"},), account, engines={"answer": engine})
    judge = Judge("realm", call, leave=1)
    said = await judge.ask("Which, A or B?", most=9, labels="AB")
    assert said is not None and set(said.scores) == {"A", "B"} and judge.spend.output == 1
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which, A or B?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    with torch.inference_mode():
        logs = torch.log_softmax(stock.float()(ids).logits[0, -1].double(), -1)
    first = {
        w: {tokenizer.encode(f, add_special_tokens=False)[0] for f in (w, " " + w, w.lower(), " " + w.lower())}
        for w in "AB"
    }
    for word, other in ("AB", "BA"):
        own = sorted(first[word] - first[other])
        assert said.scores[word] == pytest.approx(float(torch.logsumexp(logs[own], 0)), abs=1e-4)
    assert np.isclose(account.settled.output, 1)
    await engine.aclose()
