"""Step labels against an oracle that works every question out anew: sums of strings, sorted rows, searches over graphs,
over towers and over rows of checkers. On traces as the writer makes them, and on some with letters changed."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import InvalidInput
from thrifty.lab.steps import AGAIN, OTHER_WAY, first_error, label
from thrifty.lab.tasks import FAMILIES, make
from thrifty.lab.traces import CLOSE, OPEN, Habits, write

# --- the oracle: which lines are true of a question, after those that stand before them ---


def true_sum(question: str, before: Sequence[str], line: str) -> bool:
    start, terms = re.fullmatch(r"Compute (\d+)(.*)", question).groups()  # type: ignore[union-attr]
    free = re.findall(r"[+-]\d", terms)
    taken = []
    for said in before:
        if (found := re.fullmatch(r"\d+([+-]\d)=-?\d+", said)) and found[1] in free:
            free.remove(found[1])
            taken.append(found[1])
    total = int(start) + sum(map(int, taken))
    return line in [f"{total}{term}={total + int(term)}" for term in free]


def true_count(question: str, before: Sequence[str], line: str) -> bool:
    target, row = question.removeprefix("Count ").split(" in ")
    parsed = [s for s in [*before, line] if re.fullmatch(r"[A-Z][a-z]\d", s)]
    backward = bool(parsed) and len(row) > 2 and parsed[0][0] == row[-2]
    pairs = [row[i : i + 2] for i in range(0, len(row), 2)]
    ends = [row[i:] if backward else row[: i + 2] for i in range(0, len(row), 2)]
    return line in [f"{pair}{end.count(target)}" for pair, end in zip(pairs, ends, strict=True)]


def true_rank(question: str, before: Sequence[str], line: str) -> bool:
    row = question.split("letters ")[1].split(",")[0]
    return line in [f"{i}{letter}" for i, letter in enumerate(sorted(row), 1)]


def true_edge(question: str, before: Sequence[str], line: str) -> bool:
    root, goal = re.findall(r"\b[a-z]\b", question)[:2]
    edges = question.split(": ")[1].split()

    def down(node: str) -> Iterator[list[str]]:
        if node == goal:
            yield []
        for edge in edges:
            if edge[1] == node:
                yield from ([edge, *rest] for rest in down(edge[0].lower()))

    return line in next(down(root))


def true_gate(question: str, before: Sequence[str], line: str) -> bool:
    words = question.removeprefix("Gates ").split(",")[0].split()
    gates = {w[0]: w[2:] for w in words if "=" in w}
    inputs = {w[0]: int(w[1]) for w in words if "=" not in w}

    def value(name: str) -> int:
        if name in inputs:
            return inputs[name]
        a, operation, b = gates[name]
        both = value(a) + value(b)
        return {"&": int(both == 2), "|": int(both > 0), "^": both % 2}[operation]

    def written(name: str) -> Iterator[str]:
        a, operation, b = gates[name]
        for one, other in ((a, b), (b, a)):
            yield f"{one}{value(one)}{operation}{other}{value(other)}={name}{value(name)}"

    return line in [text for name in gates for text in written(name)]


@lru_cache(maxsize=256)
def shortest(pegs: str, goal: str) -> tuple[str, ...]:
    """Positions (smallest disk first) on a shortest way to all on `goal`, by breadth."""
    first, seen = (pegs,), {pegs}
    queue = deque([first])
    while queue:
        way = queue.popleft()
        here = way[-1]
        if set(here) <= {goal}:
            return way
        for disk, peg in enumerate(here):
            if peg in here[:disk]:
                continue
            for to in {*"abc"} - set(here[: disk + 1]):
                after = here[:disk] + to + here[disk + 1 :]
                if after not in seen:
                    seen.add(after)
                    queue.append((*way, after))
    raise AssertionError("no way")


def true_disk(question: str, before: Sequence[str], line: str) -> bool:
    disks = re.findall(r"(\d)([abc])", question.split(" to ")[0])
    goal, total, lines = question[-1], 0, []
    pegs = "".join(peg for _, peg in reversed(disks))
    for disk, peg in disks:
        small = pegs[: int(disk)]
        way = shortest(small, goal)
        moved = [i for i, (a, b) in enumerate(zip(way, way[1:], strict=False)) if a[-1] != b[-1]]
        third = way[moved[0]][0] if moved and len(small) > 1 else None
        if not moved:
            third = goal
        elif third is None:  # nothing is smaller: the third peg is the one that is left
            third = next(p for p in "abc" if p not in (peg, goal))
        cost = len(way) - 1 - (len(shortest(small[:-1], third)) - 1 if small[:-1] else 0)
        total += cost
        lines.append(f"{disk}{peg}{'>' if moved else '='}{goal}+{cost}={total},{third}")
        goal = third
    return line in lines


@lru_cache(maxsize=256)
def rows_from(start: str) -> dict[str, int]:
    """Every row that can be reached, with the number of moves to it."""
    found, queue = {start: 0}, deque([start])
    while queue:
        here = queue.popleft()
        for after in moved(here):
            if after not in found:
                found[after] = found[here] + 1
                queue.append(after)
    return found


def moved(row: str) -> set[str]:
    swaps = (("R_", "_R"), ("RB_", "_BR"), ("_B", "B_"), ("_RB", "BR_"))
    return {row[: m.start()] + b + row[m.end() :] for a, b in swaps for m in re.finditer(re.escape(a), row)}


def true_row(question: str, before: Sequence[str], line: str) -> bool:
    start = question.removeprefix("Jump ")
    goal = "B" * start.count("B") + "_" + "R" * start.count("R")
    here = start
    for said in before:
        row = said.lstrip("0123456789")
        if row in moved(here) and re.fullmatch(r"\d{1,3}[RB_]+", said):
            here = row
    return line in [f"{rows_from(start)[row]}{row}" for row in moved(here) if goal in rows_from(row)]


Oracle = Callable[[str, Sequence[str], str], bool]


def oracle_of(question: str) -> Oracle:
    words = {"Compute": true_sum, "Count": true_count, "Sort": true_rank, "Path": true_edge, "Gates": true_gate}
    return {**words, "Hanoi": true_disk, "Jump": true_row}[question.split()[0]]


def expected(question: str, answer: str, text: str) -> list[bool]:
    """The labels of all lines, from the oracle and the right answer."""
    labels: list[bool] = []
    known: list[tuple[str, bool]] = []
    thinking, _, said = text.removeprefix(OPEN).partition(CLOSE)
    standing = ""
    for paragraph in thinking.strip().split("\n\n"):
        lines = paragraph.split("\n")
        if lines[0].startswith("Wait, is "):
            quoted = lines[0].removeprefix("Wait, is ").removesuffix(" right? Yes.")
            labels.append(next(right for line, right in reversed(known) if line == quoted))
            continue
        if lines[0] in (AGAIN, OTHER_WAY):
            labels.append(True)
            lines = lines[1:]
        for i, line in enumerate(lines):
            if line.startswith("So "):
                concluded, *remark = re.split(r", (?=not|same)", line.removeprefix("So ").removesuffix("."))
                told = not remark or (
                    concluded == standing if remark[0] == "same as before" else remark[0] == f"not {standing}"
                )
                labels.append(concluded == answer and told)
                standing = concluded
            else:
                labels.append(oracle_of(question)(question, lines[:i], line))
                known.append((line, labels[-1]))
    return [*labels, said == f"Answer: {answer}"]


# --- the tests ---

TRACES = st.tuples(
    st.sampled_from(sorted(FAMILIES)), st.integers(1, 5), st.integers(0, 10**9), st.sampled_from([0.0, 0.05, 0.3])
)


@given(TRACES)
@settings(max_examples=150, deadline=None)
def test_labels_are_the_oracles_on_traces_with_slips_repairs_and_rechecks(drawn: tuple[str, int, int, float]) -> None:
    name, difficulty, seed, slip = drawn
    rng = random.Random(seed)
    habits = Habits(slip=slip, careful=slip / 2, direct=0.0, cut=0.0, recheck=(0.9, 0.7, 0.5), glance=0.4)
    trace = write(make(name, rng, difficulty), rng, habits)
    problem = trace.problem
    steps = label(name, problem.question, trace.text)
    assert [s.right for s in steps] == expected(problem.question, problem.answer, trace.text)
    assert all(trace.text[s.start :].startswith(s.text) for s in steps)
    assert (first_error(steps) is None) == (trace.slips == 0), "every slip is found, and nothing else"
    assert {s.kind for s in steps} <= {"line", "conclusion", "glance", "turn", "answer"}


@given(TRACES, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_labels_are_the_oracles_when_letters_are_changed(
    drawn: tuple[str, int, int, float], rng: random.Random
) -> None:
    name, difficulty, seed, slip = drawn
    problem = make(name, random.Random(seed), difficulty)
    made = FAMILIES[name].derive(problem.question, rng, lambda: rng.random() < slip, 0)
    lines = list(made.lines)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(lines))
        at = rng.randrange(len(lines[i]))
        lines[i] = lines[i][:at] + rng.choice("0123456789abcdABCDRB_+-=&|^>,") + lines[i][at + 1 :]
    if rng.random() < 0.3:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    text = "\n".join([OPEN.strip(), *lines, f"So {made.answer}.", "", "</think>", "", f"Answer: {made.answer}"])
    steps = label(name, problem.question, text)
    assert [s.right for s in steps] == expected(problem.question, problem.answer, text)


@given(st.sampled_from(["arithmetic", "boolean", "puzzles"]), st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_any_order_that_is_true_is_right(name: str, seed: int) -> None:
    """Terms of a sum in any order, gates with their inputs swapped, checkers along any way to the goal."""
    rng = random.Random(seed)
    question = make(name, rng, 2).question
    while name == "puzzles" and not question.startswith("Jump"):
        question = make(name, rng, 2).question
    if name == "arithmetic":
        start, terms = re.fullmatch(r"Compute (\d+)(.*)", question).groups()  # type: ignore[union-attr]
        total, lines = int(start), []
        for term in rng.sample(re.findall(r"[+-]\d", terms), len(re.findall(r"[+-]\d", terms))):
            lines.append(f"{total}{term}={total + int(term)}")
            total += int(term)
        if any("-" in line.split("=")[1] or line.startswith("-") for line in lines):
            return  # a total below nothing has no form in the language
    elif name == "boolean":
        lines = [re.sub(r"(..)([&|^])(..)=", r"\3\2\1=", line) for line in make_lines(name, question)]
    else:
        here, lines = question.removeprefix("Jump "), []
        goal = "B" * here.count("B") + "_" + "R" * here.count("R")
        while here != goal:
            here = rng.choice(sorted(row for row in moved(here) if goal in rows_from(row)))
            lines.append(f"{len(lines) + 1}{here}")
    assert all(s.right for s in label(name, question, "\n".join(lines)))


def make_lines(name: str, question: str) -> tuple[str, ...]:
    return FAMILIES[name].derive(question, random.Random(0), lambda: False, 0).lines


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("27+5=33\n33-8=25\nSo 25.\n\nWait, let me check.\n27+5=32\n32-8=24\nSo 24, not 25.\n", [0, 0, 0, 1, 1, 1, 1]),
        ("27+5=32\n32-8=24\nSo 24.\n\nWait, is 27+5=32 right? Yes.\n", [1, 1, 1, 1]),
        ("27+5=32\n32-8=24\nSo 24.\n\nWait, is 27+5=32 right? No.\n", [1, 1, 1, 0]),
        ("27+5=33\nWait, is 27+5=33 right? Yes.\n", [0, 0]),
        ("27+5=33\nWait, is 27+5=33 right? No.\n", [0, 1]),
        ("27+5=32\nWait, is 32-8=24 right? Yes.\n", [1, 0]),  # nothing was said that could be looked at again
        ("So 24, same as before.\n", [0]),
        ("So 25.\n\nSo 24, same as before.\n\nSo 24, not 24.\n\nSo 24, same as before.\n", [0, 0, 0, 1]),
        ("27+6=33\n27+5=32\n27+5=32\n", [0, 1, 0]),  # no term; right; the term is taken
        ("Purr.\n27+05=32\n027+5=32\n\\boxed{24}\n", [0, 0, 0, 0]),
        ("<think>\nSo 24.\n\n</think>\n\n**Final Answer:** 24", [1, 1]),
        ("</think>\n\n\\boxed{24}", [1]),
        ("</think>\n\n²4", [0]),
        ("Answer: 23", [0]),
    ],
)
def test_repairs_glances_remarks_and_what_is_none_of_the_language(text: str, labels: list[int]) -> None:
    assert [int(s.right) for s in label("arithmetic", "Compute 27+5-8", text)] == labels


def test_a_cut_line_is_left_out_only_when_asked() -> None:
    text = "27+5=32\n32-8=2"
    assert [s.right for s in label("arithmetic", "Compute 27+5-8", text)] == [True, False]
    assert [s.right for s in label("arithmetic", "Compute 27+5-8", text, whole=False)] == [True]
    assert label("arithmetic", "Compute 27+5-8", "") == () and first_error(()) is None


def test_turns_claim_nothing_and_begin_a_derivation() -> None:
    steps = label("counting", "Count b in AaBb", f"Aa0\nBb1\nSo 1.\n\n{OTHER_WAY}\nBb1\nAa1\nSo 1, same as before.\n")
    assert [s.derivation for s in steps] == [0, 0, 0, 1, 1, 1, 1] and all(s.right for s in steps)
    assert [s.claims for s in steps] == [True] * 3 + [False] + [True] * 3


@pytest.mark.parametrize(
    ("name", "question", "told"),
    [
        ("arithmetics", "Compute 1+2", "did you mean 'arithmetic'"),
        ("arithmetic", "Count b in AaBb", "no arithmetic question"),
        ("puzzles", "Jump RRBB_", "no solution"),
        ("boolean", "Gates A1 B0 C=A&D, give C", "does not stand before it"),
    ],
)
def test_bad_input(name: str, question: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        label(name, question, "1+2=3")


def test_a_path_question_in_a_circle_ends() -> None:
    assert [s.right for s in label("paths", "Path a to c: Cb Bc", "Cb\nBc\n")] == [True, True]
