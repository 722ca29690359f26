"""The gates that the thinker passes before it ships, measured through the local engine.

    python recipes/thinker/gates.py --model out/thinker/model --config recipes/thinker/config.toml --out out/thinker

Every problem is new (its seed is none of training's), every answer is judged by its family's verifier, and every figure
of accuracy has a 95% Wilson interval. Prints a table, writes `gates.json` and `curves.png`, and ends with status 1 when
a gate fails.

    thinking      at the middle difficulties, accuracy without thinking is at least 20 points below that with it
    budget        accuracy rises with allowed thinking (cut there and closed by force), then flattens
    difficulty    the easiest problems are answered right more often than the hardest, by at least 10 points
    repair        10 to 40% of first answers that were wrong are right in the end
    speed         at least 5,000 tokens/s at batch 64 on two threads, a decode policy on every branch
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thrifty import Account, Answer, Call, Sampling
from thrifty.lab.suite import answer_of
from thrifty.lab.tasks import DIFFICULTIES, Problem, check, make
from thrifty.lab.traces import CLOSE, OPEN, SKIPPED, first_and_last
from thrifty.policy import CONTINUE, DecodePolicy

HERE = Path(__file__).parent
SEED = 7_000_000
LIMIT = 800
"""output tokens of a generation that may think as long as it likes"""
BUDGETS = (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""thinking tokens allowed, of the curve"""
CUE = "Answer: "
BATCH = 64


@dataclass(frozen=True)
class Rate:
    """`right` of `n`, with a 95% Wilson interval."""

    right: int
    n: int

    @property
    def mean(self) -> float:
        return self.right / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        if not self.n:
            return 0.0, 1.0
        z, p, n = 1.959964, self.mean, self.n
        centre, half = p + z * z / (2 * n), z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
        return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))

    def told(self) -> dict[str, Any]:
        return {
            "right": self.right,
            "n": self.n,
            "mean": round(self.mean, 4),
            "interval": [round(x, 4) for x in self.interval],
        }


@dataclass(frozen=True)
class Seen:
    """One problem as the model did it: thinking freely, not at all, and cut at every budget."""

    problem: Problem
    thinking: int
    """tokens"""
    finished: bool
    first: bool | None
    """whether the first conclusion was right; None without one"""
    last: bool
    direct: bool
    greedy: bool
    rechecks: int
    redundant: int
    """re-checks that began when the standing answer was right"""
    at: dict[int, bool]


def right(problem: Problem, text: str | None) -> bool:
    """Whether a text answers the problem."""
    if text is None:
        return False
    return check(problem.family, problem.question, answer_of(text))


class Gates:
    """Generates and judges. `engine` is a LocalEngine."""

    def __init__(self, engine: Any, temperature: float) -> None:
        self.engine, self.temperature = engine, temperature

    async def ask(
        self,
        question: str,
        *,
        prefix: str | None = None,
        tokens: int = LIMIT,
        temperature: float | None = None,
        seed: int = 0,
    ) -> Answer:
        warmth = self.temperature if temperature is None else temperature
        sampling = Sampling(temperature=warmth, seed=seed, max_tokens=tokens)
        message = {"role": "user", "content": question}
        answer: Answer = await self.engine.generate(
            Call((message,), Account("gates"), prefix=prefix, sampling=sampling)
        )
        return answer

    async def see(self, problem: Problem, seed: int) -> Seen:
        """All that the gates ask of one problem."""
        question = problem.question
        free, direct, greedy = await asyncio.gather(
            self.ask(question, seed=seed),
            self.ask(question, prefix=SKIPPED[0] + CUE, tokens=24, seed=seed),
            self.ask(question, temperature=0.0),
        )
        ids = self.engine.codec.encode(free.thinking)
        budgets = [budget for budget in BUDGETS if budget < len(ids)]
        cut = await asyncio.gather(*(self.forced(problem, ids[:budget], seed) for budget in budgets))
        done = right(problem, free.text)
        first, last = first_and_last(free.thinking)
        standing = [right(problem, said) for said in _conclusions(free.thinking)]
        return Seen(
            problem=problem,
            thinking=len(ids),
            finished=free.finish == "stop",
            first=None if first is None else right(problem, first),
            last=done,
            direct=right(problem, direct.text),
            greedy=right(problem, greedy.text),
            rechecks=len(standing),
            redundant=sum(standing),
            at={**{budget: done for budget in BUDGETS}, **dict(zip(budgets, cut, strict=True))},
        )

    async def forced(self, problem: Problem, thought: list[int], seed: int) -> bool:
        """Whether the answer is right when thinking is closed after these tokens."""
        kept = self.engine.codec.decode(thought)
        prefix = f"{OPEN}{kept.removeprefix(OPEN_BREAK)}{'' if kept.endswith(OPEN_BREAK) else OPEN_BREAK}{CLOSE}{CUE}"
        return right(problem, (await self.ask(problem.question, prefix=prefix, tokens=24, seed=seed)).text)

    async def speed(self, seconds: float = 8.0, warm: float = 1.0) -> dict[str, float]:
        """Output tokens a second with 64 rows in flight, each under a policy that sees logits and tokens.

        A row that ends is followed by another, so prefills count; the window begins after `warm` seconds, and what is
        still running at its end is cancelled.
        """
        rng, meter = random.Random(SEED), Meter()

        async def row(number: int) -> None:
            while True:
                problem = make("arithmetic", rng, 5)
                message = {"role": "user", "content": problem.question}
                sampling = Sampling(temperature=self.temperature, seed=number, max_tokens=LIMIT)
                call = Call((message,), Account("speed"), sampling=sampling, policies=(Watch(meter),))
                await self.engine.generate(call)

        rows = [asyncio.create_task(row(i)) for i in range(BATCH)]
        try:
            await asyncio.sleep(warm)
            began, before, worked = time.perf_counter(), meter.tokens, time.process_time()
            await asyncio.sleep(seconds)
            took, tokens = time.perf_counter() - began, meter.tokens - before
            worked = time.process_time() - worked
        finally:
            for task in rows:
                task.cancel()
            await asyncio.gather(*rows, return_exceptions=True)
        return {"tokens": tokens, "seconds": round(took, 2), "processor_seconds": round(worked, 2)}


class Meter:
    """How many tokens were drawn. Only the engine's thread counts."""

    def __init__(self) -> None:
        self.tokens = 0


OPEN_BREAK = "\n"


class Watch(DecodePolicy):
    """Reads every step's logits and token and changes nothing, so that the speed is that of a branch under a policy."""

    name = "watch"

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def logits(self, branch: Any, logits: Any) -> Any:
        return logits

    def after(self, branch: Any, token: int) -> Any:
        self.meter.tokens += 1
        return CONTINUE


def _conclusions(thinking: str) -> list[str | None]:
    """What stood when each re-check began."""
    return [first_and_last(thinking[: thinking.index(part)])[1] for part in _rechecks(thinking)]


def _rechecks(thinking: str) -> list[str]:
    """The thinking from each re-check on."""
    parts = thinking.split("\n\n")
    found = []
    for i, part in enumerate(parts):
        if i and part.startswith(("Wait", "Alternatively")):
            found.append("\n\n".join(parts[i:]))
    return found


# --- judging ---


def judge(seen: list[Seen], speed: dict[str, float], middle: list[int]) -> dict[str, Any]:
    """All figures and whether each gate is passed."""
    mid = [s for s in seen if s.problem.difficulty in middle]
    families = sorted({s.problem.family for s in seen})

    def rate(rows: list[Seen], what: str) -> Rate:
        return Rate(sum(bool(getattr(s, what)) for s in rows), len(rows))

    curve = {budget: Rate(sum(s.at[budget] for s in mid), len(mid)) for budget in BUDGETS}
    means = [curve[b].mean for b in BUDGETS]
    half = means[len(means) // 2]
    wrong = [s for s in seen if s.first is False]
    repaired = Rate(sum(s.last for s in wrong), len(wrong))
    gap = rate(mid, "last").mean - rate(mid, "direct").mean
    easy, hard = (rate([s for s in seen if s.problem.difficulty == d], "last").mean for d in (1, 5))
    pace = speed["tokens"] / speed["seconds"]
    gates = {
        "thinking": (gap >= 0.20, f"{100 * gap:.1f} points more with thinking at difficulty {middle}; at least 20"),
        "budget": (
            max(means[:3]) + 0.10 <= max(means) and abs(means[-1] - means[-2]) <= 0.03 and half > means[0],
            f"{100 * means[0]:.0f}% without, {100 * half:.0f}% at {BUDGETS[len(means) // 2]} tokens, "
            f"{100 * means[-2]:.0f}% at {BUDGETS[-2]}, {100 * means[-1]:.0f}% at {BUDGETS[-1]}",
        ),
        "difficulty": (
            easy - hard >= 0.10,
            f"{100 * easy:.0f}% at 1, {100 * hard:.0f}% at 5; at least 10 points apart",
        ),
        "repair": (
            0.10 <= repaired.mean <= 0.40,
            f"{repaired.right} of {repaired.n} first answers that were wrong: {100 * repaired.mean:.0f}%; 10 to 40%",
        ),
        "speed": (pace >= 5000, f"{pace:,.0f} tokens/s at batch {BATCH}; at least 5,000"),
    }
    checks = sum(s.rechecks for s in seen)
    return {
        "gates": {name: {"passed": bool(ok), "told": told} for name, (ok, told) in gates.items()},
        "middle": middle,
        "suggested_middle": [
            d
            for d in DIFFICULTIES
            if (rows := [s for s in seen if s.problem.difficulty == d])
            and rate(rows, "last").mean - rate(rows, "direct").mean >= 0.20
            and 0.35 <= rate(rows, "last").mean <= 0.90
        ],
        "families": {
            name: {
                str(d): {
                    "thinking": rate(rows, "last").told(),
                    "direct": rate(rows, "direct").told(),
                    "greedy": rate(rows, "greedy").told(),
                    "tokens": round(sum(s.thinking for s in rows) / max(1, len(rows)), 1),
                }
                for d in DIFFICULTIES
                if (rows := [s for s in seen if s.problem.family == name and s.problem.difficulty == d])
            }
            for name in families
        },
        "curve": {str(budget): curve[budget].told() for budget in BUDGETS},
        "repair": repaired.told(),
        "first_wrong": Rate(len(wrong), sum(s.first is not None for s in seen)).told(),
        "unfinished": Rate(sum(not s.finished for s in seen), len(seen)).told(),
        "rechecks": {
            "a_problem": round(checks / max(1, len(seen)), 3),
            "redundant": Rate(sum(s.redundant for s in seen), checks).told(),
        },
        "speed": {**speed, "tokens_per_second": round(pace)},
    }


def failing(found: dict[str, Any], least: float = 0.20) -> list[str]:
    """The families whose own gap between thinking and none is under `least` at the middle difficulties."""
    return [
        name
        for name, rows in found["families"].items()
        if sum(rows[str(d)]["thinking"]["mean"] - rows[str(d)]["direct"]["mean"] for d in found["middle"])
        < least * len(found["middle"])
    ]


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = ["family      difficulty  thinking        direct  greedy  tokens"]
    for name, rows in found["families"].items():
        for d, row in rows.items():
            low, high = row["thinking"]["interval"]
            lines.append(
                f"{name:<12}{d:<12}{row['thinking']['mean']:.2f} [{low:.2f}-{high:.2f}]  {row['direct']['mean']:.2f}"
                f"    {row['greedy']['mean']:.2f}    {row['tokens']:.0f}"
            )
    lines += [
        f"{'pass' if gate['passed'] else 'FAIL'}  {name:<12}{gate['told']}" for name, gate in found["gates"].items()
    ]
    lines.append(
        f"difficulties at which thinking decides and methods can show a difference: {found['suggested_middle']}"
    )
    if bad := failing(found):
        lines.append(f"families that gain less than 20 points by thinking: {', '.join(bad)}")
    return "\n".join(lines)


def draw(found: dict[str, Any], log: list[dict[str, Any]], file: Path) -> None:
    """Accuracy by allowed thinking, accuracy by difficulty, and the training loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, centre, last) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    budgets = [int(b) for b in found["curve"]]
    rates = list(found["curve"].values())
    left.plot(budgets, [r["mean"] for r in rates], marker="o", ms=3)
    left.fill_between(budgets, [r["interval"][0] for r in rates], [r["interval"][1] for r in rates], alpha=0.2)
    left.set(xlabel="thinking tokens allowed", ylabel="accuracy", title=f"difficulty {found['middle']}", ylim=(0, 1))
    for name, rows in found["families"].items():
        (line,) = centre.plot(
            [int(d) for d in rows], [r["thinking"]["mean"] for r in rows.values()], marker="o", ms=3, label=name
        )
        centre.plot(
            [int(d) for d in rows], [r["direct"]["mean"] for r in rows.values()], ls=":", color=line.get_color()
        )
    centre.set(xlabel="difficulty", title="with thinking, and without (dotted)", ylim=(0, 1))
    centre.legend(fontsize=7)
    last.plot([row["tokens"] / 1e6 for row in log], [row["loss"] for row in log], lw=0.8)
    last.set(
        xlabel="training tokens (millions)",
        ylabel="loss a learned token",
        title="training",
        yscale="log" if log else "linear",
    )
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


async def measure(
    folder: Path, config: dict[str, Any], examples: int, seconds: float
) -> tuple[list[Seen], dict[str, float]]:
    """Everything that `judge` needs."""
    from thrifty.engines.local.engine import LocalEngine

    engine = LocalEngine.load(folder, max_batch=BATCH)
    gates = Gates(engine, float(config["gates"]["temperature"]))
    problems = [
        make(name, random.Random(f"gates:{SEED}:{name}:{d}:{i}"), d)
        for name in config["data"]["families"]
        for d in DIFFICULTIES
        for i in range(examples)
    ]
    try:
        seen = await asyncio.gather(*(gates.see(problem, SEED + i) for i, problem in enumerate(problems)))
        speed = await gates.speed(seconds)
    finally:
        await engine.aclose()
    return list(seen), speed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, help="a family and difficulty; else the configuration's")
    parser.add_argument("--speed-seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    examples = given.examples or int(config["gates"]["examples"])
    seen, speed = asyncio.run(measure(given.model, config, examples, given.speed_seconds))
    found = judge(seen, {**speed, "threads": given.threads}, list(config["gates"]["middle"]))
    found |= {"seed": SEED, "examples": examples, "temperature": config["gates"]["temperature"]}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gates.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    with (given.out / "seen.jsonl").open("w", encoding="utf-8") as stream:
        for one in seen:
            stream.write(json.dumps({**asdict(one), "at": {str(k): v for k, v in one.at.items()}}) + "\n")
    logged = given.out / "log.jsonl"
    log = [json.loads(line) for line in logged.read_text(encoding="utf-8").splitlines()] if logged.is_file() else []
    draw(found, log, given.out / "curves.png")
    print(table(found))
    return 0 if all(gate["passed"] for gate in found["gates"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
