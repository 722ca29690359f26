"""Perplexity-based extractive compression: what a small model could have guessed goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

from thrifty.call import Call, Message, Receipt
from thrifty.context import SEPARATOR
from thrifty.engine import Scores
from thrifty.errors import BudgetExceeded
from thrifty.method import Rewrite, knob
from thrifty.methods.context import _shorten_code, _shorten_json
from thrifty.methods.context._conversation import Counter, recalls
from thrifty.methods.context._documents import Chunk, Document, cache_cost, documents, put, recalled
from thrifty.methods.context._scored import Atom, atoms, most_that_fit, scored
from thrifty.methods.context._sentences import sentences
from thrifty.spend import Spend

MARK_SHARE = 0.25
"""of a document's tokens, at most, for the mark that says what is missing"""


@dataclass(frozen=True, kw_only=True)
class PerplexityCompression(Rewrite):
    """Shortens the context, and each long text of a user's message, to a share of its tokens, by the surprise that the
    plan's `scorer` has at them: -log p of a token given the text before it. The most surprising stay, in their order.

    `level` "sentence": whole sentences by their mean surprise, as Selective Context ranks its units; the one that would
    pass the limit is cut token by token, so that the limit is met. "token": single tokens, as LLMLingua does. Nothing
    is cut inside a character with its accents or a joined emoji.

    `contrastive`: what the question explains stays. A token counts by log p(x | question, text before) - log p(x | text
    before), the contrastive perplexity of LongLLMLingua: how much likelier the question makes it. That takes a second
    pass. Without it the scorer reads each text once (of a text longer than its window a sixteenth twice). What is not
    taken over from the papers: budgets that differ between instruction, demonstrations and question; re-reading of what
    was already compressed, segment by segment; reordering of passages.

    `tokens`, or `ratio` of what there is, are those of one document as the answering engine counts them, its mark
    included: the count is met from below. JSON stays JSON and code parses: they are cut by the same share as a whole,
    as `tool-output` does it, or stay; the receipt says where they leave too little room. The end of a message, its last
    paragraph, is taken for the question and stays. A mark says what a document was shortened from and, where it is
    `reversible`, how it is asked back: an assistant or user message with `recall #REF` keeps it whole from then on.

    What becomes of a message follows from it alone, so it is the same in every later turn and a provider's cache of the
    prefix holds; `contrastive` breaks it for the context, whose question changes. The receipt's detail says what it
    costs, as `tool-output`'s does."""

    name = "perplexity-compression"
    paper = (
        "baseline: perplexity-based extractive compression (Selective Context, Li et al. 2023, arXiv:2310.06201; "
        "LLMLingua, Jiang et al. 2023, arXiv:2310.05736; contrastive: LongLLMLingua, arXiv:2310.06839)"
    )
    roles = {"scorer": frozenset({"score"})}
    identity = {"ratio": 1.0, "tokens": 0}

    ratio: float = knob(0.5, "share of a document's tokens that stays", low=0.0, high=1.0)
    tokens: int = knob(0, "tokens of a document that stay, instead of a share; 0: the share", low=0, high=10_000_000)
    level: str = knob("sentence", "what stays or goes", choices=("sentence", "token"))
    contrastive: bool = knob(False, "rank by how much likelier the question makes it")
    least: int = knob(512, "tokens up to which a user's text stays whole", low=1, high=10_000_000, log=True)
    reversible: bool = knob(True, "marks say how to ask for what was cut")
    cached_price: float = knob(0.1, "price of a cached input token, as a share of the full one", low=0.0, high=1.0)

    async def rewrite(self, call: Call) -> Call:
        counter = Counter(call)
        before = counter.prompt(call)
        found = documents(call, counter, self.least)
        asked = {ref for pair in recalls(call.messages) for ref in pair} if self.reversible else set()
        work = [_Work(self, d, counter) for d in found if d.ref not in asked]
        work = [w for w in work if w.size > w.most]
        back = sorted(d.ref for d in found if d.ref in asked)
        if not work:
            reason = f"{len(found)} long texts, none to shorten" + (f", {len(back)} of them asked back" if back else "")
            return call.with_receipt(Receipt(self.name, False, reason, before, before, detail={"recalled": back}))
        for w in work:
            w.shorten_structured()
        reading = [w for w in work if w.text.strip()]
        scores = Scores((), Spend())
        try:
            if reading:
                scores = await self._scores(call, reading)
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            reason = f"the budget cannot hold the scoring of {len(reading)} texts ({error.resource}): all kept"
            return call.with_receipt(Receipt(self.name, False, reason, before, before, detail={"recalled": back}))
        changed = put(call, [(w.document, w.shortened()) for w in work])
        after = counter.prompt(changed)
        spend, took = scores.spend, scores.work
        if after >= before:
            reason = f"shortening {len(work)} texts would save no tokens"
            return call.with_receipt(Receipt(self.name, False, reason, before, before, spend=spend, work=took))
        results = [(w.document, w.result) for w in work]
        report, words = cache_cost(
            call, changed, counter, results, (before, after), self.cached_price, asks=self.contrastive
        )
        over = [w for w in work if w.over]
        if over:
            words += f"; code and data leave {len(over)} of them over their limit by {sum(w.over for w in over)} tokens"
        if self.contrastive and (dull := sum(not w.document.question for w in reading)):
            words += f"; {dull} without a question by plain perplexity"
        what = f"{len(work)} of {len(found)} long texts"
        reason = f"shortened {what} from {sum(w.size for w in work)} to {sum(w.left for w in work)} tokens{words}"
        detail = {"texts": len(found), "refs": [w.document.ref for w in work], "recalled": back, **report}
        return changed.with_receipt(
            Receipt(self.name, True, reason, before, after, spend=spend, work=took, detail=detail)
        )

    async def _scores(self, call: Call, work: Sequence[_Work]) -> Scores:
        """Gives each its tokens' values, higher is kept: of one pass, or of the difference of two."""
        plain = [w.text for w in work]
        asked = [w for w in work if self.contrastive and w.document.question]
        contexts = [""] * len(plain) + [w.document.question + SEPARATOR for w in asked]
        scores = await scored(call, self.name, plain + [w.text for w in asked], contexts)
        for w, alone in zip(work, scores.texts, strict=False):
            w.spans, w.values = alone.spans, -alone.logprobs
        for w, told in zip(asked, scores.texts[len(plain) :], strict=True):
            w.values = told.logprobs + w.values
        return scores


@dataclass
class _Work:
    """One document on its way to `most` tokens. `text`: its prose, which is scored; `result`: its pieces."""

    method: PerplexityCompression
    document: Document
    counter: Counter
    size: int = 0
    most: int = 0
    left: int = 0
    spans: Sequence[Sequence[int]] = ()
    values: Sequence[float] = ()
    pieces: list[list[Chunk]] = field(default_factory=list)
    result: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pieces = [list(piece) for piece in self.document.pieces]
        self.size = self._count(self.document.texts)
        self.most = self.method.tokens or math.floor(self.method.ratio * self.size)

    @property
    def over(self) -> int:
        """Tokens over the limit, where what must stay is too long."""
        return max(0, self.left - self.most)

    @property
    def text(self) -> str:
        """The prose of all pieces, a blank line between two."""
        return SEPARATOR.join(c.whole for piece in self.pieces for c in piece if c.kind == "text")

    def shorten_structured(self) -> None:
        """Data and code to their share of the limit, each as a whole; what cannot be shortened stays."""
        alone = not self.text.strip()  # then they must say themselves how the whole is asked back
        back = f"to see all, write: recall #{self.document.ref}" if alone and self.method.reversible else ""
        for piece in self.pieces:
            for i, chunk in enumerate(piece):
                if chunk.kind not in ("text", "code"):
                    room = max(1, math.floor(self.counter.text(chunk.text) * self.most / self.size))
                    short = _shorter(chunk, partial(self._fits, room), back)
                    piece[i] = chunk if short is None else replace(chunk, text=short)

    def _fits(self, room: int, text: str) -> bool:
        return self.counter.text(text) <= room

    def shortened(self) -> list[str]:
        """The document's pieces: the best prose that fits beside data and code, in its order, and the mark."""
        if not self.text.strip():
            self.result = ["".join(c.whole for c in piece) for piece in self.pieces]
        else:
            self._prose()
        self.left = self._count(self.result)
        return self.result

    def _prose(self) -> None:
        text = self.text
        edges = self._edges()
        parts = atoms(text, self.spans, list(self.values), edges)
        order = sorted(range(len(parts)), key=self._rank(text, parts, edges))
        mark = self._mark()

        def build(k: int) -> list[str]:
            return self._build(text, parts, sorted(order[:k]), mark)

        def size(k: int) -> int:
            return self._count(build(k))

        weights = [float(parts[i].tokens) for i in order]
        k = most_that_fit(weights, self.most, size)
        if k == 0 and size(0) > self.most:
            mark = ""  # data and code leave no room
        self.result = build(k)

    def _edges(self) -> list[int]:
        """Where in `text` a chunk of prose begins and ends."""
        lengths = [len(c.whole) for piece in self.pieces for c in piece if c.kind == "text"]
        starts = list(accumulate((n + len(SEPARATOR) for n in lengths), initial=0))[:-1]
        return [edge for at, n in zip(starts, lengths, strict=True) for edge in (at, at + n)]

    def _rank(
        self, text: str, parts: Sequence[Atom], edges: Sequence[int]
    ) -> Callable[[int], tuple[float, int, float, int]]:
        """Sorts atoms: the best first, and of equal ones the first."""

        def alone(i: int) -> tuple[float, int, float, int]:
            return -parts[i].value, i, 0.0, i

        if self.method.level == "token":
            return alone
        stops = [
            start + end
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
            for end in accumulate(len(s) for s in sentences(text[start:stop]))
        ]
        at, where = 0, []
        for part in parts:
            while at < len(stops) - 1 and part.stop > stops[at]:  # by its end: white space stands before a word
                at += 1
            where.append(at)
        sums, counts = [0.0] * len(stops), [0] * len(stops)
        for part, s in zip(parts, where, strict=True):
            if math.isfinite(part.value):
                sums[s] += part.value * part.tokens
                counts[s] += part.tokens
        means = [total / n if n else 0.0 for total, n in zip(sums, counts, strict=True)]

        def among(i: int) -> tuple[float, int, float, int]:
            return -means[where[i]], where[i], -parts[i].value, i

        return among

    def _build(self, text: str, parts: Sequence[Atom], kept: Sequence[int], mark: str) -> list[str]:
        """The pieces with the kept atoms only; the mark stands before the first prose."""
        edges = self._edges()
        bounds = list(zip(edges[::2], edges[1::2], strict=True))
        prose: list[list[str]] = [[] for _ in bounds]
        at = 0
        for i in kept:
            while at < len(bounds) and parts[i].start >= bounds[at][1]:
                at += 1
            if at < len(bounds) and parts[i].start >= bounds[at][0]:
                prose[at].append(text[parts[i].start : parts[i].stop])
        out: list[str] = []
        number = 0
        for piece in self.pieces:
            words: list[str] = []
            for chunk in piece:
                if chunk.kind != "text":
                    words.append(chunk.whole)
                    continue
                said, end = "".join(prose[number]), chunk.text[len(chunk.text.rstrip()) :]
                said = said.strip() + end if said.strip() else ""
                if number == 0 and mark:
                    said = f"{mark}\n{said}" if said else mark + (end or "\n")
                words.append(said)
                number += 1
            out.append("".join(words))
        return out

    def _mark(self) -> str:
        """What says that it was shortened: with how to see all, without, or none, as there is room."""
        told = f"[shortened from {self.size} tokens; to see all, write: recall #{self.document.ref}]"
        marks = [told] if self.method.reversible else []
        return next((m for m in [*marks, "[shortened]"] if self.counter.text(m) <= self.most * MARK_SHARE), "")

    def _count(self, pieces: Sequence[str]) -> int:
        kept = [piece for piece in pieces if piece.strip()]
        return self.counter.text(SEPARATOR.join(kept) if self.document.message is None else "".join(kept))


def _shorter(chunk: Chunk, fits: Callable[[str], bool], back: str) -> str | None:
    """Data or code that fits and is still of its kind; None where there is none."""

    def never(line: str) -> bool:
        return False

    if chunk.kind == "json":
        return _shorten_json.shorten(chunk.text, fits, never, back)
    if chunk.kind == "json lines":
        lines = [line for line in chunk.text.split("\n") if line.strip()]
        return _shorten_json.shorten_lines(lines, fits, never, back)
    if chunk.kind == "python":
        return _shorten_code.shorten_python(chunk.text, fits, never, back)
    return _shorten_code.shorten_braces(chunk.text, fits, back)


def recall(messages: Sequence[Message], ref: str, context: Sequence[str] = ()) -> str:
    """The whole text that a mark's ref stands for, from the conversation as it was: for a program that shows it, or
    offers it as a tool. Raises InvalidInput for a ref that is not there."""
    return recalled(messages, ref, context)
