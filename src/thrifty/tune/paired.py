"""Plans on one part of the examples: runs what is missing, and gives losses and costs beside the reference's.

Every plan that is asked for is run on all examples of the part, or it has no losses: a hole in the data would silently
become a hole in the guarantee.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thrifty.bench.head import changed_settings
from thrifty.bench.key import digest, identities, result_key
from thrifty.bench.run import run
from thrifty.bench.store import Result, Store
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Answer, Sampling
from thrifty.engine import Engine
from thrifty.errors import EngineError
from thrifty.plan import Plan
from thrifty.tune.losses import Losses, LossKind, Scored, losses_of
from thrifty.tune.shadow import comparable
from thrifty.tune.splits import group_of


@dataclass
class Part:
    """One part of the examples and how it is measured. `options` go to the bench's `run`."""

    name: str
    tasks: Sequence[Task]
    engines: Mapping[str, Engine]
    store: Store
    account: Account
    sampling: Sampling
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    async def run(self, plans: Sequence[Plan]) -> str | None:
        """Makes the missing results. Why the account stopped it, or None when all are there.

        Raises EngineError where results failed: none is left out of a test, so they have to be run again."""
        outcome = await run(
            plans,
            self.tasks,
            self.engines,
            self.store,
            suite=self.name,
            seeds=(self.seed,),
            sampling=self.sampling,
            account=self.account,
            keep_text=True,
            **self.options,
        )
        if outcome.failed and outcome.stopped is None:
            raise EngineError(
                f"{self.name}: {outcome.failed} of {outcome.total} results failed ({outcome.errors[0]}), and a test "
                "needs all: see to the engine and run the same command again"
            )
        return outcome.stopped

    def results(self, plan: Plan) -> list[Result]:
        """A plan's finished results on this part, in the order of the tasks."""
        roles = identities(plan, self.engines)
        how = {k: v for k, v in changed_settings(self.sampling).items() if k != "seed"}
        engines = digest([roles, how] if how else roles)
        keys = (result_key(plan.hash, engines, task.hash(), self.seed, 0) for task in self.tasks)
        found = (self.store.results.get(key) for key in keys)
        return [result for result in found if result is not None and result.score is not None]

    def scored(self, plan: Plan, only: frozenset[str] | None = None) -> list[Scored]:
        """Its results as a loss wants them; `only`: hashes of the tasks that count."""
        tasks = {task.hash(): task for task in self.tasks}
        return [
            Scored(r.task, group_of(tasks[r.task_hash]), float(r.score or 0.0), answer_of(r))
            for r in self.results(plan)
            if only is None or r.task_hash in only
        ]

    def losses(self, kind: LossKind, plan: Plan, reference: Plan) -> Losses:
        """Losses of a plan on this part, over the examples that it and (but for `error`) the reference have."""
        both = frozenset(r.task_hash for r in self.results(plan))
        if kind != "error":
            both &= {r.task_hash for r in self.results(reference)}
        return losses_of(kind, self.scored(plan, both), [] if kind == "error" else self.scored(reference, both))


def answer_of(result: Result) -> str | None:
    """The final answer of a result as a guard in production compares it; None where there is none."""
    if result.text is None:
        return None
    return comparable(Answer(result.text, parsed=result.final))
