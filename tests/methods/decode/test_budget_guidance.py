"""Budget guidance: the logits against arithmetic, the budget's end, records against the text, its plan and refusals."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speaking import Say
from steering import Never, Tap, endless, limited, plain, run, told

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Plan, PlanError, Sampling
from thrifty.ledger import MemoryLedger
from thrifty.methods.decode._length_predictor import Config, LengthPredictor, fingerprint
from thrifty.methods.decode.budget_forcing import BudgetForcing
from thrifty.methods.decode.budget_guidance import (
    NO_LIMIT,
    BudgetGuidance,
    BudgetGuidancePolicy,
    RecordingPolicy,
    Trace,
)

LAYERS = (1, 3)


def write(engine: Any, file: Path, boundary: str = "line", seed: int = 0, **changes: Any) -> LengthPredictor:
    """A predictor of random weights for the tiny thinker: a Gamma of its own for the letters a to m."""
    at = torch.Generator().manual_seed(seed)
    own = [engine.codec.encode(c)[0] for c in "abcdefghijklm"]
    f, k, h = 64 * len(LAYERS), len(own) + 1, 8
    runner = engine.runner
    config = Config("tiny-thinker", 64, runner.layers + 1, LAYERS, runner.vocab, boundary, h)
    config = Config(**{**config.__dict__, "fingerprint": fingerprint(runner.model), **changes})
    tensors = {
        "mean": torch.zeros(f),
        "scale": torch.ones(f),
        "into": torch.randn(h, f, generator=at) / 8,
        "into_bias": torch.zeros(h),
        "out": torch.randn(2 * k, h, generator=at) / 4,
        "out_bias": torch.cat([torch.full((k,), math.log(12.0)), torch.full((k,), math.log(3.0))]),
        "tokens": torch.tensor(own),
    }
    predictor = LengthPredictor(config, tensors)
    predictor.save(file)
    return predictor


@pytest.fixture
def trained(thinker: Any, tmp_path: Path) -> tuple[str, LengthPredictor]:
    file = tmp_path / "predictor.safetensors"
    predictor = write(thinker, file)
    return str(file), predictor


def thoughtful(engine: Any) -> Never:
    """Never ends, and neither opens nor closes a block of its own."""
    return Never([*engine.codec.ends, *engine.codec.encode("<think></think>")])


class Hidden(Tap):
    """Keeps the hidden states, too."""

    needs = frozenset({"hidden"})

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Any] = []

    def logits(self, branch: Any, logits: Any) -> Any:
        self.states.append(branch.hidden.clone())
        return super().logits(branch, logits)


# -- guiding ---------------------------------------------------------------------------------------------------


async def test_chances_are_multiplied_where_a_step_begins_and_nowhere_else(thinker: Any, trained: Any) -> None:
    file, predictor = trained
    text = "<think>xyz\ncdf\n\nghjk</think>a\nb"
    before, after = Hidden(), Tap()
    method = BudgetGuidance(most=40, predictor=file, keep=0)
    answer = await run(thinker, method, Say(text, lead=400.0), before, after=(after,), max_tokens=60)
    assert answer.thinking == "xyz\ncdf\n\nghjk" and answer.text == "a\nb"
    tag = thinker.codec.encode("</think>")[0]
    ids = thinker.codec.encode(text)
    starts = [0, 4, 8, 9]  # of the thinking's own tokens: first, after a line, after its blank line
    assert len(ids) == 1 + 13 + 1 + 3
    for at, (one, two) in enumerate(zip(before.shown, after.shown, strict=True)):
        if at - 1 not in starts:
            assert torch.equal(one, two), at
            continue
        factor = predictor.log_factor(before.states[at], 40 - (at - 1))
        factor[tag] = 0.0
        wanted = one.softmax(-1).double() * factor.exp()
        assert torch.allclose(two.double().softmax(-1), wanted / wanted.sum(), atol=1e-6), at
        assert not torch.equal(one, two)
    receipt = told(answer, method)
    assert receipt.fired and receipt.detail["guided"] == 4 and receipt.detail["shift"] >= 0
    p = before.shown[1].double().softmax(-1)
    p[tag] = 0
    assert receipt.detail["expected"] == pytest.approx(predictor.expected(before.states[1], p / p.sum()), abs=0.06)


async def test_a_smaller_budget_asks_for_shorter_thinking(thinker: Any, trained: Any) -> None:
    """P(v) with the smaller budget relative to the tag's never is higher, at the same place."""
    file, _ = trained
    tag, last = thinker.codec.encode("</think>")[0], None
    for most in (3, 8, 30, 200, 5000):
        after = Tap()
        await run(
            thinker, BudgetGuidance(most=most, predictor=file, keep=0), after=(after,), prefix="<think>\n", max_tokens=1
        )
        gaps = (after.shown[0] - after.shown[0][tag]).double()
        if last is not None:
            assert bool((gaps >= last - 1e-4).all()) and float((gaps - last).max()) > 1e-3
        last = gaps


async def test_without_a_limit_it_is_plain_sampling_bit_for_bit(thinker: Any, trained: Any) -> None:
    fields: dict[str, Any] = {"prefix": "<think>\n", "temperature": 1.0, "logprobs": True}
    method = BudgetGuidance(most=NO_LIMIT, keep=0, predictor=trained[0])
    with_it, without = await run(thinker, method, **fields), await plain(thinker, **fields)
    assert (with_it.tokens, with_it.logprobs) == (without.tokens, without.logprobs)
    assert not told(with_it, method).fired
    call = Call(({"role": "user", "content": "Why?"},), Account("t"), engines={"answer": thinker})
    assert method.ready(call)[1] == "no limit, nothing kept: thinking is left alone"

    class Endless(BudgetGuidancePolicy):
        """The same policy, its budget infinite, with every other step of it done."""

        def _guide(self, branch: Any, logits: Any, left: int) -> None:
            super()._guide(branch, logits, math.inf)  # type: ignore[arg-type]

    real = BudgetGuidance(most=900, keep=0, predictor=trained[0])
    policy = Endless(real, real.trained(call))
    policy.method = real.name
    forced = await plain(thinker, policy, **fields)
    assert (forced.tokens, forced.logprobs) == (without.tokens, without.logprobs)
    assert told(forced, real).detail["guided"] > 0 and told(forced, real).detail["shift"] == 0


# -- the budget's end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 17])
@pytest.mark.parametrize("begin", ["prefix", "model"])
async def test_thinking_is_never_longer_than_the_budget(thinker: Any, trained: Any, most: int, begin: str) -> None:
    method = BudgetGuidance(most=most, predictor=trained[0], keep=0)
    said: tuple[Any, ...] = () if begin == "prefix" else (Say("<think>" + "x" * 80),)
    never = () if said else (endless(thinker),)
    prefix = "<think>\n" if begin == "prefix" else None
    answer = await run(thinker, method, *said, *never, prefix=prefix, temperature=1.0, max_tokens=60)
    assert answer.spend.reasoning == most
    receipt = told(answer, method)
    assert receipt.fired and "forced at the budget's end" in receipt.reason and receipt.after == most


async def test_a_spent_budget_opens_no_second_block(thinker: Any, trained: Any) -> None:
    say = Say("<think>abcdefgh</think><think>ijk")
    answer = await run(thinker, BudgetGuidance(most=5, predictor=trained[0], keep=0), say, max_tokens=40)
    assert answer.spend.reasoning == 5 and answer.thinking == "abcd"
    opening, tokens = thinker.codec.encode("<think>")[0], list(answer.tokens or ())
    at = tokens.index(thinker.codec.encode("k")[0])  # the text went on to its end, so it offered a second block
    assert tokens.count(opening) == 1 and tokens[at - 2 : at] == thinker.codec.encode("ij")


async def test_a_tag_of_several_tokens_is_forced_so_that_it_fits(thinker: Any, trained: Any) -> None:
    method = BudgetGuidance(most=20, predictor=trained[0], keep=0, closing="</t>", opening="<t>", unknown="force")
    answer = await run(thinker, method, endless(thinker), prefix="<t>\n", temperature=1.0, max_tokens=60)
    receipt = told(answer, method)
    assert "</t>" in thinker.codec.decode(list(answer.tokens or ())[:20]) and receipt.after == 20
    assert "20 thinking tokens were used" in receipt.reason


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    resource=st.sampled_from(("output", "tokens", "calls", "reasoning", "input")),
    limit=st.one_of(st.sampled_from([0, 1, 2]), st.integers(3, 120)),
    most=st.integers(1, 30),
    tokens=st.integers(0, 24),
    keep=st.sampled_from([0, 3]),
    on_exceed=st.sampled_from(["degrade", "refuse"]),
)
def test_no_budget_is_exceeded(
    thinker_parts: Any, tmp_path: Path, resource: str, limit: int, most: int, tokens: int, keep: int, on_exceed: str
) -> None:
    from thrifty.engines.local.engine import LocalEngine

    async def once() -> None:
        engine = LocalEngine(*thinker_parts, "tiny-thinker", deterministic=True)
        file = tmp_path / "p.safetensors"
        if not file.exists():
            write(engine, file)
        method = BudgetGuidance(most=most, predictor=str(file), keep=keep)
        account = Account("t", Budget(**{resource: limit}))
        fields: dict[str, Any] = {"account": account, "on_exceed": on_exceed, "max_tokens": tokens, "temperature": 1.0}
        try:
            answer = await run(engine, method, prefix="<think>", **fields)
        except BudgetExceeded as refusal:
            assert refusal.resource == resource
        else:
            assert told(answer, method).reason and len(answer.tokens or ()) <= tokens
            assert account.settled == answer.spend and answer.spend.reasoning <= max(most, keep and most + 5)
        finally:
            await engine.aclose()
        assert getattr(account.settled, resource) <= limit and not account.held and not account.overdraft

    asyncio.run(once())


async def test_the_answer_keeps_its_room(thinker: Any, trained: Any) -> None:
    method = BudgetGuidance(most=500, predictor=trained[0], keep=8)
    account = limited(output=70)
    answer = await run(thinker, method, thoughtful(thinker), prefix="<think>\n", account=account, max_tokens=90)
    assert "what was left is the answer's" in told(answer, method).reason
    assert len(answer.tokens or ()) - answer.spend.reasoning >= 8 and account.settled.output <= 70


# -- records for training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("boundary", "starts"), [("line", [0, 4, 8, 9, 13]), ("paragraph", [0, 9]), ("token", None)])
async def test_a_record_has_the_states_at_the_starts_of_steps(thinker: Any, boundary: str, starts: Any) -> None:
    text = "<think>xyz\ncdf\n\nghj\n</think>yes"
    trace, before = Trace(), Hidden()
    policy = RecordingPolicy(trace, LAYERS, boundary, "<think>", "</think>")
    answer = await plain(thinker, Say(text), before, policy, max_tokens=60)
    ids = thinker.codec.encode("xyz\ncdf\n\nghj\n</think>")
    starts = list(range(len(ids))) if starts is None else starts
    assert trace.at == starts and trace.tokens == [ids[i] for i in starts]
    assert trace.length == len(ids) == answer.spend.reasoning
    for i, state in zip(starts, trace.states, strict=True):
        assert torch.equal(state, torch.cat([before.states[i + 1][layer] for layer in LAYERS]))
    assert answer.finish == "closed"


async def test_a_trace_that_was_not_closed_has_no_length(thinker: Any) -> None:
    trace = Trace()
    policy = RecordingPolicy(trace, (3,), "line", "<think>", "</think>")
    await plain(thinker, Say("<think>one two"), policy, max_tokens=6)
    assert trace.length is None and trace.at == [0]


# -- in a plan -------------------------------------------------------------------------------------------------


async def test_it_runs_below_another_family_and_the_ledger_sums(thinker: Any, trained: Any) -> None:
    from thrifty import registry

    ledger = MemoryLedger()
    account = Account("t", ledger=ledger)
    method = BudgetGuidance(most=9, predictor=trained[0], keep=0, begin="prefix")
    plan = Plan("p", (registry.get("budget-prompt")(), method)).build(thinker)
    answer = await plan.ask("Why?", account, sampling=Sampling(max_tokens=30, seed=2, temperature=1.0))
    assert [r.method for r in answer.receipts] == ["budget-prompt", "budget-guidance"]
    assert answer.spend == account.settled == next(iter(ledger.entries())).spend and answer.spend.reasoning <= 9


async def test_it_stacks_with_budget_forcing(thinker: Any, trained: Any) -> None:
    method = BudgetGuidance(most=12, predictor=trained[0], keep=0)
    forcing = BudgetForcing(most=6, keep=0, cue="")
    call = Call(({"role": "user", "content": "Why?"},), Account("t"), prefix="<think>\n")
    above = forcing.policies(call)
    for policy in above:
        policy.method = forcing.name
    answer = await run(thinker, method, thoughtful(thinker), *above, prefix="<think>\n", max_tokens=40)
    assert told(answer, forcing).fired and told(answer, method).fired and answer.spend.reasoning <= 12


async def test_the_settings_of_a_run_are_in_its_key(thinker: Any, trained: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write(thinker, other, seed=1)
    call = Call(({"role": "user", "content": "Why?"},), Account("t"), engines={"answer": thinker})
    keys = [
        BudgetGuidance(most=most, predictor=str(file)).policies(call)[0].key()
        for most, file in itertools.product((5, 6), (trained[0], other))
    ]
    assert len(set(keys)) == 4
    before = BudgetGuidance(predictor=str(other)).policies(call)[0].key()
    write(thinker, other, seed=2)
    assert BudgetGuidance(predictor=str(other)).policies(call)[0].key() != before  # the file's digest is part of it


async def test_what_cannot_guide_is_refused_before_anything_is_spent(thinker: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write(thinker, other, model="another", fingerprint=tuple([0.5] * 64))
    for settings_, match in (
        ({}, r"no predictor ships with model tiny-thinker: train one"),
        ({"predictor": "thinker"}, r"train one with|trained on model"),
        ({"predictor": str(tmp_path / "none")}, "there is no such file"),
        ({"predictor": str(other)}, r"trained on model another .* and the plan runs tiny-thinker"),
    ):
        account = Account("t")
        plan = Plan("p", (BudgetGuidance(**settings_),)).build(thinker)  # type: ignore[arg-type]
        with pytest.raises(PlanError, match=match) as refused:
            await plan.ask("Why?", account)
        assert not account.settled and "\n" not in str(refused.value)
    write(thinker, other)
    with pytest.raises(InvalidInput, match="SHA-256"):
        await Plan("p", (BudgetGuidance(predictor=str(other), sha256="00ff"),)).build(thinker).ask("Why?")
    for knobs in ({"most": 0}, {"most": NO_LIMIT + 1}, {"closing": ""}):
        with pytest.raises(InvalidInput, match=next(iter(knobs))):
            BudgetGuidance(**knobs)  # type: ignore[arg-type]


async def test_a_model_that_does_not_think_is_told(thinker: Any, trained: Any) -> None:
    method = BudgetGuidance(most=9, predictor=trained[0])
    answer = await run(thinker, method, Say("no thoughts"), max_tokens=20)
    assert not told(answer, method).fired and told(answer, method).reason == "the model did not think"
