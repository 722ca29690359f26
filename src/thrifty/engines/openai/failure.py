"""What can go wrong with a server, each told in one line: the URL without secrets, what happened, what to do."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
"""HTTP statuses after which the same request may succeed."""

_CONTEXT = re.compile(
    r"context.{0,20}(length|size|window)|maximum.{0,20}tokens|too many tokens|prompt is too long", re.I
)
_NEVER = re.compile(r"not supported|unsupported|not implemented|insufficient_quota|exceeded your current quota", re.I)


@dataclass
class Failure(Exception):
    """One failed attempt: what happened, whether the same request may succeed, the seconds that the server asks to
    wait, the HTTP status where there was one, how many bytes of an answer had come, and whether we gave up waiting."""

    message: str
    retry: bool = False
    wait: float | None = None
    status: int | None = None
    lost: int = 0
    timed_out: bool = False

    def __str__(self) -> str:
        return self.message


def of_status(status: int, body: bytes, content_type: str, model: str, has_key: bool, wait: float | None) -> Failure:
    """The failure that an HTTP status other than 2xx means; the URL is put before it by the transport."""
    said = explain(body, content_type)
    tail = f": {said}" if said else ""
    retry = status in RETRIED and not _NEVER.search(said)
    if status in (401, 403):
        do = "check the key" if has_key else "give api_key or api_key_env"
        text = f"refused the API key (HTTP {status}){tail}; {do}"
    elif status == 404:
        text = (
            f"knows no such path or model (HTTP 404){tail}; check model {model!r} (models() lists what the server has) "
            "and that base_url ends as the server wants it, most often in /v1"
        )
    elif status in (400, 413, 422) and _CONTEXT.search(said):
        text = (
            f"has too small a context for this prompt (HTTP {status}){tail}; shorten the prompt (a context method), "
            "lower max_tokens, or use a model with a longer context"
        )
    elif status == 429:
        do = "send less at once (concurrency) or wait" if retry else "raise the quota at the provider"
        text = f"limits the rate (HTTP 429){tail}; {do}"
    elif 300 <= status < 400:
        text = f"redirects elsewhere (HTTP {status}){tail}; put the final address into base_url"
    elif status >= 500:
        text = f"failed (HTTP {status}){tail}; see the server's log"
    else:
        text = f"refused the request (HTTP {status}){tail}; correct the request"
    return Failure(text, retry, wait, status=status)


def of_error(error: Any, where: str) -> Failure:
    """The failure that an error object in a 2xx answer means."""
    said = _told(error)
    code = error.get("code", error.get("status")) if isinstance(error, Mapping) else None
    status = int(code) if isinstance(code, (int, str)) and str(code).isdigit() and len(str(code)) == 3 else None
    retry = status in RETRIED and not _NEVER.search(said)
    return Failure(
        f"reported an error {where}: {said or 'without a message'}; see the server's log", retry, status=status
    )


def explain(body: bytes, content_type: str) -> str:
    """What an error body says, on one line of at most 300 characters."""
    text = body[:65536].decode("utf-8", errors="replace").strip()
    if "html" in content_type or text[:1] == "<":
        title = re.search(r"(?is)<title[^>]*>(.*?)</title>", text)
        said = html.unescape(title.group(1)).strip() if title else ""
        return one_line(f"an HTML page{f' titled {said!r}' if said else ''}, as a proxy or a web site sends it")
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError:
        return one_line(text)
    if isinstance(data, Mapping):
        return one_line(_told(data.get("error", data)))
    return one_line(text)


def one_line(text: str, most: int = 300) -> str:
    """Without line breaks and control characters, cut at `most` characters."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def _told(error: Any) -> str:
    if isinstance(error, Mapping):
        said = error.get("message", error.get("detail", ""))
        kind = error.get("code") if isinstance(error.get("code"), str) else error.get("type")
        said = said if isinstance(said, str) else orjson.dumps(said, default=str).decode()
        return f"{said} ({kind})" if isinstance(kind, str) and kind and kind not in said else said
    return error if isinstance(error, str) else orjson.dumps(error, default=str).decode()
