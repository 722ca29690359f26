"""The picture of a frontier: score against the axis, a panel for each suite, undominated plans joined.

Labels are placed so that they cover no point, no interval's middle and no other label, as far as there is
room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thrifty.bench import words
from thrifty.bench.frontier import Frontier
from thrifty.bench.row import LEVEL, Row

BEST, REFERENCE, OTHER, JOIN = "#0072b2", "#000000", "#8a5a00", "#56b4e9"
"""Okabe and Ito's colours, which colour-blind readers tell apart; the shapes differ too."""

WIDTH, HEIGHT = 7.2, 5.0
"""Of a panel, in inches."""


def draw(frontiers: Sequence[Frontier], path: str | Path) -> Path:
    """Writes the PNG: one panel a frontier, side by side, two a row."""
    import matplotlib

    matplotlib.use("Agg")  # before pyplot: no screen is needed
    import matplotlib.pyplot as plt

    columns = min(2, len(frontiers))
    rows = math.ceil(len(frontiers) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH * columns, HEIGHT * rows), squeeze=False, layout="constrained"
    )
    try:
        for panel in axes.flat[len(frontiers) :]:
            panel.set_visible(False)
        pairs = list(zip(axes.flat, frontiers, strict=False))
        for panel, frontier in pairs:
            _panel(panel, frontier)
        figure.canvas.draw()  # settles the layout: labels are placed in pixels
        for panel, frontier in pairs:
            _labels(figure, panel, frontier)
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
    return Path(path)


def _panel(panel: Any, frontier: Frontier) -> None:
    from matplotlib.lines import Line2D

    best = sorted((r for r in frontier.rows if r.undominated), key=lambda r: r.axis.value)
    line = [_place(row, frontier) for row in best]
    panel.plot([x for x, _ in line], [y for _, y in line], color=JOIN, linewidth=2, zorder=1)
    for i, row in enumerate(frontier.rows):
        color, marker = (REFERENCE, "s") if i == 0 else (BEST, "o") if row.undominated else (OTHER, "D")
        panel.errorbar(
            words.shown(row.axis.value, frontier.axis),
            row.score.value,
            xerr=_arms(*(words.shown(v, frontier.axis) for v in (row.axis.value, row.axis.low, row.axis.high))),
            yerr=_arms(row.score.value, row.score.low, row.score.high),
            fmt=marker,
            color=color,
            ecolor=color,
            elinewidth=1,
            alpha=0.95,
            capsize=2.5,
            markersize=7,
            zorder=3,
        )
    handles = [
        Line2D([], [], color=JOIN, linewidth=2, marker="o", mfc=BEST, mec=BEST, label="undominated"),
        Line2D([], [], color=OTHER, linewidth=0, marker="D", label="beaten by another plan"),
        Line2D([], [], color=REFERENCE, linewidth=0, marker="s", label="reference"),
    ]
    # Below the panel, where it covers nothing.
    panel.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9)
    reference = frontier.reference
    panel.set_title(f"{frontier.suite}, {frontier.model}, n = {reference.n}", fontsize=11)
    panel.set_xlabel(f"{words.axis_name(frontier.axis)} (less is better)")
    panel.set_ylabel(f"score, mean with {LEVEL:.0%} interval")
    panel.grid(True, color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.margins(x=0.12, y=0.12)
    low, high = panel.get_ylim()
    panel.set_ylim(max(-0.05, low), min(1.08, high))
    left, right = panel.get_xlim()
    panel.set_xlim(max(0 if left > 0 else -0.02 * right, left), right)


def _arms(value: float, low: float, high: float) -> list[list[float]] | None:
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _place(row: Row, frontier: Frontier) -> tuple[float, float]:
    return words.shown(row.axis.value, frontier.axis), row.score.value


def _labels(figure: Any, panel: Any, frontier: Frontier) -> None:
    """Each label goes to the first place around its point that is free; far ones get a line."""
    from matplotlib.patheffects import Normal, Stroke
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    inside = panel.get_window_extent(renderer)
    scale = figure.dpi / 72
    points = {r.plan: panel.transData.transform(_place(r, frontier)) for r in frontier.rows}
    taken = [Bbox.from_bounds(x - 6 * scale, y - 6 * scale, 12 * scale, 12 * scale) for x, y in points.values()]
    arms = [_arm_boxes(panel, row, frontier.axis, scale) for row in frontier.rows]
    arms.append(_join_boxes(panel, frontier, scale))
    for row in sorted(frontier.rows, key=lambda r: -points[r.plan][1]):
        x, y = points[row.plan]
        text = panel.annotate(
            row.plan, _place(row, frontier), xytext=(0, 0), textcoords="offset points", fontsize=9, zorder=5
        )
        text.set_path_effects([Stroke(linewidth=2.5, foreground="white"), Normal()])
        size = text.get_window_extent(renderer)
        least: tuple[float, tuple[float, float], Any] = (math.inf, (0.0, 0.0), None)
        for far, (dx, dy) in _places(size.width / scale, size.height / scale):
            box = Bbox.from_bounds(x + dx * scale, y + dy * scale, size.width, size.height)
            out = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            hits = sum(_overlap(box, other) for other in taken)
            crossed = sum(_overlap(box, arm) for some in arms for arm in some)
            cost = (1000 if out else 0) + 100 * hits + crossed + 0.4 * far  # near beats clear, a little
            if cost < least[0]:
                least = (cost, (dx, dy), box)
        _, (dx, dy), box = least
        text.set_position((dx, dy))
        taken.append(box)
        # From the point to the nearest place on the label's edge.
        width, height = size.width / scale, size.height / scale
        near = (min(max(0.0, dx), dx + width), min(max(0.0, dy), dy + height))
        if math.hypot(*near) > 14:
            panel.annotate(
                "",
                _place(row, frontier),
                xytext=near,
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": "#888888",
                    "linewidth": 0.8,
                    "shrinkA": 1,
                    "shrinkB": 5,
                },
                zorder=2,
            )


def _places(width: float, height: float) -> list[tuple[int, tuple[float, float]]]:
    """Offsets of a label's lower left corner from its point, in points, with the ring they stand in."""
    found: list[tuple[int, tuple[float, float]]] = []
    for ring in range(8):
        gap = 7 + 9 * ring
        places = [
            (gap, gap * 0.5),
            (-gap - width, gap * 0.5),
            (gap, -height - gap * 0.5),
            (-gap - width, -height - gap * 0.5),
            (-width / 2, gap),
            (-width / 2, -height - gap),
            (gap, -height / 2),
            (-gap - width, -height / 2),
        ]
        found += [(ring, place) for place in places]
    return found


def _arm_boxes(panel: Any, row: Row, axis: str, scale: float) -> list[Any]:
    """Thin boxes around the intervals of a point."""
    from matplotlib.transforms import Bbox

    at = words.shown(row.axis.value, axis)
    x, y = panel.transData.transform((at, row.score.value))
    boxes = []
    if math.isfinite(row.axis.low) and math.isfinite(row.axis.high):
        ends = (words.shown(v, axis) for v in (row.axis.low, row.axis.high))
        x0, x1 = (panel.transData.transform((v, row.score.value))[0] for v in ends)
        boxes.append(Bbox.from_extents(x0, y - scale, x1, y + scale))
    if math.isfinite(row.score.low) and math.isfinite(row.score.high):
        y0, y1 = (panel.transData.transform((at, v))[1] for v in (row.score.low, row.score.high))
        boxes.append(Bbox.from_extents(x - scale, y0, x + scale, y1))
    return boxes


def _join_boxes(panel: Any, frontier: Frontier, scale: float) -> list[Any]:
    """Small boxes along the line that joins the undominated."""
    from matplotlib.transforms import Bbox

    best = sorted((r for r in frontier.rows if r.undominated), key=lambda r: r.axis.value)
    ends = [panel.transData.transform(_place(r, frontier)) for r in best]
    boxes = []
    for (x0, y0), (x1, y1) in zip(ends, ends[1:], strict=False):
        pieces = max(1, int(math.hypot(x1 - x0, y1 - y0) / (6 * scale)))
        for k in range(pieces + 1):
            x, y = x0 + (x1 - x0) * k / pieces, y0 + (y1 - y0) * k / pieces
            boxes.append(Bbox.from_bounds(x - 2 * scale, y - 2 * scale, 4 * scale, 4 * scale))
    return boxes


def _overlap(a: Any, b: Any) -> bool:
    return bool(a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)
