"""Batch jobs: a file of requests through one plan, a line of JSON each; resumable, and within one account.

A request line has `id` (or gets its line number), and `prompt` or `messages`; it may have `context`, `prefix`, `tools`,
`max_tokens`, `temperature`, `top_p`, `seed`, `stop`. Other fields pass through to the engine. A result line has `id`,
`key` (a hash of request, plan and engine), and the answer with its Spend and receipts, or an `error`. Results are
appended as they come; a run that is started again skips every key that has an answer and tries again what failed, so
the last line of a key counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from thrifty.budget import Account
from thrifty.call import Answer, Call, Sampling
from thrifty.errors import BudgetExceeded, InvalidInput, ThriftyError
from thrifty.plan import Pipeline

MAX_LINE = 16_000_000
"""Bytes of one request line."""

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
_OWN = {"id", "prompt", "messages", "context", "prefix", "tools", "stop", *_SAMPLING}


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input file."""

    id: str
    key: str
    body: Mapping[str, Any]
    line: int


@dataclass(slots=True)
class Progress:
    """Where a batch job stands."""

    total: int = 0
    done: int = 0
    resumed: int = 0
    failed: int = 0
    refused: int = 0


def read_requests(path: Path, pipeline: Pipeline) -> list[Request]:
    """All requests of a file. Raises InvalidInput with file and line for what cannot be read."""
    scope = json.dumps([pipeline.plan.hash, dict(pipeline.engine.identity())], sort_keys=True)
    requests: list[Request] = []
    seen: dict[str, int] = {}
    for number, body in _lines(path):
        where = f"{path}:{number}"
        _check(body, where)
        ident = str(body.get("id", number))
        if ident in seen:
            raise InvalidInput(f"{where}: id {ident!r} was used on line {seen[ident]}: ids must differ")
        seen[ident] = number
        text = json.dumps(body, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(f"{scope}\n{ident}\n{text}".encode()).hexdigest()[:24]
        requests.append(Request(ident, key, body, number))
    if not requests:
        raise InvalidInput(f"{path}: no requests in it: one JSON object a line is needed")
    return requests


async def run(
    requests: list[Request],
    pipeline: Pipeline,
    out: Path,
    account: Account,
    *,
    concurrency: int = 8,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Answers what `out` does not have yet and appends it there.

    A request that the account refuses is written with its error and tried again by the next run, like one whose engine
    failed; the others go on. Cancelling finishes the lines being written and settles what is in flight.
    """
    if concurrency < 1:
        raise InvalidInput(f"concurrency {concurrency}: at least 1 is needed")
    async with _appending(out) as (finished, write):
        todo = [r for r in requests if r.key not in finished]
        progress = Progress(len(requests), len(requests) - len(todo), len(requests) - len(todo))
        queue = iter(todo)

        async def worker() -> None:
            for request in queue:
                line = await _answer(request, pipeline, account, progress)
                write(line)
                progress.done += 1
                if on_progress:
                    on_progress(progress)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(todo))):
                group.create_task(worker())
    return progress


def call_of(body: Mapping[str, Any], pipeline: Pipeline, account: Account) -> Call:
    """The Call that a request line asks for."""
    sampling = Sampling(**{k: body[k] for k in _SAMPLING if k in body}, stop=tuple(_list(body.get("stop"))))
    return pipeline.call(
        body.get("messages") or str(body["prompt"]),
        account,
        context=tuple(body["context"]) if body.get("context") else None,
        prefix=body.get("prefix"),
        tools=tuple(body.get("tools", ())),
        sampling=sampling,
        extra={k: v for k, v in body.items() if k not in _OWN},
    )


def answer_line(answer: Answer) -> dict[str, Any]:
    """An answer as a result line has it; empty fields left out."""
    data: dict[str, Any] = {"text": answer.text, "finish": answer.finish}
    optional = {
        "parsed": answer.parsed,
        "thinking": answer.thinking,
        "tool_calls": [dict(t) for t in answer.tool_calls],
        "estimated": answer.estimated,
    }
    data |= {k: v for k, v in optional.items() if v}
    data |= {"spend": answer.spend.to_dict(), "work": answer.work.to_dict()}
    return {**data, "receipts": [r.to_dict() for r in answer.receipts]}


# -- details ---------------------------------------------------------------------------------------------------


async def _answer(request: Request, pipeline: Pipeline, account: Account, progress: Progress) -> dict[str, Any]:
    line: dict[str, Any] = {"id": request.id, "key": request.key}
    try:
        return {**line, **answer_line(await pipeline(call_of(request.body, pipeline, account)))}
    except BudgetExceeded as error:
        progress.refused += 1
        return {**line, "error": {"kind": "BudgetExceeded", "message": str(error)}}
    except ThriftyError as error:
        progress.failed += 1
        return {**line, "error": {"kind": type(error).__name__, "message": str(error)}}


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(raw) > MAX_LINE:
                raise InvalidInput(f"{path}:{number}: a line of over {MAX_LINE:,} bytes: split the request")
            if not raw.strip():
                continue
            try:
                body = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(body, dict):
                raise InvalidInput(f"{path}:{number}: a JSON object is needed, not {type(body).__name__}")
            yield number, body


def _check(body: Mapping[str, Any], where: str) -> None:
    messages, prompt = body.get("messages"), body.get("prompt")
    if (messages is None) == (prompt is None):
        raise InvalidInput(f"{where}: either `prompt` or `messages` is needed")
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        raise InvalidInput(f"{where}: an empty prompt: give text")
    if messages is not None and not (
        isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    ):
        raise InvalidInput(f"{where}: `messages` must be a list of objects with a role, at least one")
    context = body.get("context", [])
    if not (isinstance(context, list) and all(isinstance(c, str) for c in context)):
        raise InvalidInput(f"{where}: `context` must be a list of texts")
    for name in _SAMPLING:
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            raise InvalidInput(f"{where}: {name} = {value!r}: a number of at least 0 is needed")


def _finished(out: Path) -> set[str]:
    """Keys that have an answer. A torn last line, left by a crash, is cut off."""
    keys: set[str] = set()
    end = 0
    with out.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict) or "key" not in line:
                if raw.endswith(b"\n"):
                    raise InvalidInput(f"{out}: is no result file of this command: name another output")
                break
            end += len(raw)
            if "error" not in line:
                keys.add(line["key"])
    if end < out.stat().st_size:
        with out.open("r+b") as file:
            file.truncate(end)
    return keys


@asynccontextmanager
async def _appending(out: Path) -> AsyncIterator[tuple[set[str], Callable[[Mapping[str, Any]], None]]]:
    """The finished keys, and a function that appends whole lines.

    The file is locked against a second run before it is read, and synced at the end.
    """
    import fcntl

    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInput(f"{out}: another run writes to it: wait for it, or name another output") from error
        try:
            yield _finished(out), lambda line: _append(file, line)
        finally:
            os.fsync(file.fileno())


def _append(file: IO[bytes], line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
