"""Verifiable problems of graded difficulty: six families, each with a maker, a written derivation and a verifier.

    problem = make("paths", random.Random(0), 3)
    problem.question, problem.answer, problem.steps

Invariants: a problem is a function of the generator's state and the difficulty; every problem has an answer (puzzles
without a solution are not made); `check` reads the question alone and decides exactly, by another way than `steps`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from thrifty.errors import InvalidInput, nearest
from thrifty.lab.tasks.arithmetic import Arithmetic
from thrifty.lab.tasks.boolean import Boolean
from thrifty.lab.tasks.counting import Counting
from thrifty.lab.tasks.paths import Paths
from thrifty.lab.tasks.problem import DIFFICULTIES, Derivation, Family, Problem
from thrifty.lab.tasks.puzzles import Puzzles
from thrifty.lab.tasks.sorting import Sorting

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (Arithmetic(), Counting(), Sorting(), Paths(), Boolean(), Puzzles())
}
"""The task families by name."""


def family(name: str) -> Family:
    """The family of this name. Raises InvalidInput with the nearest name."""
    if name not in FAMILIES:
        raise InvalidInput(nearest(name, FAMILIES, "task family"))
    return FAMILIES[name]


def make(name: str, rng: random.Random, difficulty: int) -> Problem:
    """One problem. Raises InvalidInput for an unknown family or a difficulty outside 1 to 5."""
    if difficulty not in DIFFICULTIES:
        raise InvalidInput(f"difficulty {difficulty}: {DIFFICULTIES[0]} to {DIFFICULTIES[-1]} are allowed")
    return family(name).make(rng, difficulty)


def check(name: str, question: str, answer: str) -> bool:
    """Whether the answer is right. Raises InvalidInput for a question that is none of the family."""
    return family(name).check(question, answer.strip().rstrip("."))


__all__ = ["DIFFICULTIES", "FAMILIES", "Derivation", "Family", "Problem", "check", "family", "make"]
