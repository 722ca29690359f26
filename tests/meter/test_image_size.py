"""Sizes from headers against an image library's own files, and files made to harm."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter.image_size import HEADER, is_image, read_size


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    form=st.sampled_from(
        ["PNG", "GIF", "JPEG", "JPEG progressive", "JPEG exif", "WEBP", "WEBP lossless", "WEBP alpha"]
    ),
)
def test_sizes_of_real_files(width: int, height: int, form: str) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = image.new(
        "RGBA" if form == "WEBP alpha" else "RGB", (width, height), (9, 99, 200, 9)[: 4 if "alpha" in form else 3]
    )
    settings = {
        "JPEG progressive": {"progressive": True},
        "JPEG exif": {"exif": b"Exif\0\0" + bytes(60_000)},
        "WEBP lossless": {"lossless": True},
    }.get(form, {})
    file = io.BytesIO()
    picture.save(file, form.split()[0], **settings)
    size = read_size(file.getvalue())
    assert (size.width, size.height, size.format) == (width, height, form.split()[0].lower())


@settings(max_examples=300)
@given(
    start=st.sampled_from(
        [
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"GIF89a",
            b"RIFF0000WEBP",
            b"RIFF0000WEBPVP8 ",
            b"RIFF0000WEBPVP8L",
            b"RIFF0000WEBPVP8X",
        ]
    ),
    rest=st.binary(max_size=60),
)
def test_damaged_headers_are_refused_in_one_line(start: bytes, rest: bytes) -> None:
    assert is_image(start + rest)
    try:
        size = read_size(start + rest, "x.img")
    except InvalidInput as error:
        assert str(error).startswith("x.img: ") and "\n" not in str(error)
    else:
        assert 0 < size.width <= 65_536 and 0 < size.height <= 65_536


def test_files_made_to_harm() -> None:
    bomb = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 1 << 31, 1 << 31)
    with pytest.raises(InvalidInput, match="2147483648"):
        read_size(bomb)
    endless = b"\xff\xd8" + b"\xff\xe1\x00\x02" * (HEADER // 4 + 9)  # segments without end
    with pytest.raises(InvalidInput, match="JPEG header is damaged"):
        read_size(endless)
    for head in (b"", b"hello", b"RIFF0000WAVE", b"%PDF-1.7"):
        assert not is_image(head)
        with pytest.raises(InvalidInput, match="PNG, JPEG, GIF or WebP"):
            read_size(head)
