"""`thrifty ledger`: what was spent, by whom and on what; whether the record was changed; export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thrifty.cli._options import Json, print_json
from thrifty.errors import InvalidInput, LedgerChanged

if TYPE_CHECKING:
    from thrifty.ledger.query import Row

app = typer.Typer(help="Read, verify, anchor and export a ledger.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="A ledger, as --ledger wrote it.")]
KeyFile = Annotated[Path | None, typer.Option("--key", help="File with the key that checkpoints are signed with.")]
Since = Annotated[str | None, typer.Option("--since", help="From this time on (UTC), such as 2026-11-01.")]
Until = Annotated[str | None, typer.Option("--until", help="Before this time (UTC).")]
Where = Annotated[
    list[str] | None, typer.Option("--where", help="FIELD=VALUE, such as model=smollm2; may be repeated.")
]


@app.command("summary")
def summary(
    path: File,
    by: Annotated[
        str, typer.Option("--by", help="Fields, comma-separated: plan, method, model, role, account, day.")
    ] = ("model,method"),
    since: Since = None,
    until: Until = None,
    where: Where = None,
    json: Json = False,
) -> None:
    """Sum what was spent, by plan, method, model, day and so on."""
    from thrifty.ledger import open_ledger

    fields = [name.strip() for name in by.split(",") if name.strip()]
    with open_ledger(path, readonly=True) as ledger:
        rows = ledger.summary(fields, since, until, _where(where))
    if json:
        print_json([row.to_dict() for row in rows])
        return
    _table(fields, rows)


@app.command("verify")
def verify(
    path: File,
    key: KeyFile = None,
    anchor: Annotated[Path | None, typer.Option("--anchor", help="File that `thrifty ledger anchor` wrote.")] = None,
    json: Json = False,
) -> None:
    """Look for edits, deletions, truncation and reordering. Exit code 5 when something was changed."""
    from thrifty.ledger import verify as check

    report = check(path, key, anchor)
    if json:
        print_json(report.to_dict())
    else:
        typer.echo(f"{path}: {report.entries:,} entries in {report.chains} chains, {report.checkpoints} checkpoints")
        for problem in report.problems:
            typer.echo(f"problem: {problem.message}")
        for line in report.cannot_detect:
            typer.echo(f"cannot detect: {line}")
    if not report.ok:
        count = len(report.problems) + report.more
        raise LedgerChanged(f"{path}: does not verify, {count} problem{'s' if count != 1 else ''}: it was changed")
    if not json:
        typer.echo("verified")


@app.command("anchor")
def anchor(
    path: File, out: Annotated[Path, typer.Argument(help="File to write; keep it elsewhere.")], key: KeyFile = None
) -> None:
    """Write the heads of all chains to a file, so that `verify --anchor` can tell what was cut off since."""
    from thrifty.ledger import open_ledger

    with open_ledger(path, readonly=True) as ledger:
        ledger.anchor(out, key)
    typer.echo(f"wrote {out}")


@app.command("export")
def export(
    path: File,
    out: Annotated[Path, typer.Argument(help="FILE.jsonl or FILE.parquet.")],
    since: Since = None,
    until: Until = None,
    where: Where = None,
) -> None:
    """Write entries to JSONL or Parquet."""
    from thrifty.ledger import open_ledger
    from thrifty.ledger.export import export as write

    with open_ledger(path, readonly=True) as ledger:
        count = write(ledger, out, since=since, until=until, where=_where(where))
    typer.echo(f"wrote {count:,} entries to {out}")


def _where(items: list[str] | None) -> dict[str, str]:
    chosen = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise InvalidInput(f"--where {item!r}: FIELD=VALUE is needed, such as model=smollm2")
        chosen[name] = value
    return chosen


def _table(fields: list[str], rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    numbers = ("entries", "calls", "input", "cached", "output", "reasoning", "usd")
    table = Table(*fields)
    for name in numbers:
        table.add_column(name, justify="right")
    for row in rows:
        spend = row.spend
        counts = (row.entries, spend.calls, spend.input, spend.cached, spend.output, spend.reasoning)
        table.add_row(*row.key, *(f"{n:,}" for n in counts), f"{spend.usd / 1e9:.6f}")
    Console().print(table)
