"""`thrifty plan`: check a plan before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thrifty.cli._options import Json, print_json
from thrifty.engines.kinds import KNOWN
from thrifty.engines.spec import read
from thrifty.errors import InvalidInput, PlanError
from thrifty.plan import Plan

app = typer.Typer(help="Check a plan.", no_args_is_help=True)


@app.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="A plan in TOML.")],
    engine: Annotated[
        str | None, typer.Option("--engine", help="Also check against an engine, or a kind: local, openai, scripted.")
    ] = None,
    json: Json = False,
) -> None:
    """Check a plan: names, knobs, order, needs, collisions. Exit code 2 and one line when something is wrong."""
    plan = Plan.load(path)
    specs = {**plan.engines, **({"answer": engine} if engine is not None else {})}
    for role, spec in specs.items():
        kind = _kind(spec, path)
        missing = plan.needs().get(role, frozenset()) - KNOWN[kind]
        if missing:
            have = [name for name, caps in KNOWN.items() if missing <= caps]
            raise PlanError(
                f"{path}: the plan needs {', '.join(sorted(missing))} of its engine {role!r}, which kind {kind!r} "
                f"lacks; kinds that have it: {', '.join(have) or 'none'}"
            )
    needs = {role: sorted(caps) for role, caps in plan.needs().items()}
    if json:
        print_json({"name": plan.name, "hash": plan.hash, "methods": [m.name for m in plan.methods], "needs": needs})
        return
    stack = " > ".join(m.name for m in plan.methods) or "no methods: the unmodified engine"
    typer.echo(f"{plan.name} ({plan.hash}): {stack}")
    for role, caps in needs.items():
        typer.echo(f"{role} needs: {', '.join(caps)}")


def _kind(spec: str, path: Path) -> str:
    if spec in KNOWN:
        return spec
    try:
        return read(spec)[0]
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
