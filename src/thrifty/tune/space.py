"""A space of plans: methods with ranges of knobs and rules for stacking them, counted before any plan is built.

    [[methods]]
    use = "adaptive-k"                # `optional = true` unless said otherwise: plans without it exist too
    [methods.knobs]
    buffer = { values = [0, 2, 5] }   # or { low = 1, high = 16, log = true, steps = 4 }, or one value
    [rules]
    max_methods = 2
    at_most_one = [["adaptive-k", "fixed-k"]]

A space is a list of factors, each with its levels: which method of a group stands in the plan (a *slot*), every knob of
every method, the budget's ranges, the order where several are given. A choice is one level of every factor that counts;
knobs of methods that are not in the plan do not. The first level of each is the baseline: no method where none is
required, and the first value of every knob.

Invariants: nothing is built before it is counted; a choice gives one Plan or a PlanError that says why not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from thrifty.bench.key import digest
from thrifty.budget import Budget
from thrifty.engine import Engine
from thrifty.errors import InvalidInput, PlanError
from thrifty.method import FLOATING, STAGES, Method
from thrifty.plan import Plan

MOST_PLANS = 10_000
"""Choices of a space that are expanded; a larger one is searched by proposals (strategy `optuna`)."""

NONE = ""
"""The level of a slot that stands for no method."""

ORDER = "order"

_FLOATING_STAGE = STAGES["context"] + 0.5
"""Searches and agents stand below prompt and context methods, so that those act once and not once a sample."""


@dataclass(frozen=True)
class Factor:
    """One thing that plans differ in. `owner`: the method whose knob it is; None for slots, budget and order."""

    name: str
    levels: tuple[Any, ...]
    owner: str | None = None


@dataclass(frozen=True)
class Entry:
    """One method of a space, with the values of its knobs; knobs that are not named stay at their defaults."""

    method: type[Method]
    optional: bool = True
    knobs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name


@dataclass(frozen=True)
class Rules:
    """How methods may stand together."""

    max_methods: int = 2
    min_methods: int = 0
    at_most_one: tuple[tuple[str, ...], ...] = ()
    exactly_one: tuple[tuple[str, ...], ...] = ()
    order: Literal["stages", "given"] | tuple[tuple[str, ...], ...] = "stages"
    """by stage and then as given; as given; or one or more orders by name (the rest by stage)"""


@dataclass(frozen=True)
class Expansion:
    """All plans of a space that the engines can run, without those that are the same."""

    plans: tuple[Plan, ...]
    total: int
    """choices"""
    duplicates: int
    unbuildable: tuple[tuple[str, int], ...]
    """why choices give no plan, and how many, the commonest first"""

    def line(self) -> str:
        """In words."""
        parts = [f"{len(self.plans):,} plans of {self.total:,} choices"]
        if self.duplicates:
            parts.append(f"{self.duplicates:,} the same as others")
        if self.unbuildable:
            parts.append(f"{sum(n for _, n in self.unbuildable):,} cannot run ({self.unbuildable[0][0]})")
        return ", ".join(parts)


@dataclass(frozen=True)
class Space:
    """See the top of the module. Read one with `thrifty.tune.spacefile.load`, or take `default_space`."""

    name: str
    entries: tuple[Entry, ...]
    rules: Rules = Rules()
    budget: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """levels of each limit, as TOML has them (usd in dollars)"""
    engines: Mapping[str, str] = field(default_factory=dict)
    on_exceed: Literal["degrade", "refuse"] = "degrade"

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits of all that changes its plans."""
        body = {
            "methods": [
                [e.name, e.method.version, e.optional, {k: list(v) for k, v in e.knobs.items()}] for e in self.entries
            ],
            "rules": [
                self.rules.max_methods,
                self.rules.min_methods,
                self.rules.at_most_one,
                self.rules.exactly_one,
                self.rules.order,
            ],
            "budget": {k: list(v) for k, v in self.budget.items()},
            "engines": dict(self.engines),
            "on_exceed": self.on_exceed,
        }
        return digest(body)

    @property
    def slots(self) -> tuple[Factor, ...]:
        """One factor for every method or group of which at most one stands in a plan, in the order of the file. A
        method that stands in several groups belongs to the first; the others hold as rules."""
        groups = [(g, False) for g in self.rules.exactly_one] + [(g, True) for g in self.rules.at_most_one]
        found: list[Factor] = []
        placed: set[str] = set()
        for entry in self.entries:
            if entry.name in placed:
                continue
            group, optional = next(((g, free) for g, free in groups if entry.name in g), ((entry.name,), True))
            members = tuple(e for e in self.entries if e.name in group and e.name not in placed)
            needed = not optional or any(not e.optional for e in members)
            names = tuple(e.name for e in members)
            placed.update(names)
            found.append(Factor(f"use:{'|'.join(names)}", names if needed else (NONE, *names)))
        return tuple(found)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """All factors: slots, knobs, budget, order."""
        knobs = [Factor(f"{e.name}.{knob}", values, e.name) for e in self.entries for knob, values in e.knobs.items()]
        limits = [Factor(f"budget.{name}", levels) for name, levels in self.budget.items()]
        orders = [Factor(ORDER, tuple(range(len(self.rules.order))))] if isinstance(self.rules.order, tuple) else []
        return (*self.slots, *knobs, *limits, *orders)

    def baseline(self) -> dict[str, Any]:
        """The first level of every factor."""
        return {factor.name: factor.levels[0] for factor in self.factors}

    def used(self, choice: Mapping[str, Any]) -> frozenset[str]:
        """Names of the methods that a choice puts into the plan."""
        return frozenset(choice[slot.name] for slot in self.slots) - {NONE}

    def active(self, choice: Mapping[str, Any]) -> tuple[Factor, ...]:
        """The factors that count, given which methods are in the plan."""
        used = self.used(choice)
        return tuple(f for f in self.factors if f.owner is None or f.owner in used)

    # -- counting and expanding --------------------------------------------------------------------------------

    def count(self, most: int | None = None) -> int:
        """How many choices there are, counted without building any; at most `most` + 1 (None: exactly)."""
        common = math.prod(len(f.levels) for f in self.factors if f.owner is None and f not in self.slots)
        knobs = {e.name: math.prod(len(v) for v in e.knobs.values()) for e in self.entries}
        total = 0
        for used in self._stacks():
            total += common * math.prod(knobs[name] for name in used if name != NONE)
            if most is not None and total > most:
                return most + 1
        return total

    def choices(self) -> Iterator[dict[str, Any]]:
        """Every choice, the levels of later factors changing fastest."""
        slots = [slot.name for slot in self.slots]
        rest = [f for f in self.factors if f.name not in slots]
        for used in self._stacks():
            free = [f for f in rest if f.owner is None or f.owner in used]
            for levels in product(*(f.levels for f in free)):
                yield {**dict(zip(slots, used, strict=True)), **{f.name: x for f, x in zip(free, levels, strict=True)}}

    def plan_at(self, choice: Mapping[str, Any]) -> Plan:
        """The plan of a choice; levels of factors that do not count are ignored.

        Raises PlanError or InvalidInput when the rules or the plan check refuse it."""
        used = self.used(choice)
        self._check(used)
        entries = sorted((e for e in self.entries if e.name in used), key=self._place(choice.get(ORDER, 0)))
        methods, words = [], []
        for entry in entries:
            settings = {knob: choice[f"{entry.name}.{knob}"] for knob in entry.knobs}
            methods.append(entry.method.from_settings(settings))
            shown = [f"{k}={_short(v)}" for k, v in settings.items() if len(entry.knobs[k]) > 1]
            words.append(entry.name + (f"({', '.join(shown)})" if shown else ""))
        limits = {name: choice[f"budget.{name}"] for name in self.budget}
        varied = [f"{name}={_short(limits[name])}" for name, levels in self.budget.items() if len(levels) > 1]
        name = " > ".join(words) or "no method"
        return Plan(
            name=name + (f" [{', '.join(varied)}]" if varied else ""),
            methods=tuple(methods),
            budget=Budget.from_dict(limits),
            engines=dict(self.engines),
            on_exceed=self.on_exceed,
        )

    def expand(self, engines: Mapping[str, Engine] | Engine, *, most: int = MOST_PLANS) -> Expansion:
        """Every plan of the space that the engines can run.

        Raises InvalidInput for a space of more than `most` choices, before any is built, and PlanError when none of
        them can run, with the commonest reason."""
        total = self.count(most)
        if total > most:
            raise InvalidInput(
                f"space {self.name!r} has more than {most:,} plans: give fewer values, lower max_methods, "
                "or search it by proposals (strategy optuna)"
            )
        plans: dict[str, Plan] = {}
        reasons: Counter[str] = Counter()
        duplicates = 0
        for choice in self.choices():
            try:
                plan = self.plan_at(choice)
                plan.build(engines)
            except InvalidInput as error:
                reasons[" ".join(str(error).split())] += 1
                continue
            duplicates += plan.hash in plans
            plans.setdefault(plan.hash, plan)
        if not plans:
            raise PlanError(self._nothing(engines, total, reasons))
        return Expansion(tuple(plans.values()), total, duplicates, tuple(reasons.most_common()))

    # -- details -----------------------------------------------------------------------------------------------

    def _stacks(self) -> Iterator[tuple[str, ...]]:
        """Which method stands in each slot, for every stack that the rules allow; one level is tried at a time, so
        what a rule forbids is never completed."""
        slots = self.slots
        needed = [sum(NONE not in s.levels for s in slots[i:]) for i in range(len(slots) + 1)]

        def deeper(i: int, used: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
            filled = sum(name != NONE for name in used)
            possible = filled + len(slots) - i
            if filled + needed[i] > self.rules.max_methods or possible < self.rules.min_methods:
                return
            if i == len(slots):
                yield used
                return
            for level in slots[i].levels:
                if level == NONE or not self._clash(frozenset(used) | {level}):
                    yield from deeper(i + 1, (*used, level))

        return deeper(0, ())

    def _clash(self, used: frozenset[str]) -> tuple[str, ...]:
        groups = (*self.rules.exactly_one, *self.rules.at_most_one)
        return next((tuple(sorted(used & set(g))) for g in groups if len(used & set(g)) > 1), ())

    def _check(self, used: frozenset[str]) -> None:
        rules = self.rules
        if clash := self._clash(used):
            raise PlanError(f"the rules allow at most one of {', '.join(clash)}")
        if not rules.min_methods <= len(used) <= rules.max_methods:
            raise PlanError(f"{len(used)} methods: the rules allow from {rules.min_methods} to {rules.max_methods}")

    def _place(self, order: int) -> Any:
        given = [entry.name for entry in self.entries]
        if self.rules.order == "given":
            return lambda entry: given.index(entry.name)
        named = list(self.rules.order[order]) if isinstance(self.rules.order, tuple) else []

        def stage(entry: Entry) -> float:
            family = entry.method().family
            return _FLOATING_STAGE if family in FLOATING else STAGES.get(family, STAGES["prompt"])

        # Named methods stand as named; each other one before the first named one of a later stage.
        later = [(name, next(stage(e) for e in self.entries if e.name == name)) for name in named]
        for entry in sorted(self.entries, key=lambda e: (stage(e), given.index(e.name))):
            if entry.name not in named:
                own = stage(entry)
                at = next((i for i, (_, s) in enumerate(later) if s > own and s != _FLOATING_STAGE), len(later))
                later.insert(at, (entry.name, own))
        final = [name for name, _ in later]
        return lambda entry: final.index(entry.name)

    def _nothing(self, engines: Mapping[str, Engine] | Engine, total: int, reasons: Counter[str]) -> str:
        given = dict(engines) if isinstance(engines, Mapping) else {"answer": engines}
        answer = given.get("answer")
        where = f"engine {answer.name}:{answer.model}" if answer is not None else "no engine for the role 'answer'"
        why = reasons.most_common(1)[0][0] if reasons else "its rules leave no stack of methods"
        return f"space {self.name!r}: none of its {total:,} plans can run on {where}: {why}"


def unique_names(plans: Sequence[Plan]) -> list[Plan]:
    """The plans, those whose name stands before already renamed by their hash, so that a run can tell them apart."""
    from dataclasses import replace

    seen: set[str] = set()
    found = []
    for plan in plans:
        kept = replace(plan, name=f"{plan.name} #{plan.hash}") if plan.name in seen else plan
        seen.add(kept.name)
        found.append(kept)
    return found


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else text[:21] + "..."
