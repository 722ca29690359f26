"""The head of a run: what is run, on what and how, for reports and for whoever wants to run it again."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from thrifty.bench.key import digest
from thrifty.bench.task import Task
from thrifty.call import Sampling
from thrifty.engine import Engine
from thrifty.plan import Plan

FORMAT = 1
"""Version of what a line of results means."""

_PACKAGES = ("thrifty", "torch", "transformers", "numpy", "reasoning-gym")


def head(
    plans: Sequence[Plan],
    tasks: Sequence[Task],
    engines: Mapping[str, Engine],
    suite: str,
    seeds: Sequence[int],
    samples: int,
    sampling: Sampling,
    concurrency: int,
    command: str | None,
) -> dict[str, Any]:
    """JSON-ready facts of one run; `command` as the user typed it."""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "suite": suite,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "plans": [{"hash": plan.hash, **plan.to_dict()} for plan in plans],
        "engine": digest(dict(engines["answer"].identity())),
        "engines": {role: dict(engine.identity()) for role, engine in sorted(engines.items())},
        "tasks": len(tasks),
        "seeds": list(seeds),
        "samples": samples,
        "concurrency": concurrency,
        "versions": versions(),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
    }
    if how := changed_settings(sampling):
        facts["sampling"] = how
    if command:
        facts["command"] = command
    return facts


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, of those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            module = sys.modules.get(name)
            if (version := getattr(module, "__version__", None)) is not None:
                found[name] = str(version)
    return found


def changed_settings(sampling: Sampling) -> dict[str, Any]:
    """What differs from the default."""
    plain = Sampling()
    names = Sampling.__dataclass_fields__
    return {n: v for n in names if (v := getattr(sampling, n)) != getattr(plain, n)}


def model_of(heads: Iterable[Mapping[str, Any]], engine: str) -> str:
    """The answering model's name, with its dtype; the engine's digest where no head tells."""
    identity: Mapping[str, Any] = {}
    for head in heads:
        identity = head.get("engines", {}).get("answer", identity)
    return " ".join(str(identity[k]) for k in ("model", "dtype") if identity.get(k)) or engine
