"""Token premiums on hand counts, planted power laws, and scipy's F distribution."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter.premium import PowerLaw, compare_variance, fit_power_law, premiums

# Article 1 of the Universal Declaration of Human Rights, its first sentence and its second.
ARTICLE = {
    "en": [
        "All human beings are born free and equal in dignity and rights.",
        "They are endowed with reason and conscience and should act towards one another in a spirit of brotherhood.",
    ],
    "de": [
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
        "Sie sind mit Vernunft und Gewissen begabt und sollen einander im Geiste der Brüderlichkeit begegnen.",
    ],
    "es": [
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y,",
        "dotados como están de razón y conciencia, deben comportarse fraternalmente los unos con los otros.",
    ],
    "ru": [
        "Все люди рождаются свободными и равными в своем достоинстве и правах.",
        "Они наделены разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    ],
}


def octets(text: str) -> int:
    return len(text.encode())


def test_by_hand() -> None:
    found = premiums(ARTICLE, octets, "en")
    rows = {row.language: row for row in found.languages}
    for language, segments in ARTICLE.items():
        total = sum(len(s.encode()) for s in segments)
        assert rows[language].tokens == total
        assert rows[language].premium == pytest.approx(total / sum(len(s) for s in ARTICLE["en"]))
    assert rows["en"].premium == rows["en"].low == rows["en"].high == 1
    assert rows["ru"].premium > 1.6  # two bytes a letter
    assert found.variance == pytest.approx(statistics.variance([float(r.tokens) for r in found.languages]))
    assert found.languages[0].tokens == min(r.tokens for r in found.languages)


@settings(max_examples=30, deadline=None)
@given(times=st.integers(1, 5))
def test_a_corpus_said_twice_has_the_same_premiums(times: int) -> None:
    once = {r.language: r.premium for r in premiums(ARTICLE, octets, "en").languages}
    again = premiums({language: segments * times for language, segments in ARTICLE.items()}, octets, "en")
    assert {r.language: r.premium for r in again.languages} == pytest.approx(once)


def test_the_interval_holds_the_premium() -> None:
    found = premiums({k: v * 10 for k, v in ARTICLE.items()}, octets, "en")
    assert all(r.low is not None and r.high is not None and r.low <= r.premium <= r.high for r in found.languages)
    single = premiums({k: v[:1] for k, v in ARTICLE.items()}, octets, "en")
    assert single.languages[-1].low is None


def test_refused() -> None:
    with pytest.raises(InvalidInput, match="en 2, xx 1"):
        premiums({"en": ["a", "b"], "xx": ["a"]}, octets, "en")
    with pytest.raises(InvalidInput, match="reference 'fr'"):
        premiums(ARTICLE, octets, "fr")
    with pytest.raises(InvalidInput, match="is empty"):
        premiums({"en": [""], "de": ["a"]}, octets, "en")


@settings(max_examples=60, deadline=None)
@given(a=st.floats(1e5, 1e8), b=st.floats(0.05, 1.5), c=st.floats(0, 5e4))
def test_a_planted_power_law_is_found(a: float, b: float, c: float) -> None:
    law = PowerLaw(a, b, c)
    sizes = [8192, 16_384, 32_768, 65_536, 114_688, 262_144]
    found = fit_power_law(sizes, [law(v) for v in sizes])
    for v in (20_000, 50_000, 200_000):
        assert found(v) == pytest.approx(law(v), rel=1e-4)
    target = law(49_152)
    assert law.solve(target) == 49_152
    assert abs(found.solve(target) - 49_152) <= 256


def test_power_laws_refuse() -> None:
    with pytest.raises(InvalidInput, match="floor"):
        PowerLaw(10, 0.5, 100).solve(100)
    with pytest.raises(InvalidInput, match="three different"):
        fit_power_law([1, 2, 2], [3, 2, 2])


def test_one_vocabulary_for_each_language_evens_out_what_one_for_all_does_not() -> None:
    """The paper's remedy on laws that differ by language: the same count at each one's own vocabulary."""
    laws = [PowerLaw(1e6 * (1 + i / 4), 0.3, 2e4 + 2e3 * i) for i in range(6)]
    common = [law(32_768) for law in laws]
    target = statistics.fmean(common)
    solved = [law(law.solve(target)) for law in laws]
    assert statistics.fmean(solved) == pytest.approx(target, rel=0.01)
    test = compare_variance(solved, common)
    assert test.ratio < 0.01 and test.p < 0.001


def test_the_f_test_is_two_sided() -> None:
    special = pytest.importorskip("scipy.special")
    first, second = [1.0, 2.0, 4.0, 9.0], [3.0, 3.5, 5.0]
    found = compare_variance(first, second)
    ratio = statistics.variance(first) / statistics.variance(second)
    below = special.betainc(1.5, 1.0, 3 * ratio / (3 * ratio + 2))
    assert found.ratio == pytest.approx(ratio)
    assert found.p == pytest.approx(2 * min(below, 1 - below))
    assert compare_variance(second, first).p == pytest.approx(found.p)
    with pytest.raises(InvalidInput, match="two languages"):
        compare_variance([1, 2], [3, 3])
    assert math.isclose(compare_variance(first, first).ratio, 1)
