"""Runs one method that steers thinking on an engine, beside policies of the test's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from thrifty import Account, Answer, Budget, Call, Receipt, Sampling
from thrifty.call import Branch
from thrifty.method import Policies
from thrifty.policy import DecodePolicy, Policy

ASK = ({"role": "user", "content": "Why?"},)


class Tap(DecodePolicy):
    """Keeps the logits that it is shown, one a step; a probe's fork does not carry it."""

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def fork(self) -> Tap:
        return self

    def logits(self, branch: Branch, logits: Any) -> Any:
        self.shown.append(logits.clone())
        return logits


class Script(DecodePolicy):
    """Puts scripted logits in the place of the model's, one row a step; the last row again when they are used up."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self._at = 0

    def logits(self, branch: Branch, logits: Any) -> Any:
        logits.copy_(self.rows[min(self._at, len(self.rows) - 1)])
        self._at += 1
        return logits


class Never(DecodePolicy):
    """Bans tokens: a random model that must think on has its closing tag and its ends taken away."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def logits(self, branch: Branch, logits: Any) -> Any:
        logits[self.ids] = -1e4
        return logits


def endless(engine: Any) -> Never:
    """Keeps an engine's model from ending, and from closing its thinking."""
    return Never([*engine.codec.ends, *engine.codec.encode("</think>")])


async def run(
    engine: Any,
    method: Policies,
    *before: Policy,
    after: tuple[Policy, ...] = (),
    account: Account | None = None,
    on_exceed: str = "degrade",
    **fields: Any,
) -> Answer:
    """One answer with the method's policies between others. `fields`: prefix, and those of Sampling (40 tokens)."""
    prefix = fields.pop("prefix", None)
    sampling = Sampling(**{"max_tokens": 40, "seed": 3, **fields})
    call = Call(ASK, account or Account("t"), prefix=prefix, sampling=sampling, on_exceed=on_exceed)  # type: ignore[arg-type]
    mine = method.policies(call)
    for policy in mine:
        policy.method = method.name
    answer: Answer = await engine.generate(replace(call, policies=(*before, *mine, *after)))
    return answer


async def plain(engine: Any, *policies: Policy, **fields: Any) -> Answer:
    """The same call without a method."""
    prefix = fields.pop("prefix", None)
    sampling = Sampling(**{"max_tokens": 40, "seed": 3, **fields})
    answer: Answer = await engine.generate(
        Call(ASK, Account("t"), prefix=prefix, sampling=sampling, policies=tuple(policies))
    )
    return answer


def told(answer: Answer, method: Policies) -> Receipt:
    """The method's own receipt."""
    return next(r for r in answer.receipts if r.method == method.name)


def limited(**limits: int) -> Account:
    """An account with limits."""
    return Account("t", Budget(**limits))
