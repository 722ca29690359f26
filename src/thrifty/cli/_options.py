"""Options that verbs share, and how their text is read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.budget import Budget
from thrifty.errors import InvalidInput
from thrifty.plan import Pipeline, Plan

if TYPE_CHECKING:
    from thrifty.ledger.entry import LedgerLike

Model = Annotated[
    str, typer.Option("--model", "-m", help="Engine: smollm2, local:FOLDER, openai:MODEL@URL, scripted:echo.")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", "-p", help="A plan in TOML; without one the engine is used as it is.")
]
Limits = Annotated[
    list[str] | None,
    typer.Option("--budget", "-b", help="A limit such as output=96, tokens=5000 or usd=0.25; may be repeated."),
]
Embedder = Annotated[str, typer.Option("--embedder", help="Engine for plans that embed.")]
LedgerFile = Annotated[Path | None, typer.Option("--ledger", help="Record what is spent in this SQLite file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def budget_of(limits: Sequence[str] | None) -> Budget:
    """`["output=96", "usd=0.25"]` as a Budget. Raises InvalidInput."""
    values: dict[str, Any] = {}
    for item in limits or ():
        name, equals, text = item.partition("=")
        if not equals:
            raise InvalidInput(f"--budget {item!r}: NAME=NUMBER is needed, such as output=96")
        number = text.replace("_", "").replace(",", "")
        try:
            values[name.strip()] = int(number) if number.lstrip("+-").isdigit() else float(number)
        except ValueError as error:
            raise InvalidInput(f"--budget {item!r}: {text!r} is no number") from error
    return Budget.from_dict(values)


def plan_of(path: Path | None) -> Plan:
    """The plan in a file, or the empty plan."""
    return Plan("plain") if path is None else Plan.load(path)


def build(plan: Plan, model: str, embedder: str) -> Pipeline:
    """The plan on the engines it names; what it does not name comes from the options."""
    from thrifty.engines.spec import resolve_roles

    roles = plan.needs()
    specs = {"answer": model, **plan.engines}
    for role in roles:
        if role not in specs:
            specs[role] = embedder if role == "embedder" else specs["answer"]
    return plan.build(resolve_roles(specs))


def ledger_of(path: Path | None) -> LedgerLike | None:
    """The ledger in a file, opened for writing; None without a file."""
    if path is None:
        return None
    from thrifty.ledger import open_ledger

    return open_ledger(path)


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    import orjson

    sys.stdout.write(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode() + "\n")
