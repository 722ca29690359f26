"""How long `import thrifty` and `thrifty --help` take, as whole processes, and whether torch came in.

    python benchmarks/startup.py [--repeats 20] [--json]

Beside them, in turn, a Python that does nothing, so that the interpreter's own start can be subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import thrifty": [sys.executable, "-c", "import sys, thrifty; sys.exit('torch' in sys.modules)"],
    "thrifty --help": [sys.executable, "-m", "thrifty", "--help"],
}


def main() -> None:
    """Runs the commands in turn and prints milliseconds: median, lowest and highest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(given.repeats + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:  # the first fills the caches
                times[name].append((time.perf_counter() - start) * 1000)
    rows = {name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)} for name, t in times.items()}
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    for name, row in rows.items():
        print(f"{name:16} {row['median_ms']:6.0f} ms  [{row['min_ms']:.0f}, {row['max_ms']:.0f}]")


if __name__ == "__main__":
    main()
