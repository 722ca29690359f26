"""Context passages of a call: found, dropped and rendered back in place, the text around them byte-identical.

Passages come from the call's `context` field, or are cut from a long user message at its blank lines. Rendering is
what every engine does last: it turns `context`, and nothing else, into message text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from thrifty.call import CONTEXT_MARK, Call, Message

SEPARATOR = "\n\n"
"""Between the passages of the `context` field."""


@dataclass(frozen=True, slots=True)
class Passages:
    """The passages of one call. `texts[i]` may be dropped; `keep` says which stay."""

    texts: tuple[str, ...]
    source: int | None = None
    """the message the passages were cut from; None: the call's `context` field"""
    pieces: tuple[str, ...] = ()
    """the cut message's text in order: joined, they are the message"""
    where: tuple[int, ...] = ()
    """index into `pieces` of each passage"""

    def keep(self, call: Call, order: Sequence[int]) -> Call:
        """The call with only the passages in `order`. Those cut from a message stay in its order."""
        if self.source is None:
            return replace(call, context=tuple(self.texts[i] for i in order))
        kept = {self.where[i] for i in order}
        dropped = set(self.where) - kept
        text = "".join(piece for i, piece in enumerate(self.pieces) if i not in dropped)
        return replace(call, messages=_with_text(call.messages, self.source, text))


def passages(call: Call, count: Callable[[str], int], over: int) -> Passages:
    """The call's passages: its `context`, else the paragraphs of the last user message longer than `over` tokens.

    The last paragraph of a cut message stays: it is where a question stands. `count` gives the tokens of a text.
    """
    if call.context:
        return Passages(call.context)
    for i in range(len(call.messages) - 1, -1, -1):
        message = call.messages[i]
        if message.get("role") != "user" or not isinstance(message.get("content"), str):
            continue
        text = str(message["content"])
        if count(text) <= over:
            continue
        pieces = tuple(re.findall(r"(?s).+?(?:\n\s*\n|\Z)", text))
        if len(pieces) > 1 and "".join(pieces) == text:
            return Passages(pieces[:-1], i, pieces, tuple(range(len(pieces) - 1)))
    return Passages(())


def render(call: Call) -> tuple[Message, ...]:
    """The call's messages with its context in place.

    The context replaces the first `CONTEXT_MARK` in a user message; without a mark it stands before the text of the
    last user message. Where all passages were dropped, the mark goes; a call that never had context stays as it is, and
    a system or assistant message never changes.
    """
    if call.context is None:
        return call.messages
    block = SEPARATOR.join(call.context)
    users = [i for i, m in enumerate(call.messages) if m.get("role") == "user"]
    for i in users:
        texts = _texts(call.messages[i])
        marked = next((j for j, text in enumerate(texts) if CONTEXT_MARK in text), None)
        if marked is not None:
            before, _, after = texts[marked].partition(CONTEXT_MARK)
            if not block and after.startswith(SEPARATOR):
                after = after[len(SEPARATOR) :]
            return _with_text(call.messages, i, before + block + after, marked)
    if not block:
        return call.messages
    if not users:
        return (*call.messages, {"role": "user", "content": block})
    last = users[-1]
    first = next(iter(_texts(call.messages[last])), "")
    return _with_text(call.messages, last, block + SEPARATOR + first)


def _texts(message: Message) -> list[str]:
    """A message's texts: one of a plain message, one a text part of the others."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [str(part.get("text", "")) for part in content or () if part.get("type") == "text"]


def _with_text(messages: tuple[Message, ...], index: int, text: str, which: int = 0) -> tuple[Message, ...]:
    """One text of one message replaced; its other parts, images too, keep their places. A message without text gets it
    in front."""
    old = messages[index]
    content = old.get("content")
    if isinstance(content, str) or content is None:
        new: object = text
    else:
        parts = list(content)
        places = [i for i, part in enumerate(parts) if part.get("type") == "text"]
        if places:
            parts[places[which]] = {**parts[places[which]], "text": text}
        else:
            parts.insert(0, {"type": "text", "text": text})
        new = parts
    return (*messages[:index], {**old, "content": new}, *messages[index + 1 :])
