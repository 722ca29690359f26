"""Two servers for the openai engine: a stub that misbehaves on demand, and llama.cpp with SmolLM2, which is real."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from stub_server import Bank, Ear, Stub

from thrifty.budget import Account, Budget
from thrifty.engines.openai import OpenAIEngine
from thrifty.ledger import MemoryLedger


@pytest.fixture
async def stub() -> AsyncIterator[Stub]:
    """A stub server on a free port of 127.0.0.1."""
    server = Stub("")
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield server
    await runner.cleanup()


@pytest.fixture
def bank() -> Callable[..., Bank]:
    """Makes accounts with limits; each is checked when the test ends."""
    made: list[Bank] = []

    def make(**limits: Any) -> Bank:
        ledger = MemoryLedger()
        made.append(Bank(Account("test", Budget(**limits), ledger=ledger), ledger))
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        one.check()


@pytest.fixture
async def engine(stub: Stub) -> AsyncIterator[Callable[..., OpenAIEngine]]:
    """Makes engines for the stub, which retry fast; all are closed."""
    made: list[OpenAIEngine] = []

    def make(**settings: Any) -> OpenAIEngine:
        given = {"retry_base": 0.001, "longest_wait": 2.0, "max_retries": 2, "rng": random.Random(0), **settings}
        made.append(OpenAIEngine(given.pop("base_url", stub.url), given.pop("model", "m"), **given))
        return made[-1]

    yield make
    for one in made:
        await one.aclose()


@pytest.fixture
def ear() -> Ear:
    return Ear()


_SERVE = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames = ["127.0.0.1"]
params.port, params.n_ctx, params.n_parallel = 0, 4096, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.warmup = False
if sys.argv[2] == "embeddings":
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
print("LISTENING", server.listening_address, flush=True)
sys.stdin.read()  # until the parent closes it, or is gone
"""


def _serve(mode: str) -> Iterator[str]:
    pytest.importorskip("xllamacpp")
    from thrifty.engines.local.embedded import gguf_path
    from thrifty.errors import ThriftyError

    try:
        gguf = gguf_path("smollm2")
    except ThriftyError as error:
        pytest.skip(f"{error}")
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(gguf), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = ""
        for line in process.stdout:
            if line.startswith("LISTENING"):
                break
        assert line.startswith("LISTENING"), f"llama.cpp did not start: exit {process.poll()}, last line {line!r}"
        yield line.split()[1] + "/v1"
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def llama_server() -> Iterator[str]:
    """The base URL of a llama.cpp server with SmolLM2-135M-Instruct, two slots of 2,048 tokens."""
    yield from _serve("chat")


@pytest.fixture(scope="session")
def llama_embedder() -> Iterator[str]:
    """The same model as an embedder (mean pooling)."""
    yield from _serve("embeddings")
