"""Answer Convergence: the measure and the stopping rule against brute force, the strategies on a model that says what
it is told, the LSTM on planted features, the black-box form."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking import Say

from thrifty import Account, Answer, Budget, BudgetExceeded, Call, InvalidInput, Plan, PlanError, Sampling
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedEngine
from thrifty.methods.decode._answers import canonical
from thrifty.methods.decode.answer_convergence import AnswerConvergence, boost, convergence, stop_at

ASK = ({"role": "user", "content": "Why?"},)
BLACK = PROVIDES - {"branch"}
ANSWERS = st.lists(st.sampled_from(["", "4", "5"]), min_size=1, max_size=12)


@given(ANSWERS)
def test_the_convergence_point_is_the_first_of_the_last_run(answers: list[str]) -> None:
    brute = min(i for i in range(1, len(answers) + 1) if len(set(answers[i - 1 :])) == 1)
    assert convergence(answers) == (brute, brute / len(answers))


@given(ANSWERS, st.integers(1, 6))
def test_the_rule_stops_at_the_first_window_of_equal_answers(answers: list[str], agree: int) -> None:
    windows = [answers[i - agree : i] for i in range(agree, len(answers) + 1)]
    brute = next((i + agree for i, w in enumerate(windows) if len(set(w)) == 1 and w[0]), None)
    assert stop_at(answers, agree) == brute


@pytest.mark.parametrize(
    ("said", "form"),
    [
        (" 0.5", "1/2"), (r"$\frac{1}{2}$.", "1/2"), ("1/2", "1/2"), ("2/4 of it", "1/2"), ("-3", "-3"),
        ("1,200.00", "1200"),
        ("x = 7.\n\nLet me check 8", "7"), ("3.5. So", "7/2"), ("Paris", "paris"), ("Answer: (B)", "(b)"), ("", ""),
        ("\n", ""),
        ("3 of 4", "3 of 4"), ("1/0", "1/0"), ("50%", "50"), (r"\boxed{12} or 13", "12"),
    ],
)  # fmt: skip
def test_normal_forms(said: str, form: str) -> None:
    assert canonical(said) == form


def own(answer: Answer) -> Any:
    return next(r for r in answer.receipts if r.method == "answer-convergence")


async def ask(engine: Any, method: AnswerConvergence, *policies: Any, **fields: Any) -> Answer:
    account = fields.pop("account", None) or Account("t")
    call = Call(ASK, account, policies=policies, sampling=Sampling(max_tokens=fields.pop("max_tokens", None)), **fields)
    answer = await Plan("t", (method,)).build(engine)(call)
    assert answer.spend == account.settled and not account.held
    return answer


# -- consistency -----------------------------------------------------------------------------------------------

STEPS = ["One. ", "Two. ", "Three. ", "Four. ", "Five. ", "Six. "]
PLANTED = ["7", "8", "", "0.5", "1/2"]  # the sixth sentence ends thinking: it is not probed


def planted(call: Call, draw: Draw) -> Reply:
    """Thinks six sentences; a probe after sentence i answers PLANTED[i]."""
    written = call.prefix or ""
    rest = "" if "<think>" in written else "<think>"
    if "</think>" in written:
        step = written.partition("</think>")[0].count(". ")
        return Reply(f" {PLANTED[min(max(step, 1), 5) - 1]}.")
    thought = written.partition("<think>")[2].strip()
    whole = "".join(STEPS)
    if not whole.startswith(thought):
        thought = ""
    return Reply(written + rest + " " + whole[len(thought) :].lstrip() + "</think> The answer.")


@pytest.mark.parametrize("agree", [1, 2, 3, 9])
@pytest.mark.parametrize("black", [False, True])
async def test_it_stops_where_the_planted_answers_agree(agree: int, black: bool) -> None:
    engine = ScriptedEngine(planted, capabilities=BLACK if black else PROVIDES)
    answer = await ask(engine, AnswerConvergence(agree=agree, cue="", begin="prefix", chunk=2, probe_tokens=4))
    step = stop_at([canonical(a) for a in PLANTED], agree)
    kept = "".join(STEPS[: step or 6]).split()
    # as a policy the branch goes one word on, where the white space after a sentence is of the next word
    assert answer.thinking.split()[: len(kept)] == kept and len(answer.thinking.split()) <= len(kept) + (not black)
    receipt = own(answer)
    assert receipt.fired == (step is not None)
    assert receipt.detail["answers"] == [canonical(a) for a in PLANTED][: step or 6]
    assert receipt.spend.calls == receipt.detail["probes"] and receipt.spend.output > 0


async def test_probes_never_change_the_main_text(thinker: Any) -> None:
    say = "<think>One. Two. Three.</think>\n\nDone"
    plain = await thinker.generate(Call(ASK, Account("p"), policies=(Say(say),)))
    probed = await ask(thinker, AnswerConvergence(agree=99, keep=0), Say(say))
    assert (probed.text, probed.thinking, probed.tokens) == (plain.text, plain.thinking, plain.tokens)
    receipt = own(probed)
    assert not receipt.fired and receipt.detail["probes"] == 2
    assert probed.spend == plain.spend + receipt.spend


async def test_probes_that_never_parse_are_told_and_stop_nothing() -> None:
    def script(call: Call, draw: Draw) -> Reply:
        closed = "</think>" in (call.prefix or "")
        return Reply(" ... ?!") if closed else Reply("fine", thinking="One. Two. Three. ")

    answer = await ask(ScriptedEngine(script), AnswerConvergence(agree=1, cue=""))
    assert answer.text == "fine" and not own(answer).fired
    assert "none of 3 probes gave an answer" in own(answer).reason


@settings(max_examples=80, deadline=None)
@given(
    black=st.booleans(),
    agree=st.integers(1, 4),
    keep=st.integers(0, 5),
    chunk=st.integers(1, 9),
    limit=st.one_of(st.none(), st.integers(0, 30)),
    output=st.one_of(st.none(), st.integers(0, 40)),
    tokens=st.one_of(st.none(), st.integers(0, 150)),
    calls=st.one_of(st.none(), st.integers(0, 6)),
)
def test_no_budget_is_ever_exceeded(
    black: bool, agree: int, keep: int, chunk: int, limit: Any, output: Any, tokens: Any, calls: Any
) -> None:
    engine = ScriptedEngine(planted, capabilities=BLACK if black else PROVIDES, tranche=3)
    account = Account("t", Budget(output=output, tokens=tokens, calls=calls))
    method = AnswerConvergence(agree=agree, keep=keep, chunk=chunk, begin="prefix", probe_tokens=3)
    try:
        answer = asyncio.run(ask(engine, method, account=account, max_tokens=limit))
    except BudgetExceeded:
        answer = None
    spent = account.settled
    assert output is None or spent.output <= output
    assert tokens is None or spent.input + spent.output <= tokens
    assert calls is None or spent.calls <= calls
    assert not account.held and not account.overdraft
    if answer is not None:
        assert limit is None or answer.spend.output - own(answer).spend.output <= limit
        assert own(answer).reason


# -- boost ---------------------------------------------------------------------------------------------------------


def test_the_boost_is_the_closed_form() -> None:
    import torch

    z = torch.tensor([1.0, 5.0, -2.0, float("-inf")])
    assert float(boost(z, 0.5)) == pytest.approx(0.5 * (5 - (1 + 5 - 2) / 3))


async def test_a_raised_tag_comes_as_soon_as_it_wins(thinker: Any) -> None:
    tag = thinker.codec.encode("</think>")[0]

    class Near(Say):
        """The closing tag is behind the said token by less with every step."""

        def logits(self, branch: Any, logits: Any) -> Any:
            logits = super().logits(branch, logits)
            logits[tag] = logits.max() - 40 + 2 * len(branch.tokens)
            return logits

    lengths = []
    for alpha in (0.0, 0.2, 0.5):
        method = AnswerConvergence(strategy="boost", alpha=alpha, keep=1)
        answer = await ask(thinker, method, Near("<think>" + "x" * 60, lead=60.0), max_tokens=60)
        lengths.append(answer.thinking.count("x"))
        assert own(answer).fired == (alpha > 0)
    assert lengths[0] > lengths[1] > lengths[2]


async def test_boost_needs_logits() -> None:
    with pytest.raises(PlanError, match="needs logits"):
        await ask(ScriptedEngine("a"), AnswerConvergence(strategy="boost"))


# -- learned ---------------------------------------------------------------------------------------------------


def traces(n: int, seed: int) -> list[tuple[Any, list[int]]]:
    """Features whose first number turns from -1 to 1 when the answer has converged, in noise."""
    import torch

    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        size = int(torch.randint(6, 14, (), generator=g))
        turn = int(torch.randint(1, size, (), generator=g))
        marks = [int(i >= turn) for i in range(size)]
        x = torch.randn(size, 8, generator=g)
        x[:, 0] += torch.tensor([2.0 * m - 1 for m in marks])
        made.append((x, marks))
    return made


def auc(scores: list[float], marks: list[int]) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a, m in zip(scores, marks, strict=True) if m for b, k in zip(scores, marks, strict=True) if not k]  # fmt: skip  # noqa: E501
    return sum(pairs) / len(pairs)


def test_the_lstm_learns_planted_features_and_survives_its_file(tmp_path: Path) -> None:
    from thrifty.methods.decode._stopper import Stopper, fit

    stopper = fit(traces(40, 0), hidden=8, epochs=12)
    stopper.save(tmp_path / "s.safetensors")
    again = Stopper.load(tmp_path / "s.safetensors")
    scores, marks = [], []
    for x, y in traces(20, 1):
        state = other = None
        for row, mark in zip(x, y, strict=True):
            chance, state = stopper.step(row, state)
            same, other = again.step(row, other)
            assert chance == same
            scores.append(chance)
            marks.append(mark)
    assert auc(scores, marks) > 0.9


def test_bad_stoppers_are_refused(tmp_path: Path) -> None:
    from thrifty.methods.decode._stopper import Stopper, fit

    (tmp_path / "x").write_bytes(b"no stopper")
    for path, word in ((tmp_path / "x", "damaged"), (tmp_path / "none", "cannot be read"), ("", "stopper")):
        with pytest.raises(InvalidInput, match=word):
            Stopper.load(path)
    with pytest.raises(InvalidInput, match="traces"):
        fit([])
    with pytest.raises(InvalidInput, match="both kinds"):
        fit([(traces(1, 0)[0][0], [1] * len(traces(1, 0)[0][1]))])


async def test_a_trained_stopper_stops_the_models_thinking(thinker: Any, tmp_path: Path) -> None:
    import torch

    from thrifty.methods.decode._stopper import fit
    from thrifty.methods.decode.answer_convergence import record

    say = "<think>One. Two. Three. Four. Five.</think>\n\nDone"
    method = AnswerConvergence(cue="", probe_tokens=2, keep=0)
    trace = await record(thinker, Call(ASK, Account("r"), policies=(Say(say),)), method)
    states, marks = trace.example()
    assert states.shape == (4, 64) and len(marks) == 4 and set(marks) <= {0, 1}
    fit([(states, [0, 0, 1, 1])], hidden=8, epochs=60).save(tmp_path / "s")  # converged at the third
    learned = AnswerConvergence(strategy="learned", stopper=str(tmp_path / "s"), tau=0.5, keep=0, cue="")
    answer = await ask(thinker, learned, Say(say), max_tokens=80)
    assert answer.thinking.strip() == "One. Two. Three." and own(answer).fired and "P(stop)" in own(answer).reason
    fit([(torch.randn(4, 5), [0, 0, 1, 1])], hidden=2, epochs=1).save(tmp_path / "other")
    with pytest.raises(InvalidInput, match="train one"):
        await ask(thinker, replace(learned, stopper=str(tmp_path / "other")), Say(say))


def test_knobs() -> None:
    with pytest.raises(InvalidInput, match="agree"):
        AnswerConvergence(agree=0)
    with pytest.raises(InvalidInput, match="boundary"):
        AnswerConvergence(boundary="(")
