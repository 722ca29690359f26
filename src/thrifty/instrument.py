"""Instruments: analyses, evaluations and bounds. They tell something about models, plans or runs, and change no call.

A module of `thrifty/meter`, `thrifty/tune` or `thrifty/bench` says that it is one:

    INSTRUMENT = Instrument(
        name="accuracy-length",
        kind="analysis",
        paper="...",
        runs="thrifty.meter.accuracy_length:regress",
    )

The declaration holds literals only: the registry reads it from the file and imports nothing, so that listing needs
neither numpy nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from thrifty.errors import PlanError

Kind = Literal["analysis", "evaluation", "bound"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Instrument:
    """One analysis, evaluation or bound. Raises PlanError for an unknown kind or an empty field."""

    name: str
    """what the field calls it, with hyphens"""
    kind: Kind
    paper: str
    """title and identifier of the source"""
    runs: str
    """what runs it: a command that begins with `thrifty`, or `MODULE:FUNCTION`"""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"instrument {self.name!r}: kind = {self.kind!r}: one of {', '.join(KINDS)} is needed")
        if not (self.name and self.paper and self.runs):
            raise PlanError(f"instrument {self.name!r}: name, paper and runs are needed")
