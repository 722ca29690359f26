"""Stand-ins of engines that spend nothing: they count prompts as the engine does and write as much as a call allows.

A plan runs on them as it would on the engines, so what its methods add to prompts, embed and sample is counted by
running the methods. Every answer differs from all before, so no vote is ever sure. There are no branches and no
tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Until
from thrifty.engine import Embeddings, Engine
from thrifty.errors import BudgetExceeded, Unsupported
from thrifty.ledger.entry import Labels
from thrifty.spend import Spend


@dataclass
class Counted:
    """What one run on stand-ins would have spent."""

    by_role: dict[str, Spend] = field(default_factory=dict)
    asides: set[str] = field(default_factory=set)
    """methods that asked the engine something of their own"""
    calls: int = 0
    """to the answering engine"""
    unlimited: bool = False
    """whether a call stated no max_tokens"""

    def add(self, role: str, spend: Spend) -> None:
        """Counts a Spend under a role."""
        self.by_role[role] = self.by_role.get(role, Spend()) + spend


Memo: TypeAlias = dict[object, int]
"""Token counts by what was counted: plans share most of their prompts and passages."""


class StandIn:
    """One engine's stand-in. `assumed`: output tokens of a call without max_tokens."""

    def __init__(
        self, engine: Engine, counted: Counted, assumed: int, memo: Memo | None = None, *, branches: bool = False
    ) -> None:
        self._engine, self._counted, self._assumed = engine, counted, assumed
        self._memo: Memo = {} if memo is None else memo
        self.name, self.model, self.dtype = engine.name, engine.model, engine.dtype
        self.capabilities = engine.capabilities if branches else engine.capabilities - {"branch"}

    def identity(self) -> Mapping[str, Any]:
        """The engine's own."""
        return self._engine.identity()

    def count(self, call: Call) -> int:
        """The engine's own."""
        parts = repr((call.messages, call.context, call.prefix, call.draft is None, call.tools))
        key = (id(self._engine), hashlib.sha256(parts.encode("utf-8", "surrogatepass")).digest())
        if key not in self._memo:
            self._memo[key] = self._engine.count(call)
        return self._memo[key]

    async def generate(self, call: Call) -> Answer:
        """An answer of no content and full length, as far as the call's account allows. Raises BudgetExceeded."""
        self._counted.calls += 1
        if call.labels.method:
            self._counted.asides.add(call.labels.method)
        limit = call.sampling.max_tokens
        self._counted.unlimited |= limit is None
        prompt = self.count(call)
        output = self._assumed if limit is None else limit
        left = call.account.remaining()
        room = min(left.get("output", output), left.get("tokens", prompt + output) - prompt)
        if room < output:
            if call.on_exceed == "refuse" or room < 1:
                raise BudgetExceeded(call.account.path, "tokens", room + prompt, 0, 0, prompt + output)
            output = int(room)
        spend = self._settle(Spend(input=prompt, output=output, calls=1), call.account, call.labels)
        text = f"answer {self._counted.calls}"
        return Answer(text, finish="length", spend=spend, receipts=call.receipts)

    async def embed(self, texts: Sequence[str], account: Account, labels: Labels) -> Embeddings:
        """Equal vectors: nothing is nearer than anything else."""
        import numpy as np

        tokens = sum(self._tokens(text) for text in texts)
        spend = self._settle(Spend(input=tokens, calls=1), account, dataclasses.replace(labels, role="embedder"))
        vectors = np.zeros((len(texts), 2), dtype=np.float32)
        vectors[:, 0] = 1.0
        return Embeddings(vectors, spend)

    async def open(self, call: Call) -> Branch:
        """Raises Unsupported: what a branch would do cannot be told without the model."""
        raise Unsupported("it opens branches, whose cost depends on what the model writes")

    async def advance(self, branches: Sequence[Branch], until: Until | int) -> None:
        """There are no branches."""

    async def aclose(self) -> None:
        """The engine is not this object's to close."""

    def _tokens(self, text: str) -> int:
        """Tokens of a text to embed; where an embedder does not tell, its bytes: no token has less than one."""
        key = (id(self._engine), text)
        if key not in self._memo:
            if (own := getattr(self._engine, "embedder", None)) is not None:
                self._memo[key] = int(own.count([text])[0])
            else:
                try:
                    self._memo[key] = self._engine.count(Call(({"role": "user", "content": text},), Account("count")))
                except Unsupported:
                    self._memo[key] = len(text.encode()) + 2
        return self._memo[key]

    def _settle(self, spend: Spend, account: Account, labels: Labels) -> Spend:
        prices = getattr(self._engine, "prices", None)
        if prices is not None:
            spend = prices.with_price(spend, self.model, labels.role)
        account.hold(spend).settle(spend)
        self._counted.add(labels.role, spend)
        return spend


def stand_ins(
    engines: Mapping[str, Engine], counted: Counted, assumed: int, memo: Memo, *, branches: bool
) -> dict[str, Engine]:
    """Stand-ins by role; roles that share an engine share one."""
    made: dict[int, StandIn] = {}

    def each() -> Iterator[tuple[str, Engine]]:
        for role, engine in engines.items():
            yield role, made.setdefault(id(engine), StandIn(engine, counted, assumed, memo, branches=branches))

    return dict(each())
