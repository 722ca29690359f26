"""The pieces by themselves: event streams cut anywhere, durations, counting, reading usage."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.engines.openai.stream import Events, EventTooLarge
from thrifty.engines.openai.transport import retry_after, seconds
from thrifty.engines.openai.usage import Counter, estimate, read
from thrifty.spend import Spend

TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=20)


@given(
    st.lists(st.lists(TEXT, min_size=1, max_size=3), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.booleans(),
)
def test_events_come_out_as_they_went_in_wherever_the_bytes_are_cut(events, end, cuts, closed):
    """An encoder of the format is the oracle: an event is its data lines, joined by LF."""
    lines = []
    for i, event in enumerate(events):
        lines += [f": ping {i}", "event: message", *(f"data: {line}" for line in event), ""]
    raw = end.join([*lines, ""] if closed else lines).encode()
    parser, found, at = Events(), [], 0
    for i in range(len(raw) + 1):
        size = cuts[i % len(cuts)]
        found += list(parser.feed(raw[at : at + size]))
        at += size
        if at >= len(raw):
            break
    found += list(parser.finish())
    assert found == ["\n".join(event) for event in events]


def test_an_event_is_bounded_and_many_small_ones_are_not():
    small = Events(limit=100)
    assert len(list(small.feed(b"data: 0123456789\n\n" * 50))) == 50
    assert list(small.feed(b": keep-alive\n" * 50)) == []
    with pytest.raises(EventTooLarge):
        list(small.feed(b"data: " + b"x" * 100))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0.0), ("1.5", 1.5), ("1s", 1.0), ("6m0s", 360.0), ("1h2m3s", 3723.0), ("250ms", 0.25), ("2d", 172800.0)]
    + [(bad, None) for bad in ("", "soon", "-1", "1x", "1s!", "nan", "inf", "9" * 40, None)],
)
def test_durations(text, expected):
    assert seconds(text) == expected


def test_retry_after_in_every_form():
    now = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
    assert retry_after({"Retry-After": "Tue, 24 Nov 2026 12:00:30 GMT"}, now) == 30
    assert retry_after({"Retry-After": "Tue, 24 Nov 2026 11:00:00 GMT"}, now) == 0
    assert retry_after({"Retry-After": "whenever"}, now) is None
    assert retry_after({"Retry-After": "9", "retry-after-ms": "1500"}, now) == 1.5
    some_left = {"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "9s"}
    none_left = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "4s"}
    assert retry_after(some_left) is None and retry_after({**some_left, **none_left}) == 4


def test_counting_with_and_without_a_tokenizer():
    messages = [{"role": "user", "content": "a" * 33}, {"role": "tool", "content": None, "tool_call_id": "x" * 10}]
    assert estimate("a" * 33) == 10
    assert Counter().messages(messages) == (3 + 4 + 10 + 4 + 4, 0)
    assert Counter(tokenizer=len, template_tokens=0).messages(messages) == (4 + 33 + 4 + 10, 0)


COUNTS = st.one_of(st.none(), st.integers(-5, 10**12), st.text(max_size=3), st.floats(), st.booleans(), st.just([]))


@given(
    st.one_of(
        COUNTS,
        st.dictionaries(
            st.sampled_from(
                ["prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "prompt_cache_hit_tokens"]
                + ["cache_read_input_tokens", "cache_creation_input_tokens", "reasoning_tokens"]
                + ["prompt_tokens_details", "completion_tokens_details"]
            ),
            st.one_of(
                COUNTS,
                st.dictionaries(st.sampled_from(["cached_tokens", "reasoning_tokens", "image_tokens"]), COUNTS),
            ),
        ),
    )
)
def test_whatever_the_usage_says_the_spend_is_possible(usage):
    used = read(usage, sent=400, counted=(100, 20), made="some text", output=3, tool_calls=1)
    spend = used.spend
    assert Spend.from_dict(spend.to_dict()) == spend
    assert spend.cached <= spend.input and spend.visual <= spend.input and spend.reasoning <= spend.output
    assert 0 < spend.input <= 400 + 20_000 + 600 and spend.output > 0
    assert spend.calls == 1 and spend.tool_calls == 1
