"""Self-consistency with adaptive stopping: sample until the majority is safe, then answer with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.budget import Account
from thrifty.call import Answer, Call, Receipt
from thrifty.errors import BudgetExceeded
from thrifty.method import Next, Search, knob
from thrifty.methods.search._branches import Tree, can_branch
from thrifty.methods.search._samples import (
    conclude,
    counts,
    how_many_fit,
    sample_call,
    shares,
    side_by_side,
    tell,
    vote_of,
    votes_of,
    winner_of,
)


@dataclass(frozen=True, kw_only=True)
class SelfConsistency(Search):
    """Samples up to `samples` answers, `wave` at a time, and returns the first one that gave the most
    frequent answer.

    It stops early when the leading answer is the true majority with probability `confidence` or more (`beta`,
    the rule that Adaptive-Consistency recommends: leader against runner-up; `dirichlet`: leader against all
    that were seen), or when the samples left could not overtake it. `confidence` 1 leaves only the second
    reason. `temperature` replaces the call's own, which as a rule is 0 and would draw the same answer each
    time. Equal votes go to the answer that was said first.

    On an engine with branches the prompt is prefilled once and the samples are forks of it; those of a wave
    advance together. One fork more is kept ready while another wave may come; when it is not needed it is billed
    all the same (one call, its prompt as cached), and the receipt says so. On other engines, and above a method
    that needs whole answers, each sample is a call.

    Samples of one wave share what is left on the account: forks take it step by step; where it cannot hold a
    tranche for each, they are calls with equal parts. Fewer run when it cannot hold a wave. When the budget
    refuses a sample, those there are decide (or BudgetExceeded is raised, when the plan says refuse)."""

    name = "self-consistency"
    paper = (
        "Let's Sample Step by Step: Adaptive-Consistency for Efficient Reasoning and Coding with LLMs "
        "(Aggarwal et al. 2023, arXiv:2305.11860), on Self-Consistency (Wang et al. 2022, arXiv:2203.11171)"
    )
    version = 2
    needs = frozenset({"text", "sampling"})
    identity = {"samples": 1}

    samples: int = knob(8, "answers at most", low=1, high=1000, log=True)
    confidence: float = knob(0.95, "stop when the majority is this sure", low=0.5, high=1.0)
    rule: str = knob("beta", "how sure is computed", choices=("beta", "dirichlet"))
    wave: int = knob(1, "samples at the same time; 1: one after another", low=1, high=1000, log=True)
    temperature: float = knob(0.7, "of the samples", low=0.01, high=10.0)
    parse: str = knob("auto", "what of an answer votes", choices=("auto", "number", "text"))

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.samples == 1:
            return await next(
                call.with_receipt(Receipt(self.name, False, "one sample: nothing to vote on", 1, 1, "samples"))
            )
        answers: list[Answer] = []
        tree = Tree(call, next, self.temperature) if can_branch(call, next) else None
        accounts = [] if tree is None else [tree.account]
        started = 0
        try:
            while not (why := self._stop([vote_of(a, self.parse) for a in answers], self.samples - started)):
                left = self.samples - started
                try:
                    rows = 0 if tree is None else tree.rows(min(self.wave, left), left)
                    if tree is not None and rows:
                        drawn = await tree.wave(started, rows, more=rows < left)
                        started += len(drawn)
                    else:
                        parts = shares(call, started, how_many_fit(call, min(self.wave, left)))
                        accounts += parts
                        drawn = await self._calls(call, next, parts, started)
                        started += len(parts)
                except BudgetExceeded as error:
                    if call.on_exceed == "refuse" or not answers:
                        raise
                    why = f"the budget ({error.resource}) held no more"
                    break
                answers += drawn
            if tree is not None:
                await tree.done()
        finally:
            if tree is not None:
                tree.close()
        own = self._receipt(answers, why, 0 if tree is None else tree.unused)
        winner = answers[winner_of(votes_of(answers, self.parse))]
        return await tell(call, conclude(call, winner, answers, accounts, own))

    def _receipt(self, answers: Sequence[Answer], why: str, unused: int) -> Receipt:
        votes = votes_of(answers, self.parse)
        tally = sorted(counts(votes).values(), reverse=True)
        parts = [f"{len(answers)} of {self.samples} samples, {tally[0] if tally else 0} agree", why]
        detail: dict[str, Any] = {"votes": tally, "abstained": sum(v is None for v in votes)}
        if unused:
            parts.append(f"{unused} fork{'s' if unused > 1 else ''} kept ready and not needed")
            detail["unused_forks"] = unused
        fired = len(answers) > 1
        return Receipt(self.name, fired, "; ".join(parts), self.samples, len(answers), "samples", detail=detail)

    async def _calls(self, call: Call, next: Next, accounts: Sequence[Account], first: int) -> list[Answer]:
        calls = [sample_call(call, first + i, account, self.temperature) for i, account in enumerate(accounts)]
        try:
            if len(calls) == 1:
                return [await next(calls[0])]
            return [a for a in await side_by_side(next, calls, lambda came: False) if a is not None]
        finally:
            for account in accounts:
                account.close()

    def _stop(self, votes: Sequence[str | None], left: int) -> str:
        """Why to stop now; empty to go on."""
        if left <= 0:
            return "all samples drawn"
        tally = sorted(counts(votes).values(), reverse=True)
        if not tally:
            return ""
        runner_up = tally[1] if len(tally) > 1 else 0
        if tally[0] - runner_up > left:
            return "the others cannot overtake"
        sure = beta_confidence(tally[0], runner_up) if self.rule == "beta" else dirichlet_confidence(tally)
        return f"sure by {sure:.3f}" if sure >= self.confidence else ""


def beta_confidence(first: int, second: int) -> float:
    """P(p > 1/2) for p ~ Beta(first + 1, second + 1): how sure the leader beats the runner-up, from their
    votes.

    For whole counts that is P(Binomial(first + second + 1, 1/2) <= first), so the sum is exact.

    >>> beta_confidence(4, 0)
    0.96875
    """
    n = first + second + 1
    return float(sum(math.comb(n, j) for j in range(first + 1)) / 2**n)


def dirichlet_confidence(votes: Sequence[int]) -> float:
    """P(p_0 > p_j for all j) for p ~ Dirichlet(votes + 1), `votes` of the leader first; one unseen answer is
    added when all agree, so that a single vote is not certain.

    With X_j ~ Gamma(votes_j + 1) it is E[prod_j F_j(X_0)], integrated by Simpson's rule (error below 1e-6).
    """
    lead, others = votes[0] + 1, [v + 1 for v in votes[1:]] or [1]
    top = lead + 12 * math.sqrt(lead) + 30
    panels = 1200
    step = top / panels
    total = 0.0
    for i in range(1, panels + 1):  # the density is 0 at 0 for lead >= 2
        x = i * step
        density = math.exp((lead - 1) * math.log(x) - x - math.lgamma(lead))
        weight = 1 if i == panels else 4 if i % 2 else 2
        total += weight * density * math.prod(_gamma_cdf(a, x) for a in others)
    return min(1.0, total * step / 3)


def _gamma_cdf(shape: int, x: float) -> float:
    """P(Gamma(shape, 1) <= x) for a whole shape: 1 - e^-x sum_{j < shape} x^j / j!."""
    term = tail = math.exp(-x)
    for j in range(1, shape):
        term *= x / j
        tail += term
    return max(0.0, 1.0 - tail)
