"""Overthinking scores: how many tokens a model spends beyond what its questions take (Pu et al. 2025, section 2).

Runs in, numbers out: a `Run` is one sample of one model on one question. All scores are in tokens and mean over
questions, each question with the same weight however many samples it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from thrifty.errors import InvalidInput
from thrifty.instrument import Instrument

INSTRUMENT = Instrument(
    name="overthinking-scores",
    kind="evaluation",
    paper=(
        "ThoughtTerminator: Benchmarking, Calibrating, and Mitigating Overthinking (Pu et al. 2025, arXiv:2504.13367)"
    ),
    runs="thrifty.bench.easy:overthinking",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One sample: what it cost in output tokens, and whether it was right."""

    question: str
    model: str
    tokens: int
    correct: bool


@dataclass(frozen=True, slots=True)
class Score:
    """A model's score, over how many questions it is, and how many had to be left out."""

    tokens: float
    questions: int
    left_out: int = 0


def difficulty(runs: Iterable[Run]) -> dict[str, float]:
    """D(q), the mean inaccuracy of a question: of each model's samples first, then of the models (equations 1 and 2).

    >>> difficulty([Run("q", "a", 9, True), Run("q", "a", 8, False), Run("q", "b", 7, False)])
    {'q': 0.75}
    """
    return {
        question: _mean(_mean(float(not r.correct) for r in samples) for samples in models.values())
        for question, models in _table(runs).items()
    }


def least(runs: Iterable[Run]) -> dict[str, int | None]:
    """The observed minimum spend of each question: its shortest correct run of any model; None without a correct one.

    >>> least([Run("q", "a", 9, True), Run("q", "b", 4, False), Run("q", "b", 7, True)])
    {'q': 7}
    """
    return {
        question: min((r.tokens for samples in models.values() for r in samples if r.correct), default=None)
        for question, models in _table(runs).items()
    }


def global_overthinking(runs: Iterable[Run]) -> dict[str, Score]:
    """O_g(M): a model's mean spend on a question less the question's observed minimum, over questions (equation 3).

    Questions that nobody answered correctly have no minimum and are left out, and counted.

    >>> global_overthinking([Run("q", "a", 10, True), Run("q", "a", 20, False), Run("q", "b", 5, True)])["a"]
    Score(tokens=10.0, questions=1, left_out=0)
    """
    kept = list(runs)
    minima = least(kept)
    return {
        model: _score(
            {q: None if minima[q] is None else _mean(r.tokens for r in rs) - (minima[q] or 0) for q, rs in of}
        )
        for model, of in _by_model(kept).items()
    }


def envelope(runs: Iterable[Run], *, correct_only: bool = False) -> dict[str, Score]:
    """O_env(M): a model's longest run of a question less its shortest, over questions (equation 4).

    All runs count, as the text has it; `correct_only` takes correct ones (then questions without are left out): whether
    the published scores filter is not stated. It is 0 for a model whose runs are all alike.

    >>> envelope([Run("q", "a", 10, True), Run("q", "a", 25, False)])
    {'a': Score(tokens=15.0, questions=1, left_out=0)}
    """
    scores = {}
    for model, of in _by_model(runs).items():
        spends = {q: [r.tokens for r in rs if r.correct or not correct_only] for q, rs in of}
        scores[model] = _score({q: float(max(s) - min(s)) if s else None for q, s in spends.items()})
    return scores


# -- details -------------------------------------------------------------------------------------------------------


def _table(runs: Iterable[Run]) -> dict[str, dict[str, list[Run]]]:
    table: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.tokens < 0:
            raise InvalidInput(f"a run of {run.question!r} with {run.tokens} tokens: at least 0 is needed")
        table.setdefault(run.question, {}).setdefault(run.model, []).append(run)
    return table


def _by_model(runs: Iterable[Run]) -> dict[str, list[tuple[str, list[Run]]]]:
    found: dict[str, list[tuple[str, list[Run]]]] = {}
    for question, models in _table(runs).items():
        for model, samples in models.items():
            found.setdefault(model, []).append((question, samples))
    return found


def _score(values: Mapping[str, float | None]) -> Score:
    known = [v for v in values.values() if v is not None]
    return Score(_mean(known) if known else 0.0, len(known), len(values) - len(known))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
