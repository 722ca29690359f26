"""A tiny random model for searches that read tensors, and the same weights in transformers as the oracle."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "engines" / "local"))


@pytest.fixture(scope="session")
def searched_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_chat import make_folder

    return make_folder(tmp_path_factory.mktemp("searched") / "model", positions=2048)


@pytest.fixture(scope="session")
def searched_parts(searched_folder: Path) -> tuple[Any, Any]:
    """Runner and tokenizer, loaded once."""
    import torch
    from transformers import AutoTokenizer

    from thrifty.engines.local.load import load

    return load(searched_folder, torch.float32, "cpu"), AutoTokenizer.from_pretrained(searched_folder)


@pytest.fixture
async def searched(searched_parts: tuple[Any, Any]) -> AsyncIterator[Any]:
    """A fresh engine over the shared weights, float32, rows alone."""
    from thrifty.engines.local.engine import LocalEngine

    engine = LocalEngine(*searched_parts, "tiny", deterministic=True)
    yield engine
    await engine.aclose()


@pytest.fixture(scope="session")
def stock(searched_folder: Path) -> Any:
    """The same weights, untouched."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(searched_folder, dtype=torch.float32).eval()
