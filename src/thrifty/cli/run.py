"""`thrifty run`: a file of requests through a plan, in one resumable job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from thrifty import batch
from thrifty.budget import Account
from thrifty.cli._options import (
    Embedder,
    Json,
    LedgerFile,
    Limits,
    Model,
    PlanFile,
    Prices,
    budget_of,
    build,
    complete,
    ledger_of,
    plan_of,
    print_json,
)
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput


def run(
    source: Annotated[Path, typer.Argument(help="Requests: JSONL with `prompt` or `messages`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Results: JSONL; what is there already is kept.")],
    model: Model = None,
    plan: PlanFile = None,
    budget: Limits = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests in flight.")] = 8,
    embedder: Embedder = "minilm",
    prices: Prices = None,
    ledger: LedgerFile = None,
    json: Json = False,
) -> None:
    """Answer a file of requests through a plan. Started again, it goes on where it stopped.

    --budget limits the whole run; a plan's own budget limits each request.
    """
    limits = budget_of(budget)
    # before the event loop, so that Ctrl-C need not wait until a model is loaded
    pipeline = build(plan_of(plan), model, embedder, prices)
    requests = batch.read_requests(source, pipeline)
    book = ledger_of(ledger)
    account = Account("run", limits, ledger=book)

    async def go() -> batch.Progress:
        async with pipeline:
            with _bar(json) as on_progress:
                return await batch.run(
                    requests, pipeline, out, account, concurrency=concurrency, on_progress=on_progress
                )

    try:
        progress = complete(go(), f"interrupted; run the same command again to go on from {out}")
    finally:
        if book is not None:
            book.close()  # type: ignore[attr-defined]
    spend = account.settled
    if json:
        print_json({**asdict(progress), "spend": spend.to_dict(), "out": os.fsencode(out).decode(errors="replace")})
    else:
        typer.echo(
            f"{progress.done} of {progress.total} done ({progress.resumed} were there), {progress.failed} failed, "
            f"{progress.refused} refused by the budget, {progress.rejected} rejected by the engine; "
            f"input {spend.input:,}, output {spend.output:,} tokens; {out}"
        )
    if progress.first_error:
        print(f"thrifty: {' '.join(progress.first_error.split())}", file=sys.stderr)
    if progress.refused:
        raise SystemExit(BudgetExceeded.exit_code)
    if progress.failed:
        raise SystemExit(EngineError.exit_code)
    if progress.rejected:
        raise SystemExit(InvalidInput.exit_code)


class _bar:
    """A progress bar on standard error, or nothing where it would be in the way."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet or not sys.stderr.isatty()

    def __enter__(self) -> Callable[[batch.Progress], None] | None:
        if self.quiet:
            return None
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        self.bar = Progress(
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.bar.start()
        self.task = self.bar.add_task("requests", total=None)
        return lambda p: self.bar.update(self.task, total=p.total, completed=p.done)

    def __exit__(self, *exc: object) -> None:
        if not self.quiet:
            self.bar.stop()
