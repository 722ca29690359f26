"""A frontier: plans by mean score and one named axis, with intervals, from stored results alone.

The first plan is the reference, normally the unmodified engine. Every other plan is compared with it on the
examples that both have. Dominance and savings hold for the named axis only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.bench import stats
from thrifty.bench.head import model_of
from thrifty.bench.row import LEVEL, POWER, Row, check_axis, example_of, groups_of, row_of, value
from thrifty.bench.run import Outcome, run
from thrifty.bench.stats import Interaction, Interval
from thrifty.bench.store import Contents, Result, Store, read
from thrifty.bench.task import Task
from thrifty.engine import Engine
from thrifty.errors import InvalidInput, nearest
from thrifty.plan import Plan


@dataclass(frozen=True, slots=True)
class Stack:
    """What plans A and B do together beyond what each does alone, on the score and on the axis."""

    a: str
    b: str
    both: str
    score: Interaction
    axis: Interaction


@dataclass(frozen=True)
class Frontier:
    """One suite on one answering engine."""

    suite: str
    model: str
    engine: str
    axis: str
    rows: tuple[Row, ...]
    """in the order of the run; the first is the reference"""
    stacks: tuple[Stack, ...] = ()
    area: float | None = None
    """under the undominated plans, up to the reference's axis (see `stats.frontier_area`)"""
    heads: tuple[Mapping[str, Any], ...] = ()
    """what was run"""
    results: Mapping[str, tuple[Result, ...]] = field(default_factory=dict)
    """by plan name"""

    @property
    def reference(self) -> Row:
        """The plan that all others are compared with."""
        return self.rows[0]

    @property
    def smallest(self) -> tuple[float, float] | None:
        """Range over the plans of the smallest difference that this n could have shown."""
        found = [r.smallest for r in self.rows if r.smallest is not None]
        return (min(found), max(found)) if found else None

    def closing_line(self) -> str:
        """What this run could not have shown."""
        n = self.reference.n
        if self.smallest is None:
            return f"n = {n}: one plan alone, nothing to compare."
        low, high = self.smallest
        if low > 1:
            return f"n = {n}: too few examples to show any difference of scores."
        most = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}, by plan"
        if high > 1:
            most = f"{low:.3f} at best"
        return (
            f"n = {n}: the smallest difference of scores that this run could have shown is {most} "
            f"({POWER:.0%} power, two-sided {1 - LEVEL:.0%})."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the results."""
        return {
            "suite": self.suite,
            "model": self.model,
            "axis": self.axis,
            "area": self.area,
            "reference": self.reference.plan,
            "smallest_difference": None if self.smallest is None else _finite(self.smallest[1]),
            "rows": [_row_dict(row) for row in self.rows],
            "interactions": [
                {
                    "a": s.a,
                    "b": s.b,
                    "both": s.both,
                    "score": _interval(s.score.additive),
                    "axis": _interval(s.axis.additive),
                    "axis_log_ratio": _interval(s.axis.log_ratio),
                }
                for s in self.stacks
            ],
        }


async def measure(
    plans: Sequence[Plan],
    tasks: Sequence[Task],
    engines: Mapping[str, Engine] | Engine,
    axis: str,
    store: Store,
    *,
    suite: str = "tasks",
    **options: Any,
) -> tuple[Frontier, Outcome]:
    """Runs what is missing (`options` go to `run`) and gives the frontier of the suite on this answering
    engine.

    Raises what `run` raises, and InvalidInput for an unknown axis before anything runs.
    """
    check_axis(axis)
    outcome = await run(plans, tasks, engines, store, suite=suite, **options)
    return frontier_of(store, outcome, axis), outcome


def frontier_of(store: Store, outcome: Outcome, axis: str) -> Frontier:
    """The frontier of one run: its own plans and examples, whatever else the store holds.

    Raises InvalidInput when its reference has no finished result."""
    results = tuple(r for r in store.results.values() if r.key in outcome.keys)
    if not any(r.score is not None for r in results):
        why = outcome.stopped or "; ".join(outcome.errors) or "nothing was run"
        raise InvalidInput(f"{outcome.suite}: no result was finished: {why}")
    contents = Contents(results, tuple(store.heads))
    (found,) = analyse(contents, axis, suite=outcome.suite, plans=outcome.plans)
    return found


def priced(results: Iterable[Result]) -> bool:
    """Whether any result has a price, so that `usd` can be an axis."""
    return any(r.spend.usd for r in results)


def load(path: str | Path, axis: str, suite: str | None = None) -> list[Frontier]:
    """The frontiers in a results file, no engine needed."""
    return analyse(read(path), axis, suite=suite)


def analyse(
    contents: Contents,
    axis: str,
    *,
    suite: str | None = None,
    plans: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Frontier]:
    """One frontier for each suite and answering engine, in order of appearance. `plans`: hashes of those to
    show, the reference first; None shows all, as their runs named them. `seed` is the bootstrap's.

    Raises InvalidInput for an unknown axis or suite, or when there is no finished result, of the reference
    above all."""
    check_axis(axis)
    names = list(dict.fromkeys(r.suite for r in contents.results))
    if suite is not None:
        if suite not in names:
            raise InvalidInput(nearest(suite, names, "suite in these results"))
        names = [suite]
    frontiers = []
    for name in names:
        of_suite = [r for r in contents.results if r.suite == name]
        for engine in dict.fromkeys(r.engine for r in of_suite):
            heads = tuple(h for h in contents.heads if h.get("suite") == name and h.get("engine", engine) == engine)
            some = [r for r in of_suite if r.engine == engine]
            frontier = _frontier(name, engine, some, heads, plans, axis, seed)
            if frontier is not None:
                frontiers.append(frontier)
    if not frontiers:
        raise InvalidInput("there is no finished result to show")
    return frontiers


# -- details -------------------------------------------------------------------------------------------------


def _frontier(
    suite: str,
    engine: str,
    results: Sequence[Result],
    heads: Sequence[Mapping[str, Any]],
    plans: Sequence[str] | None,
    axis: str,
    seed: int,
) -> Frontier | None:
    order = _plans_in_order(results, heads) if plans is None else list(plans)
    # By example, so that the same results give the same intervals in whatever order they were finished.
    ordered = sorted((r for r in results if r.score is not None), key=example_of)
    finished = {h: [r for r in ordered if r.plan_hash == h] for h in order}
    if not ordered:
        return None
    if not finished[order[0]]:
        raise InvalidInput(f"{suite}: the reference has no finished result to compare with: run it again")
    order = [h for h in order if finished[h]]
    base = {example_of(r): r for r in finished[order[0]]}
    if axis == "usd" and not priced(ordered):
        raise InvalidInput("no result has a price: name another axis, such as tokens, or run with a price table")
    rows = []
    for plan_hash in order:
        failed = sum(r.plan_hash == plan_hash and r.score is None for r in results)
        rng = np.random.default_rng(seed)
        rows.append(row_of(finished[plan_hash], base if plan_hash != order[0] else None, axis, failed, rng))
    scores, costs = [r.score.value for r in rows], [r.axis.value for r in rows]
    best = set(stats.frontier(scores, costs))
    rows = [replace(row, undominated=i in best) for i, row in enumerate(rows)]
    area = stats.frontier_area(scores, costs, costs[0]) if costs[0] > 0 else None
    return Frontier(
        suite=suite,
        model=model_of(heads, engine),
        engine=engine,
        axis=axis,
        rows=tuple(rows),
        stacks=_stacks(order, finished, heads, axis, seed),
        area=area,
        heads=tuple(heads),
        results={finished[h][0].plan: tuple(finished[h]) for h in order},
    )


def _plans_in_order(results: Sequence[Result], heads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Plan hashes as the runs named them, then others; of plans that share a name only the last stays."""
    last: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for head in heads:
        for plan in head.get("plans", ()):
            hashes.setdefault(plan["hash"], plan["name"])
            last[plan["name"]] = plan["hash"]
    for result in results:
        if result.plan_hash not in hashes:
            hashes[result.plan_hash] = result.plan
            last[result.plan] = result.plan_hash
    return [h for h, name in hashes.items() if last[name] == h]


def _stacks(
    order: Sequence[str],
    finished: Mapping[str, Sequence[Result]],
    heads: Sequence[Mapping[str, Any]],
    axis: str,
    seed: int,
) -> tuple[Stack, ...]:
    """Plans whose stack is that of two other plans together; the reference must be the engine alone."""
    described = {p["hash"]: p for head in heads for p in head.get("plans", ())}

    def stack(plan_hash: str) -> list[str]:
        if plan_hash in described:
            return sorted(repr(sorted(m.items())) for m in described[plan_hash].get("methods", ()))
        return sorted(finished[plan_hash][0].methods)

    parts = {h: stack(h) for h in order}
    if parts[order[0]]:
        return ()
    found = []
    single = [h for h in order[1:] if parts[h]]
    for both in single:
        for i, a in enumerate(single):
            for b in single[i + 1 :]:
                if both not in (a, b) and sorted(parts[a] + parts[b]) == parts[both]:
                    made = _stack(order[0], a, b, both, finished, axis, seed)
                    if made is not None:
                        found.append(made)
    return tuple(found)


def _stack(
    none: str, a: str, b: str, both: str, finished: Mapping[str, Sequence[Result]], axis: str, seed: int
) -> Stack | None:
    tables = [{example_of(r): r for r in finished[h]} for h in (none, a, b, both)]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if len(shared) < 2:
        return None
    columns = [[table[key] for key in shared] for table in tables]
    groups = groups_of(columns[0])
    points = [[float(r.score or 0.0) for r in column] for column in columns]
    costs = [[value(r, axis) for r in column] for column in columns]
    rng = np.random.default_rng(seed)
    names = [finished[h][0].plan for h in (a, b, both)]
    score = stats.interaction(points[0], points[1], points[2], points[3], rng, groups=groups)
    spent = stats.interaction(costs[0], costs[1], costs[2], costs[3], rng, groups=groups)
    return Stack(names[0], names[1], names[2], score, spent)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {"value": _finite(interval.value), "low": _finite(interval.low), "high": _finite(interval.high)}


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        "plan": row.plan,
        "hash": row.hash,
        "methods": list(row.methods),
        "n": row.n,
        "score": _interval(row.score),
        "input": row.input,
        "other_input": row.other_input,
        "cached": row.cached,
        "output": row.output,
        "axis": _interval(row.axis),
        "saving": _interval(row.saving),
        "difference": _interval(row.difference),
        "mcnemar_mid_p": None if row.mcnemar is None else row.mcnemar.mid_p,
        "paired": row.paired,
        "smallest_difference": None if row.smallest is None else _finite(row.smallest),
        "fired": {f.method: f.share for f in row.fired},
        "e3": row.e3,
        "undominated": row.undominated,
        "refused": row.refused,
        "failed": row.failed,
        "means": dict(row.means),
    }
