"""Beam search over reasoning steps: grow the best beginnings, keep the best of what they became."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.call import Answer, Call, Receipt
from thrifty.method import Next, Search, knob
from thrifty.methods.search._samples import tell
from thrifty.methods.search._scoring import NEEDS, ROLES, SCORES, StepScorer
from thrifty.methods.search._steps import NO_STEPS, Pace, Partial, Steps, check_delimiter, steps_for


@dataclass(frozen=True, kw_only=True)
class Beam(Search):
    """Keeps the `width` best beginnings of a solution and grows each by `branches` different next steps, until those
    kept have ended; the best of them is the answer. A step ends with `delimiter`, or after `step_tokens` tokens. After
    `steps` steps the best one is written to its end alone.

    `score = "confidence"`: the geometric mean of the probabilities of a beginning's tokens, which costs nothing;
    `"verifier"`: the engine in the role `scorer` checks each beginning step by step, billed under this method's name; a
    verdict that cannot be read, or that the budget does not hold, counts 0.5 and is told. Equal scores go to the
    earlier beginning, and a beginning that was cut short loses to one that was not.

    On an engine with branches all beginnings share one prefill and what they have in common, and advance together;
    elsewhere each step is a call that continues the answer (capability `continue`), which pays its prompt again.
    When the budget is down to `keep` tokens, or holds fewer branches, fewer grow; at the end of it the best beginning
    goes on alone."""

    name = "beam"
    paper = "baseline: beam search over steps (Snell et al. 2024, arXiv:2408.03314, section 5; Xie et al. 2023)"
    needs = frozenset({"text", "sampling", "logprobs"})
    identity = {"width": 1, "branches": 1}

    width: int = knob(2, "beginnings that are kept", low=1, high=256, log=True)
    branches: int = knob(2, "next steps that are tried for each", low=1, high=256, log=True)
    steps: int = knob(40, "steps at most", low=1, high=10_000, log=True)
    delimiter: str = knob("\n\n", "what ends a step")
    step_tokens: int = knob(256, "tokens of one step at most", low=1, high=100_000, log=True)
    temperature: float = knob(0.8, "of the steps", low=0.01, high=10.0)
    score: str = knob("confidence", "who scores a beginning", choices=SCORES)
    check_tokens: int = knob(1024, "tokens of one check by the verifier", low=1, high=100_000, log=True)
    keep: int = knob(64, "tokens that the search leaves for the end of the answer", low=0, high=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_delimiter(self.name, self.delimiter)
        object.__setattr__(self, "needs", NEEDS[self.score])  # the plan asks the method, not its class
        object.__setattr__(self, "roles", ROLES[self.score])

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.width == self.branches == 1:
            return await next(call.with_receipt(Receipt(self.name, False, "one beginning: nothing to choose")))
        pace = Pace(self.delimiter, self.step_tokens, self.keep, self.temperature)
        steps = steps_for(call, next, pace, logprobs=self.score == "confidence")
        if steps is None:
            return await next(call.with_receipt(Receipt(self.name, False, NO_STEPS)))
        scorer = StepScorer(self.name, call, self.score, self.check_tokens, self.keep)
        try:
            best, tried, depth = await self._search(steps, scorer)
            parts = [f"{tried} steps tried on {depth} levels, {best.depth} of them in the answer"]
            if steps.tight:
                parts.append("the budget ended the search: the best beginning went on alone")
            parts += [scorer.note] if scorer.note else []
            spend, work = scorer.cost
            own = Receipt(
                self.name,
                tried > depth,
                "; ".join(parts),
                tried,
                best.depth,
                "steps",
                spend=spend,
                work=work,
                detail=scorer.detail,
            )
            answer = await steps.conclude(best, own, scorer.accounts)
        finally:
            steps.close()
        return await tell(call, answer)

    async def _search(self, steps: Steps, scorer: StepScorer) -> tuple[Partial, int, int]:
        """The best solution, how many steps were tried, and on how many levels."""
        kept, scores = [await steps.root()], [0.0]
        tried = depth = 0
        while not steps.tight and depth < self.steps and any(p.finish is None for p in kept):
            growing = [p for p in kept if p.finish is None]
            each = self.branches if depth else self.width * self.branches
            groups = await steps.grow([(p, each) for p in growing])
            grown = [child for group in groups for child in group]
            depth += 1
            tried += len(grown)
            pool = [p for p in kept if p.finish is not None] + grown
            scores = await scorer(pool)
            order = sorted(range(len(pool)), key=lambda i: (_cut(pool[i]), -scores[i], i))
            for i in order[self.width :]:
                steps.drop(pool[i])
            kept, scores = [pool[i] for i in order[: self.width]], [scores[i] for i in order[: self.width]]
        # a solution that is whole needs no more tokens, and when there are none left it goes first
        best = min(range(len(kept)), key=lambda i: (_cut(kept[i]), steps.tight and not kept[i].complete, -scores[i], i))
        for i, partial in enumerate(kept):
            if i != best:
                steps.drop(partial)
        await steps.end(kept[best])
        return kept[best], tried, depth


def _cut(partial: Partial) -> bool:
    """Whether a beginning can go no further and is no whole solution."""
    return partial.finish is not None and not partial.complete
