"""Plan files with anything in them: a plan, or one clear refusal; never another error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thrifty import Budget, InvalidInput, Plan, registry
from thrifty.engines.spec import read
from thrifty.meter.prices import PriceTable

scalars = (
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["largest_gap", "degrade", "refuse", "scripted:echo", " "])
    | st.datetimes()
    | st.dates()
    | st.times()
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=5
)


def stanza(name: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"use": st.just(name)}, optional=dict.fromkeys(registry.get(name).knobs(), values))


methods = st.lists(st.one_of(*map(stanza, registry.names()), values), max_size=3) | values
limits = st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Budget)]), values, max_size=4)
roles = st.dictionaries(st.sampled_from(["answer", "draft", "scorer", "embedder", "judge", "x"]), values, max_size=3)
documents = st.fixed_dictionaries(
    {},
    optional={
        "name": values,
        "on_exceed": values,
        "budget": limits | values,
        "engines": roles | values,
        "methods": methods,
        "other": values,
    },
)


@given(documents)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_anything_in_a_plan_is_read_or_refused(document: dict[str, Any]) -> None:
    text = tomli_w.dumps(document)
    try:
        plan = Plan.from_toml(text)
    except InvalidInput as error:
        assert str(error).startswith("plan: ")
        return
    assert Plan.from_toml(plan.to_toml()).hash == plan.hash


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_as_a_plan_or_an_engine(text: str) -> None:
    for reader in (Plan.from_toml, read):
        try:
            reader(text)
        except InvalidInput as error:
            assert str(error)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"x = " + b"[" * 5000, "TOML"),
        (b"[budget]\noutput = " + b"9" * 5000, "TOML"),
        (b"\xff", "UTF-8"),
        (b"#" * 1_000_001, "over"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=word) as refused:
        Plan.load(path)
    assert str(path) in str(refused.value)
    with pytest.raises(InvalidInput):
        PriceTable.from_toml(path)


@pytest.mark.parametrize("stem", ["é😀", 'quo"te', "back\\slash", "line\nbreak"])
def test_the_name_of_a_file_is_the_name_of_its_plan(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.toml"
    path.write_bytes(b"\xef\xbb\xbf[budget]\r\noutput = 3\r\n")
    plan = Plan.load(path)
    assert (plan.name, plan.budget) == (stem, Budget(output=3))


def test_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("[budget]\noutput = \n")
    with pytest.raises(InvalidInput, match="line 2"):
        Plan.load(path)


def test_an_address_alone_is_refused_without_repeating_its_password() -> None:
    with pytest.raises(InvalidInput, match="openai:MODEL@URL") as refused:
        read("http://user:hunter22@host/v1")
    assert "hunter22" not in str(refused.value)
