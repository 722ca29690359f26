"""What is known of one request: for logs, metrics, traces, the dashboard and the request log."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from thrifty.call import Receipt
from thrifty.spend import Spend, Work


@dataclass(slots=True)
class Record:
    """One request from its arrival on; fields are filled in as it goes. Times: Unix seconds; durations: seconds."""

    endpoint: str
    """chat, completions, embeddings, responses"""
    id: str = field(default_factory=lambda: f"req-{secrets.token_hex(8)}")
    at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.perf_counter)
    key: str = ""
    """the key's id"""
    key_name: str = ""
    team: str = ""
    alias: str = ""
    """the model as the client named it"""
    model: str = ""
    """the upstream's name of the model that answered"""
    upstream: str = ""
    plan: str = ""
    """the plan's name in the policy"""
    plan_hash: str = ""
    arm: str = ""
    """`reference` where shadowing chose the reference plan, `plan` where it could have, else empty"""
    stream: bool = False
    status: int = 0
    error: str = ""
    finish: str = ""
    estimated: bool = False
    spend: Spend = Spend()
    work: Work = Work()
    receipts: tuple[Receipt, ...] = ()
    first: float | None = None
    """until the first byte of the answer was sent"""
    seconds: float = 0.0
    upstream_seconds: float = 0.0
    output_chunks: int = 0
    prompt: Any = None
    """messages and answer, kept only where the policy says log_text"""
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without texts; empty fields left out."""
        named = ("id", "endpoint", "at", "key", "key_name", "team", "alias", "model", "upstream", "plan", "plan_hash")
        data: dict[str, Any] = {name: getattr(self, name) for name in named}
        data |= {"arm": self.arm, "stream": self.stream, "status": self.status, "error": self.error}
        data |= {"finish": self.finish, "estimated": self.estimated, "spend": self.spend.to_dict()}
        data |= {"work": self.work.to_dict(), "receipts": [r.to_dict() for r in self.receipts]}
        data |= {"first": self.first, "seconds": self.seconds, "upstream_seconds": self.upstream_seconds}
        return {k: v for k, v in data.items() if v not in ("", None, (), [], {}) or k in ("status", "spend")}


class Observer(Protocol):
    """Is told of requests on the event loop. Its calls are quick and never raise."""

    def started(self, record: Record) -> None:
        """A request has been admitted."""

    def first(self, record: Record) -> None:
        """The first byte of its answer was sent."""

    def finished(self, record: Record) -> None:
        """It is over, answered or not; also for requests that were refused."""


class Observers:
    """Several observers as one; a failing one is dropped with a line in the log and harms no request."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self.all = list(observers)

    def started(self, record: Record) -> None:
        for observer in tuple(self.all):
            self._tell(observer, "started", record)

    def first(self, record: Record) -> None:
        for observer in tuple(self.all):
            self._tell(observer, "first", record)

    def finished(self, record: Record) -> None:
        record.seconds = time.perf_counter() - record.began
        for observer in tuple(self.all):
            self._tell(observer, "finished", record)

    def _tell(self, observer: Observer, what: str, record: Record) -> None:
        try:
            getattr(observer, what)(record)
        except Exception:
            import logging

            logging.getLogger("thrifty.serve").exception("%s failed and is not told again", type(observer).__name__)
            self.all.remove(observer)
