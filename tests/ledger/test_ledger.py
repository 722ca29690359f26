"""Both ledgers through the public interface: what goes in comes out, sums, selections, holds, closing."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thrifty.budget import Account, Budget
from thrifty.errors import InvalidInput, LedgerError
from thrifty.ledger import Entry, HoldRecord, Labels, MemoryLedger, open_ledger, verify
from thrifty.ledger.query import GROUPS
from thrifty.spend import SPEND_FIELDS, WORK_FIELDS, Spend, Work

NS = 10**9
DAY = 86_400 * NS

names = st.text(st.characters(codec="utf-8"), max_size=8)
few = st.sampled_from(["", "a", "b", "ß\u0000'\"\\", "日本"])
counts = st.integers(0, 2**53)
entries = st.builds(
    Entry,
    account=st.sampled_from(["root", "root/a", "root/a/b", "root/ab", "root0", "other"]),
    opened=st.integers(0, 4 * DAY),
    at=st.integers(0, 4 * DAY),
    spend=st.builds(Spend, **{name: counts for name in SPEND_FIELDS}),
    work=st.builds(
        Work,
        **{name: counts for name in WORK_FIELDS if not name.startswith(("engine", "kv_bytes_mean"))},
        engine_seconds=st.integers(0, 2**50).map(lambda ns: ns / NS),
        kv_bytes_mean=st.integers(0, 2**53).map(float),
    ),
    labels=st.builds(Labels, few, few, few, names, st.sampled_from(["answer", "draft"]), few),
    status=st.sampled_from(["settled", "estimated", "unknown"]),
    overdraft=st.dictionaries(st.sampled_from(["output", "usd"]), st.integers(1, 2**40), max_size=2),
)


def make(number: int = 1, **labels: str) -> Entry:
    return Entry("root/a", number, number * NS, Spend(input=number, output=1, calls=1), Work(), Labels(**labels))


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with open_ledger(None if request.param == "memory" else tmp_path / "ledger.db") as opened:
        yield opened


# -- content ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(entries, max_size=12), data=st.data())
def test_sqlite_answers_like_plain_python(tmp_path: Path, items: list[Entry], data: st.DataObject) -> None:
    path = tmp_path / "ledger.db"
    path.unlink(missing_ok=True)
    since, until = data.draw(st.none() | st.integers(0, 4 * DAY)), data.draw(st.none() | st.integers(0, 4 * DAY))
    account = data.draw(st.sampled_from([None, "root", "root/a", "ro"]))
    by = data.draw(st.lists(st.sampled_from(GROUPS), unique=True, max_size=3))
    where = {} if account is None else {"account": account}
    with open_ledger(path) as book:
        for item in items:
            book.append(item)
        assert list(book.entries()) == items
        assert len(book) == len(items)
        chosen = [
            e
            for e in items
            if (since is None or e.at >= since)
            and (until is None or e.at < until)
            and (account is None or (e.account + "/").startswith(account + "/"))
        ]
        assert list(book.entries(since, until, where)) == chosen
        rows = book.summary(by, since, until, where)

    def key(e: Entry) -> tuple[str, ...]:
        day = datetime.fromtimestamp(e.at // NS, UTC).date().isoformat()
        fields = {"account": e.account, "status": e.status, "day": day}
        return tuple(fields.get(name) if name in fields else getattr(e.labels, name) for name in by)

    assert [r.key for r in rows] == sorted({key(e) for e in chosen}, key=lambda k: [x.encode() for x in k])
    for row in rows:
        group = [e for e in chosen if key(e) == row.key]
        assert row.entries == len(group)
        for name in SPEND_FIELDS:
            assert getattr(row.spend, name) == sum(getattr(e.spend, name) for e in group)
        for name in ("prefill", "kv_reads", "target_passes", "draft_passes"):
            assert getattr(row.work, name) == sum(getattr(e.work, name) for e in group)
        assert row.work.engine_seconds == sum(round(e.work.engine_seconds * NS) for e in group) / NS
        assert row.work.kv_bytes_peak == max(e.work.kv_bytes_peak for e in group)
        assert (row.first, row.last) == (min(e.at for e in group), max(e.at for e in group))
    assert verify(path).ok


@settings(max_examples=60, deadline=None)
@given(items=st.lists(entries, max_size=12), data=st.data())
def test_memory_answers_like_sqlite(items: list[Entry], data: st.DataObject) -> None:
    book = MemoryLedger()
    for item in items:
        book.append(item)
    by = data.draw(st.sampled_from(GROUPS))
    assert list(book.entries()) == items
    assert sum(row.entries for row in book.summary(by)) == len(items)
    assert sum(row.spend.usd for row in book.summary(by)) == sum(e.spend.usd for e in items)


def test_seconds_are_kept_to_the_nanosecond(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.db") as book:
        book.append(Entry("a", 1, 2, Spend(calls=True), Work(engine_seconds=0.1234567894, kv_bytes_mean=2.6)))
        (back,) = book.entries()
    assert back.work == Work(engine_seconds=0.123456789, kv_bytes_mean=3.0)
    assert back.spend == Spend(calls=1)
    assert verify(tmp_path / "ledger.db").ok


@pytest.mark.parametrize(
    "bad",
    [
        replace(make(), spend=Spend(input=-1)),
        replace(make(), spend=Spend(output=2**53 + 1)),
        replace(make(), spend=Spend(output=10**40)),
        replace(make(), spend=Spend(output=1.5)),  # type: ignore[arg-type]
        replace(make(), work=Work(engine_seconds=float("nan"))),
        replace(make(), work=Work(engine_seconds=float("inf"))),
        replace(make(), work=Work(kv_bytes_mean=-3.0)),
        replace(make(), labels=Labels(model="\ud800")),
        replace(make(), labels=Labels(model="x" * 70_000)),
    ],
)
def test_what_cannot_be_recorded_is_refused_alone(tmp_path: Path, bad: Entry) -> None:
    with open_ledger(tmp_path / "ledger.db") as book:
        first = book.append(make(1))
        with pytest.raises(InvalidInput, match="cannot be recorded|at most"):
            book.append(bad)
        book.append(make(2)).wait()
        first.wait()
        assert len(book) == 2


def test_summary_of_nothing(ledger: Any) -> None:
    assert ledger.summary() == []
    assert ledger.summary([]) == []
    assert list(ledger.entries()) == []
    assert len(ledger) == 0
    assert ledger  # an empty ledger is not nothing


def test_unknown_fields_and_times_are_refused(ledger: Any) -> None:
    with pytest.raises(InvalidInput, match="'model'"):
        ledger.summary(by="modl")
    with pytest.raises(InvalidInput, match="'plan'"):
        list(ledger.entries(where={"plna": "x"}))
    with pytest.raises(InvalidInput, match="ISO"):
        list(ledger.entries(since="yesterday"))
    with pytest.raises(InvalidInput, match="once"):
        ledger.summary(by=["plan", "plan"])


def test_times_may_be_text_or_datetimes(ledger: Any) -> None:
    for day in range(3):
        ledger.append(replace(make(), at=day * DAY))
    assert len(list(ledger.entries(since="1970-01-02"))) == 2
    assert len(list(ledger.entries(until=datetime(1970, 1, 2, tzinfo=UTC)))) == 1
    assert len(list(ledger.entries(since="1970-01-02T01:00:00+01:00"))) == 2
    assert [row.key for row in ledger.summary(by="day")] == [("1970-01-01",), ("1970-01-02",), ("1970-01-03",)]


def test_a_summary_row_as_json(ledger: Any) -> None:
    ledger.append(make(3, model="m"))
    (row,) = ledger.summary(by=("model", "role"))
    assert row.to_dict() == {
        "model": "m",
        "role": "answer",
        "entries": 1,
        "spend": {"input": 3, "output": 1, "calls": 1},
        "work": {},
        "first": 3 * NS,
        "last": 3 * NS,
    }


# -- holds and closing -----------------------------------------------------------------------------------------------


def test_holds_live_until_they_are_settled_or_dropped(ledger: Any) -> None:
    record = HoldRecord("root", 5, Spend(input=9, output=4), Work(prefill=9), Labels(model="m"))
    first, second = ledger.open_hold(record), ledger.open_hold(record)
    assert first != second
    assert ledger.holds() == {first: record, second: record}
    ledger.append(make(), first)
    ledger.drop_hold(second)
    ledger.drop_hold("never heard of")
    assert ledger.holds() == {}
    assert len(ledger) == 1


def test_an_account_writes_its_durable_holds(ledger: Any) -> None:
    account = Account("root", Budget(output=100), ledger=ledger)
    hold = account.hold(Spend(input=10, output=60), labels=Labels(model="m"), durable=True)
    ((_, record),) = ledger.holds().items()
    assert (record.account, record.spend, record.labels.model) == ("root", Spend(input=10, output=60), "m")
    entry = hold.settle(Spend(input=10, output=61))
    assert ledger.holds() == {}
    assert list(ledger.entries()) == [entry]
    account.hold(Spend(output=5), durable=True).release()
    assert ledger.holds() == {}


def test_closing(ledger: Any) -> None:
    ticket = ledger.append(make(1))
    ledger.close()
    ledger.close()
    ticket.wait()
    for use in (lambda: ledger.append(make(2)), lambda: ledger.open_hold(HoldRecord("a", 1, Spend()))):
        with pytest.raises(LedgerError, match="closed"):
            use()
    assert len(ledger) == 1
    assert ledger.unsaved() == []


def test_what_is_queued_at_exit_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    program = (
        "import sys; from thrifty.ledger import open_ledger, Entry; from thrifty.spend import Spend\n"
        "book = open_ledger(sys.argv[1])\n"
        "for n in range(500): book.append(Entry('a', n, n, Spend(input=n)))\n"
    )
    subprocess.run([sys.executable, "-c", program, path], check=True)
    with open_ledger(path, readonly=True) as book:
        assert [e.spend.input for e in book.entries()] == list(range(500))
    assert not path.with_name("ledger.db.writers").exists()


def test_importing_thrifty_imports_no_database() -> None:
    names = ("sqlalchemy", "sqlite3", "pyarrow")
    program = f"import sys, thrifty, thrifty.ledger; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# -- tickets ---------------------------------------------------------------------------------------------------------


async def test_coroutines_threads_and_loops_wait_for_one_group(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.db") as book:
        tickets = [book.append(make(n)) for n in range(50)]
        assert len({id(t) for t in tickets}) < 50, "entries that are queued together share a ticket"
        ticket = tickets[-1]
        threads = [threading.Thread(target=ticket.wait) for _ in range(3)]

        async def elsewhere() -> None:
            await ticket.done()

        loops = [threading.Thread(target=lambda: asyncio.run(elsewhere())) for _ in range(3)]
        for thread in threads + loops:
            thread.start()
        await asyncio.gather(*(t.done() for t in tickets))
        for thread in threads + loops:
            await asyncio.to_thread(thread.join)
        connection = sqlite3.connect(tmp_path / "ledger.db")
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (50,)
        connection.close()


async def test_a_cancelled_wait_harms_no_other(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.db") as book:
        account = Account("root", ledger=book)
        blocker = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")  # nothing commits until this lets go
        tasks = [asyncio.create_task(account.hold().settle_async(Spend(input=n))) for n in range(10)]
        await asyncio.sleep(0.05)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.sleep(0)
        blocker.execute("ROLLBACK")
        blocker.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(r, asyncio.CancelledError) for r in results] == [True, False] * 5
        assert sorted(e.spend.input for e in book.entries()) == list(range(10))
        assert account.settled.input == 45


def test_a_full_queue_blocks_append_and_loses_nothing(tmp_path: Path) -> None:
    from thrifty.ledger.sqlite import SQLiteLedger

    with SQLiteLedger(tmp_path / "ledger.db", most_waiting=10) as book:
        blocker = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        added: list[int] = []

        def fill() -> None:
            for n in range(100):
                book.append(make(n))
                added.append(n)

        thread = threading.Thread(target=fill)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert len(added) <= 20  # a group in the writer's hands and a full one waiting
        blocker.execute("ROLLBACK")
        blocker.close()
        thread.join()
        assert [e.spend.input for e in book.entries()] == list(range(100))


def test_the_disk_is_synced_only_when_asked(tmp_path: Path) -> None:
    for durability, level in (("process", 1), ("power", 2)):
        with open_ledger(tmp_path / f"{durability}.db", durability=durability) as book:  # type: ignore[call-overload]
            assert book._connection.execute("PRAGMA synchronous").fetchone() == (level,)
    with pytest.raises(InvalidInput, match="power"):
        open_ledger(tmp_path / "x.db", durability="paranoid")  # type: ignore[call-overload]


# -- files that are no ledger ----------------------------------------------------------------------------------------


def test_files_that_are_no_ledger_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("dear diary, " * 1000)
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    newer = tmp_path / "newer.db"
    open_ledger(newer).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    empty = tmp_path / "empty.db"
    empty.touch()
    for path, message in ((text, "not a Thrifty ledger"), (other, "another program's"), (newer, "schema 7.*upgrade")):
        before = path.read_bytes()
        for use in (open_ledger, verify, lambda p: open_ledger(p, readonly=True)):
            with pytest.raises(InvalidInput, match=message) as caught:
                use(path)
            assert "\n" not in str(caught.value)
        assert path.read_bytes() == before
    for path, message in ((empty, "empty"), (tmp_path / "none.db", "no ledger at"), (tmp_path, "no ledger at")):
        with pytest.raises(InvalidInput, match=message):
            open_ledger(path, readonly=True)
    with pytest.raises(InvalidInput, match="folder"):
        open_ledger(tmp_path)
    with open_ledger(empty) as book:  # an empty file becomes one
        book.append(make()).wait()


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="path of a file"):
        open_ledger(None, readonly=True)  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="signs nothing"):
        open_ledger(tmp_path / "x", readonly=True, key=b"k" * 20)  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="settle or release"):
        open_ledger(tmp_path / "x", orphans="adopt")  # type: ignore[call-overload]


def test_a_ledger_is_read_where_nothing_may_be_written() -> None:
    program = (
        "import os, sys; import thrifty.ledger.read, thrifty.ledger.check; from thrifty.ledger import *\n"
        "os.getuid() == 0 and os.setuid(65534)  # root may write everywhere\n"
        "print(len(open_ledger(sys.argv[1], readonly=True)), verify(sys.argv[1]).ok)"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_ledger(folder / "ledger.db") as book:
            book.append(make())
        folder.chmod(0o555)
        arguments = [sys.executable, "-c", program, folder / "ledger.db"]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
        folder.chmod(0o755)
    assert done.stdout.split() == ["1", "True"]


# -- forks -----------------------------------------------------------------------------------------------------------


def test_a_forked_child_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with open_ledger(path) as book:
        book.append(make(1)).wait()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            told = []
            for use in (lambda: book.append(make(2)), lambda: book.flush(), lambda: len(book), lambda: book.holds()):
                try:
                    use()
                    told.append("allowed")
                except LedgerError as error:
                    told.append("fork" if "fork" in str(error) else str(error))
            book.close()
            with open_ledger(path) as mine:  # its own is fine
                mine.append(make(3)).wait()
            os.write(writing, " ".join(told).encode())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert pipe.read() == "fork fork fork fork"
        assert status == 0
        book.append(make(4)).wait()
        assert [e.spend.input for e in book.entries()] == [1, 3, 4]
    assert verify(path).ok


def test_a_forked_child_does_not_keep_a_dead_parents_holds_alive(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    program = (
        "import os, sys, time; from thrifty.ledger import *; from thrifty.spend import Spend\n"
        "book = open_ledger(sys.argv[1]); book.open_hold(HoldRecord('a', 1, Spend(input=7)))\n"
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(60); os._exit(0)\n"
        "print(pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    child = int(done.stdout.readline())
    try:
        done.wait()
        with open_ledger(path) as book:
            assert [(e.status, e.spend.input) for e in book.entries()] == [("unknown", 7)]
    finally:
        os.kill(child, 9)
        done.stdout.close()
