"""Everything of `agents` that one log allows, and a line for each thing that it does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from thrifty.errors import InvalidInput
from thrifty.meter import agents
from thrifty.meter.agents import Run
from thrifty.meter.prices import PriceTable
from thrifty.meter.usage_log import CallRecord


@dataclass(slots=True)
class Report:
    """What was found, by its name; `missing` says what the log does not hold."""

    runs: int
    decomposition: agents.Decomposition
    usd: Mapping[str, int] | None = None
    variability: dict[str, agents.Variability] = field(default_factory=dict)
    bins: dict[str, tuple[agents.CostBin, ...]] = field(default_factory=dict)
    gaps: dict[str, agents.Difference] = field(default_factory=dict)
    difficulty: float | None = None
    foresight: dict[str, agents.Foresight] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        d = self.decomposition
        spend = {k: getattr(d.total, k) for k in ("input", "cached", "output", "reasoning", "calls", "tool_calls")}
        return {
            "runs": d.runs,
            "turns": d.turns,
            "total": {**spend, "fresh": d.fresh, "tokens": d.total.tokens},
            "input_to_output": d.input_to_output,
            "resent_input": d.resent,
            "tools": dict(d.tools),
            "usd": None if self.usd is None else {k: v / 1e9 for k, v in self.usd.items()},
            "variability": {k: asdict(v) for k, v in self.variability.items()},
            "success_by_cost": {
                k: {"bins": [asdict(b) for b in v], "interior_peak": agents.interior_peak(v)}
                for k, v in self.bins.items()
            },
            "models": {k: asdict(v) for k, v in self.gaps.items()},
            "difficulty_spearman": self.difficulty,
            "predictions": {k: asdict(v) for k, v in self.foresight.items()},
            "missing": self.missing,
        }

    def lines(self) -> list[str]:
        """As the terminal has it."""
        d, t = self.decomposition, self.decomposition.total
        ratio = "" if d.input_to_output is None else f", {d.input_to_output:.1f} input tokens for each output token"
        told = [
            f"{d.runs:,} runs, {d.turns:,} turns, {t.tokens:,} tokens: input {t.input:,} ({t.cached:,} cached), "
            f"output {t.output:,} ({t.reasoning:,} reasoning){ratio}",
            f"{d.resent:.1%} of the input had been sent or received in the turn before",
        ]
        if self.usd:
            whole = sum(self.usd.values())
            parts = ", ".join(f"{k} {v / whole:.1%}" for k, v in self.usd.items()) if whole else ""
            told.append(f"{whole / 1e9:.4f} dollars: {parts}")
        if d.tools:
            told.append("calls by tool: " + ", ".join(f"{k} {v:,}" for k, v in list(d.tools.items())[:10]))
        for model, v in self.variability.items():
            shares = "" if v.within is None else f"; {v.within:.0%} of the variance lies within tasks"
            told.append(
                f"{model}: the dearest run of a task costs {v.median_ratio:.1f} times its cheapest (median of "
                f"{v.tasks} tasks, at most {v.max_ratio:.1f}), coefficient of variation {v.median_cv:.2f}{shares}"
            )
        for model, bins in self.bins.items():
            spans = ", ".join(f"{b.low:,.0f}-{b.high:,.0f}: {b.success:.0%}" for b in bins)
            peak = "; highest in the middle" if agents.interior_peak(bins) else ""
            told.append(f"{model}: success by tokens {spans}{peak}")
        for pair, gap in self.gaps.items():
            told.append(
                f"{pair}: {gap.mean:+,.0f} tokens a task [{gap.low:+,.0f}, {gap.high:+,.0f}] over {gap.tasks} tasks"
            )
        if self.difficulty is not None:
            told.append(f"rank correlation of difficulty with tokens {self.difficulty:.2f}")
        for name, f in self.foresight.items():
            rank = "none" if f.spearman is None else f"{f.spearman:.2f}"
            told.append(
                f"{name}: rank correlation {rank}, median predicted/actual {f.ratio:.2f}, {f.under:.0%} too low, "
                f"off by a factor of {f.factor:.2f} (n {f.n})"
            )
        return [*told, *(f"not in this log: {line}" for line in self.missing)]


def report(records: Iterable[CallRecord], bins: int = 5, prices: PriceTable | None = None) -> Report:
    """Analyses calls. Raises InvalidInput without calls, for fewer than one bin, or for a model without a price."""
    if not 1 <= bins <= 1000:
        raise InvalidInput(f"--bins {bins}: from 1 to 1000")
    runs = agents.runs(records)
    found = Report(len(runs), agents.decompose(runs))
    if prices is not None:
        found.usd = _by_class(runs, prices)
    models: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.tokens:
            models[run.model].append(run)
    means: dict[str, dict[str, float]] = {}
    for model, of in models.items():
        tasks = _by_task(of)
        means[model] = {task: fmean(costs) for task, costs in tasks.items()}
        try:
            found.variability[model] = agents.variability(tasks)
        except InvalidInput as error:
            found.missing.append(f"how runs of one task differ for {model} ({error})")
        known = [run for run in of if run.success is not None]
        if known:
            outcomes = [bool(run.success) for run in known]
            found.bins[model] = agents.cost_accuracy([r.tokens for r in known], outcomes, min(bins, len(known)))
        else:
            found.missing.append(f"success of runs for {model} (a field `success`)")
    _compare(found, means)
    _foresee(found, [run for of in models.values() for run in of])
    return found


def _compare(found: Report, means: Mapping[str, Mapping[str, float]]) -> None:
    names = sorted(means)[:8]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            try:
                found.gaps[f"{first} against {second}"] = agents.model_gap(means[first], means[second])
            except InvalidInput as error:
                found.missing.append(f"{first} against {second} ({error})")


def _foresee(found: Report, runs: Sequence[Run]) -> None:
    hard: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.difficulty is not None:
            hard[run.task].append(run)
    if len(hard) > 1:
        labels = [fmean(r.difficulty or 0.0 for r in of) for of in hard.values()]
        found.difficulty = agents.spearman(labels, [fmean(r.tokens for r in of) for of in hard.values()])
    else:
        found.missing.append("difficulty of tasks (a field `difficulty`)")
    told = [(r.predicted, r.tokens) for r in runs if r.predicted is not None and r.predicted > 0]
    if len(told) > 1:
        found.foresight["the agents' predictions"] = agents.foresight([p for p, _ in told], [a for _, a in told])
    else:
        found.missing.append("predictions before the run (a field `predicted_tokens`)")
    actual = [r.tokens for r in runs]
    if len(runs) > 2:
        found.foresight["the median of the other runs"] = agents.foresight(agents.median_baseline(actual), actual)
        first = [r.turns[0].input for r in runs]
        if min(first) > 0:
            found.foresight["a line on the first prompt"] = agents.foresight(
                agents.length_baseline(first, actual), actual
            )


def _by_task(runs: Iterable[Run]) -> dict[str, list[float]]:
    tasks: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        tasks[run.task].append(float(run.tokens))
    return tasks


def _by_class(runs: Iterable[Run], prices: PriceTable) -> dict[str, int]:
    """Dollars by class of token, in 1e-9; each class is priced on its own, so the parts sum up to rounding."""
    parts = {"fresh input": 0, "cached input": 0, "output": 0}
    for run in runs:
        rate, spend = prices.rate(run.model), run.spend
        parts["fresh input"] += round(rate.input * (spend.input - spend.cached))
        parts["cached input"] += round(rate.cached * spend.cached)
        parts["output"] += round(rate.output * spend.output)
    return parts
