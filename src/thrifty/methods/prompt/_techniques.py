"""Nine ways to prompt for code, from one call to four: what they add to the prompt, and the calls they make first.

A technique of one call adds a text. One of several makes calls of its own (a plan, a draft, a review) and adds what
came of them, so that the answer is always the last, ordinary call: it streams, can be opened, and passes through what
stands below. Techniques never execute code. All words and examples are ours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

Ask: TypeAlias = Callable[[str], Awaitable[str]]
"""Asks the model one prompt of the technique's own and gives its reply."""

EXAMPLES: tuple[tuple[str, str, str], ...] = (
    (
        "Write a function second_largest(xs) that returns the second largest different number of a list, or None.",
        "Equal numbers count once, so take a set; with fewer than two members there is no second; else sort and take "
        "the one before the last.",
        "def second_largest(xs):\n    distinct = sorted(set(xs))\n"
        "    return distinct[-2] if len(distinct) > 1 else None",
    ),
    (
        "Write a function count_vowels(text) that counts the vowels a, e, i, o, u, in either case.",
        "Lower the case first, then count the letters that are among the five.",
        'def count_vowels(text):\n    return sum(letter in "aeiou" for letter in text.lower())',
    ),
    (
        "Write a function rotate(xs, k) that moves every member of a list k places to the right, around the end.",
        "An empty list stays empty; k may be longer than the list, so take the remainder; then the last k come first.",
        "def rotate(xs, k):\n    if not xs:\n        return []\n    k %= len(xs)\n"
        "    return xs[-k:] + xs[:-k] if k else list(xs)",
    ),
)
"""Task, reasoning, code."""


def _shown(reasoned: bool) -> str:
    parts = []
    for task, why, code in EXAMPLES:
        reasoning = f"Reasoning: {why}\n" if reasoned else ""
        parts.append(f"Task: {task}\n{reasoning}Code:\n{code}")
    head = "Solve the task in the manner of these examples"
    return f"{head}, reasoning first:\n\n" + "\n\n".join(parts) if reasoned else f"{head}:\n\n" + "\n\n".join(parts)


STATED: Mapping[str, str] = {
    "zero-shot": "",
    "zero-shot-cot": "Think step by step before you write the code.",
    "few-shot": _shown(reasoned=False),
    "few-shot-cot": _shown(reasoned=True),
    "persona": (
        "You are a programmer of long experience. You read a task to its end, mind the corner cases, and write code "
        "that is correct before it is clever."
    ),
}
"""What a technique of one call adds; the same for every call."""

PLAN = "Write a short numbered plan of steps for the task below. Write no code.\n\nTask:\n{task}"
FOLLOW = "Follow this plan, and depart from it where it is wrong:\n\n{plan}"
REVIEW = (
    "Review the answer to the task below: name each mistake and each missed corner case in one line. Write no new "
    "answer.\n\nTask:\n{task}\n\nAnswer:\n{draft}"
)
REFINE = (
    "An earlier attempt and a review of it follow. Write a better answer that stands by itself.\n\n"
    "Attempt:\n{draft}\n\nReview:\n{review}"
)
HINTED = "{task}\n\nHint: the answer is close to this one:\n{draft}"
HINT = "Hint: the answer is close to what stands below; take over what is right in it.\n\n{draft}"
TRACE = (
    "Explain the code below line by line, follow it through one example of the task, and say at the end whether it "
    "does what the task asks. Write no new code.\n\nTask:\n{task}\n\nCode:\n{draft}"
)
DEBUG = (
    "An earlier attempt and its explanation follow. If it is wrong, correct it; if it is right, give it as it is.\n\n"
    "Attempt:\n{draft}\n\nExplanation:\n{review}"
)


async def self_planning(task: str, ask: Ask, rounds: int) -> str:
    """One call for a plan (Jiang et al. 2024)."""
    return FOLLOW.format(plan=await ask(PLAN.format(task=task)))


async def self_refine(task: str, ask: Ask, rounds: int) -> str:
    """A draft and a review of it (Madaan et al. 2023), once."""
    draft = await ask(task)
    return REFINE.format(draft=draft, review=await ask(REVIEW.format(task=task, draft=draft)))


async def progressive_hint(task: str, ask: Ask, rounds: int) -> str:
    """Drafts, each with the one before as its hint, until two are alike or `rounds` are made (Zheng et al. 2023)."""
    draft = await ask(task)
    for _ in range(rounds - 1):
        again = await ask(HINTED.format(task=task, draft=draft))
        alike, draft = again.split() == draft.split(), again
        if alike:
            break
    return HINT.format(draft=draft)


async def self_debug(task: str, ask: Ask, rounds: int) -> str:
    """A draft and its explanation ("rubber duck", Chen et al. 2023), once; no test is run."""
    draft = await ask(task)
    return DEBUG.format(draft=draft, review=await ask(TRACE.format(task=task, draft=draft)))


ASKING: Mapping[str, Callable[[str, Ask, int], Awaitable[str]]] = {
    "self-planning": self_planning,
    "self-refine": self_refine,
    "progressive-hint": progressive_hint,
    "self-debug": self_debug,
}
"""Techniques that make calls first: `(task, ask, rounds)` gives what they add."""

TECHNIQUES: tuple[str, ...] = (*STATED, *ASKING)
