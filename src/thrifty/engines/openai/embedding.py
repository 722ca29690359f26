"""The two smaller endpoints: /embeddings and /models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from thrifty.budget import Account
from thrifty.call import Call
from thrifty.engine import Embeddings
from thrifty.engines.openai import spending
from thrifty.engines.openai.failure import Failure, of_error
from thrifty.engines.openai.spending import Ask, Price
from thrifty.engines.openai.transport import Transport
from thrifty.engines.openai.usage import Counter, read
from thrifty.errors import EngineError, Unsupported
from thrifty.ledger.entry import Labels
from thrifty.spend import Spend, Work

BATCH = 128
"""Texts in one request."""


async def embed(
    texts: Sequence[str], account: Account, labels: Labels, transport: Transport, counter: Counter, price: Price
) -> Embeddings:
    """Unit vectors [N, D] float32, in the order of the texts. Raises BudgetExceeded, EngineError."""
    try:
        import numpy as np
    except ImportError as error:
        raise Unsupported("embeddings need numpy: install the extra 'bench' or 'local'") from error
    rows: list[Any] = []
    spent = Spend()
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        counted = sum(counter.text(text) for text in batch)
        body = orjson.dumps({"model": transport.model, "input": batch, "encoding_format": "float"})
        call = Call((), account, on_exceed="refuse")
        ask = Ask(Spend(input=counted, calls=1), 0, 0)
        held = await spending.take(call, ask, labels, price)
        with held.hold:
            began = time.monotonic()
            try:
                data = await _fetch(transport, "embeddings", body, account)
                vectors = _vectors(data, len(batch))
            except Failure as failure:
                failure.message = transport.failed("embeddings", failure.message)
                raise EngineError(failure.message, spent or None) from failure
            used = read(data.get("usage"), sent=len(body), counted=(counted, 0), made="", output=0, tool_calls=0)
            notes = [n for n in used.notes if not n.startswith("no output tokens")]
            cost = price(used.spend)
            work = Work(prefill=cost.input - cost.cached, engine_seconds=time.monotonic() - began)
            await held.hold.settle_async(cost, work, estimated=bool(notes))
        spent = spent + cost
        rows += vectors
    if not rows:
        return Embeddings(np.zeros((0, 0), np.float32), spent)
    try:
        array = np.asarray(rows, np.float64)
        norms = np.linalg.norm(array, axis=1, keepdims=True)
        if array.ndim != 2 or not np.isfinite(norms).all() or not (norms > 0).all():
            raise ValueError
    except ValueError as error:
        what = "sent vectors that are empty, zero, infinite or of different lengths; see the server's log"
        raise EngineError(transport.failed("embeddings", what), spent or None) from error
    return Embeddings((array / norms).astype(np.float32), spent)


async def models(transport: Transport, until: float) -> tuple[str, ...]:
    """The ids that /models lists. Raises Failure."""
    data = await _get(transport, "models", None, until)
    listed = data.get("data")
    if not isinstance(listed, list):
        raise Failure("sent a response without a list of models; check base_url")
    return tuple(str(m["id"]) for m in listed if isinstance(m, Mapping) and "id" in m)


async def _fetch(transport: Transport, path: str, body: bytes, account: Account) -> Mapping[str, Any]:
    """`_get`, repeated as the transport allows."""
    attempt = 0
    while True:
        now = time.monotonic()
        left = spending.seconds_left(account)
        total = now + transport.timeouts.total
        deadline = total if left is None else now + left
        try:
            return await _get(transport, path, body, min(total, deadline))
        except Failure as failure:
            if left is not None and time.monotonic() >= deadline:
                account.check_deadline()
            if not await transport.back_off(failure, attempt, deadline):
                raise
            attempt += 1


async def _get(transport: Transport, path: str, body: bytes | None, until: float) -> Mapping[str, Any]:
    async with transport.request(path, body, until=until) as response:
        raw = await transport.read(response, until)
    try:
        data = orjson.loads(raw.decode("utf-8", errors="replace"))
    except orjson.JSONDecodeError as error:
        raise Failure("sent a response that is not JSON; check base_url") from error
    if not isinstance(data, Mapping):
        raise Failure("sent a response that is no JSON object; check base_url")
    if data.get("error"):
        raise of_error(data["error"], "in a response of HTTP 200")
    return data


def _vectors(data: Mapping[str, Any], expected: int) -> list[Any]:
    """The vectors in the order asked for; servers may send them in another and say so by `index`."""
    rows = data.get("data")
    good = (
        [r for r in rows if isinstance(r, Mapping) and isinstance(r.get("embedding"), list)]
        if isinstance(rows, list)
        else []
    )
    if len(good) != expected:
        raise Failure(f"sent {len(good)} vectors for {expected} texts; see the server's log")
    return [r["embedding"] for r in sorted(good, key=lambda r: r["index"] if isinstance(r.get("index"), int) else 0)]
