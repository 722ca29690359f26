"""The law table: every registered method against every law, on every kind of engine that has what it needs.

A method joins by being registered. A law that says nothing about a method is skipped with its reason; the
reasons, and what ran, are written to `out/laws.json` for the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from law_table import LAWS, Law
from world import TINY, engines_for

from thrifty import registry

ROWS = [
    (name, law, kind)
    for name in registry.names()
    for law in LAWS
    for kind in (engines_for(registry.get(name)) or [""])
    if kind != TINY or law.model or (law.once and engines_for(registry.get(name)) == [TINY])
]


@pytest.mark.parametrize(("name", "law", "kind"), [pytest.param(*r, id=f"{r[0]}-{r[1].name}-{r[2]}") for r in ROWS])
async def test_law(name: str, law: Law, kind: str) -> None:
    method = registry.get(name)
    reason = law.applies(method)
    if reason is None and not kind:
        reason = f"no engine of the table has {', '.join(sorted(method.needs))}"
    if reason is None and law.once and kind != engines_for(method)[0]:
        reason = "does not depend on the engine"
    if reason is not None:
        pytest.skip(f"{law.name}: {reason}")
    await law.check(method, kind)


@pytest.mark.parametrize("name", registry.names())
def test_every_method_has_a_law_run(name: str) -> None:
    method = registry.get(name)
    assert engines_for(method), f"{name} runs on no engine of the table: add one to world.ENGINES"
    assert sum(law.applies(method) is None for law in LAWS) >= len(LAWS) - 5, f"{name} is skipped by too many laws"


def test_the_catalogue_gets_what_was_skipped() -> None:
    table = {name: {law.name: law.applies(registry.get(name)) or "runs" for law in LAWS} for name in registry.names()}
    assert all("NO REASON GIVEN" not in reason for laws in table.values() for reason in laws.values())
    out = Path(__file__).parents[2] / "out" / "laws.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    assert json.loads(out.read_text(encoding="utf-8")) == table
