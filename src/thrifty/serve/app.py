"""The HTTP side of the gateway: an ASGI application with OpenAI's endpoints.

Requests are read with a bound on their size; a client that hangs up cancels its call, which settles what was produced.
Streams are written as they come: a client that reads slowly slows its own upstream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route

from thrifty.call import Answer, Delta, Emit
from thrifty.errors import EngineError, ThriftyError
from thrifty.serve import wire
from thrifty.serve.gateway import Gateway
from thrifty.serve.keys import Refused
from thrifty.serve.records import Record

Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Endpoint = Callable[["Request"], Awaitable[None]]

_JSON = (b"content-type", b"application/json")
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]  # fmt: skip
_PASSED_ON = frozenset({400, 404, 408, 409, 413, 415, 422, 429})
"""An upstream's statuses that are about the request, or about its load: the client sees them as they are."""


def application(gateway: Gateway, more: Sequence[BaseRoute] = ()) -> Starlette:
    """The ASGI application; `more` are routes of other parts (metrics, admin, dashboard)."""
    routes = [
        Route("/v1/chat/completions", _Served(gateway, _chat, "chat"), methods=["POST"]),
        Route("/v1/completions", _Served(gateway, _completions, "completions"), methods=["POST"]),
        Route("/v1/models", _Served(gateway, _models, "models"), methods=["GET"]),
        Route("/v1/models/{id:path}", _Served(gateway, _models, "models"), methods=["GET"]),
        *more,
    ]
    return Starlette(routes=routes)


class Request:
    """One HTTP request on its way, with what is needed to answer it."""

    __slots__ = ("gateway", "scope", "receive", "send", "record", "headers", "began", "streaming")

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        self.gateway, self.scope, self.receive, self.send, self.record = gateway, scope, receive, send, record
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.began = False
        self.streaming = False

    def header(self, name: bytes) -> str | None:
        """A header's value, by its name in lower case."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def body(self) -> bytes:
        """The whole body. Raises Refused (413) beyond the policy's size, and CancelledError when the client left."""
        most = self.gateway.loaded.policy.server.max_body
        length = self.headers.get(b"content-length", b"")
        pieces: list[bytes] = []
        size = 0
        while True:
            if (length.isdigit() and int(length[:20]) > most) or size > most:
                raise Refused(413, f"the body is larger than {most:,} bytes", code="body_too_large")
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if not message.get("more_body"):
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def whole(self, status: int, data: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Sends a JSON response."""
        body = orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS)
        self.began = True
        self.record.status = status
        head = [_JSON, (b"content-length", str(len(body)).encode()), *self._named(), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": head})
        await self.send({"type": "http.response.body", "body": body})

    async def piece(self, data: bytes) -> None:
        """Sends a piece of a stream, its head before the first."""
        if not self.began:
            self.began = self.streaming = True
            self.record.status = 200
            head = [*_EVENTS, *self._named()]
            await self.send({"type": "http.response.start", "status": 200, "headers": head})
        await self.send({"type": "http.response.body", "body": data, "more_body": True})
        if self.record.first is None:
            self.gateway.observers.first(self.record)

    async def end(self) -> None:
        """Ends a stream."""
        await self.send({"type": "http.response.body", "body": b""})

    async def refuse(self, refused: Refused) -> None:
        """Sends an error: as a response, or as the last event of a stream that has begun."""
        self.record.error = str(refused)
        if self.streaming:
            self.record.status = refused.status
            await self.send(
                {"type": "http.response.body", "body": wire.event(wire.error(refused)) + wire.DONE, "more_body": False}
            )
        elif not self.began:
            wait = [] if refused.wait is None else [(b"retry-after", str(max(1, round(refused.wait))).encode())]
            await self.whole(refused.status, wire.error(refused), wait)

    def _named(self) -> list[tuple[bytes, bytes]]:
        record = self.record
        named = [(b"x-request-id", record.id.encode())]
        if record.plan_hash:
            named.append((b"x-thrifty-plan", record.plan_hash.encode()))
        if record.spend:
            named.append((b"x-thrifty-spend", orjson.dumps(record.spend.to_dict())))
        return named


class _Served:
    """An endpoint as an ASGI application: errors become responses, a client that leaves cancels the work."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint, name: str) -> None:
        self.gateway, self.endpoint, self.name = gateway, endpoint, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = Record(self.name)
        request = Request(self.gateway, scope, receive, send, record)
        try:
            await self.endpoint(request)
        except Refused as refused:
            await request.refuse(refused)
        except EngineError as error:
            _spent(record, error)
            await request.refuse(upstream_error(error))
        except asyncio.CancelledError:
            record.status, record.error = record.status or 499, record.error or "the client left"
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        except ThriftyError as error:
            await request.refuse(Refused(500, str(error), "server_error"))
        except Exception:
            record.error = "internal error"
            await request.refuse(Refused(500, f"internal error; the log has it under {record.id}", "server_error"))
            raise
        finally:
            if self.name != "models" or record.error:
                self.gateway.observers.finished(record)


# -- endpoints -------------------------------------------------------------------------------------------------


async def _chat(request: Request) -> None:
    await _generate(request, chat=True)


async def _completions(request: Request) -> None:
    await _generate(request, chat=False)


async def _generate(request: Request, chat: bool) -> None:
    gateway, record = request.gateway, request.record
    key = gateway.authorise(request.header(b"authorization"), record)
    asked = wire.parse(await request.body(), chat)
    record.alias, record.stream = asked.model, asked.stream
    wanted = request.header(b"x-thrifty-plan")
    streams: list[_Stream] = []
    emits: list[Emit] | None = None
    if asked.stream:
        many = len(asked.prompts) * asked.n
        streams = [_Stream(request, wire.Chunks(asked, record.id, i)) for i in range(many)]
        emits = [stream.emit for stream in streams]
    answers = await _until_gone(request, gateway.answer(key, asked, record, wanted, emits))
    told = wire.told(record.id, record.plan_hash, record.spend, record.receipts, record.finish, record.estimated)
    if not asked.stream:
        await request.whole(200, wire.completion(asked, answers, told))
        return
    for i, (stream, answer) in enumerate(zip(streams, answers, strict=True)):
        await stream.last(answer, told if i == len(streams) - 1 else None)
    if asked.usage_in_stream:
        old = next((a.raw.get("usage") for a in answers if a.raw), None)
        await request.piece(streams[0].chunks.usage(record.spend, old))
    await request.piece(wire.DONE)
    await request.end()


async def _models(request: Request) -> None:
    gateway = request.gateway
    key = gateway.authorise(request.header(b"authorization"), request.record)
    wanted = request.scope.get("path_params", {}).get("id")
    listed = [{"id": m, "object": "model", "created": 0, "owned_by": "thrifty"} for m in gateway.models(key)]
    if wanted is None:
        await request.whole(200, {"object": "list", "data": listed})
        return
    found = next((m for m in listed if m["id"] == wanted), None)
    if found is None:
        raise Refused(404, f"no model {wanted!r} for this key: GET /v1/models lists them", code="model_not_found")
    await request.whole(200, found)


class _Stream:
    """The listener of one choice."""

    __slots__ = ("request", "chunks")

    def __init__(self, request: Request, chunks: wire.Chunks) -> None:
        self.request, self.chunks = request, chunks

    @property
    def begun(self) -> bool:
        """Whether the client has seen a part of it."""
        return self.chunks.begun

    async def emit(self, delta: Delta) -> None:
        piece = self.chunks.chunk(delta)
        if piece is not None:
            self.request.record.output_chunks += 1
            await self.request.piece(piece)

    async def last(self, answer: Answer, told: Mapping[str, Any] | None) -> None:
        """What a method held back until the end, and why it ended."""
        if not self.begun and (answer.text or answer.thinking or answer.tool_calls):
            calls = tuple({"index": i, **dict(t)} for i, t in enumerate(answer.tool_calls))
            await self.emit(Delta(answer.text, answer.thinking, calls))
        await self.request.piece(self.chunks.last(answer.finish, told))


# -- details ---------------------------------------------------------------------------------------------------


async def _until_gone(request: Request, work: Any) -> Any:
    """The result of the work; cancelled when the client hangs up first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, ThriftyError):
                await task
            raise asyncio.CancelledError
        return task.result()
    except asyncio.CancelledError:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, ThriftyError):
                await task
        raise
    finally:
        watch.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def upstream_error(error: EngineError) -> Refused:
    """What a client sees of an upstream's failure: its own status where that is about the request; 502 or 504 else."""
    status, shown = error.status, 504 if error.timed_out else 502
    if status is not None and (status in _PASSED_ON or status >= 500):
        shown = status
    kind = "rate_limit_error" if shown == 429 else "invalid_request_error" if shown < 500 else "upstream_error"
    return Refused(shown, str(error), kind, "upstream_error", error.wait)


def _spent(record: Record, error: EngineError) -> None:
    if error.spend is not None:
        record.spend = record.spend + error.spend
    if error.work is not None:
        record.work = record.work + error.work


def headers_of(scope: Mapping[str, Any]) -> dict[str, str]:
    """A request's headers as text, for the parts that read several."""
    return {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
