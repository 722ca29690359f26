"""How fast `thrifty count` counts beside tiktoken, on one thread, with the same ids.

    python benchmarks/count.py [--megabytes 10] [--repeats 7] [--json]

The text is this Python's own library: its sources and the texts of `pydoc`, cut to the size, each file once. Both sides
start from bytes: ours through `count_stream`, which reads, decodes and cuts as the command does; tiktoken decodes and
encodes the whole text. They run in turn, each repeat in a process of its own, so no side finds warm caches. The ratio
is the median over repeats with a 95% bootstrap interval. Needs `thrifty count --get o200k --get cl100k`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def text_of(size: int) -> bytes:
    """The first `size` bytes of the library's texts, whole characters."""
    import pydoc_data.topics
    import sysconfig

    parts = ["\n".join(pydoc_data.topics.topics.values()).encode()]
    total = len(parts[0])
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if total >= size:
            break
        if "site-packages" not in file.parts:
            parts.append(file.read_bytes())
            total += len(parts[-1])
    return b"".join(parts)[:size].decode("utf-8", "ignore").encode()


def measure(side: str, name: str, file: Path) -> dict[str, float]:
    """One side once, in this process: seconds without loading, tokens, a digest of the ids, growth of memory in MB."""
    from thrifty.meter import tokenizer_files

    raw = file.read_bytes()
    if side == "ours":
        from thrifty.meter import tokenizers

        counter = tokenizers.load(name)
        counter.count("warm up")
        before = _resident(reset=True)
        start = time.perf_counter()
        tokens = counter.count_stream(io.BytesIO(raw)).tokens
    else:
        import tiktoken

        with tempfile.TemporaryDirectory() as cache:
            os.environ["TIKTOKEN_CACHE_DIR"] = cache
            member = tokenizer_files.FILES[name].members[0]
            ranks = tokenizer_files.path(name) / member.target
            (Path(cache) / member.source.rsplit("/", 1)[1]).symlink_to(ranks)
            encoding = tiktoken.get_encoding(f"{name}_base")
        encoding.encode_ordinary("warm up")
        before = _resident(reset=True)
        start = time.perf_counter()
        tokens = len(encoding.encode_ordinary(raw.decode()))
    seconds = time.perf_counter() - start
    grown = _resident() - before
    return {"seconds": seconds, "tokens": tokens, "mb": grown}


def _resident(reset: bool = False) -> float:
    """The most memory this process held since the last reset, in MB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def same_ids(name: str, raw: bytes) -> bool:
    """Whether both give the same ids for the whole text."""
    import hashlib

    from thrifty.meter import tokenizer_files, tokenizers

    text = raw.decode()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TIKTOKEN_CACHE_DIR"] = cache
        member = tokenizer_files.FILES[name].members[0]
        (Path(cache) / member.source.rsplit("/", 1)[1]).symlink_to(tokenizer_files.path(name) / member.target)
        import tiktoken

        theirs = tiktoken.get_encoding(f"{name}_base").encode_ordinary(text)
    digests = [hashlib.sha256(repr(ids).encode()).hexdigest() for ids in (theirs, tokenizers.load(name).encode(text))]
    return digests[0] == digests[1]


def interval(ratios: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    """Runs both sides in turn and prints MB/s, the ratio and the growth of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "NAME", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.one[1], Path(given.one[2]))))
        return
    os.environ.update(ONE_THREAD)
    raw = text_of(given.megabytes * 1_000_000)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        file.write_bytes(raw)
        for name in ("o200k", "cl100k"):
            found: dict[str, list[dict[str, float]]] = {"ours": [], "tiktoken": []}
            for _ in range(given.repeats):
                for side, results in found.items():
                    command = [sys.executable, __file__, "--one", side, name, str(file)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    results.append(json.loads(done.stdout))
            ratios = [t["seconds"] / o["seconds"] for o, t in zip(found["ours"], found["tiktoken"], strict=True)]
            speeds = {s: len(raw) / 1e6 / statistics.median(r["seconds"] for r in of) for s, of in found.items()}
            rows[name] = {
                "bytes": len(raw),
                "tokens": found["ours"][0]["tokens"],
                "same_count": len({r["tokens"] for of in found.values() for r in of}) == 1,
                "same_ids": same_ids(name, raw),
                "mb_per_s": speeds,
                "ratio": statistics.median(ratios),
                "interval": interval(ratios),
                "memory_mb": {s: statistics.median(r["mb"] for r in of) for s, of in found.items()},
            }
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    for name, row in rows.items():
        low, high = row["interval"]
        speed, memory = row["mb_per_s"], row["memory_mb"]
        print(
            f"{name}: {row['bytes'] / 1e6:.1f} MB, {row['tokens']:,} tokens, same ids: {row['same_ids']}; ours "
            f"{speed['ours']:.0f} MB/s, tiktoken {speed['tiktoken']:.1f} MB/s, ratio {row['ratio']:.2f} "
            f"[{low:.2f}, {high:.2f}]; memory grew by {memory['ours']:.0f} and {memory['tiktoken']:.0f} MB"
        )


if __name__ == "__main__":
    main()
