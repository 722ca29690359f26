"""Concurrency: many tasks, threads and loops at once, cancelled in the middle, settled once, nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from thrifty import Account, Budget, BudgetExceeded, Call, EngineError, Sampling
from thrifty.call import Delta
from thrifty.engines.local.engine import LocalEngine
from thrifty.ledger.entry import Entry
from thrifty.policy import DecodePolicy


class Book:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def append(self, entry: Entry, hold: str | None = None) -> Any:
        self.entries.append(entry)
        return self

    def wait(self) -> None: ...

    async def done(self) -> None: ...

    def open_hold(self, record: Any) -> str:
        raise AssertionError("local engines hold in memory")

    def drop_hold(self, hold: str) -> None: ...


def ask(text: str, account: Account | None = None, **sampling: Any) -> Call:
    sampling.setdefault("max_tokens", 30)
    return Call(({"role": "user", "content": text},), account or Account("t"), sampling=Sampling(**sampling))


async def test_twenty_tasks_at_once_say_what_each_says_alone(tiny_engine: LocalEngine) -> None:
    calls = [ask("w" * (7 * i + 1), temperature=1.0 if i % 2 else None, seed=i) for i in range(20)]
    alone = [(await tiny_engine.generate(c)).tokens for c in calls]
    steps, rows = tiny_engine.scheduler.steps, tiny_engine.scheduler.rows
    together = await asyncio.gather(*map(tiny_engine.generate, calls))
    assert [a.tokens for a in together] == alone
    steps, rows = tiny_engine.scheduler.steps - steps, tiny_engine.scheduler.rows - rows
    assert rows / steps > 2, "they ran in common batches"


async def test_the_same_seed_twice(tiny_engine: LocalEngine) -> None:
    first, again, other = [
        (await tiny_engine.generate(ask("seed", temperature=1.5, top_p=0.95, seed=s))).tokens for s in (4, 4, 5)
    ]
    assert first == again != other
    free = {(await tiny_engine.generate(ask("seed", temperature=1.5))).tokens for _ in range(4)}
    assert len(free) > 1, "without a seed, samples differ"


async def test_max_batch_bounds_a_step_and_all_get_their_turn(tiny_parts: Any) -> None:
    engine = LocalEngine(*tiny_parts, "tiny", max_batch=3)
    sizes: list[int] = []
    forward = engine.scheduler._forward
    engine.scheduler._forward = lambda rows, *more: (sizes.append(len(rows)), forward(rows, *more))[1]  # type: ignore[method-assign]
    answers = await asyncio.gather(*(engine.generate(ask("t" * i, max_tokens=12)) for i in range(1, 9)))
    assert max(sizes) == 3
    assert all(a.spend.output > 0 for a in answers)
    await engine.aclose()


async def test_deterministic_rows_run_alone(tiny_parts: Any) -> None:
    engine = LocalEngine(*tiny_parts, "tiny")
    sizes: list[list[bool]] = []
    forward = engine.scheduler._forward
    special = ask("alone", deterministic=True)
    branches: dict[int, bool] = {}

    def watched(rows: Any, between: Any = None) -> Any:
        if all(len(r.tokens) == 1 for r in rows):
            sizes.append([branches.get(id(r.store), False) for r in rows])
        return forward(rows, between)

    engine.scheduler._forward = watched  # type: ignore[method-assign]
    opened = [await engine.open(c) for c in (special, ask("b"), ask("c"))]
    branches.update({id(b.store): b is opened[0] for b in opened})
    await engine.advance(opened, 6)
    assert [True] in sizes and [False, False] in sizes
    assert not any(True in s and len(s) > 1 for s in sizes)
    for b in opened:
        b.close()
    await engine.aclose()


async def test_cancelling_in_mid_run_settles_once_and_leaves_nothing(tiny_engine: LocalEngine) -> None:
    book = Book()
    account = Account("t", Budget(output=100_000), ledger=book)
    tasks = [asyncio.create_task(tiny_engine.generate(ask("c" * i, account, max_tokens=400))) for i in range(1, 11)]
    while account.held.get("output", 0) < 10 * 64 or tiny_engine.scheduler.rows < 40:
        await asyncio.sleep(0.001)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    cancelled = [r for r in results if isinstance(r, asyncio.CancelledError)]
    assert len(cancelled) == 5
    assert len(book.entries) == 10
    assert account.held == {} and account._bytes == 0
    assert account.settled.output == sum(e.spend.output for e in book.entries)
    assert all(e.spend.output < 400 for e in book.entries if e.spend.output not in _outputs(results))


def _outputs(results: list[Any]) -> set[int]:
    return {r.spend.output for r in results if not isinstance(r, BaseException)}


async def test_a_call_cancelled_before_its_turn_costs_nothing(tiny_engine: LocalEngine) -> None:
    account = Account("t")
    blocker = asyncio.create_task(tiny_engine.generate(ask("b" * 300)))
    late = asyncio.create_task(tiny_engine.generate(ask("late", account)))
    await asyncio.sleep(0)
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    await blocker
    assert account.held == {} and account.settled.output == 0


async def test_others_go_on_while_a_long_prompt_is_read_and_its_cancelling_ends_the_reading(
    tiny_engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = tiny_engine.runner
    monkeypatch.setattr(runner, "max_chunk", 16)
    short, long = ask("short", max_tokens=200), ask("w" * 300, max_tokens=3)
    alone = [(await tiny_engine.generate(c)).tokens for c in (short, long)]
    short, long = ask("short", max_tokens=200), ask("w" * 300, max_tokens=3)
    branch, late = await tiny_engine.open(short), asyncio.create_task(tiny_engine.generate(long))
    drawn_before = 0
    while not late.done():
        await branch.step()
        drawn_before += 1
    assert drawn_before > 300 // 16, "a step for each chunk, and those of the answer"
    await tiny_engine.advance([branch], 200)
    assert ((await branch.finish_up()).tokens, (await late).tokens) == tuple(alone)

    passes, run = 0, runner._run

    def counted(pieces: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            loop.call_soon_threadsafe(doomed.cancel)
            gone.wait(10)
        run(pieces)

    loop, gone = asyncio.get_running_loop(), threading.Event()
    monkeypatch.setattr(runner, "_run", counted)
    account = Account("doomed")
    doomed = asyncio.create_task(tiny_engine.generate(ask("w" * 300, account)))
    with pytest.raises(asyncio.CancelledError):
        await doomed
    gone.set()
    again = await tiny_engine.generate(ask("x", max_tokens=1))
    assert again.finish == "length" and passes <= 6, "the rest of the prompt was not read"
    assert account.held == {} and account.settled.input > 300 and account.settled.output == 0


async def test_a_reader_who_goes_away_stops_its_row(tiny_engine: LocalEngine) -> None:
    account = Account("t")
    taken: list[Delta] = []

    async def emit(delta: Delta) -> None:
        taken.append(delta)
        if len(taken) == 3:
            raise ConnectionResetError("gone")

    call = ask("stream", account, max_tokens=300)
    from dataclasses import replace

    with pytest.raises(ConnectionResetError):
        await tiny_engine.generate(replace(call, emit=emit))
    assert account.held == {} and 3 <= account.settled.output < 30


async def test_several_threads_with_loops_of_their_own(tiny_engine: LocalEngine) -> None:
    expected = [(await tiny_engine.generate(ask(f"thread {i}"))).tokens for i in range(4)]
    found: dict[int, Any] = {}

    def run(i: int) -> None:
        async def main() -> None:
            answers = await asyncio.gather(*(tiny_engine.generate(ask(f"thread {i}")) for _ in range(3)))
            found[i] = {a.tokens for a in answers}

        asyncio.run(main())

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        await asyncio.sleep(0.01)
    assert found == {i: {expected[i]} for i in range(4)}


async def test_a_failing_batch_fails_only_the_row_at_fault(tiny_parts: Any) -> None:
    engine = LocalEngine(*tiny_parts, "tiny")
    forward = engine.scheduler._forward

    def flaky(rows: Any, between: Any = None) -> Any:
        if any(r.tokens is not None and len(r.tokens) == 1 and r.store is doomed.store for r in rows):
            raise RuntimeError("kernel says no")
        return forward(rows, between)

    doomed = await engine.open(ask("doomed"))
    good = [await engine.open(ask(t)) for t in ("a", "b")]
    await engine.advance([doomed, *good], 1)
    engine.scheduler._forward = flaky  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="RuntimeError: kernel says no"):
        await engine.advance([doomed, *good], 5)
    await engine.advance(good, 5)
    assert all(len(b.tokens) >= 6 for b in good)
    with pytest.raises(EngineError, match="kernel says no"):
        await doomed.step()
    for b in (doomed, *good):
        b.close()
    assert doomed.call.account.held == {}
    await engine.aclose()


async def test_one_account_shared_by_many_calls_is_never_overdrawn(tiny_engine: LocalEngine) -> None:
    account = Account("t", Budget(output=150))
    results = await asyncio.gather(
        *(tiny_engine.generate(ask("s" * i, account, max_tokens=60)) for i in range(1, 9)), return_exceptions=True
    )
    refused = [r for r in results if isinstance(r, BudgetExceeded)]
    answered = [r for r in results if not isinstance(r, BaseException)]
    assert len(refused) + len(answered) == 8 and answered
    assert account.settled.output == sum(a.spend.output for a in answered) <= 150
    assert account.held == {} and account.overdraft == {}


async def test_closing_the_engine_fails_what_runs_and_is_idempotent(tiny_parts: Any) -> None:
    engine = LocalEngine(*tiny_parts, "tiny")
    account = Account("t")
    task = asyncio.create_task(engine.generate(ask("going", account, max_tokens=450)))
    while engine.scheduler.rows < 3:
        await asyncio.sleep(0.001)
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        await task
    assert account.held == {} and account.settled.output > 0


async def test_a_policy_sees_its_row_in_the_order_of_its_tokens(tiny_engine: LocalEngine) -> None:
    class Watch(DecodePolicy):
        method = "watch"
        lengths: list[int] = []

        def after(self, branch: Any, token: int) -> Any:
            assert branch.tokens[-1] == token
            Watch.lengths.append(len(branch.tokens))
            return super().after(branch, token)

    from dataclasses import replace

    answer = await tiny_engine.generate(replace(ask("watch"), policies=(Watch(),)))
    assert Watch.lengths == list(range(1, answer.spend.output + 1))
