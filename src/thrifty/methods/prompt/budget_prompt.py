"""The plainest budget of all: asking for it."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.call import Call, Receipt
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt._system import instruct, prompt_tokens


@dataclass(frozen=True, kw_only=True)
class BudgetPrompt(Rewrite):
    """Asks the model to use at most so many words or tokens. A soft limit: nothing is cut.

    The baseline beside which harder ways have to show that they pay: the "global budget" prompt of Plan and
    Budget, and the fixed budget that Token-Budget-Aware LLM Reasoning (Han et al. 2024, arXiv:2412.18547)
    starts from. The instruction stands in the system message."""

    name = "budget-prompt"
    paper = "baseline: a budget stated in the prompt (as in Han et al. 2024, arXiv:2412.18547)"
    no_identity = "every limit adds a sentence to the prompt"

    words: int = knob(50, "how many the answer may have, reasoning included", low=1, high=100_000, log=True)
    unit: str = knob("words", "what is counted: models follow words better than tokens", choices=("words", "tokens"))

    async def rewrite(self, call: Call) -> Call:
        before = prompt_tokens(call)
        changed = instruct(call, instruction(self.words, self.unit))
        asked = f"asked for at most {self.words} {self.unit}"
        return changed.with_receipt(Receipt(self.name, True, asked, before, prompt_tokens(changed)))


def instruction(limit: int, unit: str = "words") -> str:
    """The sentence that the model reads.

    >>> instruction(1)
    'Use at most 1 word, reasoning included.'
    """
    return f"Use at most {limit} {unit[:-1] if limit == 1 else unit}, reasoning included."
