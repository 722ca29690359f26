"""Real worker processes: the same results, killed workers, killed parents, Ctrl-C, one budget."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import thrifty
from thrifty import Account, Budget, EngineError, InvalidInput, Plan
from thrifty.bench.run import Outcome, run
from thrifty.bench.store import Store, read
from thrifty.bench.task import Task, save
from thrifty.bench.workers import Processes
from thrifty.engines.spec import resolve_roles
from thrifty.ledger import open_ledger, verify
from thrifty.ledger.memory import MemoryLedger
from thrifty.meter.prices import PriceTable
from thrifty.spend import total_spend

SPECS = {"answer": "scripted:echo"}
PLANS = (
    Plan.from_toml('name = "plain"'),
    Plan.from_toml('name = "asked"\n[[methods]]\nuse = "budget-prompt"\nwords = 5'),
)


def tasks(n: int, words: int = 1) -> list[Task]:
    """The echo says the question, so every third answer is wrong; the more words, the longer it takes."""
    return [
        Task.from_dict(
            {
                "id": str(i),
                "prompt": f"{'word ' * words}say the number {i}",
                "gold": str(i if i % 3 else 7000),
                "scorer": "numeric",
                "max_tokens": words + 20,
            }
        )
        for i in range(n)
    ]


def facts(path: Path) -> dict[str, Any]:
    """What must not depend on who measured."""
    return {r.key: (r.plan, r.task, r.score, r.finish, r.spend, r.work, r.receipts, r.text) for r in read(path).results}


def keys(path: Path) -> list[str]:
    return [row["key"] for row in map(json.loads, path.read_text().splitlines()) if "key" in row]


async def measured(path: Path, fleet: Processes | None = None, n: int = 8, words: int = 1, **options: Any) -> Outcome:
    engines = resolve_roles(SPECS) if fleet is None else fleet.engines
    with Store(path) as store:
        return await run(PLANS, tasks(n, words), engines, store, fleet=fleet, keep_text=True, **options)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Processes]:
    with Processes(SPECS, 2) as made:
        yield made


# -- the same run --------------------------------------------------------------------------------------------


async def test_processes_give_the_results_of_one_process(tmp_path: Path, fleet: Processes) -> None:
    one = await measured(tmp_path / "one.jsonl", seeds=(0, 1))
    account = Account("bench")
    many = await measured(tmp_path / "many.jsonl", fleet, seeds=(0, 1), account=account)
    assert len(set(fleet.pids)) == 2 and os.getpid() not in fleet.pids
    assert facts(tmp_path / "many.jsonl") == facts(tmp_path / "one.jsonl")
    assert len(keys(tmp_path / "many.jsonl")) == 32 and many.complete
    assert (many.spend, many.incurred, many.shared) == (one.spend, one.incurred, one.shared)
    assert account.settled == one.incurred
    heads = [read(tmp_path / name).heads[0] for name in ("one.jsonl", "many.jsonl")]
    assert heads[0]["engines"] == heads[1]["engines"] and heads[0]["engine"] == heads[1]["engine"]


async def test_every_worker_is_a_writer_of_the_ledger_file(tmp_path: Path, fleet: Processes) -> None:
    with open_ledger(tmp_path / "ledger.db") as book:
        account = Account("bench", ledger=book)
        await measured(tmp_path / "r.jsonl", fleet, account=account)
        entries = list(book.entries())
        assert total_spend(e.spend for e in entries) == account.settled
        assert {e.labels.plan for e in entries} == {plan.hash for plan in PLANS}
        assert {e.account for e in entries} == {"bench"}
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as file:
        writers = dict(file.execute("SELECT pid, seq FROM chains").fetchall())
    assert writers.pop(os.getpid()) == 0, "the parent writes nothing"
    assert set(writers) <= set(fleet.pids) and sum(writers.values()) == 16
    assert verify(tmp_path / "ledger.db").ok


async def test_a_ledger_in_memory_gets_the_entries_too(tmp_path: Path, fleet: Processes) -> None:
    book = MemoryLedger()
    account = Account("bench", ledger=book)
    await measured(tmp_path / "r.jsonl", fleet, account=account)
    assert len(book) == 16 and total_spend(e.spend for e in book.entries()) == account.settled


@pytest.mark.parametrize("limit", [0, 40, 150])
async def test_processes_stay_within_the_runs_budget(tmp_path: Path, fleet: Processes, limit: int) -> None:
    with open_ledger(tmp_path / "ledger.db") as book:
        account = Account("bench", Budget(tokens=limit), ledger=book)
        outcome = await measured(tmp_path / "r.jsonl", fleet, account=account)
        assert outcome.stopped is not None and "tokens" in outcome.stopped and not outcome.complete
        assert account.settled.tokens <= limit and account.overdraft == {} and account.held == {}
        assert total_spend(e.spend for e in book.entries()) == account.settled == outcome.incurred
    assert (await measured(tmp_path / "r.jsonl", fleet)).complete
    await measured(tmp_path / "whole.jsonl")
    assert facts(tmp_path / "r.jsonl") == facts(tmp_path / "whole.jsonl")


def test_prices_reach_the_workers(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text('name = "mine"\ndate = "2026-01-01"\n[models.scripted]\ninput = 1000\noutput = 3000\n')
    table = PriceTable.from_toml(file)
    plain = tmp_path / "one.jsonl"
    with Store(plain) as store:
        one = asyncio.run(run(PLANS, tasks(2), resolve_roles(SPECS, prices=table), store))
    with Processes(SPECS, 1, prices=table) as workers:
        many = asyncio.run(measured(tmp_path / "many.jsonl", workers, n=2))
    assert many.spend == one.spend and many.spend.usd > 1_000_000


# -- deaths --------------------------------------------------------------------------------------------------


async def test_a_worker_that_is_killed_in_mid_run_is_replaced(tmp_path: Path) -> None:
    path, ledger = tmp_path / "r.jsonl", tmp_path / "ledger.db"
    with Processes(SPECS, 2) as workers, open_ledger(ledger) as book:
        before = workers.pids
        account = Account("bench", Budget(tokens=1_000_000), ledger=book)
        running = asyncio.create_task(measured(path, workers, n=40, words=400, account=account))
        while _entries_of(ledger, before[1]) < 6:
            assert not running.done()
            await asyncio.sleep(0.005)
        os.kill(before[1], signal.SIGKILL)
        outcome = await running
        after = workers.pids
        assert before[0] in after and before[1] not in after and len(after) == 2
        entries = list(book.entries())
        paid = total_spend(entry.spend for entry in entries)
        assert paid.calls >= 80 and book.holds() == {}
        # a local engine's holds are in memory: what the dead had only held is on the account, not in the ledger
        assert outcome.incurred == account.settled
        assert paid.tokens <= account.settled.tokens <= 1_000_000
        assert account.held == {} and account.overdraft == {}
    await measured(tmp_path / "one.jsonl", n=40, words=400)
    assert outcome.complete and outcome.done == 80
    assert "a worker died and the work went on (process" in outcome.line() and "SIGKILL" in outcome.lost[0]
    assert len(keys(path)) == len(set(keys(path))) == 80
    assert facts(path) == facts(tmp_path / "one.jsonl")
    assert verify(ledger).ok


def _entries_of(ledger: Path, pid: int) -> int:
    with contextlib.closing(sqlite3.connect(ledger)) as file:
        return sum(seq for (seq,) in file.execute("SELECT seq FROM chains WHERE pid = ?", (pid,)))


async def test_workers_that_keep_dying_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Processes(SPECS, 1) as workers:
        running = asyncio.create_task(measured(path, workers, n=1, words=200_000))
        killed: set[int] = set()
        while not running.done():
            for pid in set(workers.pids) - killed:
                await asyncio.sleep(0.3)
                killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match=r"3 workers died while .*SIGKILL \(out of memory\?\)"):
            await running
        assert 3 <= len(killed) <= 9, "three on the example, and fewer than three in a row before it"


async def test_cancelling_a_run_settles_it_and_keeps_the_workers(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Processes(SPECS, 2) as workers, open_ledger(tmp_path / "ledger.db") as book:
        pids = workers.pids
        account = Account("bench", Budget(tokens=10_000_000), ledger=book)
        running = asyncio.create_task(measured(path, workers, n=20, words=2000, account=account))
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            assert not running.done()
            await asyncio.sleep(0.005)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert account.held == {}
        assert total_spend(entry.spend for entry in book.entries()) == account.settled
        assert (await measured(path, workers, n=20, words=2000)).complete
        assert workers.pids == pids


def test_a_stray_file_in_the_folder_is_no_module_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with Processes(SPECS, 1) as workers:
        assert len(workers.pids) == 1


def test_a_bad_engine_is_told_by_the_worker_as_here() -> None:
    with pytest.raises(InvalidInput, match="unknown script 'ecko': did you mean 'echo'"):
        Processes({"answer": "scripted:ecko"}, 2)
    with pytest.raises(InvalidInput, match="0 workers: at least 1"):
        Processes(SPECS, 0)


def test_close_ends_the_workers() -> None:
    workers = Processes(SPECS, 2)
    pids = workers.pids
    workers.close()
    workers.close()
    assert not any(_alive(pid) for pid in pids) and workers.pids == []


# -- the command line ----------------------------------------------------------------------------------------


def frontier(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "thrifty", "frontier", str(folder / "sums.jsonl"), "-m", "scripted:echo",
            "--out", str(folder / "out"), "--workers", "2", *more]  # fmt: skip


def start(folder: Path, n: int, words: int, *more: str) -> subprocess.Popen[str]:
    """`thrifty frontier --workers 2`, in a process group of its own, as a shell starts it."""
    save(tasks(n, words), folder / "sums.jsonl")
    (folder / "plain.toml").write_text('name = "plain"')
    (folder / "asked.toml").write_text('name = "asked"\n[[methods]]\nuse = "budget-prompt"\nwords = 5')
    source = str(Path(thrifty.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    plans = ["--plan", str(folder / "plain.toml"), "--plan", str(folder / "asked.toml")]
    return subprocess.Popen(
        frontier(folder, *plans, *more),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (thread / "children").read_text().split())
    return found


def _alive(pid: int) -> bool:
    """Whether a process runs; one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _started(folder: Path, process: subprocess.Popen[str], lines: int) -> list[int]:
    results = folder / "out" / "results.jsonl"

    def enough() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return results.exists() and results.read_bytes().count(b"\n") >= lines

    wait_until(enough, "no results")
    workers = children(process.pid)
    assert len(workers) == 2
    return workers


def test_ctrl_c_leaves_a_resumable_run_and_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, 30, 1500, "--ledger", str(tmp_path / "ledger.db"))
    workers = _started(tmp_path, process, 5)
    os.killpg(process.pid, signal.SIGINT)  # the terminal interrupts the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command again" in err and "Traceback" not in err
    assert not any(map(_alive, workers))
    kept = keys(tmp_path / "out" / "results.jsonl")
    assert 4 <= len(kept) < 60 and read(tmp_path / "out" / "results.jsonl").torn == 0
    assert verify(tmp_path / "ledger.db").ok
    again = start(tmp_path, 30, 1500, "--json")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert json.loads(out)["complete"] is True, "and nothing but JSON is on standard output"
    assert f"resumed {len(kept)}" in err
    after = keys(tmp_path / "out" / "results.jsonl")
    assert after[: len(kept)] == kept and len(after) == len(set(after)) == 60


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    process = start(tmp_path, 30, 1500)
    workers = _started(tmp_path, process, 3)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(_alive, workers)), "workers outlive their parent", 30)


def test_the_budget_of_the_command_line_is_for_all_workers(tmp_path: Path) -> None:
    process = start(tmp_path, 8, 50, "--budget", "tokens=700", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "tokens" in json.loads(out)["stopped"]
    assert sum(r.incurred.tokens for r in read(tmp_path / "out" / "results.jsonl").results) <= 700
