"""Puzzles with exact simulators: the Tower of Hanoi from any position, and checker jumping from any row.

    Hanoi 3a2b1b to c       3a>c+4=4,b  2b=b+0=4,b  1b=b+0=4,b              4
    Jump RR_BB              1R_RBB  2RBR_B  ...                             8

Hanoi asks for the fewest moves that bring all disks to a peg: from the largest disk down, a disk that is not where it
has to be costs 2^(disk-1) moves and sends all smaller ones to the third peg. In checker jumping R moves right and B
moves left, by one cell or over one checker of the other colour, until every R is right of every B; positions from which
that cannot be done are not asked. All solutions of one position have the same number of moves: what the checkers have
to travel, less one for every jump, and every R jumps, or is jumped by, each B on its right once.

After the puzzles of "The Illusion of Thinking" (Shojaee et al. 2025), with starting positions drawn at random.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from thrifty.errors import InvalidInput
from thrifty.lab.tasks.problem import Derivation, Problem, Slip, faultless

_PEGS = "abc"
_DISKS = {1: 3, 2: 4, 3: 6, 4: 7, 5: 8}
_CELLS = {1: 5, 2: 7, 3: 9, 4: 9, 5: 11}
_MOVES = {1: (2, 4), 2: (3, 8), 3: (5, 11), 4: (9, 15), 5: (12, 18)}
"""Moves that a checker position is from its goal, by difficulty."""


@dataclass(frozen=True)
class Puzzles:
    name: str = "puzzles"
    ways: int = 1
    hanoi: float = 0.7
    """share of Hanoi"""

    def make(self, rng: random.Random, difficulty: int) -> Problem:
        if rng.random() < self.hanoi:
            disks = range(_DISKS[difficulty], 0, -1)
            question = f"Hanoi {''.join(f'{disk}{rng.choice(_PEGS)}' for disk in disks)} to {rng.choice(_PEGS)}"
        else:
            question = f"Jump {rng.choice(_positions(_CELLS[difficulty], *_MOVES[difficulty]))}"
        made = self.derive(question, rng, faultless)
        return Problem(self.name, difficulty, question, made.answer, made.lines)

    def derive(self, question: str, rng: random.Random, slip: Slip, way: int = 0) -> Derivation:
        if question.startswith("Jump"):
            return _derive_jump(_read_jump(question), rng, slip)
        disks, goal = _read_hanoi(question)
        lines, total = [], 0
        for disk, peg in disks:
            away = (peg != goal) != slip()
            total += away << (disk - 1)
            after = goal if not away else next(p for p in _PEGS if p not in (peg, goal))
            lines.append(f"{disk}{peg}{'>' if away else '='}{goal}+{away << (disk - 1)}={total},{after}")
            goal = after
        return Derivation(tuple(lines), str(total))

    def check(self, question: str, answer: str) -> bool:
        if not answer.isdigit() or answer != str(int(answer)):
            return False
        if question.startswith("Jump"):
            fewest = moves_of_jump(_read_jump(question))
            if fewest is None:
                raise InvalidInput(f"{question[:80]!r} has no solution")
            return int(answer) == fewest
        disks, goal = _read_hanoi(question)
        return int(answer) == moves_of_hanoi(tuple(_PEGS.index(peg) for _, peg in disks[::-1]), _PEGS.index(goal))


# --- Hanoi ---


def moves_of_hanoi(pegs: tuple[int, ...], goal: int) -> int:
    """Fewest moves from a position (the peg of each disk, smallest first) to all on `goal`.

    By simulation: the shortest solution moves the smallest misplaced tower out of the way recursively, each move is
    made, and its legality checked.
    """
    state, moves = list(pegs), 0

    def bring(count: int, to: int) -> None:
        nonlocal moves
        if count == 0:
            return
        disk = count - 1
        if state[disk] == to:
            bring(count - 1, to)
            return
        bring(count - 1, 3 - state[disk] - to)
        if any(state[smaller] in (state[disk], to) for smaller in range(disk)):
            raise AssertionError("a larger disk would be moved onto or from under a smaller one")
        state[disk] = to
        moves += 1
        bring(count - 1, to)

    bring(len(state), goal)
    return moves


def _read_hanoi(question: str) -> tuple[list[tuple[int, str]], str]:
    found = re.fullmatch(r"Hanoi ((?:[1-9][abc])+) to ([abc])", question)
    disks = [(int(d), p) for d, p in re.findall(r"([1-9])([abc])", found[1])] if found else []
    if not found or [disk for disk, _ in disks] != list(range(len(disks), 0, -1)):
        raise InvalidInput(f"{question[:80]!r} is no puzzle: Hanoi 2a1b to c and Jump RR_BB are puzzles")
    return disks, found[2]


# --- checker jumping ---


def jumps(row: str) -> Iterator[str]:
    """The rows that one legal move makes of this one."""
    gap = row.index("_")
    for distance in (1, 2):
        for start, checker, other in ((gap - distance, "R", "B"), (gap + distance, "B", "R")):
            if not 0 <= start < len(row) or row[start] != checker:
                continue
            if distance == 2 and row[(start + gap) // 2] != other:
                continue
            cells = list(row)
            cells[start], cells[gap] = "_", checker
            yield "".join(cells)


@lru_cache(maxsize=1 << 17)
def moves_of_jump(row: str) -> int | None:
    """Fewest moves to a row whose every R is right of every B, by a search over all lines of play; None without a
    solution. No position comes twice, since no checker moves back."""
    if _solved(row):
        return 0
    rest = [moves for after in jumps(row) if (moves := moves_of_jump(after)) is not None]
    return 1 + min(rest) if rest else None


def _solved(row: str) -> bool:
    """The gap in the middle counts too: the puzzle ends with B...B_R...R."""
    blues = row.count("B")
    return row == "B" * blues + "_" + "R" * row.count("R")


@lru_cache(maxsize=64)
def _positions(cells: int, fewest: int, most: int) -> tuple[str, ...]:
    """Every row of so many cells with a solution of so many moves, at least one checker of each colour."""
    found = []
    for gap in range(cells):
        for bits in range(1, (1 << (cells - 1)) - 1):
            row = "".join("RB"[bits >> i & 1] for i in range(cells - 1))
            row = f"{row[:gap]}_{row[gap:]}"
            moves = moves_of_jump(row)
            if moves is not None and fewest <= moves <= most:
                found.append(row)
    return tuple(found)


def _derive_jump(row: str, rng: random.Random, slip: Slip) -> Derivation:
    """The position after every move, numbered; always the first move that still leads to the goal.

    A slip does not count the move. A position without a solution cannot come up, since the moves are right.
    """
    number, lines = 0, []
    while not _solved(row):
        row = next(after for after in jumps(row) if moves_of_jump(after) is not None)
        number += not slip()
        lines.append(f"{number}{row}")
    return Derivation(tuple(lines), str(number))


def _read_jump(question: str) -> str:
    found = re.fullmatch(r"Jump ([RB]*_[RB]*)", question)
    if not found:
        raise InvalidInput(f"{question[:80]!r} is no puzzle: Hanoi 2a1b to c and Jump RR_BB are puzzles")
    return found[1]
