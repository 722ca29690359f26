"""Trees drawn without replacement: the target's law comes out exactly, on laws small enough to count."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from thrifty import Sampling
from thrifty.engines.local import sampling
from thrifty.methods.decode import _without_replacement as drawing
from thrifty.methods.decode._without_replacement import Candidate, Law, beam, children, choose, law, truncated, without

Q = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
P = np.array([0.5, 0.1, 0.2, 0.05, 0.15])
Q2 = np.array([np.roll(Q, i) for i in (1, 3, 0, 2, 4)])
P2 = np.array([np.roll(P, i) for i in (0, 2, 4, 1, 3)])
Choose = Callable[..., tuple[int, int | None]]


def chance(counts: np.ndarray, expected: Law) -> float:
    """p-value of counts [V] under a law [V]."""
    return float(stats.chisquare(counts, expected * counts.sum()).pvalue)


def siblings(variant: str, k: int, rng: np.random.Generator) -> list[int]:
    """The root's children in the order of verification."""
    if variant == "rsd-c":
        return [c.token for c in children([P], k, rng)[0]]
    return [c.token for c in beam([P], [Candidate(-1)], k, rng)[0]]


def replacing(q: Law, p: Law | None, tokens: list[int], rng: np.random.Generator) -> tuple[int, int | None]:
    """The broken one: the draft's law keeps what was rejected, as if siblings were drawn with replacement."""
    for i, token in enumerate(tokens):
        assert p is not None
        if rng.random() * p[token] < q[token]:
            return token, i
        q = np.maximum(q - p, 0.0) / np.maximum(q - p, 0.0).sum()
    return drawing.draw(q, rng), None


def first_tokens(variant: str, k: int, n: int, rule: Choose = choose, backwards: bool = False) -> np.ndarray:
    rng = np.random.default_rng(k)
    counts = np.zeros(5)
    for _ in range(n):
        drawn = siblings(variant, k, rng)
        counts[rule(Q, P, drawn[::-1] if backwards else drawn, rng)[0]] += 1
    return counts


@pytest.mark.parametrize("variant", ["rsd-c", "rsd-s"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_output_law_is_the_targets(variant: str, k: int) -> None:
    assert chance(first_tokens(variant, k, 8_000), Q) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rsd-c", "rsd-s"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_output_law_is_the_targets_on_many_samples(variant: str, k: int) -> None:
    assert chance(first_tokens(variant, k, 100_000), Q) > 1e-3


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_residual_with_replacement_is_found_out(k: int) -> None:
    assert chance(first_tokens("rsd-c", k, 8_000, replacing), Q) < 1e-6


def test_verifying_siblings_backwards_is_found_out() -> None:
    assert chance(first_tokens("rsd-c", 3, 8_000, backwards=True), Q) < 1e-6


class Fixed:
    """Gives uniform numbers from a list: a generator that an enumeration can steer."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


NEVER = 1 - 2**-53
"""The largest uniform number: it rejects whatever is not accepted for sure."""


def edge(holds: Callable[[float], bool]) -> float:
    """The largest number in [0, 1] up to which `holds`, which holds for small ones: by bisection."""
    low, high = 0.0, 1.0
    if not holds(0.0):
        return 0.0
    if holds(NEVER):
        return 1.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@pytest.mark.parametrize("rule", [choose, replacing])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_law_by_enumeration(k: int, rule: Choose) -> None:
    """Over all ordered draws of k siblings: their probability, times that of each way to accept or reject them, which
    is measured by the uniform numbers at which the rule turns. The sum is q; with the broken rule it is not."""
    total = np.zeros(5)
    for drawn in permutations(range(5), k):
        weight, rest = 1.0, 1.0
        for token in drawn:
            weight, rest = weight * P[token] / rest, rest - P[token]

        def result(*uniform: float, drawn: tuple[int, ...] = drawn) -> tuple[int, int | None]:
            return rule(Q, P, list(drawn), Fixed(*uniform, *[NEVER] * k))

        for i, token in enumerate(drawn):
            accepted = edge(lambda u, i=i, f=result: f(*[NEVER] * i, u)[1] == i)
            total[token] += weight * accepted
            weight *= 1 - accepted
        if weight:
            ends = [edge(lambda u, t=t, f=result: f(*[NEVER] * k, u)[0] <= t) for t in range(5)]
            total += weight * np.diff([0.0, *ends])
    assert total.sum() == pytest.approx(1, abs=1e-9)
    right = np.abs(total - Q).max() < 1e-9
    assert right == (rule is choose or k == 1)


def walk(variant: str, rng: np.random.Generator) -> tuple[int, int] | None:
    """Two tokens down a tree of two levels; None where the first was none of the tree's."""
    if variant == "rsd-c":
        top = children([P], 2, rng)[0]
        below = children([P2[c.token] for c in top], 2, rng)
    else:
        top = beam([P], [Candidate(-1)], 3, rng)[0]
        below = beam([P2[c.token] for c in top], top, 3, rng)
    one, at = choose(Q, P, [c.token for c in top], rng)
    if at is None:
        return None
    two, _ = choose(Q2[one], P2[one], [c.token for c in below[at]], rng)
    return one, two


def conditional(variant: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    counts = np.zeros((5, 5))
    for _ in range(n):
        pair = walk(variant, rng)
        if pair is not None:
            counts[pair] += 1
    return counts


@pytest.mark.parametrize("variant", ["rsd-c", "rsd-s"])
def test_the_second_token_has_its_conditional_law(variant: str) -> None:
    """In a beam some nodes have no children left: how many there are must tell nothing of the next token."""
    counts = conditional(variant, 3_000)
    assert min(chance(counts[x], Q2[x]) for x in range(5)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rsd-c", "rsd-s"])
def test_the_second_token_has_its_conditional_law_on_many_samples(variant: str) -> None:
    counts = conditional(variant, 100_000)
    assert min(chance(counts[x], Q2[x]) for x in range(5)) > 1e-3


@pytest.mark.parametrize("variant", ["rsd-c", "rsd-s"])
def test_a_draft_that_is_the_target_is_always_accepted(variant: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        drawn = siblings(variant, 3, rng)
        assert choose(P, P, drawn, rng) == (drawn[0], 0)


laws = st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5).filter(lambda x: sum(x) > 1e-3)


@settings(deadline=None, max_examples=60)
@given(laws, laws, st.integers(1, 7), st.integers(0, 2**32))
def test_siblings_differ_and_have_mass(one: list[float], two: list[float], k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    given_laws = [np.array(x) / sum(x) for x in (one, two)]
    trees = [
        children(given_laws, k, rng),
        beam(given_laws, [Candidate(0, -0.3, 0.2), Candidate(1, -1.5, -2.0)], k, rng),
    ]
    for groups in trees:
        for p, group in zip(given_laws, groups, strict=True):
            tokens = [c.token for c in group]
            assert len(set(tokens)) == len(tokens) and (p[tokens] > 0).all()
    assert [len(g) for g in trees[0]] == [min(k, int((p > 0).sum())) for p in given_laws]
    assert sum(map(len, trees[1])) == min(k, sum(int((p > 0).sum()) for p in given_laws))


@settings(deadline=None, max_examples=60)
@given(laws, laws, st.integers(0, 4), st.integers(0, 2**32))
def test_what_is_chosen_has_mass_in_the_target(one: list[float], two: list[float], k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, p = np.array(one) / sum(one), np.array(two) / sum(two)
    drawn = [c.token for c in children([p], k, rng)[0]] if k else []
    token, at = choose(q, p if k else None, drawn, rng)
    assert q[token] > 0 and (at is None or drawn[at] == token)


def test_a_wide_beam_draws_whole_sequences_by_their_probability() -> None:
    """Of sequences drawn without replacement the first has the law of one draw: p(x) p(y | x)."""
    rng = np.random.default_rng(3)
    counts = np.zeros(25)
    for _ in range(3_000):
        top = beam([P], [Candidate(-1)], 3, rng)[0]
        groups = beam([P2[c.token] for c in top], top, 3, rng)
        pairs = [(c.score, a.token, c.token) for a, group in zip(top, groups, strict=True) for c in group]
        _, x, y = max(pairs)
        counts[5 * x + y] += 1
    assert chance(counts, (P[:, None] * P2).ravel()) > 1e-3


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6, unique=True), st.floats(-20, 20))
def test_conditioned_scores_are_those_of_the_formula(raw: list[float], top: float) -> None:
    wide = np.array(raw, dtype=np.longdouble)
    with np.errstate(divide="ignore"):
        expected = -np.log(np.exp(-np.longdouble(top)) - np.exp(-wide.max()) + np.exp(-wide))
    found = truncated(np.array(raw), top)
    assert found.max() == top and np.allclose(found, expected.astype(float), rtol=1e-6, atol=1e-6)


def test_conditioned_scores_survive_extremes_and_ties_keep_the_order_drawn() -> None:
    raw = np.array([900.0, 901.0, -900.0, -np.inf])
    found = truncated(raw, -800.0)
    assert found[1] == -800.0 and not np.isnan(found).any() and np.isneginf(found[3])
    assert found[0] == found[1]  # the truncated scores tie in float64 ...
    q = np.array([0.2, 0.5, 0.3])
    for seed in range(50):  # ... and the children still come in the order of the scores before that
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        group = beam([q], [Candidate(0, 0.0, -800.0)], 3, rng)[0]
        assert [c.token for c in group] == list(np.argsort(-(np.log(q) + again.gumbel(size=3))))


def test_without_noise_the_likeliest_are_drawn() -> None:
    assert [c.token for c in children([P], 3, None)[0]] == [0, 2, 4]
    groups = beam([P2[0], P2[1]], [Candidate(0, np.log(0.6)), Candidate(1, np.log(0.4))], 3, None)
    joint = sorted(((0.6 * P2[0][x], 0, x) for x in range(5)), reverse=True)
    joint = sorted([*joint, *((0.4 * P2[1][x], 1, x) for x in range(5))], reverse=True)[:3]
    assert sorted((at, c.token) for at, g in enumerate(groups) for c in g) == sorted((at, x) for _, at, x in joint)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32),
    st.floats(0.1, 5),
    st.integers(0, 12),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_the_law_is_the_one_the_engine_draws_from(
    seed: int, heat: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=10) * 3
    logits[2] = -np.inf
    made = Sampling(temperature=heat, top_k=top_k, top_p=top_p, min_p=min_p)
    sampler = sampling.Sampler(made, 0)
    scaled = torch.tensor(logits)[None] / heat
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    engine = torch.empty(10, dtype=torch.float64)
    engine[order[0]] = sampling._filtered(ordered, [sampler]).softmax(-1)[0]
    found = law(logits, heat, top_k, top_p, min_p)
    assert np.allclose(found, engine.numpy(), atol=1e-12)


def test_the_law_without_a_token() -> None:
    assert without(P, 0).sum() == pytest.approx(1) and without(P, 0)[0] == 0
    assert not without(np.array([0.0, 1.0]), 1).any()
