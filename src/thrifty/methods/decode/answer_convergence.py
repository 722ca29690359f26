"""Answer Convergence: stop thinking when the answer that it would give has stopped changing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thrifty.call import Answer, Branch, Call, Receipt
from thrifty.engine import Engine
from thrifty.errors import BudgetExceeded, InvalidInput, PlanError
from thrifty.method import Next, knob
from thrifty.methods.decode._answers import canonical
from thrifty.methods.decode._continue import Continuation
from thrifty.methods.decode._stopper import Stopper, labels
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, generation, step_pattern
from thrifty.policy import CONTINUE, Probe, Verdict


def convergence(answers: Sequence[str]) -> tuple[int, float]:
    """Where the answers of a trace's N steps converge: the smallest i (from 1) with a_i = ... = a_N, and i / N, the
    Answer Convergence Ratio (section 3). Answers are compared as they are: give normal forms.

    >>> convergence(["3", "4", "5", "4", "4"])
    (4, 0.8)
    """
    if not answers:
        raise InvalidInput("convergence of no answers: give one for each step")
    at = len(answers)
    while at > 1 and answers[at - 2] == answers[-1]:
        at -= 1
    return at, at / len(answers)


def stop_at(answers: Sequence[str], agree: int) -> int | None:
    """The step (from 1) at which `agree` equal answers in a row have been seen; None when that never happens. An empty
    answer breaks a row. It is the convergence point + agree - 1 when no such row comes earlier.

    >>> stop_at(["4", "4", "", "4", "4", "4"], 3), stop_at(["4", "4"], 3)
    (6, None)
    """
    row, last = 0, ""
    for i, answer in enumerate(answers, 1):
        row = row + 1 if answer and answer == last else int(bool(answer))
        last = answer
        if row >= agree:
            return i
    return None


@dataclass(frozen=True, kw_only=True)
class AnswerConvergence(ThinkingMethod):
    """Stops thinking early by one of the paper's three strategies.

    `consistency` (section 4.1): after every step (a sentence) a probe closes thinking on a fork and reads the answer;
    when `agree` answers in a row are equal in normal form ("1/2" = "0.5"), thinking is closed. Empty answers break a
    row. Probes never touch the main text; they are billed under this method's name, prompt and thinking as their input,
    and are left out where the budget would then not hold the answer. `boost` (4.2): at each step of thinking the logit
    of the closing tag is raised by alpha * (max(z) - mean(z)); this form is a reconstruction, the paper says "linear".
    `learned` (4.3): an LSTM over the last layer's hidden state at the end of each step stops when P(stop) > tau. Train
    one on traces of your model (`record`, `fit`) and name its file in `stopper`. Its features are the state from which
    the step's last token was drawn (the paper's are at the probe).

    `boost` needs an engine with logits and a tag of one token, `learned` one with hidden states. `consistency` also
    runs on a server that continues its answers: thinking comes in calls of `chunk` tokens, each finished sentence is
    probed by a call, and when the answers agree the text goes back to that sentence; so a chunk too much is paid for.
    Without any probe that gives an answer thinking goes on to its end, and the receipt says so."""

    name = "answer-convergence"
    paper = "Answer Convergence as a Signal for Early Stopping in Reasoning (Liu and Wang 2025, arXiv:2506.02536)"
    needs = frozenset({"text", "continue"})
    identity = {"strategy": "boost", "alpha": 0.0, "keep": 0, "begin": "model"}

    strategy: str = knob("consistency", "what stops thinking", choices=("consistency", "boost", "learned"))
    agree: int = knob(10, "k: equal answers in a row that stop it", low=1, high=1000, log=True)
    boundary: str = knob("sentence", "what ends a step: token, line, paragraph, sentence, or a regular expression")
    every: int = knob(1, "steps from one probe to the next", low=1, high=1000)
    probe_tokens: int = knob(16, "tokens that a probe may say", low=1, high=4096)
    cue: str = knob("The final answer is", "how the probe's answer begins, and the answer itself; may be empty")
    alpha: float = knob(0.1, "of `boost`", low=0.0, high=10.0)
    tau: float = knob(0.9, "of `learned`", low=0.0, high=1.0)
    stopper: str = knob("", "file of a trained LSTM, for `learned`")
    chunk: int = knob(128, "tokens of one call, on an engine without branches", low=1, high=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        step_pattern(self.boundary)

    def policy(self, call: Call) -> ThinkingPolicy:
        if self.strategy == "boost":
            return BoostPolicy(self)
        if self.strategy == "learned":
            return LearnedPolicy(self, Stopper.load(self.stopper))
        return ConsistencyPolicy(self)

    def ready(self, call: Call) -> tuple[Call, str | None]:
        if self.strategy == "boost" and self.alpha == 0 and not self.keep:
            return call, "alpha = 0, nothing kept: thinking is left alone"
        needed = {"boost": "logits", "learned": "hidden"}.get(self.strategy)
        engine = call.engines.get("answer")
        if engine is not None and needed and needed not in engine.capabilities:
            raise PlanError(
                f"{self.name}: strategy {self.strategy!r} needs {needed}, which engine {engine.name}:{engine.model} "
                "lacks: use an engine that has it, or strategy = 'consistency'"
            )
        return super().ready(call)

    async def __call__(self, call: Call, next: Next) -> Answer:
        engine = call.engines.get("answer")
        if engine is None or "branch" in engine.capabilities:
            return await super().__call__(call, next)
        begun, idle = self.ready(call)
        if idle is None and call.draft is not None:
            idle = "the call drafts first: thinking cannot be cut apart by calls"
        if idle is not None:
            return await next(call.with_receipt(Receipt(self.name, False, idle)))
        return await _ByCalls(self, begun, next).run(call)


class _Told(ThinkingPolicy):
    """What the three strategies tell in common."""

    def __init__(self, method: AnswerConvergence) -> None:
        super().__init__(method.opening, method.closing, method.keep, method.boundary)
        self.knobs = method
        self._answers: list[str] = []
        self._skipped = 0

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        if not self.blocks:
            return False, "the model did not think", {}
        return False, f"thought {self.thought} tokens in {self.steps} steps", {"steps": self.steps}


class ConsistencyPolicy(_Told):
    """Probes after each step and closes when the answers agree."""

    def think(self, branch: Branch, token: int) -> Verdict:
        if not self.stepped or self.steps % self.knobs.every or self.ending(branch):
            return CONTINUE
        text = self.closing_text(self.knobs.cue)
        if not self.can_probe(branch, text, self.knobs.probe_tokens):
            self._skipped += 1
            return CONTINUE

        def heard(said: str) -> Verdict:
            self._answers.append(canonical(said))
            if stop_at(self._answers[-self.knobs.agree :], self.knobs.agree) is None:
                return CONTINUE
            return self.close(branch, f"{self.knobs.agree} answers in a row agreed", self.knobs.cue)

        return Probe(text, self.knobs.probe_tokens, heard)

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        fired, reason, detail = super().outcome(branch)
        return told_probes(fired, reason, detail, self._answers, self._skipped) if self.blocks else (fired, reason, {})


@dataclass(slots=True)
class Trace:
    """What `fit` learns from: the hidden state [D] at the end of each step, and the probe's answer there."""

    states: list[Any] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def example(self) -> tuple[Any, list[int]]:
        """Hidden states [N, D] and labels [N]."""
        import torch

        return torch.stack(self.states), labels(self.answers)


class RecordingPolicy(ConsistencyPolicy):
    """Probes after each step, never stops, and writes states and answers into a trace."""

    needs = frozenset({"hidden"})

    def __init__(self, method: AnswerConvergence, trace: Trace) -> None:
        super().__init__(method)
        self._trace = trace

    def think(self, branch: Branch, token: int) -> Verdict:
        verdict = super().think(branch, token)
        if not isinstance(verdict, Probe):
            return verdict
        state = branch.hidden[-1].detach().float().cpu().clone()  # type: ignore[attr-defined]

        def heard(said: str) -> Verdict:
            self._trace.states.append(state)
            self._trace.answers.append(canonical(said))
            return CONTINUE

        return replace(verdict, then=heard)


async def record(engine: Engine, call: Call, method: AnswerConvergence) -> Trace:
    """A trace of one call on an engine with hidden states, for `fit`; what it costs is settled on the call's account,
    the probes under the method's name."""
    trace = Trace()
    policy = RecordingPolicy(method, trace)
    policy.method = method.name
    await engine.generate(call.with_policy(policy))
    return trace


class BoostPolicy(_Told):
    """Raises the closing tag's logit while thinking."""

    _single = True
    _boosted = 0

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.follow(branch)
        if not self.inside or not self.knobs.alpha:
            return logits
        tag = generation(branch).codec.encode(self.closing)
        self._single = len(tag) == 1
        if self._single:
            logits[tag[0]] += boost(logits, self.knobs.alpha)
            self._boosted += 1
        return logits

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        fired, reason, detail = super().outcome(branch)
        if not self.blocks:
            return fired, reason, detail
        if not self._single:
            return False, f"{reason}; {self.closing} is not one token: nothing to raise", detail
        return self._boosted > 0, f"{reason}; {self.closing} was raised {self._boosted} times", detail


class LearnedPolicy(_Told):
    """Closes when the trained LSTM says so."""

    needs = frozenset({"hidden"})

    def __init__(self, method: AnswerConvergence, stopper: Stopper) -> None:
        super().__init__(method)
        self._stopper = stopper
        self._state: Any = None
        self._chances: list[float] = []

    def think(self, branch: Branch, token: int) -> Verdict:
        if not self.stepped or self.ending(branch):
            return CONTINUE
        chance, self._state = self._stopper.step(branch.hidden[-1], self._state)  # type: ignore[attr-defined]
        self._chances.append(round(chance, 4))
        if chance <= self.knobs.tau:
            return CONTINUE
        return self.close(branch, f"P(stop) = {chance:.3f} is above tau = {self.knobs.tau:g}", self.knobs.cue)

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        fired, reason, detail = super().outcome(branch)
        return fired, reason, {**detail, "chances": list(self._chances)} if self.blocks else detail


def boost(logits: Any, alpha: float) -> Any:
    """What `boost` adds to the closing tag's logit: alpha * (max(z) - mean(z)) over the finite logits [V]."""
    finite = logits[logits.isfinite()]
    return alpha * (finite.max() - finite.mean())


def told_probes(
    fired: bool, reason: str, detail: dict[str, Any], answers: Sequence[str], skipped: int
) -> tuple[bool, str, dict[str, Any]]:
    """A receipt's words about probes."""
    if answers and not any(answers):
        reason += f"; none of {len(answers)} probes gave an answer, so thinking was not stopped"
    if not answers and not skipped:
        reason += "; no step was completed, so nothing was probed"
    if skipped:
        reason += f"; {skipped} probes were left out: the budget holds the answer only"
    return fired, reason, {**detail, "probes": len(answers), "answers": list(answers[-8:])}


class _ByCalls:
    """The consistency strategy by calls that continue each other."""

    def __init__(self, method: AnswerConvergence, call: Call, next: Next) -> None:
        self.method = method
        self.text = Continuation(call, next, method.opening, method.closing, method.begin == "template")
        self.answers: list[str] = []
        self.skipped = 0
        self.why = ""
        self._pattern = step_pattern(method.boundary)
        self._probed = 0
        """characters of thinking whose steps were probed"""
        self._steps = 0

    async def run(self, asked: Call) -> Answer:
        method, text = self.method, self.text
        closing = text.tokens(f"\n{method.closing}\n\n{method.cue}")
        reserve = closing + max(1, method.keep)
        if not text.affords(method.chunk, reserve):
            reason = "no room for thinking in parts and an answer: asked for in one call"
            return await text.next(asked.with_receipt(Receipt(method.name, False, reason)))
        while True:
            most = min(method.chunk, text.room() - reserve)
            if most < 1 or (text.answers and not text.affords(method.chunk, reserve)):
                self.why = "what was left is the answer's"
            elif not await text.more(most, keep=reserve):
                break
            if text.answers[-1].tool_calls:
                break
            if not self.why and text.inside and await self._converged(reserve):
                self.why = f"{method.agree} answers in a row agreed"
            if not text.inside:
                # ended by itself, or never began: the answer may still have been cut by the chunk
                if text.finish == "length":
                    await text.more()
                break
            if self.why or text.finish != "length":
                self.why = self.why or "the model ended inside its thinking"
                text.force(f"\n{method.closing}\n\n{method.cue}")
                await text.more()
                break
        return await text.told(self._receipt())

    async def _converged(self, reserve: int) -> bool:
        """Probes every step completed since the last time; True when the answers agree, with the text cut back to the
        step at which they did."""
        method, text = self.method, self.text
        thinking = text.thinking
        for end in self._ends(thinking):
            self._probed = end
            self._steps += 1
            if self._steps % method.every:
                continue
            said = await self._probe(thinking[:end], reserve)
            if said is None:
                self.skipped += 1
                continue
            self.answers.append(canonical(said))
            if stop_at(self.answers[-method.agree :], method.agree) is not None:
                text.cut_to(thinking[:end])
                return True
        return False

    def _ends(self, thinking: str) -> list[int]:
        if self._pattern is None:
            return [len(thinking)] if len(thinking) > self._probed else []
        ends: list[int] = []
        at = self._probed
        while (found := self._pattern.search(thinking, at)) is not None:
            at = found.end()
            if thinking[(ends[-1] if ends else self._probed) : at].strip():
                ends.append(at)
        return ends

    async def _probe(self, thinking: str, reserve: int) -> str | None:
        method, text = self.method, self.text
        call = text.call
        prefix = text.head + thinking + f"\n{method.closing}\n\n{method.cue}"
        probe = replace(call.on_behalf(method.name), prefix=prefix, keep=call.keep + reserve)
        probe = probe.with_sampling(temperature=0, max_tokens=method.probe_tokens, stop=())
        engine = call.engines["answer"]
        cost = engine.count(probe)
        left = call.account.remaining()
        again = cost + reserve  # the answer's own call reads all of this too
        needs = {"calls": 2, "input": cost + again, "tokens": cost + method.probe_tokens + again + reserve}
        if any(left[r] < n for r, n in needs.items() if r in left):
            return None
        try:
            answer = await engine.generate(probe)
        except BudgetExceeded:
            return None
        text.aside, text.aside_work = text.aside + answer.spend, text.aside_work + answer.work
        return answer.text

    def _receipt(self) -> Receipt:
        method, text = self.method, self.text
        calls = len(text.answers)
        parts = f"thinking ended after {text.thought} tokens" if text.thinking else "the answer shows no thinking"
        reason = f"{parts}; thinking was closed: {self.why}" if self.why else parts
        fired, reason, detail = told_probes(bool(self.why), reason, {"calls": calls}, self.answers, self.skipped)
        return Receipt(
            method.name, fired, reason, None, text.thought, spend=text.aside, work=text.aside_work, detail=detail
        )
