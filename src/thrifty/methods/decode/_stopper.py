"""The LSTM that learns when to stop thinking (Liu and Wang 2025, section 4.3): labels, training, use, and its file.

A trace is a sequence of hidden states, one at the end of each step, and the answers that a probe gave there. Its labels
are 1 where the answer is already the converged one. The file is safetensors: weights, mean and scale of the features,
and the sizes as metadata; nothing in it is executed."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thrifty.errors import InvalidInput

_FORMAT = "thrifty-stopper-1"


def labels(answers: Sequence[str]) -> list[int]:
    """1 for every step whose answer equals the last one's, which the trace converged to; 0 where it is empty.

    >>> labels(["3", "4", "", "4"])
    [0, 1, 0, 1]
    """
    return [int(bool(a) and a == answers[-1]) for a in answers]


class Stopper:
    """A trained LSTM; `step` takes the hidden state [D] of one step after the other. Make it with `fit` or `load`."""

    def __init__(self, size: int, hidden: int, tensors: dict[str, Any]) -> None:
        from torch import nn

        self.size, self.hidden = size, hidden
        self.mean, self.scale = tensors["mean"], tensors["scale"]
        self.lstm, self.out = nn.LSTM(size, hidden, batch_first=True), nn.Linear(hidden, 1)
        modules: tuple[tuple[str, nn.Module], ...] = (("lstm", self.lstm), ("out", self.out))
        for name, module in modules:
            start = f"{name}."
            module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            module.requires_grad_(False)

    def step(self, features: Any, state: Any = None) -> tuple[float, Any]:
        """P(stop) after one step more, and the state to go on with. `features` [D] of any float type."""
        import torch

        if features.shape != (self.size,):
            raise InvalidInput(
                f"the stopper reads hidden states of {self.size} numbers and the model has {list(features.shape)}: "
                "train one on this model's traces"
            )
        row = ((features.detach().float().cpu() - self.mean) / self.scale).view(1, 1, -1)
        with torch.no_grad():
            seen, state = self.lstm(row, state)
            return float(self.out(seen)[0, 0].sigmoid()), state

    def save(self, path: str | Path) -> None:
        """Writes the file."""
        from safetensors.torch import save_file

        tensors = {"mean": self.mean, "scale": self.scale}
        tensors |= {f"lstm.{k}": v for k, v in self.lstm.state_dict().items()}
        tensors |= {f"out.{k}": v for k, v in self.out.state_dict().items()}
        sizes = json.dumps({"format": _FORMAT, "size": self.size, "hidden": self.hidden})
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), metadata={"stopper": sizes})

    @classmethod
    def load(cls, path: str | Path) -> Stopper:
        """Reads what `save` wrote. Raises InvalidInput for anything else."""
        if not str(path):
            raise InvalidInput(
                "answer-convergence: strategy 'learned' needs the knob stopper: the file of a trained LSTM"
            )
        file = Path(path)
        try:
            return _read(str(file.resolve()), file.stat().st_mtime_ns)
        except OSError as error:
            raise InvalidInput(f"stopper {file}: cannot be read: {error.strerror or error}") from error


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Stopper:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("stopper", "null"))
            if not isinstance(told, dict) or told.get("format") != _FORMAT:
                raise InvalidInput(f"stopper {path}: it is no stopper's file: train one with fit and save it")
            return Stopper(int(told["size"]), int(told["hidden"]), {k: file.get_tensor(k) for k in list(file.keys())})
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"stopper {path}: it is damaged, or no stopper's file: {error}") from error


def fit(
    traces: Sequence[tuple[Any, Sequence[int]]],
    *,
    hidden: int = 32,
    epochs: int = 40,
    rate: float = 0.01,
    seed: int = 0,
) -> Stopper:
    """Trains on traces (hidden states [N, D], labels [N]) with Adam and binary cross-entropy, classes weighted evenly.

    Raises InvalidInput when there is nothing to learn from: no traces, states of different sizes, or one class only.
    """
    import torch
    from torch import nn

    if not traces or any(len(x) != len(y) or not len(y) for x, y in traces):
        raise InvalidInput("fit needs traces with one label for each step, and at least one step")
    states = [torch.as_tensor(x).float() for x, _ in traces]
    marks = [torch.tensor(y, dtype=torch.float32) for _, y in traces]
    if len({s.shape[1] for s in states}) > 1:
        raise InvalidInput("fit needs hidden states of one size: do not mix models")
    everything, all_marks = torch.cat(states), torch.cat(marks)
    ones = int(all_marks.sum())
    if ones in (0, len(all_marks)):
        raise InvalidInput(f"all {len(all_marks)} labels are {int(ones > 0)}: steps of both kinds are needed")
    mean, scale = everything.mean(0), everything.std(0).clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lstm, out = nn.LSTM(everything.shape[1], hidden, batch_first=True), nn.Linear(hidden, 1)
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor((len(all_marks) - ones) / ones))
    both = nn.ModuleList([lstm, out])
    steps = torch.optim.Adam(both.parameters(), lr=rate)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for i in torch.randperm(len(states), generator=order).tolist():
            steps.zero_grad()
            seen, _ = lstm(((states[i] - mean) / scale)[None])
            loss(out(seen)[0, :, 0], marks[i]).backward()
            steps.step()
    tensors = {"mean": mean, "scale": scale}
    tensors |= {f"lstm.{k}": v.detach() for k, v in lstm.state_dict().items()}
    tensors |= {f"out.{k}": v.detach() for k, v in out.state_dict().items()}
    return Stopper(everything.shape[1], hidden, tensors)
