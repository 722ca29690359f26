"""Width and height of an image from its header: PNG, JPEG, GIF and WebP. Nothing is decoded, and no more than the first
`HEADER` bytes are looked at, so a hostile file costs no memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from thrifty.errors import InvalidInput

HEADER = 1 << 20
"""Bytes that a header may take; the metadata of a camera stand before a JPEG's size."""

MOST_PIXELS = 1 << 16
"""The largest width or height that is believed, in pixels."""

_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = {0x01, *range(0xD0, 0xD9)}


@dataclass(frozen=True, slots=True)
class Size:
    """A picture's format and its width and height in pixels."""

    format: str
    width: int
    height: int


def is_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes is one of the four formats.

    >>> is_image(b"GIF89a"), is_image(b"hello")
    (True, False)
    """
    return _format(head) is not None


def read_size(head: bytes, name: str = "image") -> Size:
    """The size of the image whose file begins with `head`, its first `HEADER` bytes. Raises InvalidInput.

    >>> read_size(b"GIF89a" + bytes([64, 1, 200, 0]))
    Size(format='gif', width=320, height=200)
    """
    kind = _format(head)
    if kind is None:
        raise InvalidInput(f"{name}: no image whose size can be read: PNG, JPEG, GIF or WebP is needed")
    try:
        width, height = {"png": _png, "jpeg": _jpeg, "gif": _gif, "webp": _webp}[kind](head[:HEADER])
    except (struct.error, IndexError, ValueError) as error:
        raise InvalidInput(f"{name}: the {kind.upper()} header is damaged or cut: no size can be read") from error
    if not (0 < width <= MOST_PIXELS and 0 < height <= MOST_PIXELS):
        raise InvalidInput(f"{name}: {width} x {height} pixels: from 1 to {MOST_PIXELS:,} a side are allowed")
    return Size(kind, width, height)


def _format(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return None


def _png(head: bytes) -> tuple[int, int]:
    if head[12:16] != b"IHDR":
        raise ValueError("no IHDR")
    width, height = struct.unpack_from(">II", head, 16)
    return width, height


def _gif(head: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", head, 6)
    return width, height


def _jpeg(head: bytes) -> tuple[int, int]:
    """Walks the segments to the frame header. Every step goes forward, so it ends."""
    at = 2
    while True:
        if head[at] != 0xFF:
            raise ValueError("no marker")
        while head[at] == 0xFF:  # fill bytes
            at += 1
        marker = head[at]
        at += 1
        if marker in _JPEG_ALONE:
            continue
        if marker in _JPEG_SIZES:
            height, width = struct.unpack_from(">HH", head, at + 3)
            return width, height
        if marker in (0xD9, 0xDA):
            raise ValueError("no frame header before the picture")
        (length,) = struct.unpack_from(">H", head, at)
        if length < 2:
            raise ValueError("a segment without a length")
        at += length


def _webp(head: bytes) -> tuple[int, int]:
    chunk = head[12:16]
    if chunk == b"VP8 ":
        if head[23:26] != b"\x9d\x01\x2a":
            raise ValueError("no key frame")
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        if head[20] != 0x2F:
            raise ValueError("no signature")
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X":
        size = struct.unpack_from("<6B", head, 24)
        return 1 + int.from_bytes(bytes(size[:3]), "little"), 1 + int.from_bytes(bytes(size[3:]), "little")
    raise ValueError("an unknown chunk")
