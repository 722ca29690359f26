"""What perplexity-based compression costs beside one forward pass of its scorer, in one run on the same tokens.

    python benchmarks/compression.py [--tokens 2000] [--repeats 5] [--dtype bfloat16] [--json FILE]

forward: transformers' own model over all tokens, logits of every position, without a cache: the pass that any method of
this kind needs. score: the engine's `score` of the same text. plain, token, contrastive: the whole method, counting by
the answering engine included. They take turns; a ratio is the median of the ratios of each turn, with the least and the
greatest in brackets. passes: tokens that the scorer computed, by those of the text. LLMLingua-2 is timed too where its
package and its model are on this machine; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from thrifty import Account, Call
from thrifty.engine import score
from thrifty.engines.local import embedded
from thrifty.engines.local.engine import LocalEngine
from thrifty.ledger.entry import Labels
from thrifty.methods.context.perplexity_compression import PerplexityCompression

RATIO = 0.4
QUESTION = "What does the assert statement do?"
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"level": "sentence"},
    "token": {"level": "token"},
    "contrastive": {"level": "sentence", "contrastive": True},
}


def text_of(engine: LocalEngine, tokens: int) -> str:
    """English documentation of about so many tokens."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[k] for k in sorted(topics))
    ids = engine.codec.encode(text[: tokens * 12])[:tokens]
    return engine.codec.decode(ids)


def stock_forward(model: Any, ids: list[int]) -> float:
    begun = time.perf_counter()
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    return time.perf_counter() - begun


async def compressed(engine: LocalEngine, text: str, knobs: dict[str, Any]) -> tuple[float, Any]:
    """Seconds of the rewrite alone, and its receipt."""
    method = PerplexityCompression(ratio=RATIO, **knobs)
    engines = {"answer": engine, "scorer": engine}
    asked = ({"role": "user", "content": QUESTION},)
    call = Call(asked, Account("bench"), context=(text,), engines=engines)
    begun = time.perf_counter()
    changed = await method.rewrite(call)
    return time.perf_counter() - begun, changed.receipts[-1]


def llmlingua() -> str:
    """Why LLMLingua-2 is not timed here, or its figure's absence explained."""
    if importlib.util.find_spec("llmlingua") is None:
        return "LLMLingua-2: not comparable here: its package (llmlingua) is not installed"
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    if not list(home.glob("hub/models--microsoft--llmlingua-2-*")):
        return (
            "LLMLingua-2: not comparable here: its model (a classifier of its own, from the hub) is not on this machine"
        )
    return ""


def lingua_seconds(text: str) -> float:
    """Seconds of LLMLingua-2's own compression to the same ratio."""
    from llmlingua import PromptCompressor

    made = PromptCompressor(
        "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank", use_llmlingua2=True, device_map="cpu"
    )
    begun = time.perf_counter()
    made.compress_prompt(text, rate=RATIO)
    return time.perf_counter() - begun


async def measure(tokens: int, repeats: int, dtype: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    engine = LocalEngine.load("smollm2", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(embedded.path("smollm2"), dtype=engine.runner.dtype).eval()
    text = text_of(engine, tokens)
    ids = engine.codec.encode(text)
    seconds: dict[str, list[float]] = {}
    receipts: dict[str, Any] = {}
    for turn in range(repeats + 1):
        found = {"forward": stock_forward(model, ids)}
        begun = time.perf_counter()
        scores = await score(engine, [text], Account("bench"), Labels())
        found["score"] = time.perf_counter() - begun
        for name, knobs in METHODS.items():
            found[name], receipts[name] = await compressed(engine, text, knobs)
        if turn:  # the first warms up
            for name, value in found.items():
                seconds.setdefault(name, []).append(value)
    passes = {"score": scores.work.prefill / len(ids)}
    passes |= {name: receipt.work.prefill / len(ids) for name, receipt in receipts.items()}
    rows = {}
    for name, values in seconds.items():
        ratios = [v / f for v, f in zip(values, seconds["forward"], strict=True)]
        rows[name] = {
            "seconds": statistics.median(values),
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            "passes": passes.get(name, 1.0),
        }
    hits = {name: [r.before, r.after, r.reason] for name, r in receipts.items()}
    await engine.aclose()
    return {"tokens": len(ids), "dtype": engine.dtype, "threads": torch.get_num_threads(), "rows": rows, "hits": hits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = asyncio.run(measure(given.tokens, given.repeats, given.dtype))
    print(f"{found['tokens']} tokens, smollm2, {found['dtype']}, {found['threads']} threads, ratio {RATIO}")
    for name, row in found["rows"].items():
        middle, least, most = row["ratio"]
        print(
            f"{name:12} {row['seconds']:7.2f} s   {middle:5.2f} x forward [{least:.2f}, {most:.2f}]   "
            f"{row['passes']:.2f} passes"
        )
    for name, (before, after, reason) in found["hits"].items():
        print(f"{name}: prompt of {before} to {after} tokens; {reason}")
    why = llmlingua()
    if not why:
        took = lingua_seconds(text_of(LocalEngine.load("smollm2"), given.tokens))
        found["llmlingua2"] = took
        why = f"LLMLingua-2: {took:.2f} s, with its own classifier"
    print(why)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
