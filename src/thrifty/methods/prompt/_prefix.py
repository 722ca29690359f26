"""How much of a prompt a provider has seen before: prefixes as chains of digests, piece by piece.

A prompt is read in the order in which providers cache it: the tools, then the messages. Its text is cut
into pieces of at most `PIECE` characters, never across a message; each piece's digest covers all that stands before
it, so two prompts share exactly their leading equal digests. That is how block-wise prefix caches work; only digests
are kept, no text.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.call import Call, text_of
from thrifty.context import render
from thrifty.methods.prompt._system import SYSTEM_ROLES

PIECE = 64
"""Characters of a piece: about 16 tokens of English, vLLM's block."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt's pieces: what each adds to the text, its digest, and where tools and messages end."""

    texts: tuple[str, ...]
    digests: tuple[bytes, ...]
    tools_end: int
    """pieces of the tools"""
    ends: Mapping[int, int]
    """pieces up to the end of a message, by its index in the call"""

    def text(self, pieces: int) -> str:
        """The text of the first so many pieces."""
        return "".join(self.texts[:pieces])


def prefix_of(call: Call, scope: str = "", system_first: bool = False) -> Prefix:
    """The call's prompt in pieces, its context rendered. `system_first`: the provider puts system messages before all
    others, wherever they stand (Anthropic). Prompts of another `scope` never share any."""
    texts: list[str] = []
    digests: list[bytes] = []
    last = hashlib.blake2b(scope.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def add(shape: str, text: str) -> None:
        nonlocal last
        for start in range(0, max(1, len(text)), PIECE):
            piece = text[start : start + PIECE]
            head = f"{shape}\0{start}\0{piece}".encode("utf-8", "surrogatepass")
            last = hashlib.blake2b(last + head, digest_size=16).digest()
            texts.append(piece)
            digests.append(last)

    for tool in call.tools:
        add("tool", _json(tool))
    tools_end = len(texts)
    messages = render(call)
    ends: dict[int, int] = {}
    for i in in_order(messages) if system_first else range(len(messages)):
        add(_shape(messages[i]), text_of(messages[i]))
        ends[i] = len(texts)
    return Prefix(tuple(texts), tuple(digests), tools_end, ends)


def in_order(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of messages, system messages first, wherever they stand."""
    return sorted(range(len(messages)), key=lambda i: messages[i].get("role") not in SYSTEM_ROLES)


class PrefixMemory:
    """Digests seen before, the last `most` of them; thread-safe. `marked` ones end a prefix that was to be written
    to the provider's cache."""

    def __init__(self, most: int = 65_536) -> None:
        self.most = most
        self._seen: OrderedDict[bytes, tuple[float, bool]] = OrderedDict()
        self._lock = threading.Lock()

    def shared(self, prefix: Prefix, now: float, seconds: float, marks: Sequence[int] = ()) -> tuple[int, int]:
        """(pieces, read): how many leading pieces were seen within `seconds`, and how many of them are read from a
        cache that was written up to marks, and that looks for what was written at this prompt's own marks and before
        them."""
        pieces = read = 0
        last = max(marks, default=0)
        with self._lock:
            for i, digest in enumerate(prefix.digests, start=1):
                at, is_marked = self._seen.get(digest, (-1e18, False))
                if now - at >= seconds:
                    break
                pieces = i
                read = i if is_marked and i <= last else read
        return pieces, read

    def add(self, prefix: Prefix, marks: Sequence[int], now: float) -> None:
        """Remembers a prompt; `marks`: its marked prefixes, in pieces."""
        ends = {m - 1 for m in marks}
        with self._lock:
            for i in range(len(prefix.digests) - 1, -1, -1):  # the beginnings last: they are forgotten last
                digest = prefix.digests[i]
                was = self._seen.pop(digest, (0.0, False))[1]
                self._seen[digest] = (now, was or i in ends)
            while len(self._seen) > self.most:
                self._seen.popitem(last=False)


def _shape(message: Mapping[str, Any]) -> str:
    """All of a message but its text: role, images, tool calls, other fields. Marks are no part of it."""
    content = message.get("content")
    rest: Any = None
    if isinstance(content, (list, tuple)):
        rest = [p for p in content if isinstance(p, Mapping) and p.get("type") != "text"]
    return _json({**{k: v for k, v in message.items() if k != "content"}, "content": rest or None})


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)
