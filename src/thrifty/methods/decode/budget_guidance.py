"""Budget guidance: where a step of thinking begins, tokens that lead to short thinking become likelier."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from thrifty.call import Branch, Call
from thrifty.method import knob
from thrifty.methods.decode._length_predictor import LengthPredictor, check_model, features_of, find, load
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, generation
from thrifty.policy import CONTINUE, Stop, Verdict

NO_LIMIT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class BudgetGuidance(ThinkingMethod):
    """Thinks at most `most` tokens, the closing tag included, and knows it: where a step begins, the chance of each
    next token v is multiplied by P(no more than what is left of `most` follows | v), by a predictor trained on this
    model's traces, so that thinking which would not end in time turns towards its end. Between these places nothing is
    touched. One token before the budget's end the closing tag is the only one that can be drawn (a tag of several
    tokens is forced so that it fits too); a further block is kept from opening.

    `predictor` is the file that recipes/budget_guidance/train.py writes, or the name of a packaged model that has one;
    empty: that of the answering model. One that was trained on another model is refused. It says for ln of the tokens
    left a Gamma distribution: shape and rate for each token often seen at the start of a step, and one more for all
    others; what starts a step is what it was trained on, and stands in the file. The factor is applied as a logarithm,
    so that small ones still differ; fewer than 2 tokens left count as 2, because ln 1 has no chance at all.

    The paper's predictor is a BERT over all layers; ours a small network over the same states. The paper's closing tag
    is one more token of the predictor; here its factor is 1, which is exact: nothing is left after it. The receipt's
    `expected` is the predicted length where thinking begins, the paper's estimate of difficulty."""

    name = "budget-guidance"
    paper = "Steering LLM Thinking with Budget Guidance (Li et al. 2025, arXiv:2506.13752)"
    needs = frozenset({"text", "branch", "logits", "hidden"})
    identity = {"most": NO_LIMIT, "keep": 0, "begin": "model"}

    most: int = knob(2048, "thinking tokens at most; 1,000,000: no limit", low=1, high=NO_LIMIT, log=True)
    predictor: str = knob("", "a trained predictor's file, or the packaged model it ships with; empty: the model's own")
    sha256: str = knob("", "how the file's SHA-256 must begin; empty: not checked")

    def policy(self, call: Call) -> BudgetGuidancePolicy:
        return BudgetGuidancePolicy(self, None if self.most == NO_LIMIT else self.trained(call))

    def ready(self, call: Call) -> tuple[Call, str | None]:
        if self.most == NO_LIMIT and not self.keep:
            return call, "no limit, nothing kept: thinking is left alone"
        if self.most < NO_LIMIT:
            check_model(self.name, self.trained(call), call.engines.get("answer"))
        return super().ready(call)

    def trained(self, call: Call) -> LengthPredictor:
        """The predictor. Raises PlanError where there is none, InvalidInput for a file that is none."""
        engine = call.engines.get("answer")
        file = find(self.name, self.predictor, "" if engine is None else engine.model)
        return load(self.name, file, self.sha256)


class ReadingPolicy(ThinkingPolicy):
    """Knows where a step of thinking begins: where predictions are made, and were trained."""

    needs = frozenset({"hidden"})

    @property
    def reads(self) -> bool:
        """Whether the next token is the first of a step, or of the thinking."""
        return self.inside and not self.since_step


class BudgetGuidancePolicy(ReadingPolicy):
    """Multiplies chances where steps begin, and ends thinking at the budget."""

    def __init__(self, method: BudgetGuidance, predictor: LengthPredictor | None) -> None:
        boundary = "paragraph" if predictor is None else predictor.config.boundary
        super().__init__(method.opening, method.closing, method.keep, boundary)
        self.knobs = method
        self.digest = "" if predictor is None else predictor.digest
        self._predictor = predictor
        self._guided, self._moved, self._shift, self._expected = 0, 0, 0.0, math.nan
        self._cut = False
        self._tag: int | None = None
        self._open: int | None = None
        self._looked = False

    # -- each step ---------------------------------------------------------------------------------------------

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.follow(branch)
        if self._predictor is None:
            return logits
        self._look(branch)
        left = self.knobs.most - self.thought
        if not self.inside:
            if self.blocks and left <= 1 and self._open is not None:
                logits[self._open] = -math.inf
            return logits
        if left <= 1 and self._tag is not None:
            self._cut = True
            logits.fill_(-math.inf)
            logits[self._tag] = 0.0
            return logits
        if self.reads:
            self._guide(branch, logits, left)
        return logits

    def think(self, branch: Branch, token: int) -> Verdict:
        if self._predictor is None:
            return CONTINUE
        if self.ending(branch):
            return self.close(branch, "the model ended inside its thinking")
        self._look(branch)
        if self._tag is None and self.thought + self.cost(branch, self.closing_text()) >= self.knobs.most:
            return self.close(branch, f"{self.knobs.most} thinking tokens were used")
        return CONTINUE

    def _guide(self, branch: Branch, logits: Any, left: int) -> None:
        """Adds ln P(ends in time | v) to the logits [V], in place."""
        predictor, hidden = self._predictor, getattr(branch, "hidden", None)
        if predictor is None or hidden is None:
            return
        factor = predictor.log_factor(hidden, left)
        if self._tag is not None:
            factor[self._tag] = 0.0
        before = logits.softmax(-1)
        if math.isnan(self._expected):
            others = before.clone()
            if self._tag is not None:
                others[self._tag] = 0.0
            self._expected = predictor.expected(hidden, others / others.sum().clamp_min(1e-30))
        best = int(logits.argmax())
        logits += factor.to(logits)
        self._guided += 1
        self._moved += int(logits.argmax()) != best
        self._shift = max(self._shift, 0.5 * float((logits.softmax(-1) - before).abs().sum()))

    def _look(self, branch: Branch) -> None:
        """The tags' ids, where each is one token."""
        if self._looked:
            return
        codec, self._looked = generation(branch).codec, True
        opening, closing = codec.encode(self.opening), codec.encode(self.closing)
        self._open = opening[0] if len(opening) == 1 else None
        self._tag = closing[0] if len(closing) == 1 else None

    # -- telling -----------------------------------------------------------------------------------------------

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        if self._predictor is None:
            return False, "no limit: thinking is left alone", {}
        detail: dict[str, Any] = {"predictor": self.digest, "guided": self._guided, "moved": self._moved}
        if not self.blocks:
            return False, "the model did not think", detail
        if self._guided:
            detail |= {"expected": round(self._expected, 1), "shift": round(self._shift, 6)}
        reason = (
            f"thought {self.thought} of at most {self.knobs.most} tokens, guided at {self._guided} starts of steps, "
            f"{self._moved} of them to another likeliest token"
        )
        if self._cut:
            reason += "; the closing tag was forced at the budget's end"
        return self._guided > 0 or self._cut, reason, detail


# -- what a predictor is trained on ----------------------------------------------------------------------------


@dataclass(slots=True)
class Trace:
    """One generation: hidden states [F], thinking tokens so far and the token drawn, at each start of a step; `length`
    is that of the thinking, its closing tag included, once the model has closed it."""

    states: list[Any] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    length: int | None = None


class RecordingPolicy(ReadingPolicy):
    """Writes down a trace, of hidden states from `layers`, changes nothing of it, and ends the generation with it."""

    def __init__(self, trace: Trace, layers: tuple[int, ...], boundary: str, opening: str, closing: str) -> None:
        super().__init__(opening, closing, 0, boundary)
        self.layers = layers
        self._trace = trace
        self._due: tuple[Any, int] | None = None

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.follow(branch)
        if self.reads:
            self._due = (features_of(branch.hidden, self.layers), self.thought)  # type: ignore[attr-defined]
        return logits

    def after(self, branch: Branch, token: int) -> Verdict:
        if self._due is not None:
            states, at = self._due
            self._trace.states.append(states)
            self._trace.at.append(at)
            self._trace.tokens.append(token)
            self._due = None
        return super().after(branch, token)

    def closed(self, branch: Branch, token: int) -> Verdict:
        if self._trace.length is None:
            self._trace.length = self.thought
        return Stop("closed")
