"""ThinkingPolicy: where a branch is, what it counts, when it must close; on scripted and tiny local engines."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking import Say

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, InvalidInput, Sampling
from thrifty.call import Branch
from thrifty.engines.scripted import Reply, ScriptedEngine
from thrifty.methods.decode._thinking import ThinkingPolicy, room, step_pattern
from thrifty.policy import CONTINUE, Verdict

ASK = ({"role": "user", "content": "Why?"},)
TEXT = "<think>One step. Two\n\nthree steps!\n\nfour</think>\n\nThe answer is 4."


class Log(ThinkingPolicy):
    """Notes what it is asked."""

    method = "log"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._asked: list[tuple[str, int]] = []
        self._seen: list[str] = []

    def think(self, branch: Branch, token: int) -> Verdict:
        self._asked.append(("think", self.thought))
        if self.stepped:
            self._seen.append(self.step_text)
        return CONTINUE

    def closed(self, branch: Branch, token: int) -> Verdict:
        self._asked.append(("closed", self.thought))
        return CONTINUE

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        return False, "logged", {"asked": self._asked, "steps": self._seen, "blocks": self.blocks}


def call(*policies: Any, account: Account | None = None, **fields: Any) -> Call:
    sampling = Sampling(max_tokens=fields.pop("max_tokens", None))
    return Call(ASK, account or Account("t"), policies=policies, sampling=sampling, **fields)


def told(answer: Answer, name: str = "log") -> Any:
    return next(r for r in answer.receipts if r.method == name)


@pytest.mark.parametrize("prefix", [None, "<think>\n"])
async def test_the_engines_count_of_thinking_is_the_policys(thinker: Any, prefix: str | None) -> None:
    text = TEXT if prefix is None else TEXT.removeprefix("<think>")
    answer = await thinker.generate(call(Say(text), Log(boundary="paragraph"), prefix=prefix, max_tokens=200))
    assert answer.text == "The answer is 4." and answer.thinking == "One step. Two\n\nthree steps!\n\nfour"
    receipt = told(answer)
    assert receipt.after == answer.spend.reasoning > 0
    assert receipt.detail["steps"] == ["One step. Two\n\n", "three steps!\n\n"]
    kinds = [kind for kind, _ in receipt.detail["asked"]]
    assert kinds.count("closed") == 1 and kinds.index("closed") == len(kinds) - 1
    assert receipt.detail["blocks"] == 1


@pytest.mark.parametrize(
    ("boundary", "steps"),
    [
        ("sentence", ["One step. ", "Two\n", "three steps!\n"]),
        ("line", ["One step. Two\n", "three steps!\n"]),
        (r"[A-Z]", ["O", "ne step. T"]),
    ],
)
async def test_boundaries(thinker: Any, boundary: str, steps: list[str]) -> None:
    answer = await thinker.generate(call(Say(TEXT), Log(boundary=boundary), max_tokens=200))
    assert [s.lstrip("\n") for s in told(answer).detail["steps"]] == steps


async def test_other_tags_than_the_engines_are_followed_in_the_text(thinker: Any) -> None:
    text = TEXT.replace("<think>", "[T]").replace("</think>", "[/T]")
    answer = await thinker.generate(call(Say(text), Log(opening="[T]", closing="[/T]"), max_tokens=200))
    asked = told(answer).detail["asked"]
    assert answer.spend.reasoning == 0 and answer.thinking == ""
    inside = text[text.index("[T]") + 3 : text.index("[/T]") + 4]
    assert told(answer).after == len(thinker.codec.encode(inside)) == asked[-1][1]


@settings(max_examples=60, deadline=None)
@given(words=st.integers(1, 12), limit=st.integers(0, 30), keep=st.integers(0, 8), budget=st.integers(0, 30))
def test_room_for_the_answer_is_kept_and_nothing_is_exceeded(words: int, limit: int, keep: int, budget: int) -> None:
    import asyncio

    engine = ScriptedEngine(Reply("yes it is so", thinking="hm " * words), tranche=4)
    account = Account("t", Budget(output=budget))
    try:
        answer = asyncio.run(engine.generate(call(Log(keep=keep), account=account, max_tokens=limit)))
    except BudgetExceeded:
        assert budget == 0
        return
    most = min(limit, budget)
    assert account.settled.output == answer.spend.output <= most and not account.held
    closing = 1  # "\n</think>" and the blank line after it is a word of white space
    if keep and most >= 1 + closing + 1 + keep and words + 4 > most:
        assert answer.thinking and len(answer.text.split()) >= min(4, keep)
    receipt = told(answer)
    assert receipt.after == answer.spend.reasoning


async def test_no_room_for_the_tag_is_said(thinker: Any) -> None:
    engine = ScriptedEngine(Reply("yes", thinking="hm " * 9))
    log = Log(opening="<a b>", closing="one two three four", keep=1)
    answer = await engine.generate(call(log, max_tokens=3, prefix="<a b>"))
    assert "no room to close thinking" in told(answer).reason and answer.finish == "length"


async def test_a_fork_counts_on_from_its_parent(thinker: Any) -> None:
    branch = await thinker.open(call(Say(TEXT), Log(), max_tokens=200))
    for _ in range(20):
        await branch.step()
    twin = branch.fork()
    answers = []
    for one in (branch, twin):
        while await one.step() is not None:
            pass
        answers.append(await one.finish_up())
    assert told(answers[0]).after == told(answers[1]).after == answers[0].spend.reasoning
    assert told(answers[0]).detail == told(answers[1]).detail


async def test_a_forced_end_of_thinking_is_seen_and_the_end_of_text_taken_back(thinker: Any) -> None:
    class End(Log):
        def think(self, branch: Branch, token: int) -> Verdict:
            super().think(branch, token)
            if self.ending(branch):
                return self.close(branch, "it gave up", "Final: ")
            return CONTINUE

    answer = await thinker.generate(call(Say("<think>no idea"), End(), max_tokens=60))
    assert answer.thinking.strip() == "no idea" and answer.text == "Final: "
    assert told(answer).fired and "it gave up" in told(answer).reason


def test_bad_boundaries_are_refused() -> None:
    for bad in ("(", "", "x*"):
        with pytest.raises(InvalidInput, match="boundary"):
            step_pattern(bad)


async def test_room_is_the_least_of_all_limits() -> None:
    engine = ScriptedEngine("a b c d e f g h", tranche=2)
    branch = await engine.open(call(account=Account("t", Budget(output=6)), max_tokens=20))
    await branch.step()
    assert room(branch) == 5
    assert room(await engine.open(call(max_tokens=3))) == 3
    assert room(await engine.open(call())) == float("inf")
