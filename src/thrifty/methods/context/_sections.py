"""Refined content: numbered sections of sentences that stand word for word in the passages, each under its source's
title.

    1.1. ## Title of a passage
    A sentence of it.

    1.2. ## Title of another
    A sentence about the same.

    2.1. ## ...

Invariants: what `checked` lets through is a slice of a passage, byte for byte; `parse` reads what `render` writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from thrifty.methods.context._sentences import Cut, sentences

MOST_SECTIONS = 1000
"""of a reply, read at most"""
MOST_CLOSEST = 64
"""sentences of the passages with which one that is not there word for word is compared"""

_HEAD = re.compile(r"^[ \t*>]*(\d{1,4})\.(?:(\d{1,4})\.?)?[ \t*]+(?:#+[ \t]*)?(\S.*)$", re.MULTILINE)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Quote:
    """Sentences of one passage. `section`: quotes about the same have the same number; `source`: index of the passage,
    -1 before it is known."""

    section: int
    title: str
    text: str
    source: int = -1


def render(quotes: Sequence[Quote]) -> str:
    """Quotes in order, their sections numbered from 1 by first appearance, each quote within its section.

    >>> print(render([Quote(7, "Oslo", "It snows."), Quote(7, "Bergen", "It rains.")]))
    1.1. ## Oslo
    It snows.
    <BLANKLINE>
    1.2. ## Bergen
    It rains.
    """
    numbers = {s: i + 1 for i, s in enumerate(dict.fromkeys(q.section for q in quotes))}
    seen: dict[int, int] = {}
    blocks = []
    for quote in sorted(quotes, key=lambda q: numbers[q.section]):
        seen[quote.section] = seen.get(quote.section, 0) + 1
        blocks.append(f"{numbers[quote.section]}.{seen[quote.section]}. ## {quote.title}\n{quote.text}")
    return "\n\n".join(blocks)


def parse(text: str) -> list[Quote]:
    """The quotes of a reply in this form, in order; also "1. Title" and a quote on the heading's line behind a colon.
    Words before the first heading are no quote; [] where there is none.

    >>> parse("1.1. ## Oslo\\nIt snows.\\n\\n2.1 Bergen: It rains.")
    [Quote(section=1, title='Oslo', text='It snows.', source=-1), Quote(section=2, title='Bergen', text='It rains.', \
source=-1)]
    """
    heads = list(_HEAD.finditer(text))[:MOST_SECTIONS]
    quotes = []
    for head, following in zip(heads, [*heads[1:], None][: len(heads)], strict=True):
        body = text[head.end() : len(text) if following is None else following.start()].strip()
        title = head[3].strip(" *")
        if not body and ": " in title:
            title, _, body = title.partition(": ")
        if body:
            quotes.append(Quote(int(head[1]), title.strip(), body.strip()))
    return quotes


def title_of(text: str, index: int) -> str:
    """What a passage is called: its heading, else its number from 1."""
    heading = Cut.of(text).heading.strip().lstrip("# ").strip()
    return heading or f"Document {index + 1}"


class Sources:
    """Passages in which sentences are looked up, by words: case, punctuation and white space make no difference."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self.titles = [title_of(t, i) for i, t in enumerate(texts)]
        self._spans = [[m.span() for m in _WORD.finditer(t)] for t in texts]
        self._words = [_key(_words(t)) for t in texts]
        self._sentences = [(i, s.strip(), _words(s)) for i, t in enumerate(texts) for s in sentences(t)]
        self._known = [frozenset(words) for _, _, words in self._sentences]

    def find(self, sentence: str, near: float, first: int | None = None) -> tuple[int, str] | None:
        """The passage, and its own words for a sentence: the same words in the same order, or of one of its sentences a
        share of at least `near` (2 x words in common / words of both, in order). None for what nobody wrote. `first`:
        the passage to look in before the others."""
        words = _words(sentence)
        if not words:
            return None
        order = sorted(range(len(self.texts)), key=lambda i: i != first)
        for i in order:
            at = self._words[i].find(_key(words))
            if at >= 0:
                return i, self._slice(i, self._words[i].count(" ", 0, at + 1) - 1, len(words))
        best, ratio = None, near
        for i, text, theirs in self._closest(words):
            if (found := SequenceMatcher(None, words, theirs, autojunk=False).ratio()) >= ratio:
                best, ratio = (i, text), found
        return best

    def _slice(self, source: int, start: int, count: int) -> str:
        """Words [start, start + count) of a passage, with the punctuation that hangs on them."""
        text, spans = self.texts[source], self._spans[source]
        begin, end = spans[start][0], spans[start + count - 1][1]
        while begin and not text[begin - 1].isspace() and not text[begin - 1].isalnum():
            begin -= 1
        while end < len(text) and not text[end].isspace() and not text[end].isalnum():
            end += 1
        return text[begin:end]

    def _closest(self, words: Sequence[str]) -> list[tuple[int, str, list[str]]]:
        """Sentences that share most words, and none so long or short that they cannot be near."""
        mine = set(words)
        shared = [(len(mine & theirs), n) for n, theirs in enumerate(self._known)]
        shared.sort(key=lambda x: (-x[0], x[1]))
        return [self._sentences[n] for count, n in shared[:MOST_CLOSEST] if count]


def checked(quotes: Sequence[Quote], sources: Sources, near: float) -> tuple[list[Quote], int]:
    """The quotes with only sentences that stand in the passages, in the passages' words and under their titles, and how
    many sentences were thrown out. One that is there twice stays once; a passage's sentences in one section stay
    together."""
    kept: list[Quote] = []
    seen: set[tuple[int, str]] = set()
    thrown = 0
    for quote in quotes:
        named = next((i for i, t in enumerate(sources.titles) if t.lower() == quote.title.lower()), None)
        for sentence in sentences(quote.text):
            found = sources.find(sentence, near, named)
            if found is None:
                thrown += bool(_words(sentence))
                continue
            if found in seen:
                continue
            seen.add(found)
            source, text = found
            last = kept[-1] if kept else None
            if last is not None and last.section == quote.section and last.source == source:
                kept[-1] = replace(last, text=f"{last.text} {text}")
            else:
                kept.append(Quote(quote.section, sources.titles[source], text, source))
    return kept, thrown


def within(quotes: Sequence[Quote], most: int, count: Callable[[str], int]) -> list[Quote]:
    """The first quotes that fit into `most` tokens, rendered; of the one that does not fit, its first sentences."""
    low, high = 0, len(quotes)
    while low < high:
        middle = (low + high + 1) // 2
        if count(render(quotes[:middle])) <= most:
            low = middle
        else:
            high = middle - 1
    kept = list(quotes[:low])
    if low < len(quotes):
        parts = sentences(quotes[low].text)
        for n in range(len(parts) - 1, 0, -1):
            shorter = [*kept, replace(quotes[low], text="".join(parts[:n]).rstrip())]
            if count(render(shorter)) <= most:
                return shorter
    while kept and count(render(kept)) > most:  # a tokenizer may make more of fewer words
        kept.pop()
    return kept


def _words(text: str) -> list[str]:
    return [w.lower() for w in _WORD.findall(text)]


def _key(words: Sequence[str]) -> str:
    return " " + " ".join(words) + " "
