"""What produces tokens, as the core sees it: the Engine protocol and its capabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Until
from thrifty.ledger.entry import Labels
from thrifty.spend import Spend

Capability = Literal[
    "text",  # messages in, text out
    "sampling",  # temperature and a seed or repeated draws
    "logprobs",  # of the tokens drawn
    "embed",  # sentence embeddings
    "continue",  # can continue an unfinished assistant message
    "branch",  # open, step, fork
    "logits",  # decode policies
    "hidden",  # hidden states
    "attention",  # attention policies
    "cache",  # cache policies
    "vision",  # vision policies
    "gradients",
]
CAPABILITIES: frozenset[str] = frozenset(get_args(Capability))


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors, one a text, and what they cost. `vectors` is a numpy float32 array [N, D]."""

    vectors: Any
    spend: Spend


@runtime_checkable
class Engine(Protocol):
    """An engine of one model. All generation settles on the call's account."""

    @property
    def name(self) -> str:
        """Its kind: scripted, openai, local."""

    @property
    def model(self) -> str:
        """The model that it runs or asks for."""

    @property
    def dtype(self) -> str:
        """What it computes in; empty where it is not known."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What it provides, of `CAPABILITIES`."""

    def identity(self) -> Mapping[str, Any]:
        """What results are keyed by: model, dtype, batch mode, shared-prefix attention, ... JSON-ready."""

    def count(self, call: Call) -> int:
        """Input tokens of a call as it would be sent; an estimate where the tokenizer is not known."""

    async def generate(self, call: Call) -> Answer:
        """Holds, generates, settles. Raises BudgetExceeded, EngineError, Unsupported."""

    async def open(self, call: Call) -> Branch:
        """A generation in progress. Raises Unsupported where `branch` is no capability."""

    async def advance(self, branches: Sequence[Branch], until: Until | int) -> None:
        """See `thrifty.call.advance`."""

    async def embed(self, texts: Sequence[str], account: Account, labels: Labels) -> Embeddings:
        """Unit vectors of texts, settled on the account. Raises Unsupported where `embed` is no capability."""

    async def aclose(self) -> None:
        """Frees what it holds. Idempotent."""
