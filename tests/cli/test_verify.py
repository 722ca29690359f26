"""`thrifty verify`, as a user runs it: exit codes, one clear line, JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thrifty import Budget, Plan
from thrifty.bench.task import Task, save
from thrifty.cli import main
from thrifty.ledger.chain import load_key
from thrifty.tune.calibration import Calibration, Claim, UseLog
from thrifty.tune.certificate import Certificate, SplitUsed, issue
from thrifty.tune.losses import Losses
from thrifty.tune.revocation import Revocation, revoke
from thrifty.tune.splits import data_hash, groups_of, split

TASKS = [Task(id=f"t{i}", messages=({"role": "user", "content": f"q{i}"},), gold="1") for i in range(120)]
PLAN, REFERENCE = Plan("cheap", budget=Budget(output=20)), Plan("reference")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    parts = split(TASKS)
    claim = Claim("disagree", 0.1, 0.1, bound="clopper-pearson")
    calibration, use = Calibration(parts.calibration, UseLog(tmp_path / "uses.db")).open("search", claim)
    groups = groups_of(calibration)
    values = np.zeros(len(groups))
    values[0] = 1
    made = issue(
        plan=PLAN,
        reference=REFERENCE,
        search_hash="search",
        order=[PLAN.hash],
        use=use,
        tested=[(PLAN, Losses("disagree", values, 0, 1, groups))],
        engines={"answer": {"model": "m", "dtype": "fp32"}},
        split=SplitUsed(data_hash(TASKS), (0.3, 0.5, 0.2), 0),
    )
    path = tmp_path / "certificate.json"
    made.save(path)
    save(TASKS, tmp_path / "tasks.jsonl")
    (tmp_path / "key").write_bytes(b"0123456789abcdef0123456789abcdef")
    return path


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["thrifty", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_verified(certificate: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capfd, certificate, "--data", certificate.parent / "tasks.jsonl")
    assert code == 0 and out.endswith("verified\n")
    assert "at most 0.1" in out and "mean loss 0.01667 on 60 groups" in out and "1 of 1 tested plans" in out
    assert "cannot detect: whether the whole file was written anew" in out

    code, out, _ = run(monkeypatch, capfd, certificate, "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["certified"] == 1 and found["data_checked"] is False


def test_changed_figures(certificate: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    certificate.write_text(certificate.read_text().replace('"value": 0.016', '"value": 0.006'))
    code, out, err = run(monkeypatch, capfd, certificate)
    assert code == 5 and "problem: the mean loss" in out and "verified" not in out.splitlines()
    assert err.startswith("thrifty: ") and "1 problem" in err and err.count("\n") == 1
    code, out, _ = run(monkeypatch, capfd, certificate, "--json")
    assert code == 5 and json.loads(out)["ok"] is False


def test_changed_data(certificate: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    save([replace(TASKS[0], gold="2"), *TASKS[1:]], certificate.parent / "tasks.jsonl")
    code, _, err = run(monkeypatch, capfd, certificate, "--data", certificate.parent / "tasks.jsonl")
    assert code == 5 and "not those that were used" in err and err.count("\n") == 1


def test_keys(certificate: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    key = certificate.parent / "key"
    code, _, err = run(monkeypatch, capfd, certificate, "--key", key)
    assert code == 5 and "not signed" in err
    Certificate.load(certificate).sign(load_key(key)).save(certificate)
    code, out, _ = run(monkeypatch, capfd, certificate, "--key", key)
    assert code == 0 and "written anew" not in out
    (certificate.parent / "other").write_bytes(os.urandom(32))
    assert run(monkeypatch, capfd, certificate, "--key", certificate.parent / "other")[0] == 5
    assert run(monkeypatch, capfd, certificate, "--key", key, "--public-key", key)[0] == 2
    code, _, err = run(monkeypatch, capfd, certificate, "--public-key", key)
    assert code == 2 and "Ed25519" in err


def test_revoked(certificate: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    revoke(
        certificate,
        Revocation(Certificate.load(certificate).hash, "2026-11-25T00:00:00+00:00", "drift: seen in production"),
    )
    code, out, err = run(monkeypatch, capfd, certificate)
    assert code == 5 and "revoked on 2026-11-25" in err and "verified" not in out.splitlines()
    assert json.loads(run(monkeypatch, capfd, certificate, "--json")[1])["revoked"]["reason"].startswith("drift")


def test_depths_that_no_writer_of_ours_reaches(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    deep = '"engines": {"x": ' + "[" * 400 + "]" * 400 + ","
    certificate.write_text(certificate.read_text().replace('"engines": {', deep, 1))
    code, _, err = run(monkeypatch, capfd, certificate)
    assert code == 2 and "no JSON of ours" in err and err.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"thrifty_certificate": 1}', "NaN", "[" * 5000])
def test_no_certificate(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(content)
    code, _, err = run(monkeypatch, capfd, tmp_path / "c.json")
    assert code == 2 and "c.json" in err and err.count("\n") == 1
    assert run(monkeypatch, capfd, tmp_path / "none.json")[0] == 2
