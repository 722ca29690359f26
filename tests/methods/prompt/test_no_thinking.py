"""NoThinking: the block it begins with, and when it leaves the call alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from thrifty import Account, Call, Draft, InvalidInput
from thrifty.call import text_of
from thrifty.engines.scripted import PROVIDES, ScriptedEngine
from thrifty.methods.prompt.no_thinking import NoThinking, empty_block
from thrifty.thinking import has_tags

BLOCK = "<think>\nOkay, I think I have finished thinking.\n</think>\n\n"


class Tokenizing(ScriptedEngine):
    """Counts with a tokenizer of its own, in which the given tags are one token each, and all else a token a
    character."""

    def __init__(self, *tags: str) -> None:
        super().__init__("fine", capabilities={*PROVIDES, "logits"})
        self.tags = tags

    def count(self, call: Call) -> int:
        text = "".join(text_of(m) for m in call.messages) + (call.prefix or "")
        for tag in self.tags:
            text = text.replace(tag, "T")
        return len(text)


def call_on(engine: ScriptedEngine) -> Call:
    return Call(({"role": "user", "content": "Why?"},), Account("t"), engines={"answer": engine}, prefix="Because")


async def test_the_papers_block_goes_before_the_calls_prefix() -> None:
    call = await NoThinking().rewrite(call_on(ScriptedEngine("x")))
    assert call.prefix == BLOCK + "Because"
    assert call.receipts[-1].fired and "not known" in call.receipts[-1].reason


async def test_an_engine_with_a_tokenizer_is_asked_for_the_tags() -> None:
    knows, lacks = Tokenizing("<think>", "</think>"), Tokenizing("<think>")
    assert has_tags(call_on(knows), "<think>", "</think>") is True
    assert has_tags(call_on(lacks), "<think>", "</think>") is False
    assert (await NoThinking().rewrite(call_on(knows))).receipts[-1].fired
    left = await NoThinking().rewrite(call_on(lacks))
    assert left.prefix == "Because" and not left.receipts[-1].fired
    forced = await NoThinking(unknown="force").rewrite(call_on(lacks))
    assert forced.prefix == BLOCK + "Because" and "lacks" in forced.receipts[-1].reason


async def test_a_call_that_drafts_is_left_alone() -> None:
    call = replace(call_on(ScriptedEngine("x")), draft=Draft())
    left = await NoThinking().rewrite(call)
    assert left.prefix == "Because" and not left.receipts[-1].fired


async def test_other_models_tags() -> None:
    method = NoThinking(opening="[T]", closing="[/T]", thought="")
    call = await method.rewrite(replace(call_on(ScriptedEngine("x")), prefix=None))
    assert call.prefix == empty_block("[T]", "[/T]") == "[T]\n\n[/T]\n\n"
    with pytest.raises(InvalidInput, match="opening"):
        NoThinking(opening=" ")


async def test_the_block_is_input_not_output() -> None:
    engine = ScriptedEngine("It rains.")
    plain = await engine.generate(replace(call_on(engine), prefix=None))
    call = await NoThinking().rewrite(replace(call_on(engine), prefix=None))
    answer = await engine.generate(call)
    assert answer.thinking == "" and answer.spend.output == plain.spend.output
    assert answer.spend.input > plain.spend.input
