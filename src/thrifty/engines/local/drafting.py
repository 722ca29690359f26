"""A draft: what a small local model would write after another model's tokens, read as trees and never shown.

It is a branch whose tokens are the target's: `follow` gives it what the target wrote, and `draft` counts the
candidates that were drawn from its logits. Its bill is an entry of its own, in the role `draft` and the drafting
method's name: the prompt as input; as output every candidate drawn, and every token of the target's that was none of
them (forced text, as anywhere). All its forward passes are `draft_passes`.

Invariants: a candidate is held before it is drawn; the hold leaves `keep` output tokens of the account to the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from thrifty.call import ROOT, Call, Sampling
from thrifty.engines.generation import stamped
from thrifty.engines.local.branch import LocalBranch
from thrifty.engines.local.family import Family
from thrifty.engines.local.prompt import Prompt, TextCodec
from thrifty.engines.local.sampling import Sampler
from thrifty.engines.local.verify import Reading
from thrifty.engines.settling import Tab
from thrifty.errors import InvalidInput
from thrifty.policy import Probe
from thrifty.spend import Spend, Work

if TYPE_CHECKING:
    from thrifty.engines.local.engine import LocalEngine


class DraftBranch(LocalBranch):
    """See the top of the module. Make it with `open_draft`."""

    drafts: ClassVar[bool] = True
    drawn = 0
    """candidates, and tokens of the target's that were none: what is billed as output"""

    @property
    def output(self) -> int:
        return self.drawn

    def draft(self, n: int) -> None:
        """Holds and counts n candidates about to be drawn from its logits. Raises BudgetExceeded."""
        with self.lock:
            if not self.tab.cover(self.drawn + n) or not self.tab.cover_work(self.work):
                raise self.tab.refusal or InvalidInput("the draft is closed: open a new one")
            self.drawn += n

    async def follow(self, reading: Reading, tokens: Sequence[int], drafted: int) -> None:
        """Goes on with the target's `tokens`, of which the first `drafted` were candidates: keeps the cache of those
        that `reading` has read, and reads the rest with the next tree. Closes `reading`. Raises BudgetExceeded."""
        try:
            self.draft(max(0, len(tokens) - drafted))
            await self.engine.scheduler.turn(self, lambda: self._follow(reading, tokens))
        finally:
            reading.close()

    def _follow(self, reading: Reading, tokens: Sequence[int]) -> Probe | None:
        with self.lock:
            if self.closed:
                return None
            node, at = ROOT, 0
            tree = reading.tree
            while at < len(tokens):
                match = [i for i in tree.children(node) if tree.tokens[i] == tokens[at] and reading.known(i)]
                if not match:
                    break
                node, at = match[0], at + 1
            logits = reading.logits(node)
            reading.adopt(node)
            self.tokens.extend(tokens)
            self.pending = list(tokens[at:])
            self.embeds, self.logits = None, None if self.pending else logits
        return None


async def open_draft(engine: LocalEngine, tokens: Sequence[int], call: Call, keep: int) -> DraftBranch:
    """A draft on `engine` that has read `tokens`, the target's so far, and settles on the call's account under the
    method's name in its labels; `keep` output tokens are left to the answer. Raises BudgetExceeded, EngineError;
    InvalidInput for more than the draft's context holds."""
    most, n = engine.runner.max_positions, len(tokens)
    if most is not None and n >= most:
        raise InvalidInput(f"the prompt has {n} tokens, the draft's context {most}: take a draft with a longer one")
    bare = replace(call.on_behalf(call.labels.method), sampling=Sampling(), keep=keep, on_exceed="degrade")
    reads = engine.runner.layers * (n * (n + 1) // 2 + 1)

    def bound(output: int) -> Work:
        return Work(prefill=n, kv_reads=reads, draft_passes=1)

    labels = stamped(replace(bare.labels, role="draft"), engine.name, engine.model, engine.prices)
    tab = Tab.open(
        call.account,
        Spend(input=n, calls=1),
        labels=labels,
        keep=keep,
        prices=engine.prices,
        bound=bound,
        tranche=engine.tranche,
    )
    try:
        branch = DraftBranch(bare, engine, tab, Sampler(bare.sampling, 0), Family(engine, call.account))
    except BaseException:
        tab.release()
        raise
    try:
        await engine._prefill(branch, Prompt(list(tokens)))
    except BaseException:
        branch.close()
        raise
    return branch


def same_vocabulary(one: TextCodec, other: TextCodec) -> bool:
    """Whether two tokenizers mean the same by every token id."""
    return one is other or one.tokenizer is other.tokenizer or _vocabulary(one) == _vocabulary(other)


_KNOWN: WeakKeyDictionary[TextCodec, int] = WeakKeyDictionary()


def _vocabulary(codec: TextCodec) -> int:
    """A number that stands for a vocabulary; made once a tokenizer, for it is long."""
    found = _KNOWN.get(codec)
    if found is None:
        found = _KNOWN[codec] = hash(frozenset(codec.tokenizer.get_vocab().items()))
    return found
