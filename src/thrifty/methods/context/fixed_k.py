"""Fixed-k: keep the k passages most similar to the query."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.call import Call
from thrifty.method import Rewrite, knob
from thrifty.methods.context._passages import keep_best


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
        return await keep_best(
            call,
            self.name,
            over=self.over,
            order=self.order,
            covered=lambda n: f"k = {self.k} covers all {n} passages" if n <= self.k else None,
            how_many=lambda scores: self.k,
        )
