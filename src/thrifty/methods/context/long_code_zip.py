"""LongCodeZip: of long code the functions that make the question likelier, and of these the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thrifty.call import Call, Message, Receipt
from thrifty.errors import BudgetExceeded
from thrifty.method import Rewrite, knob
from thrifty.methods.context._code_zip import CodeZip, Settings
from thrifty.methods.context._conversation import Counter, recalls
from thrifty.methods.context._documents import cache_cost, documents, put, recalled
from thrifty.spend import Spend, Work, total_spend, total_work


@dataclass(frozen=True, kw_only=True)
class LongCodeZip(Rewrite):
    """Shortens the code of the context, and of long texts of the user's messages, to `ratio` of its tokens (or
    `tokens`), as the answering engine counts them. A passage, a fenced block or a text of nothing else is a file.

    Python is cut in two steps, the question q at hand. Coarse: a function f is worth PPL(q) - PPL(q | f) by the plan's
    `scorer`, an approximation of the mutual information of the two; functions are taken in that order until they have
    1 / `fine_ratio` of what there is room for. Fine: each of them gets a share of the room by its worth (`beta`), is
    cut into blocks behind the lines whose perplexity jumps (`k`), and keeps those that fit a 0/1 knapsack of worth and
    tokens; functions of fewer than `min_lines` stay whole, blocks that begin with a comment or return something come
    first. What room is left goes to further blocks and functions in their order. The scorer reads the code about once
    for each step (functions, lines, blocks), and the question behind each function and block.

    The result parses: a block is whole statements of a body, a placeholder says how many lines are missing, signatures
    stay. Where these alone are too long the functions, classes and statements of least worth go whole. The limit is
    never passed, not even by the function at the edge, as in the released code; blocks of no worth are never chosen by
    the knapsack, and what must come first only where it fits.

    Other languages of the C family are emptied block by block, without the scorer; what does not parse keeps its head
    and tail. The receipt counts both. Without a question worth is the surprise at the code itself. Prose and data stay.
    `recall #REF`, as the first placeholder has it, brings the whole text back. The context is cut by the question, so a
    provider's cache of it breaks with every turn; the receipt's detail says what that costs."""

    name = "long-code-zip"
    paper = "LongCodeZip: Compress Long Context for Code Language Models (Shi et al. 2025, arXiv:2510.00446)"
    roles = {"scorer": frozenset({"score"})}
    identity = {"ratio": 1.0, "tokens": 0}

    ratio: float = knob(0.5, "share of a text's code tokens that stays", low=0.0, high=1.0)
    tokens: int = knob(0, "tokens of code that stay, instead of a share; 0: the share", low=0, high=10_000_000)
    fine_ratio: float = knob(
        0.5, "share of the chosen functions that the fine step leaves; 1: none", low=0.05, high=1.0
    )
    beta: float = knob(0.5, "how much more of a worthier function stays", low=0.0, high=1.0)
    k: float = knob(0.2, "standard deviations above the mean that a jump of perplexity has", low=0.0, high=10.0)
    min_lines: int = knob(5, "lines below which a chosen function stays whole", low=1, high=1000)
    least: int = knob(512, "tokens up to which a user's text stays whole", low=1, high=10_000_000, log=True)
    reversible: bool = knob(True, "placeholders say how to ask for what was cut")
    cached_price: float = knob(0.1, "price of a cached input token, as a share of the full one", low=0.0, high=1.0)

    async def rewrite(self, call: Call) -> Call:
        counter = Counter(call)
        before = counter.prompt(call)
        found = documents(call, counter, self.least)
        asked = {ref for pair in recalls(call.messages) for ref in pair} if self.reversible else set()
        knobs = Settings(self.ratio, self.tokens, self.fine_ratio, self.beta, self.k, self.min_lines, self.reversible)
        coded = [CodeZip(knobs, d, counter, call, self.name) for d in found if d.ref not in asked]
        work = [w for w in coded if w.size > w.most]
        back = sorted(d.ref for d in found if d.ref in asked)
        spend, took = Spend(), Work()

        def unfired(reason: str) -> Call:
            own = Receipt(self.name, False, reason, before, before, spend=spend, work=took, detail={"recalled": back})
            return call.with_receipt(own)

        if not work:
            kept = f", {len(back)} of them asked back" if back else ""
            return unfired(
                f"{len(found)} long texts, {sum(w.size > 0 for w in coded)} with code, none to shorten{kept}"
            )
        try:
            for w in work:
                await w.shorten()
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            spend, took = total_spend(w.spend for w in work), total_work(w.work for w in work)
            return unfired(f"the budget cannot hold the scoring of {len(work)} texts ({error.resource}): all kept")
        spend, took = total_spend(w.spend for w in work), total_work(w.work for w in work)
        results = [(w.document, w.result) for w in work]
        changed = put(call, results)
        after = counter.prompt(changed)
        if after >= before:
            return unfired(f"shortening {len(work)} texts would save no tokens")
        report, words = cache_cost(call, changed, counter, results, (before, after), self.cached_price, asks=True)
        other = sum(w.fallen for w in work)
        if other:
            words += f"; {other} pieces of code that Python does not read cut without the scorer"
        if dull := sum(not w.document.question for w in work):
            words += f"; {dull} texts without a question by plain perplexity"
        functions, whole, partly = (sum(getattr(w, key) for w in work) for key in ("functions", "whole", "partly"))
        reason = (
            f"shortened code of {sum(w.size for w in work)} to {sum(w.left for w in work)} tokens: of {functions} "
            f"functions {whole} stay whole, {partly} in part{words}"
        )
        counts = {"functions": functions, "whole": whole, "partly": partly, "fallen_back": other}
        detail = {"texts": len(found), "refs": [w.document.ref for w in work], "recalled": back, **counts, **report}
        return changed.with_receipt(
            Receipt(self.name, True, reason, before, after, spend=spend, work=took, detail=detail)
        )


def recall(messages: Sequence[Message], ref: str, context: Sequence[str] = ()) -> str:
    """The whole text that a placeholder's ref stands for, from the conversation as it was: for a program that shows it,
    or offers it as a tool. Raises InvalidInput for a ref that is not there."""
    return recalled(messages, ref, context)
