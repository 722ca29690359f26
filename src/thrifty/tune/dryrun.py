"""What a tuning run would do and cost at most, with nothing spent (`--dry-run`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.bench.run import GREEDY
from thrifty.call import Sampling
from thrifty.engine import Engine
from thrifty.plan import Plan
from thrifty.spend import Spend, total_spend
from thrifty.tune.calibration import Claim, Reuse
from thrifty.tune.cost import Cost, estimate
from thrifty.tune.feasible import check, forecast, group_counts, size_of
from thrifty.tune.found import Settings
from thrifty.tune.proposals import Random
from thrifty.tune.space import Space
from thrifty.tune.splits import Splits, groups_of

RUNS_PRICED = 2_000
"""Plans times examples that are counted one by one for each part."""


@dataclass(frozen=True)
class DryRun:
    """Plans, examples and costs before anything is spent. `whole`: how many plans a grid over the space has."""

    words: str
    """the space, expanded"""
    whole: int
    splits: Splits
    search: Cost
    each_test: Spend
    """at most, for the dearest plan on all calibration examples, with the reference beside it"""
    holdout: Spend
    bounded: bool
    warning: str | None = None

    def lines(self) -> list[str]:
        """In words."""
        word = "at most" if self.bounded else "about"
        return [
            f"space: {self.words}",
            f"examples: {group_counts(self.splits)}",
            f"search: {self.search.line()}",
            f"calibration: {word} {self.each_test.tokens:,} tokens{_dollars(self.each_test)} for the first plan tested "
            "and the reference; plans are tested until the first that fails",
            f"holdout: {word} {self.holdout.tokens:,} tokens{_dollars(self.holdout)}",
            *([self.warning] if self.warning else []),
            "nothing was spent, and the calibration examples were not used",
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "space": self.words,
            "plans": self.whole,
            "groups": {name: len(groups_of(part)) for name, part in self.splits.parts().items()},
            "bounded": self.bounded,
            "warning": self.warning,
            "search": self.search.upper.to_dict(),
            "search_first_round": self.search.first_round.to_dict(),
            "calibration_each_test": self.each_test.to_dict(),
            "holdout": self.holdout.to_dict(),
        }


async def dry_run(
    splits: Splits,
    space: Space | Sequence[Plan],
    engines: Mapping[str, Engine],
    claim: Claim,
    *,
    settings: Settings | None = None,
    reference: Plan | None = None,
    sampling: Sampling = GREEDY,
    reuse: Reuse = "refuse",
) -> DryRun:
    """Checks all that `tune` checks before it spends, and counts. Raises as `tune` does."""
    how = settings or Settings()
    base = reference or Plan("reference")
    base.build(engines)
    check(splits, space, claim, reuse)
    whole = size_of(space, base, engines, how)
    if not isinstance(space, Space):
        plans, words = list(space), f"{len(space):,} plans given"
    elif how.strategy in ("auto", "exhaustive") and space.count(how.most_plans) <= how.most_plans:
        expansion = space.expand(engines, most=how.most_plans)
        plans, words = list(expansion.plans), expansion.line()
    else:
        plans = Random(space, engines, how.seed).propose(how.trials)
        words = f"{whole:,} choices, of which {len(plans):,} drawn at random stand for those that will be proposed"
    plans = [base, *(plan for plan in plans if plan.hash != base.hash)]

    async def priced(part: Sequence[Any]) -> Cost:
        return await estimate(
            plans,
            part,
            engines,
            sampling=sampling,
            first=how.first,
            growth=how.growth,
            seed=how.seed,
            most_runs=RUNS_PRICED,
        )

    search, calibration = await priced(splits.search), await priced(splits.calibration)
    third = await priced(splits.holdout) if splits.holdout else None
    bounded = all(cost.bounded for cost in (search, calibration, third) if cost is not None)
    return DryRun(
        words=words,
        whole=whole,
        splits=splits,
        search=search,
        each_test=_with_base(calibration),
        holdout=_with_base(third) if third else Spend(),
        bounded=bounded,
        warning=forecast(splits, claim),
    )


def _with_base(cost: Cost) -> Spend:
    base, *others = cost.plans
    dearest = max((plan.upper for plan in others), key=lambda spend: (spend.usd, spend.tokens), default=Spend())
    return total_spend([base.upper, dearest])


def _dollars(spend: Spend) -> str:
    return f" (${spend.usd / 1e9:,.4f})" if spend.usd else ""
