"""Trees of candidates: logits against each path alone, and everything that can happen on the way down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_chat import make_folder

from thrifty import Account, Budget, BudgetExceeded, Call, InvalidInput, Sampling, Unsupported
from thrifty.call import ROOT, Branch, Draft, Tree, Verified, verify
from thrifty.engines.local.engine import LocalEngine
from thrifty.engines.local.verify import DEPTH
from thrifty.engines.scripted import Reply, ScriptedEngine
from thrifty.policy import (
    CONTINUE,
    AttentionPolicy,
    CachePolicy,
    DecodePolicy,
    Feed,
    Force,
    LayerView,
    Probe,
    Stop,
    Verdict,
)


def ask(text: str = "tell me", *policies: Any, budget: Budget | None = None, **sampling: Any) -> Call:
    sampling.setdefault("max_tokens", 24)
    account = Account("t", budget or Budget())
    return Call(({"role": "user", "content": text},), account, sampling=Sampling(**sampling), policies=policies)


def greedy(tree: Tree) -> Any:
    """Chooses what the model alone would."""

    def choose(node: int, logits: torch.Tensor) -> tuple[int, int | None]:
        token = int(logits.argmax())
        return token, next((i for i in tree.children(node) if tree.tokens[i] == token), None)

    return choose


def guess(tokens: Sequence[int], decoys: Sequence[int] = (7, 99, 200)) -> Tree:
    """A tree with these tokens as one path, and beside each of them a few others."""
    nodes: list[tuple[int, int]] = []
    at = ROOT
    for token in tokens:
        nodes += [(decoy, at) for decoy in decoys if decoy != token]
        nodes.append((token, at))
        at = len(nodes) - 1
    return Tree(tuple(t for t, _ in nodes), tuple(p for _, p in nodes))


async def write(branch: Any, tokens: Sequence[int], width: int = 4) -> None:
    """Writes a branch to its end in trees that hold what it will write, if that is `tokens`."""
    while branch.finish is None:
        tree = guess(tokens[len(branch.tokens) : len(branch.tokens) + width])
        await (await verify(branch, tree)).accept(greedy(tree))


@pytest.fixture(scope="module")
def wide_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Runner and tokenizer in float64, and the same weights in transformers."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from thrifty.engines.local.load import load

    folder: Path = make_folder(tmp_path_factory.mktemp("wide") / "model", seed=3)
    stock = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    return load(folder, torch.float64, "cpu"), AutoTokenizer.from_pretrained(folder), stock


def alone(stock: Any, past: Sequence[int], path: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = stock(torch.tensor([[*past, *path]]), use_cache=False).logits[0, -1]
    return found


def path_to(tree: Tree, node: int) -> list[int]:
    path: list[int] = []
    while node != ROOT:
        path.insert(0, tree.tokens[node])
        node = tree.parents[node]
    return path


# -- logits --------------------------------------------------------------------------------------------------------

trees = st.lists(st.tuples(st.integers(6, 260), st.integers(0, 10**6)), max_size=9).map(
    lambda nodes: Tree(tuple(t for t, _ in nodes), tuple(p % (i + 1) - 1 for i, (_, p) in enumerate(nodes)))
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees, more=trees, steps=st.sampled_from([0, 1, 3]), long=st.sampled_from([1, 14, 20]))
def test_logits_are_those_of_each_path_alone(
    wide_parts: tuple[Any, Any, Any], tree: Tree, more: Tree, steps: int, long: int
) -> None:
    """Also of nodes that were added later, after forced text, and over a past of several segments."""
    runner, tokenizer, stock = wide_parts

    async def run() -> None:
        engine = LocalEngine(runner, tokenizer, "wide")
        branch = await engine.open(ask("something " * long, max_tokens=None))
        await engine.advance([branch], steps)
        past = [*engine.prompter(branch.call).tokens, *branch.tokens]
        verified = await verify(branch, tree)
        n = len(tree.tokens)
        whole = (n + 1) * [ROOT] and [p if p != ROOT else n - 1 for p in more.parents]
        whole = [p + (n if old != ROOT else 0) for p, old in zip(whole, more.parents, strict=True)]
        await verified.grow(more.tokens, whole)
        assert verified.tree.tokens == tree.tokens + more.tokens
        for node in (ROOT, *range(len(verified.tree.tokens))):
            expected = alone(stock, past, path_to(verified.tree, node))
            assert torch.allclose(verified.logits(node), expected, rtol=0, atol=1e-9)
        leaf = max(range(ROOT, len(verified.tree.tokens)), key=lambda i: len(path_to(verified.tree, i)))
        wanted = path_to(verified.tree, leaf)
        down = [leaf]
        while down[0] != ROOT and verified.tree.parents[down[0]] != ROOT:
            down.insert(0, verified.tree.parents[down[0]])
        left = [i for i in down if i != ROOT]
        await verified.accept(lambda node, logits: (verified.tree.tokens[left[0]], left.pop(0)) if left else (9, None))
        assert list(branch.tokens[steps:]) == [*wanted, 9]
        again = await verify(branch, Tree())  # the adopted cache is the one that this past has
        assert torch.allclose(again.logits(ROOT), alone(stock, [*past, *wanted], [9]), rtol=0, atol=1e-9)
        again.close()
        branch.close()
        await engine.aclose()

    asyncio.run(run())


async def test_a_tree_grows_level_by_level_and_reads_each_node_once(tiny_engine: LocalEngine) -> None:
    branch = await tiny_engine.open(ask())
    await branch.step()
    before = branch.work
    verified = await verify(branch, Tree((10, 11), (ROOT, ROOT)))
    await verified.grow([12, 13], [0, 0])
    await verified.grow([14], [2])
    once = branch.work.kv_reads - before.kv_reads
    held = len(tiny_engine.prompter(branch.call).tokens)
    # two rows of the pending token and a node; two rows of a node each; one row of one
    entries = 2 * (held + 1 + held + 2) + 2 * (held + 3) + (held + 4)
    assert once == entries * tiny_engine.runner.layers
    assert branch.work.target_passes == before.target_passes + 3
    verified.close()
    branch.close()


# -- the walk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["short", "long " * 40])
@pytest.mark.parametrize("width", [1, 3, 10])
async def test_accepted_paths_are_what_the_model_alone_writes(tiny_engine: LocalEngine, text: str, width: int) -> None:
    """Over more than a block of tokens, so that tails are sealed between trees."""
    most = 150 if width == 10 else 40
    call = ask(text, max_tokens=most)
    plain = await tiny_engine.generate(call)
    branch = await tiny_engine.open(call)
    await write(branch, plain.tokens, width)
    answer = await branch.finish_up()
    assert (answer.tokens, answer.text, answer.finish) == (plain.tokens, plain.text, plain.finish)
    assert answer.spend == plain.spend
    assert answer.work.target_passes <= -(-most // (width + 1)) + 1 < plain.work.target_passes
    assert not call.account.held and not call.account.overdraft


class Once(DecodePolicy):
    """Gives `verdict` after the nth token, once, and forbids the letters of a range."""

    method = "once"

    def __init__(self, n: int, verdict: Any = CONTINUE, banned: tuple[int, int] = (0, 0)) -> None:
        self.n, self.verdict, self.banned = n, verdict, banned

    def logits(self, branch: Branch, logits: Any) -> Any:
        logits[self.banned[0] : self.banned[1]] = -torch.inf
        logits[(7 * len(branch.tokens)) % 300] += 5  # what is likely depends on the place
        return logits

    def after(self, branch: Branch, token: int) -> Verdict:
        if len(branch.tokens) == self.n:
            self.n = -1
            return self.verdict
        return CONTINUE


def mixture() -> torch.Tensor:
    weights = torch.zeros(320)
    weights[[70, 80]] = 0.5
    return weights


VERDICTS = {
    "nothing": CONTINUE,
    "stop": Stop("enough"),
    "force": Force(" and more"),
    "long force": Force(" and more" * 15),
    "feed": Feed(mixture()),
    "probe": Probe("so", 4, lambda said: Force(f"[{len(said)}]")),
    "probe that does nothing": Probe("so", 4, lambda said: CONTINUE),
}


@pytest.mark.parametrize("verdict", VERDICTS.values(), ids=VERDICTS)
@pytest.mark.parametrize("n", [1, 3, 5])
async def test_policies_count_token_by_token(tiny_engine: LocalEngine, verdict: Any, n: int) -> None:
    call = ask("words", Once(n, verdict, (70, 90)), max_tokens=170 if n == 3 else 20)
    plain = await tiny_engine.generate(call)
    branch = await tiny_engine.open(call)
    await write(branch, plain.tokens)
    answer = await branch.finish_up()
    assert (answer.tokens, answer.text, answer.finish) == (plain.tokens, plain.text, plain.finish)
    assert [(r.method, r.spend) for r in answer.receipts] == [(r.method, r.spend) for r in plain.receipts]
    assert answer.spend == plain.spend


@pytest.mark.parametrize(
    "sampling",
    [{"max_tokens": 1}, {"max_tokens": 2}, {"max_tokens": 7}, {"stop": "last"}, {"logprobs": True}],
    ids=str,
)
async def test_limits_and_stops_end_a_path(tiny_engine: LocalEngine, sampling: dict[str, Any]) -> None:
    free = await tiny_engine.generate(ask("where"))
    if "stop" in sampling:
        sampling = {"stop": (free.text[4:6],)}
    plain = await tiny_engine.generate(ask("where", **sampling))
    branch = await tiny_engine.open(ask("where", **sampling))
    await write(branch, free.tokens, 6)
    answer = await branch.finish_up()
    assert (answer.text, answer.finish, answer.tokens) == (plain.text, plain.finish, plain.tokens)
    assert answer.spend == plain.spend
    if sampling.get("logprobs"):
        assert answer.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


async def test_an_end_token_on_the_path_ends_the_answer_and_a_draft_goes_on(tiny_engine: LocalEngine) -> None:
    class End(DecodePolicy):
        def logits(self, branch: Branch, logits: Any) -> Any:
            if len(branch.tokens) == 3:
                logits[0] = 1e4
            return logits

    for call in (ask("x", End()), replace(ask("x", End()), draft=Draft(), prefix="12")):
        plain = await tiny_engine.generate(call)
        branch = await tiny_engine.open(call)
        await write(branch, plain.tokens, 6)
        answer = await branch.finish_up()
        assert (answer.tokens, answer.finish, answer.parsed) == (plain.tokens, plain.finish, plain.parsed)


async def test_other_branches_step_meanwhile(tiny_engine: LocalEngine) -> None:
    calls = [ask(text, max_tokens=40) for text in ("one", "two", "three")]
    plain = [await tiny_engine.generate(call) for call in calls]
    branch = await tiny_engine.open(calls[0])
    others = asyncio.gather(*(tiny_engine.generate(call) for call in calls[1:]))
    await write(branch, plain[0].tokens)
    assert [a.tokens for a in await others] == [a.tokens for a in plain[1:]]
    assert (await branch.finish_up()).tokens == plain[0].tokens


async def test_a_tree_that_is_closed_leaves_the_branch_as_it_was(tiny_engine: LocalEngine) -> None:
    call = ask("as it was", temperature=1.0, seed=4)
    plain = await tiny_engine.generate(call)
    branch = await tiny_engine.open(call)
    for n in (0, 1, 2):
        await tiny_engine.advance([branch], n)
        verified = await verify(branch, Tree((50, 60, 70), (ROOT, 0, ROOT)))
        twin = branch.fork()
        verified.close()
        verified.close()
        for one in (twin, branch.fork()):
            await tiny_engine.advance([one], 1000)
            assert (await one.finish_up()).tokens == plain.tokens
    await tiny_engine.advance([branch], 1000)
    assert (await branch.finish_up()).tokens == plain.tokens


async def test_a_fork_made_while_a_tree_is_open_verifies_its_own(tiny_engine: LocalEngine) -> None:
    call = ask("two ways", max_tokens=20)
    plain = await tiny_engine.generate(call)
    branch = await tiny_engine.open(call)
    await branch.step()
    tree = guess(plain.tokens[1:5])
    verified = await verify(branch, tree)
    twin = branch.fork()
    assert await verified.accept(greedy(tree)) == 5
    for one in (twin, branch):
        await write(one, plain.tokens)
        assert (await one.finish_up()).tokens == plain.tokens


# -- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 23])
async def test_no_token_is_taken_that_the_budget_does_not_hold(tiny_engine: LocalEngine, n: int) -> None:
    free = await tiny_engine.generate(ask())
    call = ask(budget=Budget(output=n), max_tokens=None)
    branch = await tiny_engine.open(call)
    await write(branch, free.tokens, 6)
    answer = await branch.finish_up()
    assert answer.finish == "budget" and answer.tokens == free.tokens[:n]
    assert call.account.settled.output == n and not call.account.held and not call.account.overdraft


async def test_an_output_budget_of_nothing_refuses_the_branch(tiny_engine: LocalEngine) -> None:
    with pytest.raises(BudgetExceeded):
        await tiny_engine.open(ask(budget=Budget(output=0)))


@pytest.mark.parametrize("resource", ["kv_reads", "target_passes"])
async def test_work_is_held_before_a_tree_is_read(tiny_engine: LocalEngine, resource: str) -> None:
    """With the limit of the plain answer a tree may be refused; plain steps go on then, and nothing is overdrawn."""
    plain = await tiny_engine.generate(ask())
    limit = getattr(plain.work, resource)
    for room in (0, 1, 50, 40_000):
        call = ask(budget=Budget(**{resource: limit + room}))
        branch = await tiny_engine.open(call)
        refused = 0
        await branch.step()  # costs no pass: the prompt's has given its logits
        while branch.finish is None:
            tree = guess(plain.tokens[len(branch.tokens) : len(branch.tokens) + 3])
            try:
                verified = await verify(branch, tree)
            except BudgetExceeded as refusal:
                refused += 1
                assert refusal.resource == resource
                await branch.step()
            else:
                await verified.accept(greedy(tree))
        answer = await branch.finish_up()
        assert answer.tokens == plain.tokens[: len(answer.tokens or ())]
        assert getattr(call.account.work, resource) == getattr(answer.work, resource) <= limit + room
        assert not call.account.overdraft and not call.account.held
        # a tree that is closed unaccepted has cost one pass more than plain steps: that much must be free beforehand
        assert bool(refused) == (room < {"kv_reads": 40_000, "target_passes": 1}[resource])


async def test_memory_is_claimed_before_the_forks_are_made(tiny_engine: LocalEngine) -> None:
    plain = await tiny_engine.generate(ask())
    one = plain.work.kv_bytes_peak
    call = ask(budget=Budget(kv_bytes_peak=3 * one))
    branch = await tiny_engine.open(call)
    with pytest.raises(BudgetExceeded, match="kv_bytes_peak"):
        await verify(branch, guess(plain.tokens[:4]))
    tree = Tree(plain.tokens[:4], (ROOT, 0, 1, 2))
    verified = await verify(branch, tree)
    assert await verified.accept(greedy(tree)) == 5
    await tiny_engine.advance([branch], 1000)
    answer = await branch.finish_up()
    assert answer.tokens == plain.tokens and one < answer.work.kv_bytes_peak <= 3 * one


# -- refusals and interruption -------------------------------------------------------------------------------------


class Window(CachePolicy):
    when = "online"

    def pattern(self, view: LayerView) -> Any:
        return torch.arange(view.keys.shape[2])


class After(CachePolicy):
    """Half of the prompt's entries stay."""

    method = "after"

    def scores(self, view: LayerView) -> Any:
        return view.keys.norm(dim=-1)

    def counts(self, total: int, layers: int, stats: Any) -> Any:
        return [n // 2 + layer for layer, n in enumerate(stats["lengths"])]


class Skip(AttentionPolicy):
    method = "skip"


class Look(DecodePolicy):
    needs = frozenset({"hidden"})


@pytest.mark.parametrize("policy", [Window(), Skip(), Look()])
async def test_policies_that_must_see_every_step_are_refused(tiny_engine: LocalEngine, policy: Any) -> None:
    branch = await tiny_engine.open(ask("x", policy))
    with pytest.raises(Unsupported, match=f"{policy.method or type(policy).__name__} must see every decode step"):
        await verify(branch, Tree((9,), (ROOT,)))
    assert await branch.step() is not None
    branch.close()


async def test_a_prompt_that_was_evicted_is_shared_as_it_is(tiny_engine: LocalEngine) -> None:
    call = ask("keep half of this, " * 6, After(), max_tokens=60)
    plain = await tiny_engine.generate(call)
    branch = await tiny_engine.open(call)
    await write(branch, plain.tokens)
    assert (await branch.finish_up()).tokens == plain.tokens


async def test_what_cannot_be_verified_is_refused_and_says_why(tiny_engine: LocalEngine) -> None:
    branch = await tiny_engine.open(ask(max_tokens=8))
    chain = Tree(tuple([9] * (DEPTH + 1)), tuple(range(-1, DEPTH)))
    with pytest.raises(InvalidInput, match=f"a path of {DEPTH + 1} candidate tokens: {DEPTH} at most"):
        await verify(branch, chain)
    with pytest.raises(InvalidInput, match="outside|vocabulary"):
        await verify(branch, Tree((100_000,), (ROOT,)))
    for tokens, parents in (((1, 2), (ROOT,)), ((1,), (0,)), ((1, 2), (ROOT, -2))):
        with pytest.raises(InvalidInput, match="a tree|of a tree"):
            Tree(tokens, parents)
    verified = await verify(branch, Tree((9,), (ROOT,)))
    for attempt in (branch.step, lambda: branch.append("x"), lambda: verify(branch, Tree())):
        with pytest.raises(InvalidInput, match="a tree of candidates after this branch is open"):
            await attempt()
    with pytest.raises(InvalidInput, match="node 4 of the tree was not read"):
        verified.logits(4)
    with pytest.raises(InvalidInput, match="token 8 is not node 0"):
        await verified.accept(lambda node, logits: (8, 0))
    branch.close()
    with pytest.raises(InvalidInput, match="accepted or closed before"):
        await verified.accept(lambda node, logits: (8, None))
    with pytest.raises(InvalidInput, match="closed branch"):
        await verify(branch, Tree())
    ended = await tiny_engine.open(ask(max_tokens=1))
    await ended.step()
    with pytest.raises(InvalidInput, match="has ended \\(length\\)"):
        await verify(ended, Tree())
    ended.close()


async def test_an_engine_without_trees_says_so() -> None:
    engine = ScriptedEngine(lambda call, draw: Reply("hi"))
    branch = await engine.open(ask())
    with pytest.raises(Unsupported, match="scripted:.* verifies no trees: the local engine does"):
        await verify(branch, Tree())
    branch.close()


async def test_the_end_of_the_context_is_the_end_of_a_path(tiny_engine: LocalEngine) -> None:
    most = tiny_engine.runner.max_positions
    call = ask("w" * (most - 20), max_tokens=None)
    plain = await tiny_engine.generate(call)
    branch = await tiny_engine.open(call)
    while branch.finish is None:
        room = branch.room
        at = len(branch.tokens)
        tree = guess(plain.tokens[at : at + max(0, min(4, room))])
        if room >= 0:
            await (await verify(branch, tree)).accept(greedy(tree))
        else:
            await branch.step()
    answer = await branch.finish_up()
    assert (answer.tokens, answer.finish) == (plain.tokens, plain.finish) == (plain.tokens, "length")
    branch = await tiny_engine.open(call)
    with pytest.raises(InvalidInput, match="positions are needed"):
        await verify(branch, Tree(tuple([9] * 32), tuple(range(-1, 31))))
    branch.close()


@pytest.mark.parametrize("wait", [0, 0.001, 0.004])
async def test_cancelling_settles_what_was_taken_and_frees_the_rest(tiny_engine: LocalEngine, wait: float) -> None:
    call = ask("cancel", max_tokens=200)
    plain = await tiny_engine.generate(call)
    base = call.account.settled.output
    branch = await tiny_engine.open(call)

    async def run() -> None:
        try:
            await write(branch, plain.tokens)
        finally:
            branch.close()

    task = asyncio.ensure_future(run())
    await asyncio.sleep(wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.account.settled.output == base + len(branch.tokens) and not call.account.held
    assert tuple(branch.tokens) == plain.tokens[: len(branch.tokens)]


async def test_a_tree_that_was_being_read_when_its_task_was_cancelled_is_forgotten(tiny_engine: LocalEngine) -> None:
    call = ask("again", max_tokens=12)
    plain = await tiny_engine.generate(call)
    branch = await tiny_engine.open(call)
    task: asyncio.Future[Verified] = asyncio.ensure_future(verify(branch, guess(plain.tokens[:5])))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)
    await write(branch, plain.tokens)
    assert (await branch.finish_up()).tokens == plain.tokens
