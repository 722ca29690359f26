"""`thrifty ledger`: what was spent, by whom and on what; whether the record was changed; export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thrifty.cli._options import Json, print_json

app = typer.Typer(help="Read, verify and export a ledger.", no_args_is_help=True)
