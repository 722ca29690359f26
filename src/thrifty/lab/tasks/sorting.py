"""Sorting: the letter that stands at a place of the sorted row, found by writing the sorted row down.

Sort 5 letters gdkbx, item 4        1b  2d  3g  4k
"""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass

from thrifty.errors import InvalidInput
from thrifty.lab.tasks.problem import Derivation, Problem, Slip, faultless

_LENGTH = {1: 4, 2: 5, 3: 7, 4: 8, 5: 9}


@dataclass(frozen=True)
class Sorting:
    name: str = "sorting"
    ways: int = 2

    def make(self, rng: random.Random, difficulty: int) -> Problem:
        n = _LENGTH[difficulty]
        row = rng.sample(string.ascii_lowercase, n)
        place = rng.randint(n // 2, n - 1)  # the first ones are seen at a glance
        question = f"Sort {n} letters {''.join(row)}, item {place}"
        answer = sorted(row)[place - 1]
        return Problem(self.name, difficulty, question, answer, self.derive(question, rng, faultless).lines)

    def derive(self, question: str, rng: random.Random, slip: Slip, way: int = 0) -> Derivation:
        """The row up to the place that is asked for; `way` 1 writes it from the largest down.

        A slip passes over the letter that is next.
        """
        row, place = _read(question)
        left = sorted(row, reverse=way == 1)
        lines = []
        numbers = range(1, place + 1) if way == 0 else range(len(row), place - 1, -1)
        letter = left[0]
        for number in numbers:
            if slip() and len(left) > 1:
                left.pop(0)
            if left:  # passing over letters may leave none: the last one is written again
                letter = left.pop(0)
            lines.append(f"{number}{letter}")
        return Derivation(tuple(lines), letter)

    def check(self, question: str, answer: str) -> bool:
        row, place = _read(question)
        return len(answer) == 1 and answer in row and sum(letter < answer for letter in row) == place - 1


def _read(question: str) -> tuple[str, int]:
    found = re.fullmatch(r"Sort ([0-9]) letters ([a-z]+), item ([0-9])", question)
    if not found or len(found[2]) != int(found[1]) or not 1 <= int(found[3]) <= int(found[1]):
        raise InvalidInput(f"{question[:80]!r} is no sorting question: Sort 3 letters gdk, item 2 is one")
    return found[2], int(found[3])
