"""Log-probabilities of given texts by the local engine's model: what `score` of the engine does.

A text is read after a start token and its context in windows of at most `WINDOW` tokens, each a fork of the store that
has read the context, so a context is prefilled once for all its texts and windows. A window after the first repeats the
last sixteenth of a full one, so every token has at least that much before it, and a long text costs at most 16/15 of
its tokens. Forward passes run on the model's thread in slices of a bounded number of logits, other branches between
them: memory does not grow with the text.

Invariants: every token is scored once; what was computed is settled once, also when the caller goes; each slice is
checked against the budget before it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thrifty.budget import Account, Hold
from thrifty.engine import Scores, TokenScores
from thrifty.engines.generation import stamped
from thrifty.engines.local.kv import BLOCK, Store
from thrifty.engines.local.runner import Row, Runner
from thrifty.engines.local.spans import encode, start_of
from thrifty.engines.local.turns import Told, told
from thrifty.errors import EngineError, ThriftyError
from thrifty.ledger.entry import Labels
from thrifty.spend import Spend, Work

if TYPE_CHECKING:
    from thrifty.engines.local.engine import LocalEngine

WINDOW = 4096
"""Tokens of a text that are read at once, at most."""

OVERLAP = 16
"""A window repeats one part in so many of a full one."""

POSITIONS = 32_768
"""Of a model that states no limit."""

LEAD = 4
"""Tokens before a text, such as the start alone, that are read with it."""

LOGITS = 2**26
"""Logits computed at once, at most (256 MiB in fp32)."""

ROWS = 64
"""Logits of so many tokens are normalised at once: what stays in a processor's cache takes half the time."""


async def score(
    engine: LocalEngine, texts: Sequence[str], account: Account, labels: Labels, context: str | Sequence[str] = ""
) -> Scores:
    """See `thrifty.engine.score`; the number of contexts was checked."""
    contexts = [context] * len(texts) if isinstance(context, str) else list(context)
    start = start_of(engine.codec)
    read = [encode(engine.codec, text) for text in texts]
    groups: list[_Group] = []
    by_context: dict[str, _Group] = {}
    for i, given in enumerate(contexts):
        if given not in by_context:
            by_context[given] = _Group([*start, *encode(engine.codec, given)[0]])
            groups.append(by_context[given])
        by_context[given].texts.append(i)
    lengths = [len(ids) for ids, _ in read]
    cut = sum(group.lay_out(lengths, engine.runner.max_positions or POSITIONS, len(start)) for group in groups)
    found = [np.full(n, np.nan) for n in lengths]
    groups = [group for group in groups if group.windows]
    spend, work = Spend(), Work()
    if groups:
        spend, work = await _Run(engine, [ids for ids, _ in read], found, groups).settle(account, labels)
    scored = tuple(TokenScores(row, spans) for row, (_, spans) in zip(found, read, strict=True))
    return Scores(scored, spend, work, cut)


# -- windows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, stop) of one text are read; those from `new` on are scored."""

    text: int
    start: int
    new: int
    stop: int

    @property
    def size(self) -> int:
        """Tokens that are read."""
        return self.stop - self.start


def windows(text: int, n: int, room: int) -> Iterator[Window]:
    """Windows over the n tokens of a text, each of at most `room`.

    >>> [(w.start, w.new, w.stop) for w in windows(0, 40, 16)]
    [(0, 0, 16), (15, 16, 31), (30, 31, 40)]
    """
    overlap = max(1, room // OVERLAP)
    start = new = 0
    while new < n:
        stop = min(n, start + room)
        yield Window(text, start, new, stop)
        start, new = stop - overlap, stop


def _parts(window: Window, first: int, most: int) -> Iterator[Window]:
    """A window in slices: the first of `first` tokens, the others of `most`."""
    at = window.start
    while at < window.stop:
        stop = min(window.stop, at + (first if at == window.start else most))
        yield replace(window, start=at, new=max(window.new, at), stop=stop)
        at = stop


@dataclass(slots=True)
class _Group:
    """Texts with one context. `prefix`: the start and the context's tokens."""

    prefix: list[int]
    texts: list[int] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)

    @property
    def lead(self) -> list[int]:
        """A prefix so short that each window reads it itself: a fork would cost more."""
        return self.prefix if len(self.prefix) <= LEAD else []

    @property
    def shared(self) -> list[int]:
        """A prefix that is read once."""
        return [] if len(self.prefix) <= LEAD else self.prefix

    def lay_out(self, lengths: Sequence[int], positions: int, start: int) -> int:
        """Makes the windows. A context that leaves the texts less than they need, and less than a quarter of the
        model's positions, loses its beginning; returns how many tokens."""
        longest = max(lengths[i] for i in self.texts)
        least = min(WINDOW, longest, max(1, positions // 4))
        cut = max(0, len(self.prefix) + least - positions)
        del self.prefix[start : start + cut]
        room = max(2, min(WINDOW, positions - len(self.prefix)))
        self.windows = [w for i in self.texts for w in windows(i, lengths[i], room)]
        return cut


# -- running them ----------------------------------------------------------------------------------------------


class _Run:
    """One request on the model's thread, in slices. `found` is filled; what was done is counted as it is done."""

    def __init__(self, engine: LocalEngine, ids: list[list[int]], found: list[Any], groups: Sequence[_Group]) -> None:
        self.engine, self.ids, self.found, self.groups = engine, ids, found, groups
        self.runner: Runner = engine.runner
        room = max(16, LOGITS // self.runner.vocab)
        self.slice = min(self.runner.max_chunk, 1 << room.bit_length() - 1)  # odd sizes are slower to multiply
        self.spend, self.work = Spend(), Work()
        self.over = False
        self.prefix: Store | None = None
        self.open: list[Store] = []
        self.last: Tensor | None = None
        """logits [V] behind the prefix"""
        self.fresh = False
        """the prefix was read, and no window yet"""
        self.before: Tensor | None = None
        """logits [V] behind the slice before, of a window that takes several"""

    async def settle(self, account: Account, labels: Labels) -> tuple[Spend, Work]:
        """Holds all of it, runs, and settles what was run. Raises BudgetExceeded, EngineError."""
        engine = self.engine
        mine = stamped(labels, engine.name, engine.model, engine.prices)
        hold = account.hold(self._priced(self._bill(), labels), self._bound(), labels=mine)
        claimed = 0
        try:
            nbytes = self._entries() * engine.entry_nbytes
            account.claim(nbytes)
            claimed = nbytes
            self.work = Work(kv_bytes_peak=nbytes)
            for job in self._jobs():
                account.check_deadline()
                await self._on_thread(job, hold)
        except BaseException:
            self.over = True
            if self.spend:
                hold.book(self._priced(self.spend, labels), self.work)
            else:
                hold.release()
            raise
        finally:
            engine.scheduler.queue(self._free)
            account.claim(-claimed)
        spend = self._priced(self.spend, labels)
        await hold.settle_async(spend, self.work)
        return spend, self.work

    async def _on_thread(self, job: Callable[[], None], hold: Hold) -> None:
        """Runs one slice on the model's thread and counts its seconds, which are held a little ahead."""
        ahead = self.work.engine_seconds + max(0.02, self.work.engine_seconds / 4)
        hold.grow(Spend(), Work(engine_seconds=max(0.0, ahead - self._held)))
        self._held = max(self._held, ahead)

        def start(tell: Told) -> None:
            def run() -> None:
                try:
                    if self.over:
                        return
                    self.engine.scheduler._refuse_stopped()
                    begun = time.perf_counter()
                    job()
                    self.work += Work(engine_seconds=time.perf_counter() - begun)
                except ThriftyError as error:
                    tell(error)
                except Exception as error:
                    known = EngineError(f"the local engine failed: {type(error).__name__}: {error}")
                    known.__cause__ = error
                    tell(known)
                else:
                    tell(None)

            self.engine.scheduler.queue(run)

        await told(start)

    _held = 0.0
    """seconds that are held"""

    # -- on the model's thread ---------------------------------------------------------------------------------

    def _jobs(self) -> Iterator[Callable[[], None]]:
        """The slices in order: of each group its prefix, then its windows, short ones packed together."""
        for group in self.groups:
            yield self._free
            lead, shared = group.lead, group.shared
            for at in range(0, len(shared), self.slice):
                yield partial(self._read_prefix, shared[at : at + self.slice], at + self.slice >= len(shared))
            packed: list[Window] = []
            used = 0
            for window in group.windows:
                if len(lead) + window.size > self.slice:
                    for part in _parts(window, self.slice - len(lead), self.slice):
                        yield partial(self._read_part, part, lead if part.start == window.start else [], window)
                    continue
                if packed and used + len(lead) + window.size > self.slice:
                    yield partial(self._read_windows, packed, lead)
                    packed, used = [], 0
                packed.append(window)
                used += len(lead) + window.size
            if packed:
                yield partial(self._read_windows, packed, lead)

    def _read_prefix(self, tokens: list[int], final: bool) -> None:
        if self.prefix is None:
            self.prefix = self.runner.store()
        output = self.runner.forward([Row(self.prefix, tokens, want="last" if final else "none", final=final)])[0]
        if final and output.logits is not None:
            self.last = output.logits[-1]
        self.fresh = final
        self._count(len(tokens), 0, output.kv_reads, int(final))

    def _read_windows(self, packed: Sequence[Window], lead: list[int]) -> None:
        """Whole windows in one forward pass."""
        rows = [Row(self._fork(), lead + self._tokens(w), want="all") for w in packed]
        for window, output in zip(packed, self.runner.forward(rows), strict=True):
            if output.logits is not None:
                before = output.logits[len(lead) - 1] if lead else self.last
                self._take(window, output.logits[len(lead) :], before)
            self._count(len(lead) + window.size, self._again(), output.kv_reads, 1)
        self._close()

    def _read_part(self, part: Window, lead: list[int], window: Window) -> None:
        """One slice of a window that is too long for one pass."""
        begins = part.start == window.start
        if begins:
            self._close()
            self._fork()
            self.before = self.last
        output = self.runner.forward([Row(self.open[0], lead + self._tokens(part), want="all")])[0]
        if output.logits is not None:
            before = output.logits[len(lead) - 1] if lead else self.before
            self._take(part, output.logits[len(lead) :], before)
            self.before = output.logits[-1].clone()
        self._count(len(lead) + part.size, self._again() if begins else 0, output.kv_reads, int(begins))

    def _again(self) -> int:
        """Tokens of the prefix that a window has besides its own: none the first time, as they are billed already."""
        fresh, self.fresh = self.fresh, False
        return 0 if fresh or self.prefix is None else self.prefix.next_position

    def _count(self, read: int, cached: int, reads: int, passes: int) -> None:
        self.spend += Spend(input=read + cached, cached=cached, calls=0 if self.spend else 1)
        self.work += Work(read, self.runner.layers * reads, passes)

    def _take(self, window: Window, logits: Tensor, before: Tensor | None) -> None:
        """Puts the new tokens' log-probabilities in place: `logits` [n, V] follow the tokens of the window, `before`
        [V] those in front of it; a window after the first has repeated some, and does not need it."""
        ids, found = self.ids[window.text], self.found[window.text]
        first = window.new
        if first == window.start:
            if before is not None:  # else there is nothing to read before the first
                found[first] = _chosen(before[None], ids[first : first + 1])[0]
            first += 1
        for at in range(first, window.stop, ROWS):
            stop = min(at + ROWS, window.stop)
            rows = logits[at - 1 - window.start : stop - 1 - window.start]
            found[at:stop] = _chosen(rows, ids[at:stop])

    def _tokens(self, window: Window) -> list[int]:
        return self.ids[window.text][window.start : window.stop]

    def _fork(self) -> Store:
        store = self.runner.store() if self.prefix is None else self.prefix.fork()
        self.open.append(store)
        return store

    def _close(self) -> None:
        for store in self.open:
            store.close()
        self.open = []

    def _free(self) -> None:
        """Gives all memory back."""
        self._close()
        if self.prefix is not None:
            self.prefix.close()
        self.prefix = self.last = self.before = None

    # -- what it will take -------------------------------------------------------------------------------------

    def _priced(self, spend: Spend, labels: Labels) -> Spend:
        prices = self.engine.prices
        return spend if prices is None else prices.with_price(spend, self.engine.model, labels.role)

    def _bill(self) -> Spend:
        """A context is input once for each window that follows it, all but the first time cached."""
        read = sum(len(g.lead) + w.size for g in self.groups for w in g.windows)
        once = sum(len(g.shared) for g in self.groups)
        cached = sum(len(g.shared) * (len(g.windows) - 1) for g in self.groups)
        return Spend(input=read + once + cached, cached=cached, calls=1)

    def _bound(self) -> Work:
        prefill = reads = passes = 0
        for group in self.groups:
            p, sizes = len(group.shared), [len(group.lead) + w.size for w in group.windows]
            prefill += p + sum(sizes)
            reads += p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in sizes)
            passes += len(group.windows) + (p > 0)
        return Work(prefill, self.runner.layers * (reads + prefill), passes)

    def _entries(self) -> int:
        """Entries alive at once, at most: a prefix, and one long window or a slice of short ones."""
        rows = 1 + max(len(g.windows) for g in self.groups)
        longest = max(w.size for g in self.groups for w in g.windows)
        prefix = max(len(g.prefix) for g in self.groups)
        return prefix + max(longest, min(rows * longest, self.slice)) + BLOCK * min(rows, self.slice)


def _chosen(logits: Tensor, ids: Sequence[int]) -> Any:
    """Log-probabilities float64 [n] of n tokens under logits [n, V]; fp32 inside, fp64 for a model in it."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    asked = torch.tensor(ids, device=wide.device)
    return (wide.gather(1, asked[:, None])[:, 0] - wide.logsumexp(1)).double().cpu().numpy()
