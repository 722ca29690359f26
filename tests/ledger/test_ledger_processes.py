"""Several processes write one ledger at once, while another reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from thrifty.errors import InvalidInput
from thrifty.ledger import Entry, HoldRecord, open_ledger, verify
from thrifty.spend import Spend

PROGRAM = """
import asyncio, sys
from thrifty.budget import Account
from thrifty.ledger import Labels, open_ledger
from thrifty.spend import Spend

async def main(path, name):
    with open_ledger(path, key=b"k" * 32) as ledger:
        account = Account(name, ledger=ledger)
        async def lane(n):
            for i in range(50):
                await account.hold(Spend(input=2), durable=i % 10 == 0).settle_async(Spend(input=1, output=n))
        await asyncio.gather(*(lane(n) for n in range(20)))

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    path, anchor = tmp_path / "ledger.db", tmp_path / "anchor"
    # None creates the file beforehand: opening a new one at the same time must work too.
    writers = [subprocess.Popen([sys.executable, "-c", PROGRAM, path, f"w{n}"]) for n in range(4)]
    seen = []
    while any(writer.poll() is None for writer in writers):
        try:
            report = verify(path)
        except InvalidInput as error:  # nobody has created it yet
            assert not seen and ("no ledger" in str(error) or "empty" in str(error))
            continue
        assert report.ok, report.problems
        with open_ledger(path, readonly=True) as book:
            seen.append(len(book))
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    assert seen == sorted(seen)
    with open_ledger(path, readonly=True) as book:
        rows = book.summary(by="account")
        assert [(row.key, row.entries) for row in rows] == [((f"w{n}",), 1000) for n in range(4)]
        assert all(row.spend.output == 50 * sum(range(20)) for row in rows)
        assert book.holds() == {}
        book.anchor(anchor)
    report = verify(path, key=b"k" * 32, anchor=anchor)
    assert report.ok, report.problems
    assert report.chains == 4
    assert report.signed == report.anchored == report.entries == 4000


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with open_ledger(path) as first:
        hold = first.open_hold(HoldRecord("a", 1, Spend(input=1)))
        with open_ledger(path) as second:  # must not take the first one's holds for orphans
            second.append(Entry("b", 1, 2, Spend(input=5))).wait()
        first.append(Entry("a", 1, 3, Spend(input=1)), hold).wait()
        assert [(e.account, e.status) for e in first.entries()] == [("b", "settled"), ("a", "settled")]
    assert verify(path).ok
