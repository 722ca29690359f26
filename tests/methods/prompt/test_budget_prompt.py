"""Budget prompt: what it says, and that it changes nothing else."""

from __future__ import annotations

import pytest

from thrifty import Account, Call
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.prompt.budget_prompt import BudgetPrompt, instruction


@pytest.mark.parametrize(
    ("limit", "unit", "said"),
    [
        (20, "words", "Use at most 20 words, reasoning included."),
        (1, "tokens", "Use at most 1 token, reasoning included."),
    ],
)
def test_instruction(limit: int, unit: str, said: str) -> None:
    assert instruction(limit, unit) == said


async def test_it_speaks_in_the_system_message_and_counts_itself() -> None:
    engine = ScriptedEngine("yes")
    call = Call(({"role": "user", "content": "Is it?"},), Account("t"), context=("One.",), engines={"answer": engine})
    changed = await BudgetPrompt(words=7).rewrite(call)
    assert changed.messages == ({"role": "system", "content": instruction(7)}, *call.messages)
    assert changed.context == call.context
    receipt = changed.receipts[-1]
    assert (receipt.before, receipt.after) == (3, 3 + len(instruction(7).split()))
