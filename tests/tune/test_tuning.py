"""Tuning from end to end on engines whose answers, losses and costs are planted: what is certified is known."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import engine as planted_engine
from planted import tasks, uniform

from thrifty import Account, Budget, Call, EngineError, InvalidInput, Plan, PlanError, Spend, registry
from thrifty.bench.store import read
from thrifty.bench.task import Task
from thrifty.call import Sampling
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger.chain import load_key
from thrifty.tune.calibration import Claim, UseLog
from thrifty.tune.certificate import Certificate, SplitUsed
from thrifty.tune.found import Settings
from thrifty.tune.recompute import check_data, recompute
from thrifty.tune.report import page
from thrifty.tune.saving import Traffic, monthly
from thrifty.tune.spacefile import from_toml
from thrifty.tune.splits import Splits, check_disjoint, data_hash, split
from thrifty.tune.tuned import Tuned
from thrifty.tune.tuning import tune

DROP = Claim("drop", 0.1, 0.1, bound="betting")


def engine(rates: dict[int | None, float], *, failing: int | None = None, prices: Any = None) -> ScriptedEngine:
    """Wrong on a share of the items that depends on how many words were asked for (None: no limit was); writes as many
    words as were asked for, or 60. A item that is wrong at one rate is wrong at every larger one."""

    def say(call: Call, draw: object) -> str:
        text = "\n".join(str(m["content"]) for m in call.messages)
        item = int(re.search(r"Item (\d+)", text)[1])  # type: ignore[index]
        asked = re.search(r"(\d+) words?\b", text)
        words = int(asked[1]) if asked else None
        wrong = uniform("wrong", item) < rates[words]
        return "so " * ((words or 60) - 1) + str(999_999 if wrong else item + 1)

    return ScriptedEngine(say, prices=prices, fail_after=failing)


def space(*words: int) -> Any:
    return from_toml(f'[[methods]]\nuse="budget-prompt"\noptional=false\nknobs={{words={{values={list(words)}}}}}')


def words_of(plan: Plan | None) -> int | None:
    return None if plan is None or not plan.methods else plan.methods[0].settings()["words"]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    async def run(spaced: Any, engines: Any, claim: Claim = DROP, **options: Any) -> Tuned:
        parts = options.pop("parts", None) or split(tasks(240))
        out = options.pop("out", "out")
        options.setdefault("log", UseLog(tmp_path / "uses.db"))
        return await tune(parts, spaced, engines, claim, tmp_path / out, **options)

    return run


# 20 words are as right as no limit, 10 lose 2% more, 5 lose a half.
RATES: dict[int | None, float] = {None: 0.1, 40: 0.1, 20: 0.1, 10: 0.12, 5: 0.6}


async def test_the_cheap_plan_that_is_good_is_certified_and_the_bad_one_is_not(
    tmp_path: Path, go: Callable[..., Any]
) -> None:
    given = tasks(240)
    used = SplitUsed(data_hash(given), (0.3, 0.5, 0.2), 0)
    tuned = await go(space(40, 20, 10, 5), engine(RATES), parts=split(given), split_used=used)
    assert words_of(tuned.plan) == 10 and tuned.needed is None and tuned.stopped is None
    assert [words_of(t.plan) for t in tuned.tests] == [20, 10], "40 words are dominated by 20, 5 are hopeless"
    assert [name for name, _ in tuned.frozen.left_out] == ["budget-prompt(words=5)"]

    # The losses recorded are the planted ones, item by item.
    made = Certificate.load(tmp_path / "out" / "certificate.json")
    assert made == tuned.certificate and recompute(made).ok and check_data(made, given) == []
    planted = {f"t{i}": float(0.1 <= uniform("wrong", i) < 0.12) for i in range(240)}
    assert dict(zip(made.groups, made.tested[1].losses, strict=True)) == {
        t.id: planted[t.id] for t in split(given).calibration
    }
    assert made.value == pytest.approx(sum(planted[g] for g in made.groups) / 120) and made.n == 120
    third = [planted[t.id] for t in split(given).holdout]
    assert made.holdout is not None and made.holdout.value == pytest.approx(sum(third) / len(third))
    assert made.holdout.low <= made.holdout.value <= made.holdout.high
    # 60 words beside 10, and the seven tokens of the question beside fourteen.
    assert made.saving is not None and made.saving.axis == "tokens"
    assert made.saving.share.value == pytest.approx(1 - made.saving.plan / made.saving.reference)
    assert made.saving.reference == 67 and made.saving.plan == pytest.approx(24)
    plan = Plan.load(tmp_path / "out" / "plan.toml")
    assert plan.hash == made.plan_hash and words_of(plan) == 10


async def test_no_calibration_example_is_asked_before_its_test_is_frozen_and_counted(
    tmp_path: Path, go: Callable[..., Any]
) -> None:
    parts, log = split(tasks(240)), UseLog(tmp_path / "uses.db")
    held_back = {t.id.removeprefix("t") for t in (*parts.calibration, *parts.holdout)}
    inner = engine(RATES)
    seen: list[str] = []

    def say(call: Call, draw: object) -> str:
        item = re.search(r"Item (\d+)", str(call.messages[-1]["content"]))[1]  # type: ignore[index]
        if item in held_back:
            seen.append(item)
            frozen = json.loads((tmp_path / "out" / "search.json").read_text())
            assert frozen["opened"] and log.uses(parts.calibration) == 1
        return inner.script(call, draw)  # type: ignore[operator, no-any-return]

    tuned = await go(space(20, 5), ScriptedEngine(say), parts=parts, log=log)
    assert tuned.plan is not None and set(seen) == held_back


async def test_a_test_that_fails_ends_the_sequence(go: Callable[..., Any]) -> None:
    # 20 words lose 9% on average: not hopeless at alpha 0.1, and not to be certified either.
    rates = {None: 0.0, 40: 0.0, 20: 0.09, 10: 0.1}
    tuned = await go(space(40, 20, 10), engine(rates), settings=Settings(level=1e-6))
    assert [words_of(t.plan) for t in tuned.tests] == [40, 20] and [t.certified for t in tuned.tests] == [True, False]
    assert words_of(tuned.plan) == 40 and tuned.certificate is not None
    assert len(tuned.certificate.tested) == 2 and recompute(tuned.certificate).ok


async def test_nothing_certified_says_how_many_examples_would_have_done(tmp_path: Path, go: Callable[..., Any]) -> None:
    rates = {None: 0.0, 20: 0.05}
    tuned = await go(space(20), engine(rates), parts=split(tasks(120)))
    assert tuned.plan is None and tuned.certificate is None and not (tmp_path / "out" / "plan.toml").exists()
    assert not (tmp_path / "out" / "certificate.json").exists()
    (test,) = tuned.tests
    needed = int(re.search(r"about ([\d,]+) groups", tuned.needed)[1].replace(",", ""))  # type: ignore[index]
    assert not test.certified and 0.02 < test.losses.mean < 0.1 and needed > test.losses.n == 60
    # Twice as many fresh ones do it.
    parts = check_disjoint(tasks(40), tasks(2_000 + 2 * needed)[2_000:])
    assert words_of((await go(space(20), engine(rates), parts=parts, out="more")).plan) == 20


async def test_a_plan_that_cannot_be_good_uses_up_no_calibration_examples(
    tmp_path: Path, go: Callable[..., Any]
) -> None:
    tuned = await go(space(5), engine(RATES))
    assert tuned.plan is None and tuned.use is None and not tuned.tests and "unused" in str(tuned.needed)
    assert UseLog(tmp_path / "uses.db").uses(split(tasks(240)).calibration) == 0
    assert not tuned.frozen.opened


async def test_a_second_run_resumes_pays_nothing_and_is_the_same_use(tmp_path: Path, go: Callable[..., Any]) -> None:
    first = await go(space(20, 10), engine(RATES))
    account = Account("again")
    again = await go(space(20, 10), engine(RATES), account=account)
    assert account.settled == Spend() and again.use.resumed and again.use.k == 1
    assert again.certificate == first.certificate and again.paid == first.paid
    # In another folder it is the same frozen search on the same examples: the same use.
    other = await go(space(20, 10), engine(RATES), out="other")
    assert other.use.resumed and other.frozen.hash == first.frozen.hash
    signed = await go(space(20, 10), engine(RATES), key=load_key(b"0123456789abcdef"))
    assert signed.certificate.hash == first.certificate.hash, "a revocation names this hash"
    assert signed.certificate.verify_signature(load_key(b"0123456789abcdef"))


async def test_a_second_use_is_refused_or_splits_delta(tmp_path: Path, go: Callable[..., Any]) -> None:
    await go(space(20, 10), engine(RATES))
    with pytest.raises(InvalidInput, match="used before .1 time"):
        await go(space(40, 20), engine(RATES), out="second")
    assert json.loads((tmp_path / "second" / "search.json").read_text())["opened"] is False
    second = await go(space(40, 20), engine(RATES), out="second", reuse="split")
    assert second.use.k == 2 and second.use.delta == 0.025 and second.certificate.delta == 0.025
    assert second.certificate.spent == pytest.approx(0.125)
    with pytest.raises(InvalidInput, match="another search, claim, engine or data: give another --out"):
        await go(space(20, 10), engine(RATES), dataclasses.replace(DROP, alpha=0.2))


@pytest.mark.parametrize("tokens", [0, 500, 5_000, 11_000, 20_000])
async def test_a_budget_is_never_passed_and_what_is_there_counts(
    tmp_path: Path, go: Callable[..., Any], tokens: int
) -> None:
    account = Account("tune", Budget(tokens=tokens))
    cut = await go(space(20, 10, 5), engine(RATES), account=account)
    assert account.settled.tokens <= tokens and not account.held and cut.stopped is not None
    if cut.certificate is not None:
        assert recompute(cut.certificate).ok
    if cut.tests:
        assert all(t.losses.n == 120 for t in cut.tests), "all of the part, or not at all"
    frozen = cut.frozen
    whole = await go(space(20, 10, 5), engine(RATES))
    assert whole.plan is not None and whole.stopped in (None, frozen.found["stopped"])
    assert not frozen.opened or whole.frozen.hash == frozen.hash, "what was opened is not searched again"
    assert whole.use.k == 1


async def test_the_best_so_far_of_a_test_that_was_cut_is_certified(tmp_path: Path, go: Callable[..., Any]) -> None:
    parts = split(tasks(240))
    whole = await go(space(20, 10), engine(RATES), parts=parts, out="whole", log=UseLog(tmp_path / "w.db"))
    # Searched and frozen without a limit, then room for the reference and the first plan only.
    need = sum(r.incurred.tokens for r in read(whole.files["results.jsonl"]).results if r.suite == "search")
    first = 120 * 67 + 120 * (14 + 20)
    account = Account("tune", Budget(tokens=need + first + 2_000))
    cut = await go(space(20, 10), engine(RATES), parts=parts, account=account, settings=Settings(first=8))
    assert cut.stopped is not None and account.settled.tokens <= account.budget.tokens
    assert [t.certified for t in cut.tests] == [True] and words_of(cut.plan) == 20
    assert cut.certificate.holdout is None, "the third part waits for the next run"
    more = await go(space(20, 10), engine(RATES), parts=parts, settings=Settings(first=8))
    assert words_of(more.plan) == 10 and more.use.resumed and more.certificate.holdout is not None


async def test_disagreement_is_of_final_answers_at_temperature_zero(tmp_path: Path, go: Callable[..., Any]) -> None:
    claim = Claim("disagree", 0.1, 0.1, bound="clopper-pearson")
    temperatures: set[float | None] = set()

    def say(call: Call, draw: object) -> str:
        temperatures.add(call.sampling.temperature)
        text = "\n".join(str(m["content"]) for m in call.messages)
        item = int(re.search(r"Item (\d+)", text)[1])  # type: ignore[index]
        asked = re.search(r"(\d+) words?\b", text)
        if not asked:
            return "long and winding " * 20 + "hence #### " + ("Forty-one" if item % 2 else "forty two")
        other = uniform("other", item) < 0.03
        return "#### " + ("none" if other else "forty-one." if item % 2 else "Forty  Two!")

    tuned = await go(space(3), ScriptedEngine(say), claim)
    assert words_of(tuned.plan) == 3 and temperatures == {0.0}
    expected = {t.id: float(uniform("other", int(t.id[1:])) < 0.03) for t in split(tasks(240)).calibration}
    made = tuned.certificate
    assert dict(zip(made.groups, made.tested[0].losses, strict=True)) == expected
    with pytest.raises(InvalidInput, match="differ from itself"):
        await go(space(3), ScriptedEngine(say), claim, sampling=Sampling(temperature=0.7), out="hot")


async def test_error_tests_the_reference_too(go: Callable[..., Any]) -> None:
    claim = Claim("error", 0.2, 0.1, bound="clopper-pearson")
    tuned = await go(space(20, 5), engine({None: 0.1, 20: 0.11, 5: 0.9}), claim)
    assert [words_of(t.plan) for t in tuned.tests] == [None, 20] and words_of(tuned.plan) == 20
    none = await go(space(20, 5), engine({None: 0.5, 20: 0.5, 5: 0.9}), claim, out="none", parts=_other())
    assert none.plan is None and none.use is None


async def test_what_remembers_calls_is_refused_before_anything_is_spent(go: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInput, match="exact-cache remembers answers from call to call"):
        await go([Plan("cached", (registry.get("exact-cache")(),))], engine(RATES))


def _other() -> Splits:
    return split([dataclasses.replace(t, id=f"o{t.id}") for t in tasks(1_240)[1_000:]])


async def test_conformal_risk_control_picks_the_cheapest_feasible_setting(go: Callable[..., Any]) -> None:
    claim = Claim("drop", 0.1, None, "conformal-risk-control")
    tuned = await go(space(40, 20, 10, 5), engine({None: 0, 40: 0.01, 20: 0.05, 10: 0.14, 5: 0.9}), claim)
    assert tuned.plan is not None and tuned.certificate.delta is None and recompute(tuned.certificate).ok
    assert tuned.tests[0].plan == tuned.frozen.reference, "the fallback is the first column"
    # By hand: the planted losses are nested, so they are monotone as they are.
    for test in tuned.tests:
        assert test.corrected == pytest.approx((math.fsum(test.losses.values) + 1) / 121)
        assert test.certified == (test.corrected <= 0.1)
    assert words_of(tuned.plan) == 20
    two = from_toml('[[methods]]\nuse="budget-prompt"\nknobs={words=[1,2]}\n'.replace("[1,2]", "{values=[1,2]}") + MORE)
    with pytest.raises(InvalidInput, match="one knob of one method"):
        await go(two, engine(RATES), claim, out="two")


MORE = '[[methods]]\nuse="truncation"\nknobs={tokens={values=[5,6]}}\n'


async def test_groups_count_once(go: Callable[..., Any]) -> None:
    parts = split(tasks(240, groups=120))
    tuned = await go(space(20, 10), engine(RATES), parts=parts)
    assert tuned.certificate.n == 60 and set(tuned.certificate.groups) <= {f"g{i}" for i in range(120)}
    with pytest.raises(InvalidInput, match="a group of several examples"):
        claim = Claim("error", 0.3, 0.1, bound="clopper-pearson")
        await go(space(20), engine(RATES), claim, parts=parts, out="exact")


@pytest.mark.parametrize("bad", [math.nan, 2.0, -0.1])
async def test_a_scorer_that_gives_nonsense_is_refused_by_the_example(go: Callable[..., Any], bad: float) -> None:
    async def score(task: Task, *_: object) -> float:
        return bad if task.id == "t7" else 1.0

    parts = check_disjoint(tasks(20), tasks(220)[20:])
    with pytest.raises(InvalidInput, match=f"'t7'.*{bad}"):
        await go(space(20), engine(RATES), parts=parts, score=score)


async def test_what_cannot_work_is_refused_before_anything_is_spent(tmp_path: Path, go: Callable[..., Any]) -> None:
    def never(*_: object) -> str:
        raise AssertionError("asked")

    silent = ScriptedEngine(never)
    hidden = from_toml('[[methods]]\nuse="soft-thinking"\noptional=false')
    with pytest.raises(PlanError, match="none of its 1 plans can run"):
        await go(hidden, silent)
    with pytest.raises(InvalidInput, match="too few for any bound"):
        await go(space(20), silent, Claim("error", 0.01, 0.1, bound="betting"))
    with pytest.raises(InvalidInput, match="search part"):
        await go(space(20), silent, parts=check_disjoint([], tasks(200)))
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidInput, match="alpha"):
            Claim("drop", alpha, 0.1, bound="betting")


async def test_results_that_failed_are_never_left_out_of_a_test(tmp_path: Path, go: Callable[..., Any]) -> None:
    parts = split(tasks(240))
    broken = {t.id.removeprefix("t") for t in parts.calibration[:1]}
    inner = engine(RATES)

    def say(call: Call, draw: object) -> str:
        item = re.search(r"Item (\d+)", str(call.messages[-1]["content"]))[1]  # type: ignore[index]
        if item in broken:
            raise EngineError("down")
        return inner.script(call, draw)  # type: ignore[operator, no-any-return]

    with pytest.raises(EngineError, match="a test needs all.*run the same command again"):
        await go(space(20, 10), ScriptedEngine(say), parts=parts)
    broken.clear()
    tuned = await go(space(20, 10), ScriptedEngine(say), parts=parts)
    assert words_of(tuned.plan) == 10 and tuned.use.resumed


async def test_what_was_frozen_cannot_be_changed_on_disk(tmp_path: Path, go: Callable[..., Any]) -> None:
    await go(space(20, 10), engine(RATES))
    path = tmp_path / "out" / "search.json"
    path.write_text(path.read_text().replace('"words": 10', '"words": 9'))
    with pytest.raises(InvalidInput, match="what it froze was changed"):
        await go(space(20, 10), engine(RATES))
    path.write_text("{}")
    with pytest.raises(InvalidInput, match="no frozen search"):
        await go(space(20, 10), engine(RATES))


async def test_the_report_says_what_is_certified_and_saved_and_escapes_what_it_quotes(
    go: Callable[..., Any],
) -> None:
    from thrifty.meter.prices import PriceTable

    methods = space(20).plan_at(space(20).baseline()).methods
    evil = [Plan("<script>alert(1)</script>", methods=methods)]
    tuned = await go(evil, engine(RATES, prices=PriceTable.local()), settings=Settings(axis="usd"))
    text = page(tuned, traffic=Traffic.parse("1000/day"))
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert "at most 0.1" in text and "chance of at most 0.1 " in text and "What is not promised" in text
    found = monthly(tuned.beside, Traffic.parse("1000/day"))
    base, plan = tuned.beside.means["usd"]
    assert found is not None and found.reference == pytest.approx(base * 30_440)
    assert found.saved.value == pytest.approx((base - plan) * 30_440) and f"{found.saved.value:,.3g}" in text
    none = page(await go(space(5), engine(RATES), out="none"))
    assert "Nothing is certified" in none and "unused" in none


async def test_tuning_costs_a_small_share_of_a_naive_grid(go: Callable[..., Any]) -> None:
    words = [40, 20, 10, *range(2, 10)]
    rates = {None: 0.1, 40: 0.1, 20: 0.1, 10: 0.12, **{w: 0.95 for w in range(2, 10)}}
    bad = [Plan(f"cut{i}", budget=Budget(output=i)) for i in range(30, 50)]
    tuned = await go([*space(*words).expand(planted_engine()).plans, *bad], engine(rates), settings=Settings(first=16))
    assert words_of(tuned.plan) == 10 and tuned.naive.tokens > 0
    results = read(tuned.files["results.jsonl"]).results
    assert tuned.paid.tokens == sum(r.incurred.tokens for r in results)
    assert tuned.share is not None and tuned.share < 0.4


@pytest.mark.parametrize("text", ["", "x", "5/fortnight", "-1/day", "0/day", "1e99/day"])
def test_traffic_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InvalidInput, match="traffic"):
        Traffic.parse(text)


def test_traffic_is_by_the_month() -> None:
    assert Traffic.parse("12,000 / month").requests == 12_000 == Traffic.parse("12_000").requests
    assert Traffic.parse("10/days").requests == pytest.approx(304.4)
