"""How a model's accuracy and effort move with the size of a puzzle, and what its thinking holds on the way.

`probe` asks any plan about puzzles of growing size and checks every answer in a simulator; the analyses read what came.
Invariant: a run that a limit cut is counted as cut, never as a failure of reasoning alone.

After "The Illusion of Thinking" (Shojaee et al. 2025, arXiv:2506.06941), reconstructed from descriptions of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from thrifty.budget import Account
from thrifty.call import Sampling
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.instrument import Instrument
from thrifty.meter.puzzles import Move, Puzzle
from thrifty.plan import Pipeline

INSTRUMENT = Instrument(
    name="puzzle-probes",
    kind="evaluation",
    paper=(
        "The Illusion of Thinking: Understanding the Strengths and Limitations of Reasoning Models via the Lens of "
        "Problem Complexity (Shojaee et al. 2025, arXiv:2506.06941)"
    ),
    runs="thrifty.meter.puzzle_probes:probe",
)


@dataclass(frozen=True, slots=True)
class Check:
    """What a simulator says of a list of moves."""

    solved: bool
    first_illegal: int | None
    """index from 0 of the first move against the rules"""
    moves: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A whole list of moves that stands in a thinking text."""

    position: float
    """where in the text it ends, from 0 to 1"""
    solved: bool


@dataclass(frozen=True, slots=True)
class Probe:
    """One answer to one puzzle."""

    puzzle: str
    size: int
    solved: bool
    thinking: int
    """tokens of thinking; of all output where the model shows none"""
    output: int
    capped: bool
    """a limit cut it"""
    moves: int
    """in the answer; 0 when it lists none"""
    first_illegal: int | None
    candidates: tuple[Candidate, ...] = ()


def check(puzzle: Puzzle, moves: Sequence[Move]) -> Check:
    """Plays moves from the start. Solved: all are legal, and the last reaches the goal."""
    state = puzzle.start
    for i, move in enumerate(moves):
        new = puzzle.after(state, move)
        if new is None:
            return Check(False, i, len(moves))
        state = new
    return Check(puzzle.solved(state), None, len(moves))


_LIST = re.compile(r"\[\s*(?:\[[^\[\]]*\]\s*,?\s*)+\]")


def lists_in(text: str) -> list[tuple[int, list[Move]]]:
    """Every list of moves in a text, with the place where it ends. What is no JSON is no list.

    >>> lists_in('moves = [[1, 0, 2]] or ["x"]')
    [(19, [(1, 0, 2)])]
    """
    found = []
    for match in _LIST.finditer(text):
        try:
            value = json.loads(match[0])
        except (ValueError, RecursionError):
            continue
        found.append((match.end(), [tuple(move) for move in value]))
    return found


def answered(text: str) -> list[Move]:
    """The last list of moves in an answer; empty when there is none."""
    lists = lists_in(text)
    return lists[-1][1] if lists else []


def candidates_in(puzzle: Puzzle, thinking: str) -> tuple[Candidate, ...]:
    """Every whole list in a thinking text, checked. Lists of one puzzle's partial moves count as wrong ones."""
    return tuple(
        Candidate(end / len(thinking), check(puzzle, moves).solved) for end, moves in lists_in(thinking) if moves
    )


def overthought(candidates: Sequence[Candidate]) -> bool:
    """Whether a right candidate was followed by a wrong one."""
    first = next((i for i, c in enumerate(candidates) if c.solved), None)
    return first is not None and any(not c.solved for c in candidates[first + 1 :])


async def probe(
    pipeline: Pipeline,
    puzzles: Iterable[Puzzle],
    samples: int = 25,
    cap: int = 64_000,
    temperature: float = 1.0,
    seed: int = 0,
    account: Account | None = None,
    hint: str = "",
) -> list[Probe]:
    """Asks a plan `samples` times about each puzzle, each answer of at most `cap` tokens. `hint` goes before the
    puzzle, such as the algorithm in words. What the account refuses ends the run: what came until then is returned.

    Raises InvalidInput for samples or cap below 1, and what the engine raises."""
    if samples < 1 or cap < 1:
        raise InvalidInput(f"samples = {samples}, cap = {cap}: at least 1 of each is needed")
    paid = account or Account("puzzles")
    probes: list[Probe] = []
    for puzzle in puzzles:
        prompt = f"{hint}\n\n{puzzle.prompt()}" if hint else puzzle.prompt()
        for sample in range(samples):
            sampling = Sampling(temperature=temperature, seed=seed + sample, max_tokens=cap)
            try:
                answer = await pipeline.ask(prompt, paid, sampling=sampling)
            except BudgetExceeded:
                return probes
            result = check(puzzle, answered(answer.text))
            probes.append(
                Probe(
                    puzzle.name,
                    puzzle.size,
                    result.solved,
                    answer.spend.reasoning or answer.spend.output,
                    answer.spend.output,
                    answer.finish in ("length", "budget"),
                    result.moves,
                    result.first_illegal,
                    candidates_in(puzzle, answer.thinking),
                )
            )
    return probes


# -- analyses: all of one puzzle and one model -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Level:
    """All answers at one size."""

    size: int
    runs: int
    accuracy: float
    thinking: float
    """mean tokens"""
    capped: int
    first_illegal: float | None
    """mean index, over the answers that broke a rule"""
    first_illegal_spread: float | None
    overthought: float
    """share whose thinking had a right list and then a wrong one"""


def levels(probes: Sequence[Probe]) -> list[Level]:
    """Figures by size, ascending."""
    by_size: dict[int, list[Probe]] = {}
    for p in probes:
        by_size.setdefault(p.size, []).append(p)
    found = []
    for size, runs in sorted(by_size.items()):
        illegal = [p.first_illegal for p in runs if p.first_illegal is not None]
        found.append(
            Level(
                size,
                len(runs),
                sum(p.solved for p in runs) / len(runs),
                fmean(p.thinking for p in runs),
                sum(p.capped for p in runs),
                fmean(illegal) if illegal else None,
                pstdev(illegal) if illegal else None,
                sum(overthought(p.candidates) for p in runs) / len(runs),
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Turn:
    """Where effort is highest."""

    size: int
    low: int
    high: int
    """the interval of `size`, from resampled runs"""
    falls: float
    """share of resamples in which effort at the largest size is below its peak by `drop` or more, the peak before it"""


def turning_point(
    tokens: Mapping[int, Sequence[float]],
    drop: float = 0.1,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Turn:
    """The size at which mean thinking tokens, smoothed over neighbours with weights 1, 2, 1, are highest: where effort
    starts to fall. Give it runs that no limit cut, or the fall may be the limit's.

    The interval is the bootstrap's over the runs of each size. Raises InvalidInput for fewer than three sizes, or a
    size without runs.
    """
    sizes = sorted(tokens)
    if len(sizes) < 3 or any(not tokens[s] for s in sizes):
        raise InvalidInput(f"{len(sizes)} sizes: at least 3, each with at least one run, are needed")
    if not 0 < confidence < 1 or resamples < 1 or not 0 <= drop < 1:
        raise InvalidInput("confidence above 0 and below 1, drop from 0 to below 1, resamples of at least 1 are needed")
    rng = random.Random(seed)
    peaks, falls = [], 0
    for _ in range(resamples):
        means = [fmean(rng.choices(tokens[s], k=len(tokens[s]))) for s in sizes]
        peak = _peak(means)
        peaks.append(sizes[peak])
        curve = _smooth(means)
        falls += peak < len(sizes) - 1 and curve[-1] <= (1 - drop) * curve[peak]
    peaks.sort()
    tail = (1 - confidence) / 2
    low, high = peaks[int(tail * resamples)], peaks[min(resamples - 1, int((1 - tail) * resamples))]
    return Turn(sizes[_peak([fmean(tokens[s]) for s in sizes])], low, high, falls / resamples)


def regimes(thinking: Mapping[int, float], plain: Mapping[int, float], margin: float = 0.05) -> dict[int, str]:
    """For each size that both have: who is better at equal compute (give pass@k at equal tokens): `plain`, `thinking`,
    `equal`, or `collapse` where neither solves more than `margin`."""
    found = {}
    for size in sorted(set(thinking) & set(plain)):
        a, b = thinking[size], plain[size]
        better = "thinking" if a > b + margin else "plain" if b > a + margin else "equal"
        found[size] = "collapse" if max(a, b) <= margin else better
    return found


def _smooth(means: Sequence[float]) -> list[float]:
    last = len(means) - 1
    return [
        (2 * m + (means[i - 1] if i else 0) + (means[i + 1] if i < last else 0)) / (2 + (i > 0) + (i < last))
        for i, m in enumerate(means)
    ]


def _peak(means: Sequence[float]) -> int:
    curve = _smooth(means)
    return max(range(len(curve)), key=lambda i: (curve[i], -i))
