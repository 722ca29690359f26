"""Virtual keys: who may call, what they may use and spend. The key itself is shown once and stored as a hash.

A key is `sk-thrifty-` and 43 characters of randomness (256 bits), so a plain SHA-256 hides it: there is nothing to
guess. Look-ups are by that hash, so no comparison of secrets depends on how much of a guess was right.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from thrifty.errors import InvalidInput, ThriftyError
from thrifty.serve.limits import parse_limits

PREFIX = "sk-thrifty-"
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Key:
    """A virtual key. Empty `models`, `plans` or `upstreams` allow all; a header cannot widen them."""

    id: str
    name: str
    hash: str
    team: str = ""
    models: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    upstreams: tuple[str, ...] = ()
    plan: str = ""
    """its default, where a request names none"""
    limits: tuple[str, ...] = ()
    """as `limits.Limit` reads them"""
    parallel: int | None = None
    on_exceed: str = ""
    """a model to degrade to when its budget is used up; empty: refuse"""
    created: float = 0.0
    expires: float | None = None
    disabled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the hash."""
        return {
            "id": self.id,
            "name": self.name,
            "team": self.team,
            "models": list(self.models),
            "plans": list(self.plans),
            "upstreams": list(self.upstreams),
            "plan": self.plan,
            "limits": list(self.limits),
            "parallel": self.parallel,
            "on_exceed": self.on_exceed,
            "created": self.created,
            "expires": self.expires,
            "disabled": self.disabled,
        }

    def usable(self, now: float) -> bool:
        """Whether it is neither disabled nor past its end."""
        return not self.disabled and (self.expires is None or now < self.expires)


def hash_of(secret: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(name: str, **fields: Any) -> tuple[Key, str]:
    """A fresh key and its secret, which is shown once. Raises InvalidInput for a bad name, limit or number."""
    secret = PREFIX + secrets.token_urlsafe(32)
    key = Key(id=secrets.token_hex(6), name=name, hash=hash_of(secret), created=time.time(), **fields)
    check(key)
    return key, secret


def check(key: Key) -> None:
    """Raises InvalidInput for what a key cannot be."""
    if not key.name or len(key.name) > _LONGEST or "/" in key.name or not key.name.isprintable():
        raise InvalidInput(f"key name {key.name!r}: 1 to {_LONGEST} printable characters without '/' are needed")
    if key.parallel is not None and key.parallel < 1:
        raise InvalidInput(f"parallel = {key.parallel}: at least 1 is needed")
    parse_limits(key.limits, f"key {key.name}")


class KeyStore(Protocol):
    """Where keys are kept. Calls may block on a disk; a gateway keeps what it read and asks `version` for changes."""

    def all(self) -> Iterable[Key]:
        """Every key, disabled ones too."""

    def put(self, key: Key) -> None:
        """Adds a key, or replaces the one with its id. Raises InvalidInput where another key has its name."""

    def remove(self, id: str) -> None:
        """Removes a key. Raises InvalidInput where there is none."""

    def version(self) -> int:
        """Changes whenever a key does."""


class MemoryKeys:
    """Keys in memory: for tests, and for a gateway that is given them."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = {key.id: key for key in keys}
        self._version = 0

    def all(self) -> Iterable[Key]:
        return list(self._keys.values())

    def put(self, key: Key) -> None:
        if any(k.name == key.name and k.id != key.id for k in self._keys.values()):
            raise InvalidInput(f"key name {key.name!r} is taken: choose another")
        self._keys[key.id] = key
        self._version += 1

    def remove(self, id: str) -> None:
        if self._keys.pop(id, None) is None:
            raise InvalidInput(f"no key {id!r}: thrifty key list shows them")
        self._version += 1

    def version(self) -> int:
        return self._version


class Refused(ThriftyError):
    """A request that is refused before anything is spent: the HTTP status, OpenAI's error type and code, and seconds
    to wait where waiting helps."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str = "", wait: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.wait = status, kind, code, wait


@dataclass(slots=True)
class Keyring:
    """Keys by hash, as one gateway knows them; `refresh` takes over what has changed in the store."""

    store: KeyStore
    _by_hash: dict[str, Key] = field(default_factory=dict)
    _version: int | None = None

    def refresh(self) -> bool:
        """Reads the store again where it has changed; whether it had."""
        version = self.store.version()
        if version == self._version:
            return False
        self._by_hash = {key.hash: key for key in self.store.all()}
        self._version = version
        return True

    def find(self, authorization: str | None) -> Key:
        """The key of an Authorization header. Raises Refused (401), with one answer for all that is wrong."""
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        key = None
        if scheme.lower() == "bearer" and 0 < len(secret) <= _LONGEST:
            key = self._by_hash.get(hash_of(secret))
        if key is None or not key.usable(time.time()):
            raise Refused(
                401,
                "no valid API key: send one as 'Authorization: Bearer KEY' (thrifty key create makes them)",
                "authentication_error",
                "invalid_api_key",
            )
        return key

    def all(self) -> list[Key]:
        """Every key known."""
        return sorted(self._by_hash.values(), key=lambda k: k.name)

    def named(self, id: str) -> Key:
        """A key by id or name. Raises InvalidInput."""
        for key in self._by_hash.values():
            if id in (key.id, key.name):
                return key
        raise InvalidInput(f"no key {id!r}: thrifty key list shows them")

    def change(self, id: str, **fields: Any) -> Key:
        """Changes a key in the store and here."""
        key = replace(self.named(id), **fields)
        check(key)
        self.store.put(key)
        self.refresh()
        return key
