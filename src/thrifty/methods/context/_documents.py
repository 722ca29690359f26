"""The long texts of a call that may be made shorter, cut into runs of prose, data and code.

A document is the call's `context`, or one long text of a user's message without its question, which is taken to stand
at its end, or, where that is a fenced block, at its beginning.
What a document is follows from the message alone, so in a later turn it is the same one, and is shortened alike."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.budget import Account
from thrifty.call import Call, Message, text_of
from thrifty.context import SEPARATOR, render
from thrifty.errors import InvalidInput
from thrifty.methods.context import _shorten_code, _shorten_json
from thrifty.methods.context._conversation import Counter, cache_report, common_prefix, digest, is_result, previous_turn
from thrifty.methods.context._sentences import sentences

STRUCTURED = ("json", "json lines", "python", "braces", "code")
"""Kinds that must parse afterwards as before; "code" is what only looks like code, and is left alone."""

_FENCE = re.compile(r"(?ms)^(`{3,}|~{3,})[^\n]*\n.*?^\1[ \t]*$\n?")
_PARAGRAPH = re.compile(r"(?s).+?(?:\n[ \t]*\n\s*|\Z)")
_PYTHON = re.compile(r"(?m)^(?:(?:async )?def|class|import|from)\s+\w+")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of one kind: "text", or one of STRUCTURED. `before` and `after` stay: a fence, white space."""

    text: str
    kind: str = "text"
    before: str = ""
    after: str = ""

    @property
    def whole(self) -> str:
        """As it stands in its document."""
        return self.before + self.text + self.after


@dataclass(frozen=True, slots=True)
class Document:
    """`pieces`: the passages of the context, or one piece of a message, each in chunks. `message`, `part`: where a
    message's text stands (`part` None: its content is one text), `lead`, `rest`: its two ends, which stay."""

    pieces: tuple[tuple[Chunk, ...], ...]
    question: str
    ref: str
    message: int | None = None
    part: int | None = None
    lead: str = ""
    rest: str = ""

    @property
    def texts(self) -> list[str]:
        """Its pieces as they are."""
        return ["".join(chunk.whole for chunk in piece) for piece in self.pieces]


def documents(call: Call, counter: Counter, least: int) -> list[Document]:
    """The call's documents, in order: the context first, then user texts of more than `least` tokens."""
    found: list[Document] = []
    if call.context:
        pieces = tuple(tuple(chunks(text)) for text in call.context)
        found.append(Document(pieces, call.question(), digest(list(call.context))))
    for i, message in enumerate(call.messages):
        if message.get("role") == "user" and not is_result(message):
            found += _of_message(i, message, counter, least)
    return found


def _of_message(at: int, message: Message, counter: Counter, least: int) -> list[Document]:
    content = message.get("content")
    if isinstance(content, str):
        texts: list[tuple[int | None, str]] = [(None, content)]
    else:
        parts = enumerate(content or ())
        texts = [(j, p["text"]) for j, p in parts if isinstance(p, Mapping) and isinstance(p.get("text"), str)]
    found = []
    for j, text in texts:
        if counter.text(text) <= least:
            continue
        lead, body, rest = split_question(text) if (j, text) == texts[-1] else ("", text, "")
        question = "".join(split_question(text_of(message))[::2]).strip()
        if body.strip():
            found.append(Document((tuple(chunks(body)),), question, digest(body), at, j, lead, rest))
    return found


def split_question(text: str) -> tuple[str, str, str]:
    r"""What stays in front, what may be made shorter, what stays behind. That is the last paragraph; of one paragraph
    the last sentence; of one sentence, and of data or code alone, nothing. Where a fenced block is the end, the first
    paragraph stays instead.

    >>> split_question("It rains. It pours.\n\nWhy?"), split_question("It rains. Why?")
    (('', 'It rains. It pours.\n\n', 'Why?'), ('', 'It rains. ', 'Why?'))
    >>> split_question("Why?\n\n```\nx = 1\n\ny = 2\n```\n")
    ('Why?\n\n', '```\nx = 1\n\ny = 2\n```\n', '')
    """
    if kind_of(text) != "text":
        return "", text, ""
    paragraphs = _PARAGRAPH.findall(text)
    cut = len(text) - len(paragraphs[-1]) if paragraphs else 0
    fences = [m.span() for m in _FENCE.finditer(text)]
    if fences and fences[-1][1] > cut:
        cut = fences[-1][1]
        if not text[cut:].strip():
            first = min(len(paragraphs[0]), fences[0][0])
            return text[:first], text[first:], ""
    elif len(paragraphs) < 2:
        whole = sentences(text)
        cut = len(text) - len(whole[-1]) if len(whole) > 1 else len(text)
    return "", text[:cut], text[cut:]


def chunks(text: str) -> list[Chunk]:
    """A text in runs of one kind; their `whole`s joined are the text. Neighbouring prose is one run."""
    known = kind_of(text)
    if known != "text":
        return [_bare(text, known)]
    found: list[Chunk] = []
    at = 0
    for fence in _FENCE.finditer(text):
        found += _paragraphs(text[at : fence.start()])
        found.append(_fenced(fence[0]))
        at = fence.end()
    found += _paragraphs(text[at:])
    joined: list[Chunk] = []
    for chunk in found:
        if chunk.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = Chunk(joined[-1].whole + chunk.whole)
        else:
            joined.append(chunk)
    return joined


def kind_of(text: str) -> str:
    """What a text is as a whole: it is read by the parser that says so."""
    core = text.strip()
    if core[:1] in ("{", "["):
        for kind, values in (("json", [core]), ("json lines", [line for line in core.split("\n") if line.strip()])):
            try:
                for value in values:
                    _shorten_json.read(value)
                return kind
            except (ValueError, RecursionError):
                continue
    if _PYTHON.search(text) and parsed(text) is not None:
        return "python"
    braces = _braced(core) and _shorten_code.shorten_braces(text, lambda _: True, "") is not None
    return "braces" if braces else "text"


def parsed(text: str) -> ast.Module | None:
    """The tree of a Python file; None for what does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def put(call: Call, changed: Sequence[tuple[Document, Sequence[str]]]) -> Call:
    """The call with each document's pieces replaced; empty ones go, with what stood between them."""
    messages = list(call.messages)
    context = call.context
    for document, texts in changed:
        kept = [text for text in texts if text.strip()]
        if document.message is None:
            context = tuple(kept)
            continue
        text = document.lead + "".join(kept) + document.rest
        old: Mapping[str, Any] = messages[document.message]
        content: Any = text
        if document.part is not None:
            content = list(old["content"])
            content[document.part] = {**content[document.part], "text": text}
        messages[document.message] = {**old, "content": content}
    return replace(call, messages=tuple(messages), context=context)


def cache_cost(
    call: Call,
    changed: Call,
    counter: Counter,
    results: Sequence[tuple[Document, Sequence[str]]],
    tokens: tuple[int, int],
    price: float,
    *,
    asks: bool,
) -> tuple[dict[str, Any], str]:
    """What the provider's cache would have had, and has, of the turn before, as `cache_report` has it.

    `results`: what became of the documents, the same then as now, but for the context's where a method `asks`: it is
    shortened by the question, which was another one. `tokens`: of the prompt before and after."""
    past = tuple(previous_turn(call.messages))
    if not past:
        return cache_report(0, 0, 0, *tokens, price)
    old = replace(call, messages=past)
    here = [(d, texts) for d, texts in results if d.message is None or d.message < len(past)]
    then = [(d, ["(shortened for another question)"] if asks and d.message is None else texts) for d, texts in here]
    sent, whole = render(put(old, then)), render(old)
    shared = counter.messages(sent[: common_prefix(sent, render(changed))])
    would = counter.messages(whole[: common_prefix(whole, render(call))])
    return cache_report(would, counter.messages(sent), shared, *tokens, price)


def recalled(messages: Sequence[Message], ref: str, context: Sequence[str] = ()) -> str:
    """The whole text of the document with this ref. Raises InvalidInput where there is none."""
    call = Call(tuple(messages), Account("recall"), context=tuple(context) or None)
    for document in documents(call, Counter(call), 0):
        if document.ref == ref.removeprefix("#"):
            return (SEPARATOR if document.message is None else "").join(document.texts)
    raise InvalidInput(f"ref {ref!r} names no long text of this conversation: give one that a mark shows")


def _braced(text: str) -> bool:
    """Most lines end as those of the C family do, and the first is no sentence: prose with data in it is none."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    ended = sum(line.endswith(("{", "}", ";", ",", "*/")) or line.startswith(("//", "/*", "*", "#")) for line in lines)
    return (
        len(lines) > 2
        and not lines[0].endswith((".", "!", "?", ":"))
        and ended * 5 >= len(lines) * 3
        and _FENCE.search(text) is None
    )


def _bare(text: str, kind: str) -> Chunk:
    """Data without the empty lines around it; code as it stands."""
    if not kind.startswith("json"):
        return Chunk(text, kind)
    start = re.match(r"(?:[ \t]*\r?\n)*", text)
    front = start.end() if start else 0
    back = len(text.rstrip())
    return Chunk(text[front:back], kind, text[:front], text[back:]) if front < back else Chunk(text)


def _fenced(text: str) -> Chunk:
    first = text.index("\n") + 1
    last = text.rstrip().rfind("\n") + 1
    inner = text[first:last]
    kind = kind_of(inner) if inner.strip() else "code"
    return Chunk(inner, "code" if kind == "text" else kind, text[:first], text[last:])


def _paragraphs(text: str) -> list[Chunk]:
    found = []
    for paragraph in _PARAGRAPH.findall(text):
        kind = kind_of(paragraph)
        if kind == "text" and _indented(paragraph):
            kind = "code"
        found.append(Chunk(paragraph) if kind == "text" else _bare(paragraph, kind))
    return found


def _indented(paragraph: str) -> bool:
    lines = [line for line in paragraph.split("\n") if line.strip()]
    return bool(lines) and sum(line.startswith(("    ", "\t")) for line in lines) * 2 > len(lines)
