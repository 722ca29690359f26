"""Thought-level self-certainty: of several next thoughts, keep the one of which the model is surest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from thrifty.call import Answer, Branch, Call, Receipt
from thrifty.method import Next, Search, knob
from thrifty.methods.search._branches import can_branch
from thrifty.methods.search._samples import tell
from thrifty.methods.search._steps import BranchSteps, Pace, Partial, check_delimiter
from thrifty.policy import DecodePolicy, Tensor


@dataclass(frozen=True, kw_only=True)
class SelfCertainty(Search):
    """Draws `candidates` next thoughts, keeps the one with the highest self-certainty, and goes on from it; after
    `guided` thoughts (0: never) the answer is written to its end without choosing.

    Self-certainty of a thought of n tokens over a vocabulary of V is the mean over its tokens of KL(uniform || p_i),
    with p_i the model's own distribution (temperature 1, nothing filtered) at the position that produced token i: 0 for
    a uniform distribution, higher the more certain. Tokens that the model masks out (-inf) are no part of V. Equal
    thoughts count once; equal certainties go to the earlier.

    Needs no vote, so it works for open-ended questions. Rejected thoughts are billed. When the budget is down to `keep`
    tokens, or holds fewer branches, fewer are tried, and the best goes on alone. Written from the paper's abstract: the
    delimiter, the sampling and the number of candidates are ours."""

    name = "self-certainty"
    paper = (
        "Improving reasoning at inference time via uncertainty minimisation (Legrand et al. 2026, arXiv:2603.07159), "
        "with the self-certainty of Kang et al. 2025, arXiv:2502.18581"
    )
    needs = frozenset({"text", "sampling", "branch", "logits"})
    identity = {"candidates": 1}

    candidates: int = knob(4, "thoughts that are tried for each step", low=1, high=256, log=True)
    guided: int = knob(0, "thoughts that are chosen before the rest is written freely; 0: all", low=0, high=10_000)
    delimiter: str = knob("\n\n", "what ends a thought")
    step_tokens: int = knob(256, "tokens of one thought at most", low=1, high=100_000, log=True)
    temperature: float = knob(0.8, "of the thoughts", low=0.01, high=10.0)
    keep: int = knob(64, "tokens that the search leaves for the end of the answer", low=0, high=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_delimiter(self.name, self.delimiter)

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.candidates == 1:
            return await next(call.with_receipt(Receipt(self.name, False, "one candidate: nothing to choose")))
        if not can_branch(call, next):
            reason = "a method below needs whole answers: no thought can be chosen"
            return await next(call.with_receipt(Receipt(self.name, False, reason)))
        record = Record()
        pace = Pace(self.delimiter, self.step_tokens, self.keep, self.temperature)
        steps = BranchSteps(call.with_policy(ReadCertainty(record, self.name)), next, pace)
        try:
            partial, tried, chosen = await self._search(steps, record)
            parts = [f"{tried} thoughts tried, {len(chosen)} kept"]
            if steps.tight:
                parts.append("the budget ended the search: the best thought went on alone")
            detail = {"certainty": [round(c, 6) for c in chosen]}
            own = Receipt(
                self.name, tried > len(chosen), "; ".join(parts), tried, len(chosen), "thoughts", detail=detail
            )
            answer = await steps.conclude(partial, own)
        finally:
            steps.close()
        return await tell(call, answer)

    async def _search(self, steps: BranchSteps, record: Record) -> tuple[Partial, int, list[float]]:
        """The solution, how many thoughts were tried, and the certainty of each that was kept."""
        best = await steps.root()
        chosen: list[float] = []
        tried = 0
        while best.finish is None and not steps.tight and (not self.guided or len(chosen) < self.guided):
            before = (best.branch, record.length(best.branch))
            children = (await steps.grow([(best, self.candidates)]))[0]
            tried += len(children)
            sure = [record.mean(c.branch, before[1] if c.branch is before[0] else 0) for c in children]
            pick = max(range(len(children)), key=lambda i: (sure[i], -i))
            for i, child in enumerate(children):
                if i != pick:
                    steps.drop(child)
            best = children[pick]
            chosen.append(sure[pick])
        await steps.end(best)
        return best, tried, chosen


@dataclass(eq=False)
class Record:
    """The certainty of every token that the branches of one call drew; forks of a policy share it."""

    drawn: WeakKeyDictionary[Branch, list[float]] = field(default_factory=WeakKeyDictionary)

    def length(self, branch: Branch | None) -> int:
        """How many tokens a branch has drawn itself."""
        return 0 if branch is None else len(self.drawn.get(branch, ()))

    def mean(self, branch: Branch | None, start: int) -> float:
        """The mean over the tokens that a branch drew from the `start`-th on; 0 when there are none."""
        values = [] if branch is None else self.drawn.get(branch, [])[start:]
        return math.fsum(values) / len(values) if values else 0.0


class ReadCertainty(DecodePolicy):
    """Notes the certainty of each distribution that a token is drawn from, and changes nothing."""

    def __init__(self, record: Record, method: str) -> None:
        self._record, self.method = record, method

    def logits(self, branch: Branch, logits: Tensor) -> Tensor:
        self._record.drawn.setdefault(branch, []).append(certainty(logits))
        return logits


def certainty(logits: Tensor) -> float:
    """KL(uniform || softmax(logits [V])) in nats: logsumexp(z) - mean(z) - log V over the finite entries.

    Summed in double precision; 0 for equal logits, and where fewer than two are finite.
    """
    import torch

    wide = logits.double()
    wide = wide[torch.isfinite(wide)]
    if len(wide) < 2:
        return 0.0
    return max(0.0, float(torch.logsumexp(wide, 0) - wide.mean()) - math.log(len(wide)))


def certainty_of(probabilities: Sequence[Sequence[float]]) -> float:
    """Self-certainty of a span from its full distributions [n, V]: -(1 / (n V)) sum_i sum_j log(V p_ij).

    The paper's sum, for probabilities at hand; entries of 0 are no part of their row.

    >>> certainty_of([[0.25] * 4])
    0.0
    """
    rows = []
    for row in probabilities:
        kept = [p for p in row if p > 0]
        rows.append(-math.fsum(math.log(len(kept) * p) for p in kept) / len(kept))
    return math.fsum(rows) / len(rows)
