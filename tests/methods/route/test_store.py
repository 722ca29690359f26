"""The store against a list that does the same in the plainest way; nearest against brute force; files."""

from __future__ import annotations

import math
import os
import random
import sqlite3
import stat
import threading
from array import array
from dataclasses import dataclass
from pathlib import Path

import pytest

from thrifty.errors import CacheError, InvalidInput
from thrifty.methods.route._store import AnswerStore


@dataclass
class Kept:
    key: bytes
    body: bytes
    made: float
    expires: float


class PlainStore:
    """Answers in the order of their last use."""

    def __init__(self, entries: int, most_bytes: int) -> None:
        self.entries, self.most_bytes, self.kept = entries, most_bytes, list[Kept]()

    def get(self, key: bytes, now: float, seconds: float) -> bytes | None:
        for kept in self.kept:
            if kept.key == key and kept.expires > now and kept.made > now - seconds:
                self.kept.remove(kept)
                self.kept.append(kept)
                return kept.body
        return None

    def put(self, key: bytes, body: bytes, now: float, seconds: float) -> bool:
        if len(body) > self.most_bytes:
            return False
        self.kept = [k for k in self.kept if k.key != key and k.expires > now]
        self.kept.append(Kept(key, body, now, now + seconds))
        while len(self.kept) > self.entries or sum(len(k.body) for k in self.kept) > self.most_bytes:
            self.kept.pop(0)
        return True


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("durable", [False, True])
def test_like_a_plain_list(seed: int, durable: bool, tmp_path: Path) -> None:
    rng = random.Random(seed)
    entries, most_bytes = rng.choice([1, 3, 8]), rng.choice([20, 60, 10_000])
    path = tmp_path / "answers.db" if durable else None
    store, plain = AnswerStore(path, entries=entries, most_bytes=most_bytes), PlainStore(entries, most_bytes)
    now = 1000.0
    for step in range(300):
        now += rng.choice([0.0, 1.0, 5.0])
        key, seconds = bytes([rng.randrange(12)]), rng.choice([3.0, 20.0, 1e6])
        if rng.random() < 0.5:
            body = bytes([step % 256]) * rng.randint(1, 30)
            assert store.put(key, body, now, seconds) == plain.put(key, body, now, seconds)
        else:
            found = store.get(key, now, seconds)
            assert (found and found.body) == plain.get(key, now, seconds)
        assert store.size() == (len(plain.kept), sum(len(k.body) for k in plain.kept))


def test_hits_are_counted_and_the_age_is_kept() -> None:
    store = AnswerStore(None, entries=2, most_bytes=100)
    store.put(b"k", b"body", 10.0, 100.0)
    found = [store.get(b"k", 20.0, 100.0) for _ in range(3)]
    assert [f.hits for f in found if f] == [0, 1, 2] and found[0] is not None and found[0].made == 10.0


@pytest.mark.parametrize("seed", range(4))
def test_near_by_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    store = AnswerStore(None, entries=100, most_bytes=10**6)
    vectors: list[tuple[int, list[float]]] = []
    for n in range(40):
        raw = [rng.gauss(0, 1) for _ in range(4)]
        unit = [x / math.hypot(*raw) for x in raw]
        part = n % 2
        store.put(bytes([n]), b"x", 0.0, 1e6, part=bytes([part]), vector=array("f", unit).tobytes(), question=str(n))
        vectors.append((part, unit))
    mine = vectors[0][1]
    found = store.near(b"\0", array("f", mine).tobytes(), 0.5, 1.0, 1e6, most=5)
    cosines = {
        str(n): math.fsum(a * b for a, b in zip(mine, v, strict=True)) for n, (p, v) in enumerate(vectors) if not p
    }
    expected = sorted((q for q in cosines if cosines[q] >= 0.5), key=lambda q: -cosines[q])[:5]
    assert [near.question for near in found] == expected
    assert [near.cosine for near in found] == pytest.approx([cosines[q] for q in expected], abs=1e-6)


def test_equal_cosines_go_to_the_older_answer_and_other_dimensions_are_passed_over() -> None:
    store = AnswerStore(None, entries=9, most_bytes=10**6)
    for name in "abc":
        store.put(name.encode(), b"x", 0.0, 1e6, vector=array("f", [1.0, 0.0]).tobytes(), question=name)
    store.put(b"d", b"x", 0.0, 1e6, vector=array("f", [1.0, 0.0, 0.0]).tobytes(), question="d")
    near = store.near(b"", array("f", [1.0, 0.0]).tobytes(), 0.9, 1.0, 1e6)
    assert [n.question for n in near] == ["a", "b", "c"]
    assert store.take(near[0].id) is not None and store.take(999) is None


def test_what_has_expired_is_not_near() -> None:
    store = AnswerStore(None, entries=9, most_bytes=10**6)
    store.put(b"k", b"x", 0.0, 10.0, vector=array("f", [1.0]).tobytes())
    one = array("f", [1.0]).tobytes()
    assert store.near(b"", one, 0.5, 9.0, 1e6) and not store.near(b"", one, 0.5, 10.0, 1e6)
    assert not store.near(b"", one, 0.5, 9.0, 5.0)


def test_a_file_outlives_its_store_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.db"
    first = AnswerStore(path, entries=9, most_bytes=1000)
    first.put(b"k", b"body", 0.0, 1e6)
    second = AnswerStore(path, entries=9, most_bytes=1000)
    assert (found := second.get(b"k", 1.0, 1e6)) is not None and found.body == b"body"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    first.close()
    first.close()
    second.close()
    again = AnswerStore(path, entries=9, most_bytes=1000)
    assert again.size() == (1, 4)


def test_what_is_dropped_is_gone_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    store = AnswerStore(path, entries=1, most_bytes=10_000)
    store.put(b"a", b"a very private answer", 0.0, 1e6)
    store.put(b"b", b"another", 0.0, 1e6)
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    assert b"very private" not in path.read_bytes() and b"another" in path.read_bytes()


def test_other_files_are_refused_and_stay_as_they_were(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("remember the milk " * 100)
    with pytest.raises(InvalidInput, match="no SQLite database"):
        AnswerStore(text, entries=1, most_bytes=100)
    assert text.read_text() == "remember the milk " * 100
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE cats (name)")
    db.close()
    with pytest.raises(InvalidInput, match="another database"):
        AnswerStore(other, entries=1, most_bytes=100)
    with pytest.raises(InvalidInput, match="a folder"):
        AnswerStore(tmp_path, entries=1, most_bytes=100)
    newer = tmp_path / "newer.db"
    AnswerStore(newer, entries=1, most_bytes=100).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InvalidInput, match="version 99"):
        AnswerStore(newer, entries=1, most_bytes=100)


def test_a_broken_table_is_told(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    store = AnswerStore(path, entries=1, most_bytes=100)
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE answers")
    db.close()
    with pytest.raises(CacheError, match="no such table"):
        store.get(b"k", 0.0, 1.0)
    with pytest.raises(CacheError, match="no such table"):  # and the lock is free again
        store.put(b"k", b"x", 0.0, 1.0)


def test_threads_and_stores_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    stores = [AnswerStore(path, entries=50, most_bytes=10**6) for _ in range(2)]

    def work(n: int) -> None:
        for i in range(25):
            stores[n % 2].put(bytes([n, i]), bytes([n]), 0.0, 1e6)
            stores[n % 2].get(bytes([n, i]), 1.0, 1e6)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[0].size() == stores[1].size() == (50, 50)
