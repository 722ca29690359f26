"""Work that is cut, given out, lost and done again: real stations on this event loop, whose deaths are staged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Call, EngineError, InvalidInput, Plan, Spend, Work
from thrifty.bench.bank import Bank, BankLedger, Leased, account_of, limited, state_of
from thrifty.bench.fanout import TRIES, Fleet, Seat, StandIn, WorkerLost, batches_of, check_same, stand_ins
from thrifty.bench.faults import WorkerFailed, error_of, fault_of
from thrifty.bench.measure import Job
from thrifty.bench.run import Outcome, run
from thrifty.bench.station import Station, limit_threads, table_of, wire_of
from thrifty.bench.store import Store, read
from thrifty.bench.task import Task
from thrifty.engines.spec import resolve_roles
from thrifty.errors import PlanError, ThriftyError, Unsupported
from thrifty.hold import Hold
from thrifty.ledger.memory import MemoryLedger
from thrifty.meter.prices import PriceTable
from thrifty.spend import total_spend

SPECS = {"answer": "scripted:echo"}
PLANS = (
    Plan.from_toml('name = "plain"'),
    Plan.from_toml('name = "asked"\n[[methods]]\nuse = "budget-prompt"\nwords = 5'),
    Plan.from_toml('name = "again"\n[engines]\nanswer = "scripted:echo"'),
)


def tasks(n: int, scorer: str = "numeric") -> list[Task]:
    """The echo says the question, so every third one is wrong."""
    return [
        Task.from_dict(
            {
                "id": str(i),
                "prompt": f"say the number {i}",
                "gold": str(i if i % 3 else 7000),
                "scorer": scorer,
                "max_tokens": 40,
            }
        )
        for i in range(n)
    ]


class Here(Fleet):
    """Stations on this event loop. `dies(worker, parts)` says when a worker dies; `twice` sends every part again."""

    def __init__(
        self,
        size: int,
        dies: Any = None,
        *,
        twice: bool = False,
        loads: Any = None,
        specs: Any = SPECS,
        fails: bool = False,
    ) -> None:
        self.size, self.dies, self.twice, self.loads = size, dies or (lambda worker, parts: False), twice, loads
        self.specs, self.fails = specs, fails
        self.engines = stand_ins(Station(specs, None, 1).describe(), lambda role, call: 0)
        self.places: dict[int, Place] = {}
        self.started: list[str] = []
        self.stopped = 0

    async def open(self, account: Account) -> Mapping[str, Any]:
        self.bank = Bank(account)
        return {"ledger": None, "booked": account.ledger is not None}

    async def paid(self) -> Spend:
        return self.bank.paid

    async def seat(self, number: int, run: Mapping[str, Any]) -> Seat:
        if number not in self.places or self.places[number].dead:
            name = f"{number}.{len(self.started)}"
            self.started.append(name)
            if self.loads is not None and not self.loads(name):
                raise WorkerLost(f"worker {name} fell over")
            self.places[number] = Place(self, name)
        self.places[number].station.begin(json.loads(json.dumps(run)), Direct(self.bank, self.places[number]))
        return self.places[number]

    def close(self) -> None:
        pass


class Place:
    def __init__(self, fleet: Here, name: str) -> None:
        self.fleet, self.name, self.station = fleet, name, Station(fleet.specs, None, 1)
        if fleet.fails:
            self.station.engines["answer"].fail_after = 1  # type: ignore[attr-defined]
        self.dead, self.parts = False, 0

    async def measure(self, example: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        async for part in self.station.measure(json.loads(json.dumps(example))):
            if self.dead or self.fleet.dies(self.name, self.parts):
                if not self.dead:
                    self.dead = True
                    self.fleet.bank.lost(self.name)
                raise WorkerLost(f"worker {self.name} was ended by SIGKILL")
            self.parts += 1
            yield json.loads(json.dumps(part))
            if self.fleet.twice and "shared" not in part:
                yield json.loads(json.dumps(part))

    def stop(self) -> None:
        self.fleet.stopped += 1
        self.station.stop()

    async def cancel(self) -> None:
        self.dead = True


class Direct:
    """A teller beside its bank. What a dead worker says is not heard."""

    def __init__(self, bank: Bank, place: Any) -> None:
        self.bank, self.place = bank, place

    def ask(self, do: str, **args: Any) -> Any:
        if self.place.dead:
            raise WorkerLost("nobody hears a dead worker")
        try:
            return self.bank.serve(self.place.name, do, json.loads(json.dumps(args)))
        except Exception as error:
            raise error_of(json.loads(json.dumps(fault_of(error)))) from None

    def tell(self, do: str, **args: Any) -> None:
        if not self.place.dead:
            self.bank.serve(self.place.name, do, json.loads(json.dumps(args)))

    def start(self, do: str, **args: Any) -> Future[Any]:
        reply: Future[Any] = Future()
        reply.set_result(self.ask(do, **args))
        return reply


async def fanned(path: Path, fleet: Fleet, n: int = 9, **options: Any) -> Outcome:
    with Store(path) as store:
        return await run(PLANS, options.pop("on", None) or tasks(n), fleet.engines, store, fleet=fleet, **options)


async def alone(path: Path, n: int = 9, **options: Any) -> Outcome:
    with Store(path) as store:
        return await run(PLANS, tasks(n), resolve_roles(SPECS), store, **options)


def facts(path: Path) -> dict[str, Any]:
    """What must not depend on who measured."""
    found = read(path).results
    return {r.key: (r.plan, r.task, r.score, r.finish, r.spend, r.work, r.receipts, r.roles) for r in found}


def lines(path: Path) -> list[str]:
    return [row["key"] for row in map(json.loads, path.read_text().splitlines()) if "key" in row]


# -- cutting -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 2)), max_size=40))
def test_jobs_are_cut_by_example(examples: list[tuple[int, int, int]]) -> None:
    task = tasks(1)[0]
    jobs = [Job(f"k{i}", PLANS[0], "e", task, f"t{t}", seed, sample) for i, (t, seed, sample) in enumerate(examples)]
    batches = batches_of(jobs)
    assert sorted(key for batch in batches for key in batch.jobs) == sorted(job.key for job in jobs)
    assert [{job.example for job in batch.jobs.values()} for batch in batches] == [
        {(f"t{t}", seed, sample)} for t, seed, sample in dict.fromkeys(examples)
    ]
    for batch in batches:
        assert list(batch.jobs) == [job.key for job in jobs if job.key in batch.jobs]


# -- the same run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("concurrency", [1, 8])
async def test_any_number_of_workers_gives_the_results_of_one_process(
    tmp_path: Path, size: int, concurrency: int
) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "r.jsonl"
    one = await alone(whole, seeds=(0, 1), samples=2)
    account = Account("bench")
    many = await fanned(path, Here(size), seeds=(0, 1), samples=2, concurrency=concurrency, account=account)
    assert facts(path) == facts(whole) and len(lines(path)) == len(set(lines(path))) == 108
    assert (many.done, many.total, many.complete) == (108, 108, True)
    assert (many.spend, many.incurred, many.shared) == (one.spend, one.incurred, one.shared)
    assert account.settled == many.incurred and account.held == {}
    assert many.shared == 36, "plain and again ask the same, and an example is never cut in two"
    again = await fanned(path, Here(size), seeds=(0, 1), samples=2)
    assert (again.resumed, again.done, again.incurred) == (108, 0, Spend())


async def test_a_head_says_how_many_workers(tmp_path: Path) -> None:
    await fanned(tmp_path / "r.jsonl", Here(3))
    assert [head["workers"] for head in read(tmp_path / "r.jsonl").heads] == [3]


async def test_a_judge_in_a_worker_is_paid_as_in_one_process(tmp_path: Path) -> None:
    specs = {**SPECS, "judge": "scripted:echo"}
    fleet, judged = Here(2, specs=specs), tasks(3, scorer="judge")
    judged = [Task.from_dict({**t.to_dict(), "gold": "VERDICT: 7"}) for t in judged]
    with Store(tmp_path / "one.jsonl") as store:
        one = await run(PLANS, judged, resolve_roles(specs), store)
    many = await fanned(tmp_path / "r.jsonl", fleet, on=judged)
    both = [{r.key: (r.score, r.judged) for r in read(tmp_path / name).results} for name in ("one.jsonl", "r.jsonl")]
    assert both[0] == both[1] and all(paid.calls for _, paid in both[0].values())
    assert many.incurred == one.incurred != many.spend


# -- losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 7])
async def test_a_dead_workers_examples_are_done_again_and_count_once(tmp_path: Path, after: int) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "r.jsonl"
    one = await alone(whole)
    ledger = MemoryLedger()
    account = Account("bench", ledger=ledger)
    fleet = Here(2, lambda worker, parts: worker in ("0.0", "1.1") and parts >= after)
    outcome = await fanned(path, fleet, account=account)
    assert fleet.started == ["0.0", "1.1", *fleet.started[2:]] and len(fleet.started) == 4
    assert outcome.complete and outcome.done == 27
    assert facts(path) == facts(whole) and len(lines(path)) == len(set(lines(path))) == 27
    assert outcome.spend == one.spend
    booked = total_spend(entry.spend for entry in ledger.entries())
    assert booked == account.settled == outcome.incurred, "what the dead had spent stays"
    assert booked.calls >= one.incurred.calls and account.held == {}
    if after == 1:  # each died with one result told of at least two made: these were paid twice
        assert booked.calls > one.incurred.calls


async def test_a_result_that_arrives_twice_counts_once(tmp_path: Path) -> None:
    outcome = await fanned(tmp_path / "r.jsonl", Here(2, twice=True))
    one = await alone(tmp_path / "whole.jsonl")
    assert (outcome.done, outcome.spend) == (27, one.spend)
    assert len(lines(tmp_path / "r.jsonl")) == 27 and facts(tmp_path / "r.jsonl") == facts(tmp_path / "whole.jsonl")


async def test_an_example_that_ends_its_workers_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    fleet = Here(1, lambda worker, parts: parts >= (8 if worker == "0.0" else 1))  # 4 parts an example
    with pytest.raises(EngineError, match=f"{TRIES} workers died while task '.*SIGKILL.*run the same command again"):
        await fanned(path, fleet, concurrency=1)
    assert len(fleet.started) == TRIES
    kept = len(lines(path))
    assert kept >= 6
    outcome = await fanned(path, Here(2))
    assert outcome.resumed == kept and outcome.complete


async def test_workers_that_cannot_start_end_the_run(tmp_path: Path) -> None:
    fleet = Here(1, loads=lambda name: False)
    with pytest.raises(EngineError, match=f"{TRIES} workers died while they loaded.*fell over"):
        await fanned(tmp_path / "r.jsonl", fleet)
    fleet = Here(1, loads=lambda name: name == f"0.{TRIES - 1}")
    assert (await fanned(tmp_path / "r.jsonl", fleet)).complete


async def test_an_engine_that_keeps_failing_stops_the_workers(tmp_path: Path) -> None:
    fleet = Here(1, fails=True)
    plans = [Plan.from_toml(f'name = "{i}"\n[[methods]]\nuse = "budget-prompt"\nwords = {i + 1}') for i in range(30)]
    with (
        Store(tmp_path / "r.jsonl") as store,
        pytest.raises(EngineError, match=r"1\d calls in a row failed.*scripted failure"),
    ):
        await run(plans, tasks(1), fleet.engines, store, fleet=fleet, concurrency=1)
    assert fleet.stopped and len(lines(tmp_path / "r.jsonl")) < 30, "the rest of the example was not begun"


# -- budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("limit", [0, 1, 12, 100, 333])
async def test_all_workers_together_stay_within_the_runs_budget(tmp_path: Path, size: int, limit: int) -> None:
    path, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    account = Account("bench", Budget(tokens=limit))
    outcome = await fanned(path, Here(size), account=account)
    assert outcome.stopped is not None and not outcome.complete
    assert account.settled.tokens <= limit and account.overdraft == {} and account.held == {}
    assert account.settled == outcome.incurred
    assert (await fanned(path, Here(2))).complete
    await alone(whole)
    assert facts(path) == facts(whole), "the run's budget leaves no trace in the results"


async def test_a_budget_stops_one_worker_as_it_stops_one_process(tmp_path: Path) -> None:
    accounts = [Account("bench", Budget(tokens=100)) for _ in range(2)]
    one = await alone(tmp_path / "one.jsonl", account=accounts[0], concurrency=1)
    many = await fanned(tmp_path / "many.jsonl", Here(1), account=accounts[1], concurrency=1)
    assert many.stopped == one.stopped is not None
    assert (many.done, many.incurred) == (one.done, one.incurred) and accounts[0].settled == accounts[1].settled
    assert facts(tmp_path / "one.jsonl") == facts(tmp_path / "many.jsonl")


async def test_a_deadline_holds_for_workers(tmp_path: Path) -> None:
    account = Account("bench", Budget(deadline=30.0))
    account._opened -= 60
    outcome = await fanned(tmp_path / "r.jsonl", Here(2), account=account)
    assert outcome.done == 0 and outcome.stopped is not None and "deadline" in outcome.stopped


async def test_a_dead_workers_budget_is_not_given_out_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    account = Account("bench", Budget(tokens=400))
    outcome = await fanned(
        path, Here(2, lambda worker, parts: worker in ("0.0", "1.1") and parts >= 2), account=account
    )
    assert outcome.stopped is not None
    assert account.settled.tokens <= 400 and account.held == {} and account.overdraft == {}


# -- the bank ------------------------------------------------------------------------------------------------


class Alive:
    def __init__(self, name: str) -> None:
        self.name, self.dead = name, False


def leased(account: Account, name: str = "w", ledger: Any = None) -> tuple[Bank, Leased]:
    bank = Bank(account)
    return bank, Leased.open(account.path, ledger, Direct(bank, Alive(name)), limited(account))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["hold", "grow", "settle", "release"]), st.integers(0, 3), st.integers(0, 30), st.booleans()
        ),
        max_size=40,
    )
)
def test_a_leased_account_does_what_the_account_would_do(steps: list[tuple[str, int, int, bool]]) -> None:
    """The oracle is an account used directly, with the same limits and the same steps."""
    direct = Account("run", Budget(tokens=100, calls=12, engine_seconds=9.0))
    there = Account("run", Budget(tokens=100, calls=12, engine_seconds=9.0))
    bank = Bank(there)
    workers = [Leased.open("run", None, Direct(bank, Alive(name)), True) for name in ("a", "b")]
    pairs: list[tuple[Any, Any]] = []
    for i, (do, which, amount, judge) in enumerate(steps):
        worker = workers[i % 2]
        if do == "hold":
            both = (direct.child("judge"), worker.child("judge")) if judge else (direct, worker)
            ask = Spend(input=amount, calls=1)
            results = [_tried(a.hold, ask, Work(engine_seconds=1.0), keep=which) for a in both]
            if not isinstance(results[0], str):
                pairs.append((results[0], results[1]))
                results = []
        elif pairs:
            held = pairs[which % len(pairs)]
            if do == "grow":
                results = [_tried(h.grow, Spend(output=amount)) for h in held]
            elif do == "settle":
                ask = Spend(input=amount, output=2, calls=1)
                results = [_tried(_overdraft, h, ask) for h in held]
            else:
                results = [_tried(h.release) for h in held]
        else:
            continue
        assert not results or results[0] == results[1]
        assert (there.settled, there.held, there.overdraft) == (direct.settled, direct.held, direct.overdraft)
        assert worker.remaining() == direct.remaining()
        assert there.work == direct.work


def _overdraft(hold: Hold, actual: Spend) -> Any:
    return hold.book(actual, Work(engine_seconds=0.5))[0].overdraft


def _tried(do: Any, *args: Any, **named: Any) -> Any:
    try:
        return do(*args, **named)
    except ThriftyError as error:
        return f"{type(error).__name__}: {error}"


def test_what_a_lost_worker_held_is_settled_in_full_once() -> None:
    account = Account("run", Budget(tokens=100))
    bank, worker = leased(account)
    worker.hold(Spend(input=10)).book(Spend(input=4))
    hold = worker.hold(Spend(input=30, calls=1), Work(engine_seconds=2.0))
    bank.lost("w")
    bank.lost("w")
    assert account.settled == Spend(input=34, calls=1) and account.held == {}
    assert account.work.engine_seconds == 2.0
    hold.book(Spend(input=30, calls=1))
    assert account.settled == Spend(input=34, calls=1), "told too late: it is settled already"
    with pytest.raises(ThriftyError, match="given up"):
        worker.hold(Spend(input=1))
    assert account.held == {}


def test_an_account_without_limits_is_told_and_not_asked() -> None:
    asked: list[str] = []

    class Listening(Direct):
        def ask(self, do: str, **args: Any) -> Any:
            asked.append(do)
            return super().ask(do, **args)

    account = Account("run")
    worker = Leased.open("run", None, Listening(Bank(account), Alive("w")), limited(account))
    worker.hold(Spend(input=5)).book(Spend(input=9))
    assert worker.remaining() == {} and asked == []
    assert account.settled == Spend(input=9)


def test_durable_holds_of_a_lost_worker_become_unknown_entries_once() -> None:
    book = MemoryLedger()
    bank = Bank(Account("run", ledger=book))
    ledger = BankLedger(Direct(bank, Alive("w")))
    worker = Leased.open("run", ledger, Direct(bank, Alive("w")), False)
    worker.hold(Spend(input=1, calls=1), durable=True).release()
    worker.hold(Spend(input=2, calls=1), durable=True).settle(Spend(input=2, output=1, calls=1))
    hold = worker.hold(Spend(input=7, calls=1), durable=True)
    assert [record.spend for record in book.holds().values()] == [Spend(input=7, calls=1)]
    bank.lost("w")
    bank.lost("w")
    hold.book(Spend(input=7, calls=1))
    assert [(e.status, e.spend, e.account) for e in book.entries()] == [
        ("settled", Spend(input=2, output=1, calls=1), "run"),
        ("unknown", Spend(input=7, calls=1), "run"),
    ]
    assert book.holds() == {}


def test_an_account_moves_to_another_process_and_refuses_in_the_same_words() -> None:
    account = Account("run", Budget(tokens=20, engine_seconds=1.5, deadline=50.0))
    account.hold(Spend(input=8)).book(Spend(input=8), Work(engine_seconds=0.25))
    other = account_of(json.loads(json.dumps(state_of(account))))
    assert (other.path, other.settled, other.remaining()) == (account.path, account.settled, account.remaining())
    refusals = [_tried(a.hold, Spend(input=13)) for a in (account, other)]
    assert refusals[0] == refusals[1] and "8 are settled" in refusals[0]
    below = Account("top", Budget(calls=3)).child("run", Budget(tokens=9))
    moved = account_of(json.loads(json.dumps(state_of(below))))
    assert (moved.path, moved.remaining()) == ("top/run", {"tokens": 9, "calls": 3})
    late = Account("run", Budget(deadline=5.0))
    late._opened -= 6
    with pytest.raises(BudgetExceeded, match="deadline"):
        account_of(state_of(late)).check_deadline()


# -- what crosses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [InvalidInput("a"), PlanError("b"), EngineError("c"), Unsupported("d"), BudgetExceeded("x", "tokens", 5, 4, 0, 2)],
)
def test_an_error_arrives_as_what_it_was(error: ThriftyError) -> None:
    error.add_note("task 'x'")
    other = error_of(json.loads(json.dumps(fault_of(error))))
    assert (type(other), str(other), other.__notes__) == (type(error), str(error), ["task 'x'"])
    assert other.exit_code == error.exit_code


def test_an_error_that_nobody_foresaw_brings_its_traceback() -> None:
    try:
        {}["key"]
    except KeyError as error:
        other = error_of(fault_of(error))
    assert isinstance(other, WorkerFailed) and "KeyError: 'key'" in str(other)
    assert "Traceback" in other.__notes__[0] and "test_fanout.py" in other.__notes__[0]


def test_price_tables_cross_exactly(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text('name = "mine"\ndate = "2026-01-01"\n[models.m]\ninput = 0.1\noutput = 0.7\ncached = 0.033\n')
    for table in (PriceTable.local(), PriceTable.from_toml(file)):
        assert table_of(json.loads(json.dumps(wire_of(table)))) == table


async def test_a_mistake_in_a_task_is_told_as_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="unknown scorer 'numerc': did you mean 'numeric'") as told:
        await fanned(tmp_path / "r.jsonl", Here(2), on=tasks(3, scorer="numerc"))
    assert any("task" in note for note in told.value.__notes__)


async def test_a_plan_that_means_something_else_in_a_worker_is_refused() -> None:
    station = Station(SPECS, None, 1)
    run_ = {"plans": {"0123456789abcdef": PLANS[1].to_toml()}}
    with pytest.raises(InvalidInput, match="'asked' means something else in a worker"):
        station.begin(run_, Direct(Bank(Account("x")), Alive("w")))


async def test_scores_of_ones_own_are_refused_with_a_fleet(tmp_path: Path) -> None:
    async def mine(*given: Any) -> float:
        return 1.0

    with pytest.raises(InvalidInput, match="`score` or `fleet`"):
        await fanned(tmp_path / "r.jsonl", Here(1), score=mine)


def test_another_engine_in_a_worker_is_refused() -> None:
    facts = Station(SPECS, None, 1).describe()
    other = {"answer": {**facts["answer"], "dtype": "bfloat16"}}
    check_same(facts, facts, "1")
    with pytest.raises(InvalidInput, match="worker 1 has another engine in the role 'answer'.*bfloat16"):
        check_same(facts, other, "1")


async def test_a_stand_in_counts_and_does_not_answer() -> None:
    station = Station(SPECS, None, 1)
    engine = station.engines["answer"]
    stand_in = stand_ins(json.loads(json.dumps(station.describe())), station.count)["answer"]
    call = Call(
        ({"role": "user", "content": "{context} who?"},), Account("x"), context=("Ann sings.",), prefix="It is",
        tools=({"type": "function", "function": {"name": "f"}},),
    )  # fmt: skip
    assert stand_in.count(call) == engine.count(call) > 5
    assert stand_in.identity() == engine.identity() and stand_in.capabilities == engine.capabilities
    for use in (stand_in.generate(call), stand_in.open(call), stand_in.embed(["a"], call.account, call.labels)):
        with pytest.raises(Unsupported, match="give the run their fleet"):
            await use
    assert isinstance(stand_in, StandIn)


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert limit_threads(3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert limit_threads(3)["OMP_NUM_THREADS"] == "2" and limit_threads(1)["OMP_NUM_THREADS"] == "1"


async def test_a_cancelled_station_settles_what_it_produced() -> None:
    account = Account("bench", Budget(tokens=10_000))
    bank, place = Bank(account), Alive("w")
    station = Station(SPECS, None, 1)
    plan = PLANS[0]
    sampling = {"stop": []}
    station.begin(
        {
            "plans": {plan.hash: plan.to_toml()}, "suite": "s", "sampling": sampling, "keep_text": False, "turns": 4,
            "unsafe": False, "account": "bench", "limited": True, "ledger": None, "booked": False,
        },
        Direct(bank, place),
    )  # fmt: skip
    task = Task.from_dict({"id": "long", "prompt": "word " * 5000, "gold": "1", "scorer": "numeric"})
    example = {
        "task": task.to_dict(),
        "task_hash": task.hash(),
        "seed": 0,
        "sample": 0,
        "jobs": [["k", plan.hash, "e"]],
    }

    async def measure() -> None:
        async for _ in station.measure(example):
            pass

    running = asyncio.create_task(measure())
    while not account.held:
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert account.held == {} and 5000 <= account.settled.tokens < 10_000
