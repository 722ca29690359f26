"""A frontier computed by hand, from stored results alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from thrifty import InvalidInput, Plan, Spend, Work
from thrifty.bench.frontier import Frontier, analyse, load, measure
from thrifty.bench.store import Contents, Result, Store
from thrifty.bench.task import Task
from thrifty.engines.scripted import ScriptedEngine

PLANS = {"plain": (), "a": ("x",), "b": ("y",), "ab": ("x", "y"), "worse": ("z",)}

#           scores of four examples, their input of the answering engine, of the embedder, output
TABLE = {
    "plain": ((1, 1, 1, 0), (100, 100, 100, 100), (0, 0, 0, 0), (10, 10, 10, 10)),
    "a": ((1, 1, 0, 0), (40, 40, 40, 40), (10, 10, 10, 10), (10, 10, 10, 10)),
    "b": ((1, 1, 1, 1), (100, 100, 100, 100), (0, 0, 0, 0), (5, 5, 5, 5)),
    "ab": ((1, 0, 1, 0), (30, 30, 30, 30), (10, 10, 10, 10), (0, 10, 10, 10)),
    "worse": ((0, 0, 0, 0), (200, 200, 200, 200), (0, 0, 0, 0), (10, 10, 10, 10)),
}


def result(plan: str, i: int, **changes: object) -> Result:
    scores, answer, other, output = TABLE[plan]
    spend = Spend(input=answer[i], output=output[i], calls=1)
    roles = {"answer": spend}
    if other[i]:
        roles["embedder"] = Spend(input=other[i], calls=1)
        spend = spend + roles["embedder"]
    receipts = [
        {"method": m, "fired": not (plan == "a" and i < 3), "reason": f"covers all {i + 5} passages"}
        for m in PLANS[plan]
    ]
    values: dict[str, object] = {
        "key": f"{plan}/{i}",
        "suite": "toy",
        "plan": plan,
        "plan_hash": f"hash-{plan}",
        "methods": PLANS[plan],
        "engine": "e",
        "task": str(i),
        "task_hash": f"task-{i}",
        "score": float(scores[i]),
        "spend": spend,
        "work": Work(prefill=answer[i]),
        "incurred": spend,
        "roles": roles,
        "receipts": tuple(receipts),
    }
    return Result(**{**values, **changes})  # type: ignore[arg-type]


def head(plans: list[str]) -> dict[str, object]:
    return {
        "suite": "toy",
        "engine": "e",
        "engines": {"answer": {"model": "toy-model", "dtype": "bfloat16"}},
        "plans": [{"hash": f"hash-{p}", "name": p, "methods": [{"use": m, "k": 1} for m in PLANS[p]]} for p in plans],
    }


def toy(**changes: object) -> Frontier:
    results = tuple(result(plan, i) for i in range(4) for plan in PLANS)
    (found,) = analyse(Contents(results, (head(list(PLANS)),)), str(changes.get("axis", "tokens")))
    return found


def test_means_savings_and_differences_are_those_of_the_hand_calculation() -> None:
    frontier = toy()
    assert frontier.model == "toy-model bfloat16"
    rows = {row.plan: row for row in frontier.rows}
    assert list(rows) == list(PLANS) and frontier.reference.plan == "plain"

    plain, a, b, ab = rows["plain"], rows["a"], rows["b"], rows["ab"]
    assert (plain.n, plain.score.value, plain.axis.value) == (4, 0.75, 110.0)
    assert plain.saving is plain.difference is plain.mcnemar is plain.smallest is None
    assert (round(plain.score.low, 4), round(plain.score.high, 4)) == (0.3006, 0.9544)  # Wilson's, 3 of 4

    assert (a.score.value, a.input, a.other_input, a.output, a.axis.value) == (0.5, 40.0, 10.0, 10.0, 60.0)
    assert a.saving is not None and a.saving.value == pytest.approx(1 - 240 / 440)
    assert (a.saving.low, a.saving.high) == pytest.approx((1 - 240 / 440,) * 2), "every example saves alike"
    assert a.difference is not None and a.difference.value == -0.25
    assert a.difference.low <= -0.25 <= a.difference.high
    assert a.mcnemar is not None and (a.mcnemar.plan_only, a.mcnemar.reference_only, a.mcnemar.exact) == (
        0,
        1,
        1.0,
    )
    assert a.paired == 4

    assert b.difference is not None and b.difference.value == 0.25
    assert b.saving is not None and b.saving.value == pytest.approx(1 - 420 / 440)
    assert ab.output == 7.5 and ab.axis.value == 47.5
    assert ab.means["input"] == 40.0 and ab.means["prefill"] == 30.0 and ab.means["calls"] == 2.0

    assert plain.e3 == pytest.approx(0.75**2 / 10) and b.e3 == pytest.approx(1 / 5)
    # sd of (0, 0, -1, 0) is 0.5, its error 0.25; t(0.975) and t(0.8) at 3 degrees of freedom are 3.182 and 0.978.
    assert a.smallest == pytest.approx((3.182 + 0.978) * 0.25, rel=0.03)


def test_the_undominated_are_marked_for_the_named_axis_only() -> None:
    tokens = toy()
    assert [r.plan for r in tokens.rows if r.undominated] == ["b", "ab"]
    # Costs over the reference's 110: ab 47.5 with score 0.5, b 105 with score 1.
    assert tokens.area == pytest.approx((0.5 * (105 - 47.5) + 1.0 * (110 - 105)) / 110)
    output = toy(axis="output")
    assert [r.plan for r in output.rows if r.undominated] == ["b"]
    assert output.rows[1].saving is not None and output.rows[1].saving.value == 0.0


def test_fired_shares_come_from_receipts_and_say_why_not() -> None:
    rows = {row.plan: row for row in toy().rows}
    (a,) = rows["a"].fired
    assert (a.method, a.share, a.calls) == ("x", 0.25, 4)
    assert a.why_not == (("covers all N passages", 3),)
    assert [f.share for f in rows["ab"].fired] == [1.0, 1.0]
    assert rows["a"].note == ""


def test_a_method_without_a_receipt_or_that_never_fired_is_told() -> None:
    silent = tuple(result("a", i, receipts=()) for i in range(4))
    idle = tuple(
        result("b", i, receipts=({"method": "y", "fired": False, "reason": "nothing to do"},)) for i in range(4)
    )
    plain = tuple(result("plain", i) for i in range(4))
    (frontier,) = analyse(Contents((*plain, *silent, *idle), ()), "tokens")
    rows = {row.plan: row for row in frontier.rows}
    assert rows["a"].fired[0].why_not == (("left no receipt", 4),)
    assert "x never fired" in rows["a"].note and "y never fired" in rows["b"].note


def test_stacks_are_found_by_their_methods_and_compared_with_their_parts() -> None:
    (stack,) = toy().stacks
    assert (stack.a, stack.b, stack.both) == ("a", "b", "ab")
    assert stack.score.additive.value == pytest.approx((0.5 - 0.75) - (0.5 - 0.75) - (1.0 - 0.75))
    assert stack.axis.additive.value == pytest.approx((47.5 - 110) - (60 - 110) - (105 - 110))
    assert stack.axis.log_ratio is not None
    assert stack.axis.log_ratio.value == pytest.approx(math.log(47.5 * 110 / (60 * 105)))


def test_a_stack_with_other_settings_is_no_stack_of_these() -> None:
    other = head(list(PLANS))
    other["plans"][3]["methods"][0]["k"] = 2  # type: ignore[index]
    results = tuple(result(plan, i) for i in range(4) for plan in PLANS)
    (frontier,) = analyse(Contents(results, (other,)), "tokens")
    assert frontier.stacks == ()


def test_partial_results_are_compared_on_what_both_have() -> None:
    results = [result(plan, i) for i in range(4) for plan in ("plain", "b")][:7]  # b lacks the last example
    results[1] = result("b", 0, score=None, error="EngineError: down")
    (frontier,) = analyse(Contents(tuple(results), (head(["plain", "b"]),)), "tokens")
    plain, b = frontier.rows
    assert (plain.n, b.n, b.paired, b.failed) == (4, 2, 2, 1)
    assert b.difference is not None and b.difference.value == 0.0
    assert b.difference.low < -0.5 and b.difference.high > 0.5, "two equal results prove nothing"
    assert "1 failed" in b.note


def test_groups_are_resampled_together() -> None:
    alone = [result(p, i) for i in range(4) for p in ("plain", "a")]
    grouped = [result(p, i, group=str(i // 2)) for i in range(4) for p in ("plain", "a")]
    (one,), (two,) = (analyse(Contents(tuple(r), (head(["plain", "a"]),)), "tokens") for r in (alone, grouped))
    assert two.rows[1].score.n == 2 and one.rows[1].score.n == 4
    assert one.rows[1].mcnemar is not None and two.rows[1].mcnemar is None


def test_of_plans_that_share_a_name_the_last_one_is_shown() -> None:
    old = [result("a", i, plan_hash="old", key=f"old/{i}") for i in range(4)]
    heads = (head(["plain", "a"]), head(["plain", "a"]))
    heads[0]["plans"][1]["hash"] = "old"  # type: ignore[index]
    new = [result(p, i) for i in range(4) for p in ("plain", "a")]
    (frontier,) = analyse(Contents((*old, *new), heads), "tokens")
    assert [r.hash for r in frontier.rows] == ["hash-plain", "hash-a"]


def test_two_engines_give_two_frontiers() -> None:
    other = [result(p, i, engine="f", key=f"f/{p}/{i}") for i in range(4) for p in ("plain", "a")]
    results = (*[result(p, i) for i in range(4) for p in ("plain", "b")], *other)
    found = analyse(Contents(tuple(results), ()), "tokens")
    assert [(f.engine, [r.plan for r in f.rows]) for f in found] == [
        ("e", ["plain", "b"]),
        ("f", ["plain", "a"]),
    ]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    contents = Contents((result("plain", 0),), ())
    with pytest.raises(InvalidInput, match="unknown axis 'outputs': did you mean 'output'"):
        analyse(contents, "outputs")
    with pytest.raises(InvalidInput, match="unknown suite in these results 'toi': did you mean 'toy'"):
        analyse(contents, "tokens", suite="toi")
    with pytest.raises(InvalidInput, match="no result has a price"):
        analyse(contents, "usd")
    with pytest.raises(InvalidInput, match="no finished result"):
        analyse(Contents((result("plain", 0, score=None, error="x"),), ()), "tokens")


def test_one_example_shows_nothing_and_says_so() -> None:
    (frontier,) = analyse(Contents((result("plain", 0), result("a", 0)), (head(["plain", "a"]),)), "tokens")
    assert frontier.closing_line() == "n = 1: too few examples to show any difference of scores."
    assert json.loads(json.dumps(frontier.to_dict(), allow_nan=False))["rows"][1]["saving"]["low"] is None


async def test_measure_runs_what_is_missing_and_agrees_with_the_file(tmp_path: Path) -> None:
    plans = [Plan("plain"), Plan.from_toml('name = "asked"\n[[methods]]\nuse = "budget-prompt"')]
    tasks = [
        Task(id=str(i), messages=({"role": "user", "content": f"Say {i}"},), gold=str(i), scorer="numeric")
        for i in range(5)
    ]
    engine = ScriptedEngine(lambda call, draw: call.question())
    with Store(tmp_path / "r.jsonl") as store:
        with pytest.raises(InvalidInput, match="unknown axis"):
            await measure(plans, tasks, engine, "tokns", store)
        assert engine.calls == []
        frontier, outcome = await measure(plans, tasks, engine, "input", store, suite="say")
    assert outcome.done == 10 and frontier.reference.score.value == 1.0
    asked = frontier.rows[1]
    assert asked.saving is not None and asked.saving.value < 0, "a longer prompt saves nothing, and the table says so"
    (again,) = load(tmp_path / "r.jsonl", "input")
    assert again.to_dict() == frontier.to_dict()


async def test_a_run_shows_its_own_plans_and_examples(tmp_path: Path) -> None:
    from thrifty.bench.frontier import frontier_of
    from thrifty.bench.run import run

    asked, plain = Plan.from_toml('name = "asked"\n[[methods]]\nuse = "budget-prompt"'), Plan("plain")
    longer = Plan.from_toml('name = "longer"\n[[methods]]\nuse = "budget-prompt"\nwords = 99')
    tasks = [
        Task(id=str(i), messages=({"role": "user", "content": f"Say {i}"},), gold=str(i), scorer="numeric")
        for i in range(6)
    ]
    engine = ScriptedEngine(lambda call, draw: call.question())
    with Store(tmp_path / "r.jsonl") as store:
        await run([plain, asked, longer], tasks, engine, store)
        outcome = await run([asked, plain], tasks[:4], engine, store)
        assert outcome.resumed == 8
        frontier = frontier_of(store, outcome, "tokens")
    assert [(r.plan, r.n) for r in frontier.rows] == [("asked", 4), ("plain", 4)]
    (everything,) = load(tmp_path / "r.jsonl", "tokens")
    assert [(r.plan, r.n) for r in everything.rows] == [("plain", 6), ("asked", 6), ("longer", 6)]


def test_a_reference_without_results_is_refused() -> None:
    failed = [result("plain", i, score=None, error="x") for i in range(4)]
    contents = Contents((*failed, *(result("a", i) for i in range(4))), (head(["plain", "a"]),))
    with pytest.raises(InvalidInput, match="the reference has no finished result"):
        analyse(contents, "tokens")
