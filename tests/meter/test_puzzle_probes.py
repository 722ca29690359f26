"""Puzzles against known shortest solutions and rules written out again; the analyses against planted figures."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Budget, Call, InvalidInput, Plan
from thrifty.engines.scripted import Draw, Reply, ScriptedEngine
from thrifty.meter.puzzle_probes import (
    Candidate,
    answered,
    candidates_in,
    check,
    levels,
    lists_in,
    overthought,
    probe,
    regimes,
    turning_point,
)
from thrifty.meter.puzzles import PUZZLES, Blocks, Checkers, Hanoi, River, shortest

SMALL = [Hanoi(3), Checkers(2), River(3), Blocks(4)]


@pytest.mark.parametrize("n", range(1, 7))
def test_the_shortest_solutions_have_the_known_lengths(n: int) -> None:
    hanoi = shortest(Hanoi(n))
    assert hanoi is not None and len(hanoi) == 2**n - 1 and check(Hanoi(n), hanoi).solved
    if n <= 5:
        jumps = shortest(Checkers(n))
        assert jumps is not None and len(jumps) == (n + 1) ** 2 - 1 and check(Checkers(n), jumps).solved


@pytest.mark.parametrize(
    ("n", "boat", "crossings"), [(1, 2, 1), (2, 2, 5), (3, 2, 11), (4, 3, 9), (5, 3, 11), (6, 4, 9)]
)
def test_jealous_couples_cross_in_the_known_number_of_crossings(n: int, boat: int, crossings: int) -> None:
    found = shortest(River(n, boat))
    assert found is not None and len(found) == crossings and check(River(n, boat), found).solved


def test_a_solution_of_blocks_builds_the_goal() -> None:
    for n in range(2, 6):
        found = shortest(Blocks(n))
        assert found is not None
        stacks = [list(s) for s in Blocks(n).start]
        for block, source, target in found:
            assert stacks[source].pop() == block
            stacks[target].append(block)
        assert stacks == [list(Blocks(n).goal), [], []]


def legal(puzzle: Any, state: Any, move: Any) -> bool:
    """The rules once more, from stacks and sets."""
    if puzzle.name == "hanoi":
        disk, a, b = move
        pegs = [[d for d in range(puzzle.size, 0, -1) if state[d - 1] == peg] for peg in range(3)]
        return a != b and b in (0, 1, 2) and pegs[a][-1:] == [disk] and (not pegs[b] or pegs[b][-1] > disk)
    if puzzle.name == "checkers":
        colour, a, b = move
        text = "".join(state)
        if not (0 <= a < len(text) and 0 <= b < len(text)) or text[a] != colour or text[b] != "_":
            return False
        left, between = min(a, b), text[min(a, b) + 1 : max(a, b)]
        forward = (colour == "R") == (left == a)
        return forward and between in ("", "B" if colour == "R" else "R")
    if puzzle.name == "river":
        side = {p: s for p, s in zip(puzzle.people, state, strict=False)}
        if len(set(move)) != len(move) or not 1 <= len(move) <= puzzle.boat:
            return False
        if any(side.get(p) != state[-1] for p in move):
            return False
        after = {p: 1 - s if p in move else s for p, s in side.items()}
        groups = [set(move), *({p for p, s in after.items() if s == bank} for bank in (0, 1))]
        return not any(x[0] == "a" and "A" + x[1:] not in g and any(y[0] == "A" for y in g) for g in groups for x in g)
    block, a, b = move
    return a != b and state[a][-1:] == (block,)


@pytest.mark.parametrize("puzzle", SMALL, ids=lambda p: p.name)
def test_walks_keep_to_the_rules_written_out_again(puzzle: Any) -> None:
    rng = random.Random(1)
    names = {
        "hanoi": lambda: (rng.randint(1, 3), rng.randint(0, 2), rng.randint(0, 2)),
        "checkers": lambda: (rng.choice("RB"), rng.randint(0, 4), rng.randint(0, 4)),
        "river": lambda: tuple(rng.choices(River(3).people, k=rng.randint(1, 3))),
        "blocks": lambda: (rng.randint(1, 4), rng.randint(0, 2), rng.randint(0, 2)),
    }
    for _ in range(30):
        state = puzzle.start
        for _ in range(12):
            for move in (names[puzzle.name]() for _ in range(20)):
                assert (puzzle.after(state, move) is not None) == legal(puzzle, state, move)
            options = list(puzzle.moves(state))
            assert all(legal(puzzle, state, m) for m in options) and len(options) == len(set(options))
            if not options:
                break
            state = puzzle.after(state, rng.choice(options))


@pytest.mark.parametrize("puzzle", SMALL, ids=lambda p: p.name)
def test_no_corrupted_list_of_moves_passes(puzzle: Any) -> None:
    moves = shortest(puzzle)
    assert moves is not None
    for i in range(len(moves)):
        assert not check(puzzle, moves[:i]).solved  # cut short
        assert not check(puzzle, moves[:i] + moves[i + 1 :]).solved  # one left out
        assert check(puzzle, [*moves[:i], ("x", -1, 99), *moves[i:]]).first_illegal == i
    for odd in ((), (1,), (None, {}, []), (1.5, 0, 2), (True, 0, 2), ("R", "0", 1), (10**30, 0, 1)):
        assert puzzle.after(puzzle.start, odd) is None


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4), st.text(max_size=30))
def test_lists_are_read_from_text(moves: list[list[int]], noise: str) -> None:
    noise = noise.replace("[", "").replace("]", "")
    text = f"{noise} moves = {json.dumps(moves)} {noise}"
    assert [m for _, m in lists_in(text)] == [[tuple(m) for m in moves]]
    assert answered(f"[[1, 2]] {text}") == [tuple(m) for m in moves]
    assert answered(noise) == []


def test_candidates_in_thinking_and_overthinking() -> None:
    right, wrong = [[1, 0, 2]], [[1, 0, 1]]
    text = f"try {right}, no, {wrong} it is"
    found = candidates_in(Hanoi(1), text)
    assert [c.solved for c in found] == [True, False] and 0 < found[0].position < found[1].position < 1
    assert overthought(found) and not overthought(found[:1]) and not overthought(found[::-1][:1])
    assert not overthought([Candidate(0.1, False), Candidate(0.9, True)])


@pytest.mark.parametrize("peak", [3, 5, 8])
def test_the_planted_turning_point_is_found(peak: int) -> None:
    rng = random.Random(peak)
    tokens = {
        n: [1000 * (n if n <= peak else 2 * peak - n) + rng.gauss(0, 150) + 2000 for _ in range(25)]
        for n in range(1, 12)
    }
    turn = turning_point(tokens, resamples=200)
    assert turn.size == peak and turn.low <= peak <= turn.high and turn.falls > 0.95
    rising = turning_point({n: [100.0 * n] * 3 for n in range(1, 6)}, resamples=20)
    assert rising.size == 5 and rising.falls == 0


def test_regimes() -> None:
    found = regimes({1: 0.8, 2: 0.9, 3: 0.5, 4: 0.02, 9: 1.0}, {1: 0.9, 2: 0.88, 3: 0.1, 4: 0.0})
    assert found == {1: "plain", 2: "equal", 3: "thinking", 4: "collapse"}


async def test_a_plan_is_probed_and_every_figure_is_its_own() -> None:
    """A scripted model that solves Hanoi up to 3 disks, then breaks the rules at its third move, thinking less."""

    def script(call: Call, draw: Draw) -> Reply:
        n = next(i for i in range(1, 9) if f"and {i} disks" in call.question())
        moves = shortest(Hanoi(n)) or []
        right = json.dumps(moves)
        wrong = json.dumps([*moves[:2], [1, 0, 0]])
        thinking = " ".join(["w"] * (10 * n if n <= 3 else 5)) + (
            f" {right}" + (f" or {wrong}" if n == 2 else "") if n <= 3 else ""
        )
        return Reply(f"moves = {right if n <= 3 else wrong}", thinking=thinking)

    pipeline = Plan("p").build(ScriptedEngine(script))
    probes = await probe(pipeline, [Hanoi(n) for n in range(1, 6)], samples=2, cap=1000)
    found = levels(probes)
    assert [x.accuracy for x in found] == [1, 1, 1, 0, 0] and [x.runs for x in found] == [2] * 5
    assert [x.first_illegal for x in found] == [None, None, None, 2, 2] and found[3].first_illegal_spread == 0
    assert [x.overthought for x in found] == [0, 1, 0, 0, 0]
    assert turning_point({x.size: [p.thinking for p in probes if p.size == x.size] for x in found}).size == 3
    short = await probe(pipeline, [Hanoi(3)], samples=1, cap=5)
    assert short[0].capped and not short[0].solved and short[0].output == 5
    account = Account("a", Budget(calls=3))
    assert len(await probe(pipeline, [Hanoi(2)], samples=9, cap=1000, account=account)) == 3
    assert account.settled.calls == 3 and not account.held


def test_every_puzzle_explains_itself() -> None:
    for name, kind in PUZZLES.items():
        text = kind(3).prompt()
        assert kind.name == name and "moves = [" in text and "as JSON" in text
    assert "algorithm" not in Hanoi(2).prompt()


async def test_bad_input() -> None:
    for kind in PUZZLES.values():
        for size in (0, -1, 1001, True, "3"):
            with pytest.raises(InvalidInput, match="size"):
                kind(size)
    for n, boat in ((6, 3), (4, 2), (2, 1)):
        with pytest.raises(InvalidInput, match="cannot cross"):
            River(n, boat)
    for bad in ({1: [1.0], 2: [2.0]}, {1: [1.0], 2: [], 3: [1.0]}):
        with pytest.raises(InvalidInput):
            turning_point(bad)
    pipeline = Plan("p").build(ScriptedEngine("x"))
    for bad_knob in ({"samples": 0}, {"cap": 0}):
        with pytest.raises(InvalidInput):
            await probe(pipeline, [Hanoi(1)], **bad_knob)
    with pytest.raises(InvalidInput, match="states"):
        shortest(Hanoi(8), most=100)
