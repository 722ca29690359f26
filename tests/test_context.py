"""Context: passages are found, dropped and rendered in place, and every byte around them stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Call
from thrifty.call import CONTEXT_MARK
from thrifty.context import SEPARATOR, passages, render

ACCOUNT = Account("t")
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}, "x": 1}

plain = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30).filter(lambda t: CONTEXT_MARK not in t)
some_passages = st.lists(plain.filter(bool), min_size=1, max_size=5).map(tuple)


def words(text: str) -> int:
    return len(text.split())


@given(plain, plain, some_passages)
def test_a_mark_is_replaced_and_nothing_else(before: str, after: str, context: tuple[str, ...]) -> None:
    system = {"role": "system", "content": f"keep {CONTEXT_MARK}"}
    user = {"role": "user", "content": before + CONTEXT_MARK + after, "name": "ann"}
    rendered = render(Call((system, user), ACCOUNT, context=context))
    assert rendered[0] is system
    assert rendered[1] == {"role": "user", "content": before + SEPARATOR.join(context) + after, "name": "ann"}


@given(plain, some_passages)
def test_without_a_mark_it_stands_before_the_last_user_message(text: str, context: tuple[str, ...]) -> None:
    first = {"role": "user", "content": "first"}
    reply = {"role": "assistant", "content": "reply"}
    rendered = render(Call((first, reply, {"role": "user", "content": text}), ACCOUNT, context=context))
    assert rendered[:2] == (first, reply)
    assert rendered[2]["content"] == SEPARATOR.join(context) + SEPARATOR + text


@given(plain)
def test_a_call_without_context_and_mark_is_untouched(text: str) -> None:
    messages = ({"role": "user", "content": text}, {"role": "user", "content": [IMAGE]})
    assert render(Call(messages, ACCOUNT)) is messages


def test_when_all_passages_are_gone_the_mark_goes_with_its_blank_line() -> None:
    messages = ({"role": "user", "content": f"Notes: {CONTEXT_MARK}\n\nWhy?"},)
    assert render(Call(messages, ACCOUNT, context=()))[0]["content"] == "Notes: Why?"


def test_a_mark_in_a_call_that_never_had_context_is_only_text() -> None:
    messages = ({"role": "user", "content": f"What does {CONTEXT_MARK} mean in a template?"},)
    assert render(Call(messages, ACCOUNT)) is messages


def test_only_the_first_mark_counts_and_marks_in_passages_are_text() -> None:
    messages = ({"role": "user", "content": f"a {CONTEXT_MARK} b {CONTEXT_MARK}"},)
    rendered = render(Call(messages, ACCOUNT, context=(f"x {CONTEXT_MARK} y",)))
    assert rendered[0]["content"] == f"a x {CONTEXT_MARK} y b {CONTEXT_MARK}"


def test_parts_keep_their_places() -> None:
    """An image before the text stays before it, and a text part keeps its other fields."""
    cached = {"type": "text", "text": "Why?", "cache_control": {"type": "ephemeral"}}
    tail = {"type": "text", "text": "Be brief."}
    call = Call(({"role": "user", "content": [IMAGE, cached, IMAGE, tail]},), ACCOUNT, context=("P", "Q"))
    assert render(call)[0]["content"] == [IMAGE, {**cached, "text": "P\n\nQ\n\nWhy?"}, IMAGE, tail]


def test_a_mark_in_a_later_part() -> None:
    parts = [{"type": "text", "text": "one"}, IMAGE, {"type": "text", "text": f"two {CONTEXT_MARK}."}]
    call = Call(({"role": "user", "content": parts},), ACCOUNT, context=("P",))
    assert render(call)[0]["content"] == [*parts[:2], {"type": "text", "text": "two P."}]


def test_messages_without_text_or_user() -> None:
    only_image = Call(({"role": "user", "content": [IMAGE]},), ACCOUNT, context=("P",))
    assert render(only_image)[0]["content"] == [{"type": "text", "text": "P" + SEPARATOR}, IMAGE]
    assert render(Call((), ACCOUNT, context=("P",))) == ({"role": "user", "content": "P"},)


paragraphs = st.lists(st.sampled_from(["a b c", "d e\nf", "g"]), min_size=1, max_size=8)
gaps = st.sampled_from(["\n\n", "\n \n", "\n\n\n\n", "\n\t\n"])


@given(paragraphs, st.lists(gaps, min_size=8, max_size=8), st.data())
def test_a_cut_message_loses_whole_paragraphs_and_no_byte_of_the_rest(
    texts: list[str], between: list[str], data: st.DataObject
) -> None:
    pieces = [t + g for t, g in zip(texts, between, strict=False)]
    text = "".join(pieces) + "What is it?"
    call = Call(({"role": "user", "content": text, "x": 1},), ACCOUNT)
    found = passages(call, words, 0)
    assert found.texts == tuple(pieces)
    kept = data.draw(st.lists(st.sampled_from(range(len(pieces))), unique=True))
    changed = found.keep(call, kept)
    expected = "".join(p for i, p in enumerate(pieces) if i in kept) + "What is it?"
    assert changed.messages == ({"role": "user", "content": expected, "x": 1},)
    assert found.keep(call, range(len(pieces))).messages == call.messages


def test_where_passages_come_from() -> None:
    long = {"role": "user", "content": "a a a a\n\nb b b b"}
    short = {"role": "user", "content": "c\n\nd"}
    image = {"role": "user", "content": [{"type": "text", "text": "e e e e\n\nf f f f"}]}
    spoken = {"role": "assistant", "content": "g g g g\n\nh h h h"}
    assert passages(Call((long,), ACCOUNT, context=("P",)), words, 0).texts == ("P",)
    found = passages(Call((long, spoken, short, image), ACCOUNT), words, 5)
    assert (found.source, found.texts) == (0, ("a a a a\n\n",))
    assert passages(Call((short, image, spoken), ACCOUNT), words, 5).texts == ()
    assert passages(Call(({"role": "user", "content": "one line of many words here"},), ACCOUNT), words, 2).texts == ()


@given(some_passages, st.data())
def test_keeping_of_the_context_field(context: tuple[str, ...], data: st.DataObject) -> None:
    call = Call(({"role": "user", "content": "q"},), ACCOUNT, context=context)
    order = data.draw(st.permutations(range(len(context))))
    assert passages(call, words, 0).keep(call, order).context == tuple(context[i] for i in order)


@pytest.mark.parametrize("size", [20_000])
def test_cutting_a_long_message_of_blank_lines_is_not_quadratic(size: int) -> None:
    """Spaces and line breaks without end: this would take minutes if every break looked at all the rest."""
    text = ("x\n" + " " * 50) * (size // 50) + "\n\nq"
    call = Call(({"role": "user", "content": text},), ACCOUNT)
    assert passages(call, len, 1).pieces
