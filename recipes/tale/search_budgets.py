"""Searches the token budget of every task of a file, and says which budget to state.

    python recipes/tale/search_budgets.py --tasks tasks.jsonl --engine openai:MODEL@URL --out found.jsonl

Each task is answered plainly; where its scorer gives at least `--right`, the budget is halved for as long as the answer
stays right and gets shorter (`--accept cheaper`, the paper's search), or for as long as it stays right (`correct`: the
token elasticity curve). `--output` limits the output tokens of the whole run.

It prints the budget that `--share` of the found ones are within. State it with `use = "tale"`, `estimator = "fixed"`,
`tokens = ...`, and check on other tasks what that saves and loses (`thrifty frontier`): these tasks have chosen it.
`--out` gets a line a task: question, budget, the short correct answer and every trial, which is also what TALE-PT
trains on."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, Sampling
from thrifty.bench.scoring import score
from thrifty.bench.task import Task, load
from thrifty.engine import Engine
from thrifty.engines.spec import resolve
from thrifty.methods.prompt.tale import Searched, asker, budget_within, search_budget


async def search(engine: Engine, task: Task, account: Account, accept: Any, right: float) -> Searched:
    """The budget of one task."""
    call = Call(
        task.messages,
        account,
        tools=task.tools,
        context=task.context or None,
        prefix=task.prefix,
        sampling=Sampling(temperature=0.0, max_tokens=task.max_tokens),
    )

    async def correct(answer: Answer) -> bool:
        return await score(task, answer, {"answer": engine}, account) >= right

    return await search_budget(asker(engine.generate, call), correct, accept=accept)


async def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--engine", default="smollm2")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", type=int, default=100_000, help="output tokens at most, all tasks together")
    parser.add_argument("--accept", choices=("cheaper", "correct"), default="cheaper")
    parser.add_argument("--right", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=0.9)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    tasks = load(chosen.tasks, limit=chosen.limit)
    engine, account = resolve(chosen.engine), Account("tale", Budget(output=chosen.output))
    found: list[Searched] = []
    lines: list[str] = []
    for task in tasks:
        try:
            one = await search(engine, task, account, chosen.accept, chosen.right)
        except BudgetExceeded as error:
            print(f"stopped before {task.id}: {error}")
            break
        if one.ended == "budget":
            print(f"stopped in {task.id}: its answer was cut short by the limit on output tokens")
            break
        found.append(one)
        print(f"{task.id}: {one.receipt().reason}, budget {one.budget}")
        row = {"id": task.id, "messages": [dict(m) for m in task.messages], "budget": one.budget}
        trials = [{"budget": t.budget, "output": t.output, "correct": t.correct} for t in one.trials]
        lines.append(json.dumps({**row, "answer": one.answer.text, "trials": trials}, ensure_ascii=False))
    await engine.aclose()
    if chosen.out is not None:
        chosen.out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    right = [s for s in found if s.trials[0].correct]
    better = [s for s in right if s.budget is not None]
    print(
        f"{len(found)} of {len(tasks)} tasks searched, {len(right)} answered right without a budget, {len(better)} of"
    )
    print(
        f"them with a budget in fewer tokens; {account.settled.calls} calls, {account.settled.output:,} output tokens"
    )
    if better:
        plain, short = sum(s.trials[0].output for s in better), sum(s.answer.spend.output for s in better)
        print(f"those {len(better)}: {plain:,} output tokens without a budget, {short:,} with their own")
        print(f"tokens = {budget_within(found, chosen.share)} covers {chosen.share:.0%} of the found budgets")


if __name__ == "__main__":
    asyncio.run(main())
