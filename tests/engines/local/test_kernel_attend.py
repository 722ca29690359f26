"""Attention over segments and tails against a brute-force oracle, for any history of appends and forks.

The model here is attention and nothing else: queries, keys and values are linear in a token's embedding, and the
"logits" are the attention's outputs. So the oracle is one softmax over the branch's own tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thrifty.engines.local import packed
from thrifty.engines.local.attend import thrifty_attention
from thrifty.engines.local.dense import causal, dense, hide
from thrifty.engines.local.kv import Store, nbytes
from thrifty.engines.local.runner import Row, Runner

LAYERS, HEADS, GROUP, WIDTH, VOCAB = 2, 2, 3, 4, 50


class Bare(torch.nn.Module):
    """Two independent attention layers over token embeddings; returns both outputs side by side."""

    def __init__(self, window: int | None, softcap: float | None, sinks: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = torch.nn.Embedding(VOCAB, 8).double()
        torch.nn.init.normal_(self.table.weight, generator=generator)
        self.maps = torch.randn(
            LAYERS, 8, (HEADS * GROUP + 2 * HEADS) * WIDTH, dtype=torch.float64, generator=generator
        )
        self.window, self.softcap = window, softcap
        self.sinks = torch.randn(HEADS * GROUP, dtype=torch.float64, generator=generator) if sinks else None
        text = SimpleNamespace(num_hidden_layers=LAYERS, vocab_size=VOCAB, max_position_embeddings=10_000)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def project(self, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [Hq, n, D], keys and values [H, n, D]; layers scale differently, so a mix-up shows."""
        flat = (self.table(tokens) @ self.maps[layer]).unflatten(-1, (-1, WIDTH)).transpose(0, 1)
        return flat[: HEADS * GROUP], flat[HEADS * GROUP : -HEADS], flat[-HEADS:]

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, step: Any, **_: Any) -> SimpleNamespace:
        outs = []
        for layer in range(LAYERS):
            q, k, v = (t[None] for t in self.project(input_ids[0], layer))
            module = SimpleNamespace(layer_idx=layer)
            out, _none = thrifty_attention(
                module,
                q,
                k,
                v,
                None,
                0.5,
                sliding_window=self.window,
                softcap=self.softcap,
                s_aux=self.sinks,
                step=step,
            )
            outs.append(out.flatten(2))
        return SimpleNamespace(logits=torch.cat(outs, -1)[:, logits_to_keep])

    def oracle(self, tokens: list[int]) -> Tensor:
        """The outputs [n, LAYERS * Hq * D] by one softmax a token, in fp64."""
        outs = []
        n = len(tokens)
        with torch.no_grad():
            for layer in range(LAYERS):
                q, k, v = self.project(torch.tensor(tokens), layer)
                k, v = k.repeat_interleave(GROUP, 0), v.repeat_interleave(GROUP, 0)
                logits = 0.5 * q @ k.transpose(1, 2)
                if self.softcap:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                age = torch.arange(n)[:, None] - torch.arange(n)
                seen = (age >= 0) & (age < (self.window or n + 1))
                weights = logits.masked_fill(~seen, -torch.inf).exp()
                total = weights.sum(-1, keepdim=True)
                if self.sinks is not None:
                    total = total + self.sinks.exp()[:, None, None]
                outs.append((weights / total @ v).transpose(0, 1).flatten(1))
        return torch.cat(outs, -1)


sizes = st.sampled_from([1, 1, 1, 2, 9, 60, 130, 300])
actions = st.one_of(
    st.tuples(st.just("append"), st.lists(st.tuples(st.integers(0, 5), sizes), min_size=1, max_size=5)),
    st.tuples(st.just("fork"), st.integers(0, 5)),
    st.tuples(st.just("close"), st.integers(0, 5)),
)


@settings(max_examples=40, deadline=None)
@given(
    history=st.lists(actions, min_size=2, max_size=12),
    window=st.sampled_from([None, None, 1, 7, 64, 200]),
    softcap=st.sampled_from([None, 3.0]),
    sinks=st.booleans(),
    chunk=st.sampled_from([5, 64, 512]),
    slots=st.sampled_from([2, 16]),
    parts=st.sampled_from([1, 2, 4]),
)
def test_any_history_equals_one_softmax(
    history: list[Any], window: int | None, softcap: float | None, sinks: bool, chunk: int, slots: int, parts: int
) -> None:
    with patch.object(packed, "LONG", 64), patch.object(packed, "_parts", lambda heads: parts):
        check_history(history, Bare(window, softcap, sinks), chunk, slots)


def check_history(history: list[Any], bare: Bare, chunk: int, slots: int) -> None:
    runner = Runner(bare, max_chunk=chunk, slots=slots)
    branches: list[tuple[Store, list[int]]] = [(runner.store(), [])]
    generator = torch.Generator().manual_seed(len(history))
    for name, what in history:
        if name == "append":
            chosen = {i % len(branches): n for i, n in what}
            fresh = {i: torch.randint(0, VOCAB, (n,), generator=generator).tolist() for i, n in chosen.items()}
            outs = runner.forward([Row(branches[i][0], new, want="all") for i, new in fresh.items()])
            for (i, new), out in zip(fresh.items(), outs, strict=True):
                branches[i][1].extend(new)
                expected = bare.oracle(branches[i][1])[-len(new) :]
                torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-9)
        elif name == "fork":
            store, tokens = branches[what % len(branches)]
            branches.append((store.fork(), list(tokens)))
        elif len(branches) > 1:
            branches.pop(what % len(branches))[0].close()
        for store, tokens in branches:
            assert store.length() == store.next_position == len(tokens)
    for store, _ in branches:
        store.close()
    assert nbytes([store for store, _ in branches]) == 0
    assert sum(p.slots - len(p.free) for p in runner.tails.pages) == 0


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_primitives_agree_with_a_plain_softmax(softcap: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, 4, 9, 8, dtype=dtype),
        torch.randn(1, 2, 9, 8, dtype=dtype),
        torch.randn(1, 2, 9, 8, dtype=dtype),
    )
    wide = [t.double() for t in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    logits = wide[0] @ wide[1].transpose(-1, -2) * 0.3
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    within = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    ordered = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    out, lse = causal(q, k, v, 0.3, softcap)
    assert (out.double() - ordered.softmax(-1) @ wide[2]).abs().max() < within
    assert (lse.double() - ordered.logsumexp(-1)).abs().max() < within
    hidden = torch.rand(1, 2, 9, 9) > 0.5
    hidden[:, :, 0] = True  # a row that sees nothing has no weight and is finite
    out, lse = dense(q[:, ::2], k, v, 0.3, hide(~hidden, dtype), softcap)
    assert torch.isfinite(out).all() and (lse[:, :, 0] < -1e20).all()
    seen = logits[:, ::2].masked_fill(hidden, -torch.inf)
    assert (lse.double() - seen.logsumexp(-1))[:, :, 1:].abs().max() < within


def test_a_model_called_without_its_runner_says_so() -> None:
    from thrifty.errors import Unsupported

    with pytest.raises(Unsupported, match="through its Runner"):
        thrifty_attention(SimpleNamespace(), torch.zeros(1), torch.zeros(1), torch.zeros(1), None)


def test_few_queries_over_many_keys_in_bf16() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 2500, 16), torch.randn(1, 2, 2500, 16)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    out, lse = dense(q, k, v, 0.25)
    logits = 0.25 * q.double() @ k.double().transpose(-1, -2)
    assert (out.double() - logits.softmax(-1) @ v.double()).abs().max() < 2e-2
    assert (lse.double() - logits.logsumexp(-1)).abs().max() < 2e-2
