"""One layer of one branch, as its cache and attention policies see it (`thrifty.policy.LayerView`).

Entries that an earlier eviction marked dead are not shown. Everything is read lazily: a policy that looks at positions
only never touches keys.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from thrifty.engines.local.kv import Store
from thrifty.engines.local.rotation import Rotation


class StoreView:
    """A layer of a store, `B` = 1. `fresh` is an entry not yet committed (its keys and values `[H_kv, 1, D]` and its
    position); `asking` are the queries `[1, H_q, n, D]` of the step that is running.
    """

    def __init__(
        self,
        store: Store,
        layer: int,
        rotation: Rotation | None = None,
        fresh: tuple[Tensor, Tensor, int] | None = None,
        asking: Tensor | None = None,
    ) -> None:
        self.store, self.layer, self.layers = store, layer, store.layers
        self.state: dict[str, Any] = store.state[layer]
        self.prefilling = not store.prefilled
        self._rotation, self._fresh, self._asking = rotation, fresh, asking

    @cached_property
    def _held(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        keys, values, positions, alive = self.store.snapshot(self.layer)
        if self._fresh is None:
            return keys, values, positions, alive
        key, value, position = self._fresh
        if keys.dim() == 1:
            return key, value, torch.tensor([position], device=key.device), None
        at = positions.new_full((*positions.shape[:-1], 1), position)
        if alive is not None:
            alive = torch.cat([alive, alive.new_ones(alive.shape[0], 1)], dim=1)
        return torch.cat([keys, key], 1), torch.cat([values, value], 1), torch.cat([positions, at], -1), alive

    @cached_property
    def index(self) -> Tensor | None:
        """Where the shown entries are among those held, `[H_kv, T]`; None when all are shown."""
        alive = self._held[3]
        if alive is None:
            return None
        return alive.nonzero()[:, 1].view(alive.shape[0], -1)

    @cached_property
    def keys(self) -> Tensor:
        """`[1, H_kv, T, D]`, after RoPE."""
        return self._shown(self._held[0])[None]

    @cached_property
    def values(self) -> Tensor:
        """`[1, H_kv, T, D]`."""
        return self._shown(self._held[1])[None]

    @cached_property
    def positions(self) -> Tensor:
        """`[1, T]`, or `[1, H_kv, T]` where heads have kept different entries."""
        positions = self._held[2]
        if self.index is None:
            return positions[None]
        heads = self.index.shape[0]
        return torch.gather(positions.expand(heads, -1), 1, self.index)[None]

    @property
    def mask(self) -> Tensor:
        """`[1, T]`, all true: rows are packed, never padded."""
        return torch.ones(1, self.length, dtype=torch.bool, device=self.positions.device)

    @property
    def length(self) -> int:
        """T, the entries shown."""
        return int(self.positions.shape[-1])

    def queries(self, rows: int) -> Tensor:
        """The last `rows` queries `[1, H_q, R, D]` after RoPE; fewer when fewer are known (none: R = 0)."""
        known = self._asking
        if known is None:
            kept = self.store.queries[self.layer]
            if kept is None:
                return self.keys.new_zeros(1, self.keys.shape[1], 0, self.keys.shape[3])
            known = kept[None]
        return known[:, :, max(0, known.shape[2] - rows) :]

    def rerotate(self, positions: Tensor) -> Tensor:
        """The keys as they would be at `positions` (`[1, T]` or `[1, H_kv, T]`). Raises Unsupported where the model's
        position encoding cannot be turned (see `Rotation`)."""
        if self._rotation is None:
            raise RuntimeError("this view was made without a rotation")
        target = positions if positions.dim() == 3 else positions[:, None]
        here = self.positions if self.positions.dim() == 3 else self.positions[:, None]
        return self._rotation.turn(self.keys, target - here, self.layer)

    def _shown(self, held: Tensor) -> Tensor:
        if self.index is None:
            return held
        return torch.gather(held, 1, self.index[..., None].expand(-1, -1, held.shape[-1]))
