"""The Gamma distribution as Budget Guidance needs it: the logarithm of its cumulative chance, and the best fit to data.

Invariant: log-chances are finite and at most 0 for every a, x > 0 in the range of a float64, however small they are."""

from __future__ import annotations

import math
from typing import Any

from thrifty.errors import InvalidInput


def log_gamma_cdf(a: Any, x: Any) -> Any:
    """ln P(a, x), P the regularised lower incomplete gamma function, elementwise, float64; a, x > 0.

    Where P is too small for a float64 it comes from its series x^a e^-x / Gamma(a + 1) * (1 + x / (a + 1) + ...), whose
    ratio is then below 1; near 1 from the upper function, so that no digits are lost."""
    import torch

    a, x = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(x, dtype=torch.float64)
    a, x = a + torch.zeros_like(x), x + torch.zeros_like(a)
    lower, upper = torch.special.gammainc(a, x), torch.special.gammaincc(a, x)
    log = torch.where(lower > 0.5, torch.log1p(-upper.clamp_max(0.75)), lower.clamp_min(1e-250).log())
    tiny = lower < 1e-200
    if bool(tiny.any()):
        b, z = a[tiny], x[tiny]
        term, total = torch.ones_like(b), torch.ones_like(b)
        for n in range(1, 10_000):
            term = term * z / (b + n)
            total = total + term
            if bool((term < 1e-17 * total).all()):
                break
        log = log.masked_scatter(tiny, b * z.log() - z - (b + 1).lgamma() + total.log())
    return log


def fit_gamma(values: Any) -> tuple[float, float]:
    """Shape and rate of the Gamma of greatest likelihood for positive values [N], by Newton's method.

    ln a - digamma(a) = ln mean - mean ln; the rate is a / mean. Raises InvalidInput for fewer than two different."""
    import torch

    x = torch.as_tensor(values, dtype=torch.float64)
    if len(x) < 2 or bool((x <= 0).any()) or float(x.max() - x.min()) < 1e-9:
        raise InvalidInput(f"{len(x)} lengths: at least two different positive ones are needed")
    s = float(x.mean().log() - x.log().mean())
    a = torch.tensor((3 - s + math.sqrt((s - 3) ** 2 + 24 * s)) / (12 * s), dtype=torch.float64)
    for _ in range(20):
        a = 1 / (1 / a + (x.log().mean() - x.mean().log() + a.log() - a.digamma()) / (a**2 * (1 / a - a.polygamma(1))))
    return float(a), float(a / x.mean())
