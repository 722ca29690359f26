"""Truncation: whole passages within the budget, the longest run from an end, by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, InvalidInput, Plan
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.context.truncation import Truncation, fit

lengths = st.lists(st.integers(0, 20), max_size=12)


@given(lengths, st.integers(0, 100))
def test_first_and_last_keep_the_longest_run_that_fits(parts: list[int], most: int) -> None:
    runs = [n for n in range(len(parts) + 1) if sum(parts[:n]) <= most]
    assert fit(parts, most, "first") == list(range(max(runs)))
    mirrored = [len(parts) - 1 - i for i in fit(parts[::-1], most, "first")]
    assert fit(parts, most, "last") == sorted(mirrored)


@given(lengths, st.integers(0, 100))
def test_middle_out_keeps_both_ends_and_as_much_as_fits(parts: list[int], most: int) -> None:
    n = len(parts)
    ends = [(h, t) for h in range(n + 1) for t in range(n + 1 - h) if h - t in (0, 1) or h + t == n and abs(h - t) <= 1]
    ends.sort(key=lambda e: e[0] + e[1])
    best = (0, 0)
    for head, tail in ends:
        if sum(parts[:head]) + sum(parts[n - tail :] if tail else []) > most:
            break
        best = (head, tail)
    assert fit(parts, most, "middle-out") == [*range(best[0]), *range(n - best[1], n)]


def test_an_unknown_end_is_refused() -> None:
    with pytest.raises(InvalidInput, match="middle-out"):
        fit([1], 1, "best")


@pytest.mark.parametrize(
    ("keep", "tokens", "left"),
    [
        ("first", 5, ("a a", "b b b")),
        ("last", 5, ("c", "d d d d")),
        ("middle-out", 6, ("a a", "d d d d")),
        ("first", 1, ()),
        ("first", 0, ()),
        ("last", 10, ("a a", "b b b", "c", "d d d d")),
    ],
)
async def test_tokens_are_the_engines(keep: str, tokens: int, left: tuple[str, ...]) -> None:
    engine = ScriptedEngine("fine")
    pipeline = Plan("t", (Truncation(keep=keep, tokens=tokens),)).build(engine)
    answer = await pipeline.ask("Why?", context=("a a", "b b b", "c", "d d d d"))
    assert engine.calls[-1].context == left
    receipt = answer.receipts[0]
    assert receipt.fired == (len(left) < 4)
    assert receipt.after == 1 + sum(len(p.split()) for p in left) == answer.spend.input
    assert ("no passage kept" in receipt.reason) == (not left)


async def test_a_long_message_loses_paragraphs_and_keeps_its_last() -> None:
    engine = ScriptedEngine("fine")
    pipeline = Plan("t", (Truncation(keep="last", tokens=3, over=4),)).build(engine)
    await pipeline.ask("One two.\n\nThree four.\n \nFive.\n\nWhy so?", Account("t"))
    assert engine.calls[-1].messages[0]["content"] == "Three four.\n \nFive.\n\nWhy so?"
