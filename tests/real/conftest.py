"""The embedded real models, loaded once. Where they are missing, tests skip; in CI that is a failure."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest

from thrifty.errors import ThriftyError


def _folder(name: str) -> str:
    from thrifty.engines.local import embedded

    try:
        return str(embedded.path(name))
    except ThriftyError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Any]:
    _folder("smollm2")
    from thrifty.engines.spec import resolve

    engine = resolve("smollm2")
    yield engine
    asyncio.run(engine.aclose())


@pytest.fixture(scope="session")
def minilm() -> Iterator[Any]:
    _folder("minilm")
    from thrifty.engines.spec import resolve

    engine = resolve("minilm")
    yield engine
    asyncio.run(engine.aclose())
