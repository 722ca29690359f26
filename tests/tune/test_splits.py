"""Splits: nothing in two parts, whatever the groups; and refusals that name what is wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.bench.task import Task
from thrifty.errors import InvalidInput
from thrifty.tune.splits import check_disjoint, content_hash, data_hash, group_of, groups_of, split


def task(ident: str, group: str | None = None, text: str | None = None) -> Task:
    return Task(id=ident, messages=({"role": "user", "content": text or f"question {ident}"},), gold="1", group=group)


def plain(n: int) -> list[Task]:
    return [task(f"t{i}") for i in range(n)]


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 25)), min_size=40, max_size=80),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_no_group_and_no_question_is_in_two_parts(shape: list[tuple[int, int]], seed: int, rng: random.Random) -> None:
    tasks = [task(f"t{i}", f"g{g}" if g < 9 else None, f"q{q}") for i, (g, q) in enumerate(shape)]
    try:
        parts = split(tasks, seed=seed).parts()
    except InvalidInput as error:
        assert "independent groups" in str(error)
        return
    assert sorted(t.id for part in parts.values() for t in part) == sorted(t.id for t in tasks)
    for key in (group_of, content_hash):
        sets = [{key(t) for t in part} for part in parts.values()]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    check_disjoint(*parts.values())
    shuffled = list(tasks)
    rng.shuffle(shuffled)
    again = split(shuffled, seed=seed).parts()
    assert {n: {t.id for t in p} for n, p in again.items()} == {n: {t.id for t in p} for n, p in parts.items()}


def test_shares_are_of_groups() -> None:
    tasks = [task(f"{g}-{i}", f"g{g}") for g in range(100) for i in range(1 + g % 3)]
    parts = split(tasks, shares=(0.3, 0.5, 0.2), seed=3).parts()
    assert [len(groups_of(part)) for part in parts.values()] == [30, 50, 20]


def test_another_seed_is_another_split_and_a_split_looks_random() -> None:
    tasks = plain(400)
    one, two = (set(t.id for t in split(tasks, seed=s).calibration) for s in (0, 1))
    assert one != two
    # the first half of the file is not favoured: hypergeometric, 200 of 400, sd 5
    assert abs(sum(int(i[1:]) < 200 for i in one) - 100) < 25


def test_a_share_of_zero_leaves_a_part_empty() -> None:
    parts = split(plain(10), shares=(0, 1, 0))
    assert (len(parts.search), len(parts.calibration), len(parts.holdout)) == (0, 10, 0)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0, 0.5), (1, -1, 1), (float("nan"), 1, 1), (1, float("inf"), 1)])
def test_bad_shares(shares: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInput, match="shares"):
        split(plain(10), shares=shares)


def test_too_few_groups() -> None:
    with pytest.raises(InvalidInput, match="2 independent groups"):
        split([task(f"t{i}", f"g{i % 2}") for i in range(50)])


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([task("a")], "example 'a' is in the search part"),
        ([task("x", "g")], "group 'g' is in the search part and in the calibration part"),
        ([task("x", text="question a")], "'x' of the calibration part asks what 'a' of the search part asks"),
        ([task("x"), task("x")], "'x' occurs twice in the calibration part"),
        ([], "no examples"),
    ],
)
def test_an_overlap_is_refused_and_named(calibration: list[Task], words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_disjoint([task("a"), task("b", "g")], calibration, [task("z")])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_an_id_that_is_another_partss_group_is_an_overlap() -> None:
    with pytest.raises(InvalidInput, match="group 'a'"):
        check_disjoint([task("a")], [task("b", "a")])


def test_the_data_hash_sees_every_field_and_no_order() -> None:
    tasks = plain(5)
    known = data_hash(tasks)
    assert data_hash(tasks[::-1]) == known and len(known) == 64
    for changed in (
        replace(tasks[0], gold="2"),
        replace(tasks[0], group="g"),
        replace(tasks[0], scorer="numeric"),
        replace(tasks[0], max_tokens=5),
        task("t0", text="another"),
    ):
        assert data_hash([changed, *tasks[1:]]) != known
    assert data_hash(tasks[1:]) != known
    with pytest.raises(InvalidInput, match="twice"):
        data_hash([*tasks, tasks[0]])
    with pytest.raises(InvalidInput, match="no examples"):
        data_hash([])
