"""What produces tokens, as the core sees it: the Engine protocol and its capabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Until
from thrifty.errors import InvalidInput, Unsupported
from thrifty.ledger.entry import Labels
from thrifty.spend import Spend, Work

Capability = Literal[
    "text",  # messages in, text out
    "sampling",  # temperature and a seed or repeated draws
    "logprobs",  # of the tokens drawn
    "embed",  # sentence embeddings
    "score",  # log-probabilities of given texts
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


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The tokens of one text as the scoring model reads it, in order; numpy arrays.

    A character that takes several tokens is in the span of each, so neighbours may overlap; together the spans cover
    the text, and no token starts before the one in front of it."""

    logprobs: Any
    """float64 [n], nats: of each token given the context and the text before it; NaN for a first token before which
    the model has nothing to read"""
    spans: Any
    """int64 [n, 2]: first character, and one past the last, with the white space before it"""


@dataclass(frozen=True, slots=True)
class Scores:
    """One TokenScores a text, in their order, and what they cost."""

    texts: tuple[TokenScores, ...]
    spend: Spend
    work: Work = Work()
    cut: int = 0
    """tokens at the beginning of contexts that the model had no room to read"""


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


@runtime_checkable
class Scorer(Protocol):
    """What an engine with the capability `score` has besides. Ask it through `score`."""

    async def score(
        self, texts: Sequence[str], account: Account, labels: Labels, context: str | Sequence[str] = ""
    ) -> Scores:
        """See `thrifty.engine.score`."""


async def score(
    engine: Engine, texts: Sequence[str], account: Account, labels: Labels, context: str | Sequence[str] = ""
) -> Scores:
    """The log-probability of every token of the texts, each read after its context: one for all, or one a text.

    Context and text are tokenised apart, so a text has the same tokens after any context (a token that would have
    joined the two does not arise). Texts with the same context share its prefill. Input tokens, one call and Work are
    held before and settled on the account. Raises Unsupported where the engine cannot score, InvalidInput for another
    number of contexts than texts, BudgetExceeded, EngineError."""
    if "score" not in engine.capabilities or not isinstance(engine, Scorer):
        raise Unsupported(
            f"engine {engine.name}:{engine.model} gives no log-probabilities of texts: name an engine with `score` "
            "for the role, such as local:smollm2"
        )
    if not isinstance(context, str) and len(context) != len(texts):
        raise InvalidInput(f"{len(context)} contexts for {len(texts)} texts: give one for all, or one a text")
    return await engine.score(texts, account, labels, context)
