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


def instruct_late(call: Call, text: str) -> Call:
    """As `instruct`, but in a system message of its own right before the last user message, so that the conversation
    before it stays as a provider has cached it. Without such a conversation it is `instruct`.

    Templates of some models (Gemma, Mistral) allow a system message at the beginning only."""
    at = _last_user(call)
    if at is None or at < 1 or call.messages[at - 1].get("role") in SYSTEM_ROLES:
        return instruct(call, text)
    late: Message = {"role": "system", "content": text}
    return replace(call, messages=(*call.messages[:at], late, *call.messages[at:]))


def conversation_tokens(call: Call) -> int:
    """Tokens between the system message and the last user message.

    A provider may have them cached, and no longer finds them when the system message before them changes from call to
    call: what `instruct` with a changing text breaks. 0 for a single question, and for a call without an engine."""
    at = _last_user(call)
    start = 1 if call.messages and call.messages[0].get("role") in SYSTEM_ROLES else 0
    if at is None or at <= start:
        return 0
    alone = replace(call, messages=(*call.messages[:start], *call.messages[at:]))
    return max(0, (prompt_tokens(call) or 0) - (prompt_tokens(alone) or 0))


def _last_user(call: Call) -> int | None:
    return next((i for i in range(len(call.messages) - 1, -1, -1) if call.messages[i].get("role") == "user"), None)
