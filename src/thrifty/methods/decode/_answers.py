"""Short answers as they are compared: what a probe said, or what a text marks as its answer, in a normal form."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?(?!\w)(?:%)?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_LEAD = re.compile(r"(?i)^(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*")
_SENTENCE = re.compile(r"(.+?)(?:[.!?](?=\s|$)|\n|$)", re.DOTALL)
_MARKS = (re.compile(r"####\s*([^\n]+)"), re.compile(r"(?i)\bfinal\s+answer\s*(?:is|:|=)\s*:?\s*([^\n]+)"))


def canonical(text: str) -> str:
    """What a probe answered, in a normal form in which equal answers are equal texts; "" when it gave none.

    The first sentence counts; where it holds one number, that number, whatever stands around it.

    >>> canonical(" 1/2"), canonical("0.50. Because"), canonical("$1,200$ apples")
    ('1/2', '1/2', '1200')
    >>> canonical("\\\\boxed{\\\\frac{1}{2}}")
    '1/2'
    >>> canonical("The answer is **Paris**!"), canonical("  \\n ...")
    ('paris', '')
    """
    inner = boxed(text)
    body = text.strip() if inner is None else inner
    body = _FRACTION.sub(r"\1/\2", body)
    found = _SENTENCE.match(body)
    line = _LEAD.sub("", found.group(1).strip() if found else "")
    line = " ".join(line.replace("$", "").split()).strip("*_`\"' .,:;!?").casefold()
    numbers = _NUMBER.findall(line)
    if len(numbers) == 1:
        return _plain(numbers[0]) or line
    return line


def boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...}; None when there is none.

    >>> boxed(r"so \\boxed{\\frac{1}{2}} it is"), boxed(r"\\boxed{4")
    ('\\\\frac{1}{2}', None)
    """
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "}" and depth == 0:
            return text[start + len("\\boxed{") : at]
    return None


def marked(text: str) -> str | None:
    """The answer that a text marks as final (`\\boxed{}`, `####`, "final answer is"); None when it marks none, or the
    mark is not complete: a line that is still being written is no answer.

    >>> marked("so it is #### 42\\nDone"), marked("The final answer is 7."), marked("the answer may be 7")
    ('42', '7.', None)
    """
    inner = boxed(text)
    if inner is not None:
        return inner.strip() or None
    for pattern in _MARKS:
        found = list(pattern.finditer(text))
        if found:
            said = found[-1].group(1).strip()
            if re.search(r"\w", said) and (text[found[-1].end() :].startswith("\n") or said.endswith((".", "!", "}"))):
                return said
    return None


def _plain(number: str) -> str:
    """A number as a fraction in lowest terms; per cent signs are dropped with nothing scaled."""
    try:
        top, _, bottom = number.replace(",", "").replace(" ", "").rstrip("%").partition("/")
        value = Fraction(top) / (Fraction(bottom) if bottom else 1)
    except (ValueError, ZeroDivisionError):
        return ""
    return str(value)
