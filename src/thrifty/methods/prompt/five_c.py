"""5C prompt contracts: Character, Cause, Constraint, Contingency, Calibration, in one short line each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from thrifty.call import Call, Receipt
from thrifty.errors import InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt._system import instruct, prompt_tokens

FIELDS = ("character", "cause", "constraint", "contingency", "calibration")
REQUIRED = ("cause", "constraint")
MOST_WORDINGS = 8
CHARS_PER_TOKEN = 3.3
"""English text; only where the call has no engine to count with"""


@dataclass(frozen=True, kw_only=True)
class FiveC(Rewrite):
    """Adds a contract of five short lines to the system message; the task itself stays where it is, last.

    Each field is a list of wordings, the preferred one first, and a blank one leaves an optional field out. Cause and
    Constraint must be there. A wording over `most_words`, the same sentence in two fields, and length limits that
    contradict one another are refused when the plan is read.

    `tokens` limits the contract; so does what the account leaves beside the prompt, where the plan degrades. Then
    `choose` takes the wordings of greatest weight whose lines fit, exactly; where not even the shortest Cause and
    Constraint do, the call goes on unchanged and the receipt says so. Without a limit the contract is the same for
    every call, so a provider's prefix cache keeps it.

    The five fields and the comparison of token counts are the paper's; the wordings, the weights (which drop
    Calibration first and Cause last), the word cap and the choice under a limit are OURS."""

    name = "five-c"
    paper = (
        "5C Prompt Contracts: A Minimalist, Creative-Friendly, Token-Efficient Design Framework for Individual and "
        "SME LLM Usage (Ari 2025, arXiv:2507.07045)"
    )
    no_identity = "a contract without Cause and Constraint is refused, and with them it changes the prompt"

    character: tuple[str, ...] = knob(("You are a careful expert.",), "who answers; wordings, the preferred one first")
    cause: tuple[str, ...] = knob(
        ("Give the reader a correct answer to use as it stands.", "Answer correctly."), "the goal and why; wordings"
    )
    constraint: tuple[str, ...] = knob(
        ("Use at most 150 words, with no preamble and no repetition.", "Use at most 150 words."),
        "limits, format, length; wordings",
    )
    contingency: tuple[str, ...] = knob(
        ("If something needed is missing, say what it is and stop.", "If unsure, say so."),
        "what to do when information is missing or a rule cannot be met; wordings",
    )
    calibration: tuple[str, ...] = knob(("Check the result against the question.",), "how to tune the answer; wordings")
    tokens: int = knob(0, "tokens of the contract at most; 0: no limit", low=0, high=100_000)
    most_words: int = knob(25, "words of a wording at most", low=1, high=10_000)
    weights: tuple[float, ...] = knob(
        (2.0, 16.0, 8.0, 4.0, 1.0),
        "worth of each field's preferred wording, in the order of the fields",
        low=0.0,
        high=1e6,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.weights) != len(FIELDS):
            raise InvalidInput(f"five-c: knob weights has {len(self.weights)} numbers: one for each of the five fields")
        for name in FIELDS:
            self._check(name, getattr(self, name))
        problems = contradictions({name: self.wordings(name) for name in FIELDS})
        if problems:
            raise InvalidInput(f"five-c: {problems[0]}: keep one of them")

    def _check(self, name: str, given: tuple[str, ...]) -> None:
        if len(given) > MOST_WORDINGS:
            raise InvalidInput(f"five-c: knob {name} has {len(given)} wordings: at most {MOST_WORDINGS} are allowed")
        if name in REQUIRED and not self.wordings(name):
            raise InvalidInput(f"five-c: knob {name} is empty: a contract needs a {name.title()}")
        for text in self.wordings(name):
            if len(text.split()) > self.most_words:
                raise InvalidInput(
                    f"five-c: knob {name} has a wording of {len(text.split())} words: at most {self.most_words} are "
                    "allowed (most_words)"
                )

    def wordings(self, name: str) -> tuple[str, ...]:
        """A field's wordings, each on one line, without blank ones."""
        return tuple(line for text in getattr(self, name) if (line := " ".join(text.split())))

    async def rewrite(self, call: Call) -> Call:
        before = prompt_tokens(call)
        limits = [self.tokens] if self.tokens else []
        limits += _room(call, before) if call.on_exceed == "degrade" else []
        limit, count = min(limits) if limits else None, _counter(call)
        contract = self._contract(call, before, limit, count)
        changed = instruct(call, render(contract))
        after = prompt_tokens(changed)
        added = _added(before, after, contract, count)
        if limit is not None and added > limit:
            reason = f"the shortest Cause and Constraint have {added} tokens, over the {limit} there are: left out"
            return call.with_receipt(Receipt(self.name, False, reason, before, before))
        named = [name for name in FIELDS if getattr(contract, name)]
        shortened = [name for name in named if getattr(contract, name) != self.wordings(name)[0]]
        dropped = [name for name in FIELDS if name not in named and self.wordings(name)]
        reason = f"a contract of {added} tokens: {', '.join(named)}"
        reason += f"; shortened {', '.join(shortened)}" if shortened else ""
        reason += f"; dropped {', '.join(dropped)}" if dropped else ""
        detail = {"tokens": {name: count(_line(name, getattr(contract, name))) for name in named}, "dropped": dropped}
        return changed.with_receipt(Receipt(self.name, True, reason, before, after, detail=detail))

    def _contract(self, call: Call, before: int | None, limit: int | None, count: Callable[[str], int]) -> Contract:
        """The best contract within the limit; the one of the shortest Cause and Constraint where none fits."""
        options = [self._options(name, weight, count) for name, weight in zip(FIELDS, self.weights, strict=True)]
        allowed = limit
        while (picked := choose([[(n, worth) for _, n, worth in field] for field in options], allowed)) is not None:
            contract = _made([field[i][0] for field, i in zip(options, picked, strict=True)])
            # Lines were counted one by one, and a tokenizer may join across their ends: so the whole decides.
            if limit is None:
                return contract
            if _added(before, prompt_tokens(instruct(call, render(contract))), contract, count) <= limit:
                return contract
            allowed = sum(field[i][1] for field, i in zip(options, picked, strict=True)) - 1
        return _made([min(field, key=lambda option: option[1])[0] for field in options])

    def _options(self, name: str, weight: float, count: Callable[[str], int]) -> list[tuple[str, int, float]]:
        texts = self.wordings(name)
        options = [(t, count(_line(name, t)), weight * (len(texts) - i) / len(texts)) for i, t in enumerate(texts)]
        return options if name in REQUIRED else [*options, ("", 0, 0.0)]


@dataclass(frozen=True, slots=True)
class Contract:
    """The five fields; blank optional ones are left out. White space is made single, so each is one line.

    Raises InvalidInput without a Cause or a Constraint, and when two fields say the same sentence or contradict each
    other on a length."""

    cause: str
    constraint: str
    character: str = ""
    contingency: str = ""
    calibration: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, " ".join(getattr(self, f.name).split()))
        for name in REQUIRED:
            if not getattr(self, name):
                raise InvalidInput(f"a contract needs a {name.title()}: give one")
        problems = contradictions({name: (getattr(self, name),) for name in FIELDS})
        if problems:
            raise InvalidInput(f"contract: {problems[0]}: keep one of them")


def render(contract: Contract) -> str:
    """One line a field, in the order of the five, blank ones left out.

    >>> print(render(Contract(cause="Help a beginner.", constraint="At most 50 words.")))
    Cause: Help a beginner.
    Constraint: At most 50 words.
    """
    return "\n".join(_line(name, text) for name in FIELDS if (text := getattr(contract, name)))


def parse(text: str) -> Contract:
    """Reads what `render` writes. Raises InvalidInput for a line that is no field, or a field named twice."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        key = name.strip().lower()
        if not line.strip():
            continue
        if not colon or key not in FIELDS or key in found:
            raise InvalidInput(f"contract line {line[:40]!r}: each of {', '.join(FIELDS)} once, as 'Name: text'")
        found[key] = rest
    return Contract(**{"cause": "", "constraint": "", **found})


def renderings(contract: Contract) -> dict[str, str]:
    """The same contract as five lines, as an unstructured paragraph and as a tagged template, to count against each
    other. The connecting words of the paragraph and the tags of the template are ours."""
    present = [(name, getattr(contract, name)) for name in FIELDS if getattr(contract, name)]
    said = {
        "character": "In this conversation I would like you to take on the following role: ",
        "cause": "The reason why I am asking you for this is as follows: ",
        "constraint": "Please make sure that you keep to these rules at all times: ",
        "contingency": "In case that something goes wrong, please do this: ",
        "calibration": "Finally, please adjust your answer in this way: ",
    }
    tags = "\n".join(f'  <field name="{name}">\n    <value>{text}</value>\n  </field>' for name, text in present)
    return {
        "contract": render(contract),
        "unstructured": " ".join(said[name] + text for name, text in present),
        "template": f"<contract>\n{tags}\n</contract>",
    }


# -- the choice of wordings ----------------------------------------------------------------------------------


def choose(options: Sequence[Sequence[tuple[int, float]]], limit: int | None) -> list[int] | None:
    """One option of each group, as indices, of greatest total worth within `limit` tokens in all; None: none fits.

    Exact (a multiple-choice knapsack, by the undominated sums). Of equal worths the fewer tokens win, then the lower
    indices.

    >>> choose([[(5, 4.0), (2, 2.0)], [(4, 1.0), (0, 0.0)]], 6)
    [0, 1]
    """
    front: list[tuple[int, float, list[int]]] = [(0, 0.0, [])]
    for group in options:
        grown = [
            (n + more, worth + value, [*picked, i])
            for n, worth, picked in front
            for i, (more, value) in enumerate(group)
            if limit is None or n + more <= limit
        ]
        grown.sort(key=lambda s: (s[0], -s[1], s[2]))
        front = []
        for sum_ in grown:
            if not front or sum_[1] > front[-1][1]:
                front.append(sum_)
    return front[-1][2] if front else None


# -- what a contract says of lengths -------------------------------------------------------------------------

UNITS = ("word", "sentence", "line", "paragraph", "bullet", "character", "token")
_NUMBERS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
}
_NUMBER = r"\d[\d,]*|" + "|".join(_NUMBERS)
_LENGTH = re.compile(
    r"(?P<how>at most|no more than|not more than|up to|within|in|maximum of|maximum|max\.?|under|below|less than|"
    r"fewer than|at least|no fewer than|no less than|minimum of|minimum|more than|over|exactly)?\s*"
    rf"\b(?P<n>{_NUMBER})\b(?:\s*(?:-|–|to)\s*(?P<to>{_NUMBER})\b)?\s+(?:short |plain |full )?"
    rf"(?P<unit>{'|'.join(UNITS)})s?\b(?!\s+(?:per|each|for each|for every|in each|a piece))",
    re.IGNORECASE,
)
_BELOW = ("under", "below", "less than", "fewer than")
_LEAST = ("at least", "no fewer than", "no less than", "minimum of", "minimum")


@dataclass(frozen=True, slots=True)
class Length:
    """A limit on the length of the whole answer; None: no end on that side."""

    unit: str
    low: int | None
    high: int | None


def lengths(text: str) -> list[Length]:
    """The length limits that a text states in English. Limits of a part ("20 words per bullet") are not counted.

    >>> lengths("Use 50-100 words and at least two bullets.")
    [Length(unit='word', low=50, high=100), Length(unit='bullet', low=2, high=None)]
    """
    found = []
    for match in _LENGTH.finditer(text):
        how, unit = (match["how"] or "").lower(), match["unit"].lower()
        n = _number(match["n"])
        if match["to"]:
            found.append(Length(unit, n, _number(match["to"])))
        elif how in _LEAST:
            found.append(Length(unit, n, None))
        elif how in ("more than", "over"):
            found.append(Length(unit, n + 1, None))
        elif how in ("", "exactly"):
            found.append(Length(unit, n, n))
        else:
            found.append(Length(unit, None, n - 1 if how in _BELOW else n))
    return found


def contradictions(contract: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong between the fields, or within one wording: two different limits of one length, a least above a
    most, and the same sentence in two fields. Wordings of one field stand for each other and are not compared."""
    said = [(name, text) for name, texts in contract.items() for text in texts]
    problems = []
    for i, (name, text) in enumerate(said):
        for other, second in said[i:]:
            same = (other, second) == (name, text)
            if other == name and not same:
                continue
            a, b = lengths(text), lengths(second)
            pairs = [(x, y) for j, x in enumerate(a) for y in (a[j + 1 :] if same else b) if x.unit == y.unit]
            for x, y in pairs:
                crossed = _above(x.low, y.high) or _above(y.low, x.high)
                differ = None not in (x.high, y.high) and x.high != y.high
                if crossed or differ:
                    problems.append(f"{name} and {other} set different lengths in {x.unit}s ({_span(x)}; {_span(y)})")
            twice = set() if same else _sentences(text) & _sentences(second)
            if twice:
                problems.append(f"{name} and {other} both say {sorted(twice)[0]!r}")
    return problems


def adherence(contract: Contract, answer: str) -> dict[str, bool]:
    """Whether an answer keeps what can be checked without a model: every length stated in any field (tokens apart),
    and that it is JSON where the Constraint names JSON. Empty: nothing can be checked."""
    checked: dict[str, bool] = {}
    for name in FIELDS:
        for limit in lengths(getattr(contract, name)):
            if limit.unit == "token":
                continue
            n = _size(answer, limit.unit)
            checked[f"{limit.unit}s {_span(limit)}"] = not _above(limit.low, n) and not _above(n, limit.high)
    if re.search(r"\bJSON\b", contract.constraint):
        try:
            json.loads(answer)
            checked["JSON"] = True
        except (ValueError, RecursionError):
            checked["JSON"] = False
    return checked


# -- details -------------------------------------------------------------------------------------------------


def _line(name: str, text: str) -> str:
    return f"{name.title()}: {text}"


def _made(texts: Sequence[str]) -> Contract:
    return Contract(**dict(zip(FIELDS, texts, strict=True)))


def _counter(call: Call) -> Callable[[str], int]:
    """Tokens of a line and the break before it, by the answering engine; characters / 3.3 where the call has none."""
    engine = call.engines.get("answer")
    if engine is None:
        return lambda text: round(len(text) / CHARS_PER_TOKEN)
    silent = call.on_behalf("")

    def tokens(text: str) -> int:
        return engine.count(replace(silent, messages=({"role": "user", "content": text},)))

    empty = tokens("")
    return lambda text: max(0, tokens("\n" + text) - empty)


def _added(before: int | None, after: int | None, contract: Contract, count: Callable[[str], int]) -> int:
    """Input tokens that the contract adds to a call."""
    return count(render(contract)) if before is None or after is None else after - before


def _room(call: Call, prompt: int | None) -> list[int]:
    """What the account leaves for the contract beside the prompt as it is, and one token of output."""
    left, taken = call.account.remaining(), prompt or 0
    room = [int(left["input"]) - taken] if "input" in left else []
    return room + ([int(left["tokens"]) - taken - 1 - call.keep] if "tokens" in left else [])


def _number(text: str) -> int:
    return _NUMBERS.get(text.lower()) or int(text.replace(",", ""))


def _above(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a > b


def _span(limit: Length) -> str:
    if limit.low == limit.high:
        return f"exactly {limit.low}"
    parts = [f"at least {limit.low}"] if limit.low is not None else []
    return " and ".join(parts + ([f"at most {limit.high}"] if limit.high is not None else []))


def _sentences(text: str) -> set[str]:
    parts = (re.sub(r"[^\w ]", "", s).strip().lower() for s in re.split(r"[.;!?]", text))
    return {part for part in parts if part}


def _size(text: str, unit: str) -> int:
    if unit == "word":
        return len(text.split())
    if unit == "sentence":
        return len([s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s])
    if unit == "paragraph":
        return len([p for p in re.split(r"\n\s*\n", text) if p.strip()])
    if unit == "bullet":
        return len(re.findall(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+\S", text))
    if unit == "line":
        return len([line for line in text.splitlines() if line.strip()])
    return len(text)
