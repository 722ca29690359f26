"""Sketch-of-Thought: reasoning in the shorthand that suits the question, chosen by a router."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

from thrifty.call import Call, Draft, Message, Receipt
from thrifty.errors import BudgetExceeded, InvalidInput
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt._embedding import embed, fits
from thrifty.methods.prompt._sketch_kits import KITS, Exemplar
from thrifty.methods.prompt._sketch_router import PARADIGMS, SHIPPED, by_words, read_router
from thrifty.methods.prompt._system import conversation_tokens, instruct, prompt_tokens
from thrifty.spend import Spend
from thrifty.thinking import CLOSING, OPENING

MOST_SHOTS = min(len(kit.exemplars) for kit in KITS.values())


@dataclass(frozen=True, kw_only=True)
class SketchOfThought(Rewrite):
    """Tells the model to reason in a sketch: equations, chains of key terms, or the notation of a field.

    `paradigm = "auto"` chooses by the last user message (not its context or images): one embedding in the role
    `embedder`, then a linear router. The router that ships was fitted for all-MiniLM-L6-v2 (`recipes/sketch_router`
    fits one for another embedder, which `weights` names). With an embedder it does not suit, with `router =
    "words"`, and where the budget has no room for the embedding, a rule over the question's words chooses, and the
    receipt says so.

    Rule and format stand in the system message; `shots` worked examples follow as chat turns, as in the paper, or
    in the system message (`form = "text"`). `answer = "boxed"` is the paper's format: the sketch between <think>
    tags, then \\boxed{answer}. `"separator"` asks for the sketch, `####` and the answer, with `draft_tokens` as a
    hard limit of the sketch; a call with an answer prefix always takes it, since a prefix comes after a draft only.
    Examples in chat turns are moved into the system message when the model's template is seen to cut thinking out
    of earlier turns, as those of Qwen3 and DeepSeek do.

    The prompt grows by some 200 to 350 tokens, which a provider can cache (`break_even` says when that pays); in a
    conversation whose questions change their paradigm the cached prefix breaks, and the receipt's `breaks_cached`
    says by how many tokens. Where the budget cannot hold the examples fewer are shown, down to none; where it
    cannot hold the rule the call goes on unchanged (a plan that refuses raises BudgetExceeded).

    Departures: rules and examples are OURS and in English; the paper's router is a fine-tuned DistilBERT, ours is
    logistic regression on MiniLM, trained on 150 questions of ours. The paper decodes greedily; here the call's own
    sampling holds.
    """

    name = "sketch-of-thought"
    paper = (
        "Sketch-of-Thought: Efficient LLM Reasoning with Adaptive Cognitive-Inspired Sketching "
        "(Aytes, Baek and Hwang 2025, arXiv:2503.05179)"
    )
    needs = frozenset({"text", "sampling"})
    roles = {"embedder": frozenset({"embed"})}
    no_identity = "its prompt is what it does"

    paradigm: str = knob("auto", "how to sketch; auto: the router chooses", choices=("auto", *PARADIGMS))
    router: str = knob("embedding", "what auto looks at", choices=("embedding", "words"))
    weights: str = knob("", "file of a router for another embedder; empty: the one that ships, for MiniLM")
    shots: int = knob(3, "worked examples shown; 0 shows none", low=0, high=MOST_SHOTS)
    form: str = knob("turns", "examples as chat turns, or in the system message", choices=("turns", "text"))
    answer: str = knob("boxed", "the format of sketch and answer", choices=("boxed", "separator"))
    separator: str = knob("####", "what stands between sketch and answer, when not boxed")
    draft_tokens: int = knob(256, "tokens at most in the sketch, when not boxed", low=1, high=100_000, log=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.separator.strip():
            raise InvalidInput("sketch-of-thought: knob separator = '' is not allowed: text such as '####' is needed")
        if self.weights:
            read_router(self.weights)  # what is wrong with a plan is found when it is built

    async def rewrite(self, call: Call) -> Call:
        before = prompt_tokens(call)
        choice = await self._choose(call)
        notes = [choice.how]
        boxed = self.answer == "boxed" and call.prefix is None
        if self.answer == "boxed" and not boxed:
            notes.append("the call has an answer prefix, so the sketch ends in a separator")
        changed, shown, form = self._fitted(call, choice.paradigm, boxed)
        if changed is None:
            reason = "; ".join([*notes, "the budget cannot hold the rule: no sketch asked for"])
            return call.with_receipt(Receipt(self.name, False, reason, before, before, spend=choice.spend))
        if shown < self.shots:
            notes.append(f"the budget holds {shown} of {self.shots} examples")
        if form != self.form:
            notes.append("the model's template cuts thinking out of chat turns: examples in the system message")
        after = prompt_tokens(changed)
        broken = conversation_tokens(call) if self.paradigm == "auto" else 0
        if broken:
            notes.append(f"another paradigm than in the last turn breaks {broken} cached tokens of the conversation")
        detail = {"paradigm": choice.paradigm, "shots": shown, "breaks_cached": broken}
        if choice.probability is not None:
            detail["probability"] = round(choice.probability, 4)
        reason = f"asked for a sketch by {choice.paradigm}: " + "; ".join(notes)
        return changed.with_receipt(Receipt(self.name, True, reason, before, after, spend=choice.spend, detail=detail))

    # -- choosing ----------------------------------------------------------------------------------------------

    async def _choose(self, call: Call) -> Choice:
        if self.paradigm != "auto":
            return Choice(self.paradigm, "as set")
        question = call.question()
        if not question:
            return Choice(by_words(""), "the question has no text to route by")
        if self.router == "words":
            return Choice(by_words(question), "chosen by words")
        router, embedder = read_router(self.weights or SHIPPED), call.engines["embedder"]
        if not router.suits(embedder.model):
            return Choice(
                by_words(question),
                f"chosen by words: the router is for {' or '.join(router.embedders)}, not for {embedder.model}",
            )
        try:
            answering = self._longest(call) if call.account.remaining() else call
            embedded = await embed(answering, self.name, [question])
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            return Choice(by_words(question), f"chosen by words: no budget ({error.resource}) to embed the question")
        p = router.probabilities(embedded.vectors[0].tolist())
        best = p.index(max(p))
        return Choice(PARADIGMS[best], f"chosen by the router, p = {p[best]:.2f}", embedded.spend, p[best])

    def _longest(self, call: Call) -> Call:
        """The call with the longest of the kits, which the embedding has to leave room for."""
        boxed = self.answer == "boxed" and call.prefix is None
        kits = [self._with_kit(call, paradigm, self.shots, boxed, self.form) for paradigm in PARADIGMS]
        return max(kits, key=lambda c: prompt_tokens(c) or 0)

    # -- telling -----------------------------------------------------------------------------------------------

    def _fitted(self, call: Call, paradigm: str, boxed: bool) -> tuple[Call | None, int, str]:
        """The call with as many examples as the account holds, how many, and their form; None: not even the rule."""
        for shots in range(self.shots, -1, -1):
            form = self.form
            changed = self._with_kit(call, paradigm, shots, boxed, form)
            if form == "turns" and boxed and shots and self._cut_by_template(call, changed, paradigm, shots):
                form = "text"
                changed = self._with_kit(call, paradigm, shots, boxed, form)
            if call.on_exceed == "refuse" or fits(changed):
                return changed, shots, form if shots else self.form
        return None, 0, self.form

    def _cut_by_template(self, call: Call, changed: Call, paradigm: str, shots: int) -> bool:
        """Whether sketches in earlier turns do not reach the model: without them the prompt is as long."""
        empty = tuple(replace(e, sketch="") for e in KITS[paradigm].exemplars[:shots])
        return prompt_tokens(changed) is not None and prompt_tokens(changed) == prompt_tokens(
            instruct(call, self._told(paradigm, True), self._turns(empty, True))
        )

    def _with_kit(self, call: Call, paradigm: str, shots: int, boxed: bool, form: str) -> Call:
        text, exemplars = self._told(paradigm, boxed), KITS[paradigm].exemplars[:shots]
        turns: tuple[Message, ...] = ()
        if form == "turns":
            turns = self._turns(exemplars, boxed)
        else:
            text = "\n\n".join([text, *(f"Q: {e.question}\nA: {self._answered(e, boxed)}" for e in exemplars)])
        told = instruct(call, text, turns)
        return told if boxed else replace(told, draft=Draft(self.separator, self.draft_tokens))

    def _told(self, paradigm: str, boxed: bool) -> str:
        return f"{KITS[paradigm].rule}\n{format_rule(None if boxed else self.separator)}"

    def _turns(self, exemplars: tuple[Exemplar, ...], boxed: bool) -> tuple[Message, ...]:
        turns: list[Message] = []
        for e in exemplars:
            turns += [
                {"role": "user", "content": e.question},
                {"role": "assistant", "content": self._answered(e, boxed)},
            ]
        return tuple(turns)

    def _answered(self, e: Exemplar, boxed: bool) -> str:
        if boxed:
            return f"{OPENING}\n{e.sketch}\n{CLOSING}\n\\boxed{{{e.answer}}}"
        return f"{e.sketch}\n{self.separator} {e.answer}"


@dataclass(frozen=True, slots=True)
class Choice:
    """A paradigm, how it was chosen, and what that cost."""

    paradigm: str
    how: str
    spend: Spend = field(default_factory=Spend)
    probability: float | None = None


def format_rule(separator: str | None = None) -> str:
    """How sketch and answer are to be written: the paper's tags and box, or with a separator.

    >>> format_rule("####").split(".")[0]
    'Write the sketch, then #### and the answer alone'
    """
    if separator is None:
        head = f"Write the sketch between {OPENING} and {CLOSING}, then the answer alone in \\boxed{{}}."
    else:
        head = f"Write the sketch, then {separator} and the answer alone."
    return f"{head} Of a multiple-choice question the answer is the letter."


def break_even(added: int, saved: float, *, input: float = 1.0, cached: float = 0.1, output: float = 4.0) -> int | None:
    """From how many calls on the kit costs less than it saves; None: never.

    `added`: input tokens a call that the kit adds (a receipt's after - before), paid at the price `input` once and at
    `cached` from the second call on; `saved`: output tokens a call that it saves, at the price `output`. Prices are in
    any one unit a token; the defaults are those of a local run. A provider that caches nothing has cached = input.

    >>> break_even(260, 40), break_even(260, 66), break_even(260, 6)
    (2, 1, None)
    """
    if added < 0 or min(input, cached, output) < 0 or not all(map(math.isfinite, (saved, input, cached, output))):
        raise InvalidInput("break_even needs added tokens and prices of at least 0")
    first = added * (Fraction(input) - Fraction(cached))
    gain = Fraction(saved) * Fraction(output) - added * Fraction(cached)
    return None if gain <= 0 else max(1, math.floor(first / gain) + 1)
