"""Shapes and pieces: however text is cut into tokens, the same answer comes out, and streams take nothing back."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from thrifty import Draft
from thrifty.engines.finishing import Pieces, Shape

PARTS = ["a", "b", " ", "\n", "S", "T", "ST", "STOP", "<", "<think>", "</think>", "think>", "#", "####"]
ALPHABET = st.sampled_from(PARTS)


def whole(text: str, stop: str) -> tuple[str, str, bool]:
    """The oracle: splits the finished text at once, by hand."""
    shown, thought, trim = "", "", False
    while text:
        opens, stops = text.find("<think>"), text.find(stop)
        ends = [at for at in (opens, stops) if at >= 0]
        at = min(ends) if ends else len(text)
        part = text[:at]
        if trim:
            part = part.lstrip()
            trim = not part
        shown += part
        if not ends:
            return shown, thought, False
        if at == stops and at != opens:
            return shown, thought, True
        text = text[at + len("<think>") :]
        inner, close, text = text.partition("</think>")
        thought += inner
        if close:
            trim = True
    return shown, thought, False


@given(st.lists(ALPHABET, max_size=12), st.randoms())
@example(["STO", "STOP"], None)
def test_any_cutting_gives_the_same_split(parts: list[str], random: object) -> None:
    text = "".join(parts)
    expected = whole(text, "STOP")
    for size in (1, 2, 3, len(text) or 1):
        shape = Shape(stop=("STOP",))
        stopped = False
        out = thinking = ""
        for i in range(0, len(text), size):
            stopped = shape.add(text[i : i + size]) == "stop"
            shown = shape.flush()
            out, thinking = out + shown.text, thinking + shown.thinking
            if stopped:
                break
        shape.end()
        shown = shape.flush()
        out, thinking = out + shown.text, thinking + shown.thinking
        assert (shape.text, shape.thinking, stopped) == expected
        assert (out, thinking) == expected[:2]


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_pieces_of_bytes_are_the_text(text: str) -> None:
    pieces = Pieces(lambda tokens: bytes(tokens).decode("utf-8", "replace"))
    parts = [pieces.add((byte,)) for byte in text.encode()]
    assert "".join(parts) + pieces.rest() == text
    assert not any("\ufffd" in p for p in parts) or "\ufffd" in text


def test_forced_text_closes_thinking_and_cannot_stop() -> None:
    shape = Shape(stop=("STOP",))
    shape.add("<think>so")
    shape.force("</think>\nSTOP it")
    assert shape.add(" is 4") is None
    assert (shape.thinking, shape.text) == ("so", "STOP it is 4")


def test_an_open_thinking_block_may_stand_in_the_prompt() -> None:
    shape = Shape(thinking=True)
    shape.add("hm</think>\n\n4")
    shape.end()
    assert (shape.thinking, shape.text) == ("hm", "4")


def test_a_draft_that_still_thinks_is_closed_first() -> None:
    shape = Shape(draft=Draft(), prefix="It is")
    shape.add("<think>hm")
    assert shape.end_draft() == "</think>#### It is"


def test_no_tags_means_no_split() -> None:
    shape = Shape(tags=None)
    shape.add("<think>a</think>b")
    assert (shape.text, shape.thinking) == ("<think>a</think>b", "")
