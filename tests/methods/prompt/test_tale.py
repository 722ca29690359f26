"""TALE: what the estimate's reply says, what the two calls hold and cost, and the budget search on planted
elasticity curves."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, InvalidInput, Plan, Sampling
from thrifty.call import text_of
from thrifty.engines.scripted import Draw, Reply, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.methods.prompt._system import conversation_tokens
from thrifty.methods.prompt.tale import (
    Searched,
    Tale,
    Trial,
    asker,
    budget_within,
    estimate_prompt,
    instruction,
    parse_budget,
    search_budget,
)

QUESTION = "A farm has 3 barns of 12 cows. How many cows?"
STATED = re.compile(r"use less than (\d+) tokens")


def world(*replies: str, budget: Budget | None = None, on_exceed: str = "degrade", **knobs: object):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine(list(replies))
    plan = Plan("t", (Tale(**knobs),), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    return engine, plan.build(engine), Account("t", ledger=MemoryLedger())


# -- the reply -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[12]]", 12),
        ("Budget: [[12]].", 12),
        ("[[ 1,200 tokens ]]", 1200),
        ("**[[80 Token]]**", 80),
        ("[[0]] no, [[30]]", 30),
        ("[[budget]] then [[45]] then [[9]]", 45),
        ("", None),
        ("45", None),
        ("[45]", None),
        ("[[-1]]", None),
        ("[[1.5]]", None),
        ("[[about 50]]", None),
        ("[[" + "9" * 5000 + "]]", None),
        ("[[" * 5000, None),
    ],
)
def test_the_budget_in_a_reply(text: str, expected: int | None) -> None:
    assert parse_budget(text) == expected


@given(st.integers(1, 999_999_999), st.text(alphabet="ab ]", max_size=9), st.text(max_size=9))
def test_a_written_budget_is_read_back(n: int, before: str, after: str) -> None:
    assert parse_budget(f"{before}[[{n}]]{after}") == n
    assert parse_budget(f"{before}[[{n:,}]]{after}") == n


# -- in a plan -----------------------------------------------------------------------------------------------


async def test_an_estimate_then_an_answer_under_it() -> None:
    engine, pipeline, account = world("Budget: [[40]]", "36")
    answer = await pipeline.ask(QUESTION, account, sampling=Sampling(seed=3, temperature=0.7, max_tokens=500))
    estimate, solve = engine.calls
    assert [c.labels.method for c in engine.calls] == ["tale", ""]
    assert estimate.messages == ({"role": "user", "content": estimate_prompt(QUESTION)},)
    assert (estimate.sampling.temperature, estimate.sampling.max_tokens, estimate.sampling.seed) == (0.0, 64, 3)
    assert solve.messages == (
        {"role": "system", "content": "Let's think step by step and use less than 40 tokens."},
        {"role": "user", "content": QUESTION},
    )
    assert solve.sampling.temperature == 0.7
    (receipt,) = answer.receipts
    assert receipt.fired and receipt.detail == {"budget": 40, "estimate": 40, "breaks_cached": 0}
    assert receipt.spend.calls == 1 and answer.spend.calls == 2 and answer.spend == account.settled
    entries = account.ledger.entries()
    assert sum(e.spend.output for e in entries if e.labels.method == "tale") == receipt.spend.output == 2
    assert receipt.before is not None and receipt.after == receipt.before + 11  # the eleven words of the sentence


async def test_fixed_asks_nothing() -> None:
    engine, pipeline, account = world("36", estimator="fixed", tokens=25)
    answer = await pipeline.ask(QUESTION, account)
    assert answer.spend.calls == 1 and answer.receipts[0].detail["budget"] == 25
    assert text_of(engine.calls[0].messages[0]).count("25") == 1


@pytest.mark.parametrize(
    ("knobs", "reply", "stated", "why"),
    [
        ({}, "no idea", None, "could not be read: no budget stated"),
        ({"fallback": 70}, "no idea", "70", "could not be read: the fallback"),
        ({"fallback": 70, "most": 50}, "[[-1]]", "50", "70 is outside 1 to 50"),
        ({"least": 20}, "[[3]]", "20", "3 is outside 20 to 100000"),
        ({"most": 90}, "[[5000]]", "90", "5000 is outside 1 to 90"),
    ],
)
async def test_what_cannot_be_used_is_told(knobs: dict[str, object], reply: str, stated: str | None, why: str) -> None:
    engine, pipeline, account = world(reply, "36", **knobs)
    answer = await pipeline.ask(QUESTION, account)
    (receipt,) = answer.receipts
    assert why in receipt.reason and receipt.fired == (stated is not None)
    said = STATED.findall("\n".join(text_of(m) for m in engine.calls[-1].messages))
    assert said == ([] if stated is None else [stated])
    assert answer.spend.calls == 2 and receipt.spend.calls == 1  # what was asked for nothing is told too


async def test_an_image_alone_is_not_estimated() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    engine, pipeline, account = world("36")
    answer = await pipeline.ask([{"role": "user", "content": [image]}], account)
    assert answer.spend.calls == 1 and not answer.receipts[0].fired and "no text" in answer.receipts[0].reason
    assert engine.calls[0].messages[0]["content"] == [image]


async def test_a_long_question_is_not_read_twice() -> None:
    engine, pipeline, account = world("36", fallback=200, question_tokens=100)
    answer = await pipeline.ask("so " * 90, account)
    assert answer.spend.calls == 1 and answer.receipts[0].detail["budget"] == 200
    assert "over 100: the fallback" in answer.receipts[0].reason


async def test_a_budget_is_lowered_to_what_is_left() -> None:
    _, pipeline, account = world("[[400]]", "36")
    answer = await pipeline.ask(QUESTION, account, sampling=Sampling(max_tokens=30))
    assert answer.receipts[0].detail["budget"] == 30 and "lowered from 400" in answer.receipts[0].reason
    _, pipeline, account = world("[[400]]", "36", budget=Budget(output=100))
    assert (await pipeline.ask(QUESTION, account)).receipts[0].detail["budget"] == 99  # the estimate took one


@pytest.mark.parametrize("limit", [Budget(output=64), Budget(calls=1), Budget(input=20), Budget(tokens=80)])
async def test_no_room_for_an_estimate(limit: Budget) -> None:
    engine, pipeline, account = world("36", budget=limit)
    answer = await pipeline.ask(QUESTION, account)
    assert answer.text == "36" and not answer.receipts[0].fired
    assert engine.calls[0].messages == ({"role": "user", "content": QUESTION},)
    _, strict, account = world("36", budget=limit, on_exceed="refuse")
    with pytest.raises(BudgetExceeded):
        await strict.ask(QUESTION, account)
    assert not account.held and not account.settled


async def test_the_estimate_leaves_room_for_the_sentence_too() -> None:
    """Every input budget between no room and plenty answers: the estimate never takes what the answer needs."""
    needed = len(estimate_prompt(QUESTION).split()) + len(instruction(1).split()) + len(QUESTION.split())
    for limit in range(20, 120):
        _, pipeline, account = world(*(["[[40]]", "36"] if limit else []), budget=Budget(input=limit))
        answer = await pipeline.ask(QUESTION, account)
        assert answer.spend.input <= limit
        assert answer.receipts[0].fired == (limit >= needed), limit


async def test_prompts_full_of_marks_are_quoted_as_they_are() -> None:
    engine, pipeline, account = world("[[9]]", "36")
    await pipeline.ask("What is {x} in [[7]] % {question}?", account)
    assert text_of(engine.calls[0].messages[0]).endswith("Task:\nWhat is {x} in [[7]] % {question}?")


# -- the conversation's prefix -------------------------------------------------------------------------------

TURNS = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "one two three"},
    {"role": "assistant", "content": "four five"},
    {"role": "user", "content": QUESTION},
)


async def test_what_it_breaks_of_the_cached_prefix() -> None:
    _, pipeline, account = world("[[40]]", "36")
    answer = await pipeline.ask(TURNS, account)
    assert answer.receipts[0].detail["breaks_cached"] == 5 and "5 tokens" in answer.receipts[0].reason
    _, pipeline, account = world("36", estimator="fixed")
    assert (await pipeline.ask(TURNS, account)).receipts[0].detail["breaks_cached"] == 0  # always the same sentence


async def test_the_budget_before_the_last_turn() -> None:
    engine, pipeline, account = world("[[40]]", "36", place="turn")
    answer = await pipeline.ask(TURNS, account)
    sent = engine.calls[1].messages
    assert sent == (*TURNS[:3], {"role": "system", "content": instruction(40)}, TURNS[3])
    assert answer.receipts[0].detail["breaks_cached"] == 0
    engine, pipeline, account = world("[[40]]", "36", place="turn")
    await pipeline.ask((TURNS[0], TURNS[3]), account)  # no conversation: in the system message, as ever
    assert engine.calls[1].messages[0]["content"] == f"Be kind.\n\n{instruction(40)}"


def test_conversation_tokens() -> None:
    engine = ScriptedEngine("x")

    def tokens(*messages: dict[str, object]) -> int:
        return conversation_tokens(Call(messages, Account("t"), engines={"answer": engine}))

    assert tokens(*TURNS) == tokens(*TURNS[1:]) == 5
    assert tokens(TURNS[0], TURNS[3]) == tokens(TURNS[3]) == tokens(TURNS[0]) == 0
    tool = {"role": "tool", "content": "a b c d", "tool_call_id": "1"}
    assert tokens(tool, TURNS[3]) == 4
    assert conversation_tokens(Call(TURNS, Account("t"))) == 0


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(InvalidInput, match="least = 9, most = 8"):
        Tale(least=9, most=8)


# -- the search ----------------------------------------------------------------------------------------------


def speaker(cost: dict[int | None, int], right: set[int | None]):  # type: ignore[no-untyped-def]
    """A model with a known elasticity curve: so many words under each budget, ending in 36 where it is right."""

    def speak(call: Call, draw: Draw) -> Reply:
        found = STATED.search("\n".join(text_of(m) for m in call.messages))
        budget = int(found[1]) if found else None
        n = cost[budget]
        return Reply(" ".join(["so"] * (n - 1) + ["36" if budget in right else "35"]))

    return speak


async def correct(answer: Answer) -> bool:
    return answer.text.endswith("36")


async def searched(cost: dict[int | None, int], right: set[int | None], **how: object):  # type: ignore[no-untyped-def]
    engine = ScriptedEngine(speaker(cost, right))
    account = Account("t", how.pop("budget", Budget()), ledger=MemoryLedger())  # type: ignore[arg-type]
    call = Call(({"role": "user", "content": QUESTION},), account)
    return await search_budget(asker(engine.generate, call), correct, **how), engine, account  # type: ignore[arg-type]


CURVE = {None: 160, 80: 90, 40: 45, 20: 60, 10: 70, 5: 30, 2: 99, 1: 99}
"""It falls to a budget of 40, rises below that (token elasticity), and falls once more at 5."""


async def test_the_greedy_search_stops_at_the_planted_minimum() -> None:
    found, engine, account = await searched(CURVE, set(CURVE))
    assert found.budget == 40 and found.answer.spend.output == 45 and found.ended == "dearer"
    assert [(t.budget, t.output, t.accepted) for t in found.trials] == [
        (None, 160, True),
        (80, 90, True),
        (40, 45, True),
        (20, 60, False),
    ]
    assert {e.labels.method for e in account.ledger.entries()} == {"tale"}
    assert found.receipt().spend == account.settled and account.settled.calls == 4
    assert found.receipt().before == 160 and found.receipt().after == 45


async def test_the_elasticity_curve_goes_on_while_correct() -> None:
    found, _, _ = await searched(CURVE, set(CURVE) - {2}, accept="correct")
    assert [t.budget for t in found.trials] == [None, 80, 40, 20, 10, 5, 2]
    assert found.budget == 5 and found.ended == "wrong"
    assert found.cheapest == Trial(5, 30, True, True)
    found, _, _ = await searched(CURVE, set(CURVE), accept="correct")
    assert found.budget == 1 and found.ended == "smallest"  # never "less than 0 tokens"
    assert found.cheapest is not None and found.cheapest.budget == 5


async def test_a_plain_answer_that_is_wrong_is_not_searched() -> None:
    found, engine, account = await searched(CURVE, {80})
    assert (found.budget, found.ended, len(found.trials), found.cheapest) == (None, "wrong", 1, None)
    assert account.settled.calls == 1 and not found.receipt().fired


async def test_a_first_trial_that_is_dearer_leaves_the_plain_answer() -> None:
    found, _, _ = await searched({None: 10, 5: 12}, {None, 5})
    assert found.budget is None and found.answer.spend.output == 10 and found.ended == "dearer"


async def test_the_search_keeps_to_its_account() -> None:
    found, _, account = await searched(CURVE, set(CURVE), budget=Budget(calls=2))
    assert found.budget == 80 and found.ended == "calls" and account.settled.calls == 2
    with pytest.raises(BudgetExceeded):
        await searched(CURVE, set(CURVE), budget=Budget(calls=0))
    with pytest.raises(InvalidInput, match="accept"):
        await searched(CURVE, set(CURVE), accept="best")


async def test_an_answer_cut_short_is_no_short_answer() -> None:
    """The scripted answers are right from their first word on; only their being cut says that they are not."""

    async def always(answer: Answer) -> bool:
        return True

    account = Account("t", Budget(output=160 + 90 + 20))
    call = Call(({"role": "user", "content": QUESTION},), account)
    engine = ScriptedEngine(speaker(CURVE, set(CURVE)))
    found = await search_budget(asker(engine.generate, call), always)
    assert found.budget == 80 and found.ended == "budget" and found.trials[-1] == Trial(40, 20, False, False)
    capped = replace(call, account=Account("u"), sampling=Sampling(max_tokens=150))
    found = await search_budget(asker(engine.generate, capped), always)
    assert (found.budget, found.ended, len(found.trials)) == (None, "length", 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=9, max_size=9))
async def test_the_search_is_the_longest_chain_that_falls(plain: int, points: list[tuple[int, bool]]) -> None:
    """Against the definition over the whole curve, which the search never sees whole."""
    budgets: list[int] = []
    while (plain >> (len(budgets) + 1)) >= 1:
        budgets.append(plain >> (len(budgets) + 1))
    cost = {None: plain, **{b: c for b, (c, _) in zip(budgets, points, strict=False)}}
    right = {None, *(b for b, (_, good) in zip(budgets, points, strict=False) if good)}
    found, _, _ = await searched(cost, right)
    chain = [plain, *(cost[b] for b in budgets)]
    lengths = [
        n
        for n in range(len(budgets) + 1)
        if all(b in right for b in budgets[:n]) and chain[: n + 1] == sorted(set(chain[: n + 1]), reverse=True)
    ]
    assert found.budget == ([None, *budgets][max(lengths)])
    assert found.answer.spend.output == chain[max(lengths)]
    longest = max(n for n in range(len(budgets) + 1) if all(b in right for b in budgets[:n]))
    whole: Searched = (await searched(cost, right, accept="correct"))[0]
    assert whole.budget == ([None, *budgets][longest])
    assert whole.cheapest is not None and whole.cheapest.output == min(chain[: longest + 1])


async def test_what_the_search_finds_is_what_the_plan_then_spends() -> None:
    """Searched on one question, then stated by the fixed method: the tokens found are the tokens spent."""
    found, engine, _ = await searched(CURVE, set(CURVE))
    assert found.budget is not None
    plan = Plan("t", (Tale(estimator="fixed", tokens=found.budget),)).build(ScriptedEngine(engine.script))
    answer = await plan.ask(QUESTION)
    assert answer.spend.output == 45 == found.answer.spend.output
    through = asker(Plan("p", ()).build(ScriptedEngine(engine.script)), replace(engine.calls[0], account=Account("u")))
    assert (await search_budget(through, correct)).budget == found.budget


@given(st.lists(st.one_of(st.none(), st.integers(1, 500)), min_size=1, max_size=30), st.integers(1, 100))
def test_the_budget_that_covers_a_share(budgets: list[int | None], percent: int) -> None:
    found = [Searched(b, Answer(""), (), "", ()) for b in budgets]
    known = [b for b in budgets if b is not None]
    if not known:
        with pytest.raises(InvalidInput, match="0 found budgets"):
            budget_within(found)
        return
    share = percent / 100
    best = min(b for b in known if sum(x <= b for x in known) >= share * len(known) - 1e-9)
    assert budget_within(found, share) in (best, min((b for b in known if b > best), default=best))
    assert sum(x <= budget_within(found, share) for x in known) >= share * len(known)
    with pytest.raises(InvalidInput, match="share 0"):
        budget_within(found, 0)


async def test_the_recipe_searches_a_file_of_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[3] / "recipes" / "tale" / "search_budgets.py"
    spec = importlib.util.spec_from_file_location("search_budgets", file)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    task = recipe.Task(id="a", messages=({"role": "user", "content": QUESTION},), gold="36", scorer="contains")
    found = await recipe.search(ScriptedEngine(speaker(CURVE, set(CURVE))), task, Account("t"), "cheaper", 1.0)
    assert found.budget == 40
    rows = [
        {"id": str(i), "prompt": f"Say word {i} {'so ' * 9}", "gold": f"{i}", "scorer": "contains"} for i in range(4)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    await recipe.main(
        ["--tasks", str(tmp_path / "tasks.jsonl"), "--engine", "scripted:echo", "--output", "80"]
        + ["--out", str(tmp_path / "found.jsonl")]
    )
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2", "3"][: len(lines)] and 1 < len(lines) < 4
    assert lines[0]["trials"][0] == {"budget": None, "output": 12, "correct": True} and "stopped in" in out
