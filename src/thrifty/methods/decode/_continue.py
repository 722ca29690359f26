"""One answer written by several calls, each of which continues what was written before: how a method acts on thinking
where the engine has no branches.

What was written so far, forced text included, goes back as the call's prefix (capability `continue`). Invariants: all
calls settle on the call's own account; what they generate and what is forced are together at most `max_tokens` (what is
forced is billed as the input that it is in the next call); nothing is shown before the end, which `told` emits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from thrifty.call import Answer, Call, Delta, Receipt, merge_receipts
from thrifty.engines.settling import DEGRADED
from thrifty.errors import BudgetExceeded
from thrifty.method import Next
from thrifty.spend import Spend, Work, total_spend, total_work
from thrifty.thinking import CLOSING, OPENING, left_open, split


class Continuation:
    """See the top of the module. `inside`: what is generated next is thinking (a template may have opened it)."""

    def __init__(
        self, call: Call, next: Next, opening: str = OPENING, closing: str = CLOSING, inside: bool = False
    ) -> None:
        self.call, self.next, self.opening, self.closing = call, next, opening, closing
        opened = left_open(call.prefix, opening, closing)
        self.written = (call.prefix or "") + (f"{opening}\n" if inside and not opened else "")
        """what goes back to the engine: how the answer began, and all that came after it"""
        self._own = len(self.written)
        self._began_inside = self.inside = inside or opened
        self.thinking = self.text = ""
        self.thought = 0
        """thinking tokens: generated or forced inside the block, tags left out of forced text"""
        self.output = 0
        """tokens generated and forced"""
        self.answers: list[Answer] = []
        self.finish = "stop"
        self.notes: list[Receipt] = []
        self.aside, self.aside_work = Spend(), Work()
        """what calls for the method's own ends cost: its receipt has it too"""

    def room(self) -> float:
        """Tokens that max_tokens still allows."""
        limit = self.call.sampling.max_tokens
        return math.inf if limit is None else max(0, limit - self.output)

    def tokens(self, text: str) -> int:
        """Tokens of a text, as the engine counts them (an estimate where it has no tokenizer)."""
        engine = self.call.engines.get("answer")
        if engine is None or not text:
            return len(text.split())
        bare = self.call.on_behalf("")
        return max(1, engine.count(replace(bare, prefix=f"a {text}")) - engine.count(replace(bare, prefix="a")))

    def affords(self, chunk: int, reserve: int) -> bool:
        """Whether max_tokens and the budget hold a call of thinking, of `chunk` tokens or as many as there is room for,
        and after it the call of the answer with `reserve` tokens, what closes thinking included."""
        engine = self.call.engines.get("answer")
        chunk = int(min(chunk, self.room() - reserve))
        if chunk < 1:
            return False
        left = self.call.account.remaining()
        size = 0 if engine is None else engine.count(replace(self.call, prefix=self.written or None))
        needs = {
            "calls": 2,
            "output": 1 + reserve,
            "reasoning": 1 + reserve,
            "input": 2 * size + chunk + reserve,
            "tokens": 2 * (size + chunk + reserve),
        }
        return all(left[r] >= n for r, n in needs.items() if r in left)

    def force(self, text: str) -> None:
        """Writes text as if the model had: it costs its tokens. What closes thinking is no thought itself."""
        n, inside = self.tokens(text), self.inside
        self.output += n
        self._write(text)
        self.thought += n if inside and self.inside else 0

    @property
    def head(self) -> str:
        """How what goes back to the engine begins, before this answer's own text: up to the open thinking block."""
        opened = self.written[: self._own]
        return opened if left_open(opened, self.opening, self.closing) else f"{opened}{self.opening}\n"

    def cut_to(self, thinking: str) -> None:
        """Goes back to where the thinking was `thinking`; what came after it is dropped (and was paid)."""
        self.written = self.written[: self._own]
        self._write(("" if self._began_inside else f"{self.opening}\n") + thinking)

    def reopen(self) -> None:
        """Goes back to the end of the last thinking block; what was answered after it is dropped (and was paid)."""
        if self.inside:
            return
        at = self.written.rfind(self.closing)
        if at >= self._own:
            kept = self.written[:at].removesuffix("\n")
            self.written = self.written[: self._own]
            self._write(kept[self._own :])

    async def more(self, most: float = math.inf, *, stop: Sequence[str] = (), keep: int = 0) -> bool:
        """Generates at most `most` tokens more, within max_tokens. False, with `finish` set, when there is no room, or
        the budget of a plan that degrades refuses a call after the first; else raises BudgetExceeded."""
        most = min(most, self.room())
        if most < 1:
            self.finish = "length"
            return False
        begun = self.written if self.output else self.call.prefix
        call = replace(self.call, prefix=begun or None, emit=None, receipts=(), keep=self.call.keep + keep)
        limit = None if most == math.inf else int(most)
        call = call.with_sampling(max_tokens=limit, stop=(*call.sampling.stop, *stop))
        try:
            answer = await self.next(call)
        except BudgetExceeded as refusal:
            if not self.answers or self.call.on_exceed == "refuse":
                raise
            self.finish = "budget"
            reason = f"the budget's {refusal.resource} ran out: the answer was cut short"
            self.notes.append(Receipt(DEGRADED, True, reason))
            return False
        self.answers.append(answer)
        self.output += answer.spend.output
        self.finish = answer.finish
        self._read(answer)
        return True

    def answer(self, own: Receipt) -> Answer:
        """The whole, with the Spend, Work and receipts of every call, and the method's own receipt."""
        last = self.answers[-1]
        work = total_work([*(a.work for a in self.answers), self.aside_work])
        below = merge_receipts([r for a in self.answers for r in a.receipts] + self.notes)
        alone = len(self.answers) == 1
        shown = [a.logprobs for a in self.answers]
        return replace(
            last,
            text=self.text,
            thinking=self.thinking,
            finish=self.finish,
            tokens=last.tokens if alone else None,
            logprobs=tuple(x for part in shown for x in part or ()) if all(p is not None for p in shown) else None,
            spend=total_spend([*(a.spend for a in self.answers), self.aside]),
            work=work,
            receipts=(*self.call.receipts, *below, own),
            estimated=any(a.estimated for a in self.answers),
        )

    async def told(self, own: Receipt) -> Answer:
        """`answer`, emitted where the call streams."""
        whole = self.answer(own)
        if self.call.emit is not None:
            if whole.text or whole.thinking:
                await self.call.emit(Delta(text=whole.text, thinking=whole.thinking, logprobs=whole.logprobs or ()))
            await self.call.emit(Delta(tool_calls=whole.tool_calls, finish=whole.finish, answer=whole))
        return whole

    # -- details -----------------------------------------------------------------------------------------------

    def _read(self, answer: Answer) -> None:
        """Takes what a call wrote: told apart by the engine (`thinking`), or with the tags in its text."""
        before, answered = self.inside, len(self.text)
        # an engine that tells thinking apart shows no closing tag: where tokens came and nothing is seen, it was that
        hidden = before and answer.spend.output > 0 and not answer.text and not answer.thinking.strip()
        if answer.thinking or hidden:
            open_it = "" if before else f"{self.opening}\n"
            close_it = f"\n{self.closing}\n\n" if answer.text or hidden else ""
            self._write(f"{open_it}{answer.thinking}{close_it}{answer.text}")
        else:
            self._write(answer.text)
        if answer.spend.reasoning:
            self.thought += answer.spend.reasoning
        elif before or self.inside or answer.thinking:
            tag = self.opening if not before and not answer.thinking else ""
            self.thought += max(0, answer.spend.output - self.tokens(self.text[answered:]) - self.tokens(tag))

    def _write(self, piece: str) -> None:
        self.written += piece
        own = self.written[self._own :]
        self.thinking, self.text = split(own, self.opening, self.closing, self._began_inside)
        opened, closed = own.rfind(self.opening), own.rfind(self.closing)
        self.inside = opened > closed or (self._began_inside and opened == closed)
