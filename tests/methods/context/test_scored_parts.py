"""What the methods with a scorer are made of: cuts between characters, atoms, fitting a count, documents."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Call
from thrifty.call import text_of
from thrifty.methods.context._conversation import Counter
from thrifty.methods.context._documents import chunks, documents, kind_of, put, split_question
from thrifty.methods.context._graphemes import cuts_at
from thrifty.methods.context._scored import NEAR, atoms, mean_nll, most_that_fit

TORN = (
    "e\u0301",
    "👩‍👩‍👧",
    "👍🏽",
    "🇳🇴🇩🇰",
    "각",
    "क्षि",
    "❤️",
    "\r\n",
    "ก็",
    "\u0600١",
    "ல்",
    "🏴\U000e0067\U000e0062\U000e007f",
)


def clusters(text: str) -> set[int]:
    """Where Unicode's grapheme clusters begin, by the `regex` package."""
    return {m.start() for m in regex.finditer(r"\X", text)}


@pytest.mark.parametrize("text", TORN)
def test_no_character_is_torn_from_what_belongs_to_it(text: str) -> None:
    text = f"a{text}b{text}{text}"
    assert {i for i in range(len(text)) if cuts_at(text, i)} <= clusters(text)


@given(st.lists(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(TORN)), max_size=12))
def test_what_unicode_does_not_cut_is_not_cut(parts: list[str]) -> None:
    text = "".join(parts)
    assert {i for i in range(len(text)) if cuts_at(text, i)} <= clusters(text)


@given(st.text(st.characters(max_codepoint=126, exclude_categories=["Cc"]), max_size=30))
def test_plain_text_is_cut_anywhere(text: str) -> None:
    assert all(cuts_at(text, i) for i in range(len(text) + 1))


@given(st.text("ab é\u0301👍🏽", max_size=20), st.data())
def test_atoms_cover_the_text_and_start_where_it_may_be_cut(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=10)) | ({0} if text else set()))
    spans = [(a, b) for a, b in zip(cuts, [*cuts[1:], len(text)], strict=False) if a < len(text)]
    edges = data.draw(st.lists(st.integers(0, len(text)), max_size=3))
    found = atoms(text, spans, [float(i) for i in range(len(spans))], edges)
    assert "".join(text[a.start : a.stop] for a in found) == text
    assert all(cuts_at(text, a.start) or a.start in edges for a in found)
    assert {e for e in edges if 0 < e < len(text)} <= {a.start for a in found}


def test_an_atom_has_the_mean_of_its_tokens_and_an_unknown_one_is_kept_first() -> None:
    found = atoms("ab\u0301c", [(0, 1), (1, 2), (2, 3), (3, 4)], [math.nan, 2.0, 4.0, 1.0])
    assert [(a.start, a.stop, a.value, a.tokens) for a in found] == [
        (0, 1, math.inf, 1),
        (1, 3, 3.0, 2),
        (3, 4, 1.0, 1),
    ]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 200), st.integers(0, 20), st.integers(1, 3))
def test_as_many_as_fit(sizes: list[int], most: int, fixed: int, scale: int) -> None:
    """The weights are the sizes but for a factor and a constant: the most that fit, or near enough to stop there."""

    def size(k: int) -> int:
        return fixed * (k > 0) + scale * sum(sizes[:k])

    k = most_that_fit([float(s) for s in sizes], most, size)
    assert size(k) <= most or k == 0
    best = max([j for j in range(len(sizes) + 1) if size(j) <= most], default=0)
    assert k == best or size(k) >= NEAR * most or size(k) == size(best)


def test_the_search_for_what_fits_is_short_where_weights_tell() -> None:
    asked: list[int] = []

    def size(k: int) -> int:
        asked.append(k)
        return 20 + k // 2

    assert 0.99 * 3000 <= 20 + most_that_fit([1.0] * 100_000, 3000, size) // 2 <= 3000
    assert len(asked) <= 6


def test_mean_nll_leaves_unknown_tokens_out() -> None:
    from thrifty.engine import TokenScores

    assert mean_nll(TokenScores(np.array([np.nan, -1.0, -3.0]), np.zeros((3, 2)))) == 2.0
    assert mean_nll(TokenScores(np.array([np.nan]), np.zeros((1, 2)))) == 0.0


# -- documents -----------------------------------------------------------------------------------------------

JSON = '{"a": [1, 2, {"b": "x y"}]}'
PYTHON = "def f(x):\n    y = x\n\n    return y\n\n\nclass A:\n    z = 1\n"
BRACES = "int f(int x) {\n  int y = x;\n  return y;\n}\nint g() {\n  f(1);\n  return f(2);\n}\n"
PROSE = "It rained all day. Nobody went out.\n\nThen the sun came out, and we did.\n"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (JSON, "json"),
        ("\n" + JSON + "\n", "json"),
        (JSON + "\n" + JSON, "json lines"),
        (PYTHON, "python"),
        ("import os\n", "python"),
        (BRACES, "braces"),
        (PROSE, "text"),
        ("def of course not\n", "text"),
        ("[see above] {x}", "text"),
        (PROSE + BRACES, "text"),
        (PROSE + json.dumps({"rows": [{"id": i} for i in range(9)]}, indent=1), "text"),
        ("[" * 100_000, "text"),
        ("", "text"),
    ],
)
def test_kinds_are_what_a_parser_reads(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_a_mixed_text_falls_into_runs_that_join_to_it() -> None:
    text = (
        f"{PROSE}\n```python\n{PYTHON}```\nAnd:\n\n{JSON}\n\n```\nno language\n```\n\n    indented = 1\n    too = 2\n"
    )
    found = chunks(text)
    assert "".join(c.whole for c in found) == text
    assert [c.kind for c in found] == ["text", "python", "text", "json", "code", "code"]
    assert found[1].text == PYTHON and found[1].before == "```python\n" and found[1].after == "```\n"


@given(st.text('ab \n`{}[]":def(.!', max_size=80))
def test_runs_always_join_to_the_text(text: str) -> None:
    assert "".join(c.whole for c in chunks(text)) == text
    assert "".join(split_question(text)) == text


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        (f"Why does it fail?\n\n```python\n{PYTHON}```\n", ("Why does it fail?\n\n", "")),
        (f"```python\n{PYTHON}```\nWhy does it fail?", ("", "Why does it fail?")),
        (f"Look.\n\n```python\n{PYTHON}```\n\nWhy does it fail?", ("", "Why does it fail?")),
        (f"```python\n{PYTHON}```", ("", "")),
        (PYTHON, ("", "")),
        (JSON, ("", "")),
        ("One. Two. Three?", ("", "Three?")),
        ("", ("", "")),
    ],
)
def test_the_question_stands_at_the_end_or_before_code(text: str, stays: tuple[str, str]) -> None:
    lead, body, rest = split_question(text)
    assert (lead, rest) == stays and lead + body + rest == text


def test_documents_are_the_context_and_long_texts_of_users() -> None:
    long = "One two three four. " * 30
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": long + "\n\nWhy?"}]
    messages = (
        {"role": "system", "content": long},
        {"role": "user", "content": long + "Who is it?"},
        {"role": "assistant", "content": long},
        {"role": "tool", "content": long, "tool_call_id": "1"},
        {"role": "user", "content": parts},
        {"role": "user", "content": "And where?"},
    )
    call = Call(messages, Account("t"), context=("A b.", "C d."))
    found = documents(call, Counter(call), 50)
    assert [(d.message, d.part) for d in found] == [(None, None), (1, None), (4, 1)]
    assert [d.question for d in found] == ["And where?", "Who is it?", "Why?"]
    assert found[2].rest == "Why?" and found[2].texts == [long + "\n\n"]
    changed = put(call, [(found[0], ["", "C."]), (found[1], ["Short. "]), (found[2], ["Also. "])])
    assert changed.context == ("C.",)
    assert changed.messages[1]["content"] == "Short. Who is it?"
    assert changed.messages[4]["content"] == [parts[0], {"type": "text", "text": "Also. Why?"}]
    assert text_of(call.messages[4]).startswith(long)
    alone = Call(messages[:2], Account("t"), context=call.context)
    assert documents(alone, Counter(alone), 50)[1].ref == found[1].ref
