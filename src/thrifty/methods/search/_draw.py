"""Some whole samples of one call at once: forks of one prefill where what is below can branch, calls elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thrifty.budget import Account
from thrifty.call import Answer, Call
from thrifty.method import Next
from thrifty.methods.search._branches import Tree, can_branch
from thrifty.methods.search._samples import how_many_fit, sample_call, shares, side_by_side


@dataclass(frozen=True, slots=True)
class Drawn:
    """Samples, in order, and the accounts on which they stand."""

    answers: Sequence[Answer]
    accounts: Sequence[Account]


async def draw_samples(call: Call, next: Next, n: int, temperature: float, first: int = 0) -> Drawn:
    """At most n samples, numbered from `first`; fewer where the account holds fewer, never none. Raises BudgetExceeded
    when it refuses the first, or, where the plan says refuse, any."""
    tree = Tree(call, next, temperature) if can_branch(call, next) else None
    if tree is not None:
        try:
            rows = tree.rows(n, n)
            if rows:
                return Drawn(await tree.wave(first, rows, more=False), [tree.account])
        finally:
            tree.close()
    accounts = shares(call, first, how_many_fit(call, n))
    try:
        calls = [sample_call(call, first + i, account, temperature) for i, account in enumerate(accounts)]
        answers = [a for a in await side_by_side(next, calls, lambda came: False) if a is not None]
    finally:
        for account in accounts:
            account.close()
    return Drawn(answers, accounts)


def without_logprobs(answer: Answer, call: Call) -> Answer:
    """The answer without log-probabilities that only a method asked for."""
    return answer if call.sampling.logprobs else replace(answer, logprobs=None)
