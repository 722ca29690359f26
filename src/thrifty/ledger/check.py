"""Checks a ledger file: every entry against its hash, every chain against its head, checkpoints and an anchor.

The report says what was found, and as plainly what these checks could not have found. Reading is one transaction, so
a ledger can be verified while others write it, and memory does not grow with the number of entries.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from thrifty.errors import LedgerChanged
from thrifty.ledger.chain import Anchor, Checkpoint, Key, KeySource, genesis, link, load_key, read_anchor
from thrifty.ledger.columns import COLUMNS
from thrifty.ledger.schema import connect

Kind = Literal["edited", "moved", "missing", "extra", "truncated", "chain", "checkpoint", "anchor"]

MOST_PROBLEMS = 1000
"""How many problems a report lists; the others are counted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was written. `entry` is CHAIN:NUMBER where one entry is meant, else empty."""

    kind: Kind
    message: str
    entry: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found, and what it can and cannot find."""

    path: str
    entries: int
    chains: int
    checkpoints: int
    holds: int
    signed: int
    """entries that a checkpoint signed with the given key covers"""
    anchored: int
    """entries that the given anchor covers"""
    problems: tuple[Problem, ...]
    more: int
    """problems beyond those listed"""
    can_detect: tuple[str, ...]
    cannot_detect: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = {name: getattr(self, name) for name in self.__slots__}
        data["problems"] = [{"kind": p.kind, "entry": p.entry, "message": p.message} for p in self.problems]
        return {"ok": self.ok, **data}


def verify(path: str | Path, key: KeySource | None = None, anchor: str | Path | None = None) -> Report:
    """Verifies a ledger, with a key its checkpoints' signatures, with an anchor what was true when it was made.

    Raises InvalidInput for a file that is no ledger, a key or an anchor that cannot be read, and LedgerChanged when the
    database itself is damaged. What was changed in the ledger is no exception but a problem in the report.
    """
    path = Path(path).absolute()
    check = _Check(path, None if key is None else load_key(key), None if anchor is None else Path(anchor))
    with closing(connect(path, readonly=True)) as connection:
        try:
            connection.execute("BEGIN")
            return check.run(connection)
        except sqlite3.DatabaseError as error:
            raise LedgerChanged(f"ledger {path} is damaged: {error}") from error


@dataclass(slots=True)
class _Chain:
    """One chain as its row tells it, and as its entries show."""

    name: str
    seq: int
    head: bytes
    covered: int
    last: int = 0
    hash: bytes = b""
    count: int = 0


@dataclass(slots=True)
class _Check:
    path: Path
    key: Key | None
    anchor_path: Path | None
    problems: list[Problem] = field(default_factory=list)
    more: int = 0
    ledger: str = ""
    chains: dict[int, _Chain] = field(default_factory=dict)
    wanted: dict[str, dict[int, list[tuple[str, str]]]] = field(default_factory=dict)
    """by chain and number: the hash that a checkpoint or the anchor gives, and which of them"""
    signed: dict[str, int] = field(default_factory=dict)
    """by chain: up to where checkpoints with a good signature cover it"""
    covered: dict[str, int] = field(default_factory=dict)
    """the same for all checkpoints"""
    checkpoints: list[str] = field(default_factory=list)
    """their hashes"""
    anchor: Anchor | None = None

    def run(self, connection: sqlite3.Connection) -> Report:
        row = connection.execute("SELECT value FROM meta WHERE name = 'ledger'").fetchone()
        if row is None:
            self._problem("chain", "the ledger's identifier is missing")
        self.ledger = row[0] if row else ""
        self._read_chains(connection)
        self._read_checkpoints(connection)
        self._read_anchor()
        entries = self._read_entries(connection)
        self._check_heads()
        if self.key is not None and entries and not self.checkpoints:
            self._problem("checkpoint", "there is no checkpoint: nothing was signed, or all were removed")
        (holds,) = connection.execute("SELECT count(*) FROM holds").fetchone()
        signed = sum(min(self.signed.get(c.name, 0), c.count) for c in self.chains.values())
        heads = {} if self.anchor is None else {name: seq for name, seq, _ in self.anchor.heads}
        anchored = sum(min(heads.get(c.name, 0), c.count) for c in self.chains.values())
        can, cannot = self._reach(entries, signed, anchored)
        return Report(
            str(self.path),
            entries,
            len(self.chains),
            len(self.checkpoints),
            holds,
            signed,
            anchored,
            tuple(self.problems),
            self.more,
            can,
            cannot,
        )

    # -- chains and entries ----------------------------------------------------------------------------------------

    def _read_chains(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute("SELECT id, name, opened, host, pid, seq, hash, covered FROM chains ORDER BY id")
        expected = 1
        for number, name, opened, host, pid, seq, head, covered in rows:
            if number > expected:
                self._problem("chain", f"chain {_span(expected, number - 1)} is missing with all its entries")
            expected = number + 1
            start = genesis(self.ledger, name, opened, host, pid)
            self.chains[number] = _Chain(name, _number(seq), _binary(head), _number(covered), hash=start)

    def _read_entries(self, connection: sqlite3.Connection) -> int:
        names = ", ".join(f'"{name}"' for name in COLUMNS)
        total = 0
        strangers: dict[Any, int] = {}
        for number, seq, prev, head, *row in connection.execute(
            f"SELECT chain, seq, prev, hash, {names} FROM entries ORDER BY chain, seq"
        ):
            total += 1
            chain = self.chains.get(number)
            if chain is None:
                strangers[number] = strangers.get(number, 0) + 1
            else:
                self._check_entry(chain, seq, _binary(prev), _binary(head), row)
        for number, count in strangers.items():
            self._problem("chain", f"{count:,} entries belong to chain {number}, which is missing")
        return total

    def _check_entry(self, chain: _Chain, seq: int, prev: bytes, head: bytes, row: list[Any]) -> None:
        entry = f"{chain.name}:{seq}"
        whole = True
        try:
            if link(prev, orjson.dumps(row)) != head:
                whole = False
                self._problem("edited", f"entry {entry} was edited: its content does not give its hash", entry)
        except TypeError:  # a value of a type that no ledger writes
            whole = False
            self._problem("edited", f"entry {entry} was edited: a column holds another kind of value", entry)
        if seq != chain.last + 1:
            if seq > chain.last + 1:
                span = _span(chain.last + 1, seq - 1)
                self._problem("missing", f"entry {chain.name}:{span} is missing", f"{chain.name}:{chain.last + 1}")
            else:
                self._problem("extra", f"entry {entry} has a number that the chain does not have", entry)
        elif prev != chain.hash and whole:
            self._problem("moved", f"entry {entry} does not follow the one before: moved, or that was rewritten", entry)
        for wanted, source in self.wanted.get(chain.name, {}).pop(seq, ()):
            if wanted != head.hex():
                self._problem("edited", f"entry {entry} is not the one that {source} covers: rewritten", entry)
        chain.last, chain.hash = max(chain.last, seq), head
        chain.count += 1

    def _check_heads(self) -> None:
        """After all entries: heads that were not met, and ends that are not where they should be."""
        for chain in self.chains.values():
            if chain.last < chain.seq:
                missing = f"{chain.name}:{_span(chain.last + 1, chain.seq)}"
                self._problem("truncated", f"entry {missing} is missing at the end", f"{chain.name}:{chain.last + 1}")
            elif chain.last > chain.seq:
                extra = f"{chain.name}:{_span(chain.seq + 1, chain.last)}"
                self._problem("extra", f"entry {extra} stands after the chain's head", f"{chain.name}:{chain.seq + 1}")
            elif chain.hash != chain.head:
                self._problem("chain", f"chain {chain.name}: its head is not the hash of its last entry")
            if chain.covered != self.covered.get(chain.name, 0):
                self._problem("checkpoint", f"chain {chain.name}: its checkpoints do not cover what its row says")
        names = {chain.name for chain in self.chains.values()}
        for name, left in self.wanted.items():
            for seq, sources in left.items():
                source = sources[0][1]
                if name not in names:
                    self._problem("chain", f"chain {name}, covered to {seq:,} by {source}, is missing")
                elif seq:
                    self._problem("missing", f"entry {name}:{seq}, covered by {source}, is missing", f"{name}:{seq}")

    # -- checkpoints and anchor --------------------------------------------------------------------------------------

    def _read_checkpoints(self, connection: sqlite3.Connection) -> None:
        before = ""
        rows = connection.execute("SELECT id, body, algorithm, key, signature FROM checkpoints ORDER BY id")
        for row in rows:
            checkpoint = Checkpoint(*row)
            number, expected = checkpoint.number, len(self.checkpoints) + 1
            if number != expected:
                self._problem("checkpoint", f"checkpoint {_span(expected, number - 1)} is missing")
                self.checkpoints += [""] * max(0, number - expected)
            good = self._signature(checkpoint)
            try:
                content = checkpoint.content()
                if content["before"] != before and number == expected:
                    self._problem("checkpoint", f"checkpoint {number} does not follow the one before it")
                if content["ledger"] != self.ledger:
                    self._problem("checkpoint", f"checkpoint {number} is of another ledger")
                self._want(content["heads"], f"checkpoint {number}")
                for name, seq, _ in content["heads"]:
                    self.covered[name] = max(seq, self.covered.get(name, 0))
                    if good:
                        self.signed[name] = max(seq, self.signed.get(name, 0))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self._problem("checkpoint", f"checkpoint {number} was edited: {error}")
            before = checkpoint.hash
            self.checkpoints.append(before)

    def _signature(self, checkpoint: Checkpoint) -> bool:
        if self.key is None:
            return False
        if checkpoint.key != self.key.id or checkpoint.algorithm != self.key.algorithm:
            name = f"{checkpoint.algorithm} key {checkpoint.key}"
            self._problem("checkpoint", f"checkpoint {checkpoint.number} is signed with another key ({name})")
            return False
        if not self.key.matches(checkpoint.body.encode(), checkpoint.signature):
            self._problem("checkpoint", f"checkpoint {checkpoint.number} was edited: its signature is not the key's")
            return False
        return True

    def _read_anchor(self) -> None:
        if self.anchor_path is None:
            return
        anchor, good = read_anchor(self.anchor_path, self.key)
        if good is False:
            self._problem("anchor", "the anchor was edited: its signature is not the key's")
        if anchor.ledger != self.ledger:
            self._problem("anchor", f"the anchor is of another ledger ({anchor.ledger}), or this file was replaced")
            return
        self.anchor = anchor
        self._want(anchor.heads, "the anchor")
        have = len(self.checkpoints)
        if have < anchor.checkpoints:
            self._problem("checkpoint", f"checkpoint {_span(have + 1, anchor.checkpoints)} is missing at the end")
        elif anchor.checkpoints and self.checkpoints[anchor.checkpoints - 1] not in ("", anchor.checkpoint):
            self._problem("checkpoint", f"checkpoint {anchor.checkpoints} is not the one that the anchor covers")

    def _want(self, heads: tuple[tuple[str, int, str], ...], source: str) -> None:
        for name, seq, head in heads:
            self.wanted.setdefault(name, {}).setdefault(seq, []).append((head, source))

    # -- the report --------------------------------------------------------------------------------------------------

    def _problem(self, kind: Kind, message: str, entry: str = "") -> None:
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(Problem(kind, message, entry))
        else:
            self.more += 1

    def _reach(self, entries: int, signed: int, anchored: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        can = [
            "an entry edited, removed, inserted or moved by someone who does not compute the later hashes anew",
            "entries removed from a chain's end by someone who leaves the chain's recorded head as it was",
        ]
        cannot = list(_ALWAYS)
        if self.key is not None:
            can.append(f"any change of the {signed:,} entries that signed checkpoints cover")
            if signed < entries:
                cannot.append(f"a change of the {entries - signed:,} entries that no signed checkpoint covers yet")
            cannot.append("a change by someone who has the signing key")
        if self.anchor is not None:
            when = datetime.fromtimestamp(self.anchor.at // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            can.append(f"any change or removal of the {anchored:,} entries that the anchor of {when} covers")
            if self.key is None and anchored < entries:
                cannot.append(f"a chain's later part computed anew: {entries - anchored:,} entries (give the key)")
            cannot.append("entries removed from the end that were written after the anchor, with their checkpoints")
        elif self.key is not None:
            cannot.append("the newest checkpoints removed with all that they alone cover (give an anchor)")
        else:
            cannot.append("chains computed anew by someone who can write the file (give the key or an anchor)")
            cannot.append("entries cut from the end, whole chains removed, heads included (give the key or an anchor)")
        return tuple(can), tuple(cannot)


_ALWAYS = (
    "what was changed before a checkpoint or an anchor first covered it",
    "open holds that were added, changed or removed: they enter the chain when they are settled",
    "spending that was never appended",
)


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first >= last else f"{first:,} to {last:,}"


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _binary(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""
