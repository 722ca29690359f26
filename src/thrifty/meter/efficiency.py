"""Figures that weigh quality against tokens in one number."""

from __future__ import annotations

import math

from thrifty.errors import InvalidInput
from thrifty.instrument import Instrument

INSTRUMENT = Instrument(
    name="e3",
    kind="evaluation",
    paper=(
        "Plan and Budget: Effective and Efficient Test-Time Scaling on Large Language Model Reasoning "
        "(Lin et al. 2025, arXiv:2505.16122)"
    ),
    runs="thrifty.meter.efficiency:e3",
)


def e3(accuracy: float, mean_tokens: float) -> float:
    """E3 = A^2 / T: accuracy (a share in [0, 1]) squared, over the mean number of decoded tokens an example.

    Squaring keeps a plan from winning by answering nothing cheaply. Per token, so figures are small; compare
    them only between plans on the same tasks and tokenizer. Source: "Plan and Budget: Effective and Efficient
    Test-Time Scaling on Large Language Model Reasoning".

    Raises: InvalidInput for an accuracy outside [0, 1] or a mean of tokens that is not above 0.

    >>> e3(0.5, 1000)
    0.00025
    """
    if not 0 <= accuracy <= 1:
        raise InvalidInput(f"accuracy is a share in [0, 1], not {accuracy}: divide percents by 100")
    if not (mean_tokens > 0 and math.isfinite(mean_tokens)):
        raise InvalidInput(f"the mean of decoded tokens must be above 0, not {mean_tokens}")
    return accuracy**2 / mean_tokens
