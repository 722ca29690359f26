"""The same run on many workers: jobs are cut by example, results come to one store, lost work is done again.

Plans on one example go to one worker, which shares their generations. Only JSON crosses (specifications, plans,
tasks, results): engines are built in the worker from their specification, and a plan that means something else
there is refused. The run's account stays here (`bank.py`), the store is written here, a result counts once by its
key. When a worker dies, the examples it had not finished go to a new one; an example that has ended several
workers ends the run, with all that was finished kept.

`workers.py` and `ray_cluster.py` have the workers: processes of this machine, actors of a Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from thrifty.bench.bank import limited
from thrifty.bench.faults import error_of
from thrifty.bench.measure import Job, Measured, Setting
from thrifty.bench.store import Result
from thrifty.budget import Account
from thrifty.call import Branch, Call, Until
from thrifty.context import render
from thrifty.engine import Embeddings
from thrifty.errors import EngineError, InvalidInput, ThriftyError, Unsupported
from thrifty.ledger.entry import Labels
from thrifty.plan import Plan
from thrifty.spend import Spend

if TYPE_CHECKING:
    from thrifty.bench.run import Bench

TRIES = 3
"""Workers that may die on one example, or while they load their engines, before the run ends."""


START_SECONDS = 600.0
"""Longest wait for a worker to find its place and to load its engines, when no other one works."""


class WorkerLost(ThriftyError):
    """A worker has died; the message says how."""


class Seat(Protocol):
    """One worker, with its engines loaded and the run begun."""

    def measure(self, example: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """Parts as `Station.measure` gives them. Raises WorkerLost."""

    def stop(self) -> None:
        """What is in flight ends, nothing new starts."""

    async def cancel(self) -> None:
        """Cancels what is in flight, which settles it; returns when that is done, or the worker is gone."""


class Fleet(ABC):
    """Workers with the same engines. `close` it, or use it in a `with` block: workers never outlive it."""

    size: int
    """how many workers"""
    engines: Mapping[str, StandIn]
    """what a run needs of the engines here: names, capabilities, identities, counting"""

    @abstractmethod
    async def seat(self, number: int, run: Mapping[str, Any]) -> Seat:
        """The worker of a place, new if the last one died, ready for the run. Raises WorkerLost."""

    @abstractmethod
    async def open(self, account: Account) -> Mapping[str, Any]:
        """A run on this account begins: what workers must know of its ledger (`ledger`: a path that they can open,
        or None; `booked`: whether entries go to the bank)."""

    def needs(self) -> str:
        """What a worker needs to start, for the error that none did."""
        return "see whether this machine has the memory for their engines"

    @abstractmethod
    async def paid(self) -> Spend:
        """The run is over: what its workers settled, the lost ones included."""

    @abstractmethod
    def close(self) -> None:
        """Ends the workers. Idempotent."""

    async def work(
        self, jobs: Sequence[Job], plans: Sequence[Plan], bench: Bench, setting: Setting, concurrency: int
    ) -> None:
        """Measures the jobs, so many at once over all workers, and gives what comes to `bench`.

        Raises what a worker raises, and EngineError when examples or engines keep ending workers."""
        batches = batches_of(jobs)
        places = min(self.size, len(batches))
        turns = -(-concurrency // places)
        try:
            run = {
                "suite": setting.suite,
                "sampling": asdict(setting.sampling),
                "keep_text": setting.keep_text,
                "unsafe": setting.unsafe,
                "plans": {plan.hash: plan.to_toml() for plan in plans},
                "account": bench.account.path,
                "limited": limited(bench.account),
                "turns": turns,
                **await self.open(bench.account),
            }
            await _Dispatch(self, bench, run, batches, turns).work(places)
        finally:
            bench.outcome.incurred = await self.paid()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class Batch:
    """What is left of one example: its jobs by key, and how many workers died on it."""

    jobs: dict[str, Job]
    deaths: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a worker."""
        first = next(iter(self.jobs.values()))
        return {
            "task": first.task.to_dict(),
            "task_hash": first.task_hash,
            "seed": first.seed,
            "sample": first.sample,
            "jobs": [[job.key, job.plan.hash, job.engine] for job in self.jobs.values()],
        }


def batches_of(jobs: Sequence[Job]) -> list[Batch]:
    """The jobs cut by example (task, seed and sample), in their order."""
    batches: dict[tuple[str, int, int], Batch] = {}
    for job in jobs:
        batches.setdefault(job.example, Batch({})).jobs[job.key] = job
    return list(batches.values())


class _Dispatch:
    """Keeps the workers busy until no batch is left or the run is stopped."""

    def __init__(
        self, fleet: Fleet, bench: Bench, run: Mapping[str, Any], batches: Sequence[Batch], turns: int
    ) -> None:
        self.fleet, self.bench, self.run, self.turns = fleet, bench, run, turns
        self.queue = deque(batches)
        self.left = {id(batch) for batch in batches}
        self.over = asyncio.Event()
        """no batch is left, or the run is stopped"""
        self.seats: dict[int, Seat] = {}

    async def work(self, places: int) -> None:
        """One coroutine a place; the first error ends all."""
        running = [asyncio.create_task(self._place(number)) for number in range(places)]
        try:
            await asyncio.gather(*running)
        except BaseException:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.gather(*(seat.cancel() for seat in self.seats.values()), return_exceptions=True)
            raise

    async def _place(self, number: int) -> None:
        """One worker after the other, as long as there is work."""
        deaths = 0
        while self.queue and self._room():
            try:
                seat = await self._seat(number)
            except WorkerLost as lost:
                self.bench.outcome.lost.append(str(lost))
                deaths += 1
                if deaths >= TRIES:
                    raise EngineError(
                        f"{deaths} workers died while they loaded their engines, the last: {lost}"
                    ) from lost
                continue
            if seat is None:
                return
            deaths = 0
            self.seats[number] = seat
            try:
                await self._feed(seat)
            except WorkerLost as lost:
                self.bench.outcome.lost.append(str(lost))
            del self.seats[number]  # after another error it stays, to be cancelled

    async def _seat(self, number: int) -> Seat | None:
        """A worker for a place; None when the others have done all before it was ready. A cluster may have no room for
        it: that is no failure as long as another worker works."""
        waiting = asyncio.create_task(self.fleet.seat(number, self.run))
        over = asyncio.create_task(self.over.wait())
        try:
            while True:
                await asyncio.wait({waiting, over}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    return waiting.result()
                if over.done():
                    return None
                if not self.seats:
                    raise EngineError(f"no worker was ready within {START_SECONDS:.0f} s: {self.fleet.needs()}")
        finally:
            for task in (waiting, over):
                task.cancel()
            await asyncio.gather(waiting, over, return_exceptions=True)

    async def _feed(self, seat: Seat) -> None:
        """Gives a worker examples until there are none, or it dies."""
        running: dict[asyncio.Task[None], Batch] = {}
        wake = asyncio.Event()
        try:
            while True:
                while self.queue and self._load(running) < self.turns and self._room():
                    batch = self.queue.popleft()
                    task = asyncio.create_task(self._example(seat, batch, wake.set))
                    task.add_done_callback(lambda _: wake.set())
                    running[task] = batch
                if not running:
                    return
                await wake.wait()
                wake.clear()
                for task in [task for task in running if task.done()]:
                    task.result()
                    del running[task]
        except WorkerLost as lost:
            # what had arrived is taken up first: every stream of this worker ends by itself
            await asyncio.gather(*running, return_exceptions=True)
            self._again(list(running.values()), lost)
            raise
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _load(self, running: Mapping[asyncio.Task[None], Batch]) -> int:
        return sum(len(batch.jobs) for batch in running.values())

    def _again(self, batches: Sequence[Batch], lost: WorkerLost) -> None:
        """Puts a dead worker's unfinished examples first in the queue."""
        for batch in reversed(batches):
            if not batch.jobs:
                self._done(batch)
                continue
            batch.deaths += 1
            if batch.deaths >= TRIES:
                job = next(iter(batch.jobs.values()))
                raise EngineError(
                    f"{batch.deaths} workers died while task {job.task.id!r} was measured, the last: {lost}; all that "
                    "was finished is kept: see to the cause and run the same command again"
                ) from lost
            self.queue.appendleft(batch)

    async def _example(self, seat: Seat, batch: Batch, told: Callable[[], None]) -> None:
        """Measures one example on a worker. A result whose key is done already counts no second time."""
        outcome = self.bench.outcome
        first = next(iter(batch.jobs.values()))
        async with contextlib.aclosing(seat.measure(batch.to_dict())) as parts:
            async for part in parts:
                if "fault" in part:
                    raise error_of(part["fault"])
                if "shared" in part:
                    outcome.shared += part["shared"]
                    continue
                paid = Spend.from_dict(part["paid"])
                if part["result"] is None:
                    self.bench.take(first, Measured(None, part["refused"], paid))
                else:
                    result = Result.from_dict(part["result"])
                    job = batch.jobs.pop(result.key, None)
                    if job is not None:
                        self.bench.take(job, Measured(result, None, paid))
                if outcome.stopped is not None:
                    self._stop()
                told()
        if batch.jobs and outcome.stopped is None:
            raise ThriftyError(f"a worker left out {len(batch.jobs)} results of task {first.task.id!r}")
        self._done(batch)

    def _done(self, batch: Batch) -> None:
        self.left.discard(id(batch))
        if not self.left:
            self.over.set()

    def _room(self) -> bool:
        if not self.bench.room():
            self._stop()
        return self.bench.outcome.stopped is None

    def _stop(self) -> None:
        self.over.set()
        for seat in self.seats.values():
            seat.stop()


class StandIn:
    """An engine of the workers, as the process that starts them has it: it can be described and it counts."""

    def __init__(self, facts: Mapping[str, Any], count: Callable[[Mapping[str, Any]], int]) -> None:
        self.name, self.model, self.dtype = str(facts["name"]), str(facts["model"]), str(facts["dtype"])
        self.capabilities = frozenset(facts["capabilities"])
        self._identity, self._count = dict(facts["identity"]), count

    def identity(self) -> Mapping[str, Any]:
        """The engine's own."""
        return self._identity

    def count(self, call: Call) -> int:
        """The engine's own: a worker counts."""
        messages = [dict(message) for message in render(call)]
        return self._count({"messages": messages, "tools": [dict(t) for t in call.tools], "prefix": call.prefix})

    async def generate(self, call: Call) -> NoReturn:
        """Raises Unsupported."""
        raise self._elsewhere()

    async def open(self, call: Call) -> Branch:
        """Raises Unsupported."""
        raise self._elsewhere()

    async def advance(self, branches: Sequence[Branch], until: Until | int) -> None:
        """Raises Unsupported."""
        raise self._elsewhere()

    async def embed(self, texts: Sequence[str], account: Account, labels: Labels) -> Embeddings:
        """Raises Unsupported."""
        raise self._elsewhere()

    async def aclose(self) -> None:
        """The fleet closes the workers."""

    def _elsewhere(self) -> Unsupported:
        return Unsupported(f"engine {self.name}:{self.model} runs in workers: give the run their fleet")


def stand_ins(
    described: Mapping[str, Mapping[str, Any]], count: Callable[[str, Mapping[str, Any]], int]
) -> dict[str, StandIn]:
    """Stand-ins by role, from what a worker says of its engines."""

    def counts(role: str) -> Callable[[Mapping[str, Any]], int]:
        return lambda call: count(role, call)

    return {role: StandIn(facts, counts(role)) for role, facts in described.items()}


def check_same(first: Mapping[str, Any], other: Mapping[str, Any], name: str) -> None:
    """Raises InvalidInput when a worker's engines are not those of the first one: results would not compare."""
    for role, facts in first.items():
        if other.get(role) != facts:
            raise InvalidInput(
                f"worker {name} has another engine in the role {role!r} than the first one: {other.get(role)}, not "
                f"{facts}: use machines with the same hardware and versions"
            )
