"""What the built-in kinds of engine can provide: for plan checks without an engine, and for error messages."""

from __future__ import annotations

from collections.abc import Mapping

from thrifty.engine import CAPABILITIES

_TEXT = frozenset({"text", "sampling", "logprobs", "embed", "continue"})

KNOWN: Mapping[str, frozenset[str]] = {
    "scripted": _TEXT | {"branch", "score"},
    "openai": _TEXT,
    "local": CAPABILITIES - {"gradients"},
}
