"""Searches a space for plans that score much and spend little, within an account of its own.

    found = await search(space, tasks, engines, store, Settings(axis="usd"), account=Account("search", Budget(...)))

Candidates come from the strategy (all plans of the space, one factor at a time, or proposals), and race: after each
round, on more and more of the same shuffled groups of examples, what is shown to be dominated is dropped (see
`racing`), the reference never. What is left at the end is ranked on the groups that all of it has seen.

Invariants: every result goes through the bench, so it is on disk at once, a cut search goes on where it stopped, and
plans that run together share generations; the account is never passed, and whatever it stopped, the best so far comes
back; the same settings and results give the same order and the same `frozen` hash. Nothing here is a guarantee: the
examples have been looked at, and those of a certificate are others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from thrifty.bench.head import changed_settings
from thrifty.bench.key import digest, identities
from thrifty.bench.run import GREEDY
from thrifty.bench.stats import frontier
from thrifty.bench.store import Store
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Sampling
from thrifty.engine import Engine
from thrifty.errors import InvalidInput, PlanError
from thrifty.plan import Plan
from thrifty.tune.adaptive import Adaptive, Estimate
from thrifty.tune.factorial import Choice, Value, one_at_a_time
from thrifty.tune.found import Candidate, Found, Settings, Strategy, search_hash
from thrifty.tune.measured import Measured
from thrifty.tune.proposals import Optuna, Proposer, Random
from thrifty.tune.racing import Drop, cuts, means, race
from thrifty.tune.space import Space, unique_names

REFERENCE = "reference"


async def search(
    space: Space | Sequence[Plan],
    tasks: Sequence[Task],
    engines: Mapping[str, Engine] | Engine,
    store: Store,
    settings: Settings | None = None,
    *,
    reference: Plan | None = None,
    account: Account | None = None,
    sampling: Sampling = GREEDY,
    **options: Any,
) -> Found:
    """Searches, on the examples of the search split alone.

    `space` may be a list of plans, which is then raced as it is. `reference`: what others are compared with, by default
    the engine without any method. `options` go to the bench's `run` (suite, concurrency, samples, score, watcher, ...).

    Raises PlanError for a space with no plan that the engines can run, InvalidInput for one that is too large for its
    strategy, an unknown axis, or an axis `usd` without prices, and what the bench raises when an engine is gone.
    """
    how = settings or Settings()
    given = dict(engines) if isinstance(engines, Mapping) else {"answer": engines}
    base = reference
    if base is None:
        base = Plan(REFERENCE)
        if isinstance(space, Space):
            base = dataclasses.replace(base, engines=dict(space.engines), on_exceed=space.on_exceed)
    base.build(given)
    shared = {"suite": "search", **options, "account": account or Account("search"), "sampling": sampling}
    measured = Measured(tasks, given, store, how.axis, how.seed, shared)
    work = _Search(how, base, given, measured)
    strategy: Strategy
    if not isinstance(space, Space):
        plans, strategy = list(space), "exhaustive"
        where = digest(sorted(plan.hash for plan in plans))
        await work.all(plans, f"{len(plans):,} plans given")
    else:
        strategy, where = how.strategy, space.hash
        if strategy == "auto":
            strategy = "exhaustive" if space.count(how.most_plans) <= how.most_plans else "optuna"
        if strategy == "exhaustive":
            expansion = space.expand(given, most=how.most_plans)
            await work.all(expansion.plans, expansion.line())
        elif strategy == "ofat":
            await work.ofat(space)
        else:
            await work.proposals(space, strategy)
    return work.found(strategy, where, sampling)


@dataclass
class _Search:
    settings: Settings
    reference: Plan
    engines: Mapping[str, Engine]
    measured: Measured
    how: str = ""
    rounds: list[str] = field(default_factory=list)
    plans: list[Plan] = field(init=False)
    """all plans that were tried, the reference first"""
    dropped: dict[str, str] = field(default_factory=dict)
    """why, by plan hash"""
    estimates: dict[str, Estimate] = field(default_factory=dict)
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        self.plans = [self.reference]

    # -- strategies --------------------------------------------------------------------------------------------

    async def all(self, plans: Sequence[Plan], words: str) -> None:
        """Every plan."""
        self.how = f"exhaustive: {words}"
        some = self._take(plans)
        if self.settings.items == "adaptive" and await self._calibrate(some):
            await self._values(some)
        await self._race()

    async def ofat(self, space: Space) -> None:
        """One factor at a time, each level on all examples (or as `items` says), and then no race: all are measured."""
        if self.settings.items == "adaptive":
            await self._calibrate(Random(space, self.engines, self.settings.seed).propose(self.settings.pilots - 1))

        async def evaluate(choices: Sequence[Choice]) -> list[Value | None]:
            plans: list[Plan | None] = []
            for choice in choices:
                try:
                    plan = space.plan_at(choice)
                    plan.build(self.engines)
                    plans.append(plan)
                except InvalidInput as error:
                    reasons.append(str(error))
                    plans.append(None)
            values = dict(await self._values(self._take([p for p in plans if p is not None])))
            return [None if p is None else self._utility(values.get(p.hash)) for p in plans]

        reasons: list[str] = []
        walk = await one_at_a_time(space.baseline(), space.factors, space.active, evaluate)
        if all(value is None for _, value in walk.tried) and self.measured.stopped is None:
            why = reasons[0] if reasons else "no result was finished"
            raise PlanError(f"space {space.name!r}: none of the {walk.runs} plans tried can run: {why}")
        (end,) = self._take([space.plan_at(walk.best)]) if walk.value is not None else [self.reference]
        total = space.count(10 * self.settings.most_plans)
        more = "over " if total > 10 * self.settings.most_plans else ""
        self.how = (
            f"one factor at a time: {walk.runs} runs, the full factorial has {more}{total:,}; it came to {end.name}"
        )
        if self.estimates:
            await self._race()

    async def proposals(self, space: Space, strategy: Strategy) -> None:
        """`trials` proposals in batches, each measured on the groups of the first round (or as `items` says)."""
        s = self.settings
        source: Proposer
        if strategy == "optuna":
            source, words = Optuna(space, self.engines, s.sampler, s.seed), f"optuna ({s.sampler})"
        else:
            source, words = Random(space, self.engines, s.seed), "random"
        if s.items == "adaptive":
            await self._calibrate(Random(space, self.engines, s.seed + 1).propose(s.pilots - 1))
        count = 0
        while count < s.trials and self.measured.stopped is None:
            batch = source.propose(min(s.batch, s.trials - count))
            if not batch:
                break
            count += len(batch)
            values = dict(await self._values(self._take(batch), first=True))
            for plan in batch:
                if plan.hash in values:
                    source.tell(plan, *values[plan.hash])
        if not count and self.measured.stopped is None:
            reasons: dict[str, int] = getattr(source, "reasons", {})
            why = max(reasons, key=lambda r: reasons[r], default="its rules leave no stack of methods")
            raise PlanError(f"space {space.name!r}: no plan was found that these engines can run: {why}")
        self.how = f"{words}: {count:,} plans proposed"
        await self._race()

    # -- measuring ---------------------------------------------------------------------------------------------

    def _take(self, plans: Sequence[Plan]) -> list[Plan]:
        """The plans under names of their own; those tried before as they were then."""
        known = {plan.hash: plan for plan in self.plans}
        fresh = list({p.hash: p for p in plans if p.hash not in known}.values())
        self.plans = unique_names([*self.plans, *fresh])
        known = {plan.hash: plan for plan in self.plans}
        return [known[plan.hash] for plan in plans]

    async def _values(self, plans: Sequence[Plan], first: bool = False) -> list[tuple[str, tuple[float, float]]]:
        """Score and axis of plans by hash, those that have any: measured, or estimated from a few examples."""
        if self.adaptive is not None and self.adaptive.items is not None:
            asked = [p for p in plans if p.hash not in self.estimates]
            for plan, guess in zip(asked, await self.adaptive.estimate(asked), strict=True):
                if guess is not None:
                    self.estimates[plan.hash] = guess
            known = [(p.hash, self.estimates[p.hash]) for p in plans if p.hash in self.estimates]
            return [(h, (e.score, e.axis)) for h, e in known]
        groups = self.measured.groups
        if first:
            groups = groups[: cuts(len(groups), self.settings.first, self.settings.growth)[0]]
        await self.measured.run([self.reference, *(p for p in plans if p.hash != self.reference.hash)], groups)
        scores, costs = (means(t) for t in self.measured.tables(plans, groups))
        return [(p.hash, (float(s), float(c))) for p, s, c in zip(plans, scores, costs, strict=True) if not np.isnan(s)]

    def _utility(self, value: tuple[float, float] | None) -> Value | None:
        if value is None:
            return None
        score, axis = value
        base = means(self.measured.tables([self.reference])[1])[0]
        cost = self.settings.trade * axis / base if self.settings.trade and base > 0 else 0.0
        return (score - cost, -axis)

    async def _calibrate(self, plans: Sequence[Plan]) -> bool:
        """Fits the items on pilots: the reference and some of these plans, evenly spaced."""
        s = self.settings
        others = [p for p in self._take(plans) if p.hash != self.reference.hash]
        step = max(1, len(others) // max(1, s.pilots - 1))
        pilots = [self.reference, *others[::step][: s.pilots - 1]]
        self.adaptive = Adaptive(self.measured, self.reference, s.asked, s.gamma)
        done = await self.adaptive.calibrate(pilots)
        self.rounds.append(f"{len(pilots)} pilots on all {len(self.measured.groups)} groups")
        scores, costs = (means(t) for t in self.measured.tables(pilots))
        for pilot, score, cost in zip(pilots, scores, costs, strict=True):
            if done and not np.isnan(score):
                n = len(self.measured.groups)
                self.estimates[pilot.hash] = Estimate(float(score), float(cost), 0.0, n)
        return done

    # -- the race ----------------------------------------------------------------------------------------------

    async def _race(self) -> None:
        """Rounds over all groups. With estimates, only those that may be undominated start."""
        alive = list(range(len(self.plans)))
        if self.estimates:
            alive = self._promising()
            self.rounds.append(f"{len(alive)} of {len(self.plans)} plans are promising and measured on all examples")
        groups = self.measured.groups
        ends = cuts(len(groups), self.settings.first, self.settings.growth)
        for number, end in enumerate(ends, 1):
            if not await self.measured.run([self.plans[i] for i in alive], groups[:end]):
                break
            scores, costs = self.measured.tables(self.plans, groups[:end])
            if number == len(ends):
                self.rounds.append(f"round {number}: {len(alive)} plans on all {end} groups")
                break  # nothing is saved by dropping plans now
            drops = race(
                scores, costs, alive, level=self.settings.level, looks=len(ends) - 1, slack=self.settings.slack
            )
            self._note(drops, number)
            self.rounds.append(f"round {number}: {len(alive)} plans on {end} groups, {len(drops)} dropped")
            gone = {d.plan for d in drops}
            alive = [i for i in alive if i not in gone]

    def _note(self, drops: Sequence[Drop], number: int) -> None:
        for d in drops:
            self.dropped[self.plans[d.plan].hash] = (
                f"round {number}: {self.plans[d.by].name} scores more and costs less on {d.groups} groups "
                f"(p = {d.p_score:.2g} and {d.p_axis:.2g})"
            )

    def _promising(self) -> list[int]:
        """The reference, and plans that no other one beats when both are given two standard deviations of their score:
        predictions from few examples are drawn towards the middle, by up to about that much."""
        known = [i for i, p in enumerate(self.plans) if p.hash in self.estimates]
        each = {i: self.estimates[self.plans[i].hash] for i in known}
        good = [
            i
            for i in known
            if not any(
                each[j].axis < each[i].axis and each[j].score - 2 * each[j].sd > each[i].score + 2 * each[i].sd
                for j in known
                if j != i
            )
        ]
        return sorted({0, *good})

    # -- the end -----------------------------------------------------------------------------------------------

    def found(self, strategy: Strategy, space: str, sampling: Sampling) -> Found:
        """Ranks what is there."""
        scores, costs = self.measured.tables(self.plans)
        seen = ~np.isnan(scores)
        whole = seen.sum(axis=1).max(initial=0)
        racing = [
            i
            for i, p in enumerate(self.plans)
            if seen[i].any() and p.hash not in self.dropped and (not self.estimates or seen[i].sum() == whole)
        ]
        common = seen[racing].all(axis=0) if racing else np.zeros(len(self.measured.groups), dtype=bool)
        if not common.any():  # stopped within the first examples
            racing = [i for i in racing if seen[i].sum() == whole]
            common = seen[racing].all(axis=0) if racing else common
        ranked: list[Candidate] = []
        s, c = means(np.where(common, scores, np.nan)), means(np.where(common, costs, np.nan))
        best = [racing[k] for k in frontier(s[racing], c[racing])] if racing and common.any() else []
        for i, plan in enumerate(self.plans):
            guess = self.estimates.get(plan.hash)
            if i in racing and common.any():
                ranked.append(self._candidate(i, scores, costs, common, i in best))
            elif guess is not None and plan.hash not in self.dropped:
                ranked.append(Candidate(plan, guess.score, guess.axis, guess.groups, estimated=True))
            elif seen[i].any():
                ranked.append(self._candidate(i, scores, costs, seen[i], False))
        ranked.sort(key=lambda r: (r.dropped is not None, r.estimated, -r.score, r.axis, r.plan.hash))
        # Of plans equal in both the first tried stays: testing the other as well could only cost confidence.
        order: list[int] = []
        for i in sorted(best, key=lambda i: (-c[i], -s[i], i)):
            if not order or (s[i], c[i]) != (s[order[-1]], c[order[-1]]):
                order.append(i)
        plans = tuple(self.plans[i] for i in order)
        return Found(
            reference=self.reference,
            ranked=tuple(ranked),
            order=plans,
            frozen=search_hash(
                self.reference,
                plans,
                self.settings,
                space=space,
                data=self.measured.data,
                engines={p.hash: identities(p, self.engines) for p in (self.reference, *plans)},
                sampling=changed_settings(sampling),
            ),
            settings=self.settings,
            strategy=strategy,
            how=self.how,
            tried=len(ranked),
            rounds=tuple(self.rounds),
            stopped=self.measured.stopped,
            incurred=self.measured.incurred,
            shared=self.measured.shared,
        )

    def _candidate(self, i: int, scores: Any, costs: Any, groups: Any, undominated: bool) -> Candidate:
        both = groups & ~np.isnan(scores[0]) & ~np.isnan(scores[i])
        n = int((groups & ~np.isnan(scores[i])).sum())
        candidate = Candidate(
            plan=self.plans[i],
            score=float(np.nanmean(scores[i][groups])),
            axis=float(np.nanmean(costs[i][groups])),
            groups=n,
            undominated=undominated,
            dropped=self.dropped.get(self.plans[i].hash),
        )
        if not both.any():
            return candidate
        difference = float((scores[i] - scores[0])[both].mean())
        base = float(costs[0][both].sum())
        saving = 1.0 - float(costs[i][both].sum()) / base if base > 0 else None
        return dataclasses.replace(candidate, difference=difference, saving=saving)
