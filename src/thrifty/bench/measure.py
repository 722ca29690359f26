"""One result: one plan answers one example, is scored, and says what it cost.

It runs wherever engines are: in the run's own process, in a worker process, on a node of a cluster. The plan
settles on an account of its own (`spend`: as if it ran alone), what is really paid on the account of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from thrifty.bench.cache import CachingEngine, GenerationCache, Tally
from thrifty.bench.key import call_seed
from thrifty.bench.scoring import Score
from thrifty.bench.store import Result
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Answer, Sampling, merge_receipts
from thrifty.engine import Engine
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput, ThriftyError
from thrifty.plan import Plan
from thrifty.spend import Spend


@dataclass(frozen=True, slots=True)
class Job:
    """One result to be made."""

    key: str
    plan: Plan
    engine: str
    """digest of the answering engine's identity"""
    task: Task
    task_hash: str
    seed: int
    sample: int

    @property
    def example(self) -> tuple[str, int, int]:
        """What plans share generations of."""
        return self.task_hash, self.seed, self.sample


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for every job of a run."""

    suite: str
    sampling: Sampling
    keep_text: bool = False
    unsafe: bool = False
    """run code that a model wrote also where this machine cannot isolate it"""


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of a job: a result, or the refusal of the run's own account that stopped it."""

    result: Result | None
    refused: str | None = None
    paid: Spend = Spend()
    """what was paid for it, its judge included"""


def used_up(account: Account) -> str | None:
    """Why the run's account allows nothing more; None while it has something of everything it limits."""
    try:
        account.check_deadline()
        remaining = account.remaining()
    except BudgetExceeded as error:
        return str(error)
    name = next((name for name, left in remaining.items() if left <= 0), None)
    return None if name is None else f"the run's budget has no {name} left"


async def measure(
    job: Job,
    cache: GenerationCache,
    engines: Mapping[str, Engine],
    account: Account,
    setting: Setting,
    score: Score,
) -> Measured:
    """Makes one result. A plan's own budget that refuses gives the score 0, a failing engine the score None.

    Raises InvalidInput, with a note that names plan and task, for a task that cannot be asked or scored."""
    tally = Tally(account)
    alone = Account("example", ledger=tally)
    judge = account.child("judge")
    seen: dict[int, CachingEngine] = {}
    shared: dict[str, Engine] = {}
    for role, engine in engines.items():
        if id(engine) not in seen:
            seen[id(engine)] = CachingEngine(engine, cache, tally, seed=job.seed, sample=job.sample)
        shared[role] = seen[id(engine)]
    started = time.monotonic()
    answer: Answer | None = None
    error: ThriftyError | None = None
    points: float | None = None
    try:
        answer = await _answer(job, shared, alone, setting.sampling)
        points = await score(job.task, answer, engines, judge)
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
    paid, paid_work = tally.paid()
    if tally.refused is not None:
        return Measured(None, str(tally.refused), paid + judge.settled)
    receipts = merge_receipts(answer.receipts) if answer is not None else ()
    result = Result(
        key=job.key,
        suite=setting.suite,
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
        text=answer.text if answer is not None and setting.keep_text else None,
        final=answer.parsed if answer is not None and setting.keep_text else None,
    )
    return Measured(result, None, paid + judge.settled)


async def _answer(job: Job, engines: Mapping[str, Engine], account: Account, sampling: Sampling) -> Answer:
    task = job.task
    pipeline = job.plan.build(engines)
    sampling = replace(sampling, seed=call_seed(job.seed, job.sample))
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
