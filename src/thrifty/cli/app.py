"""The verbs, and the options that several of them share."""

from __future__ import annotations

from typing import Annotated

import typer

from thrifty import __version__
from thrifty.cli import ask, count, frontier, ledger, meter, methods, models, plan, run, serve, tune, verify

app = typer.Typer(
    name="thrifty",
    help="Token budgets for language and vision-language models.",
    epilog="Exit codes: 0 done, 2 bad input, 3 a budget refused, 4 an engine failed, 5 the ledger or a "
    "certificate does not verify, 6 nothing was certified, 130 interrupted (run the same command again to resume).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"thrifty {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Token budgets for language and vision-language models."""


app.command("ask")(ask.ask)
app.command("run")(run.run)
app.command("count")(count.count)
app.command("frontier")(frontier.frontier)
app.command("tune")(tune.tune)
app.command("verify")(verify.verify)
app.command("serve")(serve.serve)
app.add_typer(methods.app, name="methods")
app.add_typer(plan.app, name="plan")
app.add_typer(ledger.app, name="ledger")
app.add_typer(models.app, name="models")
app.add_typer(meter.app, name="meter")
