"""Batch jobs: a file of requests through one plan, a line of JSON each; resumable, and within one account.

A request line has `id` (or gets its line number), and `prompt` or `messages`; it may have `context`, `prefix`, `tools`,
`max_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `seed`, `stop`. Other fields pass through to the engine. A
result line has `id`, `key` (a hash of request, plan and engines), and the answer with its Spend and receipts, or an
`error`. Results are appended as they come (`thrifty.results`); a run that is started again skips every key that has an
answer and tries again what failed, so the last line of a key counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.budget import Account
from thrifty.call import Answer, Call, Sampling
from thrifty.engines.generation import check_sampling
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput
from thrifty.plan import Pipeline
from thrifty.results import Results

MAX_LINE = 16_000_000
"""Bytes of one request line."""

_WHOLE = ("max_tokens", "top_k", "seed")
_REAL = ("temperature", "top_p", "min_p")
_SAMPLING = (*_WHOLE, *_REAL)
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
    """Where a batch job stands. `done` counts every request that has a line; those that failed are among them."""

    total: int = 0
    done: int = 0
    resumed: int = 0
    failed: int = 0
    """the engine failed"""
    refused: int = 0
    """the budget refused"""
    rejected: int = 0
    """the engine cannot take the request: too long for it, images without vision"""
    first_error: str = ""
    """what the first request without an answer was told"""


def read_requests(path: Path, pipeline: Pipeline) -> list[Request]:
    """All requests of a file. Raises InvalidInput with file and line for what cannot be read."""
    identities = {role: dict(engine.identity()) for role, engine in pipeline.engines.items()}
    scope = json.dumps([pipeline.plan.hash, identities], sort_keys=True)
    requests: list[Request] = []
    seen: dict[str, int] = {}
    for number, body in _lines(path):
        where = f"{path}:{number}"
        _check(body, where)
        ident = str(body.get("id", number))
        if ident in seen:
            raise InvalidInput(f"{where}: id {ident!r} was used on line {seen[ident]}: ids must differ")
        seen[ident] = number
        try:
            text = json.dumps(body, sort_keys=True, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"{where}: {error.object[error.start]!r} is half a character: write it whole") from error
        except RecursionError as error:
            raise InvalidInput(f"{where}: nested too deeply: send plainer data") from error
        key = hashlib.sha256(f"{scope}\n{ident}\n".encode() + text).hexdigest()[:24]
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
    failed or cannot take it; the others go on. What no request can help (a full disk, a broken ledger) ends the run.
    Cancelling settles what is in flight. Raises InvalidInput for an `out` that is no result file, or is in use.
    """
    if concurrency < 1:
        raise InvalidInput(f"concurrency {concurrency}: at least 1 is needed")
    with Results(out) as results:
        todo = [r for r in requests if r.key not in results.finished]
        there = len(requests) - len(todo)
        progress = Progress(len(requests), there, there)
        queue = iter(todo)

        async def worker() -> None:
            for request in queue:
                results.append(await _answer(request, pipeline, account, progress))
                progress.done += 1
                if on_progress:
                    on_progress(progress)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(todo))):
                    group.create_task(worker())
        except BaseExceptionGroup as several:
            raise _first(several) from several
    return progress


def call_of(body: Mapping[str, Any], pipeline: Pipeline, account: Account) -> Call:
    """The Call that a request line asks for."""
    return pipeline.call(
        body["messages"] if "messages" in body else body["prompt"],
        account,
        context=tuple(body.get("context", ())),
        prefix=body.get("prefix"),
        tools=tuple(body.get("tools", ())),
        sampling=_sampling(body),
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
        told: Exception = error
    except EngineError as error:
        progress.failed += 1
        told = error
    except InvalidInput as error:
        progress.rejected += 1
        told = error
    progress.first_error = progress.first_error or f"request {request.id!r}: {told}"
    failure: dict[str, Any] = {"kind": type(told).__name__, "message": str(told)}
    spend = getattr(told, "spend", None)
    return {**line, "error": failure | ({"spend": spend.to_dict()} if spend else {})}


def _first(several: BaseExceptionGroup[BaseException]) -> BaseException:
    first = several.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line that is not empty. A field of ours that is null is taken as missing."""
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
                body = json.loads(raw, parse_constant=_no_constant)
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(body, dict):
                raise InvalidInput(f"{path}:{number}: a JSON object is needed, not {type(body).__name__}")
            yield number, {k: v for k, v in body.items() if v is not None or k not in _OWN}


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _check(body: Mapping[str, Any], where: str) -> None:
    """Raises InvalidInput for a field of ours that no engine could take."""
    if ("messages" in body) == ("prompt" in body):
        raise InvalidInput(f"{where}: either `prompt` or `messages` is needed")
    if not isinstance(body.get("id", ""), (str, int)) or isinstance(body.get("id"), bool):
        raise InvalidInput(f"{where}: id = {body['id']!r}: a text or a whole number is needed")
    if not isinstance(body.get("prefix", ""), str):
        raise InvalidInput(f"{where}: `prefix` must be a text")
    context, stop, tools = body.get("context", []), body.get("stop", []), body.get("tools", [])
    if not (isinstance(context, list) and all(isinstance(c, str) for c in context)):
        raise InvalidInput(f"{where}: `context` must be a list of texts")
    if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(s, str) for s in stop)):
        raise InvalidInput(f"{where}: `stop` must be a text or a list of texts")
    if not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise InvalidInput(f"{where}: `tools` must be a list of objects")
    if "prompt" in body:
        if not isinstance(body["prompt"], str):
            raise InvalidInput(f"{where}: `prompt` must be a text")
        said = bool(body["prompt"].strip())
    else:
        said = _check_messages(body["messages"], where) or any(c.strip() for c in context)
    if not said:
        raise InvalidInput(f"{where}: an empty prompt: give text")
    for name in _SAMPLING:
        value = body.get(name, 0)
        kinds = (int,) if name in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            kind = "whole number" if name in _WHOLE else "number"
            raise InvalidInput(f"{where}: {name} = {value!r}: a {kind} is needed")
    try:
        check_sampling(_sampling(body))
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from error


def _check_messages(messages: Any, where: str) -> bool:
    """Whether the messages say anything: text, an image, a tool call. Raises InvalidInput for another form."""
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise InvalidInput(f"{where}: `messages` must be a list of objects with a role, at least one")
    said = False
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise InvalidInput(f"{where}: every message needs a `role`: system, user, assistant or tool")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                    raise InvalidInput(f"{where}: every part of a message's content must be an object with a `type`")
                if part["type"] == "text" and not isinstance(part.get("text"), str):
                    raise InvalidInput(f"{where}: a part of type 'text' needs its `text`")
                said |= part["type"] != "text" or bool(part["text"].strip())
        elif content is not None and not isinstance(content, str):
            raise InvalidInput(f"{where}: a message's `content` must be a text or a list of parts")
        said |= bool(isinstance(content, str) and content.strip()) or bool(message.get("tool_calls"))
    return said


def _sampling(body: Mapping[str, Any]) -> Sampling:
    stop = body.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Sampling(**{k: body[k] for k in _SAMPLING if k in body}, stop=stops)
