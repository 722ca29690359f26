"""One worker: engines built here from their specifications, and examples measured on them.

A station is the same in a worker process and in an actor of a cluster; only the way in differs. What comes in and
goes out is JSON: specifications, plans in TOML, tasks, results. Engines are never sent."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from thrifty.bench.bank import BankLedger, Leased, Teller
from thrifty.bench.cache import GenerationCache
from thrifty.bench.faults import fault_of
from thrifty.bench.measure import Job, Measured, Setting, measure, used_up
from thrifty.bench.scoring import score
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Call, Sampling
from thrifty.engine import Engine
from thrifty.engines.spec import resolve_roles
from thrifty.errors import InvalidInput
from thrifty.meter.prices import PriceTable, Rate
from thrifty.plan import Plan


class Station:
    """A worker's engines. `begin` a run before `measure`."""

    def __init__(self, specs: Mapping[str, str], prices: Mapping[str, Any] | None, threads: int) -> None:
        """Loads the engines. Raises what `thrifty.engines.spec.resolve` raises."""
        self.engines: dict[str, Engine] = resolve_roles(specs, prices=None if prices is None else table_of(prices))
        if "torch" in sys.modules:  # an engine has brought it in
            sys.modules["torch"].set_num_threads(threads)
        self._ledger: Any = None
        self._ledger_path: str | None = None
        self._teller: Teller | None = None
        self._plans: dict[str, Plan] = {}
        self._stopped = False

    def describe(self) -> dict[str, dict[str, Any]]:
        """What a run must know of the engines, by role."""
        return {
            role: {
                "name": engine.name,
                "model": engine.model,
                "dtype": engine.dtype,
                "capabilities": sorted(engine.capabilities),
                "identity": dict(engine.identity()),
            }
            for role, engine in self.engines.items()
        }

    def count(self, role: str, call: Mapping[str, Any]) -> int:
        """Input tokens of a call: its messages as rendered, its tools, its prefix."""
        asked = Call(tuple(call["messages"]), Account("count"), tools=tuple(call["tools"]), prefix=call["prefix"])
        return self.engines[role].count(asked)

    def begin(self, run: Mapping[str, Any], teller: Teller) -> None:
        """Takes up a run: its plans, its setting, its account. Raises InvalidInput for a plan that means something
        else here."""
        self._plans, self._teller = {}, teller
        for plan_hash, toml in run["plans"].items():
            plan = Plan.from_toml(toml)
            if plan.hash != plan_hash:
                raise InvalidInput(
                    f"plan {plan.name!r} means something else in a worker: install the same methods there and here"
                )
            self._plans[plan_hash] = plan
        sampling = {**run["sampling"], "stop": tuple(run["sampling"]["stop"])}
        self._setting = Setting(run["suite"], Sampling(**sampling), run["keep_text"], run["unsafe"])
        self._score = partial(score, unsafe=run["unsafe"])
        self._account = Leased.open(run["account"], self._open_ledger(run, teller), teller, run["limited"])
        self._turns = asyncio.Semaphore(run["turns"])
        self._stopped = False

    async def measure(self, example: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Results of one example as they come, then how many generations its plans shared. An error is the last
        part. Leaving it cancels what is in flight, which settles what was produced."""
        cache = GenerationCache()
        tasks = [asyncio.create_task(self._one(job, cache)) for job in self._jobs(example)]
        try:
            for done in asyncio.as_completed(tasks):
                measured = await done
                if measured is not None:
                    yield _part(measured)
            await self._told()
            yield {"shared": cache.hits}
        except Exception as error:  # whoever asked raises it
            yield {"fault": fault_of(error)}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """What is in flight ends, nothing new starts."""
        self._stopped = True

    async def settled(self) -> None:
        """Returns when all that was settled is committed and told: after a cancellation, which waits for neither."""
        if self._ledger_path is not None:
            await asyncio.to_thread(self._ledger.flush)
        await self._told()

    async def aclose(self) -> None:
        """Closes the engines and the ledger."""
        for engine in {id(e): e for e in self.engines.values()}.values():
            await engine.aclose()
        if self._ledger_path is not None:
            self._ledger_path, ledger = None, self._ledger
            await asyncio.to_thread(ledger.close)

    # -- details ---------------------------------------------------------------------------------------------

    async def _told(self) -> None:
        """Returns when the bank has heard all that this worker told: a run may close it after the last result."""
        if self._teller is not None:
            await asyncio.wrap_future(self._teller.start("sync"))

    def _open_ledger(self, run: Mapping[str, Any], teller: Teller) -> Any:
        path = run["ledger"]
        if path is None:
            return BankLedger(teller) if run["booked"] else None
        if path != self._ledger_path:
            from thrifty.ledger import open_ledger

            self._ledger, self._ledger_path = open_ledger(path), path
        return self._ledger

    def _jobs(self, example: Mapping[str, Any]) -> list[Job]:
        task = Task.from_dict(example["task"])
        return [
            Job(key, self._plans[plan], engine, task, example["task_hash"], example["seed"], example["sample"])
            for key, plan, engine in example["jobs"]
        ]

    async def _one(self, job: Job, cache: GenerationCache) -> Measured | None:
        async with self._turns:
            if self._stopped:
                return None
            refused = used_up(self._account)
            measured = (
                Measured(None, refused)
                if refused is not None
                else await measure(job, cache, self.engines, self._account, self._setting, self._score)
            )
            self._stopped = self._stopped or measured.result is None
            return measured


def _part(measured: Measured) -> dict[str, Any]:
    return {
        "result": None if measured.result is None else measured.result.to_dict(),
        "refused": measured.refused,
        "paid": measured.paid.to_dict(),
    }


def limit_threads(threads: int) -> dict[str, str]:
    """The environment of a worker that may use so many threads; a lower setting of the user's stays."""
    found = {}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        own = os.environ.get(name, "")
        found[name] = str(min(threads, int(own)) if own.isdigit() and int(own) else threads)
    return found


# -- price tables as JSON ------------------------------------------------------------------------------------


def wire_of(table: PriceTable) -> dict[str, Any]:
    """A price table as JSON, exact."""

    def rate(rate: Rate) -> list[str]:
        return [str(rate.input), str(rate.cached), str(rate.output)]

    return {
        "name": table.name,
        "date": table.date,
        "models": {name: rate(r) for name, r in table.models.items()},
        "roles": {name: rate(r) for name, r in table.roles.items()},
        "default": None if table.default is None else rate(table.default),
    }


def table_of(wire: Mapping[str, Any]) -> PriceTable:
    """The opposite of `wire_of`."""

    def rate(texts: Sequence[str]) -> Rate:
        return Rate(*(Decimal(text) for text in texts))

    return PriceTable(
        wire["name"],
        wire["date"],
        {name: rate(r) for name, r in wire["models"].items()},
        {name: rate(r) for name, r in wire["roles"].items()},
        None if wire["default"] is None else rate(wire["default"]),
    )
