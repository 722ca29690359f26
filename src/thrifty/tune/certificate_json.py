"""Reading a certificate's JSON: every field checked, none unknown, none missing; nothing of it is believed yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from thrifty.errors import InvalidInput, nearest
from thrifty.tune.calibration import Claim
from thrifty.tune.certificate import VERSION, Certificate, Figure, Saving, SplitUsed, Tested

_CLAIM = ("loss", "alpha", "delta_asked", "procedure", "bound")
_TEXTS = ("plan_hash", "plan_toml", "reference_hash", "search_hash", "data_hash", "model", "dtype", "date")
_OPTIONAL_TEXTS = ("algorithm", "key", "signature")


def read(data: Any) -> Certificate:
    """A certificate from its JSON form. Raises InvalidInput that names the field that is wrong."""
    if not isinstance(data, Mapping) or "thrifty_certificate" not in data:
        raise InvalidInput("a JSON object with `thrifty_certificate` is needed")
    if data["thrifty_certificate"] != VERSION:
        raise InvalidInput(
            f"`thrifty_certificate` is {data['thrifty_certificate']!r:.40}, and this Thrifty reads {VERSION}: use a "
            "newer one"
        )
    known = [f.name for f in fields(Certificate) if f.name != "claim"] + [*_CLAIM, "thrifty_certificate"]
    for name in data:
        if name not in known:
            raise InvalidInput(nearest(str(name), known, "field of a certificate"))
    for name in known:
        if name not in data and name not in _OPTIONAL_TEXTS:
            raise InvalidInput(f"the field `{name}` is missing")
    texts = {name: _text(data, name) for name in _TEXTS}
    texts |= {name: _text(data, name) for name in _OPTIONAL_TEXTS if name in data}
    bound = data["bound"]
    claim = Claim(  # refuses what it does not know
        cast(Any, _text(data, "loss")),
        _number(data, "alpha"),
        _maybe_number(data, "delta_asked"),
        cast(Any, _text(data, "procedure")),
        cast(Any, bound if bound is None else _text(data, "bound")),
    )
    certificate = Certificate(
        **texts,
        claim=claim,
        order=_texts(data, "order"),
        split=None if data["split"] is None else _split(_object(data, "split")),
        uses=_whole(data, "uses"),
        delta=_maybe_number(data, "delta"),
        spent=_maybe_number(data, "spent"),
        engines=_object(data, "engines"),
        n=_whole(data, "n"),
        groups=_texts(data, "groups"),
        tested=tuple(_tested(row) for row in _list(data, "tested")),
        value=_number(data, "value"),
        p_value=_maybe_number(data, "p_value"),
        corrected=_maybe_number(data, "corrected"),
        holdout=None if data["holdout"] is None else _figure(_object(data, "holdout")),
        saving=None if data["saving"] is None else _saving(_object(data, "saving")),
        versions={name: str(version) for name, version in _object(data, "versions").items()},
    )
    try:
        _ = certificate.hash
    except (TypeError, RecursionError) as error:
        raise InvalidInput(f"what it holds is no JSON of ours: {error}") from error
    return certificate


def _tested(row: Any) -> Tested:
    if not isinstance(row, Mapping) or set(row) != {"plan", "name", "losses"}:
        raise InvalidInput("each of `tested` is an object with plan, name and losses")
    values = _list(row, "losses")
    if not all(_real(value) for value in values):
        raise InvalidInput(f"the losses of plan {row['plan']!r} are not all numbers")
    return Tested(_text(row, "plan"), _text(row, "name"), tuple(float(value) for value in values))


def _figure(data: Mapping[str, Any]) -> Figure:
    _exactly(data, Figure)
    value, low, high, level = (_number(data, name) for name in ("value", "low", "high", "level"))
    return Figure(value, low, high, level, _whole(data, "n"))


def _saving(data: Mapping[str, Any]) -> Saving:
    _exactly(data, Saving)
    share = _figure(_object(data, "share"))
    return Saving(_text(data, "axis"), share, _number(data, "reference"), _number(data, "plan"))


def _split(data: Mapping[str, Any]) -> SplitUsed:
    _exactly(data, SplitUsed)
    shares = _list(data, "shares")
    if not all(_real(share) for share in shares):
        raise InvalidInput("`shares` are not all numbers")
    return SplitUsed(_text(data, "data_hash"), tuple(float(share) for share in shares), _whole(data, "seed"))


def _exactly(data: Mapping[str, Any], kind: type) -> None:
    wanted = {f.name for f in fields(kind)}
    if set(data) != wanted:
        raise InvalidInput(f"an object with {', '.join(sorted(wanted))} is needed, not with {', '.join(sorted(data))}")


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(data: Mapping[str, Any], name: str, kind: str) -> InvalidInput:
    return InvalidInput(f"`{name}` is {data.get(name)!r:.60}: {kind} is needed")


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        raise _refuse(data, name, "a text")
    return value


def _number(data: Mapping[str, Any], name: str) -> float:
    value = data[name]
    if not _real(value):
        raise _refuse(data, name, "a number")
    return float(value)


def _maybe_number(data: Mapping[str, Any], name: str) -> float | None:
    return None if data[name] is None else _number(data, name)


def _whole(data: Mapping[str, Any], name: str) -> int:
    value = data[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refuse(data, name, "a whole number")
    return value


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data[name]
    if not isinstance(value, list | tuple):
        raise _refuse(data, name, "a list")
    return list(value)


def _texts(data: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = _list(data, name)
    if not all(isinstance(value, str) for value in values):
        raise _refuse(data, name, "a list of texts")
    return tuple(values)


def _object(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data[name]
    if not isinstance(value, Mapping):
        raise _refuse(data, name, "an object")
    return dict(value)
