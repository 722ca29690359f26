"""Beam search against a beam over the whole tree in plain Python, and its budgets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Plan, Sampling
from thrifty.engines.scripted import PROVIDES, Draw, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.search._samples import seed_of
from thrifty.methods.search.beam import Beam

BARE = PROVIDES - {"branch"}
DEPTH = 3
HARD = PROVIDES - {"logprobs"}
"""a verifier whose probabilities cannot be read: its score is 1 or 0"""


def child(prefix: str, index: int) -> str:
    """The tree: the step that the index-th request for a prefix gets; "" when the solution has ended."""
    depth = prefix.count("\n\n")
    if depth == DEPTH:
        return ""
    return f"step{depth} {random.Random(f'{prefix}/{index}').randint(0, 9)}"


def tree(call: Call, draw: Draw) -> str:
    if call.sampling.seed is None and call.sampling.stop:
        return child(call.prefix or "", draw.index) + "\n\n"
    got = (call.prefix or "").count("\n\n")
    return "\n\n".join(f"step{d} {draw.randint(0, 9)}" for d in range(got, DEPTH))


def good(text: str) -> bool:
    digits = [int(w) for line in text.splitlines() for w in line.split()[-1:] if w.isdigit()]
    return sum(digits) >= 5 * len(digits)


def check(call: Call, draw: Draw) -> str:
    solution = call.question().partition("<solution>")[2].partition("</solution>")[0]
    return f"Is the solution correct? {'yes' if good(solution) else 'no'}"


def world(
    budget: Budget | None = None, forks: bool = True, on_exceed: str = "degrade", script: object = tree, **knobs: object
):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine(script, capabilities=PROVIDES if forks else BARE)  # type: ignore[arg-type]
    scorer = ScriptedEngine(check, model="checker", capabilities=HARD)
    plan = Plan("beam", (Beam(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build({"answer": engine, "scorer": scorer}), Account("t", ledger=MemoryLedger())


async def ask(pipeline, account, seed: int | None = 3, **sampling: object):  # type: ignore[no-untyped-def]
    return await pipeline.ask("one two three", account, sampling=Sampling(seed=seed, **sampling))  # type: ignore[arg-type]


def beam_by_hand(width: int, each: int) -> str:
    kept = [("", False)]
    first = True
    while not all(done for _, done in kept):
        pool = [k for k in kept if k[1]]
        for prefix, done in kept:
            if not done:
                seen = []
                for i in range(width * each if first else each):
                    step = child(prefix, i)
                    new = (prefix + step + "\n\n", False) if step else (prefix.removesuffix("\n\n"), True)
                    if new not in seen:
                        seen.append(new)
                pool += seen
        first = False
        kept = sorted(pool, key=lambda k: not good(k[0]))[:width]  # stable: ties go to the earlier
    return kept[0][0]


@pytest.mark.parametrize(("width", "each"), [(1, 2), (2, 1), (2, 2), (3, 2), (1, 6)])
async def test_calls_walk_the_tree_as_a_beam_by_hand_does(width: int, each: int) -> None:
    engine, pipeline, account = world(forks=False, score="verifier", width=width, branches=each)
    answer = await ask(pipeline, account, seed=None)
    assert answer.text == beam_by_hand(width, each)
    assert answer.spend == account.settled and not account.held


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("score", ["confidence", "verifier"])
@pytest.mark.parametrize(("width", "each"), [(1, 3), (2, 2), (3, 1)])
async def test_it_ends_with_a_whole_solution_and_every_token_is_accounted_for(
    forks: bool, score: str, width: int, each: int
) -> None:
    engine, pipeline, account = world(forks=forks, score=score, width=width, branches=each)
    answer = await ask(pipeline, account)
    assert [line[:5] for line in answer.text.split("\n\n")] == ["step0", "step1", "step2"]
    assert answer.finish == "stop" and answer.spend == account.settled and not account.held
    receipt = answer.receipts[-1]
    assert receipt.fired and receipt.after >= DEPTH
    checks = [e.spend for e in account.ledger.entries() if e.labels.method == "beam"]  # type: ignore[union-attr]
    assert receipt.spend == sum(checks, start=type(receipt.spend)()) and bool(checks) == (score == "verifier")


@pytest.mark.parametrize("seed", range(8))
async def test_branches_choose_among_all_that_were_drawn(seed: int) -> None:
    """One level of six forks: the answer's first step is good when one of the six is, the first such one."""
    engine, pipeline, account = world(score="verifier", width=1, branches=6, steps=1)
    answer = await ask(pipeline, account, seed=seed)
    asked = engine.calls[0]
    drawn = [tree(asked.with_sampling(seed=s), engine._draw(asked, s)) for s in (seed_of(seed, i) for i in range(6))]
    firsts = [text.split("\n\n")[0] for text in drawn]
    assert answer.text.split("\n\n")[0] == next((step for step in firsts if good(step)), firsts[0])


async def test_one_prefill_and_shared_steps() -> None:
    engine, pipeline, account = world(width=2, branches=2)
    answer = await ask(pipeline, account)
    assert answer.spend.input - answer.spend.cached == 3  # the prompt, once
    assert answer.work.prefill == 3


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("on_exceed", ["degrade", "refuse"])
@given(
    st.sampled_from(["tokens", "output", "input", "calls"]),
    st.integers(0, 260),
    st.sampled_from(["confidence", "verifier"]),
)
@settings(max_examples=40, deadline=None)
async def test_no_budget_is_exceeded(forks: bool, on_exceed: str, resource: str, limit: int, score: str) -> None:
    limit = limit // 12 if resource == "calls" else limit
    engine, pipeline, account = world(Budget(**{resource: limit}), forks, on_exceed, score=score, step_tokens=5, keep=6)
    try:
        answer = await ask(pipeline, account, max_tokens=30)
    except BudgetExceeded as error:
        assert error.resource == resource
    else:
        assert answer.spend == account.settled and answer.text
        assert len([r for r in answer.receipts if r.method == "beam"]) == 1
    assert getattr(account.settled, resource) <= limit and not account.held and not account.overdraft


@pytest.mark.parametrize("forks", [True, False])
async def test_a_tight_budget_leaves_the_end_of_the_answer_its_tokens(forks: bool) -> None:
    long = "\n\n".join(["w " * 20 + "w"] * 4)
    engine, pipeline, account = world(
        Budget(output=260), forks, script=long, width=2, branches=2, keep=90, step_tokens=21
    )
    answer = await ask(pipeline, account)
    assert answer.text == long and answer.finish == "stop"
    assert account.settled.output <= 260


async def test_an_engine_that_can_do_neither_answers_plainly_and_says_so() -> None:
    engine = ScriptedEngine("plain", capabilities=BARE - {"continue"})
    answer = await Plan("p", (Beam(),)).build(engine).ask("one")
    assert answer.text == "plain" and not answer.receipts[-1].fired and "neither branches" in answer.receipts[-1].reason


async def test_thinking_is_carried_from_call_to_call() -> None:
    """An engine that shows thinking apart, and whose steps are calls: the blocks are put together again."""
    whole = "<think>a b\n\nc d</think>e f\n\ng h"

    def script(call: Call, draw: Draw) -> str:
        return whole[len(call.prefix or "") :]

    engine = ScriptedEngine(script, capabilities=BARE)
    plan = Plan("p", (Beam(width=1, branches=2, step_tokens=2),))
    answer = await plan.build(engine).ask("one", sampling=Sampling(seed=1))
    assert answer.thinking == "a b\n\nc d" and answer.text == "e f\n\ng h"


def test_bad_input() -> None:
    for knobs in ({"width": 0}, {"branches": 0}, {"steps": 0}, {"delimiter": ""}, {"step_tokens": 0}):
        with pytest.raises(InvalidInput, match=next(iter(knobs))):
            Beam(**knobs)  # type: ignore[arg-type]
