"""Verifiable tasks from reasoning-gym, and the arithmetic suite made of them.

A task carries its generator's name and the whole entry in `scorer_settings`, all JSON, so that the scorer
`reasoning-gym` can rebuild the verifier anywhere. Where a verifier needs types that JSON does not have, the task
carries the settings and the entry's index instead, and the entry is generated again (`entry_of`).

Invariants: the same seed gives the same tasks; different seeds give different ones (the package itself numbers items
by seed + index, so neighbouring seeds would share nearly all); a question occurs once.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from thrifty.bench.task import Task
from thrifty.errors import InvalidInput, ThriftyError, Unsupported, nearest


def gym(dataset: str, n: int, seed: int, **settings: Any) -> list[Task]:
    """`n` tasks of one reasoning-gym generator, scored by its own verifier.

    `settings` are the generator's own (sizes, digits, ...). Raises InvalidInput for an unknown generator or setting, a
    setting out of range, or a generator that has fewer than `n` different questions; Unsupported where reasoning-gym
    is not installed.
    """
    return [
        Task(
            id=f"{dataset}-{seed}-{number}",
            messages=({"role": "user", "content": entry["question"].strip()},),
            gold=entry["answer"],
            scorer="reasoning-gym",
            scorer_settings=_portable(source, entry),
            extra={"suite": f"reasoning-gym:{dataset}"},
        )
        for number, (source, entry) in enumerate(_entries(dataset, n, seed, settings))
    ]


def names() -> list[str]:
    """The generators of the installed reasoning-gym. Raises Unsupported where it is not installed."""
    return sorted(_known())


def entry_of(scorer_settings: Mapping[str, Any]) -> dict[str, Any]:
    """The generator's entry (question, answer, metadata) of a task, from the `scorer_settings` that `gym` gave it.

    Raises InvalidInput for settings that `gym` did not write, Unsupported where reasoning-gym is needed and missing.
    """
    if isinstance(entry := scorer_settings.get("entry"), Mapping):
        return dict(entry)
    try:
        name, settings = str(scorer_settings["dataset"]), dict(scorer_settings["settings"])
        seed, size, index = (int(scorer_settings[key]) for key in ("seed", "size", "index"))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            "a reasoning-gym task's scorer_settings hold `dataset` and `entry`, or `settings`, `seed`, `size`, `index`"
        ) from error
    return dict(_dataset(name, seed, size, settings)[index])


# --- the arithmetic suite ---


@dataclasses.dataclass(frozen=True)
class Level:
    """One difficulty: the generator, its settings, and how its entry is asked (`{...}` from its metadata).

    Where `ask` is None the generator's own question is used.
    """

    generator: str
    settings: Mapping[str, Any]
    ask: str | None = None


ARITHMETIC: Mapping[str, Level] = {
    "sums of one digit": Level(
        "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, "What is {expression}?"
    ),
    "products of one digit": Level("products", {"min_digits": 1, "max_digits": 1}),
    "least common multiples": Level("lcm", {"min_value": 1, "max_value": 12}),
    "products of up to two digits": Level("products", {"min_digits": 1, "max_digits": 2}),
}
"""The difficulties of the arithmetic suite, by name."""


def arithmetic(n: int, seed: int, *, max_tokens: int = 96) -> list[Task]:
    """`n` short problems that a model of 135M parameters can sometimes do, the difficulties taken in turn.

    The gold is a number, scored against the last one in the answer. `extra["level"]` names the difficulty. A
    question occurs once, so `n` may be about 400. Raises InvalidInput where there are too few different questions,
    Unsupported without reasoning-gym.
    """
    levels = list(ARITHMETIC)
    pools: dict[str, list[dict[str, Any]]] = {}
    asked: set[str] = set()
    for name, level in ARITHMETIC.items():
        # These generators have few questions: many draws, so that a run may ask for nearly all of them.
        found = _entries(level.generator, -(-n // len(levels)), seed, level.settings, skip=asked, draws=24)
        pools[name] = [entry for _, entry in found]
        asked.update(entry["question"] for entry in pools[name])
    tasks = []
    for number in range(n):
        name = levels[number % len(levels)]
        level = ARITHMETIC[name]
        entry = pools[name][number // len(levels)]
        question = entry["question"].strip() if level.ask is None else level.ask.format(**entry["metadata"])
        tasks.append(
            Task(
                id=f"arithmetic-{seed}-{number}",
                messages=({"role": "user", "content": question},),
                gold=entry["answer"],
                scorer="numeric",
                max_tokens=max_tokens,
                extra={"suite": "arithmetic", "level": name, "generator": level.generator},
            )
        )
    return tasks


# --- the package ---


def _factory() -> Any:
    try:
        from reasoning_gym import factory  # takes about a second, and only this needs it
    except ImportError as error:
        raise Unsupported(
            "these tasks come from reasoning-gym, not installed here: install the extra `bench` "
            "(pip install 'thrifty[bench]')"
        ) from error
    return factory


def _known() -> dict[str, Any]:
    return {name: kinds for name, kinds in _factory().DATASETS.items() if name != "composite"}  # it mixes others


def _dataset(name: str, seed: int, size: int, settings: Mapping[str, Any]) -> Any:
    factory, known_names = _factory(), _known()
    if name not in known_names:
        raise InvalidInput(nearest(name, known_names, "reasoning-gym generator"))
    _, config = known_names[name]
    known = [field.name for field in dataclasses.fields(config) if field.name not in ("seed", "size")]
    for key in settings:
        if key not in known:
            raise InvalidInput(f"reasoning-gym:{name}: {nearest(key, known, 'setting')}")
    try:
        return factory.create_dataset(name, seed=seed, size=size, **settings)
    except (AssertionError, ValueError, TypeError) as error:  # how the package refuses a setting
        raise InvalidInput(f"reasoning-gym:{name}: {error or 'a setting is out of range'}") from error


@lru_cache(maxsize=128)
def _scorer(name: str) -> Any:
    return _dataset(name, 0, 1, {})


def _entries(
    name: str,
    n: int,
    seed: int,
    settings: Mapping[str, Any],
    *,
    skip: Iterable[str] = (),
    draws: int = 8,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The first `n` entries with different questions, each with what gives it: its generator, settings and place.

    Questions in `skip` are passed over; the generator is asked for at most `draws` times `n` entries, and 200.
    """
    if n < 1:
        raise InvalidInput(f"a suite needs at least 1 task, not {n}")
    start = random.Random(f"{name}/{seed}").randrange(2**31)
    # Some generators make the whole set at once, so the size is fixed before: it must not depend on what was found.
    size = draws * n + 200
    source = {"dataset": name, "settings": dict(settings), "seed": start, "size": size}
    data = _dataset(name, start, size, settings)
    seen = set(skip)
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for index in range(size):
        try:
            entry = data[index]
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ThriftyError(f"reasoning-gym:{name} failed at item {index}: {error!r}") from error
        if entry["question"] not in seen:
            seen.add(entry["question"])
            found.append(({**source, "index": index}, entry))
            if len(found) == n:
                return found
    raise InvalidInput(
        f"reasoning-gym:{name} gave {len(found)} different questions with these settings, not {n}: "
        f"ask for fewer, or widen its settings"
    )


def _portable(source: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """What the verifier needs: the entry where it survives JSON, else how to generate it again."""
    name = source["dataset"]
    try:
        copy = json.loads(json.dumps(entry, allow_nan=False))
        if entry["answer"] is None or _scorer(name).score_answer(entry["answer"], copy) == 1.0:
            return {"dataset": name, "entry": copy}
    except (TypeError, ValueError, LookupError, AttributeError):
        pass  # the entry, or its verifier, needs types that JSON lacks
    return source
