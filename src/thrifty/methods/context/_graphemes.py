"""Where a text may be cut without taking a character from what belongs to it.

Stricter than Unicode's extended grapheme clusters (UAX 29), never laxer: what is no cut there is none here."""

from __future__ import annotations

import unicodedata

_JOINER = "\u200d"
_PREPENDED = frozenset({0x0600, 0x0601, 0x0602, 0x0603, 0x0604, 0x0605, 0x06DD, 0x070F, 0x0890, 0x0891, 0x08E2, 0x0D4E})
"""Signs of Arabic, Syriac and Malayalam that belong to the character behind them; rarer scripts' are asked by name."""


def cuts_at(text: str, at: int) -> bool:
    """Whether nothing is torn between text[at - 1] and text[at]: not an accent from its letter, a joined emoji, a
    flag, a Hangul syllable, a conjunct, or a line feed from its carriage return.

    >>> [cuts_at("e\\u0301a", i) for i in range(4)]
    [True, False, True, True]
    """
    if not 0 < at < len(text):
        return True
    before, behind = text[at - 1], text[at]
    if before < "\x7f" and behind < "\x7f":
        return not (before == "\r" and behind == "\n")
    if behind == _JOINER or unicodedata.category(behind) in ("Mn", "Me", "Mc") or _modifies(behind):
        return before in "\r\n"
    if before == _JOINER or unicodedata.combining(before) == 9 or _prepended(before):  # 9: a virama joins consonants
        return False
    return not (_flag(before) and _flag(behind)) and not (_hangul(before) and _hangul(behind))


def _modifies(c: str) -> bool:
    """Variation selectors, skin tones, tags, half-width voicing marks, zero-width non-joiners."""
    return (
        "\U0001f3fb" <= c <= "\U0001f3ff" or "\U000e0000" <= c <= "\U000e0fff" or c in "\u200c\uff9e\uff9f\u0e33\u0eb3"
    )


def _prepended(c: str) -> bool:
    return ord(c) in _PREPENDED or (ord(c) > 0x11000 and unicodedata.category(c) in ("Lo", "Cf") and _signs(c))


def _signs(c: str) -> bool:
    name = unicodedata.name(c, "")
    return any(word in name for word in ("REPHA", "SIGN", "PREFIXED", "NUMBER SIGN", "INITIAL RA", "CLUSTER-INITIAL"))


def _flag(c: str) -> bool:
    return "\U0001f1e6" <= c <= "\U0001f1ff"


def _hangul(c: str) -> bool:
    return "\u1100" <= c <= "\u11ff" or "\ua960" <= c <= "\ua97f" or "\uac00" <= c <= "\ud7ff"
