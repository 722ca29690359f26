"""Decision trees as plain numbers: a random forest, or boosted trees, read from JSON and evaluated without the library
that trained them.

The file is `{"thrifty": "trajectory forest", ...}`; nothing in it is executed. Invariants: every child stands behind
its parent in its tree, so every walk ends; all numbers are finite; a chance is from 0 to 1."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.errors import InvalidInput, ThriftyError

KIND = "trajectory forest"
LINKS = ("mean", "logistic")
MOST_BYTES = 32_000_000
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Tree:
    """Node i asks whether x[feature[i]] <= threshold[i] and goes to left[i] or right[i]; a leaf has -1 for both and
    gives value[i]. Node 0 is the root."""

    feature: tuple[int, ...]
    threshold: tuple[float, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    value: tuple[float, ...]

    def __call__(self, x: Sequence[float]) -> float:
        at = 0
        while self.left[at] >= 0:
            at = self.left[at] if x[self.feature[at]] <= self.threshold[at] else self.right[at]
        return self.value[at]

    def check(self, features: int) -> None:
        """Raises InvalidInput for what is no tree over that many features."""
        n = len(self.value)
        if not n or {len(self.feature), len(self.threshold), len(self.left), len(self.right)} != {n}:
            raise InvalidInput("a tree needs feature, threshold, left, right and value, as long as each other")
        if not all(map(math.isfinite, (*self.threshold, *self.value))):
            raise InvalidInput("a tree holds a number that is not finite")
        for i in range(n):
            leaf = self.left[i] == self.right[i] == -1
            inner = i < self.left[i] < n and i < self.right[i] < n and 0 <= self.feature[i] < features
            if not (leaf or inner):
                raise InvalidInput(f"node {i} of a tree of {n} over {features} features leads nowhere")


@dataclass(frozen=True, slots=True)
class Forest:
    """P(correct) of a trace from its features. `link` "mean": the mean of the trees; "logistic": 1 / (1 + e^-s), with s
    the sum of the trees and `base`.

    `model`, `segment` and `prefix` (tokens of a trace that were read; 0: all) say what its features were made from."""

    features: tuple[str, ...]
    trees: tuple[Tree, ...]
    link: str = "mean"
    base: float = 0.0
    model: str = ""
    segment: int = 0
    prefix: int = 0
    digest: str = ""

    def __post_init__(self) -> None:
        if self.link not in LINKS or not self.trees or not self.features:
            raise InvalidInput(f"link {self.link!r}, {len(self.trees)} trees: one of {', '.join(LINKS)}, and a tree")
        if not math.isfinite(self.base):
            raise InvalidInput("base is not finite")
        for tree in self.trees:
            tree.check(len(self.features))
        if self.link == "mean" and not all(0 <= v <= 1 for tree in self.trees for v in tree.value):
            raise InvalidInput("a tree of a mean gives something else than a chance from 0 to 1")

    def __call__(self, x: Sequence[float]) -> float:
        """The chance for features in the order of `features`. They are rounded to float32, as those it learned from."""
        rounded = struct.unpack(f"{len(x)}f", struct.pack(f"{len(x)}f", *x))
        total = math.fsum(tree(rounded) for tree in self.trees)
        if self.link == "mean":
            return total / len(self.trees)
        s = total + self.base
        return 1 / (1 + math.exp(-s)) if s >= 0 else math.exp(s) / (1 + math.exp(s))

    def save(self, path: str | Path, **told: Any) -> str:
        """Writes the file, whole or not at all, with `told` as notes, and gives the first digits of its SHA-256. Raises
        ThriftyError."""
        trees = [{name: getattr(tree, name) for name in Tree.__slots__} for tree in self.trees]
        names = ("features", "link", "base", "model", "segment", "prefix")
        data = {"thrifty": KIND, **{name: getattr(self, name) for name in names}, **told, "trees": trees}
        body, target = (json.dumps(data) + "\n").encode(), Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_bytes(body)
            os.replace(partial, target)
        except OSError as error:
            raise ThriftyError(f"{target}: cannot be written: {error.strerror or error}") from error
        return hashlib.sha256(body).hexdigest()[:_DIGITS]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], digest: str = "") -> Forest:
        """From the file's object. Raises InvalidInput."""
        try:
            trees = tuple(
                Tree(
                    tuple(int(x) for x in tree["feature"]),
                    tuple(float(x) for x in tree["threshold"]),
                    tuple(int(x) for x in tree["left"]),
                    tuple(int(x) for x in tree["right"]),
                    tuple(float(x) for x in tree["value"]),
                )
                for tree in data["trees"]
            )
            features = tuple(str(name) for name in data["features"])
            rest = (str(data["link"]), float(data["base"]), str(data["model"]))
            return cls(features, trees, *rest, int(data["segment"]), int(data["prefix"]), digest)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidInput(f"{type(error).__name__}: {error}") from error


def load(who: str, path: str, sha256: str = "") -> Forest:
    """Reads what `save` wrote, once for each state of the file. Raises InvalidInput, naming `who`, for a file that
    cannot be read, is none, or has another SHA-256 than the one given."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{who}: {path}: cannot be read: {why}: give a forest that was trained for it") from error
    if stat.st_size > MOST_BYTES:
        raise InvalidInput(f"{who}: {path}: over {MOST_BYTES:,} bytes: it is no {KIND}")
    found = _read(who, path, stat.st_mtime_ns, stat.st_size)
    if not found.digest.startswith(sha256.strip().lower()[:_DIGITS]):
        raise InvalidInput(
            f"{who}: {path}: its SHA-256 begins {found.digest}, and knob sha256 says {sha256!r}: give the file that "
            "the plan was made with, or correct the knob"
        )
    return found


@functools.lru_cache(maxsize=8)
def _read(who: str, path: str, changed: int, size: int) -> Forest:
    try:
        body = Path(path).read_bytes()
        data = json.loads(body)
        if not isinstance(data, dict) or data.get("thrifty") != KIND:
            raise InvalidInput(f'it does not begin {{"thrifty": "{KIND}", ...}}')
        return Forest.from_dict(data, hashlib.sha256(body).hexdigest()[:_DIGITS])
    except (InvalidInput, OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{who}: {path}: it is no {KIND}: {error}") from error
