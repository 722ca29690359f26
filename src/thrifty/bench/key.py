"""What a result is a result of: plan, engines, example, seed and sample, digested into one key.

Two runs share a result only when all of them agree. A plan's name is no part of its hash, and only the
engines of the roles that the plan uses count, so adding an embedder to a run does not make the unmodified
engine's results stale."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from thrifty.engine import Engine
from thrifty.errors import InvalidInput
from thrifty.plan import Plan


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a value's canonical JSON. Raises InvalidInput for what is
    not JSON.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"a key needs values that JSON can hold: {error}") from error
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def identities(plan: Plan, engines: Mapping[str, Engine]) -> dict[str, dict[str, Any]]:
    """Identity of every engine that the plan can use, by role. A plan with a router can use them all."""
    routed = any("route" in method.parts for method in plan.methods)
    roles = set(engines) if routed else set(plan.needs()) & set(engines)
    return {role: dict(engines[role].identity()) for role in sorted(roles | {"answer"})}


def result_key(plan_hash: str, engines: str, task_hash: str, seed: int, sample: int) -> str:
    """The key of one result. `engines` is the digest of `identities`."""
    return digest([plan_hash, engines, task_hash, seed, sample])


def call_seed(seed: int, sample: int) -> int:
    """The sampling seed of one sample: the run's own seed for the first, and unrelated ones after it."""
    return seed if sample == 0 else int(digest([seed, sample]), 16) % 2**31
