"""Revocation: a file beside a certificate that says that it holds no longer, and why. It is written once and stays.

It names the certificate by its hash, so a new certificate in the same place is not revoked by an old file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import orjson

from thrifty.tune.certificate import write_whole

VERSION = 1


@dataclass(frozen=True)
class Revocation:
    """Why and when a certificate ceased to hold. `samples`, `mean` and `capital` are the drift monitor's."""

    certificate: str
    """its hash"""
    at: str
    reason: str
    samples: int = 0
    mean: float = 0.0
    capital: float = 0.0


def revocation_path(certificate: str | Path) -> Path:
    """The file that revokes a certificate: `certificate.json` has `certificate.revoked.json`."""
    return Path(certificate).with_suffix(".revoked.json")


def revoke(certificate: str | Path, revocation: Revocation) -> Revocation:
    """Writes the revocation beside a certificate, once: where there is one, it stays and is returned.

    Raises: ThriftyError when it cannot be written.
    """
    path = revocation_path(certificate)
    body = {"thrifty_revocation": VERSION, **asdict(revocation)}
    data = orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    try:
        write_whole(path, data, fresh=True)
    except FileExistsError:
        known = revocation_of(certificate, revocation.certificate)
        if known is not None:
            return known
        write_whole(path, data)  # what stands there is about a certificate that was there before
    return revocation


def revocation_of(certificate: str | Path, hash: str) -> Revocation | None:
    """The revocation beside the file of a certificate with this hash; None where there is none, or one of a
    certificate that was there before. A file that cannot be read revokes too."""
    path = revocation_path(certificate)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        return Revocation("", "", f"{path} cannot be read: {error.strerror or error}")
    try:
        body = orjson.loads(data)
        found = Revocation(**{f.name: body[f.name] for f in fields(Revocation)})
    except (ValueError, TypeError, KeyError):
        return Revocation("", "", f"{path} stands beside it and cannot be read")
    return found if found.certificate == hash else None
