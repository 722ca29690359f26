"""The catalogue page: every registered method with its paper, needs and knobs, and what was measured of it
here; the stacks that were measured beside their parts; and the instruments.

Generated from the registry and from the committed results, so that it cannot say what no run has shown. A
method that no result file holds reads "not measured on a model".

    python -m thrifty.bench.catalogue results docs/catalogue.md [--laws laws.json]

The optional laws file is what the law table writes: `{"METHOD": {"LAW": "passed" | "skipped: reason"}}`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from thrifty import registry
from thrifty.bench import words
from thrifty.bench.frontier import Frontier, analyse
from thrifty.bench.row import LEVEL, Row
from thrifty.bench.store import read
from thrifty.bench.suites import axis_of
from thrifty.errors import InvalidInput, ThriftyError
from thrifty.method import Method

Laws = Mapping[str, Mapping[str, str]]

NOT_MEASURED = "Not measured on a model."


@dataclass(frozen=True)
class Measured:
    """One plan that uses a method, beside the unmodified engine."""

    frontier: Frontier
    row: Row


def measured(folder: str | Path) -> dict[str, list[Measured]]:
    """By method name, every plan of the committed results that uses it. Raises InvalidInput for a broken
    file."""
    return _by_method(_frontiers(folder))


def catalogue(results: str | Path, laws: Laws | None = None) -> str:
    """The page in Markdown, the same for the same inputs."""
    frontiers = _frontiers(results)
    known = _by_method(frontiers)
    methods = [registry.get(name) for name in registry.names()]
    families: dict[str, list[type[Method]]] = {}
    for method in methods:
        families.setdefault(registry.sources()[method.name].family, []).append(method)
    lines = [
        "# Methods, as measured",
        "",
        f"{len(methods)} methods, {sum(m.name in known for m in methods)} of them measured. Figures stand beside the "
        f"unmodified engine on the same examples, with {LEVEL:.0%} intervals; they hold for that model, suite and "
        "axis. This page is generated from `results/` and the registry.",
        "",
        *_overview(methods, known),
    ]
    for family, members in families.items():
        lines += [f"## {family}", ""]
        for method in members:
            lines += _section(method, known.get(method.name, []), (laws or {}).get(method.name))
    lines += _stacks(frontiers) + _instruments()
    return "\n".join(lines).rstrip() + "\n"


def effect(name: str, results: str | Path) -> list[str]:
    """What was measured of one method, a line a plan, for `thrifty methods show`."""
    found = measured(results).get(name, [])
    return [_sentence(m) for m in found] or [NOT_MEASURED]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m thrifty.bench.catalogue", description="Writes the catalogue page.")
    parser.add_argument("results", help="folder with SUITE/MODEL.jsonl.gz")
    parser.add_argument("page", help="Markdown file to write")
    parser.add_argument("--laws", help="JSON file that the law table wrote")
    given = parser.parse_args(arguments)
    try:
        text = catalogue(given.results, None if given.laws is None else read_laws(given.laws))
        Path(given.page).write_text(text, encoding="utf-8")
    except ThriftyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{given.page}: cannot be written: {error}", file=sys.stderr)
        return InvalidInput.exit_code
    return 0


def read_laws(path: str | Path) -> Laws:
    """The law table's file. Raises InvalidInput for one that is not of its form."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"laws {path}: cannot be read: {error}") from error
    good = isinstance(data, dict) and all(
        isinstance(laws, dict) and all(isinstance(v, str) for v in laws.values()) for laws in data.values()
    )
    if not good:
        raise InvalidInput(f'laws {path}: an object such as {{"METHOD": {{"LAW": "passed"}}}} is needed')
    found: Laws = data
    return found


# -- details -------------------------------------------------------------------------------------------------


def _frontiers(folder: str | Path) -> list[Frontier]:
    found: list[Frontier] = []
    for path in sorted(Path(folder).glob("*/*.jsonl.gz")):
        contents = read(path)
        for suite in dict.fromkeys(r.suite for r in contents.results):
            found += analyse(contents, axis_of(suite, contents.results), suite=suite)
    return found


def _by_method(frontiers: Sequence[Frontier]) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {}
    for frontier in frontiers:
        for row in frontier.rows[1:]:
            for method in dict.fromkeys(row.methods):
                found.setdefault(method, []).append(Measured(frontier, row))
    return found


def _stacks(frontiers: Sequence[Frontier]) -> list[str]:
    """What stacks do beside their parts; nothing where none was measured."""
    lines: list[str] = []
    for frontier in (f for f in frontiers if f.stacks):
        rows = {row.plan: row for row in frontier.rows}
        axis = words.axis_head(frontier.axis)
        lines += [
            f"### {frontier.suite} on {frontier.model}",
            "",
            f"| A | B | score A, B, both | {axis} A, B, both | score beyond the sum of both |",
            "| --- | --- | --- | --- | --- |",
        ]
        for stack in frontier.stacks:
            three = [rows[name] for name in (stack.a, stack.b, stack.both)]
            scores = ", ".join(f"{row.score.value:.2f}" for row in three)
            costs = ", ".join(words.amount(row.axis.value, frontier.axis) for row in three)
            beyond = words.difference(stack.score.additive)
            lines.append(f"| {_cell(stack.a)} | {_cell(stack.b)} | {scores} | {costs} | {beyond} |")
        base = frontier.reference
        cost = words.amount(base.axis.value, frontier.axis)
        lines += ["", f"`{base.plan}` alone: score {base.score.value:.2f}, {axis} {cost}, n = {base.n}.", ""]
    return ["## Stacks", "", *lines] if lines else []


def _instruments() -> list[str]:
    lines = [
        "## Analyses, evaluations and bounds",
        "",
        "They change no call: they tell something about models, plans or runs.",
        "",
        "| name | kind | run by | source |",
        "| --- | --- | --- | --- |",
    ]
    for name, declared in registry.instruments().items():
        found = declared.instrument
        lines.append(f"| {name} | {found.kind} | `{_cell(found.runs)}` | {_cell(found.paper)} |")
    return [*lines, ""]


def _overview(methods: Sequence[type[Method]], known: Mapping[str, Sequence[Measured]]) -> list[str]:
    lines = ["| method | kind | measured alone | saving | score |", "| --- | --- | --- | --- | --- |"]
    for method in methods:
        alone = [m for m in known.get(method.name, []) if len(m.row.methods) == 1]
        link = f"[{method.name}](#{method.name})"
        if not alone:
            told = "only in a stack" if method.name in known else "no"
            lines.append(f"| {link} | {method.kind} | {told} | | |")
        for m in alone:
            where = f"{m.row.plan}, {m.frontier.suite}, {m.frontier.model}, n = {m.row.n}"
            lines.append(
                f"| {link} | {method.kind} | {_cell(where)} | {words.saving(m.row.saving)} of {m.frontier.axis} | "
                f"{words.difference(m.row.difference)} |"
            )
    return [*lines, ""]


def _section(method: type[Method], found: Sequence[Measured], laws: Mapping[str, str] | None) -> list[str]:
    lines = [f"### {method.name}", "", _cell(method.paper or "no source given") + ".", ""]
    first = (method.__doc__ or "").strip().split("\n\n")[0]
    lines += [" ".join(first.split()), ""]
    needs = ", ".join(f"`{need}`" for need in sorted(method.needs)) or "nothing"
    roles = "; ".join(
        f"an engine as `{role}` with {', '.join(f'`{n}`' for n in sorted(needed))}"
        for role, needed in sorted(method.roles.items())
    )
    lines += [f"A {method.kind}. Needs {needs}{'; ' + roles if roles else ''}.", ""]
    knobs = method.knobs()
    if knobs:
        lines += ["| knob | default | allowed | what it does |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{name}` | `{_cell(str(default))}` | {_cell(allowed.describe())} | {_cell(allowed.help)} |"
            for name, (default, allowed) in knobs.items()
        ]
        lines.append("")
    if found:
        lines += [f"- {_sentence(m)}" for m in found]
    else:
        lines.append(NOT_MEASURED)
    lines.append("")
    if laws:
        skipped = {law: told.partition(":")[2].strip() for law, told in laws.items() if told.startswith("skipped")}
        held = sum(not told.startswith("skipped") for told in laws.values())
        lines.append(f"Laws: {held} run" + (", skipped:" if skipped else "."))
        if skipped:
            lines += [
                "",
                *(f"- {_cell(law)}: {_cell(reason) or 'no reason given'}" for law, reason in skipped.items()),
            ]
        lines.append("")
    elif method.identity is None and method.no_identity:
        lines += [f"No setting makes it a no-op: {_cell(method.no_identity)}.", ""]
    return lines


def _sentence(found: Measured) -> str:
    """One plan's effect beside the unmodified engine, with what this n could not have shown."""
    frontier, row = found.frontier, found.row
    base = frontier.reference
    stacked = "" if len(row.methods) == 1 else f" (stacked: {' > '.join(row.methods)})"
    shares = f"; fired {words.fired(row.fired)}" if row.fired else ""
    limit = ""
    if row.smallest is not None:
        smaller = f"differences below {row.smallest:.2f}" if row.smallest <= 1 else "differences of any size"
        limit = f"; {smaller} could not be shown"
    return _cell(
        f"`{row.plan}`{stacked} on {frontier.suite}, {frontier.model}, n = {row.n}: score {words.score(row.score)} "
        f"beside {words.score(base.score)} of `{base.plan}`, difference {words.difference(row.difference)}; "
        f"{frontier.axis} {words.axis(row.axis, frontier.axis)} beside {words.axis(base.axis, frontier.axis)}, "
        f"saving {words.saving(row.saving)}; mean input {words.tokens_in(row)}, output "
        f"{words.amount(row.output, 'output')}{shares}{limit}."
    )


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or start HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    raise SystemExit(main())
