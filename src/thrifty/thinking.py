"""The delimiters of a model's thinking: what they are, whether a model has them, and where a text stands between them.

Invariant: nothing here calls a model or spends anything; a model is asked about its tags only by counting tokens.
"""

from __future__ import annotations

from dataclasses import replace

from thrifty.call import Call
from thrifty.errors import InvalidInput, PlanError

OPENING, CLOSING = "<think>", "</think>"
"""What most models that think write around it."""


def check_tags(who: str, opening: str, closing: str) -> None:
    """Refuses delimiters that cannot be told from other text, or from each other. Raises InvalidInput."""
    if not opening.strip() or not closing.strip():
        raise InvalidInput(f"{who}: knobs opening and closing need text, such as '{OPENING}' and '{CLOSING}'")
    if opening == closing or closing in opening:
        raise InvalidInput(f"{who}: opening = {opening!r} holds closing = {closing!r}: two different tags are needed")


def has_tags(call: Call, *tags: str) -> bool | None:
    """Whether each tag is one token of the answering model; None when its tokenizer is not at hand.

    Counted on a probe message: a word more, then the tag more, so that the template's own tokens cancel.
    """
    engine = call.engines.get("answer")
    if engine is None or "logits" not in engine.capabilities:
        return None
    probe = replace(call.on_behalf(""), labels=call.labels)

    def tokens(text: str) -> int:
        return engine.count(replace(probe, messages=({"role": "user", "content": text},)))

    alone = tokens("a")
    return all(tokens(f"a{tag}") - alone == 1 for tag in tags)


def no_tags(who: str, model: str, opening: str, closing: str) -> PlanError:
    """The error for a model that is known not to think between these tags."""
    return PlanError(
        f"{who}: {opening} and {closing} are no tokens of model {model}: set the knobs opening and closing to what it "
        "writes around its thinking, or unknown = 'force' to use these all the same"
    )


def left_open(text: str | None, opening: str = OPENING, closing: str = CLOSING) -> bool:
    """Whether a text ends inside a thinking block.

    >>> left_open("<think>\\nSo"), left_open("<think> a </think> b"), left_open(None)
    (True, False, False)
    """
    return bool(text) and (text or "").rfind(opening) > (text or "").rfind(closing)


def split(text: str, opening: str = OPENING, closing: str = CLOSING, inside: bool = False) -> tuple[str, str]:
    """A text as (thinking, answer), without tags; `inside`: it begins in a block that was opened before it.

    Blank space between a closing tag and what follows it belongs to neither.

    >>> split("a</think>\\n\\nb<think>c", inside=True)
    ('ac', 'b')
    """
    thinking, answer, trim = "", "", False
    while text:
        before, tag, text = text.partition(closing if inside else opening)
        if inside:
            thinking += before
        else:
            answer += before.lstrip() if trim else before
            trim = trim and not before.strip()
        if tag:
            trim = trim or inside
            inside = not inside
    return thinking, answer
