"""Budget forcing: at most so much thinking, then the answer; or more of it, by "Wait" in the place of its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.call import Answer, Branch, Call, Receipt
from thrifty.method import Next, knob
from thrifty.methods.decode._continue import Continuation
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, generation, reasoning_room, room
from thrifty.policy import CONTINUE, Force, Verdict

NO_LIMIT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class BudgetForcing(ThinkingMethod):
    """Thinks at most `most` tokens: then the closing tag is forced, and after it `cue`, with which the answer begins.
    And thinks on: up to `waits` times the end of thinking is suppressed and `word` written in its place, while thinking
    is shorter than `below`.

    `most` counts what the model thinks and every `word` forced, not the closing tag; an end of the text inside the
    block counts as an end of thinking. The cue is forced only where thinking was cut, as in both papers' code.
    `variant`: how `word` is joined, "s1" as it is, "m1" with a blank before it where there is none. An extension that
    would reach `most` is left out (m1's rule; its released code forgets to count the word). With `most` = 0 the answer
    begins with an empty block. Thinking is also closed early enough to leave the answer `keep` tokens of max_tokens and
    of the budget; when not even the closing tag fits, it is cut by the limit, and the receipt says so.

    On an engine with branches it is a policy. Suppressing the tag needs `logits` and a tag of one token; elsewhere an
    end of thinking stands, and the receipt says that. The token to be drawn is looked at with a copy of the branch's
    sampler, so a draw that is no closing tag is exactly what it would have been.

    On a server that continues its answers (vLLM, llama.cpp) thinking and answer are calls that continue each other.
    What was written before is then input again, and billed so; `begin` says where thinking starts: the model writes
    the opening tag itself ("model"), its template does ("template"), or we do ("prefix", for a model without a
    thinking mode too). With `waits`, thinking stops at the closing tag, so that it can be continued."""

    name = "budget-forcing"
    paper = "s1: Simple test-time scaling (Muennighoff et al. 2025, arXiv:2501.19393); m1 (2025, arXiv:2504.00869)"
    needs = frozenset({"text", "continue"})
    identity = {"most": NO_LIMIT, "waits": 0, "keep": 0, "begin": "model"}

    most: int = knob(2048, "thinking tokens at most; 1,000,000: no limit", low=0, high=NO_LIMIT, log=True)
    waits: int = knob(0, "how often an end of thinking is replaced by the word", low=0, high=64)
    below: int = knob(NO_LIMIT, "only while thinking is shorter than this", low=0, high=NO_LIMIT, log=True)
    word: str = knob("Wait", "what is written in the place of an end of thinking")
    cue: str = knob("Final Answer:", "how the answer begins when thinking was cut; may be empty")
    variant: str = knob("s1", "whose way of joining the word", choices=("s1", "m1"))

    def policy(self, call: Call) -> BudgetForcingPolicy:
        engine = call.engines.get("answer")
        kind = BudgetForcingPolicy
        if self.waits and engine is not None and "logits" in engine.capabilities:
            kind = SuppressingPolicy
        return kind(self)

    def ready(self, call: Call) -> tuple[Call, str | None]:
        if self.most == NO_LIMIT and not self.waits and not self.keep:
            return call, "no limit, no waits, nothing kept: thinking is left alone"
        call, idle = super().ready(call)
        if self.most == 0 and idle is None and call.draft is None:
            call = replace(call, prefix=(call.prefix or f"{self.opening}\n") + f"\n{self.closing}\n\n{self.cue}")
        return call, idle

    def joined(self, thinking: str) -> str:
        """The word as it continues a text.

        >>> BudgetForcing(variant="m1").joined("so 4."), BudgetForcing().joined("so 4.")
        (' Wait', 'Wait')
        """
        blank = self.variant == "m1" and thinking != "" and not thinking[-1].isspace()
        return (" " if blank else "") + self.word

    def may_wait(self, extended: int, thought: int, cost: int) -> bool:
        """Whether thinking of `thought` tokens, extended that often before, takes one more word of that cost."""
        return extended < self.waits and thought < self.below and thought + cost < self.most

    async def __call__(self, call: Call, next: Next) -> Answer:
        engine = call.engines.get("answer")
        if engine is None or "branch" in engine.capabilities:
            return await super().__call__(call, next)
        begun, idle = self.ready(call)
        if idle is None and call.draft is not None:
            idle = "the call drafts first: thinking cannot be cut apart by calls"
        if idle is not None:
            return await next(call.with_receipt(Receipt(self.name, False, idle)))
        if self.most == 0:
            reason = "thinking was skipped: the answer begins with an empty block"
            return await next(begun.with_receipt(Receipt(self.name, True, reason, None, 0)))
        return await _ByCalls(self, begun, next).run(call)


def flips(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """What one more forced word did to some questions (m1's analysis): how many wrong answers it made right, and how
    many right ones wrong. Their difference is the change in correct answers.

    >>> flips([True, False, False], [False, True, True])
    (2, 1)
    """
    pairs = list(zip(before, after, strict=True))
    return sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)


class BudgetForcingPolicy(ThinkingPolicy):
    """Closes thinking in time; takes back an end of the text inside the block, while waits are left."""

    _can_suppress = False

    def __init__(self, method: BudgetForcing) -> None:
        super().__init__(method.opening, method.closing, method.keep)
        self.knobs = method
        self._extended = 0
        self._why = ""

    def think(self, branch: Branch, token: int) -> Verdict:
        if self.thought >= self.knobs.most:
            return self.close(branch, f"{self.knobs.most} thinking tokens were used", self.knobs.cue)
        if not self.ending(branch):
            return CONTINUE
        word = self.word(branch)
        if word is None:
            return self.close(branch, "the model ended inside its thinking")
        self._extended += 1
        return Force(word)

    def must_close(self, branch: Branch, cue: str = "") -> bool:
        return super().must_close(branch, self.knobs.cue)

    def close(self, branch: Branch, why: str, cue: str = "") -> Verdict:
        return super().close(branch, why, cue or ("" if "ended" in why else self.knobs.cue))

    def word(self, branch: Branch) -> str | None:
        """What to write in the place of an end of thinking; None when thinking may end."""
        text = self.knobs.joined(self.step_text + self.since_step)
        cost = self.cost(branch, text)
        closing = self.cost(branch, self.closing_text(self.knobs.cue)) + self.keep
        fits = room(branch) > cost + closing and reasoning_room(branch) > cost + closing
        return text if fits and self.knobs.may_wait(self._extended, self.thought, cost) else None

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        detail = {"waits": self._extended} if self.knobs.waits else {}
        if self.knobs.most == 0:
            return True, "the answer began with an empty thinking block", detail
        if not self.blocks:
            return False, "the model did not think", detail
        parts = [f"thought {self.thought} of at most {self.knobs.most} tokens"]
        if self._extended:
            parts.append(f"extended {self._extended} times")
        if self.knobs.waits and not self._can_suppress:
            parts.append("an end of thinking stands: the engine has no logits")
        return self._extended > 0, "; ".join(parts), detail


class SuppressingPolicy(BudgetForcingPolicy):
    """Also replaces the closing tag that is about to be drawn by the word."""

    def __init__(self, method: BudgetForcing) -> None:
        super().__init__(method)
        self._rest: list[str] = []

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.follow(branch)
        run = generation(branch)
        tag = run.codec.encode(self.closing)
        self._can_suppress = len(tag) == 1
        if not self.inside or not self._can_suppress or self._extended >= self.knobs.waits:
            return logits
        word = self.word(branch)
        if word is None or self._next(branch, logits) != tag[0]:
            return logits
        first, *rest = run.codec.encode(word)
        logits.fill_(-math.inf)
        logits[first] = 0.0
        self._extended += 1
        self._rest = [run.codec.decode(rest)] if rest else []
        return logits

    def think(self, branch: Branch, token: int) -> Verdict:
        if self._rest:
            return Force(self._rest.pop())
        return super().think(branch, token)

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        fired, reason, detail = super().outcome(branch)
        return fired, reason.replace("the engine has no logits", f"{self.closing} is not one token"), detail

    @staticmethod
    def _next(branch: Branch, logits: Any) -> int:
        """The token that the branch's sampler will draw from these logits."""
        from thrifty.engines.local.sampling import draw

        sampler = getattr(branch, "sampler", None)
        return int(logits.argmax()) if sampler is None else draw(logits[None], [sampler.fork()])[0]


class _ByCalls:
    """Budget forcing by calls that continue each other."""

    def __init__(self, method: BudgetForcing, call: Call, next: Next) -> None:
        self.method = method
        inside = method.begin == "template"
        self.text = Continuation(call, next, method.opening, method.closing, inside)
        self.extended = 0
        self.cut = ""

    async def run(self, asked: Call) -> Answer:
        """Thinks, closes, answers. `asked`: the call as it came, for when there is no room to do that."""
        method, text = self.method, self.text
        closing = text.tokens(f"\n{method.closing}\n\n{method.cue}")
        most, whose = self._allowance(closing)
        if most < 1:
            reason = f"no room to close thinking and to answer ({whose}): asked for in one call"
            return await text.next(asked.with_receipt(Receipt(method.name, False, reason)))
        while True:
            again = self.extended < method.waits
            stop = (method.closing,) if again else ()
            tag = 0 if text.inside else text.tokens(method.opening)  # the model writes it first: it is no thought
            if not await text.more(most - text.thought + tag, stop=stop, keep=method.keep + closing):
                break
            if text.answers[-1].tool_calls:
                break
            over = text.finish in ("length", "budget")
            word = method.joined(text.thinking)
            thinks = text.inside or bool(text.thinking)
            if again and thinks and not (over and text.inside) and self._may_wait(word):
                self.extended += 1
                text.reopen()
                text.force(word)
                continue
            if not text.inside:
                if text.finish == "length":
                    await text.more()
                break
            if over:
                self.cut = f"cut at {text.thought} thinking tokens ({whose})"
            text.force(f"\n{method.closing}\n\n{method.cue if over else ''}")
            await text.more()
            break
        return await text.told(self._receipt())

    def _may_wait(self, word: str) -> bool:
        n = self.text.tokens(word)
        return self.text.room() > n and self.method.may_wait(self.extended, self.text.thought, n)

    def _allowance(self, closing: int) -> tuple[float, str]:
        """Thinking tokens that leave room for the closing text and the answer, and what decides it."""
        method, call = self.method, self.text.call
        after = closing + max(1, method.keep)
        tag = 0 if self.text.inside else self.text.tokens(method.opening)
        limits: list[tuple[float, str]] = [(method.most, f"most = {method.most}")]
        if call.sampling.max_tokens is not None:
            limits.append((call.sampling.max_tokens - after - tag, "max_tokens"))
        left = call.account.remaining()
        engine = call.engines.get("answer")
        prompt = 0 if engine is None else engine.count(call)
        if "output" in left:
            limits.append((left["output"] - after - tag, "the budget's output"))
        if "reasoning" in left:
            limits.append((left["reasoning"] - after, "the budget's reasoning"))
        if "input" in left:  # the prompt twice, what was thought once
            limits.append((left["input"] - 2 * prompt - closing - tag, "the budget's input"))
        if "tokens" in left:  # and what is thought once more
            limits.append(((left["tokens"] - 2 * prompt - closing - after - 2 * tag) // 2, "the budget's tokens"))
        if "calls" in left:
            limits.append((method.most if left["calls"] >= 2 else 0, "the budget's calls"))
        return min(limits, key=lambda pair: pair[0])

    def _receipt(self) -> Receipt:
        method, text = self.method, self.text
        calls = len(text.answers)
        detail: dict[str, Any] = {"calls": calls} | ({"waits": self.extended} if method.waits else {})
        parts = [self.cut] if self.cut else []
        if self.extended:
            parts.append(f"extended {self.extended} times")
        if not text.thinking:
            parts.append("the answer shows no thinking: with a server that hides its tags, set the knob begin")
        elif not parts:
            parts.append(f"thinking ended by itself after {text.thought} tokens")
        fired = bool(self.cut or self.extended)
        return Receipt(method.name, fired, "; ".join(parts), None, text.thought, detail=detail)
