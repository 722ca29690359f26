"""Images on their way into a language model: features, what vision policies keep of them, and embeddings to prefill.

The vision tower runs once, a policy selects or merges features, and the placeholder tokens of dropped features leave
the prompt with them, so the language model never sees them. The result goes to the runner as `Row.embeds`. For models
of the LLaVA kind: one run of placeholder tokens an image, one-dimensional positions. Images come as pixel values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrifty.engines.local.runner import Runner
from thrifty.errors import InvalidInput, Unsupported
from thrifty.policy import Selection, VisionPolicy, VisualView


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt with its images in place: `embeds` `[n, D]` for the runner; visual tokens `before` and `after`
    selection, an entry an image; `kept`, the indices each image kept."""

    embeds: Tensor
    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]


def see(
    runner: Runner,
    tokens: Sequence[int] | Tensor,
    images: Mapping[str, Any],
    policies: Sequence[VisionPolicy] = (),
) -> Seen:
    """The prompt `tokens` (with one placeholder a visual token, as the processor makes it) with its images in place.

    `images` are the keyword arguments of the model's `get_image_features` (`pixel_values`, ...). Raises Unsupported for
    a model without images, InvalidInput where placeholders and features do not match.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=runner.device)
    return place(runner, ids, features(runner, images), policies)


def features(runner: Runner, images: Mapping[str, Any]) -> list[Tensor]:
    """What the vision tower and projector make of the images: `[N, D]` each."""
    model = runner.model
    if not hasattr(model, "get_image_features") or getattr(model.config, "image_token_id", None) is None:
        raise Unsupported(f"{type(model).__name__} takes no images: load a vision-language model of the LLaVA kind")
    pixels = {k: v.to(runner.device) if isinstance(v, Tensor) else v for k, v in images.items()}
    with torch.no_grad():
        found = model.get_image_features(**pixels)
    found = getattr(found, "pooler_output", found)
    return [one.reshape(-1, one.shape[-1]) for one in found]


def place(runner: Runner, ids: Tensor, found: Sequence[Tensor], policies: Sequence[VisionPolicy] = ()) -> Seen:
    """Put each image's features where its placeholders stand, less what the policies drop; see `see`."""
    holder = int(runner.model.config.image_token_id)
    where = (ids == holder).nonzero().flatten()
    if len(where) != sum(len(f) for f in found):
        raise InvalidInput(
            f"the prompt has {len(where)} image placeholders for {sum(len(f) for f in found)} visual tokens: "
            "make both with the same processor"
        )
    text = runner.embed(ids[ids != holder])
    parts: list[Tensor] = []
    kept: list[tuple[int, ...]] = []
    after: list[int] = []
    at = done = 0
    for visual in found:
        mine = where[done : done + len(visual)]
        start, done = int(mine[0]) if len(mine) else at, done + len(visual)
        if len(mine) and int(mine[-1]) - start + 1 != len(mine):
            raise InvalidInput("an image's placeholders are not in one run: make the prompt with the model's processor")
        parts.append(runner.embed(ids[at:start]))
        chosen, index = reduce(visual, text, policies)
        parts.append(chosen.to(runner.dtype))
        kept.append(index)
        after.append(len(chosen))
        at = start + len(visual)
    parts.append(runner.embed(ids[at:]))
    return Seen(torch.cat(parts), tuple(len(f) for f in found), tuple(after), tuple(kept))


def reduce(visual: Tensor, text: Tensor, policies: Sequence[VisionPolicy]) -> tuple[Tensor, tuple[int, ...]]:
    """What the policies, in order, leave of one image's `[N, D]` features: `[k + e, D]`, and the kept indices of N.

    Raises InvalidInput for a selection that is out of range, out of order, or of the wrong shape.
    """
    index = tuple(range(len(visual)))
    for policy in policies:
        side = math.isqrt(len(visual))
        grid = (1, 1, side, side) if side * side == len(visual) else (1, 1, 1, len(visual))
        selection = policy.select(VisualView(visual, grid, text=text), policy.budget(len(visual)))
        visual = _merged(visual, selection, type(policy).__name__)
        index = tuple(index[i] for i in selection.kept)
    return visual, index


def _merged(visual: Tensor, selection: Selection, name: str) -> Tensor:
    kept = [int(i) for i in selection.kept]
    n = len(visual)
    if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < n):
        raise InvalidInput(f"{name} kept {kept[:8]}... of {n} visual tokens: it must give ascending indices below {n}")
    rows = visual[kept]
    if selection.weights is not None:
        rows = _checked(selection.weights, len(kept), n, selection.row_sum, name).to(visual) @ visual
    if selection.extra is not None:
        extra = _checked(selection.extra, len(selection.extra), n, None, name)
        rows = torch.cat([rows, extra.to(visual) @ visual])
    return rows


def _checked(weights: Tensor, rows: int, columns: int, total: float | None, name: str) -> Tensor:
    if tuple(weights.shape) != (rows, columns):
        raise InvalidInput(f"{name} gave weights of shape {tuple(weights.shape)}: it must be {(rows, columns)}")
    if total is not None and rows and not torch.allclose(weights.sum(-1).float(), torch.tensor(total), atol=1e-2):
        raise InvalidInput(f"{name} gave weights whose rows do not sum to {total}: say so in row_sum or mend them")
    return weights
