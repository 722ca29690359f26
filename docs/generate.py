"""Writes the pages that are made from the code and from the measured results.

python docs/generate.py            writes docs/verbs/*.md, docs/catalogue.md, src/thrifty/bench/measured.json
python docs/generate.py --check    fails when a page is not what the code says
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer.main

from thrifty import registry
from thrifty.bench.catalogue import catalogue, effect, measured, read_laws
from thrifty.cli.app import app

DOCS = Path(__file__).parent
ROOT = DOCS.parent


def verb_page(name: str, command: Any) -> str:
    """A verb's help as Markdown, its subcommands after it."""
    lines = [f"# thrifty {name}", "", *_section(f"thrifty {name}", command)]
    if hasattr(command, "commands"):
        for sub, child in sorted(command.commands.items()):
            lines += [f"## thrifty {name} {sub}", "", *_section(f"thrifty {name} {sub}", child)]
    return "\n".join(lines).rstrip() + "\n"


def _section(path: str, command: Any) -> list[str]:
    usage = " ".join(command.collect_usage_pieces(command.context_class(command, info_name=path)))
    lines = [(command.help or "").replace("\b", "").strip(), "", "```text", f"{path} {usage}".rstrip(), "```", ""]
    rows = []
    for param in command.params:
        if param.name == "help" or getattr(param, "hidden", False):
            continue
        names = param.name if param.param_type_name == "argument" else ", ".join([*param.opts, *param.secondary_opts])
        text = (getattr(param, "help", "") or "").replace("|", "\\|").replace("\n", " ")
        default = param.default if isinstance(param.default, (str, int, float)) and param.default is not True else None
        shown = f" Default: `{default}`." if default not in (None, False, "") and not param.required else ""
        rows.append(f"| `{names}` | {text}{shown} |")
    if rows:
        lines += ["| option | meaning |", "| --- | --- |", *rows, ""]
    return lines


def pages() -> dict[Path, str]:
    """Every generated page and its text."""
    group: Any = typer.main.get_command(app)
    made = {DOCS / "verbs" / f"{name}.md": verb_page(name, command) for name, command in group.commands.items()}
    results, laws = ROOT / "results", ROOT / "results" / "laws.json"
    made[DOCS / "catalogue.md"] = catalogue(results, read_laws(laws) if laws.exists() else None)
    known = measured(results)
    shown = {name: effect(name, results) for name in registry.names() if name in known}
    made[ROOT / "src/thrifty/bench/measured.json"] = json.dumps(shown, indent=1, ensure_ascii=False) + "\n"
    return made


def main() -> None:
    check = "--check" in sys.argv[1:]
    stale = []
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            stale.append(str(path.relative_to(ROOT)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    if stale:
        raise SystemExit(f"stale: {', '.join(stale)}: run `python docs/generate.py`")


if __name__ == "__main__":
    main()
