"""Scores one answer of a task: finds its scorer, gives a judge its engine, and says what judging cost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from thrifty.bench import scorers
from thrifty.bench.task import Task
from thrifty.budget import Account
from thrifty.call import Answer, Call, Sampling
from thrifty.engine import Engine
from thrifty.errors import InvalidInput
from thrifty.ledger.entry import Labels

Score = Callable[[Task, Answer, Mapping[str, Engine], Account], Awaitable[float]]
"""What a run asks: task, answer, the engines by role, and the account that a judge settles on."""

JUDGE_TOKENS = 256


RUNS_CODE = ("code", "reasoning-gym")
"""Scorers that may run what a model wrote."""


async def score(
    task: Task, answer: Answer, engines: Mapping[str, Engine], account: Account, *, unsafe: bool = False
) -> float:
    """The score in [0, 1] of the final answer: what a method parsed, else the text. `unsafe` runs code that a model
    wrote also where this machine cannot isolate it.

    Raises InvalidInput for an unknown scorer or setting, or a gold that the scorer cannot read.
    """
    return await scorer_of(task, engines, account, unsafe)(answer.final, task.gold, task.to_dict())


def scorer_of(task: Task, engines: Mapping[str, Engine], account: Account, unsafe: bool = False) -> scorers.Scorer:
    """The task's scorer with its settings."""
    settings: dict[str, Any] = dict(task.scorer_settings)
    if unsafe and task.scorer in RUNS_CODE:
        settings["unsafe"] = True
    if task.scorer == "judge":
        settings["ask"] = _judge(engines, account, task)
    return scorers.get(task.scorer, **settings)


def _judge(engines: Mapping[str, Engine], account: Account, task: Task) -> Callable[[str], Awaitable[str]]:
    engine = engines.get("judge")
    if engine is None:
        raise InvalidInput(f"task {task.id!r} is scored by a judge: name an engine for the role 'judge'")

    async def ask(prompt: str) -> str:
        call = Call(
            messages=({"role": "user", "content": prompt},),
            account=account,
            sampling=Sampling(temperature=0.0, max_tokens=JUDGE_TOKENS),
            labels=Labels(role="judge", method="judge"),
            on_exceed="refuse",  # a verdict cut short would be a wrong score
        )
        return (await engine.generate(call)).text

    return ask
