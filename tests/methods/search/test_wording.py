"""What a verifier is asked, what its chain says of every line, and which wording an engine's template names."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty import Account, Answer, Call
from thrifty.engines.scripted import PROVIDES, Draw, ScriptedEngine
from thrifty.methods.search._verifier import NEUTRAL, Verifier
from thrifty.methods.search._wording import BOXED, CUE, LINES, mark, paragraphs_of, wording_for
from thrifty.methods.search.best_of_n import BestOfN

HARD = PROVIDES - {"logprobs"}
SOLUTION = "27+5=33\n33-8=25\nSo 25.\n\nWait, let me check.\n27+5=32\nSo 24, not 25.\n\nAnswer: 24"
CHAIN = "27+5=32 not\n\nWait\n27+5=32 right\n32-8=24 not\n\nAnswer: No"


def test_a_chain_is_read_line_by_line_beside_the_solution() -> None:
    reading = LINES.read(CHAIN, SOLUTION)
    assert reading.labels == (False, None, None, None, True, False, False)
    assert reading.first_error == 0 and reading.correct is False


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=4), st.booleans())
def test_every_paragraph_is_read_up_to_its_first_wrong_line(rows: list[list[bool]], word: bool) -> None:
    solution = "\n\n".join("\n".join(f"l{i}{j}" for j in range(len(row))) for i, row in enumerate(rows))
    told, labels = [], []
    for row in rows:
        upto = row.index(False) + 1 if False in row else len(row)
        told.append("\n".join(f"xyz {'right' if right else 'not'}" for right in row[:upto]))
        labels += [*row[:upto], *[None] * (len(row) - upto)]
    chain = "\n\n".join([*told, f"Answer: {'Yes' if word else 'No'}"])
    reading = LINES.read(chain, solution)
    assert list(reading.labels) == labels and reading.correct is word
    assert LINES.read(chain, f"{solution}\n\nAnswer: 3").labels[-1] is word, "the last word is the answer's label"
    assert LINES.lead(chain) == "\n\n".join([*told, "Answer: "])
    cut = LINES.read("\n\n".join(told), solution)
    assert cut.correct is None and list(cut.labels) == labels


@pytest.mark.parametrize("nonsense", ["", "Purr.", "Answer: 24", "Answer: Yes and no", "right right\nnot", "yes"])
def test_nonsense_cannot_be_read(nonsense: str) -> None:
    assert LINES.read(nonsense, SOLUTION).correct is None


def test_the_message_holds_question_lines_and_cue_without_tags() -> None:
    answer = Answer("Answer: 24", thinking="27+5=32\n\n\n32-8=24\n\n")
    assert LINES.seen(answer) == "27+5=32\n\n\n32-8=24\n\nAnswer: 24" and BOXED.seen(answer) == "Answer: 24"
    assert LINES.seen(Answer("", thinking="a")) == BOXED.seen(Answer("", thinking="a")) == "a"
    assert LINES.prompt("Compute 27+5-8", LINES.seen(answer), True) == (
        f"Compute 27+5-8\n\n27+5=32\n\n32-8=24\n\nAnswer: 24\n\n{CUE}"
    )
    assert paragraphs_of("<think>\na\n</think>\n\nb") == [["a"], ["b"]]
    # of a beginning a line without its end is left out, unless it is all there is
    assert LINES.prompt("q", "a=1\nb=", whole=False) == f"q\n\na=1\n\n{CUE}"
    assert LINES.prompt("q", "a=1\nb=2\n", whole=False) == f"q\n\na=1\nb=2\n\n{CUE}"
    assert LINES.prompt("q", "a=", whole=False) == f"q\n\na=\n\n{CUE}"


def test_the_template_names_the_wording_and_a_knob_overrules_it() -> None:
    def engine(template: Any) -> Any:
        return SimpleNamespace(prompter=SimpleNamespace(template=template))

    assert wording_for(engine(mark("lines") + "<bos>")) is LINES and wording_for(engine("<bos>")) is BOXED
    assert wording_for(engine("{#- verifier: lines -#}"), "boxed") is BOXED
    for other in (engine(None), engine({"default": mark("lines")}), engine(mark("other")), SimpleNamespace()):
        assert wording_for(other) is BOXED and wording_for(other, "lines") is LINES  # type: ignore[arg-type]


def call_of(engine: Any) -> Call:
    return Call(({"role": "user", "content": "Compute 27+5-8"},), Account("t"), engines={"scorer": engine})


class Marked(ScriptedEngine):
    """A scripted engine whose template names the lines, and that reads so many tokens."""

    prompter = SimpleNamespace(template=mark("lines"), positions=200)


async def test_the_wording_of_the_template_is_asked_and_read_and_thinking_is_seen() -> None:
    engine = Marked(CHAIN, capabilities=HARD)
    verdict = await Verifier("m", call_of(engine)).verdict(Answer("Answer: 24", thinking=SOLUTION[:-10].strip()))
    assert engine.calls[0].question() == LINES.prompt("Compute 27+5-8", SOLUTION, True)
    assert verdict.score == 0 and verdict.first_error == 0 and verdict.labels[4] is True


async def test_the_score_is_the_probability_of_the_word_after_the_chain() -> None:
    def script(call: Call, draw: Draw) -> str:
        return "No" if call.prefix else CHAIN

    engine = Marked(script, capabilities=PROVIDES)
    verdict = await Verifier("m", call_of(engine), soft=True).verdict(SOLUTION)
    asked = engine.calls[-1]
    assert asked.prefix == CHAIN.removesuffix("No") and asked.sampling.logprobs
    again = await engine.generate(replace(asked, account=Account("u")))
    assert again.logprobs is not None
    assert verdict.score == pytest.approx(1 - 2.718281828459045 ** again.logprobs[0])


async def test_a_solution_that_is_too_long_is_not_asked_about_and_the_note_says_so() -> None:
    engine = Marked(CHAIN, capabilities=HARD)
    verifier = Verifier("m", call_of(engine))
    long = await verifier.verdict("one two three\n" * 200)
    assert long.score == NEUTRAL and not long.understood and not engine.calls
    assert "1 of 1 solutions are longer than the verifier reads: 0.5" in verifier.note()
    assert (await verifier.verdict(SOLUTION)).understood == 1 and verifier.refused == 0


async def test_a_trained_verifier_is_not_told_to_check_again_and_the_note_says_so() -> None:
    engine = Marked(CHAIN, capabilities=HARD)
    verifier = Verifier("m", call_of(engine), rechecks=2)
    await verifier.verdict(SOLUTION)
    assert len(engine.calls) == 1 and "no second check" in verifier.note()


async def test_best_of_n_takes_a_trained_verifier_without_a_setting() -> None:
    """The other searches ask by the same seam: the right one of four answers is found by reading lines."""
    from thrifty import Plan, Sampling
    from thrifty.methods.search._samples import seed_of

    rows = {seed_of(3, i): f"3+4={n}\n\nAnswer: {n}" for i, n in enumerate((6, 8, 7, 9))}

    def check(call: Call, draw: Draw) -> str:
        good = "3+4=7" in call.question()
        return f"3+4=7 {'right' if good else 'not'}\n\nAnswer: {'Yes' if good else 'No'}"

    answering = ScriptedEngine(lambda call, draw: rows[call.sampling.seed], capabilities=PROVIDES)
    plan = Plan("t", (BestOfN(samples=4, score="verifier"),))
    pipeline = plan.build({"answer": answering, "scorer": Marked(check, capabilities=HARD)})
    answer = await pipeline.ask("Compute 3+4", Account("t"), sampling=Sampling(seed=3))
    assert answer.text.endswith("Answer: 7") and answer.receipts[-1].detail["scores"] == [0, 0, 1, 0]


@given(st.randoms(use_true_random=False))
def test_reading_any_text_never_fails(rng: random.Random) -> None:
    text = "".join(rng.choice(["right", "not", " ", "\n", "\n\n", "Answer: Yes", "Wait", "<think>"]) for _ in range(20))
    reading = LINES.read(text, text)
    assert len(reading.labels) == sum(map(len, paragraphs_of(text)))
    assert reading.correct is None or LINES.lead(text).endswith("\n\nAnswer: ")
