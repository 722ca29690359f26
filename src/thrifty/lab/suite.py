"""The lab's problems as tasks of the bench, and the scorer that judges their answers by the family's verifier."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.bench.scorers import final_answer
from thrifty.bench.task import Task
from thrifty.errors import InvalidInput
from thrifty.lab.tasks import FAMILIES, check, family, make
from thrifty.lab.tokenizer import TEMPLATE

MIDDLE = (3,)
"""The difficulties at which thinking decides most: those that the thinker's gates were set at."""


@dataclass(frozen=True)
class LabVerifier:
    """Scores 1 or 0 with the exact verifier of a task family, from the question alone.

    Args:
        family: the family's name.
        question: the question; where it is missing, the last user message's text.
    """

    family: str
    question: str | None = None

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        question = self.question
        if question is None:
            said = [m.get("content") for m in task.get("messages", ()) if m.get("role") == "user"]
            question = str(said[-1]) if said else ""
        return float(check(self.family, question, answer_of(text)))


def answer_of(text: str) -> str:
    """The answer that a text gives: what it marks as final, else what follows its last "answer", else all of it.

    >>> [answer_of(t) for t in ("Answer: 24", "The answer is 24.", "so \\\\boxed{24}", "24", "**Final Answer:** 24")]
    ['24', '24', '24', '24', '24']
    """
    marked = final_answer(text)
    parts = re.split(r"answer(?: is)?:?\**\s*:?", marked, flags=re.IGNORECASE)
    return parts[-1].strip().rstrip(".").strip()


def is_thinker(model: str) -> bool:
    """Whether an engine's specification names the lab's thinker: the packaged one, or a folder with its chat template.

    >>> is_thinker("local:thinker"), is_thinker("smollm2")
    (True, False)
    """
    name = model.removeprefix("local:")
    template = Path(name) / "chat_template.jinja"
    return name == "thinker" or (template.is_file() and template.read_text(encoding="utf-8") == TEMPLATE)


def lab_tasks(
    n: int,
    seed: int,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    difficulties: Sequence[int] = MIDDLE,
    max_tokens: int = 640,
) -> list[Task]:
    """`n` different problems, the families and difficulties taken in turn. Task i depends on the seed, i and the
    questions before it alone, so a longer run begins with the shorter one.

    Raises InvalidInput for an unknown family, a difficulty outside 1 to 5, or more problems than there are.
    """
    if not families or not difficulties:
        raise InvalidInput("suite 'thinker': `families` and `difficulties` need at least one value each")
    kinds = [(family(name).name, difficulty) for difficulty in difficulties for name in families]
    asked: set[str] = set()
    tasks = []
    for number in range(n):
        name, difficulty = kinds[number % len(kinds)]
        rng = random.Random(f"thinker:{seed}:{number}")
        for _ in range(200):
            problem = make(name, rng, difficulty)
            if problem.question not in asked:
                break
        else:
            raise InvalidInput(f"suite 'thinker': {name} of difficulty {difficulty} has too few problems for n = {n}")
        asked.add(problem.question)
        tasks.append(
            Task(
                id=f"thinker-{seed}-{number}",
                messages=({"role": "user", "content": problem.question},),
                gold=problem.answer,
                scorer="lab",
                scorer_settings={"family": name, "question": problem.question},
                max_tokens=max_tokens,
                extra={"suite": "thinker", "family": name, "difficulty": difficulty},
            )
        )
    return tasks
