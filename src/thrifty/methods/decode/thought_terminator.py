"""ThoughtTerminator: the model is told how much it has thought and has left, and at its deadline to answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.call import Answer, Branch, Call, Delta, Receipt, text_of
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Next, knob
from thrifty.methods.decode._answers import marked
from thrifty.methods.decode._continue import Continuation
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, room
from thrifty.policy import CONTINUE, Force, Stop, Verdict
from thrifty.spend import Spend, Work

ASK_DEADLINE = (
    "How many tokens of thought does the following question need? Think little of easy questions. "
    "Reply with one whole number only.\n\nQuestion: {question}"
)


def interval(deadline: int, most: int = 250) -> int:
    """n, the tokens between interrupts: min(most, deadline / 2), at least 1 (section 5).

    >>> interval(1000), interval(100), interval(1)
    (250, 50, 1)
    """
    return max(1, min(most, deadline // 2))


def deadline_of(difficulty: float, bins: Sequence[float]) -> int:
    """The calibrated deadline: `bins` has the mean shortest successful spend of each class of difficulty, easiest
    first; `difficulty` in [0, 1] falls into one of as many equal classes.

    >>> deadline_of(0.05, [100, 400]), deadline_of(0.5, [100, 400]), deadline_of(1, [100, 400])
    (100, 400, 400)
    """
    if not bins or not 0 <= difficulty <= 1:
        raise InvalidInput(
            f"difficulty {difficulty} and {len(bins)} bins: from 0 to 1, and at least one bin, are needed"
        )
    return max(1, round(bins[min(len(bins) - 1, int(difficulty * len(bins)))]))


@dataclass(frozen=True, kw_only=True)
class ThoughtTerminator(ThinkingMethod):
    """Gives thinking a deadline of N tokens and keeps to it, in three phases.

    Scheduling: N is `deadline`, or (`schedule` = "asked") what the model says that the question needs, at most
    `deadline`; that question is billed to this method, and without a number in its reply N is `deadline`. The prompt
    names N. Running: after every n = min(`every`, N / 2) tokens an interrupt in the model's own voice says how many are
    used and left; when by then a final answer is marked in what the model has written (boxed, ####, "final answer
    is"), thinking is closed instead. Terminating: at N the model says that it is out of time, thinking is closed, and
    at most `answer_tokens` follow. There are ceil(N / n) - 1 interrupts before the deadline when nothing is found;
    thinking takes at most N and their tokens.

    The paper's difficulty predictor is a finetuned model: `deadline_of` maps a predictor's output to N. The words of
    the lines are ours. On an engine with branches it is a policy, on a server that continues its answers each stretch
    is a call, which reads all before it again. The answer is capped by stopping, not by constrained decoding."""

    name = "thought-terminator"
    paper = (
        "ThoughtTerminator: Benchmarking, Calibrating, and Mitigating Overthinking (Pu et al. 2025, arXiv:2504.13367)"
    )
    needs = frozenset({"text", "continue"})
    no_identity = "the prompt names a deadline, whatever it is"

    schedule: str = knob("fixed", "where the deadline comes from: the knob, or the model", choices=("fixed", "asked"))
    deadline: int = knob(1000, "N: thinking tokens; the most when the model is asked", low=1, high=1_000_000, log=True)
    every: int = knob(250, "tokens from one interrupt to the next, at most", low=1, high=100_000, log=True)
    answer_tokens: int = knob(50, "what the answer may take after the deadline", low=1, high=100_000, log=True)
    cue: str = knob("Final Answer:", "how the answer begins after the deadline; may be empty")
    announcement: str = knob("Think for at most {deadline} tokens.", "what the prompt says; may be empty")
    interrupt: str = knob(
        "\n\nI have used {used} tokens, and I have {left} tokens left to answer. To continue:\n", "the interrupt"
    )
    last_words: str = knob("\n\nI am out of time: I give my final answer now.", "what ends thinking at the deadline")

    def line(self, used: int, deadline: int) -> str:
        """An interrupt's text."""
        left = max(0, deadline - used)
        return self.interrupt.replace("{used}", str(used)).replace("{left}", str(left))

    def ready(self, call: Call) -> tuple[Call, str | None]:
        call, idle = super().ready(call)
        return (call, idle) if idle is not None else (_announced(call, self.announcement, self.deadline), None)

    def policy(self, call: Call) -> TerminatorPolicy:
        return TerminatorPolicy(self)

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.schedule == "asked":
            return await self._scheduled(call, next)
        engine = call.engines.get("answer")
        if engine is None or "branch" in engine.capabilities:
            return await super().__call__(call, next)
        begun, idle = self.ready(call)
        if idle is None and call.draft is not None:
            idle = "the call drafts first: thinking cannot be cut apart by calls"
        if idle is not None:
            return await next(call.with_receipt(Receipt(self.name, False, idle)))
        return await _ByCalls(self, begun, next).run(call)

    async def _scheduled(self, call: Call, next: Next) -> Answer:
        """Asks the model for the deadline, then answers with it; what asking cost joins this method's receipt."""
        asked, spend, work, emit = self.deadline, Spend(), Work(), call.emit
        why = "no number came back: the knob's deadline"
        wish = ASK_DEADLINE.replace("{question}", call.question())
        probe = replace(call.on_behalf(self.name), messages=({"role": "user", "content": wish},))
        probe = probe.with_sampling(temperature=0, max_tokens=16, stop=())
        try:
            said = await call.engines["answer"].generate(replace(probe, keep=call.keep + self.keep + 1))
        except (BudgetExceeded, KeyError):
            why = "no budget to ask for one: the knob's deadline"
        else:
            spend, work = said.spend, said.work
            number = re.search(r"\d+", said.text.replace(",", ""))
            if number:
                asked = max(1, min(self.deadline, int(number.group()[:9])))
                why = f"the model asked for {number.group()[:9]} tokens"
        answer = await replace(self, schedule="fixed", deadline=asked)(replace(call, emit=None), next)
        receipts = list(answer.receipts)
        at = next_index(receipts, self.name, len(call.receipts))
        own = receipts[at]
        receipts[at] = replace(own, reason=f"{own.reason}; {why}", spend=own.spend + spend, work=own.work + work)
        whole = replace(answer, receipts=tuple(receipts), spend=answer.spend + spend, work=answer.work + work)
        if emit is not None:
            await emit(Delta(text=whole.text, thinking=whole.thinking, logprobs=whole.logprobs or ()))
            await emit(Delta(tool_calls=whole.tool_calls, finish=whole.finish, answer=whole))
        return whole


def next_index(receipts: Sequence[Receipt], name: str, start: int) -> int:
    """Where a method's receipt stands among those from `start` on."""
    return next(i for i, r in enumerate(receipts) if i >= start and r.method == name)


class TerminatorPolicy(ThinkingPolicy):
    """Interrupts, finds answers, and ends thinking at the deadline."""

    def __init__(self, method: ThoughtTerminator) -> None:
        super().__init__(method.opening, method.closing, method.keep)
        self.knobs = method
        self._said = 0
        """tokens of interrupts"""
        self._interrupts = 0
        self._due = 0
        self._written = ""
        self._answer_from = -1

    def think(self, branch: Branch, token: int) -> Verdict:
        method = self.knobs
        used = self.thought - self._said
        if used >= method.deadline:
            return self._terminate(branch)
        if self.ending(branch):
            return self.close(branch, "the model ended inside its thinking")
        step = interval(method.deadline, method.every)
        if used < (self._interrupts + 1) * step:
            return CONTINUE
        if marked(_own_words(branch.text, self._written)) is not None:
            return self.close(branch, "it had an answer already")
        text = method.line(used, method.deadline)
        cost = self.cost(branch, text)
        self._interrupts += 1
        if room(branch) < cost + self.cost(branch, self.closing_text()) + max(1, self.keep) + 1:
            return CONTINUE
        self._said += cost
        self._due += 1
        self._written += text
        return Force(text)

    def closed(self, branch: Branch, token: int) -> Verdict:
        return self.answering(branch, token)

    def answering(self, branch: Branch, token: int) -> Verdict:
        if self._answer_from < 0:
            return CONTINUE
        spoken = len(branch.tokens) - self._answer_from
        return Stop("length") if spoken >= self.knobs.answer_tokens and not self.ending(branch) else CONTINUE

    def _terminate(self, branch: Branch) -> Verdict:
        method = self.knobs
        closing = f"{method.last_words}\n{self.closing}\n\n{method.cue}"
        n = self.cost(branch, closing)
        if n + max(1, self.keep) <= room(branch):
            verdict: Verdict = Force(closing)
            self._closed_why = f"the deadline of {method.deadline} tokens came"
        else:
            verdict = self.close(branch, f"the deadline of {method.deadline} tokens came", method.cue)
        if isinstance(verdict, Force):
            self._answer_from = len(branch.tokens) + self.cost(branch, verdict.text)
        return verdict

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        detail = {"interrupts": self._due, "deadline": self.knobs.deadline}
        if not self.blocks:
            return bool(self.knobs.announcement), "the deadline was named; the model did not think", detail
        return True, f"thought {self.thought} tokens, {self._due} interrupts", detail


class _ByCalls:
    """The same by calls that continue each other."""

    def __init__(self, method: ThoughtTerminator, call: Call, next: Next) -> None:
        self.method = method
        self.text = Continuation(call, next, method.opening, method.closing, method.begin == "template")
        self.interrupts = 0
        self.why = ""
        self.forced = ""

    async def run(self, asked: Call) -> Answer:
        method, text = self.method, self.text
        step = interval(method.deadline, method.every)
        ending = f"{method.last_words}\n{method.closing}\n\n{method.cue}"
        reserve = text.tokens(ending) + max(1, method.keep)
        if not text.affords(step, reserve):
            reason = "no room for thinking in parts and an answer: asked for in one call"
            return await text.next(asked.with_receipt(Receipt(method.name, False, reason)))
        said = 0
        while True:
            tag = 0 if text.inside or text.answers else text.tokens(method.opening)
            used = text.thought - said
            most = min(step, method.deadline - used) + tag
            if not text.affords(int(most), reserve):
                self.why = "what was left is the answer's"
            elif not await text.more(min(most, text.room() - reserve), keep=reserve):
                break
            if text.answers[-1].tool_calls:
                break
            if not text.inside:
                if text.finish == "length":
                    await text.more()
                break
            used = text.thought - said
            late = used >= method.deadline
            if late:
                self.why = f"the deadline of {method.deadline} tokens came"
            elif marked(_own_words(text.thinking, self.forced)) is not None:
                self.why = self.why or "it had an answer already"
            elif text.finish != "length":
                self.why = self.why or "the model ended inside its thinking"
            if self.why:
                text.force(ending if late else f"\n{method.closing}\n\n")
                await text.more(method.answer_tokens if late else text.room())
                break
            before = text.thought
            line = method.line(used, method.deadline)
            text.force(line)
            said += text.thought - before
            self.forced += line
            self.interrupts += 1
        return await text.told(self._receipt())

    def _receipt(self) -> Receipt:
        text, method = self.text, self.method
        detail = {"calls": len(text.answers), "interrupts": self.interrupts, "deadline": method.deadline}
        if not text.thinking:
            reason = "the deadline was named; the answer shows no thinking"
            return Receipt(method.name, bool(method.announcement), reason, None, 0, detail=detail)
        reason = f"thought {text.thought} tokens, {self.interrupts} interrupts"
        reason += f"; thinking was closed: {self.why}" if self.why else ""
        return Receipt(method.name, True, reason, None, text.thought, detail=detail)


def _own_words(text: str, forced: str) -> str:
    """What the model wrote of a text, without the lines that were forced into it."""
    for line in filter(str.strip, forced.split("\n")):
        text = text.replace(line, "", 1)
    return text


def _announced(call: Call, words: str, deadline: int) -> Call:
    """The call with the deadline named in its system message."""
    if not words:
        return call
    told = words.replace("{deadline}", str(deadline))
    first = call.messages[0] if call.messages else None
    if first is None or first.get("role") not in ("system", "developer"):
        return replace(call, messages=({"role": "system", "content": told}, *call.messages))
    content = first.get("content")
    if isinstance(content, str) or content is None:
        grown: Any = f"{text_of(first)}\n\n{told}" if content else told
    else:
        grown = [*content, {"type": "text", "text": told}]
    return replace(call, messages=({**first, "content": grown}, *call.messages[1:]))
