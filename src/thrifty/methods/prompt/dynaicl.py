"""DynaICL: as many in-context examples as the query needs, within an average that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.call import Call, Receipt
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt import _trained
from thrifty.methods.prompt._demonstrations import (
    KIND,
    Controller,
    Pack,
    Pairs,
    balanced_scale,
    number,
    plain_scale,
    shown,
    smallest_beta,
    spread,
)
from thrifty.methods.prompt._embedding import embed, fits
from thrifty.methods.prompt._system import conversation_tokens, instruct, instruct_late, prompt_tokens
from thrifty.spend import Spend

__all__ = ["Controller", "DynaICL", "Pack", "fit", "policy_gradient", "smallest_beta", "spread", "sufficient"]


@dataclass(frozen=True, kw_only=True)
class DynaICL(Rewrite):
    """Predicts from the query's embedding how many demonstrations it needs, and shows that many.

    `pack` is a file with demonstrations and a controller trained for them (`fit`, `Pack.save`); its SHA-256 may be
    fixed by `sha256`. A query x with prediction C(x) gets round(beta * C(x) / mean C * shots) of them, from 0 to
    `most`, where mean C is that of the calibration data, not of a batch. Rounding and clipping let that rule drift from
    its average: `balance` takes the greatest scale in the place of beta * shots / mean C that keeps the calibration
    data's average. A file without a controller, or none, gives every query `shots` examples: the uniform baseline, and
    the way to measure the scores that a controller is trained on.

    Examples are shown in the file's order, so that fewer are a prefix of more and a provider's cache serves both; by
    `order = "nearest"` those most like the query, the likest last. They stand in the system message after the caller's
    own words; as their number differs from query to query, in a conversation that breaks the cached prefix, and the
    receipt's `breaks_cached` says by how many tokens. `place = "turn"` puts them right before the last user message.
    Where the budget cannot hold them all (and the plan degrades), or `tokens` is passed, fewer are shown.

    The paper's controller is a fine-tuned FLAN-T5; ours is a small network over sentence embeddings, and predicts the
    expectation. The reward's weights are reconstructed. The ten demonstrations in the place of a file are OURS."""

    name = "dynaicl"
    paper = "Efficient Prompting via Dynamic In-Context Learning (Zhou et al. 2023, arXiv:2305.11170)"
    roles = {"embedder": frozenset({"embed"})}
    identity = {"shots": 0.0}

    pack: str = knob("", "file with demonstrations and a controller; empty: ten of ours and no controller")
    sha256: str = knob("", "how the file's SHA-256 must begin; empty: not checked")
    shots: float = knob(5.0, "examples a query on average", low=0.0, high=1000.0)
    beta: float = knob(1.0, "share of that average to spend", low=0.01, high=1.0)
    most: int = knob(10, "examples of one query at most", low=0, high=1000)
    balance: bool = knob(True, "keep the average on the calibration data in spite of rounding and clipping")
    tokens: int = knob(0, "tokens of examples at most in one query; 0: no limit", low=0, high=1_000_000)
    order: str = knob("fixed", "which examples: the file's first, or the nearest", choices=("fixed", "nearest"))
    place: str = knob("system", "in the system message, or before the last user message", choices=("system", "turn"))

    def __post_init__(self) -> None:
        super().__post_init__()
        pack, _ = self._pack()
        if self.order == "nearest" and pack.vectors is None and self.pack:
            raise InvalidInput(f"{self.name}: order = 'nearest' needs embeddings of the demonstrations in {self.pack}")

    def _pack(self) -> tuple[Pack, str]:
        if not self.pack:
            return Pack(), "ours"
        return _trained.read(self.name, self.pack, KIND, Pack.from_dict, self.sha256)

    async def rewrite(self, call: Call) -> Call:
        before, query = prompt_tokens(call), call.question()
        pack, digest = self._pack()
        most = min(self.most, len(pack.demonstrations))
        controller = pack.controller
        spend = Spend()
        detail: dict[str, Any] = {"pack": digest}

        def unfired(reason: str) -> Call:
            return call.with_receipt(Receipt(self.name, False, reason, before, before, spend=spend, detail=detail))

        if not query:
            return unfired("no user message to find examples for")
        wanted, why = number(self.shots * self.beta, 1.0, most), "no controller: as many for every query"
        if wanted == 0 and (controller is None or self.shots == 0):
            return unfired("0 examples are asked for")
        if most == 0:
            return unfired("0 examples at most are allowed")
        nearest = self.order == "nearest"
        similar: Sequence[float] | None = None
        if controller is not None or nearest:
            texts = [query, *(q for q, _ in pack.demonstrations)] if nearest and pack.vectors is None else [query]
            try:
                embedded = await embed(call, self.name, texts, pack.embedder)
            except BudgetExceeded as error:
                if call.on_exceed == "refuse":
                    raise
                return unfired(f"the budget cannot hold the embedding ({error.resource}): asked without examples")
            spend = embedded.spend
            if nearest:
                others = embedded.vectors[1:] if pack.vectors is None else _checked(pack.vectors, embedded.vectors)
                similar = [float(x) for x in others @ embedded.vectors[0]]
        if controller is not None:
            predicted = controller.predict(embedded.vectors[:1])[0]
            wanted = number(predicted, self._scale(controller, most), most)
            why = f"predicted {predicted:.2f}, mean {controller.mean:.2f}"
            detail |= {"predicted": predicted}
        pairs = _chosen(pack.demonstrations, wanted, similar)
        changed, shots = self._shown(call, pairs, before)
        detail |= {"shots": shots, "wanted": wanted}
        if shots == 0:
            return unfired(f"{wanted} examples wanted ({why}), 0 shown" if wanted else f"0 examples ({why})")
        varies = controller is not None or similar is not None
        detail["breaks_cached"] = conversation_tokens(call) if varies and self.place == "system" else 0
        reason = f"{shots} examples ({why})" + (f"; {wanted - shots} more do not fit" if shots < wanted else "")
        after = prompt_tokens(changed)
        return changed.with_receipt(Receipt(self.name, True, reason, before, after, spend=spend, detail=detail))

    def _scale(self, controller: Controller, most: int) -> float:
        if self.balance:
            return balanced_scale(controller.calibration, self.shots, most, self.beta)
        return plain_scale(controller.calibration, self.shots, self.beta)

    def _shown(self, call: Call, pairs: Pairs, before: int | None) -> tuple[Call, int]:
        """The call with as many of the pairs as fit, and how many those are. The last are the first to go, or, where
        they are in the order of likeness, the least like."""
        bound = call.on_exceed == "degrade" and fits(call)  # else fewer examples would not help
        for n in range(len(pairs), 0, -1):
            part = pairs[len(pairs) - n :] if self.order == "nearest" else pairs[:n]
            text = shown(part)
            changed = instruct(call, text) if self.place == "system" else instruct_late(call, text)
            within = not self.tokens or (prompt_tokens(changed) or 0) - (before or 0) <= self.tokens
            if within and (not bound or fits(changed)):
                return changed, n
        return call, 0


def _chosen(pairs: Pairs, n: int, similar: Sequence[float] | None) -> Pairs:
    """The first n, or the n most similar with the most similar last; of equals the lower index is nearer."""
    if similar is None:
        return pairs[:n]
    order = sorted(range(len(pairs)), key=lambda i: (-similar[i], i))[:n]
    return [pairs[i] for i in reversed(order)]


def _checked(vectors: Any, given: Any) -> Any:
    if vectors.shape[1] != given.shape[1]:
        raise InvalidInput(
            f"dynaicl: the demonstrations have embeddings of {vectors.shape[1]} numbers and the embedder gives "
            f"{given.shape[1]}: use the embedder that they were made with"
        )
    return vectors


# -- training a controller -----------------------------------------------------------------------------------


def sufficient(scores: Any, margin: float = 0.0) -> list[int | None]:
    """The label of each query: the fewest examples whose score is within `margin` of its best, from `scores`
    [N, K + 1] with 0 .. K examples, each in [0, 1]; None where every score is 0, so that nothing solves it.

    >>> sufficient([[0, 1, 1], [1, 0, 1], [0, 0, 0]])
    [1, 0, None]
    """
    labels: list[int | None] = []
    for row in scores:
        top = max(row)
        labels.append(next(k for k, s in enumerate(row) if s >= top - margin and s > 0) if top > 0 else None)
    return labels


def fit(
    vectors: Any,
    scores: Any,
    *,
    margin: float = 0.0,
    unsolved: str = "most",
    hidden: Sequence[int] = (32,),
    epochs: int = 60,
    rate: float = 3e-3,
    decay: float = 0.1,
    tokens: Any = None,
    alpha: float = 0.0,
    refine: int = 0,
    calibration: Any = None,
    seed: int = 0,
) -> Controller:
    """A controller from N queries: embeddings [N, D], and their scores with 0 .. K examples, [N, K + 1] (mean over
    several draws of demonstrations where one draw is noisy).

    First supervised, by cross-entropy on `sufficient`; queries that nothing solves get K (`unsolved = "most"`) or are
    left out ("drop"). Then `refine` epochs of REINFORCE: k is drawn from the controller, and its reward is the score
    less alpha times the tokens that k examples take (`tokens` [K + 1] or [N, K + 1]; k itself by default). Its average
    is kept on `calibration`, embeddings [M, D] of queries like those to come; default: the training queries. Raises
    InvalidInput for shapes that do not fit or where nothing is left to learn from."""
    import numpy as np

    from thrifty.methods.prompt import _mlp

    vectors, scores = np.asarray(vectors, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if vectors.ndim != 2 or scores.ndim != 2 or len(vectors) != len(scores) or scores.shape[1] < 2:
        raise InvalidInput(
            f"embeddings {list(vectors.shape)} and scores {list(scores.shape)}: a row for each query, and in the "
            "scores a column for each number of examples from 0 to at least 1"
        )
    if unsolved not in ("most", "drop"):
        raise InvalidInput(f"unsolved = {unsolved!r}: 'most' or 'drop' is needed")
    most = scores.shape[1] - 1
    labels = sufficient(scores.tolist(), margin)
    kept = [i for i, k in enumerate(labels) if k is not None or unsolved == "most"]
    if not kept:
        raise InvalidInput("no query is solved with any number of examples: there is nothing to learn from")
    y = np.array([most if (k := labels[i]) is None else k for i in kept])
    network = _mlp.MLP.fresh((vectors.shape[1], *hidden, most + 1), seed)
    network = _mlp.train(
        network, vectors[kept], _mlp.cross_entropy(y), epochs=epochs, rate=rate, decay=decay, seed=seed
    )
    if refine:
        cost = np.arange(most + 1.0) if tokens is None else np.asarray(tokens, dtype=np.float64)
        rewards = scores - alpha * np.broadcast_to(cost, scores.shape)
        network = _mlp.train(network, vectors, policy_gradient(rewards, seed), epochs=refine, rate=rate, seed=seed)
    fresh = Controller(network, (1.0,))
    return Controller(network, tuple(fresh.predict(vectors if calibration is None else np.asarray(calibration))))


def policy_gradient(rewards: Any, seed: int = 0) -> Any:
    """REINFORCE's gradient by a batch's outputs, for rewards [N, K + 1] of each action: one action is drawn for each
    row, and the baseline is the mean reward of the others in the batch, which leaves the gradient unbiased."""
    import numpy as np

    from thrifty.methods.prompt._mlp import softmax

    rng = np.random.default_rng(seed)

    def loss(outputs: Any, rows: Any) -> Any:
        chances = softmax(outputs)
        b = len(rows)
        drawn = (chances.cumsum(axis=1) < rng.random((b, 1))).sum(axis=1).clip(max=chances.shape[1] - 1)
        reward = rewards[rows, drawn]
        baseline = (reward.sum() - reward) / (b - 1) if b > 1 else np.zeros(b)
        gradient = chances.copy()
        gradient[np.arange(b), drawn] -= 1.0
        return gradient * (reward - baseline)[:, None] / b

    return loss
