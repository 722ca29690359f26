"""Fixtures: one tiny chat model for all tests of the local engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import make_folder


@pytest.fixture(scope="session")
def tiny_chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny_chat") / "model")


@pytest.fixture(scope="session")
def tiny_parts(tiny_chat_folder: Path) -> tuple[Any, Any]:
    """Runner and tokenizer, loaded once."""
    from transformers import AutoTokenizer

    from thrifty.engines.local.load import load

    return load(tiny_chat_folder, torch.float32, "cpu"), AutoTokenizer.from_pretrained(tiny_chat_folder)


@pytest.fixture
async def tiny_engine(tiny_parts: tuple[Any, Any]) -> AsyncIterator[Any]:
    """A fresh engine over the shared weights, float32."""
    from thrifty.engines.local.engine import LocalEngine

    runner, tokenizer = tiny_parts
    engine = LocalEngine(runner, tokenizer, "tiny")
    yield engine
    await engine.aclose()
    assert all(len(page.free) == page.slots for page in runner.tails.pages), "a branch kept its memory"


@pytest.fixture(scope="session")
def stock(tiny_chat_folder: Path) -> Any:
    """The same weights in transformers, untouched: the oracle."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_chat_folder, dtype=torch.float32).eval()
