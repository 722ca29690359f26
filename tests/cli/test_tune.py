"""`thrifty tune`, as a user runs it: exit codes, files, one clear line for what cannot be done, JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from thrifty import Plan
from thrifty.bench.task import Task, save
from thrifty.cli import main
from thrifty.tune.certificate import Certificate

# The engine echoes: two words hold the answer, one does not, and all cost by the word.
TASKS = [
    Task(
        id=f"t{i}",
        messages=({"role": "user", "content": f"Item {i} and then a good many words that nobody needs"},),
        gold=f"Item {i}",
        scorer="contains",
        max_tokens=50,
    )
    for i in range(160)
]
GOOD = 'name="lengths"\n[budget]\noutput = { values = [2, 1] }\n'
BAD = 'name="lengths"\n[budget]\noutput = { values = [1] }\n'


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    save(TASKS, tmp_path / "tasks.jsonl")
    (tmp_path / "good.toml").write_text(GOOD)
    (tmp_path / "bad.toml").write_text(BAD)
    (tmp_path / "key").write_bytes(b"0123456789abcdef0123456789abcdef")


class Command:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self._patch, self._capture = folder, monkeypatch, capfd

    def __call__(self, *arguments: Any, verb: str = "tune") -> tuple[int, str, str]:
        words = ["thrifty", verb, *map(str, arguments)]
        if verb == "tune":
            words += ["--model", "scripted:echo", "--uses", str(self.folder / "uses.db")]
        self._patch.setattr(sys, "argv", words)
        self._capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capture.readouterr()
        return int(ended.value.code or 0), out, err

    def tune(self, *arguments: Any, space: str = "good.toml") -> tuple[int, str, str]:
        there = self.folder
        return self(there / "tasks.jsonl", "--space", there / space, "--out", there / "out", *arguments)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def test_a_plan_is_certified_and_verifies(command: Command, tmp_path: Path) -> None:
    code, out, _ = command.tune("--traffic", "100000/month", "--sign", tmp_path / "key")
    assert code == 0 and out.startswith("certified: no method [output=2]") and "at most 0.05" in out
    assert "a month: $" in out and "of a naive grid's" in out
    made = tmp_path / "out"
    assert Plan.load(made / "plan.toml").budget.output == 2
    assert {p.name for p in made.iterdir()} >= {
        "plan.toml",
        "certificate.json",
        "report.html",
        "results.jsonl",
        "search.json",
    }
    code, out, _ = command(
        made / "certificate.json", "--data", tmp_path / "tasks.jsonl", "--key", tmp_path / "key", verb="verify"
    )
    assert code == 0 and out.endswith("verified\n")
    changed = [*TASKS[:-1], Task(id="new", messages=TASKS[0].messages, gold="x")]
    save(changed, tmp_path / "changed.jsonl")
    code, _, err = command(made / "certificate.json", "--data", tmp_path / "changed.jsonl", verb="verify")
    assert code == 5 and "not those that were used" in err and err.count("\n") == 1


def test_the_same_command_again_changes_nothing_and_pays_nothing(command: Command, tmp_path: Path) -> None:
    assert command.tune()[0] == 0
    made = tmp_path / "out"
    before = {name: (made / name).read_bytes() for name in ("certificate.json", "plan.toml", "results.jsonl")}
    code, out, err = command.tune()
    assert code == 0 and "certified" in out and "(resumed)" in err
    assert {name: (made / name).read_bytes() for name in before} == before
    assert Certificate.load(made / "certificate.json").uses == 1


def test_json_is_one_document(command: Command, tmp_path: Path) -> None:
    code, out, _ = command.tune("--json", "--traffic", "10/second")
    found = json.loads(out)
    assert code == 0 and found["certified"] and found["usd_a_month"]["saved"]["value"] > 0
    assert found["tests"][0]["p_value"] < 0.1 and Path(found["files"]["report.html"]).exists()


def test_nothing_certified_has_its_own_code_and_says_what_would_do(command: Command, tmp_path: Path) -> None:
    code, out, err = command.tune(space="bad.toml")
    assert code == 6 and "nothing is certified" in err.splitlines()[-1] and "unused" in err
    made = tmp_path / "out"
    assert not (made / "certificate.json").exists() and not (made / "plan.toml").exists()
    assert "Nothing is certified" in (made / "report.html").read_text()
    code, out, _ = command.tune("--json", space="bad.toml")
    assert code == 6 and json.loads(out)["certified"] is False


def test_a_dry_run_spends_and_writes_nothing(command: Command, tmp_path: Path) -> None:
    code, out, _ = command.tune("--dry-run")
    assert code == 0 and "2 plans of 2 choices" in out and "calibration 80 groups" in out and "nothing was spent" in out
    assert not (tmp_path / "out").exists() and not (tmp_path / "uses.db").exists()
    code, out, _ = command.tune("--dry-run", "--json")
    assert json.loads(out)["plans"] == 3


def test_conformal_risk_control(command: Command, tmp_path: Path) -> None:
    code, out, _ = command.tune("--method", "crc", "--loss", "error")
    assert code == 0 and "conformal risk control" in out
    assert Certificate.load(tmp_path / "out" / "certificate.json").delta is None


def test_a_budget_too_small_for_any_test(command: Command) -> None:
    code, _, err = command.tune("--budget", "tokens=3000")
    assert code == 3 and "larger budget" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--alpha", "0"), "alpha 0"),
        (("--alpha", "1"), "alpha 1"),
        (("--delta", "1"), "delta 1"),
        (("--loss", "lost"), "unknown loss"),
        (("--bound", "betting", "--method", "crc"), "no --bound"),
        (("--bound", "clopper-pearson"), "clopper-pearson"),
        (("--method", "lt"), "unknown --method"),
        (("--splits", "0.3,0.7"), "three numbers"),
        (("--splits", "a,b,c"), "three shares"),
        (("--splits", "0,0.8,0.2"), "search part has no examples"),
        (("--n", "40", "--loss", "error"), "too few for any bound"),
        (("--axis", "tokenz"), "did you mean 'tokens'"),
        (("--traffic", "many"), "traffic 'many'"),
        (("--reuse", "always"), "--reuse"),
        (("--strategy", "magic"), "strategy"),
        (("--holdout", "h.jsonl"), "--calibration"),
        (("--budget", "tokens"), "NAME=NUMBER"),
    ],
)
def test_bad_options_are_one_clear_line_and_nothing_is_written(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    code, _, err = command.tune(*arguments)
    assert code == 2 and says in err and err.count("\n") == 1 and err.startswith("thrifty: ")
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_parts_as_files_must_not_share_an_example(command: Command, tmp_path: Path) -> None:
    save(TASKS[100:], tmp_path / "calibration.jsonl")
    save(TASKS[:100], tmp_path / "search.jsonl")
    there = (
        "--space",
        tmp_path / "good.toml",
        "--out",
        tmp_path / "out",
        "--calibration",
        tmp_path / "calibration.jsonl",
    )
    code, _, err = command(tmp_path / "tasks.jsonl", *there)
    assert code == 2 and "'t100' is in the search part and in the calibration part" in err and err.count("\n") == 1
    code, out, _ = command(tmp_path / "search.jsonl", *there, "--loss", "error")
    assert code == 0 and "betting, n = 60" in out


def test_missing_files_and_suites(command: Command, tmp_path: Path) -> None:
    assert "there is no such file" in command(tmp_path / "none.jsonl")[2]
    assert "stands for 2 suites" in command("demo")[2]
    code, _, err = command.tune(space="none.toml")
    assert code == 2 and "cannot be read" in err
