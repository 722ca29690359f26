"""OpenAI's wire format, seen from the server: request bodies become Calls, Answers and Deltas become responses.

Fields that Thrifty does not know pass through both ways untouched. What an upstream sent is kept wherever a plan has
not changed it: ids, fingerprints, logprobs, and whatever a provider adds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from thrifty.call import Answer, Delta, Receipt, Sampling
from thrifty.serve.keys import Refused
from thrifty.spend import Spend

MOST_CHOICES = 128
_FINISHES = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
_WHOLE = ("top_k", "seed")
_REAL = ("temperature", "top_p", "min_p")
_OWN = frozenset(
    {"model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "stop",
     "tools", "context", *_WHOLE, *_REAL}
)  # fmt: skip


@dataclass(slots=True)
class Asked:
    """A request body, checked. `prompts` has several entries only for /v1/completions with a list."""

    model: str
    prompts: list[list[dict[str, Any]]]
    sampling: Sampling
    tools: tuple[Mapping[str, Any], ...] = ()
    context: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    usage_in_stream: bool = False
    n: int = 1
    chat: bool = True


def parse(body: bytes, chat: bool) -> Asked:
    """Reads a body of /v1/chat/completions (`chat`) or /v1/completions. Raises Refused (400)."""
    data = document(body)
    model = data.get("model")
    if not isinstance(model, str) or not model:
        raise _bad("model", "a model's name is needed; GET /v1/models lists those you may use")
    limits = [data[k] for k in ("max_completion_tokens", "max_tokens") if data.get(k) is not None]
    most = limits[0] if limits else None
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= 2**31):
        raise _bad("max_tokens", f"{most!r}: a whole number of at least 1 is needed")
    n = 1 if data.get("n") is None else data["n"]
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_CHOICES:
        raise _bad("n", f"{n!r}: a whole number from 1 to {MOST_CHOICES} is needed")
    stream = data.get("stream")
    if stream not in (None, True, False):
        raise _bad("stream", "true or false is needed")
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _bad("stream_options", "an object is needed")
    tools = data.get("tools") or []
    if not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise _bad("tools", "a list of objects is needed")
    context = data.get("context")
    if context is not None and not (isinstance(context, list) and all(isinstance(c, str) for c in context)):
        raise _bad("context", "a list of texts is needed")
    return Asked(
        model,
        [_messages(data)] if chat else _prompts(data),
        _sampling(data, most),
        tuple(tools),
        None if context is None else tuple(context),
        {k: v for k, v in data.items() if k not in _OWN},
        bool(stream),
        options.get("include_usage") is True,
        n,
        chat,
    )


def document(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refused (400)."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise Refused(400, "the body must be a JSON object")
    return data


def completion(asked: Asked, answers: list[Answer], told: Mapping[str, Any]) -> dict[str, Any]:
    """The whole response; `told` is the `thrifty` field."""
    raw = next((dict(a.raw) for a in answers if a.raw), {})
    choices = [_choice(asked, i, a) for i, a in enumerate(answers)]
    spend = answers[0].spend
    for other in answers[1:]:
        spend = spend + other.spend
    head: dict[str, Any] = {
        "id": raw.get("id") or f"{'chatcmpl' if asked.chat else 'cmpl'}-{told['id']}",
        "object": "chat.completion" if asked.chat else "text_completion",
        "created": raw.get("created") or int(time.time()),
        "model": raw.get("model") or asked.model,
    }
    old = raw.get("usage")
    rest = {k: v for k, v in raw.items() if k not in head and k not in ("choices", "usage")}
    return {**rest, **head, "choices": choices, "usage": usage(spend, old), "thrifty": told}


def usage(spend: Spend, old: Any = None) -> dict[str, Any]:
    """OpenAI's usage of a Spend, with the fields that a provider added to its own.

    >>> usage(Spend(input=3, output=2))["total_tokens"]
    5
    """
    old = old if isinstance(old, dict) else {}
    asked, made = _mapping(old.get(_DETAILS[0])), _mapping(old.get(_DETAILS[1]))
    return {
        **old,
        "prompt_tokens": spend.input,
        "completion_tokens": spend.output,
        "total_tokens": spend.input + spend.output,
        _DETAILS[0]: {**asked, "cached_tokens": spend.cached},
        _DETAILS[1]: {**made, "reasoning_tokens": spend.reasoning},
    }


_DETAILS = ("prompt_tokens_details", "completion_tokens_details")


def told(
    id: str, plan: str, spend: Spend, receipts: tuple[Receipt, ...], finish: str, estimated: bool
) -> dict[str, Any]:
    """The `thrifty` field of a response: what it cost and what each method did."""
    data: dict[str, Any] = {"id": id, "plan": plan, "spend": spend.to_dict()}
    data["receipts"] = [r.to_dict() for r in receipts]
    if finish not in _FINISHES:
        data["finish"] = finish
    if estimated:
        data["estimated"] = True
    return data


@dataclass(slots=True)
class Chunks:
    """Deltas of one choice as the chunks of a stream. An upstream's own chunk goes on as it came."""

    asked: Asked
    id: str
    index: int = 0
    begun: bool = False
    head: dict[str, Any] = field(default_factory=dict)

    def chunk(self, delta: Delta) -> bytes | None:
        """One event; None where the delta has nothing that a client must see."""
        if delta.answer is not None or delta.finish is not None:
            return None  # the end is told by `last`
        raw = delta.raw
        choices = raw.get("choices") if raw else None
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if raw is not None and not self.head:
            keep = {k: v for k, v in raw.items() if k not in ("choices", "usage")}
            self.head = {**keep, "object": "chat.completion.chunk" if self.asked.chat else "text_completion"}
        if first is not None and self._same(first, delta):
            piece = {**first, "index": self.index, "finish_reason": None}
        elif not (delta.text or delta.thinking or delta.tool_calls):
            return None
        elif self.asked.chat:
            piece = {"index": self.index, "delta": self._delta(delta), "finish_reason": None}
        else:
            piece = {"index": self.index, "text": delta.text, "finish_reason": None}
        self.begun = True
        return event({**self._head(), "choices": [piece]})

    def last(self, finish: str, told: Mapping[str, Any] | None = None) -> bytes:
        """The chunk that says why it ended; `told` is the `thrifty` field, on the last choice."""
        piece: dict[str, Any] = {"index": self.index, "finish_reason": finish_of(finish)}
        piece["delta" if self.asked.chat else "text"] = {} if self.asked.chat else ""
        more = {} if told is None else {"thrifty": told}
        return event({**self._head(), "choices": [piece], **more})

    def usage(self, spend: Spend, old: Any) -> bytes:
        """The chunk with the usage, for clients that asked for it: OpenAI's has no choices, and breaks those that did
        not."""
        return event({**self._head(), "choices": [], "usage": usage(spend, old)})

    def _head(self) -> dict[str, Any]:
        if not self.head:
            kind = ("chatcmpl", "chat.completion.chunk") if self.asked.chat else ("cmpl", "text_completion")
            self.head = {
                "id": f"{kind[0]}-{self.id}", "object": kind[1], "created": int(time.time()), "model": self.asked.model
            }  # fmt: skip
        return self.head

    def _delta(self, delta: Delta) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if not self.begun:
            data["role"] = "assistant"
        if delta.text:
            data["content"] = delta.text
        if delta.thinking:
            data["reasoning_content"] = delta.thinking
        if delta.tool_calls:
            data["tool_calls"] = [dict(t) for t in delta.tool_calls]
        return data

    def _same(self, piece: Mapping[str, Any], delta: Delta) -> bool:
        """Whether what the plan hands on is what the upstream sent."""
        if not self.asked.chat:
            return piece.get("text") == delta.text
        inner = piece.get("delta")
        return isinstance(inner, dict) and (inner.get("content") or "") == delta.text


DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def error(refused: Refused) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": str(refused), "type": refused.kind, "param": None, "code": refused.code or None}}


def finish_of(finish: str) -> str:
    """The nearest of OpenAI's reasons: a budget's end is a length, a policy's own word a stop."""
    if finish in _FINISHES:
        return finish
    return "length" if finish in ("budget", "cancelled", "error") else "stop"


# -- details ---------------------------------------------------------------------------------------------------


def _choice(asked: Asked, index: int, answer: Answer) -> dict[str, Any]:
    choices = answer.raw.get("choices")
    old = dict(choices[0]) if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    head = {"index": index, "finish_reason": finish_of(answer.finish)}
    if not asked.chat:
        return {"logprobs": None, **old, **head, "text": answer.text}
    message = dict(old["message"]) if isinstance(old.get("message"), dict) else {}
    refusal = message.get("refusal")
    message |= {"role": "assistant", "content": answer.text or (None if answer.tool_calls or refusal else "")}
    if refusal and answer.text == refusal:
        message["content"] = None
    if answer.tool_calls:
        message["tool_calls"] = [dict(t) for t in answer.tool_calls]
    if answer.thinking and not (message.get("reasoning_content") or message.get("reasoning")):
        message["reasoning_content"] = answer.thinking
    return {"logprobs": None, **old, **head, "message": message}


def _messages(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = data.get("messages")
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise _bad("messages", "a list of objects with a role is needed, at least one")
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(message.get("role"), str):
            raise _bad(f"messages[{i}].role", "system, user, assistant or tool is needed")
        if isinstance(content, list):
            if not all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in content):
                raise _bad(f"messages[{i}].content", "every part must be an object with a type")
            if not all(isinstance(p.get("text"), str) for p in content if p["type"] == "text"):
                raise _bad(f"messages[{i}].content", "a part of type 'text' needs its text")
        elif content is not None and not isinstance(content, str):
            raise _bad(f"messages[{i}].content", "a text or a list of parts is needed")
    return messages


def _prompts(data: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    prompt = data.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
        raise _bad("prompt", "a text or a list of texts is needed; lists of tokens are not taken")
    if len(texts) > MOST_CHOICES:
        raise _bad("prompt", f"{len(texts)} prompts: at most {MOST_CHOICES} in one request")
    return [[{"role": "user", "content": text}] for text in texts]


def _sampling(data: Mapping[str, Any], most: int | None) -> Sampling:
    values: dict[str, Any] = {}
    for name in (*_WHOLE, *_REAL):
        value = data.get(name)
        if value is None:
            continue
        kinds = (int,) if name in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise _bad(name, f"{value!r}: a {'whole number' if name in _WHOLE else 'number'} is needed")
        values[name] = value
    stop = data.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not (isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)):
        raise _bad("stop", "a text or a list of texts is needed")
    return Sampling(**values, max_tokens=most, stop=tuple(stops))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _bad(name: str, said: str) -> Refused:
    return Refused(400, f"{name}: {said}")
