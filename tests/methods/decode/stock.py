"""The tiny model as transformers runs it, fed by hand: the oracle for what is fed in the place of tokens."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

Choose = Callable[[int, torch.Tensor], "tuple[int, dict[int, float]]"]
"""Of the step's index and its logits [V]: the token recorded, and the weights of the embeddings that are fed."""


def decode(engine: Any, prefix: str, steps: int, choose: Choose) -> list[int]:
    """The recorded tokens of a generation after the chat prompt "Why?" and a prefix, with stock attention and cache."""
    model = engine.runner.model
    config = deepcopy(model.config)
    config._attn_implementation = "eager"
    stock = type(model)(config).eval()
    stock.load_state_dict(model.state_dict())
    table = stock.get_input_embeddings().weight
    text = engine.codec.render([{"role": "user", "content": "Why?"}], (), add_generation_prompt=True) + prefix
    tokens: list[int] = []
    with torch.no_grad():
        out = stock(torch.tensor([engine.codec.encode(text)]), use_cache=True)
        for step in range(steps):
            token, weights = choose(step, out.logits[0, -1])
            tokens.append(token)
            fed = sum(w * table[i] for i, w in weights.items())
            out = stock(inputs_embeds=fed[None, None], past_key_values=out.past_key_values, use_cache=True)
    return tokens
