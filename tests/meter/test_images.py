"""Image rules against the providers' worked examples, transformers' own processors, and brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter import images
from thrifty.meter.images import anthropic, anthropic_size, count, gemini, llava, openai, patches, qwen_vl, smart_resize

SIDE = st.integers(1, 9000)


@pytest.mark.parametrize(
    ("width", "height", "model", "detail", "tokens"),
    [
        (1024, 1024, "gpt-4o", "high", 765),  # OpenAI's guide
        (2048, 4096, "gpt-4o", "auto", 1105),
        (4096, 8192, "gpt-4o", "low", 85),
        (1024, 1024, "gpt-4.1-mini", "auto", 1659),  # 32 x 32 patches by 1.62
        (1024, 1024, "gpt-5.4", "high", 1229),
        (2048, 2048, "gpt-5.4", "high", 3000),
        (1800, 2400, "o4-mini", "auto", 2498),  # 1452 patches in the guide, by 1.72
        (2049, 513, "gpt-4.1", "auto", 1445),  # as billed, less 8 tokens of text
        (2050, 513, "gpt-4.1", "auto", 765),
        (256, 256, "gpt-5-mini", "auto", 77),  # as billed
        (1280, 720, "gpt-5-mini", "auto", 1104),
        (2048, 768, "gpt-5-mini", "auto", 1844),
    ],
)
def test_openai(width: int, height: int, model: str, detail: str, tokens: int) -> None:
    assert openai(width, height, model, detail).tokens == tokens


@settings(max_examples=300)
@given(width=SIDE, height=SIDE, most=st.integers(40, 3000), edge=st.integers(300, 4000))
def test_openai_patches_stay_within_their_budget(width: int, height: int, most: int, edge: int) -> None:
    found = patches(width, height, 100, edge, most)
    assert 1 <= found <= most
    unlimited = patches(width, height, 100, edge, None)
    assert found <= unlimited
    assert found == unlimited or unlimited > most


def test_openai_refuses() -> None:
    with pytest.raises(InvalidInput, match="original"):
        openai(10, 10, "gpt-4o", "original")
    with pytest.raises(InvalidInput, match="gpt-5.2 has auto, high, low"):
        openai(10, 10, "gpt-5.2", "original")
    with pytest.raises(InvalidInput, match="no OpenAI image rule"):
        openai(10, 10, "davinci")


@pytest.mark.parametrize(
    ("width", "height", "model", "tokens"),
    [
        (200, 200, "claude-3-5-sonnet", 64),  # Anthropic's guide
        (1000, 1000, "claude-sonnet-4-5", 1296),
        (1092, 1092, "claude-sonnet-4-5", 1521),
        (1920, 1080, "claude-opus-4-7", 2691),
        (3840, 2160, "claude-opus-4-7", 4784),
        (3840, 2160, "claude-opus-4-20250514", 1560),
        (3840, 2160, "claude-sonnet-5", 4784),
    ],
)
def test_anthropic(width: int, height: int, model: str, tokens: int) -> None:
    assert anthropic(width, height, model).tokens == tokens


def test_anthropic_sizes_of_the_guide() -> None:
    assert anthropic_size(1075, 1520) == (924, 1307)
    assert anthropic_size(3840, 2160, "claude-opus-4-7") == (2576, 1449)
    assert anthropic_size(3840, 2160) == (1456, 819)


@settings(max_examples=60)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_anthropic_takes_the_largest_size_that_fits(width: int, height: int) -> None:
    long, short = max(width, height), min(width, height)

    def fits(a: int, b: int) -> bool:
        return math.ceil(a / 28) * 28 <= 1568 and math.ceil(a / 28) * math.ceil(b / 28) <= 1568

    if fits(long, short):
        expected = (long, short)
    else:
        sizes = ((a, max(1, round(a / (long / short)))) for a in range(long - 1, 0, -1))
        expected = next(size for size in sizes if fits(*size))
    found = anthropic_size(width, height)
    assert (max(found), min(found)) == (max(expected), min(expected))
    assert (found[0] >= found[1]) == (width >= height) or found[0] == found[1]


def test_gemini() -> None:
    assert gemini(384, 384).tokens == 258 and not gemini(384, 384).rough
    assert gemini(960, 540).tokens == 6 * 258 and gemini(960, 540).rough  # Google's example
    assert [gemini(9, 9, "gemini-3-pro", d).tokens for d in ("low", "medium", "high", "ultra_high")] == [
        280, 560, 1120, 2240,
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="original"):
        gemini(9, 9, "gemini-3-flash", "original")
    assert count(2000, 100, "gemma-3-4b").total == 260


@pytest.mark.parametrize(
    ("width", "height", "size", "tokens"),
    [(1024, 768, (1024, 768), 768), (3840, 2160, (1504, 832), 1222), (100, 100, (512, 512), 256)],
)
def test_qwen3_vl_by_hand(width: int, height: int, size: tuple[int, int], tokens: int) -> None:
    assert smart_resize(width, height, 32, 256 * 1024, 1280 * 1024) == size
    assert qwen_vl(width, height, least_tokens=256, most_tokens=1280).tokens == tokens


@settings(max_examples=200, deadline=None)
@given(width=st.integers(28, 9000), height=st.integers(28, 9000), factor=st.sampled_from([28, 32]))
def test_qwen_vl_is_as_its_processor(width: int, height: int, factor: int) -> None:
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    least, most = 4 * factor**2, 1280 * factor**2
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(InvalidInput, match="200 : 1"):
            smart_resize(width, height, factor, least, most)
        return
    h, w = reference.smart_resize(height, width, factor, least, most)
    assert smart_resize(width, height, factor, least, most) == (w, h)
    assert w * h <= most


def test_qwen_factors() -> None:
    assert qwen_vl(280, 280, "qwen2.5-vl-7b").tokens == 100
    assert qwen_vl(320, 320, "Qwen3-VL-8B").tokens == 100 and qwen_vl(320, 320).around == 2


@settings(max_examples=200, deadline=None)
@given(width=st.integers(8, 4000), height=st.integers(8, 4000))
def test_llava_next_is_as_its_processor(width: int, height: int) -> None:
    module = pytest.importorskip("transformers.models.llava_next.processing_llava_next")

    class Images:
        image_grid_pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

    processor = object.__new__(module.LlavaNextProcessor)
    processor.image_processor, processor.patch_size, processor.num_additional_image_tokens = Images, 14, 1
    expected = processor._get_number_of_features(height, width, 336, 336) - 1  # without the CLS token
    assert llava(width, height, "llava-v1.6-7b").tokens == expected
    assert llava(width, height, "llava-1.5-7b").tokens == 576


def test_models_choose_their_rule() -> None:
    rules = {
        "openai/gpt-4o": "openai tiles",
        "o3": "openai tiles",
        "gpt-5.4-mini": "openai patches",
        "us.anthropic.claude-opus-4-7": "anthropic patches",
        "gemini-2.5-pro": "gemini tiles",
        "google/gemma-3-4b-it": "gemma 3",
        "Qwen/Qwen2.5-VL-7B-Instruct": "qwen-vl",
        "llava-next-mistral": "llava-next",
    }
    assert {model: count(640, 480, model).rule for model in rules} == rules
    with pytest.raises(InvalidInput, match="no image rule for model 'mistral-large'"):
        count(640, 480, "mistral-large")
    with pytest.raises(InvalidInput, match="detail 'hgih'"):
        count(640, 480, "gpt-4o", "hgih")
    for width, height in ((0, 5), (-3, 5), (5, 1 << 21)):
        for model in rules:
            with pytest.raises(InvalidInput, match="pixels"):
                count(width, height, model)
    assert images.TABLE_DATE.count("-") == 2
