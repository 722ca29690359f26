"""Conformal risk control: the cheapest setting of one knob whose expected loss is at most alpha.

The guarantee is on an expectation, over the calibration data and the next example together; there is no delta. It needs
losses that do not fall towards cheaper settings. Where they do, each example's loss is replaced by the supremum over
the setting itself and all safer ones, which is never below the loss, so what is controlled also bounds the loss itself.

With B the highest possible loss and n groups, a setting is feasible if sum of losses + B <= alpha (n + 1); the cheapest
one is returned. If even the safest is not, there is none and nothing is claimed.

What the law counts in that case matters. Give what is then used as the first column, with losses that are at most alpha
on every example (under `drop` and `disagree` the reference, whose losses are 0): then some setting is feasible from n =
B / alpha - 1 on, and the mean realised loss is at most alpha with no exception. Beside it a drop below 0 counts as 0.
Without such a column, cases with no feasible setting count with the lowest possible loss, so the mean over the others
alone may be above alpha.

Source: Angelopoulos, Bates, Fisch, Lei, Schuster, "Conformal Risk Control" (ICLR 2024), Theorem 1 and, for losses that
are not monotone, section 2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thrifty.errors import InvalidInput
from thrifty.instrument import Instrument

INSTRUMENT = Instrument(
    name="conformal-risk-control",
    kind="bound",
    paper="Conformal Risk Control (Angelopoulos et al. 2024, ICLR)",
    runs="thrifty tune --method crc",
)

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class CrcResult:
    """`index` of the cheapest feasible setting (None: not even the safest), and each setting's `corrected` risk [m].

    The corrected risk is (sum of monotone losses + B) / (n + 1); it is at most alpha for the settings up to `index`.
    """

    index: int | None
    corrected: NDArray[np.float64]


def conformal_risk_control(table: ArrayLike, alpha: float, low: float, high: float) -> CrcResult:
    """The cheapest setting with an expected loss of at most `alpha`.

    Args:
        table: losses [n, m] in [`low`, `high`], a row a group, columns from the safest setting to the cheapest. The
            order is fixed before these losses are seen.

    Sums are exact and equality counts as feasible, within what rounding of the losses and of alpha can do.

    Raises: InvalidInput for a table of another shape, a loss out of range, and an alpha not strictly within it.

    >>> conformal_risk_control([[0, 0, 1]] * 2 + [[0, 0, 0]] * 7, 0.1, 0.0, 1.0).index  # 9 rows: 0 + 1 <= 0.1 * 10
    1
    """
    losses = np.asarray(table, dtype=np.float64)
    if losses.ndim != 2 or losses.shape[1] == 0:
        raise InvalidInput(f"conformal risk control needs losses [groups, settings], not an array of {losses.shape}")
    if not low < alpha < high:
        raise InvalidInput(f"alpha {alpha} must lie strictly between the lowest loss {low:g} and the highest {high:g}")
    outside = ~((losses >= low) & (losses <= high))  # true for NaN as well
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise InvalidInput(
            f"row {row} has a loss of {losses[row, column]:g} in setting {column}: it must lie in [{low:g}, {high:g}]"
        )
    monotone = np.maximum.accumulate(losses, axis=1)
    n = len(losses)
    sums = np.array([math.fsum(column) for column in monotone.T]) + high
    feasible = np.flatnonzero(sums <= alpha * (n + 1) + _slack(n, low, high))  # a prefix, for the sums do not fall
    return CrcResult(int(feasible[-1]) if len(feasible) else None, sums / (n + 1))


def examples_needed(alpha: float, high: float = 1.0, mean: float = 0.0) -> int:
    """The smallest n at which a mean (monotone) loss of `mean` is feasible: n mean + B <= alpha (n + 1).

    Raises: InvalidInput where no number would do, that is for a mean of at least alpha.

    >>> examples_needed(0.1), examples_needed(0.1, mean=0.05)
    (9, 18)
    """
    if not mean < alpha < high:
        raise InvalidInput(
            f"no number of examples makes a mean loss of {mean:g} feasible at alpha {alpha:g}: alpha must be above the "
            f"mean and below {high:g}"
        )
    n = max(1, math.ceil((high - alpha) / (alpha - mean)))
    while n > 1 and (n - 1) * mean + high <= alpha * n + _slack(n - 1, mean, high):
        n -= 1  # rounding had made it one too many
    return n


def _slack(n: int, low: float, high: float) -> float:
    """What rounding of n losses and of alpha can add up to."""
    return 4 * _EPS * (n + 1) * max(abs(low), abs(high), 1.0)
