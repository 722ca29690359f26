"""A*-decoding: grow whichever beginning of a solution looks cheapest, and fall back to older ones when it does not."""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from thrifty.call import Answer, Call, Receipt
from thrifty.method import Next, Search, knob
from thrifty.methods.search._samples import tell
from thrifty.methods.search._scoring import NEEDS, ROLES, SCORES, StepScorer
from thrifty.methods.search._steps import NO_STEPS, Pace, Partial, Steps, check_delimiter, steps_for

S = TypeVar("S")
Cost = Callable[[float, float], float]
"""The cost of an edge, from the rewards of its two ends."""


def drop_cost(before: float, after: float) -> float:
    """What the reward falls by; 0 where it rises."""
    return max(0.0, before - after)


def depth_cost(depth: int) -> Cost:
    """(1 - r) / depth: every step costs, bad ones more."""
    return lambda before, after: (1.0 - after) / depth


@dataclass(frozen=True, kw_only=True)
class AStarDecoding(Search):
    """Keeps open beginnings in order of f = g + h, pops the lowest, tries `branches` next steps of it, and pushes those
    that differ; the first whole solution to be popped is the answer. r in [0, 1] is a beginning's reward, h = 1 - r,
    and g adds the costs of the edges: with `cost = "drop"` what r falls by, with `"depth"` (1 - r) / `depth` for each.
    A step ends with `delimiter`, or after `step_tokens` tokens.

    What holds: where r never rises along a path, f never falls, nodes are popped in order of f, and the solution has
    the lowest f of all solutions there are; then, with "drop", f = 1 + r(root) - 2 r, and the order is that of greedy
    best-first search. Where r may rise, the solution popped first need not be the lowest.

    r is the verifier's word (`score = "verifier"`: the engine in the role `scorer`, billed under this method's name;
    what cannot be read or paid counts 0.5 and is told) or the model's own (`"confidence"`: the geometric mean of the
    probabilities of a beginning's tokens). After `expansions` pops, or when the budget is down to `keep` tokens or
    holds no more branches, the whole solution with the highest r is returned, or the lowest f is written to its end
    alone. At most `queue` beginnings stay open. Engines as for `beam`. The cost of an edge is our reconstruction; the
    paper builds it from the same supervision."""

    name = "a-star-decoding"
    paper = "A*-Decoding: Token-Efficient Inference Scaling (Chatziveroglou 2025, arXiv:2505.13672)"
    needs = frozenset({"text", "sampling", "logprobs"})
    identity = {"branches": 1}

    branches: int = knob(4, "next steps that are tried for each", low=1, high=256, log=True)
    expansions: int = knob(64, "beginnings that are grown, at most", low=1, high=100_000, log=True)
    queue: int = knob(64, "beginnings that stay open, at most", low=1, high=100_000, log=True)
    cost: str = knob("drop", "of an edge", choices=("drop", "depth"))
    depth: int = knob(40, "steps that a solution has, for the cost of depth", low=1, high=10_000, log=True)
    delimiter: str = knob("\n\n", "what ends a step")
    step_tokens: int = knob(256, "tokens of one step at most", low=1, high=100_000, log=True)
    temperature: float = knob(0.8, "of the steps", low=0.01, high=10.0)
    score: str = knob("confidence", "who gives the rewards", choices=SCORES)
    check_tokens: int = knob(1024, "tokens of one check by the verifier", low=1, high=100_000, log=True)
    keep: int = knob(64, "tokens that the search leaves for the end of the answer", low=0, high=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_delimiter(self.name, self.delimiter)
        object.__setattr__(self, "needs", NEEDS[self.score])  # the plan asks the method, not its class
        object.__setattr__(self, "roles", ROLES[self.score])

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.branches == 1:
            return await next(call.with_receipt(Receipt(self.name, False, "one next step: nothing to choose")))
        pace = Pace(self.delimiter, self.step_tokens, self.keep, self.temperature)
        steps = steps_for(call, next, pace, logprobs=self.score == "confidence")
        if steps is None:
            return await next(call.with_receipt(Receipt(self.name, False, NO_STEPS)))
        scorer = StepScorer(self.name, call, self.score, self.check_tokens, self.keep)
        try:
            found = await self._search(steps, scorer)
            best = found.node.state
            await steps.end(best)
            parts = [f"{found.expanded} beginnings grown into {found.tried}; {found.why}"]
            parts += [scorer.note] if scorer.note else []
            spend, work = scorer.cost
            detail = {"f": round(found.node.f, 6), "reward": round(found.node.r, 6), "back": found.back}
            own = Receipt(
                self.name,
                found.tried > found.expanded,
                "; ".join(parts),
                found.tried,
                best.depth,
                "steps",
                spend=spend,
                work=work,
                detail=detail | scorer.detail,
            )
            answer = await steps.conclude(best, own, scorer.accounts)
        finally:
            steps.close()
        return await tell(call, answer)

    async def _search(self, steps: Steps, scorer: StepScorer) -> Found[Partial]:
        async def grow(partial: Partial) -> list[Partial]:
            return (await steps.grow([(partial, self.branches)]))[0]

        return await a_star(
            await steps.root(),
            grow=grow,
            rate=scorer,
            ended=lambda p: p.finish is not None,
            whole=lambda p: p.complete,
            drop=steps.drop,
            stopped=lambda: steps.tight,
            cost=drop_cost if self.cost == "drop" else depth_cost(self.depth),
            expansions=self.expansions,
            queue=self.queue,
        )


@dataclass(slots=True, eq=False)
class Node(Generic[S]):
    """A state of the search."""

    state: S
    g: float
    r: float
    parent: Node[S] | None = None

    @property
    def f(self) -> float:
        return self.g + 1.0 - self.r


@dataclass(slots=True)
class Found(Generic[S]):
    """How a search ended. `node` is its choice; all others were dropped."""

    node: Node[S]
    why: str
    expanded: int = 0
    tried: int = 0
    """states that were made"""
    back: int = 0
    """pops that were no child of the one before: the search fell back"""
    order: list[float] = field(default_factory=list)
    """f of what was popped"""


async def a_star(
    root: S,
    *,
    grow: Callable[[S], Awaitable[list[S]]],
    rate: Callable[[Sequence[S]], Awaitable[list[float]]],
    ended: Callable[[S], bool],
    whole: Callable[[S], bool],
    drop: Callable[[S], None] = lambda state: None,
    stopped: Callable[[], bool] = lambda: False,
    cost: Cost = drop_cost,
    expansions: int = 2**31,
    queue: int = 2**31,
) -> Found[S]:
    """Searches a tree for the whole state with the lowest f; of equal ones the older is popped first.

    `grow` gives the states one step further (its argument is used up), `rate` the rewards of states. A state that
    `ended` and is not `whole` was cut short: it is chosen only when there is nothing else.
    """
    node = Node(root, 0.0, (await rate([root]))[0])
    heap: list[tuple[float, int, Node[S]]] = [(node.f, 0, node)]
    cut: list[Node[S]] = []
    found = Found(node, "")
    number = 0
    before: Node[S] | None = None
    while heap:
        best = heapq.heappop(heap)[2]
        found.order.append(best.f)
        if ended(best.state):
            found.node, found.why = best, "a whole solution was the best of what was open"
            break
        if found.expanded >= expansions or stopped():
            heapq.heappush(heap, (best.f, -1, best))
            break
        found.back += before is not None and best.parent is not before
        before = best
        states = await grow(best.state)
        found.expanded += 1
        found.tried += len(states)
        for state, r in zip(states, await rate(states), strict=True):
            child = Node(state, best.g + cost(best.r, r), r, best)
            number += 1
            if ended(state) and not whole(state):
                cut.append(child)
            else:
                heapq.heappush(heap, (child.f, number, child))
        if len(heap) > queue:
            heap.sort()
            for _, _, worst in heap[queue:]:
                drop(worst.state)
            del heap[queue:]
    if not found.why:
        found.node, found.why = _fallback(heap, cut, node, stopped(), ended)
    for _, _, other in heap:
        if other is not found.node:
            drop(other.state)
    for other in cut:
        if other is not found.node:
            drop(other.state)
    return found


def _fallback(
    heap: list[tuple[float, int, Node[S]]], cut: list[Node[S]], root: Node[S], tight: bool, ended: Callable[[S], bool]
) -> tuple[Node[S], str]:
    """What a search that was stopped chooses: the whole state with the highest r, else the open one with the lowest f,
    else of those cut short the one with the highest r."""
    why = "the budget ended the search" if tight else "as many as allowed were grown"
    solutions = [entry for entry in heap if ended(entry[2].state)]
    if solutions:
        return max(solutions, key=lambda e: (e[2].r, -e[1]))[2], f"{why}: the best whole solution"
    if heap:
        return min(heap, key=lambda e: e[:2])[2], f"{why}: the best beginning went on alone"
    if cut:
        return max(cut, key=lambda n: n.r), "every solution was cut short: the best of them"
    return root, why
