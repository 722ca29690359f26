"""Step labels: of every line of a trace, whether it is right, decided from the question alone.

    for step in label("arithmetic", "Compute 27+5-8", thinking):
        step.text, step.kind, step.right

A step is a line. It is right when what it claims is true of the question, whatever the lines around it say: what
follows a slip follows from it, and is wrong too. Each derivation (the first one, and each that `Wait, let me check.` or
`Alternatively, the other way.` begins) starts from the question anew, so a re-check that repairs a slip is right.

    line         of a derivation; what it claims is the family's (see `_WALKS`)
    conclusion   `So 24.` is right when the answer is; of `So 24, same as before.` and `So 24, not 25.` the remark has
                 to be true as well
    glance       `Wait, is 27+5=32 right? Yes.` is right when that line stands above and its label is what is said
    turn         begins a derivation, claims nothing, and is never wrong
    answer       after the thinking, or `Answer: 24`
    other        a line that is none of the language: wrong

All six families can be checked. Where a family leaves the order of lines free in what is true (terms of a sum, moves of
checkers), any order is right, not the one that traces are written in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from thrifty.errors import InvalidInput, nearest
from thrifty.lab.tasks import arithmetic, boolean, check, counting, family, paths, puzzles, sorting
from thrifty.lab.traces import ANSWERS, CLOSE, OPEN

Kind = Literal["line", "conclusion", "glance", "turn", "answer", "other"]

AGAIN, OTHER_WAY = "Wait, let me check.", "Alternatively, the other way."
"""What begins a further derivation."""


@dataclass(frozen=True)
class Step:
    """A line of a trace. `start`: where it stands in the text, in characters; `derivation`: its number from 0."""

    text: str
    start: int
    kind: Kind
    right: bool
    derivation: int

    @property
    def claims(self) -> bool:
        """Whether it says anything that could be wrong."""
        return self.kind != "turn"


def label(name: str, question: str, text: str, whole: bool = True) -> tuple[Step, ...]:
    """The steps of a trace of the family `name`: its thinking, with or without its tags, and its answer if it is there.
    With `whole = False` a last line without its end is left out, since it may be cut.

    Raises InvalidInput for a family whose steps cannot be checked, and for a question that is none of the family.

    >>> [s.right for s in label("sorting", "Sort 3 letters gdk, item 2", "1d\\n2k\\nSo k.\\n\\n")]
    [True, False, False]
    """
    family(name)
    if name not in _WALKS:
        raise InvalidInput(f"steps of these families can be checked: {nearest(name, _WALKS, 'task family')}")
    begin = _WALKS[name](question)
    walk, number, standing, ended = begin(), 0, "", False
    steps: list[Step] = []
    for start, line, cut in _lines(text):
        if line in (OPEN.strip(), CLOSE.strip()):
            ended = ended or line == CLOSE.strip()
            continue
        if cut and not whole:
            break
        kind: Kind = "line"
        if ended or line.startswith(ANSWERS[0]):
            kind, right = "answer", _answers(name, question, _answer(line))
        elif line in (AGAIN, OTHER_WAY):
            kind, right = "turn", True
            walk, number = begin(), number + 1
        elif found := _GLANCE.fullmatch(line):
            kind, right = "glance", _glance(found[1], found[2] == "Yes", steps)
        elif found := _CONCLUSION.fullmatch(line):
            kind, right = "conclusion", _answers(name, question, found[1]) and _remark(found, standing)
            standing = found[1]
        else:
            judged = walk(line)
            kind, right = ("other", False) if judged is None else ("line", judged)
        steps.append(Step(line, start, kind, right, number))
    return tuple(steps)


def first_error(steps: Sequence[Step]) -> int | None:
    """The number of the first wrong step, from 0; None where all are right."""
    return next((i for i, step in enumerate(steps) if not step.right), None)


# --- the language ---

_GLANCE = re.compile(r"Wait, is (.+) right\? (Yes|No)\.")
_CONCLUSION = re.compile(r"So ([^ ,.]+)(?:, (same as before)|, not ([^ ,.]+))?\.")


def _lines(text: str) -> list[tuple[int, str, bool]]:
    """Place, text and whether the end is missing, of all lines that are not blank."""
    found, place = [], 0
    for piece in text.splitlines(keepends=True):
        line = piece.rstrip("\n")
        if line.strip():
            found.append((place, line, line == piece))
        place += len(piece)
    return found


def _answer(line: str) -> str:
    begin = next(b for b in sorted(ANSWERS, key=len, reverse=True) if line.startswith(b.strip()))
    return line.removeprefix(begin.strip()).strip().removesuffix("}")


def _answers(name: str, question: str, said: str) -> bool:
    return said.isascii() and check(name, question, said)


def _glance(line: str, yes: bool, steps: Sequence[Step]) -> bool:
    seen = next((s for s in reversed(steps) if s.text == line and s.kind in ("line", "other")), None)
    return seen is not None and seen.right == yes


def _remark(found: re.Match[str], standing: str) -> bool:
    """Whether what a conclusion says of the one before it is true."""
    if found[2]:
        return found[1] == standing
    return found[3] is None or (found[3] == standing and found[1] != standing)


# --- what a family's lines claim ---


class Walk(Protocol):
    """One derivation: asked about its lines in order. None: the line has not the form of the family's."""

    def __call__(self, line: str) -> bool | None: ...


Begin = Callable[[], Walk]
"""Starts a derivation of one question."""


def _arithmetic(question: str) -> Begin:
    """`27+5=32`: with the terms that lines before it took, the total is 27; +5 is one of those left; the sum is 32."""
    start, terms = arithmetic._read(question)

    def begin() -> Walk:
        left, total = list(terms), start

        def walk(line: str) -> bool | None:
            nonlocal total
            found = re.fullmatch(r"(\d{1,4})([+-]\d)=(-?\d{1,4})", line)
            if not found:
                return None
            before, term, after = int(found[1]), int(found[2]), int(found[3])
            if term not in left:
                return False
            right = before == total and after == total + term and line == f"{before}{term:+d}={after}"
            left.remove(term)  # taken, even where its sum is wrong: the lines after it have other terms to add
            total += term
            return right

        return walk

    return begin


def _counting(question: str) -> Begin:
    """`Bb1`: the letter at B is b, and up to there (from the end, where the first line is of the last label) the target
    was met once."""
    target, row = counting._read(question)

    def begin() -> Walk:
        backward: bool | None = None

        def walk(line: str) -> bool | None:
            nonlocal backward
            found = re.fullmatch(r"([A-Z])([a-z])(\d)", line)
            if not found:
                return None
            if backward is None:
                backward = len(row) > 1 and found[1] == row[-1][0]
            at = next((i for i, (name, _) in enumerate(row) if name == found[1]), None)
            if at is None or row[at][1] != found[2]:
                return False
            walked = row[at:] if backward else row[: at + 1]
            return int(found[3]) == sum(letter == target for _, letter in walked)

        return walk

    return begin


def _sorting(question: str) -> Begin:
    """`2d`: d is the second letter of the sorted row."""
    row, _ = sorting._read(question)

    def walk(line: str) -> bool | None:
        found = re.fullmatch(r"(\d)([a-z])", line)
        if not found:
            return None
        return found[2] in row and sum(letter < found[2] for letter in row) == int(found[1]) - 1

    return lambda: walk


def _paths(question: str) -> Begin:
    """`Fc`: f is on the path, and reached from c."""
    root, goal, parents = paths._read(question)
    on_path = {goal}
    here = goal
    while here != root and parents.get(here) not in (None, *on_path):  # a broken question may go in a circle
        here = parents[here]
        on_path.add(here)

    def walk(line: str) -> bool | None:
        found = re.fullmatch(r"([A-Z])([a-z])", line)
        if not found:
            return None
        node = found[1].lower()
        return node in on_path and node != root and parents.get(node) == found[2]

    return lambda: walk


def _boolean(question: str) -> Begin:
    """`A1&B0=D0`: gate D is A&B, and the three values are theirs."""
    inputs, gates, _ = boolean._read(question)
    values = dict(inputs)
    for name, first, operation, second in gates:
        if first not in values or second not in values:
            raise InvalidInput(f"{question[:80]!r}: gate {name} reads one that does not stand before it")
        both = (values[first], values[second])
        values[name] = {"&": int(all(both)), "|": int(any(both)), "^": int(both[0] != both[1])}[operation]
    made = {name: (operation, frozenset((first, second))) for name, first, operation, second in gates}

    def walk(line: str) -> bool | None:
        found = re.fullmatch(r"([A-Z])([01])([&|^])([A-Z])([01])=([A-Z])([01])", line)
        if not found:
            return None
        first, a, operation, second, b, name, value = found.groups()
        told = ((first, a), (second, b), (name, value))
        known = all(n in values and values[n] == int(v) for n, v in told)
        return known and made.get(name) == (operation, frozenset((first, second)))

    return lambda: walk


def _puzzles(question: str) -> Begin:
    return _jump(question) if question.startswith("Jump") else _hanoi(question)


def _hanoi(question: str) -> Begin:
    """`3a>c+4=12,b`: disk 3 stands on a and has to be on c; that costs 4 moves, 12 with those of larger disks; the
    smaller ones then have to be on b."""
    disks, goal = puzzles._read_hanoi(question)
    true: dict[str, str] = {}
    total = 0
    for disk, peg in disks:
        cost, third = (0, goal) if peg == goal else (2 ** (disk - 1), ({*"abc"} - {peg, goal}).pop())
        total += cost
        true[str(disk)] = f"{disk}{peg}{'>' if cost else '='}{goal}+{cost}={total},{third}"
        goal = third

    def walk(line: str) -> bool | None:
        found = re.fullmatch(r"(\d)[abc][=>][abc]\+\d{1,4}=\d{1,4},[abc]", line)
        return None if not found else true.get(found[1]) == line

    return lambda: walk


def _jump(question: str) -> Begin:
    """`2RBR_B`: one legal move makes this row of the one before it, two moves make it of the first, and from it the
    goal can be reached."""
    start = puzzles._read_jump(question)
    fewest = puzzles.moves_of_jump(start)
    if fewest is None:
        raise InvalidInput(f"{question[:80]!r} has no solution")

    def begin() -> Walk:
        row = start

        def walk(line: str) -> bool | None:
            nonlocal row
            found = re.fullmatch(r"(\d{1,3})([RB]*_[RB]*)", line)
            if not found:
                return None
            if found[2] not in puzzles.jumps(row):
                return False  # the next line may still follow from the last row that was legal
            row = found[2]
            left = puzzles.moves_of_jump(row)
            return left is not None and found[1] == str(fewest - left)

        return walk

    return begin


_WALKS: Mapping[str, Callable[[str], Begin]] = {
    "arithmetic": _arithmetic,
    "counting": _counting,
    "sorting": _sorting,
    "paths": _paths,
    "boolean": _boolean,
    "puzzles": _puzzles,
}
