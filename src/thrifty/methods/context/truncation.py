"""Truncation: keep the first, the last, or both ends of the context, whole passages only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thrifty.call import Call, Receipt
from thrifty.context import passages
from thrifty.errors import InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.context._passages import prompt_tokens, text_counter

KEEPS = ("first", "last", "middle-out")


@dataclass(frozen=True, kw_only=True)
class Truncation(Rewrite):
    """Keeps as many whole passages as fit into `tokens`, from the front, from the end, or from both in turn.

    The baseline of every context method: it reads nothing. Passages are the call's context, or the paragraphs
    of a user message over `over` tokens, whose last paragraph, where the question stands, always stays and is
    not counted. Tokens are those of the passages alone, each counted with the blank line before it. A first
    passage that does not fit leaves none, and the receipt says so."""

    name = "truncation"
    paper = "baseline: keep the first, the last or both ends of the context"
    identity = {"tokens": 10_000_000}

    tokens: int = knob(1024, "tokens of context to keep", low=0, high=10_000_000)
    keep: str = knob("first", "which end stays; middle-out drops from the middle", choices=KEEPS)
    over: int = knob(512, "cut a user message into paragraphs when it has more tokens", low=1, high=10_000_000)

    async def rewrite(self, call: Call) -> Call:
        count = text_counter(call)
        found = passages(call, count, self.over)
        n, before = len(found.texts), prompt_tokens(call)
        if not n:
            return call.with_receipt(Receipt(self.name, False, "0 passages: there is nothing to drop", before, before))
        lengths = [count("\n\n" + text.rstrip()) for text in found.texts]
        kept = fit(lengths, self.tokens, self.keep)
        if len(kept) == n:
            return call.with_receipt(
                Receipt(self.name, False, f"all {n} passages fit into {self.tokens} tokens", before, before)
            )
        changed = found.keep(call, kept)
        reason = f"kept {len(kept)} of {n} passages within {self.tokens} tokens of context"
        if not kept:
            reason = f"no passage kept: the first alone is over {self.tokens} tokens"
        detail = {"passages": n, "kept": kept}
        return changed.with_receipt(Receipt(self.name, True, reason, before, prompt_tokens(changed), detail=detail))


def fit(lengths: Sequence[int], most: int, keep: str = "first") -> list[int]:
    """Indices, ascending, of the passages that stay. It stops at the first that does not fit, so no hole is
    left at an end; "middle-out" takes first, last, second, second to last, and so on.

    >>> fit([3, 3, 3, 3], 10, "middle-out")
    [0, 1, 3]
    """
    n = len(lengths)
    if keep == "first":
        order = list(range(n))
    elif keep == "last":
        order = list(range(n - 1, -1, -1))
    elif keep == "middle-out":
        order = [i // 2 if i % 2 == 0 else n - 1 - i // 2 for i in range(n)]
    else:
        raise InvalidInput(f"keep {keep!r}: one of {', '.join(KEEPS)} is needed")
    kept: list[int] = []
    for i in order:
        most -= lengths[i]
        if most < 0:
            break
        kept.append(i)
    return sorted(kept)
