"""A tiny random model with thinking tags, and a policy that makes it say what a test wants, token by token."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "engines" / "local"))


@pytest.fixture(scope="session")
def thinker_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Runner and tokenizer of a tiny Llama (bytes as tokens) that has <think> and </think> as one token each."""
    import torch
    from tiny_chat import make_folder
    from transformers import AutoTokenizer

    from thrifty.engines.local.load import load

    folder = make_folder(tmp_path_factory.mktemp("thinker") / "model", positions=4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    return load(folder, torch.float32, "cpu"), tokenizer


@pytest.fixture
async def thinker(thinker_parts: tuple[Any, Any]) -> AsyncIterator[Any]:
    """A fresh engine over the shared weights, float32, rows alone."""
    from thrifty.engines.local.engine import LocalEngine

    engine = LocalEngine(*thinker_parts, "tiny-thinker", deterministic=True)
    yield engine
    await engine.aclose()
