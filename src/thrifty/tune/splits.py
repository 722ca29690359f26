"""Three parts of the examples: one to search on, one to calibrate on, one that reports what was tuned on neither.

Invariants: a group is in one part only, and so is a question that occurs under several ids; the parts depend on the
tasks and the seed, not on their order in the file; the hash of a data set does not depend on that order either.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from thrifty.allocate import allocate
from thrifty.bench.task import Task
from thrifty.errors import InvalidInput

NAMES = ("search", "calibration", "holdout")
SHARES = (0.3, 0.5, 0.2)


@dataclass(frozen=True)
class Splits:
    """The parts, each in the order of the tasks that were given."""

    search: tuple[Task, ...]
    calibration: tuple[Task, ...]
    holdout: tuple[Task, ...]

    def parts(self) -> dict[str, tuple[Task, ...]]:
        """The parts by name."""
        return {name: getattr(self, name) for name in NAMES}


def group_of(task: Task) -> str:
    """What a task counts under: its group, or itself where it has none."""
    return task.id if task.group is None else task.group


def groups_of(tasks: Iterable[Task]) -> tuple[str, ...]:
    """The groups of some tasks, sorted, each once: what n counts."""
    return tuple(sorted({group_of(task) for task in tasks}))


def content_hash(task: Task) -> str:
    """SHA-256 of all that is asked and scored, without id, group and extra: one question under two ids has one."""
    body = {name: value for name, value in task.to_dict().items() if name not in ("id", "group", "extra")}
    try:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"task {task.id!r} holds a value that is not JSON: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def data_hash(tasks: Sequence[Task]) -> str:
    """SHA-256 (hex) of a set of tasks, every field of each; their order does not count.

    Raises: InvalidInput for no tasks, and for an id that occurs twice.
    """
    if not tasks:
        raise InvalidInput("no examples: a data set needs at least one")
    _by_id("the examples", tasks)
    hashes = sorted(task.hash() for task in tasks)
    return hashlib.sha256("\n".join(["thrifty tasks", *hashes]).encode()).hexdigest()


def split(tasks: Sequence[Task], *, shares: Sequence[float] = SHARES, seed: int = 0) -> Splits:
    """Cuts tasks into search, calibration and holdout in these shares of the groups.

    Groups that have a question in common stay together. A share of 0 leaves that part empty; the calibration part must
    not be.

    Raises: InvalidInput for shares that are no three numbers of at least 0, an id that occurs twice, and fewer groups
    than parts.

    >>> tasks = [Task(id=str(i), messages=({"role": "user", "content": f"{i}?"},)) for i in range(10)]
    >>> [len(part) for part in split(tasks).parts().values()]
    [3, 5, 2]
    """
    _check_shares(shares)
    _by_id("the examples", tasks)
    bound = _bound_together(tasks)
    wanted = sum(share > 0 for share in shares)
    if len(bound) < wanted:
        raise InvalidInput(
            f"{len(bound)} independent groups of examples cannot be cut into {wanted} parts: give more examples"
        )
    bound.sort(key=lambda names: hashlib.sha256(f"{seed}:{names[0]}".encode("utf-8", "surrogatepass")).digest())
    counts = allocate(len(bound), shares, low=[int(share > 0) for share in shares])
    part_of = {
        group: name
        for name, chosen in zip(NAMES, _cut(bound, counts), strict=True)
        for names in chosen
        for group in names
    }
    parts = {name: tuple(task for task in tasks if part_of[group_of(task)] == name) for name in NAMES}
    return Splits(**parts)


def check_disjoint(search: Sequence[Task], calibration: Sequence[Task], holdout: Sequence[Task] = ()) -> Splits:
    """Three parts that come as they are, such as from three files, checked.

    Raises: InvalidInput, naming it, for an example (by id, or the same question under another id) or a group that is
    in two parts, an id that occurs twice in one, and an empty calibration part.
    """
    if not calibration:
        raise InvalidInput("the calibration part has no examples: nothing could be certified")
    parts = dict(zip(NAMES, (tuple(search), tuple(calibration), tuple(holdout)), strict=True))
    ids: dict[str, str] = {}
    groups: dict[str, str] = {}
    contents: dict[str, tuple[str, str]] = {}
    for name, tasks in parts.items():
        _by_id(f"the {name} part", tasks)
        for task in tasks:
            if (other := ids.setdefault(task.id, name)) != name:
                raise InvalidInput(f"example {task.id!r} is in the {other} part and in the {name} part: keep one")
            if (other := groups.setdefault(group_of(task), name)) != name:
                raise InvalidInput(
                    f"group {group_of(task)!r} is in the {other} part and in the {name} part (example {task.id!r}): "
                    "keep all of a group in one"
                )
            other, first = contents.setdefault(content_hash(task), (name, task.id))
            if other != name:
                raise InvalidInput(
                    f"example {task.id!r} of the {name} part asks what {first!r} of the {other} part asks: keep one"
                )
    return Splits(**parts)


# Details.


def _check_shares(shares: Sequence[float]) -> None:
    good = len(shares) == len(NAMES) and all(math.isfinite(share) and share >= 0 for share in shares)
    if not good or not shares[1] > 0:
        raise InvalidInput(
            f"shares {tuple(shares)}: three numbers of at least 0 are needed, for search, calibration (above 0) and "
            "holdout, such as 0.3,0.5,0.2"
        )


def _by_id(where: str, tasks: Iterable[Task]) -> Mapping[str, Task]:
    found: dict[str, Task] = {}
    for task in tasks:
        if task.id in found:
            raise InvalidInput(f"example {task.id!r} occurs twice in {where}: give each example once")
        found[task.id] = task
    return found


def _bound_together(tasks: Sequence[Task]) -> list[list[str]]:
    """Groups joined by questions they share, each set sorted: the units that a split may not cut."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            above[name] = name = above[above[name]]
        return name

    first: dict[str, str] = {}
    for task in tasks:
        here = top(group_of(task))
        above[here] = top(first.setdefault(content_hash(task), here))
    members: dict[str, list[str]] = {}
    for group in sorted(above):
        members.setdefault(top(group), []).append(group)
    return list(members.values())


def _cut(units: Sequence[list[str]], counts: Sequence[int]) -> list[Sequence[list[str]]]:
    start, cut = 0, []
    for count in counts:
        cut.append(units[start : start + count])
        start += count
    return cut
