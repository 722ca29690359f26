"""What can be known before anything is spent, and how many examples would have been needed after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thrifty.bench.task import Task
from thrifty.engine import Engine
from thrifty.errors import InvalidInput
from thrifty.plan import Plan
from thrifty.tune import crc
from thrifty.tune.bounds import examples_needed
from thrifty.tune.calibration import Claim, Reuse
from thrifty.tune.found import Settings
from thrifty.tune.losses import Losses
from thrifty.tune.space import MOST_PLANS, Space
from thrifty.tune.splits import Splits, group_of, groups_of


def check(splits: Splits, space: Space | Sequence[Plan], claim: Claim, reuse: Reuse = "refuse") -> None:
    """Refuses what can be known to fail before anything is spent. Raises InvalidInput."""
    if not splits.search:
        raise InvalidInput("the search part has no examples: give it a share above 0, or a file")
    if not splits.calibration:
        raise InvalidInput("the calibration part has no examples: nothing could be certified")
    used = (
        [e.method for e in space.entries] if isinstance(space, Space) else [type(m) for p in space for m in p.methods]
    )
    if (kept := next((m.name for m in used if m.remembers), None)) is not None:
        raise InvalidInput(
            f"{kept} remembers answers from call to call: examples are not independent then, and no bound holds; leave "
            "it out of the space, and put it above the certified plan afterwards"
        )
    groups = groups_of(splits.calibration)
    delta = claim.delta
    claim.check_n(len(groups), delta / 2 if delta is not None and reuse == "split" else delta)
    if claim.bound == "clopper-pearson" and len(groups) < len(splits.calibration):
        raise InvalidInput(
            "clopper-pearson is exact for losses of 0 and 1, and a group of several examples has a mean between: use "
            "the bound betting"
        )
    if claim.procedure == "conformal-risk-control" and isinstance(space, Space):
        varied = [f.name for f in space.factors if len(f.levels) > 1 and not f.name.startswith("use:")]
        stacked = any(len([level for level in slot.levels if level]) > 1 for slot in space.slots)
        if len(varied) != 1 or stacked or len(space.slots) > 1:
            told = ", ".join(varied) or "none"
            raise InvalidInput(
                f"conformal risk control tunes one knob of one method, and space {space.name!r} has "
                f"{len(space.entries)} methods and varies {told}: fix all but one, or use --method ltt"
            )


def forecast(splits: Splits, claim: Claim) -> str | None:
    """A warning where the calibration part could not even certify a plan that loses nothing (a drop may still be
    certified then, by a plan that scores more than the reference)."""
    n = len(groups_of(splits.calibration))
    if claim.delta is None or claim.bound is None:
        needed = crc.examples_needed(claim.alpha)
    else:
        needed = examples_needed(claim.bound, claim.loss, claim.alpha, claim.delta)
    if n >= needed:
        return None
    return f"few examples: a plan that loses nothing needs {needed:,} calibration groups to be certified, not {n:,}"


def size_of(space: Space | Sequence[Plan], reference: Plan, engines: Mapping[str, Engine], settings: Settings) -> int:
    """How many plans a naive grid over the space has, the reference counted. Raises PlanError where none can run."""
    if not isinstance(space, Space):
        plans = list(space)
        for plan in plans:
            plan.build(engines)
        return len({plan.hash for plan in plans} | {reference.hash})
    if space.count(settings.most_plans) > settings.most_plans:
        return space.count(MOST_PLANS * 100)
    return len({plan.hash for plan in space.expand(engines, most=settings.most_plans).plans} | {reference.hash})


def needed_for(claim: Claim, delta: float | None, losses: Losses) -> str:
    """How many groups would have certified losses like these, in words: a forecast from this sample."""
    try:
        if delta is None:
            count = crc.examples_needed(claim.alpha, losses.high, losses.mean)
        else:
            assert claim.bound is not None
            count = examples_needed(claim.bound, claim.loss, claim.alpha, delta, like=losses)
    except InvalidInput as error:
        return str(error)
    return (
        f"with losses like these (mean {losses.mean:.4g}) about {count:,} groups of calibration examples would be "
        f"needed; there were {losses.n:,}"
    )


def group_counts(splits: Splits) -> str:
    """The sizes of the parts, in words."""
    return ", ".join(
        f"{name} {len(groups_of(part)):,} groups" + (f" ({len(part):,} examples)" if _grouped(part) else "")
        for name, part in splits.parts().items()
    )


def _grouped(tasks: Sequence[Task]) -> bool:
    return len({group_of(task) for task in tasks}) < len(tasks)
