"""Generations that several plans share, and the two figures that follow: spend and incurred.

`CachingEngine` stands between a plan and an engine while one plan answers one example. What the plan is
charged (`spend`) is settled on the example's own account, as if the plan ran alone; what was really paid
(`incurred`) is settled on the run's account. A generation that an earlier plan asked for in exactly the same
way is replayed: charged in full, paid once.

The key is everything that the engine sees: its identity, the rendered messages with their images, tools,
unknown fields, prefix, draft, sampling with its seed, policies with their versions, what the account still
allows, the sample index, and how often this plan asked the same before. So a trace serves another plan only
if the engine saw the same budget; one that a budget cut short, or that has a deadline, is never shared."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from thrifty.bench.key import digest
from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Receipt, Until
from thrifty.context import render
from thrifty.engine import Embeddings, Engine
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.hold import Hold
from thrifty.ledger.entry import NO_LABELS, Entry, HoldRecord, Labels, Ticket
from thrifty.resources import amounts_of
from thrifty.spend import Spend, Work

_NOTHING, _NO_WORK = Spend(), Work()


class GenerationCache:
    """What the plans have generated for one example. Drop it with the example: it keeps every answer."""

    def __init__(self) -> None:
        self.entries: dict[str, asyncio.Future[_Shared | None]] = {}
        self.hits = 0


@dataclass(frozen=True, slots=True)
class Replayed(Labels):
    """Labels of an entry that is charged to the plan and was paid before."""


@dataclass
class Tally:
    """The ledger of one plan on one example: keeps its entries, and knows what the run's account refused."""

    run: Account
    entries: list[Entry] = field(default_factory=list)
    refused: BudgetExceeded | None = None
    """set when the run's account, and not the plan's, refused something"""
    _started: int = 0
    _mirrors: list[Hold] = field(default_factory=list)

    def append(self, entry: Entry, hold: str | None = None) -> _Done:
        """Keeps an entry."""
        self.entries.append(entry)
        return _Done()

    def open_hold(self, record: HoldRecord) -> str:
        """Never asked: holds that must survive a crash are written to the run's ledger."""
        return ""

    def drop_hold(self, hold: str) -> None:
        """See `open_hold`."""

    def paying(self, account: Account) -> Account:
        """An account below `account` whose holds are taken from the run's account too."""
        self._started += 1
        own = _Paying(str(self._started), parent=account)
        own.tally = self
        return own

    def hold(self, ask: Spend, work: Work, labels: Labels, durable: bool) -> Hold:
        """The run's share of a hold. Raises BudgetExceeded, and remembers it."""
        try:
            mirror = self.run.hold(ask, work, labels=labels, durable=durable)
        except BudgetExceeded as error:
            self.refused = self.refused or error
            raise
        self._mirrors.append(mirror)
        return mirror

    def close(self) -> None:
        """Gives back to the run's account what no engine has settled."""
        for mirror in self._mirrors:
            mirror.release()
        self._mirrors.clear()

    # -- sums ------------------------------------------------------------------------------------------------

    def spend(self) -> Spend:
        """As if the plan ran alone."""
        return _spend(self.entries)

    def work(self) -> Work:
        """As if the plan ran alone."""
        return _work(self.entries)

    def paid(self) -> tuple[Spend, Work]:
        """What this run paid."""
        own = [e for e in self.entries if not isinstance(e.labels, Replayed)]
        return _spend(own), _work(own)

    def by_role(self) -> dict[str, Spend]:
        """`spend` by the role of the engine."""
        roles: dict[str, Spend] = {}
        for entry in self.entries:
            roles[entry.labels.role] = roles.get(entry.labels.role, Spend()) + entry.spend
        return roles


class _Paying(Account):
    """The account of one generation: a leaf below the plan's account that the run's account pays for too."""

    tally: Tally

    def hold(
        self,
        ask: Spend = _NOTHING,
        work: Work = _NO_WORK,
        *,
        keep: int = 0,
        labels: Labels = NO_LABELS,
        durable: bool = False,
    ) -> Hold:
        mirror = self.tally.hold(ask, work, labels, durable)
        try:
            hold = super().hold(ask, work, keep=keep, labels=labels)
        except BaseException:
            mirror.release()
            raise
        both = _Both(**{f.name: getattr(hold, f.name) for f in fields(hold)})
        both.mirror, both.tally = mirror, self.tally
        return both


class _Both(Hold):
    """A hold on the plan's account and its mirror on the run's: they grow, settle and are released together."""

    mirror: Hold
    tally: Tally

    def grow(self, ask: Spend = _NOTHING, work: Work = _NO_WORK, *, keep: int | None = None) -> None:
        super().grow(ask, work, keep=keep)
        try:
            self.mirror.grow(ask, work)
        except BudgetExceeded as error:  # the plan's part stays held: this result will be dropped
            self.tally.refused = self.tally.refused or error
            raise

    def book(
        self, actual: Spend, work: Work = _NO_WORK, *, estimated: bool = False, labels: Labels | None = None
    ) -> tuple[Entry, Ticket | None]:
        entry, _ = super().book(actual, work, estimated=estimated, labels=labels)
        mirror = self.mirror
        if mirror.closed:  # the example was over before its engine settled: what was spent is settled still
            mirror = Hold(mirror.account, amounts_of(_NOTHING, _NO_WORK), 0, self.labels, self.opened)
        _, ticket = mirror.book(actual, work, estimated=estimated, labels=labels or self.labels)
        return entry, ticket  # who settles waits for the run's ledger: no result without its entries

    def release(self) -> None:
        super().release()
        self.mirror.release()


class CachingEngine:
    """An engine as one plan sees it on one example. `generate` and `embed` share; `open` passes through,
    counted."""

    def __init__(self, engine: Engine, cache: GenerationCache, tally: Tally, *, seed: int = 0, sample: int = 0) -> None:
        self.inner, self.cache, self.tally = engine, cache, tally
        self.name, self.model, self.dtype = engine.name, engine.model, engine.dtype
        self.capabilities = engine.capabilities
        self._scope = (seed, sample)
        self._asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        """Whatever else the engine has."""
        if name == "inner":  # not set yet: an engine that failed to be built
            raise AttributeError(name)
        return getattr(self.inner, name)

    def identity(self) -> Mapping[str, Any]:
        """The engine's own."""
        return self.inner.identity()

    def count(self, call: Call) -> int:
        """The engine's own."""
        return self.inner.count(call)

    async def generate(self, call: Call) -> Answer:
        """As the engine, or replayed. Raises what the engine raises, and BudgetExceeded for the run's
        account."""
        key = None if call.emit is not None or _has_deadline(call.account) else self._call_key(call)
        if key is None:
            return await self._generate(call)
        answer: Answer = await self._shared(
            key,
            lambda: self._generate(call),
            lambda answer: _freeze(answer, call),
            lambda shared: self._replay(shared, call),
        )
        return answer

    async def open(self, call: Call) -> Branch:
        """As the engine. What the branch and its forks settle is counted; it is not shared."""
        return await self.inner.open(replace(call, account=self.tally.paying(call.account)))

    async def advance(self, branches: Sequence[Branch], until: Until | int) -> None:
        """As the engine."""
        await self.inner.advance(branches, until)

    async def embed(self, texts: Sequence[str], account: Account, labels: Labels) -> Embeddings:
        """As the engine, or replayed."""

        async def fresh() -> Embeddings:
            return await self.inner.embed(texts, self.tally.paying(account), labels)

        key = self._key("embed", {"texts": list(texts), "room": account.remaining()})
        embeddings: Embeddings = await self._shared(
            key,
            fresh,
            lambda found: _Shared(found, found.spend, Work(), ()),
            lambda shared: self._charged(shared, account, labels, 0) and shared.value,
        )
        return embeddings

    async def aclose(self) -> None:
        """The engine belongs to the run, which closes it."""

    # -- details ---------------------------------------------------------------------------------------------

    async def _shared(
        self,
        key: str,
        fresh: Callable[[], Awaitable[Any]],
        freeze: Callable[[Any], _Shared | None],
        replay: Callable[[_Shared], Any],
    ) -> Any:
        found = self.cache.entries.get(key)
        if found is not None:
            shared = await asyncio.shield(found)
            replayed = replay(shared) if shared is not None else None
            if replayed is not None:
                self.cache.hits += 1
                return replayed
            return await fresh()
        promise: asyncio.Future[_Shared | None] = asyncio.get_running_loop().create_future()
        self.cache.entries[key] = promise
        try:
            value = await fresh()
            promise.set_result(freeze(value))
            return value
        finally:
            if not promise.done():  # it failed or was cancelled: those who wait must ask for themselves
                promise.set_result(None)
                self.cache.entries.pop(key, None)

    async def _generate(self, call: Call) -> Answer:
        return await self.inner.generate(replace(call, account=self.tally.paying(call.account)))

    def _replay(self, shared: _Shared, call: Call) -> Answer | None:
        if self._charged(shared, call.account, call.labels, call.keep) is None:
            return None
        answer: Answer = shared.value
        return replace(answer, receipts=(*call.receipts, *shared.receipts))

    def _charged(self, shared: _Shared, account: Account, labels: Labels, keep: int) -> bool | None:
        """Settles a replay on the plan's account; None when that does not allow it, so that the engine
        decides."""
        try:
            hold = account.hold(shared.spend, replace(shared.work, kv_bytes_peak=0, kv_bytes_mean=0.0), keep=keep)
        except BudgetExceeded:
            return None
        names = asdict(replace(labels, engine=self.name, model=self.model))
        hold.book(shared.spend, shared.work, labels=Replayed(**names))
        return True

    def _call_key(self, call: Call) -> str | None:
        """None for a call with fields that JSON cannot hold: it is not shared."""
        body = {
            "messages": [dict(m) for m in render(call)],
            "tools": [dict(t) for t in call.tools],
            "extra": dict(call.extra),
            "prefix": call.prefix,
            "draft": None if call.draft is None else asdict(call.draft),
            "sampling": asdict(call.sampling),
            "policies": [p.key() for p in call.policies],
            "keep": call.keep,
            "on_exceed": call.on_exceed,
            "room": call.account.remaining(),
        }
        try:
            return self._key("generate", body)
        except InvalidInput:
            return None

    def _key(self, kind: str, body: Mapping[str, Any]) -> str:
        base = digest([kind, dict(self.identity()), list(self._scope), dict(body)])
        self._asked[base] += 1
        return f"{base}/{self._asked[base]}"


@dataclass(frozen=True, slots=True)
class _Shared:
    """What can be replayed: the value, its cost, and the receipts that the engine added."""

    value: Any
    spend: Spend
    work: Work
    receipts: tuple[Receipt, ...]


class _Done:
    """A ticket of a ledger that is memory only."""

    def wait(self) -> None:
        """Committed already."""

    async def done(self) -> None:
        """Committed already."""


def _freeze(answer: Answer, call: Call) -> _Shared | None:
    """None for what another plan may not have: an answer that the budget cut, or whose receipts cannot be
    split."""
    passed = len(call.receipts)
    if answer.finish in ("budget", "cancelled", "error") or answer.receipts[:passed] != call.receipts:
        return None
    return _Shared(answer, answer.spend, answer.work, answer.receipts[passed:])


def _has_deadline(account: Account | None) -> bool:
    while account is not None:
        if account.budget.deadline is not None:
            return True
        account = account.parent
    return False


def _spend(entries: Sequence[Entry]) -> Spend:
    total = Spend()
    for entry in entries:
        total = total + entry.spend
    return total


def _work(entries: Sequence[Entry]) -> Work:
    total = Work()
    for entry in entries:
        total = total + entry.work
    return total
