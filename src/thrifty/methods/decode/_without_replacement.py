"""Draft trees drawn without replacement, and their verification: arrays in, arrays out.

A law is a probability vector [V] in float64. Siblings are drawn by the Gumbel-top-k trick, so they are different, and
come in the order of their perturbed scores, which is the order in which they must be verified: given the siblings
before it, each is a draw from the draft's law without them, renormalised, and how many there are does not depend on
which token the next one is. Recursive rejection sampling with that law in every step leaves exactly the target's law.

The stochastic beam is that of Kool, van Hoof and Welling ("Stochastic Beams and Where to Find Them", 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Law = NDArray[np.float64]


def law(
    logits: NDArray[np.floating], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Law:
    """The law that tokens are drawn from: temperature, then top-k, top-p and min-p, each on what the one before left,
    as the local engine draws. `logits` [V] may hold -inf; the temperature is above 0."""
    scaled = logits.astype(np.float64) / temperature
    if not top_k and top_p >= 1 and not min_p:
        return _softmax(scaled)
    order = np.argsort(-scaled, kind="stable")
    kept = scaled[order]
    if top_k:
        kept[top_k:] = -np.inf
    share = _softmax(kept)
    out = share < min_p * share[0]
    if top_p < 1:
        out |= np.cumsum(share) - share >= top_p
    out[0] = False
    kept[out] = -np.inf
    found = np.empty_like(kept)
    found[order] = _softmax(kept)
    return found


@dataclass(frozen=True, slots=True)
class Candidate:
    """One drawn token. `log`: the log-probability of its whole path; `score`: that path's perturbed score."""

    token: int
    log: float = 0.0
    score: float = 0.0


def children(laws: Sequence[Law], n: int, rng: np.random.Generator | None) -> list[list[Candidate]]:
    """RSD-C: for each node of a level, given its law, n different tokens (fewer where the law has fewer), in the order
    of their perturbed scores. Without a generator: the likeliest ones."""
    found = []
    for p in laws:
        scores = _perturbed(_log(p), rng)
        found.append([Candidate(int(x)) for x in _top(scores, n)])
    return found


def beam(
    laws: Sequence[Law], parents: Sequence[Candidate], width: int, rng: np.random.Generator | None
) -> list[list[Candidate]]:
    """RSD-S: one step of stochastic beam search. For each node of a level, given its law, its children among the
    `width` best of all, in the order of their perturbed scores. Without a generator: plain beam search.

    A child's score is conditioned on the largest among its siblings' being its parent's. Where that rounds to ties, the
    unconditioned scores order siblings.
    """
    pool: list[tuple[float, int, Candidate]] = []
    for at, (p, parent) in enumerate(zip(laws, parents, strict=True)):
        logs = parent.log + _log(p)
        raw = _perturbed(logs, rng)
        tokens = _top(raw, width)
        scores = raw if rng is None else truncated(raw, parent.score)
        pool += [(float(scores[x]), at, Candidate(int(x), float(logs[x]), float(scores[x]))) for x in tokens]
    pool.sort(key=lambda entry: -entry[0])  # stable: siblings keep the order of their unconditioned scores
    found: list[list[Candidate]] = [[] for _ in laws]
    for _, at, candidate in pool[:width]:
        found[at].append(candidate)
    return found


def truncated(scores: NDArray[np.float64], top: float) -> NDArray[np.float64]:
    """Gumbel scores [V], conditioned on their maximum being `top`: -log(exp(-top) - exp(-max) + exp(-scores)), without
    overflow.

    >>> truncated(np.array([1.0, 3.0]), 2.0).round(6)
    array([0.798489, 2.      ])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        v = top - scores + np.log1p(-np.exp(scores - scores.max()))
        found: NDArray[np.float64] = top - np.maximum(v, 0.0) - np.log1p(np.exp(-np.abs(v)))
    found[np.isneginf(scores)] = -np.inf
    return found


def choose(q: Law, p: Law | None, siblings: Sequence[int], rng: np.random.Generator) -> tuple[int, int | None]:
    """Recursive rejection sampling at one node: the next token, whose law is q, and its place among the siblings, or
    None.

    `siblings` were drawn from p without replacement, in this order; `p` may be None where there are none.
    """
    for i, token in enumerate(siblings):
        if p is None:
            break
        if rng.random() * p[token] < q[token]:
            return token, i
        left = np.maximum(q - p, 0.0)
        total = left.sum()
        if total <= 0:  # the laws are one up to rounding: what was rejected is as good as any
            return token, i
        q = left / total
        p = without(p, token)
    return draw(q, rng), None


def without(p: Law, token: int) -> Law:
    """The law of the next sibling: p without a token, renormalised (all zero when nothing is left).

    >>> without(np.array([0.5, 0.25, 0.25]), 0)
    array([0. , 0.5, 0.5])
    """
    rest = p.copy()
    rest[token] = 0.0
    total = float(rest.sum())
    if total > 0:
        rest /= total
    return rest


def draw(q: Law, rng: np.random.Generator) -> int:
    """One token of a law; tokens of no mass are never drawn."""
    mass = np.cumsum(q)
    return int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))


def _softmax(logits: NDArray[np.float64]) -> Law:
    shares: Law = np.exp(logits - logits.max())
    shares /= shares.sum()
    return shares


def _log(p: Law) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = np.log(p)
    return found


def _perturbed(logs: NDArray[np.float64], rng: np.random.Generator | None) -> NDArray[np.float64]:
    return logs if rng is None else logs + rng.gumbel(size=logs.shape)


def _top(scores: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    """The n best, best first; ties go to the lower token, and those of no mass are left out."""
    n = min(n, int(np.isfinite(scores).sum()))
    some = np.argpartition(-scores, n - 1)[:n] if 0 < n < len(scores) // 4 else np.arange(len(scores))
    some.sort()
    best: NDArray[np.intp] = some[np.argsort(-scores[some], kind="stable")][:n]
    return best
