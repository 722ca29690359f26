"""Writes a tiny random Llama with a byte-level tokenizer and a chat template, as users have them in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if tools %}<|tools|>{{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_folder(folder: Path, template: str | None = TEMPLATE, positions: int = 512, seed: int = 0) -> Path:
    """Writes a model and its tokenizer; 320 tokens: special ones, all bytes, and a few merged pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tools|>", "<|bos|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*specials, *alphabet]
    merges = [(a, b) for a in "aeiou" for b in "nrst"]
    words += [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|bos|>", additional_special_tokens=specials[1:5]
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=5,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # clear winners, so that roundings do not decide
        model.lm_head.weight[len(words) :] = -1.0  # ids without a word
        model.lm_head.weight[:6] = 0.0  # special tokens are rare
    model.save_pretrained(folder)
    return folder
