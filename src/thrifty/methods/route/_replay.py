"""What response caches share: the key of a call, which answers are worth keeping, and giving a kept one again.

The key is everything that changes the answer: the plan (so every method below, with its version and knobs, and the
budget), the engines by role, messages, context, tools, fields that Thrifty does not know, prefix, draft, sampling with
its seed, policies, and whose answers they are. What cannot be written as JSON has no key, and is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from thrifty.call import Answer, Call, Delta, Draft, Receipt
from thrifty.errors import CacheError, ThriftyError
from thrifty.method import Next, Whole, knob
from thrifty.methods.route._store import AnswerStore, Found
from thrifty.spend import Spend

SCOPES = ("account", "root", "all")
BOOKKEEPING = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "store",
    "stream_options",
)
"""Fields of OpenAI's API that change no answer."""
_WORDS_A_DELTA = 4


class Unkeyed(ThriftyError):
    """A call that no kept answer can serve; says why."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an answer is kept: its key, the part it stands in, and its question with its vector (float32 bytes)."""

    key: bytes
    part: bytes = b""
    vector: bytes | None = None
    question: str = ""


@dataclass(frozen=True, kw_only=True)
class ResponseCache(Whole):
    """Base of response caches: their common knobs, keeping and replaying."""

    remembers = True

    entries: int = knob(10_000, "answers kept; 0: none, the cache is off", low=0, high=10_000_000, log=True)
    seconds: float = knob(86_400.0, "an answer may be this old", low=1.0, high=1e9, log=True)
    megabytes: float = knob(64.0, "of answers kept, in 1e6 bytes", low=0.01, high=1e6, log=True)
    path: str = knob("", "SQLite file that keeps the answers; empty: in memory, as long as the plan lives")
    scope: str = knob("account", "who shares answers: those of one account, of one root account, all", choices=SCOPES)
    sampled: bool = knob(False, "also for calls that ask for a random draw: temperature above 0 and no seed")
    tool_calls: bool = knob(False, "also keep answers that call tools")
    ignore: tuple[str, ...] = knob(BOOKKEEPING, "unknown fields of a call that change no answer")

    @property
    def store(self) -> AnswerStore:
        """This method's store, opened when it is first needed: it lives as long as this object, a file longer."""
        # No field, for it is no setting, and equal plans stay equal. A connection must not be used across a fork.
        own = f"_store {os.getpid()}" if self.path else "_store"
        found: AnswerStore | None = self.__dict__.get(own)
        if found is None:
            new = AnswerStore(self.path or None, entries=self.entries, most_bytes=int(self.megabytes * 1e6))
            found = self.__dict__.setdefault(own, new)  # of two threads, the first one's
        return found

    async def answer(self, call: Call, next: Next, slot: Slot, missed: str, spend: Spend) -> Answer:
        """Asks below, and keeps the answer when it is worth it. `spend`: what looking it up cost, in this method's
        name. A stream passes; its last delta carries the same receipt."""
        concluded: Receipt | None = None

        async def conclude(answer: Answer) -> Answer:
            nonlocal concluded
            if concluded is None:
                why = await self._keep(slot, answer)
                reason = f"{missed}: kept for the next time" if not why else f"{missed}; not kept: {why}"
                concluded = Receipt(self.name, False, reason, spend=spend)
            return replace(answer, spend=answer.spend + spend).with_receipt(concluded)

        asked = call
        if call.emit is not None:
            emit = call.emit

            async def watched(delta: Delta) -> None:
                if delta.answer is not None:
                    delta = replace(delta, answer=await conclude(delta.answer))
                await emit(delta)

            asked = replace(call, emit=watched)
        return await conclude(await next(asked))

    async def replay(self, call: Call, found: Found, how: str, spend: Spend, **detail: Any) -> Answer:
        """A kept answer, streamed where the call streams. It costs what looking it up did; the receipt says what was
        saved: tokens as they were billed when it was made. Raises BudgetExceeded after the account's deadline."""
        call.account.check_deadline()
        kept = unpack(found.body)
        age = max(0, round(time.time() - found.made))
        reason = f"{how}: answered from the cache, and nothing below it ran"
        detail = {"saved": kept.spend.to_dict(), "age": age, "hits": found.hits + 1, **detail}
        own = Receipt(self.name, True, reason, kept.spend.tokens, 0, spend=spend, detail=detail)
        answer = replace(kept, spend=spend, receipts=(*call.receipts, own))
        if call.emit is not None:
            if answer.thinking:
                await call.emit(Delta(thinking=answer.thinking))
            logprobs = answer.logprobs or ()
            for text in pieces(answer.text):
                await call.emit(Delta(text, logprobs=logprobs))
                logprobs = ()
            if answer.tool_calls:
                await call.emit(Delta(tool_calls=answer.tool_calls))
            await call.emit(Delta(finish=answer.finish, answer=answer))
        return answer

    def passing(self, call: Call, why: str) -> Call:
        """The call with the receipt that the cache stood aside."""
        return call.with_receipt(Receipt(self.name, False, why))

    def body(self, call: Call) -> dict[str, Any]:
        """All that the key is made of. Raises Unkeyed for a call that no kept answer can serve."""
        s = call.sampling
        if s.seed is None and (s.temperature or 0) > 0 and not self.sampled:
            raise Unkeyed(f"temperature {s.temperature:g} without a seed asks for a new draw (knob sampled)")
        return {
            "plan": call.labels.plan,
            "scope": tenant(call, self.scope),
            "engines": {role: dict(engine.identity()) for role, engine in call.engines.items()},
            "messages": [dict(m) for m in call.messages],
            "context": None if call.context is None else list(call.context),
            "tools": [dict(t) for t in call.tools],
            "extra": {k: v for k, v in call.extra.items() if k not in self.ignore},
            "prefix": call.prefix,
            "draft": _draft(call.draft),
            "sampling": asdict(s),
            "policies": [p.key() for p in call.policies],
        }

    async def _keep(self, slot: Slot, answer: Answer) -> str:
        """Keeps an answer; why not, where it did not."""
        why = unworthy(answer, self.tool_calls)
        if why:
            return why
        try:
            body = pack(answer)
        except (TypeError, ValueError) as error:
            return f"it cannot be written as JSON ({error})"
        now, store = time.time(), self.store

        def put() -> bool:
            return store.put(
                slot.key, body, now, self.seconds, part=slot.part, vector=slot.vector, question=slot.question
            )

        try:
            fits = await store.run(put)
        except CacheError as error:  # the answer is there and paid: a full disk must not take it away
            return str(error)
        return "" if fits else f"its {len(body):,} bytes are more than the cache may have"


def digest(body: Mapping[str, Any]) -> bytes:
    """SHA-256 of a value's canonical JSON. Raises Unkeyed for what JSON cannot hold."""
    try:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unkeyed(f"the call cannot be written as JSON ({error})") from error
    return hashlib.sha256(text.encode()).digest()


def tenant(call: Call, scope: str) -> str:
    """Whose answers these are: the path of the account that the plan was called on, its root, or nobody's.

    What the plan and the methods above opened below that account is no part of it.
    """
    if scope == "all":
        return ""
    path = call.account.path.split("/")
    if scope == "root":
        return path[0]
    plan = call.labels.plan
    return "/".join(path[: path.index(plan)] if plan in path else path)


def unworthy(answer: Answer, tool_calls: bool = False) -> str:
    """Why an answer is not kept; empty when it is: only what the model ended by itself, and no budget cut."""
    if answer.tool_calls and not tool_calls:
        return "it calls tools (knob tool_calls)"
    if answer.finish not in ("stop", "tool_calls"):
        return f"it ended with {answer.finish!r}"
    if any(r.method == "budget" and r.fired for r in answer.receipts):
        return "the budget shortened it"
    if not (answer.text or answer.tool_calls):
        return "it is empty"
    return ""


def pack(answer: Answer) -> bytes:
    """An answer as JSON. Raises TypeError or ValueError for raw fields that JSON cannot hold."""
    data = {
        "text": answer.text,
        "finish": answer.finish,
        "thinking": answer.thinking,
        "tool_calls": [dict(c) for c in answer.tool_calls],
        "parsed": answer.parsed,
        "spend": answer.spend.to_dict(),
        "tokens": answer.tokens,
        "logprobs": answer.logprobs,
        "estimated": answer.estimated,
        # the usage belongs to the request that was billed
        "raw": {k: v for k, v in answer.raw.items() if k != "usage"},
    }
    return json.dumps(data, separators=(",", ":")).encode()


def unpack(body: bytes) -> Answer:
    """The opposite of `pack`; its Spend is what the answer cost when it was made."""
    data = json.loads(body)
    return Answer(
        text=data["text"],
        finish=data["finish"],
        thinking=data["thinking"],
        tool_calls=tuple(data["tool_calls"]),
        parsed=data["parsed"],
        spend=Spend.from_dict(data["spend"]),
        tokens=None if data["tokens"] is None else tuple(data["tokens"]),
        logprobs=None if data["logprobs"] is None else tuple(data["logprobs"]),
        estimated=data["estimated"],
        raw=data["raw"],
    )


def pieces(text: str) -> list[str]:
    """A text in the pieces that a replay streams: a few words each. Joined, they are the text, byte for byte.

    >>> pieces(" one two  three four five")
    [' one two  three four ', 'five']
    """
    words = re.findall(r"\s*\S+\s*|\s+", text)
    return ["".join(words[i : i + _WORDS_A_DELTA]) for i in range(0, len(words), _WORDS_A_DELTA)]


def _draft(draft: Draft | None) -> dict[str, Any] | None:
    return None if draft is None else asdict(draft)
