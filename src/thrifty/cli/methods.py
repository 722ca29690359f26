"""`thrifty methods`: what can be put into a plan, and the instruments that measure or bound."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from thrifty import registry
from thrifty.cli._options import Json, print_json
from thrifty.errors import InvalidInput, nearest
from thrifty.method import Method

app = typer.Typer(
    help="List the methods, and the analyses, evaluations and bounds; or show one.", invoke_without_command=True
)


@app.callback()
def listing(context: typer.Context, json: Json = False) -> None:
    """List every method with its family, kind and source; after them the analyses, evaluations and bounds."""
    if context.invoked_subcommand is not None:
        return
    rows = [describe(registry.get(name)) for name in registry.names()]
    rows += [describe_instrument(declared) for declared in registry.instruments().values()]
    if json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "family", "kind", "needs, or is run by", "source")
    for row in rows:
        needs = row["runs"] or ", ".join(row["needs"])
        table.add_row(row["name"], row["family"], row["kind"], needs, row["paper"])
    Console().print(table)


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="A name of the list.")], json: Json = False) -> None:
    """Show one method: paper, needs, knobs, and what the bench measured. Of an instrument: paper, and what runs it."""
    if name in registry.instruments():
        _show_instrument(describe_instrument(registry.instruments()[name]), json)
        return
    if name not in registry.names():
        raise InvalidInput(nearest(name, [*registry.names(), *registry.instruments()], "method"))
    row = describe(registry.get(name))
    measured = _measured(name)
    if json:
        print_json({**row, "measured": measured})
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{row['name']}[/bold]  ({row['family']}, {row['kind']})\n{escape(row['about'])}\n")
    console.print(f"source: {escape(row['paper'])}\nneeds: {', '.join(row['needs'])}")
    for role, needs in row["roles"].items():
        console.print(f"uses an engine as {role}: {', '.join(needs)}")
    if row["knobs"]:
        table = Table("knob", "default", "allowed", "what it does")
        for knob in row["knobs"]:
            table.add_row(knob["name"], str(knob["default"]), knob["allowed"], knob["help"])
        console.print(table)
    if not measured:
        console.print("measured: not on a model yet; run `thrifty frontier`")
    for line in measured:
        console.print(f"measured: {escape(line)}")


def describe(method: type[Method]) -> dict[str, Any]:
    """A method as JSON has it."""
    knobs = [
        {"name": name, "default": default, "allowed": allowed.describe(), "help": allowed.help}
        for name, (default, allowed) in method.knobs().items()
    ]
    return {
        "name": method.name,
        "family": method().family,
        "kind": method.kind,
        "paper": method.paper,
        "version": method.version,
        "needs": sorted(method.needs),
        "roles": {role: sorted(needs) for role, needs in method.roles.items()},
        "knobs": knobs,
        "identity": method.identity,
        "no_identity": method.no_identity,
        "about": (method.__doc__ or "").strip().split("\n\n")[0],
        "runs": None,
    }


def describe_instrument(declared: registry.Declared) -> dict[str, Any]:
    """An analysis, evaluation or bound as JSON has it: the same keys, and what runs it."""
    found = declared.instrument
    return {
        "name": found.name,
        "family": declared.folder,
        "kind": found.kind,
        "paper": found.paper,
        "version": 1,
        "needs": [],
        "roles": {},
        "knobs": [],
        "identity": None,
        "no_identity": "it changes no call",
        "about": declared.about,
        "runs": found.runs,
    }


def _show_instrument(row: dict[str, Any], json: bool) -> None:
    if json:
        print_json(row)
        return
    from rich.console import Console
    from rich.markup import escape

    Console().print(
        f"[bold]{row['name']}[/bold]  ({row['family']}, {row['kind']})\n{escape(row['about'])}\n\n"
        f"source: {escape(row['paper'])}\nrun by: {escape(row['runs'])}"
    )


def _measured(name: str) -> list[str]:
    """What the committed results say of a method, a line a plan; empty where nothing was measured."""
    import json
    from importlib.resources import files

    data = files("thrifty.bench") / "measured.json"
    lines: list[str] = json.loads(data.read_text(encoding="utf-8")).get(name, []) if data.is_file() else []
    return lines
