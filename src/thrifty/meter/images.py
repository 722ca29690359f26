"""How many tokens a model makes of an image: the rules of OpenAI, Anthropic, Gemini, Gemma, Qwen-VL and LLaVA as pure
functions of its width and height in pixels.

Sources, as they stood at `TABLE_DATE`: the providers' guides to images (OpenAI "Images and vision", Anthropic "Vision",
Google "Image understanding" and "Media resolution"), "Qwen3-VL Technical Report" and its processor, "Gemma 3 Technical
Report", and for LLaVA "Improved Baselines with Visual Instruction Tuning" with LLaVA-NeXT's any-resolution grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from thrifty.errors import InvalidInput

TABLE_DATE = "2026-11-25"

DETAILS = ("auto", "low", "medium", "high", "original", "ultra_high")


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """`tokens` stand for the image; `around` are the marks that a chat template puts at its sides. `rule` names the
    rule, `rough` says that its provider calls it an estimate."""

    tokens: int
    around: int
    rule: str
    rough: bool = False

    @property
    def total(self) -> int:
        """Both together."""
        return self.tokens + self.around


# --- OpenAI ---


@dataclass(frozen=True, slots=True)
class _Fit:
    """Limits that an image is fitted into: the longer side in pixels, and patches (None: no limit)."""

    edge: int
    patches: int | None


_OLD = {name: _Fit(2048, 1536) for name in ("auto", "low", "high")}
_WIDE = {name: _Fit(2048, 6144) for name in ("auto", "low", "high")}
_NEW_HIGH, _NEW_ORIGINAL = _Fit(2048, 2500), _Fit(6000, 10_000)
_5_4 = {"low": _Fit(2048, 6144), "high": _NEW_HIGH, "auto": _NEW_HIGH, "original": _NEW_ORIGINAL}
_5_5 = {"low": _Fit(512, None), "high": _NEW_HIGH, "auto": _NEW_ORIGINAL, "original": _NEW_ORIGINAL}
_ANY = _Fit(65_535, None)
_5_6 = {"low": _Fit(512, None), "high": _NEW_HIGH, "auto": _ANY, "original": _ANY}

# By prefix, the longest that fits counts: patches of 32 pixels (multiplier in hundredths, limits by detail) ...
_PATCHES: Mapping[str, tuple[int, Mapping[str, _Fit]]] = {
    "gpt-6": (120, _5_6),
    "gpt-5.6": (120, _5_6),
    "gpt-5.5": (120, _5_5),
    "gpt-5.4": (120, _5_4),
    "gpt-5.2": (120, _WIDE),
    "gpt-5-mini": (120, _OLD),
    "gpt-5-nano": (150, _OLD),
    "gpt-4.1-mini": (162, _WIDE),
    "gpt-4.1-nano": (246, _OLD),
    "o4-mini": (172, _OLD),
}
# ... or tiles of 512 pixels (tokens of the image at once, and of each tile).
_TILES: Mapping[str, tuple[int, int]] = {
    "gpt-5": (70, 140),
    "gpt-4o": (85, 170),
    "gpt-4.1": (85, 170),
    "gpt-4.5": (85, 170),
    "gpt-4": (85, 170),
    "chatgpt-4o": (85, 170),
    "gpt-4o-mini": (2833, 5667),
    "o1": (75, 150),
    "o3": (75, 150),
    "computer-use": (65, 129),
}


def openai(width: int, height: int, model: str = "gpt-4o", detail: str = "auto") -> ImageTokens:
    """OpenAI's tokens for one image. Raises InvalidInput for a model without a rule or a detail it does not have.

    >>> openai(1024, 1024).tokens, openai(2048, 4096).tokens, openai(4096, 8192, detail="low").tokens
    (765, 1105, 85)
    >>> openai(2048, 2048, "gpt-5.4", "high").tokens
    3000
    """
    name = model.rsplit("/", 1)[-1].lower()
    prefix = max((p for p in (*_PATCHES, *_TILES) if name.startswith(p)), key=len, default=None)
    if prefix is None:
        raise InvalidInput(f"no OpenAI image rule for model {model!r}: known: {', '.join((*_PATCHES, *_TILES))}")
    if prefix in _TILES:
        if detail not in ("auto", "low", "high"):
            raise InvalidInput(f"detail {detail!r}: {model} has auto, low and high")
        return ImageTokens(tiles(width, height, *_TILES[prefix], low=detail == "low"), 0, "openai tiles")
    hundredths, fits = _PATCHES[prefix]
    if detail not in fits:
        raise InvalidInput(f"detail {detail!r}: {model} has {', '.join(sorted(fits))}")
    return ImageTokens(patches(width, height, hundredths, fits[detail].edge, fits[detail].patches), 0, "openai patches")


def tiles(width: int, height: int, base: int, tile: int, low: bool = False) -> int:
    """`base` tokens and `tile` for each square of 512 pixels, after fitting into 2048 x 2048 and the shorter side into
    768. `low`: the base alone."""
    _check(width, height)
    if low:
        return base
    w, h = _within(width, height, 2048)
    if min(w, h) > 768:
        # the shorter side becomes 768; the other is rounded down
        w, h = (768, h * 768 // w) if w <= h else (w * 768 // h, 768)
    return base + tile * math.ceil(w / 512) * math.ceil(h / 512)


def patches(width: int, height: int, hundredths: int, edge: int, most: int | None) -> int:
    """Patches of 32 pixels that cover the image once it fits into `edge` and, where there is a limit, into `most`
    patches; times a multiplier given in hundredths, rounded up."""
    _check(width, height)
    w, h = _within(width, height, edge)
    count = _cover(w, h, 32)
    if most is not None and count > most:
        shrink = math.sqrt(32 * 32 * most / (w * h))
        # whole patches along both sides, so that the rounding up below stays within the limit
        scale = shrink * min(max(1, math.floor(side * shrink / 32)) / (side * shrink / 32) for side in (w, h))
        count = min(most, _cover(max(1, math.floor(w * scale)), max(1, math.floor(h * scale)), 32))
    return -(-count * hundredths // 100)


# --- Anthropic ---


def anthropic(width: int, height: int, model: str = "claude-sonnet-4-5") -> ImageTokens:
    """Anthropic's tokens for one image: one for each patch of 28 pixels of the size that the tier allows.

    Models from Claude 4.7 on take 2576 pixels a side and 4784 tokens, earlier ones 1568 and 1568.

    >>> anthropic(1000, 1000).tokens, anthropic(3840, 2160).tokens, anthropic(3840, 2160, "claude-opus-4-7").tokens
    (1296, 1560, 4784)
    """
    w, h = anthropic_size(width, height, model)
    return ImageTokens(_cover(w, h, 28), 0, "anthropic patches")


def anthropic_size(width: int, height: int, model: str = "claude-sonnet-4-5") -> tuple[int, int]:
    """The size in pixels that Claude sees: the largest of the same shape that its tier allows, never enlarged."""
    _check(width, height)
    edge, most = (2576, 4784) if _claude_version(model) >= (4, 7) else (1568, 1568)
    long, short = max(width, height), min(width, height)

    def other(side: int) -> int:
        return max(1, round(side / (long / short)))  # half to even, as the service rounds

    def fits(a: int, b: int) -> bool:
        return math.ceil(a / 28) * 28 <= edge and _cover(a, b, 28) <= most

    if not fits(long, short):
        low, high = 1, long  # `low` fits, `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, other(middle)) else (low, middle)
        long, short = low, other(low)
    return (long, short) if width >= height else (short, long)


def _claude_version(model: str) -> tuple[int, int]:
    """`claude-opus-4-7-20260101` -> (4, 7), `claude-3-5-haiku` -> (3, 5), without one (0, 0)."""
    found = re.search(r"claude\D*?(\d{1,2})(?:[-.](\d{1,2})(?!\d))?", model.lower())
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


# --- Google ---

_GEMINI_3 = {"low": 280, "medium": 560, "high": 1120, "auto": 1120, "ultra_high": 2240}


def gemini(width: int, height: int, model: str = "gemini-2.5-flash", detail: str = "auto") -> ImageTokens:
    """Gemini's tokens for one image. Gemini 3 has a number for each media resolution; before it, images up to 384
    pixels cost 258, larger ones 258 for each tile, by a formula that Google calls rough.

    >>> gemini(300, 384).tokens, gemini(960, 540).tokens, gemini(960, 540, "gemini-3-pro").tokens
    (258, 1548, 1120)
    """
    _check(width, height)
    if re.search(r"gemini-[3-9]", model.lower()):
        if detail not in _GEMINI_3:
            raise InvalidInput(f"detail {detail!r}: {model} has {', '.join(_GEMINI_3)}")
        return ImageTokens(_GEMINI_3[detail], 0, "gemini media resolution")
    if max(width, height) <= 384:
        return ImageTokens(258, 0, "gemini tiles")
    unit = max(1, int(min(width, height) / Fraction(3, 2)))
    return ImageTokens(258 * _cover(width, height, unit), 0, "gemini tiles", rough=True)


def gemma(width: int, height: int) -> ImageTokens:
    """Gemma 3: 256 tokens whatever the size (without pan and scan), between two marks and two blank lines."""
    _check(width, height)
    return ImageTokens(256, 4, "gemma 3")


# --- Qwen-VL ---


def smart_resize(width: int, height: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Width and height in pixels, multiples of `factor`, whose area is from `least` to `most` square pixels where that
    can be, of nearly the same shape. Raises InvalidInput where one side is over 200 times the other."""
    _check(width, height)
    if max(width, height) > 200 * min(width, height):
        raise InvalidInput(f"{width} x {height}: Qwen-VL takes sides up to 200 : 1")
    w, h = (max(factor, round(side / factor) * factor) for side in (width, height))
    if w * h > most:
        shrink = math.sqrt(width * height / most)
        w, h = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    elif w * h < least:
        grow = math.sqrt(least / (width * height))
        w, h = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return w, h


def qwen_vl(
    width: int, height: int, model: str = "qwen3-vl", least_tokens: int = 4, most_tokens: int = 16_384
) -> ImageTokens:
    """Qwen-VL: one token for each square of 32 pixels (28 before Qwen3-VL) after `smart_resize`, between two marks.

    >>> qwen_vl(1024, 768, least_tokens=256, most_tokens=1280).tokens
    768
    """
    factor = qwen_factor(model)
    w, h = smart_resize(width, height, factor, least_tokens * factor**2, most_tokens * factor**2)
    return ImageTokens(w * h // factor**2, 2, "qwen-vl")


def qwen_factor(model: str) -> int:
    """Pixels along one side of a token's square.

    >>> qwen_factor("Qwen2.5-VL-7B"), qwen_factor("qwen3-vl-plus"), qwen_factor("qwen-vl-max")
    (28, 32, 32)
    """
    return 28 if re.search(r"qwen-?2|qvq", model.lower()) else 32


# --- LLaVA ---

_LLAVA_GRIDS = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))


def llava(width: int, height: int, model: str = "llava-1.5") -> ImageTokens:
    """LLaVA 1.5: 24 x 24 tokens of one 336-pixel square. LLaVA-NeXT (1.6) adds the tokens of the grid that fits best,
    without its padding, and a token at the end of each row.

    >>> llava(640, 480).tokens, llava(640, 480, "llava-1.6").tokens
    (576, 2340)
    """
    _check(width, height)
    if not re.search(r"llava-?(v?1\.6|next)", model.lower()):
        return ImageTokens(576, 0, "llava")

    def quality(grid: tuple[int, int]) -> tuple[int, int]:
        """Pixels of the image that are kept, then the fewest wasted."""
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    grid = max(_LLAVA_GRIDS, key=quality)
    columns, rows = grid[0] // 14, grid[1] // 14
    if width * rows > height * columns:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return ImageTokens(576 + rows * (columns + 1), 0, "llava-next")


# --- by model ---


def count(width: int, height: int, model: str, detail: str = "auto") -> ImageTokens:
    """The tokens of an image for a model by its name. Raises InvalidInput where no rule is known for it."""
    if detail not in DETAILS:
        raise InvalidInput(f"detail {detail!r}: one of {', '.join(DETAILS)} is allowed")
    name = model.lower()
    rules: tuple[tuple[str, Callable[[], ImageTokens]], ...] = (
        ("claude", lambda: anthropic(width, height, name)),
        ("gemini", lambda: gemini(width, height, name, detail)),
        ("gemma", lambda: gemma(width, height)),
        ("llava", lambda: llava(width, height, name)),
        ("qwen|qvq", lambda: qwen_vl(width, height, name)),
        (r"(^|[/:])(gpt-|chatgpt|o[134](?![0-9a-z])|computer-use)", lambda: openai(width, height, name, detail)),
    )
    for pattern, rule in rules:
        if re.search(pattern, name):
            return rule()
    raise InvalidInput(
        f"no image rule for model {model!r}: there are rules for OpenAI, Claude, Gemini, Gemma, Qwen-VL and LLaVA"
    )


def _within(width: int, height: int, edge: int) -> tuple[int, int]:
    """The size fitted into a square of `edge` pixels, rounded to whole pixels, never enlarged."""
    longer = max(width, height)
    if longer <= edge:
        return width, height
    w, h = (max(1, round(Fraction(side * edge, longer))) for side in (width, height))
    return w, h


def _cover(width: int, height: int, side: int) -> int:
    """Squares of `side` pixels that cover an image."""
    return -(-width // side) * -(-height // side)


def _check(width: int, height: int) -> None:
    if not (0 < width <= 1 << 20 and 0 < height <= 1 << 20):
        raise InvalidInput(f"an image of {width} x {height} pixels: from 1 to 1,048,576 a side are allowed")
