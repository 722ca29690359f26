"""Loads a model for the local engine, and refuses one that the engine would compute wrongly.

`load` reads a local folder or a hub id through transformers, sets the text model's attention to ours and runs `check`:
a short forced run of packed rows of different lengths, in chunks and with a fork, whose logits must equal those of the
same weights under a stock attention, every layer having reached our function once. Models that do not pass (their class
keeps a state of its own, does not hand keyword arguments down, or computes attention elsewhere) are refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from thrifty.engines.local.attend import NAME
from thrifty.engines.local.runner import Row, Runner
from thrifty.errors import InvalidInput, Unsupported

SUPPORTED = "decoder models whose every layer calls transformers' AttentionInterface (Llama, Qwen, Mistral, Gemma, Phi)"


def load(
    name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", max_chunk: int = 1024
) -> Runner:
    """A checked runner for the model in a local folder, or with this hub id.

    `dtype` None means bf16 where the processor computes it well, else fp32 (`best_dtype`). Raises InvalidInput where
    there is nothing to load, Unsupported (naming the class) where the model fails the check.
    """
    _there(name)
    try:
        config = AutoConfig.from_pretrained(name)
        kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model, told = kind.from_pretrained(name, dtype=dtype or best_dtype(), output_loading_info=True)
    except ValueError as wrong:
        if "Unrecognized configuration class" in str(wrong):
            raise Unsupported(f"{name} has no causal language model: supported are {SUPPORTED}") from wrong
        raise InvalidInput(f"{name} cannot be read as a model: {_line(wrong)}") from wrong
    except (OSError, SafetensorError, RuntimeError, KeyError) as wrong:
        raise InvalidInput(f"{name} cannot be read as a model: {_line(wrong)}") from wrong
    if told["missing_keys"]:
        lost = sorted(told["missing_keys"])
        raise InvalidInput(f"{name} lacks {len(lost)} weights ({lost[0]}, ...): download the model again")
    return attach(model.to(device).eval(), max_chunk)


def attach(model: Any, max_chunk: int = 1024) -> Runner:
    """A checked runner for a model already in memory; its attention is set to ours. Raises Unsupported."""
    try:
        _set(model, NAME)
    except ValueError as wrong:
        raise _refused(model, f"its attention cannot be set ({wrong})") from wrong
    runner = Runner(model, max_chunk)
    check(runner)
    return runner


def best_dtype() -> torch.dtype:
    """bf16 on a GPU or a processor with instructions for it, else fp32."""
    if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def check(runner: Runner) -> None:
    """Compare the runner with stock attention on a few tokens; raises Unsupported naming the class and what differs.

    Leaves no trace in the model. Also finds out whether the model's keys can be turned (`runner.rotation.works`).
    """
    model = runner.model
    generator = torch.Generator().manual_seed(0)
    lengths = (11, 5, 1)
    rows = [torch.randint(0, runner.vocab, (n,), generator=generator) for n in lengths]
    try:
        ours = _forced(runner, rows)
    except Unsupported as wrong:
        raise _refused(model, str(wrong)) from wrong
    except (TypeError, AttributeError, IndexError, RuntimeError, ValueError, KeyError) as wrong:
        raise _refused(model, f"its forward pass failed on packed rows ({type(wrong).__name__}: {wrong})") from wrong
    reached = sorted(runner.reached or [])
    if reached != list(range(runner.layers)):
        raise _refused(model, f"{len(set(reached))} of its {runner.layers} layers reached the attention function once")
    stock = _stock(runner, rows)
    worst = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in zip(ours, stock, strict=True))
    if not worst <= _TOLERANCE[runner.dtype]:
        raise _refused(model, f"its logits differ from stock by {worst:.1e} of their largest")
    runner.rotation.works = _turns(runner)


_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


def _forced(runner: Runner, rows: list[Tensor]) -> list[Tensor]:
    """All logits of the rows: packed, in two calls and chunks, the second call on a fork of each first part."""
    whole, runner.max_chunk = runner.max_chunk, 7
    stores = [runner.store() for _ in rows]
    try:
        halves = [(len(row) + 1) // 2 for row in rows]
        first = [Row(s, r[:h], want="all") for s, r, h in zip(stores, rows, halves, strict=True)]
        begun = [o.logits for o in runner.forward(first)]
        forks = [s.fork() for s in stores]
        stores += forks
        second = [
            (i, Row(f, r[h:], want="all"))
            for i, (f, r, h) in enumerate(zip(forks, rows, halves, strict=True))
            if h < len(r)
        ]
        for (i, _), out in zip(second, runner.forward([row for _, row in second]), strict=True):
            begun[i] = torch.cat([t for t in (begun[i], out.logits) if t is not None])
        return [t.double() for t in begun if t is not None]
    finally:
        runner.max_chunk = whole
        for store in stores:
            store.close()


def _stock(runner: Runner, rows: list[Tensor]) -> list[Tensor]:
    """All logits of the rows, each by itself, under the model's own attention."""
    model = runner.model
    training = model.training
    try:
        _set(model, "eager")
        model.eval()
        with torch.no_grad():
            return [model(row[None].to(runner.device), use_cache=False).logits[0].double() for row in rows]
    finally:
        _set(model, NAME)
        model.train(training)


def _turns(runner: Runner) -> bool:
    """Whether a key at one position, turned, is the key of the same token at another."""
    if runner.rotation.works is False:
        return False
    runner.rotation.works = True
    near, far = runner.store(), runner.store()
    far.next_position = 5
    try:
        runner.forward([Row(near, [1], want="none"), Row(far, [1], want="none")])
        here, there = near.snapshot(0)[0], far.snapshot(0)[0]
        turned = runner.rotation.turn(here, torch.full(here.shape[:2], 5, device=here.device), 0)
        return bool((turned - there).abs().max() <= _TOLERANCE[runner.dtype] * there.abs().max())
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return False
    finally:
        near.close()
        far.close()


def _set(model: Any, name: str) -> None:
    """Set the attention of the text model; a vision tower keeps its own."""
    text = model.config.get_text_config()
    if text is model.config:
        model.set_attn_implementation(name)
        return
    part = next(key for key in model.config.sub_configs if getattr(model.config, key) is text)
    model.set_attn_implementation({part: name})


def _refused(model: Any, why: str) -> Unsupported:
    return Unsupported(f"{type(model).__name__} is not supported by the local engine: {why}; supported are {SUPPORTED}")


def _line(wrong: Exception) -> str:
    """The first line of another library's message."""
    text = str(wrong).strip() or type(wrong).__name__
    return text.splitlines()[0][:200]


def _there(name: str | Path) -> None:
    """Refuse a folder without a config or without weights before transformers fails in many lines."""
    folder = Path(name)
    if not folder.is_dir():
        if isinstance(name, Path) or folder.is_absolute() or str(name).startswith("."):
            raise InvalidInput(f"there is no folder {folder}: give a model folder or a hub id")
        return
    if not (folder / "config.json").is_file():
        raise InvalidInput(f"{folder} holds no config.json: give a model folder or a hub id")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise InvalidInput(f"{folder} holds a config but no weights (*.safetensors): download the model again")
