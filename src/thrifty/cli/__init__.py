"""The `thrifty` command: one file a verb. Heavy imports happen inside the verbs, so that help is quick."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import TextIO

PIPE_CLOSED = 141
"""Exit code when who reads our output has gone, as a shell reports SIGPIPE."""


def main() -> None:
    """Runs the command line. One clear line and a documented exit code for every error that has a cause."""
    from thrifty.errors import EngineError, ThriftyError

    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()  # closed by who started us
    output = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without a character is no reason to fail
    try:
        from thrifty.cli.app import app

        try:
            app()
        finally:
            output.flush()
    except SystemExit as ended:
        if ended.code == 130:  # typer took the interrupt
            _fail("interrupted", 130)
        if sys.stdout is not output:  # typer took the broken pipe, and wrapped the stream
            raise SystemExit(PIPE_CLOSED) from None
        raise
    except EngineError as error:
        spend = error.spend
        spent = f" (spent: input {spend.input:,}, output {spend.output:,} tokens)" if spend else ""
        _fail(f"{error}{spent}", error.exit_code)
    except ThriftyError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # the interpreter flushes once more at its end: let it write into nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        raise SystemExit(PIPE_CLOSED) from None
    except OSError as error:
        _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", 1)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process lives


def _fail(told: str, code: int) -> None:
    print(f"thrifty: {' '.join(told.split())}", file=sys.stderr)
    raise SystemExit(code) from None
