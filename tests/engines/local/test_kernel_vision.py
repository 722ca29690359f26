"""Visual tokens of a tiny random LLaVA: placed, selected and merged, against the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from thrifty.engines.local.load import attach
from thrifty.engines.local.runner import Row, Runner
from thrifty.engines.local.vision import features, reduce, see
from thrifty.errors import InvalidInput, Unsupported
from thrifty.policy import Selection, VisionPolicy, VisualView

IMAGE, PATCHES = 90, 16


class EverySecond(VisionPolicy):
    def select(self, view: VisualView, keep: int) -> Selection:
        return Selection(list(range(0, len(view.features), 2))[:keep])

    def budget(self, total: int) -> int:
        return total // 2


class MeanOfPairs(VisionPolicy):
    """Merges pairs, and adds the mean of all after them."""

    def select(self, view: VisualView, keep: int) -> Selection:
        n = len(view.features)
        pairs = torch.eye(n // 2).repeat_interleave(2, 1) / 2
        return Selection(range(0, n, 2), pairs, torch.full((1, n), 1 / n))


class Answers(VisionPolicy):
    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    def select(self, view: VisualView, keep: int) -> Selection:
        return self.selection


@pytest.fixture(scope="module")
def llava() -> Runner:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(**tiny.SHAPE)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return attach(model.eval())


def prompt(images: int, each: int = PATCHES) -> torch.Tensor:
    """Text, an image, text, ... with `each` placeholders an image."""
    parts = [tiny.tokens(7, 1) % 80]
    for i in range(images):
        parts += [torch.full((each,), IMAGE), tiny.tokens(5, 2 + i) % 80]
    return torch.cat(parts)


def pixels(images: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def test_an_untouched_image_equals_the_stock_model(llava: Runner) -> None:
    ids, images = prompt(2), pixels(2)
    seen = see(llava, ids, images)
    assert seen.before == seen.after == (PATCHES, PATCHES)
    ours = llava.forward([Row(llava.store(), embeds=seen.embeds, want="all")])[0].logits
    model = llava.model
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        stock = model(input_ids=ids[None], **images, use_cache=False).logits[0]
    model.set_attn_implementation({"text_config": "thrifty"})
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    assert model.config.vision_config._attn_implementation != "thrifty"


def test_dropping_every_second_feature_equals_a_prompt_without_them(llava: Runner) -> None:
    images = pixels(2)
    seen = see(llava, prompt(2), images, [EverySecond()])
    assert seen.before == (PATCHES, PATCHES) and seen.after == (8, 8)
    assert seen.kept == (tuple(range(0, 16, 2)),) * 2
    store = llava.store()
    ours = llava.forward([Row(store, embeds=seen.embeds, want="all")])[0].logits
    assert store.length() == len(prompt(2)) - 16
    short, found = prompt(2, 8), features(llava, images)
    model = llava.model
    embeds = model.get_input_embeddings()(short).detach().clone()
    embeds[short == IMAGE] = torch.cat([f[::2] for f in found])
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        stock = model(inputs_embeds=embeds[None], use_cache=False).logits[0]
    model.set_attn_implementation({"text_config": "thrifty"})
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)


def test_merging_weights_and_extra_rows(llava: Runner) -> None:
    found = features(llava, pixels(1))[0]
    merged, kept = reduce(found, found[:0], [MeanOfPairs()])
    expected = torch.stack([(found[i] + found[i + 1]) / 2 for i in range(0, 16, 2)] + [found.mean(0)])
    torch.testing.assert_close(merged, expected)
    assert kept == tuple(range(0, 16, 2))
    twice, kept = reduce(found, found[:0], [EverySecond(), EverySecond()])
    torch.testing.assert_close(twice, found[::4])
    assert kept == (0, 4, 8, 12)


def test_wrong_selections_and_prompts_are_refused(llava: Runner) -> None:
    found = features(llava, pixels(1))[0]
    wrong = [
        (Selection([3, 2]), "ascending"),
        (Selection([16]), "below 16"),
        (Selection([0, 1], torch.ones(2, 16)), "sum to 1.0"),
        (Selection([0, 1], torch.ones(1, 16)), r"must be \(2, 16\)"),
    ]
    for selection, message in wrong:
        with pytest.raises(InvalidInput, match=message):
            reduce(found, found[:0], [Answers(selection)])
    with pytest.raises(InvalidInput, match="16 image placeholders for 32 visual tokens"):
        see(llava, prompt(1), pixels(2))
    with pytest.raises(Unsupported, match="LlamaForCausalLM takes no images"):
        see(attach(tiny.model("Llama")), prompt(1), pixels(1))
