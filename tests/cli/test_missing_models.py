"""A model that is not there is told in one line, before torch is imported and without waiting for a hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from thrifty import InvalidInput
from thrifty.engines.local import hub


def refused(model: str, **env: str) -> str:
    code = (
        "import sys\nfrom thrifty.engines.spec import resolve\nfrom thrifty.errors import InvalidInput\n"
        "try:\n    resolve(sys.argv[1])\nexcept InvalidInput as error:\n    print(error, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, model]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, **env})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told, _, torch = done.stdout.strip().rpartition(" ")
    assert torch == "False"
    return told


def test_a_hub_id_without_a_hub(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert "did you mean 'smollm2'" in refused("smolm2", **offline)
    assert "cannot be reached" in refused("local:some-org/some-model", **offline)
    # nothing listens on port 1: refused at once, and not asked again and again
    away = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    assert "cannot be reached" in refused("some-org/some-model", **away)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(str(tmp_path))
    assert "there is no folder" in refused(f"local:{tmp_path}/nothing")
    assert "hub id" in refused("a/b/c")


def test_an_embedded_model_that_was_not_fetched(tmp_path: Path) -> None:
    assert "thrifty models get smollm2" in refused("smollm2", THRIFTY_HOME=str(tmp_path))


def test_loading_leaves_the_loaders_as_they_were(tmp_path: Path) -> None:
    from huggingface_hub import constants
    from transformers.utils import logging

    (tmp_path / "config.json").write_text("{}")
    before = (constants.HF_HUB_OFFLINE, logging.is_progress_bar_enabled(), logging.get_verbosity())
    with pytest.raises(InvalidInput, match="stop"), hub.loading(str(tmp_path)):
        assert not logging.is_progress_bar_enabled()
        raise InvalidInput("stop")
    assert (constants.HF_HUB_OFFLINE, logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
