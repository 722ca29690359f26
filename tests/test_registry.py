"""Registry: built-in methods by their file, other people's by entry point, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import thrifty
from thrifty import InvalidInput, Plan, PlanError, registry
from thrifty.engines.scripted import ScriptedEngine
from thrifty.method import FAMILIES

PACKAGE = '''
from dataclasses import dataclass
from thrifty import Call, Receipt, Rewrite, knob

@dataclass(frozen=True, kw_only=True)
class Politely(Rewrite):
    """Says please."""

    name = "politely"
    paper = "none"
    no_identity = "it always says please"
    times: int = knob(1, "how often", low=1, high=9)

    async def rewrite(self, call: Call) -> Call:
        return call.with_receipt(Receipt(self.name, True, f"said please {self.times} times"))

NOT_A_METHOD = 3
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path where packages can be installed; the registry forgets before and after."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "politely_pkg.py").write_text(PACKAGE)
    registry.sources.cache_clear()
    registry.get.cache_clear()
    yield tmp_path
    sys.modules.pop("politely_pkg", None)
    registry.sources.cache_clear()
    registry.get.cache_clear()


def install(folder: Path, package: str, points: str) -> None:
    """What pip leaves behind: a dist-info folder with metadata and entry points."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[thrifty.methods]\n{points}\n")


async def test_an_installed_package_adds_a_method(installed: Path) -> None:
    install(installed, "thrifty-politely", "politely = politely_pkg:Politely")
    assert "politely" in registry.names()
    assert registry.sources()["politely"].origin == "thrifty-politely"
    plan = Plan.from_toml('name = "p"\n[[methods]]\nuse = "politely"\ntimes = 2\n')
    assert Plan.from_toml(plan.to_toml()) == plan
    answer = await plan.build(ScriptedEngine("yes")).ask("Well?")
    assert answer.receipts[0].reason == "said please 2 times"
    assert plan.methods[0].family == "third_party"


def test_listing_imports_nothing(installed: Path) -> None:
    install(installed, "thrifty-politely", "politely = politely_pkg:Politely")
    assert "politely" in registry.names() and "politely_pkg" not in sys.modules
    code = "import sys, thrifty.registry as r; r.names(); print([m for m in sys.modules if '.methods.' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_two_methods_of_one_name_are_refused(installed: Path) -> None:
    install(installed, "thrifty-politely", "fixed-k = politely_pkg:Politely")
    with pytest.raises(PlanError, match="'fixed-k' is provided by thrifty and thrifty-politely: uninstall one"):
        registry.names()


def test_two_packages_of_one_name_are_refused(installed: Path) -> None:
    install(installed, "pkg-one", "politely = politely_pkg:Politely")
    install(installed, "pkg-two", "politely = politely_pkg:Politely")
    with pytest.raises(PlanError, match="'politely' is provided by pkg-(one|two) and pkg-(one|two)"):
        registry.names()


@pytest.mark.parametrize("target", ["politely_pkg:NOT_A_METHOD", "politely_pkg:Missing"])
def test_an_entry_point_that_is_no_method_is_refused(installed: Path, target: str) -> None:
    install(installed, "thrifty-politely", f"politely = {target}")
    with pytest.raises(PlanError, match=f"'politely' of thrifty-politely: {target} is no thrifty.Method"):
        registry.get("politely")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no_such_module_here:Politely", "no_such_module_here"),
        ("politely_pkg", "is no thrifty.Method class"),
    ],
)
def test_a_broken_entry_point_is_named(installed: Path, target: str, said: str) -> None:
    install(installed, "thrifty-politely", f"politely = {target}")
    with pytest.raises(PlanError, match=said) as refused:
        registry.get("politely")
    assert "thrifty-politely" in str(refused.value)


def test_an_entry_point_whose_method_has_another_name_is_refused(installed: Path) -> None:
    """A plan would be written under the one name and read under the other."""
    install(installed, "thrifty-politely", "kindly = politely_pkg:Politely")
    with pytest.raises(PlanError, match="'kindly'.*'politely'"):
        registry.get("kindly")


def test_a_knob_that_hides_the_methods_name_is_refused(installed: Path) -> None:
    (installed / "politely_pkg.py").write_text(PACKAGE.replace("times: int", "use: int"))
    install(installed, "thrifty-politely", "politely = politely_pkg:Politely")
    with pytest.raises(PlanError, match="'politely': a knob cannot be called 'use'"):
        registry.get("politely")


def test_every_file_of_a_family_is_a_method_of_its_name() -> None:
    root = Path(thrifty.__file__).parent / "methods"
    files = {f.stem.replace("_", "-"): f.parent.name for family in FAMILIES for f in (root / family).glob("[!_]*.py")}
    assert files and set(files) <= set(registry.names())
    for name, family in files.items():
        method = registry.get(name)
        assert method.name == name and method().family == family == registry.sources()[name].family


@pytest.mark.parametrize(
    ("given", "offered"),
    [("adaptive_k", "adaptive-k"), ("chain-of-drafts", "chain-of-draft"), ("trunc", "truncation")],
)
def test_an_unknown_name_is_refused_with_the_nearest(given: str, offered: str) -> None:
    with pytest.raises(InvalidInput, match=f"unknown method '{given}': did you mean '{offered}'"):
        registry.get(given)
