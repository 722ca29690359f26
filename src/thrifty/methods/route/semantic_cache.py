"""An answer is given again to a question that is worded differently: near in meaning, equal in everything else."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any

from thrifty.budget import Account, Budget
from thrifty.call import CONTEXT_MARK, Answer, Call, Message, text_of
from thrifty.errors import BudgetExceeded, CacheError, EngineError
from thrifty.method import Next, knob
from thrifty.methods.route._replay import ResponseCache, Slot, Unkeyed, digest
from thrifty.methods.route._store import AnswerStore, Found, Near
from thrifty.spend import Spend

_BYTES_A_TOKEN = 8  # more than any text has on average: what is longer than this is not even embedded


@dataclass(frozen=True, kw_only=True)
class SemanticCache(ResponseCache):
    """Answers a question with the answer to an earlier one whose embedding is near: cosine `threshold` or more.

    Only the text of the last user message may differ; all else that changes the answer must be equal, as for
    `exact-cache`: system prompt, earlier turns, images, context, tools, sampling, plan, account. The very same
    question is found without embedding it. What is kept, for how long and for whom, is as there too.

    Sentence embeddings hardly see order, numbers and negation: on MiniLM "flights from Paris to London" and "flights
    from London to Paris" are at 0.997, nearer than most paraphrases. So with `guard` (ours) a near question serves
    only when it has the same numbers in the same order, as many words of negation (English), and the words of weight
    that both have come in the same order. This lowers the risk of a wrong answer and does not remove it
    ("ascending" and "descending" are at 0.945): measure `threshold` on your own questions.

    A question for which the embedder bills more than `longest` tokens is matched exactly only: an embedder cuts long
    texts (MiniLM at 256 tokens), and two that differ behind the cut would be equal to it.

    The embedding is billed under this method's name in the role embedder; a hit costs that and nothing else. When
    the budget cannot hold it beside the call, the question is matched exactly only (or BudgetExceeded is raised, when
    the plan says refuse); so it is when the embedder fails. All kept questions with the same surroundings are
    compared, D multiplications for each."""

    name = "semantic-cache"
    paper = (
        "GPTCache: An Open-Source Semantic Cache for LLM Applications Enabling Faster Answers and Cost Savings "
        "(Bang 2023, NLPOSS); the guard is ours"
    )
    roles = {"embedder": frozenset({"embed"})}
    identity = {"entries": 0}

    threshold: float = knob(0.97, "cosine from which two questions are one", low=0.0, high=1.0)
    guard: bool = knob(True, "numbers, negation and the order of words must agree too")
    longest: int = knob(
        250, "tokens, as the embedder bills them, that a question may have", low=1, high=100_000, log=True
    )

    async def __call__(self, call: Call, next: Next) -> Answer:
        if self.entries == 0:
            return await next(self.passing(call, "entries = 0: nothing is kept"))
        question = call.question()
        if not question or call.messages[-1].get("role") != "user":
            return await next(self.passing(call, "the last message is no user's text: nothing to compare"))
        try:
            body = self.body(call)
            key = digest(body)
            part = digest({**body, "messages": [dict(m) for m in _without_question(call.messages)]})
        except Unkeyed as why:
            return await next(self.passing(call, str(why)))
        store, now = self.store, time.time()
        try:
            same = await store.run(lambda: store.get(key, now, self.seconds))
        except CacheError as broken:
            return await next(self.passing(call, str(broken)))
        if same is not None:
            return await self.replay(call, same, "the very same question", Spend())
        if len(question.encode("utf-8", "surrogatepass")) > _BYTES_A_TOKEN * self.longest:
            return await self.answer(call, next, Slot(key), self._too_long(), Spend())
        try:
            vector, spend = await self._embed(call, question)
        except BudgetExceeded as error:
            if call.on_exceed == "refuse":
                raise
            missed = f"not asked in these words, and the budget ({error.resource}) cannot hold an embedding"
            return await self.answer(call, next, Slot(key), missed, Spend())
        except EngineError as error:  # a cache that is down must not take the answer with it
            missed = f"not asked in these words, and no embedding came ({error})"
            return await self.answer(call, next, Slot(key), missed, error.spend or Spend())
        if spend.input > self.longest:
            return await self.answer(call, next, Slot(key), self._too_long(), spend)
        try:
            found, near, missed = await store.run(lambda: self._look(store, part, vector, question, now))
        except CacheError as broken:
            found, near, missed = None, None, str(broken)
        if found is not None and near is not None:
            how = f"a question like it (cosine {near.cosine:.3f})"
            return await self.replay(call, found, how, spend, cosine=round(near.cosine, 4))
        return await self.answer(call, next, Slot(key, part, vector, question), missed, spend)

    def _too_long(self) -> str:
        return f"not asked in these words, and longer than {self.longest} tokens"

    def _look(
        self, store: AnswerStore, part: bytes, vector: bytes, question: str, now: float
    ) -> tuple[Found | None, Near | None, str]:
        """The nearest kept answer that may serve, or why there is none."""
        missed = "no question like it"
        for near in store.near(part, vector, self.threshold, now, self.seconds):
            why = differs(question, near.question) if self.guard else ""
            if why:
                missed = f"{missed} ({near.cosine:.3f}: {why})" if missed == "no question like it" else missed
                continue
            found = store.take(near.id)
            if found is not None:
                return found, near, ""
        return None, None, missed

    async def _embed(self, call: Call, question: str) -> tuple[bytes, Spend]:
        """The question's vector, float32 of length 1, on an account that leaves the call its room."""
        import numpy as np

        labels = replace(call.labels, method=self.name, role="embedder")
        with _beside(call, self.name) as account:
            embedded = await call.engines["embedder"].embed([question], account, labels)
        return np.asarray(embedded.vectors[0], dtype=np.float32).tobytes(), embedded.spend


def differs(a: str, b: str) -> str:
    """What tells two near questions apart, as far as words can say: empty when nothing does. Symmetric.

    >>> differs("flights from Paris to London", "flights from London to Paris")
    'the order of words'
    >>> differs("What is 12 + 30?", "What is 12 + 31?"), differs("Is it safe?", "Isn't it safe?")
    ('numbers', 'negation')
    >>> differs("How do I cancel my plan?", "I want to cancel my plan, how do I do that?")
    ''
    """
    if _NUMBER.findall(a) != _NUMBER.findall(b):
        return "numbers"
    mine, theirs = (_WORD.findall(text.casefold().replace("\u2019", "'")) for text in (a, b))
    if sum(map(_negates, mine)) != sum(map(_negates, theirs)):
        return "negation"
    both = (set(mine) & set(theirs)) - _LIGHT
    if [w for w in dict.fromkeys(mine) if w in both] != [w for w in dict.fromkeys(theirs) if w in both]:
        return "the order of words"
    return ""


_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_NEGATIONS = frozenset(
    ("no", "not", "never", "none", "nor", "nothing", "nobody", "nowhere", "neither", "without", "cannot")
)
_LIGHT = frozenset(
    (
        *("a", "an", "the", "and", "or", "so", "that", "this", "these", "those", "there", "please", "tell", "want"),
        *("am", "are", "be", "can", "could", "did", "do", "does", "had", "has", "have", "is", "may", "should", "was"),
        *("were", "will", "would", "how", "what", "what's", "when", "where", "which", "who", "why"),
    )
)
"""Words whose order is free. Pronouns and prepositions have weight: "from A to B" is not "to A from B"."""


def _negates(word: str) -> bool:
    return word in _NEGATIONS or word.endswith("n't")


def _without_question(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without the words of the last one; its images, its other fields and where the context goes stay."""
    last = messages[-1]
    content: Any = last.get("content")
    marked = CONTEXT_MARK in text_of(last)
    if isinstance(content, str):
        kept: Any = "text"
    else:
        kept = [{**part, "text": ""} if part.get("type") == "text" else dict(part) for part in content or ()]
    return (*messages[:-1], {**last, "content": [kept, marked]})


def _beside(call: Call, method: str) -> Account:
    """An account for the embedding that leaves the call its prompt, one output token and what it keeps; with no limit
    of its own where the call does not fit anyway."""
    engine = call.engines.get("answer")
    prompt = 0 if engine is None else engine.count(call)
    needs = {"input": prompt, "tokens": prompt + 1 + call.keep, "calls": 1}
    left = {name: int(room) for name, room in call.account.remaining().items() if name in needs}
    if any(left[name] < needs[name] for name in left):
        return call.account.child(method)
    return call.account.child(method, Budget(**{name: left[name] - needs[name] for name in left}))
