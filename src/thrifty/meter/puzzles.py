"""Four puzzles whose size is a knob, with exact simulators: Tower of Hanoi, checker jumping, river crossing, blocks.

A state is an immutable tuple, a move a tuple of names and numbers as an answer lists it. Invariants: `after` gives None
for every move that the rules forbid, and never raises for what an answer may say; `moves` gives all legal ones. Puzzles
after "The Illusion of Thinking" (Shojaee et al. 2025, arXiv:2506.06941), reconstructed from descriptions of it; the
wording of the prompts and the arrangement of the blocks are ours."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from thrifty.errors import InvalidInput

State: TypeAlias = tuple[Any, ...]
Move: TypeAlias = tuple[Any, ...]


class Puzzle(Protocol):
    """One instance of a puzzle."""

    name: ClassVar[str]

    @property
    def size(self) -> int:
        """The knob n."""

    @property
    def start(self) -> State:
        """Where it begins."""

    def moves(self, state: State) -> Iterator[Move]:
        """Every legal move."""

    def after(self, state: State, move: Move) -> State | None:
        """The state that a move leads to; None when the rules forbid it, or it is no move at all."""

    def solved(self, state: State) -> bool:
        """Whether the goal is reached."""

    def prompt(self) -> str:
        """The puzzle in words, with the form that an answer must have."""


def _ask(rules: str, task: str, form: str) -> str:
    return f"{rules}\n\n{task}\n\nEnd with one line that lists every move in order, as JSON: moves = {form}"


@dataclass(frozen=True, slots=True)
class Hanoi:
    """Tower of Hanoi with `size` disks on three pegs; 2^n - 1 moves at least. A state is the peg of each disk, smallest
    first; a move is (disk from 1, from peg, to peg)."""

    name: ClassVar[str] = "hanoi"
    size: int

    def __post_init__(self) -> None:
        _check(self.name, self.size, 1)

    @property
    def start(self) -> State:
        return (0,) * self.size

    def moves(self, state: State) -> Iterator[Move]:
        for disk, peg in enumerate(state, 1):
            for to in range(3):
                if self.after(state, (disk, peg, to)) is not None:
                    yield (disk, peg, to)

    def after(self, state: State, move: Move) -> State | None:
        if not _whole(move, 3):
            return None
        disk, source, target = move
        if not (1 <= disk <= self.size and 0 <= target <= 2 and source != target and state[disk - 1] == source):
            return None
        if any(peg in (source, target) for peg in state[: disk - 1]):
            return None  # a smaller disk lies on it, or where it should go
        return (*state[: disk - 1], target, *state[disk:])

    def solved(self, state: State) -> bool:
        return all(peg == 2 for peg in state)

    def prompt(self) -> str:
        return _ask(
            f"There are three pegs, 0, 1 and 2, and {self.size} disks; disk 1 is the smallest. All disks are on peg 0, "
            "the largest at the bottom. One disk is moved at a time, from the top of a peg to another peg, and never "
            "onto a smaller one.",
            "Move all disks to peg 2.",
            "[[disk, from peg, to peg], ...]",
        )


@dataclass(frozen=True, slots=True)
class Checkers:
    """Checker jumping: `size` red and as many blue checkers change sides on 2n + 1 cells; (n + 1)^2 - 1 moves at least.
    A state is the cells, "R", "B" or "_"; a move is (colour, from cell, to cell), cells from 0."""

    name: ClassVar[str] = "checkers"
    size: int

    def __post_init__(self) -> None:
        _check(self.name, self.size, 1)

    @property
    def start(self) -> State:
        return ("R",) * self.size + ("_",) + ("B",) * self.size

    def moves(self, state: State) -> Iterator[Move]:
        for cell, colour in enumerate(state):
            for step in (1, 2):
                move = (colour, cell, cell + (step if colour == "R" else -step))
                if self.after(state, move) is not None:
                    yield move

    def after(self, state: State, move: Move) -> State | None:
        if len(move) != 3 or move[0] not in ("R", "B") or not _whole(move[1:], 2):
            return None
        colour, source, target = move
        if not (0 <= source < len(state) and 0 <= target < len(state)):
            return None
        step = (target - source) * (1 if colour == "R" else -1)
        if state[source] != colour or state[target] != "_" or step not in (1, 2):
            return None
        other = "B" if colour == "R" else "R"
        if step == 2 and state[(source + target) // 2] != other:
            return None
        cells = list(state)
        cells[source], cells[target] = "_", colour
        return tuple(cells)

    def solved(self, state: State) -> bool:
        return state == self.start[::-1]

    def prompt(self) -> str:
        return _ask(
            f"On a row of {2 * self.size + 1} cells, numbered from 0, stand {self.size} red checkers (R) on the left, "
            f"{self.size} blue ones (B) on the right, and one cell between them is empty: {' '.join(self.start)}. A "
            "checker slides into the empty cell beside it, or jumps over one checker of the other colour into the "
            "empty cell behind. Red ones only move right, blue ones only left.",
            "Make the two colours change sides.",
            '[["R", from cell, to cell], ...]',
        )


@dataclass(frozen=True, slots=True)
class River:
    """River crossing: `size` actors (a1 ...) and their agents (A1 ...), a boat for `boat` of them. No actor may be with
    another's agent unless its own is there, on either bank or in the boat. A state is the side (0 or 1) of each actor,
    of each agent, and of the boat; a move names who crosses. What cannot be solved (4 pairs with 2 in the boat,
    6 with 3, and more) is refused."""

    name: ClassVar[str] = "river"
    size: int
    boat: int = 0
    """0: 2 for up to 3 pairs, else 3"""

    def __post_init__(self) -> None:
        _check(self.name, self.size, 1)
        if self.boat == 0:
            object.__setattr__(self, "boat", 2 if self.size <= 3 else 3)
        if self.boat < 2 or (self.size >= 4 and self.boat == 2) or (self.size >= 6 and self.boat == 3):
            raise InvalidInput(
                f"river: {self.size} pairs with {self.boat} in the boat cannot cross: take fewer, or a boat of 4"
            )

    @property
    def start(self) -> State:
        return (0,) * (2 * self.size + 1)

    @property
    def people(self) -> tuple[str, ...]:
        """Actors, then agents, as a state has them."""
        return tuple(f"{kind}{i + 1}" for kind in "aA" for i in range(self.size))

    def moves(self, state: State) -> Iterator[Move]:
        here = [p for p, side in zip(self.people, state, strict=False) if side == state[-1]]
        for n in range(1, self.boat + 1):
            for crossing in itertools.combinations(here, n):
                if self.after(state, crossing) is not None:
                    yield crossing

    def after(self, state: State, move: Move) -> State | None:
        people = self.people
        if not 1 <= len(move) <= self.boat or any(p not in people for p in move) or len(set(move)) != len(move):
            return None
        indices = [people.index(p) for p in move]
        if any(state[i] != state[-1] for i in indices) or not self._safe(set(indices)):
            return None
        new = tuple(1 - side if i in indices or i == len(state) - 1 else side for i, side in enumerate(state))
        banks = ({i for i, side in enumerate(new[:-1]) if side == bank} for bank in (0, 1))
        return new if all(self._safe(bank) for bank in banks) else None

    def _safe(self, group: set[int]) -> bool:
        agents = {i - self.size for i in group if i >= self.size}
        return not agents or all(i in agents for i in group if i < self.size)

    def solved(self, state: State) -> bool:
        return all(state)

    def prompt(self) -> str:
        return _ask(
            f"{self.size} actors (a1 to a{self.size}) and their agents (A1 to A{self.size}; A1 is the agent of a1) "
            f"want to cross a river from left to right. The boat holds at most {self.boat} of them and never crosses "
            "empty. No actor may be with another actor's agent, on a bank or in the boat, unless its own agent is "
            "there too.",
            "Bring all of them to the right bank.",
            '[["a1", "A1"], ...], those in the boat at each crossing, both ways',
        )


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks world: `size` blocks in two stacks are to become one, in which the blocks of both alternate. A state is
    three stacks of numbers, bottom first; a move is (block, from stack, to stack)."""

    name: ClassVar[str] = "blocks"
    size: int

    def __post_init__(self) -> None:
        _check(self.name, self.size, 2)

    @property
    def start(self) -> State:
        half = (self.size + 1) // 2
        return (tuple(range(1, half + 1)), tuple(range(half + 1, self.size + 1)), ())

    @property
    def goal(self) -> tuple[int, ...]:
        """The first stack at the end, bottom first."""
        first, second, _ = self.start
        pairs = itertools.zip_longest(first, second)
        return tuple(block for pair in pairs for block in pair if block is not None)

    def moves(self, state: State) -> Iterator[Move]:
        for source, stack in enumerate(state):
            for target in range(3):
                if stack and target != source:
                    yield (stack[-1], source, target)

    def after(self, state: State, move: Move) -> State | None:
        if not _whole(move, 3):
            return None
        block, source, target = move
        if not (0 <= source <= 2 and 0 <= target <= 2 and source != target and state[source][-1:] == (block,)):
            return None
        stacks = list(state)
        stacks[source], stacks[target] = state[source][:-1], (*state[target], block)
        return tuple(stacks)

    def solved(self, state: State) -> bool:
        return bool(state[0] == self.goal)

    def prompt(self) -> str:
        stacks = "; ".join(f"stack {i}: {list(s) or 'empty'}" for i, s in enumerate(self.start))
        return _ask(
            f"Blocks 1 to {self.size} stand in three stacks, listed from bottom to top: {stacks}. One block is moved "
            "at a time, from the top of a stack to the top of another.",
            f"Bring all blocks into stack 0, from bottom to top: {list(self.goal)}.",
            "[[block, from stack, to stack], ...]",
        )


PUZZLES: dict[str, Any] = {"hanoi": Hanoi, "checkers": Checkers, "river": River, "blocks": Blocks}


def shortest(puzzle: Puzzle, most: int = 1_000_000) -> list[Move] | None:
    """A shortest solution, by breadth-first search over at most `most` states; None when there is none. Raises
    InvalidInput when the limit is reached."""
    came: dict[State, tuple[State, Move] | None] = {puzzle.start: None}
    queue: deque[State] = deque([puzzle.start])
    while queue:
        state = queue.popleft()
        if puzzle.solved(state):
            path: list[Move] = []
            while (step := came[state]) is not None:
                state = step[0]
                path.append(step[1])
            return path[::-1]
        for move in puzzle.moves(state):
            new = puzzle.after(state, move)
            if new is not None and new not in came:
                if len(came) >= most:
                    raise InvalidInput(f"{puzzle.name} of size {puzzle.size}: over {most:,} states: take a smaller one")
                came[new] = (state, move)
                queue.append(new)
    return None


def _whole(values: Move, n: int) -> bool:
    return len(values) == n and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _check(name: str, size: int, least: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or not least <= size <= 1000:
        raise InvalidInput(f"{name}: size = {size!r}: from {least} to 1000 is needed")
