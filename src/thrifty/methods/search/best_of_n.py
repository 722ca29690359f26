"""Best of n: draw n answers and return the one with the best score, or the answer whose scores sum to most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thrifty.call import Answer, Call, Receipt
from thrifty.method import Next, Search, knob
from thrifty.methods.search._draw import draw_samples, without_logprobs
from thrifty.methods.search._samples import COMPLETE, conclude, tell, votes_of
from thrifty.methods.search._scoring import NEEDS, ROLES, mean_confidence
from thrifty.methods.search._verifier import Verifier
from thrifty.spend import Spend, Work


@dataclass(frozen=True, kw_only=True)
class BestOfN(Search):
    """Draws `samples` answers at once and returns the best: the baseline that other searches are held against.

    `score = "confidence"` uses the answering model's own word: the geometric mean of the probabilities of its tokens,
    which costs nothing. `score = "verifier"` asks the engine in the role `scorer` to check each answer step by step
    (equal answers once); what it spends stands under this method's name, and a verdict that cannot be read, or that
    the budget does not hold, counts 0.5 and is told in the receipt. `pick = "best"` takes the highest score;
    `pick = "weighted"` adds the scores of answers that say the same and takes the best of the best sum. Answers cut
    short are chosen only when none is complete. Ties go to the earlier sample.

    On an engine with branches the prompt is prefilled once. Fewer samples are drawn where the account cannot hold
    `samples`; checks come after all samples, from what these left."""

    name = "best-of-n"
    paper = "baseline: best of n samples (Stiennon et al. 2020, arXiv:2009.01325; Cobbe et al. 2021, arXiv:2110.14168)"
    needs = frozenset({"text", "sampling", "logprobs"})
    identity = {"samples": 1}

    samples: int = knob(4, "answers to draw", low=1, high=1000, log=True)
    temperature: float = knob(0.7, "of the samples", low=0.01, high=10.0)
    score: str = knob("confidence", "who scores an answer", choices=("confidence", "verifier"))
    pick: str = knob("best", "the highest score, or the highest sum of equal answers", choices=("best", "weighted"))
    parse: str = knob("auto", "what of an answer makes two equal", choices=("auto", "number", "text"))
    check_tokens: int = knob(1024, "tokens of one check by the verifier", low=1, high=100_000, log=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", NEEDS[self.score])  # the plan asks the method, not its class
        object.__setattr__(self, "roles", ROLES[self.score])

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.samples == 1:
            return await next(
                call.with_receipt(Receipt(self.name, False, "one sample: nothing to choose", 1, 1, "samples"))
            )
        asked = call.with_sampling(logprobs=True) if self.score == "confidence" else call
        drawn = await draw_samples(asked, next, self.samples, self.temperature)
        answers, accounts = list(drawn.answers), list(drawn.accounts)
        verifier: Verifier | None = None
        if self.score == "verifier" and len(answers) > 1:
            verifier = Verifier(self.name, call, tokens=self.check_tokens, soft=True)
            accounts.append(verifier.account)
            scores = [(await verifier.verdict(a)).score for a in answers]
        else:
            scores = [mean_confidence(a.logprobs) for a in answers]
        chosen = choose(answers, scores, self.pick, self.parse)
        own = self._receipt(answers, scores, chosen, verifier)
        winner = without_logprobs(answers[chosen], call)
        return await tell(call, conclude(call, winner, answers, accounts, own))

    def _receipt(
        self, answers: Sequence[Answer], scores: Sequence[float], chosen: int, verifier: Verifier | None
    ) -> Receipt:
        parts = [f"{len(answers)} of {self.samples} samples, sample {chosen} chosen by {self.score}"]
        if len(answers) == 1:
            parts = ["one sample: the budget held no second"]
        detail: dict[str, object] = {"scores": [round(s, 6) for s in scores], "chosen": chosen}
        spend, work = Spend(), Work()
        if verifier is not None:
            parts += [note] if (note := verifier.note()) else []
            detail |= verifier.detail()
            spend, work = verifier.account.settled, verifier.account.work
        return Receipt(
            self.name,
            len(answers) > 1,
            "; ".join(parts),
            self.samples,
            len(answers),
            "samples",
            spend=spend,
            work=work,
            detail=detail,
        )


def choose(answers: Sequence[Answer], scores: Sequence[float], pick: str, parse: str = "auto") -> int:
    """The index of the chosen answer: complete ones first, then by score or by the sum over equal answers. An answer
    that says nothing stands alone."""
    pool = [i for i, a in enumerate(answers) if a.finish in COMPLETE] or list(range(len(answers)))
    if pick == "best":
        return max(pool, key=lambda i: (scores[i], -i))
    said = votes_of(answers, parse)
    sums: dict[object, float] = {}
    for i in pool:
        key = i if said[i] is None else said[i]
        sums[key] = sums.get(key, 0.0) + scores[i]
    return max(pool, key=lambda i: (sums[i if said[i] is None else said[i]], scores[i], -i))
