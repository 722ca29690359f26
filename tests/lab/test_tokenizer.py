"""The tokenizer: any ASCII text comes back, digits stand alone, and transformers and engines read its folder."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.lab.tasks import DIFFICULTIES, FAMILIES, make
from thrifty.lab.tokenizer import SPECIAL, TAGS, build, prompt, save
from thrifty.lab.traces import Habits, write

PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tokenizer")
    save(where)
    return where


def test_traces_come_back(tokenizer: Any) -> None:
    rng = random.Random(0)
    for name in FAMILIES:
        for difficulty in DIFFICULTIES:
            for _ in range(5):
                text = write(make(name, rng, difficulty), rng, Habits()).text
                assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(st.text(alphabet=PRINTABLE, max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_ascii_text_comes_back(text: str) -> None:
    tokenizer = build()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text or any(mark in text for mark in SPECIAL)


def test_digits_and_tags_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.encode("2047").tokens == list("2047")
    assert tokenizer.encode("<think>\n1</think>").tokens == ["<think>", "\n", "1", "</think>"]
    assert tokenizer.encode("Wait, Alternatively").tokens[0] == "Wait"
    assert tokenizer.encode("Aa0Bb1").tokens == list("Aa0Bb1")
    assert 100 <= tokenizer.get_vocab_size() <= 300


def test_what_is_not_ascii_is_unknown_and_fails_nothing(tokenizer: Any) -> None:
    unknown = tokenizer.token_to_id("<unk>")
    assert [i == unknown for i in tokenizer.encode("caf\u00e9 \u4f60").ids] == [False] * 3 + [True, False, True]


def test_the_folder_renders_chats_and_keeps_tags_visible(folder: Path) -> None:
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "Compute 1+2"}]
    assert fast.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == prompt("Compute 1+2")
    turns = [{"role": "system", "content": "Be brief."}, *asked]
    turns += [
        {"role": "assistant", "content": "<think>\n1+2=3\n</think>\n\nAnswer: 3"},
        {"role": "user", "content": "x"},
    ]
    assert (
        fast.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        == "<bos><system>Be brief.<user>Compute 1+2<assistant>Answer: 3<eos><user>x<assistant>"
    )
    ids = fast(prompt("Compute 1+2") + "<think>\n1", add_special_tokens=False)["input_ids"]
    assert fast.decode(ids, skip_special_tokens=True) == "Compute 1+2<think>\n1"
    assert fast.eos_token == "<eos>" and all(tag in fast.get_vocab() for tag in TAGS)
