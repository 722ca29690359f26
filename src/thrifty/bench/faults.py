"""Errors that cross from one process to another, as JSON: the same class, the same message, the same notes.

A fault that is no ThriftyError arrives as WorkerFailed, with the traceback of where it happened as a note."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from thrifty import errors
from thrifty.errors import BudgetExceeded, ThriftyError


class WorkerFailed(ThriftyError):
    """A worker ran into what nobody had foreseen."""


def fault_of(error: BaseException) -> dict[str, Any]:
    """An error as JSON.

    >>> str(error_of(fault_of(errors.InvalidInput("no such file"))))
    'no such file'
    """
    notes = list(getattr(error, "__notes__", ()))
    if isinstance(error, BudgetExceeded):
        kind, what = "BudgetExceeded", [getattr(error, n) for n in _REFUSAL]
        return {"kind": kind, "args": what, "notes": notes}
    known = next((k.__name__ for k in type(error).__mro__ if vars(errors).get(k.__name__) is k), None)
    if known is None:
        notes.append("".join(traceback.format_exception(error)))
        return {"kind": "WorkerFailed", "args": [f"{type(error).__name__}: {error}"], "notes": notes}
    return {"kind": known, "args": [str(error)], "notes": notes}


def error_of(fault: Mapping[str, Any]) -> ThriftyError:
    """The opposite of `fault_of`."""
    kind = vars(errors).get(fault["kind"], WorkerFailed)
    error: ThriftyError = kind(*fault["args"])
    for note in fault["notes"]:
        error.add_note(note)
    return error


_REFUSAL = ("account", "resource", "limit", "settled", "held", "asked")
