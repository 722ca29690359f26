"""What a language costs: tokens for the same content in different languages, and vocabularies that even it out.

Source: "Explaining and Mitigating Crosslingual Tokenizer Inequities". The corpus token count (CTC) of a language is the
tokens of its side of a parallel corpus, so that content is the same; its premium is its CTC over a reference's; the
inequity of a set of languages is the variance of their CTCs. Text that is not parallel confounds content with cost.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.errors import InvalidInput
from thrifty.instrument import Instrument

INSTRUMENT = Instrument(
    name="token-premium",
    kind="analysis",
    paper="Explaining and Mitigating Crosslingual Tokenizer Inequities",
    runs="thrifty meter premium",
)

MULTIPLE = 128
"""Vocabularies are rounded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class LanguagePremium:
    """One language: its corpus token count, its premium over the reference with a 95% bootstrap interval over
    segments (None with one segment), and tokens a character."""

    language: str
    tokens: int
    premium: float
    low: float | None
    high: float | None
    per_character: float


@dataclass(frozen=True, slots=True)
class Premiums:
    """All languages, the cheapest first. `variance` is that of their token counts, the inequity."""

    reference: str
    segments: int
    languages: tuple[LanguagePremium, ...]
    variance: float


def premiums(
    texts: Mapping[str, Sequence[str]], count: Callable[[str], int], reference: str, seed: int = 0
) -> Premiums:
    """Premiums of the languages of a parallel corpus: `texts[language]` are its segments, segment i the same content in
    every language; `count` gives the tokens of a text, without special ones.

    Raises InvalidInput for languages with different numbers of segments, or a reference that is not one of them.

    >>> found = premiums({"en": ["one two", "three"], "x": ["1 2 3 4", "5 6"]}, lambda text: len(text.split()), "en")
    >>> [(lang.language, lang.tokens, lang.premium) for lang in found.languages], found.variance
    ([('en', 3, 1.0), ('x', 6, 2.0)], 4.5)
    """
    if reference not in texts:
        raise InvalidInput(f"reference {reference!r}: one of {', '.join(texts) or 'no languages'} is needed")
    sizes = {language: len(segments) for language, segments in texts.items()}
    if len(set(sizes.values())) != 1 or not sizes[reference]:
        told = ", ".join(f"{language} {n:,}" for language, n in sizes.items())
        raise InvalidInput(f"a parallel corpus has as many segments in each language, and at least one: {told}")
    counts = {language: [count(s) for s in segments] for language, segments in texts.items()}
    base = counts[reference]
    if not sum(base):
        raise InvalidInput(f"the text of {reference!r} is empty")
    rows = []
    for language, each in counts.items():
        low, high = (1.0, 1.0) if language == reference else _interval(each, base, seed)
        characters = sum(map(len, texts[language]))
        total = sum(each)
        rows.append(
            LanguagePremium(language, total, total / sum(base), low, high, total / characters if characters else 0.0)
        )
    rows.sort(key=lambda row: (row.tokens, row.language))
    totals = [row.tokens for row in rows]
    return Premiums(
        reference, len(base), tuple(rows), statistics.variance(map(float, totals)) if len(totals) > 1 else 0.0
    )


def _interval(each: Sequence[int], base: Sequence[int], seed: int) -> tuple[float | None, float | None]:
    if len(base) < 2:
        return None, None
    import numpy as np

    from thrifty.bench import stats

    totals = np.stack([np.asarray(each, float), np.asarray(base, float)], axis=1)
    found = stats.bootstrap(totals, lambda t: t[:, 0] / np.maximum(t[:, 1], 1.0), np.random.default_rng(seed))
    return found.low, found.high


@dataclass(frozen=True, slots=True)
class VarianceTest:
    """Ratio of the variances of two settings' token counts, and the two-sided p-value of an F-test."""

    ratio: float
    p: float


def compare_variance(first: Sequence[float], second: Sequence[float]) -> VarianceTest:
    """Whether the inequity of two settings over languages differs: F = variance of the first over that of the second.

    Raises InvalidInput for fewer than two languages on a side, or a second side that does not vary.
    """
    if min(len(first), len(second)) < 2 or statistics.variance(map(float, second)) == 0:
        raise InvalidInput("two languages a side, and counts that differ, are needed")
    try:
        from scipy.stats import f
    except ImportError as error:
        raise InvalidInput("the F-test needs scipy: pip install 'thrifty[tune]'") from error
    ratio = statistics.variance(map(float, first)) / statistics.variance(map(float, second))
    tail = float(f.cdf(ratio, len(first) - 1, len(second) - 1))
    return VarianceTest(ratio, min(1.0, 2 * min(tail, 1 - tail)))


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """CTC(V) = a V^-b + c: the tokens of a corpus as its tokenizer's vocabulary V grows."""

    a: float
    b: float
    c: float

    def __call__(self, vocabulary: float) -> float:
        """Tokens at a vocabulary."""
        return float(self.a * vocabulary**-self.b + self.c)

    def solve(self, tokens: float, multiple: int = MULTIPLE) -> int:
        """The vocabulary at which the corpus takes `tokens`, rounded to a multiple. Raises InvalidInput for a count at
        or below the law's floor c, which no vocabulary reaches."""
        if not tokens > self.c or self.a <= 0 or self.b <= 0:
            raise InvalidInput(
                f"{tokens:,.0f} tokens are not above the floor of {self.c:,.0f}: no vocabulary gets there"
            )
        vocabulary = float(((tokens - self.c) / self.a) ** (-1 / self.b))
        return max(multiple, round(vocabulary / multiple) * multiple)


def fit_power_law(vocabularies: Sequence[float], tokens: Sequence[float]) -> PowerLaw:
    """The least-squares power law through a language's (V, CTC) points, its exponent searched from 0.01 to 4.

    The paper says that a power law is fitted per language; the floor c is this module's. Raises InvalidInput for fewer
    than three different vocabularies.
    """
    import numpy as np

    v, y = np.asarray(vocabularies, float), np.asarray(tokens, float)
    if v.shape != y.shape or len(set(v.tolist())) < 3 or not (np.isfinite(v).all() and np.isfinite(y).all()):
        raise InvalidInput("three different vocabularies with their token counts are needed")
    if (v <= 0).any():
        raise InvalidInput("vocabularies must be above 0")
    scaled = v / v.max()  # keeps V^-b near 1, whatever b

    def linear(b: float) -> tuple[float, Any]:
        basis = np.stack([scaled**-b, np.ones_like(scaled)], axis=1)
        weights = np.linalg.lstsq(basis, y, rcond=None)[0]
        return float(((basis @ weights - y) ** 2).sum()), weights

    grid = np.geomspace(0.01, 4.0, 200)
    best = int(np.argmin([linear(float(b))[0] for b in grid]))
    low, high = float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)])
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if linear(left)[0] < linear(right)[0] else (left, high)
    b = (low + high) / 2
    _, (a, c) = linear(b)
    return PowerLaw(float(a) * float(v.max()) ** b, b, float(c))
