"""Text made shorter: its head, its tail, and lines that match stay whole; each gap says how much is missing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

MATCH_SHARE = 0.3
"""of the room, for lines that match, where there are any"""
MARK_CHARS = 40
SHRINK = 0.85


def middle_out(text: str, most: int, head: float = 0.5, back: str = "") -> str:
    """At most `most` characters of a text, its two ends, and a mark between them; never cut inside a character with
    its accents, or a joined emoji.

    >>> middle_out("abcdefghij" * 10, 10)
    'abcde[90 characters left out]fghij'
    """
    if len(text) <= most:
        return text
    first = _boundary(text, int(most * head), -1)
    last = _boundary(text, len(text) - (most - int(most * head)), 1)
    told = f"[{last - first} characters left out{'; ' + back if back else ''}]"
    return text[:first] + told + text[last:]


def shorten(
    text: str, size: int, most: int, count: Callable[[str], int], matches: Callable[[str], bool], head: float, back: str
) -> str | None:
    """Lines from both ends, and those that match between them, within `most` of a text's `size` tokens; None where not
    even a mark fits. Lines too long to be kept whole lose their middle. `head`: share of the two ends for the first."""
    room = int(len(text) / max(1, size) * most)
    lines = split_lines(text)
    while room >= 1:
        candidate = middle_out(text, room, head, back) if len(lines) < 3 else _lines(lines, room, matches, head, back)
        if count(candidate) <= most:
            return candidate
        room = min(int(room * SHRINK), room - 1)
    told = f"[{len(text)} characters left out{'; ' + back if back else ''}]"
    return told if count(told) <= most else None


def split_lines(text: str) -> list[str]:
    """Lines with their ends, which are those of files (LF, CRLF, CR) only.

    >>> split_lines("a\\r\\nb\\n\\nc")
    ['a\\r\\n', 'b\\n', '\\n', 'c']
    """
    return re.findall(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+\Z", text)


def _lines(lines: Sequence[str], room: int, matches: Callable[[str], bool], head: float, back: str) -> str:
    longest = max(80, room // 4)
    short = [line if len(line) <= longest else middle_out(line, longest) for line in lines]
    n = len(lines)
    hits = [i for i, line in enumerate(lines) if matches(line)]
    room -= MARK_CHARS + len(back)
    ends = room * (1 - MATCH_SHARE) if hits else room
    kept: set[int] = set()
    used = 0
    for i in range(n):
        if used + len(short[i]) > ends * head:
            break
        kept.add(i)
        used += len(short[i])
    for i in range(n - 1, -1, -1):
        if i in kept or used + len(short[i]) > ends:
            break
        kept.add(i)
        used += len(short[i])
    for i in hits:  # the first matches: an error is followed by its consequences
        if i not in kept:
            if used + len(short[i]) + MARK_CHARS > room:
                break
            kept.add(i)
            used += len(short[i]) + MARK_CHARS
    out: list[str] = []
    gap = first = 0
    for i in range(n + 1):
        if i < n and i not in kept:
            gap += 1
            continue
        if gap:
            lines_ = "1 line" if gap == 1 else f"{gap} lines"
            out.append(f"[{lines_} left out{'; ' + back if back and not first else ''}]\n")
            gap, first = 0, 1
        if i < n:
            out.append(short[i])
    text = "".join(out)
    return text if lines[-1].endswith(("\n", "\r")) else text.removesuffix("\n")


def _boundary(text: str, at: int, step: int) -> int:
    """The nearest place from `at`, in the direction of `step`, that splits no character from what belongs to it."""
    at = min(max(at, 0), len(text))
    while 0 < at < len(text) and (_joins(text[at]) or text[at - 1] == "\u200d"):
        at += step
    return at


def _joins(character: str) -> bool:
    return (
        unicodedata.combining(character) != 0
        or character in "\u200d\ufe0e\ufe0f"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )
