"""Certificates: what a tuning run has shown, with the losses it was computed from, so that anyone can compute it again.

A certificate names one plan and says: on requests like the calibration examples its mean loss is at most alpha. It is a
JSON file. Whoever can write the file can write another one, figures and losses alike: only a signature with a key that
they lack holds against that, as with the ledger's checkpoints.

A certificate that no longer holds is revoked by a file beside it (`revocation.py`); itself it never changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from thrifty.errors import InvalidInput, ThriftyError
from thrifty.ledger.chain import Key
from thrifty.ledger.columns import canonical
from thrifty.plan import Plan
from thrifty.tune.calibration import Claim, Use
from thrifty.tune.losses import Losses, range_of

VERSION = 1
_MOST_BYTES = 1 << 28
_SIGNED = ("algorithm", "key", "signature")
_PACKAGES = ("numpy", "scipy", "torch", "transformers")


class CertificateRefuted(ThriftyError):
    """A certificate does not verify: its figures do not follow from its losses, it was changed, or it was revoked."""

    exit_code = 5


@dataclass(frozen=True)
class Tested:
    """One plan that was tested, and its loss for each group of calibration examples."""

    plan: str
    """hash"""
    name: str
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Figure:
    """A measured mean with its two-sided interval at `level`, over `n` groups. Reported, not certified."""

    value: float
    low: float
    high: float
    level: float
    n: int

    def __post_init__(self) -> None:
        for name in ("value", "low", "high", "level"):
            object.__setattr__(self, name, float(getattr(self, name)))  # numpy's numbers too: what is hashed is JSON


@dataclass(frozen=True)
class Saving:
    """What the plan saves of one axis beside the reference: the share, and both means a request."""

    axis: str
    share: Figure
    reference: float
    plan: float

    def __post_init__(self) -> None:
        for name in ("reference", "plan"):
            object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True)
class SplitUsed:
    """How the calibration part was cut from one file: enough to cut it again."""

    data_hash: str
    """of the whole file"""
    shares: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """See the top of the module. `issue` makes one; `recompute` (in `recompute.py`) checks one.

    `delta` is what the test was made at; it is below the claim's where the examples had been used before. `tested` are
    the plans in the order of the test, `groups` the groups that their losses stand for. `order` is what was frozen.
    """

    plan_hash: str
    plan_toml: str
    reference_hash: str
    search_hash: str
    order: tuple[str, ...]
    data_hash: str
    split: SplitUsed | None = None
    uses: int
    delta: float | None
    spent: float | None
    """what all uses of these examples may be wrong with together"""
    model: str
    dtype: str
    engines: Mapping[str, Any]
    """identity of every engine that the plan uses, by role"""
    claim: Claim
    n: int
    """groups"""
    groups: tuple[str, ...]
    tested: tuple[Tested, ...]
    value: float
    """mean loss on the calibration examples"""
    p_value: float | None = None
    corrected: float | None = None
    """conformal risk control's corrected risk"""
    holdout: Figure | None = None
    """mean loss on examples that nothing was tuned or tested on"""
    saving: Saving | None = None
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    algorithm: str = ""
    key: str = ""
    signature: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of all but the signature."""
        return hashlib.sha256(self._body()).hexdigest()

    @property
    def plan(self) -> Plan:
        """The certified plan. Raises InvalidInput when it cannot be read here."""
        return Plan.from_toml(self.plan_toml, "the certificate's plan")

    def losses(self, tested: Tested) -> Losses:
        """The recorded losses of one tested plan. Raises InvalidInput for what are none."""
        import numpy as np

        low, high = range_of(self.claim.loss)
        return Losses(self.claim.loss, np.array(tested.losses), low, high, self.groups)

    def statement(self) -> str:
        """What is certified, in one sentence."""
        what = {
            "error": "mean error (1 - score)",
            "drop": "mean score lost against the reference",
            "disagree": "rate of answers that differ from the reference's",
        }[self.claim.loss]
        said = f"plan {self.plan_hash}: {what} at most {self.claim.alpha:g}"
        if self.delta is None:
            return f"{said} in expectation over calibration and the next request (conformal risk control, n = {self.n})"
        return f"{said}, wrong with a chance of at most {self.delta:g} ({self.claim.bound}, n = {self.n})"

    # -- signing -----------------------------------------------------------------------------------------------

    def sign(self, key: Key) -> Certificate:
        """The same certificate, signed. Raises InvalidInput for a public key."""
        bare = replace(self, algorithm=key.algorithm, key=key.id, signature="")
        return replace(bare, signature=key.sign(bare._signed()))

    def verify_signature(self, key: Key) -> bool | None:
        """Whether the signature is this key's, of this certificate; None where it has none."""
        if not self.signature:
            return None
        return key.algorithm == self.algorithm and key.id == self.key and key.matches(self._signed(), self.signature)

    # -- JSON --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = asdict(self)
        claim = data.pop("claim")
        delta_asked = claim.pop("delta")
        data |= {**claim, "delta_asked": delta_asked, "thrifty_certificate": VERSION}
        if not self.signature:
            for name in _SIGNED:
                del data[name]
        return data

    def to_json(self) -> str:
        """One JSON document, for people too; the long lists of losses come last."""
        data = self.to_dict()
        long = {name: data.pop(name) for name in ("groups", "tested")}
        first = {"thrifty_certificate": data.pop("thrifty_certificate")}
        head = orjson.dumps({**first, **data}, option=orjson.OPT_INDENT_2).decode()
        rows = ",\n    ".join(orjson.dumps(row).decode() for row in long["tested"])
        groups = orjson.dumps(long["groups"]).decode()
        return f'{head[:-2]},\n  "groups": {groups},\n  "tested": [\n    {rows}\n  ]\n}}\n'

    @classmethod
    def from_dict(cls, data: Any) -> Certificate:
        """The opposite of `to_dict`. Raises InvalidInput for what is no certificate."""
        from thrifty.tune.certificate_json import read

        return read(data)

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """The opposite of `to_json`. Raises InvalidInput for what is no certificate."""
        try:
            data = orjson.loads(text)
        except ValueError as error:
            raise InvalidInput(f"not JSON: {error}") from error
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all. Raises ThriftyError when it cannot be written."""
        write_whole(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Reads a file. Raises InvalidInput, beginning with its name, for what is no certificate."""
        file = Path(path)
        try:
            with file.open("rb") as stream:
                data = stream.read(_MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise InvalidInput(f"certificate {file} cannot be read: {why}") from error
        if len(data) > _MOST_BYTES:
            raise InvalidInput(f"{file} is larger than {_MOST_BYTES:,} bytes: it is no certificate")
        try:
            return cls.from_json(data)
        except InvalidInput as error:
            raise InvalidInput(f"{file} is no certificate that can be read here: {error}") from error

    def _body(self) -> bytes:
        return canonical({name: value for name, value in self.to_dict().items() if name not in _SIGNED})

    def _signed(self) -> bytes:
        return canonical({**orjson.loads(self._body()), "algorithm": self.algorithm, "key": self.key})


def issue(
    *,
    plan: Plan,
    reference: Plan,
    search_hash: str,
    order: Sequence[str],
    use: Use,
    tested: Sequence[tuple[Plan, Losses]],
    engines: Mapping[str, Any],
    split: SplitUsed | None = None,
    holdout: Figure | None = None,
    saving: Saving | None = None,
    date: datetime | None = None,
) -> Certificate:
    """The certificate of `plan`, one of those tested, in the order of the test; nothing in it is taken on trust.

    `engines` are identities by role (`thrifty.bench.key.identities`); `answer` names model and dtype.

    Raises: InvalidInput where the plan was not tested, where losses are of different groups or of another kind than
    claimed, and CertificateRefuted where the test does not certify this plan.
    """
    from thrifty.tune.recompute import recompute

    if not tested:
        raise InvalidInput("a certificate needs the losses of at least one tested plan")
    groups = tested[0][1].groups
    for other, losses in tested:
        if losses.groups != groups or losses.kind != use.claim.loss:
            raise InvalidInput(f"plan {other.name!r} was not tested on the same groups and loss as the first plan")
    rows = tuple(Tested(other.hash, other.name, tuple(losses.values.tolist())) for other, losses in tested)
    answer = engines.get("answer", {})
    bare = Certificate(
        plan_hash=plan.hash,
        plan_toml=plan.to_toml(),
        reference_hash=reference.hash,
        search_hash=search_hash,
        order=tuple(order),
        data_hash=use.data_hash,
        split=split,
        uses=use.k,
        delta=use.delta,
        spent=use.spent,
        model=str(answer.get("model", "")),
        dtype=str(answer.get("dtype", "")),
        engines=orjson.loads(orjson.dumps(dict(engines))),  # what was read from the file is then equal
        claim=use.claim,
        n=len(groups),
        groups=groups,
        tested=rows,
        value=0.0,
        holdout=holdout,
        saving=saving,
        date=(date or datetime.now(UTC)).isoformat(timespec="seconds"),
        versions=_versions(),
    )
    found = recompute(bare, figures=False)
    if not found.ok or found.value is None:
        raise CertificateRefuted(f"plan {plan.name!r} cannot be certified: {'; '.join(found.problems)}")
    return replace(bare, value=found.value, p_value=found.p_value, corrected=found.corrected)


def write_whole(path: Path, data: bytes, *, fresh: bool = False) -> None:
    """Writes a file so that it is there whole or not at all, also after a crash. `fresh`: only where there is none.

    Raises: ThriftyError when it cannot be written, FileExistsError where a fresh one was wanted.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            if fresh:
                os.link(name, path)
            else:
                os.replace(name, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    except OSError as error:
        if fresh and isinstance(error, FileExistsError) and path.exists():
            raise
        raise ThriftyError(f"{path}: cannot be written: {error.strerror or error}: name another file") from error


def _versions() -> dict[str, str]:
    import importlib.metadata

    from thrifty import __version__

    found = {"thrifty": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
