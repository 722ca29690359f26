"""An engine that says what a script tells it: for tests and docs, deterministic, without a model.

It spends, streams, forks, is cut short and is cancelled exactly as a real engine, so methods can be tried on it in
microseconds. One token is one word with the white space before it; `count` and the bill are exact in that unit, and
joined tokens are the text, byte for byte.

>>> import asyncio
>>> from thrifty import Account, Call
>>> engine = ScriptedEngine({"capital of France": "It is Paris."})
>>> call = Call(({"role": "user", "content": "What is the capital of France?"},), Account("demo"))
>>> answer = asyncio.run(engine.generate(call))
>>> answer.text, answer.spend.input, answer.spend.output
('It is Paris.', 6, 3)
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Message, Receipt, Until, text_of
from thrifty.context import render
from thrifty.engine import CAPABILITIES, Embeddings, Scores, TokenScores
from thrifty.engines.generation import Generation, check_call, labels_for, stamped
from thrifty.engines.script import Draw, Reply, Script, Words, expected
from thrifty.engines.settling import TRANCHE, Prices, Tab
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput, Unsupported, nearest
from thrifty.ledger.entry import Labels
from thrifty.policy import CONTINUE, DecodePolicy, Feed, Probe, Verdict
from thrifty.spend import Spend, Work

__all__ = ["IMAGE_TOKENS", "PROVIDES", "Draw", "Reply", "Script", "ScriptedBranch", "ScriptedEngine", "Words"]

PROVIDES: frozenset[str] = frozenset({"text", "sampling", "logprobs", "embed", "score", "continue", "branch"})
"""What a scripted engine provides unless told otherwise."""

IMAGE_TOKENS = 16
"""Visual tokens that one image counts as."""


class ScriptedEngine:
    """See the top of the module.

    `seed` and the call's own seed decide what `Draw` gives. `delay`: seconds between tokens. `fail_after`: raise
    EngineError when a generation has drawn that many tokens. `tranche`: output tokens held at a time. `logprob`: of a
    word, given the context and the text before it, for `score`; `expected` unless told otherwise.
    """

    name = "scripted"
    dtype = "text"

    def __init__(
        self,
        script: Script,
        model: str = "scripted",
        *,
        seed: int = 0,
        capabilities: Iterable[str] = PROVIDES,
        prices: Prices | None = None,
        delay: float = 0.0,
        fail_after: int | None = None,
        tranche: int = TRANCHE,
        dimensions: int = 256,
        logprob: Callable[[str, str, str], float] | None = None,
    ) -> None:
        self.script, self.model, self.seed = script, model, seed
        self.capabilities = frozenset(capabilities)
        for capability in self.capabilities - CAPABILITIES:
            raise InvalidInput(nearest(capability, CAPABILITIES, "capability"))
        self.prices, self.delay, self.fail_after = prices, delay, fail_after
        self.tranche, self.dimensions = tranche, dimensions
        self.logprob = logprob or expected
        self.words = Words()
        self.calls: list[Call] = []
        """every call it was asked to generate for, in order"""
        self._asked: dict[str, int] = {}
        self._next = 0

    # -- the Engine protocol -----------------------------------------------------------------------------------

    def identity(self) -> Mapping[str, Any]:
        """Model, seed and, where the script is data, its hash."""
        known = None
        if not callable(self.script):
            body = json.dumps(self.script, sort_keys=True, default=repr)
            known = hashlib.sha256(body.encode()).hexdigest()[:16]
        return {"engine": self.name, "model": self.model, "dtype": self.dtype, "seed": self.seed, "script": known}

    def count(self, call: Call) -> int:
        """Words of the rendered messages, the prefix (without a draft) and the tools, and IMAGE_TOKENS an image."""
        return self._input(call).input

    async def generate(self, call: Call) -> Answer:
        """The scripted answer, streamed word by word where the call wants it."""
        branch = self._begin(call)
        try:
            while await branch.step() is not None:
                if call.emit is not None:
                    delta = branch.delta()
                    if delta is not None:
                        await call.emit(delta)
        except EngineError as error:
            branch.settle("error")
            error.spend, error.work = branch.spend, branch.work
            raise
        except BaseException:
            branch.settle("cancelled")
            raise
        answer = await branch.finish_up()
        if call.emit is not None:
            await call.emit(branch.last_delta(answer))
        return answer

    async def open(self, call: Call) -> ScriptedBranch:
        """A branch that follows the script."""
        if "branch" not in self.capabilities:
            raise Unsupported(f"engine {self.name}:{self.model} has no branches: use an engine with `branch`")
        return self._begin(call)

    async def advance(self, branches: Sequence[Branch], until: Until | int) -> None:
        """Steps the branches side by side."""
        count = until if isinstance(until, int) else None
        steps = 0
        while (count is None or steps < count) and any(b.finish is None for b in branches):
            await asyncio.gather(*(b.step() for b in branches if b.finish is None))
            steps += 1
            if not isinstance(until, int) and until(branches):
                return

    async def embed(self, texts: Sequence[str], account: Account, labels: Labels) -> Embeddings:
        """Bags of hashed words, as unit vectors [N, dimensions]: texts that share words are near each other."""
        if "embed" not in self.capabilities:
            raise Unsupported(f"engine {self.name}:{self.model} does not embed: use an engine with `embed`")
        import numpy as np

        spend = Spend(input=sum(len(self.words.split(t)) for t in texts), calls=1)
        if self.prices is not None:
            spend = self.prices.with_price(spend, self.model, labels.role)
        mine = stamped(labels, self.name, self.model, self.prices)
        hold = account.hold(spend, labels=mine)
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()) or [""]:
                row[self.words.number(word) % self.dimensions] += 1.0
            row /= np.linalg.norm(row)
        await hold.settle_async(spend, Work(target_passes=1))
        return Embeddings(vectors, spend)

    async def score(
        self, texts: Sequence[str], account: Account, labels: Labels, context: str | Sequence[str] = ""
    ) -> Scores:
        """What `logprob` says of each word. A context is input with every text it stands before."""
        if "score" not in self.capabilities:
            raise Unsupported(f"engine {self.name}:{self.model} does not score: use an engine with `score`")
        import numpy as np

        contexts = [context] * len(texts) if isinstance(context, str) else list(context)
        tokens = sum(len(self.words.split(t)) for pair in zip(contexts, texts, strict=True) if pair[1] for t in pair)
        spend = Spend(input=tokens, calls=1) if tokens else Spend()
        if self.prices is not None:
            spend = self.prices.with_price(spend, self.model, labels.role)
        work = Work(prefill=tokens, target_passes=1) if tokens else Work()
        hold = account.hold(spend, work, labels=stamped(labels, self.name, self.model, self.prices))
        found = []
        for before, text in zip(contexts, texts, strict=True):
            words = self.words.split(text)
            stops = np.cumsum([len(word) for word in words], dtype=np.int64)
            spans = np.stack([np.concatenate([[0], stops[:-1]]), stops], axis=1) if words else np.zeros((0, 2), int)
            scores = [self.logprob(w, before, text[:a]) for w, (a, _) in zip(words, spans, strict=True)]
            found.append(TokenScores(np.asarray(scores, dtype=np.float64), spans.astype(np.int64)))
        await hold.settle_async(spend, work)
        return Scores(tuple(found), spend, work)

    async def aclose(self) -> None:
        """Nothing to free."""

    # -- details -----------------------------------------------------------------------------------------------

    def _input(self, call: Call) -> Spend:
        messages = render(call)
        tokens = sum(len(self.words.split(text_of(m))) for m in messages)
        if call.prefix and call.draft is None:
            tokens += len(self.words.split(call.prefix))
        if call.tools:
            tokens += len(self.words.split(json.dumps(list(call.tools))))
        visual = IMAGE_TOKENS * sum(_images(m) for m in messages)
        return Spend(input=tokens + visual, visual=visual, calls=1)

    def _begin(self, call: Call) -> ScriptedBranch:
        check_call(call)
        for policy in call.policies:
            self._check_policy(policy)
        draw = self._draw(call, call.sampling.seed)
        tab = self._tab(call, self._input(call))
        try:
            reply = self.reply(call, draw)
            self.calls.append(call)
            return ScriptedBranch(call, self, tab, reply)
        except BaseException:
            tab.release()
            raise

    def _check_policy(self, policy: object) -> None:
        if not isinstance(policy, DecodePolicy):
            raise Unsupported(f"engine scripted:{self.model} has no tensors for {type(policy).__name__}: use `local`")
        if type(policy).logits is not DecodePolicy.logits:
            raise Unsupported(f"engine scripted:{self.model} has no logits for {type(policy).__name__}: use `local`")

    def _tab(self, call: Call, prompt: Spend, limit: int | None = None, labels: Labels | None = None) -> Tab:
        return Tab.open(
            call.account,
            prompt,
            labels=labels or labels_for(call, self.name, self.model, self.prices),
            limit=call.sampling.max_tokens if limit is None else limit,
            keep=call.keep,
            on_exceed=call.on_exceed,
            prices=self.prices,
            bound=lambda n: Work(prefill=prompt.input - prompt.cached, target_passes=n),
            tranche=self.tranche,
        )

    def _draw(self, call: Call, seed: int | None) -> Draw:
        key = json.dumps([*map(dict, render(call)), call.prefix], sort_keys=True, default=repr)
        index = self._asked.get(key, 0)
        self._asked[key] = index + 1
        text = f"{self.seed}/{index if seed is None else 's' + str(seed)}/{key}"
        return Draw(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]), index)

    def reply(self, call: Call, draw: Draw) -> Reply:
        """What the script says to a call. Raises EngineError when it has nothing to say."""
        script = self.script
        if isinstance(script, (str, Reply)):
            found: str | Reply = script
        elif callable(script):
            found = script(replace(call, messages=render(call), context=None), draw)
        elif isinstance(script, Mapping):
            text = "\n".join(text_of(m) for m in render(call)) + "\n" + (call.prefix or "")
            match = next((key for key in script if key in text), None)
            if match is None:
                asked = call.question()[:60]
                raise EngineError(f"the script has no reply to {asked!r}: add one, or a '' that fits all")
            found = script[match]
        else:
            if self._next >= len(script):
                raise EngineError(f"the script of {len(script)} replies is used up: add one a call")
            found = script[self._next]
            self._next += 1
        return Reply(found) if isinstance(found, str) else found


class ScriptedBranch(Generation):
    """One scripted generation in progress; implements `thrifty.call.Branch`."""

    engine: ScriptedEngine

    def __init__(self, call: Call, engine: ScriptedEngine, tab: Tab, reply: Reply, limit: int | None = None) -> None:
        super().__init__(call, engine, engine.words, tab, limit=limit)
        self.entropy: float | None = None
        self._read(reply)
        self._at = 0

    @property
    def work(self) -> Work:
        """Tokens computed from the prompt, and a pass for each token drawn."""
        prompt = self.tab.prompt
        return Work(prefill=prompt.input - prompt.cached, target_passes=self.output)

    async def step(self) -> int | None:
        """Draws the script's next word; None when the branch has ended."""
        if self.finish is None and self._at >= len(self._words):
            self._used_up()
        if self._thinking_words and self.finish is None:
            self._think(self._at < self._thinking_words)  # before the hold: a thinking token is held as one
        if not self.may_draw():
            return None
        await asyncio.sleep(self.engine.delay)
        if self.finish is not None:
            return None  # closed while it waited
        if self.engine.fail_after is not None and self.output >= self.engine.fail_after:
            raise EngineError(f"scripted failure after {self.output} tokens")
        word = self._words[self._at]
        self._at += 1
        token = self.codec.encode(word)[0]
        noise = random.Random(f"{token}/{len(self.tokens)}").random()
        self.entropy = 2 * noise
        self.take(token, -2 * noise, last=self._at >= len(self._words))
        verdict, method = self.judge(token)
        while isinstance(verdict, Probe):
            verdict = await self._probe(verdict, method)
        if isinstance(verdict, Feed):
            raise Unsupported(f"engine scripted:{self.engine.model} has no embeddings to feed: use `local`")
        drafting = self.shape.drafting
        self.apply(verdict)
        self._follow(drafting)
        return token

    async def append(self, text: str) -> None:
        """Forces text: it counts as output."""
        if self.finish is None:
            self.force(text)

    def fork(self, seed: int | None = None) -> ScriptedBranch:
        """A second branch with the same past. With a seed the script is asked again; the words already drawn are
        skipped. Without one, the twin goes on as this branch would."""
        return self._twin(seed, None, None, None)

    # -- details -----------------------------------------------------------------------------------------------

    def _twin(self, seed: int | None, limit: int | None, labels: Labels | None, reply: Reply | None) -> ScriptedBranch:
        if self.closed:
            raise InvalidInput("a closed branch cannot be forked: fork it before it is closed")
        shared = self.tab.prompt.input + self.output
        prompt = Spend(input=shared, cached=shared, visual=self.tab.prompt.visual, calls=1)
        call = self.call if seed is None else self.call.with_sampling(seed=seed)
        left = None if self.limit is None else max(0, self.limit - len(self.tokens))
        tab = self.engine._tab(call, prompt, left if limit is None else limit, labels)
        if reply is None:
            reply = self._reply if seed is None else self.engine.reply(call, self.engine._draw(call, seed))
        twin = ScriptedBranch(call, self.engine, tab, reply)
        self.forked(twin)
        if seed is None:
            twin._words, twin._thinking_words = list(self._words), self._thinking_words
        twin._at = self._at
        return twin

    async def _probe(self, probe: Probe, method: str) -> Verdict:
        """Runs a probe on a fork, in its method's name, and hands what it said to `then`."""
        if probe.watch is not None:
            self.engine._check_policy(probe.watch)
        labels = replace(self.tab.labels, method=method)
        asked = len(self.codec.encode(probe.text)) + probe.max_tokens
        call = replace(self.call, prefix=self.text + probe.text, draft=None, policies=(), receipts=(), emit=None)
        call = call.with_sampling(max_tokens=probe.max_tokens, stop=(), temperature=None)
        try:
            fork = self._twin(None, asked, labels, Reply())
        except BudgetExceeded as refusal:
            self.aside(Receipt(method, False, f"probe refused: {refusal.resource} ran out"))
            return CONTINUE
        try:
            fork.policies, fork.receipts = () if probe.watch is None else (probe.watch,), []
            fork.finish, fork.limit = None, len(self.tokens) + asked
            fork.shape.drafting, fork.shape.stop = False, ()
            fork.force(probe.text)
            start = len(fork.text)
            fork._read(self.engine.reply(call, self.engine._draw(call, 0)))  # greedy: always the same
            fork._at = 0
            while await fork.step() is not None:
                pass
            said = fork.text[start:]
        finally:
            fork.settle("cancelled")
        self.aside(Receipt(method, True, "probed", spend=fork.spend, work=fork.work))
        return probe.then(said)

    def _read(self, reply: Reply) -> None:
        """Takes a reply's words: thinking, then the draft up to its separator or the text."""
        self._reply = reply
        text = reply.text
        draft = self.call.draft
        if draft is not None and draft.separator in text:
            before, mark, _ = text.partition(draft.separator)
            text = before + mark
        elif draft is None and self.call.prefix and text.startswith(self.call.prefix):
            text = text[len(self.call.prefix) :]
        thinking = self.engine.words.split(reply.thinking)
        self._words = thinking + self.engine.words.split(text)
        self._thinking_words = len(thinking)

    def _follow(self, drafting: bool) -> None:
        """Keeps the script in step with what was decided: after a draft comes what stands behind its separator."""
        if drafting and not self.shape.drafting and self.call.draft is not None:
            after = self._reply.text.partition(self.call.draft.separator)[2]
            prefix = (self.call.prefix or "").strip()
            if prefix and after.strip().startswith(prefix):
                after = after.partition(prefix)[2]
            self._words, self._at, self._thinking_words = self.engine.words.split(after), 0, 0
        if self._thinking_words and self._at < self._thinking_words and not self.shape.inside:
            self._at = self._thinking_words  # a policy closed the thinking
        if self.finish == "stop" and self._at >= len(self._words):
            self.finish, self.tool_calls = self._reply.finish, tuple(self._reply.tool_calls)
            self.raw.update(self._reply.raw)

    def _used_up(self) -> None:
        """The script has no more words: the draft or the answer ends."""
        drafting = self.shape.drafting
        self._chose_end, self._ending = True, "draft" if drafting else "stop"
        self.apply(CONTINUE)
        self._follow(drafting)

    def _think(self, inside: bool) -> None:
        if inside != self.shape.inside:
            self.shape.end()
            self.shape.inside = inside


def _images(message: Message) -> int:
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return 0
    return sum(1 for part in content if part.get("type") in ("image", "image_url"))
