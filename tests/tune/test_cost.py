"""Cost estimates: equal to what is then really spent where nothing is uncertain, never below it where they say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import tasks

from thrifty import Account, Call, InvalidInput, Labels, Plan, PlanError, Sampling, Spend, Unsupported
from thrifty.bench.run import run
from thrifty.bench.store import Store
from thrifty.bench.task import Task
from thrifty.engines.scripted import ScriptedEngine
from thrifty.meter.prices import PriceTable
from thrifty.tune.cost import estimate, scaled
from thrifty.tune.spacefile import load

RECIPES = Path(__file__).parents[2] / "recipes" / "spaces"


def plan(text: str, name: str = "p") -> Plan:
    return Plan.from_toml(f"name = '{name}'\n{text}")


def retrieval(n: int) -> list[Task]:
    return [
        Task(
            id=str(i),
            messages=({"role": "user", "content": "{context}\n\nWhich city is it?"},),
            context=tuple(f"passage {j} of {i}" + " word" * (20 + j) for j in range(8)),
            gold="x",
            max_tokens=12,
        )
        for i in range(n)
    ]


def rambling(prices: PriceTable | None = None) -> ScriptedEngine:
    """Never stops by itself, and never says the same twice."""
    return ScriptedEngine(lambda call, draw: f"{draw.random()} " + "w " * 600, prices=prices)


async def spent(plans: list[Plan], some: list[Task], engines: object, path: Path) -> dict[str, Spend]:
    with Store(path) as store:
        await run(plans, some, engines, store)  # type: ignore[arg-type]
        found: dict[str, Spend] = {}
        for r in store.done.values():
            found[r.plan] = found.get(r.plan, Spend()) + r.spend
    return found


async def test_what_never_stops_costs_exactly_the_upper_bound(tmp_path: Path) -> None:
    some, on = tasks(5), rambling(PriceTable.local())
    plans = [
        Plan("plain"),
        plan("[[methods]]\nuse='budget-prompt'\nwords=7", "asked"),
        plan("[[methods]]\nuse='self-consistency'\nsamples=3\nconfidence=1.0\nparse='text'", "votes"),
        plan("[[methods]]\nuse='chain-of-draft'", "draft"),
        plan("[budget]\noutput=50", "small"),
        plan("on_exceed='refuse'\n[budget]\ninput=2", "refused"),
    ]
    cost = await estimate(plans, some, on)
    assert not on.calls, "nothing is spent"
    real = await spent(plans[:3] + plans[4:], some, rambling(PriceTable.local()), tmp_path / "r.jsonl")
    upper = {p.plan.name: p.upper for p in cost.plans}
    for name in ("plain", "asked", "small", "refused"):
        assert upper[name] == real[name]
    # Samples on branches share a prefill: `cached` is told there, and not in the estimate.
    assert (upper["votes"].calls, upper["votes"].output) == (15, real["votes"].output)
    assert real["votes"].tokens <= upper["votes"].tokens and real["votes"].usd <= upper["votes"].usd
    assert upper["draft"].input > upper["plain"].input + 5 * 40, "the worked examples are counted"
    assert cost.bounded and "at most" in cost.line()
    assert cost.upper.tokens == sum(p.upper.tokens for p in cost.plans)


@pytest.mark.parametrize("name", ["retrieval", "prompts"])
async def test_no_recipe_ever_costs_more_than_its_bound(tmp_path: Path, name: str) -> None:
    some = retrieval(2)
    short = ScriptedEngine(lambda call, draw: "w " * draw.randrange(1, 40), prices=PriceTable.local())
    engines = {"answer": short, "embedder": ScriptedEngine("", model="vectors", prices=PriceTable.local())}
    plans = list(load(RECIPES / f"{name}.toml").expand(engines).plans)
    cost = await estimate(plans, some, engines)
    real = await spent(plans, some, engines, tmp_path / "r.jsonl")
    assert cost.bounded, cost.line()
    for row in cost.plans:
        for field in ("input", "output", "calls", "usd"):
            assert getattr(real[row.plan.name], field) <= getattr(row.upper, field), (row.plan.name, field)
    if name == "retrieval":
        kept = next(p for p in cost.plans if p.plan.name == "fixed-k(k=2)")
        plain = next(p for p in cost.plans if not p.plan.methods)
        # Words of the passages, and of the question that they are compared with.
        embedded = sum(len(text.split()) for task in some for text in (*task.context, "Which city is it?"))
        assert kept.upper.input == plain.upper.input + embedded, "all passages may stay, and embedding comes on top"


async def test_what_is_no_upper_bound_says_why() -> None:
    on = rambling()
    some = tasks(4)
    asks = plan("[[methods]]\nuse='plan-and-budget'")
    cost = await estimate([asks], some, on)
    assert not cost.bounded and "depends on the answers" in cost.line() and "about" in cost.line()
    free = [Task(id="1", messages=some[0].messages, gold="1", scorer="numeric")]
    cost = await estimate([Plan("plain")], free, on, assumed=77)
    assert not cost.bounded and cost.upper.output == 77 and "77 output tokens were assumed" in cost.line()
    cost = await estimate([Plan("plain")], free, on, sampling=Sampling(max_tokens=9))
    assert cost.bounded and cost.upper.output == 9


async def test_large_spaces_are_counted_on_some_examples_and_say_so() -> None:
    some = tasks(40)
    whole = await estimate([Plan("plain")], some, rambling())
    part = await estimate([Plan("plain")], some, rambling(), most_runs=10)
    assert not part.bounded and "10 of 40 examples were counted" in part.line()
    assert part.upper.output == whole.upper.output and part.upper.tokens == pytest.approx(whole.upper.tokens, rel=0.05)


async def test_rounds_groups_and_samples_are_counted() -> None:
    cost = await estimate([Plan("plain")], tasks(40, groups=20), rambling(), samples=3, first=5)
    assert (cost.examples, cost.groups, cost.first_groups) == (40, 20, 5)
    assert cost.upper.calls == 120 and cost.first_round.calls == 30


async def test_expected_comes_from_earlier_results_alone(tmp_path: Path) -> None:
    some = tasks(6)
    half = ScriptedEngine(("w " * 100).strip())
    plain, asked = Plan("plain"), plan("[[methods]]\nuse='budget-prompt'", "asked")
    assert (await estimate([plain, asked], some, half)).expected is None
    with Store(tmp_path / "r.jsonl") as store:
        await run([plain], some[:3], half, store)
        known = list(store.done.values())
    cost = await estimate([plain, asked], some, half, known=known)
    first, second = cost.plans
    assert first.expected is not None and (first.expected.output, first.expected.calls) == (600, 6)
    assert second.expected is not None and second.expected.output == 600, "half of what is allowed, as the reference"
    assert second.expected.input == second.upper.input > first.upper.input
    assert cost.expected is not None and "expected" in cost.line()


async def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInput, match="0 plans"):
        await estimate([], tasks(1), rambling())
    bare = ScriptedEngine("x", capabilities={"text"})
    with pytest.raises(PlanError, match="continue"):
        await estimate([plan("[[methods]]\nuse='no-thinking'")], tasks(1), bare)


async def test_an_embedder_that_cannot_count_is_bounded_by_bytes() -> None:
    class Silent(ScriptedEngine):
        def count(self, call: Call) -> int:
            raise Unsupported("it makes vectors and no text")

    some = retrieval(1)
    engines = {"answer": rambling(), "embedder": Silent("", model="vectors")}
    cost = await estimate([plan("[[methods]]\nuse='fixed-k'\nk=1")], some, engines)
    plain = await estimate([Plan("plain")], some, engines)
    embedded = cost.upper.input - plain.upper.input
    assert cost.bounded and embedded >= sum(len(t.encode()) for t in some[0].context)
    found = await engines["embedder"].embed(["a b c"], Account("x"), Labels())
    assert found.spend.input == 3


def test_parts_are_rounded_up() -> None:
    assert scaled(Spend(input=10, output=3), 0.5) == Spend(input=5, output=2)
