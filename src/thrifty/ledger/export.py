"""Export: a ledger's entries as JSON lines or as Parquet, for notebooks and databases.

Both have the same flat columns: chain, number and hash of the entry (empty for a ledger in memory), then
`columns.COLUMNS`; all numbers are 64-bit integers. The file is written beside its place and renamed when it is whole,
so a broken export leaves what was there before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson

from thrifty.errors import InvalidInput, LedgerError
from thrifty.ledger.columns import COLUMNS, TEXTS, flat
from thrifty.ledger.entry import Entry
from thrifty.ledger.query import When

Format = Literal["jsonl", "parquet"]
RECORD: tuple[str, ...] = ("chain", "seq", "hash", *COLUMNS)
_BATCH = 10_000


class Exportable(Protocol):
    """A ledger whose entries can be read."""

    def entries(
        self, since: When = None, until: When = None, where: Mapping[str, str] | None = None
    ) -> Iterator[Entry]:
        """The chosen entries."""


def export(
    ledger: Exportable,
    path: str | Path,
    format: Format | None = None,
    *,
    since: When = None,
    until: When = None,
    where: Mapping[str, str] | None = None,
) -> int:
    """Writes the chosen entries to `path` and returns how many. The format follows from the name's ending (.jsonl or
    .parquet) unless given. Memory does not grow with the number of entries.

    Raises InvalidInput for an unknown format or a missing `pyarrow`, LedgerError when the file cannot be written.
    """
    path = Path(path)
    chosen = format or path.suffix.removeprefix(".").lower()
    if chosen not in _WRITERS:
        raise InvalidInput(f"export to {path.name!r} as {chosen or 'nothing'}: name a .jsonl or .parquet file")
    rows = _rows(ledger, since, until, where)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        count = _WRITERS[chosen](rows, temporary)
        temporary.replace(path)
    except OSError as error:
        raise LedgerError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _rows(ledger: Exportable, since: When, until: When, where: Mapping[str, str] | None) -> Iterator[tuple[Any, ...]]:
    records = getattr(ledger, "records", None)
    if records is not None:
        yield from records(since, until, where)
        return
    for number, entry in enumerate(ledger.entries(since, until, where), 1):
        yield ("", number, "", *flat(entry)[0])


def _write_jsonl(rows: Iterable[tuple[Any, ...]], path: Path) -> int:
    count = 0
    with path.open("wb") as file:
        for row in rows:
            line = dict(zip(RECORD, row, strict=True))
            line["overdraft"] = orjson.loads(line["overdraft"]) if line["overdraft"] else {}
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def _write_parquet(rows: Iterable[tuple[Any, ...]], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InvalidInput("a Parquet export needs the package `pyarrow`: install it, or export .jsonl") from error
    text = ("chain", "hash", *TEXTS)
    schema = pa.schema([(name, pa.string() if name in text else pa.int64()) for name in RECORD])
    count = 0
    rows = iter(rows)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(rows, _BATCH)):
            pairs = zip(zip(*batch, strict=True), schema, strict=True)
            writer.write_batch(pa.record_batch([pa.array(c, f.type) for c, f in pairs], schema=schema))
            count += len(batch)
    return count


_WRITERS: dict[str, Callable[[Iterable[tuple[Any, ...]], Path], int]] = {
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
}
