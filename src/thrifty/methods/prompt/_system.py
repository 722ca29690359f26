"""How prompt methods speak: in the system message, before everything else.

So the user's words, images and context stay byte for byte as they were, and a context method below still
finds the question where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from thrifty.call import Call, Message

SYSTEM_ROLES = ("system", "developer")


def instruct(call: Call, text: str, turns: tuple[Message, ...] = ()) -> Call:
    """The call with `text` added to its system message, or as a new one; `turns` come right after it.

    Added, never put in the place of what is there: text after a blank line, or one more text part.
    """
    first: Message | None = call.messages[0] if call.messages else None
    if first is None or first.get("role") not in SYSTEM_ROLES:
        head: Mapping[str, Any] = {"role": "system", "content": text}
        return replace(call, messages=(head, *turns, *call.messages))
    content = first.get("content")
    if isinstance(content, str):
        grown: Any = f"{content}\n\n{text}" if content else text
    else:
        grown = [*(content or ()), {"type": "text", "text": text}]
    return replace(call, messages=({**first, "content": grown}, *turns, *call.messages[1:]))


def prompt_tokens(call: Call) -> int | None:
    """Input tokens of the call as it stands; None when it has no engine yet."""
    engine = call.engines.get("answer")
    return None if engine is None else engine.count(call)
