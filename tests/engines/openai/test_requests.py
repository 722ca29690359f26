"""What the engine sends, what it makes of the replies, and what budgets do to both."""

from __future__ import annotations

import asyncio
import gc
import pickle
import random
import socket
import threading
import warnings
from dataclasses import replace
from types import MappingProxyType

import pytest
from aiohttp import web
from stub_server import PARIS, QUESTION, USAGE, Stub, body, hang, piece, stream, usage_chunk, whole

from thrifty.budget import Account, Budget
from thrifty.call import CONTEXT_MARK, Call, Draft, Sampling
from thrifty.engine import Engine
from thrifty.engines.openai import OpenAIEngine, Timeouts
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput, Unsupported
from thrifty.ledger import MemoryLedger
from thrifty.ledger.entry import Labels
from thrifty.policy import DecodePolicy
from thrifty.spend import Spend

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


class Prices:
    """1,000 a new input token, 100 a cached one, 4,000 an output token, 7 a call."""

    label = "flat 2026-11"

    def with_price(self, spend: Spend, model: str, role: str = "answer") -> Spend:
        new = spend.input - spend.cached
        return replace(spend, usd=1000 * new + 100 * spend.cached + 4000 * spend.output + 7 * spend.calls)


def receipts(answer, method):
    return [r for r in answer.receipts if r.method == method]


# -- what is sent ------------------------------------------------------------------------------------------------------


async def test_every_setting_and_unknown_field_reaches_the_server_untouched(stub, engine, bank):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    messages = (
        {"role": "system", "content": "Be short.", "cache_control": {"type": "ephemeral"}},
        MappingProxyType({"role": "user", "content": [{"type": "text", "text": "What is it?"}, image], "name": "ann"}),
    )
    stub.plays(stream(*PARIS))
    sampling = Sampling(0.7, 0.9, 40, 0.05, 11, 20, ("\n\n", "END"), logprobs=True)
    extra = {"response_format": {"type": "json_object"}, "user": "u1", "stream_options": {"chunk_include_usage": True}}
    one = engine(extra={"cache_prompt": True, "user": "default"}, headers={"X-Title": "t"}, api_key="sk-abcdef")
    await one.generate(bank().call(messages=messages, tools=(TOOL,), sampling=sampling, extra=extra))
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.requests[0] == {
        "model": "m",
        "messages": [dict(messages[0]), dict(messages[1])],
        "tools": [TOOL],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 11,
        "max_tokens": 20,
        "stop": ["\n\n", "END"],
        "logprobs": True,
        "top_logprobs": 1,
        "stream": True,
        "stream_options": {"include_usage": True, "chunk_include_usage": True},
        "response_format": {"type": "json_object"},
        "user": "u1",
        "cache_prompt": True,
    }
    assert stub.headers[0]["Authorization"] == "Bearer sk-abcdef" and stub.headers[0]["X-Title"] == "t"


async def test_nothing_is_sent_that_was_not_asked_for(stub, engine, bank):
    stub.plays(whole(body()))
    await engine(stream=False).generate(bank().call(sampling=Sampling()))
    assert stub.requests == [{"model": "m", "messages": [QUESTION]}]


async def test_context_is_rendered_and_counted(stub, engine, bank):
    stub.plays(stream(*PARIS))
    call = bank().call(messages=({"role": "user", "content": f"Read {CONTEXT_MARK} now"},), context=("one", "two"))
    one = engine()
    await one.generate(call)
    assert stub.requests[0]["messages"] == [{"role": "user", "content": "Read one\n\ntwo now"}]
    bare = replace(call, context=())
    assert one.count(call) > one.count(bare)


async def test_completions_send_one_text_and_their_prefix(stub, engine, bank):
    reply = {"choices": [{"text": " Paris", "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.25]}}]}
    stub.plays(whole({**reply, "usage": USAGE}))
    one = engine(kind="completions", stream=False)
    messages = ({"role": "user", "content": "Q: capital of France?"},)
    call = bank().call(messages=messages, prefix="A:", sampling=Sampling(max_tokens=5, logprobs=True))
    answer = await one.generate(call)
    assert stub.paths == ["/v1/completions"]
    assert stub.requests[0] == {"model": "m", "prompt": "Q: capital of France?\n\nA:", "max_tokens": 5, "logprobs": 1}
    assert (answer.text, answer.logprobs) == (" Paris", (-0.25,))
    with pytest.raises(Unsupported, match='images need an engine of kind="chat"'):
        await one.generate(bank().call(messages=({"role": "user", "content": [{"type": "image_url"}]},)))
    with pytest.raises(Unsupported, match='tools need an engine of kind="chat"'):
        await one.generate(bank().call(tools=(TOOL,)))


@pytest.mark.parametrize(
    ("refusal", "gone", "instead"),
    [
        ("unknown field: stream_options", "stream_options", None),
        ("Unrecognized request argument supplied: continue_final_message", "continue_final_message", None),
        (
            "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            "max_tokens",
            "max_completion_tokens",
        ),
    ],
)
async def test_a_field_that_the_server_refuses_is_left_out_from_then_on(stub, engine, bank, refusal, gone, instead):
    stub.plays(whole({"error": {"message": refusal}}, 400), stream(*PARIS))
    money = bank()
    one = engine()
    for _ in range(2):
        assert (await one.generate(money.call(prefix="It"))).finish == "stop"
    assert [gone in r for r in stub.requests] == [True, False, False]
    assert instead is None or stub.requests[1][instead] == 20
    assert len(money.entries()) == 2


async def test_calls_refused_at_the_same_time_all_learn_from_it(stub, engine, bank):
    async def strict(request):
        if "stream_options" in stub.requests[-1]:
            await asyncio.sleep(0.02)
            return await whole({"error": {"message": "unknown field: stream_options"}}, 400)(request)
        return await stream(*PARIS)(request)

    stub.plays(strict)
    one = engine()
    answers = await asyncio.gather(*(one.generate(bank().call()) for _ in range(3)))
    assert [a.text for a in answers] == ["It is Paris."] * 3 and len(stub.requests) == 6


# -- what comes back ---------------------------------------------------------------------------------------------------

PARTS = (
    {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"city": '}},
    {"index": 1, "id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
    {"index": 0, "function": {"arguments": '"Paris"}'}},
)
CALLS = (
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_a_stream_and_a_whole_response_are_one_answer(stub, engine, bank, ear, field):
    logprobs = {"content": [{"token": "x", "id": 5, "logprob": -0.5}]}
    chunk = {"choices": [{"index": 0, "delta": {"content": "Yes"}, "logprobs": logprobs, "finish_reason": None}]}
    events = [
        piece(None, role="assistant"),
        piece(**{field: "hm, "}),
        piece(**{field: "so"}),
        chunk,
        *(piece(tool_calls=[part]) for part in PARTS),
        piece(finish="tool_calls"),
        usage_chunk(),
    ]
    message = {"tool_calls": [dict(c) for c in CALLS], field: "hm, so"}
    data = body("Yes", finish="tool_calls", **message)
    data["choices"][0]["logprobs"] = logprobs
    answers = []
    for reply, listener in ((stream(*events), ear), (stream(*events), None), (whole(data), None)):
        stub.plays(reply)
        one = engine(stream=len(answers) < 2)
        answers.append(await one.generate(bank().call(tools=(TOOL,), emit=listener)))
    for answer in answers:
        assert (answer.text, answer.thinking, answer.finish) == ("Yes", "hm, so", "tool_calls")
        assert answer.tool_calls == CALLS
        assert (answer.tokens, answer.logprobs) == ((5,), (-0.5,))
        assert answer.spend == Spend(input=12, output=3, calls=1, tool_calls=2)
    assert [r.get("stream", False) for r in stub.requests] == [True, True, False]
    assert "".join(d.thinking for d in ear.deltas) == "hm, so"
    assert [p for d in ear.deltas for p in d.tool_calls] == [dict(p) for p in PARTS]
    assert ear.deltas[-1].finish == "tool_calls" and ear.deltas[-1].answer == answers[0]
    assert all(d.finish is None and d.answer is None for d in ear.deltas[:-1])


async def test_tool_calls_without_index_are_told_apart_by_id(stub, engine, bank):
    parts = [{k: v for k, v in p.items() if k != "index"} for p in (PARTS[0], PARTS[1], PARTS[3], PARTS[2])]
    stub.plays(stream(*(piece(tool_calls=[p]) for p in parts), piece(finish="tool_calls"), usage_chunk()))
    assert (await engine().generate(bank().call(tools=(TOOL,)))).tool_calls == CALLS


async def test_a_server_that_answers_a_stream_with_json_is_understood(stub, engine, bank, ear):
    stub.plays(whole(body()))
    answer = await engine().generate(bank().call(emit=ear))
    assert answer.text == ear.text == "It is Paris." and answer.spend.output == 3


async def test_slow_listeners_hold_the_server_back(stub, engine, bank):
    """Each delta is awaited before the next is read: with a listener that waits, few are taken."""
    stub.plays(stream(*[piece("x" * 10_000)] * 3000, piece(finish="stop")))
    seen = 0
    stuck = asyncio.Event()

    async def emit(delta):
        nonlocal seen
        seen += 1
        await stuck.wait()

    task = asyncio.create_task(engine().generate(bank().call(emit=emit, sampling=Sampling())))
    await asyncio.sleep(0.3)
    assert seen == 1 and stub.under_way == 1, "the server is still writing"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}, {"cached": 8}),
        ({"prompt_tokens": 12, "completion_tokens": 3, "prompt_cache_hit_tokens": 8}, {"cached": 8}),
        ({"prompt_tokens": 12, "completion_tokens": 3, "cache_read_input_tokens": 8}, {"cached": 8}),
        ({"input_tokens": 4, "output_tokens": 3, "cache_read_input_tokens": 8}, {"cached": 8}),
        ({"input_tokens": 12, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 8}}, {"cached": 8}),
        (
            {"prompt_tokens": 12, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 5}},
            {"output": 9, "reasoning": 5},
        ),
        (
            {
                "prompt_tokens": 12,
                "completion_tokens": 3,
                "total_tokens": 20,
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
            {"output": 8, "reasoning": 5},
        ),
        ({"prompt_tokens": 12.0, "completion_tokens": 3.0, "prompt_tokens_details": None}, {}),
    ],
)
async def test_usage_of_every_dialect(stub, engine, bank, usage, expected):
    stub.plays(stream(*PARIS[:-1], usage_chunk(usage)))
    money = bank()
    answer = await engine(prices=Prices()).generate(money.call())
    spend = {"input": 12, "output": 3, "calls": 1, **expected}
    usd = 1000 * (12 - spend.get("cached", 0)) + 100 * spend.get("cached", 0) + 4000 * spend["output"] + 7
    assert answer.spend.to_dict() == {**spend, "usd": usd} and not answer.estimated
    assert answer.work.prefill == 12 - spend.get("cached", 0)
    (entry,) = money.entries()
    assert entry.labels == Labels(engine="openai", model="m", prices="flat 2026-11")


async def test_image_tokens_are_visual(stub, engine, bank):
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    stub.plays(stream(*PARIS[:-1], usage_chunk({"prompt_tokens": 900, "completion_tokens": 3})))
    one = engine(image_tokens=600)
    call = bank().call(messages=({"role": "user", "content": content},))
    assert one.count(call) == 600 + 3 + 4 + 1  # the image, the template, one message, one character
    assert (await one.generate(call)).spend.visual == 600


# -- budgets -----------------------------------------------------------------------------------------------------------


async def test_the_hold_covers_the_request_and_is_written_before_it(stub, engine):
    ledger = MemoryLedger()
    account = Account("test", Budget(tokens=1000), ledger=ledger)
    stub.plays(hang())
    one = engine(prices=Prices())
    call = Call((QUESTION,), account, sampling=Sampling(max_tokens=20), labels=Labels(plan="p", method="cod"))
    task = asyncio.create_task(one.generate(call))
    while not stub.requests:
        await asyncio.sleep(0.01)
    count = one.count(call)
    assert account.held == {
        "tokens": count + 20,
        "input": count,
        "output": 20,
        "calls": 1,
        "usd": 1000 * count + 4000 * 20 + 7,
    }
    (record,) = ledger.holds().values()
    assert record.spend == Spend(input=count, output=20, calls=1, usd=1000 * count + 80_007)
    assert record.labels == Labels("p", "cod", "openai", "m", "answer", "flat 2026-11")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert account.held == {} and ledger.holds() == {}


async def test_a_limit_on_reasoning_holds_all_that_could_be_reasoning(stub, engine, bank):
    stub.plays(hang())
    money = bank(reasoning=30)
    task = asyncio.create_task(engine().generate(money.call(max_tokens=20)))
    while not stub.requests:
        await asyncio.sleep(0.01)
    assert money.account.held["reasoning"] == 20
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


COUNT = 3 + 4 + 10  # the template, one message, 30 bytes / 3.3


@pytest.mark.parametrize(
    ("limits", "keep", "sent", "which"),
    [
        ({"output": 8}, 0, 8, "output"),
        ({"output": 8}, 5, 3, "output"),
        ({"output": 1}, 0, 1, "output"),
        ({"tokens": COUNT + 6}, 0, 6, "tokens"),
        ({"tokens": COUNT + 6}, 2, 4, "tokens"),
        ({"usd": 1000 * COUNT + 7 + 4000 * 5 + 3999}, 0, 5, "usd"),
        ({"output": 9, "tokens": COUNT + 7, "usd": 10**9}, 0, 7, "tokens"),
        ({"reasoning": 4}, 0, 4, "reasoning"),
    ],
)
async def test_degrade_sends_what_is_left_and_says_so(stub, engine, bank, limits, keep, sent, which):
    stub.plays(
        stream(piece("It is"), piece(finish="length"), usage_chunk({"prompt_tokens": COUNT, "completion_tokens": 1}))
    )
    money = bank(**limits)
    one = engine(prices=Prices())
    assert one.count(money.call()) == COUNT
    answer = await one.generate(money.call(keep=keep))
    assert stub.requests[0]["max_tokens"] == sent
    (receipt,) = receipts(answer, "budget")
    assert receipt.fired and (receipt.before, receipt.after) == (20, sent) and which in receipt.reason
    assert answer.finish == "budget" and money.account.overdraft == {}


@pytest.mark.parametrize(
    ("limits", "on_exceed", "resource"),
    [
        ({"output": 8}, "refuse", "output"),
        ({"tokens": COUNT + 6}, "refuse", "tokens"),
        ({"output": 0}, "degrade", "output"),
        ({"tokens": COUNT}, "degrade", "tokens"),
        ({"tokens": 5}, "degrade", "tokens"),
        ({"input": COUNT - 1}, "degrade", "input"),
        ({"prefill": COUNT - 1}, "degrade", "prefill"),
        ({"calls": 0}, "degrade", "calls"),
        ({"usd": 1000}, "degrade", "usd"),
        ({"engine_seconds": 0}, "degrade", "engine_seconds"),
    ],
)
async def test_what_cannot_be_held_is_not_sent(stub, engine, bank, limits, on_exceed, resource):
    stub.plays(stream(*PARIS))
    with pytest.raises(BudgetExceeded) as caught:
        await engine(prices=Prices()).generate(bank(**limits).call(on_exceed=on_exceed))
    assert caught.value.resource == resource and stub.requests == []


@pytest.mark.parametrize(
    ("limits", "sent"), [({}, None), ({"input": 500}, None), ({"output": 50_000}, 700), ({"tokens": COUNT + 30}, 30)]
)
async def test_without_max_tokens_the_hold_decides(stub, engine, bank, limits, sent):
    stub.plays(stream(*PARIS))
    money = bank(**limits)
    await engine(default_max_tokens=700).generate(money.call(sampling=Sampling(), on_exceed="refuse"))
    assert stub.requests[0].get("max_tokens") == sent


async def test_a_usd_limit_without_prices_is_refused(stub, engine, bank):
    with pytest.raises(InvalidInput, match="limits usd, and engine 'm' has no prices"):
        await engine().generate(bank(usd=10).call())


async def test_a_call_cancelled_while_its_hold_is_written_holds_nothing(stub, engine):
    """The ledger's disk is slow: the thread takes the hold after its task has gone."""

    class SlowLedger(MemoryLedger):
        entered, go, done = threading.Event(), threading.Event(), threading.Event()

        def open_hold(self, record):
            self.entered.set()
            self.go.wait(10)
            return super().open_hold(record)

        def drop_hold(self, hold):
            super().drop_hold(hold)
            self.done.set()

    ledger = SlowLedger()
    account = Account("test", Budget(tokens=1000), ledger=ledger)
    task = asyncio.create_task(engine().generate(Call((QUESTION,), account, sampling=Sampling(max_tokens=5))))
    await asyncio.to_thread(ledger.entered.wait, 10)
    assert account.held["output"] == 5
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ledger.go.set()
    assert await asyncio.to_thread(ledger.done.wait, 10)
    assert account.held == {} and ledger.holds() == {} and stub.requests == []


@pytest.mark.parametrize("concurrency", [3, 30])
async def test_concurrent_calls_never_pass_the_limit(stub, engine, bank, concurrency):
    async def honest(request):
        made = min(3, stub.requests[-1]["max_tokens"])
        usage = {"prompt_tokens": COUNT, "completion_tokens": made}
        return await stream(piece("It"), piece(finish="length"), usage_chunk(usage), wait=0.002)(request)

    stub.plays(honest)
    money = bank(output=70)
    one = engine(concurrency=concurrency)
    results = await asyncio.gather(*(one.generate(money.call()) for _ in range(30)), return_exceptions=True)
    done = [r for r in results if not isinstance(r, BaseException)]
    assert all(isinstance(r, BudgetExceeded) for r in results if isinstance(r, BaseException))
    assert money.account.settled.output == sum(a.spend.output for a in done) <= 70
    assert money.account.overdraft == {} and stub.most_under_way <= concurrency
    # of three in flight, two hold at most 40 of 70: none is refused before 30 are settled, 3 a call
    assert len(done) >= (10 if concurrency == 3 else 3)


async def test_tool_calls_left_are_respected(stub, engine, bank):
    stub.plays(stream(*PARIS))
    money = bank(tool_calls=0)
    answer = await engine().generate(money.call(tools=(TOOL,)))
    assert stub.requests[0]["tool_choice"] == "none" and stub.requests[0]["tools"] == [TOOL]
    assert receipts(answer, "budget")[0].fired
    with pytest.raises(BudgetExceeded, match="tool_calls"):
        await engine().generate(money.call(tools=(TOOL,), on_exceed="refuse"))


# -- prefix and draft --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("continuation", "fields"),
    [
        ("auto", {"continue_final_message": True, "add_generation_prompt": False}),
        ("vllm", {"continue_final_message": True, "add_generation_prompt": False}),
        ("llama.cpp", {}),
    ],
)
@pytest.mark.parametrize("echo", [False, True])
async def test_a_prefix_is_continued_and_never_repeated(stub, engine, bank, continuation, fields, echo):
    # vLLM never repeats it, so what stands there is the model's own
    repeated = echo and continuation != "vllm"
    stub.plays(whole(body("It is Paris." if repeated else " Paris.")))
    one = engine(continuation=continuation, stream=False)
    assert "continue" in one.capabilities
    answer = await one.generate(bank().call(prefix="It is"))
    assert answer.text == " Paris."
    sent = stub.requests[0]
    assert sent["messages"] == [QUESTION, {"role": "assistant", "content": "It is"}]
    assert {k: sent[k] for k in ("continue_final_message", "add_generation_prompt") if k in sent} == fields


@pytest.mark.parametrize(
    ("said", "text"), [(("It", " is", " Paris"), " Paris"), (("It", "'s"), "It's"), (("It is",), ""), (("It",), "It")]
)
async def test_without_continuation_the_prefix_is_asked_for_in_words(stub, engine, bank, ear, said, text):
    stub.plays(stream(*map(piece, said), piece(finish="stop"), usage_chunk()))
    one = engine(continuation="none")
    assert "continue" not in one.capabilities
    answer = await one.generate(bank().call(prefix="It is", emit=ear))
    assert stub.requests[0]["messages"] == [
        {"role": "user", "content": "What is the capital of France?\n\nBegin your answer with: It is"}
    ]
    assert answer.text == ear.text == text
    assert "in words" in receipts(answer, "engine")[0].reason


def drafting(first="20 - 12 = 8", second=" 8."):
    return (
        stream(piece(first), piece(finish="stop"), usage_chunk({"prompt_tokens": 30, "completion_tokens": 9})),
        stream(piece(second), piece(finish="stop"), usage_chunk({"prompt_tokens": 60, "completion_tokens": 2})),
    )


async def test_a_draft_and_its_answer_are_two_settled_requests(stub, engine, bank, ear):
    stub.plays(*drafting())
    money = bank()
    one = engine(prices=Prices(), tokenizer=len)
    sampling = Sampling(temperature=0, max_tokens=100, stop=("\n",))
    draft = Draft("####", 40)
    call = money.call(prefix="The answer is", draft=draft, emit=ear, sampling=sampling, extra={"user": "u"})
    answer = await one.generate(call)
    first, second = stub.requests
    assert first["messages"] == [QUESTION] and first["stop"] == ["####"] and first["max_tokens"] == 40
    tail = "\n#### The answer is"
    assert second["messages"] == [QUESTION, {"role": "assistant", "content": "20 - 12 = 8" + tail}]
    assert second["stop"] == ["\n"] and second["max_tokens"] == 100 - 9 - len(tail)
    assert first["user"] == second["user"] == "u"
    assert answer.text == ear.text == "20 - 12 = 8\n#### The answer is 8."
    assert answer.parsed == answer.final == "The answer is 8."
    draft, rest = money.entries()
    assert draft.spend.to_dict() == {"input": 30, "output": 9, "calls": 1, "usd": 30_000 + 36_000 + 7}
    # forced tokens are output to the budget, and input on the bill
    assert rest.spend.to_dict() == {
        "input": 60 - len(tail),
        "output": 2 + len(tail),
        "calls": 1,
        "usd": 60_000 + 8_000 + 7,
    }
    assert answer.spend == draft.spend + rest.spend and len([d for d in ear.deltas if d.finish]) == 1


async def test_a_draft_leaves_room_for_its_answer(stub, engine, bank):
    stub.plays(*drafting())
    money = bank(output=40)
    answer = await engine(tokenizer=len).generate(money.call(prefix="So", draft=Draft("##", 100), max_tokens=200))
    tail = len("\n## So")
    assert stub.requests[0]["max_tokens"] == 40 - tail - 1
    assert stub.requests[1]["max_tokens"] == 40 - 9 - tail
    assert answer.parsed == "So 8." and money.account.overdraft == {}


@pytest.mark.parametrize("limits", [{"calls": 1}, {"output": 5}])
async def test_without_room_for_a_draft_the_answer_comes_alone(stub, engine, bank, limits):
    stub.plays(*drafting()[1:])
    call = {"prefix": "The answer is", "draft": Draft("####", 40)}
    answer = await engine().generate(bank(**limits).call(**call))
    assert len(stub.requests) == 1 and answer.text == " 8."
    assert "without it" in receipts(answer, "budget")[0].reason
    with pytest.raises(BudgetExceeded):
        await engine().generate(bank(**limits).call(**call, on_exceed="refuse"))


async def test_an_answer_that_fails_after_its_draft_tells_what_both_cost(stub, engine, bank, ear):
    stub.plays(drafting()[0], whole("{}", 400))
    money = bank()
    with pytest.raises(EngineError) as caught:
        await engine().generate(money.call(prefix="So", draft=Draft("##", 9), emit=ear))
    assert caught.value.spend == money.account.settled == Spend(input=30, output=9, calls=1)
    assert ear.deltas[-1].finish == "error"


@pytest.mark.parametrize(
    ("text", "parsed"), [("8 + 8 = 16 #### 16 ", "16"), ("a #### b #### c", "c"), ("no idea", None)]
)
async def test_a_draft_without_prefix_is_one_request(stub, engine, bank, text, parsed):
    stub.plays(stream(piece(text), piece(finish="stop"), usage_chunk()))
    answer = await engine().generate(bank().call(draft=Draft("####", 5)))
    assert len(stub.requests) == 1 and "stop" not in stub.requests[0]
    assert (answer.text, answer.parsed) == (text, parsed)


# -- embeddings, models, lists -----------------------------------------------------------------------------------------


async def test_embeddings_are_unit_vectors_in_order(stub, engine, bank):
    rows = [{"index": 1, "embedding": [0.0, 2.0]}, {"index": 0, "embedding": [3.0, 4.0]}]
    stub.plays(whole({"data": rows, "usage": {"prompt_tokens": 5, "total_tokens": 5}}))
    money = bank()
    one = engine(capabilities=("text", "embed"), prices=Prices())
    got = await one.embed(["first", "second"], money.account, Labels(role="embedder"))
    assert (
        got.vectors.dtype == "float32"
        and got.vectors.round(6).tolist() == [[0.6, 0.8], [0.0, 1.0]]
        or (abs(got.vectors - [[0.6, 0.8], [0.0, 1.0]]).max() < 1e-6)
    )
    assert stub.requests == [{"model": "m", "input": ["first", "second"], "encoding_format": "float"}]
    (entry,) = money.entries()
    assert entry.spend == got.spend == Spend(input=5, calls=1, usd=5007) and entry.labels.role == "embedder"
    assert entry.status == "settled"
    empty = await one.embed([], money.account, Labels())
    assert empty.vectors.shape == (0, 0) and len(stub.requests) == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"data": [{"embedding": [1.0]}]}, "sent 1 vectors for 2 texts"),
        ({"data": [{"embedding": [1.0]}, {"embedding": [1.0, 2.0]}]}, "different lengths"),
        ({"data": [{"embedding": [0.0]}, {"embedding": [1.0]}]}, "zero"),
        ({"error": {"message": "no embeddings here"}}, "no embeddings here"),
        ([], "no JSON object"),
    ],
)
async def test_broken_embeddings_are_refused(stub, engine, bank, data, says):
    stub.plays(whole(data))
    with pytest.raises(EngineError, match=says):
        await engine(capabilities=("embed",)).embed(["a", "b"], bank().account, Labels())


async def test_embed_needs_the_capability(engine, bank):
    with pytest.raises(Unsupported, match="embeds no texts"):
        await engine().embed(["a"], bank().account, Labels())


async def test_models_are_listed(stub, engine):
    stub.plays(whole({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}))
    assert await engine().models() == ("a", "b")
    assert stub.paths == ["/v1/models"]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_url": "localhost:8000"}, "base_url: an address such as"),
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": ""}, "base_url"),
        ({"model": ""}, "name of a model"),
        ({"kind": "chats"}, "did you mean 'chat'"),
        ({"continuation": "vlm"}, "did you mean 'vllm'"),
        ({"capabilities": ["txt"]}, "did you mean 'text'"),
        ({"capabilities": ["logits"]}, "it needs the model itself"),
        ({"max_retries": -1}, "max_retries = -1"),
        ({"concurrency": 0}, "concurrency = 0"),
        ({"timeout": 0}, "timeout"),
        ({"api_key": "two\nlines"}, "no usable key"),
        ({"api_key_env": "THRIFTY_TEST_NO_SUCH_KEY"}, "THRIFTY_TEST_NO_SUCH_KEY is not set"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        OpenAIEngine(settings.pop("base_url", "http://h/v1"), settings.pop("model", "m"), **settings)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"extra": {"max_tokens": 5}}, "'max_tokens' is not passed on: it is set by Sampling.max_tokens"),
        ({"extra": {"n": 4}}, "one answer a call"),
        ({"extra": {"x": object()}}, "cannot be written as JSON"),
        ({"messages": ({"role": "user", "content": "\ud800"},)}, "cannot be written as JSON"),
        ({"messages": ()}, "empty"),
    ],
)
async def test_calls_that_cannot_be_sent_are_refused(stub, engine, bank, fields, says):
    with pytest.raises(InvalidInput, match=says):
        await engine().generate(bank(tokens=100).call(**fields))
    assert stub.requests == []


async def test_policies_and_branches_are_refused_by_name(stub, engine, bank):
    class Ban(DecodePolicy):
        method = "ban-token"

    with pytest.raises(Unsupported, match="ban-token: engine 'openai' .* engine 'local' does"):
        await engine().generate(bank().call(policies=(Ban(),)))
    with pytest.raises(Unsupported, match="opens no branches"):
        await engine().open(bank().call())
    with pytest.raises(Unsupported, match="steps no branches"):
        await engine().advance([], 1)


async def test_deterministic_is_not_silently_ignored(stub, engine, bank):
    stub.plays(stream(*PARIS))
    answer = await engine().generate(bank().call(sampling=Sampling(deterministic=True)))
    assert not receipts(answer, "engine")[0].fired


def test_keys_are_in_no_repr_and_no_pickle(monkeypatch):
    monkeypatch.setenv("THRIFTY_TEST_KEY", "sk-from-the-environment")
    one = OpenAIEngine("http://u:password@h:1/v1?token=hidden", "m", api_key_env="THRIFTY_TEST_KEY")
    shown = f"{one!r} {one.identity()} {one._transport!r} {vars(one)}"
    assert "sk-from" not in shown
    assert "password" not in f"{one!r} {one.identity()}" and "hidden" not in f"{one!r} {one.identity()}"
    with pytest.raises(TypeError):
        pickle.dumps(one)
    assert isinstance(one, Engine)


# -- loops -------------------------------------------------------------------------------------------------------------


def test_one_engine_serves_several_loops_and_leaves_nothing_open():
    """The stub runs in each loop anew; a session left open by one loop is closed when that loop ends."""
    one = None
    account = Account("test", Budget(output=100))

    async def once(close: bool) -> str:
        nonlocal one
        server = Stub("")
        server.plays(stream(*PARIS))
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", server.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        if one is None:
            one = OpenAIEngine(f"http://127.0.0.1:{port}/v1", "m", rng=random.Random(1), timeout=Timeouts(total=5))
        text = (await one.generate(Call((QUESTION,), account))).text
        if close:
            await one.aclose()
            await one.aclose()
        await runner.cleanup()
        return text

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [asyncio.run(once(close)) for close in (True, False, True)] == ["It is Paris."] * 3
        gc.collect()
    assert account.held == {} and account.settled.calls == 3
