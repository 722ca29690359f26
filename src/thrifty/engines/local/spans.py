"""A text as a model's tokens, each with the characters that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from thrifty.engines.local.prompt import TextCodec
from thrifty.errors import Unsupported

PIECE = 100_000
"""Characters that are tokenised at once; a longer text is cut at white space where there is some."""


def start_of(codec: TextCodec) -> list[int]:
    """What stands before a whole text: the tokenizer's own special tokens, else its begin or end token, else nothing
    (then a text's first token has no score)."""
    bare, whole = codec.encode("a"), codec.encode("a", special=True)
    if bare and bare[0] in whole[1:]:
        return whole[: whole.index(bare[0])]
    ends = (getattr(codec.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next(([int(token)] for token in ends if token is not None), [])


def encode(codec: TextCodec, text: str) -> tuple[list[int], Any]:
    """Token ids of a text, and their spans int64 [n, 2] as `TokenScores` has them. Lone surrogates, as of invalid
    UTF-8, are read as U+FFFD. Raises Unsupported for a tokenizer that does not tell where its tokens stand."""
    backend = getattr(codec.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unsupported(f"{type(codec.tokenizer).__name__} tells no offsets: a model with a fast tokenizer is needed")
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for at, piece in _pieces("".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)):
        with codec._lock:
            encoded = backend.encode(piece, add_special_tokens=False)
        ids += encoded.ids
        spans += [(at + first, at + stop) for first, stop in encoded.offsets]
    return ids, _covering(spans, len(text))


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    at = 0
    while at < len(text):
        stop = min(len(text), at + PIECE)
        if stop < len(text):
            space = max(text.rfind(" ", at + PIECE // 2, stop), text.rfind("\n", at + PIECE // 2, stop))
            stop = space if space > 0 else stop
        yield at, text[at:stop]
        at = stop


def _covering(spans: Sequence[tuple[int, int]], length: int) -> Any:
    """Offsets as tokenizers give them leave out white space: each token takes what lies between it and the last."""
    found = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    if not len(found):
        return found
    found[:, 1] = np.maximum.accumulate(found[:, 1])
    found[-1, 1] = length
    before = np.concatenate([[0], found[:-1, 1]])
    found[:, 0] = np.minimum(np.maximum.accumulate(found[:, 0]), before)
    return found
