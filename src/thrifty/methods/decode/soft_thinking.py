"""Soft Thinking with Cold Stop: thinking reads mixtures of token embeddings, and ends when it is sure for long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from thrifty.call import Branch, Call
from thrifty.method import knob
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, generation
from thrifty.policy import CONTINUE, Feed, Stop, Verdict


@dataclass(frozen=True, kw_only=True)
class SoftThinking(ThinkingMethod):
    """While the model thinks, each step feeds sum_i w_i E[i] over its likeliest tokens in the place of one embedding.

    p is the softmax of the logits at `temperature`; top-k, top-p and min-p each renormalise what they leave, and the
    `most` likeliest of that get the weights w. The token that is recorded is the likeliest, so thinking draws nothing:
    its log-probability is given as 0. When it is the closing tag, or ends the text, it is fed as it is, and all that
    follows is drawn by the call's own sampling. A thinking token counts as one token of output, as any other.

    Cold Stop: after `length` steps in a row whose entropy of p (tempered, before the filters; nats) is below `tau`, the
    closing tag takes the place of the last of them (or follows it, where the tag is not one token). After thinking
    the same counter ends the answer, at the call's temperature, with finish reason "loop"; `guard` false leaves that
    out. `tau` = 0 turns both off. With `temperature` 0 the mixture is the likeliest token alone and the entropy is that
    at temperature 1 (the released code computes none then, so that Cold Stop never fires).

    Other methods that change logits belong above it: what it leaves is one token."""

    name = "soft-thinking"
    paper = (
        "Soft Thinking: Unlocking the Reasoning Potential of LLMs in Continuous Concept Space "
        "(Zhang et al. 2025, arXiv:2505.15778)"
    )
    needs = frozenset({"text", "branch", "logits"})
    no_identity = "thinking without a mixture (most = 1) is greedy, whatever the call's sampling"

    temperature: float = knob(0.6, "of the mixture; 0: the likeliest token alone", low=0.0, high=100.0)
    top_k: int = knob(30, "tokens left by top-k; 0: all", low=0, high=1_000_000)
    top_p: float = knob(0.95, "mass left by top-p", low=0.0, high=1.0)
    min_p: float = knob(0.0, "least share of the likeliest token's probability", low=0.0, high=1.0)
    most: int = knob(10, "tokens in a mixture at most", low=1, high=1000)
    tau: float = knob(0.01, "entropy in nats below which a step is sure; 0: no Cold Stop", low=0.0, high=100.0)
    length: int = knob(256, "sure steps in a row that end thinking", low=1, high=1_000_000, log=True)
    guard: bool = knob(True, "end an answer that is sure for as long: it loops")

    def policy(self, call: Call) -> SoftThinkingPolicy:
        return SoftThinkingPolicy(self, call.sampling.temperature or 0.0)


def mixture(
    logits: Any, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, most: int = 10
) -> tuple[Any, Any, float]:
    """The tokens [k] that are mixed, the likeliest first, their weights [k] (sum 1), and the entropy in nats.

    Ties go to the lower id. `logits` [V] may hold -inf.
    """
    logits = logits.double()
    log = (logits / temperature if temperature > 0 else logits).log_softmax(-1)
    entropy = float(-(log.exp() * log.masked_fill(log == -math.inf, 0.0)).sum())
    order = log.sort(descending=True, stable=True)
    share = order.values.exp()
    if temperature <= 0:
        most = 1
    if top_k:
        share = share[:top_k] / share[:top_k].sum()
    if top_p < 1:
        left = share.cumsum(0) - share < top_p
        left[0] = True
        share = share[left] / share[left].sum()
    share = share[share >= min_p * share[0]][:most]
    share = share[share > 0]
    return order.indices[: len(share)], share / share.sum(), entropy


class SoftThinkingPolicy(ThinkingPolicy):
    """Makes the mixtures and counts sure steps."""

    def __init__(self, method: SoftThinking, temperature: float) -> None:
        super().__init__(method.opening, method.closing, method.keep)
        self.knobs, self.temperature = method, temperature
        self._feed: Any = None
        self._sure = self._soft = self._mixed = 0
        self._cold = self._loop = False
        self._stopped = ""

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.follow(branch)
        knobs = self.knobs
        self._feed = None
        self._cold = False
        if not self.inside:
            if self.blocks and knobs.guard and knobs.tau:
                self._loop = self._count(mixture(logits, self.temperature, most=1)[2])
            return logits
        ids, weights, entropy = mixture(logits, knobs.temperature, knobs.top_k, knobs.top_p, knobs.min_p, knobs.most)
        token = int(ids[0])
        self._soft += 1
        tag = generation(branch).codec.encode(self.closing)
        if self._count(entropy):
            self._stopped = f"Cold Stop after {knobs.length} steps with an entropy below {knobs.tau:g}"
            self._cold, self._sure = len(tag) != 1, 0
            token = tag[0] if len(tag) == 1 else token
        elif len(ids) > 1:
            self._feed = logits.new_zeros(logits.shape).index_put((ids,), weights.to(logits))
        logits.fill_(-math.inf)
        logits[token] = 0.0
        return logits

    def _count(self, entropy: float) -> bool:
        """Counts a step; True when `length` sure ones stand in a row."""
        self._sure = self._sure + 1 if entropy < self.knobs.tau else 0
        return self._sure >= self.knobs.length

    def think(self, branch: Branch, token: int) -> Verdict:
        if self._cold:
            return self.close(branch, self._stopped)
        if self._feed is None or self.ending(branch):
            return CONTINUE
        self._mixed += 1
        return Feed(self._feed)

    def closed(self, branch: Branch, token: int) -> Verdict:
        self._sure = 0
        return CONTINUE

    def answering(self, branch: Branch, token: int) -> Verdict:
        self._loop = self._loop and not self.ending(branch)
        return Stop("loop") if self._loop else CONTINUE

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        detail: dict[str, Any] = {"soft_steps": self._soft, "mixtures": self._mixed}
        if not self._soft:
            return False, "the model did not think", detail
        reason = f"{self._soft} steps of soft thinking, {self._mixed} of them mixtures"
        if self._stopped:
            reason += f"; {self._stopped}"
        if self._loop:
            reason += f"; the answer was ended: sure for {self.knobs.length} tokens, it loops"
        return True, reason, detail
