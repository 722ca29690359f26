"""CyclicReflex: the wave against its closed form, the words against a vocabulary, the logits against arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking import Say
from steering import Tap, endless, plain, run, told

from thrifty import InvalidInput
from thrifty.methods.decode._triggers import triggers
from thrifty.methods.decode.cyclic_reflex import CyclicReflex, triangle


@settings(deadline=None)
@given(
    t=st.integers(0, 10_000),
    amplitude=st.floats(0, 20),
    period=st.integers(1, 3000),
    shift=st.floats(0, 1),
)
def test_the_wave_is_the_arcsine_of_a_sine(t: int, amplitude: float, period: int, shift: float) -> None:
    closed = 2 * amplitude / math.pi * math.asin(math.sin(2 * math.pi * (t / period + shift)))
    assert triangle(t, amplitude, period, shift) == pytest.approx(closed, abs=1e-6 * max(1.0, amplitude))


def test_a_cycle_has_mean_zero_and_its_quarters_are_the_papers() -> None:
    method = CyclicReflex()  # amplitude 5, period 1200
    assert [method.wave(t) for t in (0, 300, 600, 900, 1200)] == [0, 5, 0, -5, 0]
    assert sum(method.wave(t) for t in range(1200)) == pytest.approx(0, abs=1e-9)
    assert CyclicReflex(shift=0.25).wave(0) == 5 and method.wave(8192) == 0 != method.wave(8191)
    tip = CyclicReflex(shape="constant", amplitude=3.0, first=10, last=20)
    assert [tip.wave(t) for t in (9, 10, 19, 20)] == [0, -3, -3, 0]


def test_every_form_of_a_word_is_found_and_no_other_token() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from thrifty.engines.local.prompt import TextCodec

    words = [
        "<unk>",
        "wait",
        "Ġwait",
        "Wait",
        "ĠWait",
        "ĠWAIT",
        "Ġwaiting",
        "await",
        "but",
        "Ċbut",
        "Ġb",
        "ĠMÃ¼h",
        "</s>",
    ]
    bare = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="</s>")
    codec = TextCodec(tokenizer, frozenset({12}))
    found = triggers(codec, ("wait", "but", "Alternatively"))
    assert found.found == {"wait": (1, 2, 3, 4, 5), "but": (8, 9), "Alternatively": ()}
    assert found.ids == [1, 2, 3, 4, 5, 8, 9] and found.missing == ["Alternatively"]
    assert triggers(codec, ("müh",)).ids == [11]  # bytes that are no ASCII: every token is decoded
    assert not triggers(codec, ("<unk>", "</s>")).ids
    assert triggers(object.__new__(type("Bare", (), {"ends": frozenset()})), ("wait",)).missing == ["wait"]


async def test_only_the_words_are_moved_by_the_wave_and_only_in_thinking(thinker: Any) -> None:
    text = "<think>one two three</think>four five"
    before, after = Tap(), Tap()
    method = CyclicReflex(amplitude=3.0, period=16, words=("a", "en"), keep=0)
    answer = await run(thinker, method, Say(text), before, after=(after,), max_tokens=60)
    assert answer.text == "four five"
    ids = [i for i in range(320) if thinker.codec.decode([i]).strip().lower() in ("a", "en")]
    assert len(ids) == 3  # a, A, en
    inside = range(1, 1 + len(thinker.codec.encode("one two three")) + 1)  # the closing tag is drawn inside
    for t, (one, two) in enumerate(zip(before.shown, after.shown, strict=True)):
        expected = one.clone()
        if t in inside:
            expected[ids] += 2 * 3.0 / math.pi * math.asin(math.sin(2 * math.pi * t / 16))
        assert (two - expected).abs().max() < 1e-4, t
    receipt = told(answer, method)
    assert receipt.fired and receipt.detail["moved"] == sum(1 for t in inside if t % 8)


async def test_amplitude_zero_through_the_policy_is_plain_sampling_bit_for_bit(thinker: Any) -> None:
    fields: dict[str, Any] = {"prefix": "<think>\n", "temperature": 1.0, "logprobs": True}
    method = CyclicReflex(amplitude=0.0, keep=0, words=("a",))
    with_it, without = await run(thinker, method, **fields), await plain(thinker, **fields)
    assert (with_it.tokens, with_it.logprobs) == (without.tokens, without.logprobs)
    assert not told(with_it, method).fired and told(with_it, method).reason == "the wave was 0 throughout"


async def test_words_are_more_frequent_in_the_crest_than_in_the_trough(thinker: Any) -> None:
    method = CyclicReflex(amplitude=6.0, period=40, words=tuple("abcdefghij"), keep=0)
    detail = told(
        await run(thinker, method, endless(thinker), prefix="<think>\n", temperature=2.0, max_tokens=400), method
    ).detail
    assert detail["up"] == detail["down"] == 190
    assert detail["up_words"] > 2 * detail["down_words"]


async def test_a_word_that_is_no_token_is_reported(thinker: Any) -> None:
    text = "<think>hm</think>x"
    receipts = []
    for method, said in (
        (CyclicReflex(keep=0), text),
        (CyclicReflex(words=("a", "wait"), keep=0, period=8), text),
        (CyclicReflex(words=("a",), keep=0), "no thoughts"),
    ):
        receipts.append(told(await run(thinker, method, Say(said)), method))
    assert [r.fired for r in receipts] == [False, True, False]
    assert receipts[0].reason == "none of wait, but, alternatively is a token of the model"
    assert receipts[1].reason.endswith("no token of the model: wait")
    assert receipts[2].reason == "the model did not think"


def test_blank_words_are_refused() -> None:
    for words in ((), ("wait", " ")):
        with pytest.raises(InvalidInput, match="knob words"):
            CyclicReflex(words=words)
