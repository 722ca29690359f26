"""Methods that act on thinking by calls, against a real server: llama.cpp with SmolLM2, which has no thinking tags, so
that the prefix opens the block and the server continues it."""

from __future__ import annotations

from typing import Any

import pytest

from thrifty import Account, Call, Plan, Sampling
from thrifty.engines.openai import OpenAIEngine
from thrifty.methods.decode.answer_convergence import AnswerConvergence
from thrifty.methods.decode.budget_forcing import BudgetForcing
from thrifty.methods.decode.thought_terminator import ThoughtTerminator

pytestmark = pytest.mark.real

ASK = ({"role": "user", "content": "What is 3 plus 4?"},)


@pytest.fixture
async def llama(llama_server):
    engine = OpenAIEngine(llama_server, "smollm2")
    yield engine
    await engine.aclose()


async def ask(engine: Any, method: Any, **sampling: Any) -> Any:
    account = Account("t")
    call = Call(ASK, account, sampling=Sampling(temperature=0, max_tokens=64, **sampling))
    answer = await Plan("t", (method,)).build(engine)(call)
    assert answer.spend == account.settled and not account.held
    receipt = next(r for r in answer.receipts if r.method == method.name)
    assert answer.spend.output - receipt.spend.output <= 64
    return answer, receipt


async def test_budget_forcing_cuts_and_waits(llama):
    cut, receipt = await ask(llama, BudgetForcing(begin="prefix", most=8, keep=8))
    assert receipt.fired and receipt.after == 8 and "cut" in receipt.reason
    assert cut.text.startswith("Final Answer:") and cut.thinking and cut.spend.calls == 2
    # the second call read what the first had written: its prompt, and the thinking
    assert cut.spend.input > 2 * llama.count(Call(ASK, Account("c")))
    longer, receipt = await ask(llama, BudgetForcing(begin="prefix", most=40, waits=1, keep=8))
    assert receipt.detail.get("waits", 0) == longer.thinking.count("Wait")


async def test_answer_convergence_probes_and_closes(llama):
    method = AnswerConvergence(begin="prefix", agree=1, chunk=12, probe_tokens=6, keep=8, boundary="token")
    answer, receipt = await ask(llama, method)
    assert receipt.detail["probes"] >= 1 and receipt.spend.calls == receipt.detail["probes"]
    assert receipt.fired and answer.text.startswith("The final answer is")


async def test_thought_terminator_interrupts_and_ends(llama):
    method = ThoughtTerminator(begin="prefix", deadline=8, keep=4, answer_tokens=8, interrupt="\n({left} left)\n")
    answer, receipt = await ask(llama, method)
    assert receipt.fired and answer.thinking and answer.spend.calls >= 2
    assert receipt.detail["interrupts"] <= 1  # ceil(8 / 4) - 1
