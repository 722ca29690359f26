"""The local engine against transformers' own generate, and every contract of an Engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import make_folder

from thrifty import Account, Budget, BudgetExceeded, Call, Draft, EngineError, InvalidInput, Sampling, Unsupported
from thrifty.call import Delta
from thrifty.engine import Engine
from thrifty.engines.local.engine import LocalEmbedder, LocalEngine
from thrifty.engines.local.sampling import Sampler, draw, entropy, logprobs
from thrifty.ledger.entry import Labels
from thrifty.policy import VisionPolicy
from thrifty.spend import Spend


def ask(text: str = "tell me", budget: Budget | None = None, **sampling: Any) -> Call:
    sampling.setdefault("max_tokens", 24)
    return Call(({"role": "user", "content": text},), Account("t", budget or Budget()), sampling=Sampling(**sampling))


def greedy(stock: Any, ids: list[int], n: int) -> list[int]:
    """transformers' own greedy continuation, end token included."""
    given = torch.tensor([ids])
    out = stock.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=0
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("text", ["x", "tell me about the rain", "word " * 60])
async def test_greedy_text_is_that_of_transformers(tiny_engine: LocalEngine, stock: Any, text: str) -> None:
    call = ask(text)
    answer = await tiny_engine.generate(call)
    prompt = tiny_engine.prompter(call).tokens
    expected = greedy(stock, prompt, 24)
    assert list(answer.tokens or ()) == expected
    assert answer.text == tiny_engine.codec.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.spend == Spend(input=len(prompt), output=len(expected), calls=1)
    assert answer.spend.input == tiny_engine.count(call)
    assert call.account.held == {} and call.account.settled == answer.spend


async def test_the_prompt_is_the_template_with_context_tools_and_prefix(tiny_engine: LocalEngine) -> None:
    call = replace(ask("where is it?"), context=("A.", "B."), prefix="It is", tools=({"x": 1},))
    prompt = tiny_engine.codec.tokenizer.decode(tiny_engine.prompter(call).tokens)
    assert prompt == "<|user|>A.\n\nB.\n\nwhere is it?<|end|><|tools|>1<|assistant|>It is"


async def test_a_prefix_is_input_and_not_repeated(tiny_engine: LocalEngine, stock: Any) -> None:
    call = replace(ask("where?"), prefix="It is")
    answer = await tiny_engine.generate(call)
    assert list(answer.tokens or ()) == greedy(stock, tiny_engine.prompter(call).tokens, 24)


async def test_a_draft_is_cut_and_its_prefix_forced_as_output(tiny_engine: LocalEngine, stock: Any) -> None:
    call = replace(ask("where?", max_tokens=60), prefix="It is", draft=Draft(max_tokens=5))
    answer = await tiny_engine.generate(call)
    encode, prompt = tiny_engine.codec.encode, tiny_engine.prompter(call).tokens
    written = greedy(stock, prompt, 5)
    text = tiny_engine.codec.decode(written)
    forced = encode(("" if text.endswith("\n") else "\n") + "#### It is")
    rest = greedy(stock, prompt + written + forced, 60 - 5 - len(forced))
    assert list(answer.tokens or ()) == written + forced + rest
    assert answer.spend.output == len(written) + len(forced) + len(rest)
    assert answer.parsed is not None and answer.parsed.startswith("It is")


async def test_without_a_template_the_text_goes_on(tmp_path: Path) -> None:
    engine = LocalEngine.load(make_folder(tmp_path / "bare", template=None), dtype="float32")
    call = replace(ask("a b"), messages=({"role": "system", "content": "s"}, {"role": "user", "content": "a b"}))
    assert engine.codec.tokenizer.decode(engine.prompter(call).tokens).endswith("s\n\na b")
    with pytest.raises(Unsupported, match="no chat template"):
        await engine.generate(replace(call, tools=({"x": 1},)))
    await engine.aclose()


async def test_streams_are_whole_and_end_with_the_answer(tiny_engine: LocalEngine) -> None:
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    call = replace(ask("stream", max_tokens=40, logprobs=True), emit=emit)
    answer = await tiny_engine.generate(call)
    plain = await tiny_engine.generate(replace(call, emit=None))
    assert answer.text == plain.text == "".join(d.text for d in deltas)
    assert deltas[-1].answer is answer and deltas[-1].finish == "length"
    assert tuple(x for d in deltas for x in d.logprobs) == answer.logprobs == plain.logprobs
    assert len(deltas) > 10


async def test_a_slow_reader_holds_up_only_its_own_row(tiny_engine: LocalEngine) -> None:
    gate = asyncio.Event()
    seen: list[str] = []

    async def slow(delta: Delta) -> None:
        seen.append(delta.text)
        await gate.wait()

    held = asyncio.create_task(tiny_engine.generate(replace(ask("slow", max_tokens=60), emit=slow)))
    while not seen:
        await asyncio.sleep(0.001)
    for _ in range(3):  # others finish while it is stuck
        assert (await tiny_engine.generate(ask("fast", max_tokens=20))).finish in ("length", "stop")
    drawn = [len(t.branch.tokens) for t in tiny_engine.scheduler._turns]
    assert len(drawn) == 1 and drawn[0] <= 12
    gate.set()
    answer = await held
    assert "".join(seen) == answer.text and answer.spend.output == 60


async def test_stop_strings_end_it(tiny_engine: LocalEngine) -> None:
    whole = await tiny_engine.generate(ask("stop", max_tokens=40))
    stop = whole.text[7:10]
    cut = await tiny_engine.generate(ask("stop", max_tokens=40, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop" and cut.spend.output < 40


@pytest.mark.parametrize(
    ("budget", "fits"),
    [(Budget(output=0), 0), (Budget(output=1), 1), (Budget(tokens=10), 0), (Budget(output=7), 7), (Budget(calls=0), 0)],
)
async def test_budgets_cut_or_refuse(tiny_engine: LocalEngine, budget: Budget, fits: int) -> None:
    call = ask("a long enough question", budget)
    if not fits:
        with pytest.raises(BudgetExceeded):
            await tiny_engine.generate(call)
        assert call.account.settled == Spend()
    else:
        answer = await tiny_engine.generate(call)
        assert (answer.finish, answer.spend.output) == ("budget", fits)
        assert [(r.method, r.before, r.after) for r in answer.receipts] == [("budget", 24, fits)]
    assert call.account.held == {} and call.account.overdraft == {}


@pytest.mark.parametrize("resource", ["target_passes", "kv_reads", "prefill", "kv_bytes_peak"])
async def test_work_is_limited_too(tiny_engine: LocalEngine, resource: str) -> None:
    free = ask("a question of some length " * 8, max_tokens=80)
    whole = await tiny_engine.generate(free)
    used = getattr(whole.work, resource)
    assert used > 0
    same = replace(free, account=Account("t", Budget(**{resource: int(used) + 2000 * (resource == "kv_reads")})))
    assert (await tiny_engine.generate(same)).tokens == whole.tokens
    poor = replace(free, account=Account("t", Budget(**{resource: int(used * 0.97)})))
    if resource in ("prefill",):
        with pytest.raises(BudgetExceeded):
            await tiny_engine.generate(poor)
    else:
        answer = await tiny_engine.generate(poor)
        assert answer.finish == "budget"
        assert 0 < answer.spend.output < whole.spend.output
        assert getattr(answer.work, resource) <= used * 0.97
    assert poor.account.held == {} and poor.account.overdraft == {}


async def test_the_work_is_what_it_took(tiny_engine: LocalEngine) -> None:
    call = ask("count my work", max_tokens=10)
    answer = await tiny_engine.generate(call)
    n, out, layers = answer.spend.input, answer.spend.output, tiny_engine.runner.layers
    work = answer.work
    assert (work.prefill, work.target_passes) == (n, out)
    # token i of the prompt reads i entries; each output token but the last is read once
    reads = sum(range(1, n + 1)) + sum(n + i for i in range(1, out))
    assert work.kv_reads == layers * reads
    # a short prompt lives in one block of 128 entries: keys and values, 2 heads of 16 numbers of 4 bytes, 3 layers
    assert work.kv_bytes_peak == 128 * 2 * 2 * 16 * 4 * layers + 128 * 8
    assert work.engine_seconds > 0
    assert call.account.work.kv_bytes_peak == work.kv_bytes_peak


async def test_a_prompt_over_the_context_is_counted_so_that_a_plan_can_shorten_it(tiny_engine: LocalEngine) -> None:
    from thrifty import Plan

    passages = [f"passage {i} " + "w" * 90 for i in range(8)]
    pipeline = Plan.from_toml('name = "cut"\n[[methods]]\nuse = "truncation"\ntokens = 300\n').build(
        {"answer": tiny_engine}
    )
    answer = await pipeline.ask("where?", Account("t"), context=passages, sampling=Sampling(max_tokens=4))
    (own,) = answer.receipts
    assert own.fired and own.before is not None and own.before > 512 > answer.spend.input


async def test_bad_input_is_one_clear_line(tiny_engine: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"the prompt has 6\d\d tokens and model tiny reads 512"):
        await tiny_engine.generate(ask("x" * 600))
    with pytest.raises(InvalidInput, match="top_p"):
        await tiny_engine.generate(ask(top_p=1.5))
    with pytest.raises(Unsupported, match="sees no images"):
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        await tiny_engine.generate(replace(ask(), messages=({"role": "user", "content": [image]},)))
    with pytest.raises(Unsupported, match="sees no images"):
        await tiny_engine.generate(ask().with_policy(VisionPolicy()))
    with pytest.raises(InvalidInput, match="dtype 'fp8'"):
        LocalEngine.load(tmp_path, dtype="fp8")
    with pytest.raises(InvalidInput, match=r"no config\.json"):
        LocalEngine.load(tmp_path)
    with pytest.raises(Unsupported, match="no embeddings"):
        await tiny_engine.embed(["x"], Account("t"), Labels())


async def test_a_full_context_ends_with_length(tiny_engine: LocalEngine) -> None:
    answer = await tiny_engine.generate(ask("x" * 480, max_tokens=200))
    assert answer.finish == "length"
    assert answer.spend.tokens == 513  # the last token is drawn and needs no place of its own


async def test_a_template_that_refuses_is_the_callers_error(tiny_parts: Any) -> None:
    runner, tokenizer = tiny_parts
    engine = LocalEngine(runner, tokenizer, "tiny")
    before, tokenizer.chat_template = tokenizer.chat_template, "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(InvalidInput, match="roles must alternate"):
            await engine.generate(ask())
    finally:
        tokenizer.chat_template = before
        await engine.aclose()


async def test_a_thinking_template_splits_from_the_start(tiny_parts: Any) -> None:
    runner, tokenizer = tiny_parts
    before = tokenizer.chat_template
    tokenizer.chat_template = before + "<think>\n"
    engine = LocalEngine(runner, tokenizer, "tiny")
    try:
        answer = await engine.generate(ask())
        assert answer.text == "" and answer.thinking and answer.spend.reasoning == answer.spend.output
    finally:
        tokenizer.chat_template = before
        await engine.aclose()


async def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    engine = LocalEngine.load(make_folder(tmp_path / "sick"), dtype="float32")
    with torch.no_grad():
        engine.runner.model.lm_head.weight[9, 0] = float("nan")
    call = ask()
    with pytest.raises(EngineError, match="not finite") as caught:
        await engine.generate(call)
    assert caught.value.spend == call.account.settled and caught.value.spend.input > 0
    assert call.account.held == {}
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(ask())


def test_identity_says_what_changes_numbers(tiny_parts: Any) -> None:
    engine = LocalEngine(*tiny_parts, "tiny", max_batch=4)
    assert isinstance(engine, Engine)
    assert engine.identity()["dtype"] == "float32"
    assert engine.identity() != LocalEngine(*tiny_parts, "tiny", deterministic=True).identity()


# -- sampling: against the definition, counted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.9, "min_p": 0.05}, {"temperature": 0.5}],
)
def test_draws_follow_the_filtered_distribution(settings: dict[str, Any]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, float("-inf")])
    chosen = {"temperature": 1.0, **settings}
    p = (logits / chosen["temperature"]).softmax(0)
    p = torch.where(torch.arange(7) < chosen.get("top_k", 7), p, 0.0)  # they are sorted already
    p = p / p.sum()
    mass, kept = 0.0, []
    for x in p.tolist():
        kept.append(mass < chosen.get("top_p", 1.1))
        mass += x
    p = torch.where(torch.tensor(kept), p, 0.0)
    p = torch.where(p >= chosen.get("min_p", 0.0) * p.max(), p, 0.0)
    p = p / p.sum()
    sampler = Sampler(Sampling(**chosen), seed=3)
    order = torch.tensor([5, 0, 6, 2, 1, 4, 3])  # the code must sort by itself
    n = 6000
    counts = torch.zeros(7)
    for _ in range(n // 500):
        drawn = draw(logits[order].expand(500, -1), [sampler] * 500)
        counts += torch.bincount(order[torch.tensor(drawn)], minlength=7)
    assert (counts[p == 0] == 0).all()
    assert ((counts / n - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_rows_draw_for_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, generator=generator)
    settings = [Sampling(), Sampling(temperature=1.0, top_k=5), Sampling(temperature=2.0), Sampling(temperature=0.0)]
    together = draw(logits, [Sampler(s, 7) for s in settings])
    alone = [draw(logits[i : i + 1], [Sampler(s, 7)])[0] for i, s in enumerate(settings)]
    assert together == alone
    assert together[0] == int(logits[0].argmax()) and together[3] == int(logits[3].argmax())
    first = Sampler(settings[2], 7)
    first.uniform()
    twin, other = first.fork(), first.fork(seed=8)
    assert first.uniform() == twin.uniform() != other.uniform()


def test_logprobs_and_entropy_are_those_of_the_softmax() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    p = logits.double().softmax(-1)
    expected = [float(p[i, t].log()) for i, t in enumerate((2, 5, 7))]
    assert logprobs(logits, [2, 5, 7]) == pytest.approx(expected, abs=1e-6)
    assert entropy(logits[0]) == pytest.approx(float(-(p[0] * p[0].log()).sum()), abs=1e-9)
    assert entropy(torch.tensor([0.0, -torch.inf, 0.0])) == pytest.approx(0.693147, abs=1e-5)


async def test_the_embedder_makes_no_text() -> None:
    from thrifty.engines.local import embedded

    try:
        embedded.path("minilm")
    except Exception:
        pytest.skip("minilm is not here: thrifty models get minilm")
    engine = LocalEmbedder.load("minilm")
    account = Account("t")
    found = await engine.embed(["red apples", "crimson fruit", "a slow train"], account, Labels(role="embedder"))
    near = found.vectors @ found.vectors.T
    assert near[0, 1] > near[0, 2]
    assert account.settled == found.spend and found.spend.input > 6 and account.held == {}
    again = await engine.embed(["red apples"], account, Labels(role="embedder"))
    alone = await LocalEmbedder.load("minilm").embed(["red apples"], Account("u"), Labels(role="embedder"))
    assert again.spend == alone.spend and alone.spend.input == 4, "a bill does not depend on what ran before"
    assert account.work.target_passes == 1, "the second time nothing was computed"
    with pytest.raises(Unsupported, match="no text"):
        await engine.generate(ask())
    with pytest.raises(BudgetExceeded):
        await engine.embed(["something new"], Account("t", Budget(input=1)), Labels())
