"""Draws one token a row from a batch of logits: each row with its own settings and its own generator.

Invariants: a row's draw depends on its own logits, settings and generator alone, not on the rows beside it; each draw
takes one number from the row's generator, so a fork that copies the generator draws what its parent would have drawn.
Filters follow the usual order: temperature, top-k, top-p, min-p, each on what the one before left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thrifty.call import Sampling


class Sampler:
    """One branch's settings and generator. Without a temperature, or with 0, it is greedy and draws no numbers."""

    __slots__ = ("temperature", "top_p", "top_k", "min_p", "generator")

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.temperature = sampling.temperature or 0.0
        self.top_p = 1.0 if sampling.top_p is None else sampling.top_p
        self.top_k = sampling.top_k or 0
        self.min_p = sampling.min_p or 0.0
        self.generator: torch.Generator | None = None
        if self.temperature > 0:
            self.generator = torch.Generator().manual_seed(_signed(seed))

    @property
    def greedy(self) -> bool:
        return self.generator is None

    @property
    def filters(self) -> bool:
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    def fork(self, seed: int | None = None) -> Sampler:
        """The same settings; the same draws to come, or those of another seed."""
        twin = Sampler.__new__(Sampler)
        twin.temperature, twin.top_p, twin.top_k, twin.min_p = self.temperature, self.top_p, self.top_k, self.min_p
        twin.generator = None
        if self.generator is not None:
            twin.generator = torch.Generator()
            if seed is None:
                twin.generator.set_state(self.generator.get_state())
            else:
                twin.generator.manual_seed(_signed(seed))
        return twin

    def uniform(self) -> float:
        """The next number in [0, 1) of this row."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token id a row of `logits` [R, V]."""
    tokens: list[int] = logits.argmax(-1).tolist()
    warm = [i for i, s in enumerate(samplers) if not s.greedy]
    # apart, because sorting changes which token a number stands for: rows must not depend on their neighbours
    for rows in ([i for i in warm if samplers[i].filters], [i for i in warm if not samplers[i].filters]):
        if rows:
            found = _drawn(logits[rows], [samplers[i] for i in rows])
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
    return tokens


def logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities [R] of the tokens under softmax(logits [R, V]): after policies, before the temperature."""
    wide = logits.float()
    picked = wide.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return [float(x) for x in (picked - wide.logsumexp(-1)).tolist()]


def entropy(logits: Tensor) -> float:
    """Entropy in nats of softmax(logits [V]).

    >>> round(entropy(torch.zeros(4)), 6)
    1.386294
    """
    log = logits.double().log_softmax(-1)
    return float(-(log.exp() * log.masked_fill(log == -torch.inf, 0.0)).sum())


def _drawn(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token a row by the inverse of the cumulative distribution; all rows filter, or none does."""
    device = logits.device
    heat = torch.tensor([s.temperature for s in samplers], dtype=torch.float64, device=device)
    scaled = logits.double() / heat[:, None]
    order = None
    if samplers[0].filters:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        scaled = _filtered(scaled, samplers)
    mass = scaled.softmax(-1).cumsum(-1)
    point = torch.tensor([s.uniform() for s in samplers], dtype=torch.float64, device=device)[:, None] * mass[:, -1:]
    # right: the first place whose mass lies beyond the point, so entries of no mass are never drawn
    place = torch.searchsorted(mass, point, right=True).clamp_max(mass.shape[-1] - 1)
    if order is not None:
        place = order.gather(-1, place)
    found: list[int] = place[:, 0].tolist()
    return found


def _filtered(scaled: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """What top-k, top-p and min-p leave of logits [R, V] sorted downwards; the rest is -inf. The best always stays."""
    device = scaled.device
    ranks = torch.arange(scaled.shape[-1], device=device)
    k = torch.tensor([s.top_k or scaled.shape[-1] for s in samplers], device=device)[:, None]
    scaled = scaled.masked_fill(ranks >= k, -torch.inf)
    p = torch.tensor([s.top_p for s in samplers], dtype=torch.float64, device=device)[:, None]
    share = scaled.softmax(-1)
    before = share.cumsum(-1) - share
    out = (before >= p) & (p < 1)
    least = torch.tensor([s.min_p for s in samplers], dtype=torch.float64, device=device)[:, None]
    out |= share < least * share[:, :1]
    out[:, 0] = False
    return scaled.masked_fill(out, -torch.inf)


def _signed(seed: int) -> int:
    """torch takes seeds of 64 bits, signed or not."""
    return seed % 2**64 if seed >= 2**63 else seed
