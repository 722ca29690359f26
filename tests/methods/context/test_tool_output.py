"""Tool-output trimming: parsers that are not ours (json, Python's own, a C compiler, node) say whether what is left is
still what it was; the tokens are counted on what was sent."""

from __future__ import annotations

import ast
import inspect
import json
import random
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, InvalidInput, Plan
from thrifty.call import Call
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.context import _shorten_code, _shorten_json, _shorten_text, compaction
from thrifty.methods.context.tool_output import ToolOutput, recall


class Characters(ScriptedEngine):
    """Counts a token for each four characters, as most tokenizers come near to."""

    def count(self, call: Call) -> int:
        return sum(-(-len(m["content"]) // 4) if isinstance(m["content"], str) else 0 for m in call.messages)


def turn(text: Any, i: int = 0, arguments: str = "{}") -> list[dict[str, Any]]:
    call = {"id": f"c{i}", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"c{i}", "content": text},
    ]


async def trimmed(method: ToolOutput, messages: list[dict[str, Any]], engine: Any = None) -> tuple[Call, Any]:
    engine = engine or Characters("fine")
    pipeline = Plan("t", (method,)).build({"answer": engine})
    call = pipeline.call("x", Account("t", ledger=MemoryLedger()))
    answer = await pipeline(replace(call, messages=tuple(messages)))
    return engine.calls[-1], answer.receipts[0]


async def one(text: str, tokens: int = 200, **knobs: Any) -> tuple[str, Any]:
    """What became of one result."""
    arguments = knobs.pop("arguments", "{}")
    made, receipt = await trimmed(
        ToolOutput(tokens=tokens, **knobs), [{"role": "user", "content": "go"}, *turn(text, arguments=arguments)]
    )
    return made.messages[-1]["content"], receipt


# -- JSON ----------------------------------------------------------------------------------------------------


def rows(n: int) -> list[dict[str, Any]]:
    return [
        {"id": i, "name": f"row number {i}", "ok": i != 333, "note": "fatal: disk" if i == 333 else "fine"}
        for i in range(n)
    ]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrapped", [False, True])
async def test_json_arrays_are_sampled_and_their_count_kept(indent: int | None, wrapped: bool) -> None:
    data: Any = {"total": 500, "rows": rows(500)} if wrapped else rows(500)
    text, receipt = await one(json.dumps(data, indent=indent))
    assert len(text) <= 800 and receipt.fired and "json" in receipt.reason
    back = json.loads(text)
    items = back["rows"] if wrapped else back
    kept = [x for x in items if isinstance(x, dict)]
    assert all(x == rows(500)[x["id"]] for x in kept) and len(kept) >= 3
    assert {0, 333, 499} <= {x["id"] for x in kept}, "both ends, and the item that matches"
    assert any(f"{len(kept)} of 500 items shown" in x for x in items if isinstance(x, str))
    assert receipt.detail["refs"][0] in text


async def test_json_loses_white_space_before_anything_else() -> None:
    data = rows(10)
    text, receipt = await one(json.dumps(data, indent=8), 250)
    assert json.loads(text) == data and receipt.after < receipt.before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=8), inner, max_size=8),
    max_leaves=80,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(JSON, max_size=30) | st.dictionaries(st.text(max_size=8), JSON, max_size=20), st.integers(10, 200))
def test_any_json_stays_json_and_fits(value: Any, most: int) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    short = _shorten_json.shorten(text, lambda t: len(t) <= 4 * most, lambda _: False, "ask")
    if short is not None:
        assert len(short) <= 4 * most
        assert type(json.loads(short)) is type(value)
        if len(json.dumps(value, ensure_ascii=False, separators=(",", ":"))) <= 4 * most:
            assert json.loads(short) == value
    else:
        assert most < 60


def test_numbers_repeated_keys_and_escapes_stay_as_written() -> None:
    text = '{"a": 1.10, "a": 123456789012345678901234567890, "b": [1e400, -0.0], "c": "\\ud800 \\u00e9"}'
    short = _shorten_json.shorten(text, lambda t: True, lambda _: False, "")
    assert short == '{"a":1.10,"a":123456789012345678901234567890,"b":[1e400,-0.0],"c":"\\ud800 \\u00e9"}'
    for bad in ("[NaN]", "[1,", "12", "[" * 100_000):
        with pytest.raises(ValueError):
            _shorten_json.read(bad)


async def test_json_lines_stay_json_line_by_line() -> None:
    text, receipt = await one("\n".join(json.dumps(r) for r in rows(400)) + "\n")
    lines = [json.loads(line) for line in text.splitlines()]
    assert {0, 333, 399} <= {x["id"] for x in lines[:-1]} and "of 400 lines shown" in str(lines[-1])
    assert "json lines" in receipt.reason and len(text) <= 800


def test_a_sample_is_as_large_as_asked_and_has_both_ends() -> None:
    rng = random.Random(0)
    for _ in range(300):
        n, most = rng.randint(0, 60), rng.randint(0, 20)
        hits = [rng.random() < 0.1 for _ in range(n)]
        got = _shorten_json.sample(hits, most)
        assert got == sorted(set(got)) and len(got) == min(n, most)
        if 2 <= most < n and sum(hits) <= most // 2 and most >= sum(hits) + 2:
            assert {0, n - 1} | {i for i, hit in enumerate(hits) if hit} <= set(got)


# -- code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [compaction, json, inspect, random, ast, _shorten_code])
@pytest.mark.parametrize("tokens", [2000, 500, 120, 40])
async def test_python_still_parses_and_keeps_its_outline(module: Any, tokens: int) -> None:
    source = inspect.getsource(module)
    text, receipt = await one(source, tokens)
    tree = ast.parse(text)
    assert len(text) <= 4 * tokens or text == source
    if receipt.fired:
        assert "python" in receipt.reason and "left out" in text
        names = [getattr(n, "name", None) for n in ast.parse(source).body]
        assert [getattr(n, "name", None) for n in tree.body] == names[: len(tree.body)]


async def test_the_largest_bodies_go_first_and_matching_ones_last() -> None:
    small = "def small():\n    x = 1\n    return x\n\n"
    large = "def large():\n" + "    y = 2\n" * 200 + "    return y\n\n"
    error = "def broken():\n" + "    z = 3\n" * 80 + "    raise ValueError('fatal error')\n"
    text, _ = await one(small + large + error, 350)
    assert small in text and error.rstrip() in text and "...  # 201 lines left out" in text


C = """#include <stdio.h>
/* a brace in a comment: { */
static int add(int a, int b) {
    const char *s = "}{";
    for (int i = 0; i < b; i++) {
        a += 1;
        a -= 0;
    }
    return a + (s[0] == '}');
}
"""
JS = """// a brace: {
class Box {
  constructor(x) {
    this.x = x;
    this.y = `}${x}{`;
  }
  total(items) {
    let sum = 0;
    for (const i of items) {
      sum += i;
      sum -= 0;
    }
    return sum;
  }
}
"""


@pytest.mark.parametrize(
    ("language", "source", "suffix", "check"),
    [
        ("C", "".join(C.replace("add", f"add{i}") for i in range(30)), "c", ["gcc", "-fsyntax-only", "-w"]),
        ("JS", "".join(JS.replace("Box", f"Box{i}") for i in range(30)), "js", ["node", "--check"]),
    ],
)
async def test_braces_still_parse(language: str, source: str, suffix: str, check: list[str], tmp_path: Any) -> None:
    cuts = 0
    for tokens in (2000, 1200, 900):
        text, receipt = await one(source, tokens)
        if receipt.fired and "braces" in receipt.reason:
            cuts += 1
            assert len(text) <= 4 * tokens and "lines left out" in text
            if shutil.which(check[0]):
                file = tmp_path / f"short.{suffix}"
                file.write_text(text)
                assert subprocess.run([*check, str(file)], capture_output=True).returncode == 0, text
    assert cuts >= 1


def test_what_is_no_such_language_is_left_to_others() -> None:
    fits = lambda t: len(t) < 50  # noqa: E731
    for text in ("some prose { with } braces\n" * 20, "if (x) {\n  y;\n" * 20, "plain"):
        assert _shorten_code.shorten_braces(text, fits, "") is None
        assert _shorten_code.shorten_python(text, fits, lambda _: False, "") is None


def test_what_is_never_closed_is_read_in_linear_time() -> None:
    """Half a megabyte that would take a careless pattern hours."""
    for unit in ("/*;\n", "`;\n", '";\n', "{;\n", "*/;\n/*{\n"):
        assert _shorten_code.shorten_braces(unit * 100_000, lambda t: False, "") is None


# -- text ----------------------------------------------------------------------------------------------------


async def test_text_keeps_head_tail_and_what_matches() -> None:
    lines = [f"line {i} nothing here" for i in range(1000)]
    lines[500] = "line 500 ERROR it broke"
    lines[700] = "line 700 zebra crossing"
    text, receipt = await one("\n".join(lines), arguments='{"query": "find the zebra"}')
    got = text.split("\n")
    assert got[0] == lines[0] and got[-1] == lines[-1] and lines[500] in got and lines[700] in got
    assert len(text) <= 800 and "text" in receipt.reason
    kept = [g for g in got if not g.startswith("[")]
    gaps = [int(g.split()[0][1:]) for g in got if g.startswith("[")]
    assert [x for x in lines if x in kept] == kept and len(kept) + sum(gaps) == 1000
    text, _ = await one("\n".join(lines), arguments='{"query": "find the zebra"}', matches="", query_words=False)
    assert lines[500] not in text and lines[700] not in text
    text, _ = await one("\n".join(lines), head=1.0, matches="")
    assert text.split("\n")[-1].startswith("[")


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1_000_000,
        "bad \udcff byte " * 5000,
        "שלום עולם مرحبا بالعالم " * 2000,
        "你好世界" * 5000,
        "e\u0301" * 20_000,
        "👩‍👩‍👧‍👦" * 3000,
        "a\r\nb\r\n" * 5000,
        "\n" * 10_000,
        "one huge line " * 10_000 + "\nand a short one\n" * 3,
    ],
    ids=["no space", "surrogates", "rtl", "cjk", "accents", "families", "crlf", "empty lines", "huge line"],
)
async def test_any_text_fits_afterwards(text: str) -> None:
    short, receipt = await one(text)
    assert receipt.fired and -(-len(short) // 4) <= 200 and "left out" in short
    ends = short.split("[")[0], short.split("]")[-1]
    assert text.startswith(ends[0]) and (text.endswith(ends[1]) or not ends[1])
    assert not ends[1].startswith(("\u0301", "\u200d"))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=3000), st.integers(1, 100))
def test_shortened_text_is_never_longer_than_asked(text: str, most: int) -> None:
    count = lambda t: -(-len(t) // 4)  # noqa: E731
    short = _shorten_text.shorten(text, count(text), most, count, lambda line: "a" in line, 0.5, "")
    assert short is None or count(short) <= most
    assert short is not None or most < 12
    assert "".join(_shorten_text.split_lines(text)) == text


# -- the method ----------------------------------------------------------------------------------------------


async def test_only_long_results_change_and_images_stay() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    long = "word " * 2000
    parts = [{"type": "text", "text": long}, image, {"type": "text", "text": "short"}]
    messages = [{"role": "user", "content": long}, *turn(parts), *turn("brief", 1)]
    made, receipt = await trimmed(ToolOutput(tokens=100), messages, ScriptedEngine("fine"))
    assert made.messages[0] == messages[0] and made.messages[3:] == tuple(messages[3:])
    assert made.messages[2]["content"][1:] == parts[1:] and len(made.messages[2]["content"][0]["text"].split()) <= 100
    assert receipt.detail["cut"] == 1 and receipt.detail["results"] == 2


async def test_what_was_cut_comes_back_when_asked_for() -> None:
    text = "\n".join(f"line {i}" for i in range(2000))
    messages = [{"role": "user", "content": "go"}, *turn(text)]
    made, receipt = await trimmed(ToolOutput(tokens=100), messages)
    (ref,) = receipt.detail["refs"]
    assert f"recall #{ref}" in made.messages[-1]["content"] and recall(messages, ref) == text
    asked = [*messages, {"role": "assistant", "content": f"recall #{ref}"}, {"role": "user", "content": "go on"}]
    made, receipt = await trimmed(ToolOutput(tokens=100), asked)
    assert made.messages == tuple(asked) and "asked back" in receipt.reason
    made, receipt = await trimmed(ToolOutput(tokens=100, reversible=False), asked)
    assert receipt.fired and "recall" not in made.messages[2]["content"]
    with pytest.raises(InvalidInput, match="no tool result"):
        recall(messages, "12345678")


async def test_what_came_back_is_told_beside_what_was_cut() -> None:
    first, second = ("\n".join(f"{w} {i}" for i in range(2000)) for w in ("one", "two"))
    messages = [{"role": "user", "content": "go"}, *turn(first)]
    _, receipt = await trimmed(ToolOutput(tokens=100), messages)
    (ref,) = receipt.detail["refs"]
    more = [*messages, {"role": "user", "content": f"recall #{ref}"}, *turn(second, 1)]
    made, receipt = await trimmed(ToolOutput(tokens=100), more)
    assert made.messages[2]["content"] == first and len(made.messages[-1]["content"]) <= 400
    assert receipt.detail["recalled"] == [ref] and ref not in receipt.detail["refs"]


async def test_json_nested_too_deep_is_cut_as_text() -> None:
    for depth in (400, 900, 50_000):
        text, receipt = await one("[" * depth + "1" * 2000 + "]" * depth)
        assert receipt.fired and len(text) <= 800


async def test_the_prefix_holds_unless_results_are_kept_fresh() -> None:
    """What the engine was really sent, turn after turn."""
    for fresh in (0, 1):
        engine = Characters("fine")
        pipeline = Plan("t", (ToolOutput(tokens=50, fresh=fresh),)).build({"answer": engine})
        call = pipeline.call("x", Account("t", ledger=MemoryLedger()))
        messages: list[dict[str, Any]] = [{"role": "user", "content": "find it"}]
        last: tuple[Any, ...] = ()
        for i in range(6):
            messages += turn("\n".join(f"line {j} of {i}" for j in range(300)), i, '{"q": "line"}')
            answer = await pipeline(replace(call, messages=tuple(messages)))
            now, receipt = engine.calls[-1].messages, answer.receipts[0]
            same = now[: len(last)] == last
            assert same == (fresh == 0 or i == 0)
            if receipt.fired:
                assert (receipt.detail["cache_broken"] > 0) == (not same)
            last = now
        assert ("loss" in receipt.reason) == (receipt.detail["net_saved"] < 0)


async def test_a_bad_expression_is_refused() -> None:
    with pytest.raises(InvalidInput, match="regular expression"):
        ToolOutput(matches="(")


async def test_a_conversation_that_begins_with_a_result_and_one_without_any() -> None:
    orphan = [{"role": "tool", "tool_call_id": "gone", "content": "w " * 3000}, {"role": "user", "content": "so?"}]
    made, receipt = await trimmed(ToolOutput(tokens=100), orphan)
    assert receipt.fired and made.messages[1] == orphan[1]
    _, receipt = await trimmed(ToolOutput(), [{"role": "user", "content": "hi"}])
    assert not receipt.fired and "0 tool results" in receipt.reason
