"""An answer that was given before is given again: the same call is paid once."""

from __future__ import annotations

import time
from dataclasses import dataclass

from thrifty.call import Answer, Call
from thrifty.errors import CacheError
from thrifty.method import Next
from thrifty.methods.route._replay import ResponseCache, Slot, Unkeyed, digest
from thrifty.spend import Spend


@dataclass(frozen=True, kw_only=True)
class ExactCache(ResponseCache):
    """Answers a call that is equal to an earlier one, in everything that changes the answer, with that one's answer.
    A hit calls no engine and spends nothing; it streams as the engine would; its receipt says what was saved.

    Equal means: the same plan and engines, messages, context, tools, unknown fields (but those in `ignore`), prefix,
    draft, sampling and policies, asked on the same account (`scope`: `account` is the whole path that the plan was
    called on, so tenants with accounts of their own never see each other's answers). An image named by an address
    counts as that address. A call with a temperature above 0 and no seed asks for a new draw, and gets one unless
    `sampled`; one that names no temperature leaves it to the engine, and is served.

    Kept are answers that the model itself ended. Errors, and what was cancelled, cut by max_tokens or shortened by a
    budget, are not; nor are tool calls, unless `tool_calls`. (Seen is what engines say: a finish reason, a receipt
    `budget`. A search below that ended with fewer samples than it wanted looks whole.) The least recently used go
    first, when there are more than `entries` or `megabytes`; none is older than `seconds`.

    In memory the answers live as long as the method object, so as long as its Plan; with `path` they live in a SQLite
    file that processes share, readable by its owner alone. A file that cannot be opened makes the call fail, before
    anything is spent; when reading or writing fails later, the call is answered without the cache and the receipt says
    so. Equal calls at the same time each go below: there is an answer only when one has ended."""

    name = "exact-cache"
    paper = "baseline: a response cache with exact match"
    identity = {"entries": 0}

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.entries == 0:
            return await next(self.passing(call, "entries = 0: nothing is kept"))
        try:
            slot = Slot(digest(self.body(call)))
        except Unkeyed as why:
            return await next(self.passing(call, str(why)))
        now, store = time.time(), self.store
        try:
            found = await store.run(lambda: store.get(slot.key, now, self.seconds))
        except CacheError as broken:
            return await next(self.passing(call, str(broken)))
        if found is not None:
            return await self.replay(call, found, "asked before", Spend())
        return await self.answer(call, next, slot, "not asked before", Spend())
