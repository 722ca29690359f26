"""A gateway on a real socket before a stub upstream, and what its tests share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web

from thrifty.ledger import Ledger, MemoryLedger
from thrifty.serve import policy
from thrifty.serve.app import application
from thrifty.serve.gateway import Gateway
from thrifty.serve.keys import Key, Keyring, MemoryKeys, new_key
from thrifty.serve.records import Observers, Record

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


@dataclass
class Upstream:
    """An OpenAI-compatible server that says what it is told to; `bodies` are the requests it got."""

    text: str = "It is Paris."
    usage: Any = field(default_factory=lambda: dict(USAGE))
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=lambda: {"system_fingerprint": "fp"})
    wait: float = 0.0
    pause: float = 0.0
    """between two pieces of a stream"""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    """requests whose client hung up"""
    url: str = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append({**body, "_path": request.path, "_headers": dict(request.headers)})
        try:
            await asyncio.sleep(self.wait)
            if self.status != 200:
                error = {"error": {"message": "the upstream says no", "type": "some", "code": "why"}}
                return web.json_response(error, status=self.status, headers=self.headers)
            return await (self._stream(request, body) if body.get("stream") else self._whole(request))
        except (asyncio.CancelledError, ConnectionResetError):
            self.gone += 1
            raise

    async def _whole(self, request: web.Request) -> web.StreamResponse:
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if "chat" in request.path:
            choice["message"] = {"role": "assistant", "content": self.text, **self.message}
        else:
            choice["text"] = self.text
        data = {"id": "x", "object": "o", "created": 7, "model": "real", "choices": [choice], **self.top}
        return web.json_response(data | ({"usage": self.usage} if self.usage else {}))

    async def _stream(self, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        head = {"id": "x", "created": 7, "model": "real", **self.top}
        words = [w + " " for w in self.text.split()]
        words[-1] = words[-1][:-1]
        pieces: list[dict[str, Any]] = []
        for word in words:
            inner = {"delta": {"content": word}} if "chat" in request.path else {"text": word}
            pieces.append({**head, "choices": [{"index": 0, "finish_reason": None, **inner}]})
        pieces.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if (body.get("stream_options") or {}).get("include_usage") and self.usage:
            pieces.append({**head, "choices": [], "usage": self.usage})
        for piece in pieces:
            await response.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
            await asyncio.sleep(self.pause)
        await response.write(b"data: [DONE]\n\n")
        return response


@dataclass
class Served:
    """A running gateway with one key."""

    url: str
    gateway: Gateway
    upstream: Upstream
    ledger: Ledger
    secret: str
    key: Key
    session: aiohttp.ClientSession
    records: list[Record]
    keys: MemoryKeys

    def head(self, secret: str | None = None, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {secret or self.secret}", **more}

    async def post(
        self, path: str = "/v1/chat/completions", *, secret: str | None = None, plan: str | None = None, **body: Any
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON and headers of one request; a chat about the capital of France unless the body says else."""
        data = {"model": "fast", **body}
        if "messages" not in data and "prompt" not in data:
            data["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
        more = {} if plan is None else {"X-Thrifty-Plan": plan}
        async with self.session.post(self.url + path, json=data, headers=self.head(secret, **more)) as response:
            return response.status, json.loads(await response.read()), response.headers

    async def stream(self, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
        """The events of one stream; the last is the text [DONE]."""
        data = {"model": "fast", "messages": [{"role": "user", "content": "hi"}], "stream": True, **body}
        events: list[Any] = []
        async with self.session.post(self.url + path, json=data, headers=self.head()) as response:
            assert response.status == 200 and response.content_type == "text/event-stream"
            async for line in response.content:
                if line.startswith(b"data: "):
                    text = line[6:].strip()
                    events.append("[DONE]" if text == b"[DONE]" else json.loads(text))
        return events


class Kept:
    """An observer that keeps every record."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def started(self, record: Record) -> None: ...

    def first(self, record: Record) -> None: ...

    def finished(self, record: Record) -> None:
        self.records.append(record)


@asynccontextmanager
async def upstream_server(upstream: Upstream | None = None) -> AsyncIterator[Upstream]:
    """A stub upstream on a free port."""
    upstream = upstream or Upstream()
    app = web.Application(client_max_size=2**28)
    app.router.add_post("/{rest:.*}", upstream.answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    upstream.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()


@asynccontextmanager
async def http_server(app: Any) -> AsyncIterator[str]:
    """An ASGI application on a free port, by the server that `thrifty serve` uses; yields its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http="httptools", ws="none", lifespan="off",
                            log_level="critical", server_header=False)  # fmt: skip
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
        assert not task.done()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def serving(
    tmp_path: Path,
    data: Mapping[str, Any] | None = None,
    *,
    upstream: Upstream | None = None,
    ledger: Ledger | None = None,
    plans: Mapping[str, str] | None = None,
    clock: Any = None,
    **key: Any,
) -> AsyncIterator[Served]:
    """A gateway with a model `fast` (plain), a key with the given fields, and a stub upstream behind it.

    `data` is laid over the policy; `plans` are TOML texts by name."""
    async with upstream_server(upstream) as stub:
        paths = {}
        for name, text in (plans or {}).items():
            (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
            paths[name] = f"{name}.toml"
        document: dict[str, Any] = {
            "upstreams": {"main": {"url": stub.url, "retries": 0}},
            "models": {"fast": {"upstream": "main", "model": "real"}},
            "plans": paths,
            **(data or {}),
        }
        loaded = policy.of(document, tmp_path)
        made, secret = new_key("alice", **key)
        keys, book, kept = MemoryKeys([made]), ledger or MemoryLedger(), Kept()
        options = {} if clock is None else {"clock": clock}
        gateway = Gateway(loaded, Keyring(keys), book, Observers([kept]), **options)
        async with http_server(application(gateway)) as url, aiohttp.ClientSession() as session:
            try:
                yield Served(url, gateway, stub, book, secret, made, session, kept.records, keys)
            finally:
                await gateway.aclose()
