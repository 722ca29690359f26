"""Engines by model alias: what answers a name that clients ask for."""

from __future__ import annotations

from thrifty.engine import Engine
from thrifty.engines.openai import OpenAIEngine
from thrifty.engines.openai.transport import Timeouts
from thrifty.engines.spec import resolve
from thrifty.errors import InvalidInput
from thrifty.meter.prices import PriceTable
from thrifty.serve.policy import Loaded, Upstream


class Upstreams:
    """Makes and keeps one engine for each upstream and model."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        named = loaded.policy.prices
        self._table = None if named in (None, "provider") else PriceTable.from_toml(loaded.path(named))
        self._engines: dict[tuple[str, str], Engine] = {}
        self._roles: dict[str, Engine] = {}

    def engine(self, alias: str) -> Engine:
        """The engine that answers for an alias."""
        model = self.loaded.policy.models[alias]
        names = [model.upstream] if isinstance(model.upstream, str) else model.upstream
        return self.one(names[0], model.model or alias)

    def one(self, name: str, model: str) -> Engine:
        """The engine of one upstream and model."""
        found = self._engines.get((name, model))
        if found is None:
            found = self._engines[name, model] = _make(self.loaded.policy.upstreams[name], model, self.prices(model))
        return found

    def prices(self, model: str) -> PriceTable | None:
        """What a model's tokens cost: by the policy's table, or by its provider's where the policy says `provider`."""
        if self.loaded.policy.prices != "provider":
            return self._table
        try:
            return PriceTable.provider(model)
        except InvalidInput:
            if self.loaded.limits_usd:
                raise
            return None

    def role(self, spec: str) -> Engine:
        """An engine that a plan names for a role of its own (an embedder, a judge)."""
        if spec not in self._roles:
            self._roles[spec] = resolve(spec, prices=self._table)
        return self._roles[spec]

    async def aclose(self) -> None:
        """Closes every engine."""
        for engine in {id(e): e for e in (*self._engines.values(), *self._roles.values())}.values():
            await engine.aclose()


def _make(upstream: Upstream, model: str, prices: PriceTable | None) -> Engine:
    if upstream.engine is not None:
        return resolve(upstream.engine, prices=prices)
    assert upstream.url is not None
    return OpenAIEngine(
        upstream.url,
        model,
        api_key_env=upstream.key_env,
        kind=upstream.kind,
        prices=prices,
        timeout=Timeouts(min(upstream.connect, upstream.timeout), upstream.timeout, upstream.timeout, upstream.timeout),
        max_retries=upstream.retries,
        concurrency=upstream.concurrency,
        capabilities=upstream.capabilities,
        headers=upstream.headers,
        stream=False,  # who wants no stream gets the server's response as it is
    )
