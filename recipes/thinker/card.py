"""Writes the thinker's model card from its configuration, its run and its gates, and puts the model into the package.

    python recipes/thinker/card.py --run out/thinker            # the card only, out/thinker/model/README.md
    python recipes/thinker/card.py --run out/thinker --ship     # and copies the folder to src/thrifty/lab/thinker

`--ship` refuses a model that fails a gate.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

from thrifty.engines.local import packaged
from thrifty.lab.tasks import DIFFICULTIES, make
from thrifty.lab.traces import Habits, Shares, shares, write

HERE = Path(__file__).parent
SAMPLES = 20_000
_HOW = ("thinking", "direct", "greedy")


def counted(config: dict[str, Any]) -> Shares:
    """What the training data hold, on a sample of it."""
    rng, families = random.Random(config["seed"]), config["data"]["families"]
    habits = Habits.from_dict(config["habits"])
    names, late = list(families), config["data"]["late"]
    problems = (
        make(rng.choices(names, list(families.values()))[0], rng, rng.choices(DIFFICULTIES, late)[0])
        for _ in range(SAMPLES)
    )
    return shares(write(problem, rng, habits) for problem in problems)


def card(config: dict[str, Any], run: dict[str, Any], gates: dict[str, Any], data: Shares) -> str:
    """The card as Markdown."""
    habits, model = config["habits"], config["model"]
    used = [name for name, weight in config["data"]["families"].items() if weight]
    left = [name for name in config["data"]["families"] if name not in used]
    families = "\n".join(
        f"| {name} | {d} | {' | '.join(_rate(row[how]) for how in _HOW)} | {row['tokens']:.0f} |"
        for name, rows in gates["families"].items()
        for d, row in rows.items()
    )
    curve = " | ".join(f"{100 * rate['mean']:.0f}%" for rate in gates["curve"].values())
    passed = "\n".join(
        f"| {name} | {'pass' if g['passed'] else '**fail**'} | {g['told']} |" for name, g in gates["gates"].items()
    )
    dropped = f"\nFamilies left out because they failed a gate: {', '.join(left)}.\n" if left else ""
    return f"""---
license: apache-2.0
library_name: transformers
---
# Thinker

A Llama of {run["parameters"] / 1e6:.2f} million parameters that thinks about generated problems between `<think>` and
`</think>`, errs, doubts, repairs some of its errors, checks again what was right, and answers. It exists so that
methods which spend fewer thinking tokens can be tried in seconds, on two cores, on a model that thinks. It knows
nothing else.

**It is built to overthink.** {100 * data.redundant:.0f}% of the re-checks in its training data begin when the
standing answer is right already, and they take {100 * data.redundant_thinking:.0f}% of all thinking. These shares were
set before any method was measured on it. A saving measured on this model is a saving on a model made so; it says how a
method acts, not how much it saves on another model.

## Use

Questions have the form of the task families ({", ".join(used)}), for instance `{_example(used[0])}`. It was trained to
be sampled at temperature {gates["temperature"]:g}; greedily it hardly errs, doubts or repairs. Context
{model["max_position_embeddings"]:,} tokens. Text outside printable ASCII is unknown to it.

    thrifty ask --model thinker --temperature 1 "{_example(used[0])}"

## Gates

| gate | | |
| --- | --- | --- |
{passed}

Measured on {gates["examples"]} new problems a family and difficulty, judged by exact verifiers, through Thrifty's local
engine. First answers that were wrong: {_rate(gates["first_wrong"])}; of them repaired by reflection:
{_rate(gates["repair"])}; re-checks a problem: {gates["rechecks"]["a_problem"]:.2f}, of them redundant
{_rate(gates["rechecks"]["redundant"])}; generations that did not end by themselves: {_rate(gates["unfinished"])}.

Accuracy by allowed thinking at difficulty {gates["middle"]} (cut there, closed by force):

| {" | ".join(gates["curve"])} |
|{" --- |" * len(gates["curve"])}
| {curve} |

![curves](curves.png)

| family | difficulty | with thinking | without | greedy | thinking tokens |
| --- | --- | --- | --- | --- | --- |
{families}

Intervals are 95% Wilson.
{dropped}
## Data

Generated while it trains, by `thrifty.lab.tasks` and `thrifty.lab.traces`; seed {config["seed"]}; puzzles without a
solution are not made. Set in the recipe: a slip in {100 * habits["slip"]:g}% of steps, {100 * habits["careful"]:g}% in
re-checks; re-checks with chances {habits["recheck"]}; {100 * habits["glance"]:g}% of them are glances that look at one
line and say yes. Counted on {data.examples:,} traces: {100 * data.mistaken:.1f}% of first answers are wrong,
{100 * data.repaired:.0f}% of those are repaired, {100 * data.spoiled:.1f}% of all are right first and spoiled.
{100 * habits["direct"]:g}% of examples answer without thinking and {100 * habits["cut"]:g}% after thinking that is cut,
so that methods which force an answer meet a model that has been forced before; what a method would force is not
learned.

## Training

{run["steps"]:,} steps, {run["tokens"] / 1e6:.0f} million tokens with padding, {run["minutes"]:.0f} minutes on
{run["threads"]} threads ({run["machine"]}, {run["device"]}, PyTorch {run["torch"]}); {config["training"]["matrices"]}
and AdamW at {config["training"]["rate"]:g}. `python recipes/thinker/train.py` makes it again.

Licence: Apache-2.0, trained from generated data only.
"""


def _rate(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{100 * rate['mean']:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"


def _example(family: str) -> str:
    return make(family, random.Random(3), 2).question


def ship(folder: Path) -> Path:
    """Copies the model's folder into the package, with a manifest."""
    into = packaged.MODELS["thinker"].folder
    into.mkdir(exist_ok=True)
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, into / file.name)
    packaged.write_manifest(into)
    return into


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py and gates.py wrote")
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--ship", action="store_true")
    given = parser.parse_args()
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    run, gates = (json.loads((given.run / name).read_text(encoding="utf-8")) for name in ("run.json", "gates.json"))
    folder = given.run / "model"
    (folder / "README.md").write_text(card(config, run, gates, counted(config)), encoding="utf-8")
    if (curves := given.run / "curves.png").is_file():
        shutil.copyfile(curves, folder / "curves.png")
    print(folder / "README.md")
    failed = [name for name, gate in gates["gates"].items() if not gate["passed"]]
    if given.ship:
        if failed:
            print(f"not shipped: it fails {', '.join(failed)}")
            return 1
        print(ship(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
