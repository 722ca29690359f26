"""Fixed-k: keep the k passages most similar to the query."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.call import Call, Receipt
from thrifty.context import passages
from thrifty.errors import BudgetExceeded
from thrifty.method import Rewrite, knob
from thrifty.methods.context._passages import prompt_tokens, query_of, ranked, score, text_counter


@dataclass(frozen=True, kw_only=True)
class FixedK(Rewrite):
    """Keeps k passages by cosine similarity to the query, the same k for every question.

    The baseline that adaptive-k has to beat. Passages and query are found as adaptive-k finds them. With k or
    fewer passages nothing is embedded (unless they are to be put in order of rank)."""

    name = "fixed-k"
    paper = "baseline: dense retrieval with a fixed number of passages"
    roles = {"embedder": frozenset({"embed"})}
    identity = {"k": 1_000_000}

    k: int = knob(5, "passages to keep", low=1, high=1_000_000, log=True)
    order: str = knob("document", "order of the kept passages", choices=("document", "rank"))
    over: int = knob(512, "cut a user message into paragraphs when it has more tokens", low=1, high=10_000_000)

    async def rewrite(self, call: Call) -> Call:
        found = passages(call, text_counter(call), self.over)
        n, before = len(found.texts), prompt_tokens(call)

        def unfired(reason: str) -> Call:
            return call.with_receipt(Receipt(self.name, False, reason, before, before))

        if n < 2:
            return unfired(f"{n} passages: there is nothing to choose")
        if n <= self.k and self.order == "document":
            return unfired(f"k = {self.k} covers all {n} passages")
        query = query_of(call, found)
        if not query:
            return unfired("no user message to compare the passages with")
        try:
            scored = await score(call, self.name, query, found.texts)
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            return unfired(f"the budget cannot hold the embedding of {n} passages ({error.resource}): all kept")
        top = ranked(scored.scores)[: self.k]
        kept = top if self.order == "rank" else sorted(top)
        changed = found.keep(call, kept)
        fired = kept != list(range(n)) if found.source is None else len(kept) < n
        return changed.with_receipt(
            Receipt(
                self.name,
                fired,
                f"kept {len(kept)} of {n} passages" if fired else f"all {n} passages kept, as they were",
                before,
                prompt_tokens(changed),
                spend=scored.spend,
                detail={"passages": n, "kept": kept},
            )
        )
