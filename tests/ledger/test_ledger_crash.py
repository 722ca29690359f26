"""kill -9 in the middle of writing: no acknowledged entry is lost, no hold leaks, and the chains still verify."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from thrifty.ledger import open_ledger, verify
from thrifty.spend import Spend

WRITER = Path(__file__).with_name("crash_writer.py")
KEY = b"k" * 32


def run_and_kill(path: Path, name: str, seconds: float, *, locked: bool = False) -> list[tuple[str, str]]:
    """Runs a writer, kills it `seconds` after its first acknowledgement; returns what it acknowledged. `locked` keeps
    it from committing for that time."""
    writer = subprocess.Popen([sys.executable, WRITER, path, name], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    first = writer.stdout.readline()
    blocker = sqlite3.connect(path, isolation_level=None)
    if locked:
        blocker.execute("BEGIN IMMEDIATE")
    time.sleep(seconds)
    writer.kill()
    rest = writer.stdout.read()
    writer.wait()
    blocker.close()
    lines = (first + rest).decode().split("\n")[:-1]  # a line cut by the kill has no end and is no acknowledgement
    assert lines, "the writer died before its first acknowledgement"
    return [(kind, label) for kind, label in (line.split() for line in lines)]


def check_round(path: Path, acknowledged: list[tuple[str, str]], before: int) -> int:
    said = Counter(acknowledged)
    with open_ledger(path, key=KEY) as ledger:
        assert ledger.holds() == {}
        entries = list(ledger.entries())
    found = Counter((e.status, e.labels.method) for e in entries)
    assert max(found.values()) == 1, "an entry was recorded twice"
    statuses = {method: {s for s, m in found if m == method} for _, method in found}
    for kind, label in said:
        if kind in ("settled", "plain"):
            assert statuses.get(label) == {"settled"}, f"{label} was acknowledged as {kind}"
    for kind, label in said:
        if kind == "hold":  # settled, or orphaned by the kill and then settled in full: never neither, never both
            assert len(statuses.get(label, ())) == 1, f"hold {label} leaked or was settled twice"
    for entry in entries:
        full = Spend(input=100, output=50, calls=1)
        assert entry.spend == (full if entry.status == "unknown" else Spend(input=100, output=7, calls=1))
    assert len(entries) > before
    report = verify(path, key=KEY)
    assert report.ok, report.problems
    assert report.signed == report.entries == len(entries)
    return len(entries)


def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    pick = random.Random(7)
    count = 0
    unknown = 0
    for number in range(6):
        acknowledged = run_and_kill(path, f"r{number}", pick.uniform(0, 0.25))
        count = check_round(path, acknowledged, count)
        with open_ledger(path) as ledger:
            unknown = sum(row.entries for row in ledger.summary("status") if row.key == ("unknown",))
    assert unknown > 0, "no kill hit an open hold: the test shows nothing about orphans"


def test_nothing_is_acknowledged_that_waits_for_a_lock(tmp_path: Path) -> None:
    """The kill comes while a commit waits: an acknowledgement given too early would be found out here."""
    path = tmp_path / "ledger.db"
    check_round(path, run_and_kill(path, "locked", 0.3, locked=True), 0)


def test_orphans_are_settled_once_though_many_open_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    acknowledged = run_and_kill(path, "solo", 0.2)
    with open_ledger(path, readonly=True) as before:
        open_holds = len(before.holds())
        entries = len(before)
    assert open_holds > 0
    program = (
        "import sys; from thrifty.ledger import open_ledger\n"
        "sys.stdin.readline(); open_ledger(sys.argv[1], key=b'k' * 32).close()"
    )
    openers = [subprocess.Popen([sys.executable, "-c", program, path], stdin=subprocess.PIPE) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:  # all at once
        codes = list(pool.map(lambda p: (p.communicate(b"go\n"), p.returncode)[1], openers))
    assert codes == [0, 0, 0, 0]
    with open_ledger(path, readonly=True) as after:
        assert len(after) == entries + open_holds
    check_round(path, acknowledged, 0)


def test_orphans_are_released_where_the_policy_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    run_and_kill(path, "solo", 0.1)
    with open_ledger(path, readonly=True) as before:
        holds, entries = len(before.holds()), len(before)
    assert holds > 0
    with open_ledger(path, orphans="release") as ledger:
        assert ledger.holds() == {}
        assert len(ledger) == entries
    assert verify(path).ok


def test_a_living_writers_holds_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    writer = subprocess.Popen([sys.executable, WRITER, path, "alive"], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        writer.stdout.readline()
        for _ in range(3):
            with open_ledger(path) as other:
                assert not [e for e in other.entries() if e.status == "unknown"]
    finally:
        writer.kill()
        writer.communicate()
