"""Batch jobs: what is read, what is refused, what is kept on the disk whatever happens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Answer, Budget, Call, EngineError, InvalidInput, LedgerError, Pipeline, Plan
from thrifty.batch import Progress, read_requests, run
from thrifty.engines.scripted import ScriptedEngine
from thrifty.results import Results

KEY = "0123456789abcdef01234567"


def echo(script: Any = None) -> Pipeline:
    return Plan("plain").build(ScriptedEngine(script or (lambda call, *_: call.question())))


def file_of(path: Path, *bodies: Any) -> Path:
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


# -- requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"prompt": "a", "tools": 5}', "tools"),
        ('{"prompt": "a", "tools": [5]}', "tools"),
        ('{"prompt": "a", "stop": [5]}', "stop"),
        ('{"prompt": "a", "prefix": 5}', "prefix"),
        ('{"prompt": "a", "context": "text"}', "context"),
        ('{"prompt": "a", "temperature": NaN}', "NaN"),
        ('{"prompt": "a", "temperature": 1e400}', "temperature"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens"),
        ('{"prompt": "a", "top_p": 5}', "top_p"),
        ('{"prompt": "a \\ud800"}', "half a character"),
        ('{"prompt": "a", "id": ["x"]}', "id"),
        ('{"prompt": " ", "context": ["x"]}', "empty prompt"),
        ('{"messages": "a"}', "messages"),
        ('{"messages": [{"content": "a"}]}', "role"),
        ('{"messages": [{"role": 5, "content": "a"}]}', "role"),
        ('{"messages": [{"role": "user", "content": 5}]}', "content"),
        ('{"messages": [{"role": "user", "content": [5]}]}', "part"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}', "text"),
        ('{"messages": [{"role": "user", "content": " "}]}', "empty prompt"),
        ('{"prompt": "a", "x": ' + "[" * 50_000 + "]" * 50_000 + "}", "not JSON"),
    ],
)
def test_a_request_that_no_engine_could_take_is_refused_with_its_line(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(InvalidInput, match=r"in\.jsonl:3") as refused:
        read_requests(path, echo())
    assert word in str(refused.value)


def test_null_is_the_same_as_missing(tmp_path: Path) -> None:
    path = file_of(tmp_path / "in.jsonl", {"id": None, "prompt": "a", "messages": None, "stop": None, "seed": None})
    assert [r.id for r in read_requests(path, echo())] == ["1"]


def test_ids_must_differ(tmp_path: Path) -> None:
    path = file_of(tmp_path / "in.jsonl", {"id": "2", "prompt": "a"}, {"prompt": "b"})
    with pytest.raises(InvalidInput, match="was used on line 1"):
        read_requests(path, echo())


def test_a_line_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "' + b"a" * 16_000_000 + b'"}\n')
    with pytest.raises(InvalidInput, match="a line of over"):
        read_requests(path, echo())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    [
        "id",
        "prompt",
        "messages",
        "context",
        "prefix",
        "tools",
        "stop",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "x",
    ]
)
part = st.dictionaries(st.sampled_from(["type", "text", "image_url"]), json_values | st.just("text"), max_size=3)
message = st.fixed_dictionaries({}, optional={"role": json_values | st.just("user"), "content": json_values | part})
bodies = st.dictionaries(fields, json_values, max_size=5) | st.fixed_dictionaries(
    {"messages": st.lists(message, max_size=2)}, optional={"context": json_values, "stop": json_values}
)


@given(bodies)
@settings(max_examples=200, deadline=None)
def test_any_request_is_answered_or_refused(tmp_path_factory: pytest.TempPathFactory, body: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("run")
    path = file_of(folder / "in.jsonl", body)
    try:
        requests = read_requests(path, echo())
    except InvalidInput:
        return
    progress = asyncio.run(run(requests, echo(), folder / "out.jsonl", Account("run", Budget(output=5))))
    assert progress.done == 1
    assert ids(folder / "out.jsonl") == [requests[0].id]


# -- the result file -------------------------------------------------------------------------------------------

FOREIGN = [
    b"my notes, without a line end",
    b"my notes\n",
    b'{"prompt": "a"}',
    b'{"id": "a", "secret": "not ours, and cut',
    b'{"id": "a", "key": "short, and cut',
    b'{"id": "a", "key": ["list"], "text": ""}\n',
    b'{"id": "a", "key": "no answer and no error"}\n',
    b"[1]\n",
    b"null",
    b"\xff\xfe\n",
    b"\0" * 100,
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_is_refused_and_keeps_every_byte(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(InvalidInput, match="no result file"), Results(out):
        pass
    assert out.read_bytes() == content


def test_a_foreign_last_line_below_ours_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    content = json.dumps({"id": "a", "key": KEY, "text": "x"}).encode() + b"\nmy notes"
    out.write_bytes(content)
    with pytest.raises(InvalidInput, match="no result file"), Results(out):
        pass
    assert out.read_bytes() == content


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_file_cut_anywhere_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever a crash leaves of our own lines, the whole ones stay and the rest is answered again."""
    out = tmp_path_factory.mktemp("cut") / "out.jsonl"
    lines = [{"id": f"r{i}", "key": f"{i:024x}", "text": "é" * i} for i in range(4)]
    with Results(out) as results:
        for line in lines:
            results.append(line)
    whole = out.read_bytes()
    first = whole.index(b"\n")
    at = data.draw(st.integers(first, len(whole)))
    out.write_bytes(whole[:at])
    there = {json.loads(line)["key"] for line in whole[:at].splitlines() if line.endswith(b"}")}
    with Results(out) as results:
        assert results.finished == there
        results.append({"id": "new", "key": "f" * 24, "text": ""})
    assert {json.loads(line)["key"] for line in out.read_text().splitlines()} == there | {"f" * 24}


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out), pytest.raises(InvalidInput, match="another run writes to it"), Results(out):
        pass


@pytest.mark.parametrize("name", [".", "/dev/null", "file/below.jsonl"])
def test_an_output_that_cannot_be_resumed_from(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="name another output"), Results(tmp_path / name):
        pass


# -- the run ---------------------------------------------------------------------------------------------------


async def test_what_no_request_can_help_ends_the_run(tmp_path: Path) -> None:
    calls = 0

    def broken(call: Call, *_: Any) -> str:
        nonlocal calls
        calls += 1
        raise LedgerError("the disk is full")

    requests = read_requests(file_of(tmp_path / "in.jsonl", *({"prompt": f"{i}"} for i in range(50))), echo())
    with pytest.raises(LedgerError, match="disk is full"):
        await run(requests, echo(broken), tmp_path / "out.jsonl", Account("run"), concurrency=2)
    assert calls <= 2
    assert (tmp_path / "out.jsonl").read_bytes() == b""


async def test_failures_are_told_apart_and_tried_again(tmp_path: Path) -> None:
    def moody(call: Call, *_: Any) -> str:
        match call.question():
            case "down":
                raise EngineError("the server is down")
            case "odd":
                raise InvalidInput("too long for the model")
        return "fine"

    source = file_of(tmp_path / "in.jsonl", {"prompt": "down"}, {"prompt": "odd"}, {"prompt": "ok"})
    out = tmp_path / "out.jsonl"
    requests = read_requests(source, echo())
    progress = await run(requests, echo(moody), out, Account("run"), concurrency=1)
    assert (progress.done, progress.failed, progress.rejected, progress.refused) == (3, 1, 1, 0)
    assert progress.first_error == "request '1': the server is down"
    again = await run(requests, echo(), out, Account("run"))
    assert (again.resumed, again.done, again.failed) == (1, 3, 0)


async def test_cancelling_settles_what_is_in_flight(tmp_path: Path) -> None:
    engine = ScriptedEngine("one two three four five six", delay=0.05)
    pipeline = Plan("plain").build(engine)
    requests = read_requests(file_of(tmp_path / "in.jsonl", *({"prompt": f"{i}"} for i in range(20))), pipeline)
    account = Account("run")
    task = asyncio.create_task(run(requests, pipeline, tmp_path / "out.jsonl", account, concurrency=4))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert account.held == {}
    assert account.settled.output >= sum(line["spend"]["output"] for line in written) > 0
    with Results(tmp_path / "out.jsonl") as results:
        assert len(results.finished) == len(written)


def test_progress_starts_at_nothing() -> None:
    assert Progress().done == 0


def test_another_embedder_is_another_key(tmp_path: Path) -> None:
    """Results depend on every engine of the plan, not on the answering one alone."""

    class Named(ScriptedEngine):
        def identity(self) -> dict[str, Any]:
            return {**super().identity(), "weights": "other"}

    source = file_of(tmp_path / "in.jsonl", {"prompt": "a"})
    answer = ScriptedEngine("x")
    one = read_requests(source, Plan("p").build({"answer": answer, "embedder": ScriptedEngine("x")}))
    two = read_requests(source, Plan("p").build({"answer": answer, "embedder": Named("x")}))
    assert one[0].key != two[0].key


def test_answers_round_trip(tmp_path: Path) -> None:
    from thrifty.batch import answer_line

    line = answer_line(Answer("text", parsed="t"))
    assert json.loads(json.dumps(line)) == line
    assert line["parsed"] == "t"
