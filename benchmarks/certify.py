"""Are certificates valid, and what does validity cost? Synthetic problems whose true mean losses are known.

    python benchmarks/certify.py [--problems 2000] [--seed 0] [--json]

Learn then Test: each problem has several plans with correlated losses. In half of the problems ("edge") every plan is
just above alpha, so that any certificate is wrong; in the others the true loss goes up and down along the plans, which
are tested from the dearest to the cheapest, or along the Pareto front of a search sample of its own. Printed for each
loss and bound:

- wrong: problems with a certificate for a plan that is above alpha, with the standard error; `p` is the chance of as
  many if the true rate were delta, and a row with p below 0.001 is red;
- cost: outside the edge, the mean cost of the cheapest certified plan, where the reference costs 1 and stands in where
  nothing, or something wrong, is certified; beside it that of an oracle who knows the true losses, and of a plain
  Hoeffding bound on every plan with delta divided among them. Saved: the share of the oracle's saving.

Conformal risk control: the mean true loss of the chosen setting minus alpha, with its standard error; red if above 0 by
more than three of them. "Rising" losses rise on every example from setting to setting, and the law is nearly reached;
others jump. The last row of each table is broken on purpose, and has to be red.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import binom

from thrifty.bench.stats import frontier
from thrifty.tune.bounds import p_value
from thrifty.tune.crc import conformal_risk_control
from thrifty.tune.losses import Losses, LossKind
from thrifty.tune.ltt import fixed_sequence

Floats = NDArray[np.float64]
Test = Callable[[Losses, float], float]  # losses and alpha to a p value
Sequence = Callable[[Iterable[float], float], int]  # p values and delta to a number of certified plans
Choose = Callable[[Floats, float, float, float], int | None]  # table, alpha, low, high to a setting

DELTA = 0.1
RED = 0.001  # a row is red if chance alone explains it with less than this
SEARCH = 100  # groups in the search sample
SHAPES = ("0/1", "partial", "groups", "drop")
"""Losses of 0 and 1; of any value between; means of groups of three; differences of -1, 0 and 1."""


@dataclass(frozen=True)
class Problem:
    """Plans with true mean losses `risks` [m] and `costs` [m] (the reference costs 1); `order` is that of testing."""

    shape: str
    edge: bool
    alpha: float
    risks: Floats
    costs: Floats
    losses: Floats  # [n, m]
    order: NDArray[np.intp]

    @property
    def kind(self) -> LossKind:
        return "drop" if self.shape == "drop" else "error"

    @property
    def low(self) -> float:
        return -1.0 if self.shape == "drop" else 0.0

    def column(self, plan: int) -> Losses:
        """One plan's losses."""
        return Losses(self.kind, self.losses[:, plan], self.low, 1.0, names(len(self.losses)))


@dataclass(frozen=True)
class LttRow:
    """What one bound did on the problems of one shape."""

    shape: str
    bound: str
    problems: int
    wrong: int
    p: float
    edge_problems: int
    edge_wrong: int
    edge_p: float
    certified: float
    cost: float
    cost_error: float
    cost_oracle: float
    cost_hoeffding: float
    red: bool

    @property
    def saved(self) -> float:
        """The share of the oracle's saving."""
        return (1 - self.cost) / (1 - self.cost_oracle)


@dataclass(frozen=True)
class CrcRow:
    """What conformal risk control did on the problems of one shape; `excess` = mean true loss - alpha."""

    shape: str
    rising: bool
    rule: str
    problems: int
    excess: float
    error: float
    chosen: float
    saved: float
    red: bool


@functools.cache
def names(n: int) -> tuple[str, ...]:
    return tuple(f"{i:06}" for i in range(n))


# Problems.


def sample(rng: np.random.Generator, shape: str, risks: Floats, n: int, related: float, gains: float) -> Floats:
    """Losses [n, m] whose true means are exactly `risks`; the plans share `related` of each example's difficulty."""

    def ranks(count: int) -> Floats:
        common = rng.standard_normal((count, 1))
        own = rng.standard_normal((count, len(risks)))
        return np.asarray(ndtr(math.sqrt(related) * common + math.sqrt(1 - related) * own), dtype=np.float64)

    if shape == "0/1":
        return (ranks(n) < risks).astype(np.float64)
    if shape == "partial":
        return np.asarray(ranks(n) ** (1 / risks - 1), dtype=np.float64)  # the mean of u^k is 1 / (k + 1)
    if shape == "groups":
        return np.asarray((ranks(3 * n) < risks).reshape(n, 3, -1).mean(axis=1))
    u = ranks(n)
    return (u < risks + gains).astype(np.float64) - (u > 1 - gains)


def draw(rng: np.random.Generator, shape: str, edge: bool) -> Problem:
    """One problem: 2 to 10 plans, 50 to 800 groups."""
    m, n = int(rng.integers(2, 11)), int(rng.choice([50, 100, 200, 400, 800]))
    alpha = float(rng.uniform(0.02, 0.15) if shape == "drop" else rng.uniform(0.03, 0.25))
    related, gains = float(rng.uniform(0, 0.98)), float(rng.uniform(0, 0.1))
    costs = np.sort(rng.uniform(0.1, 1.0, m))[::-1]
    order = np.arange(m)
    if edge:
        risks = np.full(m, alpha * (1 + 1e-6))
    elif rng.random() < 0.5:  # loss rises as the cost falls, with bumps
        rise = np.linspace(rng.uniform(0.05, 0.6), rng.uniform(1.2, 3.0), m)
        risks = alpha * np.clip(rise * rng.lognormal(0, 0.3, m), 0.01, 3.9)
    else:  # loss has nothing to do with the cost
        risks = alpha * rng.uniform(0.05, 2, m)
    if not edge and rng.random() < 0.5:
        found = sample(rng, shape, risks, SEARCH, related, gains).mean(axis=0)
        order = np.array(frontier(1 - found, costs)[::-1])
    return Problem(shape, edge, alpha, risks, costs, sample(rng, shape, risks, n, related, gains), order)


# Learn then Test.


def learn_then_test(
    test: Test, shape: str, bound: str, problems: int, seed: int, sequence: Sequence = fixed_sequence
) -> LttRow:
    """Runs `test` on the problems of a seed; half of them are on the edge."""
    rng = np.random.default_rng([seed, SHAPES.index(shape)])
    wrong, edge_wrong, certified = 0, 0, 0
    savings: list[list[float]] = []  # ours, the oracle's, the plain bound's
    edges = (problems + 1) // 2
    for number in range(problems):
        problem = draw(rng, shape, number < edges)
        above = problem.risks > problem.alpha
        count = sequence((test(problem.column(i), problem.alpha) for i in problem.order), DELTA)
        if above[problem.order[:count]].any():
            wrong += 1
            edge_wrong += problem.edge
        if problem.edge:
            continue
        certified += count > 0
        chosen = (problem.order[:count], np.flatnonzero(~above), hoeffding_grid(problem))
        savings.append([saving(problem, plans) for plans in chosen])
    p, edge_p = (float(binom.sf(k - 1, n, DELTA)) for k, n in ((wrong, problems), (edge_wrong, edges)))
    cost, oracle, plain = (float(c) for c in 1 - np.mean(savings, axis=0))
    error = float(np.std(savings, axis=0, ddof=1)[0]) / math.sqrt(len(savings))
    return LttRow(shape, bound, problems, wrong, p, edges, edge_wrong, edge_p, certified / len(savings), cost, error,
                  oracle, plain, min(p, edge_p) < RED)  # fmt: skip


def saving(problem: Problem, chosen: NDArray[np.intp]) -> float:
    """What the cheapest of the chosen plans saves; nothing where it is not allowed or none is chosen."""
    if not len(chosen):
        return 0.0
    plan = chosen[problem.costs[chosen].argmin()]
    return 0.0 if problem.risks[plan] > problem.alpha else 1 - float(problem.costs[plan])


def hoeffding_grid(problem: Problem) -> NDArray[np.intp]:
    """Plans that a Hoeffding bound certifies with delta divided among them all."""
    n, m = problem.losses.shape
    margin = (1 - problem.low) * math.sqrt(math.log(m / DELTA) / (2 * n))
    return np.flatnonzero(problem.losses.mean(axis=0) + margin <= problem.alpha)


# Conformal risk control.


def risk_control(choose: Choose, shape: str, rising: bool, rule: str, problems: int, seed: int) -> CrcRow:
    """Runs `choose` on tables of 100 settings that rise on every example, or of 30 that jump.

    Under `drop` the first setting is the reference; elsewhere a problem without a feasible setting counts as loss 0.
    """
    rng = np.random.default_rng([seed, 100 + 2 * SHAPES.index(shape) + rising])
    excess, chosen, ours, best = [], 0, 0.0, 0.0
    for _ in range(problems):
        n, alpha = int(rng.integers(20, 121)), float(rng.choice([0.05, 0.1, 0.2]))
        gains, related = float(rng.uniform(0, 0.1)), 1.0
        risks = np.sort(rng.uniform(0.001, 3 * alpha, 100 if rising else 30))
        if not rising:
            risks, related = np.minimum(risks * rng.lognormal(0, 0.2, 30), 0.9), float(rng.uniform(0.5, 0.98))
        table = sample(rng, shape, risks, n, related, gains)
        if shape == "drop":
            risks[0], table[:, 0] = 0.0, 0.0
        index = choose(table, alpha, -1.0 if shape == "drop" else 0.0, 1.0)
        excess.append((0.0 if index is None else float(risks[index])) - alpha)
        chosen += index is not None
        ours += 0 if index is None else index
        best += int(np.flatnonzero(risks <= alpha).max(initial=0))
    mean, error = float(np.mean(excess)), float(np.std(excess, ddof=1)) / math.sqrt(problems)
    return CrcRow(shape, rising, rule, problems, mean, error, chosen / problems, ours / best, mean > 3 * error)


def controlled(table: Floats, alpha: float, low: float, high: float) -> int | None:
    """The setting that conformal risk control chooses."""
    return conformal_risk_control(table, alpha, low, high).index


# Broken on purpose: each must come out red.


def too_lenient(losses: Losses, alpha: float) -> float:
    """Clopper-Pearson at one and a half times alpha."""
    return p_value("clopper-pearson", losses, 1.5 * alpha)


def uncorrected(table: Floats, alpha: float, low: float, high: float) -> int | None:
    """Risk control without the + B: the cheapest setting whose mean is at most alpha."""
    feasible = np.flatnonzero(np.maximum.accumulate(table, axis=1).mean(axis=0) <= alpha)
    return int(feasible[-1]) if len(feasible) else None


def rows(problems: int, seed: int) -> tuple[list[LttRow], list[CrcRow]]:
    """Both tables; the last row of each is the broken one."""
    first = []
    for shape in SHAPES:
        for bound in ("clopper-pearson", "hoeffding-bentkus", "betting"):
            if bound != "clopper-pearson" or shape == "0/1":
                first.append(learn_then_test(functools.partial(p_value, bound), shape, bound, problems, seed))
    first.append(learn_then_test(too_lenient, "0/1", "broken: 1.5 alpha", problems, seed))
    second = [risk_control(controlled, s, rising, "crc", problems, seed) for s in SHAPES for rising in (True, False)]
    second.append(risk_control(uncorrected, "0/1", True, "broken: no + B", problems, seed))
    return first, second


def rate(k: int, n: int) -> str:
    """A share with its standard error, in percent."""
    return f"{k / n:.1%} +- {math.sqrt(k / n * (1 - k / n) / n):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.problems < 10:
        parser.error(f"--problems must be at least 10, not {given.problems}")
    start = time.perf_counter()
    first, second = rows(given.problems, given.seed)
    took = time.perf_counter() - start
    if given.json:
        result: dict[str, Any] = {"delta": DELTA, "seed": given.seed, "seconds": round(took, 1)}
        result |= {"ltt": [asdict(r) for r in first], "crc": [asdict(r) for r in second]}
        print(json.dumps(result, indent=1))
        return
    print(f"Learn then Test, delta {DELTA}, {given.problems:,} problems a row, half of them on the edge")
    print(f"{'loss':8} {'bound':18} {'wrong':>13} {'p':>6} {'on edge':>13} {'p':>6} {'cost':>14} oracle Hoeff. saved")
    for a in first:
        overall, edge = rate(a.wrong, a.problems), rate(a.edge_wrong, a.edge_problems)
        print(
            f"{a.shape:8} {a.bound:18} {overall:>13} {a.p:6.3f} {edge:>13} {a.edge_p:6.3f} "
            f"{a.cost:.3f} +- {a.cost_error:.3f} {a.cost_oracle:6.3f} {a.cost_hoeffding:6.3f} {a.saved:5.0%}"
            f"{'  RED' if a.red else ''}"
        )
    print(f"\nConformal risk control, {given.problems:,} problems a row")
    print(f"{'loss':8} {'':8} {'rule':20} {'mean loss - alpha':>20}  chosen  settings reached")
    for c in second:
        excess = f"{c.excess:+.4f} +- {c.error:.4f}"
        way = "rising" if c.rising else "jumping"
        print(
            f"{c.shape:8} {way:8} {c.rule:20} {excess:>20}  {c.chosen:6.0%}  {c.saved:16.0%}  {'RED' if c.red else ''}"
        )
    print(f"\n{took:.0f} s")


if __name__ == "__main__":
    main()
