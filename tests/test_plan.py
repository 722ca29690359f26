"""Plan: TOML in and out, hashes, what is refused when a plan is made or built, and how a call walks through
it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import (
    Account,
    Answer,
    Budget,
    BudgetExceeded,
    Call,
    InvalidInput,
    Method,
    Next,
    Plan,
    PlanError,
    Rewrite,
    Search,
    Whole,
    registry,
)
from thrifty.engines.scripted import PROVIDES, ScriptedEngine
from thrifty.methods.context.adaptive_k import AdaptiveK
from thrifty.methods.context.truncation import Truncation
from thrifty.methods.prompt.budget_prompt import BudgetPrompt
from thrifty.methods.prompt.chain_of_draft import ChainOfDraft
from thrifty.methods.prompt.no_thinking import NoThinking
from thrifty.methods.search.first_finish_search import FirstFinishSearch
from thrifty.methods.search.self_consistency import SelfConsistency

# -- TOML and hashes -----------------------------------------------------------------------------------------


@st.composite
def method(draw: st.DrawFn) -> Method:
    """Any registered method with one knob anywhere in its range."""
    cls = registry.get(draw(st.sampled_from([n for n in registry.names() if n not in ("first-finish-search",)])))
    name, (default, allowed) = draw(st.sampled_from(list(cls.knobs().items())))
    if allowed.choices:
        value: Any = draw(st.sampled_from(allowed.choices))
    elif isinstance(default, bool):
        value = draw(st.booleans())
    elif isinstance(default, int):
        value = draw(st.integers(int(allowed.low or 0), int(allowed.high or 99)))
    elif isinstance(default, float):
        value = draw(st.floats(allowed.low, allowed.high))
    elif isinstance(default, str):
        value = draw(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=9))
    else:
        value = default
    try:
        return cls.from_settings({name: value})
    except InvalidInput:
        return cls()


budgets = st.builds(
    Budget,
    tokens=st.none() | st.integers(0, 2**40),
    calls=st.none() | st.integers(0, 9),
    usd=st.none() | st.integers(0, 10**12),
    engine_seconds=st.none() | st.floats(0, 1e6),
)
engines = st.dictionaries(st.sampled_from(["answer", "embedder", "judge"]), st.text("abc:/", max_size=8))
names = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=9).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(names, st.lists(method(), max_size=3), budgets, engines, st.sampled_from(["degrade", "refuse"]))
def test_a_plan_survives_toml(name: str, stack: list[Method], budget: Budget, roles: dict[str, str], then: Any) -> None:
    try:
        plan = Plan(name, tuple(stack), budget, roles, then)
    except PlanError:
        return
    again = Plan.from_toml(plan.to_toml())
    assert again == plan and again.hash == plan.hash


def base() -> dict[str, Any]:
    return {
        "methods": (Truncation(),),
        "budget": Budget(output=9),
        "engines": {"answer": "a:b"},
        "on_exceed": "degrade",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": (Truncation(tokens=7),)},
        {"methods": ()},
        {"methods": (Truncation(), Truncation())},
        {"budget": Budget(output=10)},
        {"budget": Budget(input=9)},
        {"engines": {"answer": "a:c"}},
        {"engines": {"embedder": "a:b"}},
        {"on_exceed": "refuse"},
    ],
)
def test_the_hash_tells_plans_apart(changes: dict[str, Any]) -> None:
    assert Plan("p", **{**base(), **changes}).hash != Plan("p", **base()).hash


def test_the_hash_does_not_know_the_name_and_knows_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Plan("p", **base()).hash
    assert Plan("q", **base()).hash == before and len(before) == 16
    monkeypatch.setattr(Truncation, "version", 2)
    assert Plan("p", **base()).hash != before


def test_the_hash_is_the_same_in_another_process() -> None:
    """Written down, it keys results for years: neither the process nor the order of keys may change it."""
    text = Plan("p", (AdaptiveK(), ChainOfDraft())[::-1], Budget(output=96), {"answer": "a", "judge": "b"}).to_toml()
    code = f"from thrifty import Plan; print(Plan.from_toml({text!r}).hash)"
    run = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": str(seed), "PATH": ""},
        ).stdout.strip()
        for seed in (1, 2)
    ]
    assert run[0] == run[1] == Plan.from_toml(text).hash


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('nam = "x"', "unknown plan key 'nam': did you mean 'name'?"),
        ("", "a plan needs a name"),
        ("name = 3", "plan name = 3: a str is needed"),
        ("name = ", "not TOML"),
        ('name = "x"\non_exceed = "ask"', "'degrade' or 'refuse' is needed"),
        ('name = "x"\n[budget]\noutputs = 3', "unknown budget resource 'outputs': did you mean 'output'?"),
        ('name = "x"\n[budget]\noutput = -3', "budget output = -3"),
        ('name = "x"\n[budget]\nusd = "much"', "an amount in dollars is needed"),
        ('name = "x"\n[engines]\nanswers = "local"', "unknown engine role 'answers': did you mean 'answer'?"),
        ('name = "x"\n[engines]\nanswer = 3', "text such as 'local:smollm2' is needed"),
        ('name = "x"\nmethods = 3', "plan methods = 3: a list is needed"),
        ('name = "x"\n[[methods]]\nk = 3', 'method 1 of the plan needs `use = "NAME"`'),
        (
            'name = "x"\n[[methods]]\nuse = "adaptve-k"',
            "unknown method 'adaptve-k': did you mean 'adaptive-k'?",
        ),
        (
            'name = "x"\n[[methods]]\nuse = "fixed-k"\nkk = 3',
            "unknown knob of 'fixed-k' 'kk': did you mean 'k'?",
        ),
        ('name = "x"\n[[methods]]\nuse = "fixed-k"\nk = 0', "fixed-k: knob k = 0 is not allowed"),
    ],
)
def test_what_a_file_gets_wrong_is_said_in_one_line(toml: str, said: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Plan.from_toml(toml, "my.toml")
    assert str(refused.value).startswith("my.toml: ") and said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_loading_files(tmp_path: Path) -> None:
    file = tmp_path / "short.toml"
    file.write_text("[budget]\noutput = 96\n")
    assert Plan.load(file) == Plan("short", budget=Budget(output=96))
    file.write_text('name = "mine"\n')
    assert Plan.load(file).name == "mine"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="cannot be read"):
        Plan.load(file)
    with pytest.raises(InvalidInput, match=r"missing\.toml: cannot be read"):
        Plan.load(tmp_path / "missing.toml")
    file.write_text("name = = 1")
    with pytest.raises(InvalidInput, match=r"short\.toml: not TOML"):
        Plan.load(file)


# -- checks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WholeOne(Whole):
    name = "whole-one"

    async def __call__(self, call: Call, next: Next) -> Answer:
        return await next(call)


def white_box(family: str, decides: str = "", joins: str = "", wants: str = "text") -> Method:
    """A method that says it lives in a family."""

    @dataclass(frozen=True, kw_only=True)
    class Made(Rewrite):
        name = f"made-{family}"
        parts = frozenset({decides} if decides else ())  # type: ignore[arg-type]
        combines = frozenset({joins} if joins else ())  # type: ignore[arg-type]
        needs = frozenset({"text", wants})

        async def rewrite(self, call: Call) -> Call:
            return call

    Made.__module__ = f"somewhere.{family}.made"
    return Made()


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        ((Truncation(), BudgetPrompt()), "'budget-prompt' (prompt) stands below 'truncation'"),
        ((white_box("cache"), white_box("vision")), "'made-vision' (vision) stands below 'made-cache'"),
        ((white_box("vision"), SelfConsistency()), "put it above every white-box method"),
        ((FirstFinishSearch(), WholeOne()), "'first-finish-search' opens branches, and 'whole-one' below it"),
        ((FirstFinishSearch(), SelfConsistency()), "'self-consistency' below it needs whole answers"),
        ((white_box("cache", "scores"), white_box("cache", "scores")), "both decide scores"),
        ((white_box("cache", "store"), white_box("cache", "store")), "both decide store"),
        ((white_box("route", "route"), white_box("route", "route")), "both decide route"),
    ],
)
def test_stacks_that_are_refused(stack: tuple[Method, ...], said: str) -> None:
    with pytest.raises(PlanError) as refused:
        Plan("p", stack)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "stack",
    [
        (BudgetPrompt(), Truncation(), white_box("vision"), white_box("cache"), white_box("decode")),
        (SelfConsistency(), BudgetPrompt()),
        (BudgetPrompt(), SelfConsistency(), Truncation()),
        (Truncation(), FirstFinishSearch()),
        (WholeOne(), FirstFinishSearch()),
        (white_box("cache", "scores"), white_box("cache", "scores", joins="scores")),
        (white_box("cache", "scores"), white_box("cache", "store"), white_box("cache", "counts")),
        (white_box("decode", "decode"), white_box("decode", "decode")),
    ],
)
def test_stacks_that_are_sound(stack: tuple[Method, ...]) -> None:
    assert Plan("p", stack).methods == stack


def test_needs_are_checked_when_a_plan_is_built() -> None:
    plain = ScriptedEngine("x", capabilities={"text"})
    with pytest.raises(PlanError, match="'adaptive-k' needs an engine for the role 'embedder' with embed"):
        Plan("p", (AdaptiveK(),)).build(plain)
    with pytest.raises(PlanError, match="'no-thinking' needs continue, which engine scripted:scripted lacks"):
        Plan("p", (NoThinking(),)).build(plain)
    with pytest.raises(PlanError, match="engines that have it: local"):
        Plan("p", (white_box("cache", wants="cache"),)).build(ScriptedEngine("x"))
    with pytest.raises(PlanError, match="no engine here has it"):
        Plan("p", (white_box("cache", wants="gradients"),)).build(ScriptedEngine("x"))
    with pytest.raises(PlanError, match="did you mean 'logits'"):
        Plan("p", (white_box("decode", wants="logit"),)).build(ScriptedEngine("x"))
    with pytest.raises(PlanError, match="role 'answer'"):
        Plan("p").build({"embedder": plain})


def test_an_embedder_that_does_not_embed_is_refused_and_one_that_does_is_offered() -> None:
    engines = {"answer": ScriptedEngine("x"), "embedder": ScriptedEngine("x", capabilities={"text"})}
    with pytest.raises(PlanError, match="lacks; engines that have it: scripted"):
        Plan("p", (AdaptiveK(),)).build(engines)


def test_needs_by_role() -> None:
    needs = Plan("p", (AdaptiveK(), FirstFinishSearch())).needs()
    assert needs == {"answer": frozenset({"text", "sampling"}), "embedder": frozenset({"embed"})}
    assert Plan("p").needs() == {"answer": frozenset({"text"})}


# -- the walk of a call --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tagging(Rewrite):
    name = "tagging"

    async def rewrite(self, call: Call) -> Call:
        said = str(call.messages[-1]["content"])
        return Call(
            **{
                **{f: getattr(call, f) for f in call.__slots__},
                "messages": ({"role": "user", "content": said + "+"},),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Doubling(Tagging):
    name = "doubling"

    async def rewrite(self, call: Call) -> Call:
        said = str(call.messages[-1]["content"])
        return Call(
            **{
                **{f: getattr(call, f) for f in call.__slots__},
                "messages": ({"role": "user", "content": said * 2},),
            }
        )


async def test_the_first_method_is_outermost() -> None:
    engine = ScriptedEngine("ok")
    await Plan("p", (Tagging(), Doubling())).build(engine).ask("a")
    await Plan("p", (Doubling(), Tagging())).build(engine).ask("a")
    assert [c.messages[0]["content"] for c in engine.calls] == ["a+a+", "aa+"]


async def test_the_plans_budget_is_a_limit_below_the_callers_account() -> None:
    account = Account("me", Budget(output=5))
    pipeline = Plan("p", budget=Budget(output=3)).build(ScriptedEngine("a b c d e f g"))
    assert (await pipeline.ask("q", account)).spend.output == 3
    assert (await pipeline.ask("q", account)).spend.output == 2  # a new call has a new plan budget, the account not
    with pytest.raises(BudgetExceeded):
        await pipeline.ask("q", account)
    assert account.settled.output == 5 and not account.held


async def test_labels_engines_and_the_way_to_degrade_are_the_plans() -> None:
    engine = ScriptedEngine("ok")
    plan = Plan("p", (Tagging(),), on_exceed="refuse")
    await plan.build(engine).ask("q")
    call = engine.calls[0]
    assert call.labels.plan == plan.hash and call.on_exceed == "refuse" and call.engines == {"answer": engine}


@pytest.mark.parametrize("prompt", ["", "  \n", ()])
async def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidInput, match="empty prompt"):
        await Plan("p").build(ScriptedEngine("x")).ask(prompt)


async def test_a_pipeline_closes_each_engine_once() -> None:
    class Closing(ScriptedEngine):
        closed = 0

        async def aclose(self) -> None:
            self.closed += 1

    both, other = Closing("x"), Closing("y")
    async with Plan("p").build({"answer": both, "judge": both, "draft": other}):
        pass
    assert (both.closed, other.closed) == (1, 1)


def test_a_search_that_opens_needs_no_branches_of_its_engine() -> None:
    bare = ScriptedEngine("x", capabilities=PROVIDES - {"branch"})
    assert Plan("p", (FirstFinishSearch(),)).build(bare).engine is bare
    assert issubclass(FirstFinishSearch, Search)


def test_to_dict_is_json() -> None:
    assert json.loads(json.dumps(Plan("p", **base()).to_dict()))["methods"][0]["use"] == "truncation"
