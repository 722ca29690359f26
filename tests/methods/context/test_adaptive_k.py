"""Adaptive-k: the cut against brute force and planted gaps, and the method on an embedder of bags of
words."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from thrifty import Account, Budget, BudgetExceeded, InvalidInput, Plan
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context.adaptive_k import STRATEGIES, AdaptiveK, choose, cut
from thrifty.methods.context.fixed_k import FixedK

# Whole numbers over 64: sums, differences and shifts are exact in floats, so ties are ties to the oracle too.
falling = st.lists(st.integers(-64, 64), min_size=2, max_size=40).map(
    lambda xs: sorted((x / 64 for x in xs), reverse=True)
)
share = st.sampled_from([0.0, 0.1, 0.25, 0.4])


def searched(n: int, a: float, b: float) -> list[int]:
    """Gap indices that are searched, as the definition counts them off one by one."""
    gaps = list(range(n - 1))
    for _ in range(int((n - 1) * a)):
        gaps.pop(0)
    for _ in range(int((n - 1) * b)):
        gaps.pop()
    return gaps


@given(falling, share, share, st.integers(0, 6))
def test_largest_gap_is_the_brute_force_argmin(scores: list[float], a: float, b: float, buffer: int) -> None:
    best, at = 0.0, None
    for t in searched(len(scores), a, b):
        drop = scores[t] - scores[t + 1]
        if at is None or drop > best:
            best, at = drop, t
    assert at is not None
    assert cut(scores, ignore_extreme=a, ignore_tail=b) == at
    assert choose(scores, buffer=buffer, ignore_extreme=a, ignore_tail=b) == min(at + 1 + buffer, len(scores))


@given(falling, share, share, st.integers(1, 6))
def test_moving_avg_finds_the_steepest_window_and_in_it_the_steepest_gap(
    scores: list[float], a: float, b: float, window: int
) -> None:
    gaps = searched(len(scores), a, b)
    w = min(window, len(gaps))
    windows = [gaps[i : i + w] for i in range(len(gaps) - w + 1)]
    drops = [scores[ts[0]] - scores[ts[-1] + 1] for ts in windows]
    first = windows[drops.index(max(drops))]
    best = max(first, key=lambda t: (scores[t] - scores[t + 1], -t))
    assert cut(scores, strategy="moving_avg", ignore_extreme=a, ignore_tail=b, window=window) == best


@given(falling, share, share)
def test_2diff_spike_is_the_first_turn(scores: list[float], a: float, b: float) -> None:
    gaps = searched(len(scores), a, b)
    g = {t: scores[t + 1] - scores[t] for t in gaps}
    second = [(t, g[t + 1] - g[t]) for t in gaps[:-1]]
    expected = None
    for i, (t, turn) in enumerate(second):
        if turn > 0 and any(earlier < 0 for _, earlier in second[:i]):
            expected = t
            break
    if expected is None:
        expected = cut(scores, ignore_extreme=a, ignore_tail=b)
    assert cut(scores, strategy="2diff_spike", ignore_extreme=a, ignore_tail=b) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5))
def test_one_planted_gap_is_found_by_every_strategy(strategy: str, above: int, below: int, buffer: int) -> None:
    """Offsets are added back: the gap after rank `above` gives `above` passages, and the buffer."""
    n = above + below
    scores = [1 - i / 1024 for i in range(above)] + [0.25 - i / 1024 for i in range(below)]
    assume(above - 1 < n - 1 - int((n - 1) * 0.1))  # the gap is not in the ignored tail
    assert choose(scores, strategy=strategy, buffer=buffer) == min(n, above + buffer)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(falling, st.sampled_from([0.5, 2.0, 4.0]), st.integers(-8, 8))
def test_affine_rescaling_changes_nothing(strategy: str, scores: list[float], scale: float, shift: int) -> None:
    assert cut([s * scale + shift for s in scores], strategy=strategy) == cut(scores, strategy=strategy)


def test_a_float_buffer_multiplies_the_gap_index_from_zero() -> None:
    scores = [1.0, 0.99, 0.98, 0.97, 0.2, 0.19, 0.18, 0.17, 0.16, 0.15]  # the gap has index 3
    assert choose(scores, buffer_factor=1.0) == 4
    assert choose(scores, buffer_factor=1.5) == 5  # int(4.5) + 1
    assert choose(scores, buffer_factor=2.0) == 7
    assert choose(scores, buffer_factor=9.0) == 10


def test_the_tail_is_not_searched() -> None:
    scores = [1.0, 0.99, 0.6, 0.59, 0.58, 0.57, 0.56, 0.55, 0.54, 0.53, -1.0]
    assert choose(scores, buffer=0, ignore_tail=0.0) == 10
    assert choose(scores, buffer=0, ignore_tail=0.1) == 2


def test_few_passages_and_bad_scores() -> None:
    assert (choose([]), choose([0.5]), choose([0.5, 0.4], buffer=0)) == (0, 1, 1)
    for scores in ([0.1, 0.2], [0.5, float("nan")], [float("inf"), 0.0]):
        with pytest.raises(InvalidInput, match="falling"):
            choose(scores)
    with pytest.raises(InvalidInput, match="largest_gap"):
        cut([1.0, 0.0], strategy="biggest")
    with pytest.raises(InvalidInput, match="leave no gap"):
        cut([1.0, 0.5, 0.0], ignore_extreme=0.6, ignore_tail=0.6)
    with pytest.raises(InvalidInput, match="below 1"):
        AdaptiveK(ignore_extreme=0.6, ignore_tail=0.5)


# -- the method ----------------------------------------------------------------------------------------------


def corpus(relevant: int, n: int, rng: random.Random) -> tuple[str, ...]:
    """n passages, of which `relevant` share most words with the query."""
    other = [f"w{i}" for i in range(400)]
    texts = [f"velvet harbour ledger {rng.choice(other)}" for _ in range(relevant)]
    texts += [" ".join(rng.sample(other, 4)) for _ in range(n - relevant)]
    rng.shuffle(texts)
    return tuple(texts)


def world(method: AdaptiveK | FixedK, budget: Budget | None = None, on_exceed: str = "degrade"):  # type: ignore[no-untyped-def]
    answering, embedder = ScriptedEngine("fine"), ScriptedEngine("", model="bag", dimensions=4096)
    plan = Plan("k", (method,), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return (
        answering,
        plan.build({"answer": answering, "embedder": embedder}),
        Account("t", ledger=MemoryLedger()),
    )


async def test_k_tracks_the_number_of_relevant_passages_and_fixed_k_does_not() -> None:
    rng = random.Random(7)
    planted, adaptive, fixed = [], [], []
    for trial in range(24):
        relevant = 1 + trial % 12
        passages = corpus(relevant, 40, rng)
        for method, kept in ((AdaptiveK(buffer=0), adaptive), (FixedK(k=5), fixed)):
            engine, pipeline, account = world(method)
            await pipeline.ask("velvet harbour ledger", account, context=passages)
            kept.append(len(engine.calls[-1].context))
        planted.append(relevant)
    assert spearmanr(planted, adaptive).statistic > 0.7
    assert set(fixed) == {5}


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False))
async def test_the_order_of_the_passages_does_not_matter(rng: random.Random) -> None:
    passages = list(corpus(4, 20, random.Random(1)))
    kept = []
    for _ in range(2):
        engine, pipeline, account = world(AdaptiveK(buffer=0))
        await pipeline.ask("velvet harbour ledger", account, context=tuple(passages))
        kept.append(sorted(engine.calls[-1].context))
        rng.shuffle(passages)
    assert kept[0] == kept[1] and len(kept[0]) == 4


@pytest.mark.parametrize("order", ["document", "rank"])
async def test_order(order: str) -> None:
    passages = ("b a z", "x y w", "a b", "q r s", "t u v", "k l m")
    engine, pipeline, account = world(AdaptiveK(buffer=0, order=order))
    await pipeline.ask("a b", account, context=passages)
    assert engine.calls[-1].context == (("b a z", "a b") if order == "document" else ("a b", "b a z"))


async def test_a_long_message_is_cut_and_its_question_stays() -> None:
    text = "Intro.\n\nthe code is 4\n\ndogs bark loud\n\nrain falls down\n\n\nWhat is the code?"
    engine, pipeline, account = world(AdaptiveK(buffer=0, over=5))
    answer = await pipeline.ask(text, account)
    assert engine.calls[-1].messages[0]["content"] == "the code is 4\n\nWhat is the code?"
    receipt = answer.receipts[0]
    assert receipt.detail == {"passages": 4, "kept": [1]} and receipt.before and receipt.after
    assert (receipt.before, receipt.after) == (15, 8)
    assert receipt.spend.calls == 1 and answer.spend.calls == 2


async def test_short_messages_are_left_alone() -> None:
    engine, pipeline, account = world(AdaptiveK())
    answer = await pipeline.ask("One.\n\nTwo.\n\nWhy?", account)
    assert not answer.receipts[0].fired and "0 passages" in answer.receipts[0].reason
    assert answer.spend.calls == 1


async def test_a_buffer_that_covers_all_embeds_nothing() -> None:
    engine, pipeline, account = world(AdaptiveK(buffer=3))
    answer = await pipeline.ask("a", account, context=("a", "b", "c", "d"))
    assert answer.spend.calls == 1 and not answer.receipts[0].fired


async def test_the_embedding_is_billed_and_leaves_the_answer_its_room() -> None:
    passages = tuple(f"fact number {i} {w}" for i, w in enumerate(("velvet", "b", "c", "d", "e", "f")))
    engine, pipeline, account = world(AdaptiveK(buffer=0))
    answer = await pipeline.ask("velvet", account, context=passages)
    embedded = 1 + 4 * 6
    assert answer.receipts[0].spend.input == embedded
    assert answer.spend.input == embedded + 1 + 4 and answer.spend == account.settled
    # 25 + 25 do not fit into 30: all is kept, and the receipt says why
    engine, pipeline, account = world(AdaptiveK(buffer=0), Budget(input=30))
    answer = await pipeline.ask("velvet", account, context=passages)
    assert answer.spend.input == 25 and "all kept" in answer.receipts[0].reason
    _, strict, account = world(AdaptiveK(buffer=0), Budget(input=30), on_exceed="refuse")
    with pytest.raises(BudgetExceeded):
        await strict.ask("velvet", account, context=passages)
    assert not account.held and not account.settled
