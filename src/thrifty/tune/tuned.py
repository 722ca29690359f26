"""The end of a tuning run: what was tested, what is certified, what it cost, and where the files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thrifty.errors import ThriftyError
from thrifty.plan import Plan
from thrifty.spend import Spend
from thrifty.tune.calibration import Use
from thrifty.tune.certificate import Certificate
from thrifty.tune.frozen import Frozen
from thrifty.tune.losses import Losses
from thrifty.tune.saving import Beside
from thrifty.tune.splits import Splits, groups_of

RESULTS, SEARCH, CERTIFICATE, PLAN, REPORT = (
    "results.jsonl",
    "search.json",
    "certificate.json",
    "plan.toml",
    "report.html",
)
"""The files of a folder."""


class NothingCertified(ThriftyError):
    """The tuning is over, and no plan is certified."""

    exit_code = 6


class StoppedByBudget(ThriftyError):
    """A budget stopped the tuning before any plan was certified or had failed; a larger one lets it go on."""

    exit_code = 3


@dataclass(frozen=True)
class Test:
    """One plan of the frozen order on the calibration examples. `corrected` is conformal risk control's risk."""

    plan: Plan
    losses: Losses
    p_value: float | None = None
    corrected: float | None = None
    certified: bool = False


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The end of a tuning run, also of one that its budget stopped."""

    frozen: Frozen
    splits: Splits
    use: Use | None = None
    """None where there was nothing to test: the calibration examples are still unused"""
    tests: tuple[Test, ...] = ()
    plan: Plan | None = None
    certificate: Certificate | None = None
    beside: Beside | None = None
    """what the certified plan spends beside the reference, on examples that were not searched on"""
    needed: str | None = None
    """where nothing is certified: how many examples would have been needed, or that no number would do"""
    stopped: str | None = None
    paid: Spend = Spend()
    """by this folder's results so far, earlier runs included"""
    naive: Spend = Spend()
    """what every plan of the space on every example would have cost"""
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """What the tuning cost, as a share of the naive grid's tokens."""
        return self.paid.tokens / self.naive.tokens if self.naive.tokens else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "certified": self.plan is not None,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "plan_hash": None if self.plan is None else self.plan.hash,
            "statement": None if self.certificate is None else self.certificate.statement(),
            "tests": [
                {
                    "plan": test.plan.name,
                    "hash": test.plan.hash,
                    "loss": test.losses.mean,
                    "n": test.losses.n,
                    "p_value": test.p_value,
                    "corrected": test.corrected,
                    "certified": test.certified,
                }
                for test in self.tests
            ],
            "left_out": [list(pair) for pair in self.frozen.left_out],
            "search": {name: self.frozen.found.get(name) for name in ("strategy", "how", "tried", "rounds", "stopped")},
            "use": None if self.use is None else str(self.use),
            "groups": {name: len(groups_of(part)) for name, part in self.splits.parts().items()},
            "needed": self.needed,
            "stopped": self.stopped,
            "beside": None if self.beside is None else self.beside.to_dict(),
            "tokens_paid": self.paid.tokens,
            "tokens_naive_grid": self.naive.tokens,
            "files": {name: str(path) for name, path in self.files.items()},
        }
