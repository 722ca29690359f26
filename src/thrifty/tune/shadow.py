"""The guard of a certified plan in production: serves it, watches a sample against the reference, falls back for good.

    async with Guard(certified, reference, "certificate.json", account=Account("shadow", Budget(usd=10**10))) as guard:
        answer = await guard.ask("...")

Each request is drawn with a fixed chance by a keyed hash of its number, which has nothing to do with what it asks, so
traffic cannot choose to be looked at. For a drawn request the reference answers too, after the user has been served, on
an account of its own. Their answers are compared as in calibration, and the losses go to an e-process (`drift.py`). At
its alarm the certificate is revoked by a file beside it, and from then on every process that guards it serves the
reference.

Invariants:
- no failure of a shadow run, of its account or of the monitor's file reaches the user; all are counted;
- losses are bet on in the order in which requests came, not in which they were finished: what differs may take longer;
- which drawn requests are left out is decided before their outcome could matter (no room on the shadow account, too
  many under way, a temperature above 0, where the reference would differ from itself). A shadow run that was begun and
  failed counts as agreement: that can hide drift, and `status` shows how many there were, but cannot raise a false
  alarm.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thrifty.budget import Account, Budget
from thrifty.call import Answer, Call, Message
from thrifty.errors import BudgetExceeded, InvalidInput, ThriftyError
from thrifty.plan import Pipeline
from thrifty.tune.certificate import Certificate
from thrifty.tune.drift import DriftMonitor, EProcess
from thrifty.tune.revocation import Revocation, revocation_of, revoke

_log = logging.getLogger(__name__)

RATE = 0.02
EPSILON = 0.01


def comparable(answer: Answer) -> str | None:
    """What two answers are compared by: the final answer, normalised; None where there is none.

    >>> comparable(Answer("I think #### Forty  Two.")), comparable(Answer("  "))
    ('forty two', None)
    """
    from thrifty.bench.scorers import final_answer, normalised

    return normalised(final_answer(answer.final)) or None


def disagreement(served: Answer, reference: Answer) -> float:
    """The loss `disagree`: 0 where both have the same final answer, else 1; none agrees with nothing."""
    ours = comparable(served)
    return float(ours is None or ours != comparable(reference))


@dataclass(frozen=True)
class Sampler:
    """Draws requests by their name with a chance of `rate`, by HMAC-SHA256: who lacks the key cannot tell which.

    >>> sampler = Sampler(0.25, b"a key of sixteen bytes, at least")
    >>> sum(sampler.draws(str(i)) for i in range(10_000))
    2502
    """

    rate: float
    key: bytes

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise InvalidInput(f"rate {self.rate}: the share of requests to look at, above 0 and at most 1, is needed")
        if len(self.key) < 16:
            raise InvalidInput(f"a key of {len(self.key)} bytes: at least 16 are needed, such as os.urandom(32)")

    def draws(self, request: str) -> bool:
        """Whether this request is looked at."""
        digest = hmac.digest(self.key, request.encode("utf-8", "surrogatepass"), "sha256")
        return int.from_bytes(digest[:8]) < self.rate * 2**64


@dataclass(frozen=True)
class Status:
    """Where a guard stands. `counts`: requests `served` and `drawn` by this guard; of the drawn ones those `compared`,
    `left out` (no room, too many under way, temperature above 0), `lost` (the shadow run failed) and `void` (the user
    got no answer). `state` is the monitor's, of all guards of this certificate and before restarts too."""

    revoked: Revocation | None
    state: EProcess
    counts: dict[str, int]
    spent: Any
    """Spend of the shadow account"""
    fault: str | None
    """the last failure of the monitor or of the revocation, in words: nothing is watched while it lasts"""


class Guard:
    """See the top of the module. A guard is called as a Pipeline is, in one event loop; `aclose` waits for shadow runs
    under way. Several guards, of several processes too, share a certificate, its monitor and its revocation.

    `alpha` is the certificate's where it certifies `disagree`; for another loss name the rate of differing answers that
    is to be borne. `epsilon`: the chance of a false alarm, ever. `each`: what one shadow run may spend, taken from
    `account` before it begins, so that whether a request is looked at does not depend on its length. `monitor`: the
    drift monitor's file, beside the certificate by default. `at_once` shadow runs at a time, `waiting` in all, each
    given up after `timeout` seconds.

    Raises: InvalidInput for pipelines whose plans, model or dtype are not the certificate's, and for what `Sampler` and
    `DriftMonitor` refuse.
    """

    def __init__(
        self,
        certified: Pipeline,
        reference: Pipeline,
        certificate: str | Path,
        *,
        account: Account,
        each: Budget | None = None,
        rate: float = RATE,
        epsilon: float = EPSILON,
        alpha: float | None = None,
        key: bytes | None = None,
        monitor: str | Path | None = None,
        at_once: int = 4,
        waiting: int = 256,
        timeout: float = 300.0,
    ) -> None:
        self.path = Path(certificate)
        self.certificate = Certificate.load(self.path)
        self._hash = self.certificate.hash
        _check_plans(self.certificate, certified, reference)
        if alpha is None:
            if self.certificate.claim.loss != "disagree":
                raise InvalidInput(
                    f"the certificate bounds {self.certificate.claim.loss!r}, which production cannot measure: give "
                    "alpha, the rate of answers that may differ from the reference's"
                )
            alpha = self.certificate.claim.alpha
        self.certified, self.reference = certified, reference
        self.account, self.each, self.timeout = account, each, timeout
        self.sampler = Sampler(rate, secrets.token_bytes(32) if key is None else key)
        self.monitor = DriftMonitor(
            self.path.with_suffix(f".{self._hash[:12]}.drift.db") if monitor is None else monitor,
            self._hash,
            alpha=alpha,
            epsilon=epsilon,
        )
        self._name = secrets.token_hex(8)
        self._counts: Counter[str] = Counter()
        self._number = 0
        self._line = _Line()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(at_once)
        self._waiting = waiting
        self._feeding = asyncio.Lock()
        self._fault: str | None = None
        self._revoked: Revocation | None = None
        self._on_file = False
        state = self.monitor.state
        if state.alarm and self.revoked is None:  # a crash between the alarm and the revocation
            try:
                self._revoke(state)
            except ThriftyError as error:
                self._note(f"the revocation could not be written: {error}")

    @property
    def revoked(self) -> Revocation | None:
        """Why the certificate was revoked, here or by another process; None while it holds."""
        if self._revoked is None:
            self._revoked = revocation_of(self.path, self._hash)
        return self._revoked

    def status(self) -> Status:
        """Where it stands."""
        return Status(self.revoked, self.monitor.state, dict(self._counts), self.account.settled, self._fault)

    async def __call__(self, call: Call, *, request: str | None = None) -> Answer:
        """The certified plan's answer, or the reference's once the certificate is revoked.

        `request` names it for the draw, such as a trace id that the client did not choose; a number otherwise.
        """
        self._counts["served"] += 1
        self._number += 1
        if self.revoked is not None:
            return await self.reference(call)
        if not self.sampler.draws(f"{self._name}/{self._number}" if request is None else request):
            return await self.certified(call)
        self._counts["drawn"] += 1
        reserved = self._reserve(call)
        if reserved is None:
            self._counts["left out"] += 1
            return await self.certified(call)
        place = self._line.enter()
        try:
            served = await self.certified(call)
        except BaseException:
            self._counts["void"] += 1
            reserved.close()
            self._line.leave(place, None)
            raise
        task = asyncio.create_task(self._shadow(call, served, reserved, place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return served

    def call(self, prompt: str | Sequence[Message], account: Account | None = None, **fields: Any) -> Call:
        """As of a Pipeline."""
        return self.certified.call(prompt, account, **fields)

    async def ask(self, prompt: str | Sequence[Message], account: Account | None = None, **fields: Any) -> Answer:
        """As of a Pipeline."""
        return await self(self.call(prompt, account, **fields))

    async def drain(self) -> None:
        """Waits until the shadow runs of requests served so far are compared."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def aclose(self) -> None:
        """Waits for shadow runs, then closes the monitor's file; the pipelines stay open. Idempotent."""
        await self.drain()
        self.monitor.close()

    async def __aenter__(self) -> Guard:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    # -- details -------------------------------------------------------------------------------------------------

    def _reserve(self, call: Call) -> Account | None:
        """The account of a shadow run; None where the request is left out. Depends on nothing that is asked."""
        if call.sampling.temperature not in (None, 0, 0.0) or len(self._tasks) >= self._waiting:
            return None
        try:
            if self.each is not None:
                return self.account.reserve("run", self.each)
            if _spent(self.account):
                return None
            return self.account.child("run")
        except Exception as error:  # a closed account too: the user is served in any case
            if not isinstance(error, BudgetExceeded):
                self._note(f"no shadow run can be begun: {error}")
            return None

    async def _shadow(self, call: Call, served: Answer, account: Account, place: int) -> None:
        loss = 0.0
        outcome = "lost"
        try:
            async with self._room:
                with account:
                    bare = replace(call, account=account, emit=None, receipts=())
                    answer = await asyncio.wait_for(self.reference(bare), self.timeout)
                    if not _starved(answer, account, self.reference):
                        loss, outcome = disagreement(served, answer), "compared"
        except Exception as error:  # the shadow's failure is not the user's
            _log.info("a shadow run failed: %s", error)
        finally:
            account.close()
            self._counts[outcome] += 1
            self._line.leave(place, loss)
        await self._feed()

    async def _feed(self) -> None:
        """Bets on the losses whose turn it is, and revokes at an alarm."""
        async with self._feeding:
            losses = self._line.ready()
            if not losses:
                return
            try:
                state = await asyncio.to_thread(self.monitor.observe, *losses)
            except Exception as error:
                self._note(f"{len(losses)} comparisons could not be recorded: {error}")
                return
            self._fault = None
            if state.alarm and not self._on_file:
                try:
                    await asyncio.to_thread(self._revoke, state)
                except Exception as error:
                    self._note(f"the revocation could not be written: {error}")

    def _revoke(self, state: EProcess) -> None:
        reason = (
            f"drift: lately about {state.lately:.2g} of sampled answers differed from the reference's, and at most "
            f"{state.alpha:.3g} of them may (of all {state.samples:,} sampled {state.mean:.2g} did; the chance of a "
            f"false alarm is at most {state.epsilon:g})"
        )
        at = datetime.now(UTC).isoformat(timespec="seconds")
        revocation = Revocation(self._hash, at, reason, state.samples, state.mean, state.peak)
        self._revoked = revocation  # also where the file cannot be written: this process falls back
        self._revoked = revoke(self.path, revocation)
        self._on_file = True
        _log.warning("%s is revoked: %s", self.path, reason)

    def _note(self, fault: str) -> None:
        self._fault = fault
        _log.warning("the guard of %s: %s", self.path, fault)


class _Line:
    """Losses in the order of their requests: a later one waits until all before it are known or void."""

    def __init__(self) -> None:
        self._next = 0
        self._entered = 0
        self._known: dict[int, float | None] = {}

    def enter(self) -> int:
        self._entered += 1
        return self._entered - 1

    def leave(self, place: int, loss: float | None) -> None:
        self._known[place] = loss

    def ready(self) -> list[float]:
        losses = []
        while self._next in self._known:
            loss = self._known.pop(self._next)
            self._next += 1
            if loss is not None:
                losses.append(loss)
        return losses


def _starved(answer: Answer, account: Account, reference: Pipeline) -> bool:
    """Whether the shadow's own limits cut the reference's answer short, so that it is not what calibration saw."""
    cut = answer.finish == "budget" or any(r.method == "budget" and r.fired for r in answer.receipts)
    if not cut:
        return False
    return not reference.plan.budget.limits() or _spent(account)


def _spent(account: Account) -> bool:
    """Whether nothing is left of what every answer needs."""
    return any(account.room(name) == 0 for name in ("tokens", "input", "output", "calls", "usd"))


def _check_plans(certificate: Certificate, certified: Pipeline, reference: Pipeline) -> None:
    for what, pipeline, wanted in (
        ("certified", certified, certificate.plan_hash),
        ("reference", reference, certificate.reference_hash),
    ):
        if pipeline.plan.hash != wanted:
            raise InvalidInput(
                f"the {what} pipeline runs plan {pipeline.plan.hash}, and the certificate is about {wanted}: build "
                "that plan"
            )
    engine = certified.engine
    if (engine.model, engine.dtype) != (certificate.model, certificate.dtype):
        raise InvalidInput(
            f"the certificate is about model {certificate.model!r} in {certificate.dtype or 'no known dtype'}, not "
            f"{engine.model!r} in {engine.dtype or 'no known dtype'}: tune again on that one"
        )


__all__ = ["EPSILON", "RATE", "Guard", "Sampler", "Status", "comparable", "disagreement"]
