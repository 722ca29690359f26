"""The `thrifty` command: one file a verb. Heavy imports happen inside the verbs, so that help is quick."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line. One clear line and a documented exit code for every error that has a cause."""
    from thrifty.errors import ThriftyError

    try:
        from thrifty.cli.app import app

        app()
    except ThriftyError as error:
        print(f"thrifty: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("thrifty: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(141) from None
