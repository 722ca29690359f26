"""Pages: places of `BLOCK` entries side by side, so that those of many branches can be read in one call.

A `Tails` has pages for open tails, and pages apart for blocks: the tails that are full. So both lie close together, and
one call over a range of a page reads few places for nothing. Invariants:

* A place belongs to one `Slot`, which gives it back once: by `release`, or when the last reference to it goes. Blocks
  are shared among forks by reference, so they live as long as any branch holds them.
* A page takes memory as its places are first written (on a CPU); one whose places are all free may be dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Entries of an open tail or a block, and about the most that a branch holds without reading them."""

NOTHING = torch.empty(0)
"""A layer that holds no tensor yet."""

WIDEST = 64
"""A page has at most this many places, unless the first is to have more."""


class Page:
    """Places side by side: per layer keys and values `[slots, H_kv, BLOCK, D]`, positions `[slots, BLOCK]`."""

    def __init__(self, layers: int, slots: int, device: torch.device, number: int = 0) -> None:
        self.number = number
        self.keys: list[Tensor] = [NOTHING] * layers
        self.values: list[Tensor] = [NOTHING] * layers
        self.whole: Tensor | None = None  # [2, L, slots, H_kv, BLOCK, D]: keys and values of layers that are alike
        self.mixed = False
        self.positions = torch.zeros(slots, BLOCK, dtype=torch.int64, device=device)
        self.slots = slots
        self.free = list(range(slots - 1, -1, -1))

    def allocate(self, layer: int, heads: int, width: int, value_width: int, like: Tensor) -> None:
        """Make the layer's slabs, if they are not there: views of one tensor where all layers are alike."""
        if self.keys[layer] is not NOTHING:
            return
        layers, shape = len(self.keys), (self.slots, heads, BLOCK)
        if self.whole is None and not self.mixed and width == value_width:
            self.whole = like.new_zeros(2, layers, *shape, width)
        if self.whole is not None and self.whole.shape[2:] == (*shape, width) and width == value_width:
            self.keys[layer], self.values[layer] = self.whole[0, layer], self.whole[1, layer]
        else:
            self.whole, self.mixed = None, True
            self.keys[layer], self.values[layer] = like.new_zeros(*shape, width), like.new_zeros(*shape, value_width)

    def slot_nbytes(self) -> int:
        """Bytes of one slot over all layers."""
        return sum(t.nbytes for t in (*self.keys, *self.values)) // self.slots + BLOCK * 8


class Slot:
    """A place in a page. It is given back by `release`, or when the last reference goes."""

    __slots__ = ("page", "index", "_taken")

    def __init__(self, page: Page, index: int) -> None:
        self.page, self.index, self._taken = page, index, True

    def release(self) -> None:
        """Give the place back; a second call does nothing."""
        if self._taken:
            self._taken = False
            self.page.free.append(self.index)
            self.page.free.sort(reverse=True)

    def __del__(self) -> None:
        self.release()

    def copy_to(self, target: Slot, n: int) -> None:
        """Copy the first n entries of all layers to another place."""
        old, new, i, j = self.page, target.page, self.index, target.index
        new.positions[j, :n] = old.positions[i, :n]
        for layer, (keys, values) in enumerate(zip(old.keys, old.values, strict=True)):
            new.allocate(layer, keys.shape[1], keys.shape[3], values.shape[3], keys)
            if old.whole is None or new.whole is None:
                new.keys[layer][j, :, :n] = keys[i, :, :n]
                new.values[layer][j, :, :n] = values[i, :, :n]
        if old.whole is not None and new.whole is not None:
            new.whole[:, :, j, :, :n] = old.whole[:, :, i, :, :n]


class Pages:
    """Gives out slots; pages are made when needed, and of the empty ones one is kept.

    A new page is as large as all before it together, up to `WIDEST` slots: many rows are read in few calls.
    """

    def __init__(self, layers: int, device: torch.device, slots: int = 16) -> None:
        self.layers, self.device, self.slots = layers, device, slots
        self.pages: list[Page] = []
        self.made = 0

    def take(self) -> Slot:
        """The lowest free slot."""
        page = next((p for p in self.pages if p.free), None)
        if page is None:
            self.made += 1
            held = sum(p.slots for p in self.pages)
            page = Page(self.layers, max(self.slots, min(held, WIDEST)), self.device, self.made)
            self.pages.append(page)
        return Slot(page, page.free.pop())

    def trim(self) -> None:
        """Drop empty pages but one."""
        for page in [p for p in self.pages if len(p.free) == p.slots][1:]:
            self.pages.remove(page)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, free slots included."""
        return sum(p.slot_nbytes() * p.slots for p in self.pages)


class Tails(Pages):
    """Pages for open tails; `blocks` are those for full ones."""

    def __init__(self, layers: int, device: torch.device, slots: int = 16) -> None:
        super().__init__(layers, device, slots)
        self.blocks = Pages(layers, device, slots)
