"""The thinker's recipe, imported from where it lies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RECIPE = Path(__file__).parents[2] / "recipes" / "thinker"


def recipe(name: str) -> ModuleType:
    """A module of the recipe; `train`, `gates` and `card` under a name of their own."""
    known = name if name.startswith("thinker_") else f"thinker_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, RECIPE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]
