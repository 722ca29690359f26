"""Answers that are compared are those that a method parsed, they survive the results file, and never leave with it."""

from __future__ import annotations

from pathlib import Path

from thrifty import Account, Answer, Plan
from thrifty.bench.compact import compact
from thrifty.bench.store import Contents, Result, Store
from thrifty.bench.task import Task
from thrifty.call import Sampling
from thrifty.engines.scripted import ScriptedEngine
from thrifty.tune.paired import Part, answer_of
from thrifty.tune.shadow import comparable

TASK = Task(
    id="t0",
    messages=({"role": "user", "content": "How many?"},),
    prefix="The answer is",
    gold="7",
    scorer="numeric",
    max_tokens=60,
)


async def test_a_drafted_answer_is_compared_without_its_draft(tmp_path: Path) -> None:
    engine = {"answer": ScriptedEngine("3 + 4 is seven #### seven")}
    draft = Plan.from_toml('name="draft"\n[[methods]]\nuse="chain-of-draft"\ndraft_tokens=20\nshots=0')
    plans = [Plan("plain"), draft]
    with Store(tmp_path / "r.jsonl") as store:
        part = Part("calibration", [TASK], engine, store, Account("t"), Sampling(temperature=0.0))
        assert await part.run(plans) is None
        before = [part.results(plan)[0] for plan in plans]
    with Store(tmp_path / "r.jsonl") as store:
        part = Part("calibration", [TASK], engine, store, Account("t"), Sampling(temperature=0.0))
        again = [part.results(plan)[0] for plan in plans]
        assert [r.to_dict() for r in again] == [r.to_dict() for r in before]
        # What a guard in production would compare, from the answer itself.
        pipeline = draft.build(engine)
        answer = await pipeline.ask(
            TASK.messages, prefix=TASK.prefix, sampling=Sampling(temperature=0.0, max_tokens=60)
        )
        assert answer.parsed is not None and answer.parsed != answer.text
        assert answer_of(before[1]) == comparable(answer) and before[1].final == answer.parsed
        losses = part.losses("disagree", draft, Plan("plain"))
    assert losses.n == 1 and losses.values[0] == float(answer_of(before[0]) != answer_of(before[1]))


def test_no_text_is_no_answer_and_none_is_published() -> None:
    bare = {"key": "k", "suite": "s", "plan": "p", "plan_hash": "h", "methods": (), "engine": "e"}
    result = Result(**bare, task="t", task_hash="th", score=1.0, text="long #### 5", final="5")
    assert answer_of(result) == comparable(Answer("5")) == "5"
    assert answer_of(Result(**bare, task="t", task_hash="th", score=0.0)) is None
    (stripped,) = compact(Contents((result,), ()), "s", "e").results
    assert stripped.text is None and stripped.final is None
    assert Result.from_dict(result.to_dict()) == result
