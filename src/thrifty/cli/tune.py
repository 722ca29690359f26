"""`thrifty tune`: the cheapest plan whose loss is bounded on your tasks, and the certificate that says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from thrifty.errors import InvalidInput, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from thrifty.bench.task import Task
    from thrifty.call import Sampling
    from thrifty.engine import Engine
    from thrifty.plan import Plan
    from thrifty.tune.calibration import Claim
    from thrifty.tune.certificate import SplitUsed
    from thrifty.tune.saving import Traffic
    from thrifty.tune.space import Space
    from thrifty.tune.splits import Splits
    from thrifty.tune.tuned import Tuned

EXAMPLES = 200
"""Examples of a built-in suite, where no number is given: enough for alpha 0.05 at delta 0.1 with few losses."""


def tune(
    tasks: Annotated[
        str, typer.Argument(help="Your examples: a task file in JSONL, a suite's name, or reasoning-gym:NAME.")
    ],
    model: Model = None,
    space: Annotated[
        str, typer.Option("--space", "-s", help="Plans to try: a space in TOML, or default for all methods.")
    ] = "default",
    loss: Annotated[
        str,
        typer.Option("--loss", help="What may be lost: error (1 - score), drop (against the reference) or disagree."),
    ] = "drop",
    alpha: Annotated[float, typer.Option("--alpha", help="Mean loss that is allowed, between 0 and 1.")] = 0.05,
    delta: Annotated[
        float, typer.Option("--delta", help="Chance of a wrong certificate that is allowed (not for crc).")
    ] = 0.1,
    method: Annotated[
        str, typer.Option("--method", help="ltt: learn then test; crc: conformal risk control, for one knob.")
    ] = "ltt",
    bound: Annotated[
        str,
        typer.Option(
            "--bound",
            help="betting, hoeffding-bentkus or clopper-pearson; auto: clopper-pearson for disagree without groups, "
            "else betting.",
        ),
    ] = "auto",
    axis: Annotated[
        str | None,
        typer.Option("--axis", help="What is saved: usd, tokens, input, output, or another field of Spend or Work."),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option("--splits", help="Shares of search, calibration and holdout. Default: 0.3,0.5,0.2."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Calibration examples in a file of their own.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option("--holdout", help="Holdout examples in a file of their own (with --calibration).")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="Plan that others are compared with; by default the engine as it is."),
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help="auto, exhaustive, ofat (one factor at a time), optuna or random.")
    ] = "auto",
    trials: Annotated[int, typer.Option("--trials", min=1, help="Plans that optuna and random propose.")] = 64,
    items: Annotated[
        str, typer.Option("--items", help="all, or adaptive: most plans answer a few telling examples first.")
    ] = "all",
    max_methods: Annotated[
        int, typer.Option("--max-methods", min=1, help="Methods stacked at most in the default space.")
    ] = 2,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Use so many of the examples.")] = None,
    budget: Limits = None,
    reuse: Annotated[
        str,
        typer.Option("--reuse", help="Calibration examples that were used before: refuse, or split delta further."),
    ] = "refuse",
    uses: Annotated[
        Path | None, typer.Option("--uses", help="File that counts uses of calibration examples; default: yours.")
    ] = None,
    traffic: Annotated[
        str | None, typer.Option("--traffic", help="Requests, such as 100000/month: the report shows a month's saving.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", help="Sign the certificate with the key in this file (HMAC or Ed25519).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for plan, certificate, report and results.")] = Path(
        "out/tune"
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count everything, print what it would cost, spend nothing.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Examples in flight, over all workers.")
    ] = 8,
    workers: Annotated[int | None, typer.Option("--workers", "-w", min=1, help="Measure in so many processes.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="Measure on a Ray cluster.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Makes splits, order and sampling repeatable.")] = 0,
    embedder: Embedder = "minilm",
    judge: Annotated[str | None, typer.Option("--judge", help="Engine for tasks that a judge scores.")] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Run code that a model wrote even where this machine cannot isolate it.")
    ] = False,
    prices: Prices = None,
    ledger: LedgerFile = None,
    json: Json = False,
) -> None:
    """Find the cheapest plan whose loss is bounded on your tasks, and write plan.toml and certificate.json.

    Searches on one part of the examples, freezes what is to be tested, tests it on a second part that is used once, and
    reports on a third. Also writes report.html, search.json and results.jsonl. Started again, it goes on where it
    stopped. --budget limits the whole run. Exit code 0: a plan is certified; 6: none is, and how many examples would
    have been needed; 3: the budget stopped it before it was known.
    """
    try:
        from rich.console import Console

        from thrifty.bench.progress import Live, Silent
        from thrifty.bench.row import check_axis
        from thrifty.bench.study import complete
        from thrifty.bench.task import save
        from thrifty.tune import dryrun, report
        from thrifty.tune.calibration import UseLog
        from thrifty.tune.found import Settings
        from thrifty.tune.saving import Traffic
        from thrifty.tune.splits import SHARES, groups_of
        from thrifty.tune.tuning import tune as run_tuning
    except ImportError as error:
        raise InvalidInput("tuning needs its extra: pip install 'thrifty[tune]'") from error
    from thrifty.ledger.chain import load_key
    from thrifty.plan import Plan

    # All that can be read without an engine comes first.
    screen = Console(stderr=True)
    claim_of(loss, alpha, delta, method, bound, grouped=False)
    if reuse not in ("refuse", "split"):
        raise InvalidInput(nearest(reuse, ("refuse", "split"), "--reuse"))
    told_traffic = None if traffic is None else Traffic.parse(traffic)
    key = None if sign is None else load_key(sign)
    shares = SHARES if splits is None else _shares(splits)
    if splits is not None and calibration is not None:
        raise InvalidInput("--splits and --calibration: give shares of one file, or files")
    if holdout is not None and calibration is None:
        raise InvalidInput("--holdout needs --calibration: give all parts as files, or --splits")
    axis = check_axis(axis or _axis_of(tasks))
    settings = Settings.from_dict({"axis": axis, "strategy": strategy, "trials": trials, "items": items, "seed": seed})
    limits = budget_of(budget)
    base = None if reference is None else Plan.load(reference)
    written = None if space == "default" else _space_file(space)
    specs = _specs(tasks, model, embedder, judge, written, base)
    fleet = fleet_of(specs, workers, ray, prices)
    book = None
    try:
        engines = _engines(specs, prices) if fleet is None else dict(fleet.engines)
        parts, split_used, sampling = _parts(tasks, calibration, holdout, shares, n, seed, engines)
        grouped = any(len(groups_of(part)) < len(part) for part in parts.parts().values())
        claim = claim_of(loss, alpha, delta, method, bound, grouped=grouped)
        _judged(parts, engines)
        plans = written or _default(engines, max_methods)
        common: dict[str, Any] = {"settings": settings, "reference": base, "sampling": sampling, "reuse": reuse}
        if dry_run:
            counted = complete(dryrun.dry_run(parts, plans, engines, claim, **common), out)
            if json:
                print_json(counted.to_dict())
            else:
                for line in counted.lines():
                    typer.echo(line)
            return
        book = ledger_of(ledger)
        tuned = complete(
            run_tuning(
                parts,
                plans,
                engines,
                claim,
                out,
                account=Account("tune", limits, ledger=book),
                log=None if uses is None else UseLog(uses),
                split_used=split_used,
                key=key,
                tell=lambda line: screen.print(line, highlight=False, markup=False, soft_wrap=True),
                concurrency=concurrency,
                unsafe=unsafe,
                fleet=fleet,
                command=command_line(),
                watcher=Silent() if json else Live(screen),
                **common,
            ),
            out,
        )
    finally:
        if fleet is not None:
            fleet.close()
        if book is not None:
            book.close()  # type: ignore[attr-defined]
    if not Path(tasks).exists():
        save([task for part in parts.parts().values() for task in part], out / "tasks.jsonl")  # for `verify --data`
    page = report.write(tuned, out, traffic=told_traffic, command=command_line())
    _finish(tuned, page, told_traffic, json)


def claim_of(loss: str, alpha: float, delta: float, method: str, bound: str, *, grouped: bool) -> Claim:
    """What the options ask to be certified. Raises InvalidInput, also for an unknown name."""
    from thrifty.tune.bounds import best_bound
    from thrifty.tune.calibration import Claim
    from thrifty.tune.losses import range_of

    if method not in ("ltt", "crc"):
        raise InvalidInput(nearest(method, ("ltt", "crc"), "--method"))
    range_of(loss)  # type: ignore[arg-type]  # refuses an unknown one
    if method == "crc":
        if bound != "auto":
            raise InvalidInput("--method crc bounds an expectation: it takes no --bound")
        return Claim(loss, alpha, None, "conformal-risk-control")  # type: ignore[arg-type]
    # Known before any loss is: an answer agrees or not, and a group of one example has no mean between.
    chosen = best_bound(loss, zero_one=loss == "disagree" and not grouped) if bound == "auto" else bound  # type: ignore[arg-type]
    return Claim(loss, alpha, delta, "learn-then-test", chosen)  # type: ignore[arg-type]


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(f"--splits {text!r}: three shares are needed, such as 0.3,0.5,0.2") from error


def _axis_of(name: str) -> str:
    from thrifty.bench import suites

    if Path(name).exists() or name not in suites.SUITES:
        return suites.AXIS
    return suites.SUITES[name].axis


def _space_file(path: str) -> Space:
    from thrifty.tune.spacefile import load

    return load(path)


def _default(engines: Mapping[str, Engine], max_methods: int) -> Space:
    from thrifty.tune.spacefile import default_space

    return default_space(engines, max_methods=max_methods)


def _specs(
    tasks: str, model: str | None, embedder: str, judge: str | None, space: Space | None, reference: Plan | None
) -> dict[str, str]:
    """Specifications of the engines by role; a model that was asked for answers in the place of the space's. Raises
    InvalidInput before anything is loaded."""
    from thrifty.bench import suites
    from thrifty.engines.spec import read

    if not Path(tasks).exists():
        if tasks.endswith((".jsonl", ".json")):
            raise InvalidInput(f"task file {tasks}: there is no such file")
        if not tasks.startswith("reasoning-gym:") and len(found := suites.find(tasks)) > 1:
            raise InvalidInput(
                f"{tasks} stands for {len(found)} suites: name one, {' or '.join(s.name for s in found)}"
            )
    others = model or DEFAULT_MODEL
    specs = {"answer": others}
    if space is None:
        specs["embedder"] = embedder
    else:
        roles = {role for entry in space.entries for role in entry.method.roles}
        roles |= set(reference.needs()) if reference is not None else set()
        specs |= {role: embedder if role == "embedder" else others for role in sorted(roles - {"answer"})}
        specs |= space.engines
    if reference is not None:
        specs |= reference.engines
    if model is not None:
        specs["answer"] = model
    if judge is not None:
        specs["judge"] = judge
    for spec in specs.values():
        read(spec)
    return specs


def _engines(specs: Mapping[str, str], prices: Path | None) -> dict[str, Engine]:
    from thrifty.engines.spec import resolve_roles

    return resolve_roles(specs, prices=table_of(prices))


def _parts(
    name: str,
    calibration: Path | None,
    holdout: Path | None,
    shares: Sequence[float],
    n: int | None,
    seed: int,
    engines: Mapping[str, Engine],
) -> tuple[Splits, SplitUsed | None, Sampling]:
    """The three parts, how they were cut from one file, and what every call starts with."""
    from thrifty.bench import suites, task
    from thrifty.bench.run import GREEDY
    from thrifty.bench.study import count_with
    from thrifty.tune.certificate import SplitUsed
    from thrifty.tune.splits import check_disjoint, data_hash, split

    sampling = GREEDY
    examples: list[Task]
    if Path(name).exists():
        examples = task.load(name)
        if n is not None and n > len(examples):
            raise InvalidInput(f"{name}: has {len(examples):,} tasks, and --n {n:,} were asked: give fewer")
        examples = examples[: n or None]
    elif name.startswith("reasoning-gym:"):
        examples = task.suite(name, n or EXAMPLES, seed, count=count_with(engines["answer"]))
    else:
        (found,) = suites.find(name)
        examples, sampling = found.make(n or EXAMPLES, seed, count=count_with(engines["answer"])), found.sampling
    if calibration is not None:
        third = [] if holdout is None else task.load(holdout)
        return check_disjoint(examples, task.load(calibration), third), None, sampling
    used = SplitUsed(data_hash(examples), tuple(shares), seed)
    return split(examples, shares=shares, seed=seed), used, sampling


def _judged(parts: Splits, engines: Mapping[str, Engine]) -> None:
    judged = next((t for part in parts.parts().values() for t in part if t.scorer == "judge"), None)
    if judged is not None and "judge" not in engines:
        raise InvalidInput(f"task {judged.id!r} is scored by a judge: name an engine for the role 'judge' (--judge)")


def _finish(tuned: Tuned, page: Path, traffic: Traffic | None, json: bool) -> None:
    """Prints what is certified and where things are, and exits with the code that says which it is."""
    from thrifty.bench import words
    from thrifty.tune.saving import monthly
    from thrifty.tune.tuned import NothingCertified, StoppedByBudget

    files = {**tuned.files, page.name: page}
    month = None if traffic is None or tuned.plan is None else monthly(tuned.beside, traffic)
    if json:
        data = tuned.to_dict()
        data["files"] = {name: str(path) for name, path in files.items()}
        if month is not None:
            data["usd_a_month"] = {
                "reference": month.reference,
                "plan": month.plan,
                "saved": {name: getattr(month.saved, name) for name in ("value", "low", "high", "level")},
            }
        print_json(data)
    else:
        if tuned.certificate is not None and tuned.plan is not None:
            typer.echo(f"certified: {tuned.plan.name}")
            typer.echo(tuned.certificate.statement())
            if (saving := tuned.certificate.saving) is not None:
                typer.echo(f"saving on {saving.axis} beside the reference: {words.saving(_interval(saving.share))}")
            if (held := tuned.certificate.holdout) is not None:
                typer.echo(f"holdout: mean loss {held.value:.4g} [{held.low:.4g}, {held.high:.4g}] on {held.n} groups")
            if tuned.stopped is not None:
                typer.echo(f"stopped, and the best so far: {tuned.stopped}")
            if month is not None:
                typer.echo(f"a month: ${month.plan:,.2f} instead of ${month.reference:,.2f}")
        if tuned.share is not None:
            typer.echo(f"tuning took {tuned.paid.tokens:,} tokens, {tuned.share:.0%} of a naive grid's")
        for path in files.values():
            typer.echo(f"wrote {path}")
    if tuned.plan is None:
        if tuned.stopped and not any(not test.certified for test in tuned.tests):
            raise StoppedByBudget(
                f"nothing is certified yet: {tuned.stopped}; run the same command with a larger budget and it goes on"
            )
        raise NothingCertified(f"nothing is certified: {tuned.needed or 'no plan passed'}")


def _interval(figure: Any) -> Any:
    from thrifty.bench.stats import Interval

    return Interval(figure.value, figure.low, figure.high, figure.level, figure.n, "bootstrap")
