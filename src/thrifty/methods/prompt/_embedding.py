"""Embeds texts for a prompt method, billed under its name, on an account that leaves the answer its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from thrifty.budget import Budget
from thrifty.call import Call
from thrifty.engine import Embeddings
from thrifty.errors import InvalidInput
from thrifty.methods.prompt._system import prompt_tokens


async def embed(call: Call, method: str, texts: Sequence[str], model: str = "") -> Embeddings:
    """Unit vectors [N, D] of the texts, and what they cost. Raises BudgetExceeded where the account cannot hold them
    beside the call as it stands and one token of output, and InvalidInput where the embedder is another than `model`
    (empty: any), whose vectors would mean something else."""
    engine = call.engines["embedder"]
    if model and engine.model != model:
        raise InvalidInput(
            f"{method}: trained on the embeddings of {model!r}, and the embedder is {engine.model!r}: use that one"
        )
    account = call.account.child(method, Budget(**{name: max(0, left) for name, left in _beside(call).items()}))
    return await engine.embed(list(texts), account, replace(call.labels, method=method, role="embedder"))


def fits(call: Call) -> bool:
    """Whether the call's prompt and one token of output fit into its account, as it stands."""
    return all(left >= 0 for left in _beside(call).values())


def _beside(call: Call) -> dict[str, int]:
    """What the account leaves beside the call as it stands; only of what is limited, for counting takes time."""
    left = call.account.remaining()
    prompt = (prompt_tokens(call) or 0) if "input" in left or "tokens" in left else 0
    needs = {"input": prompt, "tokens": prompt + 1 + call.keep, "calls": 1}
    return {name: int(left[name]) - need for name, need in needs.items() if name in left}
