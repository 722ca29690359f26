"""A real Ray cluster of two nodes on this machine: the same results, a killed worker, a lost node, one budget."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thrifty import Account, Budget, EngineError, InvalidInput, Plan
from thrifty.bench.ray_cluster import RayCluster
from thrifty.bench.run import Outcome, run
from thrifty.bench.store import Store, read
from thrifty.bench.task import Task, save
from thrifty.engines.spec import resolve_roles
from thrifty.ledger import open_ledger, verify
from thrifty.ledger.memory import MemoryLedger
from thrifty.spend import total_spend

SPECS = {"answer": "scripted:echo"}
PLANS = (
    Plan.from_toml('name = "plain"'),
    Plan.from_toml('name = "asked"\n[[methods]]\nuse = "budget-prompt"\nwords = 5'),
)
MEMORY = 80 * 1024**2


def tasks(n: int, words: int) -> list[Task]:
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
    return {r.key: (r.plan, r.task, r.score, r.finish, r.spend, r.work, r.receipts) for r in read(path).results}


async def measured(path: Path, fleet: RayCluster | None = None, n: int = 8, words: int = 1, **options: Any) -> Outcome:
    engines = resolve_roles(SPECS) if fleet is None else fleet.engines
    with Store(path) as store:
        return await run(PLANS, tasks(n, words), engines, store, fleet=fleet, **options)


async def lines(path: Path, count: int, running: asyncio.Task[Outcome]) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert not running.done()
        await asyncio.sleep(0.01)


# -- without a cluster ---------------------------------------------------------------------------------------


def test_ray_is_imported_only_when_a_cluster_is_asked_for() -> None:
    code = "import sys, thrifty.bench, thrifty.bench.ray_cluster, thrifty.cli.app; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_missing_ray_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidInput, match=r"pip install 'thrifty\[ray\]'"):
        RayCluster("auto", SPECS)


@pytest.mark.parametrize(("address", "known"), [("127.0.0.1:1", None), ("auto", None), ("auto", "127.0.0.1:1")])
def test_a_cluster_that_is_not_there_is_told_at_once(
    address: str, known: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`known` is what Ray's files, caches and processes say of this machine: nothing, or a cluster that has ended."""
    pytest.importorskip("ray")
    from ray._private import services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set() if known is None else {known})
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: known)
    begun = time.monotonic()
    with pytest.raises(EngineError, match=f"--ray {address}: no cluster could be reached"):
        RayCluster(address, SPECS)
    assert time.monotonic() - begun < 60  # Ray's own wait is minutes


def test_a_ray_client_is_refused() -> None:
    pytest.importorskip("ray")
    with pytest.raises(InvalidInput, match="no Ray client"):
        RayCluster("ray://127.0.0.1:10001", SPECS)


# -- on a cluster --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU, on loopback, without dashboard or statistics."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
    )
    made.second = made.add_node(num_cpus=1, object_store_memory=MEMORY)
    try:
        yield made
    finally:
        import ray

        ray.shutdown()
        made.shutdown()


@pytest.mark.slow
async def test_a_cluster_gives_the_results_of_one_process(tmp_path: Path, cluster: Any) -> None:
    one = await measured(tmp_path / "one.jsonl")
    with open_ledger(tmp_path / "ledger.db") as book, RayCluster(cluster.address, SPECS) as fleet:
        assert fleet.size == 2 and len(set(fleet.pids)) == 2 and os.getpid() not in fleet.pids
        account = Account("bench", ledger=book)
        many = await measured(tmp_path / "many.jsonl", fleet, account=account)
        entries = list(book.entries())
        memory = MemoryLedger()
        await measured(tmp_path / "again.jsonl", fleet, account=Account("bench", ledger=memory))
        with pytest.raises(InvalidInput, match="unknown scorer 'numerc'"):
            wrong = Task.from_dict({**tasks(1, 1)[0].to_dict(), "scorer": "numerc"})
            with Store(tmp_path / "wrong.jsonl") as store:
                await run(PLANS, [wrong], fleet.engines, store, fleet=fleet)
    assert facts(tmp_path / "many.jsonl") == facts(tmp_path / "one.jsonl") == facts(tmp_path / "again.jsonl")
    assert (many.done, many.spend, many.incurred) == (16, one.spend, one.incurred)
    assert total_spend(e.spend for e in entries) == account.settled == one.incurred and len(entries) == 16
    assert {e.account for e in entries} == {"bench"} and verify(tmp_path / "ledger.db").ok
    assert total_spend(e.spend for e in memory.entries()) == one.incurred


@pytest.mark.slow
async def test_a_cluster_stays_within_the_runs_budget(tmp_path: Path, cluster: Any) -> None:
    with open_ledger(tmp_path / "ledger.db") as book, RayCluster(cluster.address, SPECS) as fleet:
        account = Account("bench", Budget(tokens=150), ledger=book)
        outcome = await measured(tmp_path / "r.jsonl", fleet, account=account)
        assert outcome.stopped is not None and "tokens" in outcome.stopped and 0 < outcome.done < 16
        assert 0 < account.settled.tokens <= 150 and account.held == {} and account.overdraft == {}
        assert total_spend(e.spend for e in book.entries()) == account.settled == outcome.incurred
        assert (await measured(tmp_path / "r.jsonl", fleet)).complete
    await measured(tmp_path / "one.jsonl")
    assert facts(tmp_path / "r.jsonl") == facts(tmp_path / "one.jsonl")


@pytest.mark.slow
def test_what_cannot_run_on_a_cluster_is_told_at_once(cluster: Any) -> None:
    with pytest.raises(InvalidInput, match="unknown script 'ecko': did you mean 'echo'"):
        RayCluster(cluster.address, {"answer": "scripted:ecko"})
    with pytest.raises(InvalidInput, match="--workers 3: from 1 to 2 fit on the cluster, one a CPU"):
        RayCluster(cluster.address, SPECS, 3)


@pytest.mark.slow
def test_the_command_line_measures_on_a_cluster(tmp_path: Path, cluster: Any) -> None:
    save(tasks(6, 5), tmp_path / "sums.jsonl")
    (tmp_path / "plain.toml").write_text('name = "plain"')
    command = [sys.executable, "-m", "thrifty", "frontier", str(tmp_path / "sums.jsonl"), "-m", "scripted:echo"]
    command += ["--plan", str(tmp_path / "plain.toml"), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run([*command, "--ray", cluster.address, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["complete"] is True
    found = read(tmp_path / "out" / "results.jsonl")
    assert [r.score for r in sorted(found.results, key=lambda r: r.task)] == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert found.heads[0]["workers"] == 1


@pytest.mark.slow
async def test_a_worker_killed_in_mid_run_is_replaced(tmp_path: Path, cluster: Any) -> None:
    path = tmp_path / "r.jsonl"
    with open_ledger(tmp_path / "ledger.db") as book, RayCluster(cluster.address, SPECS) as fleet:
        before = await asyncio.to_thread(lambda: fleet.pids)
        account = Account("bench", Budget(tokens=1_000_000), ledger=book)
        running = asyncio.create_task(measured(path, fleet, n=60, words=800, account=account))
        await lines(path, 9, running)
        os.kill(before[1], signal.SIGKILL)
        outcome = await running
        after = await asyncio.to_thread(lambda: fleet.pids)
        assert before[0] in after and before[1] not in after and len(after) == 2
        paid = total_spend(entry.spend for entry in book.entries())
    await measured(tmp_path / "one.jsonl", n=60, words=800)
    assert outcome.complete and outcome.done == 120 and facts(path) == facts(tmp_path / "one.jsonl")
    assert sum(b'"score"' in line for line in path.read_bytes().splitlines()) == 120, "every result is there once"
    assert paid.calls >= 120 and paid.tokens <= account.settled.tokens <= 1_000_000
    assert outcome.incurred == account.settled and account.held == {} and account.overdraft == {}
    assert verify(tmp_path / "ledger.db").ok


@pytest.mark.slow
async def test_a_node_lost_in_mid_run_leaves_its_work_to_the_others(tmp_path: Path, cluster: Any) -> None:
    """The last one: the cluster has one node afterwards, and no room for a second worker."""
    path = tmp_path / "r.jsonl"
    with open_ledger(tmp_path / "ledger.db") as book, RayCluster(cluster.address, SPECS) as fleet:
        running = asyncio.create_task(measured(path, fleet, n=60, words=800, account=Account("bench", ledger=book)))
        await lines(path, 9, running)
        await asyncio.to_thread(cluster.remove_node, cluster.second, False)
        outcome = await asyncio.wait_for(running, 120)
        paid = total_spend(entry.spend for entry in book.entries())
    await measured(tmp_path / "one.jsonl", n=60, words=800)
    assert outcome.complete and outcome.done == 120 and facts(path) == facts(tmp_path / "one.jsonl")
    assert paid == outcome.incurred and paid.calls >= 120 and verify(tmp_path / "ledger.db").ok
