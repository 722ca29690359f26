"""Workers on a Ray cluster: `thrifty frontier --ray ADDRESS`.

    with RayCluster("auto", {"answer": "local:/models/m"}, 4) as fleet:
        study(items, fleet.engines, "out", fleet=fleet)

Engines are actors, spread over the nodes; examples are streams of an actor's results; this process (the driver) writes
the one store. A bank actor on the driver's node keeps the run's account and is the writer of its ledger file, so a
worker's entry is committed there before its example goes on. Ray pickles what crosses, and only our own JSON and these
two classes, by their names, do. Every node needs thrifty, its methods, the models' files, and the keys of servers in
its environment: none of them is sent.

This module imports ray only when a cluster is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from thrifty.bench.bank import Bank, account_of, entry_of, state_of
from thrifty.bench.fanout import START_SECONDS, Fleet, Seat, WorkerLost, check_same, stand_ins
from thrifty.bench.faults import error_of, fault_of
from thrifty.bench.station import Station, wire_of
from thrifty.budget import Account
from thrifty.engines.spec import read
from thrifty.errors import EngineError, InvalidInput
from thrifty.meter.prices import PriceTable
from thrifty.spend import Spend

if TYPE_CHECKING:
    from thrifty.ledger.memory import MemoryLedger

CONNECT_SECONDS = 10.0
"""Longest wait for the head of the cluster to be reached."""

GRACE = 10.0
"""Seconds in which a worker settles what is in flight, before it is killed."""


class RayCluster(Fleet):
    """So many workers on a cluster, each an actor with its own engines."""

    def __init__(
        self, address: str, specs: Mapping[str, str], size: int | None = None, *, prices: PriceTable | None = None
    ) -> None:
        """Joins the cluster and starts the workers; returns when the first has loaded its engines. `size` defaults to
        the number of its GPUs where an engine is local and it has any, else of its nodes.

        Raises InvalidInput where ray is not installed, for a `ray://` address, and for more workers than fit;
        EngineError when the cluster cannot be reached or a worker cannot start."""
        self._ray, self._joined = _join(address)
        self._closed = False
        self._bank: Any = None
        self._account: Account | None = None
        self._workers: dict[int, _Worker] = {}
        self._started = 0
        try:
            self.size, self._share = _shares(self._ray, specs, size)
            self._setup = (dict(specs), None if prices is None else wire_of(prices), int(self._share["num_cpus"]))
            for number in range(self.size):
                self._start(number)
            first = self._workers[0]
            try:
                described = self._ray.get(first.ready, timeout=START_SECONDS)
            except self._ray.exceptions.GetTimeoutError:
                raise EngineError(f"no worker was ready within {START_SECONDS:.0f} s: {self.needs()}") from None
            except self._ray.exceptions.RayError as error:
                raise EngineError(f"a worker on the cluster died while it loaded its engines: {_line(error)}") from None
            self._described: Mapping[str, Any] = _open(described)
        except BaseException:
            self.close()
            raise
        self.engines = stand_ins(self._described, self._count)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, on their own nodes."""
        return [self._ray.get(worker.actor.pid.remote()) for worker in self._workers.values()]

    async def open(self, account: Account) -> Mapping[str, Any]:
        """See `Fleet`: the bank actor takes the account over until `paid`."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        path = getattr(account.ledger, "path", None)
        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        kept = "file" if path is not None else "memory" if account.ledger is not None else "none"
        self._account = account
        self._bank = (
            self._ray.remote(_BankActor)
            .options(num_cpus=0, scheduling_strategy=here)
            .remote(state_of(account), None if path is None else str(path), kept)
        )
        await self._at_bank("paid")
        return {"ledger": None, "booked": account.ledger is not None}

    def needs(self) -> str:
        """See `Fleet`."""
        share = " and ".join(f"{amount:g} {name[4:-1].upper()}" for name, amount in self._share.items())
        return f"each needs {share} of one node: free that on the cluster"

    async def paid(self) -> Spend:
        """See `Fleet`: what the bank actor settled is settled on the account here."""
        account, self._account = self._account, None
        if account is None:
            return Spend()
        told = await self._at_bank("close")
        bank, self._bank = self._bank, None
        self._ray.kill(bank)
        spend = Spend.from_dict(told["spend"])
        with account._lock:
            account._settle({}, {i: amount for i, amount in told["settled"]}, told["seconds"])
        for entry in told["entries"]:
            if account.ledger is not None:
                account.ledger.append(entry_of(entry))
        return spend

    async def seat(self, number: int, run: Mapping[str, Any]) -> Seat:
        """See `Fleet`."""
        worker = self._workers[number]
        if worker.lost:
            await self._at_bank("lost", worker.name)
            worker = self._start(number)
        try:
            described = _open(await _value(worker.ready))
            check_same(self._described, described, worker.name)
            _open(await _value(worker.actor.begin.remote(dict(run), worker.name, self._bank)))
        except self._ray.exceptions.RayError as error:
            raise worker.died(error) from None
        return worker

    def close(self) -> None:
        """See `Fleet`: ends the actors, and leaves the cluster if this object joined it."""
        if self._closed:
            return
        self._closed = True
        actors = [worker.actor for worker in self._workers.values()]
        with contextlib.suppress(Exception):  # a cluster that has gone: there is nothing left to end
            placed = [w.actor for w in self._workers.values() if not w.lost and self._ray.wait([w.ready], timeout=0)[0]]
            if placed:
                self._ray.wait([a.close.remote() for a in placed], num_returns=len(placed), timeout=GRACE)
        for actor in [*actors, *([] if self._bank is None else [self._bank])]:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        if self._joined:
            self._ray.shutdown()

    # -- details ---------------------------------------------------------------------------------------------

    def _start(self, number: int) -> _Worker:
        self._started += 1
        actor = self._ray.remote(_Actor).options(scheduling_strategy="SPREAD", max_restarts=0, **self._share).remote()
        worker = _Worker(self._ray, f"{number}.{self._started}", actor, actor.setup.remote(*self._setup))
        self._workers[number] = worker
        return worker

    async def _at_bank(self, do: str, *args: Any) -> Any:
        try:
            return _open(await _value(getattr(self._bank, do).remote(*args)))
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                f"the actor that keeps the run's account died: {_line(error)}; run the same command again"
            ) from None

    def _count(self, role: str, call: Mapping[str, Any]) -> int:
        try:
            return int(_open(self._ray.get(self._workers[0].actor.count.remote(role, dict(call)))))
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"the worker that counts tokens died: {_line(error)}") from None


class _Worker:
    """The driver's side of one actor; a Seat."""

    def __init__(self, ray: Any, name: str, actor: Any, ready: Any) -> None:
        self._ray, self.name, self.actor, self.ready = ray, name, actor, ready
        self.lost = False

    async def measure(self, example: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """See `Seat`."""
        stream = self.actor.measure.options(num_returns="streaming").remote(dict(example))
        try:
            async for reference in stream:
                yield await reference
        except self._ray.exceptions.RayError as error:
            raise self.died(error) from None

    def stop(self) -> None:
        """See `Seat`."""
        self.actor.stop.remote()

    async def cancel(self) -> None:
        """See `Seat`."""
        with contextlib.suppress(TimeoutError, self._ray.exceptions.RayError):
            await asyncio.wait_for(_value(self.actor.cancel.remote()), GRACE)

    def died(self, error: BaseException) -> WorkerLost:
        """The actor, or its node, is out of reach: nothing of it may go on."""
        self.lost = True
        with contextlib.suppress(Exception):
            self._ray.kill(self.actor)
        return WorkerLost(_line(error))


# -- actors: these run on the cluster --------------------------------------------------------------------------


class _Actor:
    """A station on a node. What it raises crosses as a fault: Ray would pickle the error."""

    def __init__(self) -> None:
        self._station: Station | None = None
        self._running: set[asyncio.Task[Any]] = set()

    async def setup(self, specs: Mapping[str, str], prices: Mapping[str, Any] | None, threads: int) -> Any:
        try:
            self._station = await asyncio.to_thread(Station, specs, prices, threads)
            return {"end": self._station.describe()}
        except Exception as error:
            return {"fault": fault_of(error)}

    async def begin(self, run: Mapping[str, Any], name: str, bank: Any) -> Any:
        try:
            self._own.begin(run, _RayTeller(name, bank))
            return {"end": None}
        except Exception as error:
            return {"fault": fault_of(error)}

    async def count(self, role: str, call: Mapping[str, Any]) -> Any:
        try:
            return {"end": self._own.count(role, call)}
        except Exception as error:
            return {"fault": fault_of(error)}

    async def measure(self, example: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        parts: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()

        async def work() -> None:
            try:
                async with contextlib.aclosing(self._own.measure(example)) as found:
                    async for part in found:
                        parts.put_nowait(part)
            except Exception as error:
                parts.put_nowait({"fault": fault_of(error)})
            finally:
                parts.put_nowait(None)

        task = asyncio.create_task(work())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        while (part := await parts.get()) is not None:
            yield part

    async def stop(self) -> None:
        self._own.stop()

    async def cancel(self) -> Any:
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._station is not None:
            with contextlib.suppress(Exception):  # the bank has gone: who waits for it is told by its own call
                await self._station.settled()
        return {"end": None}

    async def close(self) -> Any:
        await self.cancel()
        if self._station is not None:
            await self._station.aclose()
        return {"end": None}

    async def pid(self) -> int:
        return os.getpid()

    @property
    def _own(self) -> Station:
        if self._station is None:
            raise InvalidInput("the worker has no engines yet")
        return self._station


class _BankActor:
    """The run's account and ledger, for workers on every node. One call at a time, in the order of each caller."""

    def __init__(self, state: Mapping[str, Any], ledger: str | None, kept: str) -> None:
        from thrifty.ledger import open_ledger

        self._memory: MemoryLedger | None = open_ledger(None) if kept == "memory" else None
        self._file = None if ledger is None else open_ledger(ledger)
        self._bank = Bank(account_of(state, self._memory if self._file is None else self._file))
        self._before = list(self._bank.account._settled)

    def serve(self, worker: str, do: str, args: Mapping[str, Any]) -> Any:
        try:
            return {"end": self._bank.serve(worker, do, args)}
        except Exception as error:
            return {"fault": fault_of(error)}

    def lost(self, worker: str) -> Any:
        self._bank.lost(worker)
        return {"end": None}

    def paid(self) -> Any:
        return {"end": self._bank.paid.to_dict()}

    def close(self) -> Any:
        account = self._bank.account
        for worker in list(self._bank.workers):
            self._bank.lost(worker)
        settled = [[i, n - b] for i, (n, b) in enumerate(zip(account._settled, self._before, strict=True)) if n != b]
        entries = [] if self._memory is None else [asdict(entry) for entry in self._memory.entries()]
        if self._file is not None:
            self._file.close()
        spend = self._bank.paid.to_dict()
        return {"end": {"spend": spend, "settled": settled, "seconds": account.work.engine_seconds, "entries": entries}}


class _RayTeller:
    """The bank actor, from a worker. Waiting happens on a thread of its own: Ray forbids it on an actor's loop."""

    def __init__(self, name: str, bank: Any) -> None:
        self._name, self._bank = name, bank

    def ask(self, do: str, **args: Any) -> Any:
        """See `Teller`."""
        return self.start(do, **args).result()

    def tell(self, do: str, **args: Any) -> None:
        """See `Teller`."""
        self._bank.serve.remote(self._name, do, args)

    def start(self, do: str, **args: Any) -> Future[Any]:
        """See `Teller`."""
        reply: Future[Any] = Future()

        def wait(reference: Any) -> None:
            import ray

            try:
                reply.set_result(_open(ray.get(reference)))
            except BaseException as error:
                reply.set_exception(error)

        reply.set_running_or_notify_cancel()
        threading.Thread(target=wait, args=(self._bank.serve.remote(self._name, do, args),), daemon=True).start()
        return reply


# -- details -----------------------------------------------------------------------------------------------------


def _join(address: str) -> tuple[Any, bool]:
    """Ray, connected; and whether it was connected by us."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InvalidInput("--ray needs its extra: pip install 'thrifty[ray]'") from error
    if "://" in address:
        raise InvalidInput(
            f"--ray {address}: no Ray client: run on a machine of the cluster and give auto, or HOST:PORT of its head"
        )
    if ray.is_initialized():
        return ray, False
    try:
        host, _, port = _found(address).rpartition(":")
        if host and port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError, OverflowError) as error:
        raise EngineError(f"--ray {address}: no cluster could be reached: {_line(error)}") from error
    return ray, True


def _found(address: str) -> str:
    """The address that Ray means by `auto`: it may be that of a cluster which has ended, from a file or a cache."""
    if address != "auto":
        return address
    try:
        from ray._private.services import canonicalize_bootstrap_address_or_die
    except ImportError:  # no public call says it; without, a lost cluster is told minutes later
        return address
    return str(canonicalize_bootstrap_address_or_die(address))


def _shares(ray: Any, specs: Mapping[str, str], size: int | None) -> tuple[int, dict[str, float]]:
    """How many workers, and what each takes of its node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise InvalidInput("--ray: the cluster has no node with a CPU for a worker: start one with --num-cpus")
    local = any(read(spec)[0] == "local" for spec in specs.values())
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if local else 0
    fits = gpus or int(sum(node["CPU"] for node in nodes))
    wanted = size if size is not None else gpus or len(nodes)
    if not 1 <= wanted <= fits:
        raise InvalidInput(
            f"--workers {wanted}: from 1 to {fits} fit on the cluster, one a {'GPU' if gpus else 'CPU'}: give fewer"
        )
    each = -(-wanted // len(nodes))
    cpus = max(1, int(min(node["CPU"] for node in nodes)) // each)
    return wanted, {"num_cpus": cpus, **({"num_gpus": 1} if gpus else {})}


async def _value(reference: Any) -> Any:
    return await reference


def _open(told: Mapping[str, Any]) -> Any:
    if "fault" in told:
        raise error_of(told["fault"])
    return told["end"]


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] + ("..." if len(text) > 300 else "") or type(error).__name__
