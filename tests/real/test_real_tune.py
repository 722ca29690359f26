"""`tune` on SmolLM2: a few short needles, one certificate that verifies. Too few examples to mean much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thrifty import Plan
from thrifty.bench.needles import needles
from thrifty.bench.study import count_with
from thrifty.bench.task import save
from thrifty.call import Sampling
from thrifty.tune.calibration import Claim, UseLog
from thrifty.tune.certificate import SplitUsed
from thrifty.tune.found import Settings
from thrifty.tune.recompute import check_data, recompute
from thrifty.tune.report import page
from thrifty.tune.saving import Traffic
from thrifty.tune.spacefile import from_toml
from thrifty.tune.splits import data_hash, split
from thrifty.tune.tuning import tune

pytestmark = [pytest.mark.real, pytest.mark.slow]

SPACE = from_toml('[[methods]]\nuse="fixed-k"\noptional=false\nknobs={k={values=[3, 1]}}')
SHARES = (0.25, 0.6, 0.15)


async def test_needles_are_tuned_and_the_certificate_verifies(smollm2: Any, minilm: Any, tmp_path: Path) -> None:
    tasks = needles(20, 5, count=count_with(smollm2), lengths=(300,), long=None, distractors=(0,), lists=False)
    save(tasks, tmp_path / "tasks.jsonl")
    tuned = await tune(
        split(tasks, shares=SHARES),
        SPACE,
        {"answer": smollm2, "embedder": minilm},
        Claim("drop", 0.4, 0.2, bound="betting"),
        tmp_path / "out",
        settings=Settings(axis="usd", first=4),
        sampling=Sampling(stop=("\n",), max_tokens=12),
        log=UseLog(tmp_path / "uses.db"),
        split_used=SplitUsed(data_hash(tasks), SHARES, 0),
    )
    assert tuned.plan is not None and tuned.certificate is not None, tuned.needed
    assert tuned.plan.methods[0].name == "fixed-k" and tuned.certificate.model
    assert recompute(tuned.certificate).ok and check_data(tuned.certificate, tasks) == []
    assert tuned.certificate.saving is not None and tuned.certificate.saving.share.value > 0.2
    assert Plan.load(tmp_path / "out" / "plan.toml").hash == tuned.plan.hash
    assert "a month" in page(tuned, traffic=Traffic.parse("1000/day"))
