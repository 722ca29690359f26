"""Proposes choices of a space that is too large to try whole: at random, or by Optuna from what was measured.

Optuna's study has two objectives, score up and axis down, and one of two samplers: `tpe`, the multi-objective
tree-structured Parzen estimator (Ozaki et al. 2020), or `nsga2` (Deb et al. 2002). Numeric levels in order are told as
integers, so that near levels inform each other, all others as categories; knobs of methods that are not in the plan are
not part of a trial. Proposals come in batches, because plans that run together share generations; all trials of a batch
are asked before any is told. Seeded: the same results give the same proposals.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from thrifty.errors import InvalidInput
from thrifty.plan import Plan
from thrifty.tune.space import NONE, Factor, Space

Pick: TypeAlias = Callable[[str, int, bool], int]
"""Picks one of n levels of a factor by name; True when their order means something."""

Sampler = Literal["tpe", "nsga2"]

TRIES = 20
"""Proposals that are the same or cannot run, for each that is wanted, before it stops: the space is used up."""


class Proposer(Protocol):
    """Where plans come from."""

    def propose(self, count: int) -> list[Plan]:
        """Up to `count` plans that were not proposed before; fewer when no more are found."""

    def tell(self, plan: Plan, score: float, axis: float) -> None:
        """What a plan measured."""


def suggest(space: Space, pick: Pick) -> dict[str, Any]:
    """A choice made level by level. Where there are more methods than may be stacked, a place in the stack is picked
    for, not each method for itself, so that most choices keep to the rules."""
    choice = {slot.name: slot.levels[0] for slot in space.slots}
    free = [slot for slot in space.slots if NONE in slot.levels]
    room = space.rules.max_methods - (len(space.slots) - len(free))
    if len(free) <= room:
        chosen = list(space.slots)
    else:
        chosen = [slot for slot in space.slots if slot not in free]
        for place in range(max(0, room)):
            i = pick(f"place {place + 1}", len(free) + 1, False)
            if i and free[i - 1] not in chosen:
                chosen.append(free[i - 1])
    for slot in chosen:
        levels = slot.levels if len(free) <= room else tuple(x for x in slot.levels if x != NONE)
        choice[slot.name] = levels[pick(slot.name, len(levels), False) if len(levels) > 1 else 0]
    for factor in space.active(choice):
        if factor.name not in choice:
            n = len(factor.levels)
            choice[factor.name] = factor.levels[pick(factor.name, n, _ordered(factor)) if n > 1 else 0]
    return choice


@dataclass
class Random:
    """Choices drawn evenly, level by level."""

    space: Space
    engines: Mapping[str, Any]
    seed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """why choices gave no plan"""

    def __post_init__(self) -> None:
        self._rng, self._seen = random.Random(f"proposals/{self.seed}"), set[str]()

    def propose(self, count: int) -> list[Plan]:
        """See Proposer."""
        found: list[Plan] = []
        for _ in range(TRIES * count):
            if len(found) == count:
                break
            plan = _built(self.space, suggest(self.space, lambda _, n, __: self._rng.randrange(n)), self)
            if plan is not None and plan.hash not in self._seen:
                self._seen.add(plan.hash)
                found.append(plan)
        return found

    def tell(self, plan: Plan, score: float, axis: float) -> None:
        """Chance learns nothing."""


class Optuna:
    """Choices that an Optuna study proposes."""

    def __init__(self, space: Space, engines: Mapping[str, Any], sampler: Sampler = "tpe", seed: int = 0) -> None:
        """Raises InvalidInput where optuna is not installed."""
        try:
            import optuna  # takes a second to load, and only this needs it
        except ImportError as error:
            raise InvalidInput("strategy optuna needs its extra: pip install 'thrifty[tune]'") from error
        self.space, self.engines, self.reasons = space, engines, dict[str, int]()
        self._failed = optuna.trial.TrialState.FAIL
        with _quiet():
            # Half of the start-up default: a space of plans is dear, and its dimensions are few.
            made = (
                optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
                if sampler == "tpe"
                else optuna.samplers.NSGAIISampler(seed=seed, population_size=16)
            )
            self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=made)
        self._waiting: dict[str, list[Any]] = {}
        self._told: dict[str, tuple[float, float]] = {}

    def propose(self, count: int) -> list[Plan]:
        """See Proposer."""
        found: list[Plan] = []
        for _ in range(TRIES * count):
            if len(found) == count:
                break
            with _quiet():
                trial = self._study.ask()
                plan = _built(self.space, suggest(self.space, _pick(trial)), self)
                if plan is None:
                    self._study.tell(trial, state=self._failed)
                elif plan.hash in self._told:  # measured before: the study learns it again, nobody pays again
                    self._study.tell(trial, list(self._told[plan.hash]))
                else:
                    new = plan.hash not in self._waiting
                    self._waiting.setdefault(plan.hash, []).append(trial)
                    if new:
                        found.append(plan)
        return found

    def tell(self, plan: Plan, score: float, axis: float) -> None:
        """See Proposer."""
        self._told[plan.hash] = (score, axis)
        with _quiet():
            for trial in self._waiting.pop(plan.hash, ()):
                self._study.tell(trial, [score, axis])


def _pick(trial: Any) -> Pick:
    def pick(name: str, n: int, ordered: bool) -> int:
        if ordered:
            return int(trial.suggest_int(name, 0, n - 1))
        return int(trial.suggest_categorical(name, list(range(n))))

    return pick


def _ordered(factor: Factor) -> bool:
    numbers: Sequence[Any] = factor.levels
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        return False
    return list(numbers) in (sorted(numbers), sorted(numbers, reverse=True))


def _built(space: Space, choice: Mapping[str, Any], owner: Random | Optuna) -> Plan | None:
    try:
        plan = space.plan_at(choice)
        plan.build(owner.engines)
    except InvalidInput as error:
        reason = " ".join(str(error).split())
        owner.reasons[reason] = owner.reasons.get(reason, 0) + 1
        return None
    return plan


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells every trial on standard error unless told not to, for the whole process: put back afterwards."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
