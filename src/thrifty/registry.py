"""Finds methods: built-in ones by their file, other people's by the entry-point group `thrifty.methods`. And
instruments (analyses, evaluations, bounds) by their declaration.

A built-in method lives in `thrifty/methods/FAMILY/NAME.py`; the file's name with hyphens is its registered name, so
listing names imports nothing and asking for one imports one file. An entry point's name is the method's name, and its
object is the Method class. An instrument is found by reading its file for `INSTRUMENT = Instrument(...)`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thrifty.errors import InvalidInput, PlanError, nearest
from thrifty.instrument import Instrument
from thrifty.method import FAMILIES, Method

GROUP = "thrifty.methods"
INSTRUMENTS = ("meter", "tune", "bench")
"""Folders whose modules may declare an instrument."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a method comes from: a module of ours, or an entry point `package.module:Class`."""

    family: str
    target: str
    origin: str


@functools.cache
def sources() -> Mapping[str, Source]:
    """Every known method's name and where it comes from, sorted by name. Raises PlanError when two share a name."""
    import importlib.metadata  # slow to load, and only asked for by name look-ups

    found: dict[str, Source] = {}
    root = Path(__file__).parent / "methods"
    for family in FAMILIES:
        for file in sorted((root / family).glob("[!_]*.py")):
            name = file.stem.replace("_", "-")
            found[name] = Source(family, f"thrifty.methods.{family}.{file.stem}", "thrifty")
    for point in importlib.metadata.entry_points(group=GROUP):
        origin = point.dist.name if point.dist else "unknown package"
        if point.name in found:
            raise PlanError(
                f"method {point.name!r} is provided by {found[point.name].origin} and {origin}: uninstall one of them"
            )
        found[point.name] = Source("third_party", point.value, origin)
    return dict(sorted(found.items()))


@functools.cache
def get(name: str) -> type[Method]:
    """The class of a method. Raises InvalidInput with the nearest name when there is none."""
    source = sources().get(name)
    if source is None:
        raise InvalidInput(nearest(name, sources(), "method"))
    if source.family == "third_party":
        return _foreign(name, source)
    module = importlib.import_module(source.target)
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == source.target and c.name == name
    ]
    if len(classes) != 1:
        raise PlanError(f"{source.target} must define one Method with name = {name!r}; it defines {len(classes)}")
    return _sound(classes[0])


def _foreign(name: str, source: Source) -> type[Method]:
    """The class that another package's entry point names. Raises PlanError, naming the package, when there is none."""
    module, _, attribute = source.target.partition(":")
    where = f"method {name!r} of {source.origin}"
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise PlanError(f"{where} cannot be imported from {source.target}: {error}; repair or uninstall it") from error
    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise PlanError(f"{where}: {source.target} is no thrifty.Method class")
    if found.name != name:
        raise PlanError(f"{where}: the class calls itself {found.name!r}; its entry point must have the same name")
    return _sound(found)


def _sound(method: type[Method]) -> type[Method]:
    """The class. Raises PlanError when a knob is called `use`: in TOML that is the method's own name."""
    if "use" in method.knobs():
        raise PlanError(
            f"method {method.name!r}: a knob cannot be called 'use', which names the method in TOML: rename it"
        )
    return method


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sources())


# -- instruments -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Declared:
    """An instrument, the folder of its module, and what the module says it is about (its first paragraph)."""

    instrument: Instrument
    folder: str
    about: str


@functools.cache
def instruments() -> Mapping[str, Declared]:
    """Every instrument by name, sorted; nothing is imported. Raises PlanError for a declaration that cannot be read, or
    a name that something else has."""
    found: dict[str, Declared] = {}
    for folder in INSTRUMENTS:
        for file in sorted((Path(__file__).parent / folder).glob("*.py")):
            text = file.read_text(encoding="utf-8")
            if "INSTRUMENT = " not in text:
                continue
            tree = ast.parse(text)
            instrument = _declaration(tree, f"{folder}/{file.name}")
            if instrument is None:
                continue
            if instrument.name in found or instrument.name in sources():
                raise PlanError(f"{folder}/{file.name}: the name {instrument.name!r} is taken: choose another")
            found[instrument.name] = Declared(instrument, folder, (ast.get_docstring(tree) or "").split("\n\n")[0])
    return dict(sorted(found.items()))


def _declaration(tree: ast.Module, where: str) -> Instrument | None:
    """The instrument of a parsed module; None where it declares none."""
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["INSTRUMENT"]):
            continue
        try:
            if not isinstance(node.value, ast.Call) or node.value.args:
                raise ValueError
            return Instrument(**{str(k.arg): ast.literal_eval(k.value) for k in node.value.keywords})
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"{where}: INSTRUMENT = Instrument(name=..., kind=..., paper=..., runs=...) in literals is needed"
            ) from error
    return None
