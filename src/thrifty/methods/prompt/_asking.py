"""Calls that a prompt method makes for its own ends before the answer: an estimate, a plan.

Invariants: they are billed under the method's name, on one account below the call's that leaves the answer its
prompt, its output and one call; `spend` and `work` are the sums of what they cost, so a receipt that carries them
sums to the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from thrifty.budget import Account, Budget
from thrifty.call import Answer, Call, Sampling
from thrifty.errors import BudgetExceeded
from thrifty.methods.prompt._system import prompt_tokens
from thrifty.spend import Spend, Work


class Asking:
    """Asks the answering engine one question after another.

    `keep` output tokens, and the call's own, are left for the answer; `answering` is the call as it will be sent at
    its longest, where the method knows it, else `call` as it stands. Not for use from two tasks at once."""

    def __init__(
        self, method: str, call: Call, sampling: Sampling, *, keep: int, answering: Call | None = None
    ) -> None:
        self.method, self.call, self.keep = method, call, keep
        seed, deterministic = call.sampling.seed, call.sampling.deterministic
        self.sampling = replace(sampling, seed=seed, deterministic=deterministic)
        self.answering = call if answering is None else answering
        self.account: Account | None = None
        self.spend, self.work = Spend(), Work()

    async def __call__(self, prompt: str) -> str:
        """The reply to one prompt. Raises BudgetExceeded when there is nothing to spend but what the answer needs."""
        if self.account is None:
            self.account = self.call.account.child(self.method, self._limits())
        ask = replace(
            self.call.on_behalf(self.method),
            messages=({"role": "user", "content": prompt},),
            account=self.account,
            sampling=self.sampling,
        )
        answer: Answer = await self.call.engines["answer"].generate(ask)
        self.spend, self.work = self.spend + answer.spend, self.work + answer.work
        return answer.text

    def _limits(self) -> Budget:
        """What is left, less what the answer needs."""
        prompt = prompt_tokens(self.answering) or 0
        output = self.keep + self.call.keep
        needs: Mapping[str, int] = {"input": prompt, "output": output, "tokens": prompt + output, "calls": 1}
        limits: dict[str, int] = {}
        for resource, left in self.call.account.remaining().items():
            if resource in needs:
                limits[resource] = int(left) - needs[resource]
                if limits[resource] <= 0:
                    raise BudgetExceeded(self.call.account.path, resource, left, 0, needs[resource], 1)
        return Budget(**limits)


def output_room(call: Call) -> int | None:
    """Output tokens that the account and max_tokens leave for the answer, at least 1; None: there is no limit."""
    left = call.account.remaining()
    room = [int(left["output"])] if "output" in left else []
    if "tokens" in left:
        room.append(int(left["tokens"]) - (prompt_tokens(call) or 0))
    if call.sampling.max_tokens is not None:
        room.append(call.sampling.max_tokens)
    return max(1, min(room)) if room else None
