"""Live progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from thrifty.bench.store import Result

LINE_SECONDS = 10.0
"""Time between two plain lines."""


class Watcher(Protocol):
    """What a run tells about itself."""

    def begin(self, suite: str, total: int, resumed: int) -> None:
        """A suite starts; `resumed` of `total` results are there already."""

    def update(self, result: Result) -> None:
        """One result more."""

    def end(self) -> None:
        """The suite is over, or was cut."""


class Silent:
    """Tells nothing."""

    def begin(self, suite: str, total: int, resumed: int) -> None:
        """Nothing."""

    def update(self, result: Result) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Live:
    """Done and total, tokens paid so far, seconds left. Use it as a context manager, or call `end`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._suite, self._total, self._resumed = "", 0, 0
        self._done = self._tokens = self._failed = 0
        self._started = self._told = 0.0

    def begin(self, suite: str, total: int, resumed: int) -> None:
        """See `Watcher`."""
        self._suite, self._total, self._resumed = suite, total, resumed
        self._done = self._tokens = self._failed = 0
        self._started = self._told = time.monotonic()
        if resumed:
            self.console.print(f"{suite}: resumed {resumed} of {total}", highlight=False)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[tokens]:,} tokens"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self.console,
            )
            self._task = self._bar.add_task(suite, total=total, completed=resumed, tokens=0)
            self._bar.start()

    def update(self, result: Result) -> None:
        """See `Watcher`."""
        self._done += 1
        self._failed += result.score is None
        self._tokens += result.incurred.tokens
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, tokens=self._tokens)
        elif now - self._told >= LINE_SECONDS or self._resumed + self._done == self._total:
            self._told = now
            self.console.print(self.line(now), highlight=False)

    def line(self, now: float) -> str:
        """The plain form."""
        done = self._resumed + self._done
        left = (self._total - done) * (now - self._started) / max(1, self._done)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._suite}: {done} of {self._total}{failed}, {self._tokens:,} tokens, {left:.0f} s left"

    def end(self) -> None:
        """See `Watcher`."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.end()
