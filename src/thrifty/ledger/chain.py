"""The hash chain, the keys that sign its heads, and anchors.

Every writer process has a chain of its own. It starts at a hash of who the writer is, and each entry adds

    hash = SHA-256(hash before + canonical JSON of the entry)

so an entry fixes all that came before it in its chain. Whoever can write the file can compute a whole chain anew,
though: only what was signed with a key that they lack (a checkpoint), or was kept where they cannot write (an
anchor), holds against that.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import orjson

from thrifty.errors import InvalidInput
from thrifty.ledger.columns import canonical

Head: TypeAlias = tuple[str, int, str]
"""A chain's name, the number of its last entry (from 1; 0 for none), and that entry's hash in hexadecimal."""

KeySource: TypeAlias = "bytes | str | Path"
"""A secret of at least 16 bytes, or the path of a file that holds one, or an Ed25519 key in PEM (bytes or file)."""

_PEM = b"-----BEGIN"
_LARGEST_FILE = 1 << 24


class Key(Protocol):
    """Signs heads and checks signatures. `id` tells keys apart and gives nothing away."""

    @property
    def algorithm(self) -> str:
        """hmac-sha256 or ed25519"""

    @property
    def id(self) -> str:
        """16 hexadecimal digits"""

    def sign(self, data: bytes) -> str:
        """The signature in hexadecimal. Raises InvalidInput for a public key."""

    def matches(self, data: bytes, signature: str) -> bool:
        """Whether the signature is this key's, of this data."""


@dataclass(frozen=True, slots=True)
class HmacKey:
    """HMAC-SHA256: who can check can also sign, so keep the key from whoever can write the ledger."""

    secret: bytes = field(repr=False)
    algorithm: str = field(default="hmac-sha256", init=False)

    @property
    def id(self) -> str:
        return self.sign(b"thrifty ledger key")[:16]

    def sign(self, data: bytes) -> str:
        return hmac.new(self.secret, data, hashlib.sha256).hexdigest()

    def matches(self, data: bytes, signature: str) -> bool:
        return hmac.compare_digest(self.sign(data).encode(), signature.encode())


class Ed25519Key:
    """Ed25519 (RFC 8032), from the optional package `cryptography`: the public half checks and cannot sign."""

    algorithm = "ed25519"

    def __init__(self, pem: bytes) -> None:
        try:
            from cryptography.hazmat.primitives import serialization
            from cryptography.hazmat.primitives.asymmetric import ed25519
        except ImportError as error:
            raise InvalidInput("an Ed25519 key needs the package `cryptography`: install it") from error
        self._private: Any = None
        try:
            if b"PRIVATE" in pem:
                self._private = serialization.load_pem_private_key(pem, password=None)
                self._public: Any = self._private.public_key()
            else:
                self._public = serialization.load_pem_public_key(pem)
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"the PEM key cannot be read: {error}") from error
        if not isinstance(self._public, ed25519.Ed25519PublicKey):
            raise InvalidInput("the PEM key is not an Ed25519 key: make one, or use an HMAC key")
        raw = self._public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.id = hashlib.sha256(b"thrifty ledger key" + raw).hexdigest()[:16]

    def sign(self, data: bytes) -> str:
        if self._private is None:
            raise InvalidInput("a public key cannot sign: open the ledger with the private key")
        return bytes(self._private.sign(data)).hex()

    def matches(self, data: bytes, signature: str) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self._public.verify(bytes.fromhex(signature), data)
        except (InvalidSignature, ValueError):
            return False
        return True


def load_key(source: KeySource) -> Key:
    """A key from its bytes or its file. Raises InvalidInput when it is too short or cannot be read."""
    data = source if isinstance(source, bytes) else _read(Path(source), 1 << 16, "key file")
    if data.lstrip().startswith(_PEM):
        return Ed25519Key(data)
    if len(data) < 16:
        raise InvalidInput(f"a key of {len(data)} bytes: at least 16 are needed, such as os.urandom(32)")
    return HmacKey(data)


def genesis(ledger: str, name: str, opened: int, host: str, pid: int) -> bytes:
    """What the first entry of a chain follows: it fixes whose chain this is."""
    return hashlib.sha256(canonical(["thrifty ledger chain", ledger, name, opened, host, pid])).digest()


def link(before: bytes | bytearray, data: bytes) -> bytes:
    """The hash of an entry whose canonical JSON is `data`, after the one with hash `before`."""
    return hashlib.sha256(before + data).digest()


# -- checkpoints -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Signed heads of the chains that grew since the checkpoint before, so that all checkpoints together cover all
    chains. `number` counts from 1 without gaps; `before` is the hash of the previous one, empty for the first."""

    number: int
    body: str
    algorithm: str
    key: str
    signature: str

    @property
    def hash(self) -> str:
        """What the next checkpoint and anchors name this one by."""
        whole = canonical([self.number, self.body, self.algorithm, self.key, self.signature])
        return hashlib.sha256(whole).hexdigest()

    def content(self) -> dict[str, Any]:
        """The signed statement: ledger, number, before, at, heads. Raises ValueError when it is no such JSON."""
        data = orjson.loads(self.body)
        if not isinstance(data, dict) or data.get("number") != self.number:
            raise ValueError("its number is not the one that was signed")
        data["heads"] = _heads(data["heads"])
        return data


def make_checkpoint(key: Key, ledger: str, number: int, before: str, at: int, heads: Sequence[Head]) -> Checkpoint:
    """Signs heads."""
    body = canonical({"ledger": ledger, "number": number, "before": before, "at": at, "heads": list(heads)})
    return Checkpoint(number, body.decode(), key.algorithm, key.id, key.sign(body))


# -- anchors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Anchor:
    """All heads at one moment, kept outside the ledger, on a disk that its writers cannot change."""

    ledger: str
    at: int
    heads: tuple[Head, ...]
    checkpoints: int = 0
    """how many checkpoints there were"""
    checkpoint: str = ""
    """hash of the last one"""

    def dump(self, key: Key | None = None) -> bytes:
        """The anchor file: one JSON line, signed where there is a key."""
        body = {
            "thrifty_anchor": 1,
            "ledger": self.ledger,
            "at": self.at,
            "heads": [list(head) for head in self.heads],
            "checkpoints": self.checkpoints,
            "checkpoint": self.checkpoint,
        }
        if key is not None:
            body |= {"algorithm": key.algorithm, "key": key.id, "signature": key.sign(canonical(body))}
        return canonical(body) + b"\n"


def read_anchor(path: Path, key: Key | None = None) -> tuple[Anchor, bool | None]:
    """An anchor file, and whether its signature is the key's (None: it has none, or no key was given).

    Raises InvalidInput when the file is no anchor.
    """
    try:
        body = orjson.loads(_read(path, _LARGEST_FILE, "anchor"))
        if body.pop("thrifty_anchor") != 1:
            raise ValueError("written by a newer Thrifty")
        signed = {name: body.pop(name) for name in ("algorithm", "key", "signature") if name in body}
        heads, last = _heads(body["heads"]), str(body["checkpoint"])
        anchor = Anchor(str(body["ledger"]), int(body["at"]), heads, int(body["checkpoints"]), last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is not an anchor of a ledger: {error}") from error
    if key is None or "signature" not in signed:
        return anchor, None
    return anchor, key.matches(canonical({"thrifty_anchor": 1, **body}), str(signed["signature"]))


def _heads(data: Any) -> tuple[Head, ...]:
    heads = tuple((name, seq, head) for name, seq, head in data)
    if not all(isinstance(n, str) and type(s) is int and s >= 0 and isinstance(h, str) for n, s, h in heads):
        raise ValueError("a head is not a chain's name, a number and a hash")
    return heads


def _read(path: Path, most: int, kind: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InvalidInput(f"{kind} {path} cannot be read: {error.strerror or error}") from error
    if len(data) > most:
        raise InvalidInput(f"{kind} {path} is larger than {most:,} bytes: it is not one")
    return data
