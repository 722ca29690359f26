"""`thrifty ask`: one question through a plan, streamed, with its receipts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from thrifty.batch import answer_line
from thrifty.budget import Account
from thrifty.call import Answer, Delta, Sampling
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
from thrifty.errors import InvalidInput, ThriftyError


def ask(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    model: Model = None,
    plan: PlanFile = None,
    budget: Limits = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="At most this many output tokens.")] = 256,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    embedder: Embedder = "minilm",
    prices: Prices = None,
    ledger: LedgerFile = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print tokens as they come.")] = True,
    json: Json = False,
) -> None:
    """Ask one question through a plan, within a budget.

    The answer goes to standard output, what it cost and what each method did to standard error.
    """
    text = _stdin() if prompt == "-" else _utf8(prompt, "the prompt")
    if not text.strip():
        raise InvalidInput("an empty prompt: give a question, or - and text on standard input")
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": _utf8(system, "--system")})
    limits = budget_of(budget)
    pipeline = build(plan_of(plan), model, embedder, prices)
    book = ledger_of(ledger)
    account = Account("ask", limits, ledger=book)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)

    shown = False

    async def emit(delta: Delta) -> None:
        nonlocal shown
        shown = shown or bool(delta.thinking or delta.text)
        sys.stdout.write(delta.thinking + delta.text)
        sys.stdout.flush()

    async def go() -> Answer:
        async with pipeline:
            streamed = {"emit": emit} if stream and not json else {}
            return await pipeline.ask(messages, account, sampling=sampling, **streamed)

    try:
        answer = complete(go(), "interrupted; what was produced is settled")
    except (ThriftyError, KeyboardInterrupt):
        if shown:
            sys.stdout.write("\n")  # what came of the answer stays; the error stands on a line of its own
            sys.stdout.flush()
        raise
    finally:
        if book is not None:
            book.close()  # type: ignore[attr-defined]
    if json:
        print_json(answer_line(answer))
        return
    sys.stdout.write("\n" if stream else answer.text + "\n")
    sys.stdout.flush()
    _print_costs(answer)


def _stdin() -> str:
    if sys.stdin is None:  # closed by who started us
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"standard input: not UTF-8 at byte {error.start}: convert it first") from error


def _utf8(text: str, what: str) -> str:
    """The text. Raises InvalidInput where the shell gave bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{what} is not UTF-8 at character {error.start}: convert it first") from error
    return text


def _print_costs(answer: Answer) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    spend = answer.spend
    parts = [f"input {spend.input:,}", f"output {spend.output:,}", f"calls {spend.calls}", f"usd {spend.usd / 1e9:.6f}"]
    if spend.cached:
        parts.insert(1, f"cached {spend.cached:,}")
    parts += [answer.finish, *(["estimated"] if answer.estimated else [])]
    console.print(f"[dim]{' · '.join(parts)}[/dim]", soft_wrap=True)
    for receipt in answer.receipts:
        mark = "fired" if receipt.fired else "did not fire"
        counts = ""
        if receipt.before is not None and receipt.after is not None:
            counts = f" ({receipt.before:,.0f} to {receipt.after:,.0f} {receipt.unit})"
        console.print(f"[dim]{escape(receipt.method)} {mark}: {escape(receipt.reason)}{counts}[/dim]", soft_wrap=True)
