"""Two processes on one socket: requests, replies in parts, and what needs no reply.

A frame is four bytes of length and a JSON object; nothing is pickled. Each side has a thread that reads, so a
request that waits for the other side never keeps this side from serving. When the other side has gone, whatever
waits raises LinkLost, and `on_end` is called once, after all that had arrived was served."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from typing import Any

from thrifty.bench.faults import error_of, fault_of
from thrifty.errors import ThriftyError

_LENGTH = struct.Struct(">I")


class LinkLost(ThriftyError):
    """The process at the other end has gone."""


class Reply:
    """What a served request is answered with: any number of parts, then an end or an error."""

    def __init__(self, link: Link, number: int | None) -> None:
        self._link, self._number = link, number

    def part(self, value: Any) -> None:
        """One part of a reply that comes in parts."""
        self._send({"part": value})

    def end(self, value: Any = None) -> None:
        """The reply, or the end of its parts."""
        self._send({"end": value})

    def fail(self, error: BaseException) -> None:
        """An error instead of the reply."""
        self._send({"fault": fault_of(error)})

    def _send(self, body: dict[str, Any]) -> None:
        if self._number is not None:
            with contextlib.suppress(LinkLost):  # nobody waits for it any more
                self._link._send({"re": self._number, **body})


Serve = Callable[[str, Mapping[str, Any], Reply], None]
"""Serves one request; runs on the reading thread, so it must not wait for the other side."""


class Link:
    """One end of the socket. `start` begins to read."""

    def __init__(self, end: socket.socket, serve: Serve, on_end: Callable[[], None]) -> None:
        self._socket, self._serve, self._on_end = end, serve, on_end
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of what is pending
        self._writing = threading.Lock()
        self._pending: dict[int, Callable[[Mapping[str, Any] | None], None]] = {}
        self._lost = False
        self._reader = threading.Thread(target=self._read, name="thrifty-link", daemon=True)

    def start(self) -> None:
        """Begins to read."""
        self._reader.start()

    @property
    def lost(self) -> bool:
        """Whether the other side has gone."""
        return self._lost

    def request(self, do: str, **args: Any) -> Future[Any]:
        """Asks the other side. The future has its reply, its error, or LinkLost."""
        reply: Future[Any] = Future()

        def take(body: Mapping[str, Any] | None) -> None:
            if body is None:
                reply.set_exception(LinkLost("the process at the other end has gone"))
            elif "fault" in body:
                reply.set_exception(error_of(body["fault"]))
            else:
                reply.set_result(body.get("end"))

        reply.set_running_or_notify_cancel()  # who gives up waiting cancels nothing on the other side
        self._ask(do, args, take)
        return reply

    async def stream(self, do: str, **args: Any) -> AsyncGenerator[Any, None]:
        """Asks the other side, and gives the parts of its reply. Raises its error, or LinkLost."""
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()

        def take(body: Mapping[str, Any] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(parts.put_nowait, body)

        self._ask(do, args, take)
        while True:
            body = await parts.get()
            if body is None:
                raise LinkLost("the process at the other end has gone")
            if "fault" in body:
                raise error_of(body["fault"])
            if "part" not in body:
                return
            yield body["part"]

    def notify(self, do: str, **args: Any) -> None:
        """Tells the other side; there is no reply. Raises LinkLost."""
        self._send({"do": do, "args": args})

    def close(self) -> None:
        """Ends the link; the other side sees it. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._reader.is_alive() and self._reader is not threading.current_thread():
            self._reader.join()

    # -- details ---------------------------------------------------------------------------------------------

    def _ask(self, do: str, args: Mapping[str, Any], take: Callable[[Mapping[str, Any] | None], None]) -> None:
        number = next(self._numbers)
        with self._lock:
            if not self._lost:
                self._pending[number] = take
        if self._lost:
            take(None)
            return
        with contextlib.suppress(LinkLost):  # the reading thread sees the end too, and tells all who wait
            self._send({"id": number, "do": do, "args": dict(args)})

    def _send(self, body: Mapping[str, Any]) -> None:
        data = json.dumps(body, separators=(",", ":")).encode()
        try:
            with self._writing:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LinkLost("the process at the other end has gone") from error

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as stream:
                while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                    size = _LENGTH.unpack(head)[0]
                    data = stream.read(size)
                    if len(data) < size:
                        break
                    self._take(json.loads(data))
        except OSError:
            pass  # the other side's end, told as a reset
        finally:
            with self._lock:
                self._lost = True
                waiting = list(self._pending.values())
                self._pending.clear()
            with contextlib.suppress(OSError):
                self._socket.close()
            try:
                self._on_end()
            finally:
                for take in waiting:
                    take(None)

    def _take(self, body: Mapping[str, Any]) -> None:
        if "re" in body:
            with self._lock:
                number = body["re"]
                take = self._pending.get(number) if "part" in body else self._pending.pop(number, None)
            if take is not None:
                take(body)
            return
        reply = Reply(self, body.get("id"))
        try:
            self._serve(body["do"], body["args"], reply)
        except Exception as error:  # the other side asked for it, so it is told
            reply.fail(error)
