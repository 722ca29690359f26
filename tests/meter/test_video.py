"""Qwen3-VL's video arithmetic against worked figures and transformers' own processor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter.video import frames, qwen3_vl


def test_worked_figures() -> None:
    found = qwen3_vl(1280, 720, 64, 20480 * 32**2)
    assert (found.width, found.height, found.per_pair, found.tokens) == (1056, 576, 594, 19008)
    assert qwen3_vl(1280, 720, 64, 20480 * 32**2, "transformers").tokens == 9568
    # the floor of each frame wins over the limit of the whole
    assert qwen3_vl(1280, 720, 768, 20480 * 32**2).tokens == 46080


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(32, 3000),
    height=st.integers(32, 3000),
    pairs=st.integers(1, 200),
    tokens=st.integers(500, 60_000),
)
def test_the_transformers_processor(width: int, height: int, pairs: int, tokens: int) -> None:
    reference = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    found = qwen3_vl(width, height, 2 * pairs, tokens * 1024, "transformers")
    h, w = reference.smart_resize(2 * pairs, height, width, 2, 32, 4096, tokens * 1024)
    assert (found.width, found.height) == (w, h)


@pytest.mark.parametrize(
    ("duration", "total", "fps", "expected"),
    [
        (10, 300, 2, 20),
        (10.4, 300, 2, 20),  # 20.8 frames
        (1, 300, 2, 4),  # at least 4
        (1, 3, 2, 2),  # no more than there are, and an even number
        (9999, 10**6, 2, 768),
        (0, 10, 2, 4),
    ],
)
def test_frames(duration: float, total: int, fps: float, expected: int) -> None:
    assert frames(duration, total, fps) == expected


def test_refused() -> None:
    for bad in ((float("nan"), 9), (-1.0, 9), (3.0, 1)):
        with pytest.raises(InvalidInput, match="2 frames are needed"):
            frames(*bad)
    for count in (0, 3):
        with pytest.raises(InvalidInput, match="even number"):
            qwen3_vl(64, 64, count)
    with pytest.raises(InvalidInput, match="processor"):
        qwen3_vl(64, 64, 4, processor="other")
