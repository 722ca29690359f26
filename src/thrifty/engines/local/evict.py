"""Carries out what cache policies decide: after the prefill, and during decoding.

The parts compose: the first policy with `scores` says which entries matter (`pattern` where they follow from positions
alone), the first whose `counts` answers says how many each layer keeps. `total` in `counts` is the number of tokens the
branch has seen. Kept entries stay in order; ties go to the lower index.

After the prefill the store's segments are replaced by a compacted copy: the memory is freed as soon as no other branch
references the originals. During decoding entries are marked dead in marks of the branch's own, and compacted when a
block's worth are dead or the tail is full, so a step copies no history; a shared segment is never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from thrifty.engines.local.kv import BLOCK, Segment, Store
from thrifty.engines.local.policy_view import StoreView
from thrifty.engines.local.rotation import Rotation
from thrifty.errors import InvalidInput
from thrifty.policy import CachePolicy, LayerView

Kept = Tensor
"""Indices among the entries shown: `[K]` for all heads alike, or `[H_kv, K]`, ascending."""


def apply(store: Store, rotation: Rotation, after_prefill: bool) -> int:
    """Ask the store's cache policies, once a forward pass that the branch took part in; entries dropped, over layers.

    Raises InvalidInput when a policy answers with a wrong shape or an index out of range.
    """
    policies = [p for p in store.cache if after_prefill or (p.when == "online" and store.steps % p.every == 0)]
    if not policies:
        return 0
    lengths = [store.kept(layer) for layer in range(store.layers)]
    wanted = _counts(policies, store, lengths)
    renumber = any(p.positions == "renumber" for p in policies)
    chosen = _choose(policies, store, rotation, lengths, wanted)
    dropped = sum(0 if kept is None else n - kept.shape[-1] for n, kept in zip(lengths, chosen, strict=True))
    if not dropped:
        return 0
    if after_prefill or renumber:
        compact(store, chosen, rotation, renumber)
    elif not _mark(store, chosen):
        compact(store, chosen, rotation)
    elif max(store.dead) >= BLOCK:
        compact(store, [None] * store.layers, rotation)
    return dropped


def compact(store: Store, chosen: Sequence[Kept | None], rotation: Rotation, renumber: bool = False) -> None:
    """Replace all the store holds by one segment with the chosen entries (None: all that are alive).

    `renumber` gives the kept entries consecutive positions that end where the next token begins.
    """
    whole = Segment(store.layers, 0)
    views: dict[int, Tensor] = {}
    for layer, kept in enumerate(chosen):
        view = StoreView(store, layer, rotation)
        keys, values, positions = view.keys[0], view.values[0], view.positions[0]
        if kept is not None:
            keys, values, positions = _take(keys, kept), _take(values, kept), _take_positions(positions, kept)
        if view.index is None and kept is None:
            keys, values, positions = keys.clone(), values.clone(), positions.clone()  # they may lie in a slot
        whole.keys[layer], whole.values[layer] = keys.contiguous(), values.contiguous()
        if positions.dim() == 2 and bool((positions == positions[0]).all()):
            positions = positions[0].clone()
        for other in views.values():
            if other.shape == positions.shape and torch.equal(other, positions):
                positions = other
                break
        views[layer] = positions
        whole.positions[layer] = positions
        whole.lengths[layer] = keys.shape[1]
    whole.capacity = max(whole.lengths)
    if renumber:
        _renumber(store, whole, rotation)
    whole.settle()
    store.replace([whole])


def _counts(policies: Sequence[CachePolicy], store: Store, lengths: Sequence[int]) -> list[int]:
    for policy in policies:
        counts = policy.counts(store.seen, store.layers, {"lengths": list(lengths)})
        if counts is None:
            continue
        if len(counts) != store.layers or any(int(c) != c or c < 0 for c in counts):
            raise InvalidInput(
                f"{type(policy).__name__}.counts gave {list(counts)!r}: "
                f"it must give {store.layers} whole numbers of at least 0"
            )
        return [min(int(c), n) for c, n in zip(counts, lengths, strict=True)]
    return list(lengths)


def _choose(
    policies: Sequence[CachePolicy], store: Store, rotation: Rotation, lengths: Sequence[int], wanted: Sequence[int]
) -> list[Kept | None]:
    """What each layer keeps; None for everything."""
    scorer = next((p for p in policies if "scores" in p.parts), None)
    chosen: list[Kept | None] = []
    known: dict[tuple[int, ...], Kept | None] = {}
    counting = any(w < n for w, n in zip(wanted, lengths, strict=True))
    if scorer is None and counting:
        raise InvalidInput("a cache policy says how many entries to keep, but none says which: add one with scores")
    if scorer is None:
        return [None] * store.layers
    for layer, (n, count) in enumerate(zip(lengths, wanted, strict=True)):
        view = StoreView(store, layer, rotation)
        alike = store.layout(layer)
        if alike in known:
            pattern = known[alike]
        else:
            pattern = scorer.pattern(cast(LayerView, view))
            if pattern is not None:
                pattern = torch.as_tensor(pattern, dtype=torch.int64, device=view.positions.device)
                _check_pattern(scorer, pattern, n)
            known[alike] = pattern
        if pattern is not None:
            chosen.append(None if pattern.shape[-1] == n else pattern)
        elif not counting or count >= n:
            chosen.append(None)
        else:
            chosen.append(best(_scores(scorer, view), count))
    return chosen


def best(scores: Tensor, count: int) -> Kept:
    """Indices of the `count` highest of `[H, T]` scores, ascending; ties go to the lower index.

    >>> best(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2).tolist()
    [[1, 2]]
    >>> best(torch.tensor([[5.0, 5.0, 5.0]]), 2).tolist()
    [[0, 1]]
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values


def _scores(policy: CachePolicy, view: StoreView) -> Tensor:
    scores = policy.scores(cast(LayerView, view))
    expected = tuple(view.keys.shape[:3])
    if tuple(scores.shape) != expected:
        raise InvalidInput(
            f"{type(policy).__name__}.scores gave shape {tuple(scores.shape)}: it must be [B, H_kv, T] = {expected}"
        )
    each_head: Tensor = scores[0]
    return each_head


def _check_pattern(policy: CachePolicy, kept: Tensor, length: int) -> None:
    ordered = kept.dim() == 1 and (kept.numel() < 2 or bool((kept[1:] > kept[:-1]).all()))
    if not ordered or (kept.numel() and (int(kept[0]) < 0 or int(kept[-1]) >= length)):
        raise InvalidInput(
            f"{type(policy).__name__}.pattern gave {kept.tolist()[:8]}...: "
            f"it must give ascending indices below {length}"
        )


def _mark(store: Store, chosen: Sequence[Kept | None]) -> bool:
    """Mark what is not chosen as dead; False (and nothing done) where an entry outside the first segment is to go."""
    if not store.segments:
        return False
    marks: dict[tuple[int, int, int], Tensor | None] = {}
    fresh: list[Tensor | None] = []
    first = store.segments[0]
    for layer, kept in enumerate(chosen):
        alive = store.alive[layer]
        if kept is None:
            fresh.append(alive)
            continue
        name = (id(kept), id(alive), first.lengths[layer])
        if name not in marks:
            marks[name] = _survivors(store, layer, kept)
        if marks[name] is None:
            return False
        fresh.append(marks[name])
    for layer, (kept, alive) in enumerate(zip(chosen, fresh, strict=True)):
        if kept is not None:
            store.dead[layer] = store.length(layer) - kept.shape[-1]
        store.alive[layer] = alive
    return True


def _survivors(store: Store, layer: int, kept: Kept) -> Tensor | None:
    """New marks of the first segment, or None where an entry after it is to go."""
    first = store.segments[0]
    heads, held = first.keys[layer].shape[0], first.lengths[layer]
    after = store.length(layer) - held
    inside = kept.shape[-1] - after
    shown = held - store.dead[layer]
    if inside < 0 or bool((kept[..., inside:] < shown).any()):
        return None
    alive = store.alive[layer]
    if alive is None:
        index = torch.arange(held, device=kept.device).expand(heads, -1)
    else:
        index = alive.nonzero()[:, 1].view(heads, -1)
    fate = torch.zeros(heads, held, dtype=torch.bool, device=kept.device)
    mine = kept[..., :inside].expand(heads, -1)
    return fate.scatter_(1, torch.gather(index, 1, mine), True)


def _renumber(store: Store, whole: Segment, rotation: Rotation) -> None:
    longest = max(whole.lengths)
    for layer, n in enumerate(whole.lengths):
        keys, old = whole.keys[layer], whole.positions[layer]
        new = torch.arange(longest - n, longest, device=keys.device)
        whole.keys[layer] = rotation.turn(keys, (new - old).expand(keys.shape[0], -1), layer)
        whole.positions[layer] = new
    store.next_position = longest


def _take(entries: Tensor, kept: Kept) -> Tensor:
    if kept.dim() == 1:
        return entries[:, kept]
    return torch.gather(entries, 1, kept[..., None].expand(-1, -1, entries.shape[-1]))


def _take_positions(positions: Tensor, kept: Kept) -> Tensor:
    if kept.dim() == 1:
        return positions[..., kept]
    return torch.gather(positions.expand(kept.shape[0], -1), 1, kept)
