"""Counting: how often a letter stands in a row of labelled letters, walked with a running count.

    Count b in AaBbCcDb     Aa0  Bb1  Cc1  Db2

The labels are A, B, C, ... and the count has one digit.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from thrifty.errors import InvalidInput
from thrifty.lab.tasks.problem import Derivation, Problem, Slip, faultless

_LENGTH = {1: (4, 6), 2: (7, 9), 3: (10, 14), 4: (15, 19), 5: (20, 26)}
_LETTERS = "abcd"


@dataclass(frozen=True)
class Counting:
    name: str = "counting"
    ways: int = 2

    def make(self, rng: random.Random, difficulty: int) -> Problem:
        while True:
            row = rng.choices(_LETTERS, k=rng.randint(*_LENGTH[difficulty]))
            target = rng.choice(_LETTERS)
            if row.count(target) <= 9:
                break
        labelled = "".join(f"{chr(65 + i)}{letter}" for i, letter in enumerate(row))
        question = f"Count {target} in {labelled}"
        return Problem(
            self.name, difficulty, question, str(row.count(target)), self.derive(question, rng, faultless).lines
        )

    def derive(self, question: str, rng: random.Random, slip: Slip, way: int = 0) -> Derivation:
        """`way` 1 walks from the end."""
        target, row = _read(question)
        count, lines = 0, []
        for label, letter in row if way == 0 else row[::-1]:
            hit = (letter == target) != slip()
            count = min(9, count + hit)
            lines.append(f"{label}{letter}{count}")
        return Derivation(tuple(lines), str(count))

    def check(self, question: str, answer: str) -> bool:
        target, _ = _read(question)
        return answer == str(question.partition(" in ")[2].count(target))


def _read(question: str) -> tuple[str, list[tuple[str, str]]]:
    found = re.fullmatch(r"Count ([a-z]) in ((?:[A-Z][a-z])+)", question)
    if not found:
        raise InvalidInput(f"{question[:80]!r} is no counting question: Count b in AaBbCc is one")
    row = found[2]
    return found[1], list(zip(row[::2], row[1::2], strict=True))
