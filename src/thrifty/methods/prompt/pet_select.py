"""PET-Select: the prompt engineering technique that a coding query needs, chosen by its predicted complexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.call import Call, Receipt, Sampling
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt import _trained
from thrifty.methods.prompt._asking import Asking
from thrifty.methods.prompt._code_complexity import complexity, scores
from thrifty.methods.prompt._embedding import embed, fits
from thrifty.methods.prompt._system import conversation_tokens, instruct, instruct_late, prompt_tokens
from thrifty.methods.prompt._techniques import ASKING, STATED, TECHNIQUES
from thrifty.spend import Spend, Work

if TYPE_CHECKING:
    from thrifty.methods.prompt._mlp import MLP

KIND = "pet-select"


@dataclass(frozen=True, kw_only=True)
class PetSelect(Rewrite):
    """Embeds the query, asks a trained selector which of nine techniques is the cheapest that solves it, and uses it.

    `selector` is a file that `fit` trained on your own outcomes (which techniques passed, with how many tokens); its
    SHA-256 may be fixed by `sha256`. Without one every query gets `technique`, and nothing is embedded. Zero-shot is
    the plain call. What is added goes into the system message; techniques of several calls make theirs first, billed
    under this method's name, on an account that leaves the answer its prompt, `keep` output tokens and one call. They
    see the last user message, not the context. Where the budget cannot hold the embedding, the calls, or the longer
    prompt, the query is asked as it is, and the receipt says so (BudgetExceeded where the plan refuses).

    What is added differs from query to query, so in a conversation it breaks the provider's cached prefix; the
    receipt's `breaks_cached` says by how many tokens. `place = "turn"` puts it right before the last user message.

    Departures: the sentence encoder stays as it is (MiniLM in the place of a fine-tuned CodeBERT), and the triplet loss
    trains a projection of its vectors; self-debug runs no test; every technique answers with one more ordinary call,
    so progressive-hint pays for the answer that its last two drafts agreed on. All prompts are OURS."""

    name = "pet-select"
    paper = (
        "Selection of Prompt Engineering Techniques for Code Generation through Predicting Code Complexity "
        "(Wang, DaghighFarsoodeh and Pham 2024, arXiv:2409.16416)"
    )
    needs = frozenset({"text", "sampling"})
    roles = {"embedder": frozenset({"embed"})}
    identity = {"selector": "", "technique": "zero-shot"}

    selector: str = knob("", "file with a trained selector; empty: every query gets `technique`")
    sha256: str = knob("", "how the selector's SHA-256 must begin; empty: not checked")
    technique: str = knob("zero-shot", "for every query, where there is no selector", choices=TECHNIQUES)
    rounds: int = knob(2, "drafts of progressive-hint at most", low=1, high=10)
    ask_tokens: int = knob(512, "output tokens at most in each call before the answer", low=1, high=100_000, log=True)
    keep: int = knob(128, "output tokens that these calls leave for the answer", low=1, high=100_000, log=True)
    temperature: float = knob(0.0, "of these calls", low=0.0, high=2.0)
    place: str = knob("system", "in the system message, or before the last user message", choices=("system", "turn"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selector:
            self._selector()

    def _selector(self) -> tuple[Selector, str]:
        return _trained.read(self.name, self.selector, KIND, Selector.from_dict, self.sha256)

    async def rewrite(self, call: Call) -> Call:
        before, task = prompt_tokens(call), call.question()
        spend, work = Spend(), Work()
        detail: dict[str, Any] = {}

        def unfired(reason: str) -> Call:
            return call.with_receipt(
                Receipt(self.name, False, reason, before, before, spend=spend, work=work, detail=detail)
            )

        if not task:
            return unfired("no user message to choose a technique for")
        technique, why = self.technique, "no selector"
        if self.selector:
            selector, digest = self._selector()
            try:
                embedded = await embed(call, self.name, [task], selector.embedder)
            except BudgetExceeded as error:
                if call.on_exceed == "refuse":
                    raise
                return unfired(f"the budget cannot hold the embedding ({error.resource}): asked as it is")
            spend += embedded.spend
            chances = selector.chances(embedded.vectors)[0]
            technique = selector.techniques[max(range(len(chances)), key=lambda i: (chances[i], -i))]
            why = f"probability {max(chances):.2f}"
            detail |= {"selector": digest, "chances": dict(zip(selector.techniques, map(float, chances), strict=True))}
        detail["technique"] = technique
        if technique == "zero-shot":
            return unfired(f"zero-shot ({why}): asked as it is")
        asking = Asking(
            self.name, call, Sampling(temperature=self.temperature, max_tokens=self.ask_tokens), keep=self.keep
        )
        try:
            text = STATED[technique] if technique in STATED else await ASKING[technique](task, asking, self.rounds)
        except BudgetExceeded as error:
            spend, work = spend + asking.spend, work + asking.work
            if call.on_exceed == "refuse":
                raise
            return unfired(f"the budget cannot hold the calls of {technique} ({error.resource}): asked as it is")
        spend, work = spend + asking.spend, work + asking.work
        changed = instruct(call, text) if self.place == "system" else instruct_late(call, text)
        if call.on_exceed == "degrade" and fits(call) and not fits(changed):
            return unfired(f"the budget cannot hold the prompt of {technique}: asked as it is")
        varies = bool(self.selector) or technique in ASKING
        detail["breaks_cached"] = conversation_tokens(call) if varies and self.place == "system" else 0
        reason = f"{technique} ({why})" + (f", {asking.spend.calls} calls first" if asking.spend.calls else "")
        after = prompt_tokens(changed)
        return changed.with_receipt(
            Receipt(self.name, True, reason, before, after, spend=spend, work=work, detail=detail)
        )


# -- the selector --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selector:
    """A projection [D, H] trained to tell simple from complex queries, and a network [H -> techniques] over it."""

    techniques: tuple[str, ...]
    projection: Any
    network: MLP
    embedder: str = ""
    """the model whose embeddings it was trained on; another is refused; empty: not known"""

    def chances(self, vectors: Any) -> Any:
        """The probability of each technique to be the best, [N, P], of embeddings [N, D]. Raises InvalidInput for
        embeddings of another length, which another embedder than the one it was trained on gives."""
        from thrifty.methods.prompt._mlp import softmax

        if vectors.shape[1] != self.projection.shape[0]:
            raise InvalidInput(
                f"pet-select: the selector takes embeddings of {self.projection.shape[0]} numbers and the embedder "
                f"gives {vectors.shape[1]}: use the embedder that it was trained with"
            )
        return softmax(self.network(vectors @ self.projection))

    def save(self, path: str | Path) -> str:
        """Writes the file that the knob `selector` reads, and gives the first digits of its SHA-256."""
        data = {
            "techniques": list(self.techniques),
            "projection": self.projection.tolist(),
            "layers": self.network.to_list(),
            "embedder": self.embedder,
        }
        return _trained.write(path, KIND, data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selector:
        """Reads what `save` writes. Raises InvalidInput."""
        from thrifty.methods.prompt._mlp import MLP, array

        techniques, embedder = data.get("techniques"), data.get("embedder", "")
        if not isinstance(techniques, list) or not techniques or any(t not in TECHNIQUES for t in techniques):
            raise InvalidInput(f"techniques {techniques!r}: names of {', '.join(TECHNIQUES)} are needed")
        if not isinstance(embedder, str):
            raise InvalidInput(f"embedder {embedder!r}: the name of a model is needed")
        made = cls(tuple(techniques), array(data.get("projection"), 2), MLP.from_list(data.get("layers")), embedder)
        if (made.projection.shape[1], len(techniques)) != (made.network.inputs, made.network.outputs):
            raise InvalidInput("projection, layers and techniques do not fit together")
        return made


def complexities(solutions: Sequence[str], weights: Sequence[float] = (1, 1, 1, 1, 1)) -> list[float]:
    """The complexity of each reference solution, in [0, 1] over the set: lines, cyclomatic, Halstead volume, cognitive
    and maintainability index, each scaled to its range, in a weighted mean. Raises InvalidInput for what does not
    parse."""
    return scores([complexity(code) for code in solutions], weights)


def fit(
    vectors: Any,
    complexity: Sequence[float],
    passed: Any,
    tokens: Any,
    techniques: Sequence[str] = TECHNIQUES,
    *,
    threshold: float | None = None,
    size: int | None = None,
    hidden: Sequence[int] = (128, 64),
    margin: float = 1.0,
    triplet_epochs: int = 20,
    epochs: int = 20,
    balanced: bool = False,
    embedder: str = "",
    seed: int = 0,
) -> Selector:
    """A selector from N training queries: embeddings [N, D] of the model `embedder`, complexity of their reference
    solutions [N] (`complexities`), and of each technique whether it passed and its tokens, [N, P]: what a bench run of
    plans with each `technique` and no selector measures.

    Queries at or over `threshold` (default: the median) are complex. `triplet_epochs = 0` leaves the contrastive step
    out: on MiniLM and 20 queries in two plain kinds that chose right for 12 of 12 unseen ones, and with it 9, with
    every complex query still ranked above every simple one. `balanced` weighs the classes of the
    cross-entropy by their rarity, for zero-shot wins most queries. Raises InvalidInput for shapes that do not fit."""
    import numpy as np

    from thrifty.methods.prompt import _mlp

    vectors = np.asarray(vectors, dtype=np.float64)
    passed, tokens = _outcomes(passed, tokens)
    n, p = passed.shape
    if vectors.ndim != 2 or len(vectors) != n or len(complexity) != n or len(techniques) != p:
        raise InvalidInput(
            f"{len(vectors)} embeddings, {len(complexity)} complexities and outcomes {n} x {p} of {len(techniques)} "
            "techniques do not fit together: a row for each query, a column for each technique"
        )
    hard = np.asarray(complexity) >= (np.median(complexity) if threshold is None else threshold)
    projection = triplet_projection(vectors, hard, size, margin=margin, epochs=triplet_epochs, seed=seed)
    labels = best(passed, tokens)
    weights = None
    if balanced:
        counts = np.bincount(labels, minlength=p)
        weights = np.where(counts > 0, n / np.maximum(counts, 1) / max(1, (counts > 0).sum()), 0.0)
    network = _mlp.MLP.fresh((projection.shape[1], *hidden, p), seed)
    trained = _mlp.train(
        network, vectors @ projection, _mlp.cross_entropy(labels, weights), epochs=epochs, rate=1e-3, seed=seed
    )
    return Selector(tuple(techniques), projection, trained, embedder)


def triplet_projection(
    vectors: Any,
    hard: Any,
    size: int | None = None,
    *,
    margin: float = 1.0,
    epochs: int = 20,
    rate: float = 1e-2,
    seed: int = 0,
) -> Any:
    """A projection [D, size] by the triplet loss max(0, |a - p| - |a - n| + margin) of anchor a, a query p of the same
    class and one n of the other, drawn anew each epoch. It starts from the embeddings as they are (the identity; random
    orthonormal directions where `size` is below D), as fine-tuning starts from the encoder, and stays there where a
    class has fewer than two queries."""
    import numpy as np

    from thrifty.methods.prompt._mlp import Adam

    rng = np.random.default_rng(seed)
    d = vectors.shape[1]
    w = np.eye(d) if size is None else np.linalg.qr(rng.normal(size=(d, d)))[0][:, :size].copy()
    classes = [np.flatnonzero(hard), np.flatnonzero(~np.asarray(hard, dtype=bool))]
    if min(len(c) for c in classes) < 2:
        return w
    adam = Adam([w], rate)
    for _ in range(epochs):
        for same, other in (classes, classes[::-1]):
            anchor = rng.permutation(same)
            # the next of the shuffled class is never the anchor itself
            positive, negative = np.roll(anchor, 1), rng.choice(other, len(anchor))
            adam.step([triplet_gradient(w, vectors[anchor], vectors[positive], vectors[negative], margin)])
    return w


def triplet_gradient(w: Any, a: Any, p: Any, n: Any, margin: float = 1.0) -> Any:
    """The gradient of the mean triplet loss by the projection [D, H], of rows a, p, n [B, D]."""
    import numpy as np

    near, far = (a - p) @ w, (a - n) @ w
    d_near, d_far = np.linalg.norm(near, axis=1), np.linalg.norm(far, axis=1)
    active = (d_near - d_far + margin > 0).astype(np.float64)[:, None]
    by_near = active * near / np.maximum(d_near, 1e-12)[:, None]
    by_far = active * far / np.maximum(d_far, 1e-12)[:, None]
    return ((a - p).T @ by_near - (a - n).T @ by_far) / len(a)


# -- ranking and what a selector is worth --------------------------------------------------------------------


def ranking_scores(passed: Any, tokens: Any) -> Any:
    """The paper's score of every technique for every query, [N, P]: log(max_j T_j) * pass - log T.

    So the techniques that pass come before those that fail, and among each the cheaper first."""
    import numpy as np

    passed, tokens = _outcomes(passed, tokens)
    return np.log(tokens.max(axis=1, keepdims=True)) * passed - np.log(tokens)


def best(passed: Any, tokens: Any) -> Any:
    """The best technique of each query, [N]: the cheapest that passes, or the cheapest where none does."""
    import numpy as np

    passed, tokens = _outcomes(passed, tokens)
    return np.lexsort((tokens, ~passed), axis=1)[:, 0]


@dataclass(frozen=True, slots=True)
class Worth:
    """Share of queries passed, and mean tokens a query."""

    passed: float
    tokens: float


@dataclass(frozen=True)
class Report:
    """A selector beside one that draws, one that knows, and every technique used always."""

    selector: Worth
    random: Worth
    oracle: Worth
    always: Mapping[str, Worth]
    mrr: float
    """mean reciprocal rank of the best technique in the selector's order"""
    ndcg: float
    """of that order, where a technique's gain is how many stand behind it by `ranking_scores`"""
    macro_recall: float
    """of the best technique, mean over the techniques that are best of some query"""


def report(chances: Any, passed: Any, tokens: Any, techniques: Sequence[str] = TECHNIQUES) -> Report:
    """What choosing by `chances` [N, P] is worth on queries with known outcomes [N, P]."""
    import numpy as np

    chances = np.asarray(chances)
    passed, tokens = _outcomes(passed, tokens)
    n, p = passed.shape
    rows, truth = np.arange(n), best(passed, tokens)
    order = np.argsort(-chances, axis=1, kind="stable")
    gains = np.empty((n, p))
    np.put_along_axis(gains, np.lexsort((tokens, ~passed), axis=1), np.arange(p - 1, -1, -1.0)[None], axis=1)
    discount = 1 / np.log2(np.arange(2, p + 2))
    ideal = max(float((np.arange(p - 1, -1, -1.0) * discount).sum()), 1e-12)
    found = np.take_along_axis(gains, order, axis=1) @ discount / ideal if p > 1 else np.ones(n)

    def worth(choice: Any) -> Worth:
        return Worth(float(passed[rows, choice].mean()), float(tokens[rows, choice].mean()))

    return Report(
        selector=worth(order[:, 0]),
        random=Worth(float(passed.mean()), float(tokens.mean())),
        oracle=worth(truth),
        always={name: worth(np.full(n, i)) for i, name in enumerate(techniques)},
        mrr=float((1 / (1 + np.argmax(order == truth[:, None], axis=1))).mean()),
        ndcg=float(found.mean()),
        macro_recall=float(np.mean([(order[truth == c, 0] == c).mean() for c in np.unique(truth)])),
    )


def _outcomes(passed: Any, tokens: Any) -> tuple[Any, Any]:
    import numpy as np

    passed, tokens = np.asarray(passed, dtype=bool), np.asarray(tokens, dtype=np.float64)
    if passed.ndim != 2 or passed.shape != tokens.shape or not passed.size or not tokens.min() >= 1:
        raise InvalidInput(
            f"outcomes {list(passed.shape)} and tokens {list(tokens.shape)}: one of each for every query and "
            "technique, tokens at least 1"
        )
    return passed, tokens
