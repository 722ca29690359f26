"""What the callers and the model's thread say to each other: leave to draw, and that something has ended.

A `Told` is called from the model's thread; whoever waits does so in an event loop of its own, which may be closed by
then: nobody hears it, and that is no error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from thrifty.engines.local.branch import LocalBranch
    from thrifty.policy import Probe

Told: TypeAlias = Callable[["BaseException | None"], None]
"""Hears the end of something: None, or what went wrong."""


class Turn:
    """Leave for one branch to draw `left` tokens. `told` hears the end, or what went wrong; `each` every token.

    With a `job` that is done instead, once; a Probe that it returns is run before the end is told."""

    __slots__ = ("branch", "left", "told", "each", "job", "probe", "over", "running")

    def __init__(
        self,
        branch: LocalBranch,
        left: int,
        told: Told,
        each: Callable[[], None] | None = None,
        job: Callable[[], Probe | None] | None = None,
    ) -> None:
        self.branch, self.left, self.told, self.each, self.job = branch, left, told, each, job
        self.probe: Probe | None = None
        """while one runs, this turn waits for it"""
        self.over = False
        self.running = False
        """the step under way reads or draws for it"""


async def told(start: Callable[[Told], None]) -> None:
    """Waits in the running loop until what `start` began tells its end; raises what it tells."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def resolve(error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    start(lambda error: call_in(loop, lambda: resolve(error)))
    await future


def together(n: int, tell: Told) -> Told:
    """A Told for n ends: the last one tells, with the first error."""
    left = n
    first: list[BaseException] = []
    lock = threading.Lock()

    def one(error: BaseException | None) -> None:
        nonlocal left
        with lock:
            left -= 1
            if error is not None:
                first.append(error)
            last = left == 0
        if last:
            tell(first[0] if first else None)

    return one


def call_in(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    """Calls something in a loop of another thread, unless the loop is closed."""
    with suppress(RuntimeError):  # the only way to learn, without a race, that it is closed
        loop.call_soon_threadsafe(what)
