"""A server that is down, hangs, lies, or breaks: one clear line, settled once, nothing held.

The `bank` fixture checks after every test that nothing is held and that the ledger sums to the account.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from stub_server import PARIS, USAGE, body, hang, piece, reset, stream, usage_chunk, whole

from thrifty.call import Sampling
from thrifty.engines.openai import Timeouts
from thrifty.errors import BudgetExceeded, EngineError

KEY = "sk-very-secret-key-123456"


def receipts(answer, method):
    return [r for r in answer.receipts if r.method == method]


# -- down, hung, refused -----------------------------------------------------------------------------------------------


async def test_a_server_that_is_down_is_named_without_secrets(engine, bank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    money = bank()
    down = engine(base_url=f"http://user:{KEY}@127.0.0.1:{port}/v1?token={KEY}", max_retries=1)
    with pytest.raises(EngineError) as caught:
        await down.generate(money.call())
    line = str(caught.value)
    assert line.startswith(f"http://127.0.0.1:{port}/v1/chat/completions cannot be reached")
    assert "check base_url and that the server runs" in line
    assert KEY not in line and "\n" not in line and KEY not in repr(down)
    assert caught.value.spend is None and money.account.settled.calls == 0


async def test_a_certificate_that_does_not_verify_is_not_trusted(engine, bank, tmp_path):
    """A TLS server that signed its own certificate; it is asked once, and sees no request."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    connected = []
    server = await asyncio.start_server(lambda r, w: connected.append(w), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(EngineError, match="certificate that does not verify"):
        await engine(base_url=f"https://127.0.0.1:{port}/v1").generate(bank().call())
    server.close()
    assert connected == []


async def test_a_server_that_hangs_is_left_after_the_first_byte_limit_and_bills_nothing(stub, engine, bank):
    stub.plays(hang())
    money = bank(tokens=1000)
    patient = engine(timeout=Timeouts(first=0.2, connect=0.2))
    with pytest.raises(EngineError, match="sent no answer in .* s; raise the time-out"):
        await patient.generate(money.call())
    assert len(stub.requests) == 1, "a hung server is not asked again"
    assert money.entries() == []


async def test_a_stream_that_stops_is_settled_for_what_had_come(stub, engine, bank):
    stub.plays(stream(piece("It is"), piece(" Paris"), then="hang"))
    money = bank(output=50)
    with pytest.raises(EngineError, match="stopped in the middle of its stream") as caught:
        await engine(timeout=Timeouts(between=0.2)).generate(money.call())
    (entry,) = money.entries()
    assert entry.status == "estimated" and entry.spend.calls == 1
    assert entry.spend.output == 4  # "It is Paris": 11 bytes / 3.3, rounded up
    assert caught.value.spend == entry.spend


async def test_a_stream_that_was_accepted_and_never_began_costs_its_input(stub, engine, bank):
    stub.plays(stream(then="hang"))
    money = bank()
    patient = engine(timeout=Timeouts(first=0.2))
    with pytest.raises(EngineError, match="sent no first piece"):
        await patient.generate(money.call())
    (entry,) = money.entries()
    assert (entry.spend.input, entry.spend.output) == (patient.count(money.call()), 0)


async def test_the_total_limit_holds_for_a_trickle(stub, engine, bank):
    stub.plays(stream(*[piece("a ")] * 1000, wait=0.02))
    money = bank()
    with pytest.raises(EngineError, match="stopped in the middle"):
        await engine(timeout=Timeouts(total=0.4)).generate(money.call(max_tokens=500))
    assert 0 < money.account.settled.output < 500


async def test_a_slow_trickle_within_the_limits_arrives_whole(stub, engine, bank, ear):
    text = "It is Paris, on the Seine."
    stub.plays(stream(*[piece(c) for c in text], piece(finish="stop"), usage_chunk(), wait=0.005))
    answer = await engine(timeout=Timeouts(between=2)).generate(bank().call(emit=ear))
    assert answer.text == ear.text == text


async def test_500_then_ok_is_billed_once(stub, engine, bank):
    stub.plays(whole({"error": "overloaded"}, 500), reset(), stream(*PARIS))
    money = bank(output=100)
    answer = await engine().generate(money.call())
    assert answer.text == "It is Paris." and len(stub.requests) == 3
    assert [e.spend.to_dict() for e in money.entries()] == [{"input": 12, "output": 3, "calls": 1}]


async def test_a_429_storm_ends_in_one_line_and_bills_nothing(stub, engine, bank):
    stub.plays(whole({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"}))
    money = bank()
    with pytest.raises(EngineError, match=r"limits the rate \(HTTP 429\): slow down; send less at once"):
        await engine(max_retries=3).generate(money.call())
    assert len(stub.requests) == 4 and money.entries() == []


async def sleeps(monkeypatch) -> list[float]:
    """Records what is slept instead of sleeping."""
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds, *rest):
        if seconds > 0.2:
            slept.append(seconds)
            seconds = 0
        return await real(seconds, *rest)

    monkeypatch.setattr("thrifty.engines.openai.transport.asyncio.sleep", sleep)
    return slept


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry-After": "7"}, 7, 8),
        ({"retry-after-ms": "7000"}, 7, 8),
        ({"Retry-After": "date"}, 5, 9),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "0s600ms"}, 0.5, 0.7),
    ],
)
async def test_the_server_says_how_long_to_wait(stub, engine, bank, monkeypatch, headers, low, high):
    if headers.get("Retry-After") == "date":
        headers = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=8), usegmt=True)}
    slept = await sleeps(monkeypatch)
    stub.plays(whole("{}", 429, headers), stream(*PARIS))
    answer = await engine(longest_wait=20.0).generate(bank().call())
    assert answer.text == "It is Paris."
    assert low <= slept[0] <= high


async def test_a_rate_that_is_used_up_pauses_the_next_call(stub, engine, bank, monkeypatch):
    used_up = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1.5"}
    stub.plays(whole(body(), headers=used_up), stream(*PARIS))
    one = engine(longest_wait=20.0)
    await one.generate(bank().call())
    slept = []
    real = asyncio.sleep

    async def sleep(seconds, *rest):
        slept.append(seconds)
        one._transport._until = 0.0
        return await real(0, *rest)

    monkeypatch.setattr("thrifty.engines.openai.transport.asyncio.sleep", sleep)
    await one.generate(bank().call())
    assert 1.0 < slept[0] <= 1.5


async def test_a_wait_that_is_too_long_is_refused(stub, engine, bank):
    stub.plays(whole("{}", 429, {"Retry-After": "3600"}))
    with pytest.raises(EngineError, match="asks to wait 3,600 s, and more than 2 s is not waited"):
        await engine().generate(bank().call())
    assert len(stub.requests) == 1


async def test_no_retry_starts_past_the_deadline(stub, engine, bank):
    stub.plays(whole("{}", 503, {"Retry-After": "5"}))
    with pytest.raises(EngineError, match="a retry would pass the deadline"):
        await engine(longest_wait=20.0).generate(bank(deadline=1.0).call())
    assert len(stub.requests) == 1


async def test_the_deadline_ends_an_answer_with_what_had_come(stub, engine, bank):
    stub.plays(stream(piece("It is"), piece(" Paris"), then="hang"))
    money = bank(deadline=0.4)
    answer = await engine().generate(money.call())
    assert (answer.text, answer.finish, answer.estimated) == ("It is Paris", "budget", True)
    assert receipts(answer, "budget")[0].fired


async def test_the_deadline_without_a_token_is_a_refusal(stub, engine, bank):
    stub.plays(hang())
    with pytest.raises(BudgetExceeded, match="deadline"):
        await engine().generate(bank(deadline=0.2).call())


# -- nonsense ----------------------------------------------------------------------------------------------------------

PAGE = "<!doctype html><html><head><title>502 Bad &amp; Gateway</title></head><body>sorry</body></html>"


@pytest.mark.parametrize(
    ("reply", "says", "tries"),
    [
        (whole(PAGE, 200, kind="text/html"), "an HTML page titled '502 Bad & Gateway'", 1),
        (whole(PAGE, 502, kind="text/html"), r"HTTP 502.*an HTML page titled", 3),
        (whole("hello", kind="text/css"), "content type text/css instead of JSON; check base_url", 1),
        (whole({"error": {"message": "out of memory", "code": 500}}), "reported an error .*out of memory", 3),
        (whole({"error": "bad luck"}), "reported an error .*bad luck", 1),
        (whole({"choices": [], "model": "m"}), "without choices", 1),
        (whole([1, 2]), "no JSON object", 1),
        (stream(piece(), done=False), "ended its stream without an answer", 3),
        (stream(done=True), "ended its stream without an answer", 3),
        (stream({"error": {"message": "boom", "type": "server_error"}}), r"in its stream: boom \(server_error\)", 1),
        (stream(b"data: {nonsense\n\n"), "event that is no JSON object", 1),
        (whole({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401), r"refused the API key.*\*\*\*", 1),
        (whole({"error": {"message": "The model `m` does not exist"}}, 404), r"models\(\) lists", 1),
        (whole({"detail": "Not Found"}, 404), "most often in /v1", 1),
        (whole("", 307, {"Location": "http://127.0.0.1:1/"}), "redirects elsewhere", 1),
        (whole({"error": {"message": "no such thing", "code": "x"}}, 400), r"refused the request \(HTTP 400\)", 1),
        (whole({"error": {"message": "image input is not supported"}}, 500), "image input is not supported", 1),
        (whole({"error": {"message": "You exceeded your current quota"}}, 429), "raise the quota", 1),
        (
            whole({"error": {"message": "request exceeds the available context size (2048 tokens)"}}, 400),
            "too small a context .*shorten the prompt",
            1,
        ),
        (
            whole({"error": {"message": "This model's maximum context length is 10 tokens."}}, 400),
            "too small a context",
            1,
        ),
    ],
)
async def test_nonsense_is_one_line_and_bills_nothing(stub, engine, bank, reply, says, tries):
    stub.plays(reply)
    money = bank(tokens=500)
    with pytest.raises(EngineError, match=says) as caught:
        await engine(api_key=KEY).generate(money.call())
    line = str(caught.value)
    assert line.startswith(stub.url) and "\n" not in line and len(line) < 600
    assert KEY not in line
    assert len(stub.requests) == tries
    assert caught.value.spend is None and money.entries() == []


async def test_half_a_json_body_was_made_and_is_settled(stub, engine, bank):
    raw = json.dumps(body("word " * 40))
    stub.plays(whole(raw[: len(raw) // 2]))
    money = bank(output=15)
    with pytest.raises(EngineError, match="only half of one") as caught:
        await engine().generate(money.call())
    (entry,) = money.entries()
    assert entry.status == "estimated" and entry.spend.output == 15  # never more than was asked for
    assert caught.value.spend == entry.spend


async def test_no_choices_but_usage_is_billed_as_the_server_says(stub, engine, bank):
    stub.plays(whole({"choices": [], "usage": USAGE}))
    money = bank()
    with pytest.raises(EngineError, match="without choices"):
        await engine().generate(money.call())
    assert money.account.settled.to_dict() == {"input": 12, "output": 3, "calls": 1}


# -- streams that break ------------------------------------------------------------------------------------------------


async def test_half_a_stream_nobody_saw_is_settled_and_repeated(stub, engine, bank):
    stub.plays(stream(piece("It is"), then="cut"), stream(*PARIS))
    money = bank(output=60)
    one = engine()
    answer = await one.generate(money.call())
    assert answer.text == "It is Paris."
    cut, good = money.entries()
    assert (cut.status, cut.spend.output, cut.spend.input) == ("estimated", 2, one.count(money.call()))
    assert (good.status, good.spend.output) == ("settled", 3)
    assert answer.spend == cut.spend + good.spend and answer.estimated


async def test_half_a_stream_that_was_seen_is_settled_and_not_repeated(stub, engine, bank, ear):
    stub.plays(stream(piece("It is"), then="cut"), stream(*PARIS))
    money = bank(output=60)
    with pytest.raises(EngineError, match="cut its") as caught:
        await engine().generate(money.call(emit=ear))
    assert len(stub.requests) == 1
    (entry,) = money.entries()
    assert caught.value.spend == entry.spend and entry.spend.output == 2
    last = ear.deltas[-1]
    assert last.finish == "error" and last.answer.spend == entry.spend and last.answer.text == "It is"


async def test_a_cut_with_no_budget_for_a_retry_tells_what_was_spent(stub, engine, bank):
    stub.plays(stream(piece("It is"), then="cut"), stream(*PARIS))
    money = bank(calls=1)
    with pytest.raises(EngineError, match="the budget has no calls left for a retry") as caught:
        await engine().generate(money.call())
    assert caught.value.spend == money.account.settled and len(stub.requests) == 1


async def test_an_error_after_the_first_delta_is_an_event(stub, engine, bank, ear):
    stub.plays(stream(piece("It is"), {"error": {"message": "CUDA error", "code": 500}}))
    money = bank()
    with pytest.raises(EngineError, match="CUDA error") as caught:
        await engine().generate(money.call(emit=ear))
    assert [d.text for d in ear.deltas] == ["It is", ""] and ear.deltas[-1].finish == "error"
    assert caught.value.spend == money.account.settled and money.account.settled.output == 2


async def test_what_comes_after_a_complete_answer_does_not_spoil_it(stub, engine, bank):
    for tail in ([b"data: {nonsense\n\n"], [{"error": "late"}], []):
        stub.plays(stream(piece("It is Paris."), piece(finish="stop"), usage_chunk(), *tail, then="cut"))
        answer = await engine().generate(bank().call())
        assert (answer.text, answer.finish, answer.spend.output) == ("It is Paris.", "stop", 3)


async def test_a_duplicate_finish_is_one_finish(stub, engine, bank, ear):
    stub.plays(
        stream(piece("It is Paris."), piece(finish="length"), piece(finish="stop"), usage_chunk(), usage_chunk())
    )
    money = bank()
    answer = await engine().generate(money.call(emit=ear))
    assert answer.finish == "length" and [d.finish for d in ear.deltas if d.finish] == ["length"]
    assert money.account.settled.output == 3


async def test_done_is_an_end_where_no_finish_is_given(stub, engine, bank):
    stub.plays(stream(piece("It is Paris."), usage_chunk()))
    answer = await engine().generate(bank().call())
    assert (answer.text, answer.finish, answer.estimated) == ("It is Paris.", "stop", False)


async def test_a_huge_event_is_read_and_an_endless_one_refused(stub, engine, bank, monkeypatch):
    long = "x" * 3_000_000
    stub.plays(stream(piece(long), piece(finish="stop")))
    answer = await engine().generate(bank().call(sampling=Sampling()))
    assert answer.text == long
    stub.plays(stream(b"data: " + b"x" * 17_000_000, done=False))
    with pytest.raises(EngineError, match="one event is larger than 16,777,216 bytes"):
        await engine().generate(bank().call())


async def test_bad_utf8_is_replaced(stub, engine, bank):
    bad = b'data: {"choices":[{"index":0,"delta":{"content":"caf\xe9!"},"finish_reason":"stop"}]}\n\n'
    stub.plays(stream(bad, usage_chunk()), whole(json.dumps(body("caf#!")).encode().replace(b"#", b"\xe9")))
    for streaming in (True, False):
        answer = await engine(stream=streaming).generate(bank().call())
        assert answer.text == "caf\ufffd!"


# -- we go away --------------------------------------------------------------------------------------------------------


async def test_cancelling_hangs_up_and_settles_what_had_come(stub, engine, bank):
    gone = asyncio.Event()
    stub.plays(stream(piece("It is"), piece(" Paris"), then="hang", gone=gone))
    money = bank(output=50)
    seen = asyncio.Event()

    async def emit(delta):
        if "Paris" in delta.text:
            seen.set()

    task = asyncio.create_task(engine().generate(money.call(emit=emit)))
    await asyncio.wait_for(seen.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (entry,) = money.entries()
    assert entry.status == "estimated" and entry.spend.output == 4
    await asyncio.wait_for(gone.wait(), 5)


async def test_cancelling_before_the_server_accepts_bills_nothing(stub, engine, bank):
    stub.plays(hang())
    money = bank(output=50)
    task = asyncio.create_task(engine().generate(money.call()))
    while not stub.requests:
        await asyncio.sleep(0.01)
    assert money.account.held["output"] == 20
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert money.entries() == []


async def test_a_listener_that_fails_is_settled_and_its_error_raised(stub, engine, bank):
    stub.plays(stream(*PARIS))
    money = bank()

    async def emit(delta):
        raise OSError("client is gone")

    with pytest.raises(OSError, match="client is gone"):
        await engine().generate(money.call(emit=emit))
    (entry,) = money.entries()
    assert entry.status == "estimated" and entry.spend.output == 2


# -- lies about usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "expected", "why"),
    [
        (None, {"output": 4}, "gave no usage"),
        ("12 tokens", {"output": 4}, "usage is str"),
        ({"prompt_tokens": -5, "completion_tokens": 3}, {"output": 3}, "prompt_tokens = '-5' is no count"),
        ({"prompt_tokens": "12", "completion_tokens": 3}, {"output": 3}, "prompt_tokens = '12' is no count"),
        ({"prompt_tokens": 12, "completion_tokens": True}, {"input": 12, "output": 4}, "completion_tokens = 'True'"),
        ({"prompt_tokens": 0, "completion_tokens": 3}, {"output": 3}, "0 input tokens for a prompt"),
        ({"prompt_tokens": 10**15, "completion_tokens": 3}, {"output": 3}, "is no count"),
        ({"prompt_tokens": 90_000, "completion_tokens": 3}, {"output": 3}, "90,000 input tokens for a request of"),
        ({"prompt_tokens": 12, "completion_tokens": 0}, {"input": 12, "output": 4}, "0 output tokens for 12 bytes"),
        (
            {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 99}},
            {"input": 12, "output": 3},
            "99 cached of 12 input tokens",
        ),
        (
            {"prompt_tokens": 12, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 50}},
            {"input": 12, "output": 3, "reasoning": 3},
            "50 reasoning of 3 output tokens",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_usage_that_cannot_be_true_is_corrected_and_marked(stub, engine, bank, usage, expected, why, streaming):
    stub.plays(stream(*PARIS[:-1], usage_chunk(usage)) if streaming else whole(body(usage=usage)))
    money = bank()
    one = engine(stream=streaming)
    answer = await one.generate(money.call())
    assert answer.spend.to_dict() == {"input": one.count(money.call()), "calls": 1, **expected}
    assert answer.estimated and money.entries()[0].status == "estimated"
    (receipt,) = receipts(answer, "engine")
    assert receipt.fired and why in receipt.reason


async def test_a_bill_above_the_hold_is_an_overdraft(stub, engine, bank):
    usage = {"prompt_tokens": 12, "completion_tokens": 70}
    stub.plays(stream(*PARIS[:-1], usage_chunk(usage)))
    money = bank(output=50)
    answer = await engine().generate(money.call())
    assert answer.spend.output == 70 and not answer.estimated
    assert money.account.overdraft == {"output": 20}
    assert dict(money.entries()[0].overdraft) == {"output": 20}
