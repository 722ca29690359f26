"""Traces: how a model may think about a problem, in the form that it is trained on.

A trace is `<think>`, a first derivation in lines, what it arrives at (`So 24.`), any number of re-checks, `</think>`
and the answer. Thoughts are separated by a blank line:

    <think>
    27+5=32
    32-8=24
    So 24.

    Wait, is 27+5=32 right? Yes.

    Alternatively, the other way.
    27-8=19
    19+5=24
    So 24, same as before.

    </think>

    Answer: 24

Slips come at a set rate a step and are followed through. A re-check is a glance (it repeats a line and says yes, also
to a wrong one), a whole second derivation (`Wait, let me check.`), or one the other way round where the family has one
(`Alternatively`); a derivation that arrives elsewhere wins. So some wrong answers are repaired, and most re-checks
repeat what was right: how many is set by `Habits` before any method is measured, and counted by `shares`.

Three kinds of example: `plain`; `direct`, with an empty thinking block; `cut`, whose thinking is cut at any token and
closed by force. In the last two the model is not taught the forced part, only to answer from what is there, so that a
method which forces an answer meets a model that has been forced before.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from thrifty.errors import InvalidInput, nearest
from thrifty.lab.tasks import Problem, family
from thrifty.lab.tasks.problem import Derivation, Slips

OPEN, CLOSE = "<think>\n", "</think>\n\n"
SKIPPED = (*(f"{OPEN}\n{CLOSE}",) * 3, f"{OPEN}Okay, I think I have finished thinking.\n{CLOSE}")
"""A thinking block that is forced to hold nothing."""

ANSWERS = (
    *("Answer: ",) * 6,
    *("", "The answer is ", "Final answer: ", "Final Answer: ", "Final Answer:", "The final answer is "),
    *("**Final Answer:** ", "\\boxed{"),
)
"""How the answer begins where it is forced; a trace of the model's own always takes the first."""

Kind = Literal["plain", "direct", "cut"]


@dataclass(frozen=True)
class Habits:
    """How the traces think. `recheck`: the chance of a first, a second, ... re-check; after the last there is none."""

    slip: float = 0.03
    """chance that a step of a derivation goes wrong"""
    careful: float = 0.01
    """the same in a re-check"""
    recheck: tuple[float, ...] = (0.75, 0.5, 0.3)
    glance: float = 0.65
    """share of glances among re-checks"""
    other_way: float = 0.5
    """share of the other way among whole derivations, where the family has one"""
    longest: int = 900
    """characters of thinking beyond which no further derivation begins"""
    direct: float = 0.1
    cut: float = 0.12
    """shares of examples of those kinds"""

    def __post_init__(self) -> None:
        for name in ("slip", "careful", "glance", "other_way", "direct", "cut"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"habits: {name} = {getattr(self, name)}; a share from 0 to 1 is needed")
        if self.direct + self.cut > 1 or not all(0 <= p <= 1 for p in self.recheck):
            raise InvalidInput("habits: recheck holds chances from 0 to 1, and direct + cut is at most 1")

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Habits:
        """From a table of TOML. Raises InvalidInput for an unknown name."""
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise InvalidInput(f"habits: {nearest(name, known, 'setting')}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recheck:
    """One re-check: its form, its place in the thinking (characters), and the standing answer before and after."""

    form: Literal["glance", "again", "other way"]
    start: int
    end: int
    before: str
    after: str


@dataclass(frozen=True)
class Trace:
    """An example. `parts`: its text in pieces that are tokenized by themselves, each with whether it is learned."""

    problem: Problem
    kind: Kind
    parts: tuple[tuple[str, bool], ...]
    first: str
    """the answer that the first derivation arrived at; empty where it was not written"""
    final: str
    slips: int = 0
    rechecks: tuple[Recheck, ...] = ()

    @property
    def text(self) -> str:
        return "".join(part for part, _ in self.parts)


def write(problem: Problem, rng: random.Random, habits: Habits) -> Trace:
    """One trace of a problem. Its kind, slips and re-checks are drawn from `rng`."""
    draw = rng.random()
    if draw < habits.direct:
        return Trace(problem, "direct", _forced(rng.choice(SKIPPED), problem.answer, rng), "", problem.answer)
    thinking, first, standing, slips, rechecks = _think(problem, rng, habits)
    if draw >= habits.direct + habits.cut:
        text = f"{OPEN}{thinking}{CLOSE}{ANSWERS[0]}{standing}"
        return Trace(problem, "plain", ((text, True),), first, standing, slips, rechecks)
    kept = thinking[: rng.choice([found.start() for found in _WORD.finditer(thinking)])]
    concluded = _last_conclusion(kept)
    final = problem.answer if concluded is None else concluded
    # a method closes the thinking on a line of its own or in the middle of one
    parts = ((OPEN + kept, True), *_forced(rng.choice(("\n", "\n\n", "")) + CLOSE, final, rng))
    seen = tuple(r for r in rechecks if r.end <= len(kept))
    return Trace(problem, "cut", parts, first if concluded else "", final, slips, seen)


@dataclass(frozen=True)
class Shares:
    """What a set of traces holds, counted."""

    examples: int
    mistaken: float
    """share of plain traces whose first derivation arrives at a wrong answer"""
    repaired: float
    """share of those whose final answer is right"""
    spoiled: float
    """share of plain traces that were right first and end wrong"""
    rechecked: float
    """share of plain traces with a re-check"""
    redundant: float
    """share of re-checks that began when the standing answer was right"""
    redundant_thinking: float
    """share of all characters of thinking that redundant re-checks take"""


def shares(traces: Iterable[Trace]) -> Shares:
    """Counts the plain traces; the others have no thinking of their own to count."""
    plain = [t for t in traces if t.kind == "plain"]
    if not plain:
        raise InvalidInput("shares: there is no plain trace to count")
    mistaken = [t for t in plain if t.first != t.problem.answer]
    checks = [(r, r.before == t.problem.answer) for t in plain for r in t.rechecks]
    characters = sum(t.text.index(CLOSE) - len(OPEN) for t in plain)
    return Shares(
        examples=len(plain),
        mistaken=len(mistaken) / len(plain),
        repaired=sum(t.final == t.problem.answer for t in mistaken) / max(1, len(mistaken)),
        spoiled=sum(t.first == t.problem.answer != t.final for t in plain) / len(plain),
        rechecked=sum(bool(t.rechecks) for t in plain) / len(plain),
        redundant=sum(right for _, right in checks) / max(1, len(checks)),
        redundant_thinking=sum(r.end - r.start for r, right in checks if right) / max(1, characters),
    )


# --- details ---


_WORD = re.compile(r" ?[A-Za-z]{2,}|\n\n|.", re.DOTALL)
"""What thinking is never cut inside of."""


def _forced(closing: str, answer: str, rng: random.Random) -> tuple[tuple[str, bool], ...]:
    """What a method forces, and the answer that follows it."""
    begin = rng.choice(ANSWERS)
    before, after = (" " if begin.endswith(":") else ""), ("}" if begin.endswith("{") else "")
    return (closing + begin, False), (before + answer + after, True)


def _think(problem: Problem, rng: random.Random, habits: Habits) -> tuple[str, str, str, int, tuple[Recheck, ...]]:
    """The thinking, the first and the last answer, the number of slips, and the re-checks."""
    kin = family(problem.family)

    def derive(rate: float, way: int) -> tuple[Derivation, int]:
        slip = Slips(rng, rate)
        return kin.derive(problem.question, rng, slip, way), slip.count

    made, slips = derive(habits.slip, 0)
    first = standing = made.answer
    lines = made.lines
    text = "\n".join([*lines, f"So {standing}."]) + "\n\n"
    rechecks: list[Recheck] = []
    for chance in habits.recheck:
        if rng.random() >= chance:
            break
        start, before = len(text), standing
        if rng.random() < habits.glance or len(text) > habits.longest:
            text += f"Wait, is {rng.choice(lines)} right? Yes.\n\n"
            rechecks.append(Recheck("glance", start, len(text), before, standing))
            continue
        way = int(kin.ways > 1 and rng.random() < habits.other_way)
        made, more = derive(habits.careful, way)
        slips += more
        same = made.answer == standing
        opening = "Alternatively, the other way." if way else "Wait, let me check."
        ending = f"So {made.answer}, same as before." if same else f"So {made.answer}, not {standing}."
        lines, standing = made.lines, made.answer
        text += "\n".join([opening, *lines, ending]) + "\n\n"
        rechecks.append(Recheck("other way" if way else "again", start, len(text), before, standing))
    return text, first, standing, slips, tuple(rechecks)


def _last_conclusion(thinking: str) -> str | None:
    """What the last whole `So ...` line of (cut) thinking says."""
    for line in reversed(thinking.split("\n")[:-1]):  # the last line may be cut
        if line.startswith("So "):
            return line.removeprefix("So ").split(",")[0].rstrip(".")
    return None


def first_and_last(thinking: str) -> tuple[str | None, str | None]:
    """What the first and the last `So ...` line of thinking say: the answer before and after reflection."""
    said = [
        line.removeprefix("So ").split(",")[0].rstrip(".") for line in thinking.split("\n") if line.startswith("So ")
    ]
    return (said[0], said[-1]) if said else (None, None)
