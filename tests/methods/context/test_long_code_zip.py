"""LongCodeZip: its knapsack by brute force, its formulas by hand, and files that parse and never pass the limit."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import math
import textwrap
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, InvalidInput, Plan
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.context import _knapsack
from thrifty.methods.context._code_blocks import File
from thrifty.methods.context._documents import parsed
from thrifty.methods.context._knapsack import knapsack, rates, spikes
from thrifty.methods.context.long_code_zip import LongCodeZip, recall

# -- the parts -----------------------------------------------------------------------------------------------

items = st.lists(st.tuples(st.integers(0, 12), st.floats(-5, 5, allow_nan=False)), max_size=12)


@given(items, st.integers(0, 40))
def test_the_knapsack_is_the_best_of_all_subsets(things: list[tuple[int, float]], capacity: int) -> None:
    weights, values = [w for w, _ in things], [v for _, v in things]
    best = max(
        math.fsum(values[i] for i in subset)
        for n in range(len(things) + 1)
        for subset in itertools.combinations(range(len(things)), n)
        if sum(weights[i] for i in subset) <= capacity
    )
    chosen = knapsack(weights, values, capacity)
    assert sum(weights[i] for i in chosen) <= capacity and chosen == sorted(set(chosen))
    assert math.isclose(math.fsum(values[i] for i in chosen), best, abs_tol=1e-9)
    assert all(values[i] > 0 for i in chosen)


@given(items, st.integers(0, 40))
def test_too_large_for_the_table_it_is_greedy_and_keeps_to_the_capacity(
    things: list[tuple[int, float]], capacity: int
) -> None:
    weights, values = [w for w, _ in things], [v for _, v in things]
    chosen = _knapsack._greedy([i for i, v in enumerate(values) if v > 0], weights, values, capacity)
    assert sum(weights[i] for i in chosen) <= capacity and all(values[i] > 0 for i in chosen)
    left = capacity - sum(weights[i] for i in chosen)
    assert all(weights[i] > left for i, v in enumerate(values) if v > 0 and i not in chosen)


def test_many_items_or_much_room_are_taken_greedily() -> None:
    assert knapsack([2] * 101, [1.0] * 101, 5) == [0, 1]
    assert knapsack([2001, 2, 4000], [1.0, 5.0, -1.0], 2002) == [1]
    assert knapsack([], [], 5) == [] and knapsack([1], [1.0], 0) == []


def test_a_jump_exceeds_a_neighbour_by_mean_and_deviations() -> None:
    values = [1.0, 1.0, 4.0, 1.0, 1.2, 1.0, math.inf, 2.0]
    known = [1.0, 1.0, 4.0, 1.0, 1.2, 1.0, 2.0]
    mean = sum(known) / 7
    deviation = math.sqrt(sum((v - mean) ** 2 for v in known) / 7)
    assert mean + 0.2 * deviation <= 3.0 and spikes(values, 0.2) == [2]
    assert mean + 2.0 * deviation > 3.0 and spikes(values, 2.0) == []
    assert spikes([0.1, 0.7, 0.1]) == [1], "three are enough: the mean is 0.3, the deviation 0.28"
    assert spikes([0.0, 0.7, 0.0]) == [1] and spikes([0.0, 0.4, 0.0]) == [], "0.5 where fewer are known"
    assert spikes([]) == spikes([9.0]) == []


def test_rates_are_the_global_one_tilted_by_importance() -> None:
    # of 60 in functions of 5 lines or more 26 may stay, 4 of 30 going to a small one: g = 26 / 60
    g = 26 / 60
    tilted = [g * 1.5, g * 1.0, g * 0.5]
    actual = 10 * tilted[0] + 20 * tilted[1] + 30 * tilted[2]
    found = rates([10, 20, 30, 4], [3.0, 2.0, 1.0, 99.0], 30, 0.5, 5)
    assert found == pytest.approx([*(r * 26 / actual for r in tilted), 1.0])
    assert rates([10, 10], [1.0, 1.0], 10, 0.5, 5) == [0.5, 0.5]
    assert rates([3, 4], [1.0, 2.0], 0, 0.5, 5) == [1.0, 1.0]


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(-9, 9)), max_size=8), st.integers(0, 200), st.floats(0, 1))
def test_rates_are_shares_and_rise_with_importance(things: list[tuple[int, float]], target: int, beta: float) -> None:
    found = rates([n for n, _ in things], [v for _, v in things], target, beta, 5)
    assert all(0 <= r <= 1 for r in found)
    large = [(v, r) for (n, v), r in zip(things, found, strict=True) if n >= 5]
    assert all(r <= s + 1e-12 for (v, r), (w, s) in itertools.product(large, large) if v < w)


SOURCES = [inspect.getsource(module) for module in (json.decoder, textwrap, ast)]


@pytest.mark.parametrize("source", SOURCES, ids=["json.decoder", "textwrap", "ast"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_whatever_goes_the_rest_parses(source: str, data: st.DataObject) -> None:
    tree = parsed(source)
    assert tree is not None
    file = File.of(source, tree)
    assert "".join(file.text(span) for span in file.top) == source
    bodies = [span for f in file.functions for span in f.body]
    assert file.functions and file.build(bodies) == source
    kept = data.draw(st.sets(st.sampled_from(bodies)))
    dropped = data.draw(st.sets(st.sampled_from(file.top), max_size=5))
    built = file.build(kept, dropped, "recall #x")
    assert parsed(built) is not None
    if len(kept) < len(bodies) or dropped:
        assert built.count("recall #x") <= 1
    for span in kept:
        if not any(d.start <= span.start < d.stop for d in dropped):
            assert file.text(span) in built


TRICKY = '''\
@decorator(
    1)
async def one(a, b="""
two lines"""):
    """Doc.

    string"""
    x = 1; y = 2
    z = """text
not indented
    """; w = 3
    if x:
        return (
            y)
    else: return z
class A:
    é = "ü"; e = 1
    def m(self): return 1
    @property
    def n(self):
        # a comment first
        with open("x") as f:
            for line in f:
                print(line)
                yield line
    class B:
        def o(self):
            def inner():
                pass
            return inner
'''


def test_statements_that_share_lines_stay_together() -> None:
    tree = parsed(TRICKY)
    assert tree is not None
    file = File.of(TRICKY, tree)
    assert len(file.functions) == 3
    lines = TRICKY.split("\n")
    shown = [[lines[s.start].strip() for s in f.body] for f in file.functions]
    assert shown == [
        ['"""Doc.', "x = 1; y = 2", 'z = """text', "if x:"],
        ["print(line)", "yield line"],
        ["def inner():", "return inner"],
    ]
    bodies = [span for f in file.functions for span in f.body]
    for n in range(len(bodies) + 1):
        for kept in itertools.combinations(bodies, n):
            assert parsed(file.build(kept)) is not None
    bare = file.build([])
    assert bare.count("left out") == 3 and "        # a comment first" in bare


def test_windows_line_ends_and_a_missing_last_one_are_kept() -> None:
    source = "def f():\r\n    a = 1\r\n    b = 2\r\n    return a"
    tree = parsed(source)
    assert tree is not None
    file = File.of(source, tree)
    assert file.build([file.functions[0].body[0]]).startswith("def f():\r\n    a = 1\r\n    ...  # 2 lines left out")
    assert parsed(file.build([])) is not None


# -- the method ----------------------------------------------------------------------------------------------

TOPICS = ("matrix", "river", "candle", "planet", "ledger", "violin", "harbor", "pepper", "saddle", "window")
QUESTION = "How is the violin tuned ?"


def function(topic: str, i: int) -> str:
    return (
        f"def use_{topic}(value):\n"
        f"    # about the {topic} ,\n"
        f"    start = value + {i}\n"
        f"    middle = start * {i} + value\n"
        f"    log( '{topic} begins' , start )\n"
        f"    other = [ middle for _ in range( {i} ) ]\n"
        f"    end = sum( other ) - middle\n"
        f"    log( '{topic} ends' , end )\n"
        f"    return end\n\n\n"
    )


CODE = "import math\n\nLIMIT = 10\n\n\n" + "".join(function(t, i) for i, t in enumerate(TOPICS))


def values(word: str, context: str, before: str) -> float:
    """A question is likelier behind code that has its words; of the code 'log' surprises."""
    core = word.strip(" '?.,\n")
    if word.strip() in QUESTION:
        return -0.2 if len(core) > 4 and core in context else -3.0
    return -6.0 if core == "log(" else -0.05


async def ask(
    knobs: dict[str, Any], *, budget: Budget | None = None, question: str = QUESTION, **call: Any
) -> tuple[Answer, Call]:
    engine = ScriptedEngine("fine")
    pipeline = Plan("t", (LongCodeZip(**knobs),), budget or Budget()).build(
        {"answer": engine, "scorer": ScriptedEngine("", model="small", logprob=values)}
    )
    messages = call.pop("messages", ({"role": "user", "content": question},))
    answer = await pipeline(Call(messages, Account("t"), **call))
    return answer, engine.calls[-1]


def size(text: str) -> int:
    return len(ScriptedEngine("").words.split(text))


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.05, 0.2, 0.35, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("fine_ratio", [0.3, 0.5, 1.0])
async def test_the_limit_is_never_passed_and_the_result_parses(ratio: float, fine_ratio: float) -> None:
    _, sent = await ask({"ratio": ratio, "fine_ratio": fine_ratio}, context=(CODE,))
    left = "".join(sent.context or ())
    assert size(left) <= ratio * size(CODE) and parsed(left) is not None
    names = [n.name for n in (parsed(left) or ast.Module([], [])).body if isinstance(n, ast.FunctionDef)]
    assert names == [f"use_{t}" for t in TOPICS if f"use_{t}" in names]


async def test_the_function_that_the_question_is_about_stays() -> None:
    answer, sent = await ask({"ratio": 0.45, "fine_ratio": 1.0}, context=(CODE,))
    left = (sent.context or ("",))[0]
    assert function("violin", 5) in left
    detail = answer.receipts[0].detail
    assert detail["functions"] == 10 and 1 <= detail["whole"] < 5 and detail["fallen_back"] == 0
    assert left.startswith("import math\n\nLIMIT = 10\n") and left.count("recall #") == 1


async def test_the_fine_step_keeps_the_blocks_that_the_question_is_about() -> None:
    answer, sent = await ask({"ratio": 0.4, "fine_ratio": 0.3}, context=(CODE,))
    left = (sent.context or ("",))[0]
    tree = parsed(left)
    assert tree is not None
    violin = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "use_violin")
    assert "'violin begins'" in ast.unparse(violin)
    assert answer.receipts[0].detail["partly"] >= 1


async def test_signatures_too_long_leave_the_worthiest_statements() -> None:
    _, sent = await ask({"tokens": 30}, context=(CODE,))
    left = (sent.context or ("",))[0]
    assert "def use_violin" in left and "def use_matrix" not in left
    assert "lines left out" in left and parsed(left) is not None and size(left) <= 30


async def test_all_files_of_the_context_are_ranked_together() -> None:
    files = tuple(function(t, i) for i, t in enumerate(TOPICS))
    answer, sent = await ask({"ratio": 0.45, "fine_ratio": 1.0}, context=files)
    left = sent.context or ()
    assert function("violin", 5).strip() in "".join(left) and all(parsed(f) is not None for f in left)
    assert sum(size(f) for f in left) <= 0.45 * sum(size(f) for f in files)
    assert answer.receipts[0].detail["whole"] >= 1


async def test_the_scorer_reads_the_code_about_once_a_step_and_is_billed() -> None:
    answer, _ = await ask({"ratio": 0.4}, context=(CODE,))
    receipt = answer.receipts[0]
    question = size(QUESTION)
    calls = receipt.spend.calls
    assert calls == 3, "functions, lines, blocks"
    assert size(CODE) < receipt.spend.input <= 3 * size(CODE) + 80 * (question + 2)
    assert answer.spend.input == receipt.spend.input + receipt.after


async def test_without_a_question_the_surprise_at_the_code_decides() -> None:
    message = ({"role": "user", "content": f"```python\n{CODE}```\n"},)
    answer, sent = await ask({"ratio": 0.5, "least": 50}, messages=message)
    assert "1 texts without a question by plain perplexity" in answer.receipts[0].reason
    inner = sent.messages[0]["content"].split("```python\n")[1].split("```")[0]
    assert parsed(inner) is not None and size(inner) <= 0.5 * size(CODE)


async def test_fenced_code_is_cut_and_prose_and_data_stay() -> None:
    prose, data = "This is what we have. " * 20, json.dumps({"rows": list(range(50))}, indent=1)
    text = f"{prose}\n\n```python\n{CODE}```\n\n{data}\n\n{QUESTION}"
    _, sent = await ask({"ratio": 0.4, "least": 50}, messages=({"role": "user", "content": text},))
    left = sent.messages[0]["content"]
    assert left.startswith(prose) and data in left and left.endswith(QUESTION)
    inner = left.split("```python\n")[1].split("```")[0]
    assert parsed(inner) is not None and size(inner) <= 0.4 * size(CODE)


async def test_what_does_not_parse_falls_back_and_the_receipt_says_so() -> None:
    broken = CODE.replace("def use_ledger(value):", "def use_ledger(value:")
    assert parsed(broken) is None
    answer, sent = await ask({"ratio": 0.5}, context=(broken,))
    receipt, left = answer.receipts[0], (sent.context or ("",))[0]
    assert receipt.fired and receipt.detail["fallen_back"] == 1
    assert "1 pieces of code that Python does not read cut without the scorer" in receipt.reason
    assert size(left) <= 0.5 * size(broken) and left.startswith("import math") and not receipt.spend


async def test_braces_are_emptied_without_the_scorer() -> None:
    code = "".join(f"int f{i}(int x) {{\n  int y = x + {i};\n  y = y * 2;\n  return y;\n}}\n\n" for i in range(20))
    answer, sent = await ask({"ratio": 0.7}, context=(code,))
    left = (sent.context or ("",))[0]
    assert left.count("{") == left.count("}") == 20 and "lines left out" in left
    assert size(left) <= 0.7 * size(code) and answer.receipts[0].detail["fallen_back"] == 1


async def test_prose_is_no_code_and_short_code_stays() -> None:
    answer, sent = await ask({}, context=("It rains. " * 200,))
    assert not answer.receipts[0].fired and "0 with code, none to shorten" in answer.receipts[0].reason
    answer, sent = await ask({"tokens": 10_000}, context=(CODE,))
    assert sent.context == (CODE,) and not answer.receipts[0].spend


async def test_a_recall_brings_the_whole_back() -> None:
    knobs = {"ratio": 0.4}
    answer, sent = await ask(knobs, context=(CODE,))
    (ref,) = answer.receipts[0].detail["refs"]
    assert f"recall #{ref}" in (sent.context or ("",))[0]
    messages = ({"role": "user", "content": f"Please recall #{ref}. " + QUESTION},)
    answer, sent = await ask(knobs, context=(CODE,), messages=messages)
    assert sent.context == (CODE,) and "1 of them asked back" in answer.receipts[0].reason
    assert recall((), ref, (CODE,)) == CODE
    with pytest.raises(InvalidInput, match="names no long text"):
        recall((), "12345678", (CODE,))


async def test_a_file_of_an_older_message_stays_as_it_was_cut() -> None:
    first = {"role": "user", "content": f"```python\n{CODE}```\n\n{QUESTION}"}
    knobs = {"ratio": 0.4, "least": 50}
    _, one = await ask(knobs, messages=(first,))
    later = (first, {"role": "assistant", "content": "By ear."}, {"role": "user", "content": "And the harbor ?"})
    answer, two = await ask(knobs, messages=later)
    assert two.messages[0] == one.messages[0] and answer.receipts[0].detail["cache_broken"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "def f():\n    return '\ud800'\n" * 100,
        "class משהו:\n    def פעולה(self):\n        ערך = 1\n        ערך += 1\n        return ערך\n" * 1,
        "def 計算(値):\n    結果 = 値 + 1\n    結果 = 結果 * 2\n    return 結果\n" * 30,
        "def f():\n" + "    x = 1\n" * 2000,
        "x = 1\n" * 3000,
        "def f(): return 1\n" * 500,
        "(" * 50_000,
    ],
    ids=["megabyte", "surrogates", "rtl", "cjk", "one-function", "no-function", "one-liners", "nested"],
)
async def test_odd_files_keep_to_the_limit(text: str) -> None:
    answer, sent = await ask({"ratio": 0.5}, context=(text,))
    left = "".join(sent.context or ())
    if answer.receipts[0].fired:
        assert size(left) <= 0.5 * size(text)
    if parsed(text) is not None:
        assert parsed(left) is not None


async def test_an_image_only_message_has_no_code() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer, sent = await ask({"least": 1}, messages=({"role": "user", "content": [image]},))
    assert not answer.receipts[0].fired and sent.messages[0]["content"] == [image]


async def test_what_was_spent_before_a_refusal_is_in_the_receipt() -> None:
    free, _ = await ask({"ratio": 0.4}, context=(CODE,))
    plain = size(CODE) + size(QUESTION)
    whole = free.receipts[0].spend.input
    seen = set()
    for extra in range(0, whole + 200, 40):
        answer, sent = await ask({"ratio": 0.4}, budget=Budget(input=plain + extra), context=(CODE,))
        receipt = answer.receipts[0]
        seen.add((receipt.fired, bool(receipt.spend)))
        assert answer.spend.input == receipt.spend.input + ScriptedEngine("").count(sent)
        if not receipt.fired:
            assert "cannot hold the scoring of 1 texts (input): all kept" in receipt.reason and sent.context == (CODE,)
    assert seen == {(False, False), (False, True), (True, True)}
    plan = Plan("t", (LongCodeZip(),), Budget(input=plain + 5), on_exceed="refuse")
    with pytest.raises(BudgetExceeded):
        await plan.build({"answer": ScriptedEngine("x"), "scorer": ScriptedEngine("")}).ask(QUESTION, context=(CODE,))
