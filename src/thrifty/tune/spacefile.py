"""Reads a space of plans from TOML; whatever is wrong in it is named before anything is built or spent.

    name = "retrieval"
    [budget]
    output = { values = [48, 96] }
    [[methods]]
    use = "fixed-k"
    optional = false
    [methods.knobs]
    k = { low = 1, high = 16, log = true, steps = 4 }
    order = "document"
    [rules]
    max_methods = 2
    min_methods = 0
    at_most_one = [["adaptive-k", "fixed-k"]]
    exactly_one = [["budget-prompt", "chain-of-draft"]]
    order = "stages"      # or "given", or a list of names, or a list of such lists, which are then tried

A knob or a limit is one value, `{values = [...]}`, or a range with `steps` values from `low` to `high`, evenly spaced
or, with `log`, by equal factors. What a range leaves out, `log` too, is as the method says of its knob.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from thrifty import registry
from thrifty.budget import Budget
from thrifty.errors import InvalidInput, PlanError, nearest
from thrifty.method import Method, Range, check_knob
from thrifty.plan import ROLES
from thrifty.tune.space import Entry, Rules, Space

MOST_BYTES = 1_000_000
MOST_LEVELS = 1_000
"""Values of one knob."""

_KEYS = ("name", "on_exceed", "budget", "engines", "methods", "rules")
_ENTRY = ("use", "optional", "knobs")
_RULES = tuple(f.name for f in fields(Rules))
_RANGE = ("low", "high", "log", "steps")


def load(path: str | Path) -> Space:
    """Reads a TOML file; the space's name defaults to the file's. Raises InvalidInput, beginning with the file."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            read = stream.read(MOST_BYTES + 1)
        text = read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"space {file}: cannot be read: not UTF-8 at byte {error.start}") from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"space {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(read) > MOST_BYTES:
        raise InvalidInput(f"space {file}: over {MOST_BYTES:,} bytes: it is no space")
    return from_toml(text, f"space {file}", name=file.stem)


def from_toml(text: str, source: str = "space", name: str = "space") -> Space:
    """Reads a TOML document. Raises InvalidInput, beginning with `source`, naming what is known."""
    try:
        data = tomllib.loads(text.replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{source}: not TOML: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{source}: TOML that cannot be read: {error}") from error
    try:
        return from_dict({"name": name, **data})
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from error
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error}") from error


def from_dict(data: Mapping[str, Any]) -> Space:
    """A space from what TOML says. Raises InvalidInput."""
    _known(data, _KEYS, "space key")
    entries = [_entry(i, entry) for i, entry in enumerate(_a(list, data, "methods", []))]
    names = [entry.name for entry in entries]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InvalidInput(f"method {twice!r} stands twice: put all its values into one entry")
    budget = {name: _limit(name, value) for name, value in _a(dict, data, "budget", {}).items()}
    engines = _a(dict, data, "engines", {})
    for role, spec in engines.items():
        if role not in ROLES:
            raise InvalidInput(nearest(role, ROLES, "engine role"))
        if not isinstance(spec, str):
            raise InvalidInput(f"engine {role} = {spec!r}: text such as 'local:smollm2' is needed")
    on_exceed = data.get("on_exceed", "degrade")
    if on_exceed not in ("degrade", "refuse"):
        raise InvalidInput(f"on_exceed = {on_exceed!r}: 'degrade' or 'refuse' is needed")
    rules = _rules(_a(dict, data, "rules", {}), entries)
    return Space(_a(str, data, "name", "space"), tuple(entries), rules, budget, dict(engines), on_exceed)


def default_space(engines: Mapping[str, Any], *, max_methods: int = 2) -> Space:
    """Every method of the registry that these engines can run, at most `max_methods` of different families stacked.

    Of each method one knob is varied: that which makes it a no-op at its far end, or else its first number. Its values
    are the default, half of it and twice it, within the knob's range (of a choice: the first three).

    Raises PlanError when the engines can run no method.
    """
    entries: list[Entry] = []
    families: dict[str, list[str]] = {}
    answer = engines.get("answer")
    have = frozenset() if answer is None else answer.capabilities
    for name, source in registry.sources().items():
        method = registry.get(name)
        roles = all(role in engines and needs <= engines[role].capabilities for role, needs in method.roles.items())
        if not roles or not method.needs <= have or method.remembers:
            continue  # what remembers calls makes examples depend on each other
        entries.append(Entry(method, True, _few(method)))
        families.setdefault(source.family, []).append(name)
    if not entries:
        raise PlanError(f"these engines can run none of the {len(registry.names())} methods: give one that has `text`")
    groups = tuple(tuple(group) for group in families.values() if len(group) > 1)
    return Space("default", tuple(entries), Rules(max_methods=min(max_methods, len(families)), at_most_one=groups))


# -- details -------------------------------------------------------------------------------------------------


def _entry(i: int, data: Any) -> Entry:
    if not isinstance(data, dict) or not isinstance(data.get("use"), str):
        raise InvalidInput(f'method {i + 1} of the space needs `use = "NAME"`')
    _known(data, _ENTRY, f"key of method {data['use']!r} (knobs stand under [methods.knobs]):")
    optional = data.get("optional", True)
    if not isinstance(optional, bool):
        raise InvalidInput(f"{data['use']}: optional = {optional!r}: true or false is needed")
    method = registry.get(data["use"])
    known = method.knobs()
    knobs: dict[str, tuple[Any, ...]] = {}
    for name, given in _a(dict, data, "knobs", {}).items():
        if name not in known:
            raise InvalidInput(nearest(name, known, f"knob of {method.name!r}"))
        default, allowed = known[name]
        where = f"{method.name}: knob {name}"
        levels = _levels(where, given, isinstance(default, int), allowed)
        levels = tuple(tuple(x) if isinstance(x, list) else x for x in levels)
        described = next(f for f in fields(method) if f.name == name)
        for level in levels:
            check_knob(method.name, name, level, described)
        knobs[name] = _distinct(where, levels)
    return Entry(method, optional, knobs)


def _limit(name: str, given: Any) -> tuple[Any, ...]:
    levels = _levels(f"budget {name}", given, name not in ("usd", "engine_seconds", "deadline"), None)
    for level in levels:
        Budget.from_dict({name: level})
    return _distinct(f"budget {name}", levels)


def _levels(where: str, given: Any, whole: bool, allowed: Range | None) -> tuple[Any, ...]:
    if not isinstance(given, dict):
        return (given,)
    if "values" in given:
        _known(given, ("values",), f"key beside `values` of {where}:")
        values = given["values"]
        if not isinstance(values, list) or not 1 <= len(values) <= MOST_LEVELS:
            raise InvalidInput(f"{where}: values = {values!r}: a list of 1 to {MOST_LEVELS:,} values is needed")
        return tuple(values)
    _known(given, _RANGE, f"key of {where}:")
    low = given.get("low", None if allowed is None else allowed.low)
    high = given.get("high", None if allowed is None else allowed.high)
    steps, log = given.get("steps", 3), given.get("log", False if allowed is None else allowed.log)
    for word, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidInput(f"{where}: {word} = {value!r}: a number is needed, or `values = [...]`")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_LEVELS:
        raise InvalidInput(f"{where}: steps = {steps!r}: a whole number from 1 to {MOST_LEVELS:,} is needed")
    if not isinstance(log, bool):
        raise InvalidInput(f"{where}: log = {log!r}: true or false is needed")
    assert low is not None and high is not None  # numbers, as was just seen
    if not low <= high or (log and low <= 0):
        need = "0 < low <= high" if log else "low <= high"
        raise InvalidInput(f"{where}: low = {low!r}, high = {high!r}: {need} is needed")
    parts = [i / (steps - 1) for i in range(steps)] if steps > 1 else [0.0]
    values = [low * (high / low) ** x if log else low + (high - low) * x for x in parts]
    values[0] = low
    if steps > 1:
        values[-1] = high  # exactly, whatever the arithmetic between says
    return tuple(dict.fromkeys(round(x) for x in values)) if whole else tuple(dict.fromkeys(float(x) for x in values))


def _distinct(where: str, levels: tuple[Any, ...]) -> tuple[Any, ...]:
    seen: list[Any] = []
    for level in levels:
        if level in seen:
            raise InvalidInput(f"{where}: {level!r} is there twice: drop one")
        seen.append(level)
    return levels


def _rules(data: Mapping[str, Any], entries: Sequence[Entry]) -> Rules:
    _known(data, _RULES, "rule")
    names = [entry.name for entry in entries]
    counts = {}
    for word, default in (("max_methods", Rules.max_methods), ("min_methods", Rules.min_methods)):
        value = data.get(word, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidInput(f"rule {word} = {value!r}: a whole number of at least 0 is needed")
        counts[word] = value
    most = max(counts["max_methods"], counts["min_methods"]) if "max_methods" not in data else counts["max_methods"]
    if counts["min_methods"] > most:
        raise InvalidInput(f"rules: min_methods = {counts['min_methods']} is more than max_methods = {most}")
    groups = {word: _groups(word, data.get(word, []), names) for word in ("at_most_one", "exactly_one")}
    for entry in entries:
        group = next((g for g in groups["at_most_one"] if entry.name in g), ())
        if not entry.optional and len(group) > 1:
            raise InvalidInput(
                f"{entry.name!r} is not optional, so others in at_most_one = {list(group)} can never stand: "
                "drop `optional = false`, or write the group under exactly_one"
            )
    once = [name for g in groups["exactly_one"] for name in g]
    twice = next((name for i, name in enumerate(once) if name in once[:i]), None)
    if twice is not None:
        raise InvalidInput(f"exactly_one has {twice!r} in two groups: keep it in one")
    order = data.get("order", "stages")
    if isinstance(order, list):
        lists = order if order and all(isinstance(x, list) for x in order) else [order]
        order = tuple(_groups("order", lists, names))
    elif order not in ("stages", "given"):
        raise InvalidInput(f"rule order = {order!r}: 'stages', 'given', or lists of method names are needed")
    return Rules(most, counts["min_methods"], groups["at_most_one"], groups["exactly_one"], order)


def _groups(word: str, given: Any, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    if not isinstance(given, list) or not all(isinstance(g, list) and g for g in given):
        raise InvalidInput(f"rule {word} = {given!r}: a list of lists of method names is needed")
    for group in given:
        for i, name in enumerate(group):
            if name not in names:
                raise InvalidInput(nearest(str(name), names, f"method of this space in rule {word}:"))
            if name in group[:i]:
                raise InvalidInput(f"rule {word}: {name!r} stands twice in {group}")
    return tuple(tuple(group) for group in given)


def _few(method: type[Method]) -> dict[str, tuple[Any, ...]]:
    """The one knob that the default space varies, with its values, the default first."""
    known = method.knobs()
    numbers = [k for k, (d, _) in known.items() if isinstance(d, int | float) and not isinstance(d, bool)]
    named = [k for k in (method.identity or {}) if k in known]
    chosen = next((k for k in named if k in numbers or known[k][1].choices), next(iter(numbers), None))
    if chosen is None:
        chosen = next((k for k, (_, allowed) in known.items() if allowed.choices), None)
    if chosen is None:
        return {}
    default, allowed = known[chosen]
    if allowed.choices:
        return {chosen: tuple(dict.fromkeys([default, *allowed.choices]))[:3]}
    low = default if allowed.low is None else allowed.low
    high = 2 * default if allowed.high is None else allowed.high
    found = [default, *(max(low, min(high, x)) for x in (default / 2, default * 2))]
    values = [round(x) for x in found] if isinstance(default, int) else [float(x) for x in found]
    return {chosen: tuple(dict.fromkeys(values))}


def _known(data: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    for key in data:
        if key not in known:
            raise InvalidInput(nearest(str(key), known, kind))


def _a(kind: type, data: Mapping[str, Any], key: str, default: Any) -> Any:
    value = data.get(key, default)
    if not isinstance(value, kind):
        raise InvalidInput(f"space {key} = {value!r}: a {kind.__name__} is needed")
    return value
