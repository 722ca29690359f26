"""Adaptive Think: stop thinking when a trial answer's entropy is low."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.call import Branch, Call
from thrifty.errors import InvalidInput
from thrifty.method import knob
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, generation, step_pattern
from thrifty.methods.decode._trial import Trial
from thrifty.policy import CONTINUE, Probe, Verdict


@dataclass(frozen=True, kw_only=True)
class AdaptiveThink(ThinkingMethod):
    """After each step of thinking a probe closes it on a fork and writes `cue`; when the entropy over the answers that
    could follow is below `alpha`, thinking is closed in the same words and the answer goes on behind them.

    `options` (such as A, B, C, D): the answers are these tokens, with or without a space before them, and Q is the
    model's next-token distribution restricted to them. Without options the probe writes a greedy answer of at most
    `probe_tokens` to its closing brace, and the entropy is the mean over its tokens, each among its `candidates`
    likeliest ones (the authors' code runs a beam search of five answers there, which is five times the price). An
    answer that never closes its brace says nothing: thinking goes on, and the receipt counts it.

    `norm` "mean" is the paper's: the average of -q log q over the answers, relative to 1 / e, the most that one of them
    can have; "log" divides by the entropy of a uniform choice. Neither depends on the logarithm's base. Steps are
    paragraphs, joined to at least `merge` characters; none of the first `least` - 1 stops. The authors also ask before
    any thinking; here the first probe comes after the first step. `alpha` = 0 never stops and never probes.

    Probes never touch the main text; they are billed under this method's name and left out where the budget would then
    not hold the answer."""

    name = "adaptive-think"
    paper = (
        "Think or Not? Exploring Thinking Efficiency in Large Reasoning Models via an Information-Theoretic Lens "
        "(Yong et al. 2025, arXiv:2505.18237)"
    )
    needs = frozenset({"text", "branch", "logits"})
    identity = {"alpha": 0.0, "keep": 0, "begin": "model"}

    alpha: float = knob(0.1, "entropy below which it stops; 0: never", low=0.0, high=1.0)
    options: tuple[str, ...] = knob(("",), "answers to choose from, such as A, B, C; one empty text: any answer")
    cue: str = knob("The correct answer is: \\boxed{", "how the answer begins after thinking was closed")
    probe_tokens: int = knob(24, "tokens of a trial answer at most", low=1, high=4096)
    candidates: int = knob(5, "likeliest tokens that the entropy of a free answer is taken over", low=2, high=1000)
    norm: str = knob("mean", "how the entropy is brought to 0 .. 1", choices=("mean", "log"))
    boundary: str = knob("paragraph", "what ends a step: token, line, paragraph, sentence, or a regular expression")
    merge: int = knob(200, "characters that a step has at least", low=0, high=100_000)
    least: int = knob(1, "the first step that may stop it", low=1, high=10_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        step_pattern(self.boundary)
        if self.chosen and (len({o.strip() for o in self.options}) < 2 or not all(o.strip() for o in self.options)):
            raise InvalidInput(
                f"{self.name}: knob options = {list(self.options)}: at least two different answers, none blank, or one "
                "empty text for any answer"
            )

    @property
    def chosen(self) -> bool:
        """Whether the answer is one of `options`."""
        return self.options not in ((), ("",))

    def ready(self, call: Call) -> tuple[Call, str | None]:
        if not self.alpha and not self.keep:
            return call, "alpha = 0: no entropy is below it"
        return super().ready(call)

    def policy(self, call: Call) -> AdaptiveThinkPolicy:
        return AdaptiveThinkPolicy(self)


def answer_entropy(chances: Sequence[float], norm: str = "mean") -> float:
    """The entropy of a choice among n >= 2 answers, from 0 to 1; `chances` are renormalised.

    "mean": (sum of -q ln q) / n * e. "log": (sum of -q ln q) / ln n.

    >>> answer_entropy([1, 0]), round(answer_entropy([0.5, 0.5], "log"), 9), round(answer_entropy([1 / math.e] * 4), 4)
    (0.0, 1.0, 0.9421)
    """
    total = sum(chances)
    terms = sum(-q * math.log(q) for c in chances if (q := c / total) > 0)
    return abs(terms) / len(chances) * math.e if norm == "mean" else abs(terms) / math.log(len(chances))


def stops(entropies: Sequence[float | None], alpha: float, least: int = 1) -> bool:
    """Whether thinking ends after the last of these steps; None stands for a step without an answer.

    >>> stops([0.9, 0.05], 0.1), stops([0.05], 0.1, least=2), stops([None], 1.0), stops([0.0], 0.0)
    (True, False, False, False)
    """
    last = entropies[-1] if entropies else None
    return last is not None and len(entropies) >= least and last < alpha


class AdaptiveThinkPolicy(ThinkingPolicy):
    """Probes after each step and closes when the answer is sure."""

    def __init__(self, method: AdaptiveThink) -> None:
        super().__init__(method.opening, method.closing, method.keep, method.boundary)
        self.knobs = method
        self._length = 0
        self._entropies: list[float | None] = []
        self._at: list[int] = []
        self._counts = {"skipped": 0, "no_answer": 0}
        self._unknown: list[str] = []

    def think(self, branch: Branch, token: int) -> Verdict:
        if not self.knobs.alpha or not self.stepped or self.ending(branch):
            return CONTINUE
        self._length += len(self.step_text)
        if self._length < self.knobs.merge:
            return CONTINUE
        self._length = 0
        if len(self._entropies) + 1 < self.knobs.least:
            self._entropies.append(None)
            self._at.append(self.thought)
            return CONTINUE
        forms = self._forms(branch)
        if self._unknown:
            return CONTINUE
        text = self.closing_text(self.knobs.cue)
        most = 1 if self.knobs.chosen else self.knobs.probe_tokens
        if not self.can_probe(branch, text, most):
            self._counts["skipped"] += 1
            return CONTINUE
        depth = self.knobs.cue.count("{") - self.knobs.cue.count("}")
        trial = Trial(self._chosen(forms) if self.knobs.chosen else self._free, depth)

        def heard(said: str) -> Verdict:
            known = bool(trial.values) and (self.knobs.chosen or trial.complete)
            value = sum(trial.values) / len(trial.values) if known else None
            self._counts["no_answer"] += value is None
            self._entropies.append(value)
            self._at.append(self.thought)
            if value is None or not stops(self._entropies, self.knobs.alpha, self.knobs.least):
                return CONTINUE
            return self.close(
                branch, f"the answer's entropy {value:.3g} is below alpha = {self.knobs.alpha:g}", self.knobs.cue
            )

        return Probe(text, most, heard, trial)

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        found = [h for h in self._entropies if h is not None]
        counts = self._counts
        detail: dict[str, Any] = {"probes": len(found) + counts["no_answer"], **counts}
        if found:
            detail |= {"entropies": [h if h is None else round(h, 6) for h in self._entropies[-32:]]}
            detail |= {"at": self._at[-32:], "gain": round(found[0] - found[-1], 6)}
        if not self.blocks:
            return False, "the model did not think", detail
        if self._unknown:
            return False, f"no token of the model: {', '.join(self._unknown)} of the knob options", detail
        reason = f"thought {self.thought} tokens in {self.steps} steps, {detail['probes']} probes"
        if counts["no_answer"]:
            reason += f"; {counts['no_answer']} trial answers never closed: thinking went on after them"
        if counts["skipped"]:
            reason += f"; {counts['skipped']} probes were left out: the budget holds the answer only"
        return bool(self._closed_why), reason, detail

    # -- the answers -------------------------------------------------------------------------------------------

    def _forms(self, branch: Branch) -> list[list[int]]:
        """Token ids of each option, with a space before it or without; those without any go to `_unknown`."""
        if not self.knobs.chosen:
            return []
        codec = generation(branch).codec
        forms = []
        for option in self.knobs.options:
            texts = (option.strip(), f" {option.strip()}")
            ids = {tokens[0] for text in texts if len(tokens := codec.encode(text)) == 1}
            forms.append(sorted(ids))
        self._unknown = [o for o, ids in zip(self.knobs.options, forms, strict=True) if not ids]
        return forms

    def _chosen(self, forms: list[list[int]]) -> Any:
        def measure(logits: Any) -> float:
            log = logits.double().log_softmax(-1)
            best = log[[i for ids in forms for i in ids]].max()
            return answer_entropy([float((log[ids] - best).exp().sum()) for ids in forms], self.knobs.norm)

        return measure

    def _free(self, logits: Any) -> float:
        top = logits.double().softmax(-1).topk(min(self.knobs.candidates, logits.shape[-1])).values
        return answer_entropy(top.tolist(), self.knobs.norm)
