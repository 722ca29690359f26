"""Bounds on a mean loss from a finite sample: p values, upper confidence bounds, and how many examples one needs.

The null hypothesis is always "the mean loss is above alpha"; a small p value speaks against it, so that a plan may be
certified. Each bound holds for every n, with no normal approximation, when groups are drawn independently from what the
plan will meet:

- `hoeffding-bentkus`: any loss with a known range, from the sum alone (Bates et al., "Distribution-Free,
  Risk-Controlling Prediction Sets", 2021, Theorem 2; Angelopoulos et al., "Learn then Test", section 3.1);
- `clopper-pearson`: the exact binomial tail, for losses of 0 and 1 only (Clopper and Pearson, Biometrika 1934);
- `betting`: any loss with a known range, far tighter where losses vary little: a gambler bets against the null and the
  p value is 1 over the largest capital that was reached (Waudby-Smith and Ramdas, "Estimating means of bounded random
  variables by betting", JRSS B 2024, section 3 and Theorem 3).

A bound is chosen before the data are seen (`best_bound`): the smallest of several p values is not a p value.

Invariants: a p value is in [0, 1] and falls with alpha; `upper_bound` is its inversion, so the p value at the bound
that was returned is at most delta; losses are rescaled to [0, 1] inside, and alpha with them; a sum is exact.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from thrifty.errors import InvalidInput, nearest
from thrifty.tune.losses import Losses, LossKind, range_of

Bound = Literal["hoeffding-bentkus", "clopper-pearson", "betting"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)

MOST_EXAMPLES = 2**22
"""Above this many, `examples_needed` says that alpha is too near to the mean, instead of searching on."""

BETTING_ORDER = "thrifty betting order 1"
"""The salt of the hash by which groups are put in the order of betting; part of what a betting p value depends on."""

_EPS = float(np.finfo(np.float64).eps)
_DESIGN = math.log(1 / 0.1)  # bets are sized for a p value of 0.1; any other level is as valid, only less well served
_BOLD = 0.9  # share of the capital at risk in one bet, at most: one loss of 1 must not end the game
_PRIOR = 3  # imagined losses; the paper has 1, with which a few zeros at the start make bets on rare losses too large

Floats = NDArray[np.float64]


def best_bound(kind: LossKind, *, zero_one: bool) -> Bound:
    """The bound to use for a kind of loss, chosen from what is known before any is measured.

    `zero_one` says that every group's loss can only be 0 or 1: a scorer that gives nothing between, and groups of one
    example. That losses happened to be 0 or 1 is no ground for it.

    >>> best_bound("error", zero_one=True), best_bound("drop", zero_one=True)
    ('clopper-pearson', 'betting')
    """
    low, _ = range_of(kind)
    return "clopper-pearson" if zero_one and low == 0 else "betting"


def p_value(bound: Bound, losses: Losses, alpha: float) -> float:
    """The p value of the hypothesis that the mean loss is above `alpha` (in the losses' unit); 1 without losses.

    Raises: InvalidInput for an unknown bound, an alpha not strictly within the range of the losses, and for
    Clopper-Pearson on losses that are not 0 or 1.

    >>> from thrifty.tune.losses import Losses
    >>> values = np.repeat([0.0, 1.0], [93, 7])
    >>> seven = Losses("error", values, 0.0, 1.0, tuple(f"{i:03}" for i in range(100)))
    >>> round(p_value("hoeffding-bentkus", seven, 0.1), 4), round(p_value("clopper-pearson", seven, 0.1), 4)
    (0.5601, 0.2061)
    """
    if not losses.low < alpha < losses.high:
        raise InvalidInput(
            f"alpha {alpha} can bound no loss of kind {losses.kind!r}: it must lie strictly between {losses.low:g} "
            f"and {losses.high:g}"
        )
    return _tail(bound, losses)(_scaled(alpha, losses))


def upper_bound(bound: Bound, losses: Losses, delta: float) -> float:
    """The mean loss is at most this with confidence 1 - `delta`: the least alpha that `p_value` rejects at `delta`.

    The highest possible loss where the data exclude nothing.

    Raises: InvalidInput as `p_value`, and for a delta not strictly between 0 and 1.
    """
    _check_delta(delta)
    tail = _tail(bound, losses)
    low, high = losses.low, losses.high
    while low < (middle := (low + high) / 2) < high:
        if tail(_scaled(middle, losses)) <= delta:
            high = middle
        else:
            low = middle
    return high


def examples_needed(
    bound: Bound, kind: LossKind, alpha: float, delta: float, mean: float = 0.0, *, like: Losses | None = None
) -> int:
    """The smallest number of groups with which a mean loss of `mean` would be certified at `alpha` and `delta` (with
    `betting`: a number that would do while one less would not).

    A forecast, not a promise: the next sample's mean will differ. It assumes losses of 0 and 1 with that mean (of 0
    and -1 where a drop's mean is below 0), spread evenly; with `like`, the losses of an earlier sample over and over,
    and their mean.

    Raises: InvalidInput where no number would do: a mean of at least alpha, or one so near that more than
    `MOST_EXAMPLES` were needed; and for values out of range.

    >>> examples_needed("clopper-pearson", "error", 0.05, 0.1)  # 0.95 ** 45 < 0.1
    45
    """
    low, high = range_of(kind)
    if like is not None:
        if like.kind != kind or like.n == 0:
            raise InvalidInput(f"a forecast for {kind!r} needs losses of that kind, not {like.n} of {like.kind!r}")
        mean = like.mean
    _check_delta(delta)
    if not low < alpha < high:
        raise InvalidInput(f"alpha {alpha} must lie strictly between {low:g} and {high:g} for a loss of kind {kind!r}")
    if not low <= mean <= high:
        raise InvalidInput(f"a loss of kind {kind!r} cannot have the mean {mean}: it lies in [{low:g}, {high:g}]")
    if mean >= alpha:
        raise InvalidInput(
            f"no number of examples certifies a mean loss of {mean:g} at alpha {alpha:g}: allow more loss, or use a "
            "plan that loses less"
        )
    scaled = (alpha - low) / (high - low)
    if _known(bound) == "betting":
        pattern = None if like is None else (like.values[_order(like.groups)] - low) / (high - low)
        found = _first_by_halving(lambda n: _Bets(_forecast(n, mean, low, pattern)).p(scaled), delta)
    elif bound == "clopper-pearson" and low < 0:
        raise InvalidInput(_NOT_BINARY.format(what=f"losses of kind {kind!r} lie in [-1, 1]"))
    else:
        tail = _clopper_pearson if bound == "clopper-pearson" else _hoeffding_bentkus
        whole = np.ceil if low == 0 else (lambda total: total)  # losses of 0 and 1 add up to whole numbers
        rate = (mean - low) / (high - low)
        found = _first_in_order(lambda n: tail(whole(n * rate - 4 * _EPS * n), n, scaled), delta)
    if found is None:
        raise InvalidInput(
            f"more than {MOST_EXAMPLES:,} examples would be needed to certify a mean loss of {mean:g} at alpha "
            f"{alpha:g} and delta {delta:g}: allow more loss, or use a plan that loses less"
        )
    return found


# The three tails, on losses in [0, 1].


_NOT_BINARY = "clopper-pearson is exact for losses of 0 and 1 only, and {what}: use betting or hoeffding-bentkus"


def _tail(bound: Bound, losses: Losses) -> Callable[[float], float]:
    """The p value as a function of alpha, both on the scale [0, 1]."""
    name, n = _known(bound), losses.n
    if name == "clopper-pearson":
        if losses.low < 0:
            raise InvalidInput(_NOT_BINARY.format(what=f"losses of kind {losses.kind!r} lie in [-1, 1]"))
        between = (losses.values != 0) & (losses.values != 1)
        if between.any():
            at = int(between.argmax())
            what = f"group {losses.groups[at]!r} has a loss of {losses.values[at]:g}"
            raise InvalidInput(_NOT_BINARY.format(what=what))
    if n == 0:
        return lambda alpha: 1.0
    if name == "betting":
        order = _order(losses.groups)
        return _Bets((losses.values[order] - losses.low) / (losses.high - losses.low)).p
    total = np.float64((math.fsum(losses.values) - n * losses.low) / (losses.high - losses.low))
    exact = _clopper_pearson if name == "clopper-pearson" else _hoeffding_bentkus
    return lambda alpha: float(exact(total, n, alpha))


def _clopper_pearson(total: Floats | np.float64, n: NDArray[np.int64] | int, alpha: float) -> Floats:
    """P(Binomial(n, alpha) <= total)."""
    return np.asarray(bdtr(np.rint(total), n, alpha), dtype=np.float64)


def _hoeffding_bentkus(total: Floats | np.float64, n: NDArray[np.int64] | int, alpha: float) -> Floats:
    """The smaller of Hoeffding's exp(-n kl(mean, alpha)) and Bentkus' e P(Binomial(n, alpha) <= ceil(total)).

    The smaller of the two is a p value because both are functions of the sum that grow with it.
    """
    mean = np.clip(total / n, 0.0, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(mean > 0, mean * np.log(mean / alpha), 0.0)
    hoeffding = np.exp(-n * (first + (1 - mean) * np.log((1 - mean) / (1 - alpha))))
    # A sum that is whole in exact arithmetic may come out a few roundings above it, and its ceiling one too high.
    nearest_whole = np.rint(total)
    whole = np.where(np.abs(total - nearest_whole) <= 4 * _EPS * np.asarray(n), nearest_whole, np.ceil(total))
    return np.minimum(1.0, np.minimum(hoeffding, math.e * bdtr(whole, n, alpha)))


class _Bets:
    """The bets of a gambler who believes that losses are below alpha, on `values` [n] in [0, 1], in betting order.

    After t losses the capital is the product of 1 + bet_i (alpha - x_i). A bet is made before its loss is seen, so
    where the mean is at least alpha the capital is a nonnegative supermartingale that starts at 1, and by Ville's
    inequality it ever reaches 1 / p with a chance of at most p.

    The size is the paper's predictable plug-in sqrt(2 log(1 / 0.1) / (n variance)), with the variance of the losses
    before it and of `_PRIOR` imagined ones of mean 1/2 and variance 1/4, cut at `_BOLD` / (1 - alpha). Every factor
    grows with alpha, so the p value falls with it and its inversion is an interval.
    """

    def __init__(self, values: Floats) -> None:
        n = len(values)
        seen = np.arange(1, n + 1) + _PRIOR
        mean = (0.5 * _PRIOR + np.cumsum(values)) / seen
        variance = (0.25 * _PRIOR + np.cumsum((values - mean) ** 2)) / seen
        self.values, self.mean = values, math.fsum(values) / n
        self.sizes = np.sqrt(2 * _DESIGN / (n * np.concatenate([[0.25], variance[:-1]])))

    def log_capital(self, alpha: float) -> Floats:
        """The logarithm of the capital after each loss [n]."""
        bets = np.minimum(self.sizes, _BOLD / (1 - alpha))
        return np.asarray(np.cumsum(np.log1p(bets * (alpha - self.values))), dtype=np.float64)

    def p(self, alpha: float) -> float:
        """1 over the largest capital that was reached, at most 1; and 1 for an alpha below the mean of the losses.

        A gambler may have been rich before the losses came, but no bound should deny the mean that was measured.
        """
        if alpha < self.mean:
            return 1.0
        return math.exp(-max(0.0, float(self.log_capital(alpha).max())))


@lru_cache(maxsize=4)  # all plans of one calibration have the same groups
def _order(groups: tuple[str, ...]) -> NDArray[np.int64]:
    """The order of betting: by a hash of the group's id, the same on every machine and with every numpy.

    An order must have nothing to do with the losses, and ids may (the harder examples last), so ids are hashed. The
    salt is fixed: an order that could be chosen would be chosen until it suits.
    """
    hashes = [hashlib.sha256(f"{BETTING_ORDER}:{group}".encode("utf-8", "surrogatepass")).digest() for group in groups]
    return np.array(sorted(range(len(groups)), key=hashes.__getitem__), dtype=np.int64)


# Details.


def _scaled(alpha: float, losses: Losses) -> float:
    """Alpha where losses run from 0 to 1; below 1, though rounding may reach it."""
    return min((alpha - losses.low) / (losses.high - losses.low), math.nextafter(1.0, 0.0))


def _forecast(n: int, mean: float, low: float, pattern: Floats | None) -> Floats:
    """n losses on the scale [0, 1] with the given mean: the pattern over and over, or extreme ones spread evenly."""
    if pattern is not None:
        return np.resize(pattern, n)
    steps = np.floor(abs(mean) * np.arange(n + 1) + 0.5)
    values = math.copysign(1.0, mean) * np.diff(steps)
    return np.asarray((values - low) / (1 - low), dtype=np.float64)


def _first_in_order(p: Callable[[NDArray[np.int64]], Floats], delta: float) -> int | None:
    """The smallest n whose p value is at most delta. It goes up and down with n, so all are looked at, in blocks."""
    if p(np.array([MOST_EXAMPLES]))[0] > delta:
        return None
    start, size = 1, 1024
    while start <= MOST_EXAMPLES:
        n = np.arange(start, start + size, dtype=np.int64)
        reached = p(n) <= delta
        if reached.any():
            return int(n[reached.argmax()])
        start, size = start + size, min(2 * size, 2**18)
    return None


def _first_by_halving(p: Callable[[int], float], delta: float) -> int | None:
    """An n whose p value is at most delta while that of n - 1 is above."""
    high = 1
    while p(high) > delta:
        if high >= MOST_EXAMPLES:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p(middle) <= delta else (middle, high)
    return high


def _known(bound: str) -> Bound:
    if bound not in BOUNDS:
        raise InvalidInput(nearest(str(bound), BOUNDS, "bound"))
    return bound


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise InvalidInput(f"delta is the chance of a wrong certificate, strictly between 0 and 1, not {delta}")
