"""Engines by a line of text, as plans and the command line name them.

======================================  ====================================================================
`local:NAME`, `local:FOLDER`, `NAME`    transformers: an embedded model, a folder, a hub id
`openai:MODEL@URL`                      any OpenAI-compatible server; the key comes from `THRIFTY_API_KEY` or
                                        `OPENAI_API_KEY`; without `@URL`, from `OPENAI_BASE_URL`
`scripted:echo`                         repeats the question; for trying plans and for tests
======================================  ====================================================================
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from thrifty.engine import Engine
from thrifty.errors import InvalidInput, nearest
from thrifty.meter.prices import PriceTable

KINDS = ("local", "openai", "scripted")
EMBEDDERS = ("minilm",)
"""Embedded models that are embedders, so `local:minilm` gives vectors and no text."""


def resolve(spec: str, *, prices: PriceTable | None = None, **options: Any) -> Engine:
    """The engine that a specification names. Loads a local model; contacts no server.

    Raises InvalidInput for a specification that cannot be read, and what the engine itself raises for a model that
    cannot be loaded. `options` go to the engine.
    """
    kind, rest = read(spec)
    return _MAKERS[kind](rest, prices, options)


def read(spec: str) -> tuple[str, str]:
    """Kind and model of a specification; nothing is loaded. Raises InvalidInput.

    >>> read("smollm2"), read("openai:m@http://127.0.0.1:8080/v1")
    (('local', 'smollm2'), ('openai', 'm@http://127.0.0.1:8080/v1'))
    """
    kind, colon, rest = spec.partition(":")
    if kind in ("http", "https"):  # the address is not repeated: it may hold a password
        raise InvalidInput("engine: an address without a model: openai:MODEL@URL is needed")
    if kind not in KINDS and (not colon or os.path.exists(spec)):
        kind, rest = "local", spec
    if kind not in KINDS:
        raise InvalidInput(nearest(kind, KINDS, "engine kind"))
    if not rest.strip():
        raise InvalidInput(f"engine {spec!r}: a model is needed after {kind}:, such as {_EXAMPLES[kind]}")
    return kind, rest


def resolve_roles(specs: Mapping[str, str], *, prices: PriceTable | None = None, **options: Any) -> dict[str, Engine]:
    """Engines by role; roles with the same specification share one engine. `options` go to the answering engine."""
    made: dict[str, Engine] = {}
    engines: dict[str, Engine] = {}
    for role, spec in specs.items():
        if spec not in made:
            made[spec] = resolve(spec, prices=prices, **(options if role == "answer" else {}))
        engines[role] = made[spec]
    return engines


def _local(model: str, prices: PriceTable | None, options: Mapping[str, Any]) -> Engine:
    # looked up and not imported: torch takes seconds, and a name that is wrong is told before
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput(
            f"engine local:{model} needs torch and transformers: install the extra, `pip install 'thrifty[local]'`"
        )
    from thrifty.engines.local import embedded, hub

    if embedded.known(model):
        embedded.path(model)  # says how to get it, before anything heavy is imported
    table = prices or PriceTable.local()
    with hub.loading(model):
        from thrifty.engines.local.engine import LocalEmbedder, LocalEngine

        if model in EMBEDDERS:
            return LocalEmbedder.load(model, prices=table)
        return LocalEngine.load(model, prices=table, **options)


def _openai(rest: str, prices: PriceTable | None, options: Mapping[str, Any]) -> Engine:
    from thrifty.engines.openai import OpenAIEngine

    model, _, url = rest.partition("@")
    url = url or os.environ.get("OPENAI_BASE_URL", "")
    if not url:
        raise InvalidInput(f"engine openai:{model}: no server: write openai:{model}@URL or set OPENAI_BASE_URL")
    key = next((k for k in ("THRIFTY_API_KEY", "OPENAI_API_KEY") if os.environ.get(k)), None)
    return OpenAIEngine(url, model, api_key=os.environ[key] if key else None, prices=prices, **options)


def _scripted(rest: str, prices: PriceTable | None, options: Mapping[str, Any]) -> Engine:
    from thrifty.engines.scripted import ScriptedEngine

    if rest != "echo":
        raise InvalidInput(nearest(rest, ("echo",), "script"))
    return ScriptedEngine(lambda call, *_: call.question(), prices=prices or PriceTable.local())


_MAKERS = {"local": _local, "openai": _openai, "scripted": _scripted}
_EXAMPLES = {"local": "local:smollm2", "openai": "openai:MODEL@http://127.0.0.1:8080/v1", "scripted": "scripted:echo"}
