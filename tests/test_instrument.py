"""Analyses, evaluations and bounds in the registry: found without importing them, and what is said to run them does."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from thrifty import InvalidInput, PlanError, registry
from thrifty.cli.app import app
from thrifty.instrument import KINDS, Instrument

GOOD = {"name": "a", "kind": "bound", "paper": "b", "runs": "thrifty tune"}


@pytest.mark.parametrize("name", registry.instruments())
def test_what_runs_it_is_there(name: str) -> None:
    found = registry.instruments()[name].instrument
    assert found.kind in KINDS and found.name == name
    if not found.runs.startswith("thrifty "):
        module, _, function = found.runs.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        return
    command: Any = typer.main.get_command(app)
    words = found.runs.split()[1:]
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {name for p in command.params for name in p.opts}
    assert all(word in options for word in words[::2]), "what is left are options and their values"


def test_the_declarations_are_what_the_modules_hold() -> None:
    root = Path(registry.__file__).parent
    held: dict[str, Instrument] = {}
    for folder in registry.INSTRUMENTS:
        for file in (root / folder).glob("*.py"):
            if "INSTRUMENT = Instrument(" in file.read_text(encoding="utf-8"):
                module = importlib.import_module(f"thrifty.{folder}.{file.stem}")
                held[module.INSTRUMENT.name] = module.INSTRUMENT
    assert held == {name: declared.instrument for name, declared in registry.instruments().items()}
    assert {i.kind for i in held.values()} == set(KINDS)


def test_listing_imports_nothing() -> None:
    code = (
        "import sys, thrifty.registry as r; r.instruments(); "
        "print([m for m in sys.modules if m.startswith(('numpy', 'thrifty.meter', 'thrifty.tune', 'thrifty.bench'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_name_stands_for_two_things() -> None:
    assert not set(registry.instruments()) & set(registry.names())


@pytest.mark.parametrize(
    "value",
    [
        "3",
        "Instrument('a', 'bound', 'b', 'c')",
        "Instrument(name='a')",
        "Instrument(name='a', kind='bound', paper=TITLE, runs='c')",
        "Instrument(**GOOD)",
        "Instrument(name='a', kind='bound', paper='b', runs='c', knob=1)",
    ],
)
def test_a_declaration_that_is_no_literal_is_refused_with_its_place(value: str) -> None:
    tree = ast.parse(f"GOOD = {GOOD!r}\nTITLE = 'b'\nINSTRUMENT = {value}\n")
    with pytest.raises(PlanError, match="meter/x.py: INSTRUMENT = Instrument"):
        registry._declaration(tree, "meter/x.py")


def test_a_declaration_is_read_and_its_absence_told() -> None:
    text = "INSTRUMENT = Instrument(" + ", ".join(f"{k}={v!r}" for k, v in GOOD.items()) + ")"
    assert registry._declaration(ast.parse(text), "x") == Instrument(**GOOD)
    assert registry._declaration(ast.parse("X = 1"), "x") is None


@pytest.mark.parametrize("change", [{"kind": "method"}, {"paper": ""}, {"runs": ""}])
def test_an_unknown_kind_and_an_empty_field_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(PlanError, match="instrument 'a'"):
        Instrument(**{**GOOD, **change})


def test_the_command_line_lists_and_shows_them() -> None:
    runner = CliRunner()
    rows = json.loads(runner.invoke(app, ["methods", "--json"]).stdout)
    listed = {row["name"]: row for row in rows}
    assert set(listed) == {*registry.names(), *registry.instruments()} and len(rows) == len(listed)
    assert len({frozenset(row) for row in rows}) == 1, "one form for all"
    assert all((row["runs"] is None) == (row["name"] in registry.names()) for row in rows)
    shown = json.loads(runner.invoke(app, ["methods", "show", "conformal-risk-control", "--json"]).stdout)
    assert shown == listed["conformal-risk-control"] and shown["kind"] == "bound" and "alpha" in shown["about"]
    said = runner.invoke(app, ["methods", "show", "puzzle-probes"]).stdout
    assert "run by: thrifty.meter.puzzle_probes:probe" in said and "Illusion of Thinking" in said


def test_a_misspelt_name_is_refused_with_the_nearest_of_both() -> None:
    for given, offered in (("puzzel-probes", "puzzle-probes"), ("beem", "beam")):
        result = CliRunner().invoke(app, ["methods", "show", given])
        assert isinstance(result.exception, InvalidInput) and offered in str(result.exception)
