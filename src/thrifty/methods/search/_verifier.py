"""A generative verifier: an engine in the role `scorer` checks a solution step by step and says whether it is correct.

It sees the text of the question (passages included, images not) and the solution in steps, as its `Wording` has them.
Invariants: every check is billed under the asking method's name with the role `scorer`, on one account below the
call's; a chain that cannot be read counts as `NEUTRAL` and is told apart from one that can; a check that the budget
refuses, or that is longer than the verifier reads, is not made up: its solution has no understood chain.

Score after ThinkPRM (Process Reward Models That Think, 2025, arXiv:2504.16828): a label for each step, then yes or no;
the score is P(yes) / (P(yes) + P(no))."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Receipt, Sampling, text_of
from thrifty.context import render
from thrifty.errors import BudgetExceeded
from thrifty.methods.search._samples import seed_of
from thrifty.methods.search._wording import Reading, Wording, wording_for
from thrifty.policy import DecodePolicy, Tensor

ROLE = "scorer"
NEUTRAL = 0.5
"""The score of a solution about which the verifier said nothing that can be read."""

_VARIANTS: Mapping[str, tuple[str, ...]] = {
    word: tuple(space + form for space in ("", " ") for form in (word, word.title(), word.upper()))
    for word in ("yes", "no")
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all chains about one solution say together."""

    score: float
    """mean over the chains that could be read, in [0, 1]; `NEUTRAL` when none could"""
    understood: int
    asked: int
    first_error: int | None = None
    """of the first chain that could be read"""
    labels: tuple[bool | None, ...] = ()
    """of the steps, by the same chain"""


@dataclass
class Verifier:
    """Scores solutions of one call. `checks` chains each, of at most `tokens` tokens, `rechecks` times continued with
    a cue to verify again. `soft`: the score is read from the probabilities of yes and no where the engine can be made
    to say the word (`continue` and `logprobs`; exact with `logits`); else it is 1 or 0. `wording`: by name, or "auto":
    the one that the engine's chat template names, else the boxed one."""

    method: str
    call: Call
    checks: int = 1
    tokens: int = 1024
    temperature: float = 0.6
    soft: bool = False
    rechecks: int = 0
    keep: int = 0
    """output tokens to leave on the account for the answer"""
    wording: str = "auto"
    account: Account = field(init=False)
    refused: int = field(default=0, init=False)
    """solutions that the budget left without a check"""
    too_long: int = field(default=0, init=False)
    """solutions that are longer than the verifier reads"""
    unread: int = field(default=0, init=False)
    """chains that could not be read"""
    chains: int = field(default=0, init=False)
    solutions: int = field(default=0, init=False)
    _known: dict[tuple[str, bool], Verdict] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.account = self.call.account.child("verifier")
        users = [m for m in render(self.call) if m.get("role") == "user"]
        self._question = text_of(users[-1]) if users else ""

    @property
    def words(self) -> Wording:
        """How this verifier is asked and read."""
        return wording_for(self.call.engines[ROLE], self.wording)

    async def verdict(self, solution: str | Answer, whole: bool = True) -> Verdict:
        """The verdict about one solution, or what of an Answer its wording sees; asked once for equal ones. Raises
        BudgetExceeded only where the plan says refuse."""
        text = solution if isinstance(solution, str) else self.words.seen(solution)
        key = (text, whole)
        if key not in self._known:
            self._known[key] = await self._ask(text, whole)
        return self._known[key]

    def note(self) -> str:
        """What a receipt must say about it; empty when all was read."""
        parts = []
        if self.refused:
            parts.append(f"the budget held no check of {self.refused} of {self.solutions} solutions")
        if self.too_long:
            parts.append(f"{self.too_long} of {self.solutions} solutions are longer than the verifier reads")
        if self.unread:
            parts.append(f"the verifier's answer could not be read in {self.unread} of {self.chains} checks")
        said = "; ".join(parts) + (f": {NEUTRAL} stands for those" if parts else "")
        if self.rechecks and self.chains and not self.words.again:
            said += f"{'; ' if said else ''}no second check: this verifier was not trained to be told so"
        return said

    def detail(self) -> dict[str, int]:
        """Figures for a receipt."""
        return {"verified": self.solutions, "chains": self.chains, "unread": self.unread, "unchecked": self.refused}

    # -- details -----------------------------------------------------------------------------------------------

    async def _ask(self, solution: str, whole: bool) -> Verdict:
        self.solutions += 1
        scores: list[float] = []
        first: Reading | None = None
        asked = 0
        prompt = self.words.prompt(self._question, solution, whole)
        if not self._fits(prompt):
            self.too_long += 1
            return Verdict(NEUTRAL, 0, 0)
        for check in range(self.checks):
            try:
                chain = await self._chain(prompt, solution, check)
            except BudgetExceeded:
                if self.call.on_exceed == "refuse":
                    raise
                break
            asked += 1
            self.chains += 1
            reading = self.words.read(chain, solution)
            if reading.correct is None:
                self.unread += 1
                continue
            first = first or reading
            scores.append(await self._score(prompt, chain, reading.correct))
        self.refused += not asked
        if first is None:
            return Verdict(NEUTRAL, 0, asked)
        return Verdict(fmean(scores), len(scores), asked, first.first_error, first.labels)

    def _fits(self, prompt: str) -> bool:
        """Whether the verifier reads so much; True where its engine does not say how much it reads."""
        engine = self.call.engines[ROLE]
        positions = getattr(getattr(engine, "prompter", None), "positions", None)
        return positions is None or engine.count(self._request(prompt, Sampling())) < positions

    def _request(self, prompt: str, sampling: Sampling, prefix: str | None = None) -> Call:
        call = self.call.on_behalf(self.method)
        return replace(
            call,
            messages=({"role": "user", "content": prompt},),
            account=self.account,
            prefix=prefix,
            sampling=sampling,
            labels=replace(call.labels, role=ROLE),
            keep=self.keep,
            extra={},
        )

    async def _chain(self, prompt: str, solution: str, check: int) -> str:
        engine = self.call.engines[ROLE]
        greedy = self.checks == 1
        sampling = Sampling(
            temperature=0.0 if greedy else self.temperature,
            seed=seed_of(self.call.sampling.seed, check),
            max_tokens=self.tokens,
        )
        answer = await engine.generate(self._request(prompt, sampling))
        chain, latest = answer.text, answer.text
        again = self.words.again if "continue" in engine.capabilities else ""
        for _ in range(self.rechecks if again else 0):
            try:
                answer = await engine.generate(self._request(prompt, sampling, chain + again))
            except BudgetExceeded:
                if self.call.on_exceed == "refuse":
                    raise
                break
            chain = chain + again + answer.text
            latest = answer.text if self.words.read(answer.text, "").correct is not None else latest
        return latest

    async def _score(self, prompt: str, chain: str, correct: bool) -> float:
        """P(yes) against no after the chain; 1 or 0 where that cannot be read or paid."""
        engine = self.call.engines[ROLE]
        hard = 1.0 if correct else 0.0
        if not self.soft or not {"continue", "logprobs"} <= engine.capabilities:
            return hard
        ask = self._request(prompt, Sampling(temperature=0.0, max_tokens=2, logprobs=True), self.words.lead(chain))
        exact = "logits" in engine.capabilities
        if exact:
            policy = ReadYesNo()
            policy.method = self.method
            ask = replace(ask, policies=(policy,))
        try:
            answer = await engine.generate(ask)
        except BudgetExceeded:
            if self.call.on_exceed == "refuse":
                raise
            return hard
        return _p_yes(answer, self.method if exact else "", hard)


class ReadYesNo(DecodePolicy):
    """Reads P(yes) / (P(yes) + P(no)) from the logits [V] of the first token, all spellings summed. A spelling is told
    by its first token; tokens with which both words may begin count for neither."""

    def __init__(self) -> None:
        self._score: float | None = None
        self._read = False

    def logits(self, branch: Branch, logits: Tensor) -> Tensor:
        codec = getattr(branch, "codec", None)
        if not self._read and codec is not None:
            first = {w: {codec.encode(v)[0] for v in forms if codec.encode(v)} for w, forms in _VARIANTS.items()}
            yes, no = sorted(first["yes"] - first["no"]), sorted(first["no"] - first["yes"])
            if yes and no:
                import torch

                wide = logits.double()
                gap = torch.logsumexp(wide[no], 0) - torch.logsumexp(wide[yes], 0)
                self._score = float(torch.sigmoid(-gap))
        self._read = True
        return logits

    def receipt(self, branch: Branch) -> Receipt | None:
        detail = {} if self._score is None else {"p_yes": self._score}
        return Receipt(self.method, self._score is not None, "read the probabilities of yes and no", detail=detail)


def _p_yes(answer: Answer, method: str, hard: float) -> float:
    """From what a policy read; else from the probability of the word that was drawn; else the hard score."""
    for receipt in answer.receipts:
        if method and receipt.method == method and "p_yes" in receipt.detail:
            return float(receipt.detail["p_yes"])
    word = re.match(r"\W*(yes|no)\b", answer.text, re.IGNORECASE)
    if word is None or not answer.logprobs:
        return hard
    p = math.exp(min(0.0, answer.logprobs[0]))
    return p if word[1].lower() == "yes" else 1.0 - p
