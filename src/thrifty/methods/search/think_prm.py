"""ThinkPRM: a verifier that reasons about each step of a solution before it judges, and best of n by its judgement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thrifty.call import Answer, Call, Receipt
from thrifty.errors import InvalidInput
from thrifty.method import Next, Search, knob
from thrifty.methods.search._draw import draw_samples
from thrifty.methods.search._samples import conclude, tell, votes_of, winner_of
from thrifty.methods.search._verifier import ROLE, Verdict, Verifier
from thrifty.methods.search._wording import WORDINGS, read_chain
from thrifty.methods.search.best_of_n import choose


@dataclass(frozen=True, kw_only=True)
class ThinkPRM(Search):
    """Draws `samples` answers; the engine in the role `scorer` writes a verification of each, step by step, with a
    boxed label for each step, and says at the end whether the solution is correct. The score of an answer is the mean
    over `checks` such chains of P(yes) / (P(yes) + P(no)); each chain may be continued `rechecks` times with a cue to
    verify again. `pick = "weighted"` returns the best-scored of the answers that say the same and whose scores sum to
    most; `"best"` the highest score. Complete answers go before those cut short; ties to the earlier.

    P(yes) is read exactly where the scorer gives `logits` (all spellings of both words summed), from the probability
    of the word drawn where it gives `logprobs` and continues answers, and is 1 or 0 elsewhere, or with `read = "text"`.
    A chain that says nothing that can be read counts for nothing; an answer without any readable chain, or one longer
    than the verifier reads, scores 0.5; when no answer has one, or the budget held no check, the majority of the
    answers decides, and the receipt says so and that the method did not fire. Equal answers are checked once. Checks
    come after all samples, from what these left of the budget, and are billed under this method's name.

    Any engine can be the verifier: one that follows the instruction (wording `boxed`), or one that was trained for it
    (wording `lines`), such as `thinker-verifier`, which `recipes/think_prm` makes from the thinker's own labelled
    traces. That one sees the thinking too; its chat template names its wording, and `rechecks` are not for it.

    Verifier-guided search over steps is `beam` with `score = "verifier"`. The paper's labels, its last
    question and its score are kept in `boxed`; its prompt and cue, and all of `lines` but the score, are ours."""

    name = "think-prm"
    paper = "Process Reward Models That Think (Khalifa et al. 2025, arXiv:2504.16828)"
    needs = frozenset({"text", "sampling"})
    roles = {ROLE: frozenset({"text"})}  # noqa: RUF012  as in the base class
    identity = {"samples": 1}

    samples: int = knob(4, "answers to draw", low=1, high=1000, log=True)
    checks: int = knob(1, "K: verification chains of each answer", low=1, high=256, log=True)
    rechecks: int = knob(0, "times that a chain is told to verify again", low=0, high=64)
    check_tokens: int = knob(
        4096, "tokens of one chain, or of one continuation, at most", low=1, high=100_000, log=True
    )
    check_temperature: float = knob(0.6, "of the chains, when there are several of one answer", low=0.01, high=10.0)
    wording: str = knob(
        "auto", "how the verifier is asked and read; auto: as its chat template says", choices=("auto", *WORDINGS)
    )
    read: str = knob("probability", "how yes and no become a score", choices=("probability", "text"))
    pick: str = knob("weighted", "the highest score, or the highest sum of equal answers", choices=("best", "weighted"))
    temperature: float = knob(0.7, "of the samples", low=0.01, high=10.0)
    parse: str = knob("auto", "what of an answer makes two equal", choices=("auto", "number", "text"))

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.samples == 1:
            own = Receipt(self.name, False, "one sample: nothing to verify", 1, 1, "samples")
            return await next(call.with_receipt(own))
        drawn = await draw_samples(call, next, self.samples, self.temperature)
        answers = list(drawn.answers)
        verifier = Verifier(
            self.name,
            call,
            checks=self.checks,
            tokens=self.check_tokens,
            temperature=self.check_temperature,
            soft=self.read == "probability",
            rechecks=self.rechecks,
            wording=self.wording,
        )
        verdicts: list[Verdict] = []
        if len(answers) > 1:
            verdicts = [await verifier.verdict(a) for a in answers]
        judged = any(v.understood for v in verdicts)
        if judged:
            chosen = choose(answers, [v.score for v in verdicts], self.pick, self.parse)
        else:
            chosen = winner_of(votes_of(answers, self.parse))
        own = self._receipt(answers, verdicts, chosen, verifier)
        return await tell(call, conclude(call, answers[chosen], answers, [*drawn.accounts, verifier.account], own))

    def _receipt(
        self, answers: Sequence[Answer], verdicts: Sequence[Verdict], chosen: int, verifier: Verifier
    ) -> Receipt:
        judged = any(v.understood for v in verdicts)
        parts = [f"{len(answers)} of {self.samples} samples verified, sample {chosen} chosen"]
        if len(answers) == 1:
            parts = ["one sample: the budget held no second"]
        elif not judged:
            parts = [f"no verdict on any of {len(answers)} samples: their majority decided"]
        parts += [note] if (note := verifier.note()) else []
        detail: dict[str, object] = {
            "scores": [round(v.score, 6) for v in verdicts],
            "first_errors": [v.first_error for v in verdicts],
            "chosen": chosen,
        }
        return Receipt(
            self.name,
            judged,
            "; ".join(parts),
            self.samples,
            len(answers),
            "samples",
            spend=verifier.account.settled,
            work=verifier.account.work,
            detail=detail | verifier.detail(),
        )


# -- data for a verifier, and how good one is ------------------------------------------------------------------


def keep_chain(chain: str, steps: int, first_error: int | None, tokens: int, most: int = 4096) -> bool:
    """Whether a verification chain is good enough to train on: under `most` tokens, and labelling every step as gold
    does: all of `steps` correct, or correct up to `first_error` (from 0) and that one incorrect, with a last word that
    says the same.

    >>> keep_chain(r"\\boxed{correct} \\boxed{incorrect} Is the solution correct? no", 3, 1, tokens=40)
    True
    """
    if first_error is not None and not 0 <= first_error < steps:
        raise InvalidInput(f"first error at step {first_error} of {steps}: 0 to {steps - 1}, or None, is needed")
    gold = (True,) * steps if first_error is None else (True,) * first_error + (False,)
    reading = read_chain(chain, steps)
    return tokens <= most and reading.labels == gold and reading.correct is (first_error is None)


def process_bench(predicted: Sequence[int | None], gold: Sequence[int | None]) -> float:
    """ProcessBench's figure: the harmonic mean of two accuracies, of finding the exact first error where there is one,
    and of finding none (None) where there is none. 0 where either kind has no example right.

    Raises InvalidInput when the lengths differ or one of the kinds is missing.

    >>> process_bench([2, None, 1], [2, None, 0])
    0.6666666666666666
    """
    if len(predicted) != len(gold):
        raise InvalidInput(f"{len(predicted)} predictions of {len(gold)} solutions: one for each is needed")
    wrong = [p == g for p, g in zip(predicted, gold, strict=True) if g is not None]
    right = [p is None for p, g in zip(predicted, gold, strict=True) if g is None]
    if not wrong or not right:
        raise InvalidInput("solutions with and without an error are needed")
    a, b = sum(wrong) / len(wrong), sum(right) / len(right)
    return 2 * a * b / (a + b) if a + b else 0.0
