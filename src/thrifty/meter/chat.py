"""Counting a chat request before it is sent: messages, tools and images, with what the model's chat format adds.

Where a model's own chat template is there, the request is rendered with it and counted exactly. OpenAI's additions are
those of its documentation ("How to count tokens with Tiktoken", "Images and vision"), Mistral's control tokens those of
its instruct format. Whatever no provider documents is counted as its JSON text, and a note says so.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from thrifty.errors import InvalidInput, Unsupported
from thrifty.meter import images
from thrifty.meter.image_size import HEADER, read_size
from thrifty.meter.tokenizers import Tokenizer

UNKNOWN_SIDE = 1024
"""Pixels a side that an image is taken to have where only its address is given."""

_CLAUDE_TOOLS: Mapping[str, tuple[int, int]] = {
    # Anthropic's "Tool use" overview: tokens of the system prompt that tools bring (auto or none, any or a named tool)
    "opus-4-8": (290, 410),
    "opus-4-7": (675, 804),
    "opus-4-6": (497, 589),
    "opus-4-5": (496, 588),
    "opus-4": (313, 315),
    "sonnet-5": (354, 474),
    "sonnet-4-6": (497, 589),
    "sonnet-4-5": (496, 588),
    "sonnet-4": (313, 315),
    "haiku-4-5": (496, 588),
    "3-5-haiku": (264, 355),
    "3-7-sonnet": (346, 313),
    "3-5-sonnet": (346, 313),
    "3-opus": (530, 281),
    "3-haiku": (264, 340),
}
_CLAUDE_TOOLS_ELSE = (496, 588)


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """Tokens of one request: `text` of the messages, `tools` of their definitions, `visual` of its images, and what the
    chat format puts around all of these. `notes` say what is not exact, one line each."""

    text: int
    tools: int
    visual: int
    overhead: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All of them."""
        return self.text + self.tools + self.visual + self.overhead


@dataclass
class _Message:
    """A message with its content taken apart."""

    role: str
    raw: Mapping[str, Any]
    texts: list[str] = field(default_factory=list)
    pictures: list[images.ImageTokens] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def count_chat(body: Any, tokenizer: Tokenizer, model: str = "", detail: str = "auto") -> ChatTokens:
    """Counts a request: an object with `messages` and optionally `tools`, `system` and `tool_choice`, or the list of
    messages alone. `detail` holds for images that name none.

    Raises InvalidInput for another form, an image without a rule for the model, or what a chat template refuses.
    """
    if isinstance(body, list):
        body = {"messages": body}
    raw = body.get("messages") if isinstance(body, Mapping) else None
    if not isinstance(raw, list) or not raw or not all(isinstance(m, Mapping) for m in raw):
        raise InvalidInput("a chat is an object with `messages`, a list of messages, or such a list alone")
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools):
        raise InvalidInput("`tools` must be a list of objects")
    notes: list[str] = []
    system = body.get("system")
    if system:  # Anthropic's form keeps it apart from the messages
        raw = [{"role": "system", "content": system}, *raw]
    messages = [_message(m, model, detail, notes) for m in raw]
    template = _template(tokenizer.folder)
    if template is not None:
        told, tool_tokens = _rendered(messages, tools, tokenizer, notes, template)
    else:
        form = _FORMS[tokenizer.name if tokenizer.name in _FORMS else ""]
        told, tool_tokens = form(messages, tools, tokenizer, notes, model, body.get("tool_choice"))
    text = sum(tokenizer.count(t) for m in messages for t in m.texts)
    pictures = [p for m in messages for p in m.pictures]
    if any(p.rough for p in pictures):
        notes.append("the image rule of this model is a rough one, as its provider says")
    around = sum(p.around for p in pictures)
    return ChatTokens(
        text, tool_tokens, sum(p.tokens for p in pictures), told - text + around, tuple(dict.fromkeys(notes))
    )


# --- the chat formats: each returns (tokens of the messages as sent, tokens of the tools) ---


def _openai(
    messages: Sequence[_Message], tools: Sequence[Any], tokenizer: Tokenizer, notes: list[str], *_: Any
) -> tuple[int, int]:
    """3 tokens a message, its role and name, 1 more for a name, and 3 that open the answer."""
    total = 3
    for message in messages:
        total += 3 + tokenizer.count(message.role) + sum(tokenizer.count(t) for t in message.texts)
        name = message.raw.get("name")
        if isinstance(name, str):
            total += tokenizer.count(name) + 1
        for called, arguments in message.calls:
            notes.append("OpenAI does not document what past tool calls cost: their names and arguments are counted")
            total += tokenizer.count(called) + tokenizer.count(arguments) + 3
    return total, _openai_tools(tools, tokenizer, notes) if tools else 0


def _openai_tools(tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, notes: list[str]) -> int:
    """OpenAI's rule for functions whose parameters are flat; nested ones are counted as JSON text."""
    total, start = 12, 7 if tokenizer.name == "o200k" else 10
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            raise InvalidInput("each of `tools` needs a `function` object")
        total += start + tokenizer.count(f"{function.get('name', '')}:{_line(function.get('description'))}")
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        if not isinstance(properties, Mapping) or not properties:
            continue
        total += 3
        for name, told in properties.items():
            told = told if isinstance(told, Mapping) else {}
            total += 3 + tokenizer.count(f"{name}:{told.get('type', '')}:{_line(told.get('description'))}")
            if isinstance(told.get("enum"), list):
                total += sum(3 + tokenizer.count(str(item)) for item in told["enum"]) - 3
            for inner in ("properties", "items", "anyOf", "$ref"):
                if inner in told:
                    notes.append("OpenAI documents no rule for nested parameters of tools: counted as JSON text")
                    total += tokenizer.count(_json(told[inner]))
    notes.append("tools are counted by OpenAI's published rule of thumb: a few tokens may differ")
    return total


def _claude(
    messages: Sequence[_Message], tools: Sequence[Any], tokenizer: Tokenizer, notes: list[str], model: str, choice: Any
) -> tuple[int, int]:
    """The turns as `\\n\\nHuman:` and `\\n\\nAssistant:`, the format that this tokenizer was published for."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "tool": "\n\nHuman: "}
    total = tokenizer.count("\n\nAssistant:")
    for message in messages:
        total += tokenizer.count(names.get(message.role, "")) + sum(tokenizer.count(t) for t in message.texts)
        total += sum(tokenizer.count(_json({"name": n, "input": a})) for n, a in message.calls)
    notes.append("Anthropic documents no chat format for Claude 3 and later: that of Claude 2 is counted")
    if not tools:
        return total, 0
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    fits = max((name for name in _CLAUDE_TOOLS if name in model.lower()), key=len, default=None)
    prompt = (_CLAUDE_TOOLS[fits] if fits else _CLAUDE_TOOLS_ELSE)[kind in ("any", "tool", "required")]
    notes.append(f"tools are counted as JSON text, and {prompt} tokens of Anthropic's own prompt for tools")
    return total, prompt + tokenizer.count(_json(list(tools)))


def _mistral(
    messages: Sequence[_Message], tools: Sequence[Any], tokenizer: Tokenizer, notes: list[str], *_: Any
) -> tuple[int, int]:
    """A token that begins the text, two around each turn of the user and each system prompt, one after each answer."""
    total = 1
    for message in messages:
        total += sum(tokenizer.count(t) for t in message.texts) + (1 if message.role == "assistant" else 2)
        if message.calls:
            notes.append("past tool calls are counted as JSON text behind one mark")
            calls = [{"name": name, "arguments": arguments} for name, arguments in message.calls]
            total += 1 + tokenizer.count(_json(calls))
    return total, 2 + tokenizer.count(_json(list(tools))) if tools else 0


def _plain(
    messages: Sequence[_Message], tools: Sequence[Any], tokenizer: Tokenizer, notes: list[str], *_: Any
) -> tuple[int, int]:
    from thrifty.engines.openai.usage import PER_MESSAGE

    notes.append(f"this tokenizer has no chat template here: {PER_MESSAGE} tokens a message are estimated for it")
    total = 3 + sum(PER_MESSAGE + sum(tokenizer.count(t) for t in m.texts) for m in messages)
    total += sum(tokenizer.count(n) + tokenizer.count(a) for m in messages for n, a in m.calls)
    return total, tokenizer.count(_json(list(tools))) if tools else 0


_FORMS: Mapping[str, Callable[..., tuple[int, int]]] = {
    "o200k": _openai,
    "cl100k": _openai,
    "claude": _claude,
    "mistral": _mistral,
    "": _plain,  # any other
}


def _rendered(
    messages: Sequence[_Message],
    tools: Sequence[Any],
    tokenizer: Tokenizer,
    notes: list[str],
    template: tuple[str, Mapping[str, Any]],
) -> tuple[int, int]:
    """With the model's own template, to the opening of the answer."""
    source, names = template
    turns = [{**m.raw, "content": m.text if m.texts or m.raw.get("content") is not None else None} for m in messages]
    plain = tokenizer.count(_render(source, turns, None, names), special=True)
    if not tools:
        return plain, 0
    if "tools" not in source:
        notes.append("the model's chat template takes no tools: they are counted as JSON text")
        return plain, tokenizer.count(_json(list(tools)))
    return plain, tokenizer.count(_render(source, turns, list(tools), names), special=True) - plain


def _render(source: str, turns: list[dict[str, Any]], tools: list[Any] | None, names: Mapping[str, Any]) -> str:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise Unsupported("chat templates need jinja2: pip install 'thrifty[count]'") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        import json

        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = to_json
    jinja.globals["raise_exception"] = refuse
    try:
        return jinja.from_string(source).render(messages=turns, tools=tools, add_generation_prompt=True, **names)
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"the model's chat template refuses this chat: {' '.join(str(error).split())}") from error


def _template(folder: Path | None) -> tuple[str, Mapping[str, Any]] | None:
    """The chat template beside a tokenizer and the tokens that it names; None where there is none."""
    if folder is None or not (config := folder / "tokenizer_config.json").is_file():
        return None
    try:
        data = orjson.loads(config.read_bytes())
        source, beside = data.get("chat_template"), folder / "chat_template.jinja"
        if source is None and beside.is_file():
            source = beside.read_text(encoding="utf-8")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidInput(f"{config}: cannot be read: {error}") from error
    if isinstance(source, list):  # several by name
        source = next((t.get("template") for t in source if t.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    named = {key: data[key] for key in data if key.endswith("_token")}
    return source, {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}


# --- a message, taken apart ---


def _message(raw: Mapping[str, Any], model: str, detail: str, notes: list[str]) -> _Message:
    message = _Message(str(raw.get("role", "user")), raw)
    content = raw.get("content")
    if isinstance(content, str):
        message.texts.append(content)
    elif isinstance(content, list):
        for part in content:
            _part(part, message, model, detail, notes)
    elif content is not None:
        raise InvalidInput(f"content of a message is {type(content).__name__}: a text or a list of parts is needed")
    for call in raw.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments", "")
        message.calls.append((str(function.get("name", "")), _json(arguments)))
    return message


def _part(part: Any, message: _Message, model: str, detail: str, notes: list[str]) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, str):
        message.texts.append(part)
    elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        message.texts.append(part["text"])
    elif kind in ("image_url", "input_image", "image"):
        message.pictures.append(_picture(part, model, detail, notes))
    elif kind == "tool_use":
        message.calls.append((str(part.get("name", "")), _json(part.get("input", {}))))
    elif kind == "tool_result":
        inner = part.get("content")
        for piece in inner if isinstance(inner, list) else [inner] if inner is not None else []:
            _part(piece, message, model, detail, notes)
    else:
        notes.append(f"a part of type {str(kind)[:40]!r} is counted as its JSON text")
        message.texts.append(_json(part))


def _picture(part: Mapping[str, Any], model: str, detail: str, notes: list[str]) -> images.ImageTokens:
    given = part.get("image_url", part.get("source"))
    data = None
    if isinstance(given, Mapping):
        detail = str(given.get("detail", detail))
        data, given = given.get("data"), given.get("url")
    detail = str(part.get("detail", detail))
    if data is None and isinstance(given, str) and given.startswith("data:"):
        _, _, data = given.partition(",")
    if not model:
        raise InvalidInput("an image needs a model whose rule counts it: give --model")
    if not isinstance(data, str):
        notes.append(f"an image is only an address here: counted as {UNKNOWN_SIDE} x {UNKNOWN_SIDE} pixels")
        return images.count(UNKNOWN_SIDE, UNKNOWN_SIDE, model, detail)
    try:
        head = base64.b64decode(data[: HEADER // 3 * 4])
    except (binascii.Error, ValueError) as error:
        raise InvalidInput("an image is not valid base64: send it as a data URL") from error
    size = read_size(head, "an image of the chat")
    return images.count(size.width, size.height, model, detail)


def _line(text: Any) -> str:
    return str(text or "").removesuffix(".")


def _json(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
