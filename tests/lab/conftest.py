"""A configuration of the thinker small enough to train in a second."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from thinker_recipe import RECIPE


@pytest.fixture
def tiny() -> dict[str, Any]:
    config = tomllib.loads((RECIPE / "config.toml").read_text(encoding="utf-8"))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config["model"] |= small | {"num_key_value_heads": 1, "head_dim": 16}
    config["data"] |= {"early": [1, 0, 0, 0, 0], "late": [1, 0, 0, 0, 0], "longest": 160}
    config["training"] |= {"steps": 12, "tokens": 256, "chunk": 256, "warmup": 4, "every_log": 4}
    return config
