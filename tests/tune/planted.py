"""Synthetic examples and a scripted engine with a planted response: what a plan scores and spends is known exactly.

A call's system message says which words were asked for ("at most N words"); the script reads it, and answers right
with a chance that depends on it and on how hard the example is, in half of the words that were asked for, and one.
"""

from __future__ import annotations

import hashlib
import re

from thrifty import Call
from thrifty.bench.task import Task
from thrifty.engines.scripted import ScriptedEngine


def tasks(n: int, groups: int | None = None) -> list[Task]:
    return [
        Task(
            id=f"t{i}",
            messages=({"role": "user", "content": f"Item {i}: what is {i} plus one?"},),
            gold=str(i + 1),
            scorer="numeric",
            max_tokens=200,
            group=None if groups is None else f"g{i % groups}",
        )
        for i in range(n)
    ]


def uniform(*parts: object) -> float:
    """A number in [0, 1) that only depends on its parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6]) / 2**48


def engine(need: float = 40.0) -> ScriptedEngine:
    """Right when the allowed words reach what the example needs, which is even on [0, need)."""

    def say(call: Call, draw: object) -> str:
        text = "\n".join(str(m["content"]) for m in call.messages)
        item = int(re.search(r"Item (\d+)", text)[1])  # type: ignore[index]
        asked = re.search(r"(\d+) words?\b", text)
        words = int(asked[1]) if asked else 60
        right = words >= need * uniform("need", item)
        return "so " * (words // 2) + str(item + 1 if right else 999_999)

    return ScriptedEngine(say)
