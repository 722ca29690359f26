"""Notes that stand where messages of a conversation were left out: what they say, and where they are put so that
roles still alternate as chat templates demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.call import Message, text_of
from thrifty.methods.context._conversation import Counter, Group, is_result

LINE_LENGTHS = (160, 80, 40, 20)
"""characters of each message in an outline, the most that fits"""


@dataclass(frozen=True, slots=True)
class Gap:
    """A run of groups that was left out, one or more, with their tokens."""

    groups: tuple[Group, ...]
    tokens: int

    @property
    def ref(self) -> str:
        """How the run is asked back: the ref of its only group, or first and last."""
        first, last = self.groups[0].ref, self.groups[-1].ref
        return first if len(self.groups) == 1 else f"{first}-{last}"

    def header(self, count: int, reversible: bool) -> str:
        """The mark without its brackets: how many messages are missing, how long they were, how to see them."""
        what = "1 earlier message" if count == 1 else f"{count} earlier messages"
        back = f'; to see all, write "recall #{self.ref}"' if reversible else ""
        return f"{what} left out, {self.tokens} tokens{back}"


def mark(gap: Gap, messages: Sequence[Message], reversible: bool) -> str:
    """One line in brackets in the place of a gap."""
    return f"[{gap.header(_count(gap), reversible)}]"


def outline(gap: Gap, messages: Sequence[Message], counter: Counter, most: int, reversible: bool) -> str:
    """The mark, and a line for each group left out: who spoke, and how it began; at most `most` tokens.

    Lines are as long as fits, down to 20 characters; where even that is too much the newest groups have theirs."""
    head = gap.header(_count(gap), reversible)
    for length in LINE_LENGTHS:
        lines = [_line(g, messages, length, reversible) for g in gap.groups]
        whole = "\n".join([f"[{head}:", *lines]) + "]"
        if counter.text(whole) <= most:
            return whole
    low, high = 0, len(lines)  # how many of the newest fit
    while low < high:
        middle = (low + high + 1) // 2
        if counter.text("\n".join([f"[{head}; the last of them:", *lines[-middle:]]) + "]") <= most:
            low = middle
        else:
            high = middle - 1
    return "\n".join([f"[{head}; the last of them:", *lines[-low:]]) + "]" if low else f"[{head}]"


def told(gap: Gap, messages: Sequence[Message], summary: str, reversible: bool) -> str:
    """The mark with a model's summary of the gap."""
    return f"[{gap.header(_count(gap), reversible)}. Summary: {summary.strip()}]"


def transcript(gap: Gap, messages: Sequence[Message]) -> str:
    """What was left out as plain text, for a model to summarise."""
    lines: list[str] = []
    for i in _indices(gap):
        message = messages[i]
        text = text_of(message)
        calls = "".join(f"\n(calls {n})" for n in _called(message))
        lines.append(f"{message.get('role', 'unknown')}: {text}{calls}")
    return "\n\n".join(lines)


def place(kept: list[Any], gap_text: str, following: Message) -> Message:
    """Puts a note between `kept`, which may change at its end, and the message that follows, which is returned
    (changed where the note went into it).

    Between two users it is an assistant's message; before a user, the first lines of that message; after a user and
    before an assistant, the last lines of the user's; elsewhere a user's message. So roles alternate where they did."""
    before = kept[-1].get("role") if kept else None
    if following.get("role") == "user":
        if before == "user":
            kept.append({"role": "assistant", "content": gap_text})
            return following
        return _with(following, gap_text, front=True)
    if before == "user":
        kept[-1] = _with(kept[-1], gap_text, front=False)
    else:
        kept.append({"role": "user", "content": gap_text})
    return following


def _with(message: Message, text: str, front: bool) -> Message:
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        part = {"type": "text", "text": text}
        return {**message, "content": [part, *content] if front else [*content, part]}
    pieces = [text, content] if front else [content, text]
    return {**message, "content": "\n\n".join(p for p in pieces if p)}


def _indices(gap: Gap) -> list[int]:
    return [i for g in gap.groups for i in range(g.start, g.stop)]


def _count(gap: Gap) -> int:
    return len(_indices(gap))


def _called(message: Message) -> list[str]:
    calls = [c.get("function") or c.get("custom") or {} for c in message.get("tool_calls") or ()]
    return [str(c.get("name", "a tool")) for c in calls]


def _line(group: Group, messages: Sequence[Message], length: int, reversible: bool) -> str:
    first = messages[group.start]
    text = " ".join(text_of(first).split())
    if not text:
        text = "(no text)" if not _called(first) else ""
    results = sum(is_result(m) for m in messages[group.start + 1 : group.stop])
    calls = ", ".join(_called(first))
    called = f" calls {calls} ({results} result{'s' * (results != 1)})" if calls else ""
    ref = f" #{group.ref}" if reversible else ""
    return f"- {first.get('role', 'unknown')}{ref}: {_short(text, length)}{called}".rstrip()


def _short(text: str, length: int) -> str:
    """The beginning of a text, ended at a word where there is one."""
    if len(text) <= length:
        return text
    cut = text[:length]
    at_word = cut.rsplit(" ", 1)[0]
    return (at_word if len(at_word) > length // 2 else cut) + "..."
