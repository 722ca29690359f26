"""When the disk is full, the database locked or the file gone: callers hear of it, and no entry is lost."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from thrifty.budget import Account, Budget
from thrifty.errors import LedgerError
from thrifty.ledger import Entry, HoldRecord, open_ledger, verify
from thrifty.ledger.sqlite import SQLiteLedger
from thrifty.spend import Spend


def make(number: int) -> Entry:
    return Entry("root", number, number, Spend(input=number))


def numbers(path: Path) -> list[int]:
    with open_ledger(path, readonly=True) as book:
        return [e.spend.input for e in book.entries()]


def test_a_full_disk_is_told_and_outlived(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    # A limit on the size of files is what a full disk looks like to SQLite; lifting it frees the disk.
    program = """
import resource, sys
from thrifty.errors import LedgerError
from thrifty.ledger import Entry, HoldRecord, open_ledger
from thrifty.spend import Spend
book = open_ledger(sys.argv[1])
book.append(Entry("root", 0, 0, Spend(input=0))).wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
acknowledged, refused = [0], []
number = 0
while len(refused) < 3:
    number += 1
    tickets = [(n, book.append(Entry("root", n, n, Spend(input=n)))) for n in range(number, number + 100)]
    number += 99
    for n, ticket in tickets:
        try:
            ticket.wait()
            acknowledged.append(n)
        except LedgerError as error:
            refused.append(str(error))
try:
    book.open_hold(HoldRecord("root", 1, Spend(input=1)))
except LedgerError:
    print("hold refused")
lost = [e.spend.input for e in book.unsaved()]
assert set(acknowledged) | set(lost) == set(range(number + 1)), "an entry is neither saved nor unsaved"
print(refused[0])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
book.append(Entry("root", number + 1, 0, Spend(input=number + 1))).wait()
assert book.unsaved() == []
assert book.holds() == {}, "a hold that was refused must not come up later"
book.close()
print(number + 1)
"""
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, message, last = done.stdout.splitlines()
    assert held == "hold refused"
    assert "not committed yet, kept for the next commit" in message
    assert numbers(path) == list(range(int(last) + 1))
    assert verify(path).ok


async def test_a_locked_database(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    book = SQLiteLedger(path, busy_seconds=0.05)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="locked"):
        book.append(make(1)).wait()
    with pytest.raises(LedgerError, match="locked"):
        await book.append(make(2)).done()
    with pytest.raises(LedgerError, match="locked"):
        book.flush()
    assert [e.spend.input for e in book.unsaved()] == [1, 2]
    blocker.execute("ROLLBACK")
    blocker.close()
    book.flush()
    assert book.unsaved() == []
    assert numbers(path) == [1, 2]
    book.close()
    assert verify(path).ok


def test_a_settlement_that_could_not_be_written_is_settled_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    book = SQLiteLedger(path, busy_seconds=0.05)
    account = Account("root", Budget(output=10), ledger=book)
    hold = account.hold(Spend(output=6), durable=True)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError):
        account.hold(Spend(output=4), durable=True)
    with pytest.raises(LedgerError):
        hold.settle(Spend(output=5))
    assert account.settled == Spend(output=5)
    assert account.held == {}
    blocker.execute("ROLLBACK")
    blocker.close()
    book.flush()
    assert [e.spend for e in book.entries()] == [Spend(output=5)]
    assert book.holds() == {}
    book.close()


def test_unsaved_entries_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    book = SQLiteLedger(path, busy_seconds=0.01, most_waiting=3)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    for number in range(3):
        with pytest.raises(LedgerError, match="kept for the next"):
            book.append(make(number)).wait()
    with pytest.raises(LedgerError, match="no more are kept"):
        book.append(make(99))
    blocker.execute("ROLLBACK")
    blocker.close()
    book.flush()
    book.append(make(3)).wait()
    book.close()
    assert numbers(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_while_it_is_open(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "ledger.db"
    book = open_ledger(path)
    book.append(make(1)).wait()
    path.unlink()
    if replaced:
        path.write_bytes(b"something else")
    for number in (2, 3):
        with pytest.raises(LedgerError, match="removed or replaced"):
            book.append(make(number)).wait()
    with pytest.raises(LedgerError, match="removed or replaced"):
        book.open_hold(HoldRecord("root", 1, Spend()))
    with pytest.raises(LedgerError, match="2 entries not committed"):
        book.close()
    assert [e.spend.input for e in book.unsaved()] == [2, 3]
    book.close()
    if replaced:
        assert path.read_bytes() == b"something else"


def test_a_ledger_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot be opened"):
        open_ledger(tmp_path / "file" / "ledger.db")
