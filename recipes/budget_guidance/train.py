"""Trains the length predictor of the method budget-guidance for one model, on what that model thinks.

    python recipes/budget_guidance/train.py --model thinker --out budget_guidance.safetensors

Runs the frozen model on new problems of the lab, with whole thinking traces; reads its hidden states wherever a step of
thinking begins; trains; and compares the predictor with a Gamma that is the same everywhere, on traces held out whole.
Prints negative log-likelihoods and a calibration table. Writes no file, and ends with status 1, unless it is better.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty import Account, Call, Sampling
from thrifty.errors import InvalidInput, ThriftyError
from thrifty.lab.suite import lab_tasks
from thrifty.lab.tasks import DIFFICULTIES
from thrifty.methods.decode._gamma import fit_gamma
from thrifty.methods.decode._length_fit import Reads, fit, measure
from thrifty.methods.decode._length_predictor import Config, LengthPredictor, fingerprint
from thrifty.methods.decode.budget_guidance import RecordingPolicy, Trace
from thrifty.thinking import CLOSING, OPENING

BATCH = 128
"""Traces in one wave: opened one by one and stepped together, so that the batches are the same in every run."""
SEED = 9_000_000
"""Added to --seed, so that no problem is one of training's or of the gates'."""
TENTHS = tuple(i / 10 for i in range(1, 10))


@dataclass(frozen=True)
class Split:
    """Places where a step began, of traces for training, for stopping in time, and held out. `owner`: of each held-out
    place its trace."""

    train: Reads
    stop: Reads
    held: Reads
    owner: Any


async def collect(engine: Any, given: argparse.Namespace, layers: tuple[int, ...]) -> list[Trace]:
    """Traces of the model's own thinking, until there are enough or time is up."""
    tasks = lab_tasks(given.traces, SEED + given.seed, difficulties=tuple(DIFFICULTIES))
    traces: list[Trace] = []
    began = time.monotonic()
    for first in range(0, len(tasks), BATCH):
        wave = [Trace() for _ in tasks[first : first + BATCH]]
        rows = []
        for i, trace in enumerate(wave):
            policy = RecordingPolicy(trace, layers, given.boundary, OPENING, CLOSING)
            sampling = Sampling(temperature=given.temperature, seed=given.seed + first + i, max_tokens=given.longest)
            call = Call(tasks[first + i].messages, Account("traces"), sampling=sampling, policies=(policy,))
            rows.append(await engine.open(call))
        await engine.advance(rows, given.longest)
        for row in rows:
            row.close()
        traces += wave
        took = time.monotonic() - began
        print(f"{len(traces)} traces, {took:.0f} s", end="\r", file=sys.stderr, flush=True)
        if took > 60 * given.minutes:
            break
    print(file=sys.stderr)
    return traces


def split(traces: list[Trace], tag: int | None) -> Split:
    """Every fifth trace is held out, and every tenth of the others stops the training. Traces that the model did not
    close are left out, and so is the place at which it wrote the closing tag: nothing is left after that."""
    parts: dict[str, list[tuple[Any, int, int, int]]] = {"train": [], "stop": [], "held": []}
    for number, trace in enumerate(t for t in traces if t.length is not None):
        name = "held" if number % 5 == 4 else "stop" if number % 10 == 3 else "train"
        for state, at, token in zip(trace.states, trace.at, trace.tokens, strict=True):
            left = (trace.length or 0) - at
            if token != tag and left > 0:
                parts[name].append((state, token, left, number))
    if not all(parts.values()):
        raise InvalidInput("too few traces with a closed thinking block: give more --traces, or a model that thinks")
    import torch

    def reads(rows: list[tuple[Any, int, int, int]]) -> Reads:
        return Reads(torch.stack([r[0] for r in rows]), [r[1] for r in rows], [r[2] for r in rows])

    owner = torch.tensor([r[3] for r in parts["held"]])
    return Split(reads(parts["train"]), reads(parts["stop"]), reads(parts["held"]), owner)


def by_token(train: Reads, held: Reads, least: int = 20) -> Any:
    """Negative log-likelihood [N] of one Gamma a token, whatever the hidden states are."""
    import torch

    everywhere = constant(train)
    known = {}
    for token in train.tokens.unique().tolist():
        part = train.logs[train.tokens == token]
        if len(part) >= least and float(part.max() - part.min()) > 1e-6:
            known[token] = fit_gamma(part)
    return torch.stack(
        [density(*known.get(int(t), everywhere), y) for t, y in zip(held.tokens, held.logs, strict=True)]
    )


def constant(train: Reads) -> tuple[float, float]:
    """Shape and rate of the one Gamma that fits all places best."""
    return fit_gamma(train.logs)


def density(a: float, b: float, y: Any) -> Any:
    """-ln of the Gamma density at y."""
    return -(a * math.log(b) - math.lgamma(a) + (a - 1) * y.log() - b * y)


def gain(better: Any, worse: Any, owner: Any) -> tuple[float, float]:
    """Mean of worse - better, and its standard error over traces: places of one trace are not independent."""
    import torch

    gaps = torch.stack([(worse - better)[owner == t].sum() for t in owner.unique()])
    sizes = torch.stack([(owner == t).sum() for t in owner.unique()]).double()
    mean = float(gaps.sum() / sizes.sum())
    rest = gaps - mean * sizes
    n = len(gaps)
    return mean, float(rest.pow(2).sum().sqrt() / sizes.sum()) * math.sqrt(n / max(1, n - 1))


def report(predictor: LengthPredictor, parts: Split) -> bool:
    """Prints how well it does on what was held out; True when it is better than a constant Gamma."""
    nll, chances = measure(predictor, parts.held)
    a, b = constant(parts.train)
    flat, tokens = density(a, b, parts.held.logs), by_token(parts.train, parts.held)
    print(f"\nheld out: {len(nll)} starts of steps of {len(parts.owner.unique())} traces")
    print("nats a place, of ln(tokens left)        lower is better")
    print(f"  one Gamma for all                     {float(flat.mean()):.4f}   (shape {a:.2f}, rate {b:.2f})")
    print(f"  one Gamma for each token              {float(tokens.mean()):.4f}")
    print(f"  the predictor                         {float(nll.mean()):.4f}")
    for name, other in (("all", flat), ("each token", tokens)):
        mean, error = gain(nll, other, parts.owner)
        print(f"  better than one for {name:<18} {mean:+.4f} +- {1.96 * error:.4f} (95%, over traces)")
    print("\ncalibration: of the places, the share whose true length is within the predicted quantile")
    print("  predicted  " + "  ".join(f"{q:.1f}" + " " for q in TENTHS))
    shares = [float((chances <= q).double().mean()) for q in TENTHS]
    print("  observed   " + "  ".join(f"{s:.2f}" for s in shares))
    print(f"  furthest apart: {max(abs(s - q) for s, q in zip(shares, TENTHS, strict=True)):.3f}")
    mean, error = gain(nll, flat, parts.owner)
    return mean - 1.96 * error > 0


async def run(given: argparse.Namespace) -> int:
    from thrifty.engines.local.engine import LocalEngine

    began = time.monotonic()
    engine = LocalEngine.load(given.model, max_batch=BATCH, dtype=given.dtype)
    states = engine.runner.layers + 1
    layers = tuple(range(states)) if given.layers == "all" else (states - 1,)
    try:
        traces = await collect(engine, given, layers)
    finally:
        await engine.aclose()
    tag = engine.codec.encode(CLOSING)
    parts = split(traces, tag[0] if len(tag) == 1 else None)
    closed = [t.length for t in traces if t.length is not None]
    print(f"model {engine.model} ({engine.dtype}), seed {given.seed}, steps end with: {given.boundary}")
    print(
        f"{len(traces)} traces in {time.monotonic() - began:.0f} s, {len(closed)} closed by the model, "
        f"{sum(closed) / len(closed):.0f} thinking tokens on average; {len(parts.train.left)} places to learn from"
    )
    config = Config(
        model=engine.model,
        width=int(engine.runner.config.hidden_size),
        states=states,
        layers=layers,
        vocab=engine.runner.vocab,
        boundary=given.boundary,
        hidden=given.hidden,
        traces=len(closed),
        fingerprint=fingerprint(engine.runner.model),
    )
    predictor = fit(parts.train, parts.stop, config, seed=given.seed)
    own = len(predictor.tensors["tokens"])
    print(f"{own} tokens have a Gamma of their own; {time.monotonic() - began:.0f} s so far")
    if not report(predictor, parts):
        print("\nnot better than one Gamma for all by more than chance: nothing was written; give more --traces")
        return 1
    given.out.parent.mkdir(parents=True, exist_ok=True)
    digest = predictor.save(given.out)
    size = given.out.stat().st_size
    print(f"\nwrote {given.out}, {size:,} bytes, SHA-256 {digest}..., in {time.monotonic() - began:.0f} s")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a packaged model's name, a folder, or a hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--traces", type=int, default=1600)
    parser.add_argument("--minutes", type=float, default=7.0, help="no new wave of traces is begun after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--boundary", default="line", help="what ends a step: line, paragraph, sentence, token, ...")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--longest", type=int, default=640, help="output tokens of a trace at most")
    parser.add_argument("--layers", choices=("all", "last"), default="all", help="hidden states that are read")
    parser.add_argument("--hidden", type=int, default=64, help="units of the predictor")
    parser.add_argument("--dtype", default="auto", help="of the model, as plans will run it")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    try:
        return asyncio.run(run(given))
    except ThriftyError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
