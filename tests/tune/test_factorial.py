"""One factor at a time against the full factorial: closed-form run counts, additive responses and interactions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from thrifty.tune.factorial import Choice, Value, Walk, factorial_runs, ofat_runs, one_at_a_time
from thrifty.tune.space import Factor
from thrifty.tune.spacefile import from_toml


def factors(levels: Sequence[int]) -> list[Factor]:
    return [Factor(f"f{i}", tuple(range(n))) for i, n in enumerate(levels)]


async def walk(some: Sequence[Factor], response: Any) -> Walk:
    seen: list[tuple[Any, ...]] = []

    async def evaluate(choices: Sequence[Choice]) -> list[Value | None]:
        seen.extend(tuple(c[f.name] for f in some) for c in choices)
        return [(float(response(*(c[f.name] for f in some))),) for c in choices]

    found = await one_at_a_time({f.name: f.levels[0] for f in some}, some, lambda choice: some, evaluate)
    assert len(seen) == len(set(seen)) == found.runs, "each choice once, the shared baseline too"
    return found


@pytest.mark.parametrize("levels", [(3,), (2, 2), (3, 4, 2), (5, 1, 3, 4)])
async def test_an_additive_response_is_solved_in_so_many_runs(levels: tuple[int, ...]) -> None:
    some = factors(levels)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        effect = [rng.permutation(n).astype(float) for n in levels]
        found = await walk(some, lambda *c, e=effect: sum(x[i] for x, i in zip(e, c, strict=True)))
        assert found.value == (sum(float(x.max()) for x in effect),)
        assert [found.best[f.name] for f in some] == [int(np.argmax(x)) for x in effect]
        assert found.runs == sum(levels) - len(levels) + 1 == ofat_runs(some)
    assert factorial_runs(some) == len(list(product(*(f.levels for f in some))))


async def test_a_planted_interaction_is_missed() -> None:
    def response(a: int, b: int) -> float:
        return 5.0 if (a, b) == (1, 1) else 1.0 - a - b

    some = factors((2, 2))
    found = await walk(some, response)
    assert dict(found.best) == {"f0": 0, "f1": 0} and found.value == (1.0,)
    assert max(response(*c) for c in product((0, 1), repeat=2)) == 5.0


async def test_equal_levels_keep_what_was_there_and_later_entries_break_ties() -> None:
    async def evaluate(choices: Sequence[Choice]) -> list[Value | None]:
        return [(1.0, -abs(c["f0"] - 2)) for c in choices]

    some = factors((4, 3))
    found = await one_at_a_time({"f0": 0, "f1": 0}, some, lambda c: some, evaluate)
    assert dict(found.best) == {"f0": 2, "f1": 0}


async def test_what_cannot_run_is_passed_over() -> None:
    async def evaluate(choices: Sequence[Choice]) -> list[Value | None]:
        return [None if c["f0"] == 0 else (float(c["f0"]),) for c in choices]

    found = await one_at_a_time({"f0": 0}, factors((3,)), lambda c: factors((3,)), evaluate)
    assert found.best["f0"] == 2
    found = await one_at_a_time({"f0": 0}, factors((1,)), lambda c: factors((1,)), evaluate)
    assert found.value is None and found.runs == 1


async def test_knobs_of_a_method_that_is_not_in_the_plan_are_not_swept() -> None:
    space = from_toml(
        '[[methods]]\nuse="fixed-k"\nknobs={k={values=[1,2,4]}}\n[[methods]]\nuse="truncation"\n'
        'knobs={tokens={values=[10,20]}}\n[[methods]]\nuse="budget-prompt"\nknobs={words={values=[9,8,7,6]}}\n'
        '[rules]\nat_most_one=[["fixed-k","truncation"]]'
    )

    async def evaluate(choices: Sequence[Choice]) -> list[Value | None]:
        plans = [space.plan_at(c) for c in choices]
        return [(sum({"truncation": 2.0, "fixed-k": 1.0}.get(m.name, -1.0) for m in p.methods),) for p in plans]

    found = await one_at_a_time(space.baseline(), space.factors, space.active, evaluate)
    # baseline; two other levels of the first slot, one of the second; truncation's other level. Nothing of k or words.
    assert found.runs == 1 + 2 + 1 + 1
    assert [m.name for m in space.plan_at(found.best).methods] == ["truncation"]
