"""The `openai` engine: any OpenAI-compatible server (vLLM, llama.cpp, a provider), without an SDK.

What it guarantees about spending:

- Before a call, its input, its output and its price are held; max_tokens never passes what the hold covers.
- What the server made is settled once, by an entry for each request that made something. A request that was refused, or
  failed before its first token, bills nothing. One that was cut, timed out or cancelled is settled for what had come,
  marked `estimated`; once the server had accepted it (HTTP 2xx), our giving up on it costs its input at least.
- A request is repeated only while nobody has seen a part of its answer.
- When this returns or raises, nothing is held.

To know what an interrupted request had made, answers are streamed even when nobody listens (`stream=False` turns that
off: then an interrupted request is known to have made nothing, and the provider may still bill it).
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Delta, Draft, Message, Until
from thrifty.context import render
from thrifty.engine import CAPABILITIES, Embeddings
from thrifty.engines.finishing import ANSWER_ROOM
from thrifty.engines.generation import check_call
from thrifty.engines.openai import embedding, spending, wire
from thrifty.engines.openai.exchange import Bill, Exchange, answer
from thrifty.engines.openai.failure import Failure
from thrifty.engines.openai.transport import Retries, Timeouts, Transport, base, secret
from thrifty.engines.openai.usage import Counter, Tokenizer
from thrifty.engines.openai.wire import Continuation, Format, Kind, Reply, Template
from thrifty.engines.settling import Prices
from thrifty.errors import BudgetExceeded, InvalidInput, Unsupported, nearest
from thrifty.ledger.entry import Labels
from thrifty.spend import Spend

_POSSIBLE = frozenset({"text", "sampling", "logprobs", "embed", "continue"})


class OpenAIEngine:
    """One model on one OpenAI-compatible server.

    `base_url` ends as the server wants it, most often in `/v1`. `api_key_env` names an environment variable to read
    the key from. `prices` gives Spend its usd. `timeout`: `Timeouts`, or the seconds of one attempt. `concurrency`
    bounds the calls under way. `capabilities` replaces the default (text, sampling, logprobs, continue); add `embed`
    where the server has /embeddings. `continuation`: how the server continues an unfinished assistant message; `auto`
    sends what both vLLM and llama.cpp understand, `none` asks for the prefix in words instead. `default_max_tokens` is
    what an answer may take when its budget is limited and the call does not say. `tokenizer` counts the tokens of a
    text; `template_tokens` are what the chat template adds to every prompt. `extra` goes into every request, under the
    call's own. `retry_base` and `longest_wait` are seconds; see `Retries`.

    A call with a draft and a prefix makes two requests: the draft, then the answer that continues it. Together they
    generate at most `sampling.max_tokens`, what is forced between them included. The second one's input holds what was
    forced; those tokens are counted as output instead, by the tokenizer or the estimate, and priced as input.
    """

    name = "openai"

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        api_key_env: str | None = None,
        kind: Kind = "chat",
        prices: Prices | None = None,
        timeout: Timeouts | float | None = None,
        max_retries: int = 4,
        concurrency: int = 64,
        capabilities: Iterable[str] | None = None,
        continuation: Continuation = "auto",
        stream: bool = True,
        max_tokens_field: str = "max_tokens",
        default_max_tokens: int = 4096,
        tokenizer: Tokenizer | None = None,
        template_tokens: int = 3,
        image_tokens: int = 765,
        template: Template = wire.plain_template,
        dtype: str = "unknown",
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
        retry_base: float = 0.5,
        longest_wait: float = 60.0,
        rng: random.Random | None = None,
    ) -> None:
        wire.check_kind(kind)
        wire.check_continuation(continuation)
        _check_count("concurrency", concurrency)
        _check_count("default_max_tokens", default_max_tokens)
        if not model:
            raise InvalidInput("model '': the name of a model on the server is needed")
        if isinstance(timeout, (int, float)):
            timeout = Timeouts(connect=min(10.0, timeout), first=timeout, between=timeout, total=timeout)
        self.model, self.dtype, self.kind = model, dtype, kind
        self.capabilities = _capabilities(capabilities, continuation)
        self.prices = prices
        self._transport = Transport(
            base(base_url),
            secret(api_key, api_key_env),
            dict(headers or {}),
            timeout or Timeouts(),
            Retries(max_retries, retry_base, longest_wait),
            concurrency,
            rng or random.Random(),
            model,
        )
        self._exchange = Exchange(
            self._transport,
            Format(kind, model, continuation, max_tokens_field, template, dict(extra or {})),
            Counter(tokenizer, template_tokens, image_tokens),
            prices,
            stream,
            default_max_tokens,
        )

    def __repr__(self) -> str:
        return f"OpenAIEngine({self._transport.shown!r}, {self.model!r}, kind={self.kind!r})"

    def identity(self) -> Mapping[str, Any]:
        """What results are keyed by: server, model, dtype, endpoint, how answers are continued, fixed extra fields."""
        return {
            "engine": self.name,
            "url": self._transport.shown,
            "model": self.model,
            "dtype": self.dtype,
            "kind": self.kind,
            "continuation": self._exchange.format.continuation,
            "extra": dict(self._exchange.format.defaults),
        }

    def count(self, call: Call) -> int:
        """Input tokens of a call as it would be sent, its context and prefix included."""
        return self._exchange.count(wire.prompt(call, render(call), call.prefix or ""))[0]

    async def generate(self, call: Call) -> Answer:
        """Holds, asks the server, settles.

        Raises BudgetExceeded where the budget cannot hold the call, EngineError (with what was spent) where the server
        fails, Unsupported for policies, InvalidInput for what cannot be sent.
        """
        if call.policies:
            names = ", ".join(sorted({p.method or type(p).__name__ for p in call.policies}))
            raise Unsupported(f"{names}: engine 'openai' applies no policies inside the model; engine 'local' does")
        check_call(call)
        spending.check_prices(call.account, self.prices, self.model)
        bill = Bill()
        if call.sampling.deterministic:
            bill.receipt("engine", "deterministic: a server batches as it likes", fired=False)
        if call.tools and call.account.remaining().get("tool_calls", 1) < 1 and call.on_exceed == "degrade":
            bill.receipt("budget", "no tool call is left: the model was told to make none")
            call = replace(call, extra={**call.extra, "tool_choice": "none"})
        async with self._transport.slot():
            reply, before = await self._reply(call, render(call), bill)
        whole = answer(call, reply, before, bill)
        if call.emit is not None:
            await call.emit(Delta(finish=whole.finish, answer=whole))
        return whole

    async def open(self, call: Call) -> Branch:
        """Raises Unsupported: a server gives no branches."""
        raise Unsupported("engine 'openai' opens no branches: use generate, or engine 'local'")

    async def advance(self, branches: Sequence[Branch], until: Until | int) -> None:
        """Raises Unsupported: a server gives no branches."""
        raise Unsupported("engine 'openai' steps no branches: use generate, or engine 'local'")

    async def embed(self, texts: Sequence[str], account: Account, labels: Labels) -> Embeddings:
        """Unit vectors [N, D] of texts, in requests of at most 128 texts, each held and settled by itself.

        Raises Unsupported where the engine was not given the capability `embed`, BudgetExceeded, EngineError.
        """
        if "embed" not in self.capabilities:
            raise Unsupported(
                f"engine {self.model!r} embeds no texts: give it capabilities with 'embed', if its server does"
            )
        spending.check_prices(account, self.prices, self.model)
        labels = self._exchange.labels(labels)
        async with self._transport.slot():
            price = functools.partial(self._exchange.price, labels=labels)
            return await embedding.embed(texts, account, labels, self._transport, self._exchange.counter, price)

    async def models(self) -> tuple[str, ...]:
        """The models that the server lists. Raises EngineError."""
        until = time.monotonic() + self._transport.timeouts.total
        try:
            return await embedding.models(self._transport, until)
        except Failure as failure:
            raise self._exchange.error(failure, "models", Bill()) from failure

    async def aclose(self) -> None:
        """Closes the session of the running event loop. Idempotent; the engine can be used again."""
        await self._transport.aclose()

    # -- one call ----------------------------------------------------------------------------------------------------

    async def _reply(self, call: Call, messages: Sequence[Message], bill: Bill) -> tuple[Reply, str]:
        """The reply, and the text before it that belongs to the answer."""
        limit, prefix = call.sampling.max_tokens, call.prefix or ""
        wanted = None if limit is None else max(1, limit)
        if prefix and "continue" not in self.capabilities:
            bill.receipt("engine", "this engine continues no answers: the prefix was asked for in words", prefix=prefix)
            messages = _instructed(messages, prefix, call.draft)
            return await self._exchange.ask(call, messages, bill, wanted=wanted, cut="" if call.draft else prefix), ""
        if prefix and call.draft is not None:
            return await self._drafted(call, messages, call.draft, prefix, bill)
        return await self._exchange.ask(call, messages, bill, wanted=wanted, prefix=prefix), ""

    async def _drafted(
        self, call: Call, messages: Sequence[Message], draft: Draft, prefix: str, bill: Bill
    ) -> tuple[Reply, str]:
        """The draft, then the answer that continues draft + separator + prefix. Without room for both: no draft."""
        ask, limit = self._exchange.ask, call.sampling.max_tokens
        space = "" if prefix[:1].isspace() else " "
        forced = self._exchange.counter.text(f"\n{draft.separator}{space}{prefix}")
        wanted = draft.max_tokens
        if limit is not None:
            room = max(1, limit - forced - min(ANSWER_ROOM, limit // 4))
            wanted = room if wanted is None else min(wanted, room)
        refused = "calls" if call.account.remaining().get("calls", 2) < 2 else ""
        if refused and call.on_exceed == "refuse":
            call.account.hold(Spend(calls=2)).release()  # says what is left
        if not refused:
            try:
                keep = call.keep + forced + 1
                first = await ask(call, messages, bill, stop=(draft.separator,), wanted=wanted, keep=keep)
            except BudgetExceeded as error:
                if call.on_exceed == "refuse":
                    raise
                refused = error.resource
        if refused:
            bill.receipt("budget", f"no {refused} left for a draft: the answer was asked for without it")
            return await ask(call, messages, bill, wanted=limit, prefix=prefix), ""
        text = first.text.partition(draft.separator)[0]
        if first.tool_calls or first.finish == "content_filter":
            return first, ""
        tail = ("\n" if text and not text.endswith("\n") else "") + draft.separator + space + prefix
        forced = self._exchange.counter.text(tail)
        if call.emit is not None:
            await call.emit(Delta(text=tail))
        wanted = None if limit is None else max(1, limit - bill.spend.output - forced)
        try:
            reply = await ask(call, messages, bill, wanted=wanted, prefix=text + tail, forced=forced)
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            bill.receipt("budget", f"no {error.resource} left for the answer after its draft")
            first.finish = "budget"
            return first, ""
        reply.thinking = first.thinking + reply.thinking
        return reply, text + tail


def _instructed(messages: Sequence[Message], prefix: str, draft: Draft | None) -> tuple[Message, ...]:
    """The messages, asking in the last user message for an answer that begins with `prefix`."""
    where = f"After {draft.separator!r}, begin" if draft else "Begin"
    wish = f"\n\n{where} your answer with: {prefix}"
    for i in range(len(messages) - 1, -1, -1):
        if messages[i].get("role") == "user":
            content = messages[i].get("content") or ""
            new: Any = content + wish if isinstance(content, str) else [*content, {"type": "text", "text": wish}]
            return (*messages[:i], {**messages[i], "content": new}, *messages[i + 1 :])
    return (*messages, {"role": "user", "content": wish.strip()})


def _capabilities(given: Iterable[str] | None, continuation: str) -> frozenset[str]:
    if given is None:
        return frozenset({"text", "sampling", "logprobs"} | ({"continue"} if continuation != "none" else set()))
    found = frozenset(given)
    for name in sorted(found):
        if name not in CAPABILITIES:
            raise InvalidInput(nearest(name, CAPABILITIES, "capability"))
        if name not in _POSSIBLE:
            raise Unsupported(f"engine 'openai' cannot have {name!r}: it needs the model itself; engine 'local' has it")
    return found - {"continue"} if continuation == "none" else found


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000_000:
        raise InvalidInput(f"{name} = {value!r}: a whole number of at least 1 is needed")
