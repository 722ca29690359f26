"""Searches on a planted response, where the best plans, their scores and their spend are known in closed form."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from planted import engine, tasks, uniform

from thrifty import Account, Budget, EngineError, InvalidInput, Plan, PlanError, Spend
from thrifty.bench.store import Store, read
from thrifty.engines.scripted import ScriptedEngine
from thrifty.tune.found import Settings
from thrifty.tune.measured import Measured
from thrifty.tune.search import search
from thrifty.tune.spacefile import from_toml

WORDS = (1, 5, 10, 20, 40, 80)
SPACE = from_toml(f'[[methods]]\nuse="budget-prompt"\nknobs={{words={{values={list(WORDS)}}}}}')

WIDE = """
[[methods]]
use = "budget-prompt"
knobs = {words = {low = 1, high = 100, log = false, steps = 100}, unit = "words"}
[[methods]]
use = "truncation"
knobs = {tokens = {low = 1, high = 1000, log = false, steps = 1000}}
"""


def score_of(words: int, n: int, need: float = 40.0) -> float:
    """The planted mean score."""
    return sum(words >= need * uniform("need", i) for i in range(n)) / n


def words_of(plan: Plan) -> int | None:
    return plan.methods[0].settings()["words"] if plan.methods else None


async def test_every_plan_is_measured_and_ranked_by_its_planted_score(tmp_path: Path) -> None:
    n = 24
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(SPACE, tasks(n), engine(), store, Settings(level=1e-6))
    assert found.stopped is None and found.strategy == "exhaustive" and found.tried == 7
    assert found.ranked[0].score == 1.0
    for candidate in found.ranked:
        words = words_of(candidate.plan) or 60
        assert candidate.score == pytest.approx(score_of(words, n)) and candidate.groups == n
        assert candidate.difference == pytest.approx(score_of(words, n) - 1.0)
    # All of 60 and more words are right: of the plans with score 1 only the cheapest, 40 words, is undominated.
    assert [words_of(p) for p in found.order] == [40, 20, 10, 5, 1]
    assert words_of(found.best) == 40
    assert {words_of(c.plan) for c in found.ranked if c.undominated} == {40, 20, 10, 5, 1}
    costs = [next(c.axis for c in found.ranked if c.plan == p) for p in found.order]
    assert costs == sorted(costs, reverse=True)
    forty = next(c for c in found.ranked if words_of(c.plan) == 40)
    assert forty.saving is not None and 0 < forty.saving < 1


async def test_racing_drops_what_is_dominated_and_saves_its_runs(tmp_path: Path) -> None:
    # At 80 words as right as at 60 and dearer; 300 and 200 are only dearer. need 90: 80 words are better than 60.
    space = from_toml('[[methods]]\nuse="budget-prompt"\nknobs={words={values=[90, 30, 2]}}')
    bad = [
        Plan.from_toml(f'name="cut{i}"\n[budget]\noutput={i}\n[[methods]]\nuse="budget-prompt"\nwords=150')
        for i in (40, 41, 42)
    ]
    plans = [*space.expand(engine()).plans, *bad]
    n = 64
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(plans, tasks(n), engine(90.0), store, Settings(first=16))
        dropped = {c.plan.name: c for c in found.ranked if c.dropped}
        assert {"cut40", "cut41", "cut42"} <= set(dropped), found.rounds
        assert all(c.groups < n and "scores more and costs less" in str(c.dropped) for c in dropped.values())
        assert len(store.done) < n * len(plans)
    assert not set(dropped) & {p.name for p in found.order}
    assert all(c.groups == n for c in found.ranked if not c.dropped)
    assert found.ranked[-1].dropped, "dropped ones last"
    assert sum("dropped" in line for line in found.rounds) == 2


async def test_the_same_results_give_the_same_search_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    settings = Settings(first=8)
    with Store(tmp_path / "r.jsonl") as store:
        first = await search(SPACE, tasks(30), engine(), store, settings)
        again = await search(SPACE, list(reversed(tasks(30))), engine(), store, settings)
    assert first.incurred.tokens > 0 and again.incurred == Spend()
    assert dataclasses.replace(again, incurred=first.incurred, shared=first.shared) == first
    with Store(tmp_path / "other.jsonl") as store:
        other = await search(SPACE, tasks(30), engine(), store, Settings(first=8, seed=1))
    assert other.frozen != first.frozen, "settings are frozen too"
    assert [p.hash for p in other.order] == [p.hash for p in first.order]


@pytest.mark.parametrize("change", ["tasks", "space", "engine", "reference"])
async def test_the_frozen_hash_covers_what_the_search_was(tmp_path: Path, change: str) -> None:
    async def frozen(name: str, **changes: object) -> str:
        given = {"space": SPACE, "tasks": tasks(9), "engine": engine(), "reference": None} | changes
        with Store(tmp_path / name) as store:
            found = await search(
                given["space"],
                given["tasks"],
                given["engine"],
                store,
                reference=given["reference"],  # type: ignore[arg-type]
            )
        return found.frozen

    renamed = engine()
    renamed.model = "other"
    values = {
        "tasks": tasks(10),
        "space": from_toml('[[methods]]\nuse="budget-prompt"\nknobs={words={values=[1, 5, 10, 20, 40, 81]}}'),
        "engine": renamed,
        "reference": Plan("r", budget=Budget(output=150)),
    }
    assert await frozen("a.jsonl") == await frozen("b.jsonl") != await frozen("c.jsonl", **{change: values[change]})


@pytest.mark.parametrize("strategy", ["exhaustive", "ofat", "random", "optuna"])
@pytest.mark.parametrize("limit", [0, 150, 700])
async def test_a_search_stops_within_its_account_with_the_best_so_far(
    tmp_path: Path, strategy: str, limit: int
) -> None:
    account = Account("search", Budget(tokens=limit))
    settings = Settings(strategy=strategy, trials=5, batch=2)  # type: ignore[arg-type]
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(SPACE, tasks(16), engine(), store, settings, account=account)
        assert found.stopped is not None and "tokens" in found.stopped
        assert account.settled.tokens <= limit and account.settled == found.incurred and not account.held
        assert bool(found.ranked) == bool(limit) == bool(found.order)
        assert found.best in [found.reference, *(c.plan for c in found.ranked)]
        whole = await search(SPACE, tasks(16), engine(), store, settings)
    assert whole.stopped is None
    with Store(tmp_path / "uncut.jsonl") as store:
        uncut = await search(SPACE, tasks(16), engine(), store, settings)
    assert whole.frozen == uncut.frozen, "a search that was cut goes on as if it had not been"
    # Nothing that was finished is paid again; what the refusal cut in the middle is.
    cut = whole.incurred.tokens + account.settled.tokens - uncut.incurred.tokens
    assert 0 <= cut <= min(limit, 8 * 60)


@pytest.mark.parametrize("strategy", ["exhaustive", "ofat", "optuna"])
@pytest.mark.parametrize("limit", [0, 400, 1400])
async def test_an_adaptive_search_stops_within_its_account_too(tmp_path: Path, strategy: str, limit: int) -> None:
    space = from_toml(f'[[methods]]\nuse="budget-prompt"\nknobs={{words={{values={list(range(2, 60, 6))}}}}}')
    account = Account("search", Budget(tokens=limit))
    settings = Settings(strategy=strategy, items="adaptive", pilots=4, asked=6, trials=10)  # type: ignore[arg-type]
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(space, tasks(16), engine(), store, settings, account=account)
        whole = await search(space, tasks(16), engine(), store, settings)
    assert found.stopped is not None and account.settled.tokens <= limit and account.settled == found.incurred
    assert bool(found.order) == bool(limit)
    with Store(tmp_path / "uncut.jsonl") as store:
        uncut = await search(space, tasks(16), engine(), store, settings)
    assert whole.stopped is None and whole.frozen == uncut.frozen


async def test_groups_are_searched_whole_and_count_once(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(SPACE, tasks(40, groups=10), engine(), store, Settings(first=4, level=1e-6))
    assert {c.groups for c in found.ranked} == {10}
    results = read(tmp_path / "r.jsonl").results
    assert len(results) == 7 * 40
    ten = next(c for c in found.ranked if words_of(c.plan) == 10)
    by_group = [[r.score for r in results if r.plan_hash == ten.plan.hash and r.group == f"g{g}"] for g in range(10)]
    assert ten.score == pytest.approx(sum(sum(g) / len(g) for g in by_group) / 10)  # type: ignore[arg-type]


async def test_a_group_that_is_not_whole_is_no_entry_of_the_tables(tmp_path: Path) -> None:
    some, plans = tasks(6, groups=2), [Plan("plain")]
    with Store(tmp_path / "r.jsonl") as store:
        half = Measured(some[:3], {"answer": engine()}, store, "tokens")
        await half.run(plans, half.groups)
        whole = Measured(
            some, {"answer": engine()}, store, "tokens", options={"account": Account("a", Budget(tokens=0))}
        )
        assert not await whole.run(plans, whole.groups) and whole.stopped
        assert np.isnan(whole.tables(plans)[0]).all(), "three of six results, but of no group all"
        scores, costs = half.tables(plans, ["group g0", "group g1"])
    assert scores.tolist() == [[1.0, 1.0]] and costs.tolist() == [[38.0, 38.0]]


async def test_one_factor_at_a_time_makes_the_runs_of_its_closed_form(tmp_path: Path) -> None:
    text = (
        '[[methods]]\nuse="budget-prompt"\noptional=false\n'
        'knobs={words={values=[1, 10, 40]}, unit={values=["words","tokens"]}}\n'
        '[[methods]]\nuse="truncation"\noptional=false\n'
        'knobs={tokens={values=[100, 10]}, keep={values=["first","last"]}}'
    )
    space = from_toml(text)
    assert space.count() == 24
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(space, tasks(12), engine(), store, Settings(strategy="ofat"))
        assert len(store.done) == (3 + 2 + 2 + 2 - 4 + 1 + 1) * 12, "sum of levels - factors + 1, and the reference"
    assert found.how.startswith(
        "one factor at a time: 6 runs, the full factorial has 24; it came to budget-prompt(words=40"
    )
    assert found.tried == 7
    assert next(c for c in found.ranked if c.plan.methods).plan.methods[0].settings()["words"] == 40


async def test_ofat_trades_score_for_cost_as_it_is_told(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl") as store:
        space = from_toml(
            '[[methods]]\nuse="budget-prompt"\nknobs={words={values=[40,1,10]}}\n[[methods]]\nuse="truncation"'
        )
        dear = await search(space, tasks(20), engine(), store, Settings(strategy="ofat", trade=0.0))
        cheap = await search(space, tasks(20), engine(), store, Settings(strategy="ofat", trade=5.0))
    assert dear.how.endswith("it came to budget-prompt(words=40)"), "as right as the engine alone, and cheaper"
    assert cheap.how.endswith("it came to budget-prompt(words=1)")
    assert dear.frozen != cheap.frozen


@pytest.mark.parametrize(("strategy", "sampler"), [("optuna", "tpe"), ("optuna", "nsga2"), ("random", "tpe")])
async def test_proposals_search_a_space_that_is_too_large_to_try_whole(
    tmp_path: Path, strategy: str, sampler: str
) -> None:
    space = from_toml(WIDE)
    assert space.count() == 1 + 100 + 1000 + 100_000
    settings = Settings(strategy=strategy, sampler=sampler, trials=14, batch=7, first=8)  # type: ignore[arg-type]
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(space, tasks(16), engine(), store, settings)
    with Store(tmp_path / "again.jsonl") as store:
        again = await search(space, tasks(16), engine(), store, settings)
    assert found.frozen == again.frozen and found.ranked == again.ranked
    assert 14 <= found.tried <= 15, "and the reference"
    assert "14 plans proposed" in found.how and (strategy if strategy == "random" else f"({sampler})") in found.how
    assert len(found.order) >= 2 and found.ranked[0].score == 1.0


async def test_auto_takes_proposals_where_the_space_is_large(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(from_toml(WIDE), tasks(6), engine(), store, Settings(trials=4, batch=4))
        small = await search(SPACE, tasks(6), engine(), store, Settings(trials=4))
    assert (found.strategy, small.strategy) == ("optuna", "exhaustive")


async def test_optuna_leaves_the_process_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    with Store(tmp_path / "r.jsonl") as store:
        await search(SPACE, tasks(6), engine(), store, Settings(strategy="optuna", trials=30, batch=4))
        plans = {r.plan_hash for r in store.done.values()}
    assert len(plans) == 7, "a space that is used up ends the search"
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("strategy", ["exhaustive", "ofat", "random", "optuna"])
async def test_adaptive_examples_measure_the_promising_ones_whole(tmp_path: Path, strategy: str) -> None:
    n = 40
    space = from_toml(f'[[methods]]\nuse="budget-prompt"\nknobs={{words={{values={list(range(2, 60, 3))}}}}}')
    settings = Settings(strategy=strategy, items="adaptive", pilots=8, asked=8, trials=16, level=1e-6)  # type: ignore[arg-type]
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(space, tasks(n), engine(), store, settings)
        full = n * (space.count() if strategy != "random" else found.tried)
        assert len(store.done) < full
    measured = [c for c in found.ranked if not c.estimated]
    guessed = [c for c in found.ranked if c.estimated]
    assert all(c.groups == n for c in measured) and all(c.groups == 8 for c in guessed)
    assert {p.hash for p in found.order} <= {c.plan.hash for c in measured}
    for c in measured:
        assert c.score == pytest.approx(score_of(words_of(c.plan) or 60, n))
    # Every example costs a plan the same, so what a plan spends on all of them is told exactly from a few.
    for c in found.ranked:
        assert c.axis == pytest.approx(7 + 60 // 2 + 1 if not c.plan.methods else 14 + (words_of(c.plan) or 0) // 2 + 1)
    if guessed:
        errors = [abs(c.score - score_of(words_of(c.plan) or 60, n)) for c in guessed]
        assert sum(errors) / len(errors) < 0.12
    assert "pilots" in found.rounds[0]


async def test_the_axis_may_be_any_that_results_have(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl") as store:
        found = await search(SPACE, tasks(6), engine(), store, Settings(axis="output"))
        assert next(c.axis for c in found.ranked if words_of(c.plan) == 5) == 5 // 2 + 1
        with pytest.raises(InvalidInput, match="no result has a price"):
            await search(SPACE, tasks(6), engine(), store, Settings(axis="usd"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"axis": "token"}, "did you mean 'tokens'"),
        ({"strategy": "optna"}, "did you mean 'optuna'"),
        ({"first": 1}, "search first = 1: from 2"),
        ({"level": 0.9}, "search level = 0.9"),
        ({"triels": 9}, "did you mean 'trials'"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Settings.from_dict(given)


async def test_bad_input_is_told_before_anything_is_spent(tmp_path: Path) -> None:
    on = engine()
    bare = ScriptedEngine("x", capabilities={"text"})
    space = from_toml('[[methods]]\nuse="no-thinking"\noptional=false')
    with Store(tmp_path / "r.jsonl") as store:
        for strategy in ("exhaustive", "ofat", "random", "optuna"):
            with pytest.raises(PlanError, match="continue"):
                await search(space, tasks(3), bare, store, Settings(strategy=strategy, trials=2))  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="more than 10,000 plans"):
            await search(from_toml(WIDE), tasks(3), on, store, Settings(strategy="exhaustive"))
        with pytest.raises(InvalidInput, match="no examples"):
            await search(SPACE, [], on, store)
    assert not on.calls


async def test_an_engine_that_is_gone_ends_the_search_and_keeps_what_was_done(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl") as store:
        with pytest.raises(EngineError, match="in a row"):
            await search(SPACE, tasks(9), ScriptedEngine("a b c", fail_after=1), store)
        found = await search(SPACE, tasks(9), engine(), store)
    assert found.stopped is None and found.ranked[0].score == 1.0
