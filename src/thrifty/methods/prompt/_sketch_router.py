"""The router of Sketch-of-Thought: which way of sketching suits a question, from its embedding or from its words.

`Router` is a multinomial logistic regression on unit sentence vectors. It belongs to one embedder: weights fitted on
the vectors of one say nothing about those of another, so a router lists the models it may be used with. The paper
fine-tunes DistilBERT; its weights come in no package, and a linear layer on MiniLM does on a CPU. `by_words` needs no
embedder at all. Of 60 questions held out, 20 a paradigm, the router that ships is right on 59 and `by_words` on 47 (on
9 of the 20 technical ones); the router is an English one, as MiniLM is.

Invariants: `fit` is deterministic; a router read back from `to_json` routes alike; ties go to the first paradigm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PARADIGMS = ("chunked_symbolism", "conceptual_chaining", "expert_lexicons")

SHIPPED = Path(__file__).with_name("_sketch_router.json")
"""Fitted by `recipes/sketch_router` on its own questions, for all-MiniLM-L6-v2."""

_MOST_BYTES = 4_000_000
_MOST_CHARACTERS = 20_000  # words beyond these do not change what a question is about, and would take time


@dataclass(frozen=True)
class Router:
    """`weights` [paradigms, D] and `bias` [paradigms], in the order of PARADIGMS; `embedders`: the models it suits."""

    embedders: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.weights}
        numbers = [*self.bias, *(x for row in self.weights for x in row)]
        if len(self.weights) != len(PARADIGMS) or len(self.bias) != len(PARADIGMS) or len(widths) != 1 or 0 in widths:
            raise InvalidInput(f"a sketch router needs {len(PARADIGMS)} rows of weights of one length, and a bias each")
        if not all(math.isfinite(x) for x in numbers):
            raise InvalidInput("a sketch router needs finite weights")

    @property
    def dimensions(self) -> int:
        """D, the length of the vectors it takes."""
        return len(self.weights[0])

    def suits(self, model: str) -> bool:
        """Whether it was fitted on vectors of this embedding model; paths, case and `local:` make no difference."""
        return re.split(r"[/\\:]", model.lower())[-1] in self.embedders

    def probabilities(self, vector: Sequence[float]) -> list[float]:
        """Of each paradigm, for one vector [D]; they sum to 1. Raises InvalidInput for another length."""
        if len(vector) != self.dimensions:
            raise InvalidInput(f"the sketch router takes vectors of {self.dimensions} numbers, not {len(vector)}")
        logits = [
            math.fsum(w * float(x) for w, x in zip(row, vector, strict=True)) + b
            for row, b in zip(self.weights, self.bias, strict=True)
        ]
        top = max(logits)
        parts = [math.exp(z - top) for z in logits]
        return [p / math.fsum(parts) for p in parts]

    def to_json(self) -> str:
        """As `read_router` reads it; weights to six digits."""
        rows = [[float(f"{x:.6g}") for x in row] for row in self.weights]
        body = {"paradigms": PARADIGMS, "embedders": self.embedders, "bias": [float(f"{x:.6g}") for x in self.bias]}
        return json.dumps({**body, "weights": rows}, separators=(",", ":")) + "\n"


def fit(
    vectors: npt.NDArray[np.floating[Any]],
    labels: Sequence[int],
    embedders: Sequence[str],
    *,
    penalty: float = 1.0,
    tolerance: float = 1e-9,
) -> Router:
    """Logistic regression by Newton's method on all examples at once.

    `vectors` [N, D], `labels` [N] index PARADIGMS, each of which needs an example. It minimises
    sum_i -log p(label_i | v_i) + |W|^2 / (2 penalty), the bias unpunished (scikit-learn's C). With N below D the
    weights are sums of the vectors, so Newton runs on the N + 1 by N + 1 problem. Raises InvalidInput.
    """
    import numpy as np

    x = np.asarray(vectors, dtype=np.float64)
    y = np.asarray(labels, dtype=np.int64)
    if x.ndim != 2 or y.shape != x.shape[:1] or set(y.tolist()) != set(range(len(PARADIGMS))) or penalty <= 0:
        raise InvalidInput(
            "fitting needs vectors [N, D], one label a vector, examples of each paradigm, penalty above 0"
        )
    # W = A basis, where basis is an orthonormal basis of the span of the vectors: |W|^2 = |A|^2
    _, size, rows = np.linalg.svd(x, full_matrices=False)
    basis = rows[size > size.max() * 1e-10]
    features = np.hstack([x @ basis.T, np.ones((len(x), 1))])  # [N, R + 1]
    width, classes = features.shape[1], len(PARADIGMS)
    ridge = np.full(width, 1.0 / penalty)
    ridge[-1] = 0.0
    onehot = np.eye(classes)[y]
    a = np.zeros((classes, width))

    def value(a: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        logits = features @ a.T
        top = logits.max(axis=1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        loss = float((log_sum - (logits * onehot).sum(axis=1)).sum() + 0.5 * (ridge * a * a).sum())
        return loss, np.exp(logits - log_sum[:, None])

    loss, p = value(a)
    for _ in range(100):
        gradient = (p - onehot).T @ features + ridge * a
        if np.abs(gradient).max() < tolerance:
            break
        hessian = np.zeros((classes, width, classes, width))
        for i in range(classes):
            for j in range(classes):
                curve = p[:, i] * ((i == j) - p[:, j])
                hessian[i, :, j, :] = (features * curve[:, None]).T @ features
            hessian[i, :, i, :] += np.diag(ridge)
        flat = hessian.reshape(classes * width, classes * width)
        # adding one number to every bias changes nothing: the least squares step leaves their sum alone
        step = np.linalg.lstsq(flat, gradient.reshape(-1), rcond=1e-12)[0].reshape(classes, width)
        size_of_step = 1.0
        while size_of_step > 1e-8:
            new_loss, new_p = value(a - size_of_step * step)
            if new_loss <= loss:
                break
            size_of_step /= 2
        else:
            break
        a, loss, p = a - size_of_step * step, new_loss, new_p
    weights = a[:, :-1] @ basis
    return Router(tuple(embedders), tuple(map(tuple, weights.tolist())), tuple(a[:, -1].tolist()))


def read_router(path: str | Path) -> Router:
    """Reads what `Router.to_json` wrote. Raises InvalidInput, naming the file."""
    file = Path(path)
    try:
        state = file.stat()
        if state.st_size > _MOST_BYTES:
            raise InvalidInput(f"sketch router {file}: over {_MOST_BYTES:,} bytes: it is none")
        return _read(str(file), state.st_mtime_ns, state.st_size)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidInput(f"sketch router {file}: cannot be read: {error}") from error
    except InvalidInput as error:
        raise InvalidInput(f"sketch router {file}: {error}") from error


@lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> Router:
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    if tuple(data["paradigms"]) != PARADIGMS:
        raise ValueError(f"paradigms {data['paradigms']} are not {list(PARADIGMS)}")
    weights = tuple(tuple(float(x) for x in row) for row in data["weights"])
    return Router(tuple(str(m) for m in data["embedders"]), weights, tuple(float(x) for x in data["bias"]))


def by_words(question: str) -> str:
    """The paradigm that a question's own words suggest: symbols for two numbers or words of reckoning, lexicons for
    technical words, else chaining.

    >>> by_words("What do 14 pens at 3 dollars cost?"), by_words("Who wrote Faust?"), by_words("What does DNA encode?")
    ('chunked_symbolism', 'conceptual_chaining', 'expert_lexicons')
    """
    question = question[:_MOST_CHARACTERS]
    numbers = len(re.findall(r"\d+(?:[.,]\d+)*", question))
    reckoning = len(_RECKONING.findall(question))
    technical = len(_TECHNICAL.findall(question)) + len(_ABBREVIATION.findall(question))
    if numbers >= 2 or (numbers + reckoning >= 2 and reckoning >= technical):
        return PARADIGMS[0]
    return PARADIGMS[2] if technical else PARADIGMS[1]


_RECKONING = re.compile(
    r"\b(?:how (?:many|much|long|far|fast)|calculate|compute|solve|evaluate|simplify|convert|integrate|derivative|"
    r"sum|product|average|mean|percent\w*|probability|chance|ratio|area|volume|perimeter|equation|remainder|divided|"
    r"interest|per (?:hour|day|week|month|year)|times as)\b|[=+*/^%]|\b[xy]\b",
    re.IGNORECASE,
)
_TECHNICAL = re.compile(
    r"\b(?:\w{4,}(?:itis|osis|aemia|emia|ology|ase|ergic|lytic|philic|phobic|cyte|cytes)|patient|diagnos\w+|clinical|"
    r"syndrome|therapy|drug|dose|antibiotic\w*|hormone\w*|receptor\w*|enzyme\w*|protein\w*|cells?|nerve|muscle|"
    r"molecul\w+|reaction|catalyst\w*|isotope\w*|entropy|quantum|electron\w*|circuit\w*|transistor\w*|voltage|"
    r"algorithm\w*|complexity|database\w*|protocol\w*|compiler|thread\w*|memory|encryption|network\w*|function\w*|"
    r"gradient|kernel|theorem|principle|mechanism|statute|liability|tort|alloy\w*|stress|fluid)\b",
    re.IGNORECASE,
)
_ABBREVIATION = re.compile(r"\b(?!(?:USA?|UK|EU|UN|TV|OK|AM|PM|I)\b)[A-Z]{2}[A-Z0-9]*s?\b")
