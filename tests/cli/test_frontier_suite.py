"""Which suite `thrifty frontier` measures where none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from thrifty.bench.suites import SUITES
from thrifty.cli.frontier import _default, _specs
from thrifty.engines.local import packaged
from thrifty.lab.suite import is_thinker
from thrifty.lab.tokenizer import TEMPLATE


def test_the_thinker_is_measured_on_its_own_suite(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert not is_thinker(str(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert not is_thinker(str(folder))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for model in ("thinker", "local:thinker", str(folder), f"local:{folder}"):
        assert _default(model) == "thinker"
    for other in (None, "smollm2", "openai:thinker@http://127.0.0.1:1/v1", str(tmp_path / "none")):
        assert _default(other) == "demo"


@pytest.mark.parametrize("model", ["thinker", "smollm2"])
@pytest.mark.parametrize("there", [True, False])
def test_the_thinkers_own_verifier_scores_where_it_is_installed(
    model: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "present", lambda name: there and name == "thinker-verifier")
    scorer = "thinker-verifier" if there and model == "thinker" else model
    assert any("scorer" in plan.needs() for plan in SUITES["thinker"].plans())
    assert _specs(["thinker"], [], model, "minilm", None) == {"answer": model, "scorer": scorer}
