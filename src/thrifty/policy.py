"""White-box policies: what a method attaches to a call so that the engine applies it to every branch of that call.

This module is typing only and imports no torch; `Tensor` stands for `torch.Tensor`. Policies are per call. A branch
gets its own copy by `fork`, so state never leaks from one branch to another. `B` is 1 for one branch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeAlias

if TYPE_CHECKING:
    from thrifty.call import Branch, Receipt

Tensor: TypeAlias = Any
Part = Literal["scores", "counts", "store", "attention", "vision", "decode", "route"]
"""What a policy decides. A plan with two of `scores`, `store` or `route` is refused unless one declares `combines`."""


class Policy:
    """Base of all policies. `method` is the name that receipts carry; `version` changes when the numbers would."""

    method: str = ""
    version: ClassVar[int] = 1

    def fork(self) -> Self:
        """A copy for a forked branch. The default copies the object and its direct containers."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict, set)):
                setattr(twin, name, copy.copy(value))
        return twin

    def receipt(self, branch: Branch) -> Receipt | None:
        """What it did to this branch; asked once, when the branch ends."""
        return None

    def key(self) -> str:
        """Identifies its effect in the key of the generation cache."""
        settings = {k: v for k, v in sorted(vars(self).items()) if not k.startswith("_")}
        return f"{type(self).__module__}.{type(self).__qualname__}:{self.version}:{settings!r}"


# -- decode ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Continue:
    """Go on; the weakest verdict."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the branch with finish reason `reason`; the strongest verdict."""

    reason: str = "stop"


@dataclass(frozen=True, slots=True)
class Force:
    """Append `text` as output tokens before sampling goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Feed:
    """Feed a mixture of embeddings instead of the token: `weights` [V] over the vocabulary, summing to 1."""

    weights: Tensor


@dataclass(frozen=True, slots=True)
class Probe:
    """Fork, append `text`, generate at most `max_tokens`, and hand the text to `then`, whose verdict counts.

    `watch` rides on the fork, as its only decode policy and uncopied: it sees the probe's logits and tokens, and its
    Stop ends the probe."""

    text: str
    max_tokens: int
    then: Callable[[str], Verdict]
    watch: DecodePolicy | None = None


Verdict: TypeAlias = Continue | Stop | Force | Feed | Probe
CONTINUE = Continue()
STRENGTH: Mapping[type, int] = {Stop: 4, Force: 3, Probe: 2, Feed: 1, Continue: 0}
"""The strongest verdict of a step wins: Stop > Force > Probe > Feed > Continue."""


class DecodePolicy(Policy):
    """Sees each step of a branch. `logits` run in plan order; of the verdicts of `after` the strongest wins."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """`{"hidden"}` gives `branch.hidden`, [layers + 1, D], the states of the last position."""

    def logits(self, branch: Branch, logits: Tensor) -> Tensor:
        """The logits [V] to sample from. May change them in place."""
        return logits

    def after(self, branch: Branch, token: int) -> Verdict:
        """Called with the token just sampled, which is already in `branch.tokens`."""
        return CONTINUE


# -- cache -----------------------------------------------------------------------------------------------------


class LayerView(Protocol):
    """One layer of one branch's cache, as a cache policy sees it."""

    @property
    def keys(self) -> Tensor:
        """[B, H_kv, T, D], after RoPE."""

    @property
    def values(self) -> Tensor:
        """[B, H_kv, T, D]."""

    @property
    def positions(self) -> Tensor:
        """[B, T], logical positions of the entries."""

    @property
    def mask(self) -> Tensor:
        """[B, T], False where an entry is padding."""

    @property
    def layer(self) -> int:
        """Index of the layer."""

    @property
    def layers(self) -> int:
        """How many layers the model has."""

    @property
    def state(self) -> dict[str, Any]:
        """This layer's, kept between calls."""

    @property
    def prefilling(self) -> bool:
        """Whether a prompt has just been computed; False in decode."""

    def queries(self, rows: int) -> Tensor:
        """The last `rows` queries [B, H_q, R, D] after RoPE; fewer when fewer are known."""

    def rerotate(self, positions: Tensor) -> Tensor:
        """The keys as they would be at `positions` [B, T]."""


class CachePolicy(Policy):
    """Which entries stay, how many a layer keeps, how they are stored. A policy fills the parts it declares."""

    parts: ClassVar[frozenset[Part]] = frozenset({"scores"})
    when: Literal["after_prefill", "online"] = "after_prefill"
    """`online` also asks after every `every` decode steps"""
    every: int = 1
    positions: Literal["keep", "renumber"] = "keep"
    window: int = 0
    """how many of the last queries `scores` will ask its view for"""

    def scores(self, view: LayerView) -> Tensor:
        """[B, H_kv, T]; higher is kept, ties go to the lower index."""
        raise NotImplementedError(f"{type(self).__name__} declares no scores")

    def pattern(self, view: LayerView) -> Tensor | None:
        """Kept indices [K], ascending, where they follow from positions alone; None means: ask `scores`."""
        return None

    def counts(self, total: int, layers: int, stats: Mapping[str, Any]) -> Sequence[int] | None:
        """Entries each layer keeps of `total`; None leaves it to another policy."""
        return None


# -- attention -------------------------------------------------------------------------------------------------


class AttentionPolicy(Policy):
    """Changes what a layer's attention reads, without changing what is stored."""

    def skip(self, layer: int, layers: int) -> bool:
        """True: this layer's attention adds nothing for this branch."""
        return False

    def read(self, view: LayerView) -> Tensor | None:
        """Indices [K] of the entries to read at this decode step; None reads all."""
        return None


# -- vision ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VisualView:
    """The visual tokens of one image (or video) before the language model sees them."""

    features: Tensor  # [N, D]
    grid: tuple[int, int, int, int] = (1, 1, 1, 1)  # crops, frames, rows, columns
    cls_attention: Tensor | None = None  # [H, N]
    self_attention: Tensor | None = None  # [H, N, N]
    text: Tensor | None = None  # [M, D]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is kept of N visual tokens."""

    kept: Sequence[int]  # [k], ascending
    weights: Tensor | None = None  # [k, N], rows sum to `row_sum`; None keeps the features as they are
    extra: Tensor | None = None  # [e, N], tokens without an index of their own, placed after the kept ones
    row_sum: float = 1.0


class VisionPolicy(Policy):
    """Selects or merges visual tokens."""

    def select(self, view: VisualView, keep: int) -> Selection:
        """Keeps at most `keep` of N tokens."""
        raise NotImplementedError(f"{type(self).__name__} declares no selection")

    def budget(self, total: int) -> int:
        """How many of `total` visual tokens to keep."""
        return total


@dataclass(frozen=True, slots=True)
class Overruled:
    """A verdict that lost to a stronger one of the same step; it goes into the receipt of its method."""

    method: str
    verdict: Verdict
    by: str
    at: int = field(default=0)
