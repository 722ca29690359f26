"""A run that is killed, torn, doubled, interrupted, refused or failed, and goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import thrifty
from thrifty import Account, Answer, Budget, Call, EngineError, InvalidInput, Plan, PlanError, Spend
from thrifty.bench.progress import Live
from thrifty.bench.run import FAILURES_IN_A_ROW, Outcome, run
from thrifty.bench.store import Result, Store, read
from thrifty.bench.study import Interrupted, complete
from thrifty.bench.task import Task
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger.entry import Entry, HoldRecord

HERE = Path(__file__)

PLANS = (
    Plan.from_toml('name = "plain"'),
    Plan.from_toml('name = "asked"\n[[methods]]\nuse = "budget-prompt"\nwords = 5'),
)


def tasks(n: int) -> list[Task]:
    return [
        Task(
            id=str(i),
            messages=({"role": "user", "content": f"What is {i} plus one?"},),
            gold=str(i + 1),
            scorer="numeric",
            max_tokens=8,
        )
        for i in range(n)
    ]


def engine(delay: float = 0.0) -> ScriptedEngine:
    """Answers every third question wrong."""

    def say(call: object, draw: object) -> str:
        number = int(call.question().split()[2])  # type: ignore[attr-defined]
        return f"That is {number + 1 if number % 3 else 7000}"

    return ScriptedEngine(say, delay=delay)


def start(path: Path, n: int, delay: float) -> subprocess.Popen[str]:
    source = str(Path(thrifty.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, str(HERE), str(path), str(n), str(delay)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.005)
    pytest.fail(f"no {lines} lines: {process.communicate()[1]}")


async def measured(path: Path, n: int = 6, **options: Any) -> Outcome:
    with Store(path) as store:
        return await run(options.pop("plans", PLANS), tasks(n), options.pop("on", engine()), store, **options)


def facts(path: Path) -> dict[str, Any]:
    """What must not depend on how a run was cut."""
    return {r.key: (r.plan, r.task, r.score, r.finish, r.spend, r.work) for r in read(path).results}


def finished_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n")[:-1] if b'"score"' in line]


# -- resuming ------------------------------------------------------------------------------------------------


async def test_results_are_what_the_script_deserves(tmp_path: Path) -> None:
    outcome = await measured(tmp_path / "r.jsonl", suite="sums")
    assert (outcome.total, outcome.done, outcome.resumed, outcome.failed) == (12, 12, 0, 0)
    results = read(tmp_path / "r.jsonl").results
    assert {r.task: r.score for r in results} == {str(i): float(i % 3 != 0) for i in range(6)}
    plain = next(r for r in results if r.plan == "plain" and r.task == "4")
    assert plain.spend == plain.incurred == Spend(input=5, output=3, calls=1)
    assert plain.roles == {"answer": plain.spend}
    asked = next(r for r in results if r.plan == "asked" and r.task == "4")
    assert asked.spend.input > 5
    assert asked.receipts[0]["method"] == "budget-prompt" and asked.receipts[0]["fired"] is True
    assert plain.text is None, "generated text is kept on request only"


async def test_second_run_resumes_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    await measured(path)
    before = path.read_bytes()
    on = engine()
    outcome = await measured(path, on=on)
    assert (outcome.resumed, outcome.done, outcome.incurred) == (12, 0, Spend())
    assert on.calls == []
    assert path.read_bytes() == before


async def test_only_what_is_missing_is_run(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    await measured(path, n=2)
    outcome = await measured(path, n=5)
    assert (outcome.resumed, outcome.done) == (4, 6)
    outcome = await measured(path, n=5, seeds=(0, 1), samples=2)
    assert (outcome.resumed, outcome.done) == (10, 30)


async def test_an_embedder_beside_does_not_make_results_stale(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    await measured(path, n=2)
    embedder = ScriptedEngine("", model="vectors")
    outcome = await measured(path, n=2, on={"answer": engine(), "embedder": embedder})
    assert outcome.resumed == 4


@pytest.mark.parametrize("change", ["plan", "model", "task", "sampling"])
async def test_what_a_result_depends_on_is_in_its_key(tmp_path: Path, change: str) -> None:
    from thrifty import Sampling

    path = tmp_path / "r.jsonl"
    await measured(path, n=2, plans=PLANS[:1])
    plan, on, some, sampling = PLANS[0], engine(), tasks(2), Sampling()
    if change == "plan":
        plan = Plan("plain", budget=Budget(output=50))
    elif change == "model":
        on.model = "another"
    elif change == "task":
        some = [Task.from_dict({**t.to_dict(), "max_tokens": 7}) for t in some]
    else:
        sampling = Sampling(temperature=0.5)
    with Store(path) as store:
        outcome = await run([plan], some, on, store, sampling=sampling)
    assert (outcome.resumed, outcome.done) == (0, 2)


def test_kill_in_the_middle_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    path, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    process = start(path, 20, 0.01)
    wait_for_lines(path, 12, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = finished_lines(path)
    assert 11 <= len(kept) < 40
    again = start(path, 20, 0.0)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert f"resumed {len(kept)}" in out and f"resumed {len(kept)} of 40" in err
    assert finished_lines(path)[: len(kept)] == kept, "finished results stay, byte for byte"
    asyncio.run(measured(whole, n=20, concurrency=1))
    assert facts(path) == facts(whole)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    process = start(path, 30, 0.02)
    wait_for_lines(path, 8, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in err and str(path) in err
    assert "Traceback" not in err
    contents = read(path)
    assert contents.torn == 0 and len(contents.results) >= 7
    with Store(path) as store:
        assert len(store.done) == len(contents.results)


# -- the file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 40])
async def test_a_torn_last_line_is_dropped_and_redone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    await measured(path, n=3)
    before, expected = path.read_bytes(), facts(path)
    path.write_bytes(before[:-cut])
    with Store(path) as store:
        # Without its line end only, the last line is still a whole result.
        assert len(store.done) == (6 if cut == 1 else 5)
        assert store.torn == (0 if cut == 1 else len(before) - cut - before[:-cut].rfind(b"\n") - 1)
    outcome = await measured(path, n=3)
    assert outcome.done == (0 if cut == 1 else 1)
    assert facts(path) == expected


async def test_zeros_at_the_end_are_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    await measured(path, n=3)
    expected = facts(path)
    path.write_bytes(path.read_bytes() + b"\0" * 4096)
    outcome = await measured(path, n=3)
    assert outcome.resumed == 6 and facts(path) == expected
    assert b"\0" not in path.read_bytes()


async def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    await measured(path, n=3)
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3][:30]
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match=r"r\.jsonl:4: .*remove that line"):
        Store(path)
    assert path.read_bytes() == before
    with pytest.raises(InvalidInput, match=r"r\.jsonl:4: "):
        read(path)


@pytest.mark.parametrize("text", ["my notes\nof today\n", '{"a": 1}\n', "not even a line end"])
def test_a_file_of_another_kind_is_never_cut(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(InvalidInput, match="not a results file"):
        Store(path)
    assert path.read_text() == text


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = start(path, 30, 0.05)
    try:
        wait_for_lines(path, 2, first)
        with pytest.raises(InvalidInput, match=f"process {first.pid} is writing it"):
            Store(path)
        assert len(read(path).results) >= 1, "reading needs no lock"
    finally:
        first.kill()
        first.communicate()
    with Store(path) as store:  # the lock died with its holder
        assert store.done


def test_a_result_survives_its_json() -> None:
    result = Result(
        key="k", suite="s", plan="p", plan_hash="h", methods=("a", "b"), engine="e", task="t", task_hash="th",
        score=0.25, group="g", seed=3, sample=2, finish="length", spend=Spend(input=3, usd=7), error="X: y",
        roles={"embedder": Spend(input=1)}, receipts=({"method": "a", "fired": False, "reason": "r"},), text="hello",
    )  # fmt: skip
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("score", [1.5, -0.1, True, "1"])
def test_a_score_outside_its_range_is_no_result(score: object) -> None:
    line = Result("k", "s", "p", "h", (), "e", "t", "th", 1.0).to_dict() | {"score": score}
    with pytest.raises(InvalidInput, match="score"):
        Result.from_dict(line)


# -- budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_run_stays_within_its_budget(tmp_path: Path, concurrency: int) -> None:
    path, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    account = Account("bench", Budget(tokens=90))
    outcome = await measured(path, n=10, account=account, concurrency=concurrency)
    assert outcome.stopped is not None and "tokens" in outcome.stopped
    assert 0 < outcome.done < 20 and not outcome.complete
    assert account.settled.tokens <= 90 and account.overdraft == {} and account.held == {}
    assert account.settled == outcome.incurred
    outcome = await measured(path, n=10)
    assert outcome.complete
    await measured(whole, n=10)
    assert facts(path) == facts(whole), "the run's budget leaves no trace in the results"


async def test_a_run_stops_at_its_deadline(tmp_path: Path) -> None:
    account = Account("bench", Budget(deadline=0.05))
    outcome = await measured(tmp_path / "r.jsonl", n=30, on=engine(0.01), account=account, concurrency=1)
    assert outcome.stopped is not None and "deadline" in outcome.stopped
    assert 0 < outcome.done < 60


async def test_a_plans_own_budget_scores_zero_and_is_counted(tmp_path: Path) -> None:
    plan = Plan("small", budget=Budget(input=2), on_exceed="refuse")
    outcome = await measured(tmp_path / "r.jsonl", n=3, plans=[PLANS[0], plan])
    assert (outcome.refused, outcome.failed, outcome.done) == (3, 0, 6)
    small = [r for r in read(tmp_path / "r.jsonl").results if r.plan == "small"]
    assert [r.score for r in small] == [0.0] * 3
    assert all(r.finish == "budget" and r.error and r.error.startswith("BudgetExceeded: ") for r in small)
    again = await measured(tmp_path / "r.jsonl", n=3, plans=[PLANS[0], plan])
    assert again.resumed == 6


async def test_what_is_paid_reaches_the_ledger_of_the_run(tmp_path: Path) -> None:
    class Memory:
        def __init__(self) -> None:
            self.entries: list[Entry] = []

        def append(self, entry: Entry, hold: str | None = None) -> Any:
            self.entries.append(entry)

        def open_hold(self, record: HoldRecord) -> str:
            return "0"

        def drop_hold(self, hold: str) -> None:
            pass

    ledger = Memory()
    outcome = await measured(tmp_path / "r.jsonl", account=Account("bench", ledger=ledger))
    total = Spend()
    for entry in ledger.entries:
        total = total + entry.spend
    assert total == outcome.incurred
    assert {e.labels.plan for e in ledger.entries} == {p.hash for p in PLANS}


async def test_no_result_is_written_before_its_entries_are_committed(tmp_path: Path) -> None:
    from thrifty.ledger.memory import MemoryLedger

    class Slow(MemoryLedger):
        """Commits later, as a disk does."""

        def append(self, entry: Entry, hold: str | None = None) -> Any:
            super().append(entry, hold)
            return self

        def wait(self) -> None:
            raise AssertionError("a run must not block its event loop")

        async def done(self) -> None:
            await asyncio.sleep(0.005)
            committed.append(lines())

    def lines() -> int:
        return len(finished_lines(path)) if path.exists() else 0

    path, committed = tmp_path / "r.jsonl", list[int]()
    await measured(path, account=Account("bench", ledger=Slow()), concurrency=1)
    assert committed == list(range(12)), "the entry of a result, then the result"


async def test_a_remote_call_is_written_to_the_runs_ledger_before_it_is_made(tmp_path: Path) -> None:
    from thrifty.ledger.memory import MemoryLedger

    class Remote(ScriptedEngine):
        """Holds durably, as an engine whose provider bills does."""

        async def generate(self, call: Call) -> Answer:
            hold = call.account.hold(Spend(input=5, calls=1), labels=call.labels, durable=True)
            opened.append(len(book.holds()))
            if "3" in call.question():
                hold.release()
                raise EngineError("refused before it cost anything")
            await hold.settle_async(Spend(input=4, output=1, calls=1))
            return Answer("4", spend=Spend(input=4, output=1, calls=1))

    book, opened = MemoryLedger(), list[int]()
    account = Account("bench", ledger=book)
    outcome = await measured(tmp_path / "r.jsonl", n=4, plans=PLANS[:1], on=Remote(""), account=account)
    assert opened and all(count >= 1 for count in opened)
    assert list(book.holds()) == [] and account.held == {}
    assert (outcome.done, outcome.failed) == (3, 1)
    assert account.settled == Spend(input=12, output=3, calls=3)


# -- failures ------------------------------------------------------------------------------------------------


class Flaky:
    """A real scripted engine that is down for some questions."""

    def __init__(self, down: set[int]) -> None:
        self.engine, self.down = engine(), down
        self.name, self.model, self.dtype = self.engine.name, self.engine.model, self.engine.dtype
        self.capabilities = self.engine.capabilities

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def identity(self) -> Mapping[str, Any]:
        return self.engine.identity()

    async def generate(self, call: Call) -> Answer:
        if int(call.question().split()[2]) in self.down:
            raise EngineError("the server\nis down")
        return await self.engine.generate(call)


async def test_a_failure_is_told_and_tried_again(tmp_path: Path) -> None:
    path, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    outcome = await measured(path, on=Flaky({1, 4}))
    assert (outcome.done, outcome.failed) == (8, 4)
    assert "EngineError: the server is down" in outcome.errors[0]
    failed = [r for r in read(path).results if r.score is None]
    assert {r.task for r in failed} == {"1", "4"} and all(r.finish == "error" for r in failed)
    outcome = await measured(path)
    assert (outcome.resumed, outcome.done, outcome.failed) == (8, 4, 0)
    await measured(whole)
    assert facts(path) == facts(whole)


async def test_what_a_failure_cost_is_settled(tmp_path: Path) -> None:
    on = engine()
    on.fail_after = 2
    account = Account("bench")
    outcome = await measured(tmp_path / "r.jsonl", n=2, on=on, account=account)
    assert outcome.failed == 4
    assert account.settled == outcome.incurred and account.settled.output == 8
    assert account.held == {}


async def test_a_dead_engine_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"{FAILURES_IN_A_ROW} calls in a row failed.*is down"):
        await measured(tmp_path / "r.jsonl", n=40, on=Flaky(set(range(40))))
    assert len(read(tmp_path / "r.jsonl").results) < 40


# -- bad input -----------------------------------------------------------------------------------------------


async def test_bad_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    on = engine()
    with Store(tmp_path / "r.jsonl") as store:
        with pytest.raises(InvalidInput, match="same name 'plain'"):
            await run([PLANS[0], Plan("plain", budget=Budget(output=1))], tasks(1), on, store)
        with pytest.raises(InvalidInput, match="same hash .*'plain' and 'twin'"):
            await run([PLANS[0], Plan("twin")], tasks(1), on, store)
        with pytest.raises(InvalidInput, match="task '0' is there twice"):
            await run(PLANS, tasks(1) * 2, on, store)
        with pytest.raises(InvalidInput, match="at least 1 of each"):
            await run(PLANS, [], on, store)
        with pytest.raises(PlanError, match="embedder"):
            await run([Plan.from_toml('name = "k"\n[[methods]]\nuse = "fixed-k"')], tasks(1), on, store)
        with pytest.raises(InvalidInput, match="kv_bytes_peak"):
            await run(PLANS, tasks(1), on, store, account=Account("bench", Budget(kv_bytes_peak=1)))
        with pytest.raises(InvalidInput, match="unknown scorer 'numerc': did you mean 'numeric'"):
            wrong = Task.from_dict({**tasks(1)[0].to_dict(), "scorer": "numerc"})
            await run(PLANS, [wrong], on, store)
    assert [r.task for r in read(tmp_path / "r.jsonl").results] == []


async def test_a_judge_is_paid_apart(tmp_path: Path) -> None:
    task = Task(id="j", messages=({"role": "user", "content": "What is 1 plus one?"},), gold="2", scorer="judge")
    judge = ScriptedEngine("VERDICT: 7", model="judge")
    with Store(tmp_path / "r.jsonl") as store:
        outcome = await run([PLANS[0]], [task], {"answer": engine(), "judge": judge}, store)
    (result,) = read(tmp_path / "r.jsonl").results
    assert result.score == 0.7
    assert result.judged.output == 2 and result.judged.input > 10
    assert result.spend == Spend(input=5, output=3, calls=1)
    assert outcome.incurred == result.spend + result.judged


# -- this file as a process of its own: what the tests above kill and interrupt ------------------------------


async def work(path: str, n: int, delay: float) -> Outcome:
    with Store(path) as store:
        return await run(
            PLANS, tasks(n), engine(delay), store, suite="sums", concurrency=3, keep_text=True, watcher=Live()
        )


def main() -> int:
    path, n, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    try:
        print(complete(work(path, n, delay), path).line())
    except Interrupted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
