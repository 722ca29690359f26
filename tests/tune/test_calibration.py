"""Calibration data: counted before they are seen, once for each frozen search, whatever crashes or runs beside it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thrifty.bench.task import Task
from thrifty.errors import InvalidInput, ThriftyError
from thrifty.tune.calibration import Calibration, Claim, UseLog, default_log

CLAIM = Claim("error", 0.1, 0.1, bound="clopper-pearson")
CRC = Claim("error", 0.1, None, "conformal-risk-control")


def tasks(start: int, stop: int) -> list[Task]:
    return [Task(id=f"t{i}", messages=({"role": "user", "content": f"q{i}"},), gold="1") for i in range(start, stop)]


def test_the_same_search_is_the_same_use_and_another_is_refused(tmp_path: Path) -> None:
    log = UseLog(tmp_path / "uses.db")
    given, use = Calibration(tasks(0, 50), log).open("search-1", CLAIM)
    assert [t.id for t in given] == [f"t{i}" for i in range(50)]
    assert (use.k, use.delta, use.spent, use.resumed) == (1, 0.1, 0.1, False)

    _, again = Calibration(tasks(0, 50)[::-1], UseLog(tmp_path / "uses.db")).open("search-1", CLAIM)
    assert again.resumed and (again.k, again.delta, again.at) == (1, 0.1, use.at)
    assert log.uses(tasks(0, 50)) == 1

    for search, claim in (("search-2", CLAIM), ("search-1", Claim("error", 0.2, 0.1, bound="clopper-pearson"))):
        with pytest.raises(InvalidInput, match=r"used before \(1 time.*fresh examples.*at delta 0\.025"):
            Calibration(tasks(0, 50), log).open(search, claim)
    assert log.uses(tasks(0, 50)) == 1


def test_further_uses_split_delta_and_say_so(tmp_path: Path) -> None:
    log = UseLog(tmp_path / "uses.db")
    uses = [Calibration(tasks(0, 100), log, reuse="split").open(f"search-{k}", CLAIM)[1] for k in range(1, 4)]
    assert [use.delta for use in uses] == [0.05, 0.025, 0.0125]
    assert [use.spent for use in uses] == pytest.approx([0.05, 0.075, 0.0875])
    assert "use 3" in str(uses[2]) and "0.0125" in str(uses[2]) and "0.0875" in str(uses[2])


def test_one_example_in_common_counts(tmp_path: Path) -> None:
    log = UseLog(tmp_path / "uses.db")
    Calibration(tasks(0, 100), log, reuse="split").open("a", CLAIM)
    renamed = [Task(id=f"new{t.id}", messages=t.messages, gold="1", group=f"g{t.id}") for t in tasks(99, 200)]
    _, use = Calibration(renamed, log, reuse="split").open("b", CLAIM)
    assert use.k == 2
    with pytest.raises(InvalidInput, match="some of the examples were used"):
        Calibration(tasks(150, 300), log).open("c", CLAIM)
    assert Calibration(tasks(200, 300), log).open("c", CLAIM)[1].k == 1


def test_for_every_example_the_deltas_sum_to_at_most_delta(tmp_path: Path) -> None:
    log = UseLog(tmp_path / "uses.db")
    total: dict[str, float] = {}
    for k, (start, stop) in enumerate([(0, 60), (30, 90), (0, 90), (60, 120), (0, 120), (50, 100)]):
        given, use = Calibration(tasks(start, stop), log, reuse="split").open(
            f"s{k}", Claim("drop", 0.3, 0.1, bound="betting")
        )
        for task in given:
            total[task.id] = total.get(task.id, 0) + (use.delta or 0)
    assert max(total.values()) <= 0.1


def test_after_a_full_first_use_the_sum_is_told(tmp_path: Path) -> None:
    log = UseLog(tmp_path / "uses.db")
    Calibration(tasks(0, 100), log).open("a", CLAIM)
    _, use = Calibration(tasks(0, 100), log, reuse="split").open("b", CLAIM)
    assert use.delta == 0.025 and use.spent == pytest.approx(0.125)


def test_conformal_risk_control_has_nothing_to_split(tmp_path: Path) -> None:
    log = UseLog(tmp_path / "uses.db")
    assert Calibration(tasks(0, 20), log).open("a", CRC)[1].delta is None
    with pytest.raises(InvalidInput, match="no delta to split"):
        Calibration(tasks(0, 20), log, reuse="split").open("b", CRC)


def test_given_out_once(tmp_path: Path) -> None:
    calibration = Calibration(tasks(0, 50), UseLog(tmp_path / "uses.db"))
    with pytest.raises(InvalidInput, match="frozen search"):
        calibration.open(" ", CLAIM)
    calibration.open("a", CLAIM)
    with pytest.raises(InvalidInput, match="given out before"):
        calibration.open("a", CLAIM)


@pytest.mark.parametrize(
    ("claim", "n"),
    [
        (CLAIM, math.ceil(math.log(0.1) / math.log(0.9))),  # 0.9 ** n <= 0.1
        (Claim("disagree", 0.05, 0.1, bound="clopper-pearson"), 45),
        (Claim("error", 0.1, 0.1, bound="hoeffding-bentkus"), 22),  # the same tail: Hoeffding at a mean of 0
        (CRC, 9),  # 1 <= 0.1 (n + 1)
    ],
)
def test_too_few_examples_for_any_outcome(tmp_path: Path, claim: Claim, n: int) -> None:
    log = UseLog(tmp_path / "uses.db")
    with pytest.raises(InvalidInput, match=f"too few.*at least {n}"):
        Calibration(tasks(0, n - 1), log).open("a", claim)
    assert log.uses(tasks(0, n)) == 0  # what was refused was not counted
    assert Calibration(tasks(0, n), log).open("a", claim)[1].k == 1


def test_groups_are_what_counts_not_examples(tmp_path: Path) -> None:
    related = [Task(id=t.id, messages=t.messages, gold="1", group=f"g{i % 5}") for i, t in enumerate(tasks(0, 100))]
    calibration = Calibration(related, UseLog(tmp_path / "uses.db"))
    assert (calibration.n, calibration.examples) == (5, 100)
    with pytest.raises(InvalidInput, match="5 groups"):
        calibration.open("a", CLAIM)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("error", 0.0, 0.1), "alpha 0.0"),
        (("error", 1.0, 0.1), "alpha 1.0"),
        (("error", math.nan, 0.1), "alpha nan"),
        (("error", 0.1, 0.0), "delta 0.0"),
        (("error", 0.1, 1.0), "delta 1.0"),
        (("error", 0.1, None), "delta None"),
        (("errors", 0.1, 0.1), "did you mean 'error'"),
        (("error", 0.1, 0.1, "learn-then-tset"), "did you mean 'learn-then-test'"),
        (("error", 0.1, 0.1, "learn-then-test", "beting"), "did you mean 'betting'"),
        (("drop", 0.1, 0.1, "learn-then-test", "clopper-pearson"), "use betting"),
        (("error", 0.1, 0.1, "conformal-risk-control"), "no delta"),
    ],
)
def test_claims_that_make_no_sense(fields: tuple[object, ...], words: str) -> None:
    claim = (*fields, "learn-then-test", "betting")[:5] if len(fields) == 3 else fields
    with pytest.raises(InvalidInput) as refused:
        Claim(*claim)  # type: ignore[arg-type]
    assert words in str(refused.value)


TAKER = """
import sys
sys.path.insert(0, sys.argv[3])
from test_calibration import CLAIM, tasks
from thrifty.tune.calibration import Calibration, UseLog
log = UseLog(sys.argv[1])
print("ready", flush=True); sys.stdin.readline()
for i in range(5):
    print(Calibration(tasks(0, 600), log, reuse="split").open(f"{sys.argv[2]}-{i}", CLAIM)[1].k)
"""


def test_two_processes_at_once_never_share_a_number(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, str(tmp_path / "uses.db"), name, here],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for run in runs:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
    numbers = [int(k) for run in runs for k in run.communicate("\n", timeout=60)[0].split()]
    assert sorted(numbers) == list(range(1, 11))


def test_threads_at_once_never_share_a_number(tmp_path: Path) -> None:
    given = tasks(0, 2000)  # enough that reading what was used before takes a while
    claim = Claim("error", 0.5, 0.1, bound="clopper-pearson")
    start = threading.Barrier(6)

    def take(name: int) -> list[int]:
        log = UseLog(tmp_path / "uses.db")
        numbers = []
        for i in range(3):
            start.wait(60)
            numbers.append(log.take(given, f"{name}-{i}", claim, "split").k)
        return numbers

    with ThreadPoolExecutor(6) as pool:
        numbers = [k for found in pool.map(take, range(6)) for k in found]
    assert sorted(numbers) == list(range(1, 19))


CRASH = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_calibration import CLAIM, tasks
from thrifty.tune.calibration import Calibration, UseLog
Calibration(tasks(0, 50), UseLog(sys.argv[1])).open("a", CLAIM)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_right_after_opening_has_counted(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path / "uses.db"), str(Path(__file__).parent)])
    assert done.returncode == -signal.SIGKILL
    log = UseLog(tmp_path / "uses.db")
    assert log.uses(tasks(0, 50)) == 1
    assert Calibration(tasks(0, 50), log).open("a", CLAIM)[1].resumed


def test_where_a_use_cannot_be_counted_nothing_is_given_out(tmp_path: Path) -> None:
    path = tmp_path / "uses.db"
    log = UseLog(path)
    path.write_bytes(b"no database at all, " * 500)
    calibration = Calibration(tasks(0, 50), log)
    with pytest.raises(ThriftyError, match="cannot be counted"):
        calibration.open("a", CLAIM)
    with pytest.raises(InvalidInput, match="log of calibration uses"):
        UseLog(path)


def test_the_log_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_log() == tmp_path / "thrifty" / "calibration-uses.db"
    monkeypatch.setenv("XDG_STATE_HOME", f"relative{os.sep}path")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_log() == tmp_path / ".local" / "state" / "thrifty" / "calibration-uses.db"
