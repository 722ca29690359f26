"""Server-sent events: bytes in, the `data` of each event out.

Lines may end in LF, CRLF or CR, may be cut anywhere between two chunks, and may hold bad UTF-8, which is replaced by
U+FFFD. Comments (keep-alives) and fields other than `data` are skipped. The size of one event is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_EVENT = 16 * 2**20
"""Bytes of one event; a larger one is refused."""


class EventTooLarge(ValueError):
    """One event passed the bound."""


class Events:
    """An incremental parser: `feed` chunks, and iterate over what is complete.

    >>> events = Events()
    >>> list(events.feed(b"data: 1\\r\\n\\r\\n: ping\\n\\ndata: 2"))
    ['1']
    >>> list(events.finish())
    ['2']
    """

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self._limit = limit
        self._line: list[bytes] = []
        self._size = 0
        self._data: list[str] = []
        self._after_cr = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of every event that this chunk completes. Raises EventTooLarge."""
        if not chunk:
            return
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        # bytes.splitlines knows exactly the three line ends that the standard allows
        for line in chunk.splitlines(keepends=True):
            whole = line.endswith((b"\n", b"\r"))
            body = line.rstrip(b"\r\n") if whole else line
            self._size += len(body)
            if self._size > self._limit:
                raise EventTooLarge(f"one event is larger than {self._limit:,} bytes")
            self._line.append(body)
            if whole:
                full = b"".join(self._line)
                self._line.clear()
                yield from self._take(full)

    def finish(self) -> Iterator[str]:
        """What is left when the stream has ended: servers leave out the last empty line."""
        rest = b"".join(self._line)
        self._line.clear()
        if rest:
            yield from self._take(rest)
        yield from self._take(b"")

    def _take(self, line: bytes) -> Iterator[str]:
        if not line:
            self._size = 0
            if self._data:
                data = "\n".join(self._data)
                self._data.clear()
                yield data
        elif line.startswith(b"data"):
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" ").decode("utf-8", errors="replace"))
        if not self._data:
            self._size = 0
