"""Soft Thinking: the mixture against sorted lists, the run against transformers fed by hand, Cold Stop on a script."""

from __future__ import annotations

import math
from typing import Any

import pytest
import stock
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from speaking import Say
from steering import Script, Tap, endless, plain, run, told

from thrifty.methods.decode.soft_thinking import SoftThinking, mixture
from thrifty.policy import DecodePolicy


def by_lists(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, most: int
) -> dict[int, float]:
    """The weights, by the definition of each filter, in pure Python."""
    high = max(logits)
    mass = {i: math.exp((z - high) / temperature) for i, z in enumerate(logits)}

    def renormalised(m: dict[int, float]) -> dict[int, float]:
        return {i: v / sum(m.values()) for i, v in m.items()}

    order = sorted(mass, key=lambda i: (-mass[i], i))
    kept = renormalised({i: mass[i] for i in (order[:top_k] if top_k else order)})
    nucleus, before = {}, 0.0
    for i, share in kept.items():
        if not nucleus or before < top_p or top_p == 1:
            nucleus[i] = share
        before += share
    best = max(nucleus.values())
    left = {i: v for i, v in nucleus.items() if v >= min_p * best}
    return renormalised(dict(list(left.items())[:most]))


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda z: z / 4), min_size=2, max_size=12),
    temperature=st.sampled_from([0.3, 0.6, 1.0, 2.0]),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.0, 0.31, 0.67, 0.953, 1.0]),
    min_p=st.sampled_from([0.0, 0.049, 0.52]),
    most=st.integers(1, 5),
)
def test_the_mixture_is_its_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, most: int
) -> None:
    ids, weights, entropy = mixture(torch.tensor(logits), temperature, top_k, top_p, min_p, most)
    expected = by_lists(logits, temperature, top_k, top_p, min_p, most)
    assert ids.tolist() == list(expected) and weights.tolist() == pytest.approx(list(expected.values()), abs=1e-9)
    assert ids[0] == max(range(len(logits)), key=lambda i: (logits[i], -i))
    spread = [math.exp((z - max(logits)) / temperature) for z in logits]
    assert entropy == pytest.approx(scipy_entropy(spread), abs=1e-9)  # of all of it, whatever was filtered


def test_a_greedy_mixture_is_one_token_and_its_entropy_is_that_at_temperature_1() -> None:
    ids, weights, entropy = mixture(torch.tensor([0.0, 1.0, -math.inf]), 0.0)
    assert (ids.tolist(), weights.tolist()) == ([1], [1.0])
    assert entropy == pytest.approx(scipy_entropy([1, math.e]))


async def test_the_model_reads_the_mixtures(thinker: Any) -> None:
    method = SoftThinking(temperature=1.5, top_k=12, top_p=0.9, most=4, tau=0.0, keep=0)
    answer = await run(thinker, method, endless(thinker), prefix="<think>\n", max_tokens=24)
    ends = [*thinker.codec.ends, *thinker.codec.encode("</think>")]

    def choose(step: int, logits: torch.Tensor) -> tuple[int, dict[int, float]]:
        logits[ends] = -1e4
        weights = by_lists(logits.tolist(), 1.5, 12, 0.9, 0.0, 4)
        return next(iter(weights)), weights

    assert list(answer.tokens or ()) == stock.decode(thinker, "<think>\n", 24, choose)
    detail = told(answer, method).detail
    assert detail["soft_steps"] == 24 and detail["mixtures"] > 12

    def greedy(step: int, logits: torch.Tensor) -> tuple[int, dict[int, float]]:
        logits[ends] = -1e4
        return int(logits.argmax()), {int(logits.argmax()): 1.0}

    assert list(answer.tokens or ()) != stock.decode(thinker, "<think>\n", 24, greedy)


@pytest.mark.parametrize("knobs", [{"most": 1}, {"temperature": 0.0}, {"top_k": 1}])
async def test_a_mixture_of_one_is_greedy_decoding_token_for_token(thinker: Any, knobs: dict[str, Any]) -> None:
    method = SoftThinking(tau=0.0, keep=0, **knobs)
    soft = await run(thinker, method, endless(thinker), prefix="<think>\n", temperature=1.0)
    assert soft.tokens == (await plain(thinker, endless(thinker), prefix="<think>\n")).tokens
    assert told(soft, method).detail["mixtures"] == 0


def rows(entropies: list[float], first: int = 20) -> list[torch.Tensor]:
    """Logits [320] whose softmax has (nearly) these entropies: 0, or the logarithm of a whole number."""
    made = []
    for h in entropies:
        row = torch.full((320,), -50.0)
        row[first : first + round(math.exp(h))] = 50.0
        made.append(row)
    return made


@pytest.mark.parametrize("temperature", [0.6, 0.0])
async def test_cold_stop_fires_on_the_step_that_completes_the_row(thinker: Any, temperature: float) -> None:
    high = math.log(4)
    script = rows([0, 0, high, 0, 0, 0, 0, 0])
    method = SoftThinking(temperature=temperature, tau=0.5, length=3, keep=0, guard=False)
    answer = await run(thinker, method, Script(script), prefix="<think>\n", max_tokens=9)
    closing = thinker.codec.encode("</think>")
    assert answer.tokens[:6] == (20, 20, 20, 20, 20, *closing)  # the closing tag instead of the sixth
    assert answer.spend.reasoning == 6 and "Cold Stop after 3 steps" in told(answer, method).reason
    assert told(answer, method).detail["mixtures"] == (1 if temperature else 0)


async def test_an_entropy_at_the_threshold_is_not_below_it_and_zero_turns_it_off(thinker: Any) -> None:
    exact = mixture(rows([math.log(4)])[0], 1.0)[2]
    for tau, ends in ((exact, False), (exact * 1.001, True), (0.0, False)):
        method = SoftThinking(temperature=1.0, tau=tau, length=2, keep=0, guard=False)
        answer = await run(thinker, method, Script(rows([math.log(4)])), prefix="<think>\n", max_tokens=6)
        assert (answer.spend.reasoning < 6) == ends == ("Cold Stop" in told(answer, method).reason)


async def test_after_thinking_tokens_are_fed_and_drawn_as_without_it(thinker: Any) -> None:
    method = SoftThinking(tau=100.0, length=1, guard=False, keep=0)
    fields: dict[str, Any] = {"temperature": 1.0, "logprobs": True, "max_tokens": 30}
    soft = await run(thinker, method, prefix="<think>\n", **fields)
    same = await plain(thinker, Say("</think>"), prefix="<think>\n", temperature=1.0, max_tokens=1)
    assert soft.tokens[:1] == same.tokens and told(soft, method).detail["mixtures"] == 0

    class First(DecodePolicy):
        """Takes the sampler's first number for the tag, as Soft Thinking does."""

        def logits(self, branch: Any, logits: Any) -> Any:
            if not branch.tokens:
                logits.fill_(-math.inf)
                logits[thinker.codec.encode("</think>")] = 0.0
            return logits

    without = await plain(thinker, First(), prefix="<think>\n", **fields)
    assert (soft.tokens, soft.logprobs) == (without.tokens, without.logprobs)


async def test_a_tag_of_several_tokens_follows_the_step(thinker: Any) -> None:
    method = SoftThinking(opening="[T]", closing="[/T]", tau=0.5, length=2, keep=0, guard=False)
    answer = await run(thinker, method, Script(rows([0.0])), prefix="[T]", max_tokens=16)
    assert thinker.codec.decode(answer.tokens[:2]) * 0 == "" and answer.text[2:].startswith("\n[/T]\n\n")


async def test_an_answer_that_loops_is_ended(thinker: Any) -> None:
    script = rows([math.log(4)] * 2 + [0] * 30)
    tap = Tap()
    method = SoftThinking(tau=0.5, length=5, keep=0)
    answer = await run(thinker, method, Script(script), prefix="<think>\n", after=(tap,), max_tokens=30)
    # two unsure steps, five sure ones of which the last is the tag, then five sure tokens of the answer
    assert answer.finish == "loop" and len(answer.tokens or ()) == 2 + 5 + 5
    assert "it loops" in told(answer, method).reason
    free = SoftThinking(tau=0.5, length=5, keep=0, guard=False)
    assert (await run(thinker, free, Script(script), prefix="<think>\n", max_tokens=30)).finish == "length"


async def test_a_model_that_does_not_think_is_left_alone(thinker: Any) -> None:
    method = SoftThinking(tau=100.0, length=1)
    answer = await run(thinker, method, Say("no thoughts"))
    assert answer.text == "no thoughts" and told(answer, method).reason == "the model did not think"
