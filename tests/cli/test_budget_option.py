"""`--budget NAME=NUMBER` as people type it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Budget, InvalidInput
from thrifty.cli._options import budget_of


@pytest.mark.parametrize(
    ("items", "budget"),
    [
        ([], Budget()),
        (["output=96"], Budget(output=96)),
        (["tokens=1e6"], Budget(tokens=1_000_000)),
        (["tokens=1_000", "input=2,000"], Budget(tokens=1000, input=2000)),
        ([" usd = 0.25 "], Budget(usd=250_000_000)),
        (["usd=1e-9"], Budget(usd=1)),
        (["usd=0"], Budget(usd=0)),
        (["deadline=0.5"], Budget(deadline=0.5)),
    ],
)
def test_read(items: list[str], budget: Budget) -> None:
    assert budget_of(items) == budget


@pytest.mark.parametrize(
    "items",
    [
        ["output"],
        ["=5"],
        ["output="],
        ["output=5=6"],
        ["output=nan"],
        ["output=inf"],
        ["output=1e400"],
        ["output=-1"],
        ["output=0.5"],
        ["output=²"],
        ["output=" + "9" * 5000],
        ["usd=nan"],
        ["usd=-1"],
        ["usd=1e-12"],
        ["output=1", "output=2"],
        ["outptu=1"],
    ],
)
def test_refused(items: list[str]) -> None:
    with pytest.raises(InvalidInput):
        budget_of(items)


@given(st.lists(st.text(max_size=12) | st.builds("output={}".format, st.text(max_size=6)), max_size=3))
def test_any_text(items: list[str]) -> None:
    try:
        assert isinstance(budget_of(items), Budget)
    except InvalidInput as error:
        assert str(error)
