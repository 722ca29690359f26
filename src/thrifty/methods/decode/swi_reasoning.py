"""SwiReasoning: thinking switches between mixtures of embeddings and plain tokens by the trend of the entropy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from thrifty.call import Branch, Call
from thrifty.method import knob
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, generation
from thrifty.methods.decode._trial import entropy
from thrifty.policy import CONTINUE, Feed, Force, Stop, Verdict

NEVER = 1_000_000
_HORIZON = 32_768
"""Where the mixing of signals ends for a call without max_tokens: the paper's own limit."""
_SYMBOL = re.compile(r"\d|[A-Za-z]|[-+*/^=<>()\[\]{}_|]|\\[A-Za-z]+\*?|\\[{}|]")


@dataclass(frozen=True, kw_only=True)
class SwiReasoning(ThinkingMethod):
    """Thinking is soft (each step feeds p @ E, the mixture of the whole vocabulary) or normal (it feeds the token that
    was drawn), beginning as `start`. The recorded tokens are always those drawn by the call's sampling.

    H is the entropy of the logits as the model gives them. The reference is the H of the first step, and of each switch
    after it. Soft turns normal as soon as H is below the reference; normal turns soft when H is above it, after at
    least `window` steps. Signals are mixed in at the switches: the first soft step is 0.9 of the mixture and 0.1 of a
    newline; going soft feeds a of the mixture and 1 - a of the opening tag, going normal b of the mixture and 1 - b of
    the closing tag, with a = alpha + (1 - alpha) t / T and b likewise from `beta`, where t is the step and T max_tokens
    (32,768 without). A tag of several tokens is the mean of them. With `symbols`, digits, letters, operators and LaTeX
    commands are always fed as they are.

    `switches` = m > 0 bounds the switches to normal: from the m-th to the 2m-th each has the closing tag written next,
    each after that `final` too, and `answer` tokens later (that of the switch and those written are among them) the
    generation ends with finish reason "length". A closing tag that the model draws itself, or one for want of room,
    ends all steering; one that was written does not, as otherwise the last rule could never come to pass.

    Two departures from the released code: a tag is written only where thinking is open (the code writes it again into
    the answer), and a model that closes its thinking while soft switches no more (there it may, once)."""

    name = "swi-reasoning"
    paper = (
        "SwiReasoning: Switch-Thinking in Latent and Explicit for Pareto-Superior Reasoning LLMs "
        "(Shi et al. 2025, arXiv:2510.05069)"
    )
    needs = frozenset({"text", "branch", "logits"})
    identity = {"start": "normal", "window": NEVER, "keep": 0, "begin": "model"}

    window: int = knob(512, "steps in normal mode before it may turn soft", low=1, high=NEVER, log=True)
    alpha: float = knob(1.0, "share of the mixture when it turns soft, at the first step", low=0.0, high=1.0)
    beta: float = knob(0.7, "share of the mixture when it turns normal, at the first step", low=0.0, high=1.0)
    switches: int = knob(0, "switches to normal from which thinking is ended; 0: no bound", low=0, high=1000)
    answer: int = knob(
        32, "tokens from the last switch to the end, once thinking was ended for good", low=1, high=100_000
    )
    final: str = knob("The final answer is", "what is written after the closing tag then")
    symbols: bool = knob(False, "digits, letters, operators and LaTeX commands are never mixed")
    start: str = knob("soft", "the mode that thinking begins in", choices=("soft", "normal"))

    def ready(self, call: Call) -> tuple[Call, str | None]:
        if self.start == "normal" and self.window == NEVER and not self.keep:
            return call, f"it starts normal and {NEVER:,} steps never pass: no step is soft"
        return super().ready(call)

    def policy(self, call: Call) -> SwiReasoningPolicy:
        return SwiReasoningPolicy(self)


class Switch:
    """The modes of one generation, from its entropies alone: `step` takes the next one.

    Invariant: `reference` is the entropy of the first step or of the last switch; `count` counts soft -> normal.

    >>> switch = Switch(window=2)
    >>> [switch.step(h) for h in (1.0, 2.0, 0.5, 0.6, 0.7, 0.8, 0.6)]
    ['', '', 'normal', '', 'soft', '', 'normal']
    """

    def __init__(self, window: int, soft: bool = True) -> None:
        self.window, self.soft = window, soft
        self.reference = math.nan
        self.stay = self.count = 0

    def step(self, entropy: float) -> str:
        """The mode that this step turns to; "" when it stays."""
        if math.isnan(self.reference):
            self.reference = entropy
            return ""
        self.stay += 1
        if self.soft and entropy < self.reference:
            self.count += 1
        elif self.soft or entropy <= self.reference or self.stay < self.window:
            return ""
        self.soft, self.stay, self.reference = not self.soft, 0, entropy
        return "soft" if self.soft else "normal"

    def fork(self) -> Switch:
        twin = Switch(self.window, self.soft)
        twin.reference, twin.stay, twin.count = self.reference, self.stay, self.count
        return twin


class SwiReasoningPolicy(ThinkingPolicy):
    """Feeds mixtures where the mode is soft, and writes the ends that the bound on switches asks for."""

    def __init__(self, method: SwiReasoning) -> None:
        super().__init__(method.opening, method.closing, method.keep)
        self.knobs = method
        self._switch = Switch(method.window, method.start == "soft")
        self._begun = self._locked = self._written = False
        self._step = -1
        self._chances: Any = None
        self._entropy = 0.0
        self._queue: list[int] = []
        self._left: int | None = None
        self._counts = {"soft_steps": 0, "to_soft": 0, "written": 0, "ends": 0}

    def fork(self) -> SwiReasoningPolicy:
        twin = super().fork()
        twin._switch = self._switch.fork()
        return twin

    # -- each step ---------------------------------------------------------------------------------------------

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.follow(branch)
        self._chances, self._written = None, False
        self._begun = self._begun or self.inside
        if not self._begun or self._locked:
            return logits
        self._step += 1
        self._entropy = entropy(logits)
        self._chances = logits.double().softmax(-1)
        if self._queue:
            token = self._queue.pop(0)
            logits.fill_(-math.inf)
            logits[token] = 0.0
            self._written = True
            self._counts["written"] += 1
        return logits

    def think(self, branch: Branch, token: int) -> Verdict:
        return self._steer(branch, token)

    def answering(self, branch: Branch, token: int) -> Verdict:
        return self._steer(branch, token)

    def closed(self, branch: Branch, token: int) -> Verdict:
        if not self._written:
            self._locked, self._queue = True, []
        return self._steer(branch, token)

    def must_close(self, branch: Branch, cue: str = "") -> bool:
        return not self._queue and super().must_close(branch, cue)

    def close(self, branch: Branch, why: str, cue: str = "") -> Verdict:
        verdict = super().close(branch, why, cue)
        self._locked = self._locked or isinstance(verdict, Force)
        return verdict

    def _steer(self, branch: Branch, token: int) -> Verdict:
        weights = None
        if self._chances is not None and not self._locked:
            turned = self._switch.step(self._entropy)
            weights = self._weights(branch, token, turned)
            self._counts["to_soft"] += turned == "soft"
            if turned == "normal":
                self._bound(branch)
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                return Stop("length")
        if weights is None or self.ending(branch):
            return CONTINUE
        self._counts["soft_steps"] += 1
        return Feed(weights)

    def _weights(self, branch: Branch, token: int, turned: str) -> Any:
        """What is fed in the place of the token, over the vocabulary; None feeds the token."""
        knobs, p = self.knobs, self._chances
        codec = generation(branch).codec
        if not self._switch.soft and turned != "normal":
            return None
        if turned != "normal" and knobs.symbols and _SYMBOL.fullmatch(codec.decode([token]).strip()):
            return None
        if self._step == 0:
            return mixed(p, 0.9, codec.encode("\n"))
        share = self._step / (generation(branch).limit or _HORIZON)
        if turned == "soft":
            return mixed(p, knobs.alpha + (1 - knobs.alpha) * share, codec.encode(self.opening))
        if turned == "normal":
            return mixed(p, knobs.beta + (1 - knobs.beta) * share, codec.encode(self.closing))
        return p

    def _bound(self, branch: Branch) -> None:
        """What a switch to normal has written, once there were enough of them."""
        most, count = self.knobs.switches, self._switch.count
        if not most or count < most:
            return
        text = self.closing if self.inside else ""
        if count > 2 * most:
            text += f"\n\n{self.knobs.final}"
            self._left = self.knobs.answer
        self._queue = generation(branch).codec.encode(text)
        self._counts["ends"] += 1

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        counts = self._counts
        detail: dict[str, Any] = {"to_normal": self._switch.count, **counts}
        if not self._begun:
            return False, "the model did not think", detail
        reason = (
            f"{counts['soft_steps']} soft steps, {self._switch.count} switches to normal, {counts['to_soft']} to soft"
        )
        if counts["ends"]:
            reason += f"; the bound on switches was met {counts['ends']} times"
        if self._left is not None and self._left <= 0:
            reason += f"; the answer was ended {self.knobs.answer} tokens after the last switch"
        return counts["soft_steps"] + counts["written"] > 0, reason, detail


def mixed(chances: Any, share: float, tokens: list[int]) -> Any:
    """`share` of a distribution [V] and 1 - share spread evenly over `tokens`."""
    weights = chances * share
    for token in tokens:
        weights[token] += (1 - share) / len(tokens)
    return weights
