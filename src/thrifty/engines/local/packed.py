"""The attention plan for plain torch kernels: few calls, each over as many rows as possible, merged exactly.

A step's tokens meet their stores' entries in

* one call for each segment, over all rows that reference it (their queries stacked: shared keys are read once);
* one call for each run of blocks side by side in a page, whichever rows they belong to;
* one padded call a page for the open tails of all rows with one new token, and one for each row with several;
* one causal call for each row whose new tokens become a segment of their own;

and the partial results are merged by log-sum-exp in fp32. Query heads that share a key head are folded into rows, so
keys and values are repeated only inside a causal call. What depends on the step alone (which rows, which slots, index
vectors, masks) is made once, not per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from thrifty.engines.local.attend import Piece, Spec
from thrifty.engines.local.dense import FEW, HIDDEN, MANY, dense, hide
from thrifty.engines.local.kv import Segment
from thrifty.engines.local.paged import (
    Among,
    LongTail,
    Partial,
    Read,
    Write,
    block_calls,
    page_of,
    tail_calls,
    tail_write,
    unfolded,
)


class PackedPlan:
    """One step's plan; see `attend.Plan`. `pieces` cover the packed tokens in order."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._size = pieces[-1].end
        self._calls: list[_Call] = []
        self._writes: list[Write] = []
        self._blocks: dict[int, Read] = {}
        self._plans: dict[int | None, tuple[list[_Call], Tensor | None]] = {}
        self._plan_new_entries()
        self._plan_segments()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for write in self._writes:
            write(layer, keys[0], values[0])

    def attend(self, layer: int, queries: Tensor, spec: Spec) -> Tensor:
        _, q_heads, size, width = queries.shape
        heads = self._heads(layer)
        grouped = queries[0].view(heads, q_heads // heads, size, width)
        calls, gather = self._plan(spec.window)
        parts = [call.run(layer, grouped, spec) for call in calls]
        if len(parts) == 1 and gather is None and spec.sinks is None and parts[0][0].shape[0] == size:
            out = parts[0][0]
        else:
            out = self._merged(parts, gather, spec.sinks)
        return out.to(queries.dtype).reshape(1, size, q_heads, -1)

    def _heads(self, layer: int) -> int:
        piece = self._pieces[0]
        slabs = piece.segment.keys[layer] if piece.segment is not None else page_of(piece.store).keys[layer]
        return slabs.shape[-3]

    def _plan(self, window: int | None) -> tuple[list[_Call], Tensor | None]:
        """The calls of layers with this window, and where each token's partial results are: made once a step."""
        if not self._blocks:
            window = None  # the other calls look at the window themselves
        plan = self._plans.get(window)
        if plan is None:
            calls = [*self._calls, *block_calls(self._blocks.values(), window)]
            plan = calls, _merge_table(calls, self._size, self._pieces[0].store.tails.device)
            self._plans[window] = plan
        return plan

    def _plan_new_entries(self) -> None:
        """Calls on open tails and on segments in the making, and the writes into both."""
        singles: list[Piece] = []
        for piece in self._pieces:
            if piece.segment is not None:
                self._calls.append(_NewSegment(piece, piece.segment))
                self._writes.append(_segment_write(piece, piece.segment))
            elif piece.end - piece.start > 1:
                self._calls.append(LongTail(piece))
                self._writes.append(tail_write(piece))
            else:
                singles.append(piece)
        if singles:
            calls, writes = tail_calls(singles)
            self._calls += calls
            self._writes += writes

    def _plan_segments(self) -> None:
        """Who reads which segments and blocks; rows with marks of their own read their first segment by themselves."""
        readers: dict[tuple[int, int], tuple[Segment, list[Piece]]] = {}
        for piece in self._pieces:
            own = id(piece.store) if piece.store.marked else 0
            for i, segment in enumerate(piece.store.segments):
                if segment.slot is not None and (i or not own):
                    self._blocks.setdefault(id(segment), Read(segment)).add(piece, i)
                else:
                    readers.setdefault((id(segment), 0 if i else own), (segment, []))[1].append(piece)
            if piece.segment is not None and piece.offset:
                readers[id(piece.segment), 0] = (piece.segment, [piece])
        for (_, own), (segment, pieces) in readers.items():
            self._calls.append(_Shared(segment, pieces, pieces[0].store.alive if own else None))

    def _merged(self, parts: Sequence[Partial], gather: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Partial results merged a token: `[S, H_kv, G, Dv]`."""
        outs, sums = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        if gather is None:
            outs, sums = outs.view(-1, self._size, *outs.shape[1:]), sums.view(-1, self._size, *sums.shape[1:])
        else:
            outs = torch.cat([outs, outs.new_zeros(1, *outs.shape[1:])])[gather]
            sums = torch.cat([sums, sums.new_full((1, *sums.shape[1:]), HIDDEN)])[gather]
        if sinks is None:
            weights = torch.softmax(sums, dim=0)
        else:
            extra = sinks.to(sums.dtype).view(1, 1, *sums.shape[2:]).expand(1, self._size, -1, -1)
            weights = torch.softmax(torch.cat([sums, extra]), dim=0)[:-1]
        return (outs * weights[..., None]).sum(0)


# -- calls -----------------------------------------------------------------------------------------------------


class _Call(Protocol):
    """Attention of some tokens to some entries. `tokens`: the packed tokens its partial results are about, in order;
    `ranks`: the order in which each token's are summed (blocks by their place in its history, the others before)."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def ranks(self) -> Sequence[int]: ...

    def run(self, layer: int, grouped: Tensor, spec: Spec) -> Partial:
        """Queries `[H_kv, G, S, D]` of the whole step to this call's partial results."""


class _Shared:
    """All rows that read a segment, whose entries all come before the rows' tokens. `alive`: the marks of the one row
    that has some. Long segments are cut into parts of equal length, so that every thread has the same work."""

    def __init__(self, segment: Segment, pieces: Sequence[Piece], alive: Sequence[Tensor | None] | None) -> None:
        self._segment, self._pieces, self._alive = segment, pieces, alive
        self._own = [t for p in pieces for t in range(p.start, p.end)]
        first, last = self._own[0], self._own[-1]
        self._span = (first, last + 1) if last - first + 1 == len(self._own) else None
        self._oldest = min(p.position for p in pieces)
        self._newest = max(p.position + p.end - p.start - 1 for p in pieces)
        self._biases: dict[Any, Tensor] = {}
        self._index: Tensor | None = None
        self._asking: Tensor | None = None
        heads = segment.keys[0].shape[0]
        self._parts = 1
        if segment.keys[0].device.type == "cpu" and alive is None and len(self._own) <= FEW:
            most = MANY if segment.keys[0].dtype == torch.bfloat16 else math.inf
            if LONG <= max(segment.lengths) < most:
                self._parts = _parts(heads)
        self.tokens = self._own * self._parts
        self.ranks = [-1] * len(self.tokens)

    def run(self, layer: int, grouped: Tensor, spec: Spec) -> Partial:
        segment, n = self._segment, len(self._own)
        heads, group, _, width = grouped.shape
        start, length = 0, segment.lengths[layer]
        bias = None
        if spec.window is not None and self._newest - segment.first >= spec.window:
            if segment.contiguous:
                start = max(0, self._oldest - spec.window + 1 - segment.first)
            elif self._oldest - segment.last >= spec.window:
                start = length
            if start < length and not (segment.contiguous and self._oldest == self._newest):
                bias = self._window(layer, start, spec.window, group, grouped.dtype)
        if start >= length:
            return _nothing(grouped, n * self._parts, segment.values[layer].shape[-1])
        alive = self._alive[layer] if self._alive is not None else None
        if alive is not None:
            marks = self._marks(alive[:, start:length], id(alive), grouped.dtype)
            bias = marks if bias is None else bias + marks
        if self._span is not None:
            asked = grouped[:, :, self._span[0] : self._span[1]]
        else:
            if self._index is None:
                self._index = torch.tensor(self._own, device=grouped.device)
            asked = grouped.index_select(2, self._index)
        folded = asked.transpose(1, 2).reshape(1, heads, n * group, width)
        keys, values = segment.keys[layer], segment.values[layer]
        if self._parts > 1 and bias is None and start == 0 and -(-length // self._parts) * self._parts <= keys.shape[1]:
            return self._in_parts(folded, keys, values, length, n, spec)
        out, sums = dense(folded, keys[None, :, start:length], values[None, :, start:length], *spec.kernel(bias))
        found = unfolded(out, sums, n, group)
        if self._parts == 1:
            return found
        blank = _nothing(grouped, n * (self._parts - 1), values.shape[-1])
        return torch.cat([found[0], blank[0]]), torch.cat([found[1], blank[1]])

    def _in_parts(self, folded: Tensor, keys: Tensor, values: Tensor, length: int, n: int, spec: Spec) -> Partial:
        """The same as one call, as `parts` calls at once; the last part may hold a few keys less."""
        parts, (_, heads, rows, _) = self._parts, folded.shape
        each = -(-length // parts)
        keys, values = (t[:, : each * parts].view(heads, parts, each, -1).transpose(0, 1) for t in (keys, values))
        bias = None
        if each * parts != length:
            bias = self._biases.get(length)
            if bias is None:
                seen = torch.arange(each * parts, device=keys.device) < length
                bias = self._biases[length] = hide(seen, folded.dtype).view(parts, 1, 1, each)
        out, sums = dense(folded.expand(parts, -1, -1, -1), keys, values, *spec.kernel(bias))
        return (
            out.view(parts, heads, n, rows // n, -1).transpose(1, 2).flatten(0, 1),
            sums.view(parts, heads, n, rows // n).transpose(1, 2).flatten(0, 1),
        )

    def _marks(self, alive: Tensor, name: int, dtype: torch.dtype) -> Tensor:
        """Bias `[1, H_kv, 1, T]`; layers that dropped the same entries share their marks."""
        bias = self._biases.get(name)
        if bias is None or bias.shape[-1] != alive.shape[-1]:
            bias = self._biases[name] = hide(alive, dtype)[None, :, None]
        return bias

    def _window(self, layer: int, start: int, window: int, group: int, dtype: torch.dtype) -> Tensor:
        """Bias `[1, 1 or H_kv, n * G, T]`."""
        positions = self._segment.entries(layer)[2][..., start:]
        name = (id(self._segment.positions[layer]), start, window)
        bias = self._biases.get(name)
        if bias is None:
            if self._asking is None:
                self._asking = torch.cat([_range(p.position, p.end - p.start, positions.device) for p in self._pieces])
            visible = positions[..., None, :] > self._asking[:, None] - window  # [n, T] or [H_kv, n, T]
            bias = hide(visible, dtype).repeat_interleave(group, dim=-2)
            bias = self._biases[name] = bias[None] if bias.dim() == 3 else bias[None, None]
        return bias


LONG = 1024
"""A segment at least this long is cut into parts when few tokens read it."""


class _NewSegment:
    """A row's new tokens among themselves, where they become (part of) a segment."""

    def __init__(self, piece: Piece, segment: Segment) -> None:
        self._piece, self._segment = piece, segment
        self.tokens = range(piece.start, piece.end)
        self.ranks = [-1] * len(self.tokens)
        self._among = Among(0, piece.end - piece.start)

    def run(self, layer: int, grouped: Tensor, spec: Spec) -> Partial:
        piece = self._piece
        mine = slice(piece.offset, piece.offset + piece.end - piece.start)
        keys, values = self._segment.keys[layer][None, :, mine], self._segment.values[layer][None, :, mine]
        return self._among.run(grouped[:, :, piece.start : piece.end], keys, values, spec)


# -- details ---------------------------------------------------------------------------------------------------


def _nothing(grouped: Tensor, n: int, width: int) -> Partial:
    """Partial results of tokens that see no entry."""
    heads, group = grouped.shape[:2]
    wide = torch.promote_types(grouped.dtype, torch.float32)
    return grouped.new_zeros(n, heads, group, width), grouped.new_full((n, heads, group), HIDDEN, dtype=wide)


def _parts(heads: int) -> int:
    """Into how many parts (at most 8, as capacities are rounded) each head is cut so that threads have equal work."""
    threads = torch.get_num_threads()
    return next((p for p in (1, 2, 4) if heads * p % threads == 0), 8)


def _merge_table(calls: Sequence[_Call], size: int, device: torch.device) -> Tensor | None:
    """`[P, S]`: where each token's partial results stand among all of them (one past the last: none). None where every
    call is about all tokens in order, so that no table is needed."""
    everything = list(range(size))
    if all(len(c.tokens) % size == 0 and list(c.tokens) == everything * (len(c.tokens) // size) for c in calls):
        return None
    places: list[list[tuple[int, int]]] = [[] for _ in everything]
    at = 0
    for call in calls:
        for token, rank in zip(call.tokens, call.ranks, strict=True):
            places[token].append((rank, at))
            at += 1
    for mine in places:
        mine.sort()  # which of a token's blocks lie in one page must not change its sums
    most = max(len(p) for p in places)
    return torch.tensor([[p[i][1] if i < len(p) else at for p in places] for i in range(most)], device=device)


def _segment_write(piece: Piece, segment: Segment) -> Write:
    start, end, offset = piece.start, piece.end, piece.offset

    def write(layer: int, keys: Tensor, values: Tensor) -> None:
        segment.write(layer, offset, keys[:, start:end], values[:, start:end])

    return write


def _range(start: int, n: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + n, device=device)
