"""One local generation in progress: its cache, what it must read next, its sampler, and its part of each step.

The scheduler's thread runs the model and calls the methods under "the model's thread"; the caller's side steps, forks,
appends and closes. Both sides change a branch under its lock only. What touches the cache (a fork's copy, freeing) is
queued for the model's thread in the order in which it was asked for, so `fork` and `close` return at once.

Invariants: `pending` are tokens that count as output and are not yet in the cache; `logits`, if there are any, are
those of the position after all others, and then nothing is pending; a closed branch never changes again.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from thrifty.call import Answer, Call, Receipt, Tree
from thrifty.engines.generation import Generation
from thrifty.engines.local import sampling
from thrifty.engines.local.family import Family
from thrifty.engines.local.kv import BLOCK, Store
from thrifty.engines.local.prompt import Prompt, pixels
from thrifty.engines.local.runner import Output, Row
from thrifty.engines.local.verify import Reading, beyond
from thrifty.engines.local.vision import Seen, features, place
from thrifty.engines.settling import Tab
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput
from thrifty.ledger.entry import Labels
from thrifty.policy import (
    AttentionPolicy,
    CachePolicy,
    DecodePolicy,
    Feed,
    Force,
    Probe,
    Stop,
    Verdict,
    VisionPolicy,
)
from thrifty.spend import Spend, Work

if TYPE_CHECKING:
    from thrifty.engines.local.engine import LocalEngine


class LocalBranch(Generation):
    """Implements `thrifty.call.Branch`. `hidden` [layers + 1, D] are the last position's states, for policies that
    need them."""

    engine: LocalEngine
    drafts: ClassVar[bool] = False
    """its forward passes are those of a draft model"""

    def __init__(
        self,
        call: Call,
        engine: LocalEngine,
        tab: Tab,
        sampler: sampling.Sampler,
        family: Family,
        *,
        thinking: bool = False,
        opened: bool = True,
    ) -> None:
        super().__init__(call, engine, engine.codec, tab, tags=engine.tags, thinking=thinking)
        self.opened = opened
        self.lock = threading.RLock()
        self.sampler, self.family = sampler, family
        self.store: Store | None = None
        self.pending: list[int] = []
        self.embeds: Tensor | None = None
        self.logits: Tensor | None = None
        self.hidden: Tensor | None = None
        self.busy = False
        """a step of it was asked for and is not done"""
        self.begun = False
        """the model has started on its prompt: what it computes is billed"""
        self.failure: BaseException | None = None
        self.probe: LocalBranch | None = None
        self.evicted = 0
        self.seen: Seen | None = None
        """the prompt's images as they were embedded, for vision policies' receipts"""
        self.reading: Reading | None = None
        """a tree of candidates that was read and is neither accepted nor closed"""
        self._extra = Work()
        """held for trees, beyond what decoding alone takes"""
        self._drawn: Tensor | None = None
        self._parent: LocalBranch | None = None
        self._work = Work()
        self._mean: tuple[float, int] = (0.0, 0)
        self._bind()
        family.join(self)

    def _bind(self) -> None:
        self.decoders = tuple(p for p in self.policies if isinstance(p, DecodePolicy))
        self.changers = tuple(p for p in self.decoders if type(p).logits is not DecodePolicy.logits)
        self.cachers = tuple(p for p in self.policies if isinstance(p, CachePolicy))
        self.readers = tuple(p for p in self.policies if isinstance(p, AttentionPolicy))
        self.keeps_logprobs = self.call.sampling.logprobs or self.opened or bool(self.decoders)
        self.wants_hidden = any("hidden" in p.needs for p in self.decoders)

    # -- the caller's side -------------------------------------------------------------------------------------

    @property
    def entropy(self) -> float | None:
        """Nats, of the distribution that the last token came from: after policies, at temperature 1."""
        drawn = self._drawn
        return None if drawn is None else sampling.entropy(drawn)

    @property
    def work(self) -> Work:
        """As it would be settled now."""
        total, steps = self._mean
        mean = total / steps if steps else float(self.family.claimed)
        return replace(self._work, kv_bytes_peak=self.family.peak, kv_bytes_mean=mean)

    async def step(self) -> int | None:
        """Draws one token; None when the branch has ended. Raises EngineError."""
        before = len(self.tokens)
        await self.engine.scheduler.drawn([self], 1)
        # forced text may follow the token that was drawn
        return self.tokens[before] if len(self.tokens) > before else None

    async def append(self, text: str) -> None:
        """Forces text: it counts as output and is read with the next step."""
        with self.lock:
            self._idle("append to")
            self.no_tree()
            if self.finish is None:
                self._read(self.force(text))

    def fork(self, seed: int | None = None) -> LocalBranch:
        """A second branch with the same past: no second prefill. Without a seed it draws as its parent would.

        Raises BudgetExceeded; InvalidInput on a closed branch, or while a step of this one is awaited.
        """
        with self.lock:
            self._idle("fork")
            twin = self._twin(self.tab.labels, None if self.limit is None else self.limit - len(self.tokens))
            twin.sampler = self.sampler.fork(seed)
            self.engine.scheduler.queue(twin.copy_store)
            return twin

    async def verify(self, tree: Tree) -> Reading:
        """Reads a tree of candidates; see `thrifty.call.verify`."""
        with self.lock:
            self._idle("verify a tree after")
            self.no_tree()
            if self.finish is not None:
                raise InvalidInput(f"this branch has ended ({self.finish}): nothing follows it")
            reading = self.reading = Reading(self)
        try:
            await reading.grow(tree.tokens, tree.parents)
        except BaseException:
            reading.close()
            raise
        return reading

    @property
    def room(self) -> int | None:
        """Tokens that the model's context has room for after all that is pending; None where it has no end."""
        most, store = self.engine.runner.max_positions, self.store
        return None if most is None or store is None else int(most) - store.next_position - self.waiting

    @property
    def waiting(self) -> int:
        """Entries that the next pass adds to the cache."""
        return len(self.pending) + (0 if self.embeds is None else self.embeds.shape[0])

    def close(self) -> None:
        """Ends the branch, settles what it produced and frees its memory. Idempotent; a token that is being computed
        at this moment is not part of it."""
        self._end("cancelled")

    async def finish_up(self) -> Answer:
        """Closes, waits for the ledger, and returns the branch as an Answer."""
        self._end("cancelled")
        await self.tab.done()
        return self.answer()

    # -- the model's thread ------------------------------------------------------------------------------------

    def copy_store(self) -> None:
        """Takes the parent's cache: segments by reference, the open tail copied. Also for a branch that was closed
        meanwhile, because forks of it may be waiting for theirs; it is freed after them."""
        with self.lock:
            parent, self._parent = self._parent, None
            if parent is None:
                return
            if parent.store is None:
                self.failure = EngineError("the branch that this one was forked from has failed: open a new one")
                return
            self.store = parent.store.fork(cache=self.cachers, attention=self.readers)

    def free(self) -> None:
        """Gives the memory back, once the branch is closed."""
        reading, self.reading = self.reading, None
        if reading is not None:
            reading.free()
        store, self.store = self.store, None
        if store is not None:
            store.close()
        self.logits = self.hidden = self._drawn = self.embeds = None
        self.family.measure()

    def first_row(self, prompt: Prompt) -> Row:
        """The prompt as the model reads it: tokens, or embeddings where images stand in it."""
        if self.store is None:
            raise EngineError("a prompt without a cache to read it into")
        eyes = self.engine.prompter.eyes
        if not prompt.images or eyes is None:
            return Row(self.store, prompt.tokens, hidden=self.wants_hidden)
        runner = self.engine.runner
        found = features(runner, {"pixel_values": pixels(prompt.images, eyes)})
        ids = torch.tensor(prompt.spread([len(f) for f in found]), dtype=torch.int64, device=runner.device)
        lookers = [p for p in self.policies if isinstance(p, VisionPolicy)]
        self.seen = place(runner, ids, found, lookers)
        with self.lock:
            bill = replace(self.tab.prompt, input=len(self.seen.embeds), visual=sum(self.seen.after))
            self.tab.amend(bill)
        return Row(self.store, None, self.seen.embeds, hidden=self.wants_hidden)

    def prefilled(self, output: Output, seconds: float) -> None:
        """Takes the result of the prompt's forward pass."""
        with self.lock:
            if self.closed:
                return
            self.logits, self.hidden = self._only(output), output.hidden
            self.evicted += output.evicted
            self._count(output, seconds, prefill=output.written)
            self.family.measure()

    def row(self) -> Row | None:
        """What the next forward pass must read for this branch; None when its next logits are known already.

        Claims the memory first; a refused claim ends the branch with finish reason `budget`.
        """
        if self.logits is not None or self.store is None:
            return None
        new, store = self.waiting, self.store
        ask = 0 if store.slot is not None else BLOCK
        if store.tail + new > BLOCK:
            ask += max(BLOCK, new)
        if ask:
            try:
                self.family.claim(ask * self.engine.entry_nbytes)
            except BudgetExceeded as refusal:
                self.tab.refusal, self.finish = refusal, "budget"
                return None
        if self.embeds is None:
            return Row(store, list(self.pending), hidden=self.wants_hidden)
        parts = [self.embeds]
        if self.pending:
            parts.append(self.engine.runner.embed(self.pending))
        return Row(store, None, torch.cat([p.to(parts[0]) for p in parts]), hidden=self.wants_hidden)

    def stepped(self, output: Output, seconds: float) -> None:
        """Takes the result of a decode pass; it is in the cache even if the branch was closed meanwhile."""
        with self.lock:
            self.pending, self.embeds = [], None
            self.logits, self.hidden = self._only(output), output.hidden
            if self.closed:
                return
            self.evicted += output.evicted
            self._count(output, seconds)
            store = self.store
            if output.evicted or (store is not None and store.tail <= output.written):
                self._measure()

    def cover_tree(self, reads: int) -> None:
        """Holds one pass that reads so many entries in a layer, as far as the tokens drawn so far have not been held
        for. Raises BudgetExceeded."""
        planned = Work(
            kv_reads=reads * self.engine.runner.layers,
            target_passes=int(not self.drafts),
            draft_passes=int(self.drafts),
        )
        need = beyond(self._work + planned, self.tab.bound(self.output))
        more = beyond(need, self._extra)
        if more and self.tab._hold is not None:
            self.tab._hold.grow(work=more)
            self._extra = self._extra + more

    def count_tree(self, reads: int, seconds: float) -> None:
        """Takes the Work of a pass over a tree."""
        if not self.closed:
            self._count(Output(None, None, reads, 0), seconds)

    def shape_logits(self, logits: Tensor, finite: bool) -> None:
        """Lets this branch's policies change logits [V], float32, in place. Raises EngineError for unusable ones."""
        if not finite:
            model, dtype = self.engine.model, self.engine.dtype
            raise EngineError(f"model {model} gave logits that are not finite ({dtype}): try dtype 'float32'")
        if self.changers:
            new = logits
            for policy in self.changers:
                new = policy.logits(self, new)
            if new is not logits:
                logits.copy_(new)
            if not bool(torch.isfinite(logits.amax())):
                names = ", ".join(p.method or type(p).__name__ for p in self.changers)
                raise EngineError(f"decode policies ({names}) left no token to draw: leave at least one finite logit")

    def drew(self, token: int, logprob: float, logits: Tensor) -> Probe | None:
        """Records a drawn token and what follows from it. A probe that must run first is returned."""
        self.logits = None
        self._drawn = logits
        self.take(token, logprob)
        self.pending = [token]
        verdict, method = self.judge(token)
        return self.decided(verdict, method)

    def decided(self, verdict: Verdict, method: str) -> Probe | None:
        """Acts on a verdict; of a probe it only says that it is due."""
        if isinstance(verdict, Probe) and self._ending != "length":
            self._prober = method
            return verdict
        ended = self.tokens[-1] in self.codec.ends
        forced = self.apply(verdict)
        if ended and self.finish is None:
            self.pending = []  # the end token was taken back: the model never reads it
            if not forced and isinstance(verdict, Feed):
                self.finish = "stop"
        if isinstance(verdict, Feed) and self.finish is None:
            self._feed(verdict)
        if isinstance(verdict, (Force, Stop)) or forced:
            self._read(forced)
        return None

    def start_probe(self, probe: Probe) -> LocalBranch | None:
        """A fork that says what a probe asks; None (with a receipt) when the budget refuses it."""
        method = self._prober
        labels = replace(self.tab.labels, method=method)
        asked = len(self.codec.encode(probe.text)) + probe.max_tokens
        try:
            twin = self._twin(labels, asked)
        except BudgetExceeded as refusal:
            self.aside(Receipt(method, False, f"probe refused: {refusal.resource} ran out"))
            return None
        twin.policies = tuple(p for p in twin.policies if not isinstance(p, DecodePolicy))
        if probe.watch is not None:
            twin.policies += (probe.watch,)
        twin.receipts = []
        twin._bind()
        twin.shape.drafting, twin.shape.stop, twin._draft_limit = False, (), None
        twin.finish, twin.limit = None, len(self.tokens) + asked
        twin.sampler = sampling.Sampler(replace(self.call.sampling, temperature=None), 0)
        twin._ending = None
        twin.copy_store()
        twin._read(twin.force(probe.text))
        twin._said = len(twin.text)
        self.probe = twin
        return twin

    def probed(self, probe: Probe) -> Probe | None:
        """The probe has ended: hands on what it said, and acts on the verdict."""
        twin, self.probe = self.probe, None
        if twin is None:
            return None
        twin._end("cancelled")
        self.aside(Receipt(self._prober, True, "probed", spend=twin.spend, work=twin.work))
        if self.closed:
            return None
        if twin.failure is not None:
            raise twin.failure
        return self.decided(probe.then(twin.text[twin._said :]), self._prober)

    # -- details -----------------------------------------------------------------------------------------------

    _prober = ""
    _said = 0

    def _end(self, finish: str) -> bool:
        with self.lock:
            if self.closed:
                return False
            probe = self.probe
            if probe is not None and probe._end("cancelled"):
                self.aside(Receipt(self._prober, True, "probe cut off", spend=probe.spend, work=probe.work))
            self._freeze()
            if not self.begun:
                self.tab.prompt = Spend()
                self.tab.release()
            self.settle(finish)
        self.family.leave(self)
        self.engine.scheduler.queue(self.free)
        return True

    def _freeze(self) -> None:
        """Fixes Work before the memory goes."""
        self._work = self.work
        total, steps = self._mean
        self._mean = (self._work.kv_bytes_mean, 1) if not steps else (total, steps)

    def _idle(self, what: str) -> None:
        if self.closed:
            raise InvalidInput(f"a closed branch: open a new one to {what} it")
        if self.busy:
            raise InvalidInput(f"a step of this branch is awaited: {what} it when the step is done")
        if self.failure is not None:
            raise self.failure

    def no_tree(self) -> None:
        if self.reading is not None:
            raise InvalidInput("a tree of candidates after this branch is open: accept or close it first")

    def _twin(self, labels: Labels, limit: int | None) -> LocalBranch:
        """A branch with this one's past, billed for it as cached; its cache is copied later."""
        shared = self.tab.prompt.input + self.output
        prompt = Spend(input=shared, cached=shared, visual=self.tab.prompt.visual, calls=1)
        tab = self.engine.tab(self.call, prompt, labels, None if limit is None else max(0, limit))
        try:
            self.family.claim(self._tail() * self.engine.entry_nbytes)
        except BudgetExceeded:
            tab.release()
            raise
        twin = LocalBranch(self.call, self.engine, tab, self.sampler, self.family)
        twin.begun = True
        self.forked(twin)
        twin._bind()
        twin.pending, twin.embeds, twin.logits = list(self.pending), self.embeds, self.logits
        twin.hidden, twin._drawn, twin._parent = self.hidden, self._drawn, self
        return twin

    def _tail(self) -> int:
        """Entries that a fork takes at once: a block where this branch has an open tail, else none yet."""
        branch = self
        while branch.store is None and branch._parent is not None:
            branch = branch._parent
        return BLOCK if branch.store is not None and branch.store.tail else 0

    def _read(self, forced: list[int]) -> None:
        """Forced tokens must be read before the next draw, and outdate the logits."""
        if forced:
            self.pending = self.pending + forced
            self.logits = None

    def _feed(self, feed: Feed) -> None:
        weights = torch.as_tensor(feed.weights)
        vocab = self.engine.runner.vocab
        if weights.shape != (vocab,) or not bool(torch.isfinite(weights).all()):
            raise EngineError(f"Feed needs {vocab:,} finite weights: a tensor {list(weights.shape)} was given")
        self.embeds = self.engine.runner.mix(weights)
        self.pending = self.pending[1:]

    def _count(self, output: Output, seconds: float, prefill: int = 0) -> None:
        self._work = self._work + Work(
            prefill=prefill,
            kv_reads=output.kv_reads * self.engine.runner.layers,
            target_passes=int(not self.drafts),
            draft_passes=int(self.drafts),
            engine_seconds=seconds,
        )
        if not prefill:
            self._mean = (self._mean[0] + self.family.claimed, self._mean[1] + 1)

    def _measure(self) -> None:
        try:
            self.family.measure()
        except BudgetExceeded as refusal:
            self.tab.refusal, self.finish = refusal, "budget"

    def _only(self, output: Output) -> Tensor:
        if output.logits is None:
            raise EngineError("the model gave no logits")
        return output.logits[-1]
