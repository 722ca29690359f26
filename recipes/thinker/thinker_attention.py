"""Causal attention as three plain matrix products, for training short documents on a processor.

There, PyTorch's flash kernel spends most of a step in its backward pass: on rows of 64 to 300 tokens with heads of 32
this is 2 to 8 times faster in bf16. Rows are padded on the right, so causality alone keeps padding unseen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "thinker_products"


def products(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H, D], in the dtype of the values."""
    rows, heads, length, width = query.shape
    kept = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        q = (query * scale).to(value.dtype).reshape(rows * kept, heads // kept * length, width)
        k = key.to(value.dtype).reshape(rows * kept, length, width)
        v = value.reshape(rows * kept, length, width)
        future = torch.full((length, length), -1e4, dtype=value.dtype, device=q.device).triu(1)
        scores = torch.bmm(q, k.transpose(1, 2)).view(rows * kept, heads // kept, length, length) + future
        mixed = torch.bmm(torch.softmax(scores, -1).view(rows * kept, -1, length), v)
    return mixed.view(rows, heads, length, width).transpose(1, 2), None


AttentionInterface.register(NAME, products)
