"""TALE: a token budget for each question, estimated by the model itself or searched for beforehand."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from thrifty.call import Answer, Call, Receipt, Sampling
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt._asking import Asking, output_room
from thrifty.methods.prompt._system import conversation_tokens, instruct, instruct_late, prompt_tokens
from thrifty.spend import total_spend


@dataclass(frozen=True, kw_only=True)
class Tale(Rewrite):
    """Asks the model how many tokens a question needs, and then to reason step by step in fewer than that.

    `estimator = "ask"` is TALE-EP: one short call with the last user message alone (no context, images or history),
    whose reply holds the budget as [[n]]; it is billed under this method's name and its cost is in the receipt.
    `"fixed"` states `tokens` for every question and asks nothing: what `search_budget` found on your own tasks
    (`recipes/tale` runs it over a file of them). The budget is raised to `least` and lowered to `most` and to what
    the account and max_tokens leave. A reply without a budget, and a question without text or of more than
    `question_tokens` (asking would read it twice), takes `fallback`; where that is 0 the call goes on unchanged. The
    limit is soft: nothing is cut. A budget far below what the question needs makes models write more, not less (the
    paper's token elasticity): that is what `least` is for.

    The estimate spends from an account that leaves the answer its prompt, `keep` output tokens and one call. When that
    is not there the call goes on unchanged (or BudgetExceeded is raised, when the plan says refuse).

    The budget changes from question to question, so in a conversation the system message that states it breaks the
    provider's cached prefix; the receipt's `breaks_cached` says by how many tokens. `place = "turn"` states it right
    before the last user message instead and breaks nothing, for models whose template allows that.

    The answering call's sentence is the paper's, in the system message (the paper has it after the question). The
    estimating prompt is OURS; only the form of its reply, [[n]], is the paper's. The released code takes a reply
    without a number as a budget of -1, and states no budget where the question lacks its trigger line; here neither
    can happen unseen. TALE-PT, which trains the model, is no part of this method."""

    name = "tale"
    paper = "Token-Budget-Aware LLM Reasoning (Han et al. 2024, arXiv:2412.18547)"
    needs = frozenset({"text", "sampling"})
    no_identity = "its prompt is what it does; only a reply without a budget leaves the call as it was"

    estimator: str = knob("ask", "where the budget comes from", choices=("ask", "fixed"))
    tokens: int = knob(100, "budget of every question when `fixed`", low=1, high=100_000, log=True)
    fallback: int = knob(0, "budget where none can be estimated; 0 states none", low=0, high=100_000)
    least: int = knob(1, "smallest budget stated", low=1, high=100_000, log=True)
    most: int = knob(100_000, "largest budget stated", low=1, high=100_000, log=True)
    place: str = knob("system", "where it is stated: with the system, or at the turn", choices=("system", "turn"))
    estimate_tokens: int = knob(64, "output tokens at most in the estimate, thinking included", low=1, high=100_000)
    question_tokens: int = knob(8000, "a longer question is not estimated", low=1, high=10_000_000, log=True)
    keep: int = knob(64, "output tokens that the estimate leaves for the answer", low=1, high=100_000, log=True)
    temperature: float = knob(0.0, "of the estimate", low=0.0, high=2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.most:
            raise InvalidInput(f"tale: least = {self.least}, most = {self.most}: most must be at least least")

    async def rewrite(self, call: Call) -> Call:
        before = prompt_tokens(call)
        longest = self._state(call, self.most)
        sampling = Sampling(temperature=self.temperature, max_tokens=self.estimate_tokens)
        asked = Asking(self.name, call, sampling, keep=self.keep, answering=longest)
        try:
            estimate, source = await self._estimate(call, asked)
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            reason = f"the budget cannot hold the estimate and the answer ({error.resource}): no budget stated"
            return call.with_receipt(Receipt(self.name, False, reason, before, before))
        if estimate is None:
            return call.with_receipt(
                Receipt(self.name, False, source, before, before, spend=asked.spend, work=asked.work)
            )
        bounded = min(max(estimate, self.least), self.most)
        room = output_room(longest)
        budget = bounded if room is None else min(bounded, room)
        notes = [f"asked for fewer than {budget} tokens ({source})"]
        if bounded != estimate:
            notes.append(f"{estimate} is outside {self.least} to {self.most}")
        if budget < bounded:
            notes.append(f"lowered from {bounded}, for no more are left")
        broken = conversation_tokens(call) if self.place == "system" and self.estimator == "ask" else 0
        if broken:
            notes.append(f"{broken} tokens of the conversation are no longer behind a stable prefix")
        changed = self._state(call, budget)
        detail = {"budget": budget, "estimate": estimate, "breaks_cached": broken}
        receipt = Receipt(
            self.name,
            True,
            "; ".join(notes),
            before,
            prompt_tokens(changed),
            spend=asked.spend,
            work=asked.work,
            detail=detail,
        )
        return changed.with_receipt(receipt)

    def _state(self, call: Call, budget: int) -> Call:
        return (instruct if self.place == "system" else instruct_late)(call, instruction(budget))

    async def _estimate(self, call: Call, asked: Asking) -> tuple[int | None, str]:
        """A budget and where it comes from; no budget, and why there is none."""
        if self.estimator == "fixed":
            return self.tokens, "fixed"
        question = call.question()
        why = "the question has no text to estimate from"
        if question:
            prompt = estimate_prompt(question)
            alone = replace(call.on_behalf(self.name), messages=({"role": "user", "content": prompt},))
            if (size := prompt_tokens(alone) or 0) > self.question_tokens:
                why = f"an estimate would read {size} tokens, over {self.question_tokens}"
            elif (found := parse_budget(await asked(prompt))) is not None:
                return found, "the model's estimate"
            else:
                why = "the estimate could not be read"
        return (self.fallback, f"{why}: the fallback") if self.fallback else (None, f"{why}: no budget stated")


# -- prompts and the reply -----------------------------------------------------------------------------------


def instruction(budget: int | None) -> str:
    """What the answering call is told; None: the plain chain of thought that budgets are compared with.

    >>> instruction(50)
    "Let's think step by step and use less than 50 tokens."
    """
    return "Let's think step by step" + (f" and use less than {budget} tokens." if budget is not None else ".")


def estimate_prompt(question: str) -> str:
    """The question of the estimating call; the question is quoted as it is, whatever it holds."""
    return (
        "How many tokens does a short but complete and correct solution of the task below take, reasoning included? "
        "Do not solve it. Reply with the number alone, in double square brackets, such as [[120]].\n\n"
        f"Task:\n{question}"
    )


def parse_budget(text: str) -> int | None:
    """The first [[n]] of a reply, at least 1; None when there is none.

    >>> parse_budget("Budget: [[ 1,200 tokens ]], not [[7]]"), parse_budget("[[-1]] or [[0]]"), parse_budget("50")
    (1200, None, None)
    """
    for found in _BUDGET.finditer(text):
        if n := int(found[1].replace(",", "")):
            return n
    return None


_BUDGET = re.compile(r"\[\[\s*([0-9]{1,3}(?:,[0-9]{3}){1,2}|[0-9]{1,9})\s*(?:tokens?\s*)?\]\]", re.IGNORECASE)


# -- the budget search ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trial:
    """One answer of a search. `output` counts tokens; `accepted`: the search went on from here."""

    budget: int | None
    """None: the plain chain of thought that the search starts from"""
    output: int
    correct: bool
    accepted: bool


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search found for one question."""

    budget: int | None
    """the last accepted one; None: no budget was better than the plain chain of thought"""
    answer: Answer
    """under that budget: a short correct answer, unless not even the plain one was correct"""
    trials: tuple[Trial, ...]
    ended: str
    """why: wrong, dearer, smallest, the resource that ran out, or what cut the last answer short (budget, length)"""
    paid: tuple[Answer, ...]
    """every answer of the search, in order"""

    @property
    def cheapest(self) -> Trial | None:
        """The correct trial with the fewest output tokens, the earliest of equals: where the elasticity curve is
        lowest. None when no answer was correct."""
        return min((t for t in self.trials if t.correct), key=lambda t: t.output, default=None)

    def receipt(self) -> Receipt:
        """The search as a receipt under the name `tale`: what it cost, and output tokens before and after."""
        spend = total_spend(a.spend for a in self.paid)
        detail = {"budgets": [t.budget for t in self.trials], "outputs": [t.output for t in self.trials]}
        return Receipt(
            Tale.name,
            self.budget is not None,
            f"{len(self.trials)} trials, ended: {self.ended}",
            self.trials[0].output,
            self.answer.spend.output,
            spend=spend,
            detail={**detail, "budget": self.budget},
        )


async def search_budget(
    ask: Callable[[int | None], Awaitable[Answer]],
    correct: Callable[[Answer], Awaitable[bool]],
    *,
    accept: Literal["cheaper", "correct"] = "cheaper",
) -> Searched:
    """Searches the budget of one question by halving, with a judge of its answers (the paper's section 4).

    The plain answer comes first: `ask(None)`. When it is correct its output tokens are the first budget b, and b // 2
    is tried again and again. `accept="cheaper"` is the paper's greedy search for the optimal budget: go on while the
    answer stays correct and takes fewer output tokens than the one before. `"correct"` goes on while it stays correct,
    whatever it takes: that is the smallest budget, and its trials are the token elasticity curve, whose lowest point
    `Searched.cheapest` is. An answer that was cut short (by max_tokens or the account) counts as wrong whatever it
    says, for it would look like a short one. The search ends at a budget of 1, and, with what was found, where the
    account has no room for the next trial (BudgetExceeded is raised only when there is none for the plain answer).

    `ask(budget)` answers the question under a budget, as `asker` makes it. At most 1 + log2(b) answers are paid for.
    """
    if accept not in ("cheaper", "correct"):
        raise InvalidInput(f"accept = {accept!r}: 'cheaper' or 'correct' is needed")
    best = await ask(None)
    right = best.finish not in CUT and await correct(best)
    trials, paid = [Trial(None, best.spend.output, right, right)], [best]
    budget, found, ended = best.spend.output, None, "smallest" if right else _wrong(best)
    while right and budget // 2 >= 1:
        try:
            answer = await ask(budget // 2)
        except BudgetExceeded as error:
            ended = error.resource
            break
        paid.append(answer)
        good = answer.finish not in CUT and await correct(answer)
        went = good and (accept == "correct" or answer.spend.output < best.spend.output)
        trials.append(Trial(budget // 2, answer.spend.output, good, went))
        if not went:
            ended = "dearer" if good else _wrong(answer)
            break
        budget //= 2
        found, best = budget, answer
    return Searched(found, best, tuple(trials), ended, tuple(paid))


CUT = ("budget", "length")
"""Finish reasons of an answer that had more to say."""


def _wrong(answer: Answer) -> str:
    return answer.finish if answer.finish in CUT else "wrong"


def budget_within(found: Sequence[Searched], share: float = 0.9) -> int:
    """The smallest budget that at least `share` of the found budgets are within: what to state for every question.

    Questions without a found budget do not count. Raises InvalidInput where none has one, or for a share not above 0
    and at most 1."""
    budgets = sorted(s.budget for s in found if s.budget is not None)
    if not budgets or not 0 < share <= 1:
        raise InvalidInput(
            f"{len(budgets)} found budgets, share {share:g}: one at least, and a share in (0, 1], is needed"
        )
    return budgets[math.ceil(Fraction(share) * len(budgets)) - 1]


def asker(
    next: Callable[[Call], Awaitable[Answer]], call: Call, place: str = "system"
) -> Callable[[int | None], Awaitable[Answer]]:
    """Asks `call` under one budget after another, billed under the name `tale` on the call's account.

    `next` is a Pipeline (build it without `tale`) or an engine's `generate`. The call is sent silently and otherwise
    as it is; that the sentence reaches the model is not left to a trigger line in the question."""
    labels = replace(call.labels, method=Tale.name)
    state = instruct if place == "system" else instruct_late

    async def ask(budget: int | None) -> Answer:
        return await next(state(replace(call, labels=labels, emit=None), instruction(budget)))

    return ask
