"""One answer from the server, by as many requests as it takes: held, sent, read, settled, repeated.

Every request ends in one of three ways. It made something: an entry is booked. We gave up on it (cancelled, timed out,
the listener failed) after the server had accepted it: an entry with the input at least. Else nothing is billed, and the
hold serves the next attempt. Whatever happens, no hold stays open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import ClientResponse

from thrifty.call import Answer, Call, Delta, Message, Receipt
from thrifty.engines.openai import spending, wire
from thrifty.engines.openai.failure import Failure, explain
from thrifty.engines.openai.spending import Ask, Held
from thrifty.engines.openai.stream import Events, EventTooLarge
from thrifty.engines.openai.transport import Transport
from thrifty.engines.openai.usage import BYTES_A_TOKEN, Counter, Usage, read
from thrifty.engines.openai.wire import Format, Prompt, Reply
from thrifty.engines.settling import Prices
from thrifty.errors import BudgetExceeded, EngineError
from thrifty.ledger.entry import Entry, Labels, Ticket
from thrifty.spend import Spend, Work

PATHS: Mapping[str, str] = {"chat": "chat/completions", "completions": "completions"}


@dataclass(slots=True)
class Bill:
    """What the requests of one call have cost so far, and what is to be told about them."""

    spend: Spend = Spend()
    work: Work = Work()
    estimated: bool = False
    emitted: bool = False
    """somebody has seen a part of the answer"""
    receipts: list[Receipt] = field(default_factory=list)

    def receipt(self, method: str, reason: str, fired: bool = True, **detail: Any) -> None:
        """Adds a receipt."""
        self.receipts.append(Receipt(method, fired, reason, detail=detail))


@dataclass(slots=True)
class _Job:
    """One request under way."""

    call: Call
    prompt: Prompt
    counted: tuple[int, int]
    held: Held
    reply: Reply
    forced: int
    labels: Labels
    format: Format
    sent: int = 0
    started: float = field(default_factory=time.monotonic)
    timed_out: bool = False
    cancelled: bool = False


@dataclass(slots=True)
class Exchange:
    """Asks one model of one server."""

    transport: Transport
    format: Format
    counter: Counter
    prices: Prices | None
    streaming: bool
    default_max_tokens: int

    @property
    def path(self) -> str:
        """The endpoint that answers."""
        return PATHS[self.format.kind]

    async def ask(
        self,
        call: Call,
        messages: Sequence[Message],
        bill: Bill,
        *,
        prefix: str = "",
        stop: tuple[str, ...] = (),
        wanted: int | None = None,
        keep: int | None = None,
        forced: int = 0,
        cut: str = "",
    ) -> Reply:
        """One complete answer. Raises BudgetExceeded, EngineError with what the whole call has spent, InvalidInput.

        `wanted` are the tokens to generate; `forced` how many of the prefix's count as output; `cut` is what a model
        that was told to begin with it will repeat, in streams too.
        """
        prompt = wire.prompt(call, messages, prefix, stop)
        counted = self.count(prompt)
        may_call = bool(call.tools) and call.extra.get("tool_choice") != "none"
        ask = Ask(
            Spend(input=counted[0], visual=counted[1], calls=1, tool_calls=int(may_call)),
            wanted,
            self.default_max_tokens,
            call.keep if keep is None else keep,
            forced,
        )
        labels = self.labels(call.labels)
        echoes = self.format.kind == "chat" and self.format.continuation in ("auto", "llama.cpp")
        held: Held | None = None
        failed: Failure | None = None
        attempt = 0
        try:
            while True:
                if held is None:
                    try:
                        held = await spending.take(call, ask, labels, lambda s: self.price(s, labels))
                    except BudgetExceeded as refused:
                        if failed is None:
                            raise
                        failed.message += f"; the budget has no {refused.resource} left for a retry"
                        raise self.error(failed, self.path, bill) from refused
                reply = Reply(cut or (prefix if echoes else ""), in_stream=bool(cut))
                job = _Job(call, prompt, counted, held, reply, forced, labels, self.format)
                left = spending.seconds_left(call.account)
                until = job.started + self.transport.timeouts.total
                deadline = until if left is None else job.started + left
                try:
                    await self._attempt(job, bill, min(until, deadline))
                    await self._settle(job, bill)
                    return self._ended(job, bill)
                except Failure as failure:
                    job.timed_out = failure.timed_out
                    if await self._settle(job, bill):
                        held, failed = None, failure
                    if left is not None and time.monotonic() >= deadline:
                        if reply.produced_text:
                            bill.receipt("budget", "the account's deadline passed: what had come is the answer")
                            await self._rest(job, bill)
                            reply.finish = "budget"
                            return self._ended(job, bill)
                        call.account.check_deadline()
                    if failure.status == 400 and self._adapted(job.format, failure):
                        continue
                    if reply.emitted or not await self.transport.back_off(failure, attempt, deadline):
                        raise await self._told(job, failure, bill) from failure
                    attempt += 1
                except BaseException as error:
                    # cancelled, or whoever listens failed: what had come is booked before anything else is awaited
                    job.cancelled = True
                    cancelled = isinstance(error, asyncio.CancelledError)
                    self._book(job, bill, "the call was cancelled" if cancelled else "its listener failed")
                    raise
        finally:
            if held is not None:
                held.hold.release()

    def count(self, prompt: Prompt) -> tuple[int, int]:
        """(input, visual) tokens of a prompt, as it would be sent."""
        if self.format.kind == "completions":
            return self.counter.text(self.format.template(prompt.messages)) + 1, 0
        return self.counter.messages(prompt.messages, prompt.tools)

    def price(self, spend: Spend, labels: Labels) -> Spend:
        """The same Spend with its usd, where there are prices."""
        return spend if self.prices is None else self.prices.with_price(spend, self.format.model, labels.role)

    def labels(self, labels: Labels) -> Labels:
        """The labels with the engine's part filled in."""
        table = "" if self.prices is None else str(getattr(self.prices, "label", type(self.prices).__name__))
        return replace(labels, engine="openai", model=self.format.model, prices=table)

    def error(self, failure: Failure, path: str, bill: Bill) -> EngineError:
        """The failure as the caller sees it: one line without secrets, with what was spent."""
        failure.message = self.transport.failed(path, failure.message)
        return EngineError(
            failure.message,
            bill.spend or None,
            bill.work or None,
            status=failure.status,
            wait=failure.wait,
            timed_out=failure.timed_out,
        )

    # -- one request -------------------------------------------------------------------------------------------------

    async def _attempt(self, job: _Job, bill: Bill, until: float) -> None:
        """One request, read to its end into `job.reply`. Raises Failure."""
        streaming = self.streaming or job.call.emit is not None
        body = job.format.body(job.prompt, job.held.max_tokens, streaming)
        job.sent = len(body)
        async with self.transport.request(self.path, body, until=until, streaming=streaming) as response:
            job.reply.accepted = True
            kind = response.content_type
            if kind == "text/event-stream" or (streaming and kind in ("text/plain", "application/octet-stream")):
                await self._stream(response, job, bill, until)
            else:
                await self._whole(response, kind, job, bill, until)
        await self._rest(job, bill)

    async def _stream(self, response: ClientResponse, job: _Job, bill: Bill, until: float) -> None:
        events, reply = Events(), job.reply
        try:
            async for chunk in self.transport.chunks(response, until):
                for data in events.feed(chunk):
                    await _show(job, bill, reply.chunk(data))
                if reply.done:
                    await self.transport.drain(response)
                    break
            for data in events.finish():
                await _show(job, bill, reply.chunk(data))
        except EventTooLarge as error:
            raise Failure(f"sent a broken stream ({error}); see the server's log") from error
        except Failure:
            if reply.finish is None:
                raise  # but an answer that was complete stays so, whatever comes after it
        reply.end()

    async def _whole(self, response: ClientResponse, kind: str, job: _Job, bill: Bill, until: float) -> None:
        try:
            whole = await self.transport.read(response, until)
        except Failure as failure:
            job.reply.lost = failure.lost if "json" in kind else 0
            raise
        if "json" not in kind and not whole.lstrip().startswith(b"{"):
            what = explain(whole, kind) if "html" in kind else f"content type {kind}"
            raise Failure(f"answered with {what} instead of JSON; check base_url")
        await _show(job, bill, job.reply.whole(whole))

    async def _rest(self, job: _Job, bill: Bill) -> None:
        """Nothing more comes: text that was held back is shown after all."""
        if rest := job.reply.close():
            await _show(job, bill, Delta(text=rest))

    def _adapted(self, used: Format, failure: Failure) -> bool:
        """Whether the refused request can be sent without a field that the server does not know."""
        if self.format != used:
            return True  # another call has found out in the meantime
        changed = used.without(failure.message)
        if changed is not None:
            self.format = changed
        return changed is not None

    def _ended(self, job: _Job, bill: Bill) -> Reply:
        if job.held.receipt is not None:
            bill.receipts.append(job.held.receipt)
            if job.reply.finish == "length":
                job.reply.finish = "budget"
        return job.reply

    async def _told(self, job: _Job, failure: Failure, bill: Bill) -> EngineError:
        """The error; after the first delta it is an event too, the last one, with what was spent."""
        error = self.error(failure, self.path, bill)
        if job.call.emit is not None and bill.emitted:
            job.reply.close()
            job.reply.finish = "error"
            await job.call.emit(Delta(finish="error", answer=answer(job.call, job.reply, "", bill)))
        return error

    # -- its price ---------------------------------------------------------------------------------------------------

    async def _settle(self, job: _Job, bill: Bill) -> bool:
        """Settles what a request made; False where it made nothing, and its hold is still open."""
        booked = self._book(job, bill, "" if job.reply.done else "the answer is not complete")
        if booked is None:
            return False
        if booked[1] is not None:
            await booked[1].done()
        return True

    def _book(self, job: _Job, bill: Bill, cut: str) -> tuple[Entry, Ticket | None] | None:
        """Books what a request made, without waiting. None where it bills nothing, or was booked before."""
        reply = job.reply
        given_up = reply.accepted and (job.timed_out or job.cancelled)
        if job.held.hold.closed or not (reply.produced or given_up):
            return None
        used = self._used(job, cut)
        estimated = bool(used.notes)
        spend = spending.forced(self.price(used.spend, job.labels), job.forced)
        work = Work(prefill=used.spend.input - used.spend.cached, engine_seconds=_seconds(reply, job.started))
        if estimated:
            bill.receipt("engine", "usage estimated: " + "; ".join(used.notes), usage=reply.usage)
        bill.spend, bill.work = bill.spend + spend, bill.work + work
        bill.estimated |= estimated
        return job.held.hold.book(spend, work, estimated=estimated)

    def _used(self, job: _Job, cut: str) -> Usage:
        """The server's usage, corrected; our own count where there is none."""
        reply = job.reply
        output = len(reply.logprobs) or self.counter.text(reply.made)
        if reply.lost:
            output = max(1, int(reply.lost / BYTES_A_TOKEN))
        if job.held.max_tokens is not None:
            output = min(output, job.held.max_tokens)
        used = read(
            reply.usage,
            sent=job.sent,
            counted=job.counted,
            made=reply.made,
            output=output,
            tool_calls=len(reply.tool_calls),
        )
        if cut:
            used.notes.insert(0, cut)
        return used


def answer(call: Call, reply: Reply, before: str, bill: Bill) -> Answer:
    """The whole answer; `before` is what was drafted and forced."""
    text = before + reply.text
    parsed = None
    if call.draft is not None and call.draft.separator in text:
        parsed = text.rpartition(call.draft.separator)[2].strip()
    return Answer(
        text,
        reply.finish or "stop",
        reply.thinking,
        reply.tool_calls,
        parsed,
        bill.spend,
        bill.work,
        (*call.receipts, *bill.receipts),
        tuple(reply.ids) if reply.ids and len(reply.ids) == len(reply.logprobs) else None,
        tuple(reply.logprobs) if reply.logprobs else None,
        bill.estimated,
        reply.raw,
    )


async def _show(job: _Job, bill: Bill, delta: Delta | None) -> None:
    if delta is not None and job.call.emit is not None:
        job.reply.emitted = bill.emitted = True
        await job.call.emit(delta)


def _seconds(reply: Reply, started: float) -> float:
    """Seconds that the server computed, where it says so (llama.cpp); else those that the request took."""
    timings = reply.raw.get("timings")
    if isinstance(timings, Mapping):
        parts = [timings.get("prompt_ms"), timings.get("predicted_ms")]
        good = [p for p in parts if isinstance(p, (int, float)) and 0 <= p < 1e12]
        if len(good) == 2:
            return sum(good) / 1000
    return time.monotonic() - started
