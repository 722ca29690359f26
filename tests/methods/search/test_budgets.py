"""No search ever exceeds its account: every method of the family, random budgets of every kind, 0 and 1 included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, Plan, Sampling, registry
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedEngine
from thrifty.ledger import MemoryLedger

NAMES = [name for name, source in registry.sources().items() if source.family == "search"]
SCRIPTED = [name for name in NAMES if registry.get(name).needs <= PROVIDES]
ON_A_MODEL = [name for name in NAMES if name not in SCRIPTED]
SPEND = ("tokens", "input", "output", "reasoning", "calls", "usd")
WORK = ("prefill", "target_passes")
KNOBS: Mapping[str, Mapping[str, Any]] = {
    "beam": {"step_tokens": 6, "keep": 8},
    "a-star-decoding": {"step_tokens": 6, "keep": 8},
    "self-certainty": {"step_tokens": 4, "keep": 8},
    "latent-trajectory": {"samples": 3, "segment": 2, "threshold": 9.0},
    "first-finish-search": {"keep": 8},
}
VERIFIED = {name: {**KNOBS.get(name, {}), "score": "verifier"} for name in ("best-of-n", "beam", "a-star-decoding")}
VERIFIED["fractured-sampling"] = {"select": "verifier"}


class Penny:
    """A price for every token, so that money runs out too."""

    def with_price(self, spend: Any, model: str, role: str = "answer") -> Any:
        from dataclasses import replace

        return replace(spend, usd=2 * spend.input + 5 * spend.output)


def script(call: Call, draw: Draw) -> Reply:
    if "Is the solution correct?" in call.question():
        return Reply(draw.choice(["\\boxed{correct} Is the solution correct? yes", "purr " * 9, "\\boxed{incorrect}"]))
    steps = "\n\n".join(" ".join(["w"] * draw.randint(1, 7)) for _ in range(draw.randint(1, 4)))
    return Reply(f"{steps} #### {draw.randint(1, 3)}", thinking="hm " * draw.randint(0, 9))


async def within(method: Any, engines: Any, resource: str, limit: int, on_exceed: str, max_tokens: int) -> None:
    plan = Plan("b", (method,), Budget(**{resource: limit}), on_exceed=on_exceed)  # type: ignore[arg-type]
    account = Account("t", ledger=MemoryLedger())
    sampling = Sampling(seed=3, max_tokens=max_tokens)
    try:
        answer = await plan.build(engines).ask("one two three", account, sampling=sampling)
    except BudgetExceeded as error:
        assert error.resource == resource
    else:
        assert answer.spend == account.settled
        assert len([r for r in answer.receipts if r.method == method.name]) == 1
    spent = account.settled if resource in SPEND else account.work
    assert getattr(spent, resource) <= limit, f"{resource} {limit}: {spent}"
    assert not account.held and not account.overdraft


@pytest.mark.parametrize("name", SCRIPTED)
@given(
    st.sampled_from(SPEND + WORK),
    st.one_of(st.integers(0, 3), st.integers(0, 400)),
    st.sampled_from(["degrade", "refuse"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 60),
)
@example("tokens", 0, "degrade", True, False, 30)
@example("output", 1, "degrade", False, True, 30)
@settings(max_examples=60, deadline=None)
async def test_no_search_exceeds_its_account(
    name: str, resource: str, limit: int, on_exceed: str, forks: bool, verified: bool, max_tokens: int
) -> None:
    knobs = VERIFIED.get(name, KNOBS.get(name, {})) if verified else KNOBS.get(name, {})
    limit = {"calls": limit // 20, "usd": 4 * limit}.get(resource, limit)
    capabilities = PROVIDES if forks else PROVIDES - {"branch"}
    engine = ScriptedEngine(script, capabilities=capabilities, prices=Penny())
    engines = {"answer": engine, "scorer": ScriptedEngine(script, model="checker", prices=Penny())}
    await within(registry.get(name).from_settings(knobs), engines, resource, limit, on_exceed, max_tokens)


@pytest.mark.parametrize("name", ON_A_MODEL)
async def test_nor_do_those_that_need_tensors(searched: Any, name: str) -> None:
    method = registry.get(name).from_settings(KNOBS.get(name, {}))
    for resource in (*SPEND[:5], *WORK):
        for limit in (0, 1, 2, 17, 70, 150):
            for on_exceed in ("degrade", "refuse"):
                await within(method, searched, resource, limit, on_exceed, 12)


@pytest.mark.parametrize("name", NAMES)
async def test_memory_is_never_taken_beyond_its_limit(searched: Any, name: str) -> None:
    """KV bytes are claimed before they are taken: fewer branches, a shorter answer, or a refusal."""
    entry = searched.entry_nbytes
    method = registry.get(name).from_settings(KNOBS.get(name, {}))
    for entries in (0, 128, 256, 400, 700):
        account = Account("t", Budget(kv_bytes_peak=entries * entry), ledger=MemoryLedger())
        pipeline = Plan("b", (method,)).build({"answer": searched, "scorer": searched})
        try:
            answer = await pipeline.ask("one two three", account, sampling=Sampling(seed=3, max_tokens=12))
        except BudgetExceeded as error:
            assert error.resource == "kv_bytes_peak"
        else:
            assert answer.spend == account.settled
        assert account.work.kv_bytes_peak <= entries * entry and not account.held
