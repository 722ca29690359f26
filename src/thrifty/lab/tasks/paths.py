"""Path finding: the way from a root to a node of a tree whose edges are listed in any order.

    Path a to f: Cb Fc Ba Da Ed        Fc  Cb  Ba        abcf

`Cb` says that c is reached from b. From the root one would have to guess at each fork; from the goal back, each step
is one look-up: the capital is the node, what follows it is where it is reached from.
"""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass

from thrifty.errors import InvalidInput
from thrifty.lab.tasks.problem import Derivation, Problem, Slip, faultless

_EDGES = {1: 2, 2: 3, 3: 5, 4: 6, 5: 8}
"""Edges of the path, by difficulty."""

_OTHERS = {1: 3, 2: 5, 3: 7, 4: 9, 5: 12}
"""Nodes beside the path."""


@dataclass(frozen=True)
class Paths:
    name: str = "paths"
    ways: int = 1

    def make(self, rng: random.Random, difficulty: int) -> Problem:
        nodes = rng.sample(string.ascii_lowercase, _EDGES[difficulty] + 1 + _OTHERS[difficulty])
        path, others = nodes[: _EDGES[difficulty] + 1], nodes[_EDGES[difficulty] + 1 :]
        edges = list(zip(path[1:], path[:-1], strict=True))
        inside = list(path[:-1])  # nothing hangs on the goal, so that it does not stand out as the deepest leaf
        for node in others:
            edges.append((node, rng.choice(inside)))
            inside.append(node)
        rng.shuffle(edges)
        question = f"Path {path[0]} to {path[-1]}: " + " ".join(f"{node.upper()}{parent}" for node, parent in edges)
        return Problem(self.name, difficulty, question, "".join(path), self.derive(question, rng, faultless).lines)

    def derive(self, question: str, rng: random.Random, slip: Slip, way: int = 0) -> Derivation:
        """From the goal back to the root. A slip takes another node for the parent."""
        root, goal, parents = _read(question)
        here, path, lines = goal, [goal], []
        while here != root:
            parent = parents[here]
            if slip():
                parent = rng.choice([node for node in (root, *parents) if node not in (*path, parent)] or [root])
            lines.append(f"{here.upper()}{parent}")
            path.append(parent)
            here = parent
        return Derivation(tuple(lines), "".join(reversed(path)))

    def check(self, question: str, answer: str) -> bool:
        root, goal, parents = _read(question)
        if len(answer) < 2 or answer[0] != root or answer[-1] != goal:
            return False
        return all(parents.get(node) == before for before, node in zip(answer, answer[1:], strict=False))


def _read(question: str) -> tuple[str, str, dict[str, str]]:
    found = re.fullmatch(r"Path ([a-z]) to ([a-z]):((?: [A-Z][a-z])+)", question)
    if not found:
        raise InvalidInput(f"{question[:80]!r} is no path question: Path a to c: Cb Ba is one")
    return found[1], found[2], {edge[0].lower(): edge[1] for edge in found[3].split()}
