"""Reading logs of model calls: OpenAI-style JSON lines and OpenTelemetry GenAI spans. What a line says becomes a
`CallRecord`; a line that says nothing sound is skipped, and told by its number.

OpenAI style: a line is a response with `usage`, or an object with `response` (and `request`). What the call belonged to
stands beside it or in its `metadata`: task, run, phase, agent, iteration, success, difficulty, predicted_tokens.

OpenTelemetry: OTLP JSON (`resourceSpans`) or spans as the SDK prints them, one document or one a line. A span with
usage whose descendants have usage too (an agent's span that sums its calls) is not counted twice: the innermost count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from thrifty.errors import InvalidInput
from thrifty.spend import Spend

MOST_BYTES = 1 << 30
"""The largest log that is read."""
MOST_LINE = 1 << 25
"""The longest line in bytes; a longer one is skipped."""
_MOST_TOKENS = 10**9
_MOST_TOLD = 20


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call of a model. `messages`: a digest and the characters of each message sent, where the log has them;
    `tools`: those that the model called; `success`, `difficulty`, `predicted`: of the run, where known."""

    task: str
    run: str
    model: str
    spend: Spend
    phase: str = ""
    agent: str = ""
    iteration: int | None = None
    tools: tuple[str, ...] = ()
    messages: tuple[tuple[bytes, int], ...] = ()
    success: bool | None = None
    difficulty: float | None = None
    predicted: float | None = None


@dataclass(slots=True)
class Log:
    """What was read: calls in the order of the log. `skipped` counts lines or spans that could not be used, `why` tells
    the first of them by number; `summed` counts spans that only sum others."""

    records: list[CallRecord] = field(default_factory=list)
    skipped: int = 0
    why: list[str] = field(default_factory=list)
    summed: int = 0

    def skip(self, where: str, why: str) -> None:
        """Notes what could not be used."""
        self.skipped += 1
        if len(self.why) < _MOST_TOLD:
            self.why.append(f"{where}: {why}")


def read(path: str | Path) -> Log:
    """Reads a log of either kind. Raises InvalidInput where there is no file, or no call in it."""
    path = Path(path)
    log = Log()
    spans: list[tuple[str, Mapping[str, Any]]] = []
    for where, line in _objects(path, log):
        found = list(_spans(line))
        if found:
            spans += [(where, span) for span in found]
            continue
        try:
            log.records.append(_record(line))
        except InvalidInput as error:
            log.skip(where, str(error))
    _from_spans(spans, log)
    if not log.records:
        first = f": {log.why[0]}" if log.why else ""
        raise InvalidInput(f"{path}: no call with its usage in it ({log.skipped} lines skipped{first})")
    return log


def spend_of(usage: Any) -> Spend:
    """The Spend of one call from a `usage` object of OpenAI's or Anthropic's form. Raises InvalidInput for one that
    cannot be true: cached tokens are a part of the input, reasoning ones of the output."""
    if not isinstance(usage, Mapping):
        raise InvalidInput("no usage")

    def number(*names: str) -> int | None:
        for name in names:
            value: Any = usage
            for key in name.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return _count(value, name)
        return None

    got, made = number("prompt_tokens", "input_tokens"), number("completion_tokens", "output_tokens")
    if got is None or made is None:
        raise InvalidInput("usage without input or output tokens")
    cached = number("prompt_tokens_details.cached_tokens", "input_tokens_details.cached_tokens",
                    "prompt_cache_hit_tokens", "cache_read_input_tokens") or 0  # fmt: skip
    if "prompt_tokens" not in usage and "cache_read_input_tokens" in usage:  # Anthropic leaves these out of the input
        got += cached + (number("cache_creation_input_tokens") or 0)
    thought = number("completion_tokens_details.reasoning_tokens", "output_tokens_details.reasoning_tokens",
                     "reasoning_tokens") or 0  # fmt: skip
    return _sound(got, cached, made, thought)


def _sound(got: int, cached: int, made: int, thought: int, tool_calls: int = 0) -> Spend:
    if cached > got:
        raise InvalidInput(f"{cached:,} cached of {got:,} input tokens")
    if thought > made:
        raise InvalidInput(f"{thought:,} reasoning of {made:,} output tokens")
    return Spend(input=got, cached=cached, output=made, reasoning=thought, calls=1, tool_calls=tool_calls)


def _count(value: Any, name: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        value = int(value)  # OTLP writes 64-bit integers as text
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKENS:
        raise InvalidInput(f"{name} = {str(value)[:40]!r} is no count")
    return value


# --- lines ---


def _objects(path: Path, log: Log) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where it stands and the object, of every line; a file that is one JSON document is one object or its list."""
    try:
        size = path.stat().st_size
        stream = path.open("rb")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    with stream:
        if size > MOST_BYTES:
            raise InvalidInput(f"{path}: a log of {size:,} bytes: up to {MOST_BYTES:,} are read: split it")
        first = stream.readline(MOST_LINE + 1)
        whole = None
        if first.strip() in (b"{", b"[") or first.lstrip()[:1] == b"[":
            try:
                whole = orjson.loads(first + stream.read())
            except ValueError as error:
                raise InvalidInput(f"{path}: not JSON: {error}") from error
        if whole is not None:
            for number, item in enumerate(whole if isinstance(whole, list) else [whole], 1):
                if isinstance(item, Mapping):
                    yield f"item {number}", item
                else:
                    log.skip(f"item {number}", "no JSON object")
            return
        stream.seek(0)
        number, inside = 0, False  # inside a line that is too long
        while raw := stream.readline(MOST_LINE):
            ends = raw.endswith(b"\n")
            if inside:
                inside = not ends
                continue
            number += 1
            if not ends and len(raw) == MOST_LINE:
                inside = True
                log.skip(f"line {number}", f"over {MOST_LINE:,} bytes")
                continue
            if not raw.strip():
                continue
            try:
                item = orjson.loads(raw)
            except ValueError:
                log.skip(f"line {number}", "not JSON")
                continue
            if isinstance(item, Mapping):
                yield f"line {number}", item
            else:
                log.skip(f"line {number}", "no JSON object")


def _record(line: Mapping[str, Any]) -> CallRecord:
    response = line.get("response", line)
    response = response.get("body", response) if isinstance(response, Mapping) else {}  # as batch APIs wrap it
    request = line.get("request", line)
    request = request if isinstance(request, Mapping) else {}
    if not isinstance(response, Mapping):
        raise InvalidInput("no response")
    spend = spend_of(response.get("usage", line.get("usage")))
    tools: list[str] = []
    for choice in _items(response.get("choices")):
        message = choice.get("message") if isinstance(choice, Mapping) else None
        for call in _items(message.get("tool_calls")) if isinstance(message, Mapping) else ():
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping):
                tools.append(str(function.get("name", ""))[:200])
    places = [p for p in (line.get("metadata"), request.get("metadata"), line) if isinstance(p, Mapping)]

    def told(*names: str) -> Any:
        return next((p[n] for n in names for p in places if p.get(n) is not None), None)

    run = _text(told("run", "run_id", "trace_id", "session_id"))
    return CallRecord(
        task=_text(told("task", "task_id", "custom_id")) or run or "all",
        run=run or "1",
        model=_text(response.get("model") or request.get("model")) or "unknown",
        spend=Spend(**{**spend.to_dict(), "tool_calls": len(tools)}),
        phase=_text(told("phase", "stage", "step")),
        agent=_text(told("agent", "agent_role", "role")),
        iteration=_whole(told("iteration", "round")),
        tools=tuple(tools),
        messages=tuple(_digest(m) for m in _items(request.get("messages")) if isinstance(m, Mapping)),
        success=_truth(told("success", "resolved", "correct")),
        difficulty=_real(told("difficulty")),
        predicted=_real(told("predicted_tokens")),
    )


def _digest(message: Mapping[str, Any]) -> tuple[bytes, int]:
    told = orjson.dumps([message.get("role"), message.get("content"), message.get("tool_calls")], default=str)
    return hashlib.blake2b(told, digest_size=12).digest(), len(told)


# --- spans ---


def _spans(item: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The spans of an OTLP document, or the one span that the item is; attributes as a plain mapping."""
    for resource in _items(item.get("resourceSpans")):
        for scope in _items(resource.get("scopeSpans")) if isinstance(resource, Mapping) else ():
            for span in _items(scope.get("spans")) if isinstance(scope, Mapping) else ():
                if isinstance(span, Mapping):
                    yield {
                        "id": _text(span.get("spanId")),
                        "parent": _text(span.get("parentSpanId")),
                        "trace": _text(span.get("traceId")),
                        "start": _real(span.get("startTimeUnixNano")) or 0.0,
                        "name": span.get("name"),
                        "attributes": _attributes(span.get("attributes")),
                    }
    attributes = item.get("attributes")
    if isinstance(attributes, Mapping) and ("context" in item or "span_id" in item or "spanId" in item):
        inner = item["context"] if isinstance(item.get("context"), Mapping) else item
        yield {
            "id": _text(inner.get("span_id", inner.get("spanId"))),
            "parent": _text(item.get("parent_id", item.get("parentSpanId"))),
            "trace": _text(inner.get("trace_id", inner.get("traceId"))),
            "start": _text(item.get("start_time")),
            "name": item.get("name"),
            "attributes": attributes,
        }


def _attributes(given: Any) -> dict[str, Any]:
    """OTLP's list of keys and typed values."""
    found: dict[str, Any] = {}
    for pair in _items(given):
        value = pair.get("value") if isinstance(pair, Mapping) else None
        if isinstance(value, Mapping) and isinstance(pair.get("key"), str):
            found[pair["key"]] = next(iter(value.values()), None)
    return found


_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_CACHED = ("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens")
_REASONING = ("gen_ai.usage.reasoning.output_tokens", "gen_ai.usage.reasoning_tokens")


def _from_spans(spans: list[tuple[str, Mapping[str, Any]]], log: Log) -> None:
    by_id = {(s["trace"], s["id"]): s for _, s in spans}
    spending = [(where, s) for where, s in spans if any(k in s["attributes"] for k in (*_INPUT, *_OUTPUT))]
    summing = set()
    for _, span in spending:
        summing |= {(s["trace"], s["id"]) for s in _ancestors(span, by_id)}
    starts = {type(s["start"]) for _, s in spending}
    if len(starts) == 1:
        spending.sort(key=lambda pair: pair[1]["start"])
    for where, span in spending:
        if (span["trace"], span["id"]) in summing:
            log.summed += 1
            continue
        try:
            log.records.append(_span_record(span, list(_ancestors(span, by_id))))
        except InvalidInput as error:
            log.skip(where, str(error))


def _ancestors(span: Mapping[str, Any], by_id: Mapping[Any, Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Parents, the nearest first. A log whose spans form a ring ends it."""
    seen = {(span["trace"], span["id"])}
    while span["parent"]:
        key = (span["trace"], span["parent"])
        if key in seen or key not in by_id:
            return
        seen.add(key)
        span = by_id[key]
        yield span


def _span_record(span: Mapping[str, Any], parents: list[Mapping[str, Any]]) -> CallRecord:
    own = span["attributes"]

    def number(names: tuple[str, ...], missing: int | None = 0) -> int:
        for name in names:
            if own.get(name) is not None:
                return _count(own[name], name)
        if missing is None:
            raise InvalidInput(f"a span without {names[0]}")
        return missing

    def told(*names: str) -> Any:
        """The innermost that says it."""
        for level in (own, *(p["attributes"] for p in parents)):
            for name in names:
                if level.get(name) is not None:
                    return level[name]
        return None

    trace: str = span["trace"]
    agent = _text(told("gen_ai.agent.name", "gen_ai.agent.id"))
    return CallRecord(
        task=_text(told("task", "task.id", "gen_ai.conversation.id")) or trace or "all",
        run=_text(told("run", "run.id")) or trace or "1",
        model=_text(told("gen_ai.response.model", "gen_ai.request.model")) or "unknown",
        spend=_sound(number(_INPUT, None), number(_CACHED), number(_OUTPUT), number(_REASONING)),
        phase=_text(told("phase", "stage", "gen_ai.workflow.step")) or agent,
        agent=agent,
        iteration=_whole(told("iteration", "round")),
        success=_truth(told("success", "resolved", "correct")),
        difficulty=_real(told("difficulty")),
        predicted=_real(told("predicted_tokens")),
    )


# --- values of logs, which may hold anything ---


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, (Mapping, list)) else str(value)[:200]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def _truth(value: Any) -> bool | None:
    return bool(value) if isinstance(value, bool) or value in (0, 1) else None


def _real(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except ValueError:
        return None
    return number if number is not None and abs(number) < 1e30 else None
