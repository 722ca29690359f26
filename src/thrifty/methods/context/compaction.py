"""Compaction: a long conversation keeps its beginning and its newest turns; what lies between becomes a note."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from thrifty.budget import Budget
from thrifty.call import Call, Message, Receipt, Sampling
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.context import _notes
from thrifty.methods.context._conversation import (
    SYSTEM_ROLES,
    Counter,
    Group,
    cache_report,
    common_prefix,
    groups,
    previous_turn,
    recalls,
)
from thrifty.methods.context._notes import Gap
from thrifty.spend import Spend, Work

OLDER = ("drop", "outline", "summary")
MARK_TOKENS = 48
"""set aside for the mark of a gap without an outline"""

SUMMARY_PROMPT = (
    "Summarise the conversation below for someone who must go on with it. Keep goals, decisions, names, numbers, "
    "file paths, open questions and errors, word for word where they matter. No introduction. At most {words} words."
    "\n\n{transcript}"
)


@dataclass(frozen=True, kw_only=True)
class Compaction(Rewrite):
    """Cuts a conversation of more than `tokens` to `target` of that: the oldest groups go, between the first
    `first` groups and the last `recent`, and a note takes their place.

    A group is one message, or tool calls with all their results: such a pair is never split. System messages and
    the last user message always stay. `older` says what the note has: "drop" only how much is missing, "outline" also
    who said what in a line each (no model is asked), "summary" a summary by the plan's `summariser` engine, or by
    the answering one, billed under this method's name.

    Where to cut follows from replaying the conversation from its start, turn by turn: a cut is made when a turn
    passes `tokens`, and stays where it is until the next one does. So the prompt's prefix is the same from turn to
    turn but for the turns that cut, and the receipt's detail says how many cached tokens those broke and what the
    change saves at full price (`net_saved`, below zero for a loss). A summary is asked for anew in every call that
    needs one, as nothing is remembered: to pay for it once, go on with the messages of `await rewrite(call)`.

    `reversible` marks name what was cut. An assistant or user message that says `recall #REF`, while it is among those
    kept, brings the messages back in their place; `recall` here gives them to a program.

    `tokens` counts messages only, not tools and context. Where the account has room for less than the whole
    prompt, more goes, down to the last group. What must stay and is still too long stays: the receipt says
    by how much, and the engine refuses what the budget cannot hold. A conversation that begins with a tool's result
    keeps or loses it as any other message."""

    name = "compaction"
    paper = "baseline: conversation compaction (keep, summarise or drop older turns)"
    identity = {"tokens": 100_000_000}

    tokens: int = knob(8192, "tokens of conversation from which it is compacted", low=1, high=100_000_000, log=True)
    target: float = knob(0.5, "share of `tokens` that is left then", low=0.01, high=1.0)
    first: int = knob(1, "groups of messages that stay at the start, system messages not counted", low=0, high=1000)
    recent: int = knob(4, "groups of messages that stay at the end", low=1, high=10_000)
    older: str = knob("outline", "what takes the place of what goes", choices=OLDER)
    note: int = knob(256, "tokens of an outline or a summary at most", low=32, high=100_000, log=True)
    reversible: bool = knob(True, "marks say how to ask for what was cut")
    cached_price: float = knob(0.1, "price of a cached input token, as a share of the full one", low=0.0, high=1.0)

    async def rewrite(self, call: Call) -> Call:
        counter = Counter(call)
        whole = _Conversation.of(call.messages, counter)
        before = counter.prompt(call)
        cut = self._cut(whole)
        asked_back = self._asked_back(whole, cut)
        gaps = self._gaps(whole, cut, asked_back)
        room = _room(call)
        if room is not None and before > room and self._plainly(call, gaps, counter)[1] > room:
            asked_back, gaps = set(), self._into_room(call, whole, counter, cut, room)
        total = sum(whole.sizes)
        if not gaps:
            reason = f"{total} tokens of conversation: nothing to cut at {self.tokens}"
            if total > self.tokens:
                reason = f"{total} tokens of conversation are over {self.tokens}, and all of it must stay"
            back = [whole.groups[i].ref for i in sorted(asked_back)]
            if back:
                reason = f"{total} tokens of conversation: all that would go was asked back"
            return call.with_receipt(Receipt(self.name, False, reason, before, before, detail={"recalled": back}))
        spend, work, notes, why = await self._notes(call, gaps, counter)
        messages = self._build(call.messages, gaps, notes)
        changed = replace(call, messages=messages)
        after = counter.prompt(changed)
        if after >= before:
            reason = f"cutting {sum(g.tokens for g in gaps)} tokens would save none beside the note"
            return call.with_receipt(Receipt(self.name, False, reason, before, before, spend=spend, work=work))
        report, words = self._cache(call, messages, counter, before, after)
        count = sum(g.stop - g.start for gap in gaps for g in gap.groups)
        reason = f"left out {count} of {len(call.messages)} messages{why}{words}"
        left = counter.messages(messages)
        if left > self.tokens:
            reason += f"; what must stay is {left - self.tokens} tokens over {self.tokens}"
        if spend and report["net_saved"] < spend.input + spend.output:
            reason += f"; the summary took {spend.input + spend.output} tokens, more than was saved"
        refs = [g.ref for g in gaps]
        back = [whole.groups[i].ref for i in sorted(asked_back)]
        detail = {"messages": len(call.messages), "cut": count, "refs": refs, "recalled": back, **report}
        return changed.with_receipt(
            Receipt(self.name, True, reason, before, after, spend=spend, work=work, detail=detail)
        )

    # -- what goes -----------------------------------------------------------------------------------------------

    def _cut(self, whole: _Conversation) -> int:
        """Groups before this index go, unless they are pinned."""
        reserve = MARK_TOKENS if self.older == "drop" else self.note
        return cut_at(
            whole.sizes,
            whole.pinned(self.first),
            whole.asked,
            most=self.tokens,
            target=int(self.tokens * self.target),
            recent=self.recent,
            note=reserve,
        )

    def _asked_back(self, whole: _Conversation, cut: int) -> set[int]:
        """Indices of groups before `cut` that a kept message asks for."""
        stays = whole.pinned(self.first) | {whole.last_user}
        gone = {i for i in range(cut) if i not in stays}
        kept = [m for i, g in enumerate(whole.groups) if i not in gone for m in whole.messages[g.start : g.stop]]
        back: set[int] = set()
        refs = [g.ref for g in whole.groups]
        for first, last in recalls(kept) if self.reversible else ():
            if first in refs and last in refs[refs.index(first) :]:
                start = refs.index(first)
                back |= set(range(start, refs.index(last, start) + 1)) & gone
        return back

    def _gaps(self, whole: _Conversation, cut: int, back: set[int]) -> list[Gap]:
        """Runs of groups that go."""
        stays = whole.pinned(self.first) | {whole.last_user} | back
        runs: list[list[int]] = []
        for i in range(cut):
            if i not in stays:
                if runs and runs[-1][-1] == i - 1:
                    runs[-1].append(i)
                else:
                    runs.append([i])
        return [Gap(tuple(whole.groups[i] for i in run), sum(whole.sizes[i] for i in run)) for run in runs]

    def _into_room(self, call: Call, whole: _Conversation, counter: Counter, cut: int, room: int) -> list[Gap]:
        """Cuts on, group by group, until the prompt fits into the account or only the last group is left."""
        before = counter.prompt(call)
        gaps: list[Gap] = []
        for further in range(cut, len(whole.groups)):
            gaps = self._gaps(whole, further, set())
            if before - sum(g.tokens for g in gaps) <= room and self._plainly(call, gaps, counter)[1] <= room:
                break
        return gaps

    # -- what takes its place ------------------------------------------------------------------------------------

    def _plain(self, gap: Gap, messages: Sequence[Message], counter: Counter) -> str:
        if self.older == "drop":
            return _notes.mark(gap, messages, self.reversible)
        return _notes.outline(gap, messages, counter, self.note, self.reversible)

    def _plainly(self, call: Call, gaps: Sequence[Gap], counter: Counter) -> tuple[list[str], int]:
        """Notes that need no model, and the prompt's tokens with them."""
        notes = [self._plain(g, call.messages, counter) for g in gaps]
        return notes, counter.prompt(replace(call, messages=self._build(call.messages, gaps, notes)))

    async def _notes(self, call: Call, gaps: Sequence[Gap], counter: Counter) -> tuple[Spend, Work, list[str], str]:
        """A note for each gap, what it cost, and in words what became of a summary."""
        plain, compact = self._plainly(call, gaps, counter)
        if self.older != "summary":
            return Spend(), Work(), plain, ""
        spend, work, notes = Spend(), Work(), list(plain)
        for i, gap in enumerate(gaps):
            try:
                text, cost, took = await self._summary(call, _notes.transcript(gap, call.messages), compact)
            except (BudgetExceeded, InvalidInput) as error:
                if isinstance(error, BudgetExceeded) and call.on_exceed == "refuse":
                    raise
                what = error.resource if isinstance(error, BudgetExceeded) else str(error)
                return spend, work, notes, f", outlined: no summary could be made ({what})"
            spend, work = spend + cost, work + took
            if text.strip():
                notes[i] = _notes.told(gap, call.messages, text, self.reversible)
        return spend, work, notes, ", summarised"

    async def _summary(self, call: Call, transcript: str, compact: int) -> tuple[str, Spend, Work]:
        """Asks for a summary on an account that leaves the answer its compacted prompt and output."""
        role = "summariser" if "summariser" in call.engines else "answer"
        if role not in call.engines:
            raise InvalidInput("the call has no engine")
        words = max(10, int(self.note * 0.6))
        prompt = SUMMARY_PROMPT.format(words=words, transcript=transcript)
        ask = replace(
            call.on_behalf(self.name),
            messages=({"role": "user", "content": prompt},),
            account=call.account.child(self.name, self._leaving_room(call, compact + self.note)),
            sampling=Sampling(seed=call.sampling.seed, max_tokens=self.note, deterministic=call.sampling.deterministic),
            extra={},
        )
        ask = replace(ask, labels=replace(ask.labels, role=role))
        answer = await call.engines[role].generate(ask)
        return answer.text, answer.spend, answer.work

    def _leaving_room(self, call: Call, prompt: int) -> Budget:
        """What is left beside the answer's prompt and its output: its max_tokens, or as many as `note`. Raises
        BudgetExceeded where nothing is."""
        output = call.keep + (self.note if call.sampling.max_tokens is None else call.sampling.max_tokens)
        needs = {"input": prompt, "output": output, "tokens": prompt + output, "calls": 1}
        limits: dict[str, int] = {}
        for resource, left in call.account.remaining().items():
            if resource in needs:
                limits[resource] = int(left) - needs[resource]
                if limits[resource] <= 0:
                    raise BudgetExceeded(call.account.path, resource, left, 0, needs[resource], 1)
        return Budget(**limits)

    @staticmethod
    def _build(messages: Sequence[Message], gaps: Sequence[Gap], notes: Sequence[str]) -> tuple[Message, ...]:
        """The messages with a note for each gap; system messages inside a gap stay."""
        starts = {gap.groups[0].start: note for gap, note in zip(gaps, notes, strict=True)}
        gone = {i for gap in gaps for g in gap.groups for i in range(g.start, g.stop)}
        kept: list[Any] = []
        note = ""
        for i, message in enumerate(messages):
            note = starts.get(i, note)
            if i in gone and message.get("role") not in SYSTEM_ROLES:
                continue
            if note and i not in gone:
                message, note = _notes.place(kept, note, message), ""
            kept.append(message)
        return tuple(kept)

    def _cache(
        self, call: Call, messages: Sequence[Message], counter: Counter, before: int, after: int
    ) -> tuple[dict[str, Any], str]:
        """What the provider's cache would have had, and has, of the turn before."""
        past = tuple(previous_turn(call.messages))
        earlier = _Conversation.of(past, counter)
        cut = self._cut(earlier)
        gaps = self._gaps(earlier, cut, self._asked_back(earlier, cut))
        # a summary may come out in other words: what follows it counts as new
        notes = ["" if self.older == "summary" else self._plain(g, past, counter) for g in gaps]
        sent = self._build(past, gaps, notes)
        shared = counter.messages(messages[: common_prefix(sent, messages)])
        return cache_report(counter.messages(past), counter.messages(sent), shared, before, after, self.cached_price)


@dataclass(frozen=True, slots=True)
class _Conversation:
    """Messages in groups, with their sizes."""

    messages: Sequence[Message]
    groups: list[Group]
    sizes: list[int]

    @classmethod
    def of(cls, messages: Sequence[Message], counter: Counter) -> _Conversation:
        found = groups(messages)
        return cls(messages, found, [counter.messages(messages[g.start : g.stop]) for g in found])

    @property
    def asked(self) -> list[int]:
        """Numbers of groups that the model had before it when it was asked, each time; last, all of them."""
        spoke = [i for i, g in enumerate(self.groups) if self.messages[g.start].get("role") == "assistant"]
        return [*[i for i in spoke if i], len(self.groups)]

    @property
    def last_user(self) -> int:
        """Index of the group with the last user message; -1 without one."""
        users = [i for i, g in enumerate(self.groups) if self.messages[g.start].get("role") == "user"]
        return users[-1] if users else -1

    def pinned(self, first: int) -> set[int]:
        """Indices of system groups and of the first others."""
        others = [i for i, g in enumerate(self.groups) if not g.system]
        return {i for i, g in enumerate(self.groups) if g.system} | set(others[:first])


def cut_at(
    sizes: Sequence[int],
    pinned: set[int],
    asked: Sequence[int],
    *,
    most: int,
    target: int,
    recent: int,
    note: int,
) -> int:
    """The index before which groups go, pinned ones excepted, after replaying a conversation turn by turn.

    `sizes` [n] are tokens of groups, `asked` the rising numbers of groups of which the model was asked. At each, where
    pinned groups, the note and what follows the cut pass `most`, the cut moves on until they are within `target`, and
    never into the last `recent` groups. A longer conversation cuts at the same place until it passes `most` again.

    >>> cut_at([10] * 5, set(), [1, 3, 5], most=40, target=25, recent=1, note=5)
    3
    >>> cut_at([10] * 6, set(), [1, 3, 5, 6], most=40, target=25, recent=1, note=5)
    3
    """
    free = [0]
    for i, size in enumerate(sizes):
        free.append(free[-1] + (0 if i in pinned else size))
    whole = [0]
    for size in sizes:
        whole.append(whole[-1] + size)
    cut = 0
    for end in asked:
        limit = max(cut, end - recent)

        def left(at: int, end: int = end) -> int:
            return whole[end] - free[at] + (note if free[at] else 0)

        if left(cut) > most:
            while cut < limit and left(cut) > target:
                cut += 1
    return cut


def recall(messages: Sequence[Message], ref: str) -> tuple[Message, ...]:
    """The messages that a mark's ref stands for, of the conversation as it was before it was compacted: for a
    program that shows them, or offers them as a tool. Raises InvalidInput for a ref that is not there."""
    first, _, last = ref.removeprefix("#").partition("-")
    found = groups(messages)
    refs = [g.ref for g in found]
    if first not in refs or (last or first) not in refs[refs.index(first) :]:
        raise InvalidInput(
            f"ref {ref!r} names no messages of this conversation: give one of a mark, such as #{refs[0]}"
            if refs
            else f"ref {ref!r}: the conversation has no messages"
        )
    start = refs.index(first)
    stop = refs.index(last or first, start)
    return tuple(messages[found[start].start : found[stop].stop])


def _room(call: Call) -> int | None:
    """Input tokens that the account still has for this call; None where it has no limit."""
    left = call.account.remaining()
    rooms = [int(left["input"])] if "input" in left else []
    if "tokens" in left:
        rooms.append(int(left["tokens"]) - 1 - call.keep)
    return min(rooms) if rooms else None
