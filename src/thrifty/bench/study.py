"""The whole job of `thrifty frontier`: suites in; results, tables, a picture and a page out.

    found = study([item_of(find("retrieval")[0], engines)], engines, "out/demo", console=Console())

Everything is resumable: the results file in the folder is added to, never replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from thrifty.bench.frontier import Frontier, analyse, frontier_of
from thrifty.bench.progress import Live, Silent, Watcher
from thrifty.bench.report import show, write
from thrifty.bench.row import check_axis
from thrifty.bench.run import GREEDY, Outcome, run
from thrifty.bench.store import Store, read
from thrifty.bench.suites import AXIS, Suite, axis_of
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Call, Sampling
from thrifty.engine import Engine
from thrifty.errors import InvalidInput, ThriftyError
from thrifty.plan import Plan

if TYPE_CHECKING:
    from thrifty.bench.fanout import Fleet

T = TypeVar("T")

RESULTS = "results.jsonl"
"""The results file of a folder."""


class Interrupted(ThriftyError):
    """The run was interrupted; all that was finished is on the disk."""

    exit_code = 130


@dataclass(frozen=True)
class Item:
    """One suite to measure. The first plan is the reference."""

    name: str
    plans: Sequence[Plan]
    tasks: Sequence[Task]
    axis: str = AXIS
    sampling: Sampling = GREEDY
    concurrency: int = 8
    """examples in flight where the study is not told"""


@dataclass(frozen=True)
class Study:
    """What was measured, and where it is."""

    frontiers: tuple[Frontier, ...]
    outcomes: tuple[Outcome, ...] = ()
    results: Path | None = None
    picture: Path | None = None
    page: Path | None = None

    @property
    def complete(self) -> bool:
        """Whether no result is missing."""
        return all(outcome.complete for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for programs."""
        paths = {"results": self.results, "picture": self.picture, "page": self.page}
        return {
            "suites": [frontier.to_dict() for frontier in self.frontiers],
            "complete": self.complete,
            "stopped": next((o.stopped for o in self.outcomes if o.stopped), None),
            "files": {name: str(path) for name, path in paths.items() if path is not None},
        }


def item_of(
    suite: Suite, engines: Mapping[str, Engine], *, n: int | None = None, quick: bool = False, seed: int = 0
) -> Item:
    """A named suite with its own plans; `n` examples, or as many as the suite says. Lengths are in the
    answering engine's tokens."""
    number = n if n is not None else suite.quick if quick else suite.n
    tasks = suite.make(number, seed, count=count_with(engines["answer"]))
    return Item(suite.kept_as, suite.plans(), tasks, suite.axis, suite.sampling, suite.concurrency)


def count_with(engine: Engine) -> Callable[[str], int]:
    """Counts the tokens of a text as a message of this engine has them."""
    nobody = Account("count")

    def tokens(text: str) -> int:
        return engine.count(Call(({"role": "user", "content": text},), nobody))

    frame = tokens("")

    def count(text: str) -> int:
        return tokens(text) - frame if text else 0

    return count


def study(
    items: Sequence[Item],
    engines: Mapping[str, Engine],
    out: str | Path,
    *,
    axis: str | None = None,
    seeds: Sequence[int] = (0,),
    samples: int = 1,
    concurrency: int | None = None,
    account: Account | None = None,
    keep_text: bool = True,
    unsafe: bool = False,
    fleet: Fleet | None = None,
    command: str | None = None,
    console: Console | None = None,
    progress: bool = True,
) -> Study:
    """Measures the items, prints their tables, and writes results, picture and page into the folder `out`.

    Progress goes to standard error, the tables to `console` (None: they are not printed). A budget on
    `account` stops it within; what is there is reported. With a `fleet`, its workers measure, and `engines` are
    the fleet's. Raises Interrupted on Ctrl-C, EngineError when an
    engine is gone (what was finished is kept), InvalidInput for an unknown axis or a folder that is in use.
    """
    for item in items:
        check_axis(axis or item.axis)
        judged = next((task for task in item.tasks if task.scorer == "judge"), None)
        if judged is not None and "judge" not in engines:
            raise InvalidInput(
                f"task {judged.id!r} is scored by a judge: name an engine for the role 'judge' (--judge)"
            )
    if not items:
        raise InvalidInput("no suite to measure: name one")
    path = Path(out) / RESULTS
    screen = Console(stderr=True)
    watcher: Watcher = Live(screen) if progress else Silent()
    done: list[tuple[Frontier, Outcome]] = []

    async def work() -> None:
        with Store(path) as store:
            for item in items:
                outcome = await run(
                    item.plans,
                    item.tasks,
                    engines,
                    store,
                    suite=item.name,
                    seeds=seeds,
                    samples=samples,
                    sampling=item.sampling,
                    concurrency=concurrency or item.concurrency,
                    account=account,
                    keep_text=keep_text,
                    command=command,
                    watcher=watcher,
                    unsafe=unsafe,
                    fleet=fleet,
                )
                if progress:
                    screen.print(outcome.line(), highlight=False, markup=False)
                for line in outcome.errors:
                    screen.print(f"failed: {line}", highlight=False, markup=False)
                own = [r for r in store.results.values() if r.suite == item.name]
                chosen = axis or (axis_of(item.name, own) if item.axis == "usd" else item.axis)
                done.append((frontier_of(store, outcome, chosen), outcome))

    complete(work(), path)
    tasks = {task.hash(): task for item in items for task in item.tasks}
    frontiers = tuple(frontier for frontier, _ in done)
    picture, page = write(frontiers, out, tasks=tasks)
    if console is not None:
        for frontier in frontiers:
            show(frontier, console)
    return Study(frontiers, tuple(outcome for _, outcome in done), path, picture, page)


def study_from(
    results: str | Path,
    *,
    axis: str | None = None,
    suite: str | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Study:
    """The same from a results file alone, `.jsonl` or `.jsonl.gz`: no engine is loaded and nothing is run."""
    contents = read(results)
    names = [suite] if suite is not None else list(dict.fromkeys(r.suite for r in contents.results))
    if not names:
        raise InvalidInput(f"results {results}: there is no result in it")
    frontiers: list[Frontier] = []
    for name in names:
        own = [r for r in contents.results if r.suite == name]
        frontiers += analyse(contents, axis or axis_of(name, own), suite=name)
    if console is not None:
        for frontier in frontiers:
            show(frontier, console)
    picture, page = (None, None) if out is None else write(frontiers, out)
    return Study(tuple(frontiers), (), Path(results), picture, page)


def complete(work: Coroutine[Any, Any, T], path: object) -> T:
    """Runs a coroutine to its end. Ctrl-C cancels it, lets it finish its writing, and raises Interrupted."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: what was finished is in {path}; run the same command again and it goes on from there"
        ) from None
