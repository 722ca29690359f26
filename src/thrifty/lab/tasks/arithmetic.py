"""Multi-step arithmetic: a chain of additions and subtractions, worked out as running totals.

    Compute 27+5-8+6        27+5=32  32-8=24  24+6=30

Every running total, from the left and in the other order (from the last term back), lies in 0 to 99, and every term
after the first has one digit, and none occurs twice: a step is one small fact, and the next term is found by the last.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from thrifty.errors import InvalidInput
from thrifty.lab.tasks.problem import Derivation, Problem, Slip, faultless

_TERMS = {1: (2, 3), 2: (4, 5), 3: (6, 8), 4: (9, 11), 5: (12, 15)}
"""Terms after the first, by difficulty."""

_SIGNED = [*range(-9, 0), *range(1, 10)]


@dataclass(frozen=True)
class Arithmetic:
    name: str = "arithmetic"
    ways: int = 2

    def make(self, rng: random.Random, difficulty: int) -> Problem:
        low, high = _TERMS[difficulty]
        while True:
            start = rng.randint(0, 99)
            terms = rng.sample(_SIGNED, rng.randint(low, high))
            if _inside(start, terms) and _inside(start, terms[::-1]):
                break
        question = f"Compute {start}" + "".join(f"{term:+d}" for term in terms)
        return Problem(
            self.name, difficulty, question, str(start + sum(terms)), self.derive(question, rng, faultless).lines
        )

    def derive(self, question: str, rng: random.Random, slip: Slip, way: int = 0) -> Derivation:
        """`way` 1 takes the terms from the last one back."""
        total, terms = _read(question)
        lines = []
        for term in terms if way == 0 else terms[::-1]:
            after = total + term
            if slip():
                after = rng.choice([v for v in (after - 10, after - 1, after + 1, after + 10) if 0 <= v <= 99])
            after = min(99, max(0, after))  # what follows a slip may leave the range
            lines.append(f"{total}{term:+d}={after}")
            total = after
        return Derivation(tuple(lines), str(total))

    def check(self, question: str, answer: str) -> bool:
        start, terms = _read(question)
        return answer == str(start + sum(terms))


def _inside(total: int, terms: list[int]) -> bool:
    for term in terms:
        total += term
        if not 0 <= total <= 99:
            return False
    return True


def _read(question: str) -> tuple[int, list[int]]:
    if not re.fullmatch(r"Compute [0-9]+([+-][0-9])+", question):
        raise InvalidInput(f"{question[:80]!r} is no arithmetic question: Compute 27+5-8 is one")
    start, *terms = re.findall(r"[+-]?[0-9]+", question)
    return int(start), [int(term) for term in terms]
