"""From drawn tokens to an answer: pieces of text, stop strings, thinking, drafts, and what of it may be shown already.

A `Shape` follows one generation token by token. Invariants: what `flush` gave out is never taken back, and all that it
gave out, joined, is the answer's text (thinking: its thinking); text that may turn out to be part of a stop string or
of a thinking tag is held back until that is known. Stop strings and separators are looked for in drawn text outside
of thinking only, never in forced text; while a draft is being written, stop strings do not count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from thrifty.call import Draft

THINK = ("<think>", "</think>")
"""The tags around thinking that most models which think use."""

ANSWER_ROOM = 16
"""Output tokens that a draft without a limit of its own leaves to the answer, if there are as many."""

_BROKEN = "\ufffd"

Ending = Literal["stop", "draft"]


class Pieces:
    """Text of tokens as they come: `add` gives what they add, "" while a character is incomplete.

    `decode` turns token ids into text. Only a short window is decoded again for each token.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = ""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add to what came before."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        if text.endswith(_BROKEN) and len(self._window) < 64:
            return ""
        new = text[len(self._shown) :]
        if len(self._window) > 16:
            # keep a few tokens of context: a decoder may treat the first token of a text in its own way
            self._window = self._window[-4:]
            text = self._decode(self._window)
        self._shown = text
        return new

    def rest(self) -> str:
        """What an end in the middle of a character leaves over."""
        text = self._decode(self._window)
        new, self._shown = text[len(self._shown) :], text
        return new

    def fork(self) -> Pieces:
        twin = Pieces(self._decode)
        twin._window, twin._shown = list(self._window), self._shown
        return twin


@dataclass(frozen=True, slots=True)
class Shown:
    """Text that may be shown now."""

    text: str = ""
    thinking: str = ""

    def __bool__(self) -> bool:
        return bool(self.text or self.thinking)


class Shape:
    """Follows one generation; see the top of the module.

    `thinking`: the output begins inside a thinking block (some templates open it in the prompt). `tags`: None turns the
    split off.
    """

    def __init__(
        self,
        stop: Sequence[str] = (),
        draft: Draft | None = None,
        prefix: str | None = None,
        tags: tuple[str, str] | None = THINK,
        thinking: bool = False,
    ) -> None:
        self.stop = tuple(s for s in stop if s)
        self.draft, self.prefix, self.tags = draft, prefix, tags
        self.drafting = draft is not None
        self.inside = thinking and tags is not None
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._sent = [0, 0]
        self._pending = ""
        self._trim = False
        self._draft_text = ""

    def fork(self) -> Shape:
        """A copy that goes its own way."""
        twin = copy.copy(self)
        twin._text, twin._thinking, twin._sent = list(self._text), list(self._thinking), list(self._sent)
        return twin

    def add(self, piece: str) -> Ending | None:
        """Takes drawn text: "stop" when a stop string is complete, "draft" when the draft's separator is."""
        self._pending += piece
        while self._pending:
            if self.inside:
                if not self._until_close():
                    return None
                continue
            marks: tuple[str, ...] = (self.tags[0],) if self.tags else ()
            if not self.drafting:
                marks += self.stop
            at, mark = _first(self._pending, marks)
            if at is None:
                keep = _overlap(self._pending, marks)
                take = len(self._pending) - keep
                return self._visible(take)
            ending = self._visible(at)
            if ending is not None:
                return ending
            if self.tags and mark == self.tags[0]:
                self._pending = self._pending[len(mark) :]
                self.inside = True
                continue
            self._pending = ""
            return "stop"
        return None

    def force(self, text: str) -> None:
        """Takes forced text: it may open or close thinking, and cannot stop."""
        if not self.inside:
            self._put(self._pending)
            self._pending = ""
        self._pending += text
        while self._pending:
            if self.inside:
                if not self._until_close():
                    return
                continue
            at, mark = _first(self._pending, (self.tags[0],) if self.tags else ())
            if at is None:
                self._put(self._pending)
                self._pending = ""
                return
            self._put(self._pending[:at])
            self._pending = self._pending[at + len(mark) :]
            self.inside = True

    def end_draft(self) -> str:
        """Ends the draft; the text to force: the separator if the model has not written it, then the prefix."""
        draft = self.draft
        if draft is None or not self.drafting:
            return ""
        self.drafting = False
        text = ""
        if self.inside and self.tags is not None:
            text += self.tags[1]
        if draft.separator not in self._draft_text:
            text += ("\n" if self._draft_text and not self._draft_text.endswith("\n") else "") + draft.separator
        if self.prefix:
            text += self.prefix if self.prefix[:1].isspace() else " " + self.prefix
        return text

    def flush(self) -> Shown:
        """What has become certain since the last flush."""
        text, thinking = "".join(self._text), "".join(self._thinking)
        shown = Shown(text[self._sent[0] :], thinking[self._sent[1] :])
        self._text, self._thinking = [text], [thinking]
        self._sent = [len(text), len(thinking)]
        return shown

    def end(self, rest: str = "") -> None:
        """No more comes: what was held back is text after all."""
        self._pending += rest
        (self._thinking.append if self.inside else self._put)(self._pending)
        self._pending = ""

    @property
    def text(self) -> str:
        """The answer's text so far, without thinking and stop strings."""
        return "".join(self._text)

    @property
    def thinking(self) -> str:
        """The thinking so far, without its tags."""
        return "".join(self._thinking)

    @property
    def parsed(self) -> str | None:
        """With a draft: what stands after the last separator, stripped; None when there is none."""
        if self.draft is None or self.draft.separator not in self.text:
            return None
        return self.text.rpartition(self.draft.separator)[2].strip()

    # -- details -----------------------------------------------------------------------------------------------

    def _visible(self, n: int) -> Ending | None:
        """Moves n characters of what is pending into the text."""
        taken, self._pending = self._pending[:n], self._pending[n:]
        self._put(taken)
        if self.drafting and self.draft is not None:
            self._draft_text += taken
            if self.draft.separator in self._draft_text:
                self._put(self._pending)
                self._pending = ""
                return "draft"
        return None

    def _put(self, text: str) -> None:
        if self._trim:
            # the blank lines between the end of thinking and the answer belong to neither
            text = text.lstrip()
            self._trim = not text
        if text:
            self._text.append(text)

    def _until_close(self) -> bool:
        """Moves thinking on; True when the block was closed."""
        close = self.tags[1] if self.tags else ""
        at = self._pending.find(close)
        if at < 0:
            keep = _overlap(self._pending, (close,))
            take = len(self._pending) - keep
            self._thinking.append(self._pending[:take])
            self._pending = self._pending[take:]
            return False
        self._thinking.append(self._pending[:at])
        self._pending = self._pending[at + len(close) :]
        self.inside, self._trim = False, True
        return True


def _first(text: str, marks: Sequence[str]) -> tuple[int | None, str]:
    """Where the earliest mark stands, and which it is; of two at one place the first given."""
    best: int | None = None
    which = ""
    for mark in marks:
        at = text.find(mark)
        if at >= 0 and (best is None or at < best):
            best, which = at, mark
    return best, which


def _overlap(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that could be the beginning of a mark."""
    longest = 0
    for mark in marks:
        for n in range(min(len(mark) - 1, len(text)), longest, -1):
            if mark.startswith(text[-n:]):
                longest = n
                break
    return longest
