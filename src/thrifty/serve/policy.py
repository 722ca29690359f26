"""The gateway's policy file: upstreams, the models that clients may name, plans, teams and limits, in one TOML.

    [server]
    ledger = "ledger.db"

    [upstreams.main]
    url = "http://127.0.0.1:8000/v1"
    key_env = "MAIN_KEY"

    [models.fast]
    upstream = "main"
    model = "qwen3-8b"
    plan = "plans/fast.toml"

    [teams.research]
    limits = ["usd=50/month", "calls=600/60s"]

Paths are relative to the file. Secrets are named by environment variable and never stand in it. `load` checks all of
it, plans included, so that a reload either takes a whole policy or changes nothing.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from thrifty.engines.openai.transport import base
from thrifty.errors import InvalidInput, ThriftyError, nearest
from thrifty.plan import Plan
from thrifty.serve.limits import Limit, parse_limits

_MOST_BYTES = 4_000_000
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,99}$"


def _limits(texts: list[str]) -> list[str]:
    parse_limits(texts)
    return texts


def _url(text: str) -> str:
    base(text)
    return text


Name = Annotated[str, Field(pattern=_NAME)]
Limits = Annotated[list[str], AfterValidator(_limits)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Server(_Section):
    """Where and how the gateway runs. Seconds; bytes."""

    host: str = "127.0.0.1"
    port: int = Field(default=8400, ge=0, le=65535)
    ledger: str = "thrifty-ledger.db"
    """a SQLite file, or the name of an environment variable with a postgresql:// address after `env:`"""
    state: str = "thrifty-state.db"
    """keys and the request log: likewise"""
    durability: Literal["process", "power"] = "process"
    on_state_failure: Literal["closed", "open"] = "closed"
    """when the database is gone: refuse requests (503), or answer and spool their entries"""
    admin_token_env: str = "THRIFTY_ADMIN_TOKEN"
    max_body: int = Field(default=32 * 2**20, ge=1024, le=2**30)
    drain: float = Field(default=30.0, ge=0, le=3600)
    log_text: bool = False
    """write prompts and answers to the log"""


class Upstream(_Section):
    """One OpenAI-compatible server, or the local engine (`engine = "local:smollm2"`)."""

    url: Annotated[str, AfterValidator(_url)] | None = None
    engine: str | None = None
    key_env: str | None = None
    kind: Literal["chat", "completions"] = "chat"
    timeout: float = Field(default=600.0, gt=0, le=86400)
    connect: float = Field(default=10.0, gt=0, le=600)
    retries: int = Field(default=2, ge=0, le=20)
    concurrency: int = Field(default=512, ge=1, le=100_000)
    capabilities: list[str] | None = None
    headers: dict[str, str] = {}


class Model(_Section):
    """A name that clients may ask for: what answers, and by which plan."""

    upstream: Name | list[Name]
    """one, or several among which the least loaded is taken"""
    model: str | None = None
    """the upstream's own name of the model; the alias by default"""
    plan: Name | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    """for requests that say none; lowered to what the budget leaves"""
    fallback: list[Name] = []
    """other models, tried in order when this one's upstreams fail"""


class Team(_Section):
    """What the keys of a team may spend together. `on_exceed`: a model to degrade to, or none: refuse."""

    limits: Limits = []
    parallel: int | None = Field(default=None, ge=1)
    on_exceed: Name | None = None


class Whole(_Section):
    """Limits of the whole gateway."""

    limits: Limits = []
    parallel: int | None = Field(default=None, ge=1)


class Shadow(_Section):
    """A random share of traffic runs the reference plan instead, so that savings can be measured."""

    share: float = Field(default=0.0, ge=0, le=1)
    plan: Name | None = None


class Policy(_Section):
    """All of the file. Make it with `load`."""

    server: Server = Server()
    upstreams: dict[Name, Upstream] = Field(min_length=1)
    models: dict[Name, Model] = Field(min_length=1)
    plans: dict[Name, str] = {}
    teams: dict[Name, Team] = {}
    gateway: Whole = Whole()
    shadow: Shadow = Shadow()
    prices: str | None = None
    """a price table (TOML), or `provider`: what genai-prices knows of each model"""

    def limits(self, team: str | None) -> tuple[Limit, ...]:
        """Parsed limits of a team; of the gateway for None."""
        return parse_limits(self.gateway.limits if team is None else self.teams[team].limits)


class Loaded:
    """A policy with its plans read: what a gateway runs by."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        self.policy, self.folder = policy, folder
        self.plans: dict[str, Plan] = {"plain": Plan("plain")}
        for name, path in policy.plans.items():
            self.plans[name] = Plan.load(folder / path)
        _check(self)

    @property
    def limits_usd(self) -> bool:
        """Whether a limit of the policy is in dollars; those of keys are not known here."""
        teams = [t.limits for t in self.policy.teams.values()]
        return any(
            limit.resource == "usd" for texts in (self.policy.gateway.limits, *teams) for limit in parse_limits(texts)
        )

    def path(self, text: str) -> Path:
        """A path of the policy, relative to its file."""
        return self.folder / Path(text).expanduser()

    def plan_of(self, alias: str, wanted: str | None) -> str:
        """The name of the plan for a model: the one asked for, else the model's own."""
        return wanted or self.policy.models[alias].plan or "plain"


def load(path: str | Path) -> Loaded:
    """Reads and checks a policy file and the plans that it names. Raises InvalidInput or PlanError, in one line."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            read = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"policy {file}: cannot be read: {error.strerror}") from error
    if len(read) > _MOST_BYTES:
        raise InvalidInput(f"policy {file}: over {_MOST_BYTES:,} bytes: it is no policy")
    try:
        data = tomllib.loads(read.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"policy {file}: not TOML: {error}") from error
    return of(data, file.parent, str(file))


def of(data: dict[str, Any], folder: Path, source: str = "policy") -> Loaded:
    """The policy in a document; `source` begins what is told of its errors."""
    try:
        return Loaded(Policy.model_validate(data), folder)
    except ValidationError as error:
        raise InvalidInput(f"{source}: {_told(error)}") from error
    except ThriftyError as error:
        raise InvalidInput(f"{source}: {error}") from error


def _told(error: ValidationError) -> str:
    """The first thing that is wrong, with its place; how many more there are. Given values are not repeated."""
    found = error.errors(include_url=False, include_input=False)
    first = found[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        section = _section(first["loc"])
        said = nearest(str(first["loc"][-1]), section, f"key at {place}")
    else:
        said = f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return said + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _section(place: tuple[int | str, ...]) -> list[str]:
    top: dict[str, type[BaseModel]] = {
        "server": Server, "upstreams": Upstream, "models": Model, "teams": Team, "gateway": Whole, "shadow": Shadow
    }  # fmt: skip
    kind: type[BaseModel] = Policy if len(place) == 1 else top.get(str(place[0]), Policy)
    return list(kind.model_fields)


def _check(loaded: Loaded) -> None:
    policy, plans = loaded.policy, loaded.plans
    if loaded.limits_usd and policy.prices is None:
        raise InvalidInput('limits in usd need prices: prices = "FILE.toml", or "provider" for what providers publish')
    for name, upstream in policy.upstreams.items():
        if (upstream.url is None) == (upstream.engine is None):
            raise InvalidInput(f"upstreams.{name}: either url or engine is needed")
    for alias, model in policy.models.items():
        ups = [model.upstream] if isinstance(model.upstream, str) else model.upstream
        if not ups:
            raise InvalidInput(f"models.{alias}.upstream: at least one is needed")
        _known(ups, policy.upstreams, f"upstream of models.{alias}")
        _known(model.fallback, policy.models, f"fallback of models.{alias}")
        _known([model.plan] if model.plan else [], plans, f"plan of models.{alias}")
        if alias in model.fallback:
            raise InvalidInput(f"models.{alias}.fallback: a model cannot fall back on itself")
    for name, team in policy.teams.items():
        _known([team.on_exceed] if team.on_exceed else [], policy.models, f"on_exceed of teams.{name}")
    _known([policy.shadow.plan] if policy.shadow.plan else [], plans, "plan of shadow")


def _known(names: list[str], known: Any, what: str) -> None:
    for name in names:
        if name not in known:
            raise InvalidInput(nearest(name, known, what))
