"""Exports: what is read back is what was recorded."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thrifty.errors import InvalidInput, LedgerError
from thrifty.ledger import Entry, Labels, open_ledger
from thrifty.ledger.export import export
from thrifty.spend import Spend, Work

ENTRIES = [
    Entry(
        f"root/{n % 3}",
        10**18 + n,
        10**18 + 2 * n,
        Spend(n, n // 2, 0, 2**53 - n, 1, 1, 0, 5 * n),
        Work(n, 2, 3, 4, n / 8, 6, float(n)),
        Labels("plan", "méthode", "e", "line\nbreak", prices="t"),
        "estimated" if n % 2 else "settled",
        {"output": n} if n % 5 == 0 and n else {},
    )
    for n in range(25)
]


@pytest.fixture(params=["memory", "sqlite"])
def book(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    opened = open_ledger(None if request.param == "memory" else tmp_path / "ledger.db")
    for entry in ENTRIES:
        opened.append(entry)
    yield opened
    opened.close()


def back(row: dict[str, Any], overdraft: dict[str, Any]) -> Entry:
    """An independent reader: names of columns against names of fields."""
    billed = ("input", "cached", "visual", "output", "reasoning", "calls", "tool_calls", "usd")
    spend = Spend(**{name: row[name] for name in billed})
    work = Work(
        row["prefill"], row["kv_reads"], row["target_passes"], row["draft_passes"],
        row["engine_ns"] / 1e9, row["kv_bytes_peak"], float(row["kv_bytes_mean"]),
    )  # fmt: skip
    labels = Labels(**{n: row[n] for n in ("plan", "method", "engine", "model", "role", "prices")})
    return Entry(row["account"], row["opened"], row["at"], spend, work, labels, row["status"], overdraft)


def test_jsonl_round_trip(book: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert export(book, out) == len(ENTRIES)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [back(row, row["overdraft"]) for row in rows] == ENTRIES
    assert [row["seq"] for row in rows] == list(range(1, 26))


def test_parquet_round_trip(book: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    assert export(book, out) == len(ENTRIES)
    table = pq.read_table(out)
    assert {str(f.type) for f in table.schema} == {"int64", "string"}
    assert table.schema.field("usd").type == pa.int64()
    assert [back(r, json.loads(r["overdraft"] or "{}")) for r in table.to_pylist()] == ENTRIES


def test_parquet_in_many_batches(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.db") as book:
        for n in range(25_000):
            book.append(Entry("a", n, n, Spend(input=n)))
        export(book, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["input"].to_pylist() == list(range(25_000))


def test_hashes_are_those_of_the_chain(tmp_path: Path) -> None:
    path, out = tmp_path / "ledger.db", tmp_path / "out.jsonl"
    with open_ledger(path) as book:
        for entry in ENTRIES:
            book.append(entry)
        export(book, out, where={"account": "root/1"})
    query = "SELECT lower(hex(hash)) FROM entries WHERE account = 'root/1'"
    stored = {found for (found,) in sqlite3.connect(path).execute(query)}
    assert {json.loads(line)["hash"] for line in out.read_text().splitlines()} == stored


def test_a_broken_export_leaves_the_old_file(book: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")

    class Breaks:
        def entries(self, *_: Any) -> Any:
            yield ENTRIES[0]
            raise LedgerError("the disk broke")

    with pytest.raises(LedgerError, match="broke"):
        export(Breaks(), out)
    assert out.read_text() == "old\n"
    assert sorted(p.name for p in tmp_path.glob("*.part")) == []
    with pytest.raises(InvalidInput, match=r"\.jsonl or \.parquet"):
        export(book, tmp_path / "out.csv")
    with pytest.raises(LedgerError, match="cannot be written"):
        export(book, tmp_path / "nowhere" / "out.jsonl")
