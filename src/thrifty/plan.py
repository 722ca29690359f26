"""Plans: an ordered stack of methods, a budget, and engines by role; read from and written to TOML, hashed.

`Plan` is the data, `Pipeline` a plan built on engines. Everything that can be wrong with a plan is found when it is
built: unknown names, knobs out of range, a wrong order, a need that an engine does not provide, two parts that collide.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from thrifty import registry
from thrifty.budget import Account, Budget
from thrifty.call import Answer, Branch, Call, Message
from thrifty.engine import CAPABILITIES, Engine
from thrifty.engines.kinds import KNOWN
from thrifty.errors import InvalidInput, PlanError, nearest
from thrifty.method import FLOATING, STAGES, Method, Next

_MOST_BYTES = 1_000_000
ROLES = ("answer", "draft", "scorer", "embedder", "judge")
_KEYS = ("name", "on_exceed", "budget", "engines", "methods")


@dataclass(frozen=True)
class Plan:
    """A stack of methods, outermost first, with what one call may spend.

    >>> Plan.from_toml('name = "short"\\n[budget]\\noutput = 96').budget
    Budget(output=96)
    """

    name: str
    methods: tuple[Method, ...] = ()
    budget: Budget = Budget()
    engines: Mapping[str, str] = field(default_factory=dict)
    """engine specifications by role, such as `local:smollm2`; what is missing is given when the plan is built"""
    on_exceed: Literal["degrade", "refuse"] = "degrade"
    """when the budget cannot hold a call as asked: answer in fewer tokens, with a receipt, or refuse"""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise InvalidInput("a plan needs a name")
        if self.on_exceed not in ("degrade", "refuse"):
            raise InvalidInput(f"on_exceed = {self.on_exceed!r}: 'degrade' or 'refuse' is needed")
        for role in self.engines:
            if role not in ROLES:
                raise InvalidInput(nearest(role, ROLES, "engine role"))
        _check_order(self.methods)
        _check_parts(self.methods)

    @property
    def hash(self) -> str:
        """SHA-256 of all that changes results: methods with versions and every knob, budget, engines, on_exceed.

        The name is not part of it. Sixteen hexadecimal digits.
        """
        stack = [[m.name, m.version, m.settings()] for m in self.methods]
        body = {"methods": stack, "budget": self.budget.limits(), "engines": dict(self.engines)}
        text = json.dumps({**body, "on_exceed": self.on_exceed}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # -- TOML --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As TOML has it. Knobs at their defaults are written too, so that a plan means the same in a later version."""
        data: dict[str, Any] = {"name": self.name, "on_exceed": self.on_exceed}
        if self.budget.limits():
            data["budget"] = self.budget.to_dict()
        if self.engines:
            data["engines"] = dict(self.engines)
        if self.methods:
            data["methods"] = [{"use": m.name, **m.settings()} for m in self.methods]
        return data

    def to_toml(self) -> str:
        """The plan as a TOML document."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Reads what `to_dict` writes. Raises InvalidInput or PlanError, naming the nearest valid name."""
        for key in data:
            if key not in _KEYS:
                raise InvalidInput(nearest(key, _KEYS, "plan key"))
        stack = []
        for i, entry in enumerate(_a(list, data, "methods", [])):
            if not isinstance(entry, dict) or not isinstance(entry.get("use"), str):
                raise InvalidInput(f'method {i + 1} of the plan needs `use = "NAME"`')
            settings = {k: v for k, v in entry.items() if k != "use"}
            stack.append(registry.get(entry["use"]).from_settings(settings))
        engines = _a(dict, data, "engines", {})
        bad = next((r for r, spec in engines.items() if not isinstance(spec, str)), None)
        if bad is not None:
            raise InvalidInput(f"engine {bad} = {engines[bad]!r}: text such as 'local:smollm2' is needed")
        return cls(
            name=_a(str, data, "name", ""),
            methods=tuple(stack),
            budget=Budget.from_dict(_a(dict, data, "budget", {})),
            engines=engines,
            on_exceed=data.get("on_exceed", "degrade"),
        )

    @classmethod
    def from_toml(cls, text: str, source: str = "plan") -> Plan:
        """Reads a TOML document; errors start with `source`."""
        return cls._read(_toml(text, source), source)

    @classmethod
    def _read(cls, data: Mapping[str, Any], source: str) -> Plan:
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from error
        except InvalidInput as error:
            raise InvalidInput(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a TOML file. The plan's name defaults to the file's."""
        file = Path(path)
        try:
            with file.open("rb") as stream:
                read = stream.read(_MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"plan {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if len(read) > _MOST_BYTES:
            raise InvalidInput(f"plan {file}: over {_MOST_BYTES:,} bytes: it is no plan")
        try:
            text = read.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"plan {file}: cannot be read: not UTF-8 at byte {error.start}") from error
        return cls._read({"name": file.stem, **_toml(text, str(file))}, str(file))

    # -- building ----------------------------------------------------------------------------------------------

    def needs(self) -> dict[str, frozenset[str]]:
        """Capabilities that the plan needs, by role."""
        wanted: dict[str, set[str]] = {"answer": {"text"}}
        for method in self.methods:
            wanted["answer"] |= method.needs
            for role, needs in method.roles.items():
                wanted.setdefault(role, set()).update(needs)
        return {role: frozenset(needs) for role, needs in wanted.items()}

    def build(self, engines: Mapping[str, Engine] | Engine) -> Pipeline:
        """The plan on engines by role (one engine alone is `answer`). Raises PlanError for what they do not provide."""
        given = dict(engines) if isinstance(engines, Mapping) else {"answer": engines}
        for method in self.methods:
            if "route" not in method.parts:
                _check_engine(method.name, "answer", method.needs, given)
            for role, needs in method.roles.items():
                _check_engine(method.name, role, needs, given)
        _check_engine(f"plan {self.name}", "answer", frozenset({"text"}), given)
        return Pipeline(self, given)


@dataclass(frozen=True)
class Pipeline:
    """A plan built on engines: call it, or open a branch through it."""

    plan: Plan
    engines: Mapping[str, Engine]

    @property
    def engine(self) -> Engine:
        """The answering engine."""
        return self.engines["answer"]

    async def __call__(self, call: Call) -> Answer:
        """Answers one call within the plan's budget, below the call's own account."""
        if not call.messages and not call.context:
            raise InvalidInput("an empty prompt: give at least one message")
        with self._account(call) as account:
            return await self._stack()(self._enter(call, account))

    async def open(self, call: Call) -> Branch:
        """A branch through the plan. Its limits are those of the plan's budget on the call's account."""
        return await self._stack().open(self._enter(call, self._account(call)))

    def call(self, prompt: str | Sequence[Message], account: Account | None = None, **fields: Any) -> Call:
        """A Call for this pipeline: text or messages, on an account (a fresh unlimited one by default)."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InvalidInput("an empty prompt: give at least one message")
            prompt = ({"role": "user", "content": prompt},)
        return Call(messages=tuple(prompt), account=account or Account("thrifty"), **fields)

    async def ask(self, prompt: str | Sequence[Message], account: Account | None = None, **fields: Any) -> Answer:
        """`call` and answer it."""
        return await self(self.call(prompt, account, **fields))

    async def aclose(self) -> None:
        """Closes every engine."""
        for engine in {id(e): e for e in self.engines.values()}.values():
            await engine.aclose()

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def _account(self, call: Call) -> Account:
        return call.account.child(self.plan.hash, self.plan.budget)

    def _enter(self, call: Call, account: Account) -> Call:
        labels = replace(call.labels, plan=self.plan.hash)
        return replace(call, account=account, engines=self.engines, labels=labels, on_exceed=self.plan.on_exceed)

    def _stack(self) -> Next:
        below: Next = _Bottom(self.engine)
        for method in reversed(self.plan.methods):
            below = _Layer(method, below)
        return below


@dataclass(frozen=True, slots=True)
class _Bottom:
    engine: Engine

    async def __call__(self, call: Call) -> Answer:
        return await self.engine.generate(call)

    async def open(self, call: Call) -> Branch:
        return await self.engine.open(call)


@dataclass(frozen=True, slots=True)
class _Layer:
    method: Method
    below: Next

    async def __call__(self, call: Call) -> Answer:
        return await self.method(call, self.below)

    async def open(self, call: Call) -> Branch:
        return await self.method.open(call, self.below)


# -- checks ----------------------------------------------------------------------------------------------------


def _check_order(methods: Sequence[Method]) -> None:
    stage, above = 0, ""
    opener = ""
    for method in methods:
        family = method.family
        if family in FLOATING:
            if stage >= STAGES["vision"]:
                raise PlanError(
                    f"{method.name!r} ({family}) stands below {above!r}: put it above every white-box method"
                )
        elif family in STAGES:
            if STAGES[family] < stage:
                order = " > ".join(STAGES)
                raise PlanError(f"{method.name!r} ({family}) stands below {above!r}: the order is {order}")
            stage, above = STAGES[family], method.name
        if opener and method.kind in ("whole", "search"):
            raise PlanError(
                f"{opener!r} opens branches, and {method.name!r} below it needs whole answers: put that one above"
            )
        if getattr(method, "opens", False):
            opener = method.name


def _check_parts(methods: Sequence[Method]) -> None:
    owner: dict[str, Method] = {}
    for method in methods:
        for part in method.parts & {"scores", "store", "route"}:
            other = owner.get(part)
            if other is not None and part not in method.combines and part not in other.combines:
                raise PlanError(
                    f"{other.name!r} and {method.name!r} both decide {part}: keep one, or add one that combines them"
                )
            owner[part] = method


def _check_engine(who: str, role: str, needs: frozenset[str], engines: Mapping[str, Engine]) -> None:
    unknown = needs - CAPABILITIES
    if unknown:
        raise PlanError(nearest(sorted(unknown)[0], CAPABILITIES, f"capability that {who!r} needs:"))
    engine = engines.get(role)
    if engine is None:
        raise PlanError(f"{who!r} needs an engine for the role {role!r} with {_words(needs)}: name one under [engines]")
    missing = needs - engine.capabilities
    if missing:
        has = [e.name for e in engines.values() if missing <= e.capabilities]
        others = has or [name for name, caps in KNOWN.items() if missing <= caps]
        offer = f"engines that have it: {', '.join(sorted(set(others)))}" if others else "no engine here has it"
        raise PlanError(f"{who!r} needs {_words(missing)}, which engine {engine.name}:{engine.model} lacks; {offer}")


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{source}: not TOML: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise InvalidInput(f"{source}: TOML that cannot be read: {error}") from error


def _words(needs: frozenset[str]) -> str:
    return ", ".join(sorted(needs)) or "text"


def _a(kind: type, data: Mapping[str, Any], key: str, default: Any) -> Any:
    value = data.get(key, default)
    if not isinstance(value, kind):
        raise InvalidInput(f"plan {key} = {value!r}: a {kind.__name__} is needed")
    return value
