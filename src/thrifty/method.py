"""Methods: one way each to save tokens, as middleware around what is below it.

A method is a frozen dataclass whose fields are its knobs. It is one of four kinds, and subclasses one of four bases:

- Rewrite: changes only the call; `__call__` and `open` both work by themselves.
- Policies: attaches white-box policies to the call; works in `__call__` and `open` alike.
- Search: uses `next` many times, or `next.open`; it has no `open` of its own.
- Whole: needs the complete answer from below; it has no `open`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol

from thrifty.call import Answer, Branch, Call, Delta, Emit
from thrifty.errors import InvalidInput, PlanError, nearest
from thrifty.policy import Part, Policy
from thrifty.spend import total_spend, total_work

STAGES: Mapping[str, int] = {
    "route": 0,
    "prompt": 1,
    "context": 2,
    "vision": 3,
    "attention": 4,
    "cache": 5,
    "decode": 6,
}
"""Where each family stands, from the caller to the engine. `search` and `agent` may stand anywhere above `vision`."""

FLOATING = ("search", "agent")
FAMILIES = (*STAGES, *FLOATING)


class Next(Protocol):
    """What is below a method."""

    async def __call__(self, call: Call) -> Answer:
        """The whole answer of what is below."""

    async def open(self, call: Call) -> Branch:
        """A generation in progress, with all policies from below applied."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a knob allows, so that it can be checked and searched."""

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    log: bool = False

    def describe(self) -> str:
        """In words: 'from 0 to 1', 'one of a, b'."""
        if self.choices:
            return "one of " + ", ".join(str(c) for c in self.choices)
        if self.low is None and self.high is None:
            return "any"
        if self.high is None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.low is None else f"from {self.low:g} to {self.high:g}"


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
    log: bool = False,
) -> Any:
    """A method's tunable setting: default, what it does, and its range (`log`: search it on a log scale)."""
    return field(default=default, metadata={"knob": Range(help, low, high, choices, log)})


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. Class variables describe it; dataclass fields made with `knob` are its settings."""

    name: ClassVar[str] = ""
    """as registered and written in TOML; the file's name with hyphens"""
    kind: ClassVar[Literal["rewrite", "policy", "search", "whole"]]
    paper: ClassVar[str] = ""
    """title and identifier of the source, or what the baseline is"""
    version: ClassVar[int] = 1
    """raise it when results with the same knobs would differ"""
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    """capabilities of the answering engine"""
    roles: ClassVar[Mapping[str, frozenset[str]]] = {}
    """other engines it uses, by role, and the capabilities each needs"""
    parts: ClassVar[frozenset[Part]] = frozenset()
    """what its policies decide; two scorers, stores or routers in a plan are refused"""
    combines: ClassVar[frozenset[Part]] = frozenset()
    """parts of other methods that it combines, and so may stand beside"""
    identity: ClassVar[Mapping[str, Any] | None] = None
    """knob values that make it a no-op; None: there are none, and `no_identity` says why"""
    no_identity: ClassVar[str] = ""
    remembers: ClassVar[bool] = False
    """it keeps something from call to call (a cache): the same call again may cost less, and its receipt may differ"""

    @property
    def family(self) -> str:
        """The folder it lives in: the family of its module's path, or `third_party`."""
        parts = type(self).__module__.split(".")
        return next((p for p in reversed(parts) if p in FAMILIES), "third_party")

    def __post_init__(self) -> None:
        for f in fields(self):
            check_knob(self.name, f.name, getattr(self, f.name), f)

    @classmethod
    def knobs(cls) -> dict[str, tuple[Any, Range]]:
        """Default and range of every knob, in order."""
        return {f.name: (f.default, f.metadata["knob"]) for f in fields(cls) if "knob" in f.metadata}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Method:
        """A method from what TOML says. Raises InvalidInput for an unknown knob or a value out of its range."""
        known = cls.knobs()
        for key in settings:
            if key not in known:
                raise InvalidInput(nearest(key, known, f"knob of {cls.name!r}"))
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)

    def settings(self) -> dict[str, Any]:
        """Every knob's value, as TOML has it."""
        values = {name: getattr(self, name) for name in self.knobs()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

    async def __call__(self, call: Call, next: Next) -> Answer:
        """Answers the call with the help of what is below."""
        raise NotImplementedError(f"{type(self).__name__} does not answer calls")

    async def open(self, call: Call, next: Next) -> Branch:
        """Opens a branch through this method."""
        raise PlanError(f"{self.name!r} needs the whole answer and cannot be opened as a branch: put it further up")


@dataclass(frozen=True, kw_only=True)
class Rewrite(Method):
    """Changes only the call. Subclasses write `rewrite`, which leaves a receipt on the call it returns."""

    kind = "rewrite"

    async def rewrite(self, call: Call) -> Call:
        """The changed call, with this method's receipt."""
        raise NotImplementedError(f"{type(self).__name__} rewrites nothing")

    async def __call__(self, call: Call, next: Next) -> Answer:
        changed = await self.rewrite(call)
        own = changed.receipts[len(call.receipts) :]
        spend, work = total_spend(r.spend for r in own), total_work(r.work for r in own)
        if not spend and not work:
            return await next(changed)

        def charge(answer: Answer) -> Answer:
            return dataclasses.replace(answer, spend=answer.spend + spend, work=answer.work + work)

        if changed.emit is not None:
            changed = dataclasses.replace(changed, emit=_charging(changed.emit, charge))
        return charge(await next(changed))

    async def open(self, call: Call, next: Next) -> Branch:
        """What rewriting cost is in the receipt and on the account, not in the branch's own Spend."""
        return await next.open(await self.rewrite(call))


@dataclass(frozen=True, kw_only=True)
class Policies(Method):
    """Attaches policies. Subclasses write `policies`, which gives new policy objects, one set a call."""

    kind = "policy"

    def policies(self, call: Call) -> tuple[Policy, ...]:
        """New policy objects for one call; their receipts tell whether they fired."""
        raise NotImplementedError(f"{type(self).__name__} attaches nothing")

    def _attach(self, call: Call) -> Call:
        new = self.policies(call)
        for policy in new:
            policy.method = policy.method or self.name
        return dataclasses.replace(call, policies=(*call.policies, *new))

    async def __call__(self, call: Call, next: Next) -> Answer:
        """What its policies' probes cost, which the engine bills apart, is part of the answer's Spend."""
        if any(policy.method == self.name for policy in call.policies):
            return await next(self._attach(call))  # one of the same name above charges for both

        def charge(answer: Answer) -> Answer:
            own = [r for r in answer.receipts[len(call.receipts) :] if r.method == self.name]
            spend, work = total_spend(r.spend for r in own), total_work(r.work for r in own)
            return dataclasses.replace(answer, spend=answer.spend + spend, work=answer.work + work)

        attached = self._attach(call)
        if attached.emit is not None:
            attached = dataclasses.replace(attached, emit=_charging(attached.emit, charge))
        return charge(await next(attached))

    async def open(self, call: Call, next: Next) -> Branch:
        """What probes cost is in the receipt and on the account, not in the branch's own Spend."""
        return await next.open(self._attach(call))


@dataclass(frozen=True, kw_only=True)
class Search(Method):
    """Opens or calls what is below it several times."""

    kind = "search"
    opens: ClassVar[bool] = False
    """True: it uses `next.open`, so nothing below it may be a Whole or a Search"""


@dataclass(frozen=True, kw_only=True)
class Whole(Method):
    """Needs the complete answer, or may call no engine at all."""

    kind = "whole"


def _charging(emit: Emit, charge: Callable[[Answer], Answer]) -> Emit:
    """An emit whose last delta carries the charged Answer."""

    async def charged(delta: Delta) -> None:
        if delta.answer is not None:
            delta = dataclasses.replace(delta, answer=charge(delta.answer))
        await emit(delta)

    return charged


def check_knob(method: str, name: str, value: Any, f: dataclasses.Field[Any]) -> None:
    """Raises InvalidInput when a knob's value has the wrong type or is out of its range."""
    if "knob" not in f.metadata:
        return
    allowed: Range = f.metadata["knob"]
    default = f.default
    problem = ""
    if allowed.choices:
        if value not in allowed.choices:
            problem = allowed.describe()
    elif isinstance(default, bool):
        problem = "" if isinstance(value, bool) else "true or false"
    elif isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            problem = f"a whole number {allowed.describe()}"
    elif isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            problem = f"a number {allowed.describe()}"
    elif isinstance(default, str):
        problem = "" if isinstance(value, str) else "text"
    elif isinstance(default, tuple):
        problem = _check_list(value, default, allowed)
    if not problem and isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = allowed.low, allowed.high
        if (low is not None and value < low) or (high is not None and value > high):
            problem = allowed.describe()
    if problem:
        raise InvalidInput(f"{method}: knob {name} = {value!r} is not allowed: {problem} is needed")


def _check_list(value: Any, default: tuple[Any, ...], allowed: Range) -> str:
    """A knob whose default is a tuple takes a tuple of the same kind of element, each within the range."""
    kind = type(default[0]) if default else object
    kinds = (int, float) if kind is float else (kind,)
    good = isinstance(value, tuple) and all(isinstance(x, kinds) and not isinstance(x, bool) for x in value)
    if good and (allowed.low is not None or allowed.high is not None):
        low = -math.inf if allowed.low is None else allowed.low
        good = all(low <= x <= (math.inf if allowed.high is None else allowed.high) for x in value)
    word = {int: "whole numbers", float: "numbers", str: "texts"}.get(kind, "values")
    return "" if good else f"a list of {word}, each {allowed.describe()},"
