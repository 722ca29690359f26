"""Drives a transformers model over packed rows: any mix of prefill, forced text and decode in one forward pass.

A `Row` brings new tokens for one store; `Runner.forward` packs the rows as `[1, S]`, calls the model's own forward
without a Cache object and without masks, and hands back what each row wanted. Rows longer than `max_chunk` run in
chunks, with the same result. Stores change only when the whole call has succeeded.

Not thread-safe: one thread at a time may call `forward`, `fork` and `close`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from thrifty.engines.local import evict
from thrifty.engines.local.attend import Piece, Plan, Step
from thrifty.engines.local.kv import BLOCK, Segment, Store, Tails, nbytes
from thrifty.engines.local.packed import PackedPlan
from thrifty.engines.local.rotation import Rotation
from thrifty.errors import InvalidInput

if TYPE_CHECKING:
    from thrifty.policy import AttentionPolicy, CachePolicy

Want = Literal["none", "last", "all"]


@dataclass(slots=True)
class Row:
    """New tokens for one store: `tokens` (ids, a sequence or an int64 tensor `[n]`) or `embeds` `[n, D]`.

    `want`: logits of the last new token, of all of them, or none. `hidden`: also the states of the last position.
    `final=False` says that more of the prompt follows in a later call: policies that act after the prefill wait.
    """

    store: Store
    tokens: Sequence[int] | Tensor | None = None
    embeds: Tensor | None = None
    want: Want = "last"
    hidden: bool = False
    final: bool = True


@dataclass(slots=True)
class Output:
    """What a row wanted: `logits` `[1, V]` (last), `[n, V]` (all) or None, in the model's dtype; `hidden` `[L + 1, D]`
    (embedding output, then each layer's, the last one as transformers gives it) or None.

    `kv_reads`: cache entries read for this row, a mean over layers, summed over its new tokens. `evicted`: entries
    dropped by cache policies in this call, summed over layers. `written`: new tokens.
    """

    logits: Tensor | None
    hidden: Tensor | None
    kv_reads: int
    written: int
    evicted: int = 0


class Runner:
    """One loaded model. `load.load` makes it; `load.check` has compared it with stock.

    `model` must have its attention implementation set to `attend.NAME` (`load.attach` does that).
    """

    def __init__(self, model: Any, max_chunk: int = 1024, slots: int = 16) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.layers = int(self.config.num_hidden_layers)
        self.vocab = int(self.config.vocab_size)
        self.max_positions = getattr(self.config, "max_position_embeddings", None)
        self.embedding = model.get_input_embeddings()
        self.device: torch.device = self.embedding.weight.device
        self.dtype: torch.dtype = self.embedding.weight.dtype
        self.max_chunk = max_chunk
        self.plan: Callable[[Sequence[Piece]], Plan] = PackedPlan
        self.tails = Tails(self.layers, self.device, slots)
        self.rotation = Rotation(model)
        self.reached: list[int] | None = None
        self.windows: list[int | None] | None = None

    def store(self, cache: Sequence[CachePolicy] = (), attention: Sequence[AttentionPolicy] = ()) -> Store:
        """An empty store, with this branch's policies."""
        return Store(self.tails, cache, attention)

    def embed(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Input embeddings `[n, D]` of token ids, as `Row.embeds` takes them."""
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            found: Tensor = self.embedding(ids)
        return found

    def mix(self, weights: Tensor) -> Tensor:
        """The embedding `[1, D]` of a mixture: `weights` `[V]` over the vocabulary (soft tokens)."""
        table = self.embedding.weight
        scale = getattr(self.embedding, "embed_scale", 1.0)
        with torch.no_grad():
            mixed: Tensor = (weights.to(table) @ table)[None] * scale
        return mixed

    def nbytes(self, stores: Sequence[Store]) -> int:
        """Bytes held by these stores, shared segments once, each open tail's block whole."""
        return nbytes(stores)

    def entry_nbytes(self) -> int:
        """Bytes of one entry over all layers, from the config (a figure for plans; `nbytes` is what is held)."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        return int(2 * self.layers * heads * width * self.dtype.itemsize)

    def forward(self, rows: Sequence[Row], between: Callable[[], None] | None = None) -> list[Output]:
        """Run the rows' new tokens and extend their stores; one Output a row, in order.

        `between` is called after each chunk but the last; it may run other stores forward, and end this by raising.
        Raises InvalidInput for a row without tokens, ids outside the vocabulary, a store given twice, or a row that
        would pass the model's context length. When the model fails, every store is as it was.
        """
        jobs = [self._job(row) for row in rows]
        if len({id(job.store) for job in jobs}) != len(jobs):
            raise InvalidInput("a store was given in two rows of one forward pass: fork it first")
        order = sorted(jobs, key=_packing_order)
        with torch.no_grad():
            while order:
                pieces, room = [], self.max_chunk
                for job in order:
                    if room <= 0:
                        break
                    piece = job.next_piece(room, self.max_chunk - room)
                    room -= piece.end - piece.start
                    pieces.append((job, piece))
                self._run(pieces)
                order = [job for job in order if job.done < job.total]
                if order and between is not None:
                    between()
            return [self._commit(job) for job in jobs]

    def _job(self, row: Row) -> _Job:
        if (row.tokens is None) == (row.embeds is None):
            raise InvalidInput("a row needs tokens or embeds, and not both")
        ids: list[int] | None = None
        embeds = None
        if row.tokens is not None:
            shape = not isinstance(row.tokens, Tensor) or row.tokens.dim() == 1
            ids = row.tokens.tolist() if isinstance(row.tokens, Tensor) else list(row.tokens)
            total = len(ids) if shape else 0
            if total and not 0 <= min(ids) <= max(ids) < self.vocab:
                raise InvalidInput(
                    f"token ids {min(ids)} to {max(ids)} were given: this model's vocabulary has 0 to {self.vocab - 1}"
                )
        else:
            embeds = row.embeds
            total = 0 if embeds is None else embeds.shape[0]
            shape = embeds is not None and embeds.shape[1:] == self.embedding.weight.shape[1:]
        if not shape:
            raise InvalidInput("a row's tokens must have shape [n], its embeds [n, D] with the model's D")
        if not total:
            raise InvalidInput("a row without new tokens: give at least one")
        store = row.store
        if self.max_positions is not None and store.next_position + total > self.max_positions:
            raise InvalidInput(
                f"{store.next_position + total} positions are needed: this model has {self.max_positions}; "
                "shorten the prompt or ask for fewer tokens"
            )
        if store.tail + total > BLOCK:
            store.seal()
        segment = None
        if total > BLOCK:
            small = bool(store.segments) and total < SMALL
            segment = Segment(self.layers, total, store.next_position, small)
        else:
            store.open_tail()
        return _Job(row, ids, embeds, total, segment)

    def _run(self, pieces: Sequence[tuple[_Job, Piece]]) -> None:
        """One forward pass of the model over packed pieces."""
        step = Step([piece for _, piece in pieces], self.plan)
        keep: list[int] = []
        for job, piece in pieces:
            if job.row.want == "all":
                keep.extend(range(piece.start, piece.end))
            elif job.row.want == "last" and job.done == job.total:
                keep.append(piece.end - 1)
        places = [at for _, p in pieces for at in range(p.position, p.position + p.end - p.start)]
        positions = torch.tensor([places], device=self.device)
        states = any(job.row.hidden and job.done == job.total for job, _ in pieces)
        extra = {"output_hidden_states": True} if states else {}
        out = self.model(
            **self._inputs(pieces),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=torch.tensor(keep, dtype=torch.int64, device=self.device),
            step=step,
            **extra,
        )
        if self.reached is None:
            self.reached, self.windows = step.reached, step.windows
        at = 0
        for job, piece in pieces:
            if job.segment is not None:
                job.segment.grow(job.done)
            n = piece.end - piece.start
            job.unread += step.unread(piece)
            wanted = n if job.row.want == "all" else int(job.row.want == "last" and job.done == job.total)
            if wanted:
                job.logits.append(out.logits[0, at : at + wanted])
                at += wanted
            if job.row.hidden and job.done == job.total:
                job.hidden = torch.stack([h[0, piece.end - 1] for h in out.hidden_states])

    def _inputs(self, pieces: Sequence[tuple[_Job, Piece]]) -> dict[str, Tensor]:
        if all(job.ids is not None for job, _ in pieces):
            ids: list[int] = []
            for job, piece in pieces:
                ids += (job.ids or [])[job.done - (piece.end - piece.start) : job.done]
            return {"input_ids": torch.tensor([ids], dtype=torch.int64, device=self.device)}
        parts = []
        for job, piece in pieces:
            mine = slice(job.done - (piece.end - piece.start), job.done)
            if job.ids is not None:
                parts.append(self.embed(job.ids[mine]))
            elif job.embeds is not None:
                parts.append(job.embeds[mine].to(self.device, self.dtype))
        return {"inputs_embeds": torch.cat(parts)[None]}

    def _commit(self, job: _Job) -> Output:
        """Make the new tokens part of the store, and let its cache policies act."""
        store, n = job.store, job.total
        reads = self._reads(store, n) - job.unread / self.layers
        if job.segment is not None:
            store.append(job.segment)
        else:
            store.tail += n
        store.next_position += n
        store.seen += n
        evicted = 0
        if store.prefilled:
            store.steps += 1
        if store.cache and job.row.final:
            evicted = evict.apply(store, self.rotation, after_prefill=not store.prefilled)
        store.prefilled = store.prefilled or job.row.final
        logits = torch.cat(job.logits) if len(job.logits) > 1 else job.logits[0] if job.logits else None
        return Output(logits, job.hidden, round(reads), n, evicted)

    def _reads(self, store: Store, n: int) -> float:
        """Entries that n new tokens read, the mean over layers, windows honoured."""
        windows = self.windows or [None] * self.layers
        if not store.cache:  # every layer holds as much
            held = store.length()
            each = {window: _visible(held, n, window) for window in set(windows)}
            return sum(each[window] for window in windows) / self.layers
        cases: dict[tuple[int, int | None], int] = {}
        for layer, window in enumerate(windows):
            case = (store.kept(layer), window)
            cases[case] = cases.get(case, 0) + 1
        return sum(times * _visible(held, n, window) for (held, window), times in cases.items()) / self.layers


SMALL = 512
"""Appended text shorter than this may be merged with its neighbours later."""


class _Job:
    """A row on its way through one `forward`."""

    __slots__ = ("row", "store", "ids", "embeds", "total", "segment", "done", "logits", "hidden", "unread")

    def __init__(
        self, row: Row, ids: list[int] | None, embeds: Tensor | None, total: int, segment: Segment | None
    ) -> None:
        self.row, self.store = row, row.store
        self.ids, self.embeds, self.total, self.segment = ids, embeds, total, segment
        self.done = 0
        self.logits: list[Tensor] = []
        self.hidden: Tensor | None = None
        self.unread = 0

    def next_piece(self, room: int, start: int) -> Piece:
        """The next at most `room` tokens, to stand at `start` of the packed step."""
        n = min(room, self.total - self.done)
        offset = self.done if self.segment is not None else self.store.tail + self.done
        piece = Piece(self.store, start, start + n, self.store.next_position + self.done, offset, self.segment)
        self.done += n
        return piece


def _packing_order(job: _Job) -> tuple[bool, bool, int, int]:
    """Rows under attention policies last; before them decode rows in the order of their tails, so that the tails of a
    batch are one slice of their page."""
    slot = job.store.slot
    where = (slot.page.number, slot.index) if slot is not None else (0, 0)
    return (bool(job.store.attention), job.total > 1, *where)


def _visible(held: int, n: int, window: int | None) -> int:
    """Sum over i in 1..n of min(held + i, window).

    >>> _visible(10, 2, None), _visible(10, 2, 11), _visible(0, 3, 2)
    (23, 22, 5)
    """
    if window is None or held + n <= window:
        return n * held + n * (n + 1) // 2
    short = max(0, window - held)
    return short * held + short * (short + 1) // 2 + (n - short) * window
