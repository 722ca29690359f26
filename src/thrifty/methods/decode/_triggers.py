"""Trigger words of reflection as token ids: every token of a vocabulary that is such a word and nothing else.

A tokenizer has a word in several forms: with a leading space and without, in other case, as its own token or not at
all. Invariants: a form is taken when its text without white space is the word, case ignored; special and unknown tokens
are never taken; a word without a token of its own is reported, not replaced by its first piece."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Triggers:
    """Token ids by word, ascending; a word that has none has an empty tuple."""

    found: Mapping[str, tuple[int, ...]]
    ids: list[int] = field(init=False)
    """all of them, ascending, each once; a list, as a tensor is indexed with it"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", sorted({i for ids in self.found.values() for i in ids}))

    @property
    def missing(self) -> list[str]:
        """Words that are no single token of the vocabulary."""
        return [word for word, ids in self.found.items() if not ids]

    def describe(self) -> str:
        """In words, for a receipt."""
        if not self.ids:
            words = ", ".join(self.found)
            return f"none of {words} is a token of the model" if words else "no words were given"
        if self.missing:
            return f"no token of the model: {', '.join(self.missing)}"
        return f"{len(self.ids)} tokens"


_known: weakref.WeakKeyDictionary[Any, dict[tuple[str, ...], Triggers]] = weakref.WeakKeyDictionary()
"""By codec; looking through a vocabulary of 150,000 takes a while."""


def triggers(codec: Any, words: tuple[str, ...]) -> Triggers:
    """The tokens of `words` in the vocabulary of an engine's codec; none where it has no vocabulary to look through."""
    mine = _known.setdefault(codec, {})
    if words not in mine:
        mine[words] = _search(codec, words)
    return mine[words]


def _search(codec: Any, words: tuple[str, ...]) -> Triggers:
    found: dict[str, list[int]] = {word: [] for word in words}
    by_form = {word.strip().casefold(): word for word in reversed(words)}
    by_form.pop("", None)
    tokenizer = getattr(codec, "tokenizer", None)
    if tokenizer is not None and by_form:
        special = set(getattr(tokenizer, "all_special_ids", ())) | set(codec.ends)
        # a token's raw form spells ASCII letters as they are, so most of a vocabulary need not be decoded
        plain = all(form.isascii() and form.isalpha() for form in by_form)
        for raw, token in tokenizer.get_vocab().items():
            if token in special or (plain and not any(form in raw.casefold() for form in by_form)):
                continue
            word = by_form.get(codec.decode([token]).strip().casefold())
            if word is not None:
                found[word].append(token)
    return Triggers({word: tuple(sorted(ids)) for word, ids in found.items()})
