"""The mutation check: broken copies of real methods must turn the table red, each by the law that its fault
breaks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest
from law_table import LAWS, failures

from thrifty import Account, Answer, Call, Method, Next, Receipt, Spend
from thrifty.methods.context.adaptive_k import AdaptiveK
from thrifty.methods.context.compaction import Compaction
from thrifty.methods.context.fixed_k import FixedK
from thrifty.methods.context.tool_output import ToolOutput
from thrifty.methods.context.truncation import Truncation
from thrifty.methods.decode.answer_convergence import AnswerConvergence
from thrifty.methods.decode.budget_forcing import BudgetForcing
from thrifty.methods.prompt.budget_prompt import BudgetPrompt
from thrifty.methods.prompt.chain_of_draft import ChainOfDraft
from thrifty.methods.prompt.plan_and_budget import PlanAndBudget
from thrifty.methods.route._replay import unpack
from thrifty.methods.route._store import Found
from thrifty.methods.route.exact_cache import ExactCache
from thrifty.methods.search import first_finish_search
from thrifty.methods.search.first_finish_search import FirstFinishSearch
from thrifty.methods.search.self_consistency import SelfConsistency

# -- prompt --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Silent(BudgetPrompt):
    """Says nothing of what it did."""

    async def rewrite(self, call: Call) -> Call:
        return replace(await super().rewrite(call), receipts=call.receipts)


@dataclass(frozen=True, kw_only=True)
class Flattening(ChainOfDraft):
    """Turns the chat into one string."""

    async def rewrite(self, call: Call) -> Call:
        changed = await super().rewrite(call)
        return replace(changed, messages=({"role": "user", "content": "Be brief. " + call.question()},))


@dataclass(frozen=True, kw_only=True)
class Uncounted(PlanAndBudget):
    """Plans, and forgets what that cost."""

    async def rewrite(self, call: Call) -> Call:
        changed = await super().rewrite(call)
        return replace(changed, receipts=(*changed.receipts[:-1], replace(changed.receipts[-1], spend=Spend())))


@dataclass(frozen=True, kw_only=True)
class OffTheBooks(PlanAndBudget):
    """Plans on an account of its own, past the budget."""

    async def rewrite(self, call: Call) -> Call:
        changed = await super().rewrite(replace(call, account=Account("elsewhere")))
        return replace(changed, account=call.account)


# -- context -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FreeEmbedding(AdaptiveK):
    """Counts its embedding as free."""

    async def rewrite(self, call: Call) -> Call:
        changed = await super().rewrite(call)
        return replace(changed, receipts=(*changed.receipts[:-1], replace(changed.receipts[-1], spend=Spend())))


@dataclass(frozen=True, kw_only=True)
class MidWord(Truncation):
    """Cuts through a passage."""

    async def rewrite(self, call: Call) -> Call:
        changed = await super().rewrite(call)
        return replace(changed, context=tuple(text[:-5] for text in changed.context))


@dataclass(frozen=True, kw_only=True)
class OffByOne(FixedK):
    """Drops one passage more than asked for, however large k is."""

    async def rewrite(self, call: Call) -> Call:
        changed = await super().rewrite(call)
        return replace(changed, context=changed.context[:-1])


# -- route ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blurred(ExactCache):
    """Takes calls with different sampling for equal."""

    def body(self, call: Call) -> dict[str, Any]:
        return {**super().body(call), "sampling": None}


@dataclass(frozen=True, kw_only=True)
class Twice(ExactCache):
    """Bills a kept answer as if an engine had made it."""

    async def replay(self, call: Call, found: Found, how: str, spend: Spend, **detail: Any) -> Answer:
        answer = await super().replay(call, found, how, spend, **detail)
        return replace(answer, spend=unpack(found.body).spend)


@dataclass(frozen=True, kw_only=True)
class SplitPairs(Compaction):
    """Leaves out the calls of tools and keeps their results."""

    async def rewrite(self, call: Call) -> Call:
        changed = await super().rewrite(call)
        results = [m for m in call.messages if m["role"] == "tool"]
        return replace(changed, messages=(*results, *(m for m in changed.messages if m not in results)))


@dataclass(frozen=True, kw_only=True)
class InPlace(ToolOutput):
    """Writes to the caller's own messages."""

    async def rewrite(self, call: Call) -> Call:
        changed = await super().rewrite(call)
        for message in call.messages:
            if isinstance(message, dict):
                message["content"] = ""
        return changed


# -- search --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FreeLosers(SelfConsistency):
    """Bills only the answer that won."""

    async def __call__(self, call: Call, next: Next) -> Answer:
        answer = await super().__call__(call, next)
        return replace(answer, spend=replace(answer.spend, output=len(answer.tokens or ())))


@dataclass(frozen=True, kw_only=True)
class Leaking(SelfConsistency):
    """Lets every sample stream to the caller."""

    async def __call__(self, call: Call, next: Next) -> Answer:
        async def loud(below: Call) -> Answer:
            return await next(replace(below, emit=call.emit, engines=call.engines))

        # without its engine it cannot know of branches, and makes calls
        return await super().__call__(replace(call, engines={}), loud)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Unstoppable(SelfConsistency):
    """Goes on when it is cancelled."""

    async def __call__(self, call: Call, next: Next) -> Answer:
        return await asyncio.shield(super().__call__(call, next))


@dataclass(frozen=True, kw_only=True)
class OpenLosers(FirstFinishSearch):
    """Never closes the branches that lost."""

    async def __call__(self, call: Call, next: Next) -> Answer:
        engine = call.engines["answer"]
        if "branch" not in engine.capabilities:
            return await super().__call__(call, next)
        rows = [await next.open(replace(call, emit=None)) for _ in range(self.samples)]
        await first_finish_search.advance(rows, lambda rows: any(r.finish for r in rows))
        winner = next_finished(rows)
        receipt = Receipt(self.name, True, "raced", self.samples, self.samples, "samples")
        return (await winner.finish_up()).with_receipt(receipt)


def next_finished(rows: list[first_finish_search.Branch]) -> first_finish_search.Branch:
    return next(row for row in rows if row.finish)


# -- decode --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FreeProbes(AnswerConvergence):
    """Counts its probes as free."""

    async def __call__(self, call: Call, next: Next) -> Answer:
        answer = await super().__call__(call, next)
        return replace(answer, receipts=tuple(replace(r, spend=Spend()) for r in answer.receipts))


@dataclass(frozen=True, kw_only=True)
class NeverIdle(BudgetForcing):
    """Opens a thinking block whatever it was told."""

    def ready(self, call: Call) -> tuple[Call, str | None]:
        return replace(call, prefix=f"{self.opening}\n"), None


MUTANTS: tuple[tuple[str, type[Method], str], ...] = (
    ("prompt", Silent, "always a receipt"),
    ("prompt", Flattening, "images, tools, unknown fields"),
    ("prompt", Uncounted, "receipt sums to the ledger"),
    ("prompt", OffTheBooks, "receipt sums to the ledger"),
    ("context", FreeEmbedding, "receipt sums to the ledger"),
    ("context", MidWord, "context: only whole passages"),
    ("context", OffByOne, "identity"),
    ("context", SplitPairs, "tool calls keep their results"),
    ("context", InPlace, "the caller's call unchanged"),
    ("route", Blurred, "calls do not mix"),
    ("route", Twice, "same seed twice"),
    ("search", FreeLosers, "receipt sums to the ledger"),
    ("search", Leaking, "streamed = whole"),
    ("search", Unstoppable, "cancelled in the middle"),
    ("search", OpenLosers, "receipt sums to the ledger"),
    ("decode", FreeProbes, "receipt sums to the ledger"),
    ("decode", NeverIdle, "identity"),
)


@pytest.mark.parametrize(("family", "mutant", "law"), MUTANTS, ids=[m.__name__ for _, m, _ in MUTANTS])
def test_a_broken_copy_turns_the_table_red(family: str, mutant: type[Method], law: str) -> None:
    table = tuple(x for x in LAWS if x.name == law)
    original = mutant.__mro__[1]
    assert issubclass(original, Method) and f".{family}." in original.__module__
    assert law in failures(mutant, "scripted", table)
    assert failures(original, "scripted", table) == {}, "the law is red for the sound method too"


def test_every_family_with_methods_has_a_mutant() -> None:
    from thrifty import registry

    families = {s.family for s in registry.sources().values() if s.origin == "thrifty"}
    assert families <= {family for family, _, _ in MUTANTS}
