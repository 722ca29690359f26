"""CGRS: reflection words are blocked with a probability that rises with the certainty of a trial answer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.call import Branch, Call
from thrifty.errors import InvalidInput
from thrifty.method import knob
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, generation, step_pattern
from thrifty.methods.decode._trial import Trial, entropy
from thrifty.methods.decode._triggers import Triggers, triggers
from thrifty.policy import CONTINUE, Probe, Verdict

BLOCKED = 1e4
"""Nats taken from a blocked token: never drawn beside others, still there where others leave nothing else."""


@dataclass(frozen=True, kw_only=True)
class CGRS(ThinkingMethod):
    """At each step of thinking that has ended (a blank line) a probe writes a trial answer: `cue`, then at most
    `probe_tokens` greedy tokens, to the brace that closes it. Certainty C = 1 - mean entropy of those tokens / log V,
    and until the next probe each draw blocks all reflection words with probability p = max(0, (C - threshold) /
    (1 - threshold)), decided anew for every token. Probes never touch the main text; they are billed to this method
    (the paper's figures are without them), and are left out where the budget would then not hold the answer.

    A probe that never closes its brace is judged by the tokens that it said, one that says nothing leaves p as it was;
    the receipt counts both. With `every` > 0 no probe comes within so many tokens of the last. `scope` "all" acts on
    the whole output, for models that reason without tags. The dice are thrown by the call's seed (0 where it has none)
    and the token's index. A word that the vocabulary has only in pieces cannot be blocked, and the receipt says so;
    where it has none of them there are no probes."""

    name = "cgrs"
    paper = (
        "Efficient Reasoning for Large Reasoning Language Models via Certainty-Guided Reflection Suppression "
        "(Huang et al. 2025, arXiv:2508.05337)"
    )
    needs = frozenset({"text", "branch", "logits"})
    identity = {"threshold": 1.0, "keep": 0, "begin": "model"}

    threshold: float = knob(0.9, "certainty below which nothing is blocked; 1: never", low=0.0, high=1.0)
    words: tuple[str, ...] = knob(("wait", "but", "alternatively", "alternative", "hmm"), "reflection words")
    boundary: str = knob("paragraph", "where to probe: token, line, paragraph, sentence, or a regular expression")
    cue: str = knob("**Final Answer: \\boxed", "how the trial answer begins")
    probe_tokens: int = knob(24, "tokens of a trial answer at most", low=1, high=4096)
    every: int = knob(0, "tokens from one probe to the next at least", low=0, high=100_000)
    scope: str = knob("thinking", "what is steered: the thinking, or the whole output", choices=("thinking", "all"))

    def __post_init__(self) -> None:
        super().__post_init__()
        step_pattern(self.boundary)
        if not self.words or not all(word.strip() for word in self.words):
            raise InvalidInput(f"{self.name}: knob words = {list(self.words)}: at least one word is needed, none blank")

    def ready(self, call: Call) -> tuple[Call, str | None]:
        if self.threshold == 1 and not self.keep:
            return call, "threshold = 1: nothing is certain enough to block anything"
        if self.scope == "all" and self.begin == "model":
            return call, None
        return super().ready(call)

    def policy(self, call: Call) -> CGRSPolicy:
        return CGRSPolicy(self, call.sampling.seed or 0)


def certainty(entropies: Sequence[float], vocabulary: int) -> float:
    """1 - mean entropy (nats) of the answer's tokens over that of a uniform choice among `vocabulary` tokens.

    >>> certainty([0.0, 0.0], 8), round(certainty([math.log(8)], 8), 9)
    (1.0, 0.0)
    """
    return 1.0 - sum(entropies) / len(entropies) / math.log(vocabulary)


def suppression(certainty: float, threshold: float) -> float:
    """The probability with which a draw blocks the words: 0 up to the threshold, then straight up to 1 at certainty 1.

    >>> suppression(0.875, 0.75), suppression(0.5, 0.75), suppression(1.0, 0.75), suppression(1.0, 1.0)
    (0.5, 0.0, 1.0, 0.0)
    """
    if threshold >= 1:
        return 0.0
    return min(1.0, max(0.0, (certainty - threshold) / (1 - threshold)))


class CGRSPolicy(ThinkingPolicy):
    """Probes at the ends of steps, and blocks."""

    def __init__(self, method: CGRS, seed: int) -> None:
        super().__init__(method.opening, method.closing, method.keep, method.boundary)
        self.knobs, self.seed = method, seed
        self._triggers: Triggers | None = None
        self._p = 0.0
        self._vocabulary = 2
        self._last_probe = -math.inf
        self._rest = ""
        self._certainties: list[float] = []
        self._counts = {"skipped": 0, "unclosed": 0, "empty": 0, "blocked_draws": 0, "replaced": 0, "words": 0}

    # -- blocking ----------------------------------------------------------------------------------------------

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.follow(branch)
        if self._triggers is None:
            self._triggers = triggers(generation(branch).codec, self.knobs.words)
        self._vocabulary = logits.shape[-1]
        ids = self._triggers.ids
        if ids and self._p > 0 and self._acts and self._dice(len(branch.tokens)) < self._p:
            self._counts["blocked_draws"] += 1
            self._counts["replaced"] += int(logits.argmax()) in ids
            logits[ids] -= BLOCKED
        return logits

    def _dice(self, at: int) -> float:
        """In [0, 1): of the seed and the token's index alone, so that a fork throws what its parent would."""
        return random.Random(f"{self.seed}/{at}").random()

    @property
    def _acts(self) -> bool:
        return self._inside or self.knobs.scope == "all"

    # -- probing -----------------------------------------------------------------------------------------------

    def think(self, branch: Branch, token: int) -> Verdict:
        return self._probe(branch) if self.stepped else CONTINUE

    def closed(self, branch: Branch, token: int) -> Verdict:
        return self.answering(branch, token)

    def answering(self, branch: Branch, token: int) -> Verdict:
        if self.knobs.scope != "all":
            return CONTINUE
        self._rest += generation(branch).codec.decode([token])
        found = self._pattern.search(self._rest) if self._pattern is not None else None
        if self._pattern is not None and (found is None or not self._rest[: found.end()].strip()):
            return CONTINUE
        self._rest = self._rest[found.end() :] if found else ""
        return self._probe(branch)

    def after(self, branch: Branch, token: int) -> Verdict:
        if self._acts and self._triggers is not None:
            self._counts["words"] += token in self._triggers.ids
        return super().after(branch, token)

    def _probe(self, branch: Branch) -> Verdict:
        at = len(branch.tokens)
        if self._triggers is None or not self._triggers.ids or self.ending(branch):
            return CONTINUE
        if at - self._last_probe < self.knobs.every:
            return CONTINUE
        if not self.can_probe(branch, self.knobs.cue, self.knobs.probe_tokens):
            self._counts["skipped"] += 1
            return CONTINUE
        self._last_probe = at
        trial = Trial(entropy, self.knobs.cue.count("{") - self.knobs.cue.count("}"))

        def heard(said: str) -> Verdict:
            if not trial.values:
                self._counts["empty"] += 1
                return CONTINUE
            self._counts["unclosed"] += not trial.complete
            self._certainties.append(certainty(trial.values, self._vocabulary))
            self._p = suppression(self._certainties[-1], self.knobs.threshold)
            return CONTINUE

        return Probe(self.knobs.cue, self.knobs.probe_tokens, heard, trial)

    # -- telling -----------------------------------------------------------------------------------------------

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        counts, found, probes = self._counts, self._triggers, len(self._certainties)
        detail: dict[str, Any] = {"probes": probes, **counts}
        if probes:
            detail["certainty"] = [round(c, 6) for c in self._certainties[-8:]]
        if found is not None and not found.ids:
            return False, found.describe(), detail
        if not self.blocks and self.knobs.scope == "thinking":
            return False, "the model did not think", detail
        if counts["blocked_draws"]:
            reason = f"reflection words were blocked in {counts['blocked_draws']} draws after {probes} probes"
        elif probes:
            reason = f"{probes} probes, none certain enough to block a draw"
        else:
            reason = "no step was completed, so nothing was probed" if not counts["skipped"] else "nothing was probed"
        if counts["unclosed"]:
            reason += f"; {counts['unclosed']} trial answers never closed and were judged as far as they went"
        if counts["empty"]:
            reason += f"; {counts['empty']} probes said nothing"
        if counts["skipped"]:
            reason += f"; {counts['skipped']} probes were left out: the budget holds the answer only"
        if found is not None and found.missing:
            reason += f"; {found.describe()}"
        return counts["blocked_draws"] > 0, reason, detail
