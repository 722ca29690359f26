"""What decode policies decide: the strongest verdict of a step wins, the others are overruled; both are reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from thrifty.call import Receipt
from thrifty.policy import CONTINUE, STRENGTH, Continue, DecodePolicy, Overruled, Policy, Verdict

if TYPE_CHECKING:
    from thrifty.call import Branch


def decide(policies: Sequence[Policy], branch: Branch, token: int, overruled: list[Overruled]) -> tuple[Verdict, str]:
    """Asks every decode policy about `token`, in plan order: the winning verdict and its method's name.

    Stop > Force > Probe > Feed > Continue; of equals the first wins. Losing verdicts are added to `overruled`.
    """
    best: Verdict = CONTINUE
    owner = ""
    given: list[tuple[str, Verdict]] = []
    for policy in policies:
        if not isinstance(policy, DecodePolicy):
            continue
        verdict = policy.after(branch, token)
        if isinstance(verdict, Continue):
            continue
        given.append((policy.method, verdict))
        if STRENGTH[type(verdict)] > STRENGTH[type(best)]:
            best, owner = verdict, policy.method
    overruled.extend(
        Overruled(method, verdict, owner, len(branch.tokens)) for method, verdict in given if verdict is not best
    )
    return best, owner


def policy_receipts(
    policies: Sequence[Policy], branch: Branch, overruled: Sequence[Overruled], asides: Sequence[Receipt] = ()
) -> list[Receipt]:
    """Every policy's receipt, asked once when its branch ends, with what was overruled and what its probes cost.

    A policy that reports nothing of itself but was overruled, or probed, gets a receipt that says so.
    """
    receipts: list[Receipt] = []
    for policy in policies:
        receipt = policy.receipt(branch)
        lost = [o for o in overruled if o.method == policy.method]
        mine = [r for r in asides if r.method == policy.method]
        if receipt is None and (lost or mine):
            receipt = Receipt(policy.method, any(r.fired for r in mine), mine[0].reason if mine else "overruled")
        if receipt is None:
            continue
        if lost:
            by = sorted({o.by for o in lost})
            receipt = replace(receipt, detail={**receipt.detail, "overruled": len(lost), "overruled_by": by})
        for aside in mine:
            receipt = replace(receipt, spend=receipt.spend + aside.spend, work=receipt.work + aside.work)
        asides = [r for r in asides if r.method != policy.method]
        receipts.append(receipt)
    return receipts
