"""RCR-Router: of what several agents remember together, each is given what matters to its role and stage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.call import CONTEXT_MARK, Call, Message, Receipt, text_of
from thrifty.context import Passages, passages
from thrifty.errors import BudgetExceeded
from thrifty.method import Rewrite, knob
from thrifty.methods.context._conversation import SYSTEM_ROLES, Counter, canonical, groups, is_result
from thrifty.methods.context._memory import Item, Weights, ages, importance, read_item, route, shares
from thrifty.methods.context._passages import query_of, score
from thrifty.methods.context._sentences import cache_cost
from thrifty.spend import Spend

MEMORIES = ("both", "context", "turns")


@dataclass(frozen=True, kw_only=True)
class RcrRouter(Rewrite):
    """Gives the agent that is called the items of shared memory that matter most to it, within its own tokens.

    Items are the passages of the call and the turns of its conversation (`memory` says which): a turn is a user's
    message with all that follows it up to the next, tools' results included; what stands before the first, and the last
    turn, where the task is, always stay and are not counted. An item may say its type, author, round, roles and stages
    (`_memory` has the form). Its importance is the weighted sum of how far it concerns the agent's role, whether it
    helps at this stage, how new it is, and how like the task it is, and more for decisions and plans. Items are
    taken by falling importance while they fit into `base` tokens and the role's `bonus`; one that does not fit is
    passed over. What stays keeps its order.

    The role is `role`, else "role" in the call's `metadata` field, else the `name` of the last user message; the stage
    is `stage`, else "stage" in `metadata`. Without a role or a stage that part counts for nothing. Likeness is that of
    the plan's `embedder` where it names one (and the budget holds it), else the share of the task's words.

    Reconstructed: the paper's abstract names the parts, and its code is not released. The weights, the keywords'
    cap and the types that help at a stage are those of a reimplementation by others; the keywords and the form
    of items are ours. Writing agents' answers back into the memory is the program's that runs the agents: give what
    they said as passages of the next call. `by = "density"`, ours, takes by importance a token."""

    name = "rcr-router"
    paper = (
        "RCR-Router: Efficient Role-Aware Context Routing for Multi-Agent LLM Systems with Structured Memory "
        "(Liu et al. 2025, arXiv:2508.04903)"
    )
    identity = {"base": 10_000_000}

    base: int = knob(2048, "tokens of memory for every role", low=0, high=10_000_000, log=True)
    bonus: str = knob("", "tokens more by role, such as planner=512, coder=1024")
    role: str = knob("", "the agent's role; empty: the call says it")
    stage: str = knob("", "the task's stage, such as plan, execute or review; empty: the call says it")
    memory: str = knob("both", "what is memory: passages, turns, or both", choices=MEMORIES)
    by: str = knob("score", "taken by importance, or by importance a token", choices=("score", "density"))
    weight_role: float = knob(0.6, "of the role", low=0.0, high=100.0)
    weight_stage: float = knob(0.4, "of the stage", low=0.0, high=100.0)
    weight_recency: float = knob(0.3, "of how new an item is", low=0.0, high=100.0)
    weight_semantic: float = knob(1.0, "of how like the task it is; 0 embeds nothing", low=0.0, high=100.0)
    weight_decision: float = knob(0.8, "added for a decision", low=0.0, high=100.0)
    weight_plan: float = knob(0.4, "added for a plan", low=0.0, high=100.0)
    decay: float = knob(0.1, "by which newness falls a round", low=0.0, high=100.0)
    over: int = knob(512, "cut a user message into paragraphs when it has more tokens", low=1, high=10_000_000)
    cached_price: float = knob(0.1, "price of a cached input token, as a share of the full one", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        shares(self.bonus, "rcr-router: knob bonus")

    async def rewrite(self, call: Call) -> Call:
        counter = Counter(call)
        before = counter.prompt(call)

        def unfired(reason: str, **paid: Any) -> Call:
            return call.with_receipt(Receipt(self.name, False, reason, before, before, **paid))

        found = passages(call, counter.text, self.over) if self.memory != "turns" else Passages(())
        spans = self._turns(call, found) if self.memory != "context" else []
        older = [_turn(call.messages[a:b]) for a, b in spans]
        chunks = [read_item(t) for t in found.texts]
        items = [*older, *chunks]
        if not items:
            return unfired("no items of memory: there is nothing to route")
        role, stage = self._role(call), self._stage(call)
        most = self.base + shares(self.bonus, "bonus").get(role, 0)
        sizes = [counter.messages(call.messages[a:b]) for a, b in spans]
        sizes += [counter.text("\n\n" + t.rstrip()) for t in found.texts]
        who = f"{role or 'an agent without a role'}{f' at {stage}' if stage else ''}"
        if sum(sizes) <= most:
            return unfired(f"all {len(items)} items fit into the {most} tokens of {who}")
        query = query_of(call, found)
        similar, spend, note = await self._similar(call, query, items)
        scores = self._scores((older, chunks), similar, role, stage)
        kept = route(scores, sizes, most, self.by)
        changed = found.keep(call, [i - len(older) for i in kept if i >= len(older)]) if found.texts else call
        if gone := {j for n, (a, b) in enumerate(spans) if n not in kept for j in range(a, b)}:
            stay = tuple(m for j, m in enumerate(changed.messages) if j not in gone)
            changed = replace(changed, messages=stay)
        after = counter.prompt(changed)
        report, words = cache_cost(call, changed, counter, (before, after), self.cached_price)
        used = sum(sizes[i] for i in kept)
        reason = f"routed {len(kept)} of {len(items)} items, {used} of {most} tokens, to {who}{note}{words}"
        detail = {"items": len(items), "turns": len(older), "kept": kept, "role": role, "stage": stage, **report}
        return changed.with_receipt(Receipt(self.name, True, reason, before, after, spend=spend, detail=detail))

    def _scores(
        self, parts: tuple[Sequence[Item], Sequence[Item]], similar: Sequence[float], role: str, stage: str
    ) -> list[float]:
        """Importance of turns and passages, whose ages are counted apart."""
        weights = Weights(
            self.weight_role,
            self.weight_stage,
            self.weight_recency,
            self.weight_semantic,
            self.weight_decision,
            self.weight_plan,
            self.decay,
        )
        aged = [(item, age) for part in parts for item, age in zip(part, ages(part), strict=True)]
        return [importance(i, age, s, role, stage, weights) for (i, age), s in zip(aged, similar, strict=True)]

    async def _similar(self, call: Call, query: str, items: Sequence[Item]) -> tuple[list[float], Spend, str]:
        """How like the task each item is, what the embedder billed, and what the receipt must say. Raises
        BudgetExceeded where the plan says refuse."""
        if not self.weight_semantic:
            return [0.0] * len(items), Spend(), ""
        if not query:
            return [0.0] * len(items), Spend(), "; no user message to compare them with"
        note = "; likeness by shared words"
        if "embedder" in call.engines:
            try:
                scored = await score(call, self.name, query, [i.text for i in items])
            except BudgetExceeded as error:
                if call.on_exceed == "refuse":
                    raise
                note += f", for the budget holds no embedding ({error.resource})"
            else:
                return scored.scores, scored.spend, ""
        asked = set(re.findall(r"\w+", query.lower()))
        words = [set(re.findall(r"\w+", i.text.lower())) for i in items]
        return [len(asked & w) / max(1, len(asked)) for w in words], Spend(), note

    def _turns(self, call: Call, found: Passages) -> list[tuple[int, int]]:
        """Spans of turns that may go: not one in which passages stand, or are rendered."""
        held = {found.source}
        if call.context is not None:
            held |= {i for i, m in enumerate(call.messages) if CONTEXT_MARK in text_of(m)}
        return [(a, b) for a, b in turns(call.messages) if held.isdisjoint(range(a, b))]

    def _role(self, call: Call) -> str:
        if said := self.role or _metadata(call, "role"):
            return said.strip().lower()
        users = [m for m in call.messages if m.get("role") == "user" and not is_result(m)]
        return str(users[-1].get("name") or "").strip().lower() if users else ""

    def _stage(self, call: Call) -> str:
        return (self.stage or _metadata(call, "stage")).strip().lower()


def turns(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Spans [start, stop) of messages that are turns and may go: from a user's message to before the next one; the last
    is none of them. A tool's call and its result are never in two; system messages are in none, so a turn ends there.

    >>> turns([{"role": "system"}, {"role": "user"}, {"role": "assistant"}, {"role": "user"}])
    [(1, 3)]
    """
    found = groups(messages)
    starts = [g.start for g in found if messages[g.start].get("role") == "user" and not is_result(messages[g.start])]
    stops = sorted({*starts, *(g.start for g in found if messages[g.start].get("role") in SYSTEM_ROLES)})
    spans = []
    for start in starts[:-1]:
        stop = next(s for s in stops if s > start)
        if not any(g.start < stop < g.stop or g.start < start < g.stop for g in found):
            spans.append((start, stop))
    return spans


def _turn(messages: Sequence[Message]) -> Item:
    """A turn as an item: its text, its first author, and a header where its first message has one."""
    texts = [text_of(m) or canonical(m.get("tool_calls") or "") for m in messages]
    item = read_item(texts[0])
    author = item.author or str(messages[0].get("name") or "").lower()
    return replace(item, text="\n".join(texts), author=author)


def _metadata(call: Call, key: str) -> str:
    """A text of the call's `metadata` field, which providers keep with a request and do not show the model."""
    data = call.extra.get("metadata")
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, str) else ""
