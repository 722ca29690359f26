"""The drift monitor: no false alarms beyond epsilon, found in time, the same after a restart and under many writers."""

from __future__ import annotations

import itertools
import math
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from thrifty.errors import InvalidInput, ThriftyError
from thrifty.tune.drift import DriftMonitor, EProcess, bets, delay, e_values, reserve


def brute(losses: list[float], alpha: float) -> float:
    """The capital by its definition: a sum over the starting times and the bets of what each portion became."""
    t = len(losses)
    total = Fraction(reserve(t))
    for size in bets(alpha):
        for start in range(t):
            portion = Fraction(reserve(start)) - Fraction(reserve(start + 1))
            for loss in losses[start:]:
                portion *= 1 + Fraction(size) * (Fraction(loss) - Fraction(alpha))
            total += portion / len(bets(alpha))
    return float(total)


def run(losses: list[float], alpha: float, epsilon: float = 1e-12) -> EProcess:
    state = EProcess(alpha, epsilon)
    for loss in losses:
        state = state.observe(loss)
    return state


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.97])
def test_the_capital_is_the_mixture_it_is_said_to_be(alpha: float) -> None:
    losses = [round(x, 3) for x in np.random.default_rng(1).random(12) ** 2]
    assert math.isclose(run(losses, alpha).capital, brute(losses, alpha), rel_tol=1e-12)
    assert math.isclose(float(e_values(np.array([losses]), alpha)[0, -1]), brute(losses, alpha), rel_tol=1e-12)
    assert all(0 < size < 1 / alpha for size in bets(alpha))
    assert [reserve(0), reserve(2), reserve(14)] == [1, 0.5, 0.25]


def test_every_stream_of_0_and_1_enumerated() -> None:
    """Exact: at a mean of alpha the capital is 1 on average, and alarms have a chance of at most epsilon."""
    alpha, epsilon, length = 0.25, 0.1, 14
    streams = np.array(list(itertools.product([0.0, 1.0], repeat=length)))
    capital = e_values(streams, alpha)
    for mean in (0.25, 0.2, 0.05):
        chance = np.prod(np.where(streams == 1, mean, 1 - mean), axis=1)
        average = float(chance @ capital[:, -1])
        assert math.isclose(average, 1, rel_tol=1e-9) if mean == alpha else average < 1
        assert chance @ (capital.max(axis=1) >= 1 / epsilon) <= epsilon


STREAMS, LENGTH = 2000, 2000


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["coin", "uniform", "adversary"])
def test_false_alarms_at_the_boundary(alpha: float, kind: str) -> None:
    """2,000 streams of length 2,000 whose mean, given the past, is exactly alpha."""
    epsilon = 0.05
    rng = np.random.default_rng([7, int(alpha * 100)])
    if kind == "uniform":
        losses = rng.random((STREAMS, LENGTH)) * 2 * alpha
    elif kind == "coin":
        losses = (rng.random((STREAMS, LENGTH)) < alpha).astype(float)
    else:  # losses of 1 come in two regimes that change on what came before, as gambling traffic would have them
        losses = np.zeros((STREAMS, LENGTH))
        high = np.full(STREAMS, 1.0)
        for t in range(LENGTH):
            losses[:, t] = np.where(rng.random(STREAMS) < alpha / high, high, 0)
            high = np.where(losses[:, t] > 0, 1.0, np.where(t % 50 < 25, alpha, 1.0))
    alarms = (e_values(losses, alpha).max(axis=1) >= 1 / epsilon).mean()
    assert alarms <= epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / STREAMS)


def test_a_process_that_looks_once_too_often_would_fail_that_check() -> None:
    """The check can fail: a z test that is repeated after every request alarms far too often."""
    alpha, epsilon = 0.1, 0.05
    losses = (np.random.default_rng(3).random((STREAMS, LENGTH)) < alpha).astype(float)
    t = np.arange(1, LENGTH + 1)
    z = (losses.cumsum(axis=1) / t - alpha) / np.sqrt(alpha * (1 - alpha) / t)
    assert (z[:, 30:].max(axis=1) > 1.645).mean() > epsilon + 0.1


@pytest.mark.parametrize("good", [0, 2000])
@pytest.mark.parametrize("mean", [0.15, 0.5])
def test_drift_is_found_in_time_also_after_a_long_good_run(good: int, mean: float) -> None:
    alpha, epsilon, streams = 0.05, 0.05, 300
    rng = np.random.default_rng(11)
    forecast = delay(alpha, mean, epsilon, good)
    before = (rng.random((streams, good)) < 0.02).astype(float)
    after = (rng.random((streams, 3 * forecast)) < mean).astype(float)
    alarmed = e_values(np.hstack([before, after]), alpha) >= 1 / epsilon
    assert alarmed.any(axis=1).mean() > 0.99
    median = float(np.median(alarmed.argmax(axis=1) + 1 - good))
    assert forecast / 3 < median < 1.2 * forecast


def test_what_is_refused() -> None:
    for alpha, epsilon in ((0, 0.1), (1, 0.1), (0.1, 0), (0.1, 1), (math.nan, 0.1)):
        with pytest.raises(InvalidInput, match="strictly between 0 and 1"):
            EProcess(alpha, epsilon)
    for loss in (-0.1, 1.1, 2.0, math.nan):
        with pytest.raises(InvalidInput, match="lies in"):
            EProcess(0.1, 0.1).observe(loss)
    with pytest.raises(InvalidInput, match="no drift"):
        delay(0.1, 0.1, 0.05)


def test_an_alarm_stays() -> None:
    state = run([1.0] * 6, 0.1, 0.05)
    assert state.alarm
    later = state
    for _ in range(500):
        later = later.observe(0.0)
    assert later.alarm and later.samples == 506 and later.total == 6 and later.peak == state.peak
    assert math.isclose(later.capital, state.capital)
    assert later.lately < 1e-9 < state.lately and math.isclose(run([0.2] * 7, 0.1).lately, 0.2)


# -- in a file ---------------------------------------------------------------------------------------------------


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    losses = [float(x) for x in np.random.default_rng(5).random(60) < 0.2]
    for start in range(0, 60, 7):
        monitor = DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05)
        for loss in losses[start : start + 7]:
            monitor.observe(loss)
        monitor.close()
    again = DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05)
    assert again.state == run(losses, 0.1, 0.05)
    again.close()
    again.close()
    assert again.state == run(losses, 0.1, 0.05)
    with pytest.raises(ThriftyError, match="cannot write"):
        again.observe(0)


def test_a_bad_loss_changes_nothing(tmp_path: Path) -> None:
    monitor = DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05)
    monitor.observe(0, 1)
    with pytest.raises(InvalidInput):
        monitor.observe(0, 2.0)
    assert monitor.state == run([0, 1], 0.1, 0.05)
    monitor.close()


WRITER = """
import sys, threading
from thrifty.tune.drift import DriftMonitor
monitor = DriftMonitor(sys.argv[1], "cert", alpha=0.1, epsilon=0.05)
threads = [threading.Thread(target=lambda: [monitor.observe(0) for _ in range(int(sys.argv[2]))]) for _ in range(2)]
print("ready", flush=True)
[t.start() for t in threads]; [t.join() for t in threads]
"""


def test_two_processes_with_two_threads_each_lose_no_observation(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "drift.db"), "25"]
    writers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [w.wait(60) for w in writers] == [0, 0]
    monitor = DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05)
    assert monitor.state == run([0] * 100, 0.1, 0.05)  # all losses are equal, so every order gives this state
    monitor.close()


def test_killed_in_the_middle_of_writing(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "drift.db"), "1000000"], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    monitor = DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05)
    end = time.monotonic() + 30
    while monitor.state.samples < 20 and time.monotonic() < end:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait(30)
    writer.stdout.close()
    state = monitor.observe(0)
    assert state.samples > 20 and state == run([0] * state.samples, 0.1, 0.05)
    monitor.close()


def test_threads_share_one_monitor(tmp_path: Path) -> None:
    monitor = DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05)
    threads = [threading.Thread(target=lambda: [monitor.observe(0) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.state == run([0] * 40, 0.1, 0.05)
    monitor.close()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05).close()
    for certificate, alpha, epsilon in (("other", 0.1, 0.05), ("cert", 0.2, 0.05), ("cert", 0.1, 0.01)):
        with pytest.raises(InvalidInput, match="another certificate"):
            DriftMonitor(tmp_path / "drift.db", certificate, alpha=alpha, epsilon=epsilon)
    (tmp_path / "text.db").write_text("no database at all, " * 100)
    with pytest.raises(InvalidInput, match=r"text\.db"):
        DriftMonitor(tmp_path / "text.db", "cert", alpha=0.1, epsilon=0.05)
    with pytest.raises(InvalidInput, match="cannot be opened"):
        DriftMonitor(tmp_path, "cert", alpha=0.1, epsilon=0.05)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05).close()
    database = sqlite3.connect(tmp_path / "drift.db")
    database.execute('UPDATE drift SET state = replace(state, \'"samples": 0\', \'"samples": "x"\')')
    database.commit()
    database.close()
    with pytest.raises(InvalidInput, match="damaged"):
        DriftMonitor(tmp_path / "drift.db", "cert", alpha=0.1, epsilon=0.05)
