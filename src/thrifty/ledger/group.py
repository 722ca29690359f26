"""Group commit: many appends, one transaction, one writer thread.

`add` puts an item into the open group and returns the group's ticket; it never waits for the disk. The writer thread
takes the open group, commits it, and finishes its ticket. While it commits, the next group fills, so groups grow with
the load. Items are committed in the order in which they were added.

Only when `most` items wait does `add` block, until the writer has taken them: memory stays bounded, and a coroutine
that outruns the disk stops its event loop for that moment.

A failed commit loses nothing. Its tickets raise LedgerError, its items stay, and the next commit tries them again
before its own. Holds that a failed group was to open are dropped: their callers have the error and start no call.
(So is the closing of orphans: whoever asked for it has the error.)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from thrifty.errors import LedgerError


class GroupTicket:
    """The promise that one group will be committed; shared by all that is in it."""

    __slots__ = ("_error", "_event", "_finished", "_lock", "_waiting")

    def __init__(self) -> None:
        self._finished = False
        self._error: BaseException | None = None
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}

    def wait(self) -> None:
        """Blocks until the commit. Raises LedgerError when it failed."""
        self._event.wait()
        if self._error is not None:
            raise _failure(self._error)

    def done(self) -> asyncio.Future[None]:
        """`wait` for coroutines: a future of the running loop. Each caller has its own, so cancelling one harms no
        other."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        waiting = self._waiting.get(loop)
        if waiting is None:
            with self._lock:
                waiting = self._waiting.setdefault(loop, [])
        waiting.append(future)
        if self._finished:  # `finish` sets this before it looks at the list: one of the two sees the other
            self._resolve([future])
        return future

    def finish(self, error: BaseException | None = None) -> None:
        """Wakes all who wait: threads by the event, each event loop by one callback."""
        self._error = error
        self._finished = True
        with self._lock:
            waiting = list(self._waiting.items())
        self._event.set()
        for loop, futures in waiting:
            try:
                loop.call_soon_threadsafe(self._resolve, futures)
            except RuntimeError:  # the loop was closed: nobody waits on it any more
                continue

    def _resolve(self, futures: list[asyncio.Future[None]]) -> None:
        """Runs on the futures' own loop."""
        error = self._error
        for future in futures:
            if future.done():  # cancelled
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(_failure(error))


def _failure(cause: BaseException) -> LedgerError:
    error = LedgerError(f"not committed yet, kept for the next commit: {cause}")
    error.__cause__ = cause
    return error


@dataclass(slots=True)
class Orphans:
    """Chains of dead writers whose holds are to be closed, and afterwards how many holds that were."""

    chains: list[int]
    found: int = 0


@dataclass(slots=True)
class Group:
    """What one transaction writes."""

    ticket: GroupTicket = field(default_factory=GroupTicket)
    entries: list[tuple[Any, bytes]] = field(default_factory=list)
    opened: list[tuple[str, str]] = field(default_factory=list)
    """holds to write: identifier and record"""
    closed: list[str] = field(default_factory=list)
    """holds to remove"""
    orphans: list[Orphans] = field(default_factory=list)
    flush: bool = False
    """commit even if it is empty: an earlier failure may have left something"""
    last: bool = False
    """the last one before the ledger closes"""

    def __bool__(self) -> bool:
        return bool(self.entries or self.opened or self.closed or self.orphans or self.flush)


class GroupWriter:
    """The open group and the thread that commits. `commit(group)` raises when nothing of it was committed."""

    def __init__(self, commit: Callable[[Group], None], most: int) -> None:
        self._commit = commit
        self._most = most
        self._refusal: str | None = None
        self._lock = threading.Lock()
        self._space = threading.Condition(self._lock)
        self._signal = threading.Lock()  # released to wake the writer
        self._signal.acquire()
        self._idle = True
        self._closing = False
        self._group = Group()
        self._failed = Group()
        self._thread = threading.Thread(target=self._run, name="thrifty-ledger", daemon=True)
        self._thread.start()

    def add(self, item: tuple[Any, bytes], hold: str | None) -> GroupTicket:
        """Queues an entry, and the removal of the hold it came from. Raises LedgerError after `close`."""
        self.check()  # before the lock: a forked child's copy of it may never be released
        with self._lock:
            group = self._group
            if self._refusal is not None or len(group.entries) >= self._most or self._failed.entries:
                group = self._room()
            group.entries.append(item)
            if hold is not None:
                group.closed.append(hold)
            if self._idle:
                self._idle = False
                self._signal.release()
            return group.ticket

    def open_hold(self, hold: str, record: str) -> GroupTicket:
        """Queues a hold to be written."""
        return self._put(lambda group: group.opened.append((hold, record)))

    def drop_hold(self, hold: str) -> GroupTicket:
        """Queues the removal of a hold."""
        return self._put(lambda group: group.closed.append(hold))

    def close_orphans(self, orphans: Orphans) -> GroupTicket:
        """Queues the closing of dead writers' holds."""
        return self._put(lambda group: group.orphans.append(orphans))

    def flush(self) -> GroupTicket:
        """A ticket for all that was queued so far, what an earlier commit left included."""

        def force(group: Group) -> None:
            group.flush = True

        return self._put(force, anyway=True)

    def unsaved(self) -> list[tuple[Any, bytes]]:
        """The entries of failed commits, oldest first."""
        with self._lock:
            return list(self._failed.entries)

    def check(self) -> None:
        """Raises LedgerError when nothing may be added any more."""
        if self._refusal is not None:
            raise LedgerError(self._refusal)

    def close(self, refusal: str) -> None:
        """Commits what is queued and ends the thread; later calls of `add` raise LedgerError(refusal)."""
        with self._lock:
            if self._refusal is None:
                self._refusal = refusal
                self._closing = True
                self._space.notify_all()
                if self._idle:
                    self._idle = False
                    self._signal.release()
        self._thread.join()

    def abandon(self, refusal: str) -> None:
        """Refuses all further use at once, without a lock: for the child of a fork, where the thread is gone."""
        self._refusal = refusal

    # -- details -------------------------------------------------------------------------------------------------

    def _put(self, change: Callable[[Group], None], *, anyway: bool = False) -> GroupTicket:
        self.check()
        with self._lock:
            if anyway:
                self.check()
            group = self._group if anyway else self._room()
            change(group)
            if self._idle:
                self._idle = False
                self._signal.release()
            return group.ticket

    def _room(self) -> Group:
        """The open group, once it has room. Runs under the lock, which it gives up while it waits."""
        while True:
            self.check()
            group = self._group
            if len(self._failed.entries) >= self._most:
                raise LedgerError(
                    f"{len(self._failed.entries):,} entries could not be committed and no more are kept: "
                    "repair the disk and flush, or save what unsaved() gives"
                )
            if len(group.entries) + len(group.opened) + len(group.closed) < self._most:
                return group
            self._space.wait()

    def _run(self) -> None:
        closing = False
        while not closing:
            self._signal.acquire()
            while True:
                with self._lock:
                    group, closing = self._group, self._closing
                    if not group and not closing:
                        self._idle = True
                        break
                    group.last = closing
                    self._group = Group()
                    self._space.notify_all()
                self._write(group)
                if closing:
                    break

    def _write(self, group: Group) -> None:
        failed = self._failed
        whole = Group(
            group.ticket,
            failed.entries + group.entries if failed.entries else group.entries,
            group.opened,
            failed.closed + group.closed if failed.closed else group.closed,
            group.orphans,
            group.flush,
            group.last,
        )
        try:
            self._commit(whole)
        except BaseException as error:  # whatever it was, those who wait must hear of it
            with self._lock:
                self._failed = Group(entries=whole.entries, closed=whole.closed)
            group.ticket.finish(error)
        else:
            if failed.entries or failed.closed:
                with self._lock:
                    self._failed = Group()
            group.ticket.finish()
