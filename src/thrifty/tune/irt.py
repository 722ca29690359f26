"""Item response theory: what a plan would score on all examples, told from its answers to a few well-chosen ones.

The compensatory multidimensional two-parameter logistic model (Reckase, "Multidimensional Item Response Theory", 2009,
ch. 4): a plan i has an ability theta_i in R^D, an example j a discrimination a_j in R^D and an easiness d_j, and

    P_ij = sigmoid(a_j . theta_i + d_j)

is the chance (or, for scores between 0 and 1, the mean) of its score. `fit` estimates examples from plans that answered
many of them; `Posterior` is then what is known of one new plan, `AdaptiveTest` picks the examples it is asked.

The setting is that of "Cost-Efficient Estimation of General Abilities Across Benchmarks" (WILD), whose own model is not
public: the model here is the textbook one, the D-optimal choice divided by cost^gamma is that paper's idea as its
abstract gives it. In search only: what is predicted is not measured, and no certificate may rest on it.

Arrays: responses [M plans, J examples] in [0, 1], NaN where a plan was not asked. theta has no fixed rotation or sign;
only a . theta + d means something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit

from thrifty.errors import InvalidInput

Floats = NDArray[np.float64]

SPREAD = 1.5
"""Standard deviation of the prior of each discrimination."""

EASINESS_SPREAD = 2.5


@dataclass(frozen=True)
class Items:
    """Examples as the model knows them: discriminations a [J, D], easiness d [J]."""

    a: Floats
    d: Floats

    def __len__(self) -> int:
        return len(self.d)

    @property
    def dimensions(self) -> int:
        """D."""
        return int(self.a.shape[1])

    def chance(self, theta: Floats) -> Floats:
        """P_j for an ability theta [D], [J]."""
        return np.asarray(expit(self.a @ theta + self.d), dtype=np.float64)


@dataclass(frozen=True)
class Fit:
    """Items and the abilities theta [M, D] of the plans that they were fitted on."""

    items: Items
    theta: Floats
    loss: float
    """penalised negative log likelihood"""
    converged: bool


def fit(
    responses: ArrayLike,
    dimensions: int = 2,
    *,
    spread: float = SPREAD,
    easiness_spread: float = EASINESS_SPREAD,
    iterations: int = 500,
) -> Fit:
    """The penalised-likelihood (MAP) fit of abilities and items together, by L-BFGS from a singular value start.

    Priors: theta ~ N(0, I), a ~ N(0, spread^2 I), d ~ N(0, easiness_spread^2). An example that nobody answered gets
    a = 0 and the prior's d = 0. `dimensions` is cut to what the matrix can tell: min(M, J).

    Raises InvalidInput for a matrix that is empty, has a value outside [0, 1], or a plan without any response.
    """
    y = np.asarray(responses, dtype=np.float64)
    if y.ndim != 2 or 0 in y.shape:
        raise InvalidInput(f"responses must be a table [plans, examples], not of shape {y.shape}")
    seen = ~np.isnan(y)
    known = y[seen]
    if known.size and not (known.min() >= 0 and known.max() <= 1):
        raise InvalidInput(f"responses must lie in [0, 1], not between {known.min():g} and {known.max():g}")
    if not seen.any(axis=1).all():
        raise InvalidInput(f"plan {int(np.argmin(seen.any(axis=1)))} has no response: leave it out")
    if dimensions < 1:
        raise InvalidInput(f"dimensions = {dimensions}: at least 1 is needed")
    plans, items = y.shape
    d_count = min(dimensions, plans, items)
    filled = np.where(seen, y, 0.0)
    sizes = (plans * d_count, items * d_count, items)

    def unpack(x: Floats) -> tuple[Floats, Floats, Floats]:
        theta, a, d = np.split(x, np.cumsum(sizes)[:-1])
        return theta.reshape(plans, d_count), a.reshape(items, d_count), d

    def loss(x: Floats) -> tuple[float, Floats]:
        theta, a, d = unpack(x)
        logit = theta @ a.T + d
        # log(1 + e^z) - y z is the cross-entropy, also for y between 0 and 1
        value = float((np.logaddexp(0.0, logit) - filled * logit)[seen].sum())
        value += float((theta**2).sum()) / 2 + float((a**2).sum()) / (2 * spread**2)
        value += float((d**2).sum()) / (2 * easiness_spread**2)
        residual = np.where(seen, expit(logit) - filled, 0.0)
        by_theta, by_a = residual @ a + theta, residual.T @ theta + a / spread**2
        by_d = residual.sum(axis=0) + d / easiness_spread**2
        return value, np.concatenate([by_theta.ravel(), by_a.ravel(), by_d])

    found = minimize(
        loss, _start(y, seen, d_count), jac=True, method="L-BFGS-B", options={"maxiter": iterations, "maxcor": 20}
    )
    theta, a, d = unpack(found.x)
    return Fit(Items(a, d), theta, float(found.fun), bool(found.success))


@dataclass(frozen=True)
class Posterior:
    """What is known of one plan's ability: theta ~ N(mean [D], cov [D, D]). Starts at the prior N(0, I)."""

    mean: Floats
    cov: Floats

    @classmethod
    def prior(cls, dimensions: int) -> Posterior:
        """N(0, I)."""
        return cls(np.zeros(dimensions), np.eye(dimensions))

    def update(self, a: Floats, d: float, y: float) -> Posterior:
        """After the response y to an example (a [D], d): Laplace's approximation.

        The mode of prior times likelihood lies at mean + t cov a, where t = y - sigmoid(a . mean + d + t a' cov a):
        one equation in one unknown, which decreases in t, so Newton's steps are kept within the bracket (y - 1, y).
        The covariance then takes one rank-one step (Sherman and Morrison), with w = P (1 - P) at the mode.
        """
        direction = self.cov @ a
        reach, start = float(a @ direction), float(a @ self.mean) + d
        low, high, t = y - 1.0, y, 0.0 if y == 0.5 else y - float(expit(start))
        for _ in range(60):
            p = float(expit(start + t * reach))
            gap = y - p - t
            if abs(gap) < 1e-13:
                break
            low, high = (t, high) if gap > 0 else (low, t)
            step = t + gap / (1.0 + p * (1.0 - p) * reach)
            t = step if low < step < high else (low + high) / 2
        p = float(expit(start + t * reach))
        return Posterior(self.mean + t * direction, rank_one(self.cov, a, p * (1.0 - p)))

    def informed(self, a: Floats, d: float) -> Posterior:
        """As if an example were asked whose answer is not known yet: the mean stays, the covariance shrinks."""
        p = float(expit(float(a @ self.mean) + d))
        return Posterior(self.mean, rank_one(self.cov, a, p * (1.0 - p)))


def rank_one(cov: Floats, a: Floats, w: float) -> Floats:
    """(cov^-1 + w a a')^-1, without an inverse (Sherman and Morrison 1950). cov [D, D] symmetric, a [D], w >= 0."""
    direction = cov @ a
    changed = cov - np.outer(direction, direction) * (w / (1.0 + w * float(a @ direction)))
    return np.asarray((changed + changed.T) / 2, dtype=np.float64)


def gains(items: Items, posterior: Posterior) -> Floats:
    """By how much each example's answer would raise log det of the information, log(1 + w_j a_j' cov a_j), [J]."""
    p = items.chance(posterior.mean)
    return np.log1p(p * (1 - p) * np.einsum("jd,de,je->j", items.a, posterior.cov, items.a))


@dataclass(frozen=True)
class Prediction:
    """A mean score over examples, with the standard deviation that the ability's uncertainty gives it."""

    mean: float
    sd: float


def predict(items: Items, posterior: Posterior, observed: ArrayLike | None = None) -> Prediction:
    """The mean score over all examples [J]: what was observed where it was (not NaN), else the model's mean.

    The mean of sigmoid over the posterior is taken as sigmoid(m / sqrt(1 + pi v / 8)) (MacKay 1992, the probit
    correction), with m = a' mean + d and v = a' cov a. `sd` is the delta method's; it does not count that single
    answers vary, nor that the items themselves are estimates.
    """
    variance = np.einsum("jd,de,je->j", items.a, posterior.cov, items.a)
    scale = 1.0 / np.sqrt(1.0 + math.pi / 8 * variance)
    p = np.asarray(expit((items.a @ posterior.mean + items.d) * scale), dtype=np.float64)
    slope = (p * (1 - p) * scale)[:, None] * items.a
    if observed is not None:
        known = np.asarray(observed, dtype=np.float64)
        there = ~np.isnan(known)
        p, slope = np.where(there, known, p), np.where(there[:, None], 0.0, slope)
    gradient = slope.mean(axis=0)
    return Prediction(float(p.mean()), math.sqrt(max(0.0, float(gradient @ posterior.cov @ gradient))))


@dataclass
class AdaptiveTest:
    """Picks the examples that one plan is asked, D-optimally for their cost.

    `costs` [J]: what an example is expected to cost, from plans other than the one under test. gain / cost^gamma is
    largest first; ties by the lower index. It stops after `most` examples, before the expected cost passes
    `most_cost`, or when the trace of the covariance is at most `trace`.
    """

    items: Items
    costs: Floats | None = None
    gamma: float = 0.0
    most: int = 16
    most_cost: float = math.inf
    trace: float = 0.0
    posterior: Posterior = field(init=False)
    observed: Floats = field(init=False)
    """responses so far, [J], NaN where it was not asked"""

    def __post_init__(self) -> None:
        costs = np.ones(len(self.items)) if self.costs is None else np.asarray(self.costs, dtype=np.float64)
        if costs.shape != (len(self.items),) or not (np.isfinite(costs).all() and (costs > 0).all()):
            raise InvalidInput(f"costs must be {len(self.items)} finite numbers above 0, one an example")
        if not 0 <= self.gamma <= 10:
            raise InvalidInput(f"gamma = {self.gamma}: from 0 (cost ignored) to 10 is allowed")
        self.costs = costs
        self.posterior = Posterior.prior(self.items.dimensions)
        self.observed = np.full(len(self.items), math.nan)

    @property
    def asked(self) -> list[int]:
        """Examples that have a response."""
        return [int(j) for j in np.flatnonzero(~np.isnan(self.observed))]

    def next(self, count: int = 1) -> list[int]:
        """The next examples, at most `count`; fewer or none when it stops. The second and later ones are chosen as if
        those before had been answered as expected."""
        assert self.costs is not None
        asked, posterior = self.asked, self.posterior
        spent = float(self.costs[asked].sum())
        chosen: list[int] = []
        while len(chosen) < count and len(asked) + len(chosen) < min(self.most, len(self.items)):
            if float(np.trace(posterior.cov)) <= self.trace:
                break
            value = gains(self.items, posterior) / self.costs**self.gamma
            value[[*asked, *chosen]] = -math.inf
            value[self.costs > self.most_cost - spent] = -math.inf
            j = int(np.argmax(value))
            if value[j] == -math.inf:
                break
            chosen.append(j)
            spent += float(self.costs[j])
            posterior = posterior.informed(self.items.a[j], float(self.items.d[j]))
        return chosen

    def record(self, example: int, response: float) -> None:
        """Takes a response in [0, 1] to an example that had none."""
        if not 0 <= response <= 1:
            raise InvalidInput(f"response {response!r} to example {example}: a number in [0, 1] is needed")
        if not math.isnan(self.observed[example]):
            raise InvalidInput(f"example {example} has a response already")
        self.observed[example] = response
        self.posterior = self.posterior.update(self.items.a[example], float(self.items.d[example]), response)

    def prediction(self) -> Prediction:
        """The mean score over all examples."""
        return predict(self.items, self.posterior, self.observed)


def _start(y: Floats, seen: NDArray[np.bool_], dimensions: int) -> Floats:
    """Abilities and discriminations from the singular vectors of what plan and item means leave over."""
    counts = seen.sum(axis=0)
    share = (np.where(seen, y, 0.0).sum(axis=0) + 0.5) / (counts + 1.0)
    easiness = np.where(counts > 0, np.log(share / (1 - share)), 0.0)
    left = np.where(seen, y - share, 0.0)
    u, s, v = np.linalg.svd(left, full_matrices=False)
    scale = math.sqrt(len(y))
    theta = u[:, :dimensions] * scale
    a = (v[:dimensions].T * s[:dimensions]) / scale * 4.0  # the sigmoid's slope is a quarter
    return np.concatenate([theta.ravel(), np.clip(a, -3, 3).ravel(), easiness])


def mean_costs(costs: Sequence[Sequence[float]] | Floats, least: float = 1.0) -> Floats:
    """Expected cost of each example [J] from a table [M, J] with NaN; `least` where nobody was asked or it was free."""
    table = np.asarray(costs, dtype=np.float64)
    seen = ~np.isnan(table)
    total, n = np.where(seen, table, 0.0).sum(axis=0), seen.sum(axis=0)
    known = total / np.maximum(n, 1)
    middle = float(known[n > 0].mean()) if (n > 0).any() else least
    return np.maximum(np.where(n > 0, known, middle), least)
