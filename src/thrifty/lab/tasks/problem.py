"""Problem, Derivation, and what a task family does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

DIFFICULTIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Problem:
    """A question with its answer, and the steps of a faultless derivation."""

    family: str
    difficulty: int
    question: str
    answer: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Derivation:
    """One way through a problem: its lines, what it arrives at, and how many of its lines are slips.

    What follows a slip follows from it, so the answer need not be the right one.
    """

    lines: tuple[str, ...]
    answer: str
    slips: int = 0


Slip = Callable[[], bool]
"""Asked once a step: whether this step goes wrong."""


def faultless() -> bool:
    """The Slip that never happens."""
    return False


class Slips:
    """A Slip of a fixed rate; counts how often it said yes."""

    def __init__(self, rng: random.Random, rate: float) -> None:
        self.rng, self.rate, self.count = rng, rate, 0

    def __call__(self) -> bool:
        wrong = self.rng.random() < self.rate
        self.count += wrong
        return wrong


class Family(Protocol):
    """A kind of problem. `ways`: how many different derivations it has (`way` 0 is the usual one)."""

    @property
    def name(self) -> str: ...

    @property
    def ways(self) -> int: ...

    def make(self, rng: random.Random, difficulty: int) -> Problem:
        """A problem of difficulty 1 to 5."""
        ...

    def derive(self, question: str, rng: random.Random, slip: Slip, way: int = 0) -> Derivation:
        """Works the question out in lines; `rng` says what a slip writes. `slips` of the result is left at 0."""
        ...

    def check(self, question: str, answer: str) -> bool:
        """Whether the answer is right, decided from the question alone. Raises InvalidInput for a broken question."""
        ...
