"""Counting against the reference libraries: ids equal tiktoken's and tokenizers', however the text is cut."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter import tokenizers
from thrifty.meter.tokenizers import ESTIMATE, Tokenizer, choose, from_path, load

pytest.importorskip("fastokens")

# o200k_base's pattern, as the library that published it prints it
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CORPUS = (
    "def main():\n    return the_theme  # the then\n\n\nWe're here; you'll see.\r\n  1234567 == 0x1F\n文字 naïve\n" * 3
)


def merges(text: str, count: int) -> dict[bytes, int]:
    """Byte pairs of the corpus as ranks, the most frequent first: a small real byte-pair vocabulary."""
    ranks = {bytes([b]): b for b in range(256)}
    words = [[bytes([b]) for b in word.encode()] for word in text.split(" ")]
    words += [[b" ", *word] for word in words]
    while len(ranks) < 256 + count:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda p: (pairs[p], p))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours, and tiktoken with the same ranks."""
    import fastokens
    import tiktoken

    ranks = merges(CORPUS, 60)
    file = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    file.write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()))
    ours = Tokenizer("small", fastokens.Tokenizer.from_tiktoken(str(file), pattern=PATTERN))
    return ours, tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|end|>": 10_000})


MESSY = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \n\r\t/'\u00a0\u2028\u3000"),
        st.sampled_from("theTHE0123=-_"),
        st.sampled_from("文字語한글\U0001f600\U0001f468\u200d\ufe0f\u0301"),
    ),
    max_size=300,
)


@settings(max_examples=300, deadline=None)
@given(text=MESSY)
def test_ids_are_tiktokens(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = pair
    assert ours.encode(text) == reference.encode_ordinary(text)
    assert ours.count(text) == len(reference.encode_ordinary(text))


def test_special_tokens_are_text(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    assert (
        ours.encode("a<|end|>b")
        == reference.encode_ordinary("a<|end|>b")
        != reference.encode("a<|end|>b", allowed_special="all")
    )


@settings(max_examples=60, deadline=None)
@given(text=MESSY, block=st.integers(16, 80), seed=st.integers(0, 99))
def test_cut_text_counts_as_whole_text(pair: tuple[Tokenizer, Any], text: str, block: int, seed: int) -> None:
    ours, reference = pair
    text = "\n".join([text, CORPUS[:200], text[::-1], "word by word"]) * 2
    draw = random.Random(seed)
    parts, start = [], 0
    while start < len(text):
        size = draw.randint(1, 2 * block)
        parts.append(text[start : start + size])
        start += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_BLOCK", block)
        pieces = list(tokenizers._pieces(parts))
        counted = ours.count_text(parts)
    assert "".join(piece for piece, _ in pieces) == text
    assert len(pieces) > 1 and not counted.forced_cuts
    assert counted.tokens == len(reference.encode_ordinary(text))


def test_text_without_a_place_to_cut_is_held_no_longer_than_allowed(
    pair: tuple[Tokenizer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, reference = pair
    monkeypatch.setattr(tokenizers, "_BLOCK", 64)
    monkeypatch.setattr(tokenizers, "_MOST_HELD", 256)
    text = "0" * 1000
    pieces = list(tokenizers._pieces([text]))
    assert max(len(piece) for piece, _ in pieces) <= 256 + 64
    counted = ours.count_text([text])
    assert counted.forced_cuts == sum(forced for _, forced in pieces) == 3
    assert 0 <= counted.tokens - len(reference.encode_ordinary(text)) <= counted.forced_cuts


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=60), block=st.integers(1, 9))
def test_bytes_are_read_as_python_reads_them(pair: tuple[Tokenizer, Any], raw: bytes, block: int) -> None:
    ours, reference = pair
    raw += "\ufffd é 文".encode()  # a replacement character of its own is none of ours
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_BLOCK", block)
        counted = ours.count_stream(io.BytesIO(raw))
        told = tokenizers.Counted()
        assert "".join(tokenizers._decoded(io.BytesIO(raw), told)) == raw.decode("utf-8", "replace")
    assert counted.bytes == len(raw)
    assert counted.replaced == raw.decode("utf-8", "replace").count("\ufffd") - raw.count(b"\xef\xbf\xbd")


def test_lone_surrogates(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    assert ours.count("a\ud800b") == len(reference.encode_ordinary("a\ufffdb"))


def small_json(folder: Path) -> Any:
    """A tokenizer.json with a normalizer, special tokens, BOS and truncation, and the library that made it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.enable_truncation(5)
    made.enable_padding(length=9)
    made.save(str(folder / "tokenizer.json"))
    return made


@settings(max_examples=100, deadline=None)
@given(text=MESSY)
def test_a_tokenizer_json_counts_only_the_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    global _SMALL
    if _SMALL is None:
        folder = tmp_path_factory.mktemp("json")
        reference = small_json(folder)
        reference.no_truncation()
        reference.no_padding()
        reference.encode_special_tokens = True
        _SMALL = from_path(folder), reference
    ours, reference = _SMALL
    text = f"</s>{text} ﬁ"  # the ligature is two letters after NFKC
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert ours.count_stream(io.BytesIO(text.encode())).tokens == ours.count(text)


_SMALL: tuple[Tokenizer, Any] | None = None


def test_a_tekken_file(tmp_path: Path) -> None:
    import json

    import tiktoken

    ranks = merges(CORPUS, 40)
    entries = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for t, r in ranks.items()]
    config = {"pattern": PATTERN, "default_vocab_size": 256 + 30 + 1000, "default_num_special_tokens": 1000}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": entries}))
    kept = {t: r for t, r in ranks.items() if r < 256 + 30}  # the rest of the vocabulary is not in use
    reference = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=kept, special_tokens={})
    assert from_path(tmp_path).encode(CORPUS) == reference.encode_ordinary(CORPUS)
    (tmp_path / "tekken.json").write_text('{"config": {}}')
    with pytest.raises(InvalidInput, match="tekken"):
        from_path(tmp_path / "tekken.json")


@pytest.mark.parametrize(
    ("model", "tokenizer", "exact"),
    [
        ("gpt-4o-mini-2024-07-18", "o200k", True),
        ("gpt-4.1-nano", "o200k", True),
        ("gpt-5-mini", "o200k", True),
        ("openai/o3-mini", "o200k", True),
        ("chatgpt-4o-latest", "o200k", True),
        ("gpt-4-turbo", "cl100k", True),
        ("gpt-3.5-turbo-0125", "cl100k", True),
        ("text-embedding-3-small", "cl100k", True),
        ("claude-2.1", "claude", True),
        ("claude-opus-4-7", "claude", False),
        ("claude-3-5-haiku", "claude", False),
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "claude", False),
        ("gemini-2.5-pro", "gemma3", False),
        ("gemma-3-27b-it", "gemma3", True),
        ("gemma-2-9b", "gemma3", False),
        ("Qwen/Qwen3-32B", "qwen3", True),
        ("qwq-32b", "qwen3", True),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3", True),
        ("llama3.1:8b", "llama3", True),
        ("mistral-large-latest", "mistral", True),
        ("open-mixtral-8x7b", "mistral", False),
        ("codestral-latest", "mistral", True),
        ("deepseek-chat", "deepseek", True),
        ("deepseek-r1-distill-qwen-7b", "qwen3", True),
    ],
)
def test_models(model: str, tokenizer: str, exact: bool) -> None:
    found = choose(model)
    assert (found.tokenizer, not found.note) == (tokenizer, exact)


def test_models_that_are_not_known() -> None:
    for model in ("", "phi-4", "llama-4-maverick", "o", "photo1", "grok-4"):
        with pytest.raises(InvalidInput, match="--tokenizer"):
            choose(model)


def test_tokenizers_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRIFTY_HOME", str(tmp_path))
    load.cache_clear()
    with pytest.raises(InvalidInput, match=r"thrifty count --get qwen3"):
        load("qwen3")
    with pytest.raises(InvalidInput, match="did you mean 'qwen3'"):
        load("qwen")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    for path in (tmp_path, tmp_path / "nothing.json", tmp_path / "tokenizer.json"):
        with pytest.raises(InvalidInput, match="tokenizer"):
            from_path(path)


def test_an_estimate_has_counts_and_no_ids() -> None:
    assert ESTIMATE.count("x" * 33) == 10
    assert ESTIMATE.count_stream(io.BytesIO(b"x" * 33)).tokens == 10
    with pytest.raises(InvalidInput, match="no token ids"):
        ESTIMATE.encode("x")
