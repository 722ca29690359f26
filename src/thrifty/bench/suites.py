"""Named suites: their plans, their tasks, their size and their axis.

Plans are TOML files beside this module, `plans/SUITE/NN-name.toml`, read in the order of their names; the
first is the reference. A suite is data, so that `thrifty frontier retrieval` and a library call mean the same.

A suite may stand on another one's tasks and plans (`base`): `thinker` has one setting of every method,
`thinker-catalogue` adds further settings, `thinker-pairs` stacks. Their results are kept under the base's name, so
that what one of them measured serves the others in the same folder, and the reference is measured once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from thrifty.bench.store import Result
from thrifty.bench.task import Task
from thrifty.bench.task import suite as make_tasks
from thrifty.call import Sampling
from thrifty.errors import InvalidInput, nearest
from thrifty.plan import Plan

Count = Callable[[str], int]


@dataclass(frozen=True)
class Suite:
    """What `thrifty frontier` measures under one name."""

    name: str
    about: str
    axis: str
    """the axis where none is named"""
    tasks: str
    """the built-in tasks (see `task.suite`)"""
    n: int
    """examples of a run of a few minutes on two cores"""
    quick: int
    """examples of a run under a minute: enough to see that all works, too few to show much"""
    sampling: Sampling = Sampling()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """of the tasks"""
    max_tokens: int | None = None
    """output tokens that every task allows, where its own limit would leave no room for a draft"""
    concurrency: int = 8
    """examples in flight where none is said"""
    base: str = ""
    """the suite whose plans stand among these, and under whose name the results are kept"""
    stacks: bool = False
    """these plans are stacks, and of the base's plans only the reference and their parts are measured"""

    @property
    def kept_as(self) -> str:
        """The suite that the results name."""
        return self.base or self.name

    def plans(self) -> list[Plan]:
        """The plans, the reference first."""
        own = _plans(self.name)
        others = _plans(self.base) if self.base else {}
        if self.stacks:
            parts = [(method,) for plan in own.values() for method in plan.methods]
            others = {file: plan for file, plan in others.items() if not plan.methods or plan.methods in parts}
        return [plan for _, plan in sorted({**others, **own}.items())]

    def make(self, n: int, seed: int = 0, *, count: Count | None = None) -> list[Task]:
        """`n` tasks; `count` measures a text in tokens."""
        tasks = make_tasks(self.tasks, n, seed, count=count, settings=self.settings)
        if self.max_tokens is None:
            return tasks
        return [replace(task, max_tokens=self.max_tokens) for task in tasks]


_THINKER: Any = {
    # thinking, answers and probes alike; `reasoning` would leave out what a probe says after it closed the thinking
    "axis": "output",
    "tasks": "thinker",
    "n": 400,
    "quick": 100,
    # the model was trained to err, to doubt and to repair at temperature 1; greedily it does hardly any of it
    "sampling": Sampling(temperature=1.0),
    # so small a model is decoded fastest in large batches
    "concurrency": 32,
}

SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="retrieval",
            about="needles with known answers in contexts of 500 to 4,000 tokens",
            axis="usd",
            tasks="needles",
            n=24,
            quick=6,
            # One line is the answer: without a stop the model repeats itself, and a ramble may name the gold by chance.
            sampling=Sampling(stop=("\n",)),
            max_tokens=64,
        ),
        Suite(
            name="arithmetic",
            about="short sums that a model of 135M parameters can sometimes do, at most 96 new tokens",
            axis="usd",
            tasks="arithmetic",
            n=14,
            quick=3,
        ),
        Suite(
            name="easy",
            about="trivially easy questions, in the manner of DUMB500: nearly all that is spent on them is waste",
            axis="output",
            tasks="easy",
            n=100,
            quick=8,
            max_tokens=96,
        ),
        Suite(
            name="thinker",
            about="generated problems on which the lab's thinker gains by thinking, every method once; --model thinker",
            **_THINKER,
        ),
        Suite(
            name="thinker-catalogue",
            about="the same with three settings of every method; hours, over as many sittings as it takes",
            base="thinker",
            **_THINKER,
        ),
        Suite(
            name="thinker-pairs",
            about="the same problems: methods of two families alone and stacked",
            base="thinker",
            stacks=True,
            **_THINKER,
        ),
    )
}

GROUPS: Mapping[str, tuple[str, ...]] = {"demo": ("retrieval", "arithmetic")}
"""Names that stand for several suites."""


AXIS = "tokens"
"""Where neither the user nor the suite names one."""


def axis_of(name: str, results: Iterable[Result]) -> str:
    """The axis of a suite when none is named: its own, or tokens where that is `usd` and no result has a
    price."""
    own = SUITES[name].axis if name in SUITES else AXIS
    return AXIS if own == "usd" and not any(r.spend.usd for r in results) else own


def names() -> tuple[str, ...]:
    """What `find` knows."""
    return (*SUITES, *GROUPS)


def _plans(suite: str) -> dict[str, Plan]:
    """A suite's own plans by file name."""
    folder = files("thrifty.bench") / "plans" / suite
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name: Plan.from_toml(f.read_text(encoding="utf-8"), f"{suite}/{f.name}") for f in found}


def find(name: str) -> list[Suite]:
    """The suites that a name stands for. Raises InvalidInput with the nearest name."""
    if name in GROUPS:
        return [SUITES[part] for part in GROUPS[name]]
    if name not in SUITES:
        raise InvalidInput(nearest(name, names(), "suite"))
    return [SUITES[name]]
