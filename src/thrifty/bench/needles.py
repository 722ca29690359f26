"""The retrieval suite: needles with known answers planted in the Python language reference.

The hay is `pydoc_data.topics`, which every CPython carries (its text differs a little between Python versions,
so the tasks do too). It is cut once into passages at paragraph, line or sentence ends. A task's context is a
run of neighbouring passages; each needle is one sentence, set at a sentence end inside a passage of its own
(shared only where a short context has fewer passages than needles).

A needle gives one town's number. Two kinds of task: *single* asks for one town, *list* for two to four, scored
by recall. The distractors have the same form and name other towns.

Invariants: task i depends on the seed and i alone, so a longer run begins with the shorter one; every needle
stands whole in exactly one passage; no town occurs in the hay.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from thrifty.bench.task import CONTEXT_MARK, Task
from thrifty.errors import InvalidInput

Count = Callable[[str], int]
"""Measures a text in tokens."""

PASSAGE_TOKENS = (60, 120)
"""What a passage has at least and about at most, in tokens."""

MAX_DISTRACTORS = 5

_TOWNS = (
    *("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Dublin", "Lima", "Ankara", "Tunis", "Riga", "Havana"),
    *("Manila", "Zagreb", "Bergen", "Cusco", "Dakar", "Perth", "Kyoto", "Sofia", "Turin", "Vienna", "Warsaw"),
    *("Basel", "Porto", "Galway", "Tampere", "Ghent", "Leeds"),
)


def characters(text: str) -> int:
    """Tokens without a tokenizer: a quarter of the characters, rounded up."""
    return -(-len(text) // 4)


def needles(
    n: int,
    seed: int,
    *,
    count: Count | None = None,
    lengths: Sequence[int] = (500, 1000, 2000),
    long: int | None = 4000,
    distractors: Sequence[int] = (0, 1, 2, 3, 4, 5),
    lists: bool = True,
    prefix: bool = True,
) -> list[Task]:
    """`n` retrieval tasks.

    Args:
        count: measures tokens; without it a quarter of the characters.
        lengths: context lengths in tokens, taken in turn. A context has at most that many and is short of it
            by about one passage at most.
        long: every tenth task has this length instead; None for none.
        distractors: the numbers of distractor needles to draw from.
        lists: every fourth task is a list question.
        prefix: give each task the beginning of its answer.

    Raises InvalidInput for a length under 200 or one that the hay cannot fill, or too many distractors.
    """
    count = count or characters
    for number in distractors:
        if not 0 <= number <= MAX_DISTRACTORS:
            raise InvalidInput(f"needles: {number} distractors asked for; 0 to {MAX_DISTRACTORS} are allowed")
    if not lengths or not distractors:
        raise InvalidInput("needles: `lengths` and `distractors` need at least one value each")
    hay = _hay(count)
    total = sum(size for _, size in hay)
    for length in (*lengths, *(() if long is None else (long,))):
        if not 200 <= length <= total // 2:
            raise InvalidInput(f"needles: a context of {length} tokens; 200 to {total // 2} are allowed")
    tasks = []
    for i in range(n):
        # A generator per task, seeded by text: the same on every machine, and independent of n.
        rng = random.Random(f"needles/{seed}/{i}")
        length = long if long is not None and i % 10 == 9 else lengths[i % len(lengths)]
        kind = _list if lists and i % 4 == 3 else _single
        plan = kind(rng, rng.choice(distractors))
        tasks.append(_task(f"needles-{seed}-{i}", plan, length, hay, count, rng, prefix))
    return tasks


# --- what is planted and asked ---


@dataclass(frozen=True)
class _Plan:
    """The sentences that hold the answer, those that distract, and the question."""

    kind: str
    targets: tuple[str, ...]
    distractors: tuple[str, ...]
    question: str
    prefix: str
    gold: str | list[str]
    scorer: str
    max_tokens: int


def _single(rng: random.Random, distractors: int) -> _Plan:
    keys, numbers, sentences = _draw(rng, distractors + 1)
    return _Plan(
        kind="single",
        targets=(sentences[0],),
        distractors=tuple(sentences[1:]),
        question=f"What is the special magic number for {keys[0]}?",
        prefix=f"The special magic number for {keys[0]} is",
        gold=numbers[0],
        scorer="contains",
        max_tokens=12,
    )


def _list(rng: random.Random, distractors: int) -> _Plan:
    wanted = rng.choice((2, 3, 4))
    keys, numbers, sentences = _draw(rng, wanted + distractors)
    listed = ", ".join(keys[: wanted - 1]) + f" and {keys[wanted - 1]}"
    return _Plan(
        kind="list",
        targets=tuple(sentences[:wanted]),
        distractors=tuple(sentences[wanted:]),
        question=f"List all the special magic numbers for {listed}.",
        prefix=f"The special magic number for {keys[0]} is",
        gold=numbers[:wanted],
        scorer="recall",
        max_tokens=20 * wanted,
    )


def _draw(rng: random.Random, n: int) -> tuple[list[str], list[str], list[str]]:
    """`n` different keys, their numbers, and the sentences that say them."""
    keys = rng.sample(_TOWNS, n)
    numbers = [str(number) for number in rng.sample(range(10_000, 100_000), n)]
    pairs = zip(keys, numbers, strict=True)
    return keys, numbers, [f"The special magic number for {key} is {number}." for key, number in pairs]


def _task(ident: str, plan: _Plan, length: int, hay: _Hay, count: Count, rng: random.Random, prefix: bool) -> Task:
    sentences = [*plan.targets, *plan.distractors]
    passages = _run(hay, length - sum(count(f" {sentence}") for sentence in sentences), rng)
    while True:
        context, where = _plant(passages, sentences, rng)
        tokens = count("\n\n".join(context))
        if tokens <= length or len(passages) == 1:
            break
        passages = passages[:-1]  # joining and planting cost a few tokens more than the parts
    found = where[: len(plan.targets)]
    return Task(
        id=ident,
        messages=({"role": "user", "content": f"{CONTEXT_MARK}\n\n{plan.question}"},),
        context=tuple(context),
        gold=plan.gold,
        scorer=plan.scorer,
        prefix=plan.prefix if prefix else None,
        max_tokens=plan.max_tokens,
        extra={
            "suite": "needles",
            "kind": plan.kind,
            "length": length,
            "tokens": tokens,
            "distractors": len(plan.distractors),
            "passages": sorted(found),
            "depth": round(sum(found) / len(found) / max(1, len(context) - 1), 3),
        },
    )


# --- the hay ---

_Hay = tuple[tuple[str, int], ...]
"""Passages, each with about how many tokens it has."""

_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z*\"`(])")


@lru_cache(maxsize=4)
def _hay(count: Count) -> _Hay:
    from pydoc_data.topics import topics

    least, most = PASSAGE_TOKENS
    passages: list[tuple[str, int]] = []
    for name in sorted(topics):
        held, size = "", 0
        for glue, piece, tokens in _pieces(topics[name], most - least, count):
            held, size = (f"{held}{glue}{piece}", size + tokens) if held else (piece, tokens)
            if size >= least:
                passages.append((held, size))
                held, size = "", 0
        # What is left at a topic's end is shorter than a passage: left out.
    return tuple(passage for passage in passages if set(_TOWNS).isdisjoint(re.findall(r"\w+", passage[0])))


def _pieces(text: str, most: int, count: Count) -> Iterator[tuple[str, str, int]]:
    """Paragraphs, without tables; those over `most` tokens cut at sentence ends, or else at line ends.

    Yields what joins the piece to the one before it, the piece, and its tokens.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.strip() or "+--" in paragraph or "\n|" in paragraph or paragraph.startswith("|"):
            continue
        if (tokens := count(paragraph)) <= most:
            yield "\n\n", paragraph.rstrip(), tokens
            continue
        glue = "\n\n"
        for sentence in _SENTENCE_END.split(paragraph):
            parts = [sentence] if count(sentence) <= most else sentence.split("\n")
            for part in parts:
                yield glue, part.rstrip(), count(part)
                glue = "\n"


def _run(hay: _Hay, tokens: int, rng: random.Random) -> list[str]:
    """Neighbouring passages with at most `tokens` together, from a random place (the hay is a ring)."""
    start, used = rng.randrange(len(hay)), 0
    taken: list[str] = []
    while True:
        text, size = hay[(start + len(taken)) % len(hay)]
        if used + size + 1 > tokens:
            return taken
        taken.append(text)
        used += size + 1


def _plant(passages: Sequence[str], sentences: Sequence[str], rng: random.Random) -> tuple[list[str], list[int]]:
    """The passages with each sentence in one of them, and which one each sentence went to."""
    context = list(passages)
    places = rng.sample(range(len(context)), min(len(context), len(sentences)))
    where = [places[i % len(places)] for i in range(len(sentences))]
    for index, sentence in zip(where, sentences, strict=True):
        text = context[index]
        gaps = list(_SENTENCE_END.finditer(text))
        choice = rng.randrange(-1, len(gaps) + 1)
        if choice == -1:
            context[index] = f"{sentence}\n{text}"
        elif choice == len(gaps):
            context[index] = f"{text}\n{sentence}"
        else:  # between two sentences, set off on both sides as they were from each other
            gap = gaps[choice]
            context[index] = f"{text[: gap.end()]}{sentence}{gap.group()}{text[gap.end() :]}"
    return context, where
