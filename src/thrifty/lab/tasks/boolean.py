"""Boolean evaluation: the values of the last gates of a small circuit, evaluated gate by gate.

Gates A1 B0 C1 D=A&B E=D|C F=E^A, give DEF      A1&B0=D0  D0|C1=E1  E1^A1=F0        010
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from thrifty.errors import InvalidInput
from thrifty.lab.tasks.problem import Derivation, Problem, Slip, faultless

_GATES = {1: 2, 2: 4, 3: 6, 4: 9, 5: 12}
_INPUTS = 3
_NEAR = 5
"""A gate reads two of this many values before it, so that what is asked depends on what came before."""


@dataclass(frozen=True)
class Boolean:
    name: str = "boolean"
    ways: int = 1

    def make(self, rng: random.Random, difficulty: int) -> Problem:
        gates = _GATES[difficulty]
        words = [f"{chr(65 + i)}{rng.randint(0, 1)}" for i in range(_INPUTS)]
        for i in range(_INPUTS, _INPUTS + gates):
            first, second = rng.sample(range(max(0, i - _NEAR), i), 2)
            words.append(f"{chr(65 + i)}={chr(65 + first)}{rng.choice('&|^')}{chr(65 + second)}")
        asked = "".join(chr(65 + i) for i in range(_INPUTS + max(0, gates - 3), _INPUTS + gates))
        question = f"Gates {' '.join(words)}, give {asked}"
        made = self.derive(question, rng, faultless)
        return Problem(self.name, difficulty, question, made.answer, made.lines)

    def derive(self, question: str, rng: random.Random, slip: Slip, way: int = 0) -> Derivation:
        """Gate by gate, in the order of the question. A slip turns the gate's value round."""
        values, gates, asked = _read(question)
        lines = []
        for name, first, operation, second in gates:
            a, b = values[first], values[second]
            value = {"&": a & b, "|": a | b, "^": a ^ b}[operation] ^ slip()
            values[name] = value
            lines.append(f"{first}{a}{operation}{second}{b}={name}{value}")
        return Derivation(tuple(lines), "".join(str(values[name]) for name in asked))

    def check(self, question: str, answer: str) -> bool:
        values, gates, asked = _read(question)
        known = {name: bool(value) for name, value in values.items()}
        definitions = {name: rest for name, *rest in gates}

        def value(name: str) -> bool:
            if name not in known:
                first, operation, second = definitions[name]
                a, b = value(first), value(second)
                known[name] = (a and b) if operation == "&" else (a or b) if operation == "|" else a != b
            return known[name]

        return answer == "".join("1" if value(name) else "0" for name in asked)


def _read(question: str) -> tuple[dict[str, int], list[tuple[str, str, str, str]], str]:
    found = re.fullmatch(r"Gates ((?:[A-Z][01] )+)((?:[A-Z]=[A-Z][&|^][A-Z] ?)+), give ([A-Z]+)", question)
    if not found:
        raise InvalidInput(f"{question[:80]!r} is no question of gates: Gates A1 B0 C=A&B, give C is one")
    values = {word[0]: int(word[1]) for word in found[1].split()}
    gates = [(word[0], word[2], word[3], word[4]) for word in found[2].split()]
    return values, gates, found[3]
