"""reasoning-gym tasks: its own verifiers accept the gold of every task, and arithmetic golds are right."""

from __future__ import annotations

import json
import math
import re

import pytest

reasoning_gym = pytest.importorskip("reasoning_gym")

from thrifty.bench import gym, scorers  # noqa: E402
from thrifty.bench.task import Task, suite  # noqa: E402
from thrifty.errors import InvalidInput  # noqa: E402

# Numbers, texts, lists, boards, graphs; and two whose entries JSON cannot hold (arc_agi, rearc).
GENERATORS = (
    "chain_sum", "gcd", "syllogism", "word_sorting", "number_sorting", "mini_sudoku", "shortest_path", "maze",
    "countdown", "letter_counting", "rotate_matrix", "zebra_puzzles", "rearc",
)  # fmt: skip


def through_json(task: Task) -> Task:
    return Task.from_dict(json.loads(json.dumps(task.to_dict())))


@pytest.mark.parametrize("name", GENERATORS)
async def test_the_verifier_accepts_the_gold_and_refuses_another_answer(name: str) -> None:
    for task in map(through_json, gym.gym(name, 2, 0)):
        score = reasoning_gym.get_score_answer_fn(name)
        entry = gym.entry_of(task.scorer_settings)
        assert score(task.gold, entry) == 1
        assert score("not an answer", entry) < 0.5
        assert entry["question"].strip() == task.messages[0]["content"]
        scorer = scorers.get(task.scorer, **task.scorer_settings)
        assert await scorer(f"Well.\n#### {task.gold}", task.gold, task.to_dict()) == 1


@pytest.mark.parametrize("name", ["chain_sum", "maze", "rearc"])
def test_the_entry_is_the_one_the_package_makes(name: str) -> None:
    for source, entry in gym._entries(name, 3, 5, {}):
        direct = reasoning_gym.create_dataset(name, seed=source["seed"], size=source["size"])
        assert direct[source["index"]] == entry
        assert gym.entry_of(source) == entry


def test_the_same_seed_the_same_tasks_and_neighbouring_seeds_share_nothing() -> None:
    first, again, other = (gym.gym("chain_sum", 40, seed, min_digits=4) for seed in (0, 0, 1))
    assert first == again
    questions = [{task.messages[0]["content"] for task in tasks} for tasks in (first, other)]
    assert len(questions[0]) == 40 and not questions[0] & questions[1]


def test_a_question_occurs_once_and_a_small_generator_says_so() -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert len({task.messages[0]["content"] for task in gym.gym("products", 90, 0, **tiny)}) == 90
    with pytest.raises(InvalidInput, match="gave 100 different questions with these settings, not 150"):
        gym.gym("products", 150, 0, **tiny)


def test_unknown_and_wrong_are_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="unknown reasoning-gym generator 'chain_sums': did you mean 'chain_sum'"):
        gym.gym("chain_sums", 1, 0)
    with pytest.raises(InvalidInput, match="unknown setting 'max_digit': did you mean 'max_digits'"):
        suite("reasoning-gym:chain_sum", 1, 0, settings={"max_digit": 2})
    with pytest.raises(InvalidInput, match="reasoning-gym:chain_sum: .*min_digits"):
        gym.gym("chain_sum", 1, 0, min_digits=0)
    with pytest.raises(InvalidInput, match="composite"):
        gym.gym("composite", 1, 0)
    with pytest.raises(InvalidInput, match="hold `dataset` and `entry`"):
        gym.entry_of({"dataset": "chain_sum"})


def answer(question: str) -> int:
    """The sum, product, divisor or multiple that a question of the arithmetic suite asks for."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if "Multiple" in question:
        return math.lcm(*numbers)
    if "Divisor" in question:
        return math.gcd(*numbers)
    if "*" in question:
        return math.prod(numbers)
    signs = [1, *(1 if sign == "+" else -1 for sign in re.findall(r"[+-]", question))]
    return sum(sign * number for sign, number in zip(signs, numbers, strict=True))


async def test_arithmetic_golds_are_right_and_levels_take_turns() -> None:
    tasks = suite("arithmetic", 60, 3)
    levels = list(gym.ARITHMETIC)
    for number, task in enumerate(tasks):
        question = str(task.messages[0]["content"])
        assert int(task.gold) == answer(question), question
        assert (task.scorer, task.max_tokens, task.extra["level"]) == ("numeric", 96, levels[number % len(levels)])
        score = scorers.get(task.scorer, **task.scorer_settings)
        assert await score(f"We have {question} so it is {task.gold}.", task.gold, task.to_dict()) == 1
        assert await score(f"{task.gold} or rather {int(task.gold) + 1}", task.gold, task.to_dict()) == 0
    assert len({task.messages[0]["content"] for task in tasks}) == 60
    assert tasks == gym.arithmetic(60, 3)


def test_arithmetic_is_large_enough_for_a_long_run() -> None:
    assert len(gym.arithmetic(400, 0)) == 400
