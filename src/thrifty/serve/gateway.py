"""One request through the gateway: who asks, by which plan, who pays, what came back.

    authorise -> admit -> plan -> upstream -> record

`Gateway` knows no HTTP. `app.py` reads requests and writes responses; what it shows of a stream it gets through the
`emit` of the call, so a slow client slows its own upstream and nobody else's.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from thrifty.call import Answer, Call, Emit, Receipt
from thrifty.errors import BudgetExceeded, InvalidInput, LedgerError
from thrifty.ledger import Ledger
from thrifty.plan import Pipeline, Plan
from thrifty.serve.keys import Key, Keyring, Refused
from thrifty.serve.owners import Chain, Owners
from thrifty.serve.policy import Loaded
from thrifty.serve.records import Observers, Record
from thrifty.serve.upstreams import Upstreams
from thrifty.serve.wire import Asked
from thrifty.spend import total_spend, total_work


@dataclass(slots=True)
class Gateway:
    """All that one process serves by. Make it with `Gateway(loaded, keyring, ledger)`."""

    loaded: Loaded
    keyring: Keyring
    ledger: Ledger | None = None
    observers: Observers = field(default_factory=Observers)
    clock: Callable[[], float] = time.time
    rng: random.Random = field(default_factory=random.Random)
    draining: bool = False
    running: int = 0
    owners: Owners = field(init=False)
    upstreams: Upstreams = field(init=False)
    _pipelines: dict[tuple[str, str], Pipeline] = field(default_factory=dict)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.owners = Owners(self.loaded, self.ledger, self.clock)
        self.upstreams = Upstreams(self.loaded)
        self._pipelines = self._build(self.loaded, self.upstreams)
        self._idle.set()
        self.keyring.refresh()

    # -- who, and what ---------------------------------------------------------------------------------------------

    def authorise(self, authorization: str | None, record: Record) -> Key:
        """The key of a request. Raises Refused (401, and 503 while draining)."""
        if self.draining:
            raise Refused(503, "the gateway is shutting down: try another replica", "server_error", "draining", 1.0)
        key = self.keyring.find(authorization)
        record.key, record.key_name, record.team = key.id, key.name, key.team
        return key

    def choose(self, key: Key, alias: str, wanted: str | None, record: Record) -> Pipeline:
        """The pipeline for a model and a plan (from a header, else the key's, else the model's). Raises Refused for
        what is not there (404) or not the key's (403)."""
        policy = self.loaded.policy
        rule = policy.models.get(alias)
        if rule is None or (key.models and alias not in key.models):
            raise Refused(404, f"no model {alias!r} for this key: GET /v1/models lists them", code="model_not_found")
        plan = wanted or key.plan or rule.plan or "plain"
        if plan not in self.loaded.plans:
            raise Refused(404, f"no plan {plan!r} in this gateway's policy", code="plan_not_found")
        if wanted and key.plans and plan not in key.plans:
            raise Refused(403, f"this key may not choose plan {plan!r}", "permission_error", "plan_not_allowed")
        ups = [rule.upstream] if isinstance(rule.upstream, str) else rule.upstream
        if key.upstreams and not set(ups) <= set(key.upstreams):
            raise Refused(403, f"this key may not use what answers for {alias!r}", "permission_error", "not_allowed")
        plan = self._arm(plan, wanted, record)
        pipeline = self.pipeline(alias, plan)
        record.alias, record.plan, record.plan_hash = alias, plan, pipeline.plan.hash
        record.model, record.upstream = pipeline.engine.model, ups[0]
        return pipeline

    def pipeline(self, alias: str, plan: str) -> Pipeline:
        """A plan on the engine of a model. Raises Refused (400) where the engine lacks what the plan needs."""
        found = self._pipelines.get((alias, plan))
        if found is None:
            try:
                found = _pipeline(self.loaded.plans[plan], alias, self.upstreams)
            except InvalidInput as error:
                raise Refused(400, f"plan {plan!r} cannot serve model {alias!r}: {error}", code="plan_error") from error
            self._pipelines[alias, plan] = found
        return found

    def models(self, key: Key) -> list[str]:
        """The aliases that a key may name."""
        return [m for m in self.loaded.policy.models if not key.models or m in key.models]

    # -- answering ---------------------------------------------------------------------------------------------------

    async def answer(
        self, key: Key, asked: Asked, record: Record, wanted: str | None = None, emits: list[Emit] | None = None
    ) -> list[Answer]:
        """One answer for each prompt and choice, in order. `emits` has a listener for each where it is a stream.

        Raises Refused for what the client can mend or wait for, EngineError when every upstream failed.
        """
        pipeline = self.choose(key, asked.model, wanted, record)
        chain = await self._chain(key)
        self.owners.enter(chain)
        self._begin()
        try:
            self.observers.started(record)
            try:
                return await self._answers(pipeline, chain, asked, record, emits)
            except BudgetExceeded as error:
                lower = key.on_exceed or self._team(key)
                if not lower or lower == asked.model or _seen(emits):
                    raise
                return await self._degraded(key, lower, chain, asked, record, emits, error)
        except BudgetExceeded as error:
            raise self.owners.refusal(error, chain) from error
        except InvalidInput as error:
            raise Refused(400, str(error)) from error
        except LedgerError as error:
            raise Refused(503, "the ledger cannot be written: nothing was sent", "server_error", "ledger") from error
        finally:
            self.owners.leave(chain)
            self._end()

    async def _answers(
        self, pipeline: Pipeline, chain: Chain, asked: Asked, record: Record, emits: list[Emit] | None
    ) -> list[Answer]:
        calls = self._calls(pipeline, chain, asked, emits)
        if len(calls) == 1:
            answers = [await pipeline(calls[0])]
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(pipeline(call)) for call in calls]
            except BaseExceptionGroup as several:
                raise _first(several) from several
            answers = [task.result() for task in tasks]
        note(record, answers)
        return answers

    def _calls(self, pipeline: Pipeline, chain: Chain, asked: Asked, emits: list[Emit] | None) -> list[Call]:
        sampling = asked.sampling
        if sampling.max_tokens is None and (most := self.loaded.policy.models[asked.model].max_tokens) is not None:
            sampling = replace(sampling, max_tokens=most)
        account = chain[-1].meter.account
        calls: list[Call] = []
        for prompt in asked.prompts:
            for choice in range(asked.n):
                seed = None if sampling.seed is None else sampling.seed + choice
                calls.append(
                    Call(
                        tuple(prompt),
                        account,
                        asked.tools,
                        asked.context,
                        sampling=sampling if seed == sampling.seed else replace(sampling, seed=seed),
                        emit=emits[len(calls)] if emits else None,
                        extra=asked.extra,
                    )
                )
        return calls

    async def _degraded(
        self,
        key: Key,
        lower: str,
        chain: Chain,
        asked: Asked,
        record: Record,
        emits: list[Emit] | None,
        error: BudgetExceeded,
    ) -> list[Answer]:
        """The answers of the cheaper model that the key or team falls to when its budget refuses."""
        pipeline = self.pipeline(lower, self.loaded.policy.models[lower].plan or "plain")
        record.plan_hash, record.model = pipeline.plan.hash, pipeline.engine.model
        lowered = replace(asked, model=lower)
        answers = await self._answers(pipeline, chain, lowered, record, emits)
        receipt = Receipt("gateway", True, f"{error.account} has no {error.resource} left: {lower!r} answered instead")
        answers = [a.with_receipt(receipt) for a in answers]
        note(record, answers)
        return answers

    def _team(self, key: Key) -> str:
        team = self.loaded.policy.teams.get(key.team)
        return (team.on_exceed or "") if team else ""

    def _arm(self, plan: str, wanted: str | None, record: Record) -> str:
        shadow = self.loaded.policy.shadow
        if not shadow.share or wanted is not None or plan == (shadow.plan or "plain"):
            return plan
        chosen = self.rng.random() < shadow.share
        record.arm = "reference" if chosen else "plan"
        return (shadow.plan or "plain") if chosen else plan

    async def _chain(self, key: Key) -> Chain:
        try:
            return await self.owners.chain(key)
        except LedgerError as error:
            raise Refused(503, "the ledger cannot be read: nothing was sent", "server_error", "ledger") from error

    # -- reloading, draining -------------------------------------------------------------------------------------------

    async def reload(self, loaded: Loaded) -> None:
        """Takes a new policy: requests under way end by the old one. Raises InvalidInput and changes nothing when a
        plan does not fit its model."""
        upstreams = Upstreams(loaded)
        pipelines = self._build(loaded, upstreams)
        old = self.upstreams
        self.loaded, self.upstreams, self._pipelines = loaded, upstreams, pipelines
        self.owners.apply(loaded)
        task = asyncio.create_task(_close_later(old, self))
        _CLOSING.add(task)
        task.add_done_callback(_CLOSING.discard)

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for those under way; whether all ended in time."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        """Closes the upstreams."""
        await self.upstreams.aclose()

    def _begin(self) -> None:
        self.running += 1
        self._idle.clear()

    def _end(self) -> None:
        self.running -= 1
        if not self.running:
            self._idle.set()

    @staticmethod
    def _build(loaded: Loaded, upstreams: Upstreams) -> dict[tuple[str, str], Pipeline]:
        """A pipeline for every model and its own plan: what cannot work is found now."""
        found: dict[tuple[str, str], Pipeline] = {}
        for alias, model in loaded.policy.models.items():
            plan = model.plan or "plain"
            try:
                found[alias, plan] = _pipeline(loaded.plans[plan], alias, upstreams)
            except InvalidInput as error:
                raise InvalidInput(f"models.{alias}: {error}") from error
        return found


def note(record: Record, answers: list[Answer]) -> None:
    """Writes what answers cost and did into a record."""
    record.spend = total_spend([a.spend for a in answers])
    record.work = total_work([a.work for a in answers])
    record.receipts = tuple(r for a in answers for r in a.receipts)
    record.finish = answers[0].finish
    record.estimated = any(a.estimated for a in answers)
    record.upstream_seconds = record.work.engine_seconds


def _pipeline(plan: Plan, alias: str, upstreams: Upstreams) -> Pipeline:
    engines = {"answer": upstreams.engine(alias)}
    for role in plan.needs():
        if role != "answer":
            spec = plan.engines.get(role)
            engines[role] = upstreams.role(spec) if spec else engines["answer"]
    return plan.build(engines)


def _seen(emits: list[Emit] | None) -> bool:
    """Whether a client has seen a part of its answer."""
    return any(getattr(emit, "__self__", None) is not None and emit.__self__.begun for emit in emits or ())  # type: ignore[attr-defined]


def _first(several: BaseExceptionGroup[BaseException]) -> BaseException:
    first = several.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


_CLOSING: set[asyncio.Task[None]] = set()


async def _close_later(old: Upstreams, gateway: Gateway) -> None:
    """Closes replaced upstreams when the requests that may still use them are over."""
    for _ in range(36_000):
        if not gateway.running:
            break
        await asyncio.sleep(0.1)
    await old.aclose()
