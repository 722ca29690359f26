"""Adaptive-k: keep the passages before the steepest drop in similarity, however many they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thrifty.call import Call
from thrifty.errors import InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.context._passages import keep_best

STRATEGIES = ("largest_gap", "moving_avg", "2diff_spike")


@dataclass(frozen=True, kw_only=True)
class AdaptiveK(Rewrite):
    """Ranks passages by cosine similarity to the query and keeps those before the largest gap, and a buffer.

    No threshold is tuned and no model is asked: one embedding request, then one sort. `choose` is the whole
    method and says what each knob does. Passages are the call's context, or the paragraphs of a user message
    over `over` tokens, whose last paragraph is the query and always stays; those keep the message's order
    whatever `order` says.

    The tail of the ranking is not searched by default (`ignore_tail` 0.1): the largest drop of all is often
    at its very end. When the buffer alone covers every passage nothing is embedded."""

    name = "adaptive-k"
    paper = (
        "Efficient Context Selection for Long-Context QA: No Tuning, No Iteration, Just Adaptive-k "
        "(Taguchi, Maekawa and Bhutani 2025)"
    )
    roles = {"embedder": frozenset({"embed"})}
    identity = {"buffer": 1_000_000}

    strategy: str = knob("largest_gap", "how the cut is found", choices=STRATEGIES)
    buffer: int = knob(5, "passages kept beyond the cut", low=0, high=1_000_000)
    buffer_factor: float = knob(0.0, "multiplies the cut in the place of `buffer`; 0: not used", low=0.0, high=1000.0)
    ignore_extreme: float = knob(0.0, "share of the gaps not searched at the top", low=0.0, high=0.99)
    ignore_tail: float = knob(0.1, "share of the gaps not searched at the end", low=0.0, high=0.99)
    window: int = knob(3, "scores averaged by moving_avg", low=1, high=1000)
    order: str = knob("document", "order of the kept passages", choices=("document", "rank"))
    over: int = knob(512, "cut a user message into paragraphs when it has more tokens", low=1, high=10_000_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore_extreme + self.ignore_tail >= 1:
            raise InvalidInput(
                f"adaptive-k: ignore_extreme = {self.ignore_extreme:g}, ignore_tail = {self.ignore_tail:g} "
                "leave nothing to search: a sum below 1 is needed"
            )

    async def rewrite(self, call: Call) -> Call:
        return await keep_best(
            call,
            self.name,
            over=self.over,
            order=self.order,
            covered=self._covered,
            how_many=lambda scores: choose(
                scores,
                strategy=self.strategy,
                buffer=self.buffer,
                buffer_factor=self.buffer_factor,
                ignore_extreme=self.ignore_extreme,
                ignore_tail=self.ignore_tail,
                window=self.window,
            ),
        )

    def _covered(self, n: int) -> str | None:
        buffered = not self.buffer_factor and self.buffer + 1 >= n
        return f"the buffer of {self.buffer} covers all {n} passages" if buffered else None


def choose(
    scores: Sequence[float],
    *,
    strategy: str = "largest_gap",
    buffer: int = 5,
    buffer_factor: float = 0.0,
    ignore_extreme: float = 0.0,
    ignore_tail: float = 0.1,
    window: int = 3,
) -> int:
    """How many of n passages to keep, 1 to n, from their scores [n] in falling order (0 for none).

    Gap t lies between passages t and t + 1 (from 0), so `cut` t keeps t + 1 passages, and `buffer` more. A
    `buffer_factor` above 0 multiplies instead: int(t * factor) + 1, as the released code does. Raises
    InvalidInput for scores that rise or are not finite, and for an unknown strategy.

    >>> choose([0.9, 0.88, 0.87, 0.3, 0.29, 0.28, 0.27], buffer=0)
    3
    """
    n = len(scores)
    if n < 2:
        return n
    t = cut(scores, strategy=strategy, ignore_extreme=ignore_extreme, ignore_tail=ignore_tail, window=window)
    k = int(t * buffer_factor) + 1 if buffer_factor > 0 else t + 1 + buffer
    return min(max(k, 1), n)


def cut(
    scores: Sequence[float],
    *,
    strategy: str = "largest_gap",
    ignore_extreme: float = 0.0,
    ignore_tail: float = 0.1,
    window: int = 3,
) -> int:
    """The index t of the gap to cut at, 0 to n - 2, for n >= 2 falling scores.

    Of the n - 1 gaps g_t = s_{t+1} - s_t (none above 0) the first int((n-1) * ignore_extreme) and the last
    int((n-1) * ignore_tail) are not searched.

    - largest_gap: the steepest gap, the first of equals.
    - moving_avg: averages `window` neighbouring scores before differencing, so each smoothed gap spans
      `window` gaps; of those under the steepest smoothed gap, the steepest counts. (The released code returns
      the smoothed index as it is, which is too early by up to window - 1.)
    - 2diff_spike: the first gap after which the second difference turns positive having been negative, so the
      first local steepest gap; largest_gap where there is none."""
    if strategy not in STRATEGIES:
        raise InvalidInput(f"strategy {strategy!r}: one of {', '.join(STRATEGIES)} is needed")
    if not all(math.isfinite(s) for s in scores) or any(b > a for a, b in zip(scores, scores[1:], strict=False)):
        raise InvalidInput("scores must be finite numbers in falling order: sort them first")
    gaps = [b - a for a, b in zip(scores, scores[1:], strict=False)]
    start = int(len(gaps) * ignore_extreme)
    stop = len(gaps) - int(len(gaps) * ignore_tail)
    if start >= stop:
        raise InvalidInput(f"ignore_extreme {ignore_extreme:g} and ignore_tail {ignore_tail:g} leave no gap to search")
    if strategy == "moving_avg":
        w = min(window, stop - start)
        at = _steepest([scores[j + w] - scores[j] for j in range(start, stop - w + 1)], 0, stop - start - w + 1)
        return _steepest(gaps, start + at, start + at + w)
    if strategy == "2diff_spike":
        was_negative = False
        for t in range(start + 1, stop):
            second = gaps[t] - gaps[t - 1]
            if second > 0 and was_negative:
                return t - 1
            was_negative = was_negative or second < 0
    return _steepest(gaps, start, stop)


def _steepest(gaps: Sequence[float], start: int, stop: int) -> int:
    return min(range(start, stop), key=lambda t: (gaps[t], t))
