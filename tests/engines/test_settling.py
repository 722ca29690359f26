"""Tabs: what is held before it is drawn, never past a limit, settled once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Budget, BudgetExceeded, Labels
from thrifty.engines.settling import Tab
from thrifty.spend import Spend, Work


def opened(account: Account, prompt: int = 5, **fields: object) -> Tab:
    return Tab.open(account, Spend(input=prompt, calls=1), labels=Labels(), **fields)  # type: ignore[arg-type]


def test_the_prompt_and_one_tranche_are_held_and_grow() -> None:
    account = Account("t", Budget(output=1000))
    tab = opened(account)
    assert account.held == {"tokens": 69, "input": 5, "output": 64, "calls": 1}
    assert tab.cover(64) and account.held["output"] == 64
    assert tab.cover(65) and account.held["output"] == 128
    tab.settle(tab.spend(65), Work())
    assert account.settled == Spend(input=5, output=65, calls=1) and account.held == {}
    tab.settle(tab.spend(99), Work())
    assert account.settled.output == 65


def test_a_tranche_never_passes_max_tokens() -> None:
    account = Account("t", Budget(output=1000))
    tab = opened(account, limit=70)
    assert tab.cover(65, limit=70) and account.held["output"] == 70


@given(limit=st.integers(1, 300), tranche=st.integers(1, 100), prompt=st.integers(0, 50))
def test_every_token_of_a_limit_can_be_drawn_and_not_one_more(limit: int, tranche: int, prompt: int) -> None:
    account = Account("t", Budget(tokens=limit + prompt))
    tab = opened(account, prompt, tranche=tranche)
    drawn = 0
    while tab.cover(drawn + 1):
        drawn += 1
        assert account.held["tokens"] <= limit + prompt
        assert account.held["output"] >= drawn
    assert drawn == limit
    assert tab.refusal is not None and tab.refusal.resource == "tokens"


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 150))
def test_many_tabs_share_a_limit_exactly(wanted: list[int], limit: int) -> None:
    account = Account("t", Budget(output=limit))
    drawn = 0
    for want in wanted:
        try:
            tab = opened(account, tranche=7)
        except BudgetExceeded:
            assert account.room("output") == 0
            continue
        mine = 0
        while mine < want and tab.cover(mine + 1):
            mine += 1
        tab.settle(tab.spend(mine), Work())
        drawn += mine
    assert account.settled.output == drawn == min(limit, sum(wanted))
    assert account.held == {} and account.overdraft == {}


def test_work_is_held_by_its_bound() -> None:
    account = Account("t", Budget(target_passes=10, prefill=5))
    tab = opened(account, bound=lambda n: Work(prefill=5, target_passes=n), tranche=4)
    assert account.held["target_passes"] == 4 and account.held["prefill"] == 5
    drawn = 0
    while tab.cover(drawn + 1):
        drawn += 1
    assert drawn == 10
    with pytest.raises(BudgetExceeded):
        opened(Account("u", Budget(prefill=4)), bound=lambda n: Work(prefill=5))


def test_seconds_are_held_as_they_pass() -> None:
    account = Account("t", Budget(engine_seconds=1.0))
    tab = opened(account)
    assert tab.cover_work(Work(engine_seconds=0.5))
    assert account.held["engine_seconds"] >= 0.5
    assert not tab.cover_work(Work(engine_seconds=1.5))
    assert tab.refusal is not None and tab.refusal.resource == "engine_seconds"
    tab.settle(tab.spend(1), Work(engine_seconds=0.6))
    assert account.overdraft == {}


def test_a_deadline_ends_it() -> None:
    account = Account("t", Budget(deadline=0.0))
    account._opened += 3600  # not yet
    tab = opened(account)
    account._opened -= 7200  # long ago
    assert not tab.cover(1)
    assert tab.refusal is not None and "deadline" in tab.refusal.resource


class Dear:
    def with_price(self, spend: Spend, model: str, role: str) -> Spend:
        return replace(spend, usd=3 * spend.input + 7 * spend.output)


@given(st.integers(0, 500))
def test_money_is_never_overdrawn(usd: int) -> None:
    account = Account("t", Budget(usd=usd))
    try:
        tab = opened(account, prices=Dear(), tranche=16)
    except BudgetExceeded:
        assert usd < 3 * 5 + 7
        return
    drawn = 0
    while tab.cover(drawn + 1):
        drawn += 1
    tab.settle(tab.spend(drawn), Work())
    assert drawn == (usd - 15) // 7
    assert account.settled.usd == 15 + 7 * drawn and account.overdraft == {}


def test_release_gives_all_back() -> None:
    account = Account("t", Budget(output=10))
    tab = opened(account)
    tab.release()
    assert account.held == {} and account.settled == Spend()
