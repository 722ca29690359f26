"""Runs plans on examples: resumable, within a budget, every result written as soon as it is there.

Examples are the outer loop and plans the inner one, so that a run that was cut has paired results; the order
of examples is shuffled by the seed. Results that the store has already are skipped. A budget's refusal is a
result (score 0); an engine's failure is none: it is written down, told, and tried again by the next run.

Every plan answers every example on an account of its own (`spend`: as if it ran alone), while what is really
paid (`incurred`) is settled on the account of the whole run. When that one refuses something, the run stops,
and results that its refusal touched are dropped: they would show the run's budget, not the plan's."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from thrifty.bench.cache import GenerationCache
from thrifty.bench.head import changed_settings, head
from thrifty.bench.key import digest, identities, result_key
from thrifty.bench.measure import Job, Measured, Setting, measure, used_up
from thrifty.bench.progress import Silent, Watcher
from thrifty.bench.scoring import Score
from thrifty.bench.scoring import score as score_answer
from thrifty.bench.store import Store
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Sampling
from thrifty.engine import Engine
from thrifty.errors import EngineError, InvalidInput
from thrifty.plan import Plan
from thrifty.spend import Spend

if TYPE_CHECKING:
    from thrifty.bench.fanout import Fleet

GREEDY = Sampling()
"""The engine's own defaults."""

FAILURES_IN_A_ROW = 10
"""After so many the run stops: the engine is gone."""


@dataclass
class Outcome:
    """What a run did."""

    suite: str
    total: int = 0
    """results that the run is for"""
    resumed: int = 0
    """of them, there already"""
    done: int = 0
    """of them, measured now"""
    refused: int = 0
    """of those measured now, refused by a plan's own budget (score 0)"""
    failed: int = 0
    """tried now, and failed"""
    errors: list[str] = field(default_factory=list)
    """the first few failures"""
    lost: list[str] = field(default_factory=list)
    """how workers died that were replaced"""
    stopped: str | None = None
    """why it stopped early"""
    shared: int = 0
    """generations that were replayed"""
    spend: Spend = Spend()
    """of what was measured now, as if every plan ran alone"""
    incurred: Spend = Spend()
    """what was paid now, judges included"""
    seconds: float = 0.0
    plans: tuple[str, ...] = ()
    """hashes of the plans, the reference first"""
    keys: frozenset[str] = frozenset()
    """of all results that the run is for"""

    @property
    def complete(self) -> bool:
        """Whether every result is there."""
        return self.resumed + self.done == self.total

    def line(self) -> str:
        """In words."""
        parts = [f"{self.suite}: {self.resumed + self.done} of {self.total} results"]
        if self.resumed:
            parts.append(f"resumed {self.resumed}")
        if self.refused:
            parts.append(f"{self.refused} refused by a budget")
        if self.failed:
            parts.append(f"{self.failed} failed and run again next time")
        if self.lost:
            died = "a worker" if len(self.lost) == 1 else f"{len(self.lost)} workers"
            parts.append(f"{died} died and the work went on ({self.lost[-1]})")
        parts.append(f"{self.incurred.tokens:,} tokens paid")
        if self.shared:
            parts.append(f"{self.spend.tokens:,} without sharing")
        parts.append(f"{self.seconds:.0f} s")
        if self.stopped:
            parts.append(f"stopped: {self.stopped}")
        return ", ".join(parts)


async def run(
    plans: Sequence[Plan],
    tasks: Sequence[Task],
    engines: Mapping[str, Engine] | Engine,
    store: Store,
    *,
    suite: str = "tasks",
    seeds: Sequence[int] = (0,),
    samples: int = 1,
    sampling: Sampling = GREEDY,
    concurrency: int = 8,
    account: Account | None = None,
    keep_text: bool = False,
    command: str | None = None,
    watcher: Watcher | None = None,
    score: Score | None = None,
    unsafe: bool = False,
    fleet: Fleet | None = None,
) -> Outcome:
    """Makes the missing results of plans x tasks x seeds x samples.

    `sampling` is what every call starts with (a task's max_tokens and the seed are filled in). `account` is
    that of the whole run; give it a Budget to stop within. `keep_text` keeps what the model wrote. `command`
    is told in reports. `score` replaces the tasks' own scorers; `unsafe` lets those run code that a model wrote
    where this machine cannot isolate it. `fleet` measures in workers (`thrifty.bench.fanout`); `engines` are then
    the fleet's.

    Raises InvalidInput for plans or tasks that cannot be told apart, PlanError for a plan that the engines
    cannot run, EngineError when an engine fails many times in a row or an example ends its workers. Cancelling
    it loses nothing that was finished."""
    given = dict(engines) if isinstance(engines, Mapping) else {"answer": engines}
    jobs = _jobs(plans, tasks, given, seeds, samples, sampling)
    run_account = account or Account("bench")
    if run_account.budget.kv_bytes_peak is not None:
        raise InvalidInput("a run's budget cannot limit kv_bytes_peak: limit it in the plans")
    if fleet is not None and score is not None:
        raise InvalidInput("a fleet's workers score with the tasks' own scorers: give `score` or `fleet`, not both")
    done = store.done
    missing = [job for job in jobs if job.key not in done]
    outcome = Outcome(suite, total=len(jobs), resumed=len(jobs) - len(missing))
    outcome.plans, outcome.keys = tuple(plan.hash for plan in plans), frozenset(job.key for job in jobs)
    if missing:
        facts = head(plans, tasks, given, suite, seeds, samples, sampling, concurrency, command)
        store.head(facts if fleet is None else facts | {"workers": fleet.size})
    bench = Bench(store, run_account, watcher or Silent(), outcome)
    setting = Setting(suite, sampling, keep_text, unsafe)
    started = time.monotonic()
    bench.watcher.begin(suite, outcome.total, outcome.resumed)
    try:
        if fleet is None:
            await _Here(bench, given, setting, score or partial(score_answer, unsafe=unsafe)).work(
                missing, max(1, concurrency)
            )
        elif missing:
            await fleet.work(missing, plans, bench, setting, max(1, concurrency))
    finally:
        outcome.seconds = time.monotonic() - started
        bench.watcher.end()
        store.sync()
    if bench.fatal is not None:
        raise bench.fatal
    return outcome


# -- one run -------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where results go, from whatever measured them: the store, the outcome, the progress bar."""

    store: Store
    account: Account
    watcher: Watcher
    outcome: Outcome
    fatal: EngineError | None = None
    _failures: int = 0

    def room(self) -> bool:
        """Whether a further job may start: nothing has stopped the run, and its account is not used up."""
        if self.outcome.stopped is None:
            self.outcome.stopped = used_up(self.account)
        return self.outcome.stopped is None

    def take(self, job: Job, measured: Measured) -> None:
        """Writes and counts what became of a job."""
        outcome, result = self.outcome, measured.result
        outcome.incurred = outcome.incurred + measured.paid
        if result is None:
            outcome.stopped = outcome.stopped or measured.refused
            return
        self.store.append(result)
        outcome.spend = outcome.spend + result.spend
        if result.score is None:
            outcome.failed += 1
            self._failures += 1
            line = f"{job.plan.name} on {job.task.id}: {result.error}"
            if len(outcome.errors) < 5:
                outcome.errors.append(line)
            if self._failures >= FAILURES_IN_A_ROW:
                outcome.stopped = f"{self._failures} failures in a row"
                self.fatal = EngineError(
                    f"{self._failures} calls in a row failed, the last: {line}; {outcome.done} new results are kept: "
                    "see to the engine and run the same command again"
                )
        else:
            self._failures = 0
            outcome.done += 1
            outcome.refused += result.error is not None
        self.watcher.update(result)


@dataclass
class _Here:
    """Measures in this process."""

    bench: Bench
    engines: Mapping[str, Engine]
    setting: Setting
    score: Score
    _caches: dict[tuple[str, int, int], GenerationCache] = field(default_factory=dict)
    _waiting: dict[tuple[str, int, int], int] = field(default_factory=dict)

    async def work(self, jobs: Sequence[Job], concurrency: int) -> None:
        """Runs the jobs, so many at once, in order."""
        for job in jobs:
            self._waiting[job.example] = self._waiting.get(job.example, 0) + 1
        queue = iter(jobs)
        workers = [asyncio.create_task(self._worker(queue)) for _ in range(min(concurrency, len(jobs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _worker(self, queue: Iterator[Job]) -> None:
        for job in queue:
            if not self.bench.room():
                return
            cache = self._caches.setdefault(job.example, GenerationCache())
            self.bench.take(job, await measure(job, cache, self.engines, self.bench.account, self.setting, self.score))
            self._waiting[job.example] -= 1
            if not self._waiting[job.example]:
                self.bench.outcome.shared += self._caches.pop(job.example).hits


# -- details -------------------------------------------------------------------------------------------------


def _jobs(
    plans: Sequence[Plan],
    tasks: Sequence[Task],
    engines: Mapping[str, Engine],
    seeds: Sequence[int],
    samples: int,
    sampling: Sampling,
) -> list[Job]:
    if not plans or not tasks or not seeds or samples < 1:
        given = f"{len(plans)} plans, {len(tasks)} tasks, {len(seeds)} seeds, {samples} samples"
        raise InvalidInput(f"{given}: at least 1 of each is needed")
    for kind, values in (("name", [p.name for p in plans]), ("hash", [p.hash for p in plans])):
        twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
        if twice is not None:
            same = " and ".join(repr(p.name) for p in plans if twice in (p.name, p.hash))
            raise InvalidInput(f"two plans have the same {kind} {twice!r} ({same}): change or drop one")
    hashes = [task.hash() for task in tasks]
    seen: set[str] = set()
    for task, task_hash in zip(tasks, hashes, strict=True):
        if task_hash in seen:
            raise InvalidInput(f"task {task.id!r} is there twice: drop one")
        seen.add(task_hash)
    for plan in plans:
        plan.build(engines)
    keyed = [(plan, identities(plan, engines)) for plan in plans]
    how = {k: v for k, v in changed_settings(sampling).items() if k != "seed"}
    named = [(plan, digest([roles, how] if how else roles), digest(roles["answer"])) for plan, roles in keyed]
    order = list(range(len(tasks)))
    random.Random(f"order/{seeds[0]}").shuffle(order)
    return [
        Job(
            result_key(plan.hash, roles, hashes[i], seed, sample),
            plan,
            answer,
            tasks[i],
            hashes[i],
            seed,
            sample,
        )
        for i in order
        for seed in seeds
        for sample in range(samples)
        for plan, roles, answer in named
    ]
