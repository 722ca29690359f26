"""What Budget Guidance asks: how many thinking tokens are left if this token comes next? A Gamma of their logarithm.

A small network reads the model's hidden states where a step of thinking begins. For each token that was often seen
there, and once for all others, it gives the shape and the mean of a Gamma distribution of ln(max(left, 2)); `left`
counts the token itself and the closing tag. The file is safetensors: weights, mean and scale of the features, and as
metadata what it was trained on; nothing in it is executed.

Invariants: log-probabilities are finite, at most 0, and do not fall as the budget grows; a predictor acts on the model
that it was trained on, and no other."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thrifty.engines.local import packaged
from thrifty.errors import InvalidInput, PlanError, ThriftyError
from thrifty.methods.decode._gamma import log_gamma_cdf
from thrifty.methods.decode._thinking import step_pattern

FILE = "budget_guidance.safetensors"
"""Its name in a packaged model's own folder."""
LEAST = 2
"""Tokens that are left at least, as the Gamma sees it: ln 1 = 0 would have no probability at all."""
MOST_BYTES = 512_000_000
_FORMAT = "thrifty-length-predictor-1"
_POINTS = 64
_SHAPES = (-2.0, 8.0)
_MEANS = (-1.2, 3.0)
"""Bounds of ln a and of ln mean: means from 0.3 to 20, so lengths up to e^20."""
_TENSORS = ("mean", "scale", "into", "into_bias", "out", "out_bias", "tokens")


@dataclass(frozen=True)
class Config:
    """What a predictor was trained on. `layers` are indices into hidden states [layers + 1, width]; `fingerprint` are
    some of the model's weights, rounded as bf16 may round them (none: the model's sizes alone are compared)."""

    model: str
    width: int
    states: int
    """layers + 1"""
    layers: tuple[int, ...]
    vocab: int
    boundary: str
    """what ends a step, as in `_thinking.BOUNDARIES`"""
    hidden: int
    traces: int = 0
    fingerprint: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        step_pattern(self.boundary)
        good = all(0 <= i < self.states for i in self.layers) and self.layers
        if not good or min(self.width, self.vocab, self.hidden) < 1:
            raise InvalidInput(f"layers {list(self.layers)} of {self.states}, width {self.width}: they do not fit")


class LengthPredictor:
    """A trained network. Make it with `fit` or `load`."""

    def __init__(self, config: Config, tensors: dict[str, Any], digest: str = "") -> None:
        import torch

        self.config, self.digest = config, digest
        self.tensors = {name: tensors[name].detach().contiguous() for name in _TENSORS}
        f, h, k = config.width * len(config.layers), config.hidden, len(self.tensors["tokens"])
        wanted = {"mean": (f,), "scale": (f,), "into": (h, f), "into_bias": (h,)}
        wanted |= {"out": (2 * (k + 1), h), "out_bias": (2 * (k + 1),), "tokens": (k,)}
        for name, shape in wanted.items():
            if tuple(self.tensors[name].shape) != shape:
                raise InvalidInput(f"{name} is {list(self.tensors[name].shape)} and {list(shape)} is needed")
        tokens = self.tensors["tokens"].long()
        if k and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab:
            raise InvalidInput(f"a token outside of the vocabulary of {config.vocab}")
        self.rows = torch.full((config.vocab,), k, dtype=torch.long)
        """[V], of each token its row; the last is for all that have none of their own"""
        self.rows[tokens] = torch.arange(k)

    def features(self, hidden: Any) -> Any:
        """What it reads of hidden states [layers + 1, D]: [F], float32, on the processor. Raises InvalidInput when
        they are another model's."""
        if tuple(hidden.shape) != (self.config.states, self.config.width):
            raise InvalidInput(
                f"the predictor was trained on hidden states {[self.config.states, self.config.width]} of model "
                f"{self.config.model}, and these are {list(hidden.shape)}: train one on this model's traces"
            )
        return features_of(hidden, self.config.layers)

    def gammas(self, features: Any) -> tuple[Any, Any]:
        """Shape and mean, each [..., K + 1], float64, for features [..., F]."""
        return gammas_of(self.tensors, features)

    def log_factor(self, hidden: Any, left: float) -> Any:
        """ln P(no more than `left` tokens of thinking are left, the next one and the closing tag included) for each
        next token, [V] float64; `left` is at least 2, and math.inf gives exactly 0."""
        import torch

        if math.isinf(left):
            return torch.zeros(self.config.vocab, dtype=torch.float64)
        with torch.no_grad():
            shape, mean = self.gammas(self.features(hidden))
            y = math.log(max(left, LEAST))
            return log_gamma_cdf(shape, shape * (y / mean))[self.rows]

    def expected(self, hidden: Any, chances: Any) -> float:
        """How many tokens are left, by the mean of their logarithm, for next tokens of these chances [V]."""
        import torch

        with torch.no_grad():
            _, mean = self.gammas(self.features(hidden))
            return math.exp(float((chances.double().cpu() * mean[self.rows]).sum()))

    def save(self, path: str | Path) -> str:
        """Writes the file, whole or not at all, and gives the first digits of its SHA-256. Raises ThriftyError."""
        from safetensors.torch import save

        told = json.dumps({"format": _FORMAT, **asdict(self.config)}, sort_keys=True)
        body, target = save(self.tensors, metadata={"length_predictor": told}), Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_bytes(body)
            os.replace(partial, target)
        except OSError as error:
            raise ThriftyError(f"{target}: cannot be written: {error.strerror or error}") from error
        return hashlib.sha256(body).hexdigest()[:16]


def features_of(hidden: Any, layers: Sequence[int]) -> Any:
    """The chosen layers of hidden states [layers + 1, D], side by side: [F], float32, on the processor."""
    return hidden[list(layers)].detach().float().cpu().flatten()


# -- the file --------------------------------------------------------------------------------------------------


def find(who: str, predictor: str, model: str) -> Path:
    """The file that a knob names: a path, or the name of a packaged model whose folder holds one; empty: the answering
    model's. Raises PlanError where there is none."""
    name = predictor or model
    if name in packaged.MODELS:
        file = packaged.MODELS[name].folder / FILE
        where = f"no {FILE} ships with model {name}"
    else:
        file = Path(name if predictor else FILE)
        where = f"{name}: there is no such file" if predictor else f"no predictor ships with model {model or '(any)'}"
    if not (predictor or name in packaged.MODELS) or not file.is_file():
        raise PlanError(
            f"{who}: knob predictor = {predictor!r}: {where}: train one with `python recipes/budget_guidance/train.py "
            f"--model {model or 'MODEL'} --out FILE` and name that file"
        )
    return file


def load(who: str, path: str | Path, sha256: str = "") -> LengthPredictor:
    """Reads what `save` wrote, once for each state of the file. Raises InvalidInput for anything else, or another
    SHA-256 than the one given."""
    file = Path(path)
    try:
        stat = file.stat()
        if stat.st_size > MOST_BYTES:
            raise InvalidInput(f"{who}: {file}: over {MOST_BYTES:,} bytes: it is no length predictor")
        found = _read(who, str(file.resolve()), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise InvalidInput(f"{who}: {file}: cannot be read: {error.strerror or error}") from error
    if not found.digest.startswith(sha256.strip().lower()[:16]):
        raise InvalidInput(
            f"{who}: {file}: its SHA-256 begins {found.digest}, and knob sha256 says {sha256!r}: give the file that "
            "the plan was made with, or correct the knob"
        )
    return found


@functools.lru_cache(maxsize=4)
def _read(who: str, path: str, changed: int, size: int) -> LengthPredictor:
    from safetensors import SafetensorError, safe_open

    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("length_predictor", "null"))
            if not isinstance(told, dict) or told.pop("format", None) != _FORMAT:
                raise InvalidInput("it is no length predictor")
            lists = {name: tuple(told[name]) for name in ("layers", "fingerprint")}
            return LengthPredictor(Config(**{**told, **lists}), {n: file.get_tensor(n) for n in _TENSORS}, digest)
    except (InvalidInput, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"{who}: {path}: {str(error).splitlines()[0]}: give a file that recipes/budget_guidance/train.py wrote"
        ) from error


# -- whose model -----------------------------------------------------------------------------------------------


_known: weakref.WeakKeyDictionary[Any, tuple[float, ...]] = weakref.WeakKeyDictionary()


def fingerprint(model: Any) -> tuple[float, ...]:
    """Some weights of a torch module, spread over its matrices."""
    if model not in _known:
        weights = [p for _, p in sorted(model.named_parameters()) if p.dim() > 1]
        picked = [weights[i * len(weights) // _POINTS] for i in range(_POINTS)] if weights else []
        values = (float(w.detach().flatten()[(7919 * (i + 1)) % w.numel()]) for i, w in enumerate(picked))
        _known[model] = tuple(float(f"{v:.6g}") for v in values)
    return _known[model]


def check_model(who: str, predictor: LengthPredictor, engine: Any) -> None:
    """Raises PlanError when a predictor was trained on another model than the one that this engine runs. An engine that
    does not show its model is left to the sizes of its hidden states."""
    runner = getattr(engine, "runner", None)
    if runner is None:
        return
    config, theirs = predictor.config, runner.config
    same = (config.width, config.states, config.vocab) == (theirs.hidden_size, runner.layers + 1, runner.vocab)
    if same and config.fingerprint:
        here = fingerprint(runner.model)
        size = math.sqrt(sum(v * v for v in here) / max(1, len(here)))
        same = len(here) == len(config.fingerprint) and all(
            abs(a - b) <= 0.01 * abs(a) + 1e-3 * size for a, b in zip(here, config.fingerprint, strict=True)
        )
    if not same:
        raise PlanError(
            f"{who}: the predictor was trained on model {config.model} ({config.states - 1} layers of {config.width}, "
            f"{config.vocab} tokens) and the plan runs {engine.model}, which is another, or has other weights: train "
            f"one with `python recipes/budget_guidance/train.py --model {engine.model} --out FILE`"
        )


# -- the network ---------------------------------------------------------------------------------------------------


def gammas_of(tensors: dict[str, Any], features: Any) -> tuple[Any, Any]:
    import torch

    x = (features - tensors["mean"]) / tensors["scale"]
    inner = torch.nn.functional.silu(x @ tensors["into"].T + tensors["into_bias"])
    logs = (inner @ tensors["out"].T + tensors["out_bias"]).double()
    shape, mean = logs.chunk(2, dim=-1)
    return shape.clamp(*_SHAPES).exp(), mean.clamp(*_MEANS).exp()
