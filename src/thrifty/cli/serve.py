"""`thrifty serve`: the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    policy: Annotated[Path, typer.Option("--policy", "-p", help="The gateway's policy file (TOML).")] = Path(
        "thrifty.toml"
    ),
    host: Annotated[str | None, typer.Option("--host", help="In the place of the policy's.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Likewise; 0 takes a free one.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only read the policy and say what is wrong.")] = False,
) -> None:
    """Serve an OpenAI-compatible gateway that enforces budgets and plans.

    SIGHUP reads the policy again; SIGTERM drains and ends.
    """
    from thrifty.serve.run import run

    run(policy, host, port, check)
