"""Tool-output trimming: long results of tools keep what a reader looks at first, and stay parseable."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.call import Call, Message, Receipt
from thrifty.errors import InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.context import _shorten_code, _shorten_json, _shorten_text
from thrifty.methods.context._conversation import (
    Counter,
    cache_report,
    canonical,
    common_prefix,
    digest,
    is_result,
    previous_turn,
    recalls,
)

MATCHES = r"(?i)\b(error|exception|traceback|failed|failure|fatal|panic|warning)\b"
WORD = re.compile(r"\w{4,}")
KINDS = ("json", "json lines", "python", "braces", "text")


@dataclass(frozen=True, kw_only=True)
class ToolOutput(Rewrite):
    """Trims every tool result of more than `tokens` to at most that.

    - JSON loses white space first, then arrays are sampled (both ends, items that match, the rest evenly; their
      count is told), long texts lose their middle and wide or deep objects their rest. It is JSON afterwards, and
      so are JSON lines, line by line.
    - Code keeps its outline: bodies of functions and blocks give way to a comment, and it parses afterwards
      (Python, and languages of the C family). C-family code whose outline is still too long is cut as text.
    - Other text keeps head and tail, `head` of the two for the first, and lines that match.

    What matches: the regular expression `matches`, and words of four letters or more among the arguments of the
    tool call that asked for the result. These stand before the result in the conversation, so the same result is
    trimmed alike in every later turn and the provider's cache of the prefix holds. `fresh` results at the end stay
    whole for now; trimming them a turn later breaks the cache from there on, and the receipt's detail says what
    that costs (`net_saved`, in tokens at the full price).

    Each cut says how much is missing and, where it is `reversible`, how to ask for it: an assistant or user message
    behind it with `recall #REF` keeps the result whole from then on, and `recall` here gives it to a program. Images
    stay; a result that would not get shorter stays; lone surrogates, as of invalid UTF-8, pass as they are."""

    name = "tool-output"
    paper = "baseline: tool outputs cut to head, tail and matches; JSON sampled, code outlined"
    identity = {"tokens": 100_000_000}

    tokens: int = knob(1000, "tokens of a tool result that stay", low=1, high=100_000_000, log=True)
    fresh: int = knob(0, "newest results that stay whole", low=0, high=1000)
    head: float = knob(0.5, "share of a cut text's two ends that its beginning gets", low=0.0, high=1.0)
    matches: str = knob(MATCHES, "regular expression of lines and items that stay first; empty: none")
    query_words: bool = knob(True, "words of the tool call match too")
    reversible: bool = knob(True, "cuts say how to ask for what is missing")
    cached_price: float = knob(0.1, "price of a cached input token, as a share of the full one", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.matches)
        except re.error as error:
            raise InvalidInput(
                f"tool-output: knob matches = {self.matches!r} is not allowed: a regular expression is needed ({error})"
            ) from error

    async def rewrite(self, call: Call) -> Call:
        counter = Counter(call)
        trimmer = _Trimmer(self, counter)
        before = counter.prompt(call)
        results = sum(is_result(m) for m in call.messages)
        messages = trimmer.all(call.messages)
        if messages == call.messages:
            kept = f", {len(trimmer.recalled)} of them asked back" if trimmer.recalled else ""
            reason = f"{results} tool results, none to cut at {self.tokens} tokens{kept}"
            return call.with_receipt(Receipt(self.name, False, reason, before, before))
        changed = replace(call, messages=messages)
        after = counter.prompt(changed)
        cuts, recalled = dict(trimmer.cuts), sorted(trimmer.recalled)
        count = sum(a is not b for a, b in zip(call.messages, messages, strict=True))
        past = previous_turn(call.messages)
        sent = trimmer.all(past)
        shared = counter.messages(messages[: common_prefix(sent, messages)])
        report, words = cache_report(
            counter.messages(past), counter.messages(sent), shared, before, after, self.cached_price
        )
        kinds = ", ".join(f"{n} {kind}" for kind in KINDS if (n := sum(k == kind for k in cuts.values())))
        reason = f"cut {count} of {results} tool results ({kinds}){words}"
        detail = {"results": results, "cut": count, "refs": list(cuts), "recalled": recalled, **report}
        return changed.with_receipt(Receipt(self.name, True, reason, before, after, detail=detail))


class _Trimmer:
    """One call's trimming; what was cut before is not cut again."""

    def __init__(self, method: ToolOutput, counter: Counter) -> None:
        self.method, self.counter = method, counter
        self.cuts: dict[str, str] = {}
        """kind by ref, of the conversation that was trimmed last"""
        self.recalled: set[str] = set()
        self._known: dict[tuple[str, frozenset[str]], tuple[str, str] | None] = {}
        self._pattern = re.compile(method.matches) if method.matches else None

    def all(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages with their long results trimmed; those that stay are the same objects."""
        results = [i for i, m in enumerate(messages) if is_result(m)]
        fresh = set(results[-self.method.fresh :]) if self.method.fresh else set()
        self.cuts, self.recalled = {}, set()
        asked = self._asked(messages)
        out = list(messages)
        words = _call_words(messages) if self.method.query_words else {}
        for i in results:
            if i not in fresh:
                out[i] = self._message(messages[i], i, words.get(i, frozenset()), asked)
        return tuple(out)

    def _asked(self, messages: Sequence[Message]) -> dict[str, int]:
        """By ref, the last message that asks for it."""
        found: dict[str, int] = {}
        for i, message in enumerate(messages) if self.method.reversible else ():
            found |= {ref: i for pair in recalls([message]) for ref in pair}
        return found

    def _message(self, message: Message, at: int, words: frozenset[str], asked: Mapping[str, int]) -> Message:
        def short(text: str) -> str:
            ref = digest(text)
            done = self._text(text, ref, words)
            if done is None:
                return text
            if asked.get(ref, -1) > at:
                self.recalled.add(ref)
                return text
            self.cuts[ref] = done[1]
            return done[0]

        content = message.get("content")
        if isinstance(content, str):
            new: Any = short(content)
        else:
            new = [_part(p, short) for p in content or ()]
            content = list(content or ())
        return message if new == content else {**message, "content": new}

    def _text(self, text: str, ref: str, words: frozenset[str]) -> tuple[str, str] | None:
        """The trimmed text and its kind; None where it stays."""
        key = (text, words)
        if key not in self._known:
            size = self.counter.text(text)
            done = None if size <= self.method.tokens else self._trim(text, size, ref, words)
            if done is not None and self.counter.text(done[0]) >= size:
                done = None
            self._known[key] = done
        return self._known[key]

    def _trim(self, text: str, size: int, ref: str, words: frozenset[str]) -> tuple[str, str] | None:
        back = f"to see all, write: recall #{ref}" if self.method.reversible else ""

        def fits(candidate: str) -> bool:
            return self.counter.text(candidate) <= self.method.tokens

        def matches(line: str) -> bool:
            if self._pattern is not None and self._pattern.search(line):
                return True
            return bool(words) and not words.isdisjoint(w.lower() for w in WORD.findall(line))

        attempts: tuple[tuple[str, Callable[[], str | None]], ...] = (
            ("json", lambda: _shorten_json.shorten(text, fits, matches, back)),
            ("json lines", lambda: _shorten_json.shorten_lines(_filled(text), fits, matches, back)),
            ("python", lambda: _shorten_code.shorten_python(text, fits, matches, back)),
            ("braces", lambda: _shorten_code.shorten_braces(text, fits, back)),
        )
        for kind, attempt in attempts:
            try:
                short = attempt()
            except (ValueError, RecursionError):
                continue  # it is not of this kind, or nested too deep to be read
            if short is not None:
                return short, kind
        short = _shorten_text.shorten(
            text, size, self.method.tokens, self.counter.text, matches, self.method.head, back
        ) or _shorten_text.shorten(text, size, self.method.tokens, self.counter.text, matches, self.method.head, "")
        return None if short is None else (short, "text")


def recall(messages: Sequence[Message], ref: str) -> str:
    """The whole text of the tool result that a mark's ref stands for, from the conversation as it was: for a program
    that shows it, or offers it as a tool. Raises InvalidInput for a ref that is not there."""
    for message in messages:
        if is_result(message):
            content = message.get("content")
            parts = [content] if isinstance(content, str) else [_text(p) for p in content or ()]
            for text in parts:
                if text and digest(text) == ref.removeprefix("#"):
                    return text
    raise InvalidInput(f"ref {ref!r} names no tool result of this conversation: give one that a cut result shows")


def _text(part: Any) -> str:
    if not isinstance(part, Mapping):
        return ""
    text = part.get("content") if part.get("type") == "tool_result" else part.get("text")
    return text if isinstance(text, str) else ""


def _part(part: Any, short: Callable[[str], str]) -> Any:
    """A text part, or an Anthropic tool result, with its text trimmed."""
    if not isinstance(part, Mapping):
        return part
    for kind, key in (("text", "text"), ("tool_result", "content")):
        if part.get("type") == kind and isinstance(part.get(key), str):
            new = short(part[key])
            return part if new == part[key] else {**part, key: new}
    return part


def _filled(text: str) -> list[str]:
    """The lines with something on them. Raises ValueError where there are not at least two."""
    lines = [line for line in _shorten_text.split_lines(text) if line.strip()]
    if len(lines) < 2:
        raise ValueError("one line")
    return lines


def _call_words(messages: Sequence[Message]) -> dict[int, frozenset[str]]:
    """By result, the words of four letters or more of the call it answers, in lower case."""
    by_id: dict[str, frozenset[str]] = {}
    found: dict[int, frozenset[str]] = {}
    latest: frozenset[str] = frozenset()
    for i, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            body = call.get("function") or call.get("custom") or {}
            latest = _words(body.get("arguments") or body.get("input") or "")
            by_id[str(call.get("id"))] = latest
        if message.get("role") == "user" and not is_result(message):
            latest = frozenset()
        if is_result(message):
            found[i] = by_id.get(str(message.get("tool_call_id")), latest)
    return found


def _words(arguments: Any) -> frozenset[str]:
    """Words of a tool call's arguments: of their values, where they are JSON."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return frozenset(w.lower() for w in WORD.findall(arguments))
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, list):
        return frozenset().union(*(_words(canonical(v)) for v in arguments))
    return frozenset(w.lower() for w in WORD.findall(str(arguments)))
