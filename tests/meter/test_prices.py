"""Prices against hand computation, and against the library whose data they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from thrifty.errors import InvalidInput
from thrifty.meter.prices import PriceTable, Rate
from thrifty.spend import Spend


def test_local_prices_by_hand() -> None:
    spend = Spend(input=1000, cached=400, output=10)
    assert PriceTable.local().price(spend, "any") == 600 * 1000 + 400 * 100 + 10 * 4000
    assert PriceTable.local().price(Spend(input=1000), "any", "embedder") == 1000 * 100


def test_provider_prices_equal_the_library() -> None:
    genai = pytest.importorskip("genai_prices")
    for model in ("gpt-4o-mini", "claude-3-5-haiku-latest", "gpt-4o", "gemini-2.0-flash"):
        usage = genai.Usage(input_tokens=1000, cache_read_tokens=200, output_tokens=100)
        expected = genai.calc_price(usage, model_ref=model).total_price
        table = PriceTable.provider(model)
        assert table.price(Spend(input=1000, cached=200, output=100), model) == round(expected * 10**9)


def test_unknown_models_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no price known"):
        PriceTable.provider("no-such-model-at-all")
    with pytest.raises(InvalidInput, match=r"did you mean 'gpt-4o"):
        PriceTable.provider("pgt-4o-mini")


def test_a_table_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\ndate = "2026-11-24"\n[models.small]\ninput = 0.15\noutput = 0.6\n')
    table = PriceTable.from_toml(path)
    assert table.label == "mine 2026-11-24"
    assert table.price(Spend(input=10, cached=10, output=1), "small") == 1500 + 600
    with pytest.raises(InvalidInput, match="did you mean 'small'"):
        table.price(Spend(input=1), "smal")
    path.write_text("[models.small]\ninput = -1\noutput = 2\n")
    with pytest.raises(InvalidInput, match=r"mine\.toml.*small.*price -1"):
        PriceTable.from_toml(path)
    for broken in ("", "models = 3", "[models]\nsmall = 3", "[models.a]\ninput = 1", "[models.a]\nx = 1", "["):
        path.write_text(broken)
        with pytest.raises(InvalidInput, match=r"mine\.toml"):
            PriceTable.from_toml(path)


def test_real_bills_by_hand() -> None:
    rate = Rate.per_million("2.50", "10", "1.25")  # dollars a million tokens
    assert rate.price(Spend(input=1_000_000, output=1_000_000)) == 12_500_000_000
    assert rate.price(Spend(input=1234, cached=1000, output=56)) == 234 * 2500 + 1000 * 1250 + 56 * 10_000
    assert Rate.per_million("0.15", "0.6").price(Spend(input=3, cached=3)) == 450  # no cached price: the full one
    assert Rate.per_million("0.0375", 0).price(Spend(input=1)) == 38  # 37.5, rounded to even once
    assert Rate.per_million("0.0375", 0).price(Spend(input=2)) == 75  # and not 38 twice


def test_more_cached_than_sent_earns_nothing() -> None:
    assert PriceTable.local().price(Spend(input=10, cached=1000), "any") == 10 * 100


def test_with_price_changes_only_the_price() -> None:
    spend = Spend(input=7, cached=2, output=3, calls=1, usd=999)
    assert PriceTable.local().with_price(spend, "any") == Spend(7, 2, 0, 3, 0, 1, 0, 5 * 1000 + 2 * 100 + 3 * 4000)
