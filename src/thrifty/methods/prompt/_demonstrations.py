"""Demonstrations for in-context learning, and the controller that says how many of them a query needs.

Kept together in one JSON file, for a controller's labels hold for the demonstrations they were measured with. numpy is
imported inside functions, for the core has none."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from thrifty.errors import InvalidInput
from thrifty.methods.prompt import _trained

if TYPE_CHECKING:
    from thrifty.methods.prompt._mlp import MLP

KIND = "dynaicl"

Pairs: TypeAlias = Sequence[tuple[str, str]]
"""Inputs with their outputs."""

OURS: tuple[tuple[str, str], ...] = (
    ("What is 17 + 25?", "42"),
    ("A box holds 6 eggs. How many eggs are in 7 boxes?", "42"),
    ("Lea has 30 stamps and gives away 12. How many has she left?", "18"),
    ("What is 9 * 8 - 10?", "62"),
    ("Four friends share 36 nuts equally. How many does each get?", "9"),
    ("A train leaves at 9:40 and arrives at 11:05. How many minutes does it take?", "85"),
    ("Tea costs 3 dollars and cake 4. What do 2 teas and 3 cakes cost in dollars?", "18"),
    ("What is half of 130?", "65"),
    ("Ole reads 15 pages a day. How many pages does he read in two weeks?", "210"),
    ("A shirt of 40 dollars is 25 percent off. What does it cost in dollars?", "30"),
)
"""Ten that are ours, for whoever gives none."""


@dataclass(frozen=True)
class Controller:
    """A network [D -> most + 1] whose outputs k = 0, 1, ... are how likely k examples are the fewest that suffice."""

    network: MLP
    calibration: tuple[float, ...]
    """its predictions on the data it was calibrated on"""

    @property
    def most(self) -> int:
        """The greatest number it may predict."""
        return self.network.outputs - 1

    @property
    def mean(self) -> float:
        """Mean prediction on the calibration data."""
        return math.fsum(self.calibration) / len(self.calibration)

    def predict(self, vectors: Any) -> list[float]:
        """The expected number for each of the embeddings [N, D]. Raises InvalidInput for embeddings of another length,
        which another embedder than the one it was trained on gives."""
        import numpy as np

        from thrifty.methods.prompt._mlp import softmax

        if vectors.shape[1] != self.network.inputs:
            raise InvalidInput(
                f"dynaicl: the controller takes embeddings of {self.network.inputs} numbers and the embedder gives "
                f"{vectors.shape[1]}: use the embedder that it was trained with"
            )
        return [float(c) for c in softmax(self.network(vectors)) @ np.arange(self.most + 1.0)]


@dataclass(frozen=True)
class Pack:
    """Demonstrations in their order; where they are to be found by likeness, their embeddings [n, D]; and where one was
    trained, the controller."""

    demonstrations: tuple[tuple[str, str], ...] = OURS
    vectors: Any = None
    controller: Controller | None = None
    embedder: str = ""
    """the model whose embeddings vectors and controller belong to; another is refused; empty: not known"""

    def save(self, path: str | Path) -> str:
        """Writes the file that the knob `pack` reads, and gives the first digits of its SHA-256."""
        data: dict[str, Any] = {"demonstrations": [{"input": q, "output": a} for q, a in self.demonstrations]}
        if self.embedder:
            data["embedder"] = self.embedder
        if self.vectors is not None:
            data["vectors"] = [[float(x) for x in row] for row in self.vectors]
        if self.controller is not None:
            data |= {"layers": self.controller.network.to_list(), "calibration": list(self.controller.calibration)}
        return _trained.write(path, KIND, data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pack:
        """Reads what `save` writes. Raises InvalidInput."""
        listed = data.get("demonstrations")
        if not isinstance(listed, list) or not listed:
            raise InvalidInput("demonstrations: a list of objects with input and output is needed")
        pairs = []
        for i, entry in enumerate(listed):
            pair = (entry.get("input"), entry.get("output")) if isinstance(entry, Mapping) else (None, None)
            if not isinstance(pair[0], str) or not isinstance(pair[1], str) or not pair[0].strip():
                raise InvalidInput(f"demonstration {i + 1}: texts as input and output are needed")
            pairs.append((pair[0], pair[1]))
        vectors, controller = None, None
        if "vectors" in data or "layers" in data:  # a pack without them needs no numpy
            from thrifty.methods.prompt._mlp import MLP, array

            vectors = array(data["vectors"], 2) if "vectors" in data else None
            if "layers" in data:
                seen = array(data.get("calibration"), 1)
                controller = Controller(MLP.from_list(data["layers"]), tuple(float(c) for c in seen))
                if not controller.mean > 0:
                    raise InvalidInput("calibration: predictions with a mean above 0 are needed")
                if controller.most > len(pairs):
                    raise InvalidInput(
                        f"the controller asks for up to {controller.most} of {len(pairs)} demonstrations"
                    )
        if vectors is not None and len(vectors) != len(pairs):
            raise InvalidInput(f"{len(vectors)} vectors of {len(pairs)} demonstrations: one for each")
        embedder = data.get("embedder", "")
        if not isinstance(embedder, str):
            raise InvalidInput(f"embedder {embedder!r}: the name of a model is needed")
        return cls(tuple(pairs), vectors, controller, embedder)


def shown(pairs: Pairs) -> str:
    """How demonstrations stand in a prompt: so that fewer of them are a prefix of more.

    >>> shown([("1 + 1?", "2")])
    'Examples:\\n\\nQ: 1 + 1?\\nA: 2'
    """
    return "\n\n".join(["Examples:", *(f"Q: {q}\nA: {a}" for q, a in pairs)])


# -- how many for each query ---------------------------------------------------------------------------------


def number(prediction: float, scale: float, most: int) -> int:
    """Examples of one query: scale * prediction rounded (halves up), from 0 to `most`."""
    return max(0, min(most, math.floor(scale * prediction + 0.5)))


def plain_scale(calibration: Sequence[float], shots: float, beta: float = 1.0) -> float:
    """The paper's: n(x) = round(beta * C(x) / mean C * N), so the scale is beta * N / mean C."""
    return beta * shots * len(calibration) / math.fsum(calibration)


def balanced_scale(calibration: Sequence[float], shots: float, most: int, beta: float = 1.0) -> float:
    """The greatest scale at which the mean number on the calibration data, rounded and clipped, is at most beta * N.

    Rounding and clipping make the plain rule drift from its average; here that is at most beta * N, and short of it by
    less than one unit in all where no two predictions are alike."""
    return _balanced(tuple(calibration), shots, most, beta)


@functools.lru_cache(maxsize=64)
def _balanced(calibration: tuple[float, ...], shots: float, most: int, beta: float) -> float:
    steps = sorted((j - 0.5) / c for c in calibration if c > 0 for j in range(1, most + 1))
    allowed = math.floor(beta * shots * len(calibration) + 1e-9)
    if allowed >= len(steps):
        return 2 * steps[-1] if steps else 0.0
    crossed = allowed
    while crossed and not steps[crossed - 1] * (1 + 1e-12) < steps[crossed]:
        crossed -= 1  # equal predictions step together
    return (steps[crossed - 1] + steps[crossed]) / 2 if crossed else steps[0] / 2


def spread(predictions: Sequence[float], shots: float, most: int, beta: float = 1.0) -> list[int]:
    """Numbers of a whole batch known beforehand: in proportion to the predictions, from 0 to `most`, with a sum of
    exactly beta * N a query (rounded down), or `most` for all where that is less."""
    from thrifty.allocate import allocate

    if not predictions:
        return []
    total = min(math.floor(beta * shots * len(predictions) + 1e-9), most * len(predictions))
    return allocate(total, predictions, 0, most)


def smallest_beta(
    predictions: Sequence[float], scores: Any, target: float, shots: float, *, step: float = 0.01
) -> float | None:
    """The smallest beta in (0, 1] for which the plain rule's mean score is at least the target at it and at every
    greater one; None where it is missed at beta = 1. `scores` [N, most + 1] is each query's score with 0, 1, ...
    examples: the paper's second regime, fewer tokens at a fixed accuracy."""
    import numpy as np

    scores = np.asarray(scores, dtype=np.float64)
    found: float | None = None
    for i in range(round(1 / step), 0, -1):
        scale = plain_scale(predictions, shots, i * step)
        chosen = [number(c, scale, scores.shape[1] - 1) for c in predictions]
        if scores[np.arange(len(scores)), chosen].mean() < target:
            break
        found = i * step
    return found
