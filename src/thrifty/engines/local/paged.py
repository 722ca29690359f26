"""Attention to what lies in pages: the open tails of a batch, and the blocks of its rows.

Each call is over a range of a page's slots, padded where its slots hold different numbers of entries. A slot's result
must not depend on where in which page it lies: forks take slots too, and never change their parent's bits. So what a
kernel is asked of a slot (its length, whether a bias is added) follows from the rows of the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thrifty.engines.local.attend import Piece, Spec
from thrifty.engines.local.dense import causal, dense, hide
from thrifty.engines.local.kv import Segment, Store
from thrifty.engines.local.pages import Page

Partial = tuple[Tensor, Tensor]
"""Outputs `[n, H_kv, G, Dv]` and log-sum-exps `[n, H_kv, G]`."""

Write = Callable[[int, Tensor, Tensor], None]
"""Puts a layer's new keys and values, `[H_kv, S, D]` of the whole step, where they belong."""

GAP = 4
"""This many slots that nobody asked for are read along rather than that a call is made in two."""


# -- blocks ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Read:
    """A block and the packed tokens that read it, with the place (`ranks`) it has in each one's history. `oldest` and
    `newest` bound the tokens' positions."""

    block: Segment
    tokens: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    oldest: int = 2**62
    newest: int = -1
    positions: list[int] = field(default_factory=list)

    def add(self, piece: Piece, rank: int) -> None:
        """A row's tokens read it too."""
        n = piece.end - piece.start
        self.tokens.extend(range(piece.start, piece.end))
        self.ranks.extend([rank] * n)
        self.positions.extend(range(piece.position, piece.position + n))
        self.oldest, self.newest = min(self.oldest, piece.position), max(self.newest, piece.position + n - 1)


def block_calls(reads: Iterable[Read], window: int | None) -> list[BlockCall]:
    """The calls that read these blocks: one for each run of slots with equal lengths and numbers of readers. Blocks
    outside the window of all their readers are left out."""
    groups: dict[tuple[int, int, int, bool], list[Read]] = {}
    for read in reads:
        cut = False
        if window is not None:
            if read.oldest - read.block.last >= window:
                continue
            cut = read.newest - read.block.first >= window
        number = 0 if read.block.slot is None else read.block.slot.page.number
        groups.setdefault((number, len(read.tokens), read.block.capacity, cut), []).append(read)
    calls = []
    for (_, _, _, cut), group in groups.items():
        group.sort(key=_place)
        run = [group[0]]
        for read in group[1:]:
            if _place(read) - _place(run[-1]) > GAP:
                calls.append(BlockCall(run, window if cut else None))
                run = []
            run.append(read)
        calls.append(BlockCall(run, window if cut else None))
    return calls


class BlockCall:
    """Blocks in nearby slots of one page, each read by the same number of tokens."""

    def __init__(self, reads: Sequence[Read], window: int | None) -> None:
        slot = reads[0].block.slot
        if slot is None:
            raise RuntimeError("a segment without a slot is no block")
        self.page, self.length, self.readers = slot.page, reads[0].block.capacity, len(reads[0].tokens)
        self.low = slot.index
        self.rows = _place(reads[-1]) + 1 - self.low
        self.tokens = [t for read in reads for t in read.tokens]
        self.ranks = [r for read in reads for r in read.ranks]
        device = self.page.positions.device
        self._alike = all(read.tokens == reads[0].tokens for read in reads[1:])
        self._select: Tensor | None = None
        at = [_place(read) - self.low for read in reads]
        if len(reads) < self.rows:
            self._select = torch.tensor(at, device=device)
        asked = [reads[0]] * self.rows  # slots in between read anything
        for place, read in zip(at, reads, strict=True):
            asked[place] = read
        if self._alike:
            self._asked = torch.tensor(reads[0].tokens, device=device)
        else:
            self._asked = torch.tensor([t for read in asked for t in read.tokens], device=device)
        self._window = window
        self._positions = torch.tensor([read.positions for read in asked], device=device) if window else None
        self._bias: Tensor | None = None

    def run(self, layer: int, grouped: Tensor, spec: Spec) -> Partial:
        heads, group, _, width = grouped.shape
        mine = slice(self.low, self.low + self.rows)
        keys = self.page.keys[layer][mine, :, : self.length]
        values = self.page.values[layer][mine, :, : self.length]
        asked = grouped.permute(2, 0, 1, 3).index_select(0, self._asked).view(-1, self.readers, heads, group, width)
        asked = asked.transpose(1, 2).reshape(-1, heads, self.readers * group, width)
        out, sums = _anywhere(asked, keys, values, *spec.kernel(self._cut(grouped.dtype, group)))
        if self._select is not None:
            out, sums = out.index_select(0, self._select), sums.index_select(0, self._select)
        out = out.reshape(-1, heads, self.readers, group, out.shape[-1]).transpose(1, 2).flatten(0, 1)
        return out, sums.reshape(-1, heads, self.readers, group).transpose(1, 2).flatten(0, 1)

    def _cut(self, dtype: torch.dtype, group: int) -> Tensor | None:
        """What a window hides: `[R, 1, m * G, T]`."""
        if self._window is None or self._positions is None:
            return None
        if self._bias is None:
            held = self.page.positions[self.low : self.low + self.rows, None, : self.length]
            visible = held > self._positions[:, :, None] - self._window
            self._bias = hide(visible, dtype).repeat_interleave(group, dim=1)[:, None]
        return self._bias


def _place(read: Read) -> int:
    return -1 if read.block.slot is None else read.block.slot.index


# -- open tails ------------------------------------------------------------------------------------------------


def tail_calls(pieces: Sequence[Piece]) -> tuple[list[TailCall], list[Write]]:
    """The calls that read the open tails of rows with one new token each, one a page, and the writes into them."""
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(page_of(piece.store).number, []).append(piece)
    length = max(p.offset for p in pieces) + 1
    even = all(p.offset + 1 == length for p in pieces)
    return [TailCall(g, length, even) for g in groups.values()], [
        tails_write(g) if len(g) > 1 else tail_write(g[0]) for g in groups.values()
    ]


class TailCall:
    """The open tails of rows with one new token each, in one padded call over a range of their page's slots."""

    def __init__(self, pieces: Sequence[Piece], length: int, even: bool) -> None:
        self.tokens = [p.start for p in pieces]
        self.ranks = [-1] * len(pieces)
        self._page, self._length, self._even = page_of(pieces[0].store), length, even
        slots = [index_of(p.store) for p in pieces]
        first = self.tokens[0]
        self._low, rows = min(slots), max(slots) + 1 - min(slots)
        self._rows = rows
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
        asked = grouped.permute(2, 0, 1, 3)
        if self._scatter is None:
            asked = asked[self.tokens[0] : self.tokens[0] + self._rows]
        else:
            asked = asked.index_select(0, self._scatter)
        mine = slice(self._low, self._low + self._rows)
        keys = self._page.keys[layer][mine, :, : self._length]
        values = self._page.values[layer][mine, :, : self._length]
        out, sums = _anywhere(asked, keys, values, *spec.kernel(self._bias(spec.window, grouped.dtype)))
        if self._select is None:
            return out, sums
        return out.index_select(0, self._select), sums.index_select(0, self._select)

    def _bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Bias `[R, 1, 1, T]`, or None where every row of the step sees all that is read."""
        window = window if window is not None and window < self._length else None
        if window not in self._biases:
            bias = None
            if window is not None or not self._even:
                device = self._page.positions.device
                order = torch.arange(self._length, device=device)
                at = torch.tensor(self._offsets, device=device)[:, None]
                visible = order <= at if window is None else (order <= at) & (order > at - window)
                bias = hide(visible, dtype)[:, None, None]
            self._biases[window] = bias
        return self._biases[window]


class LongTail:
    """Several new tokens of one row that fit its open tail."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self.tokens = range(piece.start, piece.end)
        self.ranks = [-1] * len(self.tokens)
        self._among = Among(piece.offset, piece.offset + piece.end - piece.start)

    def run(self, layer: int, grouped: Tensor, spec: Spec) -> Partial:
        piece = self._piece
        page, slot = page_of(piece.store), index_of(piece.store)
        length = piece.offset + piece.end - piece.start
        keys, values = (t[layer][slot : slot + 1, :, :length] for t in (page.keys, page.values))
        return self._among.run(grouped[:, :, piece.start : piece.end], keys, values, spec)


class Among:
    """Attention of tokens at `[offset, length)` of consecutive entries, each seeing itself and those before it."""

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
        return unfolded(out, sums, n, group)


# -- writes and details -----------------------------------------------------------------------------------------


def tail_write(piece: Piece) -> Write:
    """Several new tokens of one row into its open tail."""
    page, slot, start, end = page_of(piece.store), index_of(piece.store), piece.start, piece.end
    offset, last = piece.offset, piece.offset + piece.end - piece.start
    page.positions[slot, offset:last] = _range(piece.position, end - start, page.positions.device)

    def write(layer: int, keys: Tensor, values: Tensor) -> None:
        page.allocate(layer, keys.shape[0], keys.shape[2], values.shape[2], keys)
        page.keys[layer][slot, :, offset:last] = keys[:, start:end]
        page.values[layer][slot, :, offset:last] = values[:, start:end]

    return write


def tails_write(pieces: Sequence[Piece]) -> Write:
    """One new token each into the open tails of rows that lie in one page."""
    page = page_of(pieces[0].store)
    device = page.positions.device
    slots = torch.tensor([index_of(p.store) for p in pieces], device=device)
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


def _anywhere(
    asked: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None, softcap: float | None
) -> Partial:
    """`dense`, with the same bits for a slot whichever thread it falls to, and so wherever it lies.

    The flash kernel gives each thread a scratch of (queries, at most 32) x (keys, at most 512, + head size + 2) floats,
    one after the other. Those that do not begin at a multiple of 64 bytes give products that differ in their last bits
    from those that do; bf16's do not. A few queries more, whose results are dropped, put them all there."""
    rows = asked.shape[2]
    unit = 16 if (keys.shape[2] + keys.shape[3]) % 2 else 8
    spare = -rows % unit if rows < 32 and asked.dtype != torch.bfloat16 else 0
    if spare:
        asked = torch.cat([asked, asked[:, :, :1].expand(-1, -1, spare, -1)], dim=2)
        if bias is not None and bias.shape[2] > 1:
            bias = torch.cat([bias, bias[:, :, :1].expand(-1, -1, spare, -1)], dim=2)
    out, sums = dense(asked.expand(keys.shape[0], -1, -1, -1), keys, values, scale, bias, softcap)
    return out[:, :, :rows], sums[:, :, :rows]


def page_of(store: Store) -> Page:
    """The page of a store's open tail, whose slot is taken if there is none yet."""
    return store.open_tail().page


def index_of(store: Store) -> int:
    """The open tail's slot in its page."""
    return store.open_tail().index


def unfolded(out: Tensor, sums: Tensor, n: int, group: int) -> Partial:
    """From `[1, H_kv, n * G, Dv]` and `[1, H_kv, n * G]` to partial results."""
    heads = out.shape[1]
    return out.view(heads, n, group, -1).transpose(0, 1), sums.view(heads, n, group).transpose(0, 1)


def _range(start: int, n: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + n, device=device)
