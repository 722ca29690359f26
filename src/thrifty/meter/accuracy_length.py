"""Does thinking longer help? Accuracy against tokens, with difficulty held fixed.

Harder questions take longer and are missed more often, so the raw slope of accuracy on length is confounded: it is
reported beside the controlled one and never alone. Runs that a cap cut are censored, not simply wrong; `regress` leaves
them out and says how many.

Analyses after "The Relationship Between Reasoning and Performance in Large Language Models -- o3 (mini) Thinks Harder,
Not Longer" (Ballon et al. 2025, arXiv:2502.15631), from its abstract and descriptions of it; the estimator's details
(ridge, clustered intervals) are ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any

from thrifty.errors import InvalidInput
from thrifty.instrument import Instrument

INSTRUMENT = Instrument(
    name="accuracy-length",
    kind="analysis",
    paper=(
        "The Relationship Between Reasoning and Performance in Large Language Models -- o3 (mini) Thinks Harder, Not "
        "Longer (Ballon et al. 2025, arXiv:2502.15631)"
    ),
    runs="thrifty.meter.accuracy_length:regress",
)

_RIDGE = 1e-4
"""On the fixed effects only, so that a tier that is always or never solved has a finite one."""


@dataclass(frozen=True, slots=True)
class Run:
    """One model's answer to one question."""

    model: str
    question: str
    tokens: int
    """thinking tokens, or all output where they are not told apart"""
    correct: bool
    tier: str = ""
    """difficulty"""
    domain: str = ""
    capped: bool = False
    """a limit cut it"""


@dataclass(frozen=True, slots=True)
class Slope:
    """How accuracy moves with length, for one model. Logits and probabilities are per 1,000 tokens."""

    model: str
    runs: int
    capped: int
    """runs left out because a limit cut them"""
    slope: float
    """of the logit, with tier and domain held fixed"""
    low: float
    high: float
    """its interval, clustered by question"""
    effect: float
    """average marginal effect: the change of P(correct)"""
    effect_low: float
    effect_high: float
    raw: float
    """the slope without tier and domain: confounded by difficulty, for comparison only"""


def regress(runs: Iterable[Run], confidence: float = 0.95) -> dict[str, Slope]:
    """For each model: logit P(correct) = b0 + b1 tokens / 1000 + tier + domain, by maximum likelihood.

    Intervals are normal, from a sandwich covariance clustered by question. Raises InvalidInput when a model has fewer
    than three whole runs, only right or only wrong ones, or runs of one length.
    """
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence = {confidence}: above 0 and below 1 is needed")
    by_model: dict[str, list[Run]] = {}
    for run in runs:
        by_model.setdefault(run.model, []).append(run)
    return {model: _regress(model, mine, confidence) for model, mine in by_model.items()}


@dataclass(frozen=True, slots=True)
class Bin:
    """The runs of one model between two token quantiles."""

    low: int
    high: int
    runs: int
    mean_tokens: float
    accuracy: float


def bins(runs: Sequence[Run], count: int = 5) -> list[Bin]:
    """Runs of one model in `count` groups of nearly equal size by length; fewer when there are fewer runs. Equal
    lengths may fall on both sides of a border. Raises InvalidInput without runs."""
    if not runs or count < 1:
        raise InvalidInput(f"{len(runs)} runs in {count} bins: at least one of each is needed")
    ordered = sorted(runs, key=lambda r: (r.tokens, r.question))
    count = min(count, len(ordered))
    found = []
    for i in range(count):
        part = ordered[i * len(ordered) // count : (i + 1) * len(ordered) // count]
        right = sum(r.correct for r in part) / len(part)
        found.append(Bin(part[0].tokens, part[-1].tokens, len(part), sum(r.tokens for r in part) / len(part), right))
    return found


def median_tokens(runs: Iterable[Run]) -> dict[tuple[str, bool], float]:
    """Median tokens by model and correctness."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for run in runs:
        groups.setdefault((run.model, run.correct), []).append(run.tokens)
    return {key: float(median(tokens)) for key, tokens in groups.items()}


@dataclass(frozen=True, slots=True)
class Matched:
    """Two settings on the same questions. Counts and token sums by what they solve."""

    questions: Mapping[str, int]
    """`both`, `only_high`, `only_low`, `none`"""
    ratio: Mapping[str, float]
    """tokens of the higher over those of the lower setting, in each group that has any"""
    extra: int
    """tokens that the higher setting took more, where it took more"""
    wasted: int
    """of them, on questions that the lower one had solved"""

    @property
    def wasted_share(self) -> float:
        """Of the extra tokens; 0 when there are none."""
        return self.wasted / self.extra if self.extra else 0.0


def wasted_tokens(low: Sequence[Run], high: Sequence[Run]) -> Matched:
    """What the higher setting's extra tokens bought. Questions that only one has are left out. Raises InvalidInput when
    none is left, or a setting has a question twice."""
    lower, higher = ({r.question: r for r in runs} for runs in (low, high))
    if len(lower) != len(low) or len(higher) != len(high):
        raise InvalidInput("a question stands twice in one setting: one run of each is needed")
    shared = [q for q in lower if q in higher]
    if not shared:
        raise InvalidInput("the two settings share no question")
    counts = dict.fromkeys(("both", "only_high", "only_low", "none"), 0)
    sums = {group: [0, 0] for group in counts}
    extra = wasted = 0
    for question in shared:
        a, b = lower[question], higher[question]
        group = ("both" if a.correct else "only_high") if b.correct else ("only_low" if a.correct else "none")
        counts[group] += 1
        sums[group][0] += a.tokens
        sums[group][1] += b.tokens
        more = max(0, b.tokens - a.tokens)
        extra += more
        wasted += more if a.correct else 0
    ratio = {group: after / before for group, (before, after) in sums.items() if before}
    return Matched(counts, ratio, extra, wasted)


def accuracy_at_cap(runs: Sequence[Run], cap: int) -> float:
    """Accuracy if every run over `cap` tokens were cut and lost. Never falls as the cap rises. Raises InvalidInput
    without runs."""
    if not runs:
        raise InvalidInput("at least one run is needed")
    return sum(r.correct and r.tokens <= cap for r in runs) / len(runs)


# -- details ---------------------------------------------------------------------------------------------------


def _regress(model: str, runs: Sequence[Run], confidence: float) -> Slope:
    import numpy as np

    whole = [r for r in runs if not r.capped]
    lengths = {r.tokens for r in whole}
    if len(whole) < 3 or len({r.correct for r in whole}) < 2 or len(lengths) < 2:
        raise InvalidInput(
            f"model {model!r}: {len(whole)} whole runs of {len(lengths)} lengths, "
            f"{sum(r.correct for r in whole)} right: "
            "at least 3 runs, right and wrong ones, of different lengths, are needed"
        )
    x = np.array([r.tokens / 1000 for r in whole])
    y = np.array([float(r.correct) for r in whole])
    fixed = [np.ones(len(whole))]
    for values in ([r.tier for r in whole], [r.domain for r in whole]):
        fixed += [np.array([float(v == level) for v in values]) for level in sorted(set(values))[1:]]
    design = np.column_stack([x, *fixed])
    clusters = {q: i for i, q in enumerate(dict.fromkeys(r.question for r in whole))}
    beta, covariance = _logit(design, y, np.array([clusters[r.question] for r in whole]))
    raw, _ = _logit(design[:, :2], y, np.arange(len(whole)))
    p = _sigmoid(design @ beta)
    spread = p * (1 - p)
    effect = float(spread.mean() * beta[0])
    gradient = (beta[0] * spread * (1 - 2 * p)) @ design / len(whole)
    gradient[0] += spread.mean()
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * math.sqrt(max(0.0, float(covariance[0, 0])))
    effect_half = z * math.sqrt(max(0.0, float(gradient @ covariance @ gradient)))
    return Slope(
        model=model,
        runs=len(whole),
        capped=len(runs) - len(whole),
        slope=float(beta[0]),
        low=float(beta[0]) - half,
        high=float(beta[0]) + half,
        effect=effect,
        effect_low=effect - effect_half,
        effect_high=effect + effect_half,
        raw=float(raw[0]),
    )


def _logit(design: Any, y: Any, clusters: Any) -> tuple[Any, Any]:
    """Maximum likelihood by Newton's method with halved steps [P], and its clustered covariance [P, P]."""
    import numpy as np

    penalty = np.full(design.shape[1], _RIDGE)
    penalty[:2] = 1e-9  # slope and intercept: only against a flat direction
    beta = np.zeros(design.shape[1])

    def loss(b: Any) -> float:
        eta = design @ b
        return float(np.logaddexp(0, eta).sum() - y @ eta + 0.5 * penalty @ (b * b))

    value = loss(beta)
    for _ in range(100):
        p = _sigmoid(design @ beta)
        gradient = design.T @ (p - y) + penalty * beta
        curvature = (design * (p * (1 - p))[:, None]).T @ design + np.diag(penalty + 1e-12)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-8 and loss(beta - size * step) > value:
            size /= 2
        beta = beta - size * step
        before, value = value, loss(beta)
        if abs(before - value) < 1e-12 * (1 + abs(value)):
            break
    p = _sigmoid(design @ beta)
    bread = np.linalg.inv((design * (p * (1 - p))[:, None]).T @ design + np.diag(penalty + 1e-12))
    scores = np.zeros((int(clusters.max()) + 1, design.shape[1]))
    np.add.at(scores, clusters, design * (y - p)[:, None])
    groups = len(scores)
    meat = scores.T @ scores * (groups / (groups - 1) if groups > 1 else 1.0)
    return beta, bread @ meat @ bread


def _sigmoid(eta: Any) -> Any:
    import numpy as np

    return 0.5 * (1 + np.tanh(eta / 2))
