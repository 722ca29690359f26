"""The thinker's recipe: training goes on exactly where it stopped, batches depend on the step alone, and what it
exports is a model that the local engine loads, thinks with and is forced with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from thinker_recipe import recipe

from thrifty import Account, Call, Sampling
from thrifty.lab.tokenizer import prompt
from thrifty.lab.traces import SKIPPED


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_a_run_that_was_stopped_ends_as_an_unbroken_one(tiny: dict[str, Any], tmp_path: Path, matrices: str) -> None:
    train = recipe("train")
    tiny["training"]["matrices"] = matrices
    whole = train.Run(tiny, tmp_path / "whole", bf16=False)
    assert train.train(whole)
    first = train.Run(tiny, tmp_path / "parts", bf16=False)
    assert not train.train(first, lambda: first.step >= 5)
    second = train.Run(tiny, tmp_path / "parts", bf16=False)
    assert (second.step, second.tokens) == (5, first.tokens)
    assert train.train(second)
    assert second.tokens == whole.tokens
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    assert not [f for f in (tmp_path / "parts").rglob("*") if f.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_training_learns(tiny: dict[str, Any], tmp_path: Path) -> None:
    train = recipe("train")
    tiny["training"] |= {"steps": 60, "tokens": 512, "chunk": 512, "every_log": 20}
    assert train.train(train.Run(tiny, tmp_path, bf16=False))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.75 * losses[0]


def test_another_configuration_is_not_continued(tiny: dict[str, Any], tmp_path: Path) -> None:
    train = recipe("train")
    run = train.Run(tiny, tmp_path, bf16=False)
    run.save()
    tiny["training"]["rate"] = 1e-9
    with pytest.raises(SystemExit, match="another configuration"):
        train.Run(tiny, tmp_path, bf16=False)


def test_a_batch_is_a_function_of_its_step_and_learns_completions_only(tiny: dict[str, Any]) -> None:
    data = recipe("thinker_data")
    one, two = data.documents(tiny), data.documents(tiny)
    one.batch(0)
    begin = one.tokenizer.encode(prompt("")).ids[-1]  # <assistant>
    for step in (17, 3):
        for (ids, labels), (same, _) in zip(one.batch(step), two.batch(step), strict=True):
            assert torch.equal(ids, same)
            assert ids.shape[0] % data.ROWS == 0 and (ids.shape[1] - 1) % data.WIDTH == 0
            for row, wanted in zip(ids, labels, strict=True):
                if (row == one.pad).all():
                    assert (wanted == data.IGNORED).all()
                    continue
                start = int((row == begin).nonzero()[0])
                assert (wanted[: start + 1] == data.IGNORED).all()
                learned = wanted != data.IGNORED
                assert torch.equal(wanted[learned], row[learned]) and int(row[learned][-1]) == one.end


def test_padding_and_products_do_not_change_a_document(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The oracle is transformers' eager attention on each document alone."""
    run = recipe("train").Run(tiny, tmp_path, bf16=False)
    chunk = next((ids, labels) for ids, labels in run.documents.batch(0) if len(ids) > 2)
    together = float(run._loss(*chunk).detach())
    run.model.set_attn_implementation("eager")
    alone = 0.0
    for ids, labels in zip(*chunk, strict=True):
        n = int((ids != run.documents.pad).sum())
        if n:
            alone += float(run._loss(ids[None, :n], labels[None, :n]).detach())
    assert together == pytest.approx(alone, rel=1e-4)


async def test_what_it_exports_thinks_by_itself_and_is_forced(tiny: dict[str, Any], tmp_path: Path) -> None:
    """After a little training the model opens its thinking itself; a forced prefix is followed by an answer."""
    from thrifty.engines.local.engine import LocalEngine

    train = recipe("train")
    tiny["training"] |= {"steps": 150, "tokens": 512, "chunk": 512, "rate": 1e-2}
    run = train.Run(tiny, tmp_path, bf16=False)
    assert train.train(run)
    engine = LocalEngine.load(run.export(), dtype="float32")
    try:
        asked = Call(({"role": "user", "content": "Compute 49-5+7"},), Account("t"), sampling=Sampling(max_tokens=150))
        free = await engine.generate(asked)
        assert free.thinking and "<think>" not in free.text and free.spend.reasoning > 0
        forced = Call(asked.messages, Account("t"), prefix=f"{SKIPPED[0]}Answer: ", sampling=Sampling(max_tokens=8))
        answer = await engine.generate(forced)
        assert answer.thinking == "" and answer.text
        assert engine.codec.encode(prompt("Compute 49-5+7")) == engine.prompter(asked).tokens
    finally:
        await engine.aclose()
