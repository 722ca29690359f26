"""Task: an example with a scorer; read from JSONL, a local `datasets` folder, or a built-in suite.

A task mirrors what a Call can carry: messages, context passages, an answer prefix, tools. Its messages may
hold the mark `{context}`: the passages, joined by a blank line, are rendered there. Its `hash` covers every
field, so a result stays with exactly the example it was measured on. A task round-trips through JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from thrifty.errors import InvalidInput, Unsupported, nearest

CONTEXT_MARK = "{context}"
"""Where in a message the context passages are rendered (the same mark as a Call's)."""

MAX_LINE = 16 * 1024 * 1024
"""Longest line of a task file, in bytes."""


@dataclass(frozen=True)
class Task:
    """One example.

    `gold` is what the scorer compares with (any JSON value). `group` names what related examples share:
    splits and bounds go by it. `prefix` is how the answer must begin. `max_tokens` limits the answer. `extra`
    is free (suites put difficulty and length there) and is not sent to the model.

    >>> task = Task(id="1", messages=({"role": "user", "content": "2 + 2?"},), gold="4", scorer="numeric")
    >>> Task.from_dict(task.to_dict()) == task
    True
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    context: tuple[str, ...] = ()
    gold: Any = None
    scorer: str = "exact"
    scorer_settings: Mapping[str, Any] = field(default_factory=dict)
    prefix: str | None = None
    group: str | None = None
    max_tokens: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; fields at their default are left out, so that a new field changes no old hash."""
        data: dict[str, Any] = {"id": self.id, "messages": [dict(message) for message in self.messages]}
        if self.context:
            data["context"] = list(self.context)
        if self.gold is not None:
            data["gold"] = self.gold
        data["scorer"] = self.scorer
        if self.scorer_settings:
            data["scorer_settings"] = dict(self.scorer_settings)
        for name in ("prefix", "group", "max_tokens"):
            if (value := getattr(self, name)) is not None:
                data[name] = value
        if self.tools:
            data["tools"] = [dict(tool) for tool in self.tools]
        if self.extra:
            data["extra"] = dict(self.extra)
        return data

    def hash(self) -> str:
        """SHA-256 (hex) of the task's canonical JSON. Raises InvalidInput for what JSON cannot hold."""
        try:
            text = json.dumps(
                self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
            )
            return hashlib.sha256(text.encode("utf-8")).hexdigest()
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"task {self.id!r} holds a value that is not JSON: {error}") from error

    def rendered(self, context: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The messages with the passages (or those given) in place: the plain form, without the prefix."""
        return render(self.messages, self.context if context is None else context)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "task", default_id: str | None = None) -> Task:
        """A task from its JSON form. `prompt` (text) may stand for `messages`: one user message.

        Raises InvalidInput, beginning with `where`, for an unknown field, a missing one or a wrong type.
        """
        if not isinstance(data, Mapping):
            raise InvalidInput(f"{where}: a task is a JSON object, not {_kind(data)}")
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known and name != "prompt":
                raise InvalidInput(f"{where}: {nearest(str(name), [*known, 'prompt'], 'field')}")
        if ("prompt" in data) == ("messages" in data):
            raise InvalidInput(f"{where}: a task has either `messages` or `prompt`, one of them and not both")
        if "prompt" in data:
            messages: list[Any] = [{"role": "user", "content": _text(data["prompt"], where, "prompt")}]
        else:
            messages = _items(data["messages"], where, "messages", Mapping)
        for message in messages:
            if not isinstance(message.get("role"), str):
                raise InvalidInput(f"{where}: every message needs a `role`: system, user, assistant or tool")
        if not messages:
            raise InvalidInput(f"{where}: `messages` is empty; a task needs at least one")
        ident = data.get("id", default_id)
        if isinstance(ident, int) and not isinstance(ident, bool):
            ident = str(ident)
        max_tokens = data.get("max_tokens")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise InvalidInput(f"{where}: `max_tokens` is {max_tokens!r}; it must be a whole number above 0")
        settings, extra = data.get("scorer_settings", {}), data.get("extra", {})
        for name, value in (("scorer_settings", settings), ("extra", extra)):
            if not isinstance(value, Mapping):
                raise InvalidInput(f"{where}: `{name}` is {_kind(value)}; it must be an object")
        return cls(
            id=_text(ident, where, "id"),
            messages=tuple(dict(message) for message in messages),
            context=tuple(_items(data.get("context", []), where, "context", str)),
            gold=data.get("gold"),
            scorer=_text(data.get("scorer", "exact"), where, "scorer"),
            scorer_settings=dict(settings),
            prefix=None if data.get("prefix") is None else _text(data["prefix"], where, "prefix"),
            group=None if data.get("group") is None else _text(data["group"], where, "group"),
            max_tokens=max_tokens,
            tools=tuple(_items(data.get("tools", []), where, "tools", Mapping)),
            extra=dict(extra),
        )


def render(messages: Sequence[Mapping[str, Any]], context: Sequence[str]) -> list[dict[str, Any]]:
    """Messages with the passages, joined by a blank line, in place of the first mark that stands in a text.

    Without a mark they stand before the last user message's text. Everything around them is unchanged.

    >>> render([{"role": "user", "content": "{context} Who?"}], ["Ann sings.", "Bob sleeps."])[0]["content"]
    'Ann sings.\\n\\nBob sleeps. Who?'
    """
    block = "\n\n".join(context)
    result = [dict(message) for message in messages]
    for message in result:
        content = message.get("content")
        if isinstance(content, str) and CONTEXT_MARK in content:
            message["content"] = content.replace(CONTEXT_MARK, block, 1)
            return result
    if block:
        for message in reversed(result):
            if message.get("role") == "user" and isinstance(message.get("content"), str):
                message["content"] = f"{block}\n\n{message['content']}"
                return result
        raise InvalidInput("the task has context but no user message with text that could hold it")
    return result


# --- files ---


def load(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[Task]:
    """Tasks from a JSONL file, or from a folder that `datasets` wrote with `save_to_disk`.

    `columns` maps a task's field (or `prompt`) to the column or key that holds it; the other columns are then
    ignored. `defaults` gives fields that the rows lack, such as the scorer. `split`: which split of a folder.

    Raises InvalidInput with file and line for what is broken, Unsupported where `datasets` is not installed.
    """
    source = Path(path)
    if not source.exists():
        raise InvalidInput(f"{source}: no such file or folder; give a .jsonl file or a `datasets` folder")
    known = [*(f.name for f in fields(Task)), "prompt"]
    for name in (*(columns or {}), *(defaults or {})):
        if name not in known:
            raise InvalidInput(nearest(name, known, "field"))
    rows = _dataset_rows(source, split, columns) if source.is_dir() else _jsonl_rows(source)
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for where, row in islice(rows, limit):
        if columns:
            for column in columns.values():
                if column not in row:
                    raise InvalidInput(f"{where}: {nearest(column, row, 'column')}")
            row = {name: row[column] for name, column in columns.items()}
        task = Task.from_dict({**(defaults or {}), **row}, where, default_id=f"{source.stem}-{len(tasks)}")
        if task.id in seen:
            raise InvalidInput(f"{where}: id {task.id!r} stands already at {seen[task.id]}; ids must differ")
        seen[task.id] = where
        tasks.append(task)
    if not tasks:
        raise InvalidInput(f"{source}: no tasks in it")
    return tasks


def save(tasks: Iterable[Task], path: str | Path) -> int:
    """Write tasks as JSONL; returns how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as stream:
        for task in tasks:
            stream.write(json.dumps(task.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _jsonl_rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with source.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            where = f"{source}:{number}"
            if len(line) > MAX_LINE:
                raise InvalidInput(f"{where}: a line may have {MAX_LINE:,} bytes; this one is longer")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
            except UnicodeDecodeError as error:
                raise InvalidInput(f"{where}: not UTF-8 at byte {error.start}") from error
            except json.JSONDecodeError as error:
                raise InvalidInput(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InvalidInput(f"{where}: a task is a JSON object, not {_kind(row)}")
            yield where, row


def _dataset_rows(
    source: Path, split: str | None, columns: Mapping[str, str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets  # heavy, and only this needs it
    except ImportError as error:
        raise Unsupported(
            f"{source} is a folder, which is read with `datasets`, not installed here: install the extra "
            f"`bench` (pip install 'thrifty[bench]') or give a .jsonl file"
        ) from error
    try:
        data: Any = datasets.load_from_disk(str(source))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{source}: not a folder saved by `datasets`: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        names = sorted(data)
        if split is None and len(names) > 1:
            raise InvalidInput(f"{source} has the splits {', '.join(names)}: say which one")
        name = names[0] if split is None else split
        if name not in data:
            raise InvalidInput(f"{source}: {nearest(name, names, 'split')}")
        data = data[name]
    for column in (columns or {}).values():
        if column not in data.column_names:
            raise InvalidInput(f"{source}: {nearest(column, data.column_names, 'column')}")
    for number, row in enumerate(data):
        yield f"{source} row {number}", {key: value for key, value in row.items() if value is not None}


# --- suites ---


def suites() -> tuple[str, ...]:
    """The built-in suites. `reasoning-gym:NAME` stands for each of its generators."""
    return ("needles", "arithmetic", "easy", "thinker", "reasoning-gym:NAME")


def suite(
    name: str,
    n: int,
    seed: int,
    *,
    count: Callable[[str], int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Task]:
    """`n` tasks of a built-in suite, the same for the same seed. `count` measures texts in tokens (needles).

    Raises InvalidInput for an unknown suite or setting, Unsupported where reasoning-gym is not installed.
    """
    if n < 1:
        raise InvalidInput(f"a suite needs at least 1 task, not {n}")
    given = dict(settings or {})
    if name == "needles":
        from thrifty.bench.needles import needles

        return needles(n, seed, count=count, **_checked(needles, given, ("n", "seed", "count"), name))
    if name == "easy":
        from thrifty.bench.easy import easy_set

        return easy_set(n, seed, **_checked(easy_set, given, ("n", "seed"), name))
    if name == "thinker":
        from thrifty.lab.suite import lab_tasks

        return lab_tasks(n, seed, **_checked(lab_tasks, given, ("n", "seed"), name))
    from thrifty.bench import gym

    if name == "arithmetic":
        return gym.arithmetic(n, seed, **_checked(gym.arithmetic, given, ("n", "seed"), name))
    if name.startswith("reasoning-gym:"):
        return gym.gym(name.removeprefix("reasoning-gym:"), n, seed, **given)
    raise InvalidInput(nearest(name, suites(), "suite"))


def _checked(function: Callable[..., Any], given: dict[str, Any], taken: tuple[str, ...], name: str) -> dict[str, Any]:
    import inspect

    known = [p for p in inspect.signature(function).parameters if p not in taken]
    for key in given:
        if key not in known:
            raise InvalidInput(f"suite {name!r}: {nearest(key, known, 'setting')}")
    return given


# --- checks ---


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        given = "missing" if value is None else _kind(value)
        raise InvalidInput(f"{where}: `{name}` is {given}; it must be a text")
    return value


def _items(value: Any, where: str, name: str, kind: type) -> list[Any]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
        what = "texts" if kind is str else "objects"
        raise InvalidInput(f"{where}: `{name}` must be a list of {what}")
    return list(value)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
