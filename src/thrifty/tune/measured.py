"""What plans scored and spent on the search's examples: runs what is missing, and gives it as tables by group.

The bench runs plans on examples, replays generations that plans share, keeps results on disk, and stops by itself when
the account refuses something. Here those results become tables [plans, groups]: a group's entry is the mean over its
examples and samples, and is there only when all of them are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.bench.key import digest
from thrifty.bench.row import check_axis, value
from thrifty.bench.run import run
from thrifty.bench.store import Result, Store
from thrifty.bench.task import Task
from thrifty.engine import Engine
from thrifty.errors import InvalidInput
from thrifty.plan import Plan
from thrifty.spend import Spend

Floats = NDArray[np.float64]


@dataclass
class Measured:
    """The results of one search. `options` go to the bench's `run`: account, sampling, concurrency, score, ..."""

    tasks: Sequence[Task]
    engines: Mapping[str, Engine]
    store: Store
    axis: str
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = field(init=False)
    """in an order shuffled by the seed"""
    stopped: str | None = field(default=None, init=False)
    """why nothing more is run"""
    incurred: Spend = field(default=Spend(), init=False)
    """paid now, results that were there already not counted"""
    shared: int = field(default=0, init=False)
    """generations that were replayed"""
    failed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_axis(self.axis)
        if not self.tasks:
            raise InvalidInput("no examples to search on: give at least one")
        self._hashes = [task.hash() for task in self.tasks]
        self._members: dict[str, list[int]] = {}
        for i, task in enumerate(self.tasks):
            self._members.setdefault(_group(task, self._hashes[i]), []).append(i)
        names = sorted(self._members)
        order = np.random.default_rng(self.seed).permutation(len(names))
        self.groups = tuple(names[i] for i in order)
        self._found: dict[tuple[str, str], list[Result]] = {}
        self._keys: set[str] = set()

    @property
    def data(self) -> str:
        """Digest of the examples, in whatever order they were given."""
        return digest(sorted(self._hashes))

    async def run(self, plans: Sequence[Plan], groups: Sequence[str]) -> bool:
        """Makes the missing results of these plans on these groups. False when the account stopped it, now or before.

        Raises what the bench raises: an engine that failed many times in a row, a plan that cannot be built."""
        if self.stopped is not None or not plans or not groups:
            return self.stopped is None
        tasks = [self.tasks[i] for group in groups for i in self._members[group]]
        outcome = await run(plans, tasks, self.engines, self.store, seeds=(self.seed,), **self.options)
        self.stopped, self.failed = outcome.stopped, self.failed + outcome.failed
        self.incurred, self.shared = self.incurred + outcome.incurred, self.shared + outcome.shared
        for key in sorted(outcome.keys - self._keys):
            result = self.store.results.get(key)
            if result is not None and result.score is not None:
                self._keys.add(key)
                self._found.setdefault((result.plan_hash, result.task_hash), []).append(result)
        if self.axis == "usd" and self._found and not any(r.spend.usd for rs in self._found.values() for r in rs):
            raise InvalidInput("no result has a price: name another axis, such as tokens, or give a price table")
        return self.stopped is None

    def tables(self, plans: Sequence[Plan], groups: Sequence[str] | None = None) -> tuple[Floats, Floats]:
        """Scores and costs on the axis, [plans, groups], NaN where a group is not whole."""
        named = self.groups if groups is None else groups
        scores, costs = (np.full((len(plans), len(named)), math.nan) for _ in range(2))
        samples = int(self.options.get("samples", 1))
        for i, plan in enumerate(plans):
            for g, group in enumerate(named):
                results = [self._found.get((plan.hash, self._hashes[t]), ()) for t in self._members[group]]
                if all(len(rs) >= samples for rs in results):
                    flat = [r for rs in results for r in rs]
                    scores[i, g] = math.fsum(float(r.score or 0.0) for r in flat) / len(flat)
                    costs[i, g] = math.fsum(value(r, self.axis) for r in flat) / len(flat)
        return scores, costs


def _group(task: Task, task_hash: str) -> str:
    """What is drawn, counted and tested as one: the group, or the example itself."""
    return f"example {task_hash}" if task.group is None else f"group {task.group}"
