"""Learn then Test with fixed-sequence testing: many plans, one chance delta of any wrong certificate.

Plans are put in an order before the calibration data are seen (from the safest along the Pareto front of the search
split to the cheapest) and tested in it, each at the full delta, until the first that is not rejected. The chance that
any plan certified this way has a true mean loss above alpha is at most delta, however the plans are related and
whether or not loss rises along the order: a wrong certificate needs the first plan above alpha in the order to be
rejected, and that happens with a chance of at most delta.

Source: Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test" (Annals of Applied Statistics 2025), section 2.2
and appendix B; the order along a Pareto front: Laufer-Goldshtein et al., "Efficiently Controlling Multiple Risks with
Pareto Testing" (ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Iterable

from thrifty.errors import InvalidInput
from thrifty.instrument import Instrument

INSTRUMENT = Instrument(
    name="learn-then-test",
    kind="bound",
    paper="Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control (Angelopoulos et al. 2025)",
    runs="thrifty tune --method ltt",
)


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """How many leading hypotheses are rejected: the plans before the first whose p value is above `delta`.

    An iterator is read no further than that plan, so plans behind it need not be run. Among the plans certified, the
    cheapest may be picked by any rule.

    Raises: InvalidInput for a delta not strictly between 0 and 1, and a p value that is not a number in [0, 1].

    >>> fixed_sequence([0.01, 0.05, 0.2, 0.001], delta=0.05)
    2
    """
    if not 0 < delta < 1:
        raise InvalidInput(f"delta is the chance of a wrong certificate, strictly between 0 and 1, not {delta}")
    certified = 0
    for p in p_values:
        if not 0 <= p <= 1:  # true for NaN as well
            raise InvalidInput(f"the p value of hypothesis {certified} (counted from 0) is {p}: it must lie in [0, 1]")
        if p > delta:
            break
        certified += 1
    return certified
