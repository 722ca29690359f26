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
from dataclasses import dataclass, field, replace

from thrifty.bench.cache import CachingEngine, GenerationCache, Tally
from thrifty.bench.head import changed_settings, head
from thrifty.bench.key import call_seed, digest, identities, result_key
from thrifty.bench.progress import Silent, Watcher
from thrifty.bench.scoring import Score
from thrifty.bench.scoring import score as score_answer
from thrifty.bench.store import Result, Store
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Answer, Sampling, merge_receipts
from thrifty.engine import Engine
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput, ThriftyError
from thrifty.plan import Plan
from thrifty.spend import Spend

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
        parts.append(f"{self.incurred.tokens:,} tokens paid")
        if self.shared:
            parts.append(f"{self.spend.tokens:,} without sharing")
        parts.append(f"{self.seconds:.0f} s")
        if self.stopped:
            parts.append(f"stopped: {self.stopped}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Job:
    """One result to be made."""

    key: str
    plan: Plan
    engine: str
    task: Task
    task_hash: str
    seed: int
    sample: int

    @property
    def example(self) -> tuple[str, int, int]:
        """What plans share generations of."""
        return self.task_hash, self.seed, self.sample


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
    score: Score = score_answer,
) -> Outcome:
    """Makes the missing results of plans x tasks x seeds x samples.

    `sampling` is what every call starts with (a task's max_tokens and the seed are filled in). `account` is
    that of the whole run; give it a Budget to stop within. `keep_text` keeps what the model wrote. `command`
    is told in reports.

    Raises InvalidInput for plans or tasks that cannot be told apart, PlanError for a plan that the engines
    cannot run, EngineError when an engine fails many times in a row. Cancelling it loses nothing that was
    finished."""
    given = dict(engines) if isinstance(engines, Mapping) else {"answer": engines}
    jobs = _jobs(plans, tasks, given, seeds, samples, sampling)
    run_account = account or Account("bench")
    if run_account.budget.kv_bytes_peak is not None:
        raise InvalidInput("a run's budget cannot limit kv_bytes_peak: limit it in the plans")
    done = store.done
    missing = [job for job in jobs if job.key not in done]
    outcome = Outcome(suite, total=len(jobs), resumed=len(jobs) - len(missing))
    outcome.plans, outcome.keys = tuple(plan.hash for plan in plans), frozenset(job.key for job in jobs)
    if missing:
        store.head(head(plans, tasks, given, suite, seeds, samples, sampling, concurrency, command))
    bench = _Bench(given, store, suite, sampling, run_account, keep_text, watcher or Silent(), score, outcome)
    started = time.monotonic()
    bench.watcher.begin(suite, outcome.total, outcome.resumed)
    try:
        await bench.work(missing, max(1, concurrency))
    finally:
        outcome.seconds = time.monotonic() - started
        bench.watcher.end()
        store.sync()
    if bench.fatal is not None:
        raise bench.fatal
    return outcome


# -- one run -------------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    engines: Mapping[str, Engine]
    store: Store
    suite: str
    sampling: Sampling
    account: Account
    keep_text: bool
    watcher: Watcher
    score: Score
    outcome: Outcome
    fatal: EngineError | None = None
    _caches: dict[tuple[str, int, int], GenerationCache] = field(default_factory=dict)
    _waiting: dict[tuple[str, int, int], int] = field(default_factory=dict)
    _failures: int = 0

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
            if self.outcome.stopped or not self._room():
                return
            cache = self._caches.setdefault(job.example, GenerationCache())
            result = await self._one(job, cache)
            if result is not None:
                self.store.append(result)
                self._count(result, job)
            self._waiting[job.example] -= 1
            if not self._waiting[job.example]:
                self.outcome.shared += self._caches.pop(job.example).hits

    def _room(self) -> bool:
        """Whether the run's account still has something of everything it limits."""
        try:
            self.account.check_deadline()
        except BudgetExceeded as error:
            self.outcome.stopped = str(error)
            return False
        used_up = next((name for name, left in self.account.remaining().items() if left <= 0), None)
        if used_up is not None:
            self.outcome.stopped = f"the run's budget has no {used_up} left"
        return used_up is None

    async def _one(self, job: Job, cache: GenerationCache) -> Result | None:
        """One result; None when the run's own account refused what it needed."""
        tally = Tally(self.account)
        alone = Account("example", ledger=tally)
        judge = self.account.child("judge")
        seen: dict[int, CachingEngine] = {}
        engines: dict[str, Engine] = {}
        for role, engine in self.engines.items():
            if id(engine) not in seen:
                seen[id(engine)] = CachingEngine(engine, cache, tally, seed=job.seed, sample=job.sample)
            engines[role] = seen[id(engine)]
        started = time.monotonic()
        answer: Answer | None = None
        error: ThriftyError | None = None
        points: float | None = None
        try:
            answer = await self._answer(job, engines, alone)
            points = await self.score(job.task, answer, self.engines, judge)
        except BudgetExceeded as refusal:
            if answer is not None:  # the judge's, which settles on the run's account
                tally.refused = tally.refused or refusal
            error, points = refusal, 0.0
        except EngineError as failure:
            error = failure
        except InvalidInput as mistake:
            mistake.add_note(f"plan {job.plan.name!r}, task {job.task.id!r}")
            raise
        finally:
            tally.close()
        if tally.refused is not None:
            self.outcome.stopped = self.outcome.stopped or str(tally.refused)
            self._pay(tally, judge)
            return None
        paid, paid_work = tally.paid()
        receipts = merge_receipts(answer.receipts) if answer is not None else ()
        return Result(
            key=job.key,
            suite=self.suite,
            plan=job.plan.name,
            plan_hash=job.plan.hash,
            methods=tuple(m.name for m in job.plan.methods),
            engine=job.engine,
            task=job.task.id,
            task_hash=job.task_hash,
            score=points,
            group=job.task.group,
            seed=job.seed,
            sample=job.sample,
            finish=answer.finish if answer else "budget" if isinstance(error, BudgetExceeded) else "error",
            spend=tally.spend(),
            work=replace(tally.work(), kv_bytes_peak=max(tally.work().kv_bytes_peak, alone.work.kv_bytes_peak)),
            incurred=paid,
            incurred_work=paid_work,
            roles=tally.by_role(),
            judged=judge.settled,
            receipts=tuple(r.to_dict() for r in receipts),
            seconds=time.monotonic() - started,
            error=None if error is None else f"{type(error).__name__}: {_one_line(error)}",
            estimated=any(e.status == "estimated" for e in tally.entries),
            text=answer.text if answer is not None and self.keep_text else None,
        )

    async def _answer(self, job: Job, engines: Mapping[str, Engine], account: Account) -> Answer:
        task = job.task
        pipeline = job.plan.build(engines)
        sampling = replace(self.sampling, seed=call_seed(job.seed, job.sample))
        if task.max_tokens is not None:
            sampling = replace(sampling, max_tokens=task.max_tokens)
        return await pipeline.ask(
            task.messages,
            account,
            tools=task.tools,
            context=task.context or None,
            prefix=task.prefix,
            sampling=sampling,
        )

    def _count(self, result: Result, job: Job) -> None:
        outcome = self.outcome
        outcome.spend = outcome.spend + result.spend
        outcome.incurred = outcome.incurred + result.incurred + result.judged
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

    def _pay(self, tally: Tally, judge: Account) -> None:
        """Counts what a dropped result had cost."""
        self.outcome.incurred = self.outcome.incurred + tally.paid()[0] + judge.settled


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
