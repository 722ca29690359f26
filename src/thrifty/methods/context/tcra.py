"""TCRA-LLM's semantic compression: the words whose absence changes a sentence's embedding least are left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from thrifty.call import Call, Receipt
from thrifty.context import passages
from thrifty.errors import BudgetExceeded
from thrifty.method import Rewrite, knob
from thrifty.methods.context._conversation import Counter
from thrifty.methods.context._passages import embed
from thrifty.methods.context._sentences import cache_cost, reworded, sentences
from thrifty.spend import Spend, total_spend

UNITS = ("sentence", "passage")
BATCH = 1024
"""texts embedded in one request at most"""
DIGITS = 5
"""of an impact: what lies behind is noise of single precision, and would break ties"""
PIECE_WORDS = 200
"""a longer sentence is embedded in pieces of so many words: n words cost about n * n tokens"""

_WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]\s*|[^\s぀-ヿ㐀-鿿豈-﫿]+\s*|\s+")
_NUMBER = re.compile(r"\d")
_NEGATION = re.compile(
    r"(?:not|no|nor|non|none|never|nothing|nobody|nowhere|neither|without|except|unless|cannot|\w*n['’]t)\W*",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Tcra(Rewrite):
    """Takes `ratio` of each passage's tokens away, the words that matter least first, and keeps the order of the rest.

    How much a word matters is its impact: the distance between the embedding of its sentence (`unit`) and of the same
    without it. Impacts of one passage are ranked together, the fewest words go that bring its tokens, as the answering
    engine counts them, to at most (1 - ratio) of what they were; a passage that would have no word left goes whole.
    `group` words are tried and left out together. `rounds` above 1 measures impacts anew after each part of the
    removal, at as many times the price. `protect` keeps numbers and negations until nothing else is left (false is as
    in the paper: they go like other words, and "not" has a small impact on most embedders).

    The embedder reads every sentence once for each of its words: a sentence of 20 words costs 20 times its tokens, at
    the embedder's price. The receipt says what it read; counted in `tokens` that is more than is saved, always: the
    method pays in `usd`, on a local embedder, or where the same passages come again and again.

    The paper's other method, a T5 fine-tuned to summarise at several lengths, is not here: it is a trained model. The
    distance and the grouping are reconstructed from descriptions of the paper; on unit vectors all usual distances rank
    alike. Impacts are measured once and not after each word, which the descriptions call iterative: see `rounds`."""

    name = "tcra"
    paper = (
        "TCRA-LLM: Token Compression Retrieval Augmented Large Language Model for Inference Cost Reduction "
        "(Liu et al. 2023, arXiv:2310.15556), its semantic compression"
    )
    roles = {"embedder": frozenset({"embed"})}
    identity = {"ratio": 0.0}

    ratio: float = knob(0.2, "share of each passage's tokens that goes", low=0.0, high=0.99)
    group: int = knob(1, "words left out together", low=1, high=100)
    unit: str = knob("sentence", "what is embedded with and without a word", choices=UNITS)
    rounds: int = knob(1, "times that impacts are measured", low=1, high=100)
    protect: bool = knob(True, "numbers and negations go last")
    chunk_over: int = knob(512, "cut a user message into paragraphs when it has more tokens", low=1, high=10_000_000)
    cached_price: float = knob(0.1, "price of a cached input token, as a share of the full one", low=0.0, high=1.0)

    async def rewrite(self, call: Call) -> Call:
        counter = Counter(call)
        before = counter.prompt(call)

        def unfired(reason: str, **paid: Any) -> Call:
            return call.with_receipt(Receipt(self.name, False, reason, before, before, **paid))

        if not self.ratio:
            return unfired("ratio = 0 takes nothing away")
        found = passages(call, counter.text, self.chunk_over)
        if not found.texts:
            return unfired("0 passages: there is nothing to compress")
        texts = [_Text.of(t, self) for t in found.texts]
        paid: list[Spend] = []
        stopped = ""
        for part in range(self.rounds):
            share = (part + 1) / self.rounds
            try:
                await self._measure(call, texts, paid)
            except BudgetExceeded as error:
                if call.on_exceed == "refuse":
                    raise
                stopped = f"the budget cannot hold the embedding without each word ({error.resource})"
                break
            for text in texts:
                size = counter.text(text.whole.strip())
                text.shrink(floor(size * (1 - self.ratio * share) + 1e-9), counter.text)
        spend = total_spend(paid)
        kept = [t.now for t in texts]
        changed = reworded(call, found, kept)
        after = counter.prompt(changed)
        if stopped and kept == list(found.texts):
            return unfired(f"{stopped}: all kept", spend=spend)
        if after >= before:
            return unfired("no word can go that would save a token", spend=spend)
        words, gone = sum(len(t.words) for t in texts), sum(not k for t in texts for k in t.kept)
        empty = sum(not k.strip() for k in kept)
        report, told = cache_cost(call, changed, counter, (before, after), self.cached_price)
        reason = f"left out {gone} of {words} words; the embedder read {spend.input} tokens for it"
        reason += f"; {empty} passages have no word left" if empty else ""
        reason += f"; {stopped}, so fewer went" if stopped else ""
        detail = {"words": words, "left_out": gone, "passages": len(kept), "emptied": empty, **report}
        return changed.with_receipt(Receipt(self.name, True, reason + told, before, after, spend=spend, detail=detail))

    async def _measure(self, call: Call, texts: Sequence[_Text], paid: list[Spend]) -> None:
        """Sets the impact of every group of words that is still there, and adds to `paid` request by request. Raises
        BudgetExceeded; what was measured before stays paid."""
        waiting: list[tuple[_Text, int]] = []
        asked: dict[str, None] = {}
        units = [(text, unit) for text in texts for unit in range(len(text.units))]
        for n, (text, unit) in enumerate(units):
            waiting.append((text, unit))
            asked |= dict.fromkeys(text.variants(unit))
            if asked and (len(asked) >= BATCH or n == len(units) - 1):
                embedded = await embed(call, self.name, list(asked))
                paid.append(embedded.spend)
                known = dict(zip(asked, embedded.vectors, strict=True))
                for one, at in waiting:
                    one.take(at, known)
                waiting, asked = [], {}


@dataclass
class _Text:
    """One passage as words, joined they are the passage: which are kept, in which unit and group each is, and the
    impact of each group."""

    whole: str
    words: list[str]
    units: list[list[int]]
    """indices of words"""
    groups: list[list[int]]
    """indices of words that go together, each within one unit"""
    own: list[list[int]]
    """indices of the groups of each unit"""
    guarded: list[bool]
    """by group: it goes last"""
    kept: list[bool]
    impacts: list[float]

    @classmethod
    def of(cls, text: str, method: Tcra) -> _Text:
        words: list[str] = []
        units: list[list[int]] = []
        for sentence in sentences(text) if method.unit == "sentence" else [text]:
            more = split_words(sentence)
            start = len(words)
            words += more
            units += [
                list(range(start + i, min(start + i + PIECE_WORDS, start + len(more))))
                for i in range(0, len(more), PIECE_WORDS)
            ]
        groups: list[list[int]] = []
        own: list[list[int]] = []
        for unit in units:
            first = len(groups)
            groups += [unit[i : i + method.group] for i in range(0, len(unit), method.group)]
            own.append(list(range(first, len(groups))))
        guarded = [method.protect and any(protected(words[i]) for i in g) for g in groups]
        return cls(text, words, units, groups, own, guarded, [True] * len(words), [0.0] * len(groups))

    @property
    def now(self) -> str:
        """The passage as it stands; a line whose last word went still ends, and the white space at the end is what it
        was; "" without any word."""
        pieces: list[str] = []
        for word, kept in zip(self.words, self.kept, strict=True):
            if kept:
                pieces.append(word)
            elif pieces and "\n" in word and "\n" not in pieces[-1]:
                pieces[-1] = pieces[-1].rstrip() + word[len(word.rstrip()) :]
        text = "".join(pieces).rstrip()
        return text + self.whole[len(self.whole.rstrip()) :] if text else ""

    def variants(self, unit: int) -> list[str]:
        """A unit as it stands, and without each of its groups that is still there; what would be empty is left out."""
        texts = [self._without(unit, ()), *(self._without(unit, self.groups[n]) for n in self._left(unit))]
        return [t for t in texts if t]

    def take(self, unit: int, vectors: Mapping[str, Any]) -> None:
        """Impacts from the vectors of `variants`: distances from the unit as it stands; the largest there is for the
        last group of a unit."""
        whole = vectors.get(self._without(unit, ()))
        for n in self._left(unit):
            other = vectors.get(self._without(unit, self.groups[n]))
            if whole is not None:
                difference = whole - (-whole if other is None else other)
                self.impacts[n] = round(float((difference @ difference) ** 0.5), DIGITS)

    def shrink(self, most: int, count: Callable[[str], int]) -> None:
        """Leaves out the fewest groups, in order of impact, that bring the passage to at most `most` tokens."""
        left = [n for n, g in enumerate(self.groups) if self.kept[g[0]]]
        order = sorted(left, key=lambda n: (self.guarded[n], self.impacts[n], n))

        def tokens(gone: int) -> int:
            self._set(order, gone)
            return count(self.now.strip())

        low, high = 0, len(order)  # tokens(high) is 0
        while low < high:
            middle = (low + high) // 2
            if tokens(middle) <= most:
                high = middle
            else:
                low = middle + 1
        while low < len(order) and tokens(low) > most:
            low += 1  # a tokenizer may make more of fewer words
        self._set(order, low)

    def _set(self, order: Sequence[int], gone: int) -> None:
        for rank, n in enumerate(order):
            for i in self.groups[n]:
                self.kept[i] = rank >= gone

    def _left(self, unit: int) -> list[int]:
        """Indices of a unit's groups that are still there."""
        return [n for n in self.own[unit] if self.kept[self.groups[n][0]]]

    def _without(self, unit: int, group: Sequence[int]) -> str:
        return "".join(self.words[i] for i in self.units[unit] if self.kept[i] and i not in group).strip()


def split_words(text: str) -> list[str]:
    """Words with the white space behind them: joined, they are the text. A Chinese or Japanese character is a word.

    >>> split_words("No  salt,\\nplease. 你好")
    ['No  ', 'salt,\\n', 'please. ', '你', '好']
    """
    found = _WORD.findall(text)
    return ["".join(found[:2]), *found[2:]] if len(found) > 1 and not found[0].strip() else list(found)


def protected(word: str) -> bool:
    """Whether a word has a digit or negates.

    >>> [protected(w) for w in ("42%", "Don't", "knot", "NOT,")]
    [True, True, False, True]
    """
    return bool(_NUMBER.search(word) or _NEGATION.fullmatch(word.strip(" \t\n\r(\"'“‘[").strip()))
