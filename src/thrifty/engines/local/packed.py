"""The attention plan for plain torch kernels: few calls, each over as many rows as possible, merged exactly.

A step's tokens meet their stores' entries in

* one call for each segment, over all rows that reference it (their queries stacked: shared keys are read once);
* one padded call for the open tails of all rows with one new token, and one for each row with several;
* one causal call for each row whose new tokens become a segment of their own;

and the partial results are merged by log-sum-exp in fp32. Query heads that share a key head are folded into rows, so
keys and values are repeated only inside a causal call. What depends on the step alone (which rows, which slots, index
vectors, masks) is made once, not per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from thrifty.engines.local.attend import Piece, Spec
from thrifty.engines.local.dense import FEW, HIDDEN, MANY, causal, dense, hide
from thrifty.engines.local.kv import Page, Segment, Store

Partial = tuple[Tensor, Tensor]
"""Outputs `[n, H_kv, G, Dv]` and log-sum-exps `[n, H_kv, G]`."""


class PackedPlan:
    """One step's plan; see `attend.Plan`. `pieces` cover the packed tokens in order."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._size = pieces[-1].end
        self._calls: list[_Call] = []
        self._writes: list[Callable[[int, Tensor, Tensor], None]] = []
        self._plan_new_entries()
        self._plan_segments()
        self._gather = _merge_table(self._calls, self._size, pieces[0].store.tails.device)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for write in self._writes:
            write(layer, keys[0], values[0])

    def attend(self, layer: int, queries: Tensor, spec: Spec) -> Tensor:
        _, q_heads, size, width = queries.shape
        heads = self._heads(layer)
        grouped = queries[0].view(heads, q_heads // heads, size, width)
        parts = [call.run(layer, grouped, spec) for call in self._calls]
        if len(parts) == 1 and self._gather is None and spec.sinks is None and parts[0][0].shape[0] == size:
            out = parts[0][0]
        else:
            out = self._merged(parts, spec.sinks)
        return out.to(queries.dtype).reshape(1, size, q_heads, -1)

    def _heads(self, layer: int) -> int:
        piece = self._pieces[0]
        slabs = piece.segment.keys[layer] if piece.segment is not None else _page(piece.store).keys[layer]
        return slabs.shape[-3]

    def _plan_new_entries(self) -> None:
        """Calls on open tails and on segments in the making, and the writes into both."""
        singles: dict[int, list[Piece]] = {}
        for piece in self._pieces:
            if piece.segment is not None:
                self._calls.append(_NewSegment(piece, piece.segment))
                self._writes.append(_segment_write(piece, piece.segment))
            elif piece.end - piece.start > 1:
                self._calls.append(_LongTail(piece))
                self._writes.append(_tail_write(piece))
            else:
                singles.setdefault(_page(piece.store).number, []).append(piece)
        for group in singles.values():
            self._calls.append(_Tails(group))
            self._writes.append(_tail_write(group[0]) if len(group) == 1 else _tails_write(group))

    def _plan_segments(self) -> None:
        """One call a segment, over the rows that read it; rows with marks of their own read it by themselves."""
        readers: dict[tuple[int, int], tuple[Segment, list[Piece]]] = {}
        for piece in self._pieces:
            own = id(piece.store) if piece.store.marked else 0
            for i, segment in enumerate(piece.store.segments):
                readers.setdefault((id(segment), 0 if i else own), (segment, []))[1].append(piece)
            if piece.segment is not None and piece.offset:
                readers[id(piece.segment), 0] = (piece.segment, [piece])
        for (_, own), (segment, pieces) in readers.items():
            self._calls.append(_Shared(segment, pieces, pieces[0].store.alive if own else None))

    def _merged(self, parts: Sequence[Partial], sinks: Tensor | None) -> Tensor:
        """Partial results merged a token: `[S, H_kv, G, Dv]`."""
        outs, sums = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        if self._gather is None:
            outs, sums = outs.view(-1, self._size, *outs.shape[1:]), sums.view(-1, self._size, *sums.shape[1:])
        else:
            outs = torch.cat([outs, outs.new_zeros(1, *outs.shape[1:])])[self._gather]
            sums = torch.cat([sums, sums.new_full((1, *sums.shape[1:]), HIDDEN)])[self._gather]
        if sinks is None:
            weights = torch.softmax(sums, dim=0)
        else:
            extra = sinks.to(sums.dtype).view(1, 1, *sums.shape[2:]).expand(1, self._size, -1, -1)
            weights = torch.softmax(torch.cat([sums, extra]), dim=0)[:-1]
        return (outs * weights[..., None]).sum(0)


# -- calls -----------------------------------------------------------------------------------------------------


class _Call(Protocol):
    """Attention of some tokens to some entries. `tokens`: the packed tokens its partial results are about, in order."""

    @property
    def tokens(self) -> Sequence[int]: ...

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
        found = _unfolded(out, sums, n, group)
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


class _Tails:
    """The open tails of rows with one new token each, in one padded call over a range of their page's slots."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.tokens = [p.start for p in pieces]
        self._page = _page(pieces[0].store)
        slots = [_index(p.store) for p in pieces]
        first = self.tokens[0]
        self._low, rows = min(slots), max(slots) + 1 - min(slots)
        self._rows = rows
        self._length = max(p.offset for p in pieces) + 1
        self._offsets = [p.offset for p in pieces]
        self._scatter: Tensor | None = None
        self._select: Tensor | None = None
        if slots != list(range(self._low, self._low + rows)) or self.tokens != list(range(first, first + rows)):
            where, offsets = [first] * rows, [0] * rows  # slots of other branches in between read anything
            for piece, slot in zip(pieces, slots, strict=True):
                where[slot - self._low], offsets[slot - self._low] = piece.start, piece.offset
            device = self._page.positions.device
            self._scatter = torch.tensor(where, device=device)
            self._select = torch.tensor([s - self._low for s in slots], device=device)
            self._offsets = offsets
        self._biases: dict[int | None, Tensor | None] = {}

    def run(self, layer: int, grouped: Tensor, spec: Spec) -> Partial:
        if self._scatter is None:
            asked = grouped[:, :, self.tokens[0] : self.tokens[0] + self._rows]
        else:
            asked = grouped.index_select(2, self._scatter)
        mine = slice(self._low, self._low + self._rows)
        keys = self._page.keys[layer][mine, :, : self._length]
        values = self._page.values[layer][mine, :, : self._length]
        out, sums = dense(asked.permute(2, 0, 1, 3), keys, values, *spec.kernel(self._bias(spec.window, grouped.dtype)))
        if self._select is None:
            return out, sums
        return out.index_select(0, self._select), sums.index_select(0, self._select)

    def _bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Bias `[R, 1, 1, T]`, or None where every row sees all that is read."""
        window = window if window is not None and window < self._length else None
        if window not in self._biases:
            bias = None
            if window is not None or len(set(self._offsets)) > 1:
                device = self._page.positions.device
                order = torch.arange(self._length, device=device)
                at = torch.tensor(self._offsets, device=device)[:, None]
                visible = order <= at if window is None else (order <= at) & (order > at - window)
                bias = hide(visible, dtype)[:, None, None]
            self._biases[window] = bias
        return self._biases[window]


class _LongTail:
    """Several new tokens of one row that fit its open tail."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self.tokens = range(piece.start, piece.end)
        self._among = _Among(piece.offset, piece.offset + piece.end - piece.start)

    def run(self, layer: int, grouped: Tensor, spec: Spec) -> Partial:
        piece = self._piece
        page, slot = _page(piece.store), _index(piece.store)
        length = piece.offset + piece.end - piece.start
        keys, values = (t[layer][slot : slot + 1, :, :length] for t in (page.keys, page.values))
        return self._among.run(grouped[:, :, piece.start : piece.end], keys, values, spec)


class _NewSegment:
    """A row's new tokens among themselves, where they become (part of) a segment."""

    def __init__(self, piece: Piece, segment: Segment) -> None:
        self._piece, self._segment = piece, segment
        self.tokens = range(piece.start, piece.end)
        self._among = _Among(0, piece.end - piece.start)

    def run(self, layer: int, grouped: Tensor, spec: Spec) -> Partial:
        piece = self._piece
        mine = slice(piece.offset, piece.offset + piece.end - piece.start)
        keys, values = self._segment.keys[layer][None, :, mine], self._segment.values[layer][None, :, mine]
        return self._among.run(grouped[:, :, piece.start : piece.end], keys, values, spec)


class _Among:
    """Tokens at `[offset, length)` of consecutive entries, each seeing itself and those before it."""

    def __init__(self, offset: int, length: int) -> None:
        self._offset, self._length = offset, length
        self._biases: dict[int | None, Tensor] = {}

    def run(self, asked: Tensor, keys: Tensor, values: Tensor, spec: Spec) -> Partial:
        heads, group, n, width = asked.shape
        window = spec.window if spec.window is not None and spec.window < self._length else None
        if self._offset == 0 and window is None:
            flat = asked.reshape(1, heads * group, n, width)
            out, sums = causal(flat, keys, values, spec.scale, spec.softcap)
            return out.view(heads, group, n, -1).permute(2, 0, 1, 3), sums.view(heads, group, n).permute(2, 0, 1)
        bias = self._biases.get(window)
        if bias is None:
            at = torch.arange(self._offset, self._length, device=asked.device)[:, None]
            order = torch.arange(self._length, device=asked.device)
            visible = order <= at if window is None else (order <= at) & (order > at - window)
            bias = self._biases[window] = hide(visible, asked.dtype).repeat_interleave(group, dim=0)[None, None]
        folded = asked.transpose(1, 2).reshape(1, heads, n * group, width)
        out, sums = dense(folded, keys, values, *spec.kernel(bias))
        return _unfolded(out, sums, n, group)


# -- details ---------------------------------------------------------------------------------------------------


def _unfolded(out: Tensor, sums: Tensor, n: int, group: int) -> Partial:
    """From `[1, H_kv, n * G, Dv]` and `[1, H_kv, n * G]` to partial results."""
    heads = out.shape[1]
    return out.view(heads, n, group, -1).transpose(0, 1), sums.view(heads, n, group).transpose(0, 1)


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
    places: list[list[int]] = [[] for _ in everything]
    at = 0
    for call in calls:
        for token in call.tokens:
            places[token].append(at)
            at += 1
    most = max(len(p) for p in places)
    return torch.tensor([[p[i] if i < len(p) else at for p in places] for i in range(most)], device=device)


def _segment_write(piece: Piece, segment: Segment) -> Callable[[int, Tensor, Tensor], None]:
    start, end, offset = piece.start, piece.end, piece.offset

    def write(layer: int, keys: Tensor, values: Tensor) -> None:
        segment.write(layer, offset, keys[:, start:end], values[:, start:end])

    return write


def _tail_write(piece: Piece) -> Callable[[int, Tensor, Tensor], None]:
    page, slot, start, end = _page(piece.store), _index(piece.store), piece.start, piece.end
    offset, last = piece.offset, piece.offset + piece.end - piece.start
    page.positions[slot, offset:last] = _range(piece.position, end - start, page.positions.device)

    def write(layer: int, keys: Tensor, values: Tensor) -> None:
        page.allocate(layer, keys.shape[0], keys.shape[2], values.shape[2], keys)
        page.keys[layer][slot, :, offset:last] = keys[:, start:end]
        page.values[layer][slot, :, offset:last] = values[:, start:end]

    return write


def _tails_write(pieces: Sequence[Piece]) -> Callable[[int, Tensor, Tensor], None]:
    page = _page(pieces[0].store)
    device = page.positions.device
    slots = torch.tensor([_index(p.store) for p in pieces], device=device)
    offsets = torch.tensor([p.offset for p in pieces], device=device)
    page.positions[slots, offsets] = torch.tensor([p.position for p in pieces], device=device)
    first, last = pieces[0].start, pieces[-1].start + 1
    if last - first != len(pieces):
        raise RuntimeError("rows with one new token must stand side by side in a step")

    def write(layer: int, keys: Tensor, values: Tensor) -> None:
        page.allocate(layer, keys.shape[0], keys.shape[2], values.shape[2], keys)
        page.keys[layer][slots, :, offsets] = keys[:, first:last].transpose(0, 1)
        page.values[layer][slots, :, offsets] = values[:, first:last].transpose(0, 1)

    return write


def _page(store: Store) -> Page:
    return store.open_tail().page


def _index(store: Store) -> int:
    return store.open_tail().index


def _range(start: int, n: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + n, device=device)
