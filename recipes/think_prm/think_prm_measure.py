"""What the verifier can do, on problems that training never saw: its verdicts on steps, its score, and best of n by it.

Beside it stand the majority (every step is right, every score the same) and the thinker's own log-probability, whose
threshold for a wrong step is the best there is on the very data that it is measured on: more than it would get.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import think_prm_data as data
from think_prm_card import said

from thrifty import Account, Answer, Call, Sampling
from thrifty.lab.steps import Step
from thrifty.lab.suite import answer_of
from thrifty.lab.tasks import Problem, check
from thrifty.methods.search._samples import votes_of, winner_of
from thrifty.methods.search._verifier import Verdict, Verifier
from thrifty.methods.search._wording import LINES
from thrifty.methods.search.best_of_n import choose
from thrifty.methods.search.think_prm import process_bench

BATCH = 64
LIMIT = 800
"""output tokens of the thinker"""
CHAIN = 700
"""tokens of one verification"""
RESAMPLES = 500


@dataclass(frozen=True)
class Judged:
    """One trace of the thinker: its gold labels, and what the verifier and its own probabilities say of it."""

    problem: Problem
    answer: Answer
    gold: tuple[Step, ...]
    right: bool
    verdict: Verdict
    logprobs: tuple[float, ...]
    """mean log-probability of the tokens of each step"""

    @property
    def told(self) -> list[bool]:
        """The verifier's verdict on each step; right where it said nothing that can be read."""
        silent: tuple[bool | None, ...] = (True,) * len(self.gold)
        return data.predicted(self.verdict.labels if self.verdict.understood else silent, self.gold)


async def think(engine: Any, problem: Problem, seed: int) -> Answer:
    """The thinker's answer at temperature 1, with the log-probabilities of its tokens."""
    sampling = Sampling(temperature=1.0, seed=seed, max_tokens=LIMIT, logprobs=True)
    call = Call(({"role": "user", "content": problem.question},), Account("think"), sampling=sampling)
    answer: Answer = await engine.generate(call)
    return answer


def raw(engine: Any, answer: Answer) -> str:
    """All that was written, tags included."""
    return str(engine.codec.decode(answer.tokens or ()))


def step_logprobs(pieces: Sequence[str], logprobs: Sequence[float], gold: Sequence[Step], text: str) -> list[float]:
    """Mean log-probability of the tokens (their texts in `pieces`) in which each step of `text` is written.

    >>> step_logprobs(["a", "b", "c"], [-1.0, -3.0, -5.0], [Step("bc", 1, "line", True, 0)], "abc")
    [-4.0]
    """
    place, starts = 0, []
    for piece in pieces:
        starts.append(place)
        place += len(piece)
    found, at = [], 0
    for step in gold:
        at = text.index(step.text, at)
        inside = [p for s, p in zip(starts, logprobs, strict=False) if at <= s < at + len(step.text)]
        found.append(fmean(inside) if inside else 0.0)
        at += len(step.text)
    return found


async def measure(thinker: Path, verifier: Path, config: dict[str, Any], problems: Sequence[Problem]) -> dict[str, Any]:
    """Samples, verifies, counts."""
    from thrifty.engines.local.engine import LocalEngine

    n = int(config["data"]["samples"])
    engine = LocalEngine.load(thinker, max_batch=BATCH)
    try:
        asked = [(p, 1_000_000 + config["seed"] + n * i + k) for i, p in enumerate(problems) for k in range(n)]
        answers = await asyncio.gather(*(think(engine, p, seed) for p, seed in asked))
        texts = [raw(engine, a) for a in answers]
        pieces = [[engine.codec.decode([t]) for t in a.tokens or ()] for a in answers]
    finally:
        await engine.aclose()
    scorer = LocalEngine.load(verifier, max_batch=BATCH)
    try:
        verdicts = await asyncio.gather(*(verify(scorer, p, a) for (p, _), a in zip(asked, answers, strict=True)))
    finally:
        await scorer.aclose()
    rows = []
    for (problem, _), answer, text, parts, (verdict, _) in zip(asked, answers, texts, pieces, verdicts, strict=True):
        gold = data.solution_of(problem, text).steps()
        own = step_logprobs(parts, answer.logprobs or (), gold, text)
        right = check(problem.family, problem.question, answer_of(answer.text))
        rows.append(Judged(problem, answer, gold, right, verdict, tuple(own)))
    spent = sum(a.spend.output for a in answers), sum(tokens for _, tokens in verdicts)
    return judge(rows, n) | {"tokens": {"thinker": spent[0], "verifier": spent[1]}}


async def verify(engine: Any, problem: Problem, answer: Answer) -> tuple[Verdict, int]:
    """The verdict, through the very code that the methods use, and its output tokens."""
    account = Account("verify")
    call = Call(({"role": "user", "content": problem.question},), account, engines={"scorer": engine})
    verifier = Verifier("think-prm", call, tokens=CHAIN, soft=True)
    verdict = await verifier.verdict(LINES.seen(answer))
    return verdict, account.settled.output


# --- counting ---


def judge(rows: Sequence[Judged], samples: int) -> dict[str, Any]:
    """All figures, and the gates: better than the majority on steps, and than the thinker's own word on answers."""
    claims = [(s.right, t, p) for r in rows for s, t, p in zip(r.gold, r.told, r.logprobs, strict=True) if s.claims]
    gold, told, own = [c[0] for c in claims], [c[1] for c in claims], [c[2] for c in claims]
    right = [r.right for r in rows]
    scores = [r.verdict.score for r in rows]
    likely = [fmean(r.answer.logprobs) if r.answer.logprobs else 0.0 for r in rows]
    groups = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    firsts = [next((i for i, s in enumerate(r.gold) if not s.right), None) for r in rows]
    found = [next((i for i, said in enumerate(r.told) if not said), None) for r in rows]
    bench = process_bench(found, firsts) if {f is None for f in firsts} == {True, False} else None
    out: dict[str, Any] = {
        "traces": len(rows),
        "problems": len(groups),
        "unread": sum(not r.verdict.understood for r in rows),
        "steps": {
            "n": len(claims),
            "wrong": gold.count(False),
            "verifier": {"f1": f1(gold, told), "accuracy": fmean(g == t for g, t in zip(gold, told, strict=True))},
            "majority": {"f1": f1(gold, [True] * len(gold)), "accuracy": gold.count(True) / max(1, len(gold))},
            "log-probability": {"f1": best_f1(gold, own)},
        },
        "process_bench": bench,
        "answers": {
            "right": sum(right),
            "auc": {
                "verifier": auc(scores, right),
                "log-probability": auc(likely, right),
                "majority": auc([0.0] * len(right), right),
            },
            "auc_gap": auc_gap([[r.verdict.score for r in g] for g in groups], likely, right),
        },
        "best_of": {"n": samples, **picks(groups)},
        "families": {
            name: {
                "traces": len(mine),
                "right": sum(r.right for r in mine),
                "f1": f1(*_pairs(mine)),
                "auc": auc([r.verdict.score for r in mine], [r.right for r in mine]),
            }
            for name in sorted({r.problem.family for r in rows})
            if (mine := [r for r in rows if r.problem.family == name])
        },
        "difficulties": {
            str(d): {"f1": f1(*_pairs(mine)), "auc": auc([r.verdict.score for r in mine], [r.right for r in mine])}
            for d in sorted({r.problem.difficulty for r in rows})
            if (mine := [r for r in rows if r.problem.difficulty == d])
        },
        "scores": {"right": [r.verdict.score for r in rows if r.right], "wrong": [
            r.verdict.score for r in rows if not r.right]},
    }  # fmt: skip
    steps, answers = out["steps"], out["answers"]["auc"]
    rivals = max(steps["majority"]["f1"], steps["log-probability"]["f1"])
    ours, theirs = answers["verifier"], answers["log-probability"]
    out["gates"] = {
        "steps": {
            "passed": steps["verifier"]["f1"] > rivals,
            "told": f"F1 of wrong steps {steps['verifier']['f1']:.3f}; above {rivals:.3f}",
        },
        "answers": {
            "passed": ours is not None and theirs is not None and ours > theirs,
            "told": f"AUC of the score {said(ours)}; above the thinker's own {said(theirs)}",
        },
        "readable": {
            "passed": out["unread"] <= 0.05 * len(rows),
            "told": f"{out['unread']} of {len(rows)} verdicts could not be read; at most 5%",
        },
    }
    return out


def _pairs(rows: Sequence[Judged]) -> tuple[list[bool], list[bool]]:
    pairs = [(s.right, t) for r in rows for s, t in zip(r.gold, r.told, strict=True) if s.claims]
    return [g for g, _ in pairs], [t for _, t in pairs]


def f1(gold: Sequence[bool], told: Sequence[bool]) -> float:
    """Harmonic mean of precision and recall of the wrong steps; 0 where none was found.

    >>> f1([True, False, False], [True, False, True]), f1([True, False], [True, True])
    (0.6666666666666666, 0.0)
    """
    hits = sum(not g and not t for g, t in zip(gold, told, strict=True))
    total = gold.count(False) + told.count(False)  # type: ignore[attr-defined]
    return 2 * hits / total if hits else 0.0


def best_f1(gold: Sequence[bool], values: Sequence[float]) -> float:
    """The best F1 that any threshold on the values gives, those below it being called wrong."""
    ordered = sorted(zip(values, gold, strict=True))
    wrong = sum(not g for g in gold)
    hits, best = 0, 0.0
    for i, (value, g) in enumerate(ordered, 1):
        hits += not g
        if i == len(ordered) or ordered[i][0] != value:
            best = max(best, 2 * hits / (i + wrong))
    return best


def auc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """The chance that a right one scores higher than a wrong one, ties half; None where one kind is missing.

    >>> auc([0.9, 0.5, 0.5, 0.1], [True, True, False, False])
    0.875
    """
    good = [s for s, r in zip(scores, right, strict=True) if r]
    bad = [s for s, r in zip(scores, right, strict=True) if not r]
    if not good or not bad:
        return None
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


def auc_gap(ours: Sequence[Sequence[float]], theirs: Sequence[float], right: Sequence[bool]) -> list[float] | None:
    """AUC of our scores (grouped by problem) less that of theirs, and its 95% interval by resampling problems:
    [gap, low, high]. None where one kind of answer is missing."""
    flat = [s for group in ours for s in group]
    first, second = auc(flat, right), auc(theirs, right)
    if first is None or second is None:
        return None
    starts = [sum(len(g) for g in ours[:i]) for i in range(len(ours))]
    rng, gaps = random.Random(0), []
    for _ in range(RESAMPLES):
        rows = [starts[i] + k for i in rng.choices(range(len(ours)), k=len(ours)) for k in range(len(ours[i]))]
        kinds = [right[r] for r in rows]
        a, b = auc([flat[r] for r in rows], kinds), auc([theirs[r] for r in rows], kinds)
        if a is not None and b is not None:
            gaps.append(a - b)
    gaps.sort()
    low, high = gaps[int(0.025 * len(gaps))], gaps[min(len(gaps) - 1, int(0.975 * len(gaps)))]
    return [first - second, low, high]


def picks(groups: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """Accuracy of one answer in each group, by who picks it; with the difference to the majority, paired by problem."""
    ways: dict[str, list[bool]] = {
        name: [] for name in ("first", "majority", "log-probability", "verifier", "verifier, weighted", "oracle")
    }
    for group in groups:
        answers = [r.answer for r in group]
        scores = [r.verdict.score for r in group]
        likely = [math.exp(min(0.0, fmean(a.logprobs))) if a.logprobs else 0.0 for a in answers]
        chosen = {
            "first": 0,
            "majority": winner_of(votes_of(answers)),
            "log-probability": choose(answers, likely, "best"),
            "verifier": choose(answers, scores, "best"),
            "verifier, weighted": choose(answers, scores, "weighted"),
        }
        for name, i in chosen.items():
            ways[name].append(group[i].right)
        ways["oracle"].append(any(r.right for r in group))
    return {
        name: {"accuracy": fmean(won), "against_majority": paired(won, ways["majority"])}
        for name, won in ways.items()
        if won
    }


def paired(ours: Sequence[bool], theirs: Sequence[bool]) -> list[float]:
    """Mean difference and its 95% interval (normal, paired): [mean, low, high]."""
    gaps = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    mean = fmean(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / max(1, len(gaps) - 1)) ** 0.5
    half = 1.959964 * spread / len(gaps) ** 0.5
    return [mean, mean - half, mean + half]
