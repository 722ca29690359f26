"""Adaptive Think: the entropy against scipy and a grid, the probe against a fresh run, where it stops against alpha."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from speaking import Say
from steering import Tap, limited, plain, run, told

from thrifty import InvalidInput
from thrifty.methods.decode.adaptive_think import AdaptiveThink, answer_entropy, stops

TEXT = "<think>one\n\ntwo\n\nthree\n\nfour</think>five"
STEPS = ("<think>one\n\n", "<think>one\n\ntwo\n\n", "<think>one\n\ntwo\n\nthree\n\n")


@settings(deadline=None)
@given(chances=st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda q: sum(q) > 1e-6))
def test_the_entropy_is_scipys_over_what_is_possible(chances: list[float]) -> None:
    nats, n = scipy_entropy(chances), len(chances)
    assert answer_entropy(chances, "log") == pytest.approx(nats / math.log(n), abs=1e-9)
    # the average of -q log2 q, against the largest value of that curve, found on a grid
    most = max(-q * math.log2(q) for q in (i / 10_000 for i in range(1, 10_001)))
    assert answer_entropy(chances) == pytest.approx(nats / math.log(2) / n / most, abs=1e-6)


@settings(deadline=None)
@given(
    entropies=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=12),
    alphas=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    least=st.integers(1, 4),
)
def test_a_larger_alpha_never_thinks_longer(entropies: list[float | None], alphas: list[float], least: int) -> None:
    def length(alpha: float) -> int:
        ends = (i for i in range(1, len(entropies) + 1) if stops(entropies[:i], alpha, least))
        return next(ends, len(entropies) + 1)

    low, high = sorted(alphas)
    assert length(high) <= length(low) <= length(0.0) == len(entropies) + 1
    assert length(high) >= min(least, len(entropies) + 1)


async def chosen(thinker: Any, options: tuple[str, ...], cue: str) -> list[float]:
    """The entropies of the steps, from fresh prefills: probabilities of the options' tokens, renormalised."""
    found = []
    for before in STEPS:
        tap = Tap()
        await plain(thinker, tap, prefix=f"{before}\n</think>\n\n{cue}", max_tokens=1)
        chances = tap.shown[0].double().softmax(-1)
        picked = [float(chances[thinker.codec.encode(option)[0]]) for option in options]
        found.append(scipy_entropy(picked) / math.log(len(options)))
    return found


async def test_it_stops_at_the_first_step_whose_answer_is_sure(thinker: Any) -> None:
    options = ("A", "B", "C", "D")
    knobs: dict[str, Any] = {"options": options, "merge": 0, "cue": "So: ", "norm": "log", "keep": 0}
    expected = await chosen(thinker, options, "So: ")
    never = AdaptiveThink(alpha=1e-9, **knobs)
    whole = await run(thinker, never, Say(TEXT), max_tokens=100)
    assert whole.text == "five" and told(whole, never).detail["entropies"] == pytest.approx(expected, abs=2e-5)
    assert not told(whole, never).fired
    order = sorted(range(3), key=lambda i: expected[i])
    alpha = (expected[order[0]] + expected[order[1]]) / 2
    stopped = AdaptiveThink(alpha=alpha, **knobs)
    answer = await run(thinker, stopped, Say(TEXT), max_tokens=100)
    receipt = told(answer, stopped)
    first = order[0]
    assert receipt.fired and "below alpha" in receipt.reason and receipt.detail["probes"] == first + 1
    assert answer.thinking.strip() == STEPS[first].removeprefix("<think>").strip()
    assert answer.text.startswith("So: ") and receipt.detail["at"][-1] <= receipt.after
    assert receipt.detail["gain"] == pytest.approx(expected[0] - expected[first], abs=2e-5)
    assert receipt.spend.calls == first + 1


async def test_a_free_answer_is_weighed_token_by_token_among_the_likeliest(thinker: Any) -> None:
    cue = "{"
    method = AdaptiveThink(alpha=1e-9, merge=0, cue=cue, probe_tokens=8, keep=0, candidates=4)
    receipt = told(await run(thinker, method, Say(TEXT), max_tokens=100), method)
    assert receipt.detail["no_answer"] == 3 == receipt.detail["probes"] and "entropies" not in receipt.detail
    assert "3 trial answers never closed: thinking went on" in receipt.reason and not receipt.fired
    tap = Tap()
    await plain(thinker, tap, prefix=STEPS[0] + "\n</think>\n\n{", max_tokens=8)
    policy: Any = method.policy(None)  # type: ignore[arg-type]
    for row in tap.shown:
        top = sorted(row.double().softmax(-1).tolist())[-4:]
        assert policy._free(row) == pytest.approx(scipy_entropy(top) / 4 * math.e, abs=1e-9)


@pytest.fixture
async def bracing(thinker_parts: tuple[Any, Any]) -> AsyncIterator[Any]:
    """The tiny model, likelier to say a closing brace, so that its trial answers close."""
    from thrifty.engines.local.engine import LocalEngine
    from thrifty.engines.local.load import attach

    runner, tokenizer = thinker_parts
    model = type(runner.model)(runner.model.config)
    model.load_state_dict(runner.model.state_dict())
    brace = tokenizer("}")["input_ids"][0]
    with torch.no_grad():
        model.lm_head.weight[brace] *= 3.5
        model.lm_head.weight /= 20  # less sure of everything
    engine = LocalEngine(attach(model.eval()), tokenizer, "tiny-bracing", deterministic=True)
    yield engine
    await engine.aclose()


async def test_a_free_answer_that_closes_its_brace_can_stop_thinking(bracing: Any) -> None:
    knobs: dict[str, Any] = {"merge": 0, "cue": "{", "probe_tokens": 12, "keep": 0, "candidates": 4}
    brace = bracing.codec.encode("}")[0]
    expected: list[float | None] = []
    for before in STEPS:
        tap = Tap()
        said = (await plain(bracing, tap, prefix=f"{before}\n</think>\n\n{{", max_tokens=12)).tokens or ()
        until = said.index(brace) + 1 if brace in said else None
        tops = [sorted(row.double().softmax(-1).tolist())[-4:] for row in tap.shown[:until]]
        values = [scipy_entropy(top) / 4 * math.e for top in tops]
        expected.append(sum(values) / len(values) if until else None)
    known = [h for h in expected if h is not None]
    assert len(known) >= 2 and len(set(known)) == len(known)
    never = AdaptiveThink(alpha=1e-9, **knobs)
    assert told(await run(bracing, never, Say(TEXT), max_tokens=100), never).detail["entropies"] == [
        h if h is None else pytest.approx(h, abs=2e-5) for h in expected
    ]
    least = min(range(3), key=lambda i: expected[i] if expected[i] is not None else math.inf)
    sure = AdaptiveThink(alpha=min(known) + 1e-4, **knobs)
    answer = await run(bracing, sure, Say(TEXT), max_tokens=100)
    assert answer.thinking.strip() == STEPS[least].removeprefix("<think>").strip() and answer.text.startswith("{")
    assert told(answer, sure).fired


async def test_steps_are_joined_and_the_first_ones_may_not_stop(thinker: Any) -> None:
    knobs: dict[str, Any] = {"options": ("A", "B"), "alpha": 1.0, "cue": "", "keep": 0}
    joined = AdaptiveThink(merge=9, **knobs)
    receipt = told(await run(thinker, joined, Say(TEXT), max_tokens=100), joined)
    assert receipt.detail["probes"] == 1 and receipt.fired
    assert receipt.detail["at"] == [len(thinker.codec.encode("one\n\ntwo\n\n"))]
    third = AdaptiveThink(merge=0, least=3, **knobs)
    answer = await run(thinker, third, Say(TEXT), max_tokens=100)
    assert told(answer, third).detail["probes"] == 1 and answer.thinking.strip() == "one\n\ntwo\n\nthree"


async def test_what_it_could_not_do_is_said(thinker: Any) -> None:
    words = AdaptiveThink(options=("yes", "A"), merge=0, keep=0)
    receipt = told(await run(thinker, words, Say(TEXT), max_tokens=100), words)
    assert (
        not receipt.fired and receipt.reason == "no token of the model: yes of the knob options" and not receipt.spend
    )
    poor = AdaptiveThink(options=("A", "B"), alpha=1.0, merge=0, keep=8)
    answer = await run(thinker, poor, Say(TEXT), account=limited(output=90), max_tokens=90)
    receipt = told(answer, poor)
    assert receipt.detail["skipped"] > 0 and "left out" in receipt.reason
    idle = AdaptiveThink(keep=0)
    assert told(await run(thinker, idle, Say("five")), idle).reason == "the model did not think"


def test_bad_knobs() -> None:
    for options in (("A",), ("A", " "), ("A", "A ")):
        with pytest.raises(InvalidInput, match="knob options"):
            AdaptiveThink(options=options)
    assert not AdaptiveThink(options=()).chosen and not AdaptiveThink().chosen
