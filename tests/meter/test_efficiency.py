"""E3 against the paper's definition, worked by hand."""

from __future__ import annotations

import math

import pytest

from thrifty.errors import InvalidInput
from thrifty.meter.efficiency import e3


def test_e3_by_hand() -> None:
    assert e3(0.5, 1000) == pytest.approx(2.5e-4)
    assert e3(1.0, 1) == 1.0
    assert e3(0.0, 10) == 0.0
    assert e3(0.8, 400) > e3(0.4, 180)  # half the accuracy is worth more than half the tokens


@pytest.mark.parametrize("accuracy, tokens", [(50, 10), (-0.1, 10), (math.nan, 10), (0.5, 0), (0.5, math.inf)])
def test_e3_refuses(accuracy: float, tokens: float) -> None:
    with pytest.raises(InvalidInput, match="accuracy|tokens"):
        e3(accuracy, tokens)
