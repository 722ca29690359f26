"""The walk of a request through the gateway, over real sockets: what goes up, what comes back, who pays."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from served import Upstream, serving

from thrifty.errors import InvalidInput
from thrifty.ledger import open_ledger
from thrifty.serve import policy
from thrifty.serve.keys import new_key

SHORT = 'name = "short"\n[[methods]]\nuse = "budget-prompt"\nwords = 5\n'


async def test_an_answer_comes_back_as_the_upstream_gave_it_with_spend_and_receipts(tmp_path: Path) -> None:
    async with serving(tmp_path, plans={"short": SHORT}) as s:
        s.upstream.message = {"annotations": [{"a": 1}]}
        status, data, headers = await s.post(plan="short", user="u1", response_format={"type": "text"})
        assert status == 200
        assert data["id"] == "x" and data["model"] == "real" and data["system_fingerprint"] == "fp"
        message = {"role": "assistant", "content": "It is Paris.", "annotations": [{"a": 1}]}
        assert data["choices"][0]["message"] == message and data["choices"][0]["finish_reason"] == "stop"
        assert {k: data["usage"][k] for k in s.upstream.usage} == s.upstream.usage
        assert data["thrifty"]["spend"] == {"input": 12, "output": 3, "calls": 1}
        assert [r["method"] for r in data["thrifty"]["receipts"]] == ["budget-prompt"]
        assert headers["x-thrifty-plan"] == data["thrifty"]["plan"] != ""
        sent = s.upstream.bodies[0]
        assert sent["model"] == "real" and sent["user"] == "u1" and sent["response_format"] == {"type": "text"}
        assert "5 words" in str(sent["messages"])
        entry = next(iter(s.ledger.entries()))
        assert entry.account.startswith("gateway/default/alice/") and entry.spend.input == 12
        assert s.records[0].status == 200 and s.records[0].key_name == "alice"


async def test_a_stream_goes_through_chunk_by_chunk_and_hides_usage_that_was_not_asked(tmp_path: Path) -> None:
    async with serving(tmp_path) as s:
        events = await s.stream()
        assert events[-1] == "[DONE]"
        assert [e["choices"][0]["delta"].get("content") for e in events[:-2]] == ["It ", "is ", "Paris."]
        assert all(e["choices"] for e in events[:-1]) and all(e["system_fingerprint"] == "fp" for e in events[:-1])
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
        assert events[-2]["thrifty"]["spend"] == {"input": 12, "output": 3, "calls": 1}
        assert s.upstream.bodies[0]["stream_options"] == {"include_usage": True}
        told = await s.stream(stream_options={"include_usage": True})
        assert told[-2]["choices"] == [] and told[-2]["usage"]["total_tokens"] == 15


async def test_choices_and_prompts_are_calls_each(tmp_path: Path) -> None:
    async with serving(tmp_path) as s:
        status, data, _ = await s.post(n=3, seed=5)
        assert status == 200 and [c["index"] for c in data["choices"]] == [0, 1, 2]
        assert sorted(b["seed"] for b in s.upstream.bodies) == [5, 6, 7]
        assert data["usage"]["prompt_tokens"] == 36 and s.ledger.summary(by=())[0].entries == 3
        events = await s.stream(n=2)
        ended = [e["choices"][0]["index"] for e in events[:-1] if e["choices"][0]["finish_reason"]]
        assert sorted(ended) == [0, 1] and sum("thrifty" in e for e in events[:-1]) == 1


async def test_completions_keep_their_own_form(tmp_path: Path) -> None:
    data = {"upstreams": {"main": {"url": "http://127.0.0.1:1/v1", "kind": "completions"}}}
    upstream = Upstream()
    async with serving(tmp_path, upstream=upstream) as s:
        over = {"upstreams": {"main": {"url": upstream.url, "kind": "completions"}}}
        await s.gateway.reload(policy.of({**over, "models": {"fast": {"upstream": "main"}}}, tmp_path))
        status, body, _ = await s.post("/v1/completions", prompt=["a", "b"], echo=False)
        assert status == 200 and [c["text"] for c in body["choices"]] == ["It is Paris."] * 2
        assert sorted(b["prompt"] for b in upstream.bodies) == ["a", "b"]
        assert body["object"] == "text_completion" and upstream.bodies[0]["echo"] is False
        events = await s.stream("/v1/completions", prompt="a", messages=None)
        assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "It is Paris."
    assert data


async def test_without_a_valid_key_nothing_is_sent(tmp_path: Path) -> None:
    async with serving(tmp_path) as s:
        for secret in ("sk-thrifty-wrong", "x" * 500, "é"):
            status, data, _ = await s.post(secret=secret)
            assert status == 401 and data["error"]["code"] == "invalid_api_key"
        async with s.session.post(s.url + "/v1/chat/completions", data=b"{}") as response:
            assert response.status == 401
        s.gateway.keyring.change("alice", disabled=True)
        assert (await s.post())[0] == 401 and not s.upstream.bodies


async def test_a_key_uses_only_what_it_may(tmp_path: Path) -> None:
    models = {"fast": {"upstream": "main"}, "big": {"upstream": "other"}, "third": {"upstream": "main"}}
    ups = {"main": {"url": "http://127.0.0.1:1/v1"}, "other": {"url": "http://127.0.0.1:1/v1"}}
    over: dict[str, Any] = {"models": models, "upstreams": ups}
    async with serving(tmp_path, over, plans={"short": SHORT}) as s:
        s.gateway.keyring.change("alice", models=("fast", "big"), plans=("plain",), upstreams=("main",))
        assert (await s.post(model="third"))[0] == 404
        assert (await s.post(model="big"))[0] == 403
        assert (await s.post(plan="short"))[0] == 403
        assert (await s.post(plan="none"))[1]["error"]["code"] == "plan_not_found"
        async with s.session.get(s.url + "/v1/models", headers=s.head()) as response:
            assert [m["id"] for m in (await response.json())["data"]] == ["fast", "big"]
        async with s.session.get(s.url + "/v1/models/third", headers=s.head()) as response:
            assert response.status == 404


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n:"),
        ({"n": 1000}, "n:"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": [1]}, "stop"),
        ({"tools": {"a": 1}}, "tools"),
        ({"stream": "yes"}, "stream"),
        ({"model": 3}, "model"),
    ],
)
async def test_a_bad_field_is_named(tmp_path: Path, body: dict[str, Any], said: str) -> None:
    async with serving(tmp_path) as s:
        status, data, _ = await s.post(**body)
        assert status == 400 and said in data["error"]["message"] and not s.upstream.bodies


async def test_a_body_that_is_too_large_or_no_json_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, {"server": {"max_body": 2048}}) as s:
        assert (await s.post(user="x" * 4000))[0] == 413
        for body in (b"", b"[1]", b"{", b"\xff", b"[" * 2000):
            async with s.session.post(s.url + "/v1/chat/completions", data=body, headers=s.head()) as response:
                assert response.status == 400


@pytest.mark.parametrize(("given", "seen"), [(400, 400), (404, 404), (422, 422), (429, 429), (401, 502), (503, 503)])
async def test_an_upstreams_error_keeps_its_status(tmp_path: Path, given: int, seen: int) -> None:
    upstream = Upstream(status=given, headers={"Retry-After": "7"})
    async with serving(tmp_path, upstream=upstream) as s:
        status, data, headers = await s.post()
        assert status == seen and "the upstream says no" in data["error"]["message"]
        assert s.ledger.summary(by=()) == [] or not s.ledger.summary(by=())[0].spend
        if given == 429:
            assert headers["Retry-After"] == "7"


async def test_an_upstream_that_is_not_there_is_502(tmp_path: Path) -> None:
    over = {"upstreams": {"main": {"url": "http://127.0.0.1:1/v1", "retries": 0}}}
    async with serving(tmp_path, over) as s:
        assert (await s.post())[0] == 502


async def test_a_budget_for_exactly_n_calls_serves_n(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=("calls=20/day",)) as s:
        s.upstream.wait = 0.02
        statuses = [status for status, _, _ in await asyncio.gather(*(s.post() for _ in range(60)))]
        assert statuses.count(200) == 20 and statuses.count(429) == 40
        assert s.ledger.summary(by=())[0].spend.calls == 20 and len(s.upstream.bodies) == 20
        status, data, headers = await s.post()
        assert status == 429 and data["error"]["code"] == "budget_exceeded"
        assert "calls=20/day" in data["error"]["message"] and 0 < int(headers["Retry-After"]) <= 86400


async def test_max_tokens_comes_from_the_policy_and_never_passes_what_is_left(tmp_path: Path) -> None:
    over = {"models": {"fast": {"upstream": "main", "max_tokens": 100}}}
    async with serving(tmp_path, over, limits=("output=150/day",)) as s:
        s.upstream.usage = {"prompt_tokens": 12, "completion_tokens": 100, "total_tokens": 112}
        s.upstream.text = "word " * 100
        await s.post()
        status, data, _ = await s.post()
        assert [b["max_tokens"] for b in s.upstream.bodies] == [100, 50] and status == 200
        assert any(r["method"] == "budget" for r in data["thrifty"]["receipts"])


async def test_an_empty_budget_falls_to_the_cheaper_model(tmp_path: Path) -> None:
    models = {"fast": {"upstream": "main", "model": "real"}, "cheap": {"upstream": "main", "model": "small"}}
    prices = 'name = "p"\ndate = "2026-01-01"\n[models.real]\ninput = 1000\noutput = 1000\n'
    (tmp_path / "p.toml").write_text(prices + "[models.small]\ninput = 1\noutput = 1\n", encoding="utf-8")
    over = {"models": models, "prices": "p.toml"}
    async with serving(tmp_path, over, limits=("usd=0.02/day",), on_exceed="cheap") as s:
        models_sent = []
        for _ in range(3):
            status, data, _ = await s.post(max_tokens=4)
            assert status == 200
            models_sent.append(s.upstream.bodies[-1]["model"])
        assert models_sent == ["real", "small", "small"]
        assert any("answered instead" in r["reason"] for r in data["thrifty"]["receipts"])


async def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    key, _ = new_key("alice", limits=("calls=3/day",))
    for expected in (3, 0):
        with open_ledger(path) as book:
            async with serving(tmp_path, ledger=book, limits=key.limits) as s:
                statuses = [(await s.post())[0] for _ in range(4)]
                assert statuses.count(200) == expected


async def test_a_client_that_hangs_up_stops_its_upstream_and_pays_for_what_came(tmp_path: Path) -> None:
    async with serving(tmp_path, upstream=Upstream(text="word " * 200, pause=0.02)) as s:
        request = s.session.post(
            s.url + "/v1/chat/completions",
            json={"model": "fast", "messages": [{"role": "user", "content": "hi"}], "stream": True},
            headers=s.head(),
        )
        async with request as response:
            for _ in range(3):
                await response.content.readline()
            response.close()
        for _ in range(300):
            if s.upstream.gone and s.records:
                break
            await asyncio.sleep(0.01)
        entry = next(iter(s.ledger.entries()))
        assert s.upstream.gone == 1 and entry.status == "estimated" and 0 < entry.spend.output < 100
        assert not s.gateway.owners.state()["gateway"]["held"] and not s.gateway.running
        assert s.records[0].status in (200, 499)


async def test_a_reload_changes_limits_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as s:
        assert (await s.post())[0] == 200
        base = {"upstreams": {"main": {"url": s.upstream.url}}, "models": {"fast": {"upstream": "main"}}}
        await s.gateway.reload(policy.of({**base, "gateway": {"limits": ["calls=1/day"]}}, tmp_path))
        assert (await s.post())[0] == 429
        with pytest.raises(InvalidInput, match="unknown upstream"):
            await s.gateway.reload(policy.of({**base, "models": {"fast": {"upstream": "no"}}}, tmp_path))
        assert (await s.post())[0] == 429
        await s.gateway.reload(policy.of(base, tmp_path))
        assert (await s.post())[0] == 200


async def test_draining_refuses_new_requests_and_ends_the_old(tmp_path: Path) -> None:
    async with serving(tmp_path) as s:
        s.upstream.wait = 0.2
        running = asyncio.create_task(s.post())
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(s.gateway.drain(5))
        await asyncio.sleep(0)
        assert (await s.post())[0] == 503
        assert (await running)[0] == 200 and await draining


async def test_parallel_calls_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, parallel=2) as s:
        s.upstream.wait = 0.2
        statuses = [status for status, _, _ in await asyncio.gather(*(s.post() for _ in range(5)))]
        assert sorted(statuses) == [200, 200, 429, 429, 429]
