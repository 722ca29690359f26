"""What the methods on a conversation share: counting messages, which of them belong together, how what was cut is
asked back, and what a change costs in cached tokens.

A conversation is a call's messages as the caller sends them, whole, every time. Nothing is remembered between calls:
whatever a method decides follows from these messages alone, so the same history is cut at the same place again, on
any machine, and the provider's cache of the prefix holds from turn to turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.call import Call, Message, text_of
from thrifty.errors import InvalidInput
from thrifty.methods.context._passages import CHARS_PER_TOKEN

SYSTEM_ROLES = ("system", "developer")
RESULT_ROLES = ("tool", "function")
PIECE = 8_000
"""characters counted at once: tokenizers are slow on a megabyte without a space, and a local model counts no prompt
that is longer than its context"""

RECALL = re.compile(r"\brecall #([0-9a-f]{8})(?:-([0-9a-f]{8}))?")
"""How an assistant or a user asks for what was cut."""


# -- counting ------------------------------------------------------------------------------------------------


class Counter:
    """Tokens of texts, messages and prompts by one call's answering engine; characters / 3.3 without one.

    Long texts are counted in pieces of `PIECE` characters: at most a token too many each. A message is its content, its
    tool calls and what the engine adds around it."""

    def __init__(self, call: Call) -> None:
        self._engine = call.engines.get("answer")
        self._probe = call.on_behalf("")
        self._known: dict[str, int] = {}
        self._empty = self._measure("", 0)
        self._around = max(0, self._pair() - self._empty)

    def text(self, text: str) -> int:
        """Tokens of a text alone."""
        if text not in self._known:
            pieces = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
            self._known[text] = sum(max(0, self._measure(p, len(p)) - self._empty) for p in pieces)
        return self._known[text]

    def message(self, message: Message) -> int:
        """Tokens of one message of a conversation."""
        content = message.get("content")
        total = self._around
        if isinstance(content, str):
            total += self.text(content)
        else:
            total += sum(self._part(p) for p in content or ())
        fields = [message[k] for k in ("tool_calls", "function_call") if message.get(k)]
        return total + sum(self.text(canonical(f)) for f in fields)

    def messages(self, messages: Iterable[Message]) -> int:
        """Their sum."""
        return sum(self.message(m) for m in messages)

    def prompt(self, call: Call) -> int:
        """Input tokens of a call as it stands; the sum of its parts where the engine refuses to count it whole."""
        if self._engine is not None:
            try:
                return self._engine.count(call)
            except InvalidInput:
                pass
        tools = self.text(canonical(list(call.tools))) if call.tools else 0
        return self.messages(call.messages) + tools + sum(self.text(p) for p in call.context or ())

    def _part(self, part: Any) -> int:
        if not isinstance(part, Mapping):
            return 0
        if part.get("type") == "text":
            return self.text(str(part.get("text", "")))
        if "image" not in str(part.get("type")):
            return self.text(canonical(part))
        return max(0, self._measure([part], 0) - self._empty)

    def _measure(self, content: Any, length: int) -> int:
        if self._engine is not None:
            try:
                return self._engine.count(replace(self._probe, messages=({"role": "user", "content": content},)))
            except InvalidInput:
                pass
        return round(length / CHARS_PER_TOKEN)

    def _pair(self) -> int:
        if self._engine is None:
            return 0
        turns = ({"role": "user", "content": ""}, {"role": "assistant", "content": ""})
        try:
            return self._engine.count(replace(self._probe, messages=turns))
        except InvalidInput:
            return 0


# -- what belongs together -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Messages [start, stop) that stay or go together: one message, or tool calls with all their results."""

    start: int
    stop: int
    system: bool
    ref: str
    """8 hex digits of a digest of the messages: how the group is asked back"""


def groups(messages: Sequence[Message]) -> list[Group]:
    """The conversation in groups, in order, each message in one.

    A result belongs to the nearest call before it that names its id, or stands right behind. A result without any call,
    as where a conversation begins with one, is a group of its own: it is no worse off than it came."""
    found: list[Group] = []
    i = 0
    while i < len(messages):
        stop, at = i + 1, i
        while at < stop:
            stop = max(stop, _answered(messages, at))
            at += 1
        part = messages[i:stop]
        found.append(Group(i, stop, messages[i].get("role") in SYSTEM_ROLES, digest([dict(m) for m in part])))
        i = stop
    return found


def _answered(messages: Sequence[Message], at: int) -> int:
    """One past the last result of the calls in message `at`."""
    waiting = call_ids(messages[at])
    if not waiting and not messages[at].get("function_call"):
        return at + 1
    last, open_ids = at, set(waiting)
    for j in range(at + 1, len(messages)):
        if not open_ids or open_ids & call_ids(messages[j]):
            break  # answered, or a later call uses the same id again
        if open_ids & result_ids(messages[j]):
            open_ids -= result_ids(messages[j])
            last = j
    stop = last + 1
    while stop < len(messages) and is_result(messages[stop]):
        stop += 1
    return stop


def call_ids(message: Message) -> set[str]:
    """Ids of the tool calls in a message."""
    ids = {str(c.get("id")) for c in message.get("tool_calls") or () if isinstance(c, Mapping)}
    return ids | {str(p.get("id")) for p in _parts(message) if p.get("type") == "tool_use"}


def result_ids(message: Message) -> set[str]:
    """Ids of the tool calls that a message answers."""
    ids = {str(message["tool_call_id"])} if is_result(message) and message.get("tool_call_id") else set()
    return ids | {str(p.get("tool_use_id")) for p in _parts(message) if p.get("type") == "tool_result"}


def is_result(message: Message) -> bool:
    """Whether it is what a tool gave back."""
    return message.get("role") in RESULT_ROLES or any(p.get("type") == "tool_result" for p in _parts(message))


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [p for p in content if isinstance(p, Mapping)] if isinstance(content, (list, tuple)) else []


# -- asking back ---------------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"), default=str)


def digest(value: Any) -> str:
    """8 hex digits of the SHA-256 of a JSON value; lone surrogates, as of invalid UTF-8, are no obstacle."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:8]


def recalls(messages: Iterable[Message]) -> list[tuple[str, str]]:
    """What assistant and user ask to see again: (first, last) refs, equal where one is asked for. What a tool
    printed asks for nothing.

    >>> recalls([{"role": "assistant", "content": "I must recall #0011aabb first."}])
    [('0011aabb', '0011aabb')]
    """
    speakers = [m for m in messages if m.get("role") in ("user", "assistant")]
    found = [m.groups() for message in speakers for m in RECALL.finditer(text_of(message))]
    return [(first, last or first) for first, last in found]


# -- the provider's cache ------------------------------------------------------------------------------------


def previous_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation as it was when the model was last asked: all before its last message; () where it never
    was."""
    spoke = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    return messages[: spoke[-1]] if spoke else ()


def common_prefix(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many messages two conversations begin with alike."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def cache_report(
    cached_before: int, sent_before: int, cached_after: int, before: int, after: int, cached_price: float
) -> tuple[dict[str, Any], str]:
    """What a change does to the bill of a provider that caches prefixes, where the turn before was sent a moment
    ago by the same plan: for the receipt's detail, and in words where something breaks or is lost.

    Unchanged, `cached_before` of `before` tokens would have been cached: the turn before, whole. Changed, that turn
    had `sent_before` tokens, and `cached_after` of the `after` tokens now begin as they did; the rest of it is broken.
    `net_saved` is in tokens at the full price, of which a cached one costs `cached_price`; it is below zero where the
    discount lost is worth more than what was cut.

    >>> cache_report(900, 380, 0, 1000, 400, 0.1)[0]
    {'cached_before': 900, 'cached_after': 0, 'cache_broken': 380, 'net_saved': -210.0}
    """
    broken = max(0, sent_before - cached_after)
    net = round((before - after) - (1 - cached_price) * (cached_before - cached_after), 6)
    detail = {"cached_before": cached_before, "cached_after": cached_after, "cache_broken": broken, "net_saved": net}
    words = f"; it breaks {broken} cached tokens" if broken else ""
    if net < 0:
        words += f"; a loss of {-net:g} tokens at full price if the provider caches prefixes"
    return detail, words
