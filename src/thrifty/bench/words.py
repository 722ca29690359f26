"""Figures of a frontier as people read them: one form for the terminal, the picture and the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from thrifty.bench.row import Fired, Row
from thrifty.bench.stats import Interval

UNITS = {
    "usd": "US dollars for 1,000 examples",
    "engine_seconds": "engine seconds",
    "kv_reads": "key-value entries read",
    "kv_bytes_peak": "bytes of KV cache, peak",
    "kv_bytes_mean": "bytes of KV cache, mean",
    "prefill": "prompt tokens computed",
    "target_passes": "forward passes",
    "draft_passes": "draft passes",
    "calls": "calls",
    "tool_calls": "tool calls",
    "tokens": "tokens, input and output",
}


def axis_name(axis: str) -> str:
    """What an axis counts, with what it is a mean of."""
    return UNITS[axis] if axis == "usd" else f"{UNITS.get(axis, f'{axis} tokens')}, mean of an example"


def axis_head(axis: str) -> str:
    """An axis as the head of a column."""
    return "usd/1k" if axis == "usd" else axis


def shown(value: float, axis: str) -> float:
    """A mean on an axis in the unit that people read: dollars for 1,000 examples, else as it is."""
    return value * 1000 if axis == "usd" else value


def amount(value: float, axis: str) -> str:
    """A mean on an axis.

    >>> amount(1234.6, "tokens"), amount(0.00123456, "usd"), amount(7.25, "output")
    ('1,235', '1.23', '7.2')
    """
    if not math.isfinite(value):
        return "?"
    value = shown(value, axis)
    if axis == "usd":
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if 0 < abs(value) < 1:
        return f"{value:.4g}"
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def score(interval: Interval) -> str:
    """A score with its interval."""
    return f"{interval.value:.2f} {_bounds(interval, lambda v: f'{v:.2f}')}"


def axis(interval: Interval, name: str) -> str:
    """A mean on an axis with its interval."""
    return f"{amount(interval.value, name)} {_bounds(interval, lambda v: amount(v, name))}"


def saving(interval: Interval | None) -> str:
    """A share saved, in percent; negative where it costs more; how many times as much from twice as much
    on."""
    if interval is None:
        return ""
    if interval.value <= -1:
        turned = replace(interval, value=1 - interval.value, low=1 - interval.high, high=1 - interval.low)
        return f"costs {turned.value:.1f}\u00d7 {_bounds(turned, lambda v: f'{v:.1f}')}"
    return f"{_signed(interval.value * 100, 0)}% {_bounds(interval, lambda v: _signed(v * 100, 0))}"


def difference(interval: Interval | None) -> str:
    """A paired difference of scores."""
    if interval is None:
        return ""
    return f"{_signed(interval.value, 2)} {_bounds(interval, lambda v: _signed(v, 2))}"


def tokens_in(row: Row) -> str:
    """Input of the answering engine, and after a plus that of the other roles."""
    if row.other_input >= 0.05:
        return f"{amount(row.input, 'input')} + {amount(row.other_input, 'input')}"
    return amount(row.input, "input")


def fired(found: tuple[Fired, ...]) -> str:
    """Share of calls on which each method of a plan fired."""
    if len(found) == 1:
        return f"{found[0].share:.0%}"
    return ", ".join(f"{f.method} {f.share:.0%}" for f in found)


def p_value(row: Row) -> str:
    """McNemar's mid-p, where it applies."""
    if row.mcnemar is None:
        return ""
    p = row.mcnemar.mid_p
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _bounds(interval: Interval, show: Callable[[float], str]) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return "[?]"
    return f"[{show(interval.low)}, {show(interval.high)}]"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "\u2212")
