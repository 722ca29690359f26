"""Tampering: what is done to the file by someone with a database shell, and what `verify` says of it.

Each attack comes in two strengths. Naive: rows are changed and nothing else. Thorough: all hashes and heads that the
attacker can compute are made to fit again (they know the format, and lack the key).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest

from thrifty.errors import InvalidInput, LedgerError
from thrifty.ledger import Entry, open_ledger, verify
from thrifty.ledger.columns import COLUMNS
from thrifty.spend import Spend, Work

KEY = b"a key of at least sixteen bytes"
OTHER_KEY = b"another key, also long enough"
COVERED, AFTER = 12, 3  # entries of the first chain before the anchor, and of a chain begun after it


def entry(number: int) -> Entry:
    return Entry(f"acct/{number}", number, 10**18 + number, Spend(input=number, output=1, calls=1), Work(prefill=3))


@pytest.fixture
def ledger(tmp_path: Path) -> tuple[Path, Path]:
    """Three chains with signed checkpoints; an anchor after the second."""
    path, anchor = tmp_path / "ledger.db", tmp_path / "anchor.json"
    for chain in range(2):
        with open_ledger(path, key=KEY) as book:
            for number in range(COVERED):
                book.append(entry(100 * chain + number)).wait()
    with open_ledger(path, key=KEY) as book:
        book.anchor(anchor)
        for number in range(AFTER):
            book.append(entry(900 + number)).wait()
    return path, anchor


def change(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def forge(path: Path) -> None:
    """Makes every chain consistent again, as an attacker would who knows the format: an independent implementation of
    the chain, from its description."""
    connection = sqlite3.connect(path)
    (ledger_id,) = connection.execute("SELECT value FROM meta").fetchone()
    names = ", ".join(f'"{c}"' for c in COLUMNS)
    with connection:
        for number, name, opened, host, pid in connection.execute(
            "SELECT id, name, opened, host, pid FROM chains"
        ).fetchall():
            start = json.dumps(
                ["thrifty ledger chain", ledger_id, name, opened, host, pid], separators=(",", ":"), ensure_ascii=False
            )
            head, seq = hashlib.sha256(start.encode()).digest(), 0
            query = f"SELECT id, {names} FROM entries WHERE chain = ? ORDER BY seq"
            rows = connection.execute(query, (number,)).fetchall()
            connection.execute("UPDATE entries SET seq = -seq WHERE chain = ?", (number,))
            for row_id, *row in rows:
                seq += 1
                data = json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode()
                prev, head = head, hashlib.sha256(head + data).digest()
                connection.execute("UPDATE entries SET seq=?, prev=?, hash=? WHERE id=?", (seq, prev, head, row_id))
            connection.execute("UPDATE chains SET seq=?, hash=? WHERE id=?", (seq, head, number))
    connection.close()


def kinds(path: Path, key: bytes | None = None, anchor: Path | None = None) -> set[str]:
    return {problem.kind for problem in verify(path, key, anchor).problems}


EDIT = "UPDATE entries SET output = 0 WHERE chain = 1 AND seq = 5"
EDIT_TEXT = "UPDATE entries SET account = 'acct/somebody else' WHERE chain = 1 AND seq = 5"
DELETE_MIDDLE = "DELETE FROM entries WHERE chain = 1 AND seq = 5"
DELETE_LAST = "DELETE FROM entries WHERE chain = 1 AND seq > 10"
SWAP = (
    "UPDATE entries SET seq = -5 WHERE chain = 1 AND seq = 5",
    "UPDATE entries SET seq = 5 WHERE chain = 1 AND seq = 6",
    "UPDATE entries SET seq = 6 WHERE chain = 1 AND seq = -5",
)
DELETE_CHAIN = ("DELETE FROM entries WHERE chain = 1", "DELETE FROM chains WHERE id = 1")


def test_an_untouched_ledger_verifies(ledger: tuple[Path, Path]) -> None:
    path, anchor = ledger
    for key in (None, KEY):
        for use in (None, anchor):
            report = verify(path, key, use)
            assert report.ok, report.problems
            assert (report.entries, report.chains) == (2 * COVERED + AFTER, 3)
            assert report.signed == (report.entries if key else 0)
            assert report.anchored == (2 * COVERED if use else 0)


@pytest.mark.parametrize(
    ("statements", "kind", "where"),
    [
        ([EDIT], "edited", "5"),
        ([EDIT_TEXT], "edited", "5"),
        (["UPDATE entries SET output = 'many' WHERE chain = 1 AND seq = 5"], "edited", "5"),
        (["UPDATE entries SET output = x'00' WHERE chain = 1 AND seq = 5"], "edited", "5"),
        (["UPDATE entries SET hash = x'00' WHERE chain = 1 AND seq = 5"], "edited", "5"),
        (["UPDATE entries SET prev = hash WHERE chain = 1 AND seq = 5"], "edited", "5"),
        ([DELETE_MIDDLE], "missing", "5"),
        ([DELETE_LAST], "truncated", "11"),
        (list(SWAP), "moved", "5"),
        ([*DELETE_CHAIN], "chain", None),
        (["UPDATE chains SET host = 'elsewhere' WHERE id = 1"], "moved", "1"),
        (["UPDATE chains SET seq = 5 WHERE id = 1"], "extra", "6"),
        (["INSERT INTO entries SELECT 999, chain, 13, prev, hash, " + ", ".join(f'"{c}"' for c in COLUMNS)
          + " FROM entries WHERE chain = 1 AND seq = 12"], "moved", "13"),
    ],
)  # fmt: skip
def test_naive_tampering_is_seen_without_key_or_anchor(
    ledger: tuple[Path, Path], statements: list[str], kind: str, where: str | None
) -> None:
    path, _ = ledger
    change(path, *statements)
    report = verify(path)
    assert kind in {p.kind for p in report.problems}
    if where is not None:
        assert any(p.kind == kind and p.entry.endswith(f":{where}") for p in report.problems), report.problems


def test_an_edit_is_pinned_to_its_entry(ledger: tuple[Path, Path]) -> None:
    path, _ = ledger
    change(path, EDIT)
    report = verify(path)
    assert [p.kind for p in report.problems] == ["edited"]  # and not all the later ones too


@pytest.mark.parametrize("statements", [[EDIT], [DELETE_MIDDLE], [DELETE_LAST], [*SWAP]])
def test_a_forger_without_the_key_is_seen_only_with_key_or_anchor(
    ledger: tuple[Path, Path], statements: list[str]
) -> None:
    path, anchor = ledger
    change(path, *statements)
    forge(path)
    # Checkpoints stand: their heads tell, even unsigned.
    assert kinds(path)
    # So a forger removes them, and their traces.
    change(path, "DELETE FROM checkpoints", "UPDATE chains SET covered = 0")
    blind = verify(path)
    assert blind.ok
    assert any("computed anew" in line and "key" in line for line in blind.cannot_detect)
    assert any("cut from the end" in line for line in blind.cannot_detect)
    assert kinds(path, KEY) == {"checkpoint"}
    assert kinds(path, None, anchor) & {"edited", "missing"}
    assert not any("computed anew by someone who can write" in x for x in verify(path, None, anchor).cannot_detect)


def test_a_removed_chain_is_seen_only_with_key_or_anchor(ledger: tuple[Path, Path]) -> None:
    path, anchor = ledger
    change(
        path,
        *DELETE_CHAIN,
        "UPDATE chains SET id = id - 1",
        "UPDATE entries SET chain = chain - 1",
        "DELETE FROM checkpoints",
        "UPDATE chains SET covered = 0",
    )
    assert verify(path).ok
    assert kinds(path, KEY) == {"checkpoint"}
    assert "chain" in kinds(path, None, anchor)


def test_a_roll_back_to_an_older_state_is_seen_only_with_the_anchor(ledger: tuple[Path, Path]) -> None:
    path, anchor = ledger
    # The second chain goes, with every checkpoint that was made since: an older copy of the file looks the same.
    connection = sqlite3.connect(path)
    bodies = [(n, json.loads(b)) for n, b in connection.execute("SELECT id, body FROM checkpoints ORDER BY id")]
    (second,) = connection.execute("SELECT name FROM chains WHERE id = 2").fetchone()
    connection.close()
    cut = min(number for number, body in bodies if any(name == second for name, *_ in body["heads"]))
    change(
        path,
        f"DELETE FROM checkpoints WHERE id >= {cut}",
        "DELETE FROM entries WHERE chain > 1",
        "DELETE FROM chains WHERE id > 1",
    )
    report = verify(path, KEY)
    assert report.ok
    assert any("newest checkpoints removed" in line for line in report.cannot_detect)
    assert {"chain", "checkpoint"} <= kinds(path, KEY, anchor)


@pytest.mark.parametrize(
    ("statement", "seen_without_key"),
    [
        ("UPDATE checkpoints SET body = replace(body, '\"number\":2', '\"number\":3') WHERE id = 2", True),
        ("UPDATE checkpoints SET body = 'no JSON' WHERE id = 2", True),
        ("UPDATE checkpoints SET body = replace(body, '\"at\":1', '\"at\":2') WHERE id = 4", False),
        ("UPDATE checkpoints SET signature = 'abcd' WHERE id = 4", False),
        ("UPDATE checkpoints SET signature = 'abcd' WHERE id = 2", True),  # the next one names its hash
        ("UPDATE checkpoints SET key = '0123456789abcdef' WHERE id = 4", False),
        ("DELETE FROM checkpoints WHERE id = 2", True),
        ("UPDATE chains SET covered = 99 WHERE id = 1", True),
    ],
)
def test_edited_checkpoints(ledger: tuple[Path, Path], statement: str, seen_without_key: bool) -> None:
    path, _ = ledger
    connection = sqlite3.connect(path)
    (last,) = connection.execute("SELECT max(id) FROM checkpoints").fetchone()
    connection.close()
    change(path, statement.replace("id = 4", f"id = {last}"))
    assert ("checkpoint" in kinds(path)) == seen_without_key
    assert "checkpoint" in kinds(path, KEY)


def test_a_checkpoint_of_another_key_proves_nothing(ledger: tuple[Path, Path]) -> None:
    path, _ = ledger
    report = verify(path, OTHER_KEY)
    assert not report.ok
    assert report.signed == 0
    assert all("another key" in p.message for p in report.problems)


def test_the_anchor_itself(ledger: tuple[Path, Path], tmp_path: Path) -> None:
    path, anchor = ledger
    body = json.loads(anchor.read_text())
    body["heads"][0][1] = 3
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps(body))
    assert "anchor" in kinds(path, KEY, forged)
    forged.write_text("[]")
    with pytest.raises(InvalidInput, match="not an anchor"):
        verify(path, None, forged)
    with pytest.raises(InvalidInput, match="cannot be read"):
        verify(path, None, tmp_path / "nowhere")
    with open_ledger(tmp_path / "other.db") as other:
        other.append(entry(1)).wait()
        other.anchor(forged)
    assert kinds(path, None, forged) == {"anchor"}


def test_another_ledger_in_its_place(ledger: tuple[Path, Path], tmp_path: Path) -> None:
    path, anchor = ledger
    path.unlink()
    with open_ledger(path, key=KEY) as book:
        book.append(entry(1)).wait()
    assert verify(path, KEY).ok
    assert "anchor" in kinds(path, KEY, anchor)


def test_keys(tmp_path: Path, ledger: tuple[Path, Path]) -> None:
    path, _ = ledger
    key_file = tmp_path / "key"
    key_file.write_bytes(KEY)
    assert verify(path, key_file).signed == verify(path, str(key_file)).signed == 2 * COVERED + AFTER
    with pytest.raises(InvalidInput, match="at least 16"):
        verify(path, b"short")
    with pytest.raises(InvalidInput, match="cannot be read"):
        verify(path, tmp_path / "nowhere")
    assert KEY.decode() not in repr(open_key())


def open_key() -> object:
    from thrifty.ledger.chain import load_key

    return load_key(KEY)


def test_ed25519(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    secret = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    public = private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    path = tmp_path / "ledger.db"
    with open_ledger(path, key=secret) as book:
        for number in range(5):
            book.append(entry(number)).wait()
    assert verify(path, public).signed == 5
    change(path, EDIT.replace("seq = 5", "seq = 4"))
    forge(path)
    assert "edited" in kinds(path, public)
    with pytest.raises(InvalidInput, match="cannot sign"):
        open_ledger(path, key=public)
    with pytest.raises(InvalidInput, match="cannot be read"):
        open_ledger(path, key=b"-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----")


def test_verifying_takes_memory_for_problems_only_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with open_ledger(path) as book:
        for number in range(1500):
            book.append(entry(number))
    change(path, "UPDATE entries SET usd = usd + 1")
    report = verify(path)
    assert (len(report.problems), report.more) == (1000, 500)


def test_a_damaged_database_is_one_clear_line(ledger: tuple[Path, Path]) -> None:
    path, _ = ledger
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(LedgerError, match="damaged|cannot be opened") as caught:
        verify(path)
    assert "\n" not in str(caught.value)
