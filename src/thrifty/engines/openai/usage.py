"""Tokens of a request: counted before it is sent, read from the server's usage afterwards, and never believed blindly.

Counting: a tokenizer if one is given; else one token for every 3.3 bytes of UTF-8, which is near what current
tokenizers make of English text and code, and not far off for other scripts. Either way the wrapping of messages by the
chat template is estimated.

Reading: a usage that cannot be true is corrected field by field, and each correction is noted; the caller then marks
the entry `estimated` and writes a receipt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from thrifty.spend import Spend

Tokenizer: TypeAlias = Callable[[str], int]
"""Tokens of a text."""

BYTES_A_TOKEN = 3.3
PER_MESSAGE = 4
"""Tokens that a chat template puts around one message."""

_ABSURD = 100_000_000  # tokens; no context is near it
_MOST_BYTES_A_TOKEN = 64  # a mean over a whole text; single tokens may be longer
_SLACK = 20_000  # tokens that a provider may add to a prompt of its own: system prompts, tool instructions


def estimate(text: str) -> int:
    """Tokens of a text without a tokenizer: UTF-8 bytes / 3.3, rounded up.

    >>> estimate(""), estimate("What is the capital of France?"), estimate("你好")
    (0, 10, 2)
    """
    return math.ceil(len(text.encode("utf-8", errors="replace")) / BYTES_A_TOKEN)


@dataclass(frozen=True, slots=True)
class Counter:
    """Counts a request as it will be sent. `template_tokens` are what the template adds once (a default system prompt,
    the opening of the answer), `image_tokens` what one image costs at full detail."""

    tokenizer: Tokenizer | None = None
    template_tokens: int = 3
    image_tokens: int = 765

    def text(self, text: str) -> int:
        """Tokens of a text."""
        return estimate(text) if self.tokenizer is None else self.tokenizer(text)

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, int]:
        """(input, visual) tokens of a chat request; visual ones are a part of the input."""
        total, visual = self.template_tokens, 0
        for message in messages:
            total += PER_MESSAGE
            content = message.get("content")
            if isinstance(content, str):
                total += self.text(content)
            for part in content if isinstance(content, (list, tuple)) else ():
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind in ("image_url", "input_image", "image"):
                    image = part.get("image_url")
                    low = isinstance(image, Mapping) and image.get("detail") == "low"
                    visual += min(85, self.image_tokens) if low else self.image_tokens
                elif isinstance(part, Mapping):
                    total += self.text(str(part.get("text", "")))
            total += sum(
                self.text(_json(message[key])) for key in ("tool_calls", "name", "tool_call_id") if key in message
            )
        if tools:
            total += self.text(_json(list(tools)))
        return total + visual, visual


@dataclass(slots=True)
class Usage:
    """What one request used. `notes` say what was corrected; with any, the figures are estimates."""

    spend: Spend
    notes: list[str] = field(default_factory=list)


def read(raw: Any, *, sent: int, counted: tuple[int, int], made: str, output: int, tool_calls: int) -> Usage:
    """The Spend of one request from the server's `usage`.

    `sent` is the size of the request in bytes, `counted` our own (input, visual) count, `made` all text that came back,
    `output` our count of it. What is missing or cannot be true is replaced by our counts and noted.
    """
    expected, visual = counted
    if not isinstance(raw, Mapping):
        what = "the server gave no usage" if raw is None else f"usage is {type(raw).__name__}, not an object"
        spend = Spend(input=expected, visual=visual, output=output, calls=1, tool_calls=tool_calls)
        return Usage(spend, [f"{what}: tokens were counted here"])
    notes: list[str] = []

    def number(value: Any, name: str) -> int | None:
        """A count, None where there is none; what is no count is noted."""
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _ABSURD:
            notes.append(f"{name} = {str(value)[:40]!r} is no count")
            return None
        return value

    def first(*paths: str) -> int | None:
        for path in paths:
            value: Any = raw
            for key in path.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return number(value, path)
        return None

    got_in, got_out = first("prompt_tokens", "input_tokens"), first("completion_tokens", "output_tokens")
    cached = first(
        "prompt_tokens_details.cached_tokens",
        "input_tokens_details.cached_tokens",
        "prompt_cache_hit_tokens",
        "cache_read_input_tokens",
    )
    seen = first("prompt_tokens_details.image_tokens", "input_tokens_details.image_tokens")
    thought = first(
        "completion_tokens_details.reasoning_tokens", "output_tokens_details.reasoning_tokens", "reasoning_tokens"
    )
    total = first("total_tokens")
    if "prompt_tokens" not in raw and "cache_read_input_tokens" in raw and got_in is not None:
        # Anthropic's own form leaves what was read from and written to the cache out of input_tokens
        got_in += (cached or 0) + (first("cache_creation_input_tokens") or 0)

    if got_in is None:
        notes.append("no input tokens given: they were counted here")
    elif got_in == 0 and expected > 0:
        notes.append("0 input tokens for a prompt that is not empty: they were counted here")
        got_in = None
    elif got_in > sent + _SLACK + 30 * visual:
        notes.append(f"{got_in:,} input tokens for a request of {sent:,} bytes: they were counted here")
        got_in = None
    elif visual == 0 and got_in * _MOST_BYTES_A_TOKEN < expected * BYTES_A_TOKEN:
        notes.append(f"{got_in:,} input tokens where about {expected:,} were sent: they were counted here")
        got_in = None
    if got_in is None:
        got_in, cached = expected, 0

    if thought and got_out is not None and total == got_in + got_out + thought:
        got_out += thought  # some providers leave reasoning out of completion_tokens, but not out of the total
    size = len(" ".join(made.split()).encode("utf-8", errors="replace"))
    if got_out is None:
        notes.append("no output tokens given: they were counted here")
    elif got_out * _MOST_BYTES_A_TOKEN < size:
        notes.append(f"{got_out:,} output tokens for {size:,} bytes of text: they were counted here")
        got_out = None
    if got_out is None:
        got_out = output

    if cached is not None and cached > got_in:
        notes.append(f"{cached:,} cached of {got_in:,} input tokens: none is taken as cached")
        cached = 0
    if thought is not None and thought > got_out:
        notes.append(f"{thought:,} reasoning of {got_out:,} output tokens: all output is taken as reasoning")
        thought = got_out
    if seen is None or seen > got_in:
        seen = min(visual, got_in)
    return Usage(
        Spend(
            input=got_in,
            cached=cached or 0,
            visual=seen,
            output=got_out,
            reasoning=thought or 0,
            calls=1,
            tool_calls=tool_calls,
        ),
        notes,
    )


def _json(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
