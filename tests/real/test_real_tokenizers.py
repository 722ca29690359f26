"""The real tokenizers: ids of the reference libraries on a fuzz corpus, also through a long stream cut into parts.

Each test skips where the tokenizer's files were not fetched (`thrifty count --get NAME`)."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import ThriftyError
from thrifty.meter import tokenizer_files, tokenizers

pytestmark = pytest.mark.real

BY_TOKENIZERS = ("claude", "qwen3", "llama3", "gemma3", "deepseek")
BY_TIKTOKEN = ("o200k", "cl100k", "mistral")
WORDS = [
    "the", "quick", "fox's", "I'll", "WE'RE", "don't", "def", "foo(self):", "return", "{x: 1}", "1234567", "3.14", "==",
    "!=", "<|endoftext|>", "<|im_start|>", "<think>", "</s>", "<tool_call>", "\u0130I\u0307", "e\u0301",
    "\u1112\u1161\u11ab", "\u017f", "\ufb01", "\u2460", "naïve", "Straße",
]  # fmt: skip


def ours(name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.load(name)
    except ThriftyError as error:
        pytest.skip(str(error))


def reference(name: str) -> Any:
    """A function from text to the ids of the library that the model's makers use."""
    folder = tokenizer_files.path(name)
    if name in BY_TOKENIZERS:
        from tokenizers import Tokenizer

        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        made.encode_special_tokens = True
        return lambda text: made.encode(text, add_special_tokens=False).ids
    import tiktoken

    if name == "mistral":
        import base64

        import orjson

        data = orjson.loads((folder / "tekken.json").read_bytes())
        kept = data["vocab"][: 131_072 - 1000]
        ranks = {base64.b64decode(v["token_bytes"]): v["rank"] for v in kept}
        return tiktoken.Encoding(
            "tekken", pat_str=data["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
        ).encode_ordinary
    return tiktoken.get_encoding(f"{name}_base").encode_ordinary


@pytest.fixture(autouse=True)
def ranks_for_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's own cache, so that it needs no network: its files are named by where they come from."""
    import hashlib

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("o200k", "cl100k"):
        if tokenizer_files.present(name):
            file = tokenizer_files.folder(name) / f"{name}_base.tiktoken"
            source = tokenizer_files.FILES[name].members[0].source.rsplit("/", 1)[1]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == tokenizer_files.FILES[name].members[0].sha256
            (tmp_path / source).symlink_to(file)


def messy(draw: random.Random) -> str:
    """Random Unicode, words, code, whitespace runs, emoji, CJK and other scripts, mixed."""

    def char(low: int, high: int) -> str:
        return chr(draw.randrange(low, high))

    def any_char() -> str:
        return draw.choice(
            [char(32, 127), char(0x80, 0x800), char(0x800, 0xD800), char(0xE000, 0x10000), char(0x10000, 0x110000)]
        )

    kinds = [
        any_char,
        lambda: draw.choice([" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "   \n  ", "\x1c"]),
        lambda: char(0x4E00, 0x9FFF),
        lambda: char(0x1F300, 0x1FAFF) + draw.choice(["", "\ufe0f", "\u200d"]),
        lambda: draw.choice(WORDS) + draw.choice(["", " ", "\n"]),
        lambda: draw.choice("aeiou=-_*#/ 0\n") * draw.randrange(1, 60),
        lambda: char(0x0600, 0x06FF),
        lambda: char(0x0900, 0x0DFF),
    ]
    runs = (draw.choice(kinds) for _ in range(draw.randrange(1, 30)))
    return "".join(kind() for kind in runs for _ in range(draw.randrange(1, 12)))


@pytest.mark.parametrize("name", [*BY_TIKTOKEN, *BY_TOKENIZERS])
def test_ids_on_a_fuzz_corpus(name: str) -> None:
    counter, expected = ours(name), reference(name)
    draw = random.Random(name)
    for _ in range(400):
        text = messy(draw)
        assert counter.encode(text) == expected(text), ascii(text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=120))
def test_ids_on_any_text(text: str) -> None:
    counter = ours("o200k")
    assert counter.encode(text) == _o200k()(text)


def _o200k(made: list[Any] = []) -> Any:  # noqa: B006  # loaded once
    if not made:
        made.append(reference("o200k"))
    return made[0]


@pytest.mark.parametrize("name", [*BY_TIKTOKEN, *BY_TOKENIZERS])
def test_a_long_stream_cut_anywhere_it_is_safe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, expected = ours(name), reference(name)
    draw = random.Random(1)
    source = Path(__file__).read_text(encoding="utf-8")
    text = "".join(messy(draw) + source[i : i + 900] for i in range(0, len(source), 700))
    monkeypatch.setattr(tokenizers, "_BLOCK", 257)
    counted = counter.count_stream(io.BytesIO(text.encode()))
    assert counted.tokens == len(expected(text)) and not counted.forced_cuts


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "deepseek"])
def test_chats_with_the_models_own_templates(name: str) -> None:
    from thrifty.meter.chat import count_chat

    counter = ours(name)
    transformers = pytest.importorskip("transformers")
    folder = str(tokenizer_files.path(name))
    real = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    chat = [
        {"role": "user", "content": "Why is the sky blue?\n  Say it in one line."},
        {"role": "assistant", "content": "Air scatters blue light more than red."},
        {"role": "user", "content": "文字 too? <|im_end|>"},
    ]
    text = real.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert count_chat(chat, counter).total == len(real.encode(text, add_special_tokens=False))
