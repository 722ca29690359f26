"""What searches share: seeds, how many samples a budget holds, running them side by side, votes, and the last
word.

A search passes `receipts=()` and `emit=None` down, so what the methods above it left is counted once, and it
alone streams. Each sample runs on an account of its own below the call's, whose settled Spend is what the
sample cost, also when it was cancelled and returned nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation

from thrifty.budget import Account
from thrifty.call import Answer, Call, Delta, Receipt, merge_receipts
from thrifty.errors import BudgetExceeded
from thrifty.method import Next
from thrifty.spend import total_spend, total_work

COMPLETE = ("stop", "tool_calls")
"""Finish reasons of answers that the model itself ended."""


def seed_of(seed: int | None, sample: int) -> int | None:
    """The seed of one sample: the call's own for the first, derived ones for the others, None where the call
    has none.

    >>> seed_of(7, 0), seed_of(7, 1) == seed_of(7, 1), seed_of(7, 1) == seed_of(7, 2), seed_of(None, 3)
    (7, True, False, None)
    """
    if seed is None or sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33  # 31 bits: every server takes them


def sample_call(call: Call, sample: int, account: Account, temperature: float) -> Call:
    """What one sample sends down: silent, on its own account, with its own seed."""
    sampling = replace(call.sampling, seed=seed_of(call.sampling.seed, sample), temperature=temperature)
    return replace(call, account=account, sampling=sampling, receipts=(), emit=None)


def how_many_fit(call: Call, most: int, output: int = 1) -> int:
    """How many samples of at least `output` tokens each the account could hold at once: 1 to `most`. A plan
    that refuses gets `most`: it asks for all, and hears of it when they do not fit."""
    return most if call.on_exceed == "refuse" else max(1, room_for(call, most, output))


def room_for(call: Call, most: int, output: int = 1) -> int:
    """The same for every plan, and 0 when there is not even room for one."""
    left = call.account.remaining()
    if not left:
        return most
    engine = call.engines.get("answer")
    prompt = 0 if engine is None else engine.count(call)
    needs = {"calls": 1, "input": prompt, "output": output, "tokens": prompt + output}
    fits = [int(left[name] // need) for name, need in needs.items() if name in left and need]
    return min([most, *fits])


def shares(call: Call, first: int, n: int) -> list[Account]:
    """Accounts for samples `first` to `first + n - 1`: equal parts of what is left; one sample alone may have
    it all.

    Close each when its sample is done.
    """
    names = [f"sample{i}" for i in range(first, first + n)]
    if n == 1 or not call.account.remaining():
        return [call.account.child(name) for name in names]
    return call.account.split([1.0] * n, names)


async def side_by_side(
    next: Next, calls: Sequence[Call], enough: Callable[[list[Answer]], bool]
) -> list[Answer | None]:
    """Runs calls at the same time until `enough` of the answers that came, in the order they came; cancels
    the others.

    An answer that was cancelled or that its budget refused is None. Other errors are raised, when all have
    stopped. Raises BudgetExceeded when the budget refused every one. Nothing is left running, also when this
    is cancelled."""

    async def run(call: Call) -> Answer:
        return await next(call)

    tasks = [asyncio.ensure_future(run(call)) for call in calls]
    results: list[Answer | None] = [None] * len(tasks)
    order: list[Answer] = []
    refused: BudgetExceeded | None = None
    try:
        pending = set(tasks)
        while pending and not (order and enough(order)):
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for i, task in enumerate(tasks):
                if task in done:
                    try:
                        results[i] = answer = task.result()
                    except BudgetExceeded as error:
                        refused = error
                    else:
                        order.append(answer)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if refused is not None and (not order or calls[0].on_exceed == "refuse"):
        raise refused
    return results


def conclude(
    call: Call, winner: Answer, answers: Sequence[Answer], accounts: Sequence[Account], own: Receipt
) -> Answer:
    """The winner with the Spend and Work of every sample's account, and the receipts of all: above, below,
    our own."""
    below = merge_receipts([r for answer in answers for r in answer.receipts])
    work = total_work(account.work for account in accounts)
    return replace(
        winner,
        spend=total_spend(account.settled for account in accounts),
        work=replace(
            work,
            kv_bytes_peak=max([work.kv_bytes_peak, *(a.work.kv_bytes_peak for a in answers)]),
            kv_bytes_mean=max([0.0, *(a.work.kv_bytes_mean for a in answers)]),
        ),
        receipts=(*call.receipts, *below, own),
        estimated=any(a.estimated for a in answers),
    )


async def tell(call: Call, answer: Answer) -> Answer:
    """Emits a finished answer, where the call streams, and returns it."""
    if call.emit is not None:
        emit: Callable[[Delta], Awaitable[None]] = call.emit
        if answer.text or answer.thinking or answer.tool_calls:
            await emit(Delta(answer.text, answer.thinking, answer.tool_calls, answer.logprobs or ()))
        await emit(Delta(finish=answer.finish, answer=answer))
    return answer


# -- votes ---------------------------------------------------------------------------------------------------


def vote_of(answer: Answer, parse: str = "auto") -> str | None:
    """What an answer votes for, in normal form; None when it abstains.

    `auto`: its tool calls; else its parsed answer; else what stands after the last "####", in the last
    \\boxed{...}, or after the last "answer is" or "answer:"; else, of a complete answer, its last number, or
    the whole text. `number` and `text` use the last number or the whole text of the answer. An empty answer
    abstains; in `auto`, so does one that was cut before it said its answer."""
    if answer.tool_calls:
        return json.dumps([t.get("function", t) for t in answer.tool_calls], sort_keys=True, default=str)
    final = answer.final
    if parse == "text":
        return normal(final) or None
    if parse == "number":
        return last_number(final)
    marked = answer.parsed if answer.parsed is not None else marked_answer(answer.text)
    if marked is not None and marked.strip():
        amount = _AMOUNT.fullmatch(marked.strip())
        return normal(amount[1] if amount else marked)
    if answer.finish not in COMPLETE:
        return None
    return last_number(final) or normal(final) or None


def votes_of(answers: Sequence[Answer], parse: str = "auto") -> list[str | None]:
    """The votes of some answers. When all would abstain because all were cut, the last number of each votes
    after all."""
    votes = [vote_of(answer, parse) for answer in answers]
    return votes if any(v is not None for v in votes) else [last_number(answer.final) for answer in answers]


def marked_answer(text: str) -> str | None:
    """What a text marks as its answer; None when it marks nothing.

    >>> marked_answer("So the answer is 12 apples.\\nBye"), marked_answer("draft #### 8"), marked_answer("8")
    ('12 apples.', '8', None)
    """
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0]
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, at = 1, start + len("\\boxed{")
        for end in range(at, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[at:end]
    said = list(_SAYS.finditer(text))
    return text[said[-1].end() :].strip().split("\n")[0].strip() or None if said else None


def normal(text: str) -> str:
    """Text as it is compared: case, outer punctuation and the writing of numbers make no difference.

    >>> normal(" $1,200.00. ") == normal("1200"), normal("**Paris**!"), normal("-.5")
    (True, 'paris', '-0.5')
    """
    flat = " ".join(text.casefold().split()).strip("*_`\"' \t").rstrip(".!?,;: *_`\"'")
    number = _number(flat.lstrip("$€£").rstrip("%").replace(",", ""))
    return flat if number is None else number


def last_number(text: str) -> str | None:
    """The last number in a text, in normal form; None when there is none.

    >>> last_number("6 * 7 = 42, so 42.0!")
    '42'
    """
    found = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|(?<![\w.])-?\.\d+", text)
    return _number(found[-1].replace(",", "")) if found else None


def winner_of(votes: Sequence[str | None]) -> int:
    """The index of the first sample that voted for the answer with the most votes; 0 when all abstain. Of
    equals the one that was said first wins.

    >>> winner_of([None, "8", "9", "9", "8"])
    1
    """
    tally = counts(votes)
    if not tally:
        return 0
    best = max(tally.values())
    return votes.index(next(v for v, n in tally.items() if n == best))


def counts(votes: Sequence[str | None]) -> dict[str, int]:
    """Votes by answer, in order of first appearance."""
    tally: dict[str, int] = {}
    for vote in votes:
        if vote is not None:
            tally[vote] = tally.get(vote, 0) + 1
    return tally


_AMOUNT = re.compile(r"([$€£]?-?[\d,]*\.?\d+%?)(?: +[^\W\d]+){1,2}[.!]?")
"""a number and its unit, such as "12 red apples." """
_SAYS = re.compile(r"(?i)\banswer\s*(?:is|[:=])")


def _number(text: str) -> str | None:
    if len(text) > 64 or not re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", text):
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:  # not reached for what the pattern lets through
        return None
    plain = format(value, "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain in ("-0", "") else plain
