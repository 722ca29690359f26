"""How a model's hidden states move while it reasons: the three Latent-Trajectory signals, kept up token by token.

Invariant: a segment's mean is summed as its tokens come, so a token costs O(layers x D); segments are kept, because the
direction that they are compared with is known only at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from thrifty.call import Branch, Receipt
from thrifty.errors import InvalidInput
from thrifty.policy import CONTINUE, DecodePolicy, Tensor, Verdict

SIGNALS = ("net", "cumulative", "aligned")


@dataclass(frozen=True, slots=True)
class Signals:
    """Of one trace: `net` change per segment, `cumulative` change, and how `aligned` the steps are with the whole."""

    net: float
    cumulative: float
    aligned: float
    segments: int

    def score(self, signal: str) -> float:
        """Higher is better: correct traces move far, straight, and without detours."""
        return -self.cumulative if signal == "cumulative" else float(getattr(self, signal))


def signals_of(segments: Tensor) -> Signals | None:
    """From segment means [N, L, D]; None for fewer than two segments, where nothing has moved.

    With drift u = s[N] - s[1] and updates v[n] = s[n] - s[n - 1], each in a layer and averaged over layers: net is
    |u| / N, cumulative the sum of |v[n]|, aligned the mean of cos(v[n], u) (0 where either is zero).
    """
    import torch

    s = torch.as_tensor(segments).double()
    if s.shape[0] < 2:
        return None
    u = s[-1] - s[0]
    v = s[1:] - s[:-1]
    u_norm, v_norm = u.norm(dim=-1), v.norm(dim=-1)
    below = v_norm * u_norm
    cosine = torch.where(below > 1e-12, (v * u).sum(-1) / below.clamp_min(1e-12), torch.zeros_like(below))
    return Signals(
        net=float(u_norm.mean()) / s.shape[0],
        cumulative=float(v_norm.sum(0).mean()),
        aligned=float(cosine.mean()),
        segments=int(s.shape[0]),
    )


@dataclass(eq=False)
class Trajectory:
    """Segment means of one trace, as its tokens come. Tokens of an unfinished segment do not count."""

    tokens: int
    """of a segment"""
    segments: list[Any] = field(default_factory=list)
    """[L, D] each"""
    _sum: Any = None
    _count: int = 0

    def add(self, hidden: Tensor) -> None:
        """Takes the states [L, D] of one more token."""
        self._sum = hidden.float().clone() if self._sum is None else self._sum + hidden
        self._count += 1
        if self._count == self.tokens:
            self.segments.append(self._sum / self._count)
            self._sum, self._count = None, 0

    def signals(self) -> Signals | None:
        """Of what there is so far."""
        import torch

        return signals_of(torch.stack(self.segments)) if len(self.segments) > 1 else None


@dataclass(eq=False)
class Trace:
    """What is known of one branch: its thinking, and, until it thinks, what it wrote at all."""

    thinking: Trajectory
    whole: Trajectory
    drawn: int = 0
    inside: bool = False

    def signals(self) -> Signals | None:
        """Of the thinking where there was any, else of all."""
        return self.thinking.signals() if self.thinking.segments or self.thinking._count else self.whole.signals()


class Traces:
    """The traces of all branches of one call; forks of a policy share it."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.known: WeakKeyDictionary[Branch, Trace] = WeakKeyDictionary()

    def of(self, branch: Branch) -> Trace:
        return self.known.setdefault(branch, Trace(Trajectory(self.tokens), Trajectory(self.tokens)))


class ReadTrajectory(DecodePolicy):
    """Follows the hidden states of each branch, and changes nothing. The states at hand when a token is drawn are those
    of the token before it, so a trace's last token is never seen, and the first states, the prompt's, are left out, as
    is the embedding layer."""

    needs = frozenset({"hidden"})

    def __init__(self, traces: Traces, method: str) -> None:
        self._traces, self.method = traces, method
        self.tokens = traces.tokens

    def after(self, branch: Branch, token: int) -> Verdict:
        trace = self._traces.of(branch)
        hidden = getattr(branch, "hidden", None)
        if trace.drawn and hidden is not None:
            if trace.inside:
                trace.thinking.add(hidden[1:])
            elif not trace.thinking.segments:
                trace.whole.add(hidden[1:])
        trace.drawn += 1
        trace.inside = bool(getattr(getattr(branch, "shape", None), "inside", False))
        return CONTINUE

    def receipt(self, branch: Branch) -> Receipt | None:
        found = self._traces.known.pop(branch, None)
        signals = None if found is None else found.signals()
        detail = {} if signals is None else {name: getattr(signals, name) for name in (*SIGNALS, "segments")}
        return Receipt(self.method, False, "followed the hidden states", detail=detail)


# -- calibration -------------------------------------------------------------------------------------------------


def auc(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """P(a correct trace scores above a wrong one), ties half. Raises InvalidInput unless there are both.

    >>> auc([3, 2, 1], [True, False, False]), auc([1, 1], [True, False])
    (1.0, 0.5)
    """
    good = [s for s, c in zip(scores, correct, strict=True) if c]
    bad = [s for s, c in zip(scores, correct, strict=True) if not c]
    if not good or not bad:
        raise InvalidInput("correct and wrong traces are needed, at least one of each")
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


def choose_threshold(questions: Sequence[tuple[Sequence[tuple[float, bool]], bool]]) -> tuple[float, float, float]:
    """The threshold that answers most questions right, and of equal ones needs the fewest samples: threshold, accuracy,
    mean samples. Each question is its traces in order, (score, correct), and whether their majority is right.

    Every score that occurs is tried, and one above all of them (always vote). Raises InvalidInput without traces.
    """
    tried = sorted({score for traces, _ in questions for score, _ in traces})
    if not tried or any(not traces for traces, _ in questions):
        raise InvalidInput("at least one question, each with at least one trace, is needed")
    tried.append(tried[-1] + max(1.0, abs(tried[-1])))
    best: tuple[float, float, float] | None = None
    for threshold in tried:
        right = used = 0
        for traces, majority in questions:
            at = next((i for i, (score, _) in enumerate(traces) if score >= threshold), None)
            right += majority if at is None else traces[at][1]
            used += len(traces) if at is None else at + 1
        found = (threshold, right / len(questions), used / len(questions))
        if best is None or (found[1], -found[2]) > (best[1], -best[2]):
            best = found
    if best is None:
        raise InvalidInput("no threshold was tried")
    return best
