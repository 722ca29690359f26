"""One count of several things for one model: texts, files, chats and images, with what is approximate about each."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from thrifty.errors import InvalidInput
from thrifty.meter import chat, image_size, images, tokenizer_files, tokenizers
from thrifty.meter.tokenizers import ESTIMATE, Readable, Tokenizer

_LOOK = 1 << 13
"""Bytes of a file that are looked at to tell text from images and binaries."""


@dataclass(frozen=True, slots=True)
class Item:
    """One counted thing. `parts`, for a chat: text, tools, visual and overhead tokens; for an image its size."""

    name: str
    kind: str
    tokens: int
    bytes: int
    approximate: bool = False
    parts: dict[str, int] = field(default_factory=dict)


@dataclass
class Counting:
    """Counts for one model; `items` and `notes` grow with each call. `text_tokenizer` is None where only an estimate
    was to be had."""

    model: str
    text_tokenizer: Tokenizer | None
    tokenizer: str
    detail: str = "auto"
    note: str = ""
    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: str, tokenizer: str | None = None, detail: str = "auto", estimate: bool = False) -> Counting:
        """For a model by its name, or with a tokenizer given by name or path.

        Raises InvalidInput where the tokenizer is not known or not here, unless `estimate`.
        """
        if detail not in images.DETAILS:
            raise InvalidInput(f"--detail {detail}: one of {', '.join(images.DETAILS)} is allowed")
        note = ""
        try:
            if tokenizer is None:
                choice = tokenizers.choose(model)
                tokenizer, note = choice.tokenizer, choice.note
            if tokenizer not in tokenizer_files.FILES:
                return cls(model, tokenizers.from_path(tokenizer), tokenizer, detail, note)
            if tokenizer_files.present(tokenizer) or not estimate:
                return cls(model, tokenizers.load(tokenizer), tokenizer, detail, note)
            note = f"estimated from bytes: `thrifty count --get {tokenizer}` fetches the tokenizer"
        except InvalidInput as error:
            if not estimate:
                raise
            note = f"estimated from bytes: {error}"
        return cls(model, None, "estimate from bytes", detail, note)

    @property
    def total(self) -> int:
        """Tokens of all items."""
        return sum(item.tokens for item in self.items)

    def text(self, name: str, text: str) -> None:
        """Counts a text."""
        self._text(name, "text", io.BytesIO(text.encode("utf-8", "replace")))

    def file(self, name: str, stream: Readable) -> None:
        """Counts a file: an image by its rule, text by its tokens. Raises InvalidInput for any other binary."""
        head = stream.read(_LOOK)
        if image_size.is_image(head):
            head += stream.read(image_size.HEADER - len(head))
            size = image_size.read_size(head, name)
            counted = images.count(size.width, size.height, self.model, self.detail)
            if counted.rough:
                self._tell("the image rule of this model is a rough one, as its provider says")
            parts = {"width": size.width, "height": size.height}
            self.items.append(Item(name, "image", counted.total, _rest(stream, len(head)), counted.rough, parts))
            return
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InvalidInput(f"{name}: UTF-16: convert it to UTF-8 first")
        if b"\0" in head or _garbled(head):
            raise InvalidInput(f"{name}: a binary file, no text: give text in UTF-8 or a PNG, JPEG, GIF or WebP image")
        self._text(name, "text", _Joined(head, stream))

    def chat(self, name: str, body: Any) -> None:
        """Counts a chat request. Raises InvalidInput for what is none."""
        try:
            tokenizer = self.text_tokenizer or ESTIMATE
            counted = chat.count_chat(body, tokenizer, self.model, self.detail)
        except InvalidInput as error:
            raise InvalidInput(f"{name}: {error}") from error
        for note in counted.notes:
            self._tell(note)
        import orjson

        size = len(orjson.dumps(body))
        parts = {key: getattr(counted, key) for key in ("text", "tools", "visual", "overhead")}
        self.items.append(Item(name, "chat", counted.total, size, self._approximate or bool(counted.notes), parts))
        self._common()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "tokens": self.total,
            "exact": not any(item.approximate for item in self.items),
            "items": [asdict(item) for item in self.items],
            "notes": self.notes,
            "rules": {"tokenizers": tokenizers.TABLE_DATE, "images": images.TABLE_DATE},
        }

    @property
    def _approximate(self) -> bool:
        return self.text_tokenizer is None or bool(self.note)

    def _text(self, name: str, kind: str, stream: Readable) -> None:
        tokenizer = self.text_tokenizer or ESTIMATE
        counted = tokenizer.count_stream(stream)
        if counted.replaced:
            self._tell(f"{name}: {counted.replaced:,} invalid UTF-8 sequences were read as U+FFFD")
        if counted.forced_cuts:
            self._tell(f"{name}: cut in {counted.forced_cuts:,} places that may add a token each")
        approximate = self._approximate or bool(counted.forced_cuts)
        self.items.append(Item(name, kind, counted.tokens, counted.bytes, approximate))
        self._common()

    def _common(self) -> None:
        if self.note:
            self._tell(self.note)

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _garbled(head: bytes) -> bool:
    """Whether a file begins with what is no text in UTF-8: a quarter of its characters invalid. Text in an older
    encoding, such as Latin-1, is far below that."""
    text = head.decode("utf-8", "replace")
    return 4 * (text.count("\ufffd") - head.count(b"\xef\xbf\xbd")) > len(text)


class _Joined:
    """A stream whose beginning was read already."""

    def __init__(self, head: bytes, rest: Readable) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int = -1) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        return self._rest.read(size)


def _rest(stream: Readable, seen: int) -> int:
    """Bytes of a stream, of which some were read; read in blocks and thrown away."""

    def blocks() -> Iterator[bytes]:
        while block := stream.read(1 << 20):
            yield block

    return seen + sum(len(block) for block in blocks())
