"""One generation in progress, without the model: tokens, text, limits, policies, the bill, and the Answer at its end.

Both built-in engines with branches stand on `Generation`; an engine adds how the next token is drawn. Its loop is

    while generation.may_draw():
        ... draw a token ...
        generation.take(token, logprob)
        verdict, method = generation.judge(token)      # a Probe is run by the engine, and its verdict taken instead
        forced = generation.apply(verdict)             # token ids that the model must read after this one

Invariants: every token in `tokens` beyond the inherited ones is output and was held before it was drawn; `finish` is
set once, except that Force takes back an end that the model chose; `settle` books once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from thrifty.call import Answer, Branch, Call, Delta, Finish, Receipt, Sampling
from thrifty.engines.finishing import ANSWER_ROOM, THINK, Ending, Pieces, Shape, Shown
from thrifty.engines.settling import Tab
from thrifty.engines.verdicts import decide, policy_receipts
from thrifty.errors import InvalidInput
from thrifty.ledger.entry import Labels
from thrifty.policy import CONTINUE, Force, Overruled, Stop, Verdict
from thrifty.spend import Spend, Work
from thrifty.thinking import left_open


class Codec(Protocol):
    """The tokenizer, as a generation needs it."""

    ends: frozenset[int]
    """tokens that end an answer"""

    def encode(self, text: str) -> list[int]:
        """Tokens of text that continues other text: no special tokens are added."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; special ones are left out."""


class Generation:
    """State that every branch has; see the top of the module."""

    def __init__(
        self,
        call: Call,
        engine: Any,
        codec: Codec,
        tab: Tab,
        *,
        tags: tuple[str, str] | None = THINK,
        thinking: bool = False,
        limit: int | None = None,
    ) -> None:
        sampling = call.sampling
        self.call, self.engine, self.codec, self.tab = call, engine, codec, tab
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        self.receipts: list[Receipt] = list(call.receipts)
        self.policies = tuple(p.fork() for p in call.policies)
        self.limit = sampling.max_tokens if limit is None else limit
        if tags is not None and call.draft is None:
            thinking = thinking or left_open(call.prefix, *tags)
        self.shape = Shape(sampling.stop, call.draft, call.prefix, tags, thinking)
        self.pieces = Pieces(codec.decode)
        self.tool_calls: tuple[Mapping[str, Any], ...] = ()
        self.raw: dict[str, Any] = {}
        self.inherited = 0
        self.reasoning = 0
        self.closed = False
        self._text: list[str] = []
        self._overruled: list[Overruled] = []
        self._asides: list[Receipt] = []
        self._ending: Ending | Finish | None = None
        self._answer: Answer | None = None
        self._told = 0
        self._chose_end = False
        self._draft_limit = self._room_for_draft()
        if self.limit == 0:
            self.finish = "length"

    # -- what a Branch shows -----------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The output so far, decoded, thinking included."""
        return "".join(self._text)

    @property
    def output(self) -> int:
        """Output tokens of this branch's own."""
        return len(self.tokens) - self.inherited

    @property
    def chose_end(self) -> bool:
        """Whether the model chose to end with the last token drawn; Force takes that back."""
        return self._chose_end

    @property
    def work(self) -> Work:
        """The Work so far; engines override it."""
        return Work()

    @property
    def spend(self) -> Spend:
        """As it would be settled now."""
        return self.tab.spend(self.output, self.reasoning, len(self.tool_calls))

    # -- the loop ----------------------------------------------------------------------------------------------

    def may_draw(self) -> bool:
        """True when one more token is allowed and held; else `finish` says why not."""
        if self.finish is not None:
            return False
        more = 1 if self.shape.inside else 0
        covered = self.tab.cover(self.output + 1, self.reasoning + more, self._own_limit)
        if not covered or not self.tab.cover_work(self.work):
            self.finish = "budget"
            return False
        return True

    def take(self, token: int, logprob: float = 0.0, last: bool = False) -> None:
        """Records a drawn token; `last` says that the model chose to end with it (as its end tokens always say)."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.shape.inside:
            self.reasoning += 1
        piece = self.pieces.add((token,))
        self._text.append(piece)
        self._ending = self.shape.add(piece) if piece else None
        self._chose_end = last or token in self.codec.ends
        if self._chose_end:
            self._ending = "stop"
        if self.limit is not None and len(self.tokens) >= self.limit:
            self._ending = self._ending if self._ending == "stop" and not self.shape.drafting else "length"
        elif self.shape.drafting and (
            self._ending == "stop" or (self._draft_limit is not None and len(self.tokens) >= self._draft_limit)
        ):
            self._ending = "draft"

    def judge(self, token: int) -> tuple[Verdict, str]:
        """The policies' verdict about the token just taken, and whose it is."""
        return decide(self.policies, cast(Branch, self), token, self._overruled) if self.policies else (CONTINUE, "")

    def apply(self, verdict: Verdict) -> list[int]:
        """Acts on a verdict, an end of the draft or an end of the answer; returns the token ids to force now.

        Feed and Probe are the engine's to carry out; here they count as Continue.
        """
        ending, self._ending = self._ending, None
        if isinstance(verdict, Stop):
            self.finish = verdict.reason
            return []
        if ending == "length":
            self.finish = "length"
            return []
        forced: list[int] = []
        if isinstance(verdict, Force):
            forced = self.force(verdict.text)
            if self.finish is None and ending == "stop":
                return forced
        if ending == "draft" and self.finish is None:
            written = len(self.tokens)
            cut = self.shape.draft is not None and self.shape.draft.separator not in self.text
            if cut and not self.shape.prefix and self._chose_end:
                self.finish = "stop"  # the model ended without a separator, and there is nothing to force
                return forced
            text = self.shape.end_draft()
            self.raw["draft"] = {"tokens": written, "cut": cut}
            if text:
                forced = forced + self.force(text)
        elif ending is not None and self.finish is None:
            self.finish = ending
        return forced

    def force(self, text: str) -> list[int]:
        """Counts forced text as output and returns its tokens; sets `finish` instead when it does not fit."""
        tokens = self.codec.encode(text)
        if not tokens:
            return []
        total = self.output + len(tokens)
        if self.limit is not None and len(self.tokens) + len(tokens) > self.limit:
            self.finish = "length"
            return []
        more = len(tokens) if self.shape.inside else 0
        if not self.tab.cover(total, self.reasoning + more, self._own_limit):
            self.finish = "budget"
            return []
        self.tokens.extend(tokens)
        self.logprobs.extend([0.0] * len(tokens))
        if self.shape.inside:
            self.reasoning += len(tokens)
        rest = self.pieces.rest()
        if rest:
            self.shape.add(rest)
        piece = self.pieces.add(tokens)
        self._text.append(rest + piece)
        self.shape.force(piece)
        if self.limit is not None and len(self.tokens) >= self.limit:
            self.finish = "length"
        return tokens

    def aside(self, receipt: Receipt) -> None:
        """Remembers what a probe cost; it goes into the receipt of its method."""
        self._asides.append(receipt)

    def forked(self, twin: Generation) -> None:
        """Gives `twin`, a new Generation, this one's past."""
        twin.tokens, twin.logprobs = list(self.tokens), list(self.logprobs)
        twin.finish, twin.limit = self.finish, self.limit
        twin.policies = tuple(p.fork() for p in self.policies)
        twin.shape, twin.pieces = self.shape.fork(), self.pieces.fork()
        twin.raw, twin.inherited = dict(self.raw), len(self.tokens)
        twin._text = list(self._text)
        twin._draft_limit = self._draft_limit

    # -- the end -----------------------------------------------------------------------------------------------

    def settle(self, finish: Finish | None = None) -> bool:
        """Ends, collects receipts and books what was spent. False when that was done before."""
        if self.closed:
            return False
        self.closed = True
        if self.finish is None:
            self.finish = finish or "cancelled"
        rest = self.pieces.rest()
        self._text.append(rest)
        self.shape.end(rest)
        if self.tool_calls and not self.tab.cover_tools(len(self.tool_calls)):
            self.tool_calls, self.finish = (), "budget"
        self.receipts.extend(policy_receipts(self.policies, cast(Branch, self), self._overruled, self._asides))
        if self.finish == "budget":
            self.receipts.append(self.tab.receipt(self.limit, self.output))
        self.tab.settle(self.spend, self.work)
        return True

    def answer(self) -> Answer:
        """The closed branch as an Answer."""
        if not self.closed:
            raise InvalidInput("a branch becomes an Answer when it is closed: await finish_up()")
        if self._answer is None:
            shown = self.call.sampling.logprobs
            self._answer = Answer(
                text=self.shape.text,
                finish=self.finish or "stop",
                thinking=self.shape.thinking,
                tool_calls=self.tool_calls,
                parsed=self.shape.parsed,
                spend=self.spend,
                work=self.work,
                receipts=tuple(self.receipts),
                tokens=tuple(self.tokens),
                logprobs=tuple(self.logprobs) if shown else None,
                raw=self.raw,
            )
        return self._answer

    async def finish_up(self) -> Answer:
        """Closes, waits for the ledger, and returns the branch as an Answer."""
        self.close()
        await self.tab.done()
        return self.answer()

    def close(self) -> None:
        """Ends the branch and settles what it produced. Idempotent. Engines add the freeing of memory."""
        self.settle()

    def delta(self) -> Delta | None:
        """What may be shown now and was not shown before; None when there is no such text."""
        shown = self.shape.flush()
        return self._delta(shown) if shown else None

    def last_delta(self, answer: Answer) -> Delta:
        """The end of a stream: what was held back, and the whole Answer."""
        last = self._delta(self.shape.flush())
        return replace(last, tool_calls=answer.tool_calls, finish=answer.finish, answer=answer)

    # -- details -----------------------------------------------------------------------------------------------

    def _delta(self, shown: Shown) -> Delta:
        logprobs: tuple[float, ...] = ()
        if self.call.sampling.logprobs:
            logprobs, self._told = tuple(self.logprobs[self._told :]), len(self.logprobs)
        return Delta(shown.text, shown.thinking, logprobs=logprobs)

    @property
    def _own_limit(self) -> int | None:
        return None if self.limit is None else self.limit - self.inherited

    def _room_for_draft(self) -> int | None:
        """Tokens a draft may take: its own limit, and room for the separator, the prefix and an answer."""
        draft = self.call.draft
        if draft is None:
            return None
        if self.limit is None:
            return draft.max_tokens
        forced = len(self.codec.encode(f"\n{draft.separator} {self.call.prefix or ''}"))
        room = max(1, self.limit - forced - min(ANSWER_ROOM, self.limit // 4))
        return room if draft.max_tokens is None else min(draft.max_tokens, room)


def labels_for(call: Call, name: str, model: str, prices: Any) -> Labels:
    """The call's labels with the engine's own part filled in."""
    return stamped(call.labels, name, model, prices)


def stamped(labels: Labels, name: str, model: str, prices: Any) -> Labels:
    """Labels with the engine, its model and its price table (by its `label`, else its class) filled in."""
    table = "" if prices is None else str(getattr(prices, "label", type(prices).__name__))
    return replace(labels, engine=name, model=model, prices=table)


def check_call(call: Call) -> None:
    """Refuses a call that no engine can answer. Raises InvalidInput."""
    if not call.messages and not call.context:
        raise InvalidInput("an empty prompt: give at least one message")
    check_sampling(call.sampling)
    draft = call.draft
    if draft is not None:
        if not draft.separator:
            raise InvalidInput("an empty draft separator: give some text, such as '####'")
        if draft.max_tokens is not None and draft.max_tokens < 1:
            raise InvalidInput(f"draft max_tokens = {draft.max_tokens}: at least 1 is needed")


def check_sampling(sampling: Sampling) -> None:
    """Raises InvalidInput for a setting out of its range."""
    for name, low, high in (
        ("temperature", 0.0, 100.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("top_k", 0, 10**9),
        ("max_tokens", 0, 2**40),
        ("seed", -(2**63), 2**64 - 1),
    ):
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:  # NaN fails too
            raise InvalidInput(f"sampling {name} = {value!r}: from {low:g} to {high:g} is needed")
