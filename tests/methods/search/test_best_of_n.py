"""Best of n: which answer is chosen, against a sort by hand; what a verifier that answers nonsense does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, InvalidInput, Plan, PlanError, Sampling
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.search._samples import seed_of
from thrifty.methods.search.best_of_n import BestOfN, choose

BARE = PROVIDES - {"branch"}
YES, NO = (
    "Step 1: \\boxed{correct} Is the solution correct? yes",
    "Step 1: \\boxed{incorrect} Is the solution correct? no",
)


def world(
    rows: list[str | Reply], check: object = YES, budget: Budget | None = None, branches: bool = True, **knobs: object
):  # type: ignore[no-untyped-def]
    by_seed = {seed_of(3, i): row for i, row in enumerate(rows)}

    def script(call: Call, draw: Draw) -> str | Reply:
        return by_seed[call.sampling.seed]

    engine = ScriptedEngine(script, capabilities=PROVIDES if branches else BARE)
    scorer = ScriptedEngine(check, model="checker", capabilities=PROVIDES - {"logprobs"})  # type: ignore[arg-type]
    knobs.setdefault("samples", len(rows))
    plan = Plan("bon", (BestOfN(**knobs),), budget or Budget())  # type: ignore[arg-type]
    return scorer, plan.build({"answer": engine, "scorer": scorer}), Account("t", ledger=MemoryLedger())


async def ask(pipeline, account, **sampling: object):  # type: ignore[no-untyped-def]
    return await pipeline.ask("one two three", account, sampling=Sampling(seed=3, **sampling))  # type: ignore[arg-type]


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=6
    )
)
def test_the_choice_is_that_of_a_search_through_all(rows: list[tuple[str, float, bool]]) -> None:
    answers = [Answer(f"#### {text}", finish="stop" if whole else "length") for text, _, whole in rows]
    scores = [score for _, score, _ in rows]
    pool = [i for i, r in enumerate(rows) if r[2]] or list(range(len(rows)))
    assert choose(answers, scores, "best") == next(i for i in pool if scores[i] == max(scores[j] for j in pool))
    chosen = choose(answers, scores, "weighted")
    totals = {text: sum(scores[i] for i in pool if rows[i][0] == text) for text in {rows[i][0] for i in pool}}
    assert chosen in pool and totals[rows[chosen][0]] == max(totals.values())


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("right", range(3))
async def test_a_verifier_that_knows_finds_the_right_answer_wherever_it_stands(branches: bool, right: int) -> None:
    rows: list[str | Reply] = [f"so it is #### {'42' if i == right else 7 + i}" for i in range(3)]

    def check(call: Call, draw: Draw) -> str:
        return YES if "#### 42" in call.question() else NO

    scorer, pipeline, account = world(rows, check, branches=branches, score="verifier")
    answer = await ask(pipeline, account)
    assert answer.text.endswith("#### 42")
    receipt = answer.receipts[-1]
    assert receipt.fired and receipt.detail["chosen"] == right and receipt.detail["verified"] == 3
    spent = [e for e in account.ledger.entries() if e.labels.method == "best-of-n"]  # type: ignore[union-attr]
    assert {e.labels.role for e in spent} == {"scorer"} and receipt.spend == sum(
        (e.spend for e in spent), start=type(receipt.spend)()
    )
    assert answer.spend == account.settled and not account.held


async def test_equal_answers_are_checked_once() -> None:
    scorer, pipeline, account = world(["#### 1", "#### 1", "#### 2"], score="verifier")
    await ask(pipeline, account)
    assert len(scorer.calls) == 2


@pytest.mark.parametrize("nonsense", ["", "Cats purr.", "\\boxed{12}", "yes no yes"])
async def test_a_verifier_that_answers_nonsense_leaves_the_first_answer_and_a_receipt_says_so(nonsense: str) -> None:
    scorer, pipeline, account = world(["#### 1", "#### 2"], nonsense, score="verifier")
    answer = await ask(pipeline, account)
    assert answer.text == "#### 1"
    assert "could not be read in 2 of 2 checks: 0.5 stands for those" in answer.receipts[-1].reason
    assert answer.receipts[-1].detail["scores"] == [0.5, 0.5]


async def test_a_budget_without_room_for_checks_is_told() -> None:
    scorer, pipeline, account = world(["#### 1", "#### 2"], score="verifier", budget=Budget(calls=2))
    answer = await ask(pipeline, account)
    assert answer.spend.calls == 2 and "the budget held no check of 2 of 2 solutions" in answer.receipts[-1].reason


async def test_confidence_is_the_geometric_mean_of_the_tokens_probabilities() -> None:
    scorer, pipeline, account = world(["a b c #### 1", "d e f #### 2", "g #### 3"])
    answer = await ask(pipeline, account, logprobs=True)
    scores = answer.receipts[-1].detail["scores"]
    assert answer.logprobs is not None
    product = 1.0
    for p in answer.logprobs:
        product *= 2.718281828459045**p
    assert max(scores) == pytest.approx(product ** (1 / len(answer.logprobs)), abs=1e-6)
    assert not scorer.calls
    assert (await ask(pipeline, Account("u"))).logprobs is None  # what only the method asked for is not shown


@given(
    st.sampled_from(["tokens", "output", "input", "calls"]),
    st.integers(0, 60),
    st.booleans(),
    st.sampled_from(["best", "weighted"]),
)
@settings(max_examples=60, deadline=None)
async def test_no_budget_is_exceeded(resource: str, limit: int, branches: bool, pick: str) -> None:
    rows: list[str | Reply] = ["w " * 9 + "#### 1", "w " * 4 + "#### 2", "#### 3"]
    scorer, pipeline, account = world(
        rows, budget=Budget(**{resource: limit}), branches=branches, score="verifier", pick=pick
    )
    try:
        answer = await ask(pipeline, account)
    except BudgetExceeded:
        pass
    else:
        assert answer.spend == account.settled
    assert getattr(account.settled, resource) <= limit and not account.held and not account.overdraft


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match="samples = 0"):
        BestOfN(samples=0)
    with pytest.raises(PlanError, match="scorer"):
        Plan("p", (BestOfN(score="verifier"),)).build(ScriptedEngine("a"))
    for a, b in itertools.pairwise([BestOfN(), BestOfN(score="verifier")]):
        assert a != b and "logprobs" in a.needs and "logprobs" not in b.needs
