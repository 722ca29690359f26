"""What the engine measures on a probe that writes a trial answer: every distribution that the answer was drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

from thrifty.call import Branch
from thrifty.policy import CONTINUE, DecodePolicy, Stop, Verdict


class Trial(DecodePolicy):
    """Rides on a probe: `measure(logits [V])` of each step, and an end where the answer's braces close.

    `depth`: braces that the probe's text has left open. An answer that began no brace ends at a line's end once it has
    said something. `values` has one number for each token said, that which ended the probe included."""

    method = "trial"

    def __init__(self, measure: Callable[[Any], float], depth: int = 0) -> None:
        self.values: list[float] = []
        self.complete = False
        self._measure, self._depth = measure, depth
        self._opened = depth > 0
        self._said = ""

    def fork(self) -> Self:
        return self

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.values.append(self._measure(logits))
        return logits

    def after(self, branch: Branch, token: int) -> Verdict:
        piece: str = branch.codec.decode([token])  # type: ignore[attr-defined]
        for mark in piece:
            self._depth += {"{": 1, "}": -1}.get(mark, 0)
            self._opened = self._opened or mark == "{"
            if mark == "}" and self._depth <= 0:
                self.complete = True
        self._said += piece
        if not self._opened and "\n" in self._said.lstrip():
            return Stop()
        return Stop() if self.complete else CONTINUE


def entropy(logits: Any) -> float:
    """Entropy in nats of softmax(logits [V]), -inf allowed."""
    log = logits.double().log_softmax(-1)
    return float(-(log.exp() * log.masked_fill(log == -math.inf, 0.0)).sum())
