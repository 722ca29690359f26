"""Worker processes on this machine: `thrifty frontier --workers N`.

    with Processes({"answer": "smollm2"}, 2) as fleet:
        study(items, fleet.engines, "out", fleet=fleet)

A worker is a fresh interpreter (never a fork: torch does not survive one) with a socket to this process. It ends
when the socket does, so no worker outlives its parent, however that ends. It is in a process group of its own:
Ctrl-C reaches this process only, which then lets the workers settle what is in flight. Each worker is a writer of
its own of the run's ledger file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from thrifty.bench.bank import Bank
from thrifty.bench.fanout import Fleet, Seat, WorkerLost, check_same, stand_ins
from thrifty.bench.link import Link, LinkLost, Reply
from thrifty.bench.station import Station, limit_threads, wire_of
from thrifty.budget import Account
from thrifty.errors import EngineError, InvalidInput
from thrifty.meter.prices import PriceTable
from thrifty.spend import Spend

GRACE = 10.0
"""Seconds in which a worker settles what is in flight and closes its ledger, before it is killed."""


class Processes(Fleet):
    """So many worker processes, each with its own engines and its share of the cores."""

    def __init__(self, specs: Mapping[str, str], size: int, *, prices: PriceTable | None = None) -> None:
        """Starts the workers; returns when the first has loaded its engines.

        Raises InvalidInput for a number below 1, what `thrifty.engines.spec.resolve` raises, and EngineError when
        the worker dies."""
        if size < 1:
            raise InvalidInput(f"{size} workers: at least 1 is needed")
        self.size = size
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._setup = {
            "specs": dict(specs),
            "prices": None if prices is None else wire_of(prices),
            "threads": max(1, cores // size),
        }
        self._bank: Bank | None = None
        self._workers: dict[int, _Worker] = {}
        self._started = 0
        self._closed = False
        try:
            for number in range(size):
                self._start(number)
            first = self._workers[0]
            try:
                self._described: Mapping[str, Any] = first.ready.result()
            except LinkLost:
                raise EngineError(f"a worker died while it loaded its engines: {first.death()}") from None
        except BaseException:
            self.close()
            raise
        self.engines = stand_ins(self._described, self._count)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [worker.process.pid for worker in self._workers.values() if worker.process.poll() is None]

    async def open(self, account: Account) -> Mapping[str, Any]:
        """See `Fleet`: a ledger that is a file is opened by every worker."""
        self._bank = Bank(account)
        path = getattr(account.ledger, "path", None)
        return {"ledger": None if path is None else str(path), "booked": account.ledger is not None and path is None}

    async def paid(self) -> Spend:
        """See `Fleet`."""
        return Spend() if self._bank is None else self._bank.paid

    async def seat(self, number: int, run: Mapping[str, Any]) -> Seat:
        """See `Fleet`."""
        worker = self._workers[number]
        if worker.link.lost:
            await self._bury(worker)
            worker = self._start(number)
        try:
            check_same(self._described, await asyncio.wrap_future(worker.ready), worker.name)
            await asyncio.wrap_future(worker.link.request("begin", run=dict(run)))
        except LinkLost:
            raise WorkerLost(await asyncio.to_thread(worker.death)) from None
        return worker

    def close(self) -> None:
        """See `Fleet`: asks the workers to end, and kills those that do not."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers.values():
            with contextlib.suppress(LinkLost):
                worker.link.notify("exit")
        for worker in self._workers.values():
            worker.end()

    # -- details ---------------------------------------------------------------------------------------------

    def _start(self, number: int) -> _Worker:
        self._started += 1
        worker = _Worker(f"{number}.{self._started}", self._setup, self._serve, self._lost)
        self._workers[number] = worker
        return worker

    def _serve(self, worker: str, do: str, args: Mapping[str, Any], reply: Reply) -> None:
        if self._bank is None:
            raise InvalidInput("no run has begun: nothing can be spent")
        reply.end(self._bank.serve(worker, do, args))

    def _lost(self, worker: str) -> None:
        if self._bank is not None and not self._closed:
            self._bank.lost(worker)

    async def _bury(self, worker: _Worker) -> None:
        """Settles what a dead worker had written that it was about to spend."""
        await asyncio.to_thread(worker.end)
        ledger = None if self._bank is None else self._bank.account.ledger
        settle = getattr(ledger, "settle_orphans", None)
        if settle is not None:
            await asyncio.to_thread(settle)

    def _count(self, role: str, call: Mapping[str, Any]) -> int:
        worker = self._workers[0]
        try:
            return int(worker.link.request("count", role=role, call=dict(call)).result())
        except LinkLost:
            raise EngineError(f"the worker that counts tokens died: {worker.death()}") from None


class _Worker:
    """One process and the link to it; a Seat."""

    def __init__(self, name: str, setup: Mapping[str, Any], serve: Any, lost: Any) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "thrifty.bench.workers", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=_standard_error(),  # what an engine prints is no result of ours
                env={**os.environ, **limit_threads(setup["threads"])},
                process_group=0,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.link = Link(ours, lambda do, args, reply: serve(name, do, args, reply), lambda: lost(name))
        self.link.start()
        self.ready: Future[Any] = self.link.request("setup", **setup)

    async def measure(self, example: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """See `Seat`."""
        try:
            async with contextlib.aclosing(self.link.stream("measure", example=dict(example))) as parts:
                async for part in parts:
                    yield part
        except LinkLost:
            raise WorkerLost(await asyncio.to_thread(self.death)) from None

    def stop(self) -> None:
        """See `Seat`."""
        with contextlib.suppress(LinkLost):
            self.link.notify("stop")

    async def cancel(self) -> None:
        """See `Seat`."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(self.link.request("cancel")), GRACE)
        except TimeoutError:
            self.process.kill()
        except LinkLost:
            pass

    def death(self) -> str:
        """How it died, in words."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return f"process {self.process.pid} closed its socket and was killed"
        if code >= 0:
            return f"process {self.process.pid} exited with code {code}"
        guess = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"process {self.process.pid} was ended by {signal.Signals(-code).name}{guess}"

    def end(self) -> None:
        """Waits until it has ended, and kills it when that takes too long."""
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.link.close()


def _standard_error() -> int:
    try:
        os.fstat(2)
    except OSError:  # closed by who started us
        return subprocess.DEVNULL
    return 2


# -- the worker's own side -------------------------------------------------------------------------------------


class _Child:
    """Serves its parent on one socket, until that ends."""

    def __init__(self, end: socket.socket) -> None:
        self.link = Link(end, self._serve, self._ended)
        self.station: Station | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def work(self) -> None:
        """Returns when the parent says so, or has gone."""
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self.link.start()
        await self._over.wait()
        await self._cancel()
        if self.station is not None:
            await self.station.aclose()

    def _serve(self, do: str, args: Mapping[str, Any], reply: Reply) -> None:
        """On the reading thread: all but counting goes to the event loop."""
        if do == "count":
            reply.end(self._station.count(args["role"], args["call"]))
            return
        served: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
            "setup": self._setup,
            "begin": self._begin,
            "measure": self._measure,
            "stop": self._stop,
            "cancel": self._settle,
            "exit": self._exit,
        }
        self._loop.call_soon_threadsafe(self._run, do == "measure", served[do](reply, **args), reply)

    def _run(self, cancellable: bool, work: Coroutine[Any, Any, None], reply: Reply) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # the parent asked for it, so it is told
                reply.fail(error)

        task = self._loop.create_task(guarded())
        kept = self._tasks if cancellable else _FOREVER
        kept.add(task)
        task.add_done_callback(kept.discard)

    def _ended(self) -> None:
        """The parent has gone: what is in flight is settled, and then, at the latest, this process ends."""
        timer = threading.Timer(GRACE, os._exit, (1,))
        timer.daemon = True
        timer.start()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._over.set)

    @property
    def _station(self) -> Station:
        if self.station is None:
            raise InvalidInput("the worker has no engines yet")
        return self.station

    async def _setup(self, reply: Reply, specs: Any, prices: Any, threads: int) -> None:
        self.station = await asyncio.to_thread(Station, specs, prices, threads)
        reply.end(self.station.describe())

    async def _begin(self, reply: Reply, run: Any) -> None:
        await asyncio.to_thread(self._station.begin, run, _LinkTeller(self.link))
        reply.end()

    async def _measure(self, reply: Reply, example: Any) -> None:
        async with contextlib.aclosing(self._station.measure(example)) as parts:
            async for part in parts:
                reply.part(part)
        reply.end()

    async def _stop(self, reply: Reply) -> None:
        self._station.stop()

    async def _settle(self, reply: Reply) -> None:
        await self._cancel()
        if self.station is not None:
            await self.station.settled()
        reply.end()

    async def _exit(self, reply: Reply) -> None:
        self._over.set()

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_FOREVER: set[asyncio.Task[None]] = set()
"""Tasks that only the end of the process ends; a task that nobody refers to may vanish."""


class _LinkTeller:
    """The bank at the other end of the link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def ask(self, do: str, **args: Any) -> Any:
        """See `Teller`."""
        return self._link.request(do, **args).result()

    def tell(self, do: str, **args: Any) -> None:
        """See `Teller`."""
        with contextlib.suppress(LinkLost):  # the process is about to end
            self._link.notify(do, **args)

    def start(self, do: str, **args: Any) -> Future[Any]:
        """See `Teller`."""
        return self._link.request(do, **args)


def main(descriptor: int) -> None:
    """A worker process, with its parent at the other end of the socket."""
    end = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)  # no grandchild keeps it open
    asyncio.run(_Child(end).work())


if __name__ == "__main__":
    main(int(sys.argv[1]))
