"""Examples for the verifier: traces, the chains that verify them, and which chains are good enough to learn from.

A chain is written by deriving the problem anew, line by line beside the trace (the derivation of the trace's own
direction), and comparing: what the line should say, what it says, the verdict. The labels come from
`thrifty.lab.steps`, which decides by another way, from what a line claims. As in the paper a chain is kept only where
all its labels are the gold ones; a trace that goes a way of its own, which is right all the same, is so left out.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "thinker"))
from thinker_data import IGNORED, Documents, Mix  # noqa: E402

from thrifty.lab.steps import AGAIN, OTHER_WAY, Step, label  # noqa: E402
from thrifty.lab.tasks import DIFFICULTIES, Problem, family, make  # noqa: E402
from thrifty.lab.tasks.problem import faultless  # noqa: E402
from thrifty.lab.tokenizer import prompt  # noqa: E402
from thrifty.lab.traces import ANSWERS, CLOSE, OPEN, Habits, write  # noqa: E402
from thrifty.methods.search._wording import LINES, paragraphs_of  # noqa: E402

_GLANCE = re.compile(r"Wait, is (.+) right\? Yes\.")


@dataclass(frozen=True)
class Solution:
    """A trace of a problem as the verifier sees it: thinking, a blank line, the answer; or the beginning of one."""

    problem: Problem
    text: str
    whole: bool = True

    def steps(self) -> tuple[Step, ...]:
        """Its steps, labelled."""
        return label(self.problem.family, self.problem.question, self.text)

    def sound(self, steps: Sequence[Step]) -> bool:
        """The gold of the last word: of a whole one, whether its answer is right; of a beginning, whether the
        derivation it is in has no wrong line."""
        if self.whole:
            return bool(steps) and steps[-1].kind == "answer" and steps[-1].right
        here = [s for s in steps if s.derivation == steps[-1].derivation and s.kind != "glance"]
        return all(s.right for s in here)


def solution_of(problem: Problem, text: str) -> Solution:
    """From a model's whole output, tags included."""
    thinking, _, answer = text.removeprefix(OPEN).partition(CLOSE)
    return Solution(problem, f"{thinking.strip()}\n\n{answer.strip()}")


def beginning(solution: Solution, rng: random.Random) -> Solution:
    """The solution up to the end of any line of its thinking."""
    ends = [m.end() for m in re.finditer(r"[^\n]\n", solution.text)]
    return Solution(solution.problem, solution.text[: rng.choice(ends)], whole=False) if ends else solution


def chain_of(solution: Solution) -> str:
    """The verification of a solution, in the form that `Lines` reads."""
    problem, seen = solution.problem, set[str]()
    kin = family(problem.family)
    told: list[str] = []
    sound, said = True, None
    for paragraph in paragraphs_of(solution.text):
        head = paragraph[0]
        if head.startswith(ANSWERS[0]):
            said = head.removeprefix(ANSWERS[0])
            break
        if glance := _GLANCE.fullmatch(head):
            told.append(f"Wait {glance[1]} {_word(glance[1] in seen)}")
            continue
        turns = {AGAIN: "Wait", OTHER_WAY: "Alternatively"}
        lines = [turns[head]] if head in turns else []
        derived = kin.derive(problem.question, random.Random(0), faultless, int(head == OTHER_WAY and kin.ways > 1))
        expected = [*derived.lines, f"So {derived.answer}"]
        sound = True
        for i, line in enumerate(paragraph[len(lines) :]):
            wanted = expected[min(i, len(expected) - 1)]
            here = line if i < len(derived.lines) else line.split(",")[0].rstrip(".")
            sound = here == wanted
            lines.append(f"{wanted} {here} {_word(sound)}")
            if not sound:
                break
            seen.add(line)
        told.append("\n".join(lines))
    if solution.whole:
        sound = said == kin.derive(problem.question, random.Random(0), faultless).answer
    return "\n\n".join([*told, f"Answer: {'Yes' if sound else 'No'}"])


def agrees(chain: str, solution: Solution) -> bool:
    """The paper's filter: every label that the chain gives is the gold one, it is silent only where it may be (of
    what claims nothing, and after a wrong line of the same derivation), and so is its last word."""
    gold, reading = solution.steps(), LINES.read(chain, solution.text)
    if len(gold) != len(reading.labels):
        return False
    broken: set[int] = set()
    for step, told in zip(gold, reading.labels, strict=True):
        if told is None and step.claims and step.derivation not in broken:
            return False
        if told is not None and told != step.right:
            return False
        if told is False and step.kind != "glance":
            broken.add(step.derivation)
    return reading.correct == solution.sound(gold)


def predicted(labels: Sequence[bool | None], gold: Sequence[Step]) -> list[bool]:
    """What a chain says of every step: its label; wrong after a wrong line of the same derivation; else right."""
    broken: set[int] = set()
    said = []
    for told, step in zip(labels, gold, strict=True):
        said.append((step.derivation not in broken or step.kind == "answer") if told is None else told)
        if told is False and step.kind in ("line", "conclusion", "other"):
            broken.add(step.derivation)
    return said


@dataclass(frozen=True)
class Recipe:
    """What is drawn: see `config.toml`."""

    families: tuple[str, ...]
    written: float
    slips: tuple[float, ...]
    mistaken: float
    beginnings: float


class Chains(Documents):
    """Batches of solutions with their chains, by the thinker's own code: a batch depends on the seed and the step."""

    def __init__(self, config: dict[str, Any], own: Sequence[Solution]) -> None:
        data, training = config["data"], config["training"]
        names = {name: float(weight) for name, weight in data["families"].items() if weight}
        mix = Mix(names, (1,) * 5, (1,) * 5, 0, 0.0)
        super().__init__(
            mix, Habits(), int(config["seed"]), int(data["longest"]), int(training["tokens"]), int(training["chunk"])
        )
        self.recipe = Recipe(tuple(names), data["written"], tuple(data["slips"]), data["mistaken"], data["beginnings"])
        kept = [s for s in own if s.problem.family in names and agrees(chain_of(s), s)]
        self.kept, self.given = len(kept), len(own)
        wrong = [not all(step.right for step in s.steps()) for s in kept]
        self.own = {bad: [s for s, w in zip(kept, wrong, strict=True) if w == bad] for bad in (False, True)}

    def draw(self, rng: random.Random, step: int) -> Solution:  # type: ignore[override]
        """One solution, whole or a beginning, whose chain the filter keeps."""
        while True:
            solution = self._solution(rng)
            if rng.random() < self.recipe.beginnings:
                solution = beginning(solution, rng)
            if agrees(chain_of(solution), solution):
                return solution

    def _solution(self, rng: random.Random) -> Solution:
        bad = rng.random() < self.recipe.mistaken
        if rng.random() >= self.recipe.written and (pool := self.own[bad] or self.own[not bad]):
            return rng.choice(pool)
        names = list(self.mix.families)
        name = rng.choices(names, list(self.mix.families.values()))[0]
        rate = rng.choice(self.recipe.slips)
        habits = Habits(slip=rate, careful=rate / 2, direct=0.0, cut=0.0)
        return solution_of((problem := make(name, rng, rng.choice(DIFFICULTIES))), write(problem, rng, habits).text)

    def weights(self, labels: Tensor, emphasis: float) -> Tensor:
        """`emphasis` for the tokens of lines that end in ` not`, 1 for all others: [rows, length], as the labels."""
        weights = torch.ones_like(labels, dtype=torch.float32)
        ends = {self.tokenizer.token_to_id(piece) for piece in ("\n", "\n\n")}
        wrong = self.tokenizer.token_to_id(" not")
        for row, end in (labels == wrong).nonzero().tolist():
            start = end
            while start > 0 and int(labels[row, start - 1]) not in ends and int(labels[row, start - 1]) != IGNORED:
                start -= 1
            weights[row, start : end + 1] = emphasis
        return weights

    def encode(self, solution: Solution, rng: random.Random) -> tuple[list[int], list[int]]:  # type: ignore[override]
        """Ids and labels; only the chain is learned."""
        asked = self._ids(prompt(LINES.prompt(solution.problem.question, solution.text, solution.whole)))
        chain = [*self._ids(chain_of(solution)), self.end]
        return [*asked, *chain], [*[IGNORED] * len(asked), *chain]


def _word(right: bool) -> str:
    return "right" if right else "not"
