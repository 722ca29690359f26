"""Run untrusted Python, such as code that a model wrote, in a subprocess that can do no harm.

    outcome = await run("print(sum(range(10)))")
    outcome.status                                   # "passed"

What holds, for root and for ordinary users alike:

- no network, not even loopback; no files but the system's programs and the interpreter, read-only; an empty
  environment
- one folder to write, home and working folder at once, in memory, bounded, gone afterwards
- limits on processor time, wall time, memory, file size, open files and processes, inherited by children
- nothing that the program started is alive when `run` returns; its output is bounded

It takes Linux namespaces. Where the machine grants none, `run` refuses with one line that says what is
missing, unless `unsafe=True`: then limits, the empty environment and the folder still hold, but files and
network are open to the program. The kernel itself is the boundary: against a program that exploits a fault of
the kernel, use a machine of its own. Memory and processor time are limited for each process, so a run takes
at most `processes` times as much.

An exit code of 0 says that the program ended, not that it did what was asked: see `scorers.Code` for how
tests prove that they ran to their end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from thrifty.errors import InvalidInput

Status = Literal["passed", "failed", "timeout", "memory", "refused"]

MAX_SOURCE = 4 << 20  # bytes of program and input; larger is refused


@dataclass(frozen=True)
class Limits:
    """What one run may take. Times in seconds, sizes in bytes; memory and processor time are for each process."""

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    processes: int = 8
    open_files: int = 64
    output_bytes: int = 64 << 10

    def __post_init__(self) -> None:
        for name, low, high in (
            ("cpu_seconds", 1, 86_400),
            ("wall_seconds", 0.05, 86_400),
            ("memory_bytes", 32 << 20, 1 << 40),
            ("file_bytes", 1, 1 << 40),
            ("disk_bytes", 1 << 20, 1 << 40),
            ("processes", 1, 4096),
            ("open_files", 8, 4096),
            ("output_bytes", 256, 64 << 20),
        ):
            value = getattr(self, name)
            whole = name == "wall_seconds" or isinstance(value, int)
            if isinstance(value, bool) or not whole or not low <= value <= high:
                kind = "a number" if name == "wall_seconds" else "a whole number"
                raise InvalidInput(f"sandbox limit {name} is {value!r}: give {kind} from {low:,} to {high:,}")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `exit_code` is negative for a signal and None where the program never ran or was
    killed by us.

    `passed` is exit code 0 and `failed` any other; `timeout` is either clock; `memory` is a MemoryError or a
    kill that was not ours; `refused` ran nothing, and `reason` says why. `seconds` is wall time. Output over
    its bound keeps its beginning and its end. `isolated` is False only under `unsafe=True` on a machine
    without namespaces.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    seconds: float = 0.0
    isolated: bool = True
    reason: str = ""


async def run(
    source: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    readable: Iterable[str | Path] = (),
    unsafe: bool = False,
) -> Outcome:
    """Run the Python program `source` and say how it ended. Cancelling ends the program too.

    Args:
        source: a whole program; it runs as `main.py` under this interpreter's base installation.
        stdin: what it reads from standard input.
        limits: defaults to `Limits()`.
        readable: files and folders it may read besides (for example a folder of packages), at their real
        paths.
        unsafe: where the machine cannot isolate, run without isolation instead of refusing.

    Raises:
        InvalidInput: a program or an input of more than 4 MB, or a `readable` path that does not exist.
    """
    limits = limits or Limits()
    if len(source) + len(stdin) > MAX_SOURCE:
        raise InvalidInput(f"a sandbox program and its input may have {MAX_SOURCE:,} characters, not "
                           f"{len(source) + len(stdin):,}")  # fmt: skip
    if os.name != "posix":
        return Outcome("refused", reason=f"running code needs limits on processes, which {sys.platform} lacks")
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    order: dict[str, Any] = {
        "source": source,
        "stdin": stdin,
        "python": python,
        "readable": [os.path.realpath(sys.base_prefix), os.path.dirname(python), *_existing(readable)],
        "isolate": True,
        **asdict(limits),
    }
    outcome = await _attempt(order, limits)
    if outcome.status == "refused" and unsafe:
        outcome = await _attempt({**order, "isolate": False}, limits)
    return outcome


async def missing() -> str | None:
    """What this machine lacks to isolate a program, in one line; None where it lacks nothing."""
    outcome = await run("")
    return None if outcome.status == "passed" else outcome.reason or outcome.stderr[-500:]


def _existing(paths: Iterable[str | Path]) -> list[str]:
    real = [os.path.realpath(path) for path in paths]
    for path in real:
        if not os.path.exists(path):
            raise InvalidInput(f"the sandbox was asked to show {path}, which does not exist")
    return real


async def _attempt(order: dict[str, Any], limits: Limits) -> Outcome:
    """One start of the child, its two outputs read as they come, its report read at the end."""
    folder = tempfile.mkdtemp(prefix="thrifty-sandbox-")
    child = Path(__file__).with_name("sandbox_child.py")
    report, report_end = os.pipe()
    out, err = _Bounded(limits.output_bytes), _Bounded(limits.output_bytes)
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                order["python"], "-I", "-S", "-B", str(child), str(report_end),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                pass_fds=(report_end,), env={}, cwd="/", start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(report_end)
        assert process.stdin and process.stdout and process.stderr  # what PIPE means; tells the type checker
        readers = [asyncio.create_task(out.fill(process.stdout)), asyncio.create_task(err.fill(process.stderr))]
        try:
            process.stdin.write(json.dumps({**order, "folder": folder}).encode() + b"\n")
            with contextlib.suppress(ConnectionError):  # it ended early: the report says why
                await process.stdin.drain()
            await process.wait()
            await asyncio.wait(readers, timeout=2.0)  # both have ended, unless something unisolated holds the pipe
        finally:
            await _stop(process, readers)
        os.set_blocking(report, False)
        lines = b""
        with contextlib.suppress(BlockingIOError):
            lines = os.read(report, 1 << 16)
        return _outcome(lines, out.text(), err.text(), order, limits)
    finally:
        os.close(report)
        shutil.rmtree(folder, ignore_errors=True)


async def _stop(process: asyncio.subprocess.Process, readers: list[asyncio.Task[None]]) -> None:
    """End the child in the kind way (its input ends, it kills the program and leaves), then in the other."""
    if process.returncode is None:
        if process.stdin:
            process.stdin.close()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 6.0)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    for reader in readers:
        reader.cancel()


def _outcome(report: bytes, stdout: str, stderr: str, order: dict[str, Any], limits: Limits) -> Outcome:
    facts: dict[str, Any] = {}
    for line in reversed(report.splitlines()):
        facts.update(json.loads(line))
    isolated = bool(order["isolate"])
    if "refused" in facts:
        lacks = f"this machine does not offer {facts['refused']}" if isolated else facts["refused"]
        hint = "; unsafe runs without isolation" if isolated else ""
        return Outcome("refused", isolated=isolated, reason=f"cannot run code safely: {lacks}{hint}")
    if "timeout" in facts:
        return Outcome("timeout", stdout, stderr, None, limits.wall_seconds, isolated)
    if "exit" not in facts:
        return Outcome("refused", isolated=isolated, reason=f"the sandbox ended without a report: {stderr[-300:]!r}")
    code, seconds = int(facts["exit"]), float(facts["seconds"])
    lines = stderr.rstrip().splitlines()
    status: Status = "passed" if code == 0 else "failed"
    if code == -24 or (code == -9 and facts["cpu"] >= limits.cpu_seconds):  # SIGXCPU, or its hard limit
        status = "timeout"
    elif code == -9 or (code != 0 and lines and lines[-1].startswith("MemoryError")):
        status = "memory"
    return Outcome(status, stdout, stderr, code, seconds, isolated)


class _Bounded:
    """The first and the last half of a stream, whatever its length."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head, self._tail, self._seen = bytearray(), bytearray(), 0

    async def fill(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(1 << 16):
            self._seen += len(chunk)
            room = self._half - len(self._head)
            self._head += chunk[:room]
            self._tail += chunk[room:]
            del self._tail[: max(0, len(self._tail) - self._half)]

    def text(self) -> str:
        left_out = self._seen - len(self._head) - len(self._tail)
        gap = f"\n[... {left_out:,} bytes left out ...]\n".encode() if left_out else b""
        return bytes(self._head + gap + self._tail).decode("utf-8", "replace")
