"""Recursive Speculative Decoding: a small model drafts a tree without replacement, a large one reads it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from thrifty.call import ROOT, Answer, Branch, Call, Receipt, Tree, advance, verify
from thrifty.errors import BudgetExceeded, InvalidInput, PlanError, Unsupported
from thrifty.method import Next, Search, knob

if TYPE_CHECKING:
    from thrifty.engines.local.branch import LocalBranch
    from thrifty.engines.local.drafting import DraftBranch
    from thrifty.engines.local.verify import Reading
    from thrifty.methods.decode._without_replacement import Candidate

MOST_NODES = 64
AHEAD = 8
"""Tokens between two looks at a stream where nothing is drafted."""


@dataclass(frozen=True, kw_only=True)
class RecursiveSpeculativeDecoding(Search):
    """Answers as the model alone would, in fewer of its forward passes.

    In each round the engine in the role `draft` draws a tree of candidates, siblings without replacement: `"rsd-c"`
    has `branching[i]` children at every node of level i (one, beyond the list), `"rsd-s"` keeps the `width` best of
    each level by stochastic beam search. The answering model reads all nodes in one pass, and recursive rejection
    sampling walks down: a sibling x is accepted with probability min(1, q(x) / p(x)), else q becomes the positive part
    of q - p and p loses x; after the last one, or at a leaf, a token is drawn from what q is by then. So every round
    gives at least one token, and each token has the law it would have had: temperature, filters, and what decode
    policies of this plan make of the logits at that place, whose verdicts count token by token. The draws differ from
    those of the plain answer with the same seed; at temperature 0 the tokens are the same, but for near-ties that a
    pass of another shape may round apart. At temperature 0 the draft proposes its likeliest tokens.

    The draft needs the same vocabulary and reads the answering model's own prompt. It is billed in the role `draft`:
    the prompt as input, every drawn candidate as output. What the answer may still need of `output` and `tokens` is
    never given to it: with a limit on these and no max_tokens, nothing is drafted. Other limits (usd, kv_reads,
    seconds) are shared, so under them drafting may cut the answer shorter; when one refuses a round the answer goes on
    without.

    Attention policies, cache policies that act while decoding, policies that need hidden states, and images are beyond
    it: then nothing is drafted, and the receipt says why. Reconstructed from the paper's description; its code was not
    at hand."""

    name = "recursive-speculative-decoding"
    paper = (
        "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement "
        "(Jeon et al. 2024, arXiv:2402.14160)"
    )
    opens = True
    needs = frozenset({"text", "branch", "logits", "cache"})
    roles = {"draft": frozenset({"text", "branch", "logits", "cache"})}
    identity = {"length": 0}

    variant: str = knob("rsd-c", "how the tree is drawn", choices=("rsd-c", "rsd-s"))
    branching: tuple[int, ...] = knob((2, 2, 1), "rsd-c: children of a node, level by level", low=1, high=64)
    width: int = knob(4, "rsd-s: nodes of a level", low=1, high=64, log=True)
    length: int = knob(3, "levels of the tree; 0: no drafting", low=0, high=16)

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.nodes()
        if most > MOST_NODES:
            raise InvalidInput(
                f"{self.name}: a tree of {most} nodes (branching, width, length): {MOST_NODES} at most can be verified"
            )

    def nodes(self) -> int:
        """Nodes of a whole tree."""
        if self.variant == "rsd-s":
            return self.width * self.length
        total, level = 0, 1
        for i in range(self.length):
            level *= self.children(i)
            total += level
        return total

    def children(self, level: int) -> int:
        """Children of a node above this level, in `rsd-c`."""
        return self.branching[level] if level < len(self.branching) else 1

    async def __call__(self, call: Call, next: Next) -> Answer:
        if not self.length:
            return await next(call.with_receipt(Receipt(self.name, False, "draft length 0: nothing is drafted")))
        check_draft(self.name, call.engines.get("answer"), call.engines.get("draft"))
        account = call.account.child("speculation")
        branch = await next.open(replace(call, account=account, emit=None))
        run = _Run(self, call, branch)
        try:
            await run.write()
            own = await run.receipt()
            answer = await branch.finish_up()
        finally:
            run.close()
            branch.close()
        answer = replace(
            answer,
            receipts=(*answer.receipts, own),
            spend=account.settled,
            work=replace(account.work, kv_bytes_mean=answer.work.kv_bytes_mean),
        )
        if call.emit is not None:
            await call.emit(run.branch.last_delta(answer))
        return answer


def check_draft(method: str, answer: Any, draft: Any) -> None:
    """Raises PlanError unless both are local engines whose tokens mean the same."""
    for role, engine in (("answer", answer), ("draft", draft)):
        if engine is None or getattr(engine, "codec", None) is None or getattr(engine, "runner", None) is None:
            what = "none" if engine is None else f"{engine.name}:{engine.model}"
            raise PlanError(f"{method!r} needs a local engine in the role {role!r}: {what} was given")
    from thrifty.engines.local.drafting import same_vocabulary

    if not same_vocabulary(answer.codec, draft.codec):
        raise PlanError(
            f"{method!r} needs a draft with the vocabulary of {answer.model}, which {draft.model} does not have: "
            "name a smaller model of the same family under draft"
        )


class _Run:
    """One answer. `branch` is the answering model's, `draft` the other's while there is one."""

    def __init__(self, method: RecursiveSpeculativeDecoding, call: Call, branch: Branch) -> None:
        import numpy as np

        self.method, self.call, self.branch = method, call, cast("LocalBranch", branch)
        self.draft: DraftBranch | None = None
        seed, sampling = call.sampling.seed, branch.call.sampling
        self.rng = np.random.default_rng(None if seed is None else seed % 2**64)
        self.greedy = not sampling.temperature
        self.filters = (
            sampling.temperature or 1.0,
            sampling.top_k or 0,
            _or(sampling.top_p, 1.0),
            sampling.min_p or 0.0,
        )
        self.note = ""
        """why nothing (more) was drafted"""
        self.rounds = self.nodes = self.accepted = self.drawn = 0

    async def write(self) -> None:
        """Writes the answer to its end. The first token takes no pass: the prompt's has given its logits."""
        await self.branch.step()
        await self._show()
        if self.branch.finish is None:
            self.draft = await self._open()
        while self.draft is not None and self.branch.finish is None:
            try:
                more = await self._round(self.draft)
            except BudgetExceeded as refusal:
                self.note, more = f"the budget's {refusal.resource} ran out for drafting", False
            await self._show()
            if not more:
                break
        if self.draft is not None:
            self.draft.close()
        while self.branch.finish is None:
            await advance([self.branch], AHEAD if self.call.emit is not None else 2**40)
            await self._show()

    async def receipt(self) -> Receipt:
        """What was drafted, and what it cost."""
        spend, work = Answer("").spend, Answer("").work
        if self.draft is not None:
            drafted = await self.draft.finish_up()
            spend, work = drafted.spend, drafted.work
        if not self.rounds:
            reason = f"nothing was drafted: {self.note or 'the answer had ended before'}"
            return Receipt(self.method.name, False, reason, spend=spend, work=work)
        reason = (
            f"{self.nodes} nodes drafted, {self.accepted} accepted: "
            f"{self.drawn} tokens in {self.rounds} passes, {self.drawn - self.rounds} saved"
        )
        if self.note:
            reason += f"; then no more: {self.note}"
        detail = {
            "nodes": self.nodes,
            "accepted": self.accepted,
            "tokens": self.drawn,
            "block_efficiency": round(self.drawn / self.rounds, 4),
            "saved": self.drawn - self.rounds,
        }
        return Receipt(
            self.method.name,
            True,
            reason,
            self.drawn,
            self.rounds,
            "target passes",
            spend=spend,
            work=work,
            detail=detail,
        )

    def close(self) -> None:
        if self.draft is not None:
            self.draft.close()

    # -- details -----------------------------------------------------------------------------------------------

    async def _open(self) -> DraftBranch | None:
        """A draft that has read what the branch has; None, with a note, when there can be none."""
        from thrifty.engines.local.drafting import open_draft
        from thrifty.engines.local.verify import refuse

        branch = self.branch
        prompt = branch.engine.prompter(branch.call)
        if prompt.images:
            self.note = "the prompt has images, which a draft does not read"
            return None
        keep = self._keep()
        if keep is None:
            self.note = "the budget limits tokens and the call has no max_tokens, so all are left to the answer"
            return None
        labels = replace(branch.call.labels, method=self.method.name)
        draft: Any = self.call.engines["draft"]
        try:
            refuse(branch)
            past = [*prompt.tokens, *branch.tokens]
            return await open_draft(draft, past, replace(branch.call, labels=labels), keep)
        except (InvalidInput, Unsupported) as error:
            self.note = str(error)
        except BudgetExceeded as refusal:
            self.note = f"the budget's {refusal.resource} leaves no room for a draft"
        return None

    def _keep(self) -> int | None:
        """Output tokens that the answer may need beyond what it holds; None: all that there are."""
        limit = self.branch.limit
        if limit is None:
            left = self.branch.call.account.remaining()
            return None if "output" in left or "tokens" in left else 0
        return self.call.keep + max(0, limit - self.branch.tab.held)

    async def _round(self, draft: DraftBranch) -> bool:
        """Drafts a tree, verifies it, and lets the draft follow; False when no more can be drafted."""
        branch = self.branch
        rooms = [self.method.length, branch.room, draft.room]
        if branch.limit is not None:
            rooms.append(branch.limit - len(branch.tokens) - 1)
        depth = min(r for r in rooms if r is not None)
        if depth < 1:
            if draft.room is not None and draft.room < 1:
                self.note = "the draft's context is full"
            elif not self.rounds:
                self.note = "there is room for one token only"
            return False
        reading = cast("Reading", await verify(draft, Tree()))
        tree, laws = await self._grow(draft, reading, depth)
        verified = await verify(branch, tree)
        before, accepted = len(branch.tokens), 0

        def choose(node: int, logits: Any) -> tuple[int, int | None]:
            nonlocal accepted
            token, child = self._choose(tree, laws, node, logits)
            accepted += child is not None
            return token, child

        drawn = await verified.accept(choose)
        if drawn:
            self.rounds += 1
        self.drawn, self.accepted = self.drawn + drawn, self.accepted + accepted
        if branch.finish is not None:
            return False
        await draft.follow(reading, branch.tokens[before:], accepted)
        return True

    async def _grow(self, draft: DraftBranch, reading: Reading, depth: int) -> tuple[Tree, dict[int, Any]]:
        """Draws the tree level by level: one pass of the draft a level. Also the law at each node that has children.

        Raises BudgetExceeded when not even the first level is held.
        """
        from thrifty.methods.decode import _without_replacement as drawing

        tokens: list[int] = []
        parents: list[int] = []
        known: dict[int, Candidate] = {ROOT: drawing.Candidate(ROOT)}
        laws: dict[int, Any] = {}
        level = [ROOT]
        rng = None if self.greedy else self.rng
        for i in range(depth):
            here = [self._law(reading.logits(node)) for node in level]
            if self.method.variant == "rsd-c":
                groups = drawing.children(here, self.method.children(i), rng)
            else:
                groups = drawing.beam(here, [known[node] for node in level], self.method.width, rng)
            try:
                draft.draft(sum(map(len, groups)))
            except BudgetExceeded:
                if not tokens:
                    raise
                break
            first = len(tokens)
            for node, p, group in zip(level, here, groups, strict=True):
                laws[node] = p
                for candidate in group:
                    known[len(tokens)] = candidate
                    tokens.append(candidate.token)
                    parents.append(node)
            self.nodes += len(tokens) - first
            level = [n for n in range(first, len(tokens)) if tokens[n] not in self.branch.codec.ends]
            if i + 1 == depth or not level:
                break
            try:
                await reading.grow(tokens[first:], parents[first:])
            except BudgetExceeded:
                break
        return Tree(tuple(tokens), tuple(parents)), laws

    def _law(self, logits: Any) -> Any:
        """The law of logits [V] under the call's sampling. A draft's logits may be padded to another length."""
        from thrifty.methods.decode import _without_replacement as drawing

        values = logits.double().cpu().numpy()
        size = self.branch.engine.runner.vocab
        if len(values) != size:
            import numpy as np

            values = np.concatenate([values[:size], np.full(max(0, size - len(values)), -np.inf)])
        return drawing.law(values, *self.filters)

    def _choose(self, tree: Tree, laws: dict[int, Any], node: int, logits: Any) -> tuple[int, int | None]:
        """The next token after a node, and the child that it is."""
        from thrifty.methods.decode import _without_replacement as drawing

        below = tree.children(node)
        if self.greedy:
            token = int(logits.argmax())
            return token, next((i for i in below if tree.tokens[i] == token), None)
        siblings: Sequence[int] = [tree.tokens[i] for i in below]
        token, place = drawing.choose(self._law(logits), laws.get(node), siblings, self.rng)
        return token, None if place is None else below[place]

    async def _show(self) -> None:
        if self.call.emit is None:
            return
        with self.branch.lock:
            delta = self.branch.delta()
        if delta is not None:
            await self.call.emit(delta)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
