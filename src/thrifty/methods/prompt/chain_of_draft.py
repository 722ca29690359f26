"""Chain of Draft: reasoning in notes of a few words instead of sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from thrifty.call import Call, Draft, Message, Receipt
from thrifty.errors import InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt._system import instruct, prompt_tokens

EXEMPLARS: dict[str, tuple[tuple[str, str], ...]] = {
    "arithmetic": (
        (
            "Mia had 20 stickers. She gave some to Ben and has 12 left. How many did she give?",
            "20 - x = 12; x = 8. {s} 8",
        ),
        (
            "A box holds 6 eggs. How many eggs are in 7 boxes after 5 break?",
            "6 * 7 = 42; 42 - 5 = 37. {s} 37",
        ),
        ("What is 48 + 17 - 9?", "48 + 17 = 65; 65 - 9 = 56. {s} 56"),
        (
            "Tea costs 3 dollars, cake 4. What do 2 teas and 3 cakes cost?",
            "2 * 3 = 6; 3 * 4 = 12; 18. {s} 18",
        ),
    ),
    "reading": (
        (
            "The ferry Alma left Oban at 9:10. The ferry Brae left at 9:40. When did Brae leave?",
            "Brae: second sentence; 9:40. {s} 9:40",
        ),
        (
            "Ruth keeps bees. Her brother Karl keeps goats. What does Karl keep?",
            "Karl, Ruth's brother; goats. {s} goats",
        ),
        (
            "The code for the north gate is 4471. The code for the south gate is 9026. "
            "What is the code for the north gate?",
            "north gate: 4471. {s} 4471",
        ),
        (
            "Lena was born in Turin and moved to Graz at ten. In which town was she born?",
            "born: Turin; moved later. {s} Turin",
        ),
    ),
}
"""Worked examples in the drafting style. They are ours, not the paper's. `{s}` stands for the separator."""


@dataclass(frozen=True, kw_only=True)
class ChainOfDraft(Rewrite):
    """Asks for a draft of at most a few words a reasoning step, then the answer after a separator.

    The system prompt is the one the paper prints, with its number of words and separator as knobs; the
    exemplars are OURS (arithmetic and reading). The model reads system prompt, exemplars as "Q: ... A: ...",
    then the question: prompt and exemplars stand in the system message (`form = "text"`, as the paper has it)
    or the exemplars as chat turns after it, so the user's messages, images and context stay as they are. The
    word limit is soft: nothing is cut. `draft_tokens` is a hard limit of the draft, after which an engine
    forces the call's answer prefix; where the call has none, and `draft_tokens` is not reached, the model
    ends on its own.

    The effect weakens without exemplars and on models under some 3 billion parameters, as the paper says.
    """

    name = "chain-of-draft"
    paper = "Chain of Draft: Thinking Faster by Writing Less (Xu et al. 2025, arXiv:2502.18600)"
    no_identity = "its prompt is what it does"

    words: int = knob(5, "words at most in each step of the draft", low=1, high=100)
    shots: int = knob(4, "worked examples shown; 0 shows none", low=0, high=4)
    exemplars: str = knob("arithmetic", "which worked examples", choices=tuple(EXEMPLARS))
    form: str = knob("text", "examples in the system message, or as chat turns", choices=("text", "turns"))
    separator: str = knob("####", "what stands between draft and answer")
    draft_tokens: int = knob(256, "tokens at most in the draft", low=1, high=100_000, log=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.separator.strip():
            raise InvalidInput("chain-of-draft: knob separator = '' is not allowed: some text such as '####' is needed")

    async def rewrite(self, call: Call) -> Call:
        before = prompt_tokens(call)
        shown = [(q, a.format(s=self.separator)) for q, a in EXEMPLARS[self.exemplars][: self.shots]]
        text = system_prompt(self.words, self.separator)
        turns: tuple[Message, ...] = ()
        if self.form == "turns":
            turns = _as_turns(shown)
        else:
            text = "\n\n".join([text, *(f"Q: {q}\nA: {a}" for q, a in shown)])
        changed = replace(instruct(call, text, turns), draft=Draft(self.separator, self.draft_tokens))
        reason = f"asked for a draft of {self.words} words a step, {len(shown)} examples"
        return changed.with_receipt(Receipt(self.name, True, reason, before, prompt_tokens(changed)))


def system_prompt(words: int = 5, separator: str = "####") -> str:
    """The paper's system prompt, with its two settings.

    >>> system_prompt(1).split(". ")[1]
    'Return the answer at the end of the response after a separator ####.'
    """
    return (
        f"Think step by step, but only keep a minimum draft for each thinking step, with {words} "
        f"{'word' if words == 1 else 'words'} at most. "
        f"Return the answer at the end of the response after a separator {separator}."
    )


@dataclass(frozen=True, slots=True)
class Compliance:
    """How well a draft kept to its word limit. Both figures are 0 for a draft without steps."""

    steps: int
    within: float
    """share of the steps with at most so many words, 0 to 1"""
    mean: float
    """words a step"""


def compliance(draft: str, words: int, separator: str = "####") -> Compliance:
    """Splits a draft into steps and counts their words; what stands after the last separator is no draft.

    Steps end at a semicolon, a line break, or a full stop that is not inside a number. The rule for words, in
    formulas too: a number or a name is one word, an operator or a bracket none, so spaces change nothing
    ("20-x=12" and "20 - x = 12" have 3 words). A hyphen or an apostrophe joins two words of at least two
    letters, or one and an ending ("well-known", "Ruth's": 1).

    >>> compliance("20 - x = 12; x = 20-12 = 8. #### 8", 4)
    Compliance(steps=2, within=1.0, mean=3.5)
    """
    body = draft.rpartition(separator)[0] if separator in draft else draft
    counts = [n for step in _STEP_END.split(body) if (n := len(_WORD.findall(step)))]
    if not counts:
        return Compliance(0, 0.0, 0.0)
    return Compliance(len(counts), sum(n <= words for n in counts) / len(counts), sum(counts) / len(counts))


_STEP_END = re.compile(r"[;\n]|\.(?!\d)|(?<!\d)\.(?=\d)")
_WORD = re.compile(
    r"\d[\d.,:]*\d[^\W_]*|\d[^\W\d_]*"  # a number, with its unit if written together
    r"|[^\W\d_]{2,}(?:-[^\W\d_]{2,}|['’][^\W\d_]+)*"  # a word
    r"|[^\W\d_]\d*"  # a one-letter name
)


def _as_turns(shown: list[tuple[str, str]]) -> tuple[Message, ...]:
    turns: list[Message] = []
    for question, answer in shown:
        turns += [
            {"role": "user", "content": f"Q: {question}"},
            {"role": "assistant", "content": f"A: {answer}"},
        ]
    return tuple(turns)
