"""What can be held and settled, and amounts of it as budgets count them: integers by index, without the zeros.

Seconds are counted in whole nanoseconds, so that sums are exact and nothing is left of a hold that was given back.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from thrifty.errors import InvalidInput
from thrifty.spend import SPEND_FIELDS, WORK_ADDING, Spend, Work

RESOURCES: tuple[str, ...] = ("tokens", *SPEND_FIELDS, *WORK_ADDING)
"""What can be held and settled."""

Amounts: TypeAlias = dict[int, int]
"""What is not zero, by index in RESOURCES; seconds in nanoseconds."""

INDEX: dict[str, int] = {name: i for i, name in enumerate(RESOURCES)}
TOKENS, OUTPUT, SECONDS = INDEX["tokens"], INDEX["output"], INDEX["engine_seconds"]
NO_WORK = Work()


def amounts_of(spend: Spend, work: Work) -> Amounts:
    """A Spend and a Work as amounts. Raises InvalidInput for a negative one.

    >>> {RESOURCES[i]: n for i, n in amounts_of(Spend(input=3, output=2), Work(engine_seconds=0.5)).items()}
    {'tokens': 5, 'input': 3, 'output': 2, 'engine_seconds': 500000000}
    """
    # Written out, for this runs several times a call: a loop over the fields takes twice as long.
    amounts: Amounts = {}
    if x := spend.input + spend.output:
        amounts[0] = x
    if x := spend.input:
        amounts[1] = x
    if x := spend.cached:
        amounts[2] = x
    if x := spend.visual:
        amounts[3] = x
    if x := spend.output:
        amounts[4] = x
    if x := spend.reasoning:
        amounts[5] = x
    if x := spend.calls:
        amounts[6] = x
    if x := spend.tool_calls:
        amounts[7] = x
    if x := spend.usd:
        amounts[8] = x
    if work is not NO_WORK:
        if x := work.prefill:
            amounts[9] = x
        if x := work.kv_reads:
            amounts[10] = x
        if x := work.target_passes:
            amounts[11] = x
        if x := work.draft_passes:
            amounts[12] = x
        if seconds := work.engine_seconds:
            amounts[13] = _nanoseconds(seconds)
    if amounts and min(amounts.values()) < 0:
        i = min(amounts, key=lambda i: amounts[i])
        raise InvalidInput(f"{RESOURCES[i]} = {shown(i, amounts[i])}: an amount of at least 0 is needed")
    return amounts


def _nanoseconds(seconds: float) -> int:
    if not math.isfinite(seconds):
        raise InvalidInput(f"engine_seconds = {seconds}: a finite number is needed")
    return round(seconds * 1e9)


def without(amounts: Amounts, resources: Amounts) -> Amounts:
    """Amounts of the other resources."""
    return {i: amount for i, amount in amounts.items() if i not in resources}


def units(i: int, amount: float) -> int:
    """An amount as it is counted here."""
    return round(amount * 1e9) if i == SECONDS else int(amount)


def shown(i: int, amount: int) -> float:
    """An amount in its resource's own unit."""
    return amount / 1e9 if i == SECONDS else amount
