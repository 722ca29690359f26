"""A stub server that misbehaves on demand, and what tests of the openai engine share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from thrifty.budget import Account
from thrifty.call import Call, Delta, Sampling
from thrifty.ledger import MemoryLedger

Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
QUESTION = {"role": "user", "content": "What is the capital of France?"}


def body(text: str = "It is Paris.", *, usage: Any = USAGE, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A whole chat response."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    data = {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]}
    return data if usage is None else {**data, "usage": usage}


def whole(data: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json") -> Reply:
    """Answers with one body; bytes and text go out as they are."""
    raw = data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else json.dumps(data).encode()

    async def reply(request: web.Request) -> web.StreamResponse:
        return web.Response(body=raw, status=status, headers={"Content-Type": kind, **(headers or {})})

    return reply


def piece(text: str | None = None, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    """One chunk of a chat stream."""
    content = {} if text is None else {"content": text}
    return {"id": "x", "choices": [{"index": 0, "delta": {**content, **delta}, "finish_reason": finish}]}


def usage_chunk(usage: Any = USAGE) -> dict[str, Any]:
    """The chunk that carries the usage."""
    return {"id": "x", "choices": [], "usage": usage}


PARIS = (piece("It is"), piece(" Paris"), piece("."), piece(finish="stop"), usage_chunk())


def stream(
    *events: Any, done: bool = True, then: str = "end", wait: float = 0.0, gone: asyncio.Event | None = None
) -> Reply:
    """Answers with a stream. `then`: end, cut (the connection breaks), or hang after the events. `gone` is set when
    the client hangs up while this hangs."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            raw = event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode()
            await response.write(raw)
            await asyncio.sleep(wait)
        if then == "cut":
            assert request.transport is not None
            request.transport.abort()
        elif then == "hang":
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                if gone is not None:
                    gone.set()
                raise
        elif done:
            await response.write(b"data: [DONE]\n\n")
        return response

    return reply


def hang(seconds: float = 30.0) -> Reply:
    """Never answers."""

    async def reply(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return web.Response()

    return reply


def reset() -> Reply:
    """Breaks the connection before it answers."""

    async def reply(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        await asyncio.sleep(1)
        return web.Response()

    return reply


@dataclass
class Stub:
    """A server that plays its replies in order; the last one is repeated."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    def plays(self, *replies: Reply) -> None:
        self.replies = list(replies)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.requests.append(json.loads(raw) if raw else {})
        self.paths.append(request.path)
        self.headers.append(dict(request.headers))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await reply(request)
        finally:
            self.under_way -= 1


@dataclass
class Bank:
    """An account with its ledger, and what must hold after every call."""

    account: Account
    ledger: MemoryLedger

    def call(self, **fields: Any) -> Call:
        sampling = fields.pop("sampling", Sampling(temperature=0, max_tokens=fields.pop("max_tokens", 20)))
        messages = fields.pop("messages", (QUESTION,))
        return Call(messages, self.account, sampling=sampling, **fields)

    def entries(self) -> list[Any]:
        return list(self.ledger.entries())

    def check(self) -> None:
        """Nothing is held, no hold record is open, and the ledger's sum is what the account settled."""
        assert self.account.held == {}
        assert self.ledger.holds() == {}
        total: dict[str, int] = {}
        for entry in self.entries():
            for name, amount in entry.spend.to_dict().items():
                total[name] = total.get(name, 0) + amount
        assert total == self.account.settled.to_dict()


@dataclass
class Ear:
    """Listens to a stream."""

    deltas: list[Delta] = field(default_factory=list)

    async def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)

    @property
    def text(self) -> str:
        return "".join(d.text for d in self.deltas)
