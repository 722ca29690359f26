"""The report of a tuning run as one page: opens without a network or a script, on a phone and in the dark.

What comes first is for who decides: what is certified, in one sentence, and what it saves a month. What was tried, how
it was tested and what is not promised follow. Everything that a file, a model or a server named is escaped, and a
content policy forbids scripts and connections.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from thrifty.bench import words
from thrifty.errors import InvalidInput
from thrifty.tune.certificate import Certificate, Figure, write_whole
from thrifty.tune.feasible import group_counts
from thrifty.tune.saving import Monthly, Traffic, monthly
from thrifty.tune.tuned import REPORT, Tuned

MOST_ROWS = 200
"""Plans that the table of what was tried shows."""

LOSS = {
    "error": "mean error (1 - score)",
    "drop": "mean score lost against the reference",
    "disagree": "share of requests whose answer differs from the reference's",
}
UNIT = {"error": "of the score", "drop": "of the score", "disagree": "of the answers"}


def write(tuned: Tuned, folder: str | Path, *, traffic: Traffic | None = None, command: str | None = None) -> Path:
    """Writes `report.html` into the folder. Raises ThriftyError where it cannot be written."""
    path = Path(folder) / REPORT
    write_whole(path, page(tuned, traffic=traffic, command=command).encode("utf-8", "replace"))
    return path


def page(tuned: Tuned, *, traffic: Traffic | None = None, command: str | None = None) -> str:
    """The whole page."""
    style = (files("thrifty.bench") / "assets" / "report.css").read_text(encoding="utf-8")
    title = "Thrifty: what may be saved, and what is certified"
    parts = [_answer(tuned), _month(tuned, traffic), _tried(tuned), _tested(tuned), _cost(tuned), _limits(tuned)]
    return _PAGE.format(
        title=_e(title), style=style + _STYLE, body="".join(part for part in parts if part) + _made(tuned, command)
    )


_STYLE = """
.big { font-size: 1.15rem; border-left: 4px solid var(--best); padding: .3rem .9rem; margin: 1rem 0; }
.none { border-color: var(--other); }
svg { width: 100%; max-width: 46rem; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg line { stroke: var(--line); }
svg .other { fill: var(--other); } svg .best { fill: var(--best); } svg .reference { fill: var(--reference); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}</main>
</body>
</html>
"""


# -- for who decides -----------------------------------------------------------------------------------------


def _answer(tuned: Tuned) -> str:
    claim = tuned.frozen.claim
    if tuned.plan is None or tuned.certificate is None:
        why = tuned.needed or tuned.stopped or "nothing was tested"
        stop = f"<p>The run was stopped: {_e(tuned.stopped)}.</p>" if tuned.stopped and tuned.stopped != why else ""
        return (
            "<section><h2>Nothing is certified</h2>"
            f"<p class='big none'>No plan was shown to keep the {_e(LOSS[claim.loss])} at most {claim.alpha:g}. "
            f"{_e(_sentence(why))}</p>{stop}</section>"
        )
    c = tuned.certificate
    lines = [f"<p class='big'><b>{_e(tuned.plan.name)}</b>: {_e(promise(c))}</p>"]
    if c.saving is not None:
        axis = c.saving.axis
        lines.append(
            f"<p>It takes <b>{_share(c.saving.share, axis)}</b> than {_e(tuned.frozen.reference.name)}: "
            f"{_e(words.amount(c.saving.plan, axis))} instead of {_e(words.amount(c.saving.reference, axis))} "
            f"({_e(words.axis_name(axis))}). Measured, not certified.</p>"
        )
    if c.holdout is not None:
        lines.append(
            f"<p>On {c.holdout.n:,} groups of examples that nothing was tuned or tested on, its mean loss was "
            f"{_interval(c.holdout)}.</p>"
        )
    if tuned.stopped:
        lines.append(f"<p>The budget stopped the run ({_e(tuned.stopped)}): this is the best so far.</p>")
    return f"<section><h2>What is certified</h2>{''.join(lines)}</section>"


def promise(certificate: Certificate) -> str:
    """What is certified, as a reader without statistics can take it."""
    c = certificate
    said = f"on requests like the examples, the {LOSS[c.claim.loss]} is at most {c.claim.alpha:g}"
    if c.delta is None:
        return f"{said} on average over such tuning runs (conformal risk control, {c.n:,} groups of examples)."
    return (
        f"{said}. A run like this one says so wrongly with a chance of at most {c.delta:.3g} "
        f"({c.claim.bound} bound, {c.n:,} groups of examples)."
    )


def _month(tuned: Tuned, traffic: Traffic | None) -> str:
    if tuned.plan is None or traffic is None:
        return ""
    found = monthly(tuned.beside, traffic)
    if found is None:
        told = "Nothing has a price here: give a price table (--prices) to see dollars."
        tokens = None if tuned.beside is None else tuned.beside.means.get("tokens")
        if tokens is not None:
            told += (
                f" In tokens: {_count(tokens[1] * traffic.requests)} a month instead of "
                f"{_count(tokens[0] * traffic.requests)}."
            )
        return f"<section><h2>A month</h2><p>{_e(told)}</p></section>"
    return f"<section><h2>A month</h2>{_month_table(found, traffic, tuned)}</section>"


def _month_table(found: Monthly, traffic: Traffic, tuned: Tuned) -> str:
    model = "" if tuned.certificate is None else tuned.certificate.model
    saved = found.saved
    return (
        "<div class='scroll'><table><caption>"
        f"At {_count(traffic.requests)} requests a month like the examples, at the prices of this run for "
        f"{_e(model)}. {saved.level:.0%} interval of the mean; a local engine's prices are weights, not a bill."
        "</caption><thead><tr><th></th><th class='number'>dollars a month</th></tr></thead><tbody>"
        f"<tr><th scope='row'>{_e(tuned.frozen.reference.name)}</th>"
        f"<td class='number'>{_usd(found.reference)}</td></tr>"
        f"<tr><th scope='row'>{_e('' if tuned.plan is None else tuned.plan.name)}</th>"
        f"<td class='number'>{_usd(found.plan)}</td></tr>"
        f"<tr class='best'><th scope='row'>saved</th><td class='number'>{_usd(saved.value)} "
        f"<small>[{_usd(saved.low)}, {_usd(saved.high)}]</small></td></tr></tbody></table></div>"
    )


# -- what was tried and tested -------------------------------------------------------------------------------


def _tried(tuned: Tuned) -> str:
    found = tuned.frozen.found
    rows: Sequence[Mapping[str, Any]] = found.get("ranked") or ()
    axis = str((found.get("settings") or {}).get("axis", "tokens"))
    if not rows:
        return ""
    certified = None if tuned.plan is None else tuned.plan.hash
    body = []
    for row in rows[:MOST_ROWS]:
        kind = " class='best'" if row.get("hash") == certified else ""
        note = (
            ("the reference" if row.get("hash") == tuned.frozen.reference.hash else "")
            or row.get("dropped")
            or ("predicted from few examples" if row.get("estimated") else "")
            or ("not dominated" if row.get("undominated") else "")
        )
        saving = row.get("saving")
        body.append(
            f"<tr{kind}><th scope='row'>{_e(str(row['plan'].get('name')))}</th>"
            f"<td class='number'>{row.get('groups')}</td><td class='number'>{_number(row.get('score'))}</td>"
            f"<td class='number'>{_e(words.amount(_float(row.get('axis')), axis))}</td>"
            f"<td class='number'>{'' if saving is None else f'{saving:.0%}'}</td><td>{_e(str(note))}</td></tr>"
        )
    more = f" {len(rows) - MOST_ROWS} more are in search.json." if len(rows) > MOST_ROWS else ""
    rounds = "".join(f"<li>{_e(str(line))}</li>" for line in found.get("rounds") or ())
    return (
        f"<section><h2>What was tried <small>{_e(str(found.get('how')))}</small></h2>{_picture(tuned, rows, axis)}"
        "<div class='scroll'><table><caption>Means over the examples searched on. They were looked at, so nothing "
        f"here is a guarantee.{more}</caption><thead><tr><th>plan</th><th class='number'>groups</th>"
        f"<th class='number'>score</th><th class='number'>{_e(words.axis_head(axis))}</th>"
        "<th class='number'>saving</th><th>note</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f"<details><summary>Rounds of the search</summary><ul class='lines'>{rounds}</ul></details></section>"
    )


def _picture(tuned: Tuned, rows: Sequence[Mapping[str, Any]], axis: str) -> str:
    """Score against spend, as SVG."""
    points = [(_float(r.get("axis")), _float(r.get("score")), r) for r in rows]
    points = [(words.shown(x, axis), y, r) for x, y, r in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return ""
    wide, high, left, low = 640, 280, 54, 36
    top = max(x for x, _, _ in points) * 1.05 or 1.0
    floor, ceiling = min(y for _, y, _ in points), max(y for _, y, _ in points)
    floor, ceiling = max(0.0, floor - 0.05), min(1.0, ceiling + 0.05)
    span = (ceiling - floor) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (wide - left - 10) * x / top, 10 + (high - low - 10) * (1 - (y - floor) / span)

    marks = []
    for x, y, row in points:
        h = row.get("hash")
        kind = "best" if tuned.plan is not None and h == tuned.plan.hash else "other"
        kind = "reference" if h == tuned.frozen.reference.hash else kind
        cx, cy = place(x, y)
        text = f"{row['plan'].get('name')}: score {y:.3f}, {words.amount(_float(row.get('axis')), axis)}"
        marks.append(
            f"<circle class='{kind}' cx='{cx:.1f}' cy='{cy:.1f}' r='{6 if kind != 'other' else 4}'>"
            f"<title>{_e(text)}</title></circle>"
        )
    bottom = high - low
    ticks = "".join(
        f"<text x='{left - 6}' y='{place(0, y)[1] + 4:.1f}' text-anchor='end'>{y:.2f}</text>"
        for y in (floor, (floor + ceiling) / 2, ceiling)
    )
    return (
        f"<svg viewBox='0 0 {wide} {high}' role='img' aria-label='score against {_e(axis)}'>"
        f"<line x1='{left}' y1='10' x2='{left}' y2='{bottom}'/>"
        f"<line x1='{left}' y1='{bottom}' x2='{wide - 10}' y2='{bottom}'/>{ticks}"
        f"<text x='{left}' y='{bottom + 16}'>0</text>"
        f"<text x='{wide - 10}' y='{bottom + 16}' text-anchor='end'>{top:.4g}</text>"
        f"<text x='{(left + wide) / 2}' y='{high - 4}' text-anchor='middle'>{_e(words.axis_name(axis))} "
        f"(black or white: the reference; blue: certified)</text>{''.join(marks)}</svg>"
    )


def _tested(tuned: Tuned) -> str:
    if not tuned.tests and not tuned.frozen.left_out:
        return ""
    claim = tuned.frozen.claim
    head = "p value" if claim.procedure == "learn-then-test" else "corrected risk"
    limit = claim.alpha if tuned.use is None or tuned.use.delta is None else tuned.use.delta
    rows = []
    for test in tuned.tests:
        kind = " class='best'" if tuned.plan is not None and test.plan.hash == tuned.plan.hash else ""
        shown = test.p_value if test.corrected is None else test.corrected
        rows.append(
            f"<tr{kind}><th scope='row'>{_e(test.plan.name)}</th><td class='number'>{test.losses.n}</td>"
            f"<td class='number'>{test.losses.mean:.4f}</td><td class='number'>{_number(shown, 4)}</td>"
            f"<td>{'certified' if test.certified else 'not certified'}</td></tr>"
        )
    waiting = [plan.name for plan in tuned.frozen.order if plan.hash not in {test.plan.hash for test in tuned.tests}]
    rows += [
        f"<tr><th scope='row'>{_e(name)}</th><td></td><td></td><td></td><td>not reached</td></tr>" for name in waiting
    ]
    rows += [
        f"<tr><th scope='row'>{_e(name)}</th><td></td><td></td><td></td><td>not tested: {_e(why)}</td></tr>"
        for name, why in tuned.frozen.left_out
    ]
    use = "The calibration examples were not opened." if tuned.use is None else f"{tuned.use}."
    return (
        "<section><h2>What was tested</h2><div class='scroll'><table><caption>In the order that was frozen before "
        f"these examples were opened (search {_e(tuned.frozen.hash)}). {_e(_sentence(use))} A plan is certified where "
        f"its {head} is at most {limit:g}, and so is every one before it.</caption><thead><tr><th>plan</th>"
        f"<th class='number'>groups</th><th class='number'>mean loss</th><th class='number'>{head}</th><th></th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cost(tuned: Tuned) -> str:
    share = "" if tuned.share is None else f" Tuning took {tuned.share:.0%} of that."
    return (
        f"<section><h2>What tuning cost</h2><p>{_count(tuned.paid.tokens)} tokens. A naive grid, every one of the "
        f"{tuned.frozen.space:,} plans of the space on every example, would have taken about "
        f"{_count(tuned.naive.tokens)}.{share}</p></section>"
    )


def _limits(tuned: Tuned) -> str:
    claim = tuned.frozen.claim
    lines = [
        "It holds for requests that come as the examples did. Traffic of another kind needs examples of its own.",
        f"It bounds the mean loss {UNIT[claim.loss]}, not the loss of a single request.",
        "It holds for the engine, model and precision that were measured.",
        "The saving is an estimate with an interval; only the loss is certified.",
    ]
    if claim.loss == "drop":
        lines.append("Gains on some requests make up for losses on others.")
    return (
        "<section><h2>What is not promised</h2><ul class='lines'>"
        + "".join(f"<li>{_e(line)}</li>" for line in lines)
        + "</ul></section>"
    )


def _made(tuned: Tuned, command: str | None) -> str:
    facts = [("command", command), ("examples", group_counts(tuned.splits)), ("search", tuned.frozen.hash)]
    if (c := tuned.certificate) is not None:
        facts += [
            ("certificate", c.hash),
            ("signed", f"{c.algorithm}, key {c.key}" if c.signature else "no"),
            ("model", f"{c.model} ({c.dtype})"),
            ("date", c.date),
            ("versions", ", ".join(f"{name} {version}" for name, version in c.versions.items())),
            ("check it", "thrifty verify certificate.json --data TASKS"),
        ]
    listed = "".join(f"<dt>{_e(name)}</dt><dd>{_e(str(value))}</dd>" for name, value in facts if value)
    plan = "" if tuned.certificate is None else f"<h3>The plan</h3><pre>{_e(tuned.certificate.plan_toml)}</pre>"
    return f"<details><summary>How this was made</summary><dl>{listed}</dl>{plan}</details>"


# -- figures in words ----------------------------------------------------------------------------------------


def _share(figure: Figure, axis: str) -> str:
    low, high, more = figure.low, figure.high, figure.value < 0
    if more:
        low, high = -high, -low
    return f"{abs(figure.value):.0%} <small>[{low:.0%}, {high:.0%}]</small> {'more' if more else 'less'} {_e(axis)}"


def _interval(figure: Figure) -> str:
    return f"{figure.value:.4f} <small>[{figure.low:.4f}, {figure.high:.4f}]</small>"


def _number(value: Any, digits: int = 3) -> str:
    number = _float(value)
    if not math.isfinite(number):
        return ""
    return f"{number:.1e}" if 0 < abs(number) < 10**-digits else f"{number:.{digits}f}"


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _usd(value: float) -> str:
    if not math.isfinite(value):
        raise InvalidInput(f"a cost of {value} is no number")
    return f"{value:,.2f}" if abs(value) >= 1 or value == 0 else f"{value:,.3g}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _e(text: str) -> str:
    return html.escape(text, quote=True)
