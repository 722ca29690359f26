"""Method: knobs and their ranges, and what the four bases do with a call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from thrifty import (
    Account,
    Answer,
    Call,
    Delta,
    InvalidInput,
    Method,
    Next,
    Plan,
    PlanError,
    Policies,
    Receipt,
    Rewrite,
    Spend,
    Whole,
    Work,
    knob,
)
from thrifty.call import Branch
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.method import Range
from thrifty.policy import CONTINUE, DecodePolicy, Stop, Verdict


@dataclass(frozen=True, kw_only=True)
class Sample(Rewrite):
    name = "sample"
    paper = "none"

    whole: int = knob(3, "a count", low=1, high=9)
    real: float = knob(0.5, "a share", low=0.0, high=1.0)
    flag: bool = knob(False, "a switch")
    word: str = knob("a", "a word")
    choice: str = knob("x", "a choice", choices=("x", "y"))
    numbers: tuple[int, ...] = knob((1, 2), "some counts", low=0, high=5)
    free: float = knob(1.0, "any number")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"whole": 0}, "whole = 0 is not allowed: from 1 to 9"),
        ({"whole": 10}, "from 1 to 9"),
        ({"whole": 2.0}, "a whole number from 1 to 9"),
        ({"whole": True}, "a whole number"),
        ({"whole": "3"}, "a whole number"),
        ({"real": 1.5}, "from 0 to 1"),
        ({"real": float("nan")}, "a number from 0 to 1"),
        ({"real": float("inf")}, "a number"),
        ({"real": True}, "a number"),
        ({"flag": 1}, "true or false"),
        ({"word": 5}, "text"),
        ({"choice": "z"}, "one of x, y"),
        ({"numbers": 4}, "a list of whole numbers, each from 0 to 5"),
        ({"numbers": [1, 9]}, "each from 0 to 5"),
        ({"numbers": [1, "2"]}, "a list of whole numbers"),
        ({"numbers": [True]}, "a list of whole numbers"),
        ({"free": float("nan")}, "a number any"),
        ({"hole": 3}, "unknown knob of 'sample' 'hole': did you mean 'whole'?"),
    ],
)
def test_what_is_not_allowed(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Sample.from_settings(settings)
    assert said in str(refused.value)


def test_what_is_allowed() -> None:
    given = {
        "whole": 9,
        "real": 1,
        "flag": True,
        "word": "",
        "choice": "y",
        "numbers": [0, 5, 5],
        "free": -1e9,
    }
    method = Sample.from_settings(given)
    assert method.settings() == given and method.numbers == (0, 5, 5)
    assert Sample.from_settings(method.settings()) == method
    assert Sample.knobs()["whole"] == (3, Range("a count", 1, 9))


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (Range("", 0, 1), "from 0 to 1"),
        (Range("", 2), "at least 2"),
        (Range("", None, 7), "at most 7"),
        (Range(""), "any"),
        (Range("", choices=("a", "b")), "one of a, b"),
    ],
)
def test_ranges_in_words(allowed: Range, words: str) -> None:
    assert allowed.describe() == words


def test_methods_are_frozen_and_know_their_family() -> None:
    from thrifty.methods.context.truncation import Truncation

    assert Truncation().family == "context" and Sample().family == "third_party"
    with pytest.raises(AttributeError):
        Sample().whole = 5  # type: ignore[misc]


# -- rewrites that spend -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asking(Rewrite):
    """Asks the engine once in its own name, then adds nothing."""

    name = "asking"

    async def rewrite(self, call: Call) -> Call:
        own = await call.engines["answer"].generate(call.on_behalf(self.name))
        return call.with_receipt(Receipt(self.name, True, "asked", spend=own.spend, work=own.work))


@pytest.mark.parametrize("stream", [False, True])
async def test_what_rewriting_cost_is_in_the_answer_and_in_the_last_delta(stream: bool) -> None:
    ledger = MemoryLedger()
    account, seen = Account("t", ledger=ledger), []

    async def emit(delta: Delta) -> None:
        seen.append(delta)

    pipeline = Plan("p", (Asking(), Asking())).build(ScriptedEngine("four words are here"))
    answer = await pipeline.ask("q", account, emit=emit if stream else None)
    assert answer.spend == Spend(input=3, output=12, calls=3) == account.settled
    assert answer.work.target_passes == 12
    assert [e.labels.method for e in ledger.entries()] == ["asking", "asking", ""]
    if stream:
        assert seen[-1].answer == answer and "".join(d.text for d in seen) == answer.text


async def test_a_branch_has_the_receipt_and_the_account_has_the_cost() -> None:
    account = Account("t", ledger=MemoryLedger())
    pipeline = Plan("p", (Asking(),)).build(ScriptedEngine("a b"))
    branch = await pipeline.open(pipeline.call("q", account))
    answer = await branch.finish_up()
    assert [r.method for r in answer.receipts] == ["asking"]
    assert account.settled == answer.spend + answer.receipts[0].spend


# -- policies and the other bases ----------------------------------------------------------------------------


class StopAt(DecodePolicy):
    def __init__(self, n: int) -> None:
        self.n = n

    def after(self, branch: Branch, token: int) -> Verdict:
        return Stop("enough") if len(branch.tokens) >= self.n else CONTINUE

    def receipt(self, branch: Branch) -> Receipt:
        return Receipt(self.method, branch.finish == "enough", f"{len(branch.tokens)} tokens")


@dataclass(frozen=True, kw_only=True)
class Stopping(Policies):
    name = "stopping"
    needs = frozenset({"text"})

    n: int = knob(2, "tokens", low=1, high=99)

    def policies(self, call: Call) -> tuple[DecodePolicy, ...]:
        return (StopAt(self.n),)


async def test_policies_reach_the_engine_by_call_and_by_branch() -> None:
    pipeline = Plan("p", (Stopping(),)).build(ScriptedEngine("a b c d"))
    answer = await pipeline.ask("q")
    assert (answer.text, answer.finish) == ("a b", "enough")
    assert answer.receipts == (Receipt("stopping", True, "2 tokens"),)
    branch = await pipeline.open(pipeline.call("q"))
    while await branch.step() is not None:
        pass
    assert (await branch.finish_up()).receipts == answer.receipts


@dataclass(frozen=True, kw_only=True)
class Shouting(Whole):
    name = "shouting"

    async def __call__(self, call: Call, next: Next) -> Answer:
        answer = await next(call)
        return replace(answer, text=answer.text.upper())


async def test_a_whole_answers_and_does_not_open() -> None:
    pipeline = Plan("p", (Shouting(),)).build(ScriptedEngine("a b"))
    assert (await pipeline.ask("q")).text == "A B"
    with pytest.raises(PlanError, match="'shouting' needs the whole answer"):
        await pipeline.open(pipeline.call("q"))


async def test_bases_that_are_not_filled_in_say_so() -> None:
    class Empty(Method):
        name = "empty"

    for method in (Empty(), Rewrite(), Policies()):
        with pytest.raises(NotImplementedError):
            await Plan("p", (method,)).build(ScriptedEngine("a")).ask("q")
    assert Work() == Work.from_dict({})
