"""Delimiters of thinking: where a text stands between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import InvalidInput
from thrifty.engines.finishing import Shape
from thrifty.thinking import check_tags, left_open, no_tags, split

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "b c"]), max_size=12).map("".join)


@given(PIECES, st.booleans())
def test_split_is_what_the_engines_make_of_the_same_text(text: str, inside: bool) -> None:
    shape = Shape(thinking=inside)
    for letter in text:
        shape.add(letter)
    shape.end()
    assert split(text, inside=inside) == (shape.thinking, shape.text)
    if not inside and text.count("</think>") == 0:
        assert left_open(text) == shape.inside


@pytest.mark.parametrize("tags", [("", "</t>"), ("<t>", " "), ("<t>", "<t>"), ("<t></t>", "</t>")])
def test_tags_that_cannot_be_told_apart_are_refused(tags: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput, match="opening"):
        check_tags("x", *tags)


def test_the_error_names_the_knobs() -> None:
    message = str(no_tags("budget-forcing", "smollm2", "<think>", "</think>"))
    assert all(word in message for word in ("opening", "closing", "unknown", "smollm2", "budget-forcing"))
