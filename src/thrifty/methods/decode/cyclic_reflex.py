"""CyclicReflex: reflection words are made likelier, then unlikelier, in waves along the thinking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.call import Branch, Call
from thrifty.errors import InvalidInput
from thrifty.method import knob
from thrifty.methods.decode._thinking import ThinkingMethod, ThinkingPolicy, generation
from thrifty.methods.decode._triggers import Triggers, triggers


@dataclass(frozen=True, kw_only=True)
class CyclicReflex(ThinkingMethod):
    """While the model thinks, the logits of its reflection words get `wave(t)`, t being the output tokens so far.

    A cycle of `period` tokens goes from 0 up to +`amplitude`, down to -`amplitude` and back, so its mean is 0: first
    reflection is encouraged, then the model is pushed to commit. `shift` (in periods) moves where the wave begins. Only
    tokens `first` <= t < `last` are touched, and none after thinking has ended. `shape` "constant" is the baseline
    TIP: -`amplitude` throughout that window.

    A word is every token that is this word alone, in any case, with or without a space before it (the released code
    takes one bare form and, where there is none, shifts the unknown token). A word that the vocabulary has only in
    pieces cannot be moved, and the receipt says so."""

    name = "cyclic-reflex"
    paper = "CyclicReflex: Improving Large Reasoning Models via Cyclical Reflection Token Scheduling (arXiv:2506.11077)"
    needs = frozenset({"text", "branch", "logits"})
    identity = {"amplitude": 0.0, "keep": 0, "begin": "model"}

    amplitude: float = knob(5.0, "the wave's height, in nats; 0: no wave", low=0.0, high=100.0)
    period: int = knob(1200, "tokens a cycle", low=1, high=1_000_000, log=True)
    shift: float = knob(0.0, "where in the cycle thinking begins, in periods", low=0.0, high=1.0)
    first: int = knob(0, "output tokens before the wave begins", low=0, high=1_000_000)
    last: int = knob(8192, "output tokens after which it has ended", low=0, high=1_000_000)
    shape: str = knob("triangle", "the wave, or TIP's constant penalty", choices=("triangle", "constant"))
    words: tuple[str, ...] = knob(("wait", "but", "alternatively"), "reflection words")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.words or not all(word.strip() for word in self.words):
            raise InvalidInput(f"{self.name}: knob words = {list(self.words)}: at least one word is needed, none blank")

    def ready(self, call: Call) -> tuple[Call, str | None]:
        if not self.amplitude and not self.keep:
            return call, "amplitude = 0: the logits are left alone"
        return super().ready(call)

    def policy(self, call: Call) -> CyclicReflexPolicy:
        return CyclicReflexPolicy(self)

    def wave(self, t: int) -> float:
        """What the words' logits get at the output token of index t, in nats.

        >>> method = CyclicReflex(amplitude=2.0, period=8)
        >>> [method.wave(t) for t in range(9)]
        [0.0, 1.0, 2.0, 1.0, 0.0, -1.0, -2.0, -1.0, 0.0]
        """
        if not self.first <= t < self.last:
            return 0.0
        if self.shape == "constant":
            return -self.amplitude
        return triangle(t, self.amplitude, self.period, self.shift)


def triangle(t: float, amplitude: float, period: float, shift: float = 0.0) -> float:
    """The triangular wave of the paper: 0 at the beginning of a cycle, +amplitude after a quarter of it, -amplitude
    after three quarters. `shift` in periods.

    >>> triangle(25, 4.0, 100), triangle(0, 4.0, 100, shift=0.5), triangle(75, 4.0, 100)
    (4.0, 0.0, -4.0)
    """
    u = (t / period + shift) % 1.0
    if u <= 0.25:
        return amplitude * 4 * u
    if u <= 0.75:
        return amplitude * (2 - 4 * u)
    return amplitude * (4 * u - 4)


class CyclicReflexPolicy(ThinkingPolicy):
    """Adds the wave to the words' logits and counts what was drawn in its crests and troughs."""

    def __init__(self, method: CyclicReflex) -> None:
        super().__init__(method.opening, method.closing, method.keep)
        self.knobs = method
        self._triggers: Triggers | None = None
        self._added = 0.0
        self._counts = {"moved": 0, "up": 0, "up_words": 0, "down": 0, "down_words": 0, "words": 0}

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.follow(branch)
        if self._triggers is None:
            self._triggers = triggers(generation(branch).codec, self.knobs.words)
        self._added = 0.0
        ids = self._triggers.ids
        if self._inside and ids:
            self._added = self.knobs.wave(len(branch.tokens))
            if self._added:
                logits[ids] += self._added
        return logits

    def after(self, branch: Branch, token: int) -> Any:
        drawn = self._triggers is not None and token in self._triggers.ids
        counts = self._counts
        if self._inside:  # as of the token before: where this one was drawn
            counts["words"] += drawn
        if self._added:
            side = "up" if self._added > 0 else "down"
            counts["moved"] += 1
            counts[side] += 1
            counts[f"{side}_words"] += drawn
        return super().after(branch, token)

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        counts = self._counts
        found = self._triggers
        detail: dict[str, Any] = dict(counts)
        if found is not None:
            detail |= {"tokens": len(found.ids), "missing": found.missing}
        if found is not None and not found.ids:
            return False, found.describe(), detail
        if not self.blocks:
            return False, "the model did not think", detail
        if not counts["moved"]:
            return False, "the wave was 0 throughout", detail
        reason = f"reflection words were moved at {counts['moved']} tokens of thinking"
        if found is not None and found.missing:
            reason += f"; {found.describe()}"
        return True, reason, detail
