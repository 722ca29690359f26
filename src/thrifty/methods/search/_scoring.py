"""Who scores a solution or the beginning of one: the answering model's own confidence, or a verifier. Always in [0, 1],
higher is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from thrifty.budget import Account
from thrifty.call import Call
from thrifty.methods.search._steps import Partial
from thrifty.methods.search._verifier import NEUTRAL, ROLE, Verifier
from thrifty.spend import Spend, Work
from thrifty.thinking import CLOSING, OPENING

SCORES = ("confidence", "verifier")
NEEDS: Mapping[str, frozenset[str]] = {
    "confidence": frozenset({"text", "sampling", "logprobs"}),
    "verifier": frozenset({"text", "sampling"}),
}
"""What each needs of the answering engine."""
ROLES: Mapping[str, Mapping[str, frozenset[str]]] = {"confidence": {}, "verifier": {ROLE: frozenset({"text"})}}
"""What each needs of others."""


def mean_confidence(logprobs: Sequence[float] | None) -> float:
    """exp of the mean log-probability: the geometric mean of the tokens' probabilities. Neutral (0.5) without tokens.

    >>> round(mean_confidence([math.log(0.5), math.log(0.125)]), 6), mean_confidence([])
    (0.25, 0.5)
    """
    return math.exp(min(0.0, fmean(logprobs))) if logprobs else NEUTRAL


class StepScorer:
    """Scores beginnings, and keeps account of what that cost."""

    def __init__(self, method: str, call: Call, kind: str, check_tokens: int, keep: int) -> None:
        self.verifier: Verifier | None = None
        if kind == "verifier":
            self.verifier = Verifier(method, call, tokens=check_tokens, keep=keep, soft=True)

    async def __call__(self, partials: Sequence[Partial]) -> list[float]:
        """One score each, in order. Raises BudgetExceeded only where the plan says refuse."""
        if self.verifier is None:
            return [mean_confidence(p.logprobs) for p in partials]
        texts = [p.text.replace(OPENING, "").replace(CLOSING, "\n\n") for p in partials]
        return [
            (await self.verifier.verdict(text, whole=p.finish is not None)).score if text.strip() else NEUTRAL
            for text, p in zip(texts, partials, strict=True)
        ]

    @property
    def accounts(self) -> list[Account]:
        return [] if self.verifier is None else [self.verifier.account]

    @property
    def cost(self) -> tuple[Spend, Work]:
        """What the checks cost."""
        return (
            (Spend(), Work()) if self.verifier is None else (self.verifier.account.settled, self.verifier.account.work)
        )

    @property
    def note(self) -> str:
        return "" if self.verifier is None else self.verifier.note()

    @property
    def detail(self) -> dict[str, int]:
        return {} if self.verifier is None else self.verifier.detail()
