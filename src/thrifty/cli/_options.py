"""Options that verbs share, and how their text is read."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from thrifty.budget import Budget
from thrifty.errors import InvalidInput, ThriftyError
from thrifty.plan import Pipeline, Plan

if TYPE_CHECKING:
    from thrifty.bench.fanout import Fleet
    from thrifty.ledger.entry import LedgerLike
    from thrifty.meter.prices import PriceTable

T = TypeVar("T")

DEFAULT_MODEL = "smollm2"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Engine: smollm2, local:FOLDER, openai:MODEL@URL, scripted:echo. Without it the plan's own, else smollm2.",
    ),
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
Prices = Annotated[
    Path | None,
    typer.Option(
        "--prices", help="Price table in TOML: [models.NAME] with input and output in dollars a million tokens."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Interrupted(ThriftyError):
    """The user pressed Ctrl-C."""

    exit_code = 130


def budget_of(limits: Sequence[str] | None) -> Budget:
    """`["output=96", "usd=0.25"]` as a Budget. Raises InvalidInput."""
    values: dict[str, Any] = {}
    for item in limits or ():
        name, equals, text = (part.strip() for part in item.partition("="))
        if not (name and equals):
            raise InvalidInput(f"--budget {item!r}: NAME=NUMBER is needed, such as output=96")
        if name in values:
            raise InvalidInput(f"--budget {item!r}: {name} was given before: give one limit of it")
        values[name] = _number(text.replace("_", "").replace(",", ""), item)
        if name == "usd" and 0 < values[name] < 1e-9:
            raise InvalidInput(f"--budget {item!r}: below 1e-9 dollars, the smallest unit: give more, or 0")
    return Budget.from_dict(values)


def plan_of(path: Path | None) -> Plan:
    """The plan in a file, or the empty plan."""
    return Plan("plain") if path is None else Plan.load(path)


def build(plan: Plan, model: str | None, embedder: str, prices: Path | None = None) -> Pipeline:
    """The plan on the engines it names; a model that was asked for answers in the place of the plan's."""
    from thrifty.engines.spec import resolve_roles

    roles = plan.needs()
    specs = {"answer": DEFAULT_MODEL, **plan.engines}
    if model is not None:
        specs["answer"] = model
    for role in roles:
        if role not in specs:
            specs[role] = embedder if role == "embedder" else specs["answer"]
    return plan.build(resolve_roles(specs, prices=table_of(prices)))


def table_of(path: Path | None) -> PriceTable | None:
    """The price table in a file; None without a file: local engines have a default, servers no prices."""
    from thrifty.meter.prices import PriceTable

    return None if path is None else PriceTable.from_toml(path)


def ledger_of(path: Path | None) -> LedgerLike | None:
    """The ledger in a file, opened for writing; None without a file."""
    if path is None:
        return None
    from thrifty.ledger import open_ledger

    return open_ledger(path)


def fleet_of(specs: Mapping[str, str], workers: int | None, ray: str | None, prices: Path | None) -> Fleet | None:
    """The workers that were asked for; None when this process measures."""
    if ray is not None:
        from thrifty.bench.ray_cluster import RayCluster

        return RayCluster(ray, specs, workers, prices=table_of(prices))
    if workers is None:
        return None
    from thrifty.bench.workers import Processes

    return Processes(specs, workers, prices=table_of(prices))


def command_line() -> str:
    """What was typed, for the results file, without the passwords of addresses."""
    return re.sub(r"://[^\s/@]*@", "://", shlex.join(["thrifty", *sys.argv[1:]]))


def print_json(data: Any) -> None:
    """One JSON document on standard output, in UTF-8 whatever the locale says."""
    import orjson

    document = orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE)
    sys.stdout.flush()
    sys.stdout.buffer.write(document)


def complete(work: Coroutine[Any, Any, T], told: str) -> T:
    """Runs a coroutine to its end. Ctrl-C cancels it, which settles what is in flight, and raises Interrupted."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise Interrupted(told) from None


def _number(text: str, item: str) -> float:
    try:
        if text.lstrip("+-").isdigit():
            return int(text)
        value = float(text)
    except ValueError as error:
        raise InvalidInput(f"--budget {item!r}: {text!r} is no number") from error
    return int(value) if value.is_integer() else value
