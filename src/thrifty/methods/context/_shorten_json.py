"""JSON made shorter that is still JSON: arrays are sampled and keep their count, long texts lose their middle.

Numbers keep every digit, objects the order of their keys and their repeated ones; what is left out is told where it
was, as a string. Objects are read as tuples of pairs, arrays as lists."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.methods.context._shorten_text import middle_out

CUT_KEY = "[left out]"
Matches = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Level:
    """How much stays: items of each array, characters of each text, keys of each object, depth."""

    items: int
    chars: int
    keys: int
    depth: int


LEVELS = tuple(
    Level(*row)
    for row in (
        (1000, 8000, 400, 40),
        (400, 4000, 200, 30),
        (200, 2000, 100, 20),
        (100, 1000, 60, 14),
        (60, 600, 40, 12),
        (40, 400, 30, 10),
        (25, 300, 25, 9),
        (16, 200, 20, 8),
        (10, 140, 16, 7),
        (7, 100, 12, 6),
        (5, 70, 10, 5),
        (3, 50, 8, 4),
        (2, 40, 6, 3),
        (2, 24, 4, 2),
        (0, 24, 0, 1),
    )
)
"""From generous to scant; the first that fits is taken."""


class _Number(str):
    """A number as it was written."""


def read(text: str) -> Any:
    """The value of a JSON text whose outermost value is an array or an object. Raises ValueError for all else."""
    if text.lstrip()[:1] not in ("[", "{"):
        raise ValueError("no array and no object")

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=tuple, parse_int=_Number, parse_float=_Number, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def write(value: Any) -> str:
    """Compact JSON of what `read` gave."""
    if isinstance(value, _Number):
        return value
    if isinstance(value, str):
        plain = not any("\ud800" <= c <= "\udfff" for c in value)  # a lone surrogate cannot be sent but escaped
        return json.dumps(value, ensure_ascii=not plain)
    if isinstance(value, tuple):
        return "{" + ",".join(f"{write(k)}:{write(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(write(v) for v in value) + "]"
    return json.dumps(value)


def shorten(text: str, fits: Callable[[str], bool], matches: Matches, back: str) -> str | None:
    """The shortest loss that fits: first white space alone, then the levels in turn; None where not even the last
    fits. `back` says how to see the whole. Raises ValueError where the text is no JSON array or object."""
    value = read(text)
    compact = write(value)
    if fits(compact):
        return compact
    low, high = 0, len(LEVELS) - 1
    best: str | None = None
    while low <= high:  # more generous levels are longer, near enough; each candidate is checked by itself
        middle = (low + high) // 2
        candidate = write(_told(_cut(value, LEVELS[middle], matches), value, back))
        if fits(candidate):
            best, high = candidate, middle - 1
        else:
            low = middle + 1
    return best


def shorten_lines(lines: Sequence[str], fits: Callable[[str], bool], matches: Matches, back: str) -> str | None:
    """The same for JSON lines: whole lines are sampled, each shortened by itself, and the last line tells how many
    there were. None where nothing fits. Raises ValueError where a line is no JSON array or object."""
    values = [read(line) for line in lines]
    compact = "\n".join(write(v) for v in values)
    if fits(compact):
        return compact
    hits = [matches(line) for line in lines]
    for level in LEVELS:
        kept = sample(hits, max(1, level.items))
        short = [write(_cut(values[i], level, matches)) for i in kept]
        told = write(((CUT_KEY, _shown(kept, len(lines), "lines") + (f"; {back}" if back else "")),))
        if fits(candidate := "\n".join([*short, told])):
            return candidate
    return None


def sample(matching: Sequence[bool], most: int) -> list[int]:
    """Indices, ascending, of at most `most` of n items: the first and the last, up to half of them from those that
    match, evenly, and the rest evenly over all.

    >>> sample([False] * 10, 4)
    [0, 3, 6, 9]
    """
    n = len(matching)
    if n <= most:
        return list(range(n))
    hits = [i for i, hit in enumerate(matching) if hit]
    chosen = {hits[j] for j in _evenly(len(hits), min(len(hits), most // 2))}
    for edge in (0, n - 1):
        if len(chosen) < most:
            chosen.add(edge)
    rest = [i for i in range(n) if i not in chosen]
    if chosen <= {0, n - 1} and most > 1:
        return _evenly(n, most)
    return sorted(chosen | {rest[j] for j in _evenly(len(rest), most - len(chosen))})


def _evenly(n: int, k: int) -> list[int]:
    """k of n indices from the first to the last."""
    if k <= 1:
        return [0] if k and n else []
    return [round(j * (n - 1) / (k - 1)) for j in range(k)]


def _cut(value: Any, level: Level, matches: Matches, depth: int = 0) -> Any:
    if isinstance(value, list):
        if depth >= level.depth and value:
            return [f"[{len(value)} items left out]"]
        kept = sample([matches(write(v)) for v in value], level.items) if len(value) > level.items else None
        items = value if kept is None else [value[i] for i in kept]
        short = [_cut(v, level, matches, depth + 1) for v in items]
        return short if kept is None else [*short, f"[{_shown(kept, len(value), 'items')}]"]
    if isinstance(value, tuple):
        if depth >= level.depth and value:
            return ((_free(value), f"{len(value)} keys"),)
        pairs = value[: level.keys]
        short_pairs = tuple((k, _cut(v, level, matches, depth + 1)) for k, v in pairs)
        left = len(value) - len(pairs)
        return short_pairs if not left else (*short_pairs, (_free(value), f"{left} of {len(value)} keys"))
    if isinstance(value, str) and not isinstance(value, _Number) and len(value) > level.chars:
        return middle_out(value, level.chars)
    return value


def _told(short: Any, value: Any, back: str) -> Any:
    """Says at the outermost level how the whole can be seen."""
    if not back:
        return short
    if isinstance(short, list):
        return [*short, f"[shortened; {back}]"]
    return (*short, (_free(value, "[shortened]"), back))


def _free(pairs: tuple[Any, ...], key: str = CUT_KEY) -> str:
    """A key that the object does not have itself."""
    taken = {k for k, _ in pairs}
    while key in taken:
        key += "_"
    return key


def _shown(kept: Sequence[int], n: int, what: str) -> str:
    """Which of n are there, counted from 0: runs as ranges."""
    runs: list[list[int]] = []
    for i in kept:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    where = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{len(kept)} of {n} {what} shown" + (f": {where}" if 0 < len(runs) <= 8 else "")
