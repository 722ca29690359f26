"""What a frontier looks like: a table in the terminal, a picture, a page.

show(frontier, console)                      # the table
write([frontier], "out/demo")                # frontier.png and report.html
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from thrifty.bench import words
from thrifty.bench.frontier import Frontier, Stack
from thrifty.bench.row import LEVEL, Row
from thrifty.bench.task import Task
from thrifty.errors import InvalidInput

WIDE, NARROW = 150, 90
PLAIN = 170
"""From so many columns on, intervals stand beside their values; below the second, tokens are left to the
page. A table that goes to no terminal is wide."""


def show(frontier: Frontier, console: Console | None = None) -> None:
    """Prints the table of one suite, what stacked methods do together, and what this n could not have
    shown."""
    out = console or Console()
    if not out.is_terminal and out.width < WIDE:
        out = Console(file=out.file, width=PLAIN, highlight=False)
    out.print()
    out.print(table(frontier) if out.width >= WIDE else narrow_table(frontier, tokens=out.width >= NARROW))
    lines = [] if out.width >= WIDE else _asides(frontier)
    lines += [stack_line(stack) for stack in frontier.stacks]
    if frontier.area is not None:
        lines.append(area_line(frontier))
    for line in lines:
        out.print(Text(line, style="dim"))
    out.print(Text(frontier.closing_line()))


def table(frontier: Frontier) -> Table:
    """Plans; score, input, output, axis, saving, difference, fired share, note. Takes some 150 columns."""
    made = _empty(frontier)
    for name in ("score", "input", "output", words.axis_head(frontier.axis), "saving", "difference"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("fired")
    made.add_column("note")
    for i, row in enumerate(frontier.rows):
        made.add_row(
            _name(row),
            words.score(row.score),
            words.tokens_in(row),
            words.amount(row.output, "output"),
            words.axis(row.axis, frontier.axis),
            words.saving(row.saving) if i else "reference",
            words.difference(row.difference) if i else "reference",
            Text(words.fired(row.fired).replace(", ", "\n")),
            Text(row.note),
        )
    return made


def narrow_table(frontier: Frontier, *, tokens: bool = True) -> Table:
    """The same in 80 columns (90 with the tokens): intervals stand below their values, and fired shares
    elsewhere."""
    made = _empty(frontier)
    names = (
        "score",
        *(("in / out",) if tokens else ()),
        words.axis_head(frontier.axis),
        "saving",
        "difference",
    )
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(frontier.rows):
        both = f"{words.amount(row.input + row.other_input, 'input')}\n{words.amount(row.output, 'output')}"
        made.add_row(
            _name(row, width=13),
            _below(words.score(row.score)),
            *((both,) if tokens else ()),
            _below(words.axis(row.axis, frontier.axis)),
            _below(words.saving(row.saving)) if i else "reference",
            _below(words.difference(row.difference)) if i else "reference",
        )
    return made


def _empty(frontier: Frontier) -> Table:
    made = Table(
        title=f"{frontier.suite} on {frontier.model}",
        caption=(
            f"{LEVEL:.0%} intervals. {words.axis_head(frontier.axis)}: {words.axis_name(frontier.axis)}. Saving (on "
            f"{frontier.axis}) and difference (of the score) are paired with {frontier.reference.plan!r}. "
            "Input: of the answering engine + of others. * undominated"
        ),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    made.add_column("plan", no_wrap=True)
    return made


def _name(row: Row, width: int = 28) -> Text:
    name = "\n".join(textwrap.wrap(row.plan, width)) + (" *" if row.undominated else "")
    return Text(name, style="bold" if row.undominated else "")


def _below(text: str) -> str:
    return text.replace(" [", "\n[")


def _asides(frontier: Frontier) -> list[str]:
    """What the narrow table has no columns for."""
    lines = []
    for row in frontier.rows:
        told = [f"fired {words.fired(row.fired)}"] if row.fired else []
        told += [row.note] if row.note else []
        if told:
            lines.append(f"{row.plan}: {'; '.join(told)}")
    return lines


def stack_line(stack: Stack) -> str:
    """What two stacked methods do beyond each alone, in words."""
    line = (
        f"{stack.both} beside {stack.a} and {stack.b}: score {words.difference(stack.score.additive)} "
        "beyond the sum of both"
    )
    ratio = stack.axis.log_ratio
    if ratio is not None:
        verb = "more" if ratio.value > 0 else "less"
        sure = "" if ratio.low > 0 or ratio.high < 0 else ", which may be chance"
        line += f"; spends {abs(_percent(ratio.value)):.0f}% {verb} than if savings multiplied{sure}"
    return line + "."


def area_line(frontier: Frontier) -> str:
    """The frontier's area, in words."""
    if not frontier.area:
        return f"No plan with a score above 0 takes less than {frontier.reference.plan!r} on {frontier.axis}."
    return (
        f"Area under the frontier: {frontier.area:.3f} (best mean score within a budget, averaged over budgets from 0 "
        f"to what {frontier.reference.plan!r} takes, on {frontier.axis})."
    )


def write(
    frontiers: Sequence[Frontier], out: str | Path, *, tasks: Mapping[str, Task] | None = None
) -> tuple[Path, Path]:
    """Writes `frontier.png` and `report.html` into the folder. `tasks` by hash let the page show questions.

    Raises InvalidInput where the folder cannot be written.
    """
    from thrifty.bench.page import page
    from thrifty.bench.plot import draw

    if not frontiers:
        raise InvalidInput("no frontier to report: run some plans first")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture = draw(frontiers, folder / "frontier.png")
        html = folder / "report.html"
        html.write_text(page(frontiers, tasks=tasks), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"report in {folder}: cannot be written: {error}") from error
    return picture, html


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)
