"""The openai engine against a real server: llama.cpp with SmolLM2-135M-Instruct, in a process of its own."""

from __future__ import annotations

import asyncio
import math

import aiohttp
import pytest

from thrifty.budget import Account, Budget
from thrifty.call import Call, Draft, Sampling
from thrifty.engines.openai import OpenAIEngine
from thrifty.errors import EngineError
from thrifty.ledger.entry import Labels

pytestmark = pytest.mark.real

SEA = {"role": "user", "content": "Tell me about the sea."}
CAPITAL = {"role": "user", "content": "What is the capital of France?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
async def llama(llama_server):
    made = []

    def make(**settings):
        made.append(OpenAIEngine(llama_server, "smollm2", **settings))
        return made[-1]

    yield make
    for one in made:
        await one.aclose()


async def tokens(server: str, text: str) -> list[int]:
    """The server's own tokenizer, as the oracle."""
    root = server.removesuffix("/v1")
    async with aiohttp.ClientSession() as session, session.post(f"{root}/tokenize", json={"content": text}) as reply:
        return (await reply.json())["tokens"]


async def rendered(server: str, messages: list[dict]) -> list[int]:
    """A prompt's tokens as the server's chat template makes them."""
    root = server.removesuffix("/v1")
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{root}/apply-template", json={"messages": messages}) as reply,
    ):
        prompt = (await reply.json())["prompt"]
    return await tokens(server, prompt)


def call(account: Account, *messages: dict, max_tokens: int = 12, **fields) -> Call:
    sampling = fields.pop("sampling", Sampling(temperature=0, max_tokens=max_tokens))
    return Call(messages or (SEA,), account, sampling=sampling, **fields)


async def test_streamed_and_whole_answers_are_the_same_and_usage_is_right(llama, llama_server, bank, ear):
    money = bank(output=200)
    answers = [
        await llama().generate(call(money.account, emit=ear)),
        await llama().generate(call(money.account)),
        await llama(stream=False).generate(call(money.account)),
    ]
    assert answers[0].text == answers[1].text == answers[2].text == ear.text != ""
    prompt = await rendered(llama_server, [SEA])
    for answer in answers:
        assert answer.finish == "length" and not answer.estimated
        assert answer.spend.input == len(prompt)
        assert answer.spend.output == len(await tokens(llama_server, answer.text)) == 12
        assert answer.work.engine_seconds > 0
    # the same prompt again is in the server's cache, but for its last token
    assert answers[2].spend.cached == len(prompt) - 1
    assert answers[2].work.prefill == 1
    assert money.account.settled.calls == 3 and money.account.overdraft == {}


async def test_a_prefix_is_continued_and_not_repeated(llama, llama_server, bank, ear):
    money = bank()
    texts = set()
    for settings, listener in ({}, ear), ({"stream": False}, None), ({"continuation": "llama.cpp"}, None):
        ask = call(money.account, CAPITAL, prefix="The capital of France", emit=listener, max_tokens=8)
        answer = await llama(**settings).generate(ask)
        texts.add(answer.text)
        assert answer.spend.input == len(await rendered(llama_server, [CAPITAL])) + len(
            await tokens(llama_server, "The capital of France")
        )
    assert texts == {" is Paris."} and ear.text == " is Paris."


async def test_a_draft_then_its_prefix(llama, bank, ear):
    money = bank(output=60)
    ask = call(money.account, CAPITAL, prefix="The capital of France", draft=Draft("####", 5), emit=ear, max_tokens=40)
    answer = await llama().generate(ask)
    draft, tail, rest = answer.text.partition("\n#### The capital of France")
    assert draft and tail and answer.text == ear.text
    # the model may go on with a separator of its own; the last one counts
    assert answer.parsed == ("The capital of France" + rest).rpartition("####")[2].strip()
    assert "Paris" in answer.parsed
    first, second = money.entries()
    assert first.spend.output == 5 and second.spend.output > 3
    assert second.spend.cached >= first.spend.input - 1, "the second request finds the first one's prompt cached"
    assert answer.spend == first.spend + second.spend == money.account.settled


async def test_stop_strings(llama, bank):
    money = bank()
    plain = await llama().generate(call(money.account, max_tokens=16))
    word = plain.text.split()[3]
    stopped = await llama().generate(call(money.account, sampling=Sampling(temperature=0, max_tokens=16, stop=(word,))))
    assert stopped.text == plain.text.partition(word)[0]
    assert stopped.finish == "stop" and stopped.spend.output < 16


async def test_seeds_decide_what_is_drawn(llama, bank):
    money = bank()

    async def draw(seed: int) -> str:
        sampling = Sampling(temperature=1.5, top_p=1.0, top_k=0, min_p=0.0, seed=seed, max_tokens=10)
        return (await llama().generate(call(money.account, sampling=sampling))).text

    first = await draw(1)
    assert await draw(1) == first
    assert len({first, await draw(2), await draw(3)}) > 1


async def test_logprobs_are_those_of_the_tokens(llama, llama_server, bank):
    sampling = Sampling(temperature=0, max_tokens=6, logprobs=True)
    for settings in {}, {"stream": False}:
        answer = await llama(**settings).generate(call(bank().account, sampling=sampling))
        assert list(answer.tokens) == await tokens(llama_server, answer.text)
        assert len(answer.logprobs) == 6 and all(-10 < p <= 0 for p in answer.logprobs)


async def test_cancelling_in_mid_stream_stops_the_server_and_settles(llama, llama_server, bank):
    money = bank(output=1500)
    begun = asyncio.Event()
    seen: list[str] = []

    async def emit(delta):
        seen.append(delta.text)
        if len(seen) >= 3:
            begun.set()

    one = llama()
    task = asyncio.create_task(
        one.generate(call(money.account, max_tokens=1000, emit=emit, extra={"ignore_eos": True}))
    )
    await asyncio.wait_for(begun.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (entry,) = money.entries()
    assert entry.status == "estimated" and 0 < entry.spend.output < 1000
    assert entry.spend.input == one.count(call(money.account))
    root = llama_server.removesuffix("/v1")
    async with aiohttp.ClientSession() as session:
        for _ in range(200):
            async with session.get(f"{root}/slots") as reply:
                if not any(slot["is_processing"] for slot in await reply.json()):
                    return
            await asyncio.sleep(0.1)
    pytest.fail("the server still generates 20 s after its client hung up")


async def test_a_budget_of_one_token_is_one_token(llama, bank):
    money = bank(output=1)
    answer = await llama().generate(call(money.account))
    assert answer.spend.output == 1 and answer.finish == "budget" and answer.text
    assert [r.fired for r in answer.receipts if r.method == "budget"] == [True]
    assert money.account.overdraft == {}


async def test_completions(llama, bank):
    sampling = Sampling(temperature=0, max_tokens=3, logprobs=True)
    ask = Call(({"role": "user", "content": "The capital of France is"},), bank().account, sampling=sampling)
    answers = [await llama(kind="completions", stream=s).generate(ask) for s in (True, False)]
    assert answers[0].text == answers[1].text and answers[0].text.startswith(" Paris")
    assert all(a.spend.output == len(a.logprobs) == 3 for a in answers)


async def test_tools_are_accepted_and_other_fields_obeyed(llama, bank):
    grammar = 'root ::= "yes" | "no"'
    answer = await llama().generate(call(bank().account, extra={"grammar": grammar}))
    assert answer.text in ("yes", "no")
    answer = await llama().generate(call(bank().account, tools=(TOOL,), max_tokens=4))
    assert answer.spend.output == 4


async def test_concurrent_calls(llama, bank):
    money = bank(output=100)
    one = llama(concurrency=2)
    answers = await asyncio.gather(*(one.generate(call(money.account, max_tokens=4)) for _ in range(4)))
    assert sum(a.spend.output for a in answers) == money.account.settled.output == 16


async def test_a_prompt_longer_than_the_context_is_one_line(llama, bank):
    with pytest.raises(EngineError, match="too small a context for this prompt .*shorten the prompt"):
        await llama().generate(call(bank().account, {"role": "user", "content": "word " * 4000}))


async def test_what_the_server_lacks_is_said(llama, bank):
    with pytest.raises(EngineError, match="embeddings"):
        await llama(capabilities=("embed",)).embed(["a"], bank().account, Labels())


async def test_models(llama):
    (name,) = await llama().models()
    assert "SmolLM2-135M-Instruct" in name


async def test_embeddings(llama_embedder, bank):
    money = bank()
    one = OpenAIEngine(llama_embedder, "smollm2", capabilities=("embed",))
    texts = ["The cat sat on the mat.", "Stock markets fell sharply in Tokyo."]
    got = await one.embed(texts, money.account, Labels(role="embedder"))
    await one.aclose()
    assert got.vectors.shape == (2, 576)
    async with aiohttp.ClientSession() as session:
        for text, vector in zip(texts, got.vectors, strict=True):
            async with session.post(f"{llama_embedder}/embeddings", json={"input": text}) as reply:
                raw = (await reply.json())["data"][0]["embedding"]
            length = math.sqrt(math.fsum(x * x for x in raw))
            assert max(abs(a / length - b) for a, b in zip(raw, vector.tolist(), strict=True)) < 1e-3
    assert got.spend.input == sum([len(await tokens(llama_embedder, t)) for t in texts])
    (entry,) = money.entries()
    assert entry.status == "settled" and entry.spend == got.spend


def test_two_loops_one_engine(llama_server):
    one = OpenAIEngine(llama_server, "smollm2")
    account = Account("test", Budget(output=8))
    texts = [asyncio.run(one.generate(call(account, max_tokens=4))).text for _ in range(2)]
    assert texts[0] == texts[1] and account.settled.output == 8 and account.held == {}
