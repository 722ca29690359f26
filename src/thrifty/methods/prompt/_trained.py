"""Files that prompt methods were trained into: JSON, read once, checked whole, told by their SHA-256.

A plan's hash covers a file's name and not what is in it, so a method that reads one has a knob for the first digits of
its SHA-256, and every receipt shows them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from thrifty.errors import InvalidInput, ThriftyError

T = TypeVar("T")
MOST_BYTES = 64_000_000
DIGITS = 16


def read(method: str, path: str, kind: str, build: Callable[[Mapping[str, Any]], T], sha256: str = "") -> tuple[T, str]:
    """What `build` makes of the object in a file of `{"thrifty": kind, ...}`, and the file's digest. Built once for
    each state of the file. Raises InvalidInput, naming the method, for a file that cannot be read, is of another kind,
    or has another SHA-256 than the one given, and for what `build` refuses."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{method}: {path}: cannot be read: {why}: give a file that was trained for it") from error
    if stat.st_size > MOST_BYTES:
        raise InvalidInput(f"{method}: {path}: over {MOST_BYTES:,} bytes: it is no trained {kind}")
    built, digest = _built(method, path, kind, build, stat.st_mtime_ns, stat.st_size)
    if not digest.startswith(sha256.strip().lower()[:DIGITS]):
        raise InvalidInput(
            f"{method}: {path}: its SHA-256 begins {digest}, and knob sha256 says {sha256!r}: "
            "give the file that the plan was made with, or correct the knob"
        )
    return built, digest


@functools.lru_cache(maxsize=16)
def _built(
    method: str, path: str, kind: str, build: Callable[[Mapping[str, Any]], Any], changed: int, size: int
) -> tuple[Any, str]:
    try:
        body = Path(path).read_bytes()
        data = json.loads(body)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{method}: {path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict) or data.get("thrifty") != kind:
        raise InvalidInput(f'{method}: {path}: is no trained {kind}: it must begin {{"thrifty": "{kind}", ...}}')
    try:
        return build(data), hashlib.sha256(body).hexdigest()[:DIGITS]
    except InvalidInput as error:
        raise InvalidInput(f"{method}: {path}: {error}") from error


def write(path: str | Path, kind: str, data: Mapping[str, Any]) -> str:
    """Writes a file that `read` reads, whole or not at all, and gives its digest. Raises ThriftyError."""
    body = (json.dumps({"thrifty": kind, **data}, ensure_ascii=False) + "\n").encode()
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_bytes(body)
        os.replace(partial, target)
    except OSError as error:
        raise ThriftyError(f"{target}: cannot be written: {error.strerror or error}") from error
    return hashlib.sha256(body).hexdigest()[:DIGITS]
