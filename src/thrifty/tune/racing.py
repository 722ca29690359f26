"""Racing: drops plans that another one beats on score and axis alike, by paired tests on the examples both have seen.

A plan is *dominated* when some other plan scores more and costs less, in the mean over groups of examples. After every
round each plan is compared with those that look undominated, and dropped when both differences are shown: each by a
one-sided paired test at level / (looks * others), others being all plans but itself. So a plan that no other one
dominates is dropped with chance at most `level` over the whole race (an intersection-union test, whose two parts need
no correction between them, and Bonferroni's over looks and rivals), as far as the tests hold their level:

- scores of 0 and 1, one a group: the exact sign test (McNemar's);
- all else: Student's t on the differences, and never below 2^-n, the least that n signs can show, so that a constant
  difference on a few examples proves nothing. On very skewed costs t holds its level only nearly.

The idea of racing by tests is Maron and Moore's ("Hoeffding Races", NeurIPS 1993). It is for search only: the plans
that are left have been looked at, so no statement of confidence may rest on these examples.

Arrays: scores and costs [K plans, G groups], NaN where a plan has not seen a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from thrifty.bench.stats import frontier
from thrifty.errors import InvalidInput

Floats = NDArray[np.float64]

LEAST = 2
"""Groups of which a plan can be dropped at all."""


@dataclass(frozen=True)
class Drop:
    """A dominated plan: indices of it and of the plan that beats it, p values of both parts, groups compared."""

    plan: int
    by: int
    p_score: float
    p_axis: float
    groups: int


def race(
    scores: Floats,
    costs: Floats,
    alive: Sequence[int],
    *,
    level: float,
    looks: int,
    slack: float = 0.0,
    keep: Sequence[int] = (0,),
) -> list[Drop]:
    """The plans among `alive` that one look shows to be dominated; those in `keep` never are (the reference).

    `looks`: how often the race looks in all. `slack`: also drops plans that cost more and are shown to score less than
    `slack` above the other one. All rows of the tables count as rivals in the correction, those dropped before too.

    Raises InvalidInput for a level outside (0, 1), fewer than one look or a negative slack.
    """
    if not 0 < level < 1 or looks < 1 or slack < 0:
        raise InvalidInput(
            f"level = {level}, looks = {looks}, slack = {slack}: a level between 0 and 1, at least 1 look and a slack "
            "of at least 0 are needed"
        )
    bar = level / (looks * max(1, len(scores) - 1))
    dropped: dict[int, Drop] = {}
    for rival in _challengers(scores, costs, alive):
        others = [i for i in alive if i != rival and i not in keep and i not in dropped]
        if not others:
            continue
        p_score = p_less(scores[others] - scores[rival] - slack)
        p_axis = p_less(costs[rival] - costs[others])
        both = (~np.isnan(scores[others]) & ~np.isnan(scores[rival])).sum(axis=1)
        for i, ps, pa, n in zip(others, p_score, p_axis, both, strict=True):
            if max(ps, pa) <= bar:
                dropped[i] = Drop(i, rival, float(ps), float(pa), int(n))
    return [dropped[i] for i in sorted(dropped)]


def p_less(differences: Floats) -> Floats:
    """One-sided p values of H0: the mean of a row is at least 0, for rows [K, G] with NaN for what is missing. [K].

    1 for a row of fewer than two values. See the top of the module for the tests.
    """
    there = ~np.isnan(differences)
    n = there.sum(axis=1)
    d = np.where(there, differences, 0.0)
    signs = np.where(there, np.isin(differences, (-1.0, 0.0, 1.0)), True).all(axis=1)
    up, down = (d > 0).sum(axis=1), (d < 0).sum(axis=1)
    exact = distributions.binom.cdf(up, up + down, 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = d.sum(axis=1) / n
        spread = np.where(there, differences - mean[:, None], 0.0)
        error = np.sqrt((spread**2).sum(axis=1) / (n - 1) / n)
        t = distributions.t.cdf(mean / error, n - 1)
    flat = ~(error > 1e-12 * np.abs(mean))  # a constant difference: no spread to divide by
    t = np.where(flat, np.where(mean < 0, 0.0, 1.0), t)
    p = np.where(signs, exact, np.maximum(t, 0.5 ** n.astype(np.float64)))
    return np.asarray(np.where(n < LEAST, 1.0, np.minimum(p, 1.0)), dtype=np.float64)


def cuts(groups: int, first: int, growth: float) -> list[int]:
    """After how many groups each round ends: `first`, then `growth` times as many, and at last all of them.

    >>> cuts(50, 8, 2.0)
    [8, 16, 32, 50]
    """
    if groups < 1 or first < 1 or growth <= 1:
        raise InvalidInput(
            f"groups = {groups}, first = {first}, growth = {growth}: at least 1, at least 1 and above 1 are needed"
        )
    found = [min(first, groups)]
    while found[-1] < groups:
        found.append(min(groups, max(found[-1] + 1, round(found[-1] * growth))))
    if len(found) > 1 and found[-1] < found[-2] * (1 + (growth - 1) / 4):
        del found[-2]  # the last round would add next to nothing: one look less
    return found


def means(table: Floats) -> Floats:
    """Row means over what is there; NaN for an empty row. [K]."""
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, table, 0.0).sum(axis=1) / there.sum(axis=1), dtype=np.float64)


def _challengers(scores: Floats, costs: Floats, alive: Sequence[int]) -> list[int]:
    """The plans that look undominated, cheapest first."""
    s, c = means(scores[list(alive)]), means(costs[list(alive)])
    known = [i for i in range(len(alive)) if not (np.isnan(s[i]) or np.isnan(c[i]))]
    if not known:
        return []
    return [alive[known[i]] for i in frontier(s[known], c[known])]
