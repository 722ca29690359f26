"""What a branch remembers: keys and values per layer, in shared segments and one open tail.

A `Store` belongs to one branch. Per layer it holds a list of segments (immutable runs of entries, shared by
reference among forks; a layer may have its own length) and one open tail of at most `BLOCK` entries, which lives in
a slot of the runner's `Tails` so that the tails of a batch can be read in one call. A tail that is full, or nearly so,
becomes a block: a segment in a slot of its own, for the same reason. Invariants:

* An entry, once in a segment, is never written again. Eviction replaces all segments by one compacted copy, or marks
  entries of that copy dead until the next compaction; marks are the branch's own and are replaced, never changed.
* Appending a token writes one entry a layer and copies no history. A tail is sealed by one copy of at most `BLOCK`
  entries; where it was not full and a block would waste too much, the copy is a small segment, and `MERGE` of those
  become one segment with the blocks among them. Both happen by the branch's own length, whoever shares it: a fork never
  changes what its parent reads, nor its bits.
* Entries carry their position (int64), because a kept entry keeps its place when others are evicted.
  `next_position` is logical: it does not shrink when entries are evicted (unless a policy renumbers).
* `nbytes` counts what is held: whole segments, dead entries included, and the whole slots of blocks and tails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from thrifty.engines.local.pages import BLOCK as BLOCK
from thrifty.engines.local.pages import NOTHING, Slot
from thrifty.engines.local.pages import Tails as Tails

if TYPE_CHECKING:
    from thrifty.policy import AttentionPolicy, CachePolicy

MERGE = 8
"""This many small segments become one."""


class Segment:
    """A run of entries, the same for every store that references it.

    `keys[l]`, `values[l]`: `[H_kv, T_l, D]`; `positions[l]`: `[T_l]`, or `[H_kv, T_l]` where heads kept different
    entries. `lengths[l]` is `T_l`: while a prompt is prefilled in chunks, the part that is filled. `first` and `last`
    bound the positions; `contiguous` says that every layer holds all of them. `small` ones may be merged.
    A block has the `slot` where its tensors lie, as views; it is given back when nobody references the block.
    """

    __slots__ = ("keys", "values", "positions", "lengths", "capacity", "first", "last", "contiguous", "small", "slot")

    def __init__(self, layers: int, capacity: int, first: int = 0, small: bool = False) -> None:
        self.keys: list[Tensor] = [NOTHING] * layers
        self.values: list[Tensor] = [NOTHING] * layers
        self.positions: list[Tensor] = [NOTHING] * layers
        self.lengths = [0] * layers
        self.capacity = capacity
        self.first, self.last = first, first + capacity - 1
        self.contiguous = True
        self.small = small
        self.slot: Slot | None = None

    @classmethod
    def block(cls, slot: Slot, n: int) -> Segment:
        """The first n entries of a slot that nobody writes any more."""
        page, i = slot.page, slot.index
        made = cls(len(page.keys), n, first=int(page.positions[i, 0]))
        made.keys, made.values = [k[i, :, :n] for k in page.keys], [v[i, :, :n] for v in page.values]
        made.positions, made.lengths = [page.positions[i, :n]] * len(page.keys), [n] * len(page.keys)
        made.slot = slot
        return made

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put `[H_kv, n, D]` keys and values at `start`: used while the segment is filled, before anyone shares it."""
        if self.keys[layer] is NOTHING:
            rounded = -(-self.capacity // 8) * 8  # so that the plan may cut it into equal parts
            self.keys[layer] = keys.new_zeros(keys.shape[0], rounded, keys.shape[2])
            self.values[layer] = values.new_zeros(values.shape[0], rounded, values.shape[2])
        end = start + keys.shape[1]
        self.keys[layer][:, start:end] = keys
        self.values[layer][:, start:end] = values

    def grow(self, length: int) -> None:
        """Say that every layer is filled up to `length`, at consecutive positions."""
        if self.positions[0] is NOTHING:
            device = self.keys[0].device
            self.positions = [torch.arange(self.first, self.last + 1, device=device)] * len(self.keys)
        self.lengths = [length] * len(self.keys)

    def settle(self) -> None:
        """Recompute `first`, `last` and `contiguous` from the positions, after eviction."""
        held = [p for p in self.positions if p.numel()]
        self.first = min((int(p.min()) for p in held), default=0)
        self.last = max((int(p.max()) for p in held), default=-1)
        self.contiguous = all(n == self.last - self.first + 1 for n in self.lengths)
        self.capacity = max(self.lengths)

    def entries(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[H_kv, T_l, D]` and positions of one layer, as views."""
        n = self.lengths[layer]
        return self.keys[layer][:, :n], self.values[layer][:, :n], self.positions[layer][..., :n]

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor it holds, shared or not."""
        for group in (self.keys, self.values, self.positions):
            yield from (t for t in group if t is not NOTHING)


class Store:
    """The cache of one branch. Made by `Runner.store()`, filled by `Runner.forward`, forked here.

    `cache` and `attention` are this branch's policies (`thrifty.policy`); `state[l]` is what they keep for a layer.
    `seen` counts the tokens ever written, `steps` the forward passes since the prefill.
    """

    def __init__(
        self, tails: Tails, cache: Sequence[CachePolicy] = (), attention: Sequence[AttentionPolicy] = ()
    ) -> None:
        self.tails = tails
        self.cache, self.attention = tuple(cache), tuple(attention)
        self.segments: list[Segment] = []
        self.slot: Slot | None = None
        self.tail = 0
        self.alive: list[Tensor | None] = [None] * tails.layers
        self.dead = [0] * tails.layers
        self.next_position = 0
        self.seen = 0
        self.steps = 0
        self.prefilled = False
        self.state: list[dict[str, Any]] = [{} for _ in range(tails.layers)]
        self.queries: list[Tensor | None] = [None] * tails.layers

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.tails.layers

    @property
    def marked(self) -> bool:
        """Whether some entries are marked dead: `alive[l]` bool `[H_kv, T_l]` is about the first segment only."""
        return any(self.dead)

    def length(self, layer: int = 0) -> int:
        """Entries physically held by one layer, dead ones included."""
        return sum([s.lengths[layer] for s in self.segments]) + self.tail

    def kept(self, layer: int = 0) -> int:
        """Entries that one layer's attention reads."""
        return self.length(layer) - self.dead[layer]

    def layout(self, layer: int) -> tuple[int, ...]:
        """Equal for two layers of this store exactly where they are known to hold entries at the same positions."""
        return (id(self.alive[layer]), *(id(s.positions[layer]) for s in self.segments), self.length(layer))

    def fork(
        self, cache: Sequence[CachePolicy] | None = None, attention: Sequence[AttentionPolicy] | None = None
    ) -> Store:
        """A branch with the same past: segments by reference, the open tail copied. The parent is not touched.

        Policies are forked too, unless the caller hands in those of the new branch.
        """
        twin = Store(
            self.tails,
            cast("list[CachePolicy]", [p.fork() for p in self.cache]) if cache is None else cache,
            cast("list[AttentionPolicy]", [p.fork() for p in self.attention]) if attention is None else attention,
        )
        twin.segments = list(self.segments)
        twin.alive, twin.dead = list(self.alive), list(self.dead)
        twin.next_position, twin.seen = self.next_position, self.seen
        twin.prefilled, twin.steps = self.prefilled, self.steps
        twin.state = [{k: _copied(v) for k, v in layer.items()} for layer in self.state]
        twin.queries = list(self.queries)
        if self.tail and self.slot is not None:
            twin.slot, twin.tail = self.tails.take(), self.tail
            self.slot.copy_to(twin.slot, self.tail)
        return twin

    def close(self) -> None:
        """Forget everything and give the tail's slot back. A second call does nothing."""
        self.replace([])
        self.queries = [None] * self.layers
        self.state = [{} for _ in range(self.layers)]

    def open_tail(self) -> Slot:
        """The slot of the open tail, taken on first use."""
        if self.slot is None:
            self.slot = self.tails.take()
        return self.slot

    def seal(self) -> None:
        """Turn the open tail into a block, or into a small segment where the rest of a block would waste too much."""
        if not self.tail or self.slot is None:
            return
        slot, n, block = self.slot, self.tail, self._spares(self.tail)
        self.tail = 0
        if block:
            place = self.tails.blocks.take()
            slot.copy_to(place, n)
            self.append(Segment.block(place, n))
            return
        page, i = slot.page, slot.index
        segment = Segment(self.layers, n, first=int(page.positions[i, 0]), small=True)
        segment.keys = [k[i, :, :n].clone() for k in page.keys]
        segment.values = [v[i, :, :n].clone() for v in page.values]
        segment.grow(n)
        self.append(segment)

    def append(self, segment: Segment) -> None:
        """Add a filled segment after all others; the last `MERGE` small ones become one with the blocks among them."""
        self.segments.append(segment)
        if not segment.small or self.marked:
            return
        small = 0
        for i in range(len(self.segments) - 1, -1, -1):
            if not self.segments[i].small and self.segments[i].slot is None:
                return
            small += self.segments[i].small
            if small == MERGE:
                self.segments[i:] = [join(self.segments[i:])]
                return

    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All entries of one layer in order: keys and values `[H_kv, T, D]`, positions `[T]` or `[H_kv, T]`,
        liveness bool `[H_kv, T]` or None. A single segment comes as views, else they are copies.
        """
        parts = [s.entries(layer) for s in self.segments if s.lengths[layer]]
        if self.tail and self.slot is not None:
            page, i, n = self.slot.page, self.slot.index, self.tail
            parts.append((page.keys[layer][i, :, :n], page.values[layer][i, :, :n], page.positions[i, :n]))
        keys, values, positions = _concatenate(parts)
        alive = self.alive[layer]
        if alive is not None and alive.shape[1] < keys.shape[1]:
            alive = torch.cat([alive, alive.new_ones(alive.shape[0], keys.shape[1] - alive.shape[1])], dim=1)
        return keys, values, positions, alive

    def replace(self, segments: list[Segment]) -> None:
        """Put these segments in the place of everything held, the open tail and the marks included."""
        self.segments = segments
        self.alive, self.dead, self.tail = [None] * self.layers, [0] * self.layers, 0
        self.tails.blocks.trim()
        if self.slot is not None:
            self.slot.release()
            self.slot = None
            self.tails.trim()

    def _spares(self, n: int) -> bool:
        """Whether the tail's n entries may be a block: what its blocks and its tail waste stays within an eighth."""
        wasted = BLOCK - n + sum(BLOCK - s.capacity for s in self.segments if s.slot is not None)
        return wasted == 0 or 8 * (wasted + BLOCK) <= min(self.length(layer) for layer in range(self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes this branch holds, shared segments in full. For a set of branches use the function `nbytes`."""
        return nbytes([self])


def nbytes(stores: Iterable[Store]) -> int:
    """Bytes held by a set of branches: what is shared once, the whole slot of each block and open tail."""
    held: dict[int, int] = {}
    slots: dict[tuple[int, int], int] = {}
    for store in stores:
        tensors = [t for t in (*store.alive, *store.queries) if t is not None]
        for segment in store.segments:
            if segment.slot is None:
                tensors += segment.tensors()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        for slot in (store.slot, *(s.slot for s in store.segments)):
            if slot is not None:
                slots[id(slot.page), slot.index] = slot.page.slot_nbytes()
    return sum(held.values()) + sum(slots.values())


def join(segments: Sequence[Segment]) -> Segment:
    """One segment with the entries of several, in order. It is not small."""
    layers = len(segments[0].keys)
    whole = Segment(layers, sum(s.lengths[0] for s in segments))
    known: dict[tuple[int, ...], Tensor] = {}
    for layer in range(layers):
        keys, values, positions = _concatenate([s.entries(layer) for s in segments])
        whole.keys[layer], whole.values[layer] = keys, values
        name = tuple(id(s.positions[layer]) for s in segments)
        whole.positions[layer] = known.setdefault(name, positions)
        whole.lengths[layer] = keys.shape[1]
    whole.settle()
    return whole


_Part = tuple[Tensor, Tensor, Tensor]


def _concatenate(parts: list[_Part]) -> _Part:
    if not parts:
        return NOTHING, NOTHING, NOTHING
    if len(parts) == 1:
        return parts[0]
    positions = [p[2] for p in parts]
    if any(p.dim() == 2 for p in positions):
        positions = [p.expand(parts[0][0].shape[0], -1) if p.dim() == 1 else p for p in positions]
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1), torch.cat(positions, -1)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
