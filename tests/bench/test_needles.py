"""The retrieval suite: what was planted is there once, whole, at a known place, and nothing else was changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

import thrifty
from thrifty.bench import scorers
from thrifty.bench.needles import MAX_DISTRACTORS, PASSAGE_TOKENS, characters, needles
from thrifty.bench.task import Task
from thrifty.errors import InvalidInput

NEEDLE = re.compile(r"The special magic number for (\w+) is (\d{5})\.")
TASKS = needles(120, 0)


def words(text: str) -> int:
    """A count by another rule than characters: a bit more than a token a word."""
    return len(text.split()) + len(re.findall(r"[^\w\s]", text))


def planted(task: Task) -> dict[str, str]:
    found = [pair for passage in task.context for pair in NEEDLE.findall(passage)]
    assert len({town for town, _ in found}) == len(found), "each needle stands once"
    return dict(found)


def asked(task: Task) -> list[str]:
    (message,) = task.messages
    tail = str(message["content"]).removeprefix("{context}\n\n")
    return re.findall(r"[A-Z]\w+", tail.partition(" for ")[2])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_the_needles_are_there_and_answer_the_question(task: Task) -> None:
    numbers = planted(task)
    towns = asked(task)
    assert len(numbers) == len(towns) + task.extra["distractors"]
    assert len(set(numbers.values())) == len(numbers)
    if task.extra["kind"] == "single":
        assert (len(towns), task.scorer, task.gold) == (1, "contains", numbers[towns[0]])
    else:
        assert 2 <= len(towns) <= 4
        assert (task.scorer, task.gold) == ("recall", [numbers[town] for town in towns])
    assert task.prefix == f"The special magic number for {towns[0]} is"
    holding = [i for i, text in enumerate(task.context) for town, _ in NEEDLE.findall(text) if town in towns]
    assert task.extra["passages"] == holding
    if len(task.context) > len(numbers):
        assert all(len(NEEDLE.findall(text)) <= 1 for text in task.context)


@pytest.mark.parametrize("count", [characters, words])
def test_contexts_have_the_asked_length(count) -> None:  # type: ignore[no-untyped-def]
    for task in needles(40, 1, count=count):
        tokens = count("\n\n".join(task.context))
        assert task.extra["tokens"] == tokens
        assert task.extra["length"] - 160 < tokens <= task.extra["length"]
        plain = [NEEDLE.sub("", text) for text in task.context]
        least, most = PASSAGE_TOKENS
        assert all(least * 0.8 <= count(text) <= most * 1.2 for text in plain)


def test_without_the_needles_the_context_is_the_hay_in_its_order() -> None:
    hay = " ".join(" ".join(topics[name] for name in sorted(topics)).split())
    towns = {town for task in TASKS for town in planted(task)}
    assert len(towns) > 20
    for task in TASKS:
        at = found = wraps = 0
        for passage in task.context:
            rest = " ".join(NEEDLE.sub(" ", passage).split())
            assert towns.isdisjoint(re.findall(r"\w+", rest))
            lines = [" ".join(line.split()) for line in NEEDLE.sub(" ", passage).split("\n")]
            assert all(line in hay for line in lines)
            if rest not in hay:  # a table inside was left out
                continue
            if hay.find(rest, at) < 0:
                at, wraps = 0, wraps + 1
            at = hay.find(rest, at)
            found += 1
        assert found >= 0.8 * len(task.context)
        assert wraps <= 1, "the end of the hay joins its beginning"


def test_the_mixture() -> None:
    lengths = [task.extra["length"] for task in TASKS]
    assert lengths.count(4000) == 12
    assert {lengths.count(length) for length in (500, 1000, 2000)} == {36}
    assert sum(task.extra["kind"] == "list" for task in TASKS) == 30
    assert {task.extra["distractors"] for task in TASKS} == set(range(MAX_DISTRACTORS + 1))
    depths = [task.extra["depth"] for task in TASKS if task.extra["kind"] == "single"]
    for third in range(3):
        assert sum(third / 3 <= depth <= (third + 1) / 3 for depth in depths) > len(depths) / 6
    assert len({task.hash() for task in TASKS}) == len({task.id for task in TASKS}) == len(TASKS)


def test_settings_are_kept() -> None:
    tasks = needles(20, 0, lengths=(300,), long=None, distractors=(2,), lists=False, prefix=False)
    assert {task.extra["length"] for task in tasks} == {300}
    assert {(task.extra["distractors"], task.extra["kind"], task.prefix) for task in tasks} == {(2, "single", None)}


def test_a_longer_run_begins_with_the_shorter_one_and_seeds_differ() -> None:
    assert needles(7, 0) == TASKS[:7]
    assert all(one.gold != other.gold for one, other in zip(TASKS, needles(20, 1), strict=False))


def test_the_same_in_another_process() -> None:
    code = "from thrifty.bench.needles import needles\nprint(*(task.hash() for task in needles(8, 0)))"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(Path(thrifty.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [task.hash() for task in TASKS[:8]]


def test_the_rendered_prompt_holds_the_passages_then_the_question() -> None:
    task = TASKS[0]
    (message,) = task.rendered()
    head, _, question = message["content"].rpartition("\n\n")
    assert head == "\n\n".join(task.context)
    assert question == f"What is the special magic number for {asked(task)[0]}?"


async def test_the_scorers_tell_the_needle_from_the_distractors() -> None:
    for task in TASKS[:24]:
        numbers = planted(task)
        score = scorers.get(task.scorer, **task.scorer_settings)
        right = [numbers[town] for town in asked(task)]
        wrong = [number for number in numbers.values() if number not in right]
        assert await score(f" {', '.join(right)}.", task.gold, task.to_dict()) == 1
        assert await score(f" {', '.join(wrong)} 1{right[0]}", task.gold, task.to_dict()) == 0
        if task.extra["kind"] == "list":
            assert await score(right[0], task.gold, task.to_dict()) == pytest.approx(1 / len(right))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lengths": (100,)}, "a context of 100 tokens; 200 to"),
        ({"lengths": (10**6,)}, "a context of 1000000 tokens"),
        ({"long": 5}, "a context of 5 tokens"),
        ({"distractors": (6,)}, "6 distractors asked for; 0 to 5"),
        ({"distractors": (-1,)}, "-1 distractors"),
        ({"lengths": ()}, "at least one value each"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        needles(3, 0, **settings)  # type: ignore[arg-type]
