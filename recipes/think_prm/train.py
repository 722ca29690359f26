"""Trains the thinker's verifier: the thinker's own weights, taught to check the thinker's own labelled traces.

    python recipes/think_prm/train.py --model thinker --out out/thinker-verifier --minutes 9 --threads 1
    python recipes/think_prm/train.py --model thinker --out out/thinker-verifier --ship   # into src/thrifty/lab

Writes into `--out`: `traces.jsonl` (what the thinker thought about the training problems, at temperature 1),
`log.jsonl`, `checkpoint/`, `model/` (a folder that a plan takes as its scorer, card included), `measured.json`. Started
again with the same `--out` it goes on where it was stopped: traces are appended, training goes on from its checkpoint,
and what is there is not made again. SIGTERM and SIGINT take a checkpoint first.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import think_prm_card as card  # noqa: E402
import think_prm_data as data  # noqa: E402
import think_prm_measure as measure  # noqa: E402

from thrifty.engines.local import embedded, packaged  # noqa: E402
from thrifty.engines.local.engine import LocalEngine  # noqa: E402
from thrifty.lab import tokenizer  # noqa: E402
from thrifty.lab.tasks import Problem, make  # noqa: E402
from thrifty.methods.search._wording import LINES, mark  # noqa: E402

NAME = "thinker-verifier"
WAVE = 256
"""Traces that are sampled before they are written down."""


def _thinker() -> ModuleType:
    """The thinker's trainer, under a name of its own: both files are called train.py."""
    if "thinker_train" not in sys.modules:
        spec = importlib.util.spec_from_file_location("thinker_train", HERE.parent / "thinker" / "train.py")
        if spec is None or spec.loader is None:
            raise ImportError("recipes/thinker/train.py is not beside this recipe")
        module = importlib.util.module_from_spec(spec)
        sys.modules["thinker_train"] = module
        spec.loader.exec_module(module)
    return sys.modules["thinker_train"]


thinker = _thinker()


class Run(thinker.Run):  # type: ignore[name-defined, misc]
    """The thinker's run (steps, rate, checkpoints, bf16) on other batches, from weights that are there."""

    def __init__(
        self,
        config: dict[str, Any],
        base: Path,
        own: Sequence[data.Solution],
        out: Path,
        minutes: float | None = None,
        bf16: bool | None = None,
    ) -> None:
        weights = hashlib.sha256((base / "model.safetensors").read_bytes())
        config = config | {"base": weights.hexdigest(), "own": len(own)}
        self.config, self.out, self.minutes, self.training = config, out, minutes, config["training"]
        torch.manual_seed(config["seed"])
        self.documents = data.Chains(config, own)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fast = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        self.bf16 = fast if bf16 is None else bf16
        attention = thinker.NAME if self.device.type == "cpu" else "sdpa"
        self.model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=attention)
        self.model = self.model.to(self.device)
        self.optimisers = thinker.optimisers(self.model, self.training)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        if (out / "checkpoint" / "state.json").is_file():
            self._restore(out / "checkpoint")

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Summed over learned tokens. Lines that end in ` not` count `emphasis` times: elsewhere copying the trace is
        right, and a verifier that only copies finds no error."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            wanted = labels[:, 1:]
            chosen = wanted != data.IGNORED
            logits = self.model.lm_head(hidden[chosen])
        losses = torch.nn.functional.cross_entropy(logits.float(), wanted[chosen], reduction="none")
        chains: data.Chains = self.documents
        return (losses * chains.weights(wanted, float(self.training["emphasis"]))[chosen]).sum()

    def export(self) -> Path:
        """The model folder; its chat template says how this verifier is asked."""
        folder = self.out / "model"
        self.model.save_pretrained(folder)
        tokenizer.save(folder)
        template = folder / "chat_template.jinja"
        template.write_text(mark(LINES.name) + template.read_text(encoding="utf-8"), encoding="utf-8")
        return folder


def problems(config: dict[str, Any], n: int, held_out: bool = False) -> list[Problem]:
    """`n` problems, families and difficulties in turn; held-out ones are none of those that are trained on."""
    names = [name for name, weight in config["data"]["families"].items() if weight]
    kinds = [(name, difficulty) for difficulty in (1, 2, 3, 4, 5) for name in names]
    seed, split = config["seed"], "measure" if held_out else "train"

    def drawn(split: str, i: int) -> Problem:
        return make(kinds[i % len(kinds)][0], random.Random(f"{split}:{seed}:{i}"), kinds[i % len(kinds)][1])

    if not held_out:
        return [drawn(split, i) for i in range(n)]
    used = {p.question for p in problems(config, int(config["data"]["traces"]))}
    found: list[Problem] = []
    for i in range(100 * n + 100):
        if len(found) == n:
            break
        if (problem := drawn(split, i)).question not in used:
            used.add(problem.question)
            found.append(problem)
    return found


async def sample(
    engine: Any, config: dict[str, Any], file: Path, stop: Callable[[], bool] = lambda: False
) -> list[data.Solution]:
    """The thinker's traces of the training problems, appended to `file`; those that did not end are left out."""
    wanted = problems(config, int(config["data"]["traces"]))
    done = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    with file.open("a", encoding="utf-8") as stream:
        while len(done) < len(wanted) and not stop():
            wave = range(len(done), min(len(wanted), len(done) + WAVE))
            answers = await asyncio.gather(*(measure.think(engine, wanted[i], config["seed"] + i) for i in wave))
            for i, answer in zip(wave, answers, strict=True):
                said = measure.raw(engine, answer) if answer.finish == "stop" else None
                done.append({"question": wanted[i].question, "text": said})
                stream.write(json.dumps(done[-1]) + "\n")
            stream.flush()
            print(f"{len(done)} of {len(wanted)} traces", flush=True)
    if any(row["question"] != problem.question for row, problem in zip(done, wanted, strict=False)):
        raise SystemExit(f"{file} was made with another configuration: give another --out, or remove it")
    return [data.solution_of(p, r["text"]) for r, p in zip(done, wanted, strict=False) if r["text"] is not None]


def ship(folder: Path) -> Path:
    """Copies the model's folder into the package, with a manifest."""
    into = packaged.MODELS[NAME].folder
    into.mkdir(exist_ok=True)
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, into / file.name)
    packaged.write_manifest(into)
    return into


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="thinker", help="the thinker: its name, or its folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--minutes", type=float, default=9.0, help="of fine-tuning; the rest takes about five")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, help="else the configuration's")
    parser.add_argument("--ship", action="store_true", help="copy it into the package if it passes its gates")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    config["seed"] = config["seed"] if given.seed is None else given.seed
    base = Path(embedded.path(given.model)) if embedded.known(given.model) else Path(given.model)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    given.out.mkdir(parents=True, exist_ok=True)
    cost_file = given.out / "cost.json"
    cost = json.loads(cost_file.read_text(encoding="utf-8")) if cost_file.is_file() else {}

    def timed(what: str, began: float) -> None:
        cost[what] = round(cost.get(what, 0.0) + time.perf_counter() - began, 1)
        cost_file.write_text(json.dumps(cost), encoding="utf-8")

    async def traces() -> list[data.Solution]:
        engine = LocalEngine.load(base, max_batch=measure.BATCH)
        try:
            return await sample(engine, config, given.out / "traces.jsonl", lambda: bool(stopped))
        finally:
            await engine.aclose()

    began = time.perf_counter()
    own = asyncio.run(traces())
    timed("sampling", began)
    if stopped:
        print("stopped while sampling; start it again to go on")
        return 0
    run = Run(config, base, own, given.out, given.minutes)
    chains = run.documents
    print(
        f"{chains.kept} chains of {chains.given} traces kept; {len(chains.own[True])} of them hold an error", flush=True
    )
    if not thinker.train(run, lambda: bool(stopped)):
        print(f"stopped at step {run.step}; start it again to go on")
        return 0
    folder = run.export()
    began = time.perf_counter()
    found = asyncio.run(measure.measure(base, folder, config, problems(config, config["data"]["held_out"], True)))
    timed("measuring", began)
    made = {
        "seed": config["seed"],
        "base": config.get("base", run.config["base"]),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "traces": {"sampled": config["data"]["traces"], "ended": chains.given, "kept": chains.kept,
                   "with_an_error": len(chains.own[True])},
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": {**cost, "training": round(run.seconds, 1)},
        "threads": given.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {run.device}",
        "torch": torch.__version__,
    }  # fmt: skip
    log = [json.loads(line) for line in (given.out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    card.draw(found, log, folder / "curves.png")
    told = {"run": made, **found}
    (given.out / "measured.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(card.card(config, told), encoding="utf-8")
    print(card.table(found))
    print(folder)
    failed = [name for name, gate in found["gates"].items() if not gate["passed"]]
    if given.ship:
        if failed:
            print(f"not shipped: it fails {', '.join(failed)}")
            return 1
        print(ship(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
