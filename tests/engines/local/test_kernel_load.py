"""What is loaded, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import transformers

from thrifty.engines.local.load import attach, load
from thrifty.engines.local.runner import Row
from thrifty.errors import InvalidInput, Unsupported


def test_a_saved_folder_loads_and_equals_itself(tmp_path: Path) -> None:
    made = tiny.model("Qwen2")
    made.save_pretrained(tmp_path)
    runner = load(tmp_path, torch.float32)
    tokens = tiny.tokens(40)
    ours = runner.forward([Row(runner.store(), tokens, want="all")])[0].logits
    assert ours is not None
    torch.testing.assert_close(ours, tiny.stock(made, tokens), rtol=0, atol=1e-4)
    assert load(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_the_check_leaves_no_trace() -> None:
    made = tiny.model("Llama").train()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    random = torch.random.get_rng_state()
    runner = attach(made, max_chunk=300)
    assert made.training and made.config._attn_implementation == "thrifty"
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(len(p.free) == p.slots for p in runner.tails.pages) and runner.max_chunk == 300


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97}),
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 4}),
        ("StableLm", {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}),
    ],
)
def test_other_architectures_are_refused_by_name(name: str, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2} if name == "StableLm" else {}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**more, **heads)).eval()
    with pytest.raises(Unsupported, match=f"{name}ForCausalLM is not supported by the local engine: .*supported are"):
        attach(model)


def test_a_model_computed_wrongly_is_refused() -> None:
    """A layer that scales its output in our run only: the logits differ, whatever the layers say."""
    made = tiny.model("Llama")

    def spoil(_module: Any, _args: Any, kwargs: Any, out: Any) -> Any:
        return (out[0] * 1.05, *out[1:]) if "step" in kwargs else out

    made.model.layers[2].self_attn.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(Unsupported, match="differ from stock"):
        attach(made)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no config\.json"):
        load(tmp_path)
    tiny.model("Llama").config.save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="no weights"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(InvalidInput, match="no-such-folder"):
        load(tmp_path / "no-such-folder")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    made = tiny.model("Llama")
    made.save_pretrained(tmp_path, state_dict={k: v for k, v in made.state_dict().items() if "layers.1.mlp" not in k})
    with pytest.raises(InvalidInput, match=r"lacks 3 weights \(model\.layers\.1\.mlp"):
        load(tmp_path, torch.float32)
