"""Tool retrieval: of many tools, only those that fit the task are described to the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.budget import Budget
from thrifty.call import Call, Message, Receipt, text_of
from thrifty.errors import BudgetExceeded, InvalidInput, nearest
from thrifty.method import Rewrite, knob
from thrifty.methods.context._conversation import (
    SYSTEM_ROLES,
    Counter,
    cache_report,
    canonical,
    is_result,
    previous_turn,
)
from thrifty.methods.context._passages import ranked

Tool = Mapping[str, Any]
ASKED = re.compile(r"\brecall #([\w.:/-]*\w)")
"""How an assistant or a user asks for a tool by name."""


@dataclass(frozen=True, kw_only=True)
class ToolRetrieval(Rewrite):
    """Keeps the `k` tools whose cards are nearest to what the user asks, by cosine similarity of sentence embeddings.

    A card is a tool's name, its description and the names of its parameters. `query` says what they are compared
    with: the "last" user message, or "all" of them, each of which brings its own k: a set that only grows, and only
    when a new need comes up. Tools stand before everything else in what providers cache, so another set breaks the
    whole prefix: the receipt's detail says what that costs (`net_saved`, in tokens at the full price).

    Always kept: tools named in `always` (separated by commas), the one that the call's `tool_choice` demands, those
    that the conversation has called already, and tools without a name, which are the provider's own. With `tokens`
    above 0, cards are added in order of rank, the newest message's first, while the schemas fit into it. The
    kept ones stay in the order of the catalogue.

    `reversible` tells the model, in the system message, the names of the tools that were left out; an assistant or user
    message with `recall #NAME` brings a tool back for the rest of the conversation. A `tool_choice` of an
    unknown tool is refused. Without any words to compare with, or a budget that holds the embedding, all tools stay.

    This is the retriever of TPTU-v2 with any sentence encoder; the paper also fine-tunes it on pairs of tasks and
    tools, which needs such pairs. The paper's demonstrations and its fine-tuned planner are no part of it."""

    name = "tool-retrieval"
    paper = (
        "TPTU-v2: Boosting Task Planning and Tool Usage of Large Language Model-based Agents in Real-world Systems "
        "(Kong et al. 2023, arXiv:2311.11315), its API retriever"
    )
    roles = {"embedder": frozenset({"embed"})}
    identity = {"k": 1_000_000}

    k: int = knob(8, "tools kept for each query", low=1, high=1_000_000, log=True)
    query: str = knob("all", "what tools are compared with: the last user message, or each", choices=("last", "all"))
    tokens: int = knob(0, "tokens of schemas at most; 0: no limit", low=0, high=10_000_000)
    always: str = knob("", "names of tools that always stay, separated by commas")
    reversible: bool = knob(True, "names of the tools left out are told, and one asked for comes back")
    cached_price: float = knob(0.1, "price of a cached input token, as a share of the full one", low=0.0, high=1.0)

    async def rewrite(self, call: Call) -> Call:
        counter = Counter(call)
        before, n = counter.prompt(call), len(call.tools)

        def unfired(reason: str) -> Call:
            return call.with_receipt(Receipt(self.name, False, reason, before, before))

        names = [tool_name(t) for t in call.tools]
        demanded = _tool_choice(call, names)
        sizes = [counter.text(canonical(t)) for t in call.tools]
        if not n:
            return unfired("no tools")
        if n <= self.k and (not self.tokens or sum(sizes) <= self.tokens):
            return unfired(f"k = {self.k} covers all {n} tools")
        past = previous_turn(call.messages)
        queries, old = self._queries(call.messages), self._queries(past)
        if not queries:
            return unfired("no user message to compare the tools with")
        texts = list(dict.fromkeys([*old, *queries]))
        try:
            scores, spend = await self._scores(call, before, texts)
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            return unfired(f"the budget cannot hold the embedding of {n} tools ({error.resource}): all kept")
        rows = dict(zip(texts, scores, strict=True))
        pins = self._pinned(call.messages, names, demanded)
        kept = choose([rows[q] for q in queries], sizes, pins, k=self.k, most=self.tokens)
        if len(kept) == n:
            reason = f"all {n} tools are needed, or fit"
            return call.with_receipt(Receipt(self.name, False, reason, before, before, spend=spend))
        changed = self._with(call, kept, names)
        after = counter.prompt(changed)
        if after >= before:
            reason = f"leaving out {n - len(kept)} of {n} tools would save nothing"
            return call.with_receipt(Receipt(self.name, False, reason, before, before, spend=spend))
        pins = self._pinned(past, names, demanded)
        earlier = choose([rows[q] for q in old], sizes, pins, k=self.k, most=self.tokens) if old else list(range(n))
        report, words = self._cache(call, counter, past, sizes, (earlier, kept), (before, after)) if past else ({}, "")
        over = ""
        if self.tokens and (taken := sum(sizes[i] for i in kept)) > self.tokens:
            over = f"; those that always stay take {taken} of {self.tokens} tokens"
        reason = f"kept {len(kept)} of {n} tools{over}{words}"
        detail = {"tools": n, "kept": [names[i] for i in kept], **report}
        return changed.with_receipt(Receipt(self.name, True, reason, before, after, spend=spend, detail=detail))

    def _cache(
        self,
        call: Call,
        counter: Counter,
        past: Sequence[Message],
        sizes: Sequence[int],
        sets: tuple[list[int], list[int]],
        prompts: tuple[int, int],
    ) -> tuple[dict[str, Any], str]:
        """What the provider's cache would have had, and has, of the turn before, with that turn's tools and these."""
        earlier, kept = sets
        names = [tool_name(t) for t in call.tools]
        messages = tuple(past)
        if len(earlier) < len(sizes):
            messages = self._with(replace(call, messages=messages), earlier, names).messages
        sent = sum(sizes[i] for i in earlier) + counter.messages(messages)
        shared = sent if earlier == kept else 0
        return cache_report(sum(sizes) + counter.messages(past), sent, shared, *prompts, self.cached_price)

    def _queries(self, messages: Sequence[Message]) -> list[str]:
        """What tools are compared with, oldest first; empty where no user said a word."""
        users = [m for m in messages if m.get("role") == "user" and not is_result(m)]
        texts = [t for m in users if (t := text_of(m).strip())]
        return texts if self.query == "all" else texts[-1:]

    async def _scores(self, call: Call, prompt: int, texts: Sequence[str]) -> tuple[list[list[float]], Any]:
        """Cosine of each text to each tool, [texts][tools], and what the embedder billed under this method's name, on
        an account that leaves the call the room it needs where it fits as it is. Raises BudgetExceeded."""
        needs = {"input": prompt, "tokens": prompt + 1 + call.keep, "calls": 1}
        left = {name: int(room) for name, room in call.account.remaining().items() if name in needs}
        fits = all(left[name] >= needs[name] for name in left)
        limits = Budget(**{name: left[name] - needs[name] for name in left}) if fits else Budget()
        labels = replace(call.labels, method=self.name, role="embedder")
        account = call.account.child(self.name, limits)
        cards = [card(t) for t in call.tools]
        embedded = await call.engines["embedder"].embed([*texts, *cards], account, labels)
        vectors = embedded.vectors
        table = vectors[: len(texts)] @ vectors[len(texts) :].T
        return [[float(x) for x in row] for row in table], embedded.spend

    def _pinned(self, messages: Sequence[Message], names: Sequence[str], demanded: str) -> list[int]:
        """Indices of tools that stay whatever their score."""
        wanted = {demanded, *(part.strip() for part in self.always.split(","))}
        for message in messages:
            wanted |= _called(message)
            if self.reversible and message.get("role") in ("user", "assistant"):
                wanted |= set(ASKED.findall(text_of(message)))
        return [i for i, name in enumerate(names) if not name or name in wanted]

    def _with(self, call: Call, kept: Sequence[int], names: Sequence[str]) -> Call:
        """The call with these tools, and the names of the others told."""
        stay = set(kept)
        changed = replace(call, tools=tuple(call.tools[i] for i in kept))
        if not self.reversible:
            return changed
        others = ", ".join(name for i, name in enumerate(names) if i not in stay)
        note = f"Further tools, left out for now: {others}. To have one, write: recall #NAME"
        first = call.messages[0]
        if first.get("role") not in SYSTEM_ROLES:
            return replace(changed, messages=({"role": "system", "content": note}, *call.messages))
        content = first.get("content")
        if isinstance(content, (list, tuple)):
            grown: Any = [*content, {"type": "text", "text": note}]
        else:
            grown = f"{content}\n\n{note}" if content else note
        return replace(changed, messages=({**first, "content": grown}, *call.messages[1:]))


# -- the core, in pure functions -----------------------------------------------------------------------------


def choose(
    scores: Sequence[Sequence[float]], sizes: Sequence[int], pinned: Sequence[int], *, k: int, most: int = 0
) -> list[int]:
    """Indices of tools that stay, ascending, from scores [queries][tools], oldest query first.

    Pinned ones stay. Of each query, the newest first, the k best by falling score (ties by the lower index) join, while
    the sum of `sizes` stays within `most` (0: no limit); the first of a query that does not fit ends that query.

    >>> choose([[0.1, 0.9, 0.5, 0.2]], [1, 1, 1, 1], [3], k=2)
    [1, 2, 3]
    """
    kept = set(pinned)
    taken = sum(sizes[i] for i in kept)
    for row in reversed(scores):
        for i in ranked(row)[:k]:
            if i in kept:
                continue
            if most and taken + sizes[i] > most:
                break
            kept.add(i)
            taken += sizes[i]
    return sorted(kept)


def card(tool: Tool) -> str:
    """What is embedded of a tool: its name as words, its description, its parameters' names.

    >>> card({"type": "function", "function": {"name": "get_weather", "description": "Tells the weather.",
    ...       "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}})
    'get weather: Tells the weather. (city)'
    """
    body = _body(tool)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_\W]+", " ", tool_name(tool)).strip()
    schema = body.get("parameters") or body.get("input_schema") or {}
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    names = ", ".join(map(str, properties)) if isinstance(properties, Mapping) else ""
    return f"{words}: {body.get('description') or ''}" + (f" ({names})" if names else "")


def tool_name(tool: Tool) -> str:
    """A tool's name; empty for a provider's own tool that has only a type."""
    return str(_body(tool).get("name") or "")


def _body(tool: Tool) -> Mapping[str, Any]:
    for key in ("function", "custom"):
        if isinstance(tool.get(key), Mapping):
            return tool[key]  # type: ignore[no-any-return]
    return tool


def _called(message: Message) -> set[str]:
    """Names of the tools that a message calls."""
    calls = [c for c in message.get("tool_calls") or () if isinstance(c, Mapping)]
    old = message.get("function_call")
    names = {tool_name(c) for c in calls} | ({str(old.get("name"))} if isinstance(old, Mapping) else set())
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else ()
    return names | {str(p.get("name")) for p in parts if isinstance(p, Mapping) and p.get("type") == "tool_use"}


def _tool_choice(call: Call, names: Sequence[str]) -> str:
    """The tool that the call demands by name; empty without one. Raises InvalidInput for one that is not there."""
    demanded = call.extra.get("tool_choice")
    name = tool_name(demanded) if isinstance(demanded, Mapping) else ""
    if name and call.tools and name not in names:
        raise InvalidInput("tool_choice: " + nearest(name, [x for x in names if x], "tool"))
    return name
