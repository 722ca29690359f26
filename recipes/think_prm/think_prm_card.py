"""What is told of a verifier: the figures as text, its curves, and its model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    steps, answers = found["steps"], found["answers"]
    lines = [
        f"{found['traces']} traces of {found['problems']} problems, {answers['right']} right; {found['unread']} unread",
        f"steps: {steps['n']}, {steps['wrong']} wrong",
        *(f"  {who:<18} F1 {steps[who]['f1']:.3f}" for who in ("verifier", "majority", "log-probability")),
        "answers",
        *(f"  {who:<18} AUC {said(value)}" for who, value in answers["auc"].items()),
        f"  verifier less log-probability, by problem: {interval(answers['auc_gap'], 1, 3)}",
        f"one of {found['best_of']['n']}, picked by",
        *(
            f"  {who:<18} {100 * row['accuracy']:.1f}%   against the majority {interval(row['against_majority'])}"
            for who, row in found["best_of"].items()
            if who != "n"
        ),
        *(f"  {name:<12} F1 {row['f1']:.3f}  AUC {said(row['auc'])}" for name, row in found["families"].items()),
        *(f"  {d:<12} F1 {row['f1']:.3f}  AUC {said(row['auc'])}" for d, row in found["difficulties"].items()),
        *(f"{'pass' if g['passed'] else 'FAIL'}  {name:<10}{g['told']}" for name, g in found["gates"].items()),
    ]
    return "\n".join(lines)


def draw(found: dict[str, Any], log: Sequence[dict[str, Any]], file: Path) -> None:
    """The scores of right and wrong answers, figures by difficulty, and the training loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, centre, last) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    kinds = [found["scores"]["right"], found["scores"]["wrong"]]
    left.hist(kinds, bins=20, range=(0, 1), label=["right", "wrong"])
    left.set(xlabel="score", ylabel="answers", title="the verifier's score")
    left.legend()
    levels = list(found["difficulties"])
    centre.plot(levels, [found["difficulties"][d]["f1"] for d in levels], marker="o", label="F1 of wrong steps")
    aucs = [found["difficulties"][d]["auc"] for d in levels]
    centre.plot(levels, [math.nan if a is None else a for a in aucs], marker="o", label="AUC of the score")
    centre.set(xlabel="difficulty", title="held-out problems", ylim=(0, 1.02))
    centre.legend()
    last.plot([row["tokens"] / 1e6 for row in log], [row["loss"] for row in log], lw=0.8)
    last.set(xlabel="training tokens (millions)", ylabel="loss a learned token", title="training")
    last.set(yscale="log" if log else "linear")
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def card(config: dict[str, Any], told: dict[str, Any]) -> str:
    """The model card as Markdown."""
    run, steps, auc_of = told["run"], told["steps"], told["answers"]["auc"]
    settings, used = config["data"], [n for n, w in config["data"]["families"].items() if w]
    seconds, made = run["seconds"], run["traces"]

    def share(name: str) -> str:
        return f"{100 * settings[name]:g}%"

    who = ("verifier", "majority", "log-probability")
    figures = "\n".join(f"| {w} | {steps[w]['f1']:.3f} | {said(auc_of[w])} |" for w in who)
    best = "\n".join(
        f"| {w} | {100 * row['accuracy']:.1f}% | {interval(row['against_majority'])} |"
        for w, row in told["best_of"].items()
        if w != "n"
    )
    by_family = "\n".join(
        f"| {n} | {row['traces']} | {row['right']} | {row['f1']:.3f} | {said(row['auc'])} |"
        for n, row in told["families"].items()
    )
    gates = "\n".join(
        f"| {n} | {'pass' if g['passed'] else '**fail**'} | {g['told']} |" for n, g in told["gates"].items()
    )
    return f"""---
license: apache-2.0
library_name: transformers
---
# Thinker verifier

The thinker ({run["parameters"] / 1e6:.2f} million parameters), fine-tuned to check what the thinker thinks. It reads a
question and a solution line by line, writes for each line what it should say, what it says, and ` right` or ` not`,
and ends with `Answer: Yes` or `Answer: No`, whose probability is the score. After "Process Reward Models That Think"
(Khalifa et al. 2025): it generates its verdicts; it has no classifying head. It knows the lab's problems
({", ".join(used)}) and nothing else.

## Use

As the scorer of `think-prm`, of `best-of-n`, `beam` and `a-star-decoding` with `score = "verifier"`, and of
`fractured-sampling` with `select = "verifier"`. Its chat template says how it is asked; nothing is to be set.

    [engines]
    answer = "thinker"
    scorer = "thinker-verifier"

## Gates

| gate | | |
| --- | --- | --- |
{gates}

## Measured

{told["traces"]} traces that the thinker wrote at temperature 1 about {told["problems"]} problems new to the verifier
({told["answers"]["right"]} answers right; {steps["n"]:,} steps, {steps["wrong"]} wrong by the exact labels);
{told["unread"]} verdicts could not be read and count as right steps and a score of 0.5. The majority says that every
step is right. The log-probability is the thinker's own, its threshold for steps the best there is on these very data.

| | F1 of wrong steps | AUC of the score |
| --- | --- | --- |
{figures}

AUC of the verifier less the thinker's own, 95% by resampling problems: {interval(told["answers"]["auc_gap"], 1, 3)}.
ProcessBench's figure (first error found exactly, and none where there is none): {said(told["process_bench"])}.
One answer of {told["best_of"]["n"]}, by who picks it (difference to the majority in points, paired, 95%):

| | right | against the majority |
| --- | --- | --- |
{best}

The thinker wrote {told["tokens"]["thinker"]:,} tokens, the verifier {told["tokens"]["verifier"]:,} about them.

| family | traces | right | F1 of wrong steps | AUC |
| --- | --- | --- | --- | --- |
{by_family}

![curves](curves.png)

## Data

{made["sampled"]:,} traces of the thinker at temperature 1, of which {made["ended"]:,} ended; chains were written by
deriving each problem anew beside the trace and kept where every label is the exact one ({made["kept"]:,} kept,
{made["with_an_error"]:,} of them with a wrong step). {share("written")} of the examples are traces of the lab's
own writer with slips of {settings["slips"]} a step; of the thinker's own, {share("mistaken")} are drawn to hold a wrong
step; {share("beginnings")} of all are only the beginning of a trace. No outer data. Seed {run["seed"]}.

## Training

{run["steps"]:,} steps, {run["tokens"] / 1e6:.1f} million tokens with padding, from the thinker's weights (SHA-256
{run["base"][:16]}). Seconds: {seconds.get("sampling", 0):.0f} sampling, {seconds["training"]:.0f} training,
{seconds.get("measuring", 0):.0f} measuring, on {run["threads"]} thread(s) ({run["machine"]}, PyTorch {run["torch"]}).
`python recipes/think_prm/train.py --model thinker --out DIR --seed {run["seed"]}` makes it again.

Licence: Apache-2.0, trained from generated data only.
"""


def interval(row: Sequence[float] | None, scale: float = 100, digits: int = 1) -> str:
    """A difference with its interval."""
    if row is None:
        return "none"
    mean, low, high = (scale * x for x in row)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def said(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
