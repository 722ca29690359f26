"""A passage in sentences, byte for byte; and passages with other words in the place of the old ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.call import Call
from thrifty.context import Passages, render
from thrifty.methods.context._conversation import Counter, cache_report, common_prefix, previous_turn

HEADING_CHARS = 120
"""a longer first line is no heading"""

WRAPPED_CHARS = 60
"""a line of so many characters may be a wrapped one: its end alone ends no sentence"""

_END = re.compile(r"(?:[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’）]*|\n)\s*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Za-z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Inc|Ltd|Co|Corp|vs|cf|al|Fig|No|Nos|pp|ca|approx)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space behind it: joined, they are the text.

    A sentence ends at a mark with white space behind it, at a full stop of Chinese or Japanese, or with its line,
    unless that is so long that it may be wrapped. Initials and common abbreviations end none.

    >>> sentences("Dr. J. Roe left.  Why?\\nNobody knows")
    ['Dr. J. Roe left.  ', 'Why?\\n', 'Nobody knows']
    """
    pieces: list[str] = []
    start = 0
    for end in _END.finditer(text):
        said = text[max(start, end.start() - 16) : end.end()].rstrip()
        if not said or ("\n" not in end[0] and _ABBREVIATION.search(said)):
            continue
        line = end.start() - max(start, text.rfind("\n", start, end.start()) + 1)
        if end[0][0] == "\n" and end[0].count("\n") == 1 and line >= WRAPPED_CHARS:
            continue
        pieces.append(text[start : end.end()])
        start = end.end()
    if start < len(text):
        pieces.append(text[start:])
    return pieces


@dataclass(frozen=True, slots=True)
class Cut:
    """One passage cut up: its heading, or "", and its sentences; joined, they are the passage."""

    heading: str
    sentences: tuple[str, ...]

    @classmethod
    def of(cls, text: str, headings: bool = True) -> Cut:
        """A first line that ends no sentence, with more behind it, is a heading: it goes with whatever stays.

        >>> Cut.of("Jane Roe\\nShe was born in Oslo. She left.")
        Cut(heading='Jane Roe\\n', sentences=('She was born in Oslo. ', 'She left.'))
        """
        line, newline, rest = text.partition("\n")
        short = 0 < len(line.strip()) <= HEADING_CHARS
        if headings and newline and rest.strip() and short and not re.search(r"[.!?…。！？:;,]\W*$", line):
            space = len(rest) - len(rest.lstrip())
            return cls(line + newline + rest[:space], tuple(sentences(rest[space:])))
        return cls("", tuple(sentences(text)))

    def keep(self, which: Sequence[int]) -> str:
        """The passage with only these sentences, in its order; the white space at its end is what it was. Nothing
        stays of a passage without a sentence."""
        if not which:
            return ""
        whole = self.heading + "".join(self.sentences)
        kept = self.heading + "".join(self.sentences[i] for i in sorted(which))
        return kept.rstrip() + whole[len(whole.rstrip()) :]


def reworded(call: Call, found: Passages, texts: Sequence[str], order: Sequence[int] | None = None) -> Call:
    """The call with passage i reading texts[i]; an empty one goes. `order`: indices of those that stay, for passages of
    the `context` field; those cut from a message stay in its order."""
    stay = [i for i in (range(len(texts)) if order is None else order) if texts[i].strip()]
    pieces = list(found.pieces)
    for i, at in enumerate(found.where):
        pieces[at] = texts[i]
    return replace(found, texts=tuple(texts), pieces=tuple(pieces)).keep(call, stay)


def cache_cost(
    call: Call, changed: Call, counter: Counter, tokens: tuple[int, int], price: float
) -> tuple[dict[str, Any], str]:
    """What other passages may cost in cached tokens, as `cache_report` has it: at most, for a provider keeps the
    passages of the turn before where the same ones were chosen for it. Nothing where the model was never asked.

    `tokens`: of the prompt before and after. What the last turn and this one share, unchanged, would have been cached;
    changed, surely so only what stands before the first message that has passages."""
    past = tuple(previous_turn(call.messages))
    if not past:
        return {}, ""
    old, now, new = render(replace(call, messages=past)), render(call), render(changed)
    shared = common_prefix(old, now)
    safe = min(shared, common_prefix(now, new))
    held = max(safe, shared - (len(now) - len(new)))  # messages that went stood before the end of what was shared
    before, sent, after = (counter.messages(m) for m in (now[:shared], new[:held], new[:safe]))
    return cache_report(before, sent, after, *tokens, price)
