"""Provider prompt caching: the stable beginning of a prompt is marked, so that the provider bills it at a discount."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from thrifty.call import Call, Message, Receipt
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt._prefix import Prefix, PrefixMemory, prefix_of
from thrifty.methods.prompt._system import SYSTEM_ROLES, prompt_tokens

MARK = "cache_control"
MOST_MARKS = 4
"""What Anthropic allows in one request."""
_CLAUDE = ("claude", "anthropic")


@dataclass(frozen=True, kw_only=True)
class PromptCaching(Rewrite):
    """Helps the provider's own prompt cache, and measures how much of each prompt it can serve.

    `anthropic`: sets breakpoints (`cache_control`), at most four. A prefix is written to the cache up to each and read
    from it by later calls that begin alike, in the order tools, system, messages. They go to the end of the leading
    system messages (of the tools, where there is none) and, in conversations, to the last message and the user
    or tool message before it, so that the next turn finds what this one wrote (`turns`: `auto` marks those once an
    assistant has spoken; writing costs 1.25 times the input price, 2 times with `hour`, and a question that is asked
    once would be written for nothing). Only prefixes of `minimum` tokens or more are marked: the provider
    ignores shorter ones without a word. A call that brings marks of its own keeps them and gets no others.

    `automatic` (OpenAI, DeepSeek, Gemini, vLLM and others): prefixes of at least `minimum` tokens are cached by
    themselves in steps of `step`; nothing needs to be marked. `key` adds `prompt_cache_key`, which sends calls that
    begin alike to the same machine. `auto` takes `anthropic` for models with "claude" or "anthropic" in their name.

    With both, `tools = "sorted"` puts the tools in the order of their names: tools stand first, so a list that comes in
    another order every time breaks the cache from the first token. Messages are never reordered and no word is changed.

    The receipt has the tokens of the prompt before, and after those that are still expected at the full price; its
    detail the tokens shared with the beginning of an earlier call of the same account within `seconds`
    (`shared`: text, by the engine's count, in pieces of 64 characters), those expected from the cache (`expected`),
    and the breakpoints. What the provider really read stands in the answer's `Spend.cached`. Price tables here have no
    rate for writing, so its premium is not in `usd`. Put this after the other prompt methods, and beware of methods
    below it that rewrite the conversation: what they change is no longer what was marked."""

    name = "prompt-caching"
    paper = "baseline: providers' prompt caching (Anthropic's cache_control, OpenAI's automatic prefixes)"
    identity = {"provider": "automatic", "tools": "given", "key": ""}
    remembers = True

    provider: str = knob("auto", "how the provider caches prompts", choices=("auto", "anthropic", "automatic"))
    minimum: int = knob(1024, "tokens that a prefix needs to be cached", low=1, high=1_000_000, log=True)
    step: int = knob(128, "automatic: tokens by which a cached prefix grows", low=1, high=100_000, log=True)
    turns: str = knob("auto", "anthropic: mark the conversation too", choices=("auto", "always", "never"))
    hour: bool = knob(False, "anthropic: keep for an hour instead of five minutes, written at twice the input price")
    tools: str = knob("given", "order of the tools", choices=("given", "sorted"))
    key: str = knob("", "prompt_cache_key to send; empty: none")
    seconds: float = knob(300.0, "how long a prefix is taken to stay cached", low=1.0, high=1e6, log=True)

    async def rewrite(self, call: Call) -> Call:
        changed, did = self._ordered(call)
        engine = call.engines.get("answer")
        model = "" if engine is None else engine.model
        marking = self.provider == "anthropic" or (
            self.provider == "auto" and any(name in model.lower() for name in _CLAUDE)
        )
        prefix = prefix_of(changed, f"{model}\0{_asker(call)}", system_first=marking)
        tokens_of = _counter(call)
        count = functools.cache(lambda pieces: tokens_of(prefix.text(pieces)) if pieces else 0)
        total, now = prompt_tokens(changed), time.monotonic()
        marks, why = self._marks(changed, prefix, count) if marking else ([], "the provider caches by itself")
        ends = [prefix.tools_end if i < 0 else prefix.ends[i] for i in marks]
        seen, read = self._memory.shared(prefix, now, self.seconds, ends)
        shared = count(seen)
        detail: dict[str, Any] = {"shared": shared if total is None else min(shared, total)}
        if marking:
            changed = _marked(changed, marks, self._control())
            expected = count(read)
            detail["breakpoints"] = len(marks)
            did += [f"{len(marks)} breakpoint{'s' if len(marks) > 1 else ''} set"] if marks else []
        else:
            expected = shared // self.step * self.step if shared >= self.minimum else 0
        expected = expected if total is None else min(expected, total)
        self._memory.add(prefix, ends, now)
        reason = "; ".join([*(did or [why]), f"{detail['shared']} tokens begin as an earlier call did"])
        after = None if total is None else total - expected
        detail["expected"] = expected
        return changed.with_receipt(Receipt(self.name, bool(did), reason, total, after, detail=detail))

    # -- details -------------------------------------------------------------------------------------------------

    @property
    def _memory(self) -> PrefixMemory:
        """No field, for it is no setting: lives as long as this object."""
        found: PrefixMemory = self.__dict__.setdefault("_prefixes", PrefixMemory())
        return found

    def _ordered(self, call: Call) -> tuple[Call, list[str]]:
        """The call with its tools in order and its key, and what was done."""
        did: list[str] = []
        if self.tools == "sorted":
            tools = tuple(sorted(call.tools, key=_tool_name))
            if tools != call.tools:
                call, did = replace(call, tools=tools), ["tools sorted by name"]
        if self.key and "prompt_cache_key" not in call.extra:
            call = replace(call, extra={**call.extra, "prompt_cache_key": self.key})
            did.append("prompt_cache_key added")
        return call, did

    def _control(self) -> dict[str, str]:
        return {"type": "ephemeral", "ttl": "1h"} if self.hour else {"type": "ephemeral"}

    def _marks(self, call: Call, prefix: Prefix, count: Callable[[int], int]) -> tuple[list[int], str]:
        """The messages to mark, by index (-1: the last tool), or none and why. `count`: tokens of so many pieces."""
        if any(_has_mark(x) for x in (*call.tools, *call.messages)):
            return [], "the call has breakpoints of its own"
        messages = call.messages
        able = [i for i in range(len(messages)) if _markable(messages[i])]
        talk = next((i for i, m in enumerate(messages) if m.get("role") not in SYSTEM_ROLES), len(messages))
        system = [i for i in able if i < talk]  # a later one may be there for this turn only
        spots = system[-1:] or ([-1] if call.tools else [])
        spoken = any(m.get("role") == "assistant" for m in messages)
        if self.turns == "always" or (self.turns == "auto" and spoken):
            spots += [i for i in able if messages[i].get("role") in ("user", "tool")][-2:]
        long = [i for i in spots if count(prefix.tools_end if i < 0 else prefix.ends[i]) >= self.minimum]
        if long:
            return long[:MOST_MARKS], ""
        return [], f"no stable prefix of {self.minimum} tokens" if spots else "nothing stable to mark"


def _marked(call: Call, marks: list[int], control: Mapping[str, str]) -> Call:
    """The call with breakpoints at the end of the last tool (-1) and of messages."""
    if not marks:
        return call
    tools, messages = list(call.tools), list(call.messages)
    for i in marks:
        if i < 0:
            tools[-1] = {**tools[-1], MARK: dict(control)}
        else:
            messages[i] = _with_mark(messages[i], control)
    return replace(call, tools=tuple(tools), messages=tuple(messages))


def _with_mark(message: Message, control: Mapping[str, str]) -> Message:
    """The message with a breakpoint on its last part; a plain text becomes one part."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    parts[-1] = {**parts[-1], MARK: dict(control)}
    return {**message, "content": parts}


def _markable(message: Message) -> bool:
    """Whether a breakpoint may stand on it: not on empty texts."""
    content = message.get("content")
    if isinstance(content, str):
        return bool(content.strip())
    last = content[-1] if isinstance(content, (list, tuple)) and content else None
    return isinstance(last, Mapping) and (last.get("type") != "text" or bool(str(last.get("text", "")).strip()))


def _has_mark(item: Mapping[str, Any]) -> bool:
    """A tool or a message that carries a breakpoint somewhere."""
    content, function = item.get("content"), item.get("function")
    parts = content if isinstance(content, (list, tuple)) else ()
    return MARK in item or any(isinstance(x, Mapping) and MARK in x for x in (function, *parts))


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    return str((function if isinstance(function, Mapping) else tool).get("name", ""))


def _asker(call: Call) -> str:
    """The path of the account that the plan was called on: what others sent is not told."""
    path, plan = call.account.path.split("/"), call.labels.plan
    return "/".join(path[: path.index(plan)] if plan in path else path)


def _counter(call: Call) -> Callable[[str], int]:
    """Tokens of a text in the answering engine; without one, characters / 3.3."""
    engine = call.engines.get("answer")
    if engine is None:
        return lambda text: round(len(text) / 3.3)
    probe = call.on_behalf("")

    def tokens(text: str) -> int:
        return engine.count(replace(probe, messages=({"role": "user", "content": text},)))

    empty = tokens("")
    return lambda text: max(0, tokens(text) - empty)
