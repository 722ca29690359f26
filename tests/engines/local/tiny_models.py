"""Tiny random models of several architectures, and the stock forward they are compared with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MORE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 13},
    "Gemma2": {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 9, "sliding_window_pattern": 2},
    "Phi3": {},
    "GptOss": {"head_dim": 16, "sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1},
}
ARCHITECTURES = sorted(_MORE)


def model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A random causal LM of one architecture, by the name of its config class."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **_MORE.get(name, {}), **more})
    kind = "Gemma3ForCausalLM" if name == "Gemma3Text" else f"{name}ForCausalLM"
    made = getattr(transformers, kind)(config)
    for parameter in made.parameters():  # the default initialisation is so small that attention hardly matters
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if name == "GptOss":
        made.set_experts_implementation("eager")  # the grouped one has no fp64
    return made.to(dtype).eval()


def stock(made: Any, tokens: Tensor) -> Tensor:
    """All logits [n, V] of the model's own attention, put back afterwards: sdpa where it can, because eager rounds its
    softmax through fp32 even in fp64."""
    before = made.config._attn_implementation
    plain = getattr(made.config, "attn_logit_softcapping", None) is None and made._supports_sdpa
    made.set_attn_implementation("sdpa" if plain else "eager")
    try:
        with torch.no_grad():
            return made(tokens[None], use_cache=False).logits[0]
    finally:
        made.set_attn_implementation(before)


def tokens(n: int, seed: int = 0) -> Tensor:
    """n random token ids."""
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))
