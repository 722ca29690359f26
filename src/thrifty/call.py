"""One request on its way down, and what comes back: Call, Answer, Receipt, Delta, and the Branch between them.

All of them are immutable; methods make changed copies with `dataclasses.replace`. Messages and tools are plain dicts in
the OpenAI form and are passed on untouched by every method that does not exist to change them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from thrifty.budget import Account
from thrifty.errors import InvalidInput, Unsupported
from thrifty.ledger.entry import Labels
from thrifty.spend import Spend, Work, total_spend, total_work

if TYPE_CHECKING:
    from thrifty.engine import Engine
    from thrifty.policy import Policy

Message: TypeAlias = Mapping[str, Any]
"""One chat message in the OpenAI form: role, content (text or parts), tool calls, ..."""

Finish = str
"""Why a generation ended: stop, length, budget, tool_calls, cancelled, error, or a policy's own word."""

CONTEXT_MARK = "{context}"
"""Where in a message the context chunks are rendered; without it they stand before the last user message."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. None leaves a setting to the engine, which is greedy (`local`) or the server's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    deterministic: bool = False
    """run this generation alone in its batch, so that the same seed gives the same text"""


@dataclass(frozen=True, slots=True)
class Draft:
    """Asks that the model drafts first: up to `separator`, at most `max_tokens`. Then the call's prefix, if it has one,
    is forced and counts as output. The parsed answer is what stands after the last separator."""

    separator: str = "####"
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of a stream. The last one carries `finish`, and the Answer that holds Spend and receipts."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: Finish | None = None
    answer: Answer | None = None
    raw: Mapping[str, Any] | None = None


Emit: TypeAlias = Callable[[Delta], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one method did to one call.

    `before` and `after` count what the method works on (`unit`): tokens of the prompt, chunks, bytes, samples. `spend`
    is what generations made in the method's own name cost; it sums to the ledger's entries under that name.
    """

    method: str
    fired: bool
    reason: str
    before: float | None = None
    after: float | None = None
    unit: str = "tokens"
    spend: Spend = Spend()
    work: Work = Work()
    detail: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; empty fields left out."""
        data: dict[str, Any] = {"method": self.method, "fired": self.fired, "reason": self.reason}
        if self.before is not None or self.after is not None:
            data |= {"before": self.before, "after": self.after, "unit": self.unit}
        if self.spend:
            data["spend"] = self.spend.to_dict()
        if self.work:
            data["work"] = self.work.to_dict()
        if self.detail:
            data["detail"] = dict(self.detail)
        return data


@dataclass(frozen=True, slots=True)
class Call:
    """One request: what is asked, how to sample, who pays, and what the methods above have attached."""

    messages: tuple[Message, ...]
    account: Account
    tools: tuple[Mapping[str, Any], ...] = ()
    context: tuple[str, ...] | None = None
    """passages that context methods may drop, reorder or shorten; rendered at `CONTEXT_MARK`. None: the call has none,
    and a mark in its text is only text; (): all were dropped, and the mark goes"""
    prefix: str | None = None
    """how the answer must begin: sent as the unfinished last assistant message, counted as input (but see Draft)"""
    draft: Draft | None = None
    sampling: Sampling = Sampling()
    policies: tuple[Policy, ...] = ()
    emit: Emit | None = None
    engines: Mapping[str, Engine] = field(default_factory=dict)
    """the plan's engines by role"""
    labels: Labels = Labels()
    receipts: tuple[Receipt, ...] = ()
    """of the methods passed so far; the engine hands them on to its Answer or Branch"""
    keep: int = 0
    """output tokens to leave free on the account for what comes after this generation"""
    on_exceed: Literal["refuse", "degrade"] = "degrade"
    """when the budget cannot hold the call as asked: raise, or answer in fewer tokens with a receipt"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """fields that Thrifty does not know; passed on untouched"""

    def with_receipt(self, receipt: Receipt) -> Call:
        """The same call with one receipt more."""
        return replace(self, receipts=(*self.receipts, receipt))

    def with_policy(self, policy: Policy) -> Call:
        """The same call with one policy more, after those already there."""
        return replace(self, policies=(*self.policies, policy))

    def with_sampling(self, **changes: Any) -> Call:
        """The same call with some sampling settings changed."""
        return replace(self, sampling=replace(self.sampling, **changes))

    def on_behalf(self, method: str) -> Call:
        """A call that `method` makes for its own ends: silent, of free form, billed under the method's name."""
        return replace(
            self,
            emit=None,
            tools=(),
            context=None,
            prefix=None,
            draft=None,
            policies=(),
            receipts=(),
            labels=replace(self.labels, method=method),
        )

    def question(self) -> str:
        """The text of the last user message, without the context mark; empty when there is none."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                text = text_of(message)
                return (text if self.context is None else text.replace(CONTEXT_MARK, "")).strip()
        return ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What comes back, always whole."""

    text: str
    finish: Finish = "stop"
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    parsed: str | None = None
    """the final answer where a method knows how to find it, else None"""
    spend: Spend = Spend()
    work: Work = Work()
    receipts: tuple[Receipt, ...] = ()
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    estimated: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> str:
        """The parsed answer if there is one, else the text."""
        return self.text if self.parsed is None else self.parsed

    def with_receipt(self, receipt: Receipt) -> Answer:
        """The same answer with one receipt more."""
        return replace(self, receipts=(*self.receipts, receipt))

    def charged(self, others: Sequence[Answer]) -> Answer:
        """The same answer, its Spend and Work grown by those of other answers that were paid for it."""
        return replace(
            self,
            spend=total_spend([self.spend, *(a.spend for a in others)]),
            work=total_work([self.work, *(a.work for a in others)]),
            estimated=self.estimated or any(a.estimated for a in others),
        )


@runtime_checkable
class Branch(Protocol):
    """One generation in progress. `step`, `append` and `finish_up` are awaited; `fork` and `close` are plain calls.

    A branch holds its prompt plus one tranche on its call's account and grows; when a growth is refused it ends with
    finish reason `budget`. It settles once, when it is closed.
    """

    @property
    def call(self) -> Call:
        """The call that opened it."""

    @property
    def engine(self) -> Engine:
        """The engine that it runs on."""

    @property
    def tokens(self) -> Sequence[int]:
        """Output tokens so far, forced ones included."""

    @property
    def logprobs(self) -> Sequence[float]:
        """Of the tokens so far, in nats, where the call asked for them."""

    @property
    def entropy(self) -> float | None:
        """Of the distribution that the last token was drawn from, in nats."""

    @property
    def finish(self) -> Finish | None:
        """Why it ended; None while it can go on."""

    @property
    def receipts(self) -> Sequence[Receipt]:
        """Of the methods that it passed; those of its policies come when it is closed."""

    @property
    def text(self) -> str:
        """The output so far, decoded."""

    @property
    def spend(self) -> Spend:
        """As it would be settled now."""

    @property
    def work(self) -> Work:
        """As it would be settled now."""

    async def step(self) -> int | None:
        """Draws one token; None when the branch has ended."""

    async def append(self, text: str) -> None:
        """Forces text: it counts as output."""

    def fork(self, seed: int | None = None) -> Branch:
        """A second branch with the same past, without a second prefill. The parent's tokens never change."""

    def close(self) -> None:
        """Ends the branch, settles what it produced and frees its memory. Idempotent."""

    async def finish_up(self) -> Answer:
        """Closes, waits for the ledger, and returns the branch as an Answer."""


Until: TypeAlias = Callable[[Sequence[Branch]], bool]


async def advance(branches: Sequence[Branch], until: Until | int) -> None:
    """Steps branches of different lengths in one batch, until `until` (a number of steps, or a condition that is asked
    after each) or until all have ended. They must be of one engine."""
    if branches:
        await branches[0].engine.advance(branches, until)


ROOT = -1
"""The parent of a tree's first nodes: the branch as it is."""

Choose: TypeAlias = Callable[[int, Any], tuple[int, int | None]]
"""Given a node (or `ROOT`) and the logits [V] after it as policies left them: the token that comes next, and the child
that it is, or None when it is no node of the tree."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Candidate tokens that may follow a branch: node i is `tokens[i]` after node `parents[i]`, or after the branch
    itself where that is `ROOT`. Parents stand before their children.

    >>> Tree((7, 9, 4), (ROOT, ROOT, 0)).children(ROOT)
    [0, 1]
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise InvalidInput(f"a tree of {len(self.tokens)} tokens and {len(self.parents)} parents: give one each")
        for i, parent in enumerate(self.parents):
            if not ROOT <= parent < i:
                raise InvalidInput(
                    f"node {i} of a tree has the parent {parent}: {ROOT} (the root) to {i - 1} may be it"
                )

    def children(self, node: int) -> list[int]:
        """The nodes after one, in order."""
        return [i for i, parent in enumerate(self.parents) if parent == node]


class Verified(Protocol):
    """A tree that a branch has read. The branch itself is unchanged until `accept`; while this is open it may not be
    stepped or appended to. Candidates are Work; a token is billed when a branch takes it."""

    @property
    def tree(self) -> Tree:
        """All nodes so far."""

    def logits(self, node: int) -> Any:
        """The model's logits [V] after a node (`ROOT`: after the branch), before any policy."""

    async def grow(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        """Reads more nodes, numbered on from those there are, in one pass. Raises BudgetExceeded, InvalidInput."""

    async def accept(self, choose: Choose) -> int:
        """Walks from the root as `choose` says, as far as budget, limit, policies and stops allow, and makes the path
        part of the branch, with the token that ended it. How many tokens were drawn. Closes this."""

    def close(self) -> None:
        """Forgets the tree; the branch goes on as if nothing had been read. Idempotent."""


async def verify(branch: Branch, tree: Tree) -> Verified:
    """Reads a tree of candidates after a branch, all nodes in one forward pass: for speculative methods.

    Raises Unsupported where the engine cannot (the local one can), or where a policy of the branch needs to see token
    by token what the cache holds; BudgetExceeded when the work or the memory is refused; InvalidInput for a branch that
    has ended or a path that is too long.
    """
    read: Callable[[Tree], Awaitable[Verified]] | None = getattr(branch, "verify", None)
    if read is None:
        raise Unsupported(f"engine {branch.engine.name}:{branch.engine.model} verifies no trees: the local engine does")
    return await read(tree)


def text_of(message: Message) -> str:
    """The text of a message whose content is a string or a list of parts; images are skipped."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or () if part.get("type") == "text")


def merge_receipts(receipts: Sequence[Receipt]) -> tuple[Receipt, ...]:
    """One receipt a method, in order of first appearance: counts and Spend add, it fired if any of them did."""
    merged: dict[str, Receipt] = {}
    for r in receipts:
        old = merged.get(r.method)
        if old is None:
            merged[r.method] = r
            continue
        merged[r.method] = replace(
            old,
            fired=old.fired or r.fired,
            reason=old.reason if old.fired or not r.fired else r.reason,
            before=_plus(old.before, r.before),
            after=_plus(old.after, r.after),
            spend=old.spend + r.spend,
            work=old.work + r.work,
            detail={**r.detail, **old.detail},
        )
    return tuple(merged.values())


def _plus(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b
