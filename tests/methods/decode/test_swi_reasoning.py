"""SwiReasoning: the modes on scripted entropies, the run against transformers fed by hand, the bound on switches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import stock
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from speaking import Say
from steering import Script, endless, plain, run, told

from thrifty import Account, Call, Sampling
from thrifty.methods.decode.swi_reasoning import _SYMBOL, SwiReasoning, Switch


def modes(entropies: list[float], window: int) -> str:
    """S or N for each step, by the rules."""
    switch = Switch(window)
    return "".join("S" if (switch.step(h), switch.soft)[1] else "N" for h in entropies)


def test_soft_turns_normal_at_once_and_normal_turns_soft_after_the_window() -> None:
    # the reference is 5, then 4 (the switch at the third step)
    assert modes([5, 6, 4, 9, 9, 9, 9], window=3) == "SSNNNSS"
    assert modes([5, 4, 9, 8, 7], window=1) == "SNSNN"  # instant both ways; 7 is not above 8
    assert modes([5, 5, 5], window=1) == "SSS"  # equal is neither
    assert modes([5, 4, 4, 4.1, 3, 4.1], window=2) == "SNNSNN"
    assert modes([5, 4, *[9] * 600], window=512).count("N") == 512


@settings(deadline=None)
@given(entropies=st.lists(st.integers(0, 6), min_size=1, max_size=60), window=st.integers(1, 9))
def test_stays_are_at_least_the_window_and_each_switch_beats_its_reference(entropies: list[float], window: int) -> None:
    trace = modes(entropies, window)
    turns = [i for i in range(1, len(trace)) if trace[i] != trace[i - 1]]
    reference = entropies[0]
    for i, before in zip(turns, [0, *turns], strict=False):
        assert entropies[i] < reference if trace[i] == "N" else entropies[i] > reference and i - before >= window
        reference = entropies[i]
    switch = Switch(window)
    for h in entropies:
        switch.step(h)
    assert switch.count == sum(trace[i] == "N" for i in turns)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
async def test_the_model_reads_what_the_rules_say(thinker: Any, alpha: float) -> None:
    """The rules once more, written down step by step over stock transformers."""
    steps, window, beta = 40, 3, 0.6
    method = SwiReasoning(window=window, alpha=alpha, beta=beta, keep=0)
    answer = await run(thinker, method, endless(thinker), prefix="<think>\n", max_tokens=steps)
    encode = thinker.codec.encode
    opening, closing, newline = (encode(t)[0] for t in ("<think>", "</think>", "\n"))
    state: dict[str, Any] = {"mode": "soft", "since": 0}
    trace = []

    def choose(step: int, logits: torch.Tensor) -> tuple[int, dict[int, float]]:
        logits[[*thinker.codec.ends, closing]] = -1e4
        p = logits.double().softmax(-1)
        h, token = scipy_entropy(p.numpy()), int(logits.argmax())
        weights = dict(enumerate(p.tolist()))
        if step == 0:
            state["ref"] = h
            weights = {i: 0.9 * w for i, w in weights.items()}
            weights[newline] += 0.1
        elif state["mode"] == "soft" and h < state["ref"]:
            b = beta + (1 - beta) * step / steps
            weights = {i: b * w for i, w in weights.items()}
            weights[closing] += 1 - b
            state.update(mode="normal", ref=h, since=step)
        elif state["mode"] == "normal":
            if h > state["ref"] and step - state["since"] >= window:
                a = alpha + (1 - alpha) * step / steps
                weights = {i: a * w for i, w in weights.items()}
                weights[opening] += 1 - a
                state.update(mode="soft", ref=h, since=step)
            else:
                weights = {token: 1.0}
        trace.append((state["mode"], state["since"]))
        return token, weights

    assert list(answer.tokens or ()) == stock.decode(thinker, "<think>\n", steps, choose)
    detail = told(answer, method).detail
    switched = {since for _, since in trace if since}
    assert detail["to_normal"] + detail["to_soft"] == len(switched) > 3
    ordinary = await plain(thinker, endless(thinker), prefix="<think>\n", max_tokens=steps)
    assert answer.tokens != ordinary.tokens


async def test_always_normal_is_plain_sampling_bit_for_bit(thinker: Any) -> None:
    fields: dict[str, Any] = {"prefix": "<think>\n", "temperature": 1.0, "logprobs": True, "max_tokens": 40}
    method = SwiReasoning(start="normal", window=999_999, keep=0)  # no shortcut: the policy runs
    with_it, without = await run(thinker, method, **fields), await plain(thinker, **fields)
    assert (with_it.tokens, with_it.logprobs) == (without.tokens, without.logprobs)
    assert not told(with_it, method).fired and told(with_it, method).detail["soft_steps"] == 0


def rows(entropies: list[float]) -> list[torch.Tensor]:
    """Logits [320] whose softmax is uniform over exp(H) of the letters from token 20 on."""
    made = []
    for h in entropies:
        row = torch.full((320,), -50.0)
        row[20 : 20 + round(math.exp(h))] = 50.0
        made.append(row)
    return made


def swings(n: int) -> list[torch.Tensor]:
    """Entropies that turn the mode at every step after the first."""
    return rows([math.log(4), *[math.log(2 if i % 2 == 0 else 8) for i in range(n)]])


async def test_from_m_switches_on_the_tag_is_written_and_beyond_2m_the_answer_is_ended(thinker: Any) -> None:
    closing = thinker.codec.encode("</think>")[0]
    final = thinker.codec.encode("\n\nSo: ")
    method = SwiReasoning(window=1, switches=1, answer=20, final="So: ", keep=0)
    script = [*swings(5), *rows([math.log(3)] * 60)]
    # soft, N (1), soft, N (2), soft, N (3): the tag after the first, the last words after the third
    answer = await run(thinker, method, Script(script), prefix="<think>\n", max_tokens=60)
    expected = [20, 20, closing, 20, 20, 20, *final]
    assert list(answer.tokens or ())[: len(expected)] == expected
    assert answer.finish == "length" and len(answer.tokens or ()) == 5 + 20  # the switch's own token is one of 20
    receipt = told(answer, method)
    assert receipt.detail["to_normal"] == 3 == receipt.detail["ends"] and "20 tokens after" in receipt.reason
    assert receipt.detail["written"] == 1 + len(final) and "</think>" not in answer.text
    unbound = SwiReasoning(window=1, keep=0)
    free = await run(thinker, unbound, Script(script), prefix="<think>\n", max_tokens=60)
    assert closing not in (free.tokens or ()) and told(free, unbound).detail["ends"] == 0


@pytest.mark.parametrize("switches", [2, 3])
async def test_nothing_is_written_before_the_bound(thinker: Any, switches: int) -> None:
    method = SwiReasoning(window=1, switches=switches, answer=8, keep=0)
    answer = await run(thinker, method, Script(swings(40)), prefix="<think>\n", max_tokens=60)
    closing = thinker.codec.encode("</think>")[0]
    first = (answer.tokens or ()).index(closing)
    assert first == 2 * switches  # one soft step first, then a switch to normal at every odd step
    ends = told(answer, method).detail["ends"]
    assert answer.finish == "length" and ends >= switches + 1
    # bounded by the switches: a last one, the words then written, and `answer` tokens after the last of them
    assert len(answer.tokens or ()) < 60


async def test_a_tag_that_the_model_draws_ends_all_steering(thinker: Any) -> None:
    closing = thinker.codec.encode("</think>")[0]
    tag = torch.full((320,), -50.0)
    tag[closing] = 50.0
    script = [*rows([math.log(8), math.log(9)]), tag, *swings(30)]
    method = SwiReasoning(window=1, switches=1, keep=0)
    answer = await run(thinker, method, Script(script), prefix="<think>\n", max_tokens=25)
    assert (answer.tokens or ())[2] == closing and (answer.tokens or ()).count(closing) == 1
    assert told(answer, method).detail == {"to_normal": 0, "soft_steps": 2, "to_soft": 0, "written": 0, "ends": 0}
    assert len(answer.tokens or ()) == 25


async def test_symbols_are_fed_as_they_are(thinker: Any) -> None:
    for text in ("7", "x", "=", "\\frac", "\\{", "\\operatorname"):
        assert _SYMBOL.fullmatch(text)
    for text in ("so", "12x", "", "wait", "\\"):
        assert not _SYMBOL.fullmatch(text)
    letters = [t for t in range(320) if len(thinker.codec.decode([t])) == 1 and thinker.codec.decode([t]).isalpha()]
    row = torch.full((320,), -50.0)
    row[letters[:2]] = 50.0
    for symbols, soft in ((True, 0), (False, 6)):
        method = SwiReasoning(symbols=symbols, keep=0)
        answer = await run(thinker, method, Script([row]), prefix="<think>\n", max_tokens=6)
        assert told(answer, method).detail["soft_steps"] == soft


async def test_a_fork_goes_on_in_its_own_mode(thinker: Any) -> None:
    call = Call(({"role": "user", "content": "Why?"},), Account("t"), prefix="<think>\n")
    call = replace(call, sampling=Sampling(max_tokens=30, seed=1))
    branch = await thinker.open(
        replace(call, policies=(endless(thinker), *SwiReasoning(window=2, keep=0).policies(call)))
    )
    for _ in range(9):
        await branch.step()
    twin = branch.fork()
    answers = []
    for one in (twin, branch):
        while await one.step() is not None:
            pass
        answers.append(await one.finish_up())
    assert answers[0].tokens == answers[1].tokens and len(answers[0].tokens or ()) == 30
    assert answers[0].receipts == answers[1].receipts


async def test_a_model_that_does_not_think_is_left_alone(thinker: Any) -> None:
    method = SwiReasoning(switches=1)
    answer = await run(thinker, method, Say("no thoughts"))
    assert answer.text == "no thoughts" and told(answer, method).reason == "the model did not think"
