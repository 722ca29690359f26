"""Every method that steers thinking: budgets are never exceeded, room is kept, a model without the tags is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speaking import Say
from steering import limited, plain, run, told

from thrifty import Account, Budget, BudgetExceeded, Call, Plan, PlanError, Sampling, registry
from thrifty.ledger import MemoryLedger
from thrifty.methods.decode.adaptive_think import AdaptiveThink
from thrifty.methods.decode.cgrs import CGRS
from thrifty.methods.decode.cyclic_reflex import CyclicReflex
from thrifty.methods.decode.soft_thinking import SoftThinking
from thrifty.methods.decode.swi_reasoning import SwiReasoning
from thrifty.policy import DecodePolicy
from thrifty.spend import total_spend

METHODS: tuple[Any, ...] = (
    CyclicReflex(words=("a", "e"), period=4),
    CGRS(words=("a", "e"), threshold=0.0, boundary="token", cue="=", probe_tokens=2, every=3),
    AdaptiveThink(options=("a", "e"), alpha=0.5, boundary="token", merge=3, cue="="),
    AdaptiveThink(alpha=0.5, boundary="token", merge=3, cue="{", probe_tokens=3),
    SoftThinking(tau=0.5, length=3),
    SwiReasoning(window=1, switches=1, answer=4, final="So"),
)
NAMES = [f"{m.name}{i}" for i, m in enumerate(METHODS)]
RESOURCES = ("output", "tokens", "calls", "reasoning", "input")


@pytest.fixture(scope="session")
def loops() -> Any:
    """One event loop for the property test: the engine's answers come back to it."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    resource=st.sampled_from(RESOURCES),
    limit=st.one_of(st.sampled_from([0, 1, 2]), st.integers(3, 120)),
    most=st.integers(0, 24),
    keep=st.sampled_from([0, 3]),
    on_exceed=st.sampled_from(["degrade", "refuse"]),
)
def test_no_budget_is_exceeded(
    thinker_parts: Any, loops: Any, method: Any, resource: str, limit: int, most: int, keep: int, on_exceed: str
) -> None:
    from thrifty.engines.local.engine import LocalEngine

    async def once() -> None:
        engine = LocalEngine(*thinker_parts, "tiny-thinker", deterministic=True)
        account = Account("t", Budget(**{resource: limit}))
        fields: dict[str, Any] = {"account": account, "on_exceed": on_exceed, "max_tokens": most, "temperature": 1.0}
        try:
            answer = await run(engine, replace(method, keep=keep), prefix="<think>", **fields)
        except BudgetExceeded as refusal:
            assert refusal.resource == resource
        else:
            assert told(answer, method).reason and len(answer.tokens or ()) <= most
            own = answer.spend + sum((r.spend for r in answer.receipts), start=type(answer.spend)())
            assert account.settled == own
        finally:
            await engine.aclose()
        assert getattr(account.settled, resource) <= limit and not account.held and not account.overdraft

    loops.run_until_complete(once())


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
async def test_the_answer_keeps_its_room(thinker: Any, method: Any) -> None:
    """Thinking that would go on for ever is closed, and the answer gets what was kept for it, probes paid."""

    class Endless(DecodePolicy):
        """No end, and no tag of the model's own."""

        def logits(self, branch: Any, logits: Any) -> Any:
            logits[[*thinker.codec.ends, *thinker.codec.encode("<think></think>")]] = -1e4
            return logits

    cold = replace(method, tau=0.0) if isinstance(method, SoftThinking) else method
    cold = replace(cold, switches=0) if isinstance(method, SwiReasoning) else cold
    cold = replace(cold, alpha=1e-6) if isinstance(method, AdaptiveThink) else cold
    account = limited(output=70)
    answer = await run(thinker, replace(cold, keep=8), Endless(), prefix="<think>\n", account=account, max_tokens=90)
    assert "thinking was closed: what was left is the answer's" in told(answer, method).reason
    assert answer.finish == "budget" and len(answer.tokens or ()) - answer.spend.reasoning >= 8
    assert account.settled.output <= 70


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_model_without_the_tags_is_refused_by_the_names_of_the_knobs(thinker_parts: Any, method: Any) -> None:
    from thrifty.engines.local.engine import LocalEngine

    engine = LocalEngine(*thinker_parts, "tiny", deterministic=True)
    call = Call(({"role": "user", "content": "Why?"},), Account("t"), engines={"answer": engine})
    assert replace(method).ready(call)[1] is None
    with pytest.raises(PlanError, match="knobs opening and closing"):
        replace(method, opening="<reason>", closing="</reason>").ready(call)
    told_why = replace(method, opening="<reason>", closing="</reason>", unknown="skip").ready(call)[1]
    assert told_why is not None and "does not think" in told_why
    asyncio.run(engine.aclose())


@pytest.mark.parametrize("method", [m for m in METHODS if m.identity], ids=[m.name for m in METHODS if m.identity])
async def test_identities_hold_through_the_policy_too(thinker: Any, method: Any) -> None:
    """Without the shortcut that attaches nothing: the same tokens and log-probabilities, bit for bit."""
    fields: dict[str, Any] = {"prefix": "<think>\n", "temperature": 1.0, "logprobs": True, "max_tokens": 30}
    noop = replace(method, **method.identity)
    assert "left alone" in (why := noop.ready(_call(thinker))[1]) or "below" in why or "enough" in why or "soft" in why
    with_it, without = await run(thinker, noop, **fields), await plain(thinker, **fields)
    assert (with_it.tokens, with_it.logprobs) == (without.tokens, without.logprobs)
    assert not told(with_it, method).fired


def _call(engine: Any) -> Call:
    return Call(({"role": "user", "content": "Why?"},), Account("t"), engines={"answer": engine})


async def test_a_plan_runs_them_below_another_family_and_the_ledger_sums(thinker: Any) -> None:
    for method in METHODS:
        ledger = MemoryLedger()
        account = Account("t", ledger=ledger)
        own = replace(method, keep=0, begin="prefix")
        plan = Plan("p", (registry.get("budget-prompt")(), own)).build(thinker)
        answer = await plan.ask("Why?", account, sampling=Sampling(max_tokens=30, seed=2, temperature=1.0))
        names = [r.method for r in answer.receipts]
        assert names.count(method.name) == 1 and "budget-prompt" in names
        receipt = told(answer, method)
        probes = total_spend(e.spend for e in ledger.entries() if e.labels.method == method.name)
        assert receipt.spend == probes and account.settled == total_spend(e.spend for e in ledger.entries())


async def test_two_that_steer_stack(thinker: Any) -> None:
    """A penalty on words, above Soft Thinking, changes what is mixed."""
    wave = CyclicReflex(words=("as", "g"), amplitude=20.0, shape="constant", keep=0)
    call = Call(({"role": "user", "content": "Why?"},), Account("t"), prefix="<think>\n")
    above = wave.policies(call)
    for policy in above:
        policy.method = wave.name
    soft = SoftThinking(tau=0.0, keep=0, temperature=2.0)
    both = await run(thinker, soft, *above, prefix="<think>\n", max_tokens=20)
    alone = await run(thinker, soft, prefix="<think>\n", max_tokens=20)
    assert told(both, wave).fired and told(both, soft).fired and both.tokens != alone.tokens


async def test_say_is_heard_through_all_of_them(thinker: Any) -> None:
    """A model that is sure of its words says them under each method; only mixtures and closings may differ."""
    for method in METHODS[:2]:
        answer = await run(thinker, replace(method, keep=0), Say("<think>one</think>two"), max_tokens=60)
        assert (answer.thinking, answer.text) == ("one", "two")
