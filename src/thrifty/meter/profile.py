"""Where the tokens of a pipeline go, stage by stage: a matrix of stages and kinds of tokens, the share of each stage,
how much input only repeats what was sent before, and what a cap on a stage's rounds would save.

Source: "Tokenomics: Quantifying Where Tokens Are Used in Agentic Software Engineering", whose stages and tables these
are. Its abstract was at hand, not its text: how it averages shares and counts repeats is reconstructed. Reasoning
tokens are a part of the output and are never added to it; each call counts in one stage, its innermost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.errors import InvalidInput, nearest
from thrifty.instrument import Instrument
from thrifty.meter.prices import PriceTable
from thrifty.meter.usage_log import CallRecord
from thrifty.spend import Spend

INSTRUMENT = Instrument(
    name="token-profile",
    kind="analysis",
    paper="Tokenomics: Quantifying Where Tokens Are Used in Agentic Software Engineering",
    runs="thrifty meter profile",
)

CHATDEV: Mapping[str, str] = {
    "DemandAnalysis": "design",
    "LanguageChoose": "design",
    "Coding": "coding",
    "CodeComplete": "code completion",
    "CodeCompleteAll": "code completion",
    "CodeReview": "code review",
    "CodeReviewComment": "code review",
    "CodeReviewModification": "code review",
    "Test": "testing",
    "TestErrorSummary": "testing",
    "TestModification": "testing",
    "EnvironmentDoc": "documentation",
    "Manual": "documentation",
}
"""ChatDev's phases and the stages that the paper maps them to."""

UNNAMED = "(no phase)"


@dataclass(frozen=True, slots=True)
class StageSpend:
    """What one stage spent. `mean_share`: its share of a task's tokens, mean over tasks; `pooled_share`: its share of
    all tokens. They differ where tasks differ in size. `rounds`: the most rounds that any run went through it."""

    stage: str
    spend: Spend
    mean_share: float
    pooled_share: float
    rounds: int

    @property
    def visible(self) -> int:
        """Output tokens that are no reasoning."""
        return self.spend.output - self.spend.reasoning

    @property
    def input_to_output(self) -> float | None:
        """Input tokens for each output token; None without output."""
        return self.spend.input / self.spend.output if self.spend.output else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "stage": self.stage,
            **{k: getattr(self.spend, k) for k in ("input", "cached", "output", "reasoning", "calls", "usd")},
            "visible": self.visible,
            "tokens": self.spend.tokens,
            "mean_share": self.mean_share,
            "pooled_share": self.pooled_share,
            "input_to_output": self.input_to_output,
            "rounds": self.rounds,
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """Stages, the most expensive first; `total` is their sum. `repeated`: the share of input that repeats messages sent
    before in the same run, by characters; None where the log holds no messages."""

    stages: tuple[StageSpend, ...]
    total: Spend
    tasks: int
    repeated: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        total = {k: getattr(self.total, k) for k in ("input", "cached", "output", "reasoning", "calls", "usd")}
        return {
            "tasks": self.tasks,
            "total": {**total, "tokens": self.total.tokens},
            "repeated_input": self.repeated,
            "stages": [stage.to_dict() for stage in self.stages],
        }


def profile(
    records: Iterable[CallRecord],
    stages: Mapping[str, str] | None = None,
    prices: PriceTable | None = None,
) -> Profile:
    """The profile of calls. `stages` maps phases to stages; a phase that is not in it is a stage of its own.

    Raises InvalidInput without calls, or for a model without a price.

    >>> from thrifty.spend import Spend
    >>> calls = [CallRecord("a", "1", "m", Spend(input=60, output=20, calls=1), "write"),
    ...          CallRecord("a", "1", "m", Spend(input=15, output=5, calls=1), "review"),
    ...          CallRecord("b", "1", "m", Spend(input=300, output=100, calls=1), "review")]
    >>> [(s.stage, s.spend.tokens, round(s.mean_share, 2), round(s.pooled_share, 2)) for s in profile(calls).stages]
    [('review', 420, 0.6, 0.84), ('write', 80, 0.4, 0.16)]
    """
    calls = list(records)
    if not calls:
        raise InvalidInput("no calls to profile")
    stage_of = _stage_of(stages)
    sums: dict[str, Spend] = defaultdict(Spend)
    by_task: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    rounds: dict[str, int] = defaultdict(int)
    for call, turn in zip(calls, iterations(calls), strict=True):
        spend = prices.with_price(call.spend, call.model) if prices else call.spend
        stage = stage_of(call.phase)
        sums[stage] += spend
        by_task[call.task][stage] += spend.tokens
        rounds[stage] = max(rounds[stage], turn)
    total = sum(sums.values(), Spend())
    spent = {task: shares for task, shares in by_task.items() if sum(shares.values())}

    def mean_share(stage: str) -> float:
        return sum(s.get(stage, 0) / sum(s.values()) for s in spent.values()) / len(spent) if spent else 0.0

    rows = [
        StageSpend(stage, s, mean_share(stage), s.tokens / total.tokens if total.tokens else 0.0, rounds[stage])
        for stage, s in sums.items()
    ]
    rows.sort(key=lambda row: (-row.spend.tokens, row.stage))
    return Profile(tuple(rows), total, len(by_task), repeated_input(calls))


def repeated_input(records: Iterable[CallRecord]) -> float | None:
    """The share of input tokens that repeat, word for word, a message that was sent before in the same run. A call's
    tokens are split over its messages by their characters. None where no call has messages."""
    seen: dict[tuple[str, str], set[bytes]] = defaultdict(set)
    repeated = whole = 0.0
    for call in records:
        if not call.messages:
            continue
        known = seen[call.task, call.run]
        again = sum(size for digest, size in call.messages if digest in known)
        whole += call.spend.input
        repeated += call.spend.input * again / max(1, sum(size for _, size in call.messages))
        known.update(digest for digest, _ in call.messages)
    return repeated / whole if whole else None


def iterations(records: Sequence[CallRecord]) -> list[int]:
    """The round of each call, from 1: as its record says, else how often its phase has come in its run. Calls of one
    phase that follow each other are of one round.

    >>> phases = ["write", "review", "review", "fix", "review", "fix"]
    >>> iterations([CallRecord("t", "1", "m", Spend(), phase) for phase in phases])
    [1, 1, 1, 1, 2, 2]
    """
    count: dict[tuple[str, str, str], int] = defaultdict(int)
    last: dict[tuple[str, str], str] = {}
    turns = []
    for call in records:
        run = (call.task, call.run)
        if last.get(run) != call.phase:
            count[*run, call.phase] += 1
            last[run] = call.phase
        turns.append(call.iteration if call.iteration is not None else count[*run, call.phase])
    return turns


def capped(
    records: Sequence[CallRecord], stage: str, most: int, stages: Mapping[str, str] | None = None
) -> tuple[Spend, int]:
    """What would not have been spent had a stage ended after `most` rounds, and in how many runs: the sum of its later
    rounds. What those rounds were good for is not in the log. Raises InvalidInput for a stage that is not in it."""
    stage_of = _stage_of(stages)
    known = {stage_of(call.phase) for call in records}
    if stage not in known:
        raise InvalidInput(nearest(stage, known, "stage"))
    if most < 0:
        raise InvalidInput(f"{most} rounds: from 0")
    later = [
        call
        for call, turn in zip(records, iterations(records), strict=True)
        if stage_of(call.phase) == stage and turn > most
    ]
    return sum((call.spend for call in later), Spend()), len({(call.task, call.run) for call in later})


def _stage_of(stages: Mapping[str, str] | None) -> Callable[[str], str]:
    names = stages or {}
    return lambda phase: names.get(phase, phase) or UNNAMED
