"""Logs of both kinds, and lines that say nothing sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter import usage_log
from thrifty.meter.usage_log import read, spend_of
from thrifty.spend import Spend


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


USAGE = {"prompt_tokens": 100, "completion_tokens": 20}


@pytest.mark.parametrize(
    ("usage", "spend"),
    [
        (USAGE, Spend(input=100, output=20, calls=1)),
        (
            {**USAGE, "prompt_tokens_details": {"cached_tokens": 40},
             "completion_tokens_details": {"reasoning_tokens": 5}},
            Spend(input=100, cached=40, output=20, reasoning=5, calls=1),
        ),
        (
            {"input_tokens": 7, "output_tokens": 2, "cache_read_input_tokens": 50, "cache_creation_input_tokens": 3},
            Spend(input=60, cached=50, output=2, calls=1),  # Anthropic leaves cached ones out of the input
        ),
        ({"input_tokens": 9, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4}},
         Spend(input=9, cached=4, output=2, calls=1)),
    ],
)  # fmt: skip
def test_usage(usage: dict[str, Any], spend: Spend) -> None:
    assert spend_of(usage) == spend


@pytest.mark.parametrize(
    "usage",
    [None, [], {}, {"prompt_tokens": 1}, {"prompt_tokens": -1, "completion_tokens": 1},
     {"prompt_tokens": 1.5, "completion_tokens": 1}, {"prompt_tokens": True, "completion_tokens": 1},
     {"prompt_tokens": 10**12, "completion_tokens": 1}, {"prompt_tokens": "many", "completion_tokens": 1},
     {**USAGE, "prompt_tokens_details": {"cached_tokens": 101}},
     {**USAGE, "completion_tokens_details": {"reasoning_tokens": 21}}],
)  # fmt: skip
def test_usage_that_cannot_be_true(usage: Any) -> None:
    with pytest.raises(InvalidInput):
        spend_of(usage)


def test_openai_lines(tmp_path: Path) -> None:
    tool = {"message": {"tool_calls": [{"function": {"name": "grep"}}, {"function": {"name": "edit"}}]}}
    log = read(
        write(
            tmp_path / "a.jsonl",
            {"model": "m", "usage": USAGE, "task": "t", "run": 2, "phase": "write", "iteration": 3, "success": True},
            "\n",
            {
                "request": {
                    "messages": [{"role": "user", "content": "hi"}],
                    "metadata": {"task": "u", "stage": "check"},
                },
                "response": {"model": "n", "usage": USAGE, "choices": [tool]},
            },
            {"custom_id": "batch-1", "response": {"body": {"model": "m", "usage": USAGE}}},
        )
    )
    a, b, c = log.records
    assert (a.task, a.run, a.model, a.phase, a.iteration, a.success) == ("t", "2", "m", "write", 3, True)
    assert (b.task, b.phase, b.tools, b.spend.tool_calls, len(b.messages)) == ("u", "check", ("grep", "edit"), 2, 1)
    assert (c.task, c.run, c.spend) == ("batch-1", "1", Spend(input=100, output=20, calls=1))
    assert log.skipped == 0


def test_hostile_lines_are_told_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_log, "MOST_LINE", 2000)
    log = read(
        write(
            tmp_path / "a.jsonl",
            {"model": "m", "usage": USAGE},
            "{not json\n",
            "[1, 2]\n",
            "[" * 1500 + "\n",
            {"model": "m", "usage": {"prompt_tokens": -4, "completion_tokens": 1}},
            '"' + "x" * 5000 + '"\n',
            {"model": "m"},
            {
                "model": ["m"],
                "usage": USAGE,
                "choices": 5 * ["x"],
                "phase": {"a": 1},
                "success": "maybe",
                "iteration": -1,
            },
            {"model": "m", "usage": USAGE},
        )
    )
    assert [why.split(":")[0] for why in log.why] == [f"line {n}" for n in (2, 3, 4, 5, 6, 7)]
    assert log.skipped == 6 and len(log.records) == 3
    assert log.records[1].model == "unknown" and log.records[1].success is None and log.records[1].iteration is None


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["usage", "response", "request", "metadata", "choices", "messages", "attributes",
                                     "resourceSpans", "scopeSpans", "spans", "context", "prompt_tokens", "span_id"]),
                    inner, max_size=4,
                ),
                max_leaves=20,
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=6,
    )
)  # fmt: skip
def test_any_bytes_are_read_or_skipped(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    good = json.dumps({"model": "m", "usage": USAGE}).encode()
    file.write_bytes(b"\n".join([good, *lines, b""]))
    log = read(file)
    assert log.records[0].spend == Spend(input=100, output=20, calls=1)


def span(
    name: str, ident: str, parent: str | None, start: int, numbers: dict[str, Any] | None = None, **texts: str
) -> dict[str, Any]:
    attributes = [{"key": k.replace("__", "."), "value": {"stringValue": v}} for k, v in texts.items()]
    attributes += [{"key": f"gen_ai.usage.{k}", "value": {"intValue": str(v)}} for k, v in (numbers or {}).items()]
    return {
        "name": name, "spanId": ident, "parentSpanId": parent or "", "traceId": "T",
        "startTimeUnixNano": str(start), "attributes": attributes,
    }  # fmt: skip


def otlp(*spans: dict[str, Any]) -> dict[str, Any]:
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


def test_spans_count_once_and_in_their_innermost_phase(tmp_path: Path) -> None:
    spans = [
        # the agent's span sums its calls: counting it too would double the bill
        span("invoke_agent", "1", None, 0, {"input_tokens": 170, "output_tokens": 30},
             gen_ai__conversation__id="c", phase="all"),
        span("chat", "3", "2", 9, {"input_tokens": 70, "output_tokens": 10}, gen_ai__request__model="m"),
        span("review", "2", "1", 4, None, phase="review"),
        span("chat", "4", "1", 1, {"input_tokens": 100, "output_tokens": 20, "cache_read.input_tokens": 60},
             gen_ai__response__model="m-1", gen_ai__request__model="m"),
        span("chat", "5", "1", 2, {"input_tokens": -1, "output_tokens": 20}),
        span("execute_tool", "6", "1", 3, None, gen_ai__tool__name="grep"),
    ]  # fmt: skip
    for path in (
        write(tmp_path / "one.json", otlp(*spans)),
        write(tmp_path / "lines.jsonl", *(otlp(s) for s in spans)),
    ):
        log = read(path)
        assert [(r.phase, r.task, r.model) for r in log.records] == [("all", "c", "m-1"), ("review", "c", "m")]
        assert [r.spend for r in log.records] == [
            Spend(input=100, cached=60, output=20, calls=1),
            Spend(input=70, output=10, calls=1),
        ]
        assert (log.summed, log.skipped) == (1, 1)
    pretty = tmp_path / "pretty.json"
    pretty.write_text(json.dumps(otlp(*spans), indent=2))
    assert [r.spend.input for r in read(pretty).records] == [100, 70]


def test_spans_as_the_sdk_prints_them_and_rings(tmp_path: Path) -> None:
    def flat(ident: str, parent: str | None, **more: Any) -> dict[str, Any]:
        return {
            "name": "chat", "context": {"trace_id": "0x1", "span_id": ident}, "parent_id": parent,
            "attributes": {"gen_ai.request.model": "m", **more},
        }  # fmt: skip

    usage = {"gen_ai.usage.prompt_tokens": 5, "gen_ai.usage.completion_tokens": 1}
    log = read(
        write(tmp_path / "flat.jsonl", flat("a", None, **{"gen_ai.agent.name": "coder"}), flat("b", "a", **usage))
    )
    assert [(r.spend, r.agent, r.phase) for r in log.records] == [(Spend(input=5, output=1, calls=1), "coder", "coder")]
    ring = write(tmp_path / "ring.jsonl", flat("a", "b"), flat("b", "a", **usage))
    assert len(read(ring).records) == 1


def test_files_that_hold_no_call(tmp_path: Path) -> None:
    for text, told in (("", "0 lines skipped"), ("x\n", "line 1: not JSON"), ("{}", "no usage"), ("[}", "not JSON")):
        file = tmp_path / "log"
        file.write_text(text)
        with pytest.raises(InvalidInput, match=told):
            read(file)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read(tmp_path / "none")
