"""Speed of accounts and of the ledger, through the public interface.

    python benchmarks/ledger.py [--json] [--repeats 15] [--durability process|power]

Prints, as medians with the interval of the repeats' middle 90%:
- hold + settle on the third level of accounts, in microseconds: without a ledger, and with one in memory;
- entries a second into a new SQLite ledger, hashing included, until the last is committed: appended from one thread,
  and held and settled (`settle_async`) by many coroutines;
- the processor time that an entry takes, which on a shared machine says more than the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from thrifty.budget import Account, Budget
from thrifty.ledger import Entry, Labels, Ledger, open_ledger, verify
from thrifty.spend import Spend, Work

ASK = Spend(input=120, output=64, calls=1, usd=376_000)
ACTUAL = Spend(input=120, output=40, calls=1, usd=280_000)
WORK = Work(prefill=120, kv_reads=900_000, target_passes=41, engine_seconds=0.731)
LABELS = Labels("f3a91c7d5e20b846", "", "local", "smollm2", "answer", "local 2026-11-01")
LIMIT = 10**15


def leaf(ledger: Ledger | None) -> Account:
    """The third level of a tree whose levels all have limits."""
    root = Account("team", Budget(tokens=LIMIT, usd=LIMIT), ledger=ledger)
    return root.child("project", Budget(output=LIMIT)).child("run", Budget(tokens=LIMIT, calls=LIMIT))


def in_memory(ledger: bool, count: int = 5_000) -> tuple[float, float]:
    """Microseconds of clock and of processor for one hold and its settlement."""
    account = leaf(open_ledger() if ledger else None)
    start, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        account.hold(ASK, labels=LABELS).settle(ACTUAL, WORK)
    return (time.perf_counter() - start) / count * 1e6, (time.process_time() - used) / count * 1e6


def appended(path: Path, durability: str, count: int) -> tuple[float, float]:
    """Entries a second and microseconds of processor an entry, appended from one thread."""
    with open_ledger(path, durability=durability) as ledger:  # type: ignore[call-overload]
        start, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            ticket = ledger.append(Entry("team/project/run", 1, time.time_ns(), ACTUAL, WORK, LABELS))
        ticket.wait()
        return count / (time.perf_counter() - start), (time.process_time() - used) / count * 1e6


def settled(path: Path, durability: str, count: int, tasks: int) -> tuple[float, float]:
    """The same for coroutines that hold, settle and wait for the commit, each entry after the other."""

    async def work(account: Account) -> None:
        for _ in range(count // tasks):
            await account.hold(ASK, labels=LABELS).settle_async(ACTUAL, WORK)

    async def run(account: Account) -> tuple[float, float]:
        start, used = time.perf_counter(), time.process_time()
        await asyncio.gather(*(work(account) for _ in range(tasks)))
        return count / (time.perf_counter() - start), (time.process_time() - used) / count * 1e6

    with open_ledger(path, durability=durability) as ledger:  # type: ignore[call-overload]
        return asyncio.run(run(leaf(ledger)))


def repeat(measure: Callable[[Path], tuple[float, float]], repeats: int) -> dict[str, list[float]]:
    """Median and middle 90% of each of the two figures, over repeats with a new file each."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats + 1):
            found.append(measure(Path(folder) / f"{number}.db"))
    figures = list(zip(*found[1:], strict=True))  # the first one warms up
    return {name: spread(list(values)) for name, values in zip(("value", "cpu_us"), figures, strict=True)}


def spread(values: list[float]) -> list[float]:
    """Median, and the 5th and 95th percentile."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return [round(x, 3) for x in (statistics.median(values), cuts[0], cuts[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of accounts and of the ledger.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--entries", type=int, default=40_000)
    parser.add_argument("--tasks", type=int, default=4_000)
    parser.add_argument("--durability", choices=["process", "power"], default="process")
    given = parser.parse_args()
    level, count, n = given.durability, given.entries, given.repeats
    results = {
        "hold + settle, no ledger, us": repeat(lambda _: in_memory(False), n),
        "hold + settle, memory ledger, us": repeat(lambda _: in_memory(True), n),
        "append, SQLite, entries/s": repeat(lambda path: appended(path, level, count), n),
        "hold + settle_async, SQLite, entries/s": repeat(lambda path: settled(path, level, count, given.tasks), n),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checked.db"
        settled(path, level, given.tasks * 2, given.tasks)
        report = verify(path)
        if not report.ok or report.entries != given.tasks * 2:
            raise SystemExit(f"the ledger that was timed does not verify: {report.problems[:3]}")
    if given.json:
        machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
        print(json.dumps({"machine": machine, "durability": level, "repeats": n, "results": results}, indent=1))
        return
    print(f"{n} repeats, durability {level}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    for name, figures in results.items():
        value, low, high = figures["value"]
        print(f"{name:40} {value:>12,.1f}   [{low:,.1f}, {high:,.1f}]   {figures['cpu_us'][0]:.1f} us of processor")


if __name__ == "__main__":
    main()
