"""CGRS: certainty and probability against closed forms, the probe against a fresh run, the block against the draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from speaking import Say
from steering import Tap, endless, limited, plain, run, told

from thrifty import InvalidInput
from thrifty.methods.decode._trial import Trial, entropy
from thrifty.methods.decode.cgrs import CGRS, CGRSPolicy, certainty, suppression

TEXT = "<think>one\n\ntwo\n\nthree</think>four\n\nfive"
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


@settings(deadline=None)
@given(logits=st.lists(st.floats(-30, 30), min_size=2, max_size=30))
def test_entropy_is_scipys(logits: list[float]) -> None:
    weights = [math.exp(x - max(logits)) for x in logits]
    assert entropy(torch.tensor(logits, dtype=torch.float64)) == pytest.approx(scipy_entropy(weights), abs=1e-9)
    assert entropy(torch.tensor([0.0, -math.inf, 0.0])) == pytest.approx(math.log(2))


@settings(deadline=None)
@given(n=st.integers(1, 9), size=st.integers(2, 200_000), delta=st.floats(0, 0.99))
def test_a_sure_answer_blocks_always_a_blind_guess_never_and_linearly_between(n: int, size: int, delta: float) -> None:
    assert certainty([0.0] * n, size) == 1 and suppression(1.0, delta) == pytest.approx(1)
    assert certainty([math.log(size)] * n, size) == pytest.approx(0, abs=1e-12)
    assert suppression(delta, delta) == 0 == suppression(delta / 2, delta)
    for share in (0.25, 0.5, 0.75):
        assert suppression(delta + share * (1 - delta), delta) == pytest.approx(share)


async def test_probes_see_the_distributions_of_the_trial_answer_and_leave_the_text_alone(thinker: Any) -> None:
    method = CGRS(threshold=0.9999, words=("a",), keep=0, probe_tokens=6)
    answer = await run(thinker, method, Say(TEXT), max_tokens=90)
    assert answer.thinking == "one\n\ntwo\n\nthree" and answer.text == "four\n\nfive"
    receipt = told(answer, method)
    assert not receipt.fired and receipt.detail["probes"] == 2 and receipt.detail["unclosed"] == 2
    assert "2 trial answers never closed" in receipt.reason
    expected = []
    for before in ("<think>one\n\n", "<think>one\n\ntwo\n\n"):
        tap = Tap()
        await plain(thinker, tap, prefix=before + method.cue, max_tokens=6)  # a fresh prefill, greedy
        sure = [scipy_entropy(row.double().softmax(-1).numpy()) / math.log(320) for row in tap.shown]
        assert len(sure) == 6
        expected.append(1 - sum(sure) / 6)
    assert receipt.detail["certainty"] == pytest.approx(expected, abs=2e-6)
    # each probe costs what stands before it as input, and its cue and answer as output
    cue = len(thinker.codec.encode(method.cue))
    assert receipt.spend.calls == 2 and receipt.spend.output == 2 * (cue + 6)


async def test_a_blocked_word_is_never_drawn_and_without_a_block_nothing_changes(thinker: Any) -> None:
    fields: dict[str, Any] = {"prefix": "<think>\n", "temperature": 1.5, "max_tokens": 120}
    sure = _Always(CGRS(threshold=0.0, words=LETTERS, boundary="token", every=40, keep=0, probe_tokens=2))
    answer = await run(thinker, sure, endless(thinker), **fields)
    assert all(thinker.codec.decode([t]).strip().lower() not in LETTERS for t in answer.tokens[1:])
    detail = told(answer, sure).detail
    assert detail["blocked_draws"] == 119 and detail["probes"] == 3 and detail["replaced"] > 5
    never = CGRS(threshold=0.999999, words=LETTERS, boundary="token", every=40, keep=0, probe_tokens=2)
    free = await run(thinker, never, endless(thinker), logprobs=True, **fields)
    without = await plain(thinker, endless(thinker), logprobs=True, **fields)
    assert (free.tokens, free.logprobs) == (without.tokens, without.logprobs)
    assert told(free, never).detail["words"] > 10


class _Always(CGRS):
    """The same with dice that always fall below p."""

    def policy(self, call: Any) -> Any:
        class Loaded(CGRSPolicy):
            def _dice(self, at: int) -> float:
                return 0.0

        return Loaded(self, 0)

    def __init__(self, method: CGRS) -> None:
        super().__init__(**{name: getattr(method, name) for name in method.knobs()})


def test_the_dice_are_uniform_one_throw_a_token_and_of_the_seed() -> None:
    one, other = CGRSPolicy(CGRS(), 1), CGRSPolicy(CGRS(), 2)
    throws = [one._dice(t) for t in range(4000)]
    assert throws == [one.fork()._dice(t) for t in range(4000)] != [other._dice(t) for t in range(4000)]
    for p in (0.1, 0.5, 0.9):
        assert sum(u < p for u in throws) / 4000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))


def test_a_trial_answer_ends_at_its_own_brace() -> None:
    class Bytes:
        class codec:
            decode = staticmethod(lambda ids: "".join(map(chr, ids)))

    for depth, said, left in ((0, r"{\frac{1}{2}} so", " so"), (1, r"\frac{1}{2}} so", " so"), (0, "4\nor", "or")):
        trial, rest = Trial(lambda z: 0.0, depth), said
        for mark in said:
            rest = rest[1:]
            if type(trial.after(Bytes(), ord(mark))).__name__ == "Stop":  # type: ignore[arg-type]
                break
        assert rest == left and trial.complete == ("{" in said)


async def test_the_whole_output_can_be_steered_without_any_tags(thinker: Any) -> None:
    method = CGRS(threshold=0.0, words=("a",), scope="all", keep=0, probe_tokens=2)
    answer = await run(thinker, method, Say("one\n\ntwo\n\nthree four"), max_tokens=60)
    receipt = told(answer, method)
    assert answer.text == "one\n\ntwo\n\nthree four" and not answer.thinking
    assert receipt.fired and receipt.detail["probes"] == 2 and receipt.detail["blocked_draws"] > 0
    only = CGRS(threshold=0.0, words=("a",), keep=0)
    assert told(await run(thinker, only, Say("one\n\ntwo")), only).reason == "the model did not think"


async def test_what_it_could_not_do_is_said(thinker: Any) -> None:
    none = CGRS(keep=0)
    receipt = told(await run(thinker, none, Say(TEXT), max_tokens=90), none)
    assert not receipt.fired and receipt.reason.startswith("none of wait") and not receipt.spend
    poor = CGRS(threshold=0.0, words=("a",), keep=10)
    account = limited(output=110)
    answer = await run(thinker, poor, Say("<think>" + "x" * 50 + "\n\ny</think>z"), account=account, max_tokens=110)
    receipt = told(answer, poor)
    assert receipt.detail["skipped"] == 1 and "left out" in receipt.reason and answer.text == "z"
    quick = CGRS(threshold=0.0, words=("a",), keep=0)
    receipt = told(await run(thinker, quick, Say("<think>x</think>z")), quick)
    assert receipt.reason == "no step was completed, so nothing was probed"


def test_bad_knobs() -> None:
    with pytest.raises(InvalidInput, match="knob words"):
        CGRS(words=("",))
    with pytest.raises(InvalidInput, match="boundary"):
        CGRS(boundary="(")
