"""Fits the router of Sketch-of-Thought on labelled questions and says how well it does on others.

    python recipes/sketch_router/train.py                  # prints the held-out accuracy
    python recipes/sketch_router/train.py --write          # and writes the router that the package ships
    python recipes/sketch_router/train.py --embedder SPEC --out router.json    # for an embedder of your own

`questions.jsonl` has a line a question: `split` (train or test), `label` (one of the three paradigms) and `question`.
They are ours, labelled from the paradigms' definitions (arithmetic and formulas; commonsense, recall and multi-hop;
technical fields); no question of the test split shares its task with one of the training split. Give `--questions` to
use your own. The penalty was not tuned."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from thrifty import Account
from thrifty.bench.stats import wilson
from thrifty.engines.spec import resolve
from thrifty.ledger.entry import Labels
from thrifty.methods.prompt._sketch_router import PARADIGMS, SHIPPED, by_words, fit

MINILM = ("minilm", "all-minilm-l6-v2", "all-minilm")
QUESTIONS = Path(__file__).with_name("questions.jsonl")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--embedder", default="minilm")
    parser.add_argument("--penalty", type=float, default=1.0, help="as scikit-learn's C")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true", help=f"write {SHIPPED.name}, the router that ships")
    chosen = parser.parse_args()
    rows = [json.loads(line) for line in chosen.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    engine = resolve(chosen.embedder)
    vectors = (await engine.embed([r["question"] for r in rows], Account("router"), Labels())).vectors
    await engine.aclose()
    labels = [PARADIGMS.index(r["label"]) for r in rows]
    train = [i for i, r in enumerate(rows) if r["split"] == "train"]
    test = [i for i, r in enumerate(rows) if r["split"] == "test"]
    names = MINILM if chosen.embedder == "minilm" else (engine.model.lower().rpartition("/")[2],)
    router = fit(vectors[train], [labels[i] for i in train], names, penalty=chosen.penalty)
    for name, split in (("train", train), ("test", test)):
        for how in ("embedding", "words"):
            right = 0
            for i in split:
                p = router.probabilities(vectors[i])
                said = PARADIGMS[p.index(max(p))] if how == "embedding" else by_words(rows[i]["question"])
                right += said == rows[i]["label"]
            interval = wilson(right, len(split))
            low, high = interval.low, interval.high
            print(
                f"{name:5} by {how:9} {right} of {len(split)} right: {right / len(split):.3f} [{low:.3f}, {high:.3f}]"
            )
    for out in [chosen.out] * (chosen.out is not None) + [SHIPPED] * chosen.write:
        out.write_text(router.to_json(), encoding="utf-8")
        print(f"wrote {out}, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    asyncio.run(main())
