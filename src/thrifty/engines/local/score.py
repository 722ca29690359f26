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
from thrifty.engines.local.prompt import TextCodec
from thrifty.engines.local.runner import Row, Runner
from thrifty.engines.local.turns import Told, told
from thrifty.errors import EngineError, ThriftyError, Unsupported
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

LOGITS = 2**25
"""Logits computed at once, at most (128 MiB in fp32)."""

ROWS = 64
"""Logits of so many tokens are normalised at once: what stays in a processor's cache takes half the time."""

PIECE = 100_000
"""Characters that are tokenised at once; a longer text is cut at white space where there is some."""


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


# -- texts and windows -----------------------------------------------------------------------------------------


def start_of(codec: TextCodec) -> list[int]:
    """What stands before a whole text: the tokenizer's own special tokens, else its begin or end token, else nothing
    (then a text's first token has no score)."""
    bare, whole = codec.encode("a"), codec.encode("a", special=True)
    if bare and bare[0] in whole[1:]:
        return whole[: whole.index(bare[0])]
    ends = (getattr(codec.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next(([int(token)] for token in ends if token is not None), [])


def encode(codec: TextCodec, text: str) -> tuple[list[int], Any]:
    """Token ids of a text, and their spans int64 [n, 2] as `TokenScores` has them. Lone surrogates, as of invalid
    UTF-8, are read as U+FFFD. Raises Unsupported for a tokenizer that does not tell where its tokens stand."""
    backend = getattr(codec.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unsupported(f"{type(codec.tokenizer).__name__} tells no offsets: a model with a fast tokenizer is needed")
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for at, piece in _pieces("".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)):
        with codec._lock:
            encoded = backend.encode(piece, add_special_tokens=False)
        ids += encoded.ids
        spans += [(at + first, at + stop) for first, stop in encoded.offsets]
    return ids, _covering(spans, len(text))


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    at = 0
    while at < len(text):
        stop = min(len(text), at + PIECE)
        if stop < len(text):
            space = max(text.rfind(" ", at + PIECE // 2, stop), text.rfind("\n", at + PIECE // 2, stop))
            stop = space if space > 0 else stop
        yield at, text[at:stop]
        at = stop


def _covering(spans: Sequence[tuple[int, int]], length: int) -> Any:
    """Offsets as tokenizers give them leave out white space: each token takes what lies between it and the last."""
    found = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    if not len(found):
        return found
    found[:, 1] = np.maximum.accumulate(found[:, 1])
    found[-1, 1] = length
    before = np.concatenate([[0], found[:-1, 1]])
    found[:, 0] = np.minimum(np.maximum.accumulate(found[:, 0]), before)
    return found


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


@dataclass(slots=True)
class _Group:
    """Texts with one context. `prefix`: the start and the context's tokens."""

    prefix: list[int]
    texts: list[int] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)

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
        self.slice = max(16, min(self.runner.max_chunk, LOGITS // self.runner.vocab))
        self.spend, self.work = Spend(), Work()
        self.over = False
        self.prefix: Store | None = None
        self.open: list[Store] = []
        self.last: Tensor | None = None
        """logits [V] behind the prefix"""
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
        calls = 1
        for group in self.groups:
            yield self._free
            size = len(group.prefix)
            for at in range(0, size, self.slice):
                yield partial(self._read_prefix, group.prefix[at : at + self.slice], at + self.slice >= size)
            packed: list[Window] = []
            first = True
            for window in [*group.windows, None]:
                full = packed and (window is None or sum(w.size for w in packed) + window.size > self.slice)
                if full:
                    yield partial(self._read_windows, packed, size, first, calls)
                    packed, first, calls = [], False, 0
                if window is None:
                    continue
                if window.size <= self.slice:
                    packed.append(window)
                    continue
                for at in range(window.start, window.stop, self.slice):
                    part = replace(window, start=at, new=max(window.new, at), stop=min(window.stop, at + self.slice))
                    yield partial(self._read_slice, part, at == window.start, size, first, calls)
                    first, calls = False, 0

    def _read_prefix(self, tokens: list[int], final: bool) -> None:
        if self.prefix is None:
            self.prefix = self.runner.store()
        row = Row(self.prefix, tokens, want="last" if final else "none", final=final)
        output = self.runner.forward([row])[0]
        if final and output.logits is not None:
            self.last = output.logits[-1]
        self.work += Work(len(tokens), self.runner.layers * output.kv_reads, int(final))

    def _read_windows(self, packed: Sequence[Window], size: int, first: bool, calls: int) -> None:
        """Whole windows in one forward pass."""
        stores = [self._fork() for _ in packed]
        rows = [Row(s, self._tokens(w), want="all") for s, w in zip(stores, packed, strict=True)]
        outputs = self.runner.forward(rows)
        for window, output in zip(packed, outputs, strict=True):
            if output.logits is not None:
                self._take(window, output.logits, self.last if window.start == 0 else None)
            self._count(window, output.kv_reads, size, 0 if first else size, calls, passes=1)
            first, calls = False, 0
        self._close()

    def _read_slice(self, part: Window, begins: bool, size: int, first: bool, calls: int) -> None:
        """One slice of a window that is too long for one pass."""
        if begins:
            self._close()
            self._fork()
            self.before = self.last if part.start == 0 else None
        output = self.runner.forward([Row(self.open[0], self._tokens(part), want="all")])[0]
        if output.logits is not None:
            self._take(part, output.logits, self.before)
            self.before = output.logits[-1].clone()
        shared = size if begins else 0
        self._count(part, output.kv_reads, shared, 0 if first else shared, calls, passes=int(begins))

    def _count(self, window: Window, reads: int, prefix: int, cached: int, calls: int, passes: int) -> None:
        self.spend += Spend(input=prefix + window.size, cached=cached, calls=calls)
        self.work += Work(window.size, self.runner.layers * reads, passes)

    def _take(self, window: Window, logits: Tensor, before: Tensor | None) -> None:
        """Puts the new tokens' log-probabilities in place: `logits` [n, V] follow the tokens of the window, `before`
        [V] those in front of it."""
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
        read = sum(w.size for g in self.groups for w in g.windows)
        prefixes = sum(len(g.prefix) * len(g.windows) for g in self.groups)
        return Spend(input=read + prefixes, cached=prefixes - sum(len(g.prefix) for g in self.groups), calls=1)

    def _bound(self) -> Work:
        prefill = reads = passes = 0
        for group in self.groups:
            p = len(group.prefix)
            prefill += p + sum(w.size for w in group.windows)
            reads += p * (p + 1) // 2 + sum(w.size * p + w.size * (w.size + 1) // 2 for w in group.windows)
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
