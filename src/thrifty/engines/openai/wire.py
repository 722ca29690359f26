"""The wire format: a Call becomes JSON, and JSON becomes the pieces of an Answer. No network, no spending.

`Prompt` is what is sent, `Reply` what has come back so far. A reply is fed with the chunks of a stream or with one
whole response; both end in the same fields, and the text never contains the prefix that it continues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import orjson

from thrifty.call import Call, Delta, Message, text_of
from thrifty.engines.openai.failure import Failure, of_error
from thrifty.errors import InvalidInput, Unsupported, nearest

Kind = Literal["chat", "completions"]
Continuation = Literal["auto", "vllm", "llama.cpp", "none"]
Template: TypeAlias = Callable[[Sequence[Message]], str]
"""Makes the prompt of a completions request from messages."""

VLLM_CONTINUES: Mapping[str, bool] = {"continue_final_message": True, "add_generation_prompt": False}

_OURS: Mapping[str, str] = {
    "model": "the engine's model",
    "messages": "Call.messages",
    "prompt": "Call.messages",
    "stream": "Call.emit and the engine's stream",
    "max_tokens": "Sampling.max_tokens",
    "max_completion_tokens": "Sampling.max_tokens",
    "tools": "Call.tools",
}
"""Fields that budgets depend on, and what sets them; they are refused in `Call.extra`."""


def plain_template(messages: Sequence[Message]) -> str:
    """The texts of the messages, joined by empty lines: for base models, which know no roles."""
    return "\n\n".join(text_of(message) for message in messages)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent, before max_tokens is known. `prefix` is the unfinished answer, the last of `messages`."""

    messages: tuple[Message, ...]
    prefix: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    stop: tuple[str, ...] = ()
    call: Call | None = None


def prompt(call: Call, messages: Sequence[Message], prefix: str = "", stop: tuple[str, ...] = ()) -> Prompt:
    """The prompt of a call: its rendered messages, and the beginning of the answer as the last of them.

    `stop` takes the place of the call's stop strings: a draft ends at its separator only.
    """
    tail: tuple[Message, ...] = ({"role": "assistant", "content": prefix},) if prefix else ()
    return Prompt((*messages, *tail), prefix, call.tools, stop or call.sampling.stop, call)


@dataclass(frozen=True, slots=True)
class Format:
    """How one server wants its requests."""

    kind: Kind
    model: str
    continuation: Continuation
    max_tokens_field: str
    template: Template
    defaults: Mapping[str, Any]
    usage_in_stream: bool = True
    vllm_fields: bool = True

    def body(self, prompt: Prompt, max_tokens: int | None, stream: bool) -> bytes:
        """The request as JSON. Raises InvalidInput or Unsupported for what cannot be sent."""
        call = prompt.call
        extra = {**self.defaults, **(call.extra if call else {})}
        for name, source in _OURS.items():
            if name in extra:
                raise InvalidInput(f"extra field {name!r} is not passed on: it is set by {source}")
        for name in ("n", "best_of"):
            if extra.get(name, 1) not in (1, None):
                raise InvalidInput(
                    f"extra field {name} = {extra[name]!r}: one answer a call; make several calls instead"
                )
        data: dict[str, Any] = {**extra, "model": self.model}
        if self.kind == "chat":
            data["messages"] = prompt.messages
            if prompt.tools:
                data["tools"] = prompt.tools
            if prompt.prefix and self.vllm_fields and self.continuation in ("auto", "vllm"):
                data |= VLLM_CONTINUES
        else:
            data["prompt"] = self._flat(prompt)
        if call is not None:
            data |= self._sampling(call, prompt.stop)
        if max_tokens is not None:
            data[self.max_tokens_field] = max_tokens
        if stream:
            data["stream"] = True
            if self.usage_in_stream:
                data["stream_options"] = {**(extra.get("stream_options") or {}), "include_usage": True}
        else:
            data.pop("stream_options", None)
        try:
            return orjson.dumps(data, default=_plain, option=orjson.OPT_NON_STR_KEYS)
        except TypeError as error:
            raise InvalidInput(f"the call cannot be written as JSON ({error}): give plain data") from error

    def without(self, said: str) -> Format | None:
        """This format without the field that a server's refusal names; None where the refusal is about none of ours."""
        if self.usage_in_stream and "stream_options" in said:
            return replace(self, usage_in_stream=False)
        if self.vllm_fields and self.continuation == "auto" and any(name in said for name in VLLM_CONTINUES):
            return replace(self, vllm_fields=False)
        if self.max_tokens_field == "max_tokens" and "max_completion_tokens" in said:
            return replace(self, max_tokens_field="max_completion_tokens")
        return None

    def _flat(self, prompt: Prompt) -> str:
        if prompt.tools:
            raise Unsupported('tools need an engine of kind="chat"; this one has kind="completions"')
        for message in prompt.messages:
            content = message.get("content")
            if isinstance(content, (list, tuple)) and any(part.get("type") != "text" for part in content):
                raise Unsupported('images need an engine of kind="chat"; this one has kind="completions"')
        return self.template(prompt.messages)

    def _sampling(self, call: Call, stop: tuple[str, ...]) -> dict[str, Any]:
        s = call.sampling
        data: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "seed")
            if (value := getattr(s, name)) is not None
        }
        if stop:
            data["stop"] = list(dict.fromkeys(stop))
        if s.logprobs:
            # llama.cpp gives none at top_logprobs = 0, and twenty where it is not said
            data |= {"logprobs": True, "top_logprobs": 1} if self.kind == "chat" else {"logprobs": 1}
        return data


@dataclass(slots=True)
class Reply:
    """What one attempt has brought so far. `prefix` is cut off where the server (llama.cpp, in whole responses) or the
    model (told to begin with it) repeats it."""

    prefix: str = ""
    in_stream: bool = False
    """streams may repeat the prefix too"""
    text: str = ""
    thinking: str = ""
    finish: str | None = None
    logprobs: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    usage: Any = None
    raw: dict[str, Any] = field(default_factory=dict)
    accepted: bool = False
    """the server answered with 2xx"""
    emitted: bool = False
    """somebody has seen a part of it"""
    done: bool = False
    """it is complete"""
    lost: int = 0
    """bytes of an answer that could not be read"""
    _waiting: str = ""
    _tools: list[dict[str, Any]] = field(default_factory=list)
    _parts: list[str] = field(default_factory=list)
    _thoughts: list[str] = field(default_factory=list)

    @property
    def produced(self) -> bool:
        """Whether the server is known to have made anything that it may bill."""
        some = self._parts or self._waiting or self._thoughts or self._tools or self.lost or self.usage is not None
        return bool(some or self.done)

    @property
    def produced_text(self) -> bool:
        """Whether any token has come."""
        return bool(self._parts or self._waiting or self._thoughts or self._tools)

    @property
    def made(self) -> str:
        """All text that was generated: thinking, tool calls and answer."""
        tools = "".join(_text(c.get("function", {}).get(k)) for c in self._tools for k in ("name", "arguments"))
        return "".join((*self._thoughts, *self._parts, self._waiting, tools))

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        """The tool calls so far, each whole."""
        return tuple({k: v for k, v in call.items() if k != "index"} for call in self._tools)

    def chunk(self, data: str) -> Delta | None:
        """Takes one event of a stream; None where it adds nothing that anyone must see. Raises Failure."""
        if data.strip() == "[DONE]":
            self.done = True
            return None
        event = _parse(data)
        if event is None:
            if self.finish is not None:
                return None  # all was there already
            raise Failure("broke its stream with an event that is no JSON object; see the server's log")
        if event.get("error"):
            raise of_error(event["error"], "in its stream")
        self._keep(event)
        choice = _choice(event)
        if choice is None:
            return None
        if choice.get("finish_reason") and self.finish is None:
            self.finish = str(choice["finish_reason"])
        delta = self._add(_part(choice, "delta"), choice)
        seen = delta.text or delta.thinking or delta.tool_calls or delta.logprobs
        return replace(delta, raw=event) if seen else None

    def whole(self, body: bytes) -> Delta:
        """Takes a complete response. Raises Failure."""
        event = _parse(body.decode("utf-8", errors="replace"))
        if event is None:
            # it began like an answer, so the tokens were made, and most likely billed
            self.lost = len(body) if body.lstrip()[:1] == b"{" else 0
            raise Failure("sent a response that is no JSON object, or only half of one; see the server's log")
        if event.get("error"):
            raise of_error(event["error"], "in a response of HTTP 200")
        choice = _choice(event)
        if choice is None:
            self.usage = event.get("usage")
            raise Failure("sent a response without choices; check that base_url is an OpenAI-compatible server")
        self._keep(event)
        self.raw = dict(event)
        self.done = True
        self.finish = str(choice.get("finish_reason") or "stop")
        return replace(self._add(_part(choice, "message"), choice, whole=True), raw=event)

    def end(self) -> None:
        """The stream is over. Raises Failure when the answer is not complete."""
        if self.finish is None and not (self.done and self.produced_text):
            self.done = False
            what = "cut its stream in the middle" if self.produced_text else "ended its stream without an answer"
            raise Failure(f"{what}; see the server's log", retry=True)
        self.done = True

    def close(self) -> str:
        """Joins the pieces, when nothing more comes; returns text that was held back and never shown."""
        rest, self._waiting = self._waiting, ""
        self._parts.append(rest)
        self.text, self.thinking = "".join(self._parts), "".join(self._thoughts)
        return rest

    # -- details -------------------------------------------------------------------------------------------------

    def _keep(self, event: Mapping[str, Any]) -> None:
        """Remembers the fields around the choices; later events override earlier ones."""
        if event.get("usage") is not None:
            self.usage = event["usage"]
        self.raw.update({k: v for k, v in event.items() if k != "choices" and v is not None})

    def _add(self, piece: Mapping[str, Any], choice: Mapping[str, Any], whole: bool = False) -> Delta:
        text = _text(piece.get("content")) or _text(piece.get("text")) or _text(piece.get("refusal"))
        thinking = _text(piece.get("reasoning_content")) or _text(piece.get("reasoning"))
        if self.prefix and whole:
            text = text.removeprefix(self.prefix)
        elif self.prefix and self.in_stream and text:
            text = self._cut(text)
        calls = piece.get("tool_calls")
        calls = tuple(c for c in calls if isinstance(c, Mapping)) if isinstance(calls, (list, tuple)) else ()
        if text:
            self._parts.append(text)
        if thinking:
            self._thoughts.append(thinking)
        for part in calls:
            self._assemble(part)
        return Delta(text, thinking, calls, self._logprobs(choice.get("logprobs")))

    def _cut(self, text: str) -> str:
        """The text without a repeated prefix; holds it back until that is decided."""
        begun = self._waiting + text
        if len(begun) < len(self.prefix) and self.prefix.startswith(begun):
            self._waiting = begun
            return ""
        self._waiting, self.in_stream = "", False
        return begun.removeprefix(self.prefix)

    def _assemble(self, part: Mapping[str, Any]) -> None:
        """Adds one part to the tool call it belongs to: by index, else by a new id, else to the last one."""
        index = part.get("index")
        known = [c for c in self._tools if index is not None and c.get("index") == index]
        if index is None and self._tools and not part.get("id"):
            known = self._tools[-1:]
        given = part.get("function")
        function: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        if not known:
            rest = {k: v for k, v in part.items() if k != "function"}
            self._tools.append({"type": "function", **rest, "function": {"name": "", "arguments": "", **function}})
            return
        call = known[0]
        call.update({k: v for k, v in part.items() if k != "function" and v is not None})
        for key, value in function.items():
            old = call["function"].get(key)
            # a name is repeated by some servers and never sent in parts; arguments come in parts
            call["function"][key] = (
                old + value if key == "arguments" and isinstance(value, str) and old else value or old
            )

    def _logprobs(self, given: Any) -> tuple[float, ...]:
        if not isinstance(given, Mapping):
            return ()
        found: list[float] = []
        entries = given.get("content")
        if isinstance(entries, list):
            for entry in entries:
                if isinstance(entry, Mapping) and isinstance(entry.get("logprob"), (int, float)):
                    found.append(float(entry["logprob"]))
                    if isinstance(entry.get("id"), int):
                        self.ids.append(entry["id"])
        elif isinstance(given.get("token_logprobs"), list):  # the older form of /completions
            found = [float(x) for x in given["token_logprobs"] if isinstance(x, (int, float))]
        self.logprobs += found
        return tuple(found)


def check_kind(kind: str) -> None:
    """Raises InvalidInput for an unknown kind of endpoint."""
    if kind not in ("chat", "completions"):
        raise InvalidInput(nearest(kind, ("chat", "completions"), "kind"))


def check_continuation(name: str) -> None:
    """Raises InvalidInput for an unknown way to continue an answer."""
    known = ("auto", "vllm", "llama.cpp", "none")
    if name not in known:
        raise InvalidInput(nearest(name, known, "continuation"))


def _parse(text: str) -> Mapping[str, Any] | None:
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return data if isinstance(data, Mapping) else None


def _choice(event: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = event.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, Mapping) else None


def _part(choice: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A chat's delta or message; of a completion, the choice itself."""
    part = choice.get(name)
    return part if isinstance(part, Mapping) else choice


def _text(content: Any) -> str:
    """Text of a string or of a list of text parts; empty for anything else."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(p.get("text", "") for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str))
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
