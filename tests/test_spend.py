"""Spend and Work add field by field, and survive dictionaries."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.resources import NO_WORK, RESOURCES, amounts_of
from thrifty.spend import SPEND_FIELDS, WORK_ADDING, WORK_FIELDS, Spend, Work, total_spend, total_work

numbers = st.integers(0, 2**60)
spends = st.builds(Spend, **{name: numbers for name in SPEND_FIELDS})
seconds = st.integers(0, 2**30).map(lambda n: n / 1024)  # exact in floating point
works = st.builds(Work, **{n: seconds if n in ("engine_seconds", "kv_bytes_mean") else numbers for n in WORK_FIELDS})


@given(spends, spends)
def test_spends_add_by_field(a: Spend, b: Spend) -> None:
    for name in SPEND_FIELDS:
        assert getattr(a + b, name) == getattr(a, name) + getattr(b, name)
    assert (a + b).tokens == a.input + a.output + b.input + b.output


@given(works, works)
def test_works_add_or_take_the_larger(a: Work, b: Work) -> None:
    for name in WORK_FIELDS:
        pair = (getattr(a, name), getattr(b, name))
        assert getattr(a + b, name) == (sum(pair) if name in WORK_ADDING else max(pair))


@given(st.lists(spends, max_size=5), st.lists(works, max_size=5))
def test_totals(some: list[Spend], more: list[Work]) -> None:
    assert total_spend(some).usd == sum(s.usd for s in some)
    assert total_work(more).prefill == sum(w.prefill for w in more)
    assert total_spend([]) == Spend()
    assert total_work([]) == Work()


@given(spends, works)
def test_dictionaries_hold_what_is_not_zero(spend: Spend, work: Work) -> None:
    assert Spend.from_dict(spend.to_dict()) == spend
    assert Work.from_dict(work.to_dict()) == work
    assert all(spend.to_dict().values())
    assert bool(spend) == bool(spend.to_dict())
    assert bool(work) == bool(work.to_dict())


@given(spends, works)
def test_amounts_name_every_resource(spend: Spend, work: Work) -> None:
    """The written-out conversion, against the names."""
    found = {RESOURCES[i]: amount for i, amount in amounts_of(spend, work).items()}
    expected: dict[str, Any] = {"tokens": spend.tokens}
    expected |= {name: getattr(spend, name) for name in SPEND_FIELDS}
    expected |= {name: getattr(work, name) for name in WORK_ADDING}
    expected["engine_seconds"] = round(work.engine_seconds * 1e9)
    assert found == {name: amount for name, amount in expected.items() if amount}
    assert amounts_of(Spend(), NO_WORK) == {}


@pytest.mark.parametrize("bad", [-1, 1.5, True, "3", None])
def test_a_spend_of_anything_but_counts_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidInput, match="at least 0"):
        Spend.from_dict({"input": bad})


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), True, "3"])
def test_a_work_of_anything_but_numbers_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidInput, match="at least 0"):
        Work.from_dict({"engine_seconds": bad})


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'output'"):
        Spend.from_dict({"ouput": 1})
    with pytest.raises(InvalidInput, match="did you mean 'prefill'"):
        Work.from_dict({"prefil": 1})
