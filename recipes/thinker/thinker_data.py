"""Batches for the thinker, generated as they are needed.

Invariant: a batch is a function of the configuration and its step, so training resumes exactly and nothing is stored.
Documents are padded in small chunks of like length; none attends to another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrifty.lab.tasks import DIFFICULTIES, make
from thrifty.lab.tokenizer import build, prompt
from thrifty.lab.traces import Habits, Trace, write

IGNORED = -100

POOL = 16
"""Steps whose documents are drawn together."""

Row = tuple[list[int], list[int]]
"""Ids and labels of a document."""

WIDTH, ROWS = 32, 4
"""Chunks are padded to multiples of these: every new shape costs a processor's matrix kernels time and memory."""


def rounded(n: int, step: int) -> int:
    """The next multiple.

    >>> rounded(33, 32), rounded(32, 32)
    (64, 32)
    """
    return -(-n // step) * step


@dataclass(frozen=True)
class Mix:
    """What is drawn: families with weights, weights of the five difficulties at the start and from `settled` on."""

    families: dict[str, float]
    early: tuple[float, ...]
    late: tuple[float, ...]
    settled: int
    """steps over which the weights move from `early` to `late`"""
    instructions: float
    """share of questions with an instruction before or after them that changes nothing"""

    def weights(self, step: int) -> list[float]:
        part = min(1.0, step / self.settled) if self.settled > 0 else 1.0
        return [a + (b - a) * part for a, b in zip(self.early, self.late, strict=True)]


INSTRUCTIONS = (
    *(
        "Please think step by step.",
        "Think step by step.",
        "Let me think.",
        "Answer the question.",
        "Give only the answer.",
    ),
    *("Please reason step by step, and put your final answer within \\boxed{}.", "Be brief.", "Solve this problem."),
)


class Documents:
    """Makes token ids and labels of examples."""

    def __init__(self, mix: Mix, habits: Habits, seed: int, longest: int, tokens: int, chunk: int) -> None:
        """`tokens`: of a step, about; `chunk`: of what is computed at once, with padding; `longest`: of a document."""
        self.mix, self.habits, self.seed = mix, habits, seed
        self.longest, self.tokens, self.chunk = longest, tokens, chunk
        self._pool: tuple[int, list[Sequence[Row]]] | None = None
        self.tokenizer = build()
        self.end = self.tokenizer.token_to_id("<eos>")
        self.pad = self.tokenizer.token_to_id("<pad>")

    def draw(self, rng: random.Random, step: int) -> Trace:
        name = rng.choices(list(self.mix.families), list(self.mix.families.values()))[0]
        difficulty = rng.choices(DIFFICULTIES, self.mix.weights(step))[0]
        return write(make(name, rng, difficulty), rng, self.habits)

    def encode(self, trace: Trace, rng: random.Random) -> tuple[list[int], list[int]]:
        """Ids and labels, the labels at the place of their own token (the loss shifts them)."""
        question = trace.problem.question
        if rng.random() < self.mix.instructions:
            said = rng.choice(INSTRUCTIONS)
            question = f"{said}\n{question}" if rng.random() < 0.5 else f"{question}\n{said}"
        ids = self._ids(prompt(question))
        labels = [IGNORED] * len(ids)
        for text, learned in trace.parts:
            piece = self._ids(text)
            ids += piece
            labels += piece if learned else [IGNORED] * len(piece)
        return [*ids, self.end], [*labels, self.end]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Chunks of [rows, length] ids and labels for one step.

        Documents for `POOL` steps are drawn at once, sorted by length and cut into chunks, which are dealt to the steps
        in random order: sorting a step's own documents would leave a third of each chunk empty.
        """
        first = step - step % POOL
        if self._pool is None or self._pool[0] != first:
            self._pool = (first, self._chunks(first))
        chunks = self._pool[1]
        return [self._padded(rows) for rows in chunks[step % POOL :: POOL]]

    def _chunks(self, first: int) -> list[Sequence[Row]]:
        rng = random.Random(f"{self.seed}:{first}")
        rows: list[Row] = []
        total = 0
        while total < self.tokens * POOL:
            ids, labels = self.encode(self.draw(rng, first), rng)
            if len(ids) <= self.longest:
                rows.append((ids, labels))
                total += len(ids)
        rows.sort(key=lambda row: len(row[0]))
        chunks: list[list[Row]] = [[]]
        for row in rows:
            if chunks[-1] and rounded(len(row[0]) - 1, WIDTH) * (len(chunks[-1]) + 1) > self.chunk:
                chunks.append([])
            chunks[-1].append(row)
        rng.shuffle(chunks)
        return list(chunks)

    def _padded(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        shape = rounded(len(rows), ROWS), rounded(max(len(ids) for ids, _ in rows) - 1, WIDTH) + 1
        ids = torch.full(shape, self.pad)
        labels = torch.full(shape, IGNORED)
        for i, (row, wanted) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, : len(wanted)] = torch.tensor(wanted)
        return ids, labels


def documents(config: dict[str, Any]) -> Documents:
    """From the tables `data` and `habits` of the configuration."""
    data = config["data"]
    mix = Mix(
        families={name: float(weight) for name, weight in data["families"].items()},
        early=tuple(data["early"]),
        late=tuple(data["late"]),
        settled=int(data["settled"]),
        instructions=float(data["instructions"]),
    )
    training = config["training"]
    sizes = int(data["longest"]), int(training["tokens"]), int(training["chunk"])
    return Documents(mix, Habits.from_dict(config["habits"]), int(config["seed"]), *sizes)
