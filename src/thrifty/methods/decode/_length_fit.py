"""Trains the length predictor of Budget Guidance on what a model thought, and measures it on what it did not see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from thrifty.errors import InvalidInput
from thrifty.methods.decode._gamma import fit_gamma, log_gamma_cdf
from thrifty.methods.decode._length_predictor import LEAST, Config, LengthPredictor, gammas_of


@dataclass(frozen=True)
class Reads:
    """What is learned from: N places where a step began. `features` [N, F]; `tokens` [N], what was drawn there; `left`
    [N], thinking tokens from there on, that one and the closing tag included."""

    features: Any
    tokens: Any
    left: Any

    def __post_init__(self) -> None:
        import torch

        features = torch.as_tensor(self.features, dtype=torch.float32)
        tokens, left = torch.as_tensor(self.tokens, dtype=torch.long), torch.as_tensor(self.left, dtype=torch.float64)
        if features.dim() != 2 or not len(features) == len(tokens) == len(left) or not len(left):
            raise InvalidInput(
                f"features {list(features.shape)}, {len(tokens)} tokens, {len(left)} lengths: a row each, at least one"
            )
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "left", left)

    def pick(self, index: Any) -> Reads:
        """Some of them."""
        return Reads(self.features[index], self.tokens[index], self.left[index])

    @property
    def logs(self) -> Any:
        """ln(max(left, 2)), [N] float64."""
        return self.left.clamp_min(LEAST).log()


def fit(
    train: Reads,
    stop: Reads,
    config: Config,
    *,
    least: int = 20,
    epochs: int = 60,
    patience: int = 8,
    rate: float = 2e-3,
    decay: float = 0.02,
    batch: int = 256,
    seed: int = 0,
) -> LengthPredictor:
    """A predictor, by AdamW on the negative log-likelihood of ln left, its rate falling by a cosine; kept is the epoch
    that does best on `stop`.

    Tokens seen `least` times or more get a Gamma of their own. The shared one learns from every place, whatever came
    next, so that a token never seen is judged by what the hidden states say and not by a guess. Raises InvalidInput
    when there is nothing to learn from."""
    import torch

    counts = torch.bincount(train.tokens, minlength=config.vocab)
    tokens = (counts >= least).nonzero()[:, 0]
    k = len(tokens)
    a0, b0 = fit_gamma(train.logs)
    order = torch.Generator().manual_seed(seed)
    f = train.features.shape[1]
    tensors = {
        "mean": train.features.mean(0),
        "scale": train.features.std(0).clamp_min(1e-6) if len(train.features) > 1 else torch.ones(f),
        "into": torch.randn(config.hidden, f, generator=order) / math.sqrt(f),
        "into_bias": torch.zeros(config.hidden),
        "out": torch.zeros(2 * (k + 1), config.hidden),
        "out_bias": torch.cat([torch.full((k + 1,), math.log(a0)), torch.full((k + 1,), math.log(a0 / b0))]).float(),
        "tokens": tokens,
    }
    rows = torch.full((config.vocab,), k, dtype=torch.long)
    rows[tokens] = torch.arange(k)
    matrices, biases = (
        [tensors[name].requires_grad_() for name in names] for names in (("into", "out"), ("into_bias", "out_bias"))
    )
    groups = [{"params": matrices, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
    steps = torch.optim.AdamW(groups, lr=rate)
    best, kept, bad = math.inf, dict(tensors), 0
    for epoch in range(epochs):
        for group in steps.param_groups:
            group["lr"] = rate * (0.02 + 0.49 * (1 + math.cos(math.pi * epoch / epochs)))
        for index in torch.split(torch.randperm(len(train.tokens), generator=order), batch):
            part = train.pick(index)
            steps.zero_grad()
            shape, mean = gammas_of(tensors, part.features)
            both = _nll(shape, mean, rows[part.tokens], part.logs) + _nll(shape, mean, k, part.logs)
            both.mean().backward()
            steps.step()
        with torch.no_grad():
            found = float(_nll(*gammas_of(tensors, stop.features), rows[stop.tokens], stop.logs).mean())
        if found < best - 1e-4:
            best, kept, bad = found, {n: t.detach().clone() for n, t in tensors.items()}, 0
        else:
            bad += 1
            if bad >= patience:
                break
    return LengthPredictor(config, kept)


def measure(predictor: LengthPredictor, reads: Reads) -> tuple[Any, Any]:
    """On places that it did not learn from: negative log-likelihood [N] of ln left, and the predicted chance [N] that
    no more than the true number is left (uniform, where it is calibrated)."""
    import torch

    with torch.no_grad():
        shape, mean = predictor.gammas(reads.features)
        rows = predictor.rows[reads.tokens]
        a, m = _at(shape, rows), _at(mean, rows)
        return _nll(shape, mean, rows, reads.logs), log_gamma_cdf(a, a * reads.logs / m).exp()


def _at(values: Any, rows: Any) -> Any:
    """Of [N, K + 1] the row's value of each, [N]; `rows` [N], or one for all."""
    return values[..., rows] if isinstance(rows, int) else values.gather(-1, rows[:, None])[:, 0]


def _nll(shape: Any, mean: Any, rows: Any, y: Any) -> Any:
    """-ln of the Gamma density at y [N], with shape a and rate a / mean."""
    a, m = _at(shape, rows), _at(mean, rows)
    rate = a / m
    return -(a * rate.log() - a.lgamma() + (a - 1) * y.log() - rate * y)
