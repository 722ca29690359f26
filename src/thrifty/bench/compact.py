"""Measured results as they are committed: `results/SUITE/MODEL.jsonl.gz`, without anything that a model
wrote.

A line a plan and example with score, Spend, Work and which methods fired; reasons, error messages and answers
are left out, because they can quote the model. The same results give the same bytes. `store.read` reads it
back."""

from __future__ import annotations

import gzip
import io
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from thrifty.bench.head import model_of
from thrifty.bench.store import Contents, Result, encode
from thrifty.errors import InvalidInput

MOST_BYTES = 5 * 1024**2
"""Largest committed file."""


def compact(contents: Contents, suite: str, engine: str) -> Contents:
    """The finished results of one suite and answering engine, stripped, in a fixed order."""
    results = [r for r in contents.results if r.suite == suite and r.engine == engine and r.score is not None]
    results.sort(key=lambda r: (r.task_hash, r.seed, r.sample, r.plan, r.plan_hash))
    heads = [h for h in contents.heads if h.get("suite") == suite and h.get("engine") == engine]
    return Contents(tuple(_stripped(r) for r in results), tuple(_merged(heads)))


def write(contents: Contents, folder: str | Path) -> list[Path]:
    """Writes `FOLDER/SUITE/MODEL.jsonl.gz` for each suite and answering engine of the results; returns the
    paths.

    Raises InvalidInput when there is nothing finished, or a file would be over 5 MB (nothing is written
    then)."""
    pairs = dict.fromkeys((r.suite, r.engine) for r in contents.results if r.score is not None)
    if not pairs:
        raise InvalidInput("there is no finished result to write")
    made: dict[Path, bytes] = {}
    for suite, engine in pairs:
        part = compact(contents, suite, engine)
        path = Path(folder) / file_name(suite) / f"{file_name(model_of(part.heads, engine))}.jsonl.gz"
        if path in made:
            raise InvalidInput(f"two engines of these results share the file {path}: split the results by engine")
        made[path] = pack(part)
        size = len(made[path])
        if size > MOST_BYTES:
            raise InvalidInput(f"{path} would have {size:,} bytes; {MOST_BYTES:,} are allowed: use fewer examples")
    for path, data in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_bytes(data)
        os.replace(fresh, path)
    return list(made)


def pack(contents: Contents) -> bytes:
    """The file's bytes: gzip without a time or a name, so that the same results give the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as packed:
        for line in encode(contents.results, contents.heads):
            packed.write(line)
    return buffer.getvalue()


def file_name(text: str) -> str:
    """A name as a file's: letters, digits, dots, hyphens.

    >>> file_name("org/Model 1B bfloat16")
    'org-Model-1B-bfloat16'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "unnamed"


def _stripped(result: Result) -> Result:
    """Nothing that could quote the model, and no figure that depends on the machine's load."""
    receipts = tuple({"method": r.get("method", ""), "fired": bool(r.get("fired"))} for r in result.receipts)
    error = None if result.error is None else result.error.partition(":")[0]
    return replace(result, receipts=receipts, error=error, text=None, final=None, seconds=round(result.seconds, 2))


def _merged(heads: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of heads that say the same but for their time, the last."""
    last = {repr(sorted((k, repr(v)) for k, v in h.items() if k != "at")): h for h in heads}
    return list(last.values())
