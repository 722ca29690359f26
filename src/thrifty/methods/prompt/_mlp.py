"""A small network over sentence embeddings: dense layers with ReLU between them, trained by Adam, kept as JSON.

For heads that choose among a few classes (a technique, a number of examples): some thousand weights, trained in
seconds on any machine, so numpy is enough. Imported only by functions, for the core has no numpy. Invariants: the same
data and seed give the same weights; a file that is read back gives the same outputs to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from thrifty.errors import InvalidInput

Loss: TypeAlias = Callable[[Any, Any], Any]
"""`loss(outputs [B, C], rows [B]) -> [B, C]`: the gradient of a batch's mean loss by its outputs"""


@dataclass(frozen=True)
class MLP:
    """Layers x -> x W + b, with ReLU after all but the last. W are [in, out], b [out], float64."""

    weights: tuple[Any, ...]
    biases: tuple[Any, ...]

    @classmethod
    def fresh(cls, sizes: Sequence[int], seed: int = 0) -> MLP:
        """Random layers of the given widths, input first: He's initialisation, biases 0."""
        rng = np.random.default_rng(seed)
        pairs = list(zip(sizes, sizes[1:], strict=False))
        return cls(
            tuple(rng.normal(0.0, np.sqrt(2.0 / a), (a, b)) for a, b in pairs), tuple(np.zeros(b) for _, b in pairs)
        )

    @property
    def inputs(self) -> int:
        """Numbers it takes."""
        return int(self.weights[0].shape[0])

    @property
    def outputs(self) -> int:
        """Numbers it gives."""
        return int(self.weights[-1].shape[1])

    def __call__(self, x: Any) -> Any:
        """Outputs [N, C] of inputs [N, D]."""
        return self._pass(np.asarray(x, dtype=np.float64))[-1]

    def gradients(self, x: Any, by_outputs: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
        """Gradients of a loss by weights and by biases; `by_outputs` gives it by the outputs [N, C]."""
        kept = self._pass(np.asarray(x, dtype=np.float64))
        back = by_outputs(kept[-1])
        weights: list[Any] = []
        biases: list[Any] = []
        for i in range(len(self.weights) - 1, -1, -1):
            weights.insert(0, kept[i].T @ back)
            biases.insert(0, back.sum(axis=0))
            if i:
                back = (back @ self.weights[i].T) * (kept[i] > 0)
        return weights, biases

    def _pass(self, x: Any) -> list[Any]:
        kept = [x]
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ w + b
            if i + 1 < len(self.weights):
                x = np.maximum(x, 0.0)
            kept.append(x)
        return kept

    # -- as JSON -----------------------------------------------------------------------------------------------

    def to_list(self) -> list[dict[str, Any]]:
        """JSON-ready: one object a layer."""
        return [{"weights": w.tolist(), "biases": b.tolist()} for w, b in zip(self.weights, self.biases, strict=True)]

    @classmethod
    def from_list(cls, layers: Any) -> MLP:
        """Reads what `to_list` writes. Raises InvalidInput for anything that is not finite layers that fit."""
        if not isinstance(layers, list) or not layers or not all(isinstance(x, Mapping) for x in layers):
            raise InvalidInput("layers: a list of objects with weights and biases is needed")
        weights = tuple(array(x.get("weights"), 2) for x in layers)
        biases = tuple(array(x.get("biases"), 1) for x in layers)
        for w, b in zip(weights, biases, strict=True):
            if w.shape[1] != b.shape[0]:
                raise InvalidInput(f"a layer has weights {list(w.shape)} and {b.shape[0]} biases: one for each output")
        for w, v in zip(weights, weights[1:], strict=False):
            if w.shape[1] != v.shape[0]:
                raise InvalidInput(f"a layer of {w.shape[1]} outputs stands before one of {v.shape[0]} inputs")
        return cls(weights, biases)


def array(data: Any, dimensions: int) -> Any:
    """A float64 array of so many dimensions, none of them 0. Raises InvalidInput for anything else."""
    try:
        made = np.array(data, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"numbers in {dimensions} dimensions are needed: {error}") from error
    if made.ndim != dimensions or not made.size or not np.isfinite(made).all():
        raise InvalidInput(f"finite numbers in {dimensions} dimensions are needed, not an array {list(made.shape)}")
    return made


# -- training ------------------------------------------------------------------------------------------------


def train(
    network: MLP,
    x: Any,
    loss: Loss,
    *,
    epochs: int = 20,
    batch: int = 32,
    rate: float = 1e-3,
    decay: float = 0.0,
    seed: int = 0,
) -> MLP:
    """Adam (0.9, 0.999) over shuffled batches; `decay` is decoupled weight decay on the weights (AdamW)."""
    rng = np.random.default_rng(seed)
    x = np.asarray(x, dtype=np.float64)
    values = [w.copy() for w in (*network.weights, *network.biases)]
    adam = Adam(values, rate)
    half = len(network.weights)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch):
            rows = order[start : start + batch]
            now = MLP(tuple(values[:half]), tuple(values[half:]))
            weights, biases = now.gradients(x[rows], lambda out, rows=rows: loss(out, rows))  # type: ignore[misc]
            if decay:
                for w in values[:half]:
                    w *= 1.0 - rate * decay
            adam.step([*weights, *biases])
    return MLP(tuple(values[:half]), tuple(values[half:]))


class Adam:
    """Kingma and Ba's optimiser over arrays, which it changes in place."""

    def __init__(self, values: list[Any], rate: float) -> None:
        self.values, self.rate, self.t = values, rate, 0
        self.first, self.second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]

    def step(self, gradients: Sequence[Any]) -> None:
        """One step against the gradients."""
        self.t += 1
        for value, g, m, v in zip(self.values, gradients, self.first, self.second, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            value -= self.rate * (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)


def softmax(outputs: Any) -> Any:
    """Probabilities [N, C] along the last axis."""
    e = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cross_entropy(labels: Any, weights: Any = None) -> Loss:
    """The gradient of the mean cross-entropy by the outputs; `weights` [C] of the classes, mean over their sum."""
    labels = np.asarray(labels)

    def loss(outputs: Any, rows: Any) -> Any:
        y = labels[rows]
        of = np.ones(len(rows)) if weights is None else np.asarray(weights)[y]
        gradient = softmax(outputs)
        gradient[np.arange(len(rows)), y] -= 1.0
        return gradient * of[:, None] / of.sum()

    return loss
