"""One plan a family on SmolLM2: it fires, it answers, and its receipts, its answer and the ledger agree."""

from __future__ import annotations

from typing import Any

import pytest

from thrifty import Account, Answer, Plan, Sampling
from thrifty.bench.needles import needles
from thrifty.ledger import MemoryLedger
from thrifty.spend import total_spend

pytestmark = pytest.mark.real


def plan(toml: str) -> Plan:
    return Plan.from_toml(f'name = "test"\n{toml}')


def agree(answer: Answer, ledger: MemoryLedger, account: Account) -> None:
    """Spend of the answer, the account and the ledger are one; so are those of each method and its receipt."""
    entries = list(ledger.entries())
    assert total_spend(e.spend for e in entries) == answer.spend == account.settled
    assert account.held == {}
    for receipt in answer.receipts:
        own = total_spend(e.spend for e in entries if e.labels.method == receipt.method)
        assert own == receipt.spend, receipt.method


async def test_a_prompt_method_drafts_then_answers(smollm2: Any) -> None:
    ledger = MemoryLedger()
    account = Account("t", ledger=ledger)
    pipeline = plan('[[methods]]\nuse = "chain-of-draft"\ndraft_tokens = 40\n').build(smollm2)
    answer = await pipeline.ask("What is 6 + 2?", account, sampling=Sampling(max_tokens=64))
    plain = await Plan("plain").build(smollm2).ask("What is 6 + 2?", sampling=Sampling(max_tokens=64))
    assert [r.fired for r in answer.receipts] == [True]
    assert answer.spend.input > plain.spend.input  # the instruction and the examples are paid for
    agree(answer, ledger, account)


async def test_a_context_method_cuts_the_prompt_and_keeps_the_needle(smollm2: Any, minilm: Any) -> None:
    tasks = [t for t in needles(12, 3, count=None, lengths=(1000,), long=None, distractors=(0,), lists=False)][:3]
    found = 0
    for task in tasks:
        ledger = MemoryLedger()
        account = Account("t", ledger=ledger)
        pipeline = plan('[[methods]]\nuse = "fixed-k"\nk = 3\n').build({"answer": smollm2, "embedder": minilm})
        asked = {"context": task.context, "prefix": task.prefix, "sampling": Sampling(max_tokens=12)}
        answer = await pipeline.ask(task.messages, account, **asked)
        plain = await Plan("plain").build(smollm2).ask(task.messages, **asked)
        by_role = {e.labels.role: e.spend for e in ledger.entries()}
        assert by_role["answer"].input < plain.spend.input / 2
        assert by_role["embedder"].usd < by_role["answer"].usd
        found += str(task.gold) in answer.text.replace(",", "")
        agree(answer, ledger, account)
    assert found >= 2


async def test_a_search_shares_its_prompt_and_stops_its_losers(smollm2: Any) -> None:
    ledger = MemoryLedger()
    account = Account("t", ledger=ledger)
    pipeline = plan('[[methods]]\nuse = "first-finish-search"\nsamples = 4\n').build(smollm2)
    answer = await pipeline.ask("Name a colour.", account, sampling=Sampling(max_tokens=48, seed=1))
    prompt = smollm2.count(pipeline.call("Name a colour.", account))
    assert answer.spend.input == 4 * prompt
    assert answer.spend.cached == 3 * prompt  # four branches, one prefill
    assert answer.work.prefill == prompt
    assert answer.spend.output <= 4 * (len(answer.tokens or ()) + 1)  # no loser went on after the first was done
    agree(answer, ledger, account)
