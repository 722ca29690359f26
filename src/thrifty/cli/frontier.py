"""`thrifty frontier`: the main job. Plans on tasks, score against spend, resumable, with a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thrifty.budget import Account
from thrifty.cli._options import (
    DEFAULT_MODEL,
    Embedder,
    Json,
    LedgerFile,
    Limits,
    Model,
    Prices,
    budget_of,
    command_line,
    fleet_of,
    ledger_of,
    print_json,
    table_of,
)
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput, PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from thrifty.bench.study import Item, Study
    from thrifty.engine import Engine
    from thrifty.plan import Plan


def frontier(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="Suites (retrieval, arithmetic, easy, thinker, thinker-catalogue, thinker-pairs, demo), "
            "reasoning-gym:NAME, or task files in JSONL. Without one: thinker for the lab's thinker, else demo."
        ),
    ] = None,
    model: Model = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option("--plan", "-p", help="A plan in TOML; may be repeated. The first is the reference."),
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option("--axis", help="What is saved: usd, tokens, input, output, or another field of Spend or Work."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results, picture and page.")] = Path(
        "out/frontier"
    ),
    n: Annotated[int | None, typer.Option("--n", min=1, help="Examples a suite.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The suite's small size: a run of at most ten minutes on two cores.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Makes tasks, order and sampling repeatable.")] = 0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to each example.")] = 1,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", "-c", min=1, help="Examples in flight, over all workers. Without it: 8, the thinker's 32."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-w",
            min=1,
            help="Measure in so many processes, each with its own engines and its share of the cores. With --ray: so "
            "many workers on the cluster (otherwise one a GPU, or one a node).",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Measure on a Ray cluster: HOST:PORT of its head, or auto for the cluster of this machine.",
        ),
    ] = None,
    embedder: Embedder = "minilm",
    judge: Annotated[str | None, typer.Option("--judge", help="Engine for tasks that a judge scores.")] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Run code that a model wrote even where this machine cannot isolate it.")
    ] = False,
    budget: Limits = None,
    results: Annotated[Path | None, typer.Option("--from", help="Report on this results file; nothing is run.")] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Also write compact results, without generated text, into this folder."),
    ] = None,
    prices: Prices = None,
    ledger: LedgerFile = None,
    json: Json = False,
) -> None:
    """Measure plans on tasks: score against spend, with paired intervals, beside the unmodified engine.

    Prints a table a suite and writes results.jsonl, frontier.png and report.html. Started again, it goes on where it
    stopped. --budget limits the whole run, its workers together. A worker that dies is replaced and its examples are
    measured again; what it had spent stays in the ledger.
    """
    try:
        from rich.console import Console

        from thrifty.bench.row import check_axis
        from thrifty.bench.study import study, study_from
    except ImportError as error:
        raise InvalidInput("the bench needs its extra: pip install 'thrifty[bench]'") from error

    console = None if json else Console()
    if results is not None:
        target = out if out != Path("out/frontier") else None
        _finish(study_from(results, axis=axis, out=target, console=console), json, save)
        return
    limits = budget_of(budget)
    if axis is not None:
        check_axis(axis)
    plans = [_load(path) for path in plan or ()]
    names = suites or [_default(model)]
    specs = _specs(names, plans, model, embedder, judge)
    fleet = fleet_of(specs, workers, ray, prices)
    book = None
    try:
        engines = _engines(specs, prices) if fleet is None else fleet.engines
        items = _items(names, plans, engines, n, quick, seed)
        book = ledger_of(ledger)
        found = study(
            items,
            engines,
            out,
            axis=axis,
            seeds=(seed,),
            samples=samples,
            concurrency=concurrency,
            unsafe=unsafe,
            fleet=fleet,
            account=Account("frontier", limits, ledger=book),
            command=command_line(),
            console=console,
        )
    finally:
        if fleet is not None:
            fleet.close()
        if book is not None:
            book.close()  # type: ignore[attr-defined]
    _finish(found, json, save)


def _default(model: str | None) -> str:
    """The suite that is measured where none is named: the lab's thinker is measured on what it was made for."""
    from thrifty.lab.suite import is_thinker

    return "thinker" if model is not None and is_thinker(model) else "demo"


def _items(
    names: Sequence[str],
    plans: Sequence[Plan],
    engines: Mapping[str, Engine],
    n: int | None,
    quick: bool,
    seed: int,
) -> list[Item]:
    from dataclasses import replace

    from thrifty.bench import suites
    from thrifty.bench.study import Item, count_with, item_of
    from thrifty.bench.task import load, suite

    items: list[Item] = []
    for name in names:
        if Path(name).exists():
            tasks = load(name)
            if n is not None and n > len(tasks):
                raise InvalidInput(f"{name}: has {len(tasks):,} tasks, and --n {n:,} were asked: give fewer")
            tasks = tasks[: n or None]
            items.append(Item(Path(name).stem, plans or suites.find("arithmetic")[0].plans(), tasks))
        elif name.startswith("reasoning-gym:"):
            number = n or (8 if quick else 40)
            tasks = suite(name, number, seed, count=count_with(engines["answer"]))
            items.append(Item(name.replace(":", "-"), plans or suites.find("arithmetic")[0].plans(), tasks))
        else:
            for found in suites.find(name):
                item = item_of(found, engines, n=n, quick=quick, seed=seed)
                items.append(replace(item, plans=plans) if plans else item)
    return items


def _engines(specs: Mapping[str, str], prices: Path | None) -> dict[str, Engine]:
    from thrifty.engines.spec import resolve_roles

    return resolve_roles(specs, prices=table_of(prices))


def _specs(
    names: Sequence[str], plans: Sequence[Plan], model: str | None, embedder: str, judge: str | None
) -> dict[str, str]:
    """Specifications of the engines by role; a model that was asked for answers in the place of the plans'. Raises
    InvalidInput for what cannot be read, before anything is loaded."""
    from thrifty.bench import suites
    from thrifty.engines.local import packaged
    from thrifty.engines.spec import read
    from thrifty.lab.suite import is_thinker

    used = list(plans)
    for name in names:
        if name.endswith((".jsonl", ".json")) and not Path(name).exists():
            raise InvalidInput(f"task file {name}: there is no such file")
        if not used and not Path(name).exists():
            known = "arithmetic" if name.startswith("reasoning-gym:") else name
            used += [p for found in suites.find(known) for p in found.plans()]
    roles = {role for plan in used for role in plan.needs()} - {"answer", "embedder"}
    others = model or DEFAULT_MODEL
    specs = {"answer": others, **dict.fromkeys(roles, others)}
    if "scorer" in roles and is_thinker(others) and packaged.present("thinker-verifier"):
        specs["scorer"] = "thinker-verifier"  # made from the thinker's own traces
    if any("embedder" in plan.needs() for plan in used):
        specs["embedder"] = embedder
    if judge is not None:
        specs["judge"] = judge
    named: dict[str, Plan] = {}
    for plan in used:
        for role, spec in plan.engines.items():
            if role == "answer" and model is not None:
                continue
            other = named.setdefault(role, plan)
            if other.engines[role] != spec:
                raise PlanError(
                    f"plans {other.name!r} and {plan.name!r} name different engines for the role {role!r}: a frontier "
                    "compares plans on the same engines; run one for each"
                )
            specs[role] = spec
    for spec in specs.values():
        read(spec)
    return specs


def _load(path: Path) -> Plan:
    from thrifty.plan import Plan

    return Plan.load(path)


def _finish(found: Study, json: bool, save: Path | None) -> None:
    """Prints where things are; a run that is not complete exits with the code of its cause."""
    if save is not None and found.results is not None:
        from thrifty.bench.compact import write
        from thrifty.bench.store import read

        for path in write(read(found.results), save):
            print(f"saved {path}", file=sys.stderr)
    if json:
        print_json(found.to_dict())
    else:
        for file in (found.results, found.picture, found.page):
            if file is not None:
                typer.echo(f"wrote {file}" if file != found.results else f"results are in {file}")
    stopped = next((o.stopped for o in found.outcomes if o.stopped), None)
    if stopped:
        raise SystemExit(BudgetExceeded.exit_code)
    if not found.complete:
        raise SystemExit(EngineError.exit_code)
