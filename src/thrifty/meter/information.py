"""How much each step of thinking tells about the answer (InfoGain), and how far thinking strays from a reference
(InfoBias). Source: "Think or Not? Exploring Thinking Efficiency in Large Reasoning Models via an Information-Theoretic
Lens" (Yong et al. 2025, arXiv:2505.18237), with the estimators of its released code.

Entropies are in bits. Dependence is the Hilbert-Schmidt criterion of two sets of vectors, X `[n, D]` and Y `[n, E]`,
whose rows belong together: embeddings of n answers of the model and of n reference answers to one question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.errors import InvalidInput
from thrifty.instrument import Instrument

INSTRUMENT = Instrument(
    name="info-gain",
    kind="analysis",
    paper=(
        "Think or Not? Exploring Thinking Efficiency in Large Reasoning Models via an Information-Theoretic Lens "
        "(Yong et al. 2025, arXiv:2505.18237)"
    ),
    runs="thrifty.meter.information:info_gain",
)


@dataclass(frozen=True, slots=True)
class InfoGain:
    """What the steps of one trace told. `entropies`: before the first step and after each, N + 1 of them."""

    entropies: tuple[float, ...]
    tokens: int

    @property
    def gains(self) -> tuple[float, ...]:
        """Of each step: the entropy before it less that after it. They sum to `total`."""
        return tuple(a - b for a, b in zip(self.entropies, self.entropies[1:], strict=False))

    @property
    def total(self) -> float:
        """The first entropy less the last."""
        return self.entropies[0] - self.entropies[-1]

    @property
    def per_step(self) -> float:
        """The mean gain of a step."""
        return self.total / (len(self.entropies) - 1)

    @property
    def per_token(self) -> float:
        """The total gain over the tokens of the trace."""
        return self.total / self.tokens


def entropy(chances: Sequence[float]) -> float:
    """Entropy in bits of a distribution over answers; `chances` are renormalised. Raises InvalidInput.

    >>> entropy([1, 1, 1, 1]), entropy([3, 0])
    (2.0, 0.0)
    """
    total = sum(chances)
    if not chances or not all(c >= 0 for c in chances) or not 0 < total < math.inf:
        raise InvalidInput(f"chances {list(chances)[:6]}: numbers from 0, not all 0, are needed")
    return sum(-q * math.log2(q) for c in chances if (q := c / total) > 0) + 0.0


def info_gain(answers: Sequence[Sequence[float]], tokens: int) -> InfoGain:
    """InfoGain of a trace: `answers[i]` is the distribution over the answers after i steps, `tokens` its length.

    Raises InvalidInput for fewer than two distributions or tokens.

    >>> gain = info_gain([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], tokens=20)
    >>> gain.gains, gain.per_step, gain.per_token
    ((1.0, 1.0), 1.0, 0.1)
    """
    if len(answers) < 2 or tokens < 1:
        raise InvalidInput(f"{len(answers)} distributions, {tokens} tokens: at least 2 and 1 are needed")
    return InfoGain(tuple(entropy(q) for q in answers), tokens)


def hsic(x: Any, y: Any, bandwidth: float | None = 1.0) -> float:
    """HSIC of X `[n, D]` and Y `[n, E]`: trace(K H L H) / (n - 1)^2, with Gaussian kernels exp(-d^2 / (2 b^2)).

    0 for independent samples as n grows. The paper leaves the bandwidth b open: 1 by default, None takes each side's
    median distance. Raises InvalidInput for shapes that do not fit, or n < 2.
    """
    k, m = _centred(x, y, bandwidth)
    return float((k * m).sum()) / (len(k) - 1) ** 2


def normalised_hsic(x: Any, y: Any, bandwidth: float | None = None, ridge: float = 1e-5) -> float:
    """The dependence that the released code takes, with both kernels centred on both sides: trace(R_x R_y), where
    R = K (K + ridge n I)^-1. From 0 to n - 1; it does not depend on the scale of the kernels.

    The code's kernel is exp(-d^2 / (2 * 5^2 * D)): `bandwidth` = 5 sqrt(D). None takes each side's median distance.
    """
    import numpy as np

    n = len(x)
    k, m = _centred(x, y, bandwidth)
    eye = ridge * n * np.eye(n)
    return float(np.sum(np.linalg.solve(k + eye, k) * np.linalg.solve(m + eye, m).T))


def info_bias(dependence: Sequence[float], tokens: Sequence[float]) -> list[float]:
    """InfoBias of each example of a set: 1 - its dependence on the reference for each token of thinking, brought to
    0 .. 1 over the set. So it compares the examples of one set, and no two sets; where all are equal it is 1.

    Raises InvalidInput for lists of different lengths, or a length that is not above 0.

    >>> info_bias([4.0, 4.0, 1.0], [10, 20, 10])
    [0.0, 0.6666666666666667, 1.0]
    """
    if len(dependence) != len(tokens) or not all(t > 0 for t in tokens):
        raise InvalidInput(f"{len(dependence)} dependences for {len(tokens)} lengths: as many are needed, all above 0")
    each = [d / t for d, t in zip(dependence, tokens, strict=True)]
    low, high = min(each, default=0.0), max(each, default=0.0)
    return [1.0 - ((e - low) / (high - low) if high > low else 0.0) for e in each]


def _centred(x: Any, y: Any, bandwidth: float | None) -> tuple[Any, Any]:
    """Both Gaussian kernels, centred in rows and columns."""
    import numpy as np

    x, y = (np.asarray(a, dtype=np.float64) for a in (x, y))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise InvalidInput(f"shapes {list(x.shape)} and {list(y.shape)}: [n, D] and [n, E] with n of at least 2 needed")
    if bandwidth is not None and not bandwidth > 0:
        raise InvalidInput(f"bandwidth = {bandwidth}: above 0, or None for the median distance")
    kernels = []
    for a in (x, y):
        square = ((a[:, None] - a[None]) ** 2).sum(-1)
        wide = bandwidth
        if wide is None:
            wide = math.sqrt(float(np.median(square[np.tril_indices(len(a), -1)]))) or 1.0
        k = np.exp(-square / (2 * wide**2))
        kernels.append(k - k.mean(0) - k.mean(1, keepdims=True) + k.mean())
    return kernels[0], kernels[1]
