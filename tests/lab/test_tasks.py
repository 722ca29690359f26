"""Task families: answers against brute force, verifiers against wrong answers, and no puzzle without a solution."""

from __future__ import annotations

import itertools
import random
import re
from collections import deque

import pytest

from thrifty import InvalidInput
from thrifty.lab.tasks import DIFFICULTIES, FAMILIES, check, make
from thrifty.lab.tasks.problem import Slips, faultless
from thrifty.lab.tasks.puzzles import jumps, moves_of_hanoi, moves_of_jump

KINDS = list(itertools.product(FAMILIES, DIFFICULTIES))


def some(name: str, difficulty: int, n: int = 40) -> list:
    rng = random.Random(f"{name}{difficulty}")
    return [make(name, rng, difficulty) for _ in range(n)]


@pytest.mark.parametrize(("name", "difficulty"), KINDS)
def test_the_verifier_takes_the_answer_and_refuses_others(name: str, difficulty: int) -> None:
    problems = some(name, difficulty)
    for problem in problems:
        assert check(name, problem.question, problem.answer)
        assert check(name, problem.question, f" {problem.answer}. ")
        assert not check(name, problem.question, "")
        assert not check(name, problem.question, problem.answer + problem.answer[-1])
    answers = {p.answer for p in problems}
    for problem in problems:
        right = {a for a in answers if check(name, problem.question, a)}
        assert right == {problem.answer}, "the answer is the only one"


@pytest.mark.parametrize("name", FAMILIES)
def test_difficulty_makes_the_derivation_longer(name: str) -> None:
    mean = [sum(sum(map(len, p.steps)) for p in some(name, d, 200)) / 200 for d in DIFFICULTIES]
    assert mean == sorted(mean) and mean[-1] > 1.8 * mean[0]


@pytest.mark.parametrize(("name", "difficulty"), KINDS)
def test_every_way_arrives_at_the_answer_and_a_slip_need_not(name: str, difficulty: int) -> None:
    family, rng = FAMILIES[name], random.Random(1)
    wrong = 0
    for problem in some(name, difficulty):
        for way in range(family.ways):
            assert family.derive(problem.question, rng, faultless, way).answer == problem.answer
        slip = Slips(rng, 0.5)
        wrong += family.derive(problem.question, rng, slip).answer != problem.answer
    assert wrong > 10


def test_the_same_generator_makes_the_same_problem() -> None:
    for name, difficulty in KINDS:
        one, two = (make(name, random.Random(5), difficulty) for _ in range(2))
        assert one == two


def test_arithmetic_is_what_python_computes() -> None:
    for difficulty in DIFFICULTIES:
        for problem in some("arithmetic", difficulty):
            expression = problem.question.removeprefix("Compute ")
            assert re.fullmatch(r"[0-9+-]+", expression)
            total = sum(int(x) for x in re.findall(r"[+-]?[0-9]+", expression))
            assert problem.answer == str(total) and 0 <= total <= 99
            for step in problem.steps:
                left, _, right = step.partition("=")
                assert sum(int(x) for x in re.findall(r"[+-]?[0-9]+", left)) == int(right)


def test_sorting_and_counting_are_what_python_says() -> None:
    for difficulty in DIFFICULTIES:
        for problem in some("sorting", difficulty):
            row, place = re.fullmatch(r"Sort \d letters ([a-z]+), item (\d)", problem.question).groups()  # type: ignore[union-attr]
            assert problem.answer == sorted(row)[int(place) - 1]
        for problem in some("counting", difficulty):
            target, row = problem.question[6], problem.question[11:]
            assert int(problem.answer) == sum(c == target for c in row[1::2])


def test_paths_are_the_shortest_of_a_search_over_the_edges() -> None:
    for difficulty in DIFFICULTIES:
        for problem in some("paths", difficulty):
            start, goal = problem.question[5], problem.question[10]
            edges = [(word[0].lower(), word[1]) for word in problem.question.partition(": ")[2].split()]
            found: list[str] = []
            waiting = deque([start])
            while waiting:
                path = waiting.popleft()
                if path[-1] == goal:
                    found.append(path)
                waiting.extend(path + child for child, parent in edges if parent == path[-1] and child not in path)
            assert found == [problem.answer]


def test_circuits_are_what_python_evaluates() -> None:
    for difficulty in DIFFICULTIES:
        for problem in some("boolean", difficulty):
            said, _, asked = problem.question.removeprefix("Gates ").partition(", give ")
            value = {w[0]: w[1] == "1" for w in said.split() if "=" not in w}
            for gate in (w for w in said.split() if "=" in w):
                a, b = value[gate[2]], value[gate[4]]
                value[gate[0]] = {"&": a and b, "|": a or b, "^": a is not b}[gate[3]]
            assert problem.answer == "".join(str(int(value[name])) for name in asked)


def test_hanoi_is_the_shortest_of_a_search_over_all_positions() -> None:
    disks = 4

    def moves(state: tuple[int, ...]):  # type: ignore[no-untyped-def]
        for disk in range(disks):
            if state[disk] in state[:disk]:
                continue  # a smaller one lies on it
            for to in range(3):
                if to != state[disk] and to not in state[:disk]:
                    yield (*state[:disk], to, *state[disk + 1 :])

    for goal in range(3):
        distance = {(goal,) * disks: 0}
        waiting = deque(distance)
        while waiting:
            here = waiting.popleft()
            for after in moves(here):
                if after not in distance:
                    distance[after] = distance[here] + 1
                    waiting.append(after)
        assert len(distance) == 3**disks
        assert all(moves_of_hanoi(state, goal) == d for state, d in distance.items())


def test_jumps_without_a_solution_are_not_asked() -> None:
    """By depth-first search over all lines of play, and by the closed form of the number of moves."""

    def solvable(row: str) -> bool:
        blues = row.count("B")
        if row == "B" * blues + "_" + "R" * row.count("R"):
            return True
        return any(solvable(after) for after in jumps(row))

    rows = {"".join(p) for p in itertools.permutations("RRBB_")}
    assert {row for row in rows if moves_of_jump(row) is not None} == {row for row in rows if solvable(row)}
    assert any(moves_of_jump(row) is None for row in rows)
    assert [moves_of_jump("R" * n + "_" + "B" * n) for n in (1, 2, 3)] == [(n + 1) ** 2 - 1 for n in (1, 2, 3)]
    with pytest.raises(InvalidInput, match="no solution"):
        check("puzzles", "Jump " + next(row for row in sorted(rows) if moves_of_jump(row) is None), "3")
    for difficulty in DIFFICULTIES:
        for problem in some("puzzles", difficulty):
            if not problem.question.startswith("Jump"):
                continue
            row = problem.question.removeprefix("Jump ")
            reds = [i for i, c in enumerate(row) if c == "R"]
            blues = [i for i, c in enumerate(row) if c == "B"]
            travel = sum(len(row) - len(reds) + k - i for k, i in enumerate(reds))
            travel += sum(i - k for k, i in enumerate(blues))
            crossings = sum(b > r for r in reds for b in blues)
            assert int(problem.answer) == travel - crossings
            assert [step.lstrip("0123456789") for step in problem.steps][-1] == "B" * len(blues) + "_" + "R" * len(reds)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="is no"):
        check(name, "What is 2 + 2?", "4")
    with pytest.raises(InvalidInput, match="1 to 5"):
        make(name, random.Random(0), 6)


def test_an_unknown_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'sorting'"):
        make("sortin", random.Random(0), 1)
