"""How many tokens Qwen3-VL makes of a video: frames, their size, and the tokens of each pair of frames.

Source: "Qwen3-VL Technical Report" and its two processors, which disagree: the reference utilities (`utils`) give each
frame an area, the one of the transformers library (`transformers`) the video as a whole, about half as many tokens. The
text of the timestamps before each pair is not in these counts: the tokenizer counts it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thrifty.errors import InvalidInput
from thrifty.meter.images import smart_resize

FACTOR = 32
"""Pixels along one side of a token's square; a token covers two frames."""

MARKS = 2
"""Tokens around each pair of frames: the start and the end of vision."""


@dataclass(frozen=True, slots=True)
class VideoTokens:
    """Frames that are taken, their size in pixels, and tokens: of each pair of frames, and in all without marks."""

    frames: int
    width: int
    height: int
    per_pair: int

    @property
    def tokens(self) -> int:
        """Tokens that stand for the video."""
        return self.frames // 2 * self.per_pair


def frames(duration: float, total: int, fps: float = 2.0, least: int = 4, most: int = 768) -> int:
    """How many of a video's `total` frames are taken: `fps` a second of its `duration` in seconds, from `least` to
    `most` or as many as there are, an even number. Raises InvalidInput for a video of fewer than two frames."""
    if not (math.isfinite(duration) and duration >= 0 and math.isfinite(fps) and fps > 0 and total >= 2):
        raise InvalidInput(f"a video of {duration} s and {total} frames at {fps} a second: 2 frames are needed")
    low, high = math.ceil(least / 2) * 2, min(most, total) // 2 * 2
    wanted = min(max(duration * fps, low), high)
    return max(2, min(int(wanted // 2 * 2), total // 2 * 2))


def qwen3_vl(
    width: int,
    height: int,
    frames: int,
    total_pixels: int = int(0.9 * 128_000 * FACTOR**2),
    processor: str = "utils",
) -> VideoTokens:
    """Tokens of `frames` frames of one size, under a limit of pixels for the whole video. Not a hard limit: a floor for
    each frame wins where there are many frames. Raises InvalidInput.

    >>> qwen3_vl(1280, 720, 64, 20480 * 32**2).tokens, qwen3_vl(1280, 720, 64, 20480 * 32**2, "transformers").tokens
    (19008, 9568)
    """
    if processor not in ("utils", "transformers"):
        raise InvalidInput(f"processor {processor!r}: utils or transformers")
    if frames < 2 or frames % 2 or total_pixels < 1:
        raise InvalidInput(f"{frames} frames, {total_pixels} pixels: an even number of frames and pixels are needed")
    if processor == "utils":
        least = 128 * FACTOR**2
        most = max(min(768 * FACTOR**2, total_pixels / frames * 2), int(least * 1.05))
        w, h = smart_resize(width, height, FACTOR, least, int(most))
    else:
        w, h = _as_one(width, height, frames, total_pixels)
    return VideoTokens(frames, w, h, w * h // FACTOR**2)


def _as_one(width: int, height: int, frames: int, most: int, least: int = 4096) -> tuple[int, int]:
    """A frame's size where the limits are on frames x width x height."""
    if min(width, height) < FACTOR:
        scale = max(FACTOR / height, FACTOR / width)
        width, height = int(width * scale), int(height * scale)
    w, h = (round(side / FACTOR) * FACTOR for side in (width, height))
    if frames * w * h > most:
        shrink = math.sqrt(frames * width * height / most)
        w, h = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (width, height))
    elif frames * w * h < least:
        grow = math.sqrt(least / (frames * width * height))
        w, h = (math.ceil(side * grow / FACTOR) * FACTOR for side in (width, height))
    return w, h
