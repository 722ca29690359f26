"""Spaces: closed-form counts, every refusal by name, and plans that the plan check accepts."""

from __future__ import annotations

from itertools import product
from math import comb
from pathlib import Path

import pytest

from thrifty import InvalidInput, Plan, PlanError
from thrifty.engines.scripted import ScriptedEngine
from thrifty.tune.space import Space, unique_names
from thrifty.tune.spacefile import default_space, from_toml, load

RECIPES = Path(__file__).parents[2] / "recipes" / "spaces"
ENGINE = ScriptedEngine("x")
BOTH = {"answer": ENGINE, "embedder": ScriptedEngine("", model="vectors")}

THREE = """
[[methods]]
use = "fixed-k"
[methods.knobs]
k = { values = [1, 2, 4] }
[[methods]]
use = "truncation"
[methods.knobs]
tokens = { low = 10, high = 1000, log = true, steps = 3 }
keep = { values = ["first", "last"] }
[[methods]]
use = "budget-prompt"
[methods.knobs]
words = { low = 10, high = 40, log = false, steps = 4 }
unit = "words"
"""


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        ("max_methods = 0", 1),
        ("max_methods = 1", 1 + 3 + 6 + 4),
        ("max_methods = 2", 1 + 3 + 6 + 4 + 3 * 6 + 3 * 4 + 6 * 4),
        ("max_methods = 3", 4 * 7 * 5),
        ("max_methods = 3\nmin_methods = 2", 3 * 6 + 3 * 4 + 6 * 4 + 3 * 6 * 4),
        ('at_most_one = [["fixed-k", "truncation"]]', (1 + 3 + 6) * 5),
        ('at_most_one = [["fixed-k", "truncation"], ["truncation", "budget-prompt"]]', 1 + 3 + 6 + 4 + 3 * 4),
        ('exactly_one = [["fixed-k", "truncation"]]', (3 + 6) * 5),
        ('exactly_one = [["fixed-k", "truncation"]]\nmax_methods = 1', 3 + 6),
    ],
)
def test_counts_are_closed_forms_and_the_expansion_has_so_many(rules: str, count: int) -> None:
    space = from_toml(f"{THREE}\n[rules]\n{rules}")
    assert space.count() == count == len(list(space.choices()))
    found = space.expand(BOTH)
    assert (found.total, len(found.plans), found.duplicates, found.unbuildable) == (count, count, 0, ())
    assert len({p.hash for p in found.plans}) == len({p.name for p in found.plans}) == count
    for plan in found.plans:
        assert Plan.from_toml(plan.to_toml()) == plan


def test_plans_are_the_cross_product_that_one_would_write_by_hand() -> None:
    space = from_toml(f'{THREE}\n[rules]\nexactly_one = [["fixed-k", "truncation"]]')
    texts = ["", *(f"[[methods]]\nuse = 'budget-prompt'\nwords = {w}\n" for w in (10, 20, 30, 40))]
    lower = [f"[[methods]]\nuse = 'fixed-k'\nk = {k}\n" for k in (1, 2, 4)]
    lower += [
        f"[[methods]]\nuse = 'truncation'\ntokens = {t}\nkeep = '{keep}'\n"
        for t, keep in product((10, 100, 1000), ("first", "last"))
    ]
    by_hand = {Plan.from_toml(f"name = 'x'\n{a}{b}").hash for a, b in product(texts, lower)}
    assert {p.hash for p in space.expand(BOTH).plans} == by_hand


def test_ranges_are_evenly_spaced_or_by_equal_factors() -> None:
    (fixed, cut, prompt) = from_toml(THREE).entries
    assert cut.knobs["tokens"] == (10, 100, 1000) and prompt.knobs["words"] == (10, 20, 30, 40)
    space = from_toml("[[methods]]\nuse='self-consistency'\nknobs = {confidence = {steps = 3}, samples = 5}")
    assert space.entries[0].knobs == {"confidence": (0.5, 0.75, 1.0), "samples": (5,)}, "the method's own bounds"


def test_stages_order_the_stack_and_searches_stand_below_prompts() -> None:
    text = "\n".join(
        f"[[methods]]\nuse='{m}'\noptional=false" for m in ("self-consistency", "truncation", "budget-prompt")
    )

    def stack(order: str) -> list[str]:
        (plan,) = from_toml(f"{text}\n[rules]\nmax_methods=3\n{order}").expand(ENGINE).plans
        return [m.name for m in plan.methods]

    assert stack("") == ["budget-prompt", "truncation", "self-consistency"]
    assert stack('order = ["self-consistency", "budget-prompt"]') == ["self-consistency", "budget-prompt", "truncation"]
    with pytest.raises(PlanError, match="stands below"):
        stack('order = "given"')


def test_several_orders_are_tried_and_those_that_the_plan_check_refuses_are_counted() -> None:
    text = "\n".join(f"[[methods]]\nuse='{m}'\noptional=false" for m in ("truncation", "self-consistency"))
    orders = '[["truncation", "self-consistency"], ["self-consistency", "truncation"]]'
    found = from_toml(f"{text}\n[rules]\norder = {orders}").expand(ENGINE)
    assert [[m.name for m in p.methods] for p in found.plans] == [
        ["truncation", "self-consistency"],
        ["self-consistency", "truncation"],
    ]
    assert len({p.name for p in found.plans}) == 2
    text = "\n".join(f"[[methods]]\nuse='{m}'\noptional=false" for m in ("truncation", "budget-prompt"))
    found = from_toml(
        f'{text}\n[rules]\norder = [["budget-prompt", "truncation"], ["truncation", "budget-prompt"]]'
    ).expand(ENGINE)
    assert len(found.plans) == 1 and found.total == 2
    ((reason, count),) = found.unbuildable
    assert "stands below" in reason and count == 1 and "1 cannot run" in found.line()


def test_budgets_vary_too_and_same_plans_are_counted_once() -> None:
    space = from_toml(
        "[budget]\noutput = {values=[10, 20]}\nusd = 0.5\n"
        '[[methods]]\nuse="budget-prompt"\n[rules]\norder=[["budget-prompt"],["budget-prompt"]]'
    )
    found = space.expand(ENGINE)
    assert (found.total, len(found.plans), found.duplicates) == (8, 4, 4)
    assert {p.budget.output for p in found.plans} == {10, 20}
    assert {p.budget.usd for p in found.plans} == {500_000_000}
    assert len({p.name for p in found.plans}) == 4


def test_a_space_too_large_is_refused_before_anything_is_built() -> None:
    knobs = "\n".join(f"{k} = {{low=1, high=1000, steps=1000}}" for k in ("tokens", "over"))
    space = from_toml(f"[[methods]]\nuse='truncation'\n[methods.knobs]\n{knobs}")
    assert space.count() == 1_000_001 and space.count(500) == 501
    with pytest.raises(InvalidInput, match="more than 10,000 plans.*optuna"):
        space.expand(ENGINE)


def test_counting_the_stacks_of_many_methods_takes_no_time() -> None:
    space = default_space(BOTH, max_methods=2)
    assert space.count() == len(list(space.choices()))
    from dataclasses import replace

    copies = tuple(  # forty methods, at most forty at a time: 2^40 stacks, never enumerated
        replace(space.entries[0], method=type(f"M{i}", (space.entries[0].method,), {"name": f"m{i}"}), knobs={})
        for i in range(40)
    )
    wide = Space("wide", copies, replace(space.rules, at_most_one=(), max_methods=40))
    assert wide.count(10_000) == 10_001
    few = Space("few", copies, replace(space.rules, at_most_one=(), max_methods=2))
    assert few.count() == 1 + 40 + comb(40, 2)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[methods]]\nuse="adaptve-k"', "unknown method 'adaptve-k': did you mean 'adaptive-k'"),
        ('[[methods]]\nuse="fixed-k"\n[methods.knobs]\nkk = 3', "unknown knob of 'fixed-k' 'kk': did you mean 'k'"),
        ('[[methods]]\nuse="fixed-k"\n[methods.knobs]\nk = {values=[1, 0]}', "k = 0 is not allowed: from 1"),
        ('[[methods]]\nuse="fixed-k"\n[methods.knobs]\nk = {values=[1, 1]}', "1 is there twice"),
        ('[[methods]]\nuse="fixed-k"\n[methods.knobs]\nk = {low=0, high=3, log=true}', "0 < low <= high is needed"),
        ('[[methods]]\nuse="fixed-k"\n[methods.knobs]\nk = {low=5, high=3}', "low <= high is needed"),
        ('[[methods]]\nuse="fixed-k"\n[methods.knobs]\nk = {stepz=3}', "did you mean 'steps'"),
        ('[[methods]]\nuse="fixed-k"\n[methods.knobs]\nk = {values=[]}', "a list of 1 to 1,000 values"),
        ('[[methods]]\nuse="fixed-k"\nk = 3', "knobs stand under"),
        ('[[methods]]\nuse="fixed-k"\n[[methods]]\nuse="fixed-k"', "stands twice"),
        ('[[methods]]\nuse="fixed-k"\noptional="no"', "true or false"),
        ('[[methods]]\nname="fixed-k"', 'needs `use = "NAME"`'),
        ("[rules]\nmax_method = 2", "unknown rule 'max_method': did you mean 'max_methods'"),
        ("[rules]\nmax_methods = 1\nmin_methods = 2", "is more than max_methods"),
        ('[[methods]]\nuse="fixed-k"\n[rules]\nat_most_one=[["fixed-j"]]', "did you mean 'fixed-k'"),
        ('[[methods]]\nuse="fixed-k"\n[rules]\nat_most_one=["fixed-k"]', "a list of lists"),
        ('[rules]\norder="any"', "'stages', 'given', or lists"),
        ("[budget]\noutputs = 3", "did you mean 'output'"),
        ('[engines]\nanswr="x"', "did you mean 'answer'"),
        ('on_exceed="panic"', "'degrade' or 'refuse'"),
        ("methods = 3", "space methods = 3: a list is needed"),
        ("nme = 3", "unknown space key"),
        ("= 3", "not TOML"),
        (
            '[[methods]]\nuse="fixed-k"\noptional=false\n[[methods]]\nuse="truncation"\n'
            '[rules]\nat_most_one=[["fixed-k","truncation"]]',
            "can never stand",
        ),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_toml(text, "space s.toml")
    assert str(caught.value).startswith("space s.toml: ") and words in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


def test_a_space_without_a_plan_that_the_engine_can_run_says_why() -> None:
    space = from_toml('[[methods]]\nuse="no-thinking"\noptional=false')
    bare = ScriptedEngine("x", capabilities={"text"})
    with pytest.raises(PlanError, match="none of its 1 plans can run on engine scripted:scripted: .*continue"):
        space.expand(bare)
    found = from_toml('[[methods]]\nuse="no-thinking"\n[[methods]]\nuse="fixed-k"').expand(bare)
    assert [p.methods for p in found.plans] == [()], "the engine alone can always run"
    assert sum(n for _, n in found.unbuildable) == 3
    with pytest.raises(PlanError, match="rules leave no stack"):
        from_toml('[[methods]]\nuse="fixed-k"\noptional=false\n[rules]\nmax_methods=0').expand(BOTH)
    with pytest.raises(PlanError, match="none of the"):
        default_space({"answer": ScriptedEngine("x", capabilities=set())})


def test_files_are_read_and_missing_ones_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="gone.toml: cannot be read"):
        load(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        load(tmp_path / "bad.toml")
    (tmp_path / "mine.toml").write_text("[rules]\nmax_methods = 1\n")
    assert load(tmp_path / "mine.toml").name == "mine"


@pytest.mark.parametrize("name", sorted(p.name for p in RECIPES.glob("*.toml")))
def test_recipes_expand_whole(name: str) -> None:
    found = load(RECIPES / name).expand(BOTH)
    assert 10 < len(found.plans) == found.total and not found.unbuildable


def test_the_default_space_has_what_the_engines_can_run_and_no_more() -> None:
    alone, both = default_space({"answer": ENGINE}), default_space(BOTH)
    names = {e.name for e in both.entries}
    assert "adaptive-k" in names and "adaptive-k" not in {e.name for e in alone.entries}
    bare = default_space({"answer": ScriptedEngine("x", capabilities={"text"})})
    assert not {"no-thinking", "self-consistency"} & {e.name for e in bare.entries}
    assert "exact-cache" not in names, "what remembers calls makes examples depend on each other"
    found = both.expand(BOTH)
    assert not found.unbuildable and max(len(p.methods) for p in found.plans) == 2
    for entry in both.entries:
        for knob, values in entry.knobs.items():
            assert values[0] == entry.method.knobs()[knob][0], "the default first"


def test_the_hash_changes_with_what_changes_plans_and_not_with_the_name() -> None:
    one = from_toml(THREE, name="a")
    assert one.hash == from_toml(THREE, name="b").hash
    assert one.hash != from_toml(THREE.replace("[1, 2, 4]", "[1, 2]")).hash
    assert one.hash != from_toml(THREE + "\n[rules]\nmax_methods = 1").hash


def test_names_are_made_unique() -> None:
    plans = unique_names([Plan("a"), Plan("a", on_exceed="refuse"), Plan("b")])
    assert [p.name for p in plans][::2] == ["a", "b"] and plans[1].name.startswith("a #")
