"""Plan-and-Budget: split a question into sub-questions and give each a share of the answer's budget."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.call import Call, Receipt, Sampling
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt._asking import Asking, output_room
from thrifty.methods.prompt._system import instruct, prompt_tokens

SCHEDULES = ("constant", "linear", "polynomial", "exponential", "cosine")
MOST_STEPS = 5
TOKENS_PER_WORD = 1.3
"""English prose; only used to turn what is left on an account into words"""


@dataclass(frozen=True, kw_only=True)
class PlanAndBudget(Rewrite):
    """Plans sub-questions, rates difficulty and credits, and states a word budget for each in one answering
    call.

    `planning = "two"` makes the paper's two calls: sub-questions with a hint each, then a level from 1 to 5
    with a credit for each sub-question. `"one"` asks for all of that at once, and `"none"` makes no call (one
    step, level `level`), for models too small to plan. The level chooses the total from `levels`, lowered to
    what the account and the call's max_tokens still allow; credits times the schedule's decay share it out
    exactly. A reply that cannot be read falls back to one step or to equal credits at level `level`, and the
    receipt says which.

    Planning is billed under this method's name, and its receipt's Spend is the sum. It spends from a child
    account that leaves the answer its prompt, `keep` output tokens and one call; when that is not there, the
    call goes on unchanged (or BudgetExceeded is raised, when the plan says refuse). Planning sees the last
    user message, not the context.

    The prompts are ours, written from the paper's description. As in the released code the budgets are words
    by default."""

    name = "plan-and-budget"
    paper = (
        "Plan and Budget: Effective and Efficient Test-Time Scaling on Large Language Model Reasoning "
        "(Lin et al. 2025, arXiv:2505.16122)"
    )
    needs = frozenset({"text", "sampling"})
    no_identity = "it always states a budget in the prompt"

    planning: str = knob("two", "planning calls: two, one with all in it, or none", choices=("two", "one", "none"))
    schedule: str = knob("polynomial", "how budgets decay from step to step", choices=SCHEDULES)
    power: float = knob(2.0, "exponent of the polynomial schedule", low=0.0, high=10.0)
    base: float = knob(0.9, "base of the exponential schedule", low=0.01, high=1.0)
    levels: tuple[int, ...] = knob((200, 250, 350, 450, 600), "total budget at levels 1 to 5", low=1, high=1_000_000)
    level: int = knob(3, "level where none is asked for or none can be read", low=1, high=5)
    unit: str = knob("words", "what the budgets count", choices=("words", "tokens"))
    plan_tokens: int = knob(256, "output tokens at most in each planning call", low=1, high=100_000, log=True)
    keep: int = knob(64, "output tokens that planning leaves for the answer", low=1, high=100_000, log=True)
    temperature: float = knob(0.1, "of the planning calls", low=0.0, high=2.0)
    top_p: float = knob(0.9, "of the planning calls", low=0.01, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.levels) != 5 or list(self.levels) != sorted(self.levels):
            raise InvalidInput(
                f"plan-and-budget: knob levels = {list(self.levels)!r} is not allowed: "
                "five budgets, ascending, are needed"
            )

    async def rewrite(self, call: Call) -> Call:
        before = prompt_tokens(call)
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p, max_tokens=self.plan_tokens)
        asked = Asking(self.name, call, sampling, keep=self.keep)
        try:
            outline, notes = await self._outline(call, asked)
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            reason = f"the budget cannot hold the planning calls and the answer ({error.resource}): not planned"
            return call.with_receipt(
                Receipt(self.name, False, reason, before, before, spend=asked.spend, work=asked.work)
            )
        wanted = self.levels[outline.level - 1]
        total = min(wanted, self._room(call, wanted))
        parts = allocate_tokens(outline.credits, total, self.schedule, self.power, self.base)
        changed = instruct(call, solve_prompt(outline, parts, self.unit))
        if total < wanted:
            notes.append(f"lowered from {wanted} to {total} {self.unit}, which is what is left")
        reason = "; ".join([f"{len(parts)} steps share {total} {self.unit} at level {outline.level}", *notes])
        detail = {"level": outline.level, "credits": list(outline.credits), "budgets": parts}
        after = prompt_tokens(changed)
        return changed.with_receipt(
            Receipt(self.name, True, reason, before, after, spend=asked.spend, work=asked.work, detail=detail)
        )

    async def _outline(self, call: Call, asked: Asking) -> tuple[Outline, list[str]]:
        """Makes the planning calls; the notes say what could not be read."""
        question = call.question()
        alone = Outline(self.level, (DIRECT,), (100.0,))
        if self.planning == "none":
            return alone, ["no planning call"]
        if self.planning == "one":
            whole = parse_outline(await asked(ONE_PROMPT.format(question=question)))
            return (alone, ["the plan could not be read: one step"]) if whole is None else (whole, [])
        steps = parse_steps(await asked(PLAN_PROMPT.format(question=question)))
        notes = []
        if not steps:
            steps, notes = (DIRECT,), ["the plan could not be read: one step"]
        equal = Outline(self.level, steps, (100.0 / len(steps),) * len(steps))
        try:
            reply = await asked(CREDIT_PROMPT.format(question=question, steps=_numbered(steps)))
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            return equal, [*notes, f"no budget ({error.resource}) to ask for credits: equal ones"]
        rated = parse_credits(reply, len(steps))
        if rated is None:
            return equal, [*notes, f"the credits could not be read: equal ones at level {self.level}"]
        return Outline(rated[0], steps, rated[1]), notes

    def _room(self, call: Call, wanted: int) -> int:
        """What the account and max_tokens leave for the answer, in this method's unit; `wanted` without limits."""
        room = output_room(call)
        return wanted if room is None else max(1, int(room / (TOKENS_PER_WORD if self.unit == "words" else 1.0)))


# -- the core, in pure functions -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outline:
    """A question's level, 1 to 5, its steps and their credits, which sum to 100."""

    level: int
    steps: tuple[str, ...]
    credits: tuple[float, ...]


def decay(schedule: str, n: int, power: float = 2.0, base: float = 0.9) -> list[float]:
    """Weights d_i of steps i = 0..n-1, none rising and none zero: constant 1, linear n-i, polynomial
    (n-i)^power, exponential base^i, cosine 0.5 (1 + cos(pi i / (n-1))) + 0.1 (1 for a single step).

    >>> decay("polynomial", 3)
    [9.0, 4.0, 1.0]
    """
    if schedule not in SCHEDULES:
        raise InvalidInput(f"schedule {schedule!r}: one of {', '.join(SCHEDULES)} is needed")
    if schedule == "constant" or n == 1:
        return [1.0] * n
    if schedule == "linear":
        return [float(n - i) for i in range(n)]
    if schedule == "polynomial":
        return [float(n - i) ** power for i in range(n)]
    if schedule == "exponential":
        return [base**i for i in range(n)]
    return [0.5 * (1 + math.cos(math.pi * i / (n - 1))) + 0.1 for i in range(n)]


def allocate_tokens(
    credits: Sequence[float], total: int, schedule: str = "polynomial", power: float = 2.0, base: float = 0.9
) -> list[int]:
    """Splits `total` by credit times decay: floors first, then the rest one each to the largest shares.

    The parts sum to `total` exactly. This is the paper's own rule for the rest (`thrifty.allocate` gives it
    to the largest fractions instead). Floors have a tolerance of 1e-9, so that a share that is a whole number
    never loses one to rounding.

    >>> allocate_tokens([50, 50], 250, "polynomial")
    [200, 50]
    """
    if not credits or min(credits) < 0 or not sum(credits) > 0 or total < 0:
        raise InvalidInput(f"credits {list(credits)}, total {total}: credits of at least 0, one above 0, are needed")
    weights = [c * d for c, d in zip(credits, decay(schedule, len(credits), power, base), strict=True)]
    whole = sum(weights)
    parts = [math.floor(total * w / whole + 1e-9) for w in weights]
    by_share = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    for i in by_share[: total - sum(parts)]:
        parts[i] += 1
    return parts


def bam(complexity: Sequence[float], exponents: Sequence[float], total: float) -> list[float]:
    """The budgets b that minimise sum_i c_i / b_i^a_i under sum b = total (the paper's Budget Allocation
    Model).

    b_i = (a_i c_i / lambda)^(1 / (a_i + 1)), where lambda makes them sum to `total`. With one common exponent
    that is total * (a c_i)^(1/(a+1)) / sum_k (...)_k; with mixed ones there is no closed form, so lambda is
    found by bisection on its logarithm. Needs c > 0, a > 0, total > 0.

    >>> [round(b, 6) for b in bam([1, 16], [1, 1], 100)]
    [20.0, 80.0]
    """
    if not complexity or len(complexity) != len(exponents):
        raise InvalidInput(f"{len(complexity)} complexities, {len(exponents)} exponents: one of each a step is needed")
    if min(*complexity, *exponents, total) <= 0 or not math.isfinite(sum(complexity) + sum(exponents) + total):
        raise InvalidInput("the allocation needs complexities, exponents and a total above 0")
    logs = [math.log(a * c) for a, c in zip(exponents, complexity, strict=True)]

    def log_parts(log_lambda: float) -> list[float]:
        return [(x - log_lambda) / (a + 1) for x, a in zip(logs, exponents, strict=True)]

    # At `low` one part alone reaches the total; at `high` none is above an n-th of it: it crosses in between.
    n, log_total = len(logs), math.log(total)
    low = max(x - (a + 1) * log_total for x, a in zip(logs, exponents, strict=True))
    high = max(x - (a + 1) * (log_total - math.log(n)) for x, a in zip(logs, exponents, strict=True))
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(math.exp(p) for p in log_parts(middle)) > total:
            low = middle
        else:
            high = middle
    parts = [math.exp(p) for p in log_parts(high)]
    whole = math.fsum(parts)
    return [p * total / whole for p in parts]


# -- prompts and their replies -------------------------------------------------------------------------------

DIRECT = "Solve the question directly."

PLAN_PROMPT = (
    "Break the question below into 2 to 5 smaller questions that lead to its answer, in order; an easy "
    "question needs fewer. Do not solve anything. Write one a line, numbered, with a hint in brackets:\n"
    "1. first smaller question (hint)\n2. second smaller question (hint)\n\nQuestion: {question}"
)
CREDIT_PROMPT = (
    "Rate the difficulty of the question below from 1 (very easy) to 5 (very hard), and divide 100 credits "
    "over its smaller questions: more credits to those that need more thought. Do not solve anything. "
    'Reply with JSON only, such as {{"level": 3, "credits": [40, 35, 25]}}.\n\n'
    "Question: {question}\n\nSmaller questions:\n{steps}"
)
ONE_PROMPT = (
    "Break the question below into 2 to 5 smaller questions, in order; an easy question needs fewer. Rate "
    "the whole from 1 (very easy) to 5 (very hard), and divide 100 credits over the smaller questions by the "
    "thought they need. Do not solve anything. Reply with JSON only, such as "
    '{{"level": 2, "steps": [{{"ask": "...", "credit": 60}}, {{"ask": "...", "credit": 40}}]}}.\n\n'
    "Question: {question}"
)


def solve_prompt(outline: Outline, budgets: Sequence[int], unit: str = "words") -> str:
    """What the answering call is told: the level, and each step with its budget."""
    lines = [f"The question has difficulty {outline.level} of 5. Answer it step by step, within these budgets:"]
    for i, (step, most) in enumerate(zip(outline.steps, budgets, strict=True), 1):
        lines.append(f"{i}. {step} Think little: use at most {most} {unit[:-1] if most == 1 else unit} for this step.")
    lines.append("Then give the final answer.")
    return "\n".join(lines)


def parse_steps(text: str) -> tuple[str, ...]:
    """The numbered lines of a plan, at most five; empty when there are none.

    >>> parse_steps("Sure!\\n1. How many eggs? (count)\\n2) How many break?")
    ('How many eggs? (count)', 'How many break?')
    """
    found = re.findall(r"(?m)^[ \t]*\d{1,2}[.)][ \t]+(\S[^\n]*)$", text)
    return tuple(step.strip() for step in found[:MOST_STEPS])


def parse_credits(text: str, n: int) -> tuple[int, tuple[float, ...]] | None:
    """Level and n credits, scaled to sum to 100, from a reply with a JSON object; None when they cannot be
    read.

    >>> parse_credits('Here: {"level": 2, "credits": [3, 1]}', 2)
    (2, (75.0, 25.0))
    """
    data = _first_object(text)
    return None if data is None else _rated(data.get("level"), data.get("credits"), n)


def parse_outline(text: str) -> Outline | None:
    """Level, steps and credits from the one planning call's JSON; None when they cannot be read."""
    data = _first_object(text)
    steps = data.get("steps") if data else None
    if not data or not isinstance(steps, list) or not 1 <= len(steps) <= MOST_STEPS:
        return None
    if not all(isinstance(s, dict) and isinstance(s.get("ask"), str) and s["ask"].strip() for s in steps):
        return None
    rated = _rated(data.get("level"), [s.get("credit") for s in steps], len(steps))
    asks = tuple(" ".join(s["ask"].split()) for s in steps)
    return None if rated is None else Outline(rated[0], asks, rated[1])


def _rated(level: Any, credits: Any, n: int) -> tuple[int, tuple[float, ...]] | None:
    if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= 5:
        return None
    if not isinstance(credits, list) or len(credits) != n:
        return None
    good = all(isinstance(c, (int, float)) and not isinstance(c, bool) and 0 <= c <= 1e6 for c in credits)
    if not good or not sum(credits) > 0:
        return None
    return level, tuple(100.0 * c / sum(credits) for c in credits)


def _first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a reply, whatever stands around it."""
    reader = json.JSONDecoder()
    for at in [m.start() for m in re.finditer(r"\{", text)][:20]:
        try:
            data, _ = reader.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict):
            return data
    return None


def _numbered(steps: Sequence[str]) -> str:
    return "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
