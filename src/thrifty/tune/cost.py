"""What a search would cost at most, before anything is spent (`--dry-run`).

Every plan is run on stand-ins of the engines: they count prompts as the real engine does, write as many tokens as the
call allows, agree with nobody, and cost nothing. So the prompts that methods write, their own calls and their samples
are counted by running the methods themselves. What a stand-in cannot know makes the figure larger, never smaller:

- answers are as long as they may be, and no vote or race stops early;
- what an embedder would let a method leave out is left in, beside what embedding costs.

`bounded` is False, and says why, where a plan's figure is no upper bound after all: a method whose calls depend on
what the model answers, a call without `max_tokens` (output is then taken as `assumed`), an example that could not be
counted, or examples drawn from many. Prompts are counted by the engine's own `count`, so the figures are as exact as it
is. Policies (white-box) are not run: they act within `max_tokens`. Judges are not counted.

`expected` is told only where there is something to expect from: earlier results of the same plan, or of the first one
(the reference), whose share of the allowed output is then assumed of all.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thrifty.bench.store import Result
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Sampling
from thrifty.engine import Engine
from thrifty.errors import BudgetExceeded, InvalidInput, ThriftyError
from thrifty.plan import Plan
from thrifty.spend import Spend, total_spend
from thrifty.tune.racing import cuts
from thrifty.tune.standin import Counted, Memo, stand_ins

ASSUMED_OUTPUT = 512
"""Output tokens of a call that states no limit."""

MOST_RUNS = 5_000
"""Plans times examples that are counted one by one; above it examples are drawn."""


@dataclass(frozen=True)
class PlanCost:
    """What one plan costs on all examples. `upper` as if it ran alone; `expected` None where nothing is known."""

    plan: Plan
    upper: Spend
    expected: Spend | None
    bounded: bool
    why: str = ""
    """why `upper` is no upper bound"""


@dataclass(frozen=True)
class Cost:
    """What a search costs before generations are shared and plans are dropped: all plans on all examples, and all plans
    on the first round."""

    plans: tuple[PlanCost, ...]
    examples: int
    groups: int
    first_groups: int

    @property
    def upper(self) -> Spend:
        """All plans on all examples."""
        return total_spend(p.upper for p in self.plans)

    @property
    def first_round(self) -> Spend:
        """About what the first round costs at most: the share of groups that it has."""
        return scaled(self.upper, self.first_groups / self.groups)

    @property
    def expected(self) -> Spend | None:
        """All plans on all examples, None where a plan's is not known."""
        known = [p.expected for p in self.plans if p.expected is not None]
        return total_spend(known) if len(known) == len(self.plans) else None

    @property
    def bounded(self) -> bool:
        """Whether `upper` is an upper bound."""
        return all(p.bounded for p in self.plans)

    def line(self) -> str:
        """In words."""
        why = next((p.why for p in self.plans if p.why), "")
        word = "at most" if self.bounded else "about"
        parts = [
            f"{len(self.plans):,} plans on {self.examples:,} examples: {word} {self.upper.tokens:,} tokens "
            f"({self.upper.input:,} in, {self.upper.output:,} out, {self.upper.calls:,} calls)"
        ]
        if self.upper.usd:
            parts.append(f"{word} ${self.upper.usd / 1e9:,.4f}")
        parts.append(f"first round {word} {self.first_round.tokens:,} tokens")
        if self.expected is not None:
            parts.append(f"expected {self.expected.tokens:,} tokens before plans are dropped or share work")
        return "; ".join(parts) + (f" (no upper bound: {why})" if why else "")


async def estimate(
    plans: Sequence[Plan],
    tasks: Sequence[Task],
    engines: Mapping[str, Engine] | Engine,
    *,
    sampling: Sampling | None = None,
    samples: int = 1,
    first: int = 8,
    growth: float = 2.0,
    assumed: int = ASSUMED_OUTPUT,
    known: Sequence[Result] = (),
    seed: int = 0,
    most_runs: int = MOST_RUNS,
) -> Cost:
    """What the plans cost on the examples, the reference among the plans if it is to be counted. Nothing is spent and
    no server asked, unless an engine's own `count` asks one. `known`: earlier results, for `expected`.

    Raises InvalidInput for no plans or no examples, PlanError for a plan that the engines cannot run."""
    if not plans or not tasks:
        raise InvalidInput(f"{len(plans)} plans, {len(tasks)} examples: at least 1 of each is needed")
    given = dict(engines) if isinstance(engines, Mapping) else {"answer": engines}
    for plan in plans:
        plan.build(given)
    few = max(1, min(len(tasks), most_runs // len(plans)))
    drawn = list(tasks) if few == len(tasks) else random.Random(f"cost/{seed}").sample(list(tasks), few)
    groups = len({t.hash() if t.group is None else f"group {t.group}" for t in tasks})
    asked = sampling or Sampling()
    scale = samples * len(tasks) / len(drawn)
    why = "" if few == len(tasks) else f"{few} of {len(tasks)} examples were counted, the others taken as alike"
    rows, memo = [], Memo()
    for plan in plans:
        total, doubts = await _plan(plan, drawn, given, asked, assumed, memo)
        doubt = "; ".join(x for x in (doubts, why) if x)
        rows.append(PlanCost(plan, scaled(total, scale), None, not doubt, doubt))
    rows = _expected(rows, drawn, known, len(tasks) * samples)
    return Cost(tuple(rows), len(tasks), groups, cuts(groups, first, growth)[0])


def scaled(spend: Spend, factor: float) -> Spend:
    """A Spend times a factor, rounded up."""
    values = {f.name: -int(-getattr(spend, f.name) * factor // 1) for f in dataclasses.fields(Spend)}
    return Spend(**values)


# -- one plan ------------------------------------------------------------------------------------------------


async def _plan(
    plan: Plan, tasks: Sequence[Task], engines: Mapping[str, Engine], sampling: Sampling, assumed: int, memo: Memo
) -> tuple[Spend, str]:
    """Its Spend on these examples, and why that is no upper bound."""
    # A method that asks another engine what to leave out might leave out nothing.
    choosers = [m for m in plan.methods if m.roles and m.kind == "rewrite"]
    whole = dataclasses.replace(plan, methods=tuple(m for m in plan.methods if m not in choosers))
    doubts = [
        f"what {m.name} asks depends on the answers"
        for m in plan.methods
        if m.kind == "whole" or m.family in ("route", "agent") or (m.kind == "search" and "samples" not in m.knobs())
    ]
    total = Spend()
    for task in tasks:
        try:
            counted = await _run(whole, task, engines, sampling, assumed, memo)
            total = total + total_spend(counted.by_role.values())
            doubts += [f"what {name} asks depends on the answers" for name in sorted(counted.asides)]
            if counted.unlimited:
                doubts.append(f"{assumed} output tokens were assumed of calls without max_tokens")
            if choosers:
                other = await _run(plan, task, engines, sampling, assumed, memo)
                total = total + total_spend(s for role, s in other.by_role.items() if role != "answer")
        except BudgetExceeded:
            continue  # the plan's own budget refuses it: nothing is spent
        except ThriftyError as error:
            doubts.append(f"{plan.name} could not be counted: {' '.join(str(error).split())[:160]}")
    return total, "; ".join(dict.fromkeys(doubts))


async def _run(
    plan: Plan, task: Task, engines: Mapping[str, Engine], sampling: Sampling, assumed: int, memo: Memo
) -> Counted:
    counted = Counted()
    needs = plan.needs()["answer"]
    pipeline = plan.build(stand_ins(engines, counted, assumed, memo, branches="branch" in needs))
    if task.max_tokens is not None:
        sampling = dataclasses.replace(sampling, max_tokens=task.max_tokens)
    await pipeline.ask(
        task.messages,
        Account("cost"),
        tools=task.tools,
        context=task.context or None,
        prefix=task.prefix,
        sampling=dataclasses.replace(sampling, seed=0),
    )
    return counted


def _expected(rows: Sequence[PlanCost], tasks: Sequence[Task], known: Sequence[Result], runs: int) -> list[PlanCost]:
    """Fills in `expected`: a plan's own earlier results, else the output share that the first plan's had."""
    hashes = {task.hash() for task in tasks}
    mine: dict[str, list[Result]] = {}
    for result in known:
        if result.score is not None and result.task_hash in hashes:
            mine.setdefault(result.plan_hash, []).append(result)
    base = mine.get(rows[0].plan.hash, [])
    written = sum(r.spend.output for r in base)
    allowed = rows[0].upper.output * len(base) / runs
    share = min(1.0, written / allowed) if allowed else None
    found = []
    for row in rows:
        own = mine.get(row.plan.hash, [])
        expected = None
        if own:
            expected = scaled(total_spend(r.spend for r in own), runs / len(own))
        elif share is not None:
            # Priced alike: what is not written is not paid, and its price is the output's share of the bill.
            output = round(row.upper.output * share)
            priced = row.upper.usd and rows[0].upper.usd
            usd = round(row.upper.usd * _paid(rows[0], base, runs)) if priced else 0
            expected = dataclasses.replace(row.upper, output=output, reasoning=0, usd=usd)
        found.append(dataclasses.replace(row, expected=expected))
    return found


def _paid(row: PlanCost, results: Sequence[Result], runs: int) -> float:
    """Which share of its upper bill a plan really paid."""
    return min(1.0, sum(r.spend.usd for r in results) / (row.upper.usd * len(results) / runs))
