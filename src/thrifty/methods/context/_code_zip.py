"""One text of LongCodeZip on its way to its limit: functions ranked, their blocks chosen, the files put together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from thrifty.call import Call
from thrifty.context import SEPARATOR
from thrifty.engine import TokenScores
from thrifty.methods.context import _shorten_code, _shorten_text
from thrifty.methods.context._code_blocks import File, Function, Span, parses
from thrifty.methods.context._conversation import Counter
from thrifty.methods.context._documents import Chunk, Document, parsed
from thrifty.methods.context._knapsack import knapsack, rates, spikes
from thrifty.methods.context._scored import mean_nll, most_that_fit, scored
from thrifty.spend import Spend, Work

BACK_SHARE = 0.25
"""of a document's tokens, at most, for the words that say how all is seen"""


@dataclass(frozen=True, slots=True)
class Settings:
    """The method's knobs that matter here."""

    ratio: float
    tokens: int
    fine_ratio: float
    beta: float
    k: float
    min_lines: int
    reversible: bool


@dataclass(slots=True)
class _Item:
    """Statements of one function that stay or go together."""

    file: int
    spans: tuple[Span, ...]
    tokens: int
    worth: float = 0.0


@dataclass
class CodeZip:
    """One document on its way to `most` tokens of code, in the name of `method`. `result`: its pieces."""

    knobs: Settings
    document: Document
    counter: Counter
    call: Call
    method: str
    spend: Spend = field(default_factory=Spend)
    work: Work = field(default_factory=Work)
    result: list[str] = field(default_factory=list)
    fallen: int = 0
    functions: int = 0
    whole: int = 0
    partly: int = 0

    def __post_init__(self) -> None:
        self.pieces = [_as_files(piece) for piece in self.document.pieces]
        self.code = [c for piece in self.pieces for c in piece if c.kind in ("python", "braces", "code")]
        self.size = sum(self.counter.text(c.text) for c in self.code)
        self.most = self.knobs.tokens or math.floor(self.knobs.ratio * self.size)
        self.left = self.size

    async def shorten(self) -> None:
        """Fills `result`. Raises BudgetExceeded; `spend` is what was spent until then."""
        back = f"to see all, write: recall #{self.document.ref}" if self.knobs.reversible else ""
        if self.counter.text(back) > self.most * BACK_SHARE:
            back = ""
        short: dict[int, str] = {}
        room = self.most
        for chunk in self.code:
            if chunk.kind != "python":
                size = self.counter.text(chunk.text)
                short[id(chunk)] = self._fall_back(chunk.text, size, size * self.most // self.size, back)
                room -= self.counter.text(short[id(chunk)])
        files = [c for c in self.code if c.kind == "python"]
        for chunk, text in zip(files, await self._python([c.text for c in files], max(0, room), back), strict=True):
            short[id(chunk)] = text
        self.left = sum(self.counter.text(text) for text in short.values())
        for piece in self.pieces:
            words = [c.before + short[id(c)] + c.after if id(c) in short else c.whole for c in piece]
            self.result.append("".join(words))

    def _fall_back(self, text: str, size: int, most: int, back: str) -> str:
        """Without the scorer: blocks of the C family emptied, else head and tail; at most `most` tokens."""
        if size <= most:
            return text
        self.fallen += 1

        def fits(candidate: str) -> bool:
            return self.counter.text(candidate) <= most

        found = _shorten_code.shorten_braces(text, fits, back)
        for told in (back, ""):
            found = found or _shorten_text.shorten(text, size, most, self.counter.text, lambda _: False, 0.5, told)
        return found or ""

    async def _python(self, texts: Sequence[str], most: int, back: str) -> list[str]:
        """The files, at most `most` tokens together."""
        files = [File.of(text, tree) for text in texts if (tree := parsed(text)) is not None]
        if sum(self.counter.text(text) for text in texts) <= most:
            return list(texts)
        functions = [(i, f) for i, file in enumerate(files) for f in file.functions]
        self.functions += len(functions)
        worth = await self._worth([files[i].text(f) for i, f in functions])
        bare = self._size(self._build(files, [], {}, back))
        if bare > most:
            return await self._outline(files, functions, worth, most, back)
        ranked = sorted(range(len(functions)), key=lambda j: (-worth[j], j))
        items = await self._items(files, functions, worth, ranked, most - bare)

        def size(k: int) -> int:
            return self._size(self._build(files, items[:k], {}, back))

        kept = items[: most_that_fit([float(item.tokens) for item in items], most, size)]
        return self._done(files, functions, kept, {}, back)

    # -- the coarse step -----------------------------------------------------------------------------------------

    async def _worth(self, texts: Sequence[str]) -> list[float]:
        """PPL(q) - PPL(q | text) of each; without a question the mean surprise at the text."""
        question = self.document.question
        if not texts:
            return []
        if not question:
            return [mean_nll(scores) for scores in await self._score(texts)]
        contexts = ["", *(text.rstrip() + SEPARATOR for text in texts)]
        alone, *after = [
            math.exp(min(700.0, mean_nll(s))) for s in await self._score([question] * len(contexts), contexts)
        ]
        return [alone - behind for behind in after]

    async def _score(self, texts: Sequence[str], contexts: str | Sequence[str] = "") -> tuple[TokenScores, ...]:
        scores = await scored(self.call, self.method, texts, contexts)
        self.spend, self.work = self.spend + scores.spend, self.work + scores.work
        return scores.texts

    async def _outline(
        self,
        files: Sequence[File],
        functions: Sequence[tuple[int, Function]],
        worth: Sequence[float],
        most: int,
        back: str,
    ) -> list[str]:
        """Signatures alone are too long: as many outermost statements as fit, those of most worth, without bodies."""
        tops = [(i, span) for i, file in enumerate(files) for span in file.top]
        values: list[float | None] = []
        for i, span in tops:
            mine = [
                w for (j, f), w in zip(functions, worth, strict=True) if j == i and span.start <= f.start < span.stop
            ]
            values.append(max(mine) if mine else None)
        plain = [t for t, value in zip(tops, values, strict=True) if value is None]
        rest = iter(await self._worth([files[i].text(span) for i, span in plain]))
        known = [next(rest) if value is None else value for value in values]
        ranked = sorted(range(len(tops)), key=lambda t: (-known[t], t))

        def dropped(k: int) -> dict[int, list[Span]]:
            gone: dict[int, list[Span]] = {}
            for t in ranked[k:]:
                gone.setdefault(tops[t][0], []).append(tops[t][1])
            return gone

        def size(k: int) -> int:
            return self._size(self._build(files, [], dropped(k), back))

        weights = [float(self.counter.text(files[i].text(span))) for i, span in (tops[t] for t in ranked)]
        k = most_that_fit(weights, most, size)
        for told in (back, ""):
            if size(k) <= most:
                return self._done(files, functions, [], dropped(k), told)
            back = ""  # without how to ask it back, or without a word
        return [""] * len(files)

    # -- the fine step -------------------------------------------------------------------------------------------

    async def _items(
        self,
        files: Sequence[File],
        functions: Sequence[tuple[int, Function]],
        worth: Sequence[float],
        ranked: Sequence[int],
        room: int,
    ) -> list[_Item]:
        """What may stay, the first first: what the knapsacks chose of the chosen functions, the rest of these by worth
        a token, and other functions whole."""
        bodies = [
            _Item(i, f.body, self._tokens(files[i], f.body), w) for (i, f), w in zip(functions, worth, strict=True)
        ]
        if self.knobs.fine_ratio >= 1:
            return [bodies[j] for j in ranked if bodies[j].tokens <= room]
        chosen: list[int] = []
        left = room / self.knobs.fine_ratio
        for j in ranked:
            if left <= 0:
                break
            chosen.append(j)
            left -= bodies[j].tokens
        sizes = [bodies[j].tokens for j in chosen]
        lines = [functions[j][1].size for j in chosen]
        shares = self._shares(sizes, lines, [worth[j] for j in chosen], room)
        large = [j for j, n in zip(chosen, lines, strict=True) if n >= self.knobs.min_lines]
        blocks = dict(zip(large, await self._blocks(files, [functions[j] for j in large]), strict=True))
        first: list[_Item] = []
        further: list[_Item] = []
        for j, share in zip(chosen, shares, strict=True):
            if j not in blocks:
                first.append(bodies[j])
                continue
            taken = self._taken(files[functions[j][0]], blocks[j], int(bodies[j].tokens * share))
            first += [block for b, block in enumerate(blocks[j]) if b in taken]
            further += [block for b, block in enumerate(blocks[j]) if b not in taken]
        further.sort(key=lambda item: -item.worth / max(1, item.tokens))
        return [*first, *further, *(bodies[j] for j in ranked if j not in set(chosen))]

    def _shares(self, sizes: Sequence[int], lines: Sequence[int], worth: Sequence[float], room: int) -> list[float]:
        """Of each chosen function's body, what stays: `rates` in tokens, small ones by their lines."""
        least = self.knobs.min_lines
        marked = [size if n >= least else 0 for size, n in zip(sizes, lines, strict=True)]
        whole = sum(size for size, n in zip(sizes, lines, strict=True) if n < least)
        return rates(marked, worth, max(0.0, room - whole), self.knobs.beta, 1)

    async def _blocks(self, files: Sequence[File], functions: Sequence[tuple[int, Function]]) -> list[list[_Item]]:
        """Each function's body in blocks, with their worth."""
        found: list[list[_Item]] = []
        surprise: list[float] = []
        for (i, f), scores in zip(functions, await self._score([files[i].text(f) for i, f in functions]), strict=True):
            lines = _line_surprise(files[i].lines[f.start : f.stop], scores)
            jumps = {f.start + n for n in spikes([x / math.log(2) for x in lines], self.knobs.k)}
            blocks: list[list[Span]] = [[]]
            for span in f.body:
                blocks[-1].append(span)
                if any(span.start <= jump < span.stop for jump in jumps):
                    blocks.append([])
            mine = [tuple(block) for block in blocks if block]
            found.append([_Item(i, spans, self._tokens(files[i], spans)) for spans in mine])
            for spans in mine:
                known = [x for x in lines[spans[0].start - f.start : spans[-1].stop - f.start] if x > 0]
                surprise.append(math.fsum(known) / len(known) if known else 0.0)
        items = [item for group in found for item in group]
        if self.document.question:
            surprise = await self._worth([_text(files[item.file], item.spans) for item in items])
        for item, worth in zip(items, surprise, strict=True):
            item.worth = worth
        return found

    def _taken(self, file: File, blocks: Sequence[_Item], capacity: int) -> set[int]:
        """Numbers of the blocks that the knapsack chooses; those to be preserved first, where they fit."""
        held = {b for b, block in enumerate(blocks) if _preserved(_text(file, block.spans))}
        left = capacity - sum(blocks[b].tokens for b in held)
        if left < 0:
            held, left = set(), capacity
        rest = [b for b in range(len(blocks)) if b not in held]
        chosen = knapsack([blocks[b].tokens for b in rest], [blocks[b].worth for b in rest], left)
        return held | {rest[c] for c in chosen}

    # -- putting it together -------------------------------------------------------------------------------------

    def _build(
        self, files: Sequence[File], kept: Sequence[_Item], dropped: dict[int, list[Span]], back: str
    ) -> list[str]:
        stays: list[set[Span]] = [set() for _ in files]
        for item in kept:
            stays[item.file].update(item.spans)
        out = []
        for i, file in enumerate(files):
            text = file.build(stays[i], dropped.get(i, ()), back)
            if back and back in text:
                back = ""
            out.append(text)
        return out

    def _done(
        self,
        files: Sequence[File],
        functions: Sequence[tuple[int, Function]],
        kept: Sequence[_Item],
        dropped: dict[int, list[Span]],
        back: str,
    ) -> list[str]:
        """The files as they go out, and what the receipt counts of them."""
        stays = {(item.file, span) for item in kept for span in item.spans}
        for i, f in functions:
            there = sum((i, span) in stays for span in f.body)
            self.whole += there == len(f.body)
            self.partly += 0 < there < len(f.body)
        texts = self._build(files, kept, dropped, back)
        for i, text in enumerate(texts):
            if not parses(text):  # never seen; a file must not go out broken
                whole = "".join(files[i].lines)
                texts[i] = self._fall_back(whole, self.counter.text(whole), self.counter.text(text), "")
        return texts

    def _size(self, texts: Sequence[str]) -> int:
        return sum(self.counter.text(text) for text in texts)

    def _tokens(self, file: File, spans: Sequence[Span]) -> int:
        return self.counter.text(_text(file, spans))


def _as_files(piece: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """A piece that is code for the most part, not fenced, and that no parser reads whole, is one broken file."""
    code = sum(len(c.text) for c in piece if c.kind in ("python", "code", "braces") and "\n" not in c.before.strip())
    fenced = any(c.before.strip() for c in piece)
    whole = "".join(c.whole for c in piece)
    if len(piece) > 1 and not fenced and code * 2 > len(whole):
        return (Chunk(whole, "code"),)
    return tuple(piece)


def _text(file: File, spans: Sequence[Span]) -> str:
    return "".join(file.text(span) for span in spans)


def _line_surprise(lines: Sequence[str], scores: TokenScores) -> list[float]:
    """Mean -log p of the tokens that end on each line; 0 for a line without one, as an empty one is released."""
    sums, counts = [0.0] * len(lines), [0] * len(lines)
    stops, at = [], 0
    for line in lines:
        at += len(line)
        stops.append(at)
    n = 0
    for (_, stop), logprob in zip(scores.spans, scores.logprobs, strict=True):
        while n < len(stops) - 1 and stop > stops[n]:
            n += 1
        if not math.isnan(logprob):
            sums[n] -= float(logprob)
            counts[n] += 1
    return [
        total / count if count and line.strip() else 0.0 for total, count, line in zip(sums, counts, lines, strict=True)
    ]


def _preserved(block: str) -> bool:
    """It begins with a comment, or returns something."""
    return block.lstrip().startswith("#") or re.search(r"(?m)^\s*return\b", block) is not None
