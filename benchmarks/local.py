"""Speed of the local engine beside transformers' own `generate` (and llama.cpp, vLLM), on the same model in one run.

    python benchmarks/local.py [--quick] [--json FILE] [--dtype bfloat16] [--vllm-python PATH]

Decode: tokens a second at batch 1 and 16 and contexts of 100, 1,000 and 4,000 tokens. Every row of a batch has a cache
of its own, unpadded and of equal length. The prompt's pass is not part of it. The engines take turns; a figure is the
median of the repeats, a ratio the median of the ratios of each turn, with the least and the greatest in brackets.
llama.cpp: the sum of its slots' own figures, its weights in 4 bits, so not the same work. Prefill: tokens a second of
one prompt. Forks: 8 forks of a 2,000-token prompt by 16 tokens, with the prompt's prefill, against one prefill plus our
own batched decode of 8 separate copies of it: below 1 means that sharing is faster.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thrifty import Account, Call, Sampling
from thrifty.engines.local.branch import LocalBranch
from thrifty.engines.local.embedded import gguf_path
from thrifty.engines.local.engine import LocalEngine
from thrifty.engines.local.kv import Segment
from thrifty.engines.local.prompt import Prompt

STEPS = 16
SIZES = {False: ((100, 1000, 4000), (1, 16)), True: ((100, 1000), (1, 4))}
"""Contexts and batches, by whether it is to be quick."""


def prompt_ids(engine: LocalEngine, n: int) -> list[int]:
    """n token ids of English text."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[k] for k in sorted(topics))
    return engine.codec.encode(text[: n * 12])[:n]


async def opened(engine: LocalEngine, ids: list[int]) -> LocalBranch:
    """A branch that has read exactly these ids."""
    call = Call(({"role": "user", "content": "x"},), Account("bench"), sampling=Sampling(max_tokens=100_000))
    branch, _ = engine._begin(call, opened=True)
    prompt = Prompt(ids)
    branch.family.claim(len(ids) * engine.entry_nbytes)
    branch.store = engine.runner.store()
    await engine.scheduler.prefill(branch, lambda: branch.first_row(prompt))
    return branch


def never_ending(engine: LocalEngine) -> None:
    """Ends would make batches shrink: every row draws to its limit, on both sides."""
    engine.codec.ends = frozenset()


async def separate(engine: LocalEngine, branch: LocalBranch) -> LocalBranch:
    """A fork whose segments are copies: it shares no memory with its parent."""
    twin = branch.fork()
    await engine.advance([twin], 1)  # the fork's cache is there once it has drawn; the prompt's pass gave this token
    if twin.store is not None:
        twin.store.segments = [_copied(s) for s in twin.store.segments]
    return twin


def _copied(segment: Segment) -> Segment:
    twin = copy.copy(segment)
    twin.keys = [k.clone() for k in segment.keys]
    twin.values = [v.clone() for v in segment.values]
    return twin


async def our_decode(engine: LocalEngine, base: LocalBranch, batch: int, steps: int) -> float:
    """Tokens a second of `batch` separate copies of a branch that has read its prompt."""
    rows = [await separate(engine, base) for _ in range(batch)]
    begun = time.perf_counter()
    await engine.advance(rows, steps)
    seconds = time.perf_counter() - begun
    for row in rows:
        row.close()
    return batch * steps / seconds


class Clock:
    """A logits processor that notes when each step's logits arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


class Stock:
    """transformers, untouched, with its default attention."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def prefill(self, ids: list[int]) -> tuple[Any, float]:
        """The cache of one prompt, and the seconds it took."""
        begun = time.perf_counter()
        with torch.no_grad():
            out = self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        return out.past_key_values, time.perf_counter() - begun

    def decode(self, ids: list[int], cache: Any, batch: int, steps: int) -> float:
        """Tokens a second of `generate`, continuing `batch` copies of a cache; its first step is not counted."""
        rows = copy.deepcopy(cache)
        rows.batch_repeat_interleave(batch)
        rows.crop(-1)  # generate reads the prompt's last token itself
        given = torch.tensor([ids]).repeat(batch, 1)
        clock = Clock()
        with torch.no_grad():
            out = self.model.generate(
                given, attention_mask=torch.ones_like(given), past_key_values=rows, logits_processor=[clock],
                max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        if out.shape[1] != len(ids) + steps + 1 or len(clock.times) != steps + 1:
            raise RuntimeError(f"generate made {out.shape[1] - len(ids)} tokens in {len(clock.times)} steps")
        return batch * steps / (clock.times[-1] - clock.times[0])


async def forks(engine: LocalEngine, ids: list[int], n: int, steps: int) -> tuple[float, float]:
    """Seconds of n forks, and of one prefill plus the batched decode of n separate copies; both from nothing."""
    begun = time.perf_counter()
    base = await opened(engine, ids)
    rows = [base, *(base.fork() for _ in range(n - 1))]
    await engine.advance(rows, steps)
    shared = time.perf_counter() - begun
    for row in rows:
        row.close()
    begun = time.perf_counter()
    base = await opened(engine, ids)
    read = time.perf_counter() - begun
    rows = [await separate(engine, base) for _ in range(n)]  # making the copies is not counted
    begun = time.perf_counter()
    await engine.advance(rows, steps - 1)
    apart = read + time.perf_counter() - begun
    for row in (base, *rows):
        row.close()
    return shared, apart


async def measure(engine: LocalEngine, stock: Stock, quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every figure, the engines in turn."""
    never_ending(engine)
    results: list[dict[str, Any]] = []
    contexts, batches = SIZES[quick]
    repeats, steps = (2, 6) if quick else (5, STEPS)
    for context in contexts:
        ids = prompt_ids(engine, context)
        ours_read, stock_read, cache = [], [], None
        for _ in range(2 if quick else 3):
            begun = time.perf_counter()
            base = await opened(engine, ids)
            ours_read.append(time.perf_counter() - begun)
            base.close()
            cache, seconds = stock.prefill(ids)
            stock_read.append(seconds)
        results.append(_row("prefill", context, 1, [context / s for s in ours_read], [context / s for s in stock_read]))
        say(_line(results[-1]))
        base = await opened(engine, ids)
        for batch in batches:
            ours, theirs = [], []
            for _ in range(repeats):
                ours.append(await our_decode(engine, base, batch, steps))
                theirs.append(stock.decode(ids, cache, batch, steps))
            results.append(_row("decode", context, batch, ours, theirs))
            say(_line(results[-1]))
        base.close()
    ids = prompt_ids(engine, 500 if quick else 2000)
    pairs = [await forks(engine, ids, 8, steps) for _ in range(2 if quick else 5)]
    ratios = [shared / apart for shared, apart in pairs]
    results.append(
        {"what": "8 forks", "context": len(ids), "batch": 8, "shared_s": statistics.median(s for s, _ in pairs),
         "apart_s": statistics.median(a for _, a in pairs), "ratio": _spread(ratios)}
    )  # fmt: skip
    say(f"8 forks of {len(ids)} tokens by {steps}: {_bracketed(results[-1]['ratio'])} of the time of separate copies")
    return results


def _row(what: str, context: int, batch: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "what": what, "context": context, "batch": batch, "ours": _spread(ours), "generate": _spread(theirs),
        "ratio": _spread(ratios),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values), "n": len(values)}


def _bracketed(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} [{spread['least']:.2f}, {spread['greatest']:.2f}]"


def _line(row: dict[str, Any]) -> str:
    ours, theirs = row["ours"]["median"], row["generate"]["median"]
    return (
        f"{row['what']:8} batch {row['batch']:2}, context {row['context']:5,}: ours {ours:7.1f} tokens/s, "
        f"transformers {theirs:7.1f}, ratio {_bracketed(row['ratio'])}"
    )


# -- other engines, each in a process of its own ---------------------------------------------------------------------

_LLAMA = """
import json, sys, threading, time, xllamacpp
gguf, threads, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for batch, context, text in json.load(sys.stdin):
    p = xllamacpp.CommonParams()
    p.model.path, p.n_parallel, p.n_ctx = gguf, batch, (context + steps + 64) * batch
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    p.warmup, p.cache_prompt = False, False
    server = xllamacpp.Server(p)
    speeds = []
    def one(i):
        body = {"prompt": text, "n_predict": steps + 1, "ignore_eos": True, "temperature": 0, "id_slot": i}
        speeds.append(server.handle_completions(body)["timings"]["predicted_per_second"])
    work = [threading.Thread(target=one, args=(i,)) for i in range(batch)]
    [w.start() for w in work]; [w.join() for w in work]
    if len(speeds) < batch:
        sys.exit(f"{batch - len(speeds)} of {batch} completions failed")
    print("RESULT", json.dumps([batch, context, sum(speeds)]), flush=True)
    del server
"""

_VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, steps = sys.argv[1], int(sys.argv[2])
llm = LLM(folder, dtype=sys.argv[3], enforce_eager=True, enable_prefix_caching=False, max_model_len=4400)
def seconds(ids, batch, n):
    given = [{"prompt_token_ids": ids[i:] + ids[:i]} for i in range(batch)]
    begun = time.perf_counter()
    llm.generate(given, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True), use_tqdm=False)
    return time.perf_counter() - begun
for batch, context, ids in json.load(sys.stdin):
    seconds(ids, batch, 1)
    spent = seconds(ids, batch, steps + 1) - seconds(ids, batch, 1)
    print("RESULT", json.dumps([batch, context, batch * steps / spent]), flush=True)
"""


def other(command: list[str], jobs: list[Any], threads: int) -> list[list[float]]:
    """What another engine's process measured: [batch, context, tokens/s] each, as far as it came."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, env=env, timeout=1800)
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(found) < len(jobs):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        print(f"  ended after {len(found)} of {len(jobs)}, exit code {done.returncode}: {last}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, two repeats: shows that it runs")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--model", default="smollm2", help="embedded name or folder")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--no-llama", action="store_true", help="leave llama.cpp out even where it is installed")
    parser.add_argument("--vllm-python", help="python of a venv with vLLM, to measure it too")
    args = parser.parse_args()
    from thrifty.engines.local import embedded

    folder = embedded.path(args.model) if args.model in embedded.MODELS else Path(args.model)
    engine = LocalEngine.load(folder, dtype=args.dtype)
    stock = Stock(folder, engine.runner.dtype)
    head = {
        "model": args.model, "dtype": engine.dtype, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": _processor(), "load": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(head))

    async def run() -> list[dict[str, Any]]:
        try:
            return await measure(engine, stock, args.quick, print)
        finally:
            await engine.aclose()

    results = asyncio.run(run())
    contexts, batches = SIZES[args.quick]
    sizes = [(b, c) for c in contexts for b in batches]
    steps, threads = (6 if args.quick else STEPS), torch.get_num_threads()
    others: dict[str, Any] = {}
    if not args.no_llama and args.model == "smollm2" and _installed("xllamacpp"):
        jobs = [(b, c, engine.codec.decode(prompt_ids(engine, c))) for b, c in sizes]
        command = [sys.executable, "-c", _LLAMA, str(gguf_path("smollm2")), str(threads), str(steps)]
        others["llama.cpp, Q4_1 weights"] = other(command, jobs, threads)
    if args.vllm_python:
        jobs = [(b, c, prompt_ids(engine, c)) for b, c in sizes]
        others["vLLM"] = other([args.vllm_python, "-c", _VLLM, str(folder), str(steps), engine.dtype], jobs, threads)
    for name, found in others.items():
        for batch, context, speed in found:
            print(f"decode   batch {int(batch):2}, context {int(context):5,}: {name} {speed:7.1f} tokens/s")
    if args.json:
        whole = {**head, "steps": steps, "results": results, "others": others}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    main()
