"""Turning keys to other positions: RoPE rotations compose, so a key at p becomes one at p' by a turn of p' - p.

(RoFormer, Su et al., section 3.2.2: R(a) R(b) = R(a + b).) Works for models with one `rotary_emb` that rotates the
halves of the head (Llama and its kin); `load.check` verifies it on the loaded weights and says so in `works`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thrifty.errors import Unsupported


class Rotation:
    """The rotary embedding of a model. `works` is set by the check at load."""

    def __init__(self, model: Any) -> None:
        found = [m for n, m in model.named_modules() if n.endswith("rotary_emb") and "vision" not in n]
        self._rotary = found[0] if found else None
        self._name = type(model).__name__
        self._types = getattr(model.config.get_text_config(), "layer_types", None)
        self.works: bool | None = None if found else False

    def turn(self, keys: Tensor, by: Tensor, layer: int) -> Tensor:
        """Keys `[..., T, D]` turned by `by` `[..., T]` positions. Raises Unsupported where that does not work."""
        if self._rotary is None or self.works is False:
            raise Unsupported(
                f"{self._name}'s keys cannot be turned to other positions: use a method with positions = keep"
            )
        flat = by.reshape(1, -1)
        keys, dtype = keys.to(torch.promote_types(keys.dtype, torch.float32)), keys.dtype
        try:
            cos, sin = self._rotary(keys, flat)
        except (TypeError, AttributeError):
            if self._types is None:
                raise
            cos, sin = self._rotary(keys, flat, self._types[layer])
        scale = getattr(self._rotary, "attention_scaling", 1.0)
        shape = (*by.shape, cos.shape[-1])
        cos, sin = (cos / scale).view(shape), (sin / scale).view(shape)
        width = cos.shape[-1]
        turned, rest = keys[..., :width], keys[..., width:]
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-high, low], dim=-1) * sin
        return torch.cat([turned, rest], dim=-1).to(dtype)
