"""Trains the forest of the method latent-trajectory for one model: which of its traces are correct, by three signals.

    pip install scikit-learn
    python recipes/latent_trajectory/train.py --model thinker --out forest.json

Runs the model several times on each of some new problems of the lab, follows its hidden states for a prefix of each
trace (`--prefix 0`: for all of it, for mode "accept"), judges the answers by the verifier, and fits. Prints, on
problems held out whole, the area under the ROC curve of each signal, of the length and of the forest, and how often the
trace that it would choose is right, beside the first one and the majority. Evaluating needs no scikit-learn.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty import Account, Answer, Call, Sampling
from thrifty.errors import InvalidInput, ThriftyError
from thrifty.lab.suite import answer_of, lab_tasks
from thrifty.lab.tasks import DIFFICULTIES, check
from thrifty.methods.search._forest import Forest, Tree
from thrifty.methods.search._samples import seed_of, votes_of, winner_of
from thrifty.methods.search._trajectory import SIGNALS, ReadTrajectory, Signals, Traces, auc

BATCH = 128
"""Traces in one wave: opened one by one and stepped together, so that the batches are the same in every run."""
SEED = 11_000_000
"""Added to --seed, so that no problem is one of training's or of the gates'."""


@dataclass(frozen=True)
class Seen:
    """One trace: its problem, what was read of its prefix (None: too short), its answer, and whether that is right."""

    problem: int
    signals: Signals | None
    length: int
    """tokens of it that were read"""
    answer: Answer
    correct: bool

    @property
    def features(self) -> list[float]:
        return [] if self.signals is None else [float(getattr(self.signals, name)) for name in SIGNALS]


async def collect(engine: Any, given: argparse.Namespace) -> list[Seen]:
    """`samples` traces of each problem."""
    tasks = lab_tasks(given.problems, SEED + given.seed, difficulties=tuple(given.difficulties))
    jobs = [(number, sample) for number in range(len(tasks)) for sample in range(given.samples)]
    seen: list[Seen] = []
    began = time.monotonic()
    for first in range(0, len(jobs), BATCH):
        wave, traces = jobs[first : first + BATCH], Traces(given.segment)
        rows = []
        for number, sample in wave:
            seed = seed_of(given.seed + number, sample)
            sampling = Sampling(temperature=given.temperature, seed=seed, max_tokens=given.longest)
            policy = ReadTrajectory(traces, "latent-trajectory")
            rows.append(
                await engine.open(
                    Call(tasks[number].messages, Account("traces"), sampling=sampling, policies=(policy,))
                )
            )
        await engine.advance(rows, given.prefix or given.longest)
        read = [(traces.of(row).signals(), len(row.tokens)) for row in rows]
        await engine.advance([row for row in rows if row.finish is None], given.longest)
        for (number, _), (signals, length), row in zip(wave, read, rows, strict=True):
            answer, task = await row.finish_up(), tasks[number]
            right = check(task.extra["family"], task.scorer_settings["question"], answer_of(answer.text))
            seen.append(Seen(number, signals, length, answer, bool(right)))
        print(f"{len(seen)} of {len(jobs)} traces, {time.monotonic() - began:.0f} s", end="\r", file=sys.stderr)
        if time.monotonic() - began > 60 * given.minutes:
            break
    print(file=sys.stderr)
    return seen


def fit(rows: Sequence[Seen], given: argparse.Namespace) -> Any:
    """A classifier of scikit-learn. Raises InvalidInput where there is nothing to tell apart, or no scikit-learn."""
    try:
        from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    except ImportError as error:
        raise InvalidInput("training needs scikit-learn: pip install scikit-learn") from error
    known = [row for row in rows if row.signals is not None]
    if len({row.correct for row in known}) < 2:
        raise InvalidInput(f"{len(known)} traces with a signal, all right or all wrong: both are needed")
    if given.kind == "forest":
        model = RandomForestClassifier(given.trees, max_depth=given.depth, min_samples_leaf=10, random_state=given.seed)
    else:
        model = GradientBoostingClassifier(n_estimators=given.trees, max_depth=given.depth, random_state=given.seed)
    return model.fit([row.features for row in known], [row.correct for row in known])


def forest_of(classifier: Any, **told: Any) -> Forest:
    """A fitted RandomForestClassifier or GradientBoostingClassifier, of two classes, as plain numbers."""
    boosted = hasattr(classifier, "init_")
    trees = []
    for tree in classifier.estimators_.ravel() if boosted else classifier.estimators_:
        inner = tree.tree_
        if boosted:
            value = inner.value[:, 0, 0] * classifier.learning_rate
        else:
            value = inner.value[:, 0, 1] / inner.value[:, 0].sum(-1)
        leaf = inner.children_left < 0
        trees.append(
            Tree(
                tuple(0 if end else int(f) for f, end in zip(inner.feature, leaf, strict=True)),
                tuple(0.0 if end else float(t) for t, end in zip(inner.threshold, leaf, strict=True)),
                tuple(map(int, inner.children_left)),
                tuple(map(int, inner.children_right)),
                tuple(map(float, value)),
            )
        )
    prior = float(classifier.init_.class_prior_[1]) if boosted else 0.5
    base = math.log(prior / (1 - prior))
    return Forest(SIGNALS, tuple(trees), "logistic" if boosted else "mean", base, **told)


def report(forest: Forest, held: Sequence[Seen], seed: int) -> None:
    """Prints how well it does on what was held out."""
    known = [row for row in held if row.signals is not None]
    correct = [row.correct for row in known]
    problems = len({row.problem for row in held})
    print(f"\nheld out: {len(known)} traces with a signal of {problems} problems; {sum(correct)} right")
    scores = {name: [row.signals.score(name) for row in known if row.signals] for name in SIGNALS}
    scores["shorter"] = [-float(row.length) for row in known]
    scores["forest"] = [forest(row.features) for row in known]
    print("area under the ROC curve (0.5: says nothing), with a 95% bootstrap over problems")
    for name, values in scores.items():
        low, high = bootstrap(known, values, seed)
        print(f"  {name:<12}{auc(values, correct):.3f}  [{low:.3f}, {high:.3f}]")
    groups = [[row for row in held if row.problem == p] for p in sorted({r.problem for r in held})]
    chosen = {"the first": 0, "the majority": 0, "the forest's": 0}
    for rows in groups:
        chosen["the first"] += rows[0].correct
        chosen["the majority"] += rows[winner_of(votes_of([row.answer for row in rows]))].correct
        chosen["the forest's"] += max(rows, key=lambda r: forest(r.features) if r.signals else -1.0).correct
    told = ", ".join(f"{name}: {n}" for name, n in chosen.items())
    print(f"right answers of {len(groups)}, when the trace taken is {told}")


def bootstrap(rows: Sequence[Seen], values: Sequence[float], seed: int, draws: int = 200) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of the area, problems drawn with replacement."""
    by_problem: dict[int, list[tuple[float, bool]]] = {}
    for row, value in zip(rows, values, strict=True):
        by_problem.setdefault(row.problem, []).append((value, row.correct))
    rng, problems = random.Random(seed), list(by_problem.values())
    areas = []
    for _ in range(draws):
        sample = [pair for _ in problems for pair in rng.choice(problems)]
        if len({c for _, c in sample}) == 2:
            areas.append(auc(*map(list, zip(*sample, strict=True))))
    areas.sort()
    return areas[int(0.025 * len(areas))], areas[int(0.975 * (len(areas) - 1))]


async def run(given: argparse.Namespace) -> int:
    from thrifty.engines.local.engine import LocalEngine

    began = time.monotonic()
    engine = LocalEngine.load(given.model, max_batch=BATCH, dtype=given.dtype)
    try:
        seen = await collect(engine, given)
    finally:
        await engine.aclose()
    held = [row for row in seen if row.problem % 4 == 3]
    train = [row for row in seen if row.problem % 4 != 3]
    if not held or len({row.correct for row in held if row.signals}) < 2:
        raise InvalidInput("the held-out traces are all right or all wrong: other --difficulties or more --problems")
    classifier = fit(train, given)
    forest = forest_of(classifier, model=engine.model, segment=given.segment, prefix=given.prefix)
    known = [row for row in held if row.signals is not None]
    exact = classifier.predict_proba([row.features for row in known])[:, 1]
    apart = max(abs(forest(row.features) - p) for row, p in zip(known, exact, strict=True))
    short = sum(row.signals is None for row in seen)
    print(f"model {engine.model}, seed {given.seed}, segment {given.segment}, prefix {given.prefix}")
    print(f"{len(seen)} traces in {time.monotonic() - began:.0f} s, {short} too short for a signal")
    print(f"{len(forest.trees)} trees; as scikit-learn evaluates them to within {apart:.1e}")
    report(forest, held, given.seed)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    digest, size = forest.save(given.out, traces=len(seen)), given.out.stat().st_size
    print(f"\nwrote {given.out}, {size:,} bytes, SHA-256 {digest}..., in {time.monotonic() - began:.0f} s")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a packaged model's name, a folder, or a hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--samples", type=int, default=5, help="traces of a problem")
    parser.add_argument("--minutes", type=float, default=7.0, help="no new wave of traces is begun after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--segment", type=int, default=16, help="as the knob of the method")
    parser.add_argument("--prefix", type=int, default=64, help="as the knob of the method; 0: whole traces")
    parser.add_argument("--difficulties", type=int, nargs="+", default=list(DIFFICULTIES))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--longest", type=int, default=640, help="output tokens of a trace at most")
    parser.add_argument("--kind", choices=("forest", "boosted"), default="forest")
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dtype", default="auto", help="of the model, as plans will run it")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    try:
        return asyncio.run(run(given))
    except ThriftyError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
