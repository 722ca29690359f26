"""Shared memory of several agents as items: what each says of itself, and how much it matters to one agent now.

An item is a context passage or a turn of the conversation. A passage may say what it is in its first line, or as JSON:

    [type=decision author=planner round=2 roles=coder,reviewer stages=execute] Use SQLite.
    {"type": "fact", "round": 1, "roles": ["coder"], "text": "The port is 8080."}

Nothing of it is needed: what an item does not say counts for nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.errors import InvalidInput

MOST_JSON = 100_000
"""characters of an item that is read as JSON, at most"""

STAGE_TYPES: Mapping[str, frozenset[str]] = {
    "plan": frozenset({"decision", "plan"}),
    "execute": frozenset({"tool_trace", "fact"}),
    "review": frozenset({"decision", "entity", "fact"}),
}
"""Types that help at a stage, for items that name no stage."""

_KEYWORDS = {
    "planner": "plan goal step steps strategy task tasks subtask milestone deadline scope",
    "coder": "code function class bug test api error exception file module implement",
    "reviewer": "review check risk issue quality correct wrong missing verify accept",
    "searcher": "search source find found query page link reference document evidence",
    "summarizer": "summary conclusion result results finding answer overall final",
}
KEYWORDS: Mapping[str, frozenset[str]] = {role: frozenset(words.split()) for role, words in _KEYWORDS.items()}
"""Words that make an item matter to a role, for items that name no role; ours."""

_HEADER = re.compile(r"\s*\[((?:\s*[a-z_]+\s*=\s*[^\s\]=]+)+)\s*\]")
_FIELD = re.compile(r"([a-z_]+)\s*=\s*([^\s\]=]+)")
_KNOWN = ("type", "author", "round", "roles", "stages")


@dataclass(frozen=True, slots=True)
class Item:
    """One item of memory; `round` is None where it does not say."""

    text: str
    type: str = ""
    author: str = ""
    round: int | None = None
    roles: frozenset[str] = frozenset()
    stages: frozenset[str] = frozenset()


def read_item(text: str) -> Item:
    """An item from a passage, with what its first line or its JSON says of it. What cannot be read is only text.

    >>> read_item("[type=plan round=2 roles=coder,reviewer] Use SQLite.").roles == {"coder", "reviewer"}
    True
    """
    stripped = text.lstrip()
    if stripped.startswith("{") and len(text) <= MOST_JSON:
        try:
            data = json.loads(stripped)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict) and any(key in data for key in _KNOWN):
            return _item(text, data)
    header = _HEADER.match(text)
    if header is not None:
        fields = dict(_FIELD.findall(header[1]))
        if any(key in fields for key in _KNOWN):
            return _item(text, fields)
    return Item(text)


def _item(text: str, data: Mapping[str, Any]) -> Item:
    def names(key: str) -> frozenset[str]:
        value = data.get(key, ())
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else ()
        return frozenset(str(p).strip().lower() for p in parts if str(p).strip())

    said = str(data.get("round", ""))
    number = int(said) if re.fullmatch(r"\d{1,9}", said) else None
    type_, author = (str(data.get(k) or "").lower() for k in ("type", "author"))
    return Item(text, type_, author, number, names("roles"), names("stages"))


@dataclass(frozen=True, slots=True)
class Weights:
    """What each part of an item's importance counts for."""

    role: float = 0.6
    stage: float = 0.4
    recency: float = 0.3
    semantic: float = 1.0
    decision: float = 0.8
    plan: float = 0.4
    decay: float = 0.1
    """by which recency falls a round, as exp(-decay * rounds)"""


def ages(items: Sequence[Item]) -> list[int]:
    """Rounds since each item was written: by their own rounds, the newest at 0 and those that do not say as old as the
    oldest; where none says, by place, the last at 0.

    >>> ages([Item("a", round=3), Item("b"), Item("c", round=5)]), ages([Item("a"), Item("b")])
    ([2, 2, 0], [1, 0])
    """
    rounds = [i.round for i in items if i.round is not None]
    if not rounds:
        return [len(items) - 1 - i for i in range(len(items))]
    newest, oldest = max(rounds), min(rounds)
    return [newest - (oldest if i.round is None else i.round) for i in items]


def importance(item: Item, age: int, similarity: float, role: str, stage: str, weights: Weights) -> float:
    """How much an item matters to `role` at `stage`: the weighted sum of role, stage, recency and similarity, and more
    for a decision or a plan.

    Role: 1 where the item names it, and 0.1 for each of the role's keywords in it, at most 0.5. Stage: 1 where the
    item names it, else 0.5 where its type is of those that help there. Similarity below 0 counts for 0."""
    words = set(re.findall(r"\w+", item.text.lower()))
    hits = len(KEYWORDS.get(role, frozenset()) & words)
    relevance = (1.0 if role and role in item.roles else 0.0) + min(0.5, 0.1 * hits)
    fitting = 1.0 if stage and stage in item.stages else 0.5 if item.type in STAGE_TYPES.get(stage, ()) else 0.0
    boost = {"decision": weights.decision, "plan": weights.plan}.get(item.type, 0.0)
    recent = math.exp(-weights.decay * age)
    parts = weights.role * relevance + weights.stage * fitting + weights.recency * recent
    return parts + weights.semantic * max(0.0, similarity) + boost


def route(scores: Sequence[float], sizes: Sequence[int], most: int, by: str = "score") -> list[int]:
    """Indices, ascending, of items within `most` tokens.

    "score": by falling score (ties by the lower index); one that does not fit is passed over, and the next is tried.
    "density": the same by score a token, or the single best item where that is worth more: never less than half of the
    best choice there is, for scores of at least 0.

    >>> route([3.0, 2.0, 1.0], [5, 3, 2], 5), route([3.0, 2.0, 1.0], [5, 3, 2], 6, "density")
    ([0], [1, 2])
    """
    n = len(scores)
    worth = scores if by == "score" else [s / max(1, t) for s, t in zip(scores, sizes, strict=True)]
    kept: list[int] = []
    room = most
    for i in sorted(range(n), key=lambda i: (-worth[i], i)):
        if sizes[i] <= room:
            room -= sizes[i]
            kept.append(i)
    if by == "density":
        single = min((i for i in range(n) if sizes[i] <= most), key=lambda i: (-scores[i], i), default=None)
        if single is not None and scores[single] > sum(scores[i] for i in kept):
            kept = [single]
    return sorted(kept)


def shares(text: str, what: str) -> dict[str, int]:
    """Tokens by role from "planner=512, coder=1024". Raises InvalidInput, naming `what`.

    >>> shares("planner=512, coder=1024", "bonus")
    {'planner': 512, 'coder': 1024}
    """
    found: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"([\w.-]+)\s*=\s*(\d{1,8})", part)
        if match is None:
            raise InvalidInput(f"{what}: {part!r} is not allowed: role=tokens, separated by commas, is needed")
        found[match[1].lower()] = int(match[2])
    return found
