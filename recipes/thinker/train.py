"""Trains the thinker: a Llama of 1 to 3 million parameters, from generated problems, on a few cores.

    python recipes/thinker/train.py --out out/thinker --minutes 90 --threads 2

Writes into `--out`: `log.jsonl`, `checkpoint/` every five minutes (weights and optimiser as safetensors, what else is
needed as JSON), and at the end `model/`, a folder that `thrifty ask --model out/thinker/model` loads. Started again
with the same `--out` it goes on where the last checkpoint was taken, and does exactly what an unbroken run would have
done (with `--minutes` the schedule also counts the time, so exactly only up to the clock). SIGTERM and SIGINT take a
checkpoint first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from thinker_attention import NAME  # noqa: E402
from thinker_data import IGNORED, Documents, documents  # noqa: E402

from thrifty.lab import tokenizer  # noqa: E402

HERE = Path(__file__).parent


def model_of(config: dict[str, Any], ids: Any) -> LlamaForCausalLM:
    """A fresh model; the same for the same seed. `ids` is the tokenizer (for the vocabulary and the special ids)."""
    torch.manual_seed(config["seed"])
    settings = LlamaConfig(
        vocab_size=-(-ids.get_vocab_size() // 16) * 16,
        tie_word_embeddings=True,
        bos_token_id=ids.token_to_id("<bos>"),
        eos_token_id=ids.token_to_id("<eos>"),
        pad_token_id=ids.token_to_id("<pad>"),
        attn_implementation=NAME if not torch.cuda.is_available() else "sdpa",
        **config["model"],
    )
    model = LlamaForCausalLM(settings)
    # transformers' 0.02 is made for wide models: at this width it drowns the embeddings and flattens attention
    scale = settings.hidden_size**-0.5
    for name, weights in model.named_parameters():
        if weights.dim() == 2:
            branch = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(weights, std=scale / math.sqrt(2 * settings.num_hidden_layers) if branch else scale)
    return model


def rate(progress: float, step: int, training: dict[str, Any]) -> float:
    """Warm-up, a flat stretch, and a linear fall over the last `decay` of the run.

    >>> t = {"rate": 1.0, "warmup": 10, "decay": 0.5, "floor": 0.0}
    >>> [rate(p, s, t) for p, s in ((0, 4), (0.2, 50), (0.5, 100), (0.75, 150), (1.0, 200))]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warm = min(1.0, (step + 1) / training["warmup"])
    left = min(1.0, (1.0 - min(1.0, progress)) / training["decay"])
    return float(training["rate"] * warm * (training["floor"] + (1.0 - training["floor"]) * left))


def optimisers(model: LlamaForCausalLM, training: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, with steps as large as AdamW's; AdamW for embeddings and norms."""
    inner = [
        p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    betas, decay = tuple(training["betas"]), training["weight_decay"]
    if training["matrices"] == "adamw":
        groups = [{"params": inner, "weight_decay": decay}, {"params": outer, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=training["rate"], betas=betas, fused=True)]
    return [
        torch.optim.Muon(inner, lr=training["rate"], weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=training["rate"], betas=betas, weight_decay=0.0, fused=True),
    ]


class Run:
    """One training run: model, optimiser, and how far it has come."""

    def __init__(
        self, config: dict[str, Any], out: Path, minutes: float | None = None, bf16: bool | None = None
    ) -> None:
        self.config, self.out, self.minutes = config, out, minutes
        self.training: dict[str, Any] = config["training"]
        self.documents: Documents = documents(config)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fast = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        self.bf16 = fast if bf16 is None else bf16
        self.model = model_of(config, self.documents.tokenizer).to(self.device)
        self.optimisers = optimisers(self.model, self.training)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        if (out / "checkpoint" / "state.json").is_file():
            self._restore(out / "checkpoint")

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end: by steps, or by the time where that is shorter."""
        by_step = self.step / self.training["steps"]
        return by_step if self.minutes is None else max(by_step, self.seconds / (60 * self.minutes))

    def one_step(self) -> tuple[float, float]:
        """Draws a batch, takes a step; returns the loss a learned token and the gradient's norm."""
        began, progress = time.perf_counter(), self.progress
        chunks = self.documents.batch(self.step)
        learned = sum(int((labels != IGNORED).sum()) for _, labels in chunks)
        lost = 0.0
        for ids, labels in chunks:
            loss = self._loss(ids.to(self.device), labels.to(self.device)) / learned
            loss.backward()
            lost += float(loss.detach())
            self.tokens += ids.numel()
        now = rate(progress, self.step, self.training)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training["clip"]))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = now
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - began
        return lost, norm

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Summed over learned tokens; only their logits are computed."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            wanted = labels[:, 1:]
            chosen = wanted != IGNORED
            logits = self.model.lm_head(hidden[chosen])
        return torch.nn.functional.cross_entropy(logits.float(), wanted[chosen], reduction="sum")

    # -- checkpoints --

    def save(self) -> None:
        """A whole checkpoint or none: written beside the old one, which it then replaces."""
        new, folder = self.out / "checkpoint.new", self.out / "checkpoint"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        names = {id(p): name for name, p in self.model.named_parameters()}
        save_file(
            {name: p.detach().contiguous() for name, p in self.model.named_parameters()}, new / "weights.safetensors"
        )
        state = {
            f"{names[id(p)]}:{key}": value.detach().clone()
            for optimiser in self.optimisers
            for p, values in optimiser.state.items()
            for key, value in values.items()
        }
        save_file(state, new / "optimiser.safetensors")
        told = {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "config": self.config}
        (new / "state.json").write_text(json.dumps(told), encoding="utf-8")
        old = self.out / "checkpoint.old"
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def _restore(self, folder: Path) -> None:
        told = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if told["config"] != json.loads(json.dumps(self.config)):
            raise SystemExit(f"{folder} was made with another configuration: give another --out, or remove it")
        self.step, self.seconds, self.tokens = told["step"], told["seconds"], told["tokens"]
        weights, state = load_file(folder / "weights.safetensors"), load_file(folder / "optimiser.safetensors")
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])
        owner = {id(p): o for o in self.optimisers for group in o.param_groups for p in group["params"]}
        named = dict(self.model.named_parameters())
        for key, value in state.items():
            name, _, part = key.rpartition(":")
            p = named[name]
            # AdamW counts its steps in a tensor that stays on the processor unless it is fused on a GPU
            owner[id(p)].state[p][part] = value.to(p.device)

    def export(self) -> Path:
        """The model folder: config, float32 weights, tokenizer with its template."""
        folder = self.out / "model"
        self.model.save_pretrained(folder)
        tokenizer.save(folder)
        return folder


def train(run: Run, stop: Any = lambda: False) -> bool:
    """To the end or until `stop()`; True when it is complete. Logs, and takes checkpoints by the clock."""
    saved, losses = time.monotonic(), []
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "log.jsonl").open("a", encoding="utf-8") as log:
        while run.progress < 1.0 and not stop():
            loss, norm = run.one_step()
            losses.append(loss)
            if run.step % run.training["every_log"] == 0:
                line = {
                    "step": run.step,
                    "loss": round(sum(losses) / len(losses), 5),
                    "norm": round(norm, 4),
                    "rate": round(run.optimisers[0].param_groups[0]["lr"], 7),
                    "tokens": run.tokens,
                    "seconds": round(run.seconds, 1),
                    "progress": round(run.progress, 4),
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(line, flush=True)
                losses = []
            if time.monotonic() - saved >= run.training["every_checkpoint"]:
                run.save()
                saved = time.monotonic()
    run.save()
    return run.progress >= 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--minutes", type=float, help="the schedule ends by then, if not by its steps before")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    run = Run(config, given.out, given.minutes)
    size = sum(p.numel() for p in run.model.parameters())
    print(
        f"{size:,} parameters, {run.device}, bf16 {run.bf16}, {given.threads} threads, from step {run.step}", flush=True
    )
    if not train(run, lambda: bool(stopped)):
        print(f"stopped at step {run.step}; start it again to go on")
        return
    machine = {"machine": platform.machine(), "threads": given.threads, "device": str(run.device)}
    made = {"parameters": size, "steps": run.step, "tokens": run.tokens, "minutes": round(run.seconds / 60, 1)}
    folder = run.export()
    (given.out / "run.json").write_text(json.dumps({**made, **machine, "torch": torch.__version__}), encoding="utf-8")
    print(f"{folder}: {made}")


if __name__ == "__main__":
    main()
