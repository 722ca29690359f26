"""Scorers: how good an answer's text is, as a number in [0, 1].

    score = await get("numeric", tolerance=0.01)("so 12 * 3 = 36.", "36", {})   # 1.0

A scorer is an async callable of the text, the gold and the task (its JSON form). `get` finds one by name and
guards what it returns: a NaN or a number outside [0, 1] is refused, never averaged. A wrong gold or setting
is the user's error and raises InvalidInput; a wrong or unreadable answer scores 0.

Scorers that need more than text live beside this file: `llm_judge.py` asks an engine, `verifier.py` calls
reasoning-gym's own checks, and `Code` runs tests in `sandbox.py`.

Texts are compared after Unicode's NFKC and case folding. Where a text marks its final answer
(`<answer>...</answer>`, the last `\\boxed{...}`, or what follows the last `####`), the scorers that want one
short answer read only that.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from thrifty.bench import sandbox
from thrifty.errors import InvalidInput, Unsupported, nearest


class Scorer(Protocol):
    """Gives the text of an answer a number in [0, 1]."""

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float: ...


def names() -> list[str]:
    """The scorers that `get` knows."""
    return sorted(_factories())


def get(name: str, **settings: Any) -> Scorer:
    """The scorer of this name, guarded by `checked`.

    Raises: InvalidInput for an unknown name or setting (with the nearest known one), or a setting out of
    range.
    """
    factories = _factories()
    if name not in factories:
        raise InvalidInput(nearest(name, factories, "scorer"))
    known = list(inspect.signature(factories[name]).parameters)
    for setting in settings:
        if setting not in known:
            raise InvalidInput(nearest(setting, known, f"setting of scorer {name!r}"))
    if name == "judge" and "ask" not in settings:
        raise InvalidInput("scorer 'judge' needs `ask`, which sends a prompt to a judge's engine: name one")
    return _Guarded(name, factories[name](**settings))


def checked(score: float, scorer_name: str) -> float:
    """`score` as a float, or InvalidInput where it is no number in [0, 1].

    >>> checked(True, "exact")
    1.0
    """
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise InvalidInput(f"scorer {scorer_name!r} returned {score!r}; a score is a number from 0 to 1")
    return value


# Text.


@dataclass(frozen=True)
class Exact:
    """1 where the final answer equals the gold, or one of a list of golds, but for case, white space and the
    punctuation around it (a sign or point that belongs to a number is kept)."""

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        answer = normalised(final_answer(text))
        return float(any(answer == normalised(one) for one in _golds(gold, "exact")))


@dataclass(frozen=True)
class Contains:
    """1 where the text contains the gold, or one of a list of golds, as whole words: 12 is not in 512."""

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        words = _words(text)
        return float(any(_within(one, words) for one in _golds(gold, "contains")))


@dataclass(frozen=True)
class Recall:
    """The share of gold items that the text contains, each as in `Contains`; an item may be a list of
    alternatives.

    What the text says besides costs nothing: use `F1` where it should.
    """

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        if not isinstance(gold, list | tuple) or not gold:
            raise InvalidInput(f"scorer 'recall' needs a list of gold items, not {gold!r}")
        words = _words(text)
        items = dict.fromkeys(tuple(_golds(item, "recall")) for item in gold)
        return sum(any(_within(one, words) for one in item) for item in items) / len(items)


@dataclass(frozen=True)
class F1:
    """The harmonic mean of precision and recall of words, the best over the golds: SQuAD's (Rajpurkar et al.,
    "SQuAD: 100,000+ Questions for Machine Comprehension of Text"), which drops English articles and
    punctuation."""

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        answer = _squad_words(final_answer(text))
        return max(_f1(answer, _squad_words(one)) for one in _golds(gold, "f1"))


@dataclass(frozen=True)
class Choice:
    """1 where the letter that the text chooses is the gold's. `letters` are those that may be chosen."""

    letters: str = "ABCDE"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Z]{2,26}", self.letters) or len(set(self.letters)) != len(self.letters):
            raise InvalidInput(f"letters must be different capital letters, such as ABCD, not {self.letters!r}")

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        wanted = str(gold).strip().strip("().").upper()
        if len(wanted) != 1 or wanted not in self.letters:
            raise InvalidInput(f"scorer 'choice' needs a gold letter of {self.letters}, not {gold!r}")
        return float(chosen_letter(text, self.letters) == wanted)


# Numbers.


@dataclass(frozen=True)
class Numeric:
    """1 where the last number of the text (of its marked final answer, if it has one) is the gold's.

    Reads 1,000 and 3/4 and \\frac{3}{4}, -2 and 1.5e3, $5 and 50%. A percent matches its number and its
    hundredth, so 50% answers both 50 and 0.5. Equal means within `tolerance` or within `relative` times the
    gold, whichever is wider; arithmetic is exact.
    """

    tolerance: float = 0.0
    relative: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tolerance", "relative"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise InvalidInput(f"scorer 'numeric': {name} must be 0 or more, not {value!r}")

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        wanted = last_number(str(gold))
        if wanted is None:
            raise InvalidInput(f"scorer 'numeric' needs a gold with a number in it, not {gold!r}")
        given = last_number(final_answer(text))
        if given is None:
            return 0.0
        pairs = [(given[0], wanted[0])]
        if given[1] != wanted[1]:  # one of them is a percent
            pairs.append((given[0] / 100, wanted[0]) if given[1] else (given[0], wanted[0] / 100))
        return float(
            any(abs(a - b) <= max(Fraction(self.tolerance), Fraction(self.relative) * abs(b)) for a, b in pairs)
        )


def last_number(text: str) -> tuple[Fraction, bool] | None:
    """The last number of a text and whether it is a percent; None where there is none.

    >>> last_number("from 3 to -1,250.50")
    (Fraction(-2501, 2), False)
    """
    found = None
    plain = _DATE.sub(lambda match: match[0].replace("/", " "), _FRACTION.sub(r"\1/\2", text))
    for match in _NUMBER.finditer(plain):
        whole, below = match["number"].replace(",", ""), match["below"]
        if len(match[0]) > 400:  # no answer is that long, and its arithmetic would not end
            continue
        value = Fraction(whole) if below is None or int(below) == 0 else Fraction(whole) / int(below)
        found = (-value if match["sign"] in ("-", "\u2212") else value, match["percent"] is not None)
    return found


_FRACTION = re.compile(r"\\d?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}")
_DATE = re.compile(r"[0-9]+(?:\s?/\s?[0-9]+){2,}")  # no fraction: its parts are numbers of their own
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+\u2212]?)\s?[$€£¥]?"
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]++)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
    r"|\.[0-9]++)(?![eE][-+]?[0-9])"  # an exponent of more digits makes no answer, and endless arithmetic
    r"(?:\s?/\s?(?P<below>[0-9]+))?\s?(?P<percent>\\?%)?"
)


# Code.


@dataclass(frozen=True)
class Code:
    """1 where the code in the text passes the gold's tests in the sandbox.

    The gold is Python that tests (run after the answer, in its namespace), or an object: `tests`, and where
    wanted `entry_point` (the tests define `check(candidate)`, called with it, as HumanEval's do) and `prompt`
    (put before an answer that does not define the entry point itself).

    A pass needs the run to reach its end, shown by a random mark that the tests' last line prints: an answer
    that leaves early with exit code 0 fails. An answer that searches the interpreter for the mark could forge
    it; none does by mistake.

    Raises: Unsupported where the machine cannot isolate and `unsafe` is not set.
    """

    unsafe: bool = False
    limits: sandbox.Limits = field(default_factory=sandbox.Limits)

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        parts: Mapping[str, Any] = gold if isinstance(gold, Mapping) else {"tests": gold}
        for name, value in parts.items():
            if name not in ("tests", "entry_point", "prompt"):
                raise InvalidInput(nearest(str(name), ("tests", "entry_point", "prompt"), "part of a code gold"))
            if not isinstance(value, str):
                raise InvalidInput(f"scorer 'code' needs {name!r} as a text, not {value!r}")
        tests, entry = parts.get("tests", ""), parts.get("entry_point")
        if not tests.strip():
            raise InvalidInput("scorer 'code' needs tests as its gold: Python text, or an object with `tests`")
        code = extracted_code(text, entry)
        if entry and "prompt" in parts and not _defines(code, entry):
            code = parts["prompt"] + code
        if entry:
            tests += f"\ncheck({entry})\n"
        mark = secrets.token_hex(16)
        program = (
            f"space = {{'__name__': 'answer'}}\n"
            f"for name, source in (('answer', {json.dumps(code)}), ('tests', {json.dumps(tests)})):\n"
            "    exec(compile(source, name, 'exec'), space)\n"
            f"import os, sys\nsys.stdout.flush()\nos.write(1, b'{mark}')\n"
        )
        outcome = await sandbox.run(program, limits=self.limits, unsafe=self.unsafe)
        if outcome.status == "refused":
            raise Unsupported(outcome.reason)
        return float(outcome.status == "passed" and mark in outcome.stdout)


def extracted_code(text: str, entry_point: str | None = None) -> str:
    """The code of an answer: the first fenced block that defines the entry point, else the longest one, else
    all of it.

    A fence that never closes (the answer was cut) runs to the end.
    """
    blocks = [match[1] for match in re.finditer(r"```[^\n`]*\n(.*?)(?:\n?```|\Z)", text, re.DOTALL)]
    if not blocks:
        return text
    if entry_point:
        for block in blocks:
            if _defines(block, entry_point):
                return block
    return max(blocks, key=len)


# Reading answers.


def final_answer(text: str) -> str:
    """The part that a text marks as its final answer, or all of it."""
    tagged = re.findall(r"<answer>(.*?)(?:</answer>|\Z)", text, re.DOTALL | re.IGNORECASE)
    if tagged:
        return str(tagged[-1]).strip()
    start = text.rfind("\\boxed{")
    if start >= 0:
        return _braced(text, start + len("\\boxed{")).strip()
    _, marked, after = text.rpartition("####")
    return after.strip() if marked and after.strip() else text


def normalised(value: Any) -> str:
    """Case folded, NFKC, single spaces, without the punctuation around it.

    >>> normalised('  "The  Answer!" '), normalised("(-5)."), normalised("50%")
    ('the answer', '-5', '50%')
    """
    text = " ".join(_folded(str(value)).split())
    start, end = 0, len(text)
    while end > start and _outer(text[end - 1]):
        end -= 1
    while start < end and _outer(text[start]) and not re.match(r"[-\u2212.]+[0-9]", text[start:end]):
        start += 1
    return text[start:end].strip()


def chosen_letter(text: str, letters: str = "ABCDE") -> str | None:
    """The letter that a text chooses, or None.

    In this order: a text that is only a letter; the last "answer is X" or "answer: X"; a letter with a
    bracket, point or colon at the very start; the last "option X" or "choice X"; the last "(X)"; the last
    single capital letter, unless it is the article A.
    """
    text = final_answer(text).strip()
    one = f"[{letters}]"
    any_case = f"[{letters}{letters.lower()}]"
    opening = r"[\s(\[{\"'*_`$]*"
    for pattern in (
        rf"\A\W*({any_case})\W*\Z",
        rf"(?i:\banswer\b(?:\s+is)?(?:\s+(?:option|choice))?)\s*[:=]?{opening}({one})\b(?!['’]\w)",
        rf"\A\W*({one})\s*[).:\]]",
        rf"(?i:\b(?:option|choice)\b)\s*[:=]?{opening}({one})\b",
        rf"\(({any_case})\)",
        rf"\b(?!A\s+[a-z])({one})\b(?!['’]\w)",
    ):
        found = re.findall(pattern, text)
        if found:
            return str(found[-1]).upper()
    return None


# Details.


@dataclass(frozen=True)
class _Guarded:
    name: str
    scorer: Scorer

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        return checked(await self.scorer(text, gold, task), self.name)


def _factories() -> dict[str, Callable[..., Scorer]]:
    from thrifty.bench.llm_judge import Judge
    from thrifty.bench.verifier import ReasoningGym
    from thrifty.lab.suite import LabVerifier

    return {
        "exact": Exact,
        "numeric": Numeric,
        "choice": Choice,
        "contains": Contains,
        "f1": F1,
        "recall": Recall,
        "judge": Judge,
        "code": Code,
        "reasoning-gym": ReasoningGym,
        "lab": LabVerifier,
    }


def _golds(gold: Any, scorer: str) -> list[str]:
    """The acceptable golds as texts; none, or an empty one, is refused, because it would match anything."""
    golds = [str(one) for one in (gold if isinstance(gold, list | tuple) else [gold]) if one is not None]
    if not golds or not all(one.strip() for one in golds):
        raise InvalidInput(f"scorer {scorer!r} needs a gold that is not empty, not {gold!r}")
    return golds


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _outer(character: str) -> bool:
    return character.isspace() or (character not in "%‰" and unicodedata.category(character).startswith("P"))


def _words(text: str) -> str:
    """The words of a text with single spaces between; a number is one word, without its thousands commas."""
    found: Iterator[str] = (
        re.sub(r",(?=[0-9]{3}(?![0-9]))", "", match[0])
        for match in re.finditer(r"[0-9]+(?:[.,][0-9]+)*|[^\W_]+(?:['’][^\W_]+)*", _folded(text))
    )
    return " ".join(found)


def _within(item: str, words: str) -> bool:
    """Whether an item stands in `words` as whole words; scripts that write no spaces need no word ends."""
    wanted = _words(item)
    if not wanted:  # only signs: compare as they are
        raise InvalidInput(f"a gold must have a letter or a digit in it, not {item!r}")
    before = "" if unicodedata.category(wanted[0]) == "Lo" else r"(?<!\S)"
    after = "" if unicodedata.category(wanted[-1]) == "Lo" else r"(?!\S)"
    return re.search(before + re.escape(wanted) + after, words) is not None


def _squad_words(text: str) -> list[str]:
    bare = "".join(c for c in _folded(text) if not unicodedata.category(c).startswith("P"))
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split()


def _f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def _defines(code: str, name: str) -> bool:
    name = re.escape(name)
    return re.search(rf"^(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*=", code, re.MULTILINE) is not None


def _braced(text: str, start: int) -> str:
    """The text from `start` to the brace that closes it (or to the end)."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]
