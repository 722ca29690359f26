"""An entry as one flat row: the columns' names and order, the bounds of their values, and the bytes that are hashed.

Every column is an integer or a text, so that sums are exact and any JSON library reproduces the hashed bytes. Engine
seconds are kept to the nanosecond and `kv_bytes_mean` to the byte; all else comes back as it went in. The row has
nothing beside its columns: what is queried is what was hashed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, cast

import orjson

from thrifty.errors import InvalidInput, nearest
from thrifty.ledger.entry import Entry, HoldRecord, Labels, Status
from thrifty.spend import SPEND_FIELDS, Spend, Work

LABELS: tuple[str, ...] = ("plan", "method", "engine", "model", "role", "prices")
WORK_COLUMNS: tuple[str, ...] = (
    "prefill",
    "kv_reads",
    "target_passes",
    "draft_passes",
    "engine_ns",
    "kv_bytes_peak",
    "kv_bytes_mean",
)
TEXTS: tuple[str, ...] = ("account", "status", *LABELS, "overdraft")
NUMBERS: tuple[str, ...] = (*SPEND_FIELDS, *WORK_COLUMNS)
COLUMNS: tuple[str, ...] = ("account", "opened", "at", "status", *LABELS, *NUMBERS, "overdraft")
"""In the order of the row and of the hashed JSON array. `overdraft` is a JSON object as text, empty for none."""

FILTERS: tuple[str, ...] = ("account", "status", *LABELS)
"""What entries can be chosen by. An account stands for itself and all below it."""

MOST = 2**53
"""The largest number an entry may hold: above it a JSON reader may round. A thousand such still sum in 64 bits."""

MOST_BYTES = 1 << 16
"""The largest entry, as hashed."""

_WHOLE = struct.Struct(f"{len(NUMBERS)}Q")

Flat = tuple[Any, ...]
"""One row: a value for each of COLUMNS."""


def flat(entry: Entry) -> tuple[Flat, bytes]:
    """The entry's row and the bytes of it that are hashed. Raises InvalidInput for what cannot be recorded exactly."""
    spend, work, labels = entry.spend, entry.work, entry.labels
    try:
        numbers = _WHOLE.unpack(  # packed and unpacked: only whole numbers pass, and True becomes 1
            _WHOLE.pack(
                spend.input,
                spend.cached,
                spend.visual,
                spend.output,
                spend.reasoning,
                spend.calls,
                spend.tool_calls,
                spend.usd,
                work.prefill,
                work.kv_reads,
                work.target_passes,
                work.draft_passes,
                round(work.engine_seconds * 1e9),
                work.kv_bytes_peak,
                round(work.kv_bytes_mean),
            )
        )
        row: Flat = (
            entry.account,
            entry.opened,
            entry.at,
            entry.status,
            labels.plan,
            labels.method,
            labels.engine,
            labels.model,
            labels.role,
            labels.prices,
            *numbers,
            canonical(entry.overdraft).decode() if entry.overdraft else "",
        )
        data = orjson.dumps(row)
    except (TypeError, ValueError, OverflowError, struct.error) as error:
        raise InvalidInput(f"entry of {entry.account!r} cannot be recorded: {_reason(entry, error)}") from error
    if sum(numbers) > MOST and max(numbers) > MOST:
        raise InvalidInput(f"entry of {entry.account!r} cannot be recorded: {_reason(entry, 'too large')}")
    if len(data) > MOST_BYTES:
        raise InvalidInput(f"an entry of {len(data):,} bytes: at most {MOST_BYTES:,} are allowed; shorten its labels")
    return row, data


def entry_of(row: Sequence[Any]) -> Entry:
    """The entry of a row (the opposite of `flat`)."""
    spend, work = row[10:18], row[18:25]
    prefill, kv_reads, target, draft, engine_ns, peak, mean = work
    return Entry(
        row[0],
        row[1],
        row[2],
        Spend(*spend),
        Work(prefill, kv_reads, target, draft, engine_ns / 1e9, peak, float(mean)),
        Labels(*row[4:10]),
        cast(Status, row[3]),
        orjson.loads(row[25]) if row[25] else {},
    )


def canonical(data: object) -> bytes:
    """JSON with sorted keys and no spaces. Raises TypeError for what JSON cannot say."""
    return orjson.dumps(dict(data) if isinstance(data, Mapping) else data, option=orjson.OPT_SORT_KEYS)


def pack_hold(hold: HoldRecord) -> str:
    """A hold as the JSON row of the entry that it would become. Raises InvalidInput like `flat`."""
    return flat(Entry(hold.account, hold.opened, 0, hold.spend, hold.work, hold.labels, "unknown"))[1].decode()


def unpack_hold(text: str, now: int) -> Entry:
    """The `unknown` entry, settled `now` at the hold's full amount."""
    row = orjson.loads(text)
    row[2] = now
    return entry_of(row)


def moment(when: int | str | datetime | None) -> int | None:
    """Unix nanoseconds of a time given as such, as an aware datetime, or as ISO text (UTC unless it says otherwise).

    >>> moment("1970-01-02")
    86400000000000
    """
    if when is None or isinstance(when, int):
        return when
    try:
        given = datetime.fromisoformat(when) if isinstance(when, str) else when
        if given.tzinfo is None:
            given = given.replace(tzinfo=UTC)
        whole = int(given.replace(microsecond=0).timestamp())
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"time {when!r}: nanoseconds, a datetime or ISO text is needed") from error
    return whole * 1_000_000_000 + given.microsecond * 1_000


def check_names(names: Sequence[str], known: Sequence[str], kind: str) -> None:
    """Raises InvalidInput for the first name that is not known."""
    for name in names:
        if name not in known:
            raise InvalidInput(nearest(name, known, kind))


def _reason(entry: Entry, error: object) -> str:
    for part in (entry.spend, entry.work):
        for field in fields(part):
            value = getattr(part, field.name)
            if not isinstance(value, int | float) or not 0 <= value <= MOST or (field.type == "int" and value % 1):
                return f"{field.name} = {value!r}, where a number from 0 to {MOST:,} is needed"
    return str(error)
