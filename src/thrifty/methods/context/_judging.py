"""Questions that a context method puts to a model before the answer: is this enough, which of these is best, say it
shorter. The plan's engine for the role `judge` is asked, or the answering one where the plan names none.

Invariants: what is asked is billed under the asking method's name, on one account below the call's that leaves the
answer its prompt, some output and one call; `spend` and `work` are the sums of what it cost, of a failed call too, so a
receipt that carries them sums to the ledger. Once the budget, or the judge, has refused, nothing more is asked, and
`stopped` says why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from thrifty.budget import Account, Budget
from thrifty.call import Branch, Call, Receipt, Sampling
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput
from thrifty.policy import DecodePolicy, Tensor
from thrifty.spend import Spend, Work

ROLE = "judge"
ANSWER_TOKENS = 64
"""output tokens that are left for an answer without max_tokens, beside the call's own `keep`"""


@dataclass(frozen=True, slots=True)
class Said:
    """A judge's reply. `scores`: by label, its log-probability as the first word, up to one constant; only where the
    engine lets logits, or the probability of the word that it drew, be read."""

    text: str
    scores: Mapping[str, float] = field(default_factory=dict)


class Judge:
    """Asks one question after another. `leave`: input tokens that the answer will need, at most. Not for use from two
    tasks at once."""

    def __init__(self, method: str, call: Call, *, leave: int) -> None:
        self.method, self.call, self.leave = method, call, leave
        self.role = ROLE if ROLE in call.engines else "answer"
        self.engine = call.engines.get(self.role)
        self.spend, self.work = Spend(), Work()
        self.asked = 0
        self.stopped = "" if self.engine is not None else "the call has no engine"
        self._account: Account | None = None

    async def ask(self, prompt: str, *, most: int, labels: Sequence[str] = ()) -> Said | None:
        """The reply to one prompt in at most `most` tokens, greedy; None where there is none, and `stopped` says why.

        With `labels` the first word is one of them, and its scores are read where they can be: of all of them, in one
        token, on an engine with `logits`; of the word drawn and evenly of the others on one with `logprobs`. Raises
        BudgetExceeded only where the plan says refuse."""
        if self.stopped or self.engine is None:
            return None
        reader = ReadLabels(labels) if labels and "logits" in self.engine.capabilities else None
        soft = bool(labels) and reader is None and "logprobs" in self.engine.capabilities
        seed, deterministic = self.call.sampling.seed, self.call.sampling.deterministic
        sampling = Sampling(
            temperature=0.0,
            seed=seed,
            max_tokens=1 if reader is not None else most,
            logprobs=soft,
            deterministic=deterministic,
        )
        try:
            if self._account is None:
                self._account = self.call.account.child(self.method, self._limits())
            ask = replace(
                self.call.on_behalf(self.method),
                messages=({"role": "user", "content": prompt},),
                account=self._account,
                sampling=sampling,
                policies=() if reader is None else (reader,),
                extra={},
            )
            if reader is not None:
                reader.method = self.method
            answer = await self.engine.generate(replace(ask, labels=replace(ask.labels, role=self.role)))
        except BudgetExceeded as error:
            if self.call.on_exceed == "refuse":
                raise
            self.stopped = f"the budget holds no more of it ({error.resource})"
            return None
        except EngineError as error:
            self.spend, self.work = self.spend + (error.spend or Spend()), self.work + (error.work or Work())
            self.stopped = f"the {self.role} engine failed: {error}"
            return None
        except InvalidInput as error:  # a prompt beyond the model's context
            self.stopped = str(error)
            return None
        self.asked += 1
        self.spend, self.work = self.spend + answer.spend, self.work + answer.work
        if reader is not None:
            read = next((r.detail for r in answer.receipts if r.method == self.method and r.fired), {})
            return Said(answer.text, dict(read))  # the engine worked with a copy of the reader
        drawn = answer.logprobs[0] if soft and answer.logprobs and not answer.thinking else None
        return Said(answer.text, {} if drawn is None else _spread(first_label(answer.text, labels), drawn, labels))

    def _limits(self) -> Budget:
        """What is left beside the answer. Raises BudgetExceeded where nothing is."""
        wanted = self.call.sampling.max_tokens
        output = self.call.keep + (ANSWER_TOKENS if wanted is None else min(wanted, ANSWER_TOKENS))
        needs = {"input": self.leave, "output": output, "tokens": self.leave + output, "calls": 1}
        limits: dict[str, int] = {}
        for resource, left in self.call.account.remaining().items():
            if resource in needs:
                limits[resource] = int(left) - needs[resource]
                if limits[resource] <= 0:
                    raise BudgetExceeded(self.call.account.path, resource, left, 0, needs[resource], 1)
        return Budget(**limits)


class ReadLabels(DecodePolicy):
    """Reads the log-probabilities of labels from the logits [V] of the first token, with and without a space before
    it and in either case; what could begin two labels counts for neither."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.scores: dict[str, float] = {}
        self._read = False

    def logits(self, branch: Branch, logits: Tensor) -> Tensor:
        codec = getattr(branch, "codec", None)
        if not self._read and codec is not None:
            import torch

            first: dict[str, set[int]] = {}
            for label in self.labels:
                forms = (space + form for space in ("", " ") for form in {label, label.lower()})
                first[label] = {ids[0] for form in forms if (ids := codec.encode(form))}
            shared = {i for a in self.labels for b in self.labels if a != b for i in first[a] & first[b]}
            own = {label: sorted(ids - shared) for label, ids in first.items()}
            if all(own.values()):
                wide = torch.log_softmax(logits.double(), -1)
                self.scores = {label: float(torch.logsumexp(wide[ids], 0)) for label, ids in own.items()}
        self._read = True
        return logits

    def receipt(self, branch: Branch) -> Receipt | None:
        return Receipt(self.method, bool(self.scores), "read the probabilities of labels", detail=dict(self.scores))


def first_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text begins with, whatever stands around it; None where its first word is none of them.

    >>> first_label("(b) is best", ["A", "B"]), first_label("Both.", ["A", "B"])
    ('B', None)
    """
    word = re.match(r"\W*(\w+)", text)
    known = {label.lower(): label for label in labels}
    return None if word is None else known.get(word[1].lower())


def sealed(content: str, *tags: str) -> str:
    """Content without our tags, so that it cannot step out of its place in a prompt.

    >>> sealed("a</passage> b", "passage")
    'a[passage] b'
    """
    return re.sub(rf"<\s*/?\s*({'|'.join(tags)})\b[^<>]*>", r"[\1]", content, flags=re.IGNORECASE)


def _spread(label: str | None, logprob: float, labels: Sequence[str]) -> dict[str, float]:
    """Scores from the probability p of the word drawn: the other labels share 1 - p evenly."""
    if label is None or not math.isfinite(logprob):
        return {}
    p = min(max(math.exp(min(logprob, 0.0)), 1e-9), 1 - 1e-9)
    other = math.log((1 - p) / max(1, len(labels) - 1))
    return {name: math.log(p) if name == label else other for name in labels}
