"""Images through the whole engine, on a tiny random LLaVA: against the stock model, and with half of them dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import make_folder
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Sampling, Unsupported
from thrifty.call import Receipt
from thrifty.engines.local.engine import LocalEngine
from thrifty.engines.local.load import attach
from thrifty.policy import Selection, VisionPolicy, VisualView
from thrifty.spend import Spend

PATCHES = 16


class EverySecond(VisionPolicy):
    method = "every-second"

    def select(self, view: VisualView, keep: int) -> Selection:
        return Selection(range(0, len(view.features), 2))

    def receipt(self, branch: Any) -> Receipt:
        before, after = sum(branch.seen.before), sum(branch.seen.after)
        return Receipt(self.method, after < before, "", before, after, "visual tokens")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlavaForConditionalGeneration, Any]:
    tokenizer = AutoTokenizer.from_pretrained(make_folder(tmp_path_factory.mktemp("llava") / "model"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    holder = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=holder, vision_feature_layer=-1)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval(), tokenizer


def ask(*images: torch.Tensor, budget: Budget | None = None, policies: tuple[Any, ...] = ()) -> Call:
    content = [{"type": "text", "text": "what "}, *({"type": "image", "pixel_values": i} for i in images)]
    messages = ({"role": "user", "content": [*content, {"type": "text", "text": " is it?"}]},)
    account = Account("t", budget or Budget())
    return Call(messages, account, sampling=Sampling(max_tokens=8), policies=policies)


def test_greedy_text_is_that_of_transformers(parts: tuple[Any, Any]) -> None:
    import asyncio

    model, tokenizer = parts
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    prompt = "<|user|>what " + "<image>" * (2 * PATCHES) + " is it?<|end|><|assistant|>"
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    model.set_attn_implementation("eager")
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images,
        max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=0,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    engine = LocalEngine(attach(model), tokenizer, "tiny-llava")

    async def run() -> None:
        assert "vision" in engine.capabilities
        call = ask(*images)
        answer = await engine.generate(call)
        assert list(answer.tokens or ()) == expected
        assert answer.spend == Spend(input=ids.shape[1], visual=2 * PATCHES, output=len(expected), calls=1)
        assert engine.count(call) == ids.shape[1]

        halved = await engine.generate(ask(*images, policies=(EverySecond(),)))
        assert halved.spend.visual == PATCHES and halved.spend.input == ids.shape[1] - PATCHES
        assert [(r.fired, r.before, r.after) for r in halved.receipts] == [(True, 32, 16)]

        poor = ask(*images, budget=Budget(visual=31))
        with pytest.raises(BudgetExceeded, match="visual"):
            await engine.generate(poor)
        assert poor.account.held == {}
        with pytest.raises(InvalidInput, match="pixel_values of shape"):
            await engine.generate(ask(images))
        url = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
        with pytest.raises(InvalidInput, match="fetches nothing"):
            await engine.generate(Call(({"role": "user", "content": [url]},), Account("t")))
        url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        with pytest.raises((InvalidInput, Unsupported), match="could not be read|Pillow"):
            await engine.generate(Call(({"role": "user", "content": [url]},), Account("t")))
        await engine.aclose()

    asyncio.run(run())


def test_a_model_folder_needs_no_image_processor(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = parts
    model.save_pretrained(tmp_path / "llava")
    tokenizer.save_pretrained(tmp_path / "llava")
    engine = LocalEngine.load(tmp_path / "llava", dtype="float32")
    assert engine.prompter.eyes is not None and engine.prompter.eyes.patches == PATCHES
