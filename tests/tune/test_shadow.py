"""The guard, end to end on scripted engines: silent while the plans agree, back to the reference when they do not."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thrifty import Account, Budget, BudgetExceeded, Call, EngineError, InvalidInput, Plan
from thrifty.call import Answer, Delta
from thrifty.engines.script import Draw
from thrifty.engines.scripted import ScriptedEngine
from thrifty.tune.calibration import Claim, Use
from thrifty.tune.certificate import Certificate, issue
from thrifty.tune.drift import EProcess
from thrifty.tune.losses import Losses, LossKind
from thrifty.tune.revocation import Revocation, revocation_of, revocation_path
from thrifty.tune.shadow import Guard, Sampler, comparable, disagreement

CHEAP, REFERENCE = Plan("cheap", budget=Budget(output=30)), Plan("reference")
KEY = b"a key of sixteen bytes, at least"


def certificate(path: Path, loss: LossKind = "disagree") -> Path:
    claim = Claim(loss, 0.1, 0.1, bound="betting")
    groups = tuple(f"g{i:03}" for i in range(100))
    low = -1.0 if loss == "drop" else 0.0
    made = issue(
        plan=CHEAP,
        reference=REFERENCE,
        search_hash="search",
        order=[CHEAP.hash],
        use=Use(1, "data", "search", claim, "refuse", 0.1, 0.1, "2026-11-25T00:00:00+00:00"),
        tested=[(CHEAP, Losses(loss, np.zeros(100), low, 1, groups))],
        engines={"answer": {"model": "m", "dtype": "text"}},
    )
    made.save(path)
    return path


def revoked(path: Path) -> Revocation | None:
    return revocation_of(path, Certificate.load(path).hash)


class World:
    """A cheap engine that answers wrongly as often as `wrong` says, and one that is always right."""

    def __init__(self, path: Path) -> None:
        self.wrong = 0.0
        self.path = certificate(path / "certificate.json")
        self.coin = random.Random(1)
        self.cheap = ScriptedEngine(self._cheap, model="m")
        self.dear = ScriptedEngine("The answer is #### 4", model="m")
        self.shadow = Account("shadow")

    def _cheap(self, call: Call, draw: Draw) -> str:
        return "#### 5" if self.coin.random() < self.wrong else "so it is #### 4."

    def guard(self, **settings: Any) -> Guard:
        known: dict[str, Any] = {"account": self.shadow, "rate": 0.5, "epsilon": 0.01, "key": KEY}
        return Guard(CHEAP.build(self.cheap), REFERENCE.build(self.dear), self.path, **{**known, **settings})


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    yield World(tmp_path)


async def served(guard: Guard, n: int) -> list[str]:
    """Texts of n requests, a few at a time."""
    texts: list[str] = []
    for start in range(0, n, 20):
        answers = await asyncio.gather(*(guard.ask(f"request {i}") for i in range(start, min(n, start + 20))))
        await guard.drain()
        texts += [answer.text for answer in answers]
    return texts


async def test_while_the_plans_agree_the_cheap_one_is_served(world: World) -> None:
    async with world.guard() as guard:
        user = Account("user")
        texts = [(await guard.ask(f"q{i}", user)).text for i in range(200)]
        await guard.drain()
        status = guard.status()
    assert set(texts) == {"so it is #### 4."}
    assert status.revoked is None and status.state.mean == 0 and status.fault is None
    assert status.counts["drawn"] == status.counts["compared"] == len(world.dear.calls)
    assert 60 < status.counts["drawn"] < 140
    assert len(world.cheap.calls) == 200 and status.counts["served"] == 200
    # who pays: the shadow's own account for the reference's runs, the user's for what was served, and no more
    assert user.settled.calls == 200 and world.shadow.settled.calls == len(world.dear.calls)


async def test_when_the_cheap_plan_starts_to_disagree(world: World) -> None:
    async with world.guard() as guard:
        await served(guard, 300)
        assert guard.revoked is None
        world.wrong = 0.6
        texts = await served(guard, 300)
        assert guard.revoked is not None
        after = [(await guard.ask("later")).text for _ in range(20)]
        runs = world.shadow.settled.calls
    # noticed, and not at the last moment; from then on the reference, and no shadow runs any more
    first = next(i for i, text in enumerate(texts) if text.startswith("The"))
    assert first < 120 and all(text.startswith("The") for text in [*texts[first:], *after])
    assert runs == guard.status().counts["drawn"]

    known = revoked(world.path)
    assert known == guard.revoked and known is not None
    assert known.certificate == Certificate.load(world.path).hash
    assert known.capital >= 100 and "drift" in known.reason and "at most 0.1 of them may" in known.reason
    body = json.loads(revocation_path(world.path).read_text())
    assert body["thrifty_revocation"] == 1 and body["samples"] == known.samples

    calls = len(world.cheap.calls)
    async with world.guard() as again:  # after a restart
        assert (await again.ask("q")).text.startswith("The") and len(world.cheap.calls) == calls


async def test_another_process_s_revocation_counts(world: World) -> None:
    async with world.guard() as first, world.guard() as second:
        world.wrong = 1.0
        await served(first, 60)
        assert first.revoked is not None
        assert (await second.ask("q")).text.startswith("The")


async def test_a_restart_in_the_middle_goes_on_where_it_was(world: World) -> None:
    world.wrong = 0.5
    losses = 0
    while revoked(world.path) is None:
        async with world.guard(rate=1.0) as guard:
            await guard.ask("q")  # one request a process
            await guard.drain()
            losses += 1
        assert losses < 100
    state = EProcess(0.1, 0.01)
    coin = random.Random(1)
    while not state.alarm:
        state = state.observe(float(coin.random() < 0.5))
    assert losses == state.samples


async def test_a_new_certificate_in_the_same_place_is_not_revoked(world: World) -> None:
    async with world.guard(rate=1.0) as guard:
        world.wrong = 1.0
        await served(guard, 40)
        assert guard.revoked is not None
    replace(Certificate.load(world.path), date="2026-12-01T00:00:00+00:00").save(world.path)  # tuned again
    world.wrong = 0.0
    async with world.guard(rate=1.0) as guard:
        assert guard.revoked is None and guard.status().state.samples == 0
        world.wrong = 1.0
        await served(guard, 40)
        assert guard.revoked is not None and revoked(world.path) == guard.revoked


async def test_a_crash_between_alarm_and_revocation(world: World) -> None:
    guard = world.guard()
    guard.monitor.observe(*[1.0] * 20)
    assert guard.revoked is None
    await guard.aclose()
    async with world.guard() as again:
        assert again.revoked is not None and revoked(world.path) is not None
        assert (await again.ask("q")).text.startswith("The")


# -- what must never reach the user --------------------------------------------------------------------------------


async def test_a_reference_that_fails(world: World) -> None:
    world.dear = ScriptedEngine("The answer is #### 4", model="m", fail_after=1)
    async with world.guard(rate=1.0) as guard:
        assert set(await served(guard, 40)) == {"so it is #### 4."}
        status = guard.status()
    assert status.counts["lost"] == 40 and "compared" not in status.counts
    assert (status.state.samples, status.state.mean) == (40, 0.0)


async def test_a_shadow_budget_that_runs_out(world: World) -> None:
    world.shadow = Account("shadow", Budget(calls=5))
    async with world.guard(rate=1.0) as guard:
        for i in range(12):
            await guard.ask(f"q{i}", Account("user", Budget(calls=1)))
            await guard.drain()
        counts = guard.status().counts
    assert counts == {"served": 12, "drawn": 12, "compared": 5, "left out": 7}
    assert world.shadow.settled.calls == 5 and not world.shadow.overdraft


async def test_what_one_shadow_run_may_spend_is_set_aside_first(world: World) -> None:
    world.shadow = Account("shadow", Budget(tokens=100))
    async with world.guard(rate=1.0, each=Budget(tokens=30)) as guard:
        for i in range(20):
            await guard.ask(f"q{i}")
            await guard.drain()
        counts = guard.status().counts
    # each run takes 6 tokens (1 in, 5 out): it begins while 30 are left
    assert counts["compared"] == (100 - 30) // 6 + 1 and counts["left out"] == 20 - counts["compared"]
    assert world.shadow.settled.tokens == 6 * counts["compared"] and not world.shadow.held


async def test_an_answer_cut_by_the_shadow_s_budget_is_no_disagreement(world: World) -> None:
    world.dear = ScriptedEngine("a long way to the answer, which is at last #### 4", model="m")
    async with world.guard(rate=1.0, each=Budget(output=5)) as guard:
        await served(guard, 40)
        status = guard.status()
    assert status.counts["lost"] == 40 and status.state.mean == 0 and status.revoked is None


async def test_a_reference_that_hangs(world: World) -> None:
    world.dear = ScriptedEngine("a b c d e f #### 4", model="m", delay=10)
    async with world.guard(rate=1.0, timeout=0.05) as guard:
        texts = await asyncio.wait_for(served(guard, 8), 5)
        assert set(texts) == {"so it is #### 4."} and guard.status().counts["lost"] == 8
    assert not world.shadow.held


async def test_the_monitor_s_file_fails(world: World) -> None:
    async with world.guard(rate=1.0) as guard:
        guard.monitor._database.execute("DROP TABLE drift")
        assert set(await served(guard, 5)) == {"so it is #### 4."}
        assert "could not be recorded" in (guard._fault or "")


async def test_a_revocation_that_cannot_be_written_still_falls_back_here(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    world.wrong = 1.0
    async with world.guard(rate=1.0) as guard:
        monkeypatch.setattr(os, "link", full)
        texts = await served(guard, 60)
        assert texts[-1].startswith("The") and "No space left" in (guard.status().fault or "")
    assert revoked(world.path) is None
    async with world.guard() as again:  # the alarm itself is durable
        assert (await again.ask("q")).text.startswith("The") and again.status().fault


async def test_a_request_that_fails_is_the_user_s_error_and_no_sample(world: World) -> None:
    async with world.guard(rate=1.0) as guard:
        with pytest.raises(BudgetExceeded):
            await guard.ask("q", Account("user", Budget(calls=0)))
        world.cheap.fail_after = 1
        with pytest.raises(EngineError):
            await guard.ask("q")
        world.cheap.fail_after = None
        await guard.ask("q")
        await guard.drain()
        status = guard.status()
    assert status.counts == {"served": 3, "drawn": 3, "void": 2, "compared": 1} and status.state.samples == 1
    assert not world.shadow.held


async def test_a_cancelled_request_leaves_nothing_behind(world: World) -> None:
    world.cheap.delay = 10
    async with world.guard(rate=1.0, each=Budget(tokens=100)) as guard:
        task = asyncio.create_task(guard.ask("q"))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        world.cheap.delay = 0
        await guard.ask("q")
        await guard.drain()
        assert guard.status().counts == {"served": 2, "drawn": 2, "void": 1, "compared": 1}
    assert not world.shadow.held


async def test_streams_come_from_what_is_served_only(world: World) -> None:
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    async with world.guard(rate=1.0) as guard:
        answer = await guard(replace(guard.call("q"), emit=emit))
        await guard.drain()
    assert "".join(d.text for d in deltas) == answer.text == "so it is #### 4."


async def test_the_user_does_not_wait_for_the_shadow(world: World) -> None:
    world.dear.delay = 0.2
    async with world.guard(rate=1.0) as guard:
        await asyncio.wait_for(guard.ask("q"), 0.15)
        assert "compared" not in guard.status().counts
    assert guard._counts["compared"] == 1  # waited for at the end


async def test_losses_are_bet_on_in_the_order_of_the_requests(world: World) -> None:
    """What differs takes longer here; fed as they finish, the agreeing ones would all come first."""
    seen: list[float] = []
    wrong = {"request 0", "request 3", "request 4"}

    async def slow(call: Call) -> Answer:
        await asyncio.sleep(0.05 if call.question() in wrong else 0)
        return await real(call)

    world.cheap = ScriptedEngine(lambda call, draw: "5" if call.question() in wrong else "4", model="m")
    async with world.guard(rate=1.0) as guard:
        real = guard.reference
        guard.reference = slow  # type: ignore[assignment]
        observe = guard.monitor.observe
        guard.monitor.observe = lambda *losses: seen.extend(losses) or observe(*losses)  # type: ignore[func-returns-value, method-assign, assignment]
        await asyncio.gather(*(guard.ask(f"request {i}") for i in range(8)))
        await guard.drain()
    assert seen == [1, 0, 0, 1, 1, 0, 0, 0]


async def test_a_burst_is_bounded(world: World) -> None:
    world.dear.delay = 0.003
    async with world.guard(rate=1.0, at_once=2, waiting=5) as guard:
        await asyncio.gather(*(guard.ask(f"q{i}") for i in range(50)))
        assert len(guard._tasks) <= 50
        for i in range(10):
            await guard.ask(f"later {i}")
        assert guard.status().counts["left out"] >= 10
        await guard.drain()
        counts = guard.status().counts
        assert counts["compared"] + counts["left out"] == counts["drawn"] == 60


async def test_what_samples_by_itself_is_left_out(world: World) -> None:
    async with world.guard(rate=1.0) as guard:
        await guard(guard.call("q").with_sampling(temperature=0.8))
        await guard(guard.call("q").with_sampling(temperature=0.0))
        await guard.drain()
        assert guard.status().counts == {"served": 2, "drawn": 2, "left out": 1, "compared": 1}


# -- drawing and comparing -----------------------------------------------------------------------------------------


def test_draws_have_the_rate_and_no_pattern() -> None:
    for rate in (0.01, 0.3, 1.0):
        n = 20_000
        drawn = [Sampler(rate, KEY).draws(str(i)) for i in range(n)]
        assert abs(sum(drawn) - n * rate) <= 4 * math.sqrt(n * rate * (1 - rate))
        both = sum(a and b for a, b in zip(drawn, drawn[1:], strict=False))
        assert abs(both - n * rate**2) <= 5 * math.sqrt(n * rate**2 + 1)
    other = [Sampler(0.3, b"another key of thirty-two bytes!").draws(str(i)) for i in range(1000)]
    assert other != [Sampler(0.3, KEY).draws(str(i)) for i in range(1000)]


async def test_a_request_is_drawn_by_its_name_never_by_its_content(world: World) -> None:
    sampler = Sampler(0.5, KEY)
    names = [f"trace-{i}" for i in range(40)]
    async with world.guard() as guard:
        for name in names:
            for content in ("short", "long " * 50, "shadow me"):
                before = guard.status().counts.get("drawn", 0)
                await guard(guard.call(content), request=name)
                assert (guard.status().counts.get("drawn", 0) > before) == sampler.draws(name)


def test_comparing_is_what_calibration_does() -> None:
    from thrifty.tune.losses import Scored, losses_of

    answers = [Answer("x #### 4"), Answer("<answer>4.</answer>"), Answer("5"), Answer(" "), Answer("t", parsed="4")]
    for a in answers:
        for b in answers:
            pair = [[Scored("e", "e", 0.0, comparable(answer))] for answer in (a, b)]
            assert disagreement(a, b) == losses_of("disagree", *pair).values[0]
    assert [disagreement(answers[0], b) for b in answers] == [0, 0, 1, 1, 0]


async def test_what_is_refused(world: World, tmp_path: Path) -> None:
    for settings, words in (
        ({"rate": 0}, "rate 0"),
        ({"rate": 1.5}, "rate 1.5"),
        ({"key": b"short"}, "5 bytes"),
        ({"epsilon": 0}, "epsilon"),
        ({"alpha": 1.0}, "alpha"),
    ):
        with pytest.raises(InvalidInput, match=words):
            world.guard(**settings)
    with pytest.raises(InvalidInput, match="the certified pipeline runs plan"):
        Guard(REFERENCE.build(world.dear), REFERENCE.build(world.dear), world.path, account=world.shadow)
    with pytest.raises(InvalidInput, match="about model 'm'"):
        other = ScriptedEngine("4", model="another")
        Guard(CHEAP.build(other), REFERENCE.build(other), world.path, account=world.shadow)
    drop = certificate(tmp_path / "drop.json", "drop")
    pipelines = CHEAP.build(world.cheap), REFERENCE.build(world.dear)
    with pytest.raises(InvalidInput, match="production cannot measure"):
        Guard(*pipelines, drop, account=world.shadow)
    async with Guard(*pipelines, drop, account=world.shadow, alpha=0.2) as guard:
        assert guard.status().state.alpha == 0.2
