"""Price tables: what tokens cost, in integers of 1e-9 USD, with a name and a date that the ledger keeps.

A table gives a rate a token for input, cached input and output. Cached tokens are a part of the input and are billed at
their own rate, the rest of the input at the full one. Nothing here opens a network.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from thrifty.errors import InvalidInput, nearest
from thrifty.spend import NANO, Spend

_PER_MILLION = Decimal(NANO) / 1_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """Price of one token, in 1e-9 USD."""

    input: Decimal
    cached: Decimal
    output: Decimal

    @classmethod
    def per_million(cls, input: Any, output: Any, cached: Any = None) -> Rate:
        """From dollars a million tokens, as providers print them. Without a cached price the input's holds."""
        values = [_dollars(x) * _PER_MILLION for x in (input, input if cached is None else cached, output)]
        return cls(*values)

    def price(self, spend: Spend) -> int:
        """What a Spend costs, rounded half to even once.

        >>> Rate.per_million(1, 4, 0.1).price(Spend(input=10, cached=4, output=2))
        14400
        """
        cached = min(spend.cached, spend.input)  # a server that says more cached than sent must not earn us money
        full = spend.input - cached
        return int((self.input * full + self.cached * cached + self.output * spend.output).to_integral_value())


@dataclass(frozen=True)
class PriceTable:
    """Rates by model, and by role where a model has none of its own. `default` serves every other model."""

    name: str
    date: str
    models: Mapping[str, Rate] = field(default_factory=dict)
    roles: Mapping[str, Rate] = field(default_factory=dict)
    default: Rate | None = None

    @property
    def label(self) -> str:
        """Name and date, as the ledger records them."""
        return f"{self.name} {self.date}"

    def rate(self, model: str, role: str = "answer") -> Rate:
        """The rate of a model in a role. Raises InvalidInput with the nearest model where there is none."""
        found = self.models.get(model) or self.roles.get(role) or self.default
        if found is None:
            raise InvalidInput(f"price table {self.label}: {nearest(model, self.models, 'model')}")
        return found

    def price(self, spend: Spend, model: str, role: str = "answer") -> int:
        """What a Spend costs, in 1e-9 USD."""
        return self.rate(model, role).price(spend)

    def with_price(self, spend: Spend, model: str, role: str = "answer") -> Spend:
        """The same Spend with its `usd`."""
        return replace(spend, usd=self.price(spend, model, role))

    @classmethod
    def local(cls) -> PriceTable:
        """For models on one's own machine, whose tokens nobody bills: the proportions of a usual provider.

        A million tokens of input cost 1 dollar, cached ones a tenth, output ones four times as much. An embedder's cost
        a tenth of the input: the embedded one has about a tenth of the language model's parameters a token.
        """
        return cls(
            "local",
            "2026-11-01",
            roles={"embedder": Rate.per_million("0.1", 0, "0.01")},
            default=Rate.per_million(1, 4, "0.1"),
        )

    @classmethod
    def provider(cls, model: str, provider: str | None = None) -> PriceTable:
        """The provider's price of one model, from genai-prices' own data. Tiered prices count from their first tier.

        Raises InvalidInput for a model that it does not know or where it is not installed (extra `prices`).
        """
        try:
            from genai_prices import Usage, calc_price
            from genai_prices.data_snapshot import get_snapshot
        except ImportError as error:
            raise InvalidInput("provider prices need genai-prices: pip install 'thrifty[prices]'") from error
        million = 1_000_000
        try:
            parts = {
                "input": calc_price(Usage(input_tokens=1000), model_ref=model, provider_id=provider),
                "output": calc_price(Usage(output_tokens=1000), model_ref=model, provider_id=provider),
                "cached": calc_price(
                    Usage(input_tokens=1000, cache_read_tokens=1000), model_ref=model, provider_id=provider
                ),
            }
        except LookupError as error:
            known = [m.id for p in get_snapshot().providers for m in p.models if provider in (None, p.id)]
            near = difflib.get_close_matches(model, known, n=1, cutoff=0.5)
            guess = f"did you mean {near[0]!r}? else " if near else ""
            raise InvalidInput(f"no price known for model {model!r}: {guess}give a table in TOML") from error
        rates = {name: part.total_price / 1000 * million for name, part in parts.items()}
        return cls(
            f"genai-prices {parts['input'].provider.id}",
            _version("genai-prices"),
            {model: Rate.per_million(rates["input"], rates["output"], rates["cached"])},
        )

    @classmethod
    def from_toml(cls, path: str | Path) -> PriceTable:
        """Reads `name`, `date` and `[models.NAME]` with dollars a million tokens: input, output, optionally cached.

        Raises InvalidInput naming the file.
        """
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not TOML
            raise InvalidInput(f"price table {path}: cannot be read: {error}") from error
        rates: dict[str, Rate] = {}
        models = data.get("models")
        if not isinstance(models, dict) or not models:
            raise InvalidInput(f"price table {path}: no [models.NAME] in it")
        for model, entry in models.items():
            names = set(entry) if isinstance(entry, dict) else set()
            if not {"input", "output"} <= names <= {"input", "cached", "output"}:
                raise InvalidInput(f"price table {path}: model {model!r} needs input and output, and may have cached")
            try:
                rates[model] = Rate.per_million(entry["input"], entry["output"], entry.get("cached"))
            except InvalidInput as error:
                raise InvalidInput(f"price table {path}: model {model!r}: {error}") from error
        return cls(str(data.get("name", Path(path).stem)), str(data.get("date", "undated")), rates)


def _dollars(value: Any) -> Decimal:
    try:
        amount = Decimal(str(value))
    except InvalidOperation as error:
        raise InvalidInput(f"price {value!r}: dollars a million tokens are needed, such as 0.25") from error
    if not (amount.is_finite() and 0 <= amount <= 1_000_000):
        raise InvalidInput(f"price {value!r}: from 0 to 1,000,000 dollars a million tokens is allowed")
    return amount


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
