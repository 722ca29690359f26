"""Two attention primitives that also give the log-sum-exp, so that partial results can be merged exactly.

`dense` attends to every key (less what a bias hides), `causal` to the keys up to the query's own. On a CPU they call
torch's flash kernel, whose operator returns the log-sum-exp; where that kernel cannot (a soft cap, keys and values of
different widths, another device) plain matrix products in fp32 do the same. For few bf16 queries over many keys, bf16
products with an fp32 softmax are faster than the flash kernel, and no less exact beside fp32 (measured on SmolLM2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HIDDEN = -1e30
"""The bias that hides a key. Finite, so that a row without any visible key has a tiny weight and not a NaN."""

FEW, MANY = 8, 2048
"""At most this many queries over at least this many keys are bf16 matrix products."""

_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def dense(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `[B, H, R, D]` queries to `[B, H, T, D]` keys: outputs `[B, H, R, Dv]`, log-sum-exp `[B, H, R]` fp32
    (fp64 for fp64). `bias` broadcasts to `[B, H, R, T]` and is added to the scaled (and capped) logits.

    >>> q = torch.ones(1, 1, 1, 2); k = torch.zeros(1, 1, 3, 2); v = torch.arange(6.0).view(1, 1, 3, 2)
    >>> out, lse = dense(q, k, v, 1.0)
    >>> out.flatten().tolist(), round(lse.item(), 4)
    ([2.0, 3.0], 1.0986)
    """
    if softcap is None and _fast(queries, keys, values):
        if bias is None and queries.dtype == torch.bfloat16 and queries.shape[2] <= FEW and keys.shape[2] >= MANY:
            return _products(queries, keys, values, scale)
        out, lse = _flash(queries, keys, values, 0.0, False, attn_mask=bias, scale=scale)
        return out, lse
    return _plain(queries, keys, values, scale, bias, softcap)


def causal(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention among n new tokens: `[1, H_q, n, D]` queries, `[1, H_kv, n, D]` keys, each token sees itself and those
    before it. Outputs `[1, H_q, n, Dv]` and log-sum-exp `[1, H_q, n]`.
    """
    group = queries.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    if softcap is None and _fast(queries, keys, values):
        out, lse = _flash(queries, keys, values, 0.0, True, scale=scale)
        return out, lse
    n = queries.shape[2]
    order = torch.arange(n, device=queries.device)
    bias = hide(order[:, None] >= order, queries.dtype)
    return _plain(queries, keys, values, scale, bias, softcap)


def hide(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias: 0 where `visible` is true, `HIDDEN` (or the dtype's lowest) elsewhere."""
    low = max(HIDDEN, torch.finfo(dtype).min)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, low)


def _fast(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    return (
        _flash is not None
        and queries.device.type == "cpu"
        and keys.shape[-1] == values.shape[-1]
        and queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    )


def _products(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = torch.matmul(queries, keys.transpose(-1, -2)).float().mul_(scale)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights.to(values.dtype), values) / total, (total.log() + top)[..., 0]


def _plain(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    logits = torch.matmul(queries.to(wide), keys.to(wide).transpose(-1, -2)) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias.to(wide)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse[..., None])
    return torch.matmul(weights, values.to(wide)).to(queries.dtype), lse
