"""The one attention function that every layer of every local model calls, and what one step hands it.

`thrifty_attention` is registered with transformers under `NAME`. It finds the running `Step` in the keyword arguments
of the forward pass; the step writes the new keys and values where they belong and attends over what each row holds,
by a `Plan` that is built once a step and serves all layers (`packed.PackedPlan`). Another plan (flash varlen or
FlexAttention on a GPU) takes its place by being given to the runner: it needs `write` and `attend` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface

from thrifty.engines.local.dense import dense, hide
from thrifty.engines.local.kv import Segment, Store
from thrifty.engines.local.policy_view import StoreView
from thrifty.errors import Unsupported
from thrifty.policy import LayerView

NAME = "thrifty"


class Spec(NamedTuple):
    """What a layer asks of attention: logits are `scale * q.k`, then capped; keys `window` or more before the query are
    not seen; `sinks` `[H_q]` are logits that take part in the softmax and carry no value."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def kernel(self, bias: Tensor | None) -> tuple[float, Tensor | None, float | None]:
        """What `dense` takes after queries, keys and values."""
        return self.scale, bias, self.softcap


@dataclass(slots=True)
class Piece:
    """New tokens `[start, end)` of a packed step that belong to one store, at `position` and following.

    They go into the store's open tail at `offset`, or into `segment` at `offset` while it is being filled.
    """

    store: Store
    start: int
    end: int
    position: int
    offset: int
    segment: Segment | None = None


class Plan(Protocol):
    """How one step's tokens meet the entries of their stores. Made once a step, used by each layer."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the new keys and values, `[1, H_kv, S, D]`."""

    def attend(self, layer: int, queries: Tensor, spec: Spec) -> Tensor:
        """`[1, H_q, S, D]` queries to `[1, S, H_q, Dv]` outputs. The new entries have been written."""


def thrifty_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    step: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: hands the layer's call to the running step.

    Raises Unsupported when the model was called directly, or brings a mask of its own.
    """
    if step is None:
        raise Unsupported(f"{type(module).__name__} was called without a step: drive this model through its Runner")
    if attention_mask is not None:
        raise Unsupported(
            f"{type(module).__name__} builds an attention mask of its own, which the runner cannot honour"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return step.attend(module.layer_idx, query, key, value, Spec(scale, sliding_window, softcap, s_aux)), None


AttentionInterface.register(NAME, thrifty_attention)


class Step:
    """One forward pass: hands each layer's call to the plan, and to the policies of rows that have some.

    `pieces` cover the packed tokens in order, those of rows with attention policies last.
    """

    def __init__(self, pieces: Sequence[Piece], plan: Callable[[Sequence[Piece]], Plan]) -> None:
        plain = [p for p in pieces if not p.store.attention]
        self.reached: list[int] = []
        self.windows: list[int | None] = []
        self._plain = plan(plain) if plain else None
        self._split = plain[-1].end if plain else 0
        self._ruled = [_Ruled(p, plan) for p in pieces if p.store.attention]
        self._watched = [p for p in pieces if any(c.window for c in p.store.cache)]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, spec: Spec) -> Tensor:
        """One layer's `[1, H, S, D]` queries, keys and values to its outputs `[1, S, H_q, Dv]`."""
        self.reached.append(layer)
        self.windows.append(spec.window)
        for piece in self._watched:
            _remember(piece, layer, queries)
        if self._plain is not None and not self._ruled:
            self._plain.write(layer, keys, values)
            return self._plain.attend(layer, queries, spec)
        outs = []
        if self._plain is not None:
            mine = slice(0, self._split)
            self._plain.write(layer, keys[:, :, mine], values[:, :, mine])
            outs.append(self._plain.attend(layer, queries[:, :, mine], spec))
        for row in self._ruled:
            mine = slice(row.start, row.end)
            outs.append(row.attend(layer, queries[:, :, mine], keys[:, :, mine], values[:, :, mine], spec))
        return torch.cat(outs, dim=1)

    def unread(self, piece: Piece) -> int:
        """Entries that a piece's attention policies left unread, summed over layers."""
        return sum(row.unread for row in self._ruled if row.start == piece.start)


class _Ruled:
    """One row under attention policies: attended to by itself, layer by layer as they say."""

    def __init__(self, piece: Piece, plan: Callable[[Sequence[Piece]], Plan]) -> None:
        self.start, self.end = piece.start, piece.end
        self.unread = 0
        self._piece = Piece(piece.store, 0, piece.end - piece.start, piece.position, piece.offset, piece.segment)
        self._plan = plan([self._piece])
        self._done = piece.position - piece.store.next_position  # of the same row, in earlier chunks

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, spec: Spec) -> Tensor:
        store = self._piece.store
        self._plan.write(layer, keys, values)
        n, held = queries.shape[2], store.kept(layer) + self._done
        if any(p.skip(layer, store.layers) for p in store.attention):
            self.unread += n * held + n * (n + 1) // 2
            return queries.new_zeros(1, queries.shape[2], queries.shape[1], values.shape[-1])
        if queries.shape[2] == 1 and store.prefilled:
            view = StoreView(store, layer, fresh=(keys[0], values[0], self._piece.position), asking=queries)
            for policy in store.attention:
                kept = policy.read(cast(LayerView, view))
                if kept is not None:
                    self.unread += held + 1 - len(kept)
                    return _chosen(view, kept, queries, spec)
        return self._plan.attend(layer, queries, spec)


def _chosen(view: Any, kept: Any, queries: Tensor, spec: Spec) -> Tensor:
    """Attention of one token to the chosen entries of its view."""
    index = torch.as_tensor(kept, device=queries.device)
    keys, values, positions = view.keys[:, :, index], view.values[:, :, index], view.positions[0][index]
    bias = None
    if spec.window is not None:
        bias = hide(positions > int(view.positions.max()) - spec.window, queries.dtype)[None, None, None]
    folded = queries.reshape(1, keys.shape[1], -1, queries.shape[-1])
    out, sums = dense(folded, keys, values, spec.scale, bias, spec.softcap)
    if spec.sinks is not None:
        out = out * torch.sigmoid(sums - spec.sinks.view(sums.shape))[..., None]
    return out.to(queries.dtype).reshape(1, 1, queries.shape[1], -1)


def _remember(piece: Piece, layer: int, queries: Tensor) -> None:
    """Keep the store's last queries of this layer, as many as its cache policies look at."""
    rows = max(c.window for c in piece.store.cache)
    fresh = queries[0, :, max(piece.start, piece.end - rows) : piece.end]
    old = piece.store.queries[layer]
    if old is not None and fresh.shape[1] < rows:
        fresh = torch.cat([old[:, fresh.shape[1] - rows :], fresh], dim=1)
    piece.store.queries[layer] = fresh.clone()
