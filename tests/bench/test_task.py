"""Tasks: what is read is what was written, and what is broken is refused with its place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.bench.task import MAX_LINE, Task, load, render, save, suite, suites
from thrifty.errors import InvalidInput

USER = {"role": "user", "content": "2 + 2?"}

numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
messages = st.builds(lambda role, content: {"role": role, "content": content}, texts, texts)
tasks = st.builds(
    Task,
    id=texts,
    messages=st.lists(messages, min_size=1, max_size=3).map(tuple),
    context=st.lists(texts, max_size=3).map(tuple),
    gold=json_values,
    scorer=texts,
    scorer_settings=objects,
    prefix=st.none() | texts,
    group=st.none() | texts,
    max_tokens=st.none() | st.integers(1, 10_000),
    tools=st.lists(objects, max_size=2).map(tuple),
    extra=objects,
)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


@given(tasks)
def test_a_task_survives_json(task: Task) -> None:
    again = Task.from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task
    assert again.hash() == task.hash()


def test_the_hash_is_that_of_the_canonical_json() -> None:
    task = Task(id="a", messages=(USER,), gold=4, scorer_settings={"b": 1, "a": [2.5]}, prefix="é")
    text = (
        '{"gold":4,"id":"a","messages":[{"content":"2 + 2?","role":"user"}],"prefix":"é",'
        '"scorer":"exact","scorer_settings":{"a":[2.5],"b":1}}'
    )
    assert task.hash() == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"id": "b"}, {"messages": [{"role": "user", "content": "2 + 3?"}]}, {"context": ["x"]}, {"gold": "4 "},
        {"scorer": "numeric"}, {"scorer_settings": {"a": 1}}, {"prefix": ""}, {"group": "g"}, {"max_tokens": 3},
        {"tools": [{}]}, {"extra": {"a": 1}},
    ],
)  # fmt: skip
def test_every_field_changes_the_hash(change: dict[str, Any]) -> None:
    base = {"id": "a", "messages": [USER], "gold": "4"}
    assert Task.from_dict({**base, **change}).hash() != Task.from_dict(base).hash()


def test_a_value_outside_json_has_no_hash() -> None:
    for value in (float("nan"), {1, 2}, b"x"):
        with pytest.raises(InvalidInput, match="task 'a' holds a value that is not JSON"):
            Task(id="a", messages=(USER,), gold=value).hash()


def test_render_puts_the_passages_in_place_and_changes_nothing_else() -> None:
    system = {"role": "system", "content": "Be brief.", "name": "s"}
    marked = {"role": "user", "content": "Text:\n{context}\nWho {context}?"}
    assert render([system, marked], ["A", "B"]) == [
        system,
        {"role": "user", "content": "Text:\nA\n\nB\nWho {context}?"},
    ]
    assert marked["content"] == "Text:\n{context}\nWho {context}?"
    # A passage that holds the mark itself is text like any other.
    assert render([marked], ["{context}"])[0]["content"] == "Text:\n{context}\nWho {context}?"
    older = {"role": "user", "content": "Hello"}
    assert render([older, {"role": "assistant", "content": "Hi"}, USER], ["A"])[0] == older
    assert render([older, USER], ["A"])[1]["content"] == "A\n\n2 + 2?"
    assert render([USER], []) == [USER]
    assert render([{"role": "user", "content": "{context}Who?"}], [])[0]["content"] == "Who?"
    with pytest.raises(InvalidInput, match="no user message"):
        render([system], ["A"])


def test_jsonl_round_trip_and_prompt(tmp_path: Path) -> None:
    given_tasks = [Task(id=str(i), messages=(USER,), gold=i, context=("p", "q")) for i in range(3)]
    assert save(given_tasks, tmp_path / "t.jsonl") == 3
    assert load(tmp_path / "t.jsonl") == given_tasks
    assert load(tmp_path / "t.jsonl", limit=2) == given_tasks[:2]
    rows = write(tmp_path / "p.jsonl", {"prompt": "2 + 2?", "gold": "4"}, "", {"prompt": "3?", "id": 7})
    first, second = load(rows, defaults={"scorer": "numeric", "max_tokens": 9})
    assert (first.id, first.messages, first.scorer, first.max_tokens) == ("p-0", (USER,), "numeric", 9)
    assert second.id == "7"


def test_columns_are_mapped_and_others_ignored(tmp_path: Path) -> None:
    rows = write(tmp_path / "c.jsonl", {"question": "2 + 2?", "answer": "4", "source": "x"})
    (task,) = load(rows, columns={"prompt": "question", "gold": "answer"})
    assert (task.messages, task.gold) == ((USER,), "4")
    with pytest.raises(InvalidInput, match=r"c\.jsonl:1: unknown column 'anser': did you mean 'answer'"):
        load(rows, columns={"prompt": "question", "gold": "anser"})
    with pytest.raises(InvalidInput, match="unknown field 'golds': did you mean 'gold'"):
        load(rows, columns={"golds": "answer"})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "b", "messages": [', "not JSON"),
        ('{"id": "b", "prompt": "x", "gold": NaN}', "NaN is not a JSON number"),
        ("[1]", "a task is a JSON object, not a list"),
        ({"id": "b", "prompt": "x", "scorr": "exact"}, "unknown field 'scorr': did you mean 'scorer'"),
        ({"id": "b"}, "either `messages` or `prompt`"),
        ({"id": "b", "prompt": "x", "messages": [USER]}, "either `messages` or `prompt`"),
        ({"id": "b", "messages": []}, "`messages` is empty"),
        ({"id": "b", "messages": "x"}, "`messages` must be a list of objects"),
        ({"id": "b", "messages": [{"content": "x"}]}, "needs a `role`"),
        ({"id": "b", "prompt": "x", "context": "x"}, "`context` must be a list of texts"),
        ({"id": "b", "prompt": "x", "context": [1]}, "`context` must be a list of texts"),
        ({"id": "b", "prompt": "x", "max_tokens": 0}, "`max_tokens` is 0"),
        ({"id": "b", "prompt": "x", "max_tokens": True}, "`max_tokens` is True"),
        ({"id": "b", "prompt": "x", "scorer_settings": []}, "`scorer_settings` is a list; it must be an object"),
        ({"id": ["b"], "prompt": "x"}, "`id` is a list; it must be a text"),
        ({"id": "b", "prompt": None}, "`prompt` is missing"),
        ({"id": "a", "prompt": "x"}, "id 'a' stands already at"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_line_is_refused_with_file_and_line(tmp_path: Path, line: Any, said: str) -> None:
    path = write(tmp_path / "broken.jsonl", {"id": "a", "prompt": "x"}, "", line)
    with pytest.raises(InvalidInput) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and said in message and "\n" not in message


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file or folder"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match="no tasks in it"):
        load(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(InvalidInput, match=r"bytes\.jsonl:1: not UTF-8"):
        load(tmp_path / "bytes.jsonl")
    with (tmp_path / "long.jsonl").open("wb") as stream:
        stream.truncate(MAX_LINE + 2)
    with pytest.raises(InvalidInput, match=r"long\.jsonl:1: a line may have"):
        load(tmp_path / "long.jsonl")


def test_a_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["2 + 2?", "3 + 3?"], "answer": ["4", "6"], "note": [None, "n"]}
    data = datasets.Dataset.from_dict(rows)
    data.save_to_disk(tmp_path / "one")
    mapping = {"prompt": "question", "gold": "answer"}
    first, second = load(tmp_path / "one", columns=mapping, defaults={"scorer": "numeric"})
    assert (first.id, first.messages, first.gold, first.scorer) == ("one-0", (USER,), "4", "numeric")
    assert second.gold == "6"
    with pytest.raises(InvalidInput, match="unknown column 'questions': did you mean 'question'"):
        load(tmp_path / "one", columns={"prompt": "questions"})
    with pytest.raises(InvalidInput, match="one row 0: unknown field 'question'"):
        load(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    with pytest.raises(InvalidInput, match="splits test, train"):
        load(tmp_path / "two", columns=mapping)
    with pytest.raises(InvalidInput, match="unknown split 'tests': did you mean 'test'"):
        load(tmp_path / "two", columns=mapping, split="tests")
    assert [task.gold for task in load(tmp_path / "two", columns=mapping, split="test")] == ["6"]
    (tmp_path / "other").mkdir()
    with pytest.raises(InvalidInput, match="not a folder saved by `datasets`"):
        load(tmp_path / "other")


def test_suites_by_name() -> None:
    assert suites() == ("needles", "arithmetic", "easy", "thinker", "reasoning-gym:NAME")
    assert [task.id for task in suite("needles", 2, 0)] == ["needles-0-0", "needles-0-1"]
    with pytest.raises(InvalidInput, match="unknown suite 'needels': did you mean 'needles'"):
        suite("needels", 2, 0)
    with pytest.raises(InvalidInput, match="suite 'needles': unknown setting 'length': did you mean 'lengths'"):
        suite("needles", 2, 0, settings={"length": [500]})
    with pytest.raises(InvalidInput, match="at least 1 task"):
        suite("needles", 0, 0)
