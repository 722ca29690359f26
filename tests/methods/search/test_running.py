"""Fractured Sampling on a running trace: against an exhaustive replay of the same trace; what is paid; budgets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from thrifty import Account, Budget, BudgetExceeded, Call, Plan, Sampling
from thrifty.engines.scripted import ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.method import Policies
from thrifty.methods.search._running import RunningTrace
from thrifty.methods.search.fractured_sampling import FracturedSampling
from thrifty.policy import DecodePolicy, Policy

THINKING = "c7d7f9g7h7k7l7m9p7q7"
"""What the mind thinks: its answer at any moment is the last digit that it has come to."""
CLOSED = "</think>\n\n"


class Mind(DecodePolicy):
    """Decides the next character from the text alone, so that a fork thinks as its parent would. It thinks `THINKING`
    and closes; whenever its thinking is closed it answers with the last digit in it."""

    def __init__(self, thinking: str) -> None:
        self.thinking = thinking

    def logits(self, branch: Any, logits: Any) -> Any:
        thought, closed, said = branch.text.partition(CLOSED)
        if not closed:
            text = f"{self.thinking}{CLOSED}"[len(thought) :]
        else:
            digits = re.findall(r"\d", thought)
            text = f"#### {digits[-1] if digits else 'none'}"[len(said) :]
        token = branch.codec.encode(text)[0] if text else min(branch.codec.ends)
        logits.fill_(-50.0)
        logits[token] = 50.0
        return logits


@dataclass(frozen=True, kw_only=True)
class Minded(Policies):
    """Puts the mind below the search."""

    name = "minded"
    paper = "test"
    thinking: str = THINKING

    def policies(self, call: Call) -> tuple[Policy, ...]:
        return (Mind(self.thinking),)


WORDS = 282
"""Ids beyond have no word in the tiny model, and one logit: ties that greedy choices would be left to."""


class Worded(DecodePolicy):
    """Leaves the random model the ids that have a word."""

    def logits(self, branch: Any, logits: Any) -> Any:
        logits[WORDS:] = -1e4
        return logits


async def ask(
    engine: Any,
    thinking: str = THINKING,
    budget: Budget | None = None,
    on_exceed: str = "degrade",
    max_tokens: int = 200,
    **knobs: Any,
) -> tuple[Any, Account]:
    below = Minded(thinking=thinking)
    plan = Plan("run", (FracturedSampling(**knobs), below), budget or Budget(), on_exceed=on_exceed)  # type: ignore[arg-type]
    account = Account("t", ledger=MemoryLedger())
    pipeline = plan.build(engine)
    call = pipeline.call("hello", account, sampling=Sampling(seed=3, max_tokens=max_tokens, stop=("$",)))
    return await pipeline(replace(call, prefix="<think>\n")), account


def tokens(engine: Any, text: str) -> int:
    return len(engine.codec.encode(text))


def replay(
    engine: Any, depths: int, m: int, every: int, agree: int, traces: int
) -> tuple[list[list[tuple[int, str]]], int, bool]:
    """By brute force: the cells of each trace (depth, answer), the thinking of the last trace, and whether it was
    stopped there. Every token of the thinking is one character."""
    whole = len(THINKING) + tokens(engine, "</think>")

    def answer(prefix: str) -> str:
        digits = re.findall(r"\d", prefix)
        return digits[-1] if digits else "none"

    votes: dict[str, int] = {}
    grid: list[list[tuple[int, str]]] = []
    for _ in range(traces):
        cells: list[tuple[int, str]] = []
        grid.append(cells)
        for depth in range(1, depths):
            if depth * every >= whole:
                break
            said = answer(THINKING[: depth * every])
            cells += [(depth, said)] * m
            votes[said] = votes.get(said, 0) + m
            if agree and max(votes.values()) >= agree:
                return grid, depth * every, True
        said = answer(THINKING)
        cells += [(depths, said)] * m
        votes[said] = votes.get(said, 0) + m
        if agree and max(votes.values()) >= agree:
            break
    return grid, whole, False


@pytest.mark.parametrize("agree", [0, 1, 2, 4, 7, 50])
@pytest.mark.parametrize(("depths", "every", "m", "traces"), [(4, 4, 1, 1), (9, 3, 2, 2), (16, 1, 1, 2), (3, 90, 2, 2)])
async def test_it_stops_where_an_exhaustive_replay_does(
    searched: Any, agree: int, depths: int, every: int, m: int, traces: int
) -> None:
    answer, account = await ask(searched, depths=depths, every=every, solutions=m, traces=traces, agree=agree)
    grid, thought, stopped = replay(searched, depths, m, every, agree, traces)
    cells = [cell for trace in grid for cell in trace]
    receipt = answer.receipts[-1]
    tally: dict[str, int] = {}
    for _, said in cells:
        tally[said] = tally.get(said, 0) + 1
    best = max(tally.values())
    winner = next(said for _, said in cells if tally[said] == best)
    assert answer.text == f"#### {winner}"
    assert receipt.after == len(cells) and receipt.detail["traces"] == len(grid)
    assert receipt.detail["votes"] == sorted(tally.values(), reverse=True)
    assert ("was stopped at depth" in receipt.reason) == stopped
    if stopped:
        assert f"after {thought} thinking tokens" in receipt.reason
    # every trace is paid once, as far as it went, and every solution once; nothing is generated twice
    close, blank = tokens(searched, CLOSED), tokens(searched, "\n\n")
    expected = 0
    for number, trace in enumerate(grid):
        ran_out = not (stopped and number == len(grid) - 1)
        expected += len(THINKING) + close if ran_out else thought
        own = sum(depth == depths for depth, _ in trace)
        expected += max(0, own - 1) * blank  # a fork from the end of thinking writes its blank line itself
        expected += sum(tokens(searched, f"#### {said}") + 1 + (close if d < depths else 0) for d, said in trace)
    assert answer.spend.output == expected and answer.spend == account.settled and not account.held


async def test_forks_of_a_random_model_say_what_it_says_from_scratch(searched: Any, stock: Any) -> None:
    """The oracle is the stock model, greedily, from the prompt and the trace so far: each solution, and the trace."""
    sampling = Sampling(max_tokens=30)
    hello = ({"role": "user", "content": "hello"},)
    call = Call(hello, Account("t"), prefix="<think>\n", sampling=sampling, policies=(Worded(),))
    prompt, close = searched.prompter(call).tokens, searched.codec.encode(CLOSED)

    def greedy(tokens: list[int], n: int) -> list[int]:
        out: list[int] = []
        with torch.no_grad():
            for _ in range(n):
                out.append(int(stock(torch.tensor([prompt + tokens + out])).logits[0, -1, :WORDS].argmax()))
        return out

    begun = greedy([], 30)
    trace = RunningTrace(await searched.open(call), call.account, CLOSED, 6, seed=0)
    for depth in (5, 10, 13):
        assert await trace.to(depth)
        (found,) = await trace.read(1, 1)
        assert list(found.tokens or ()) == [*begun[:depth], *close, *greedy(begun[:depth] + close, 6)]
    (whole,) = await trace.end(1, 1)
    assert list(whole.tokens or ()) == begun
    trace.close()
    assert call.account.settled.output == 30 + 3 * (len(close) + 6)


async def test_a_trace_is_not_changed_by_being_read(searched: Any) -> None:
    """Token by token what it is without forks; the forks share the past, differ by their seeds, and are cut in time."""
    sampling = Sampling(seed=3, temperature=1.0, max_tokens=30)
    call = Call(({"role": "user", "content": "hello"},), Account("t"), prefix="<think>\n", sampling=sampling)
    alone = await searched.generate(call)
    row = await searched.open(call)
    trace, answers = RunningTrace(row, call.account, CLOSED, 5, seed=3), []
    close = tokens(searched, CLOSED)
    for depth in (4, 9, 20):
        assert await trace.to(depth) and trace.thought == depth and trace.thinks
        found = await trace.read(3, len(answers) + 1)
        assert [list(a.tokens or ())[:depth] for a in found] == [list(row.tokens)] * 3
        assert [len(a.tokens or ()) for a in found] == [depth + close + 5 if depth < 20 else 30] * 3
        assert [a.finish for a in found] == ["length"] * 3 and len({a.tokens for a in found}) > 1
        answers += found
    assert not await trace.to(99)
    whole, *others = await trace.end(3, 99)
    assert (whole.tokens, whole.thinking) == (alone.tokens, alone.thinking) and others == []
    trace.close()
    assert call.account.settled.output == alone.spend.output + 30 + 6 * (close + 5) + 3 * 10 and not call.account.held


async def test_where_nothing_can_be_followed_the_receipt_says_so(searched: Any) -> None:
    engine = ScriptedEngine("#### 4", capabilities={"text", "sampling", "continue"})
    plan = Plan("run", (FracturedSampling(every=4, depths=3, traces=1),))
    answer = await plan.build(engine).ask("hello")
    assert "no trace was read while it ran" in answer.receipts[-1].reason
    answer, _ = await ask(searched, "x", every=90, depths=3, traces=1)
    assert answer.receipts[-1].after == 1 and answer.text == "#### none"  # it thought less than one depth


@pytest.mark.parametrize("resource", ["tokens", "output", "input", "calls", "reasoning"])
async def test_no_budget_is_exceeded(searched: Any, resource: str) -> None:
    told = 0
    for limit in (0, 1, 2, 40, 160, 400):
        for on_exceed in ("degrade", "refuse"):
            limits = Budget(**{resource: limit})
            knobs: dict[str, Any] = {"depths": 3, "every": 5, "solutions": 2, "traces": 2, "agree": 7}
            try:
                answer, account = await ask(searched, budget=limits, on_exceed=on_exceed, **knobs)
            except BudgetExceeded as error:
                assert error.resource == resource
                continue
            assert answer.spend == account.settled and getattr(account.settled, resource) <= limit
            assert not account.held and not account.overdraft
            told += bool(answer.receipts[-1].reason)
    assert told
