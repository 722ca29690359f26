"""What a scripted engine is told: replies, what a script may draw from, and the words that are its tokens."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from thrifty.call import Call, Finish


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted answer."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    finish: Finish = "stop"
    raw: Mapping[str, Any] = field(default_factory=dict)


class Draw(random.Random):
    """What a script draws from: a generator seeded by the call and its seed; `index` counts how often this engine was
    asked for the same messages before, so samples can differ without a seed."""

    def __init__(self, seed: int, index: int) -> None:
        super().__init__(seed)
        self.index = index


Script: TypeAlias = (
    str | Reply | Callable[[Call, Draw], "str | Reply"] | Mapping[str, "str | Reply"] | Sequence["str | Reply"]
)
"""A reply to everything; a function of the rendered call; replies by a substring of the rendered messages and prefix
(the first that fits, "" fits all); or replies given out in order."""


class Words:
    """A reversible tokenizer: a token is a word with the white space before it, its id a hash of it."""

    ends: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self._words: dict[int, str] = {}

    def split(self, text: str) -> list[str]:
        """The words of a text; joined, they are the text."""
        return re.findall(r"\s*\S+|\s+", text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [self.number(word) for word in self.split(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids that this object gave out."""
        return "".join(self._words[token] for token in tokens)

    def number(self, word: str) -> int:
        """The id of one word: 48 bits of its hash, the same in every process."""
        token = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=6).digest())
        self._words[token] = word
        return token


def expected(word: str, context: str, before: str) -> float:
    """The log-probability of a word for who has no model: more letters and rarer ones are less likely, and a word that
    the context has is four times as likely in nats.

    >>> expected("zebra", "a zebra", "") > expected("zebra", "", "")
    True
    """
    core = word.strip().strip(".,;:!?\"'()").lower()
    letters = hashlib.blake2b(core.encode("utf-8", "surrogatepass"), digest_size=2).digest()
    surprise = 0.5 + min(len(core), 12) / 2 + int.from_bytes(letters) / 2**16
    known = bool(core) and re.search(rf"(?<!\w){re.escape(core)}(?!\w)", context.lower()) is not None
    return -surprise / 4 if known else -surprise
