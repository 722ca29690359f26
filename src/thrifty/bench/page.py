"""The report as one self-contained page: opens without a network, readable on a phone and in the dark.

The plot library's script is inlined. A content policy forbids every connection. Everything that a model, a
task or a server wrote is escaped: text as HTML, data as JSON without any `<`."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import tomli_w

from thrifty.bench import words
from thrifty.bench.frontier import Frontier
from thrifty.bench.row import LEVEL, Row
from thrifty.bench.store import Result
from thrifty.bench.task import Task
from thrifty.call import text_of

FAILURES = 3
"""Wrong answers shown for each plan."""

SHOWN = 600
"""Characters of a question or an answer that are shown."""


def page(frontiers: Sequence[Frontier], *, tasks: Mapping[str, Task] | None = None) -> str:
    """The whole page. `tasks` by hash let it show questions beside wrong answers."""
    from plotly.offline import get_plotlyjs

    title = "Thrifty: " + ", ".join(dict.fromkeys(f.suite for f in frontiers))
    body = "".join(_suite(f, f"plot{i}", tasks or {}) for i, f in enumerate(frontiers))
    plots = [_figure(f) for f in frontiers]
    assets = files("thrifty.bench") / "assets"
    return _PAGE.format(
        title=_e(title),
        style=(assets / "report.css").read_text(encoding="utf-8"),
        body=body,
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        data=_json(plots),
        script=(assets / "report.js").read_text(encoding="utf-8"),
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}</main>
<script>{plotly}</script>
<script type="application/json" id="plots">{data}</script>
<script>{script}</script>
</body>
</html>
"""


# -- one suite -----------------------------------------------------------------------------------------------


def _suite(frontier: Frontier, plot: str, tasks: Mapping[str, Task]) -> str:
    from thrifty.bench.report import area_line, stack_line

    lines = [frontier.closing_line()]
    if frontier.area is not None:
        lines.append(area_line(frontier))
    lines += [stack_line(stack) for stack in frontier.stacks]
    return (
        f"<section><h2>{_e(frontier.suite)} <small>on {_e(frontier.model)}</small></h2>"
        f"<div class='plot' id='{plot}' role='img' aria-label='score against {_e(frontier.axis)}'></div>"
        f"{_table(frontier)}"
        f"<ul class='lines'>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>"
        f"{_receipts(frontier)}{_wrong(frontier, tasks)}{_what_was_run(frontier)}</section>"
    )


def _table(frontier: Frontier) -> str:
    axis = frontier.axis
    columns = [c for c in _columns(frontier) if any(c.cells)]
    head = "".join(f"<th scope='col' class='number' title='{_e(c.tip)}'>{_e(c.name)}</th>" for c in columns)
    rows = []
    for i, row in enumerate(frontier.rows):
        kind = " class='best'" if row.undominated else ""
        numbers = "".join(f"<td class='number'>{_bounds_small(c.cells[i])}</td>" for c in columns)
        rows.append(
            f"<tr{kind}><th scope='row'>{_e(row.plan)}</th>{numbers}"
            f"<td>{_e(words.fired(row.fired))}</td><td>{_e(row.note)}</td></tr>"
        )
    return (
        f"<div class='scroll'><table><caption>{LEVEL:.0%} intervals; saving and difference are paired with "
        f"{_e(frontier.reference.plan)}; undominated plans are bold. They hold for {_e(axis)} only.</caption>"
        f"<thead><tr><th scope='col'>plan</th>{head}<th scope='col'>fired</th><th scope='col'>note</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


@dataclass(frozen=True)
class _Column:
    name: str
    tip: str
    cells: list[str]


def _columns(frontier: Frontier) -> list[_Column]:
    """The table's numbers; a column without any is left out."""
    rows, axis, base = frontier.rows, frontier.axis, frontier.reference.plan
    savings = ["reference", *(words.saving(r.saving) for r in rows[1:])]
    differences = ["reference", *(words.difference(r.difference) for r in rows[1:])]
    return [
        _Column("n", "examples", [str(r.n) for r in rows]),
        _Column("score", f"mean, {LEVEL:.0%} interval", [words.score(r.score) for r in rows]),
        _Column("input", "tokens of the answering engine + of others", [words.tokens_in(r) for r in rows]),
        _Column(
            "cached",
            "input tokens that the provider had cached",
            [words.amount(r.cached, "cached") if r.cached else "" for r in rows],
        ),
        _Column("output", "tokens", [words.amount(r.output, "output") for r in rows]),
        _Column(words.axis_head(axis), words.axis_name(axis), [words.axis(r.axis, axis) for r in rows]),
        _Column("saving", f"of {axis}, paired with {base}", savings),
        _Column("difference", f"of the score, paired with {base}", differences),
        _Column("p", "McNemar's test, mid-p, for scores of 0 and 1", [words.p_value(r) for r in rows]),
        _Column(
            "E3 × 1,000",
            "score squared over output tokens, times 1000",
            ["" if r.e3 is None else f"{r.e3 * 1000:.3g}" for r in rows],
        ),
    ]


def _bounds_small(text: str) -> str:
    value, bracket, bounds = text.partition(" [")
    return f"{_e(value)} <small>[{_e(bounds)}</small>" if bracket else _e(value)


def _receipts(frontier: Frontier) -> str:
    rows = []
    for row in frontier.rows:
        for fired in row.fired:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in fired.why_not)
            rows.append(
                f"<tr><th scope='row'>{_e(row.plan)}</th><td>{_e(fired.method)}</td>"
                f"<td class='number'>{fired.fired} of {fired.calls}</td><td>{_e(reasons)}</td></tr>"
            )
    if not rows:
        return ""
    return (
        "<details open><summary>Receipts: how often each method acted, and why not</summary><div class='scroll'><table>"
        "<thead><tr><th>plan</th><th>method</th><th class='number'>acted</th><th>what it said otherwise</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _wrong(frontier: Frontier, tasks: Mapping[str, Task]) -> str:
    """For each plan a few answers that scored least, with what the model wrote where it was kept."""
    blocks = []
    for plan, results in frontier.results.items():
        wrong = [r for r in results if (r.score or 0) < 1]
        shown = sorted(wrong, key=lambda r: r.score or 0)[:FAILURES]
        items = "".join(_example(r, tasks.get(r.task_hash)) for r in shown)
        if items:
            share = f"{len(wrong)} of {len(results)} scored less than 1"
            blocks.append(f"<h3>{_e(plan)} <small>{share}</small></h3><ol class='examples'>{items}</ol>")
    if not blocks:
        return ""
    return f"<details><summary>Wrong answers, a few for each plan</summary>{''.join(blocks)}</details>"


def _example(result: Result, task: Task | None) -> str:
    parts = [f"<b>{_e(result.task)}</b>: score {result.score:.2f}, finish {_e(result.finish)}"]
    if result.error:
        parts.append(_e(_cut(result.error)))
    if task is not None:
        question = next((text_of(m) for m in reversed(task.messages) if m.get("role") == "user"), "")
        parts.append(f"<span class='label'>question</span><pre>{_e(_cut(question))}</pre>")
        parts.append(f"<span class='label'>gold</span><pre>{_e(_cut(str(task.gold)))}</pre>")
    if result.text is not None:
        parts.append(f"<span class='label'>answer</span><pre>{_e(_cut(result.text))}</pre>")
    return f"<li>{''.join(f'<div>{part}</div>' for part in parts)}</li>"


def _what_was_run(frontier: Frontier) -> str:
    if not frontier.heads:
        return ""
    head = frontier.heads[-1]
    facts = [
        ("command", head.get("command")),
        ("when", " and ".join(str(h.get("at", "?")) for h in frontier.heads[-5:])),
        ("engines", head.get("engines")),
        ("examples", head.get("tasks")),
        ("seeds", head.get("seeds")),
        ("samples of an example", head.get("samples")),
        ("sampling", head.get("sampling")),
        ("calls at once", head.get("concurrency")),
        ("versions", head.get("versions")),
        ("machine", head.get("machine")),
    ]
    listed = "".join(f"<dt>{_e(name)}</dt><dd>{_value(value)}</dd>" for name, value in facts if value not in (None, ""))
    plans = "".join(
        f"<h3>{_e(str(plan.get('name')))} <small>{_e(str(plan.get('hash')))}</small></h3><pre>{_e(_toml(plan))}</pre>"
        for plan in head.get("plans", ())
    )
    return f"<details><summary>What was run</summary><dl>{listed}</dl>{plans}</details>"


def _toml(plan: Mapping[str, Any]) -> str:
    return tomli_w.dumps({k: v for k, v in plan.items() if k != "hash"})


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        items = "".join(f"<li><b>{_e(str(k))}</b> {_value(v)}</li>" for k, v in value.items())
        return f"<ul>{items}</ul>"
    if isinstance(value, list):
        return _e(", ".join(json.dumps(v, ensure_ascii=False) for v in value))
    return _e(str(value))


# -- the plot ------------------------------------------------------------------------------------------------


def _figure(frontier: Frontier) -> dict[str, Any]:
    """What the script draws: points with their intervals and texts; colours are the style's."""
    best = sorted((r for r in frontier.rows if r.undominated), key=lambda r: r.axis.value)
    return {
        "suite": frontier.suite,
        "range": _ranges(frontier),
        "x_title": words.axis_name(frontier.axis),
        "points": [
            {
                "name": row.plan,
                "kind": "reference" if i == 0 else "best" if row.undominated else "other",
                "x": _number(words.shown(row.axis.value, frontier.axis)),
                "y": _number(row.score.value),
                "x_arms": _arms(*_shown(row, frontier)),
                "y_arms": _arms(row.score.value, row.score.low, row.score.high),
                "hover": "<br>".join(_e(line) for line in _hover(row, frontier, reference=i == 0)),
            }
            for i, row in enumerate(frontier.rows)
        ],
        "join": [[_number(words.shown(r.axis.value, frontier.axis)), _number(r.score.value)] for r in best],
    }


def _hover(row: Row, frontier: Frontier, *, reference: bool) -> Iterable[str]:
    yield row.plan
    yield f"score {words.score(row.score)}"
    yield f"{frontier.axis} {words.axis(row.axis, frontier.axis)}"
    if not reference:
        yield f"saving {words.saving(row.saving)}"
        yield f"difference {words.difference(row.difference)}"
    yield f"input {words.tokens_in(row)}, output {words.amount(row.output, 'output')}"
    if row.fired:
        yield f"fired {words.fired(row.fired)}"


def _ranges(frontier: Frontier) -> list[list[float]]:
    """What the axes show: every interval, and some room."""
    xs = [v for r in frontier.rows for v in _shown(r, frontier) if math.isfinite(v)]
    ys = [v for r in frontier.rows for v in (r.score.value, r.score.low, r.score.high) if math.isfinite(v)]
    wide, high = (max(xs) - min(xs)) or abs(max(xs)) or 1.0, (max(ys) - min(ys)) or 0.5
    return [[min(xs) - 0.08 * wide, max(xs) + 0.08 * wide], [min(ys) - 0.08 * high, max(ys) + 0.1 * high]]


def _shown(row: Row, frontier: Frontier) -> tuple[float, float, float]:
    value, low, high = (words.shown(v, frontier.axis) for v in (row.axis.value, row.axis.low, row.axis.high))
    return value, low, high


def _arms(value: float, low: float, high: float) -> list[float]:
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 0.0]
    return [max(0.0, value - low), max(0.0, high - value)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"


def _json(value: Any) -> str:
    """JSON that cannot end its script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
