"""What a search is told and what it finds: settings, candidates in order, and the hash that freezes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from thrifty.bench.key import digest
from thrifty.bench.row import check_axis
from thrifty.errors import InvalidInput, nearest
from thrifty.plan import Plan
from thrifty.spend import Spend
from thrifty.tune.space import MOST_PLANS

Strategy = Literal["auto", "exhaustive", "ofat", "optuna", "random"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to search. Raises InvalidInput for what is out of range, naming what is allowed."""

    axis: str = "tokens"
    """a field of Spend or Work, or `tokens`"""
    strategy: Strategy = "auto"
    """`exhaustive`: every plan of the space; `ofat`: one factor at a time; `optuna` and `random`: `trials` proposals;
    `auto`: exhaustive for a space of up to `most_plans` choices, else optuna"""
    sampler: Literal["tpe", "nsga2"] = "tpe"
    """Optuna's"""
    trials: int = 64
    """plans that optuna and random propose"""
    batch: int = 8
    """plans proposed at a time"""
    most_plans: int = MOST_PLANS
    first: int = 8
    """groups of the first round; proposals are judged on these"""
    growth: float = 2.0
    """each round has so many times the groups of the one before"""
    level: float = 0.05
    """chance at most that racing drops a given plan that none dominates (see `racing`)"""
    slack: float = 0.0
    """racing also drops what is dearer and shown not to score this much more"""
    trade: float = 0.0
    """ofat keeps the level with the best score - trade * axis / the reference's axis; ties go to the cheaper"""
    items: Literal["all", "adaptive"] = "all"
    """whether a plan answers all examples, or a few chosen ones first (see `adaptive`)"""
    pilots: int = 12
    """adaptive: plans that answer all examples first, the reference among them"""
    asked: int = 16
    """adaptive: groups that each other plan answers"""
    gamma: float = 0.5
    """adaptive: how much an example's cost counts in choosing it, 0 not at all"""
    seed: int = 0

    def __post_init__(self) -> None:
        check_axis(self.axis)
        for name, allowed in (
            ("strategy", STRATEGIES),
            ("sampler", ("tpe", "nsga2")),
            ("items", ("all", "adaptive")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidInput(nearest(str(getattr(self, name)), allowed, name))
        for name, low, high in (
            ("trials", 1, 100_000),
            ("batch", 1, 1_000),
            ("most_plans", 1, 1_000_000),
            ("first", 2, 1_000_000),
            ("growth", 1.1, 100),
            ("level", 1e-6, 0.5),
            ("slack", 0, 1),
            ("trade", 0, 1_000),
            ("pilots", 2, 10_000),
            ("asked", 1, 1_000_000),
            ("gamma", 0, 10),
        ):
            given = getattr(self, name)
            if not isinstance(given, int | float) or isinstance(given, bool) or not low <= given <= high:
                raise InvalidInput(f"search {name} = {given!r}: from {low:g} to {high:,g} is needed")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """Settings by name. Raises InvalidInput for an unknown one."""
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise InvalidInput(nearest(name, known, "search setting"))
        return cls(**data)


@dataclass(frozen=True)
class Candidate:
    """One plan that was tried. Means are over `groups` groups of examples."""

    plan: Plan
    score: float
    axis: float
    groups: int
    difference: float | None = None
    """of the score to the reference's, on the groups of both"""
    saving: float | None = None
    """share of the axis saved beside the reference, on the groups of both"""
    undominated: bool = False
    estimated: bool = False
    """predicted from a few examples, and not measured on all (see `adaptive`)"""
    dropped: str | None = None
    """why racing dropped it"""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the plan as its hash and TOML form."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "plan"}
        return {"plan": self.plan.to_dict(), "hash": self.plan.hash, **data}


@dataclass(frozen=True)
class Found:
    """The end of a search, also of one that its budget stopped."""

    reference: Plan
    ranked: tuple[Candidate, ...]
    """all plans that have results: those still in the race by score, then what was dropped or only estimated"""
    order: tuple[Plan, ...]
    """the undominated ones, dearest first, cheapest last: the order of a fixed-sequence test. The reference is among
    them when it is undominated; a plan dearer than it only if it scores more"""
    frozen: str
    """digest of the order and of all that led to it"""
    settings: Settings
    strategy: Strategy
    """that `auto` came to"""
    how: str
    """the strategy in words: sampler, counts"""
    tried: int
    """plans that have a result"""
    rounds: tuple[str, ...]
    """what each round did, in words"""
    stopped: str | None
    incurred: Spend
    """paid by this search now"""
    shared: int
    """generations that were replayed"""

    @property
    def best(self) -> Plan:
        """The undominated plan of the best score; the reference when nothing was measured."""
        return self.order[0] if self.order else self.reference

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "reference": self.reference.hash,
            "order": [plan.hash for plan in self.order],
            "ranked": [candidate.to_dict() for candidate in self.ranked],
            "frozen": self.frozen,
            "settings": asdict(self.settings),
            "strategy": self.strategy,
            "how": self.how,
            "tried": self.tried,
            "rounds": list(self.rounds),
            "stopped": self.stopped,
            "incurred": self.incurred.to_dict(),
            "shared": self.shared,
        }


def search_hash(
    reference: Plan,
    order: Sequence[Plan],
    settings: Settings,
    *,
    space: str,
    data: str,
    engines: Mapping[str, Any],
    sampling: Mapping[str, Any],
) -> str:
    """Sixteen hexadecimal digits of what a search froze: the plans in their order, the reference, how it searched, on
    which space and examples, with which engines and sampling."""
    body = [reference.hash, [p.hash for p in order], asdict(settings), space, data, dict(engines), dict(sampling)]
    return digest(body)
