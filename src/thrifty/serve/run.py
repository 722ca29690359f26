"""Runs the gateway: opens what the policy names, serves until SIGTERM, drains; SIGHUP reads the policy again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from thrifty.errors import InvalidInput, ThriftyError
from thrifty.ledger import open_ledger
from thrifty.serve.app import application
from thrifty.serve.gateway import Gateway
from thrifty.serve.keys import Keyring
from thrifty.serve.policy import Loaded, load
from thrifty.serve.state import open_keys

REFRESH_SECONDS = 1.0
"""How often changed keys are looked for."""

log = logging.getLogger("thrifty.serve")


def run(policy: Path, host: str | None = None, port: int | None = None, check: bool = False) -> None:
    """Serves by a policy file until a signal ends it. Raises InvalidInput for a policy that cannot be used."""
    try:
        import uvicorn
    except ImportError as error:
        raise InvalidInput("thrifty serve needs its extra: pip install 'thrifty[serve]'") from error
    loaded = load(policy)
    if check:
        print(f"{policy}: {len(loaded.policy.models)} models, {len(loaded.plans)} plans, no errors", file=sys.stderr)
        return
    server = loaded.policy.server
    ledger = open_ledger(loaded.path(server.ledger), durability=server.durability)
    keys = open_keys(loaded)
    gateway = Gateway(loaded, Keyring(keys), ledger)
    config = uvicorn.Config(
        application(gateway),
        host=host or server.host,
        port=server.port if port is None else port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(server.drain) + 1,
        backlog=4096,
    )
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(uvicorn.Server(config), gateway, policy))
    finally:
        ledger.close()


async def _serve(server: object, gateway: Gateway, policy: Path) -> None:
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(_refresh(gateway))]
    with contextlib.suppress(NotImplementedError, AttributeError):  # no SIGHUP on Windows
        loop.add_signal_handler(signal.SIGHUP, lambda: tasks.append(asyncio.create_task(reload(gateway, policy))))
    try:
        await server.serve()  # type: ignore[attr-defined]
        await gateway.drain(gateway.loaded.policy.server.drain)
    finally:
        for task in tasks:
            task.cancel()
        await gateway.aclose()


async def reload(gateway: Gateway, policy: Path) -> bool:
    """Takes the policy file's present text; on an error the old policy stays. Whether it was taken."""
    try:
        loaded: Loaded = await asyncio.to_thread(load, policy)
        await gateway.reload(loaded)
    except ThriftyError as error:
        log.error("the policy was not taken: %s", error)
        return False
    log.warning("the policy was read again: %s", policy)
    return True


async def _refresh(gateway: Gateway) -> None:
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        try:
            gateway.keyring.refresh()
        except Exception as error:
            log.error("keys cannot be read: %s", error)
