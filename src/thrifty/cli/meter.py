"""`thrifty meter`: what a language costs, where a pipeline's tokens go, and how agents spend."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.cli._options import Json, Prices, print_json, table_of
from thrifty.errors import InvalidInput

if TYPE_CHECKING:
    from thrifty.meter.usage_log import Log

app = typer.Typer(help="Analyse token spending: languages, stages of a pipeline, agents.", no_args_is_help=True)

LogFile = Annotated[
    Path, typer.Argument(help="A log: OpenAI-style JSON lines with usage, or OpenTelemetry GenAI spans in JSON.")
]


@app.command("premium")
def premium(
    texts: Annotated[
        list[str], typer.Argument(help="LANGUAGE=FILE for each language of one parallel text, a segment a line.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Model whose tokenizer counts.")] = "gpt-4o",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="A tokenizer by name, or a tokenizer.json, in its place.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Language that the others are compared with; the first by default."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Take each file as one segment, not a segment a line.")
    ] = False,
    json: Json = False,
) -> None:
    """Tokens that the same content takes in different languages, and each language's premium over a reference.

    The lines of all files must correspond. A premium multiplies the price, and shrinks the context as much.
    """
    from thrifty.meter.counting import Counting
    from thrifty.meter.premium import premiums

    parallel: dict[str, list[str]] = {}
    for item in texts:
        language, equals, file = item.partition("=")
        if not (language and equals and file) or language in parallel:
            raise InvalidInput(f"{item!r}: LANGUAGE=FILE is needed, each language once, such as en=english.txt")
        parallel[language] = _segments(Path(file), whole)
    counter = Counting.of(model, tokenizer).text_tokenizer
    if counter is None:
        raise InvalidInput("premiums need a tokenizer, not an estimate")
    found = premiums(parallel, counter.count, reference or next(iter(parallel)))
    if json:
        print_json({"tokenizer": counter.name, **asdict(found)})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("language")
    for name in ("tokens", "premium", "95% interval", "tokens a character"):
        table.add_column(name, justify="right")
    for row in found.languages:
        spread = f"{row.low:.2f} to {row.high:.2f}" if row.low is not None and row.high is not None else ""
        table.add_row(row.language, f"{row.tokens:,}", f"{row.premium:.2f}", spread, f"{row.per_character:.2f}")
    Console().print(table)
    typer.echo(
        f"tokenizer {counter.name}, {found.segments:,} segments, reference {found.reference}; "
        f"variance of the token counts {found.variance:,.0f}"
    )


@app.command("profile")
def profile(
    log: LogFile,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="PHASE=STAGE puts a phase of the log into a stage; may be repeated."),
    ] = None,
    chatdev: Annotated[
        bool, typer.Option("--chatdev", help="Map ChatDev's phases to the stages of the paper.")
    ] = False,
    cap: Annotated[
        list[str] | None,
        typer.Option("--cap", help="STAGE=ROUNDS: what ending a stage after so many rounds would have saved."),
    ] = None,
    prices: Prices = None,
    json: Json = False,
) -> None:
    """Where a pipeline's tokens go: each stage's input, output and reasoning tokens, its share, its rounds."""
    from thrifty.meter import profile as stages

    read = _log(log)
    names = dict(stages.CHATDEV) if chatdev else {}
    names.update(_pair(item, "--stage", "PHASE=STAGE") for item in stage or ())
    found = stages.profile(read.records, names, table_of(prices))
    caps: list[dict[str, Any]] = []
    for item in cap or ():
        name, most = _pair(item, "--cap", "STAGE=ROUNDS")
        if not most.isascii() or not most.isdigit() or len(most) > 9:
            raise InvalidInput(f"--cap {item!r}: STAGE=ROUNDS with a whole number is needed, such as review=2")
        saved, runs = stages.capped(read.records, name, int(most), names)
        caps.append({"stage": name, "rounds": int(most), "saved": saved.tokens, "runs": runs})
    if json:
        print_json({**found.to_dict(), "caps": caps, **_told(read)})
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    total = found.total
    parts = [name for name in ("input", "cached", "output", "reasoning") if getattr(total, name)]
    table = Table()
    table.add_column("stage", no_wrap=True)
    for column in ("calls", *parts, "tokens", "mean share", "pooled share", "rounds"):
        table.add_column(column, justify="right")
    for row in found.stages:
        counts = (row.spend.calls, *(getattr(row.spend, name) for name in parts), row.spend.tokens)
        shares = f"{row.mean_share:.1%}", f"{row.pooled_share:.1%}"
        table.add_row(escape(row.stage), *(f"{n:,}" for n in counts), *shares, str(row.rounds))
    Console().print(table)
    typer.echo(
        f"{found.tasks:,} tasks, {total.calls:,} calls, {total.tokens:,} tokens; input {_part(total.input, total)}"
    )
    if found.repeated is not None:
        typer.echo(f"{found.repeated:.1%} of the input repeats messages that the same run had sent before")
    for row_ in caps:
        share = row_["saved"] / total.tokens if total.tokens else 0.0
        typer.echo(
            f"{row_['stage']} with at most {row_['rounds']} rounds: {row_['saved']:,} tokens less ({share:.1%}); "
            f"it went further in {row_['runs']} runs, and what for is not in the log"
        )
    _warn(read)


@app.command("agents")
def agents(
    log: LogFile,
    bins: Annotated[int, typer.Option("--bins", help="Ranges of cost for success by cost.")] = 5,
    prices: Prices = None,
    json: Json = False,
) -> None:
    """How agents spend: input and output, runs of one task compared, success by cost, models, predictions."""
    from thrifty.meter import agent_report

    read = _log(log)
    found = agent_report.report(read.records, bins, table_of(prices))
    if json:
        print_json({**found.to_dict(), **_told(read)})
        return
    for line in found.lines():
        typer.echo(line)
    _warn(read)


def _log(path: Path) -> Log:
    from thrifty.meter.usage_log import read

    return read(path)


def _told(log: Log) -> dict[str, Any]:
    return {"skipped": log.skipped, "why": log.why, "summing_spans": log.summed}


def _warn(log: Log) -> None:
    if log.summed:
        typer.echo(f"{log.summed:,} spans that sum others were not counted again")
    if log.skipped:
        typer.echo(f"skipped {log.skipped:,}: {'; '.join(log.why[:5])}{' ...' if log.skipped > 5 else ''}", err=True)


def _pair(item: str, option: str, form: str) -> tuple[str, str]:
    left, equals, right = item.rpartition("=")
    if not (left and equals and right):
        raise InvalidInput(f"{option} {item!r}: {form} is needed")
    return left, right


def _part(count: int, total: Any) -> str:
    return f"{count / total.tokens:.1%}" if total.tokens else "0%"


def _segments(path: Path, whole: bool) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 at byte {error.start:,}") from error
    return [text] if whole else text.rstrip("\n").split("\n")
