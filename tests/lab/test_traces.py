"""Traces: what they conclude, and how often they err, doubt, repair and repeat, counted on 2,000 samples."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from thrifty import InvalidInput
from thrifty.lab.tasks import DIFFICULTIES, FAMILIES, check, make
from thrifty.lab.traces import CLOSE, OPEN, SKIPPED, Habits, Trace, first_and_last, shares, write

PLAIN = Habits(direct=0.0, cut=0.0)


def some(n: int, habits: Habits, seed: int = 0, family: str | None = None) -> list[Trace]:
    rng = random.Random(seed)
    names = [family] if family else list(FAMILIES)
    return [write(make(rng.choice(names), rng, rng.choice(DIFFICULTIES)), rng, habits) for _ in range(n)]


def right(trace: Trace, answer: str) -> bool:
    return check(trace.problem.family, trace.problem.question, answer)


def test_without_slips_every_trace_is_right_whatever_its_kind() -> None:
    for trace in some(600, Habits(slip=0.0, careful=0.0, direct=0.2, cut=0.3)):
        assert trace.slips == 0 and right(trace, trace.final)
        assert trace.text.rpartition("</think>")[2].strip().rstrip("}").endswith(trace.problem.answer)


def test_the_answer_is_what_the_thinking_arrived_at() -> None:
    for trace in some(600, replace(PLAIN, slip=0.1)):
        thinking, _, answer = trace.text.removeprefix(OPEN).partition(CLOSE)
        assert first_and_last(thinking) == (trace.first, trace.final)
        assert answer == f"Answer: {trace.final}"
        assert (trace.slips > 0) >= (trace.first != trace.problem.answer), "a wrong answer has a slip behind it"
        standing = trace.first
        for check_ in trace.rechecks:
            assert check_.before == standing
            said = thinking[check_.start : check_.end]
            assert said.startswith("Alternatively" if check_.form == "other way" else "Wait") and said.endswith("\n\n")
            assert (check_.form != "glance") or check_.after == standing
            standing = check_.after
        assert standing == trace.final


def test_a_slip_is_made_at_the_set_rate_a_step() -> None:
    """Counting has one slip a line at most, so lines and slips can be counted apart."""
    traces = some(2000, replace(PLAIN, slip=0.05, recheck=()), family="counting")
    lines = sum(len(t.problem.steps) for t in traces)
    slips = sum(t.slips for t in traces)
    assert abs(slips / lines - 0.05) < 4 * (0.05 * 0.95 / lines) ** 0.5


def test_shares_are_as_configured_on_2000_samples() -> None:
    habits = Habits(slip=0.04, careful=0.0, recheck=(0.7, 0.4), glance=0.6, other_way=0.5, direct=0.15, cut=0.2)
    traces = some(2000, habits, seed=3)

    def near(found: float, wanted: float, n: int) -> bool:
        return abs(found - wanted) < 4 * (wanted * (1 - wanted) / n) ** 0.5

    for kind, wanted in (("direct", 0.15), ("cut", 0.2), ("plain", 0.65)):
        assert near(sum(t.kind == kind for t in traces) / 2000, wanted, 2000)
    plain = [t for t in traces if t.kind == "plain"]
    assert near(sum(bool(t.rechecks) for t in plain) / len(plain), 0.7, len(plain))
    again = [t for t in plain if t.rechecks]
    assert near(sum(len(t.rechecks) == 2 for t in again) / len(again), 0.4, len(again))
    short = [t for t in plain if t.problem.difficulty <= 3]  # long thinking begins no further derivation
    forms = [r.form for t in short for r in t.rechecks]
    assert near(forms.count("glance") / len(forms), 0.6, len(forms))
    both_ways = [r.form for t in short if FAMILIES[t.problem.family].ways > 1 for r in t.rechecks if r.form != "glance"]
    assert near(both_ways.count("other way") / len(both_ways), 0.5, len(both_ways))
    counted = shares(traces)
    wrong = [t for t in plain if t.first != t.problem.answer]
    assert counted.examples == len(plain) and counted.mistaken == len(wrong) / len(plain)
    # a repair needs a derivation among at most two re-checks: 1 - (1 - 0.7 * 0.4) * ... in closed form
    repair = 0.7 * (0.4 + 0.6 * 0.4 * 0.4)
    short_wrong = [t for t in wrong if t.problem.difficulty <= 3]
    assert near(sum(t.final == t.problem.answer for t in short_wrong) / len(short_wrong), repair, len(short_wrong))
    assert counted.spoiled == 0.0, "re-checks without slips spoil nothing"


def test_the_shipped_habits_overthink_and_repair_some() -> None:
    counted = shares(some(2000, Habits(), seed=9))
    assert 0.10 < counted.repaired < 0.45
    assert counted.redundant > 0.7 and counted.redundant_thinking > 0.25
    assert 0.05 < counted.mistaken < 0.35 and counted.spoiled < 0.05


def test_what_a_method_would_force_is_not_learned() -> None:
    for trace in some(400, Habits(direct=0.5, cut=0.5)):
        learned = [text for text, wanted in trace.parts if wanted]
        assert learned[-1].strip().rstrip("}").endswith(trace.final)
        assert not any("</think>" in text for text in learned)
        if trace.kind == "direct":
            assert len(learned) == 1 and trace.parts[0][0].startswith(SKIPPED)
        else:
            assert len(learned) == 2 and learned[0].startswith(OPEN)


def test_cut_thinking_answers_with_what_it_had_concluded() -> None:
    for trace in some(400, Habits(slip=0.2, direct=0.0, cut=1.0)):
        kept = trace.parts[0][0].removeprefix(OPEN)
        said = [line for line in kept.split("\n")[:-1] if line.startswith("So ")]
        wanted = said[-1].removeprefix("So ").split(",")[0].rstrip(".") if said else trace.problem.answer
        assert trace.final == wanted


@pytest.mark.parametrize("given", [{"slip": 1.5}, {"direct": 0.6, "cut": 0.6}, {"recheck": [2.0]}, {"slips": 0.1}])
def test_habits_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="habits"):
        Habits.from_dict(given)
