"""Accounts against a model that keeps no sums: everything is counted anew from what is open and what was settled."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from thrifty.budget import RESOURCES, Account, Budget, Hold, tightest
from thrifty.errors import BudgetExceeded, InvalidInput, ThriftyError
from thrifty.ledger import MemoryLedger
from thrifty.spend import Spend, Work

USED = ("tokens", "input", "output", "calls", "usd", "prefill", "engine_seconds")
"""The resources that the machine plays with; the others follow the same code."""

Vector = dict[str, int]  # seconds in nanoseconds


def vector(spend: Spend, work: Work) -> Vector:
    found = {name: getattr(spend, name) for name in ("input", "output", "calls", "usd")}
    found |= {"tokens": spend.input + spend.output, "prefill": work.prefill}
    found["engine_seconds"] = round(work.engine_seconds * 1e9)
    return found


def in_units(shown: dict[str, float]) -> Vector:
    return {name: round(v * 1e9) if name == "engine_seconds" else int(v) for name, v in shown.items()}


@dataclass(eq=False)
class Node:
    """The model's account."""

    limits: Vector
    parent: Node | None
    reserves: bool
    closed: bool = False
    children: list[Node] = field(default_factory=list)
    holds: list[Vector] = field(default_factory=list)
    settled: list[Vector] = field(default_factory=list)
    overdraft: Vector = field(default_factory=dict)

    def line(self) -> list[Node]:
        return [self] if self.parent is None else [self, *self.parent.line()]

    def spent(self, name: str) -> int:
        return sum(v[name] for v in self.settled) + sum(c.spent(name) for c in self.children)

    def held(self, name: str) -> int:
        return sum(v[name] for v in self.holds) + sum(c.covered(name) for c in self.children)

    def covered(self, name: str) -> int:
        """What the account above holds for this one."""
        if self.reserves and name in self.limits and not self.closed:
            return max(self.limits[name] - self.spent(name), self.held(name))
        return self.held(name)

    def note(self) -> None:
        for node in self.line():
            for name, limit in node.limits.items():
                over = node.spent(name) + node.held(name) - limit
                if over > node.overdraft.get(name, 0):
                    node.overdraft[name] = over

    def refuses(self, ask: Vector, keep: int) -> bool:
        backed: set[str] = set()
        for node in self.line():
            for name, limit in node.limits.items():
                more = ask.get(name, 0) + (keep if name in ("tokens", "output") else 0)
                if name not in backed and more and node.spent(name) + node.held(name) + more > limit:
                    return True
            if node.reserves:
                backed |= set(node.limits)
        return False

    def is_closed(self) -> bool:
        return any(node.closed for node in self.line())

    def remaining(self) -> Vector:
        left: Vector = {}
        backed: set[str] = set()
        for node in self.line():
            for name, limit in node.limits.items():
                if name not in backed:
                    room = max(0, limit - node.spent(name) - node.held(name))
                    left[name] = min(room, left.get(name, room))
            if node.reserves:
                backed |= set(node.limits)
        return left


small = st.integers(0, 30)
spends = st.builds(Spend, input=small, output=small, calls=st.integers(0, 2), usd=small)
works = st.builds(Work, prefill=small, engine_seconds=st.integers(0, 30).map(lambda n: n / 7))
limits = st.dictionaries(st.sampled_from(USED), st.integers(0, 100), max_size=3)


def budget_of(limit: Vector) -> tuple[Budget, Vector]:
    """Seconds get a limit that no binary fraction gives exactly."""
    shown: dict[str, Any] = {n: v / 7 if n == "engine_seconds" else v for n, v in limit.items()}
    return Budget(**shown), {n: round(v / 7 * 1e9) if n == "engine_seconds" else v for n, v in limit.items()}


class Accounts(RuleBasedStateMachine):
    accounts: Bundle[tuple[Account, Node]] = Bundle("accounts")
    holds: Bundle[tuple[Hold, Node, Vector]] = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = MemoryLedger()
        self.pairs: list[tuple[Account, Node]] = []
        self.open: list[tuple[Hold, Node, Vector]] = []
        self.count = 0

    def add(self, account: Account, node: Node) -> tuple[Account, Node]:
        if node.parent is not None:
            node.parent.children.append(node)
        self.pairs.append((account, node))
        return account, node

    def name(self) -> str:
        self.count += 1
        return f"a{self.count}"

    @initialize(target=accounts, output=st.integers(20, 60))
    def reserve_in_a_root(self, output: int) -> tuple[Account, Node]:
        """Where an overdraft meets other open holds: too rare if left to chance."""
        parent = self.root({"output": output, "tokens": 100})
        return self.reserve(parent, {"output": output // 2})

    @rule(target=accounts, limit=limits)
    def root(self, limit: Vector) -> tuple[Account, Node]:
        budget, exact = budget_of(limit)
        return self.add(Account(self.name(), budget, ledger=self.ledger), Node(exact, None, False))

    @rule(target=accounts, pair=accounts, limit=limits)
    def child(self, pair: tuple[Account, Node], limit: Vector) -> tuple[Account, Node]:
        account, node = pair
        budget, exact = budget_of(limit)
        if node.is_closed():
            with pytest.raises(InvalidInput):
                account.child(self.name(), budget)
            return pair
        return self.add(account.child(self.name(), budget), Node(exact, node, False))

    @rule(target=accounts, pair=accounts, limit=limits)
    def reserve(self, pair: tuple[Account, Node], limit: Vector) -> tuple[Account, Node]:
        account, node = pair
        budget, exact = budget_of(limit)
        if node.is_closed() or node.refuses(exact, 0):
            with pytest.raises((InvalidInput, BudgetExceeded)):
                account.reserve(self.name(), budget)
            return pair
        return self.add(account.reserve(self.name(), budget), Node(exact, node, True))

    @rule(target=accounts, pair=accounts, weights=st.lists(st.integers(0, 5), min_size=1, max_size=3))
    def split(self, pair: tuple[Account, Node], weights: list[int]) -> tuple[Account, Node]:
        account, node = pair
        if node.is_closed():
            with pytest.raises(InvalidInput):
                account.split(weights)
            return pair
        before = node.remaining()
        parts = account.split(weights, [self.name() for _ in weights])
        shares = [in_units(part.budget.limits()) for part in parts]
        for name, amount in before.items():
            assert sum(share[name] for share in shares) == amount
        for part, share in zip(parts, shares, strict=True):
            self.add(part, Node(share, node, True))
        return self.pairs[-1]

    @rule(target=holds, pair=accounts, spend=spends, work=works, keep=st.sampled_from([0, 0, 5]))
    def hold(self, pair: tuple[Account, Node], spend: Spend, work: Work, keep: int) -> Any:
        account, node = pair
        ask = vector(spend, work)
        if node.is_closed() or node.refuses(ask, keep):
            with pytest.raises((InvalidInput, BudgetExceeded)) as caught:
                account.hold(spend, work, keep=keep)
            if isinstance(caught.value, BudgetExceeded):
                e = caught.value
                assert e.settled + e.held + e.asked > e.limit
            return (None, node, {})
        node.holds.append(ask)
        opened = (account.hold(spend, work, keep=keep), node, ask)
        self.open.append(opened)
        return opened

    @rule(held=holds, spend=spends, work=works)
    def grow(self, held: tuple[Hold | None, Node, Vector], spend: Spend, work: Work) -> None:
        hold, node, ask = held
        if hold is None:
            return
        more = vector(spend, work)
        if hold.closed or node.is_closed() or node.refuses(more, hold.keep):
            with pytest.raises(ThriftyError):
                hold.grow(spend, work)
            return
        hold.grow(spend, work)
        for name, amount in more.items():
            ask[name] += amount

    @rule(held=holds, spend=spends, work=works, within=st.booleans(), estimated=st.booleans())
    def settle(self, held: Any, spend: Spend, work: Work, within: bool, estimated: bool) -> None:
        hold, node, ask = held
        if hold is None:
            return
        if hold.closed:
            with pytest.raises(ThriftyError, match="settled or released before"):
                hold.settle(spend, work)
            return
        if within:  # an engine that keeps to what it held
            spend = Spend(**{n: min(getattr(spend, n), ask[n]) for n in ("input", "output", "calls", "usd")})
            seconds = min(work.engine_seconds, ask["engine_seconds"] / 1e9)
            work = Work(prefill=min(work.prefill, ask["prefill"]), engine_seconds=seconds)
        over = [{n: limit.overdraft.get(n, 0) for n in USED} for limit in node.line()]
        entry = hold.settle(spend, work, estimated=estimated)
        self.drop(hold, node, ask)
        node.settled.append(vector(spend, work))
        node.note()
        new = {
            name: max(level.overdraft.get(name, 0) - old[name] for level, old in zip(node.line(), over, strict=True))
            for name in USED
        }
        assert in_units(dict(entry.overdraft)) == {name: amount for name, amount in new.items() if amount}
        if within:
            assert not entry.overdraft
        assert list(self.ledger.entries())[-1] is entry
        assert (entry.spend, entry.work, entry.status) == (spend, work, "estimated" if estimated else "settled")

    @rule(held=holds)
    def release(self, held: Any) -> None:
        hold, node, ask = held
        if hold is None:
            return
        if not hold.closed:
            self.drop(hold, node, ask)
        hold.release()

    @rule(pair=accounts)
    def close(self, pair: tuple[Account, Node]) -> None:
        account, node = pair
        account.close()
        node.closed = True

    def drop(self, hold: Hold, node: Node, ask: Vector) -> None:
        self.open = [o for o in self.open if o[0] is not hold]
        node.holds = [v for v in node.holds if v is not ask]

    @invariant()
    def every_sum_is_the_recount(self) -> None:
        for account, node in self.pairs:
            held, over = in_units(account.held), in_units(account.overdraft)
            totals = vector(account.settled, account.work)
            for name in USED:
                assert held.get(name, 0) == node.held(name), (account.path, name)
                assert over.get(name, 0) == node.overdraft.get(name, 0), (account.path, name)
                assert abs(totals[name] - node.spent(name)) <= (name == "engine_seconds") * len(self.ledger)
                if name in node.limits:
                    assert node.spent(name) + held.get(name, 0) <= node.limits[name] + over.get(name, 0)
            if not node.is_closed():
                assert in_units(account.remaining()) == node.remaining()

    def teardown(self) -> None:
        for hold, node, ask in list(self.open):
            hold.release()
            self.drop(hold, node, ask)
        for account, node in self.pairs:
            account.close()
            node.closed = True
        for account, _ in self.pairs:
            assert account.held == {}, f"{account.path} leaks"
        self.every_sum_is_the_recount()


Accounts.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAccounts = Accounts.TestCase


# -- at the same time --------------------------------------------------------------------------------------------


def test_threads_never_exceed_and_end_exact() -> None:
    root = Account("root", Budget(tokens=4_000, usd=3_000), ledger=MemoryLedger())
    reserve = root.reserve("reserve", Budget(tokens=1_000))
    places = [root, root.child("a", Budget(output=900)), root.child("b"), reserve, reserve.child("c")]
    settled: list[Spend] = []
    wrong: list[str] = []
    stop = threading.Event()

    def spend(seed: int) -> None:
        pick = random.Random(seed)
        for _ in range(300):
            ask = Spend(input=pick.randrange(5), output=pick.randrange(10), usd=pick.randrange(8))
            try:
                hold = pick.choice(places).hold(ask)
                if pick.random() < 0.3:
                    hold.grow(Spend(output=pick.randrange(5)))
            except BudgetExceeded:
                continue
            if pick.random() < 0.3:
                hold.release()
            else:
                actual = Spend(input=ask.input, output=pick.randrange(ask.output + 1), usd=ask.usd)
                settled.append(hold.settle(actual).spend)

    def watch() -> None:
        while not stop.is_set():
            left = root.remaining()
            spent, held = root.settled, root.held
            if left["tokens"] < 0 or spent.usd > 3_000 or spent.tokens > 4_000 or held.get("tokens", 0) > 4_000:
                wrong.append(f"{spent} {held}")

    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=spend, args=(seed,)) for seed in range(8)]
    for thread in (watcher, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    watcher.join()
    reserve.close()
    assert not wrong
    assert root.settled == sum(settled, Spend())
    assert root.overdraft == {}
    # A growth that is refused leaves its hold open: those are what is still held, and no more than was never closed.
    assert root.settled.tokens + root.held.get("tokens", 0) <= 4_000


async def test_coroutines_and_cancellation() -> None:
    ledger = MemoryLedger()
    root = Account("root", Budget(output=600, calls=10_000), ledger=ledger)
    pick = random.Random(3)
    refused = 0

    async def call(seed: int) -> None:
        nonlocal refused
        mine = random.Random(seed)
        try:
            hold = root.hold(Spend(output=mine.randrange(1, 10), calls=1))
        except BudgetExceeded:
            refused += 1
            return
        with hold:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await hold.settle_async(Spend(output=1, calls=1))

    for round_ in range(20):
        tasks = [asyncio.create_task(call(1000 * round_ + n)) for n in range(100)]
        await asyncio.sleep(0)
        assert root.settled.output + root.held.get("output", 0) <= 600
        for task in pick.sample(tasks, 50):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert root.held == {}
    assert refused > 0
    assert root.settled.output == len(ledger) <= 600
    assert root.settled.calls == len(ledger)


# -- the rest, case by case --------------------------------------------------------------------------------------


def test_the_error_says_where_and_how_much() -> None:
    root = Account("root", Budget(output=100))
    child = root.child("child", Budget(output=1000))
    root.hold(Spend(output=30)).settle(Spend(output=20))
    held = child.hold(Spend(output=50))
    with pytest.raises(BudgetExceeded) as caught:
        child.hold(Spend(output=31))
    e = caught.value
    assert (e.account, e.resource, e.limit, e.settled, e.held, e.asked) == ("root", "output", 100, 20, 50, 31)
    with pytest.raises(BudgetExceeded):
        child.hold(Spend(output=20), keep=11)
    child.hold(Spend(output=20), keep=10).release()
    with pytest.raises(BudgetExceeded):
        held.grow(Spend(output=31))
    held.grow(Spend(output=30))
    assert child.held == {"tokens": 80, "output": 80}


def test_what_is_kept_back_counts_inside_a_reserve_only() -> None:
    root = Account("root", Budget(output=100))
    reserve = root.reserve("reserve", Budget(output=100))
    assert root.room("output") == 0
    reserve.hold(Spend(output=50), keep=50).release()
    with pytest.raises(BudgetExceeded):
        reserve.hold(Spend(output=51), keep=50)
    with pytest.raises(BudgetExceeded):
        root.hold(Spend(output=1))


def test_an_account_below_a_closed_one_is_closed() -> None:
    root = Account("root", Budget(output=100))
    reserve = root.reserve("reserve", Budget(output=60))
    child = reserve.child("child")
    hold = child.hold(Spend(output=10))
    reserve.close()
    assert root.held == {"output": 10, "tokens": 10}
    for use in (lambda: child.hold(Spend(output=1)), lambda: hold.grow(Spend(output=1)), lambda: child.child("x")):
        with pytest.raises(InvalidInput, match="'root/reserve' is closed"):
            use()
    hold.settle(Spend(output=25))
    assert root.held == {}
    assert root.settled.output == 25


def test_an_overdraft_shows_at_every_level_it_passes() -> None:
    root = Account("root", Budget(output=100), ledger=MemoryLedger())
    reserve = root.reserve("reserve", Budget(output=10))
    root.hold(Spend(output=90))
    first, second = reserve.hold(Spend(output=6)), reserve.hold(Spend(output=4))
    entry = first.settle(Spend(output=8))
    assert entry.overdraft == {"output": 2}
    assert root.overdraft == reserve.overdraft == {"output": 2}
    assert root.held["output"] == 94, "the second hold is still covered in full"
    assert second.settle(Spend(output=5)).overdraft == {"output": 1}
    assert (root.settled.output, root.held["output"]) == (13, 90)
    assert root.overdraft == reserve.overdraft == {"output": 3}


def test_split_is_all_or_nothing_and_exact_in_seconds() -> None:
    root = Account("root", Budget(output=10, engine_seconds=1.0))
    parts = root.split([1, 1, 1])
    assert [p.budget.output for p in parts] == [4, 3, 3]
    assert sum(round((p.budget.engine_seconds or 0) * 1e9) for p in parts) == 10**9
    assert root.remaining() == {"output": 0, "engine_seconds": 0}
    with pytest.raises(InvalidInput, match="2 names for 1"):
        root.split([1], ["a", "b"])
    with pytest.raises(InvalidInput, match="without '/'"):
        Account("other", Budget(output=5)).split([1, 1], ["fine", "no/good"])


def test_seconds_leave_nothing_behind() -> None:
    root = Account("root", Budget(engine_seconds=0.3))
    holds = [root.hold(work=Work(engine_seconds=0.1)) for _ in range(3)]  # in floating point, 0.1 + 0.1 + 0.1 > 0.3
    for hold in holds:
        hold.release()
    assert root.held == {}


def test_memory_is_claimed_at_every_level() -> None:
    root = Account("root", Budget(kv_bytes_peak=100))
    first, second = root.child("first", Budget(kv_bytes_peak=80)), root.child("second")
    first.claim(70)
    with pytest.raises(BudgetExceeded) as caught:
        first.claim(11)
    assert caught.value.account == "root/first"
    with pytest.raises(BudgetExceeded):
        second.claim(31)
    second.claim(30)
    first.claim(-70)
    second.claim(-30)
    second.claim(100)
    assert (first.work.kv_bytes_peak, second.work.kv_bytes_peak, root.work.kv_bytes_peak) == (70, 100, 100)


def test_a_deadline_is_checked_at_every_hold_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Account("root", Budget(deadline=1000.0))
    child = root.child("child")
    hold = child.hold(Spend(output=1))
    later = time.monotonic() + 1001
    monkeypatch.setattr(time, "monotonic", lambda: later)
    for use in (lambda: child.hold(), lambda: hold.grow(Spend(output=1)), root.check_deadline, child.check_deadline):
        with pytest.raises(BudgetExceeded) as caught:
            use()
        assert (caught.value.account, caught.value.resource) == ("root", "seconds before the deadline")
    hold.settle(Spend(output=1))  # what was spent is settled all the same
    assert root.settled.output == 1


def test_leaving_a_with_block_releases_what_was_not_settled() -> None:
    root = Account("root", Budget(output=10))
    with pytest.raises(KeyError), root.hold(Spend(output=10)):
        raise KeyError
    with root.hold(Spend(output=10)) as hold:
        hold.settle(Spend(output=3))
    with pytest.raises(ThriftyError, match="settled or released before"):
        hold.settle(Spend(output=3))
    hold.release()
    assert (root.settled.output, root.held) == (3, {})


def test_settled_spend_and_work_are_what_was_settled() -> None:
    root = Account("root")
    spend = Spend(9, 4, 3, 7, 2, 1, 5, 11)
    work = Work(1, 2, 3, 4, 0.1234567891234)
    root.child("a").hold().settle(spend, work)
    assert (root.settled, root.work) == (spend, work)


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -0.5])
def test_impossible_seconds_are_refused(seconds: float) -> None:
    root = Account("root")
    with pytest.raises(InvalidInput, match="finite|at least 0"):
        root.hold(work=Work(engine_seconds=seconds))
    assert root.held == {}


@pytest.mark.parametrize("bad", [Spend(input=-1), Spend(usd=-5)])
def test_negative_amounts_are_refused(bad: Spend) -> None:
    root = Account("root", Budget(tokens=10))
    with pytest.raises(InvalidInput, match="at least 0"):
        root.hold(bad)
    hold = root.hold(Spend(input=3))
    with pytest.raises(InvalidInput, match="at least 0"):
        hold.settle(bad)
    assert root.held == {"tokens": 3, "input": 3}
    hold.release()


@pytest.mark.parametrize(
    "limits",
    [{"output": -1}, {"output": 1.5}, {"output": True}, {"tokens": 2**63}, {"deadline": float("nan")}, {"usd": 0.5}],
)
def test_absurd_budgets_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="is needed"):
        Budget(**limits)


def test_budgets_in_toml_are_in_dollars() -> None:
    budget = Budget.from_dict({"usd": 0.25, "output": 96, "deadline": 1.5})
    assert budget.usd == 250_000_000
    assert Budget.from_dict(budget.to_dict()) == budget
    with pytest.raises(InvalidInput, match="did you mean 'output'"):
        Budget.from_dict({"ouput": 3})
    for bad in ("much", None, True, float("inf"), float("nan")):
        with pytest.raises(InvalidInput, match="usd"):
            Budget.from_dict({"usd": bad})


@given(usd=st.integers(0, 10**15))
def test_dollars_round_trip(usd: int) -> None:
    assert Budget.from_dict(Budget(usd=usd).to_dict()).usd == usd


def test_tightest() -> None:
    assert tightest([]) == Budget()
    assert tightest([Budget(output=5, usd=9), Budget(output=7, calls=1)]) == Budget(output=5, usd=9, calls=1)


def test_room_and_names() -> None:
    root = Account("root", Budget(output=5))
    assert root.room("output") == 5
    assert root.room("input") is None
    with pytest.raises(InvalidInput, match="did you mean 'output'"):
        root.room("outputs")
    with pytest.raises(InvalidInput, match="without '/'"):
        root.child("a/b")
    assert len(RESOURCES) == len(set(RESOURCES))
