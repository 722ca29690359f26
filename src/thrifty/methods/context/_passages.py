"""What the context methods share: counting tokens, finding the query, scoring passages, keeping the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from thrifty.budget import Budget
from thrifty.call import Call, Receipt
from thrifty.context import Passages, passages
from thrifty.engine import Embeddings
from thrifty.errors import BudgetExceeded
from thrifty.spend import Spend

CHARS_PER_TOKEN = 3.3
"""English text; only where the call has no engine to count with"""


def text_counter(call: Call) -> Callable[[str], int]:
    """Counts the tokens of a text by the answering engine: those of a message with it, less those of an empty
    message.

    A call without engines counts characters / 3.3.
    """
    engine = call.engines.get("answer")
    if engine is None:
        return lambda text: round(len(text) / CHARS_PER_TOKEN)
    probe = call.on_behalf("")

    def tokens(text: str) -> int:
        return engine.count(replace(probe, messages=({"role": "user", "content": text},)))

    empty = tokens("")
    return lambda text: max(0, tokens(text) - empty)


def prompt_tokens(call: Call) -> int | None:
    """Input tokens of the call as it stands, context rendered; None when it has no engine yet."""
    engine = call.engines.get("answer")
    return None if engine is None else engine.count(call)


def query_of(call: Call, found: Passages) -> str:
    """What passages are compared with: the last user message, or of a cut message the last paragraph."""
    return found.pieces[-1].strip() if found.source is not None else call.question()


@dataclass(frozen=True, slots=True)
class Scored:
    """Cosine similarity of each passage to the query, [n], and what the embedder billed."""

    scores: list[float]
    spend: Spend


async def score(call: Call, method: str, query: str, texts: Sequence[str]) -> Scored:
    """Embeds query and passages in one request, billed under the method's name on an account below the
    call's.

    When the call as it stands still fits into its account, embedding must leave it that room; where it does
    not, fewer passages are its only chance, and embedding may take what there is. Raises BudgetExceeded."""
    embedded = await embed(call, method, [query, *texts])
    vectors = embedded.vectors
    return Scored([float(x) for x in vectors[1:] @ vectors[0]], embedded.spend)


async def embed(call: Call, method: str, texts: Sequence[str]) -> Embeddings:
    """Unit vectors [N, D] of texts in one request, billed as `score` says. Raises BudgetExceeded."""
    labels = replace(call.labels, method=method, role="embedder")
    account = call.account.child(method, _leaving_room(call))
    return await call.engines["embedder"].embed(list(texts), account, labels)


async def keep_best(
    call: Call,
    method: str,
    *,
    over: int,
    order: str,
    covered: Callable[[int], str | None],
    how_many: Callable[[list[float]], int],
) -> Call:
    """The call with its best passages only, in the order of the document or of their rank, and a receipt.

    `over`: tokens from which a user message is cut into paragraphs. `covered(n)` is the reason why none of n
    passages can go, so that nothing need be embedded, or None. `how_many` says from the scores, in falling order,
    how many stay. Raises BudgetExceeded where the budget cannot hold the embedding and the call says to refuse."""
    found = passages(call, text_counter(call), over)
    n, before = len(found.texts), prompt_tokens(call)

    def unfired(reason: str) -> Call:
        return call.with_receipt(Receipt(method, False, reason, before, before))

    if n < 2:
        return unfired(f"{n} passages: there is nothing to choose")
    if order == "document" and (reason := covered(n)) is not None:
        return unfired(reason)
    query = query_of(call, found)
    if not query:
        return unfired("no user message to compare the passages with")
    try:
        scored = await score(call, method, query, found.texts)
    except BudgetExceeded as error:
        if call.on_exceed == "refuse":
            raise
        return unfired(f"the budget cannot hold the embedding of {n} passages ({error.resource}): all kept")
    best = ranked(scored.scores)
    best = best[: how_many([scored.scores[i] for i in best])]
    kept = best if order == "rank" else sorted(best)
    changed = found.keep(call, kept)
    fired = kept != list(range(n)) if found.source is None else len(kept) < n
    reason = f"kept {len(kept)} of {n} passages" if fired else f"all {n} passages kept, as they were"
    detail = {"passages": n, "kept": kept}
    after = prompt_tokens(changed)
    return changed.with_receipt(Receipt(method, fired, reason, before, after, spend=scored.spend, detail=detail))


def _leaving_room(call: Call) -> Budget:
    prompt = prompt_tokens(call) or 0
    needs = {"input": prompt, "tokens": prompt + 1 + call.keep, "calls": 1}
    left = {name: int(room) for name, room in call.account.remaining().items() if name in needs}
    if any(left[name] < needs[name] for name in left):
        return Budget()
    return Budget(**{name: left[name] - needs[name] for name in left})


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices by falling score; equal scores by the lower index.

    >>> ranked([0.1, 0.9, 0.9])
    [1, 2, 0]
    """
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))
