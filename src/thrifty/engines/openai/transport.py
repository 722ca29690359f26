"""Requests over HTTP: sessions, time-outs, pauses between retries, and errors without secrets.

One session serves one event loop; it is closed by `aclose`, or when its loop ends. Waiting follows the server: a
Retry-After, and rate-limit headers that say that nothing remains, pause the whole engine until then.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import math
import os
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import aiohttp
from yarl import URL

from thrifty.engines.openai.failure import Failure, of_status, one_line
from thrifty.errors import InvalidInput

T = TypeVar("T")
_MOST_BODY = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `connect`: until there is a connection; `first`: from then until the first byte of the answer, which
    includes queueing and prefill; `between`: between two pieces of a stream; `total`: one attempt. Without a stream the
    whole answer comes at once, and only `connect` and `total` hold."""

    connect: float = 10.0
    first: float = 300.0
    between: float = 120.0
    total: float = 1800.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InvalidInput(f"timeout {f.name} = {value!r}: a number of seconds above 0 is needed")


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and how long between: full jitter, uniform in [0, min(longest, base * 2^attempt)], and never less
    than the server asks for. A server that asks for more than `longest` seconds is not waited for."""

    most: int = 4
    base: float = 0.5
    longest: float = 60.0

    def __post_init__(self) -> None:
        if isinstance(self.most, bool) or not isinstance(self.most, int) or not 0 <= self.most <= 100:
            raise InvalidInput(f"max_retries = {self.most!r}: a whole number from 0 to 100 is needed")


class Secret:
    """Text that no repr, log or error shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "Secret(***)"

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not pickled")

    def reveal(self) -> str:
        """The text itself, for the request's header."""
        return self._text


def secret(api_key: str | None, api_key_env: str | None) -> Secret | None:
    """The API key as given or from the environment. Raises InvalidInput for a missing variable or an unusable key."""
    source = "api_key"
    if api_key is None and api_key_env is not None:
        source = f"environment variable {api_key_env}"
        api_key = os.environ.get(api_key_env)
        if not api_key:
            raise InvalidInput(f"{source} is not set: put the API key there")
    if api_key is None:
        return None
    key = api_key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise InvalidInput(f"{source} holds no usable key: one line of printable ASCII is needed")
    return Secret(key)


def base(url: str) -> URL:
    """The base URL, checked. Raises InvalidInput."""
    try:
        parsed = URL(url.strip())
        good = parsed.scheme in ("http", "https") and bool(parsed.host) and parsed.port is not None
    except (ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise InvalidInput("base_url: an address such as http://127.0.0.1:8000/v1 is needed")
    return parsed


@dataclass(slots=True)
class _Loop:
    """What belongs to one event loop."""

    session: aiohttp.ClientSession
    slots: asyncio.Semaphore
    keeper: AsyncGenerator[None, None]


@dataclass(slots=True)
class Transport:
    """Sends requests to one server."""

    url: URL
    key: Secret | None
    headers: Mapping[str, str]
    timeouts: Timeouts
    retries: Retries
    concurrency: int
    rng: random.Random
    model: str
    _loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = field(default_factory=WeakKeyDictionary, repr=False)
    _until: float = field(default=0.0, repr=False)

    @property
    def shown(self) -> str:
        """The address as errors show it: no user, password, query or fragment."""
        return str(self.url.with_user(None).with_query(None).with_fragment(None)).rstrip("/")

    def failed(self, path: str, what: str) -> str:
        """An error's line: the address, and what happened, without secrets."""
        return self._scrub(f"{self.shown}/{path} {what}")

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of `concurrency` places; held from before a call is held on its account until it is settled."""
        here = await self._here()
        async with here.slots:
            yield

    @asynccontextmanager
    async def request(
        self, path: str, body: bytes | None, *, until: float, streaming: bool = False
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to one request, when its status is 2xx. Raises Failure; `until` is a monotonic time."""
        here = await self._here()
        await self._pause(until)
        first = min(until, time.monotonic() + self.timeouts.connect + self.timeouts.first) if streaming else until
        address = self.url.with_user(None).with_path(f"{self.url.path.rstrip('/')}/{path}").with_query(self.url.query)
        send = here.session.request(
            "GET" if body is None else "POST", address, data=body, headers=self._headers(), allow_redirects=False
        )
        response = await within(send, first, "sent no answer")
        try:
            self._note(response.headers)
            if not 200 <= response.status < 300:
                said = await within(response.content.read(65536), until, "did not finish its error message")
                wait = retry_after(response.headers)
                raise of_status(response.status, said, response.content_type, self.model, self.key is not None, wait)
            yield response
        finally:
            if response.content.at_eof():
                response.release()
            else:
                response.close()  # a server stops generating when its client hangs up

    async def read(self, response: aiohttp.ClientResponse, until: float) -> bytes:
        """A whole body, bounded in size. Raises Failure; `lost` says how much had come."""
        pieces: list[bytes] = []
        size = 0
        while True:
            try:
                piece = await within(response.content.readany(), until, "did not finish its answer")
            except Failure as failure:
                failure.lost = size
                raise
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
            if size > _MOST_BODY:
                raise Failure(f"sent more than {_MOST_BODY:,} bytes; check that it is an OpenAI-compatible server")

    async def chunks(self, response: aiohttp.ClientResponse, until: float) -> AsyncIterator[bytes]:
        """The pieces of a stream as they come. Raises Failure."""
        limit = time.monotonic() + self.timeouts.first
        what, size = "sent no first piece of its stream", 0
        while True:
            piece = await within(response.content.readany(), min(until, limit), what)
            if not piece:
                return
            size += len(piece)
            if size > _MOST_BODY:
                raise Failure(f"sent more than {_MOST_BODY:,} bytes; check that it is an OpenAI-compatible server")
            yield piece
            limit, what = time.monotonic() + self.timeouts.between, "stopped in the middle of its stream"

    async def drain(self, response: aiohttp.ClientResponse) -> None:
        """Reads the end of a stream whose answer is complete, so that its connection can be used again."""
        with suppress(Failure):
            for _ in range(8):
                if not await within(response.content.readany(), time.monotonic() + 0.05, "did not end"):
                    return

    async def back_off(self, failure: Failure, attempt: int, until: float) -> bool:
        """Waits before the next attempt; False where there must be none."""
        if not failure.retry or attempt >= self.retries.most:
            return False
        pause = self.rng.uniform(0, min(self.retries.longest, self.retries.base * 2.0**attempt))
        if failure.wait is not None:
            if failure.wait > self.retries.longest:
                failure.message += (
                    f"; it asks to wait {failure.wait:,.0f} s, and more than {self.retries.longest:g} s is not waited"
                )
                return False
            # a little later than asked, and not all clients at once
            pause = failure.wait + pause * 0.1
        if time.monotonic() + pause >= until:
            failure.message += "; a retry would pass the deadline"
            return False
        await asyncio.sleep(pause)
        return True

    async def aclose(self) -> None:
        """Closes this loop's session, and those of loops that have ended. Idempotent."""
        here = self._loops.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here.keeper.aclose()

    # -- details -------------------------------------------------------------------------------------------------

    async def _here(self) -> _Loop:
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeouts.connect),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=True,
            )
            # a loop closes its async generators when it ends, so a session that nobody closed does not outlive it
            keeper = _keep_open(session)
            here = self._loops[loop] = _Loop(session, asyncio.Semaphore(self.concurrency), keeper)
            await anext(keeper)
        return here

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream", **self.headers}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key.reveal()}"
        elif self.url.user is not None:
            pair = f"{self.url.user}:{self.url.password or ''}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        return headers

    def _scrub(self, text: str) -> str:
        secrets = [self.key.reveal()] if self.key else []
        secrets += [self.url.password or "", *self.headers.values(), *self.url.query.values()]
        for hidden in secrets:
            if len(hidden) >= 6:
                text = text.replace(hidden, "***")
        return text

    def _note(self, headers: Mapping[str, str]) -> None:
        """Pauses the engine where the headers say that nothing remains of a rate."""
        for name in ("requests", "tokens"):
            left = headers.get(f"x-ratelimit-remaining-{name}")
            reset = seconds(headers.get(f"x-ratelimit-reset-{name}"))
            if left is not None and left.strip() in ("0", "0.0") and reset is not None:
                self._until = max(self._until, time.monotonic() + min(reset, self.retries.longest))

    async def _pause(self, until: float) -> None:
        while (left := self._until - time.monotonic()) > 0:
            if self._until >= until:
                raise Failure("has no rate left before the deadline; send less at once or wait")
            await asyncio.sleep(left)


async def within(step: Awaitable[T], until: float, what: str) -> T:
    """Awaits one step of a request until a monotonic time. Raises Failure for what goes wrong on the way."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(max(0.0, until - started)):
            return await step
    except (aiohttp.ConnectionTimeoutError, aiohttp.ServerTimeoutError) as error:
        why = "could not be connected to in time; check base_url and that the server runs"
        raise Failure(why, retry=True, timed_out=True) from error
    except TimeoutError as error:
        waited = time.monotonic() - started
        why = f"{what} in {waited:.3g} s; raise the time-out or check the server's load"
        raise Failure(why, timed_out=True) from error
    except aiohttp.ClientConnectorCertificateError as error:
        why = one_line(str(error.certificate_error), 160)
        raise Failure(f"has a certificate that does not verify ({why}); check base_url and SSL_CERT_FILE") from error
    except aiohttp.ClientConnectorError as error:
        why = one_line(str(error.os_error.strerror or error.os_error), 120)
        raise Failure(f"cannot be reached ({why}); check base_url and that the server runs", retry=True) from error
    except aiohttp.ClientPayloadError as error:
        raise Failure("cut its answer in the middle; see the server's log", retry=True) from error
    except (aiohttp.ClientConnectionError, ConnectionError) as error:
        raise Failure("closed the connection without an answer; see the server's log", retry=True) from error
    except aiohttp.ClientError as error:
        why = f"answered with something that is not HTTP ({one_line(str(error), 120)}); check base_url"
        raise Failure(why) from error


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that the headers ask to wait before a retry: Retry-After (seconds or a date), else retry-after-ms, else
    the reset of a rate of which nothing remains.

    >>> retry_after({"Retry-After": "2"})
    2.0
    """
    milliseconds = seconds(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    given = headers.get("Retry-After")
    if given is not None:
        plain = seconds(given)
        if plain is not None:
            return plain
        try:
            date = email.utils.parsedate_to_datetime(given)
        except ValueError:
            date = None
        if date is not None:
            date = date if date.tzinfo else date.replace(tzinfo=UTC)
            return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
    resets = [
        reset
        for name in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{name}", "").strip() in ("0", "0.0")
        and (reset := seconds(headers.get(f"x-ratelimit-reset-{name}"))) is not None
    ]
    return max(resets, default=None)


def seconds(text: str | None) -> float | None:
    """Seconds of a number or of a duration as rate-limit headers give it; None for anything else.

    >>> seconds("1.5"), seconds("6m0s"), seconds("20ms"), seconds("soon")
    (1.5, 360.0, 0.02, None)
    """
    if text is None:
        return None
    text = text.strip()
    if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text):
        value = float(text)
        # some servers give the moment itself
        return max(0.0, value - time.time()) if value > 1e9 else value
    parts = re.findall(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)", text)
    if not parts or "".join(n + u for n, u in parts) != text:
        return None
    unit = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return math.fsum(float(n) * unit[u] for n, u in parts)


async def _keep_open(session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await session.close()
