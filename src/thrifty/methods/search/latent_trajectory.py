"""Latent-Trajectory: how the hidden states moved while a trace was written tells which trace to trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Receipt, advance
from thrifty.errors import BudgetExceeded, InvalidInput, PlanError
from thrifty.method import Next, Search, knob
from thrifty.methods.search._branches import Tree, add_forks, can_branch, short_of, to_the_end, without_shared
from thrifty.methods.search._forest import load
from thrifty.methods.search._samples import conclude, how_many_fit, sample_call, shares, tell, votes_of, winner_of
from thrifty.methods.search._trajectory import SIGNALS, ReadTrajectory, Signals, Traces

__all__ = ["LatentTrajectory"]


@dataclass(frozen=True, kw_only=True)
class LatentTrajectory(Search):
    """`mode = "accept"`: draws answers one after another, at most `samples`, and returns the first whose signal reaches
    `threshold`; when none does, their majority. `mode = "early"`: runs `samples` traces for `prefix` tokens, goes on
    with the one whose signal is best, and closes the others.

    The hidden states of a trace's thinking (of all its output, if it has none) are averaged over segments of `segment`
    tokens; `signal` is how far the last is from the first, per segment (`net`), how straight the way was (`aligned`),
    or the length of the way, shorter being better (`cumulative`, whose score is negative), each averaged over layers.
    A trace of fewer than two segments has no signal and is accepted by none; a shorter last segment does not count.

    The threshold is the model's and the task's: find it with `choose_threshold` on traces that were scored. With
    `signal = "forest"` the score is the chance that a trace is correct, by a random forest over all three signals, as
    the paper selects early; `forest` is the file that recipes/latent_trajectory/train.py writes for a model, a segment
    and a prefix (0: whole traces, for "accept"), and none but these are taken. The prompt is prefilled once.
    When the budget is down to `keep` tokens, an early run ends at once."""

    name = "latent-trajectory"
    paper = (
        "Tracing the Traces: Latent Temporal Signals for Efficient and Accurate Reasoning "
        "(Vilas et al. 2025, arXiv:2510.10494)"
    )
    needs = frozenset({"text", "sampling", "branch", "hidden"})
    identity = {"samples": 1}

    samples: int = knob(5, "traces at most", low=1, high=256, log=True)
    mode: str = knob("accept", "accept one by one, or choose early", choices=("accept", "early"))
    signal: str = knob("aligned", "which signal, or a forest over all", choices=(*SIGNALS, "forest"))
    forest: str = knob("", "file of a trained forest, for signal = 'forest'")
    sha256: str = knob("", "how the forest's SHA-256 must begin; empty: not checked")
    threshold: float = knob(0.5, "the score that is accepted", low=-1e9, high=1e9)
    segment: int = knob(500, "tokens of a segment", low=1, high=100_000, log=True)
    prefix: int = knob(2000, "tokens of each trace before one is chosen early", low=1, high=1_000_000, log=True)
    temperature: float = knob(0.7, "of the samples", low=0.01, high=10.0)
    parse: str = knob("auto", "what of an answer votes", choices=("auto", "number", "text"))
    keep: int = knob(64, "tokens that an early run leaves for the chosen trace", low=0, high=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signal != "forest":
            return
        if not self.forest:
            raise InvalidInput(f"{self.name}: signal = 'forest' needs knob forest: the file of a trained one")
        found, prefix = load(self.name, self.forest, self.sha256), self.prefix if self.mode == "early" else 0
        if (found.segment, found.prefix) != (self.segment, prefix) or set(found.features) - set(SIGNALS):
            raise InvalidInput(
                f"{self.name}: {self.forest}: trained on segments of {found.segment} tokens, prefix {found.prefix} (0: "
                f"whole traces), and mode {self.mode!r} has segment = {self.segment}, prefix {prefix}: set the knobs "
                "to what it was trained on, or train another"
            )

    def score(self, signals: Signals) -> float:
        """What a trace is judged by; higher is better."""
        if self.signal != "forest":
            return signals.score(self.signal)
        trees = load(self.name, self.forest, self.sha256)
        return trees([float(getattr(signals, name)) for name in trees.features])

    def _check_model(self, call: Call) -> None:
        """Raises PlanError when the forest was trained on another model: signals of two models are not comparable."""
        engine = call.engines.get("answer")
        if self.signal != "forest" or engine is None:
            return
        theirs = load(self.name, self.forest, self.sha256).model
        if theirs and theirs != engine.model:
            raise PlanError(
                f"{self.name}: {self.forest} was trained on model {theirs} and the plan runs {engine.model}: train one "
                "with recipes/latent_trajectory/train.py"
            )

    async def __call__(self, call: Call, next: Next) -> Answer:
        self._check_model(call)
        if self.samples == 1:
            own = Receipt(self.name, False, "one sample: nothing to choose", 1, 1, "samples")
            return await next(call.with_receipt(own))
        if not can_branch(call, next):
            own = Receipt(self.name, False, "a method below needs whole answers: no trace can be followed")
            return await next(call.with_receipt(own))
        traces = Traces(self.segment)
        followed = call.with_policy(ReadTrajectory(traces, self.name))
        if self.mode == "early":
            return await tell(call, await self._early(followed, next, traces))
        return await tell(call, await self._accept(followed, next))

    # -- one after another -------------------------------------------------------------------------------------

    async def _accept(self, call: Call, next: Next) -> Answer:
        tree = Tree(call, next, self.temperature)
        accounts: list[Account] = [tree.account]
        answers: list[Answer] = []
        signals: list[Signals | None] = []
        accepted, why = False, "none reached the threshold: their majority"
        try:
            while len(answers) < self.samples and not accepted:
                try:
                    drawn = await self._one(call, next, tree, accounts, len(answers))
                except BudgetExceeded as error:
                    if call.on_exceed == "refuse" or not answers:
                        raise
                    why = f"the budget ({error.resource}) held no more: the majority"
                    break
                signals.append(_signals(drawn, self.name))
                answers.append(_without(drawn, self.name))
                last = signals[-1]
                accepted = last is not None and self.score(last) >= self.threshold
            await tree.done()
        finally:
            tree.close()
        chosen = len(answers) - 1 if accepted else winner_of(votes_of(answers, self.parse))
        why = "the last one reached the threshold" if accepted else why
        return conclude(
            call, answers[chosen], answers, accounts, self._receipt(signals, chosen, why, tree.unused, accepted)
        )

    async def _one(self, call: Call, next: Next, tree: Tree, accounts: list[Account], number: int) -> Answer:
        left = self.samples - number
        if tree.rows(1, left):
            return (await tree.wave(number, 1, more=left > 1))[0]
        (account,) = shares(call, number, 1)
        accounts.append(account)
        try:
            return await next(sample_call(call, number, account, self.temperature))
        finally:
            account.close()

    # -- early selection ---------------------------------------------------------------------------------------

    async def _early(self, call: Call, next: Next, traces: Traces) -> Answer:
        account = call.account.child("traces")
        n = how_many_fit(call, self.samples, max(1, self.keep))
        root = await next.open(sample_call(call, 0, account, self.temperature))
        rows: list[Branch] = [root]
        try:
            add_forks(rows, call, 1, n - 1, call.sampling.seed or 0)
            tight = await self._run(rows, account, call.on_exceed == "degrade")
            signals = [traces.of(row).signals() for row in rows]
            chosen = best_of([None if s is None else self.score(s) for s in signals])
            for i, row in enumerate(rows):
                if i != chosen:
                    row.close()
            await to_the_end([rows[chosen]])
            answers = [await row.finish_up() for row in rows]
        finally:
            for row in rows:
                row.close()
        answers = [_without(a, self.name) for a in answers]
        answers = [answers[0], *(without_shared(a, root.call) for a in answers[1:])]
        why = "the budget ended the early run" if tight else f"chosen after {self.prefix} tokens"
        if all(s is None for s in signals):
            why = "no trace had two segments: the first goes on"
        return conclude(call, answers[chosen], answers, [account], self._receipt(signals, chosen, why, 0, True))

    async def _run(self, rows: Sequence[Branch], account: Account, degrade: bool) -> bool:
        """Each row to `prefix` tokens or its end; True when the budget ended it."""

        def short() -> bool:
            return degrade and len(rows) > 1 and short_of(account, self.keep)

        def over(row: Branch) -> bool:
            return row.finish is not None or len(row.tokens) >= self.prefix

        while running := [row for row in rows if not over(row)]:
            if short():
                return True
            await advance(running, lambda now: short() or any(map(over, now)))
        return False

    # -- the receipt -------------------------------------------------------------------------------------------

    def _receipt(self, signals: Sequence[Signals | None], chosen: int, why: str, unused: int, acted: bool) -> Receipt:
        known = sum(s is not None for s in signals)
        parts = [f"{len(signals)} of {self.samples} traces, {known} with a signal; {why}"]
        parts += [f"{unused} fork kept ready and not needed"] if unused else []
        scores = [None if s is None else round(self.score(s), 6) for s in signals]
        fired = bool(known) and (acted or len(signals) > 1)
        detail: dict[str, object] = {"scores": scores, "chosen": chosen}
        if self.signal == "forest":
            detail["forest"] = load(self.name, self.forest, self.sha256).digest
        return Receipt(self.name, fired, "; ".join(parts), self.samples, len(signals), "samples", detail=detail)


def best_of(scores: Sequence[float | None]) -> int:
    """The index of the best score; the first of equals, and 0 when none has one.

    >>> best_of([None, 0.5, 0.7, 0.7]), best_of([None, None])
    (2, 0)
    """
    known = [(score, -i) for i, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else 0


def _signals(answer: Answer, method: str) -> Signals | None:
    """What a trace's policy found."""
    for receipt in answer.receipts:
        if receipt.method == method and "segments" in receipt.detail:
            return Signals(**{name: receipt.detail[name] for name in (*SIGNALS, "segments")})
    return None


def _without(answer: Answer, method: str) -> Answer:
    """An answer without what its policy told: the search tells it."""
    return replace(answer, receipts=tuple(r for r in answer.receipts if r.method != method))
