"""Who pays: the accounts of the gateway, its teams and its keys, each with limits over periods.

    gateway / TEAM / KEY / (plan) / ...

A key without a team belongs to `default`. Accounts are opened when first used and carry what the ledger has of them,
so a restart forgets nothing. This is one process; `leases` makes several of them share a limit exactly.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from thrifty.budget import Account
from thrifty.errors import BudgetExceeded
from thrifty.ledger import Ledger
from thrifty.limits import Budget
from thrifty.serve.keys import Key, Refused
from thrifty.serve.limits import Limit, parse_limits
from thrifty.serve.policy import Loaded
from thrifty.serve.windows import Meter
from thrifty.spend import Spend, Work

ROOT, NO_TEAM = "gateway", "default"


@dataclass(slots=True)
class Owner:
    """One level: its meter, and how many of its calls are under way."""

    meter: Meter
    parallel: int | None = None
    running: int = 0
    limits: tuple[Limit, ...] = ()


Chain = tuple[Owner, Owner, Owner]
"""Gateway, team and key."""


@dataclass(slots=True)
class Owners:
    """The tree of accounts. `clock` gives Unix seconds."""

    loaded: Loaded
    ledger: Ledger | None
    clock: Callable[[], float] = time.time
    _root: Owner | None = None
    _teams: dict[str, Owner] = field(default_factory=dict)
    _keys: dict[str, Owner] = field(default_factory=dict)
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def chain(self, key: Key) -> Chain:
        """Gateway, team and key of a key, opened if need be, their windows up to date."""
        found = self._known(key)
        if found is None:
            async with self._opening:
                found = await asyncio.to_thread(self._open, key)
        for level in found:
            level.meter.roll()
        owner = found[-1]
        if owner.limits != (mine := _limits_of(key)):
            owner.limits, owner.parallel = mine, key.parallel
            owner.meter.limit(mine)
        return found

    def _known(self, key: Key) -> Chain | None:
        team, owner = self._teams.get(key.team or NO_TEAM), self._keys.get(key.id)
        return None if self._root is None or team is None or owner is None else (self._root, team, owner)

    def enter(self, chain: Chain) -> None:
        """Takes a place among the calls under way. Raises Refused (429) where a level has no more."""
        for level in chain:
            if level.parallel is not None and level.running >= level.parallel:
                raise Refused(
                    429,
                    f"{level.meter.account.path}: {level.running} calls are under way, and {level.parallel} are "
                    "allowed at once: wait for one",
                    "rate_limit_error",
                    "parallel_calls",
                    1.0,
                )
        for level in chain:
            level.running += 1

    def leave(self, chain: Chain) -> None:
        """Gives the place back."""
        for level in chain:
            level.running -= 1

    def refusal(self, error: BudgetExceeded, chain: Chain) -> Refused:
        """A refusal that names the limit and when to come back: 429, or 400 where the request alone is too much."""
        for level in chain:
            account = level.meter.account
            if account.path != error.account:
                continue
            window = level.meter.binding(error.resource)
            if window is None:
                break
            wait = level.meter.frees(error.resource, error.asked + error.held)
            limit, spent = window.limit, account.total(error.resource) - window.base
            what = Budget(**{error.resource: _unit(error.resource, spent)}).to_dict()[error.resource]  # type: ignore[arg-type]
            text = f"{account.path}: the limit {limit} is used up: {what:g} {error.resource} are spent"
            if error.held:
                held = Budget(**{error.resource: _unit(error.resource, error.held)})  # type: ignore[arg-type]
                text += f" and {held.to_dict()[error.resource]:g} held by calls under way"
            rate = limit.period.rolls and limit.period.seconds <= 3600
            kind, code = ("rate_limit_error", "rate_limit_exceeded") if rate else (
                "insufficient_quota", "budget_exceeded"
            )  # fmt: skip
            if math.isinf(wait):
                return Refused(429, f"{text}; this request alone asks for more than it allows", kind, code)
            return Refused(429, f"{text}; come back in {wait:,.0f} s", kind, code, wait)
        return Refused(400, f"this request does not fit its plan's budget: {error}", code="plan_budget_exceeded")

    def apply(self, loaded: Loaded) -> None:
        """Takes a new policy: limits of levels that are open change at once, and keep what was spent."""
        self.loaded = loaded
        if self._root is not None:
            self._relimit(self._root, loaded.policy.limits(None), loaded.policy.gateway.parallel)
        for name, owner in self._teams.items():
            team = loaded.policy.teams.get(name)
            self._relimit(owner, loaded.policy.limits(name) if team else (), team.parallel if team else None)

    def state(self) -> dict[str, Any]:
        """Every open level, its windows and what is held, for the dashboard."""
        levels = [o for o in (self._root, *self._teams.values(), *self._keys.values()) if o is not None]
        return {
            o.meter.account.path: {"windows": o.meter.state(), "held": o.meter.account.held, "running": o.running}
            for o in levels
        }

    # -- opening: in a thread, for it reads the ledger ---------------------------------------------------------------

    def _open(self, key: Key) -> Chain:
        policy = self.loaded.policy
        if self._root is None:
            self._root = self._level(Account(ROOT, ledger=self.ledger), policy.limits(None), policy.gateway.parallel)
        name = key.team or NO_TEAM
        team = self._teams.get(name)
        if team is None:
            rules = policy.teams.get(name)
            account = self._root.meter.account.child(name)
            limits = policy.limits(name) if rules else ()
            team = self._level(account, limits, rules.parallel if rules else None)
        owner = self._keys.get(key.id) or self._level(team.meter.account.child(key.name), _limits_of(key), key.parallel)
        self._teams[name], self._keys[key.id] = team, owner
        return self._root, team, owner

    def _level(self, account: Account, limits: tuple[Limit, ...], parallel: int | None) -> Owner:
        if self.ledger is not None:
            rows = self.ledger.summary(by=(), where={"account": account.path})
            if rows:
                account.carry(rows[0].spend, rows[0].work)

        def used(resource: str, since: float) -> float:
            if self.ledger is None:
                return 0
            rows = self.ledger.summary(by=(), since=int(since * 1e9), where={"account": account.path})
            return _amount(rows[0].spend, rows[0].work, resource) if rows else 0

        return Owner(Meter(account, limits, used, self.clock), parallel, limits=limits)

    def _relimit(self, owner: Owner, limits: tuple[Limit, ...], parallel: int | None) -> None:
        owner.parallel = parallel
        if owner.limits != limits:
            owner.limits = limits
            owner.meter.limit(limits)


def _limits_of(key: Key) -> tuple[Limit, ...]:
    return _PARSED.setdefault(key.limits, None) or _parse(key.limits)


_PARSED: dict[tuple[str, ...], tuple[Limit, ...] | None] = {}


def _parse(texts: tuple[str, ...]) -> tuple[Limit, ...]:
    if len(_PARSED) > 10_000:
        _PARSED.clear()
    _PARSED[texts] = found = parse_limits(texts)
    return found


def _amount(spend: Spend, work: Work, resource: str) -> float:
    return float(getattr(spend, resource) if hasattr(spend, resource) else getattr(work, resource))


def _unit(resource: str, amount: float) -> float:
    return amount if resource == "engine_seconds" else int(amount)
