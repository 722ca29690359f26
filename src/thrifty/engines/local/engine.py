"""The local engine: a transformers model in this process, its calls batched by itself; and the local embedder.

    engine = LocalEngine.load("smollm2")            # an embedded model, a local folder, or a hub id
    answer = await engine.generate(call)

Calls may come from many tasks, threads and event loops at once; one thread runs the model (see `scheduler`). Greedy
unless a call says otherwise. With the same seed and the same batch shapes the text is the same; `deterministic` (of the
engine, or of a call's sampling) runs rows alone, so that what else is running cannot change a rounding.
"""

from __future__ import annotations

import asyncio
import atexit
import random
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from thrifty.budget import Account
from thrifty.call import Answer, Branch, Call, Until
from thrifty.engine import Embeddings, Scores
from thrifty.engines.finishing import THINK
from thrifty.engines.generation import check_call, labels_for, stamped
from thrifty.engines.local import embedded, score
from thrifty.engines.local.branch import LocalBranch
from thrifty.engines.local.embedder import Embedder
from thrifty.engines.local.family import Family
from thrifty.engines.local.kv import BLOCK
from thrifty.engines.local.load import load as load_runner
from thrifty.engines.local.prompt import Prompt, Prompter, TextCodec, ends_of, eyes_of
from thrifty.engines.local.runner import Runner
from thrifty.engines.local.sampling import Sampler
from thrifty.engines.local.scheduler import FOREVER, Scheduler
from thrifty.engines.local.turns import Turn, call_in
from thrifty.engines.settling import TRANCHE, Prices, Tab
from thrifty.errors import EngineError, InvalidInput, Unsupported
from thrifty.ledger.entry import Labels
from thrifty.policy import AttentionPolicy, CachePolicy, DecodePolicy, VisionPolicy
from thrifty.spend import Spend, Work

AHEAD = 8
"""Tokens that a stream may be drawn ahead of the caller who takes it."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_PROVIDES = frozenset(
    {"text", "sampling", "logprobs", "score", "continue", "branch", "logits", "hidden", "attention", "cache"}
)


class LocalEngine:
    """See the top of the module. Make it with `load`, or from a Runner and a tokenizer.

    `tags`: around thinking; None keeps thinking in the text. `tranche`: output tokens held at a time. `folder`: where a
    vision model's image processor lies.
    """

    name = "local"

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        model: str,
        *,
        prices: Prices | None = None,
        max_batch: int = 16,
        tranche: int = TRANCHE,
        deterministic: bool = False,
        tags: tuple[str, str] | None = THINK,
        folder: str | Path | None = None,
    ) -> None:
        if max_batch < 1 or tranche < 1:
            raise InvalidInput(f"max_batch = {max_batch}, tranche = {tranche}: at least 1 is needed")
        self.runner, self.model, self.prices, self.tranche, self.tags = runner, model, prices, tranche, tags
        self.dtype = str(runner.dtype).removeprefix("torch.")
        self.deterministic = deterministic
        self.codec = TextCodec(tokenizer, ends_of(tokenizer, runner.model))
        eyes = eyes_of(runner.model, tokenizer, folder)
        self.prompter = Prompter(self.codec, model, runner.max_positions, eyes)
        self.entry_nbytes = runner.entry_nbytes()
        self.capabilities = _PROVIDES | {"vision"} if eyes else _PROVIDES
        self.scheduler = Scheduler(runner, max_batch, deterministic)
        self._seeds = random.Random()
        _stop_at_exit(self.scheduler)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        **settings: Any,
    ) -> LocalEngine:
        """A model by folder, embedded name or hub id.

        `dtype` "auto" is bf16 on a GPU or a processor that computes it well, else float32. `settings` are those of the
        class. Raises InvalidInput where there is nothing to load, Unsupported where the model is none we can run.
        """
        from transformers import AutoTokenizer

        folder = _folder(name)
        wanted = None if dtype == "auto" else _DTYPES.get(dtype)
        if wanted is None and dtype != "auto":
            raise InvalidInput(f"dtype {dtype!r}: one of auto, {', '.join(_DTYPES)} is needed")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with _quiet():
                runner = load_runner(folder, wanted, device)
                tokenizer = AutoTokenizer.from_pretrained(folder)
        except OSError as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InvalidInput(f"model {str(name)!r} cannot be loaded: {line}") from error
        return cls(runner, tokenizer, _short(name), folder=folder, **settings)

    # -- the Engine protocol -----------------------------------------------------------------------------------

    def identity(self) -> Mapping[str, Any]:
        """What results are keyed by. JSON-ready."""
        return {
            "engine": self.name,
            "model": self.model,
            "class": type(self.runner.model).__name__,
            "dtype": self.dtype,
            "device": self.runner.device.type,
            "batch": "alone" if self.deterministic else f"continuous, at most {self.scheduler.max_batch}",
            "shared_prefix_attention": not self.deterministic,
        }

    def count(self, call: Call) -> int:
        """Input tokens of the call, exactly (an image as the model's config counts it, before vision policies)."""
        return self.prompter.size(self.prompter(call, counting=True))

    async def generate(self, call: Call) -> Answer:
        """Holds, generates, settles. Raises BudgetExceeded, EngineError (with what was spent), InvalidInput."""
        branch: LocalBranch | None = None
        try:
            branch, prompt = self._begin(call, opened=False)
            await self._prefill(branch, prompt)
            if call.emit is None:
                await self.scheduler.drawn([branch], FOREVER)
            else:
                await self._stream(branch, call)
        except BaseException as error:
            if branch is not None:
                branch._end("error" if isinstance(error, EngineError) else "cancelled")
                if isinstance(error, EngineError):
                    error.spend, error.work = branch.spend, branch.work
            raise
        answer = await branch.finish_up()
        if call.emit is not None:
            await call.emit(branch.last_delta(answer))
        return answer

    async def open(self, call: Call) -> LocalBranch:
        """A branch whose prompt has been read."""
        branch, prompt = self._begin(call, opened=True)
        try:
            await self._prefill(branch, prompt)
        except BaseException:
            branch.close()
            raise
        return branch

    async def advance(self, branches: Sequence[Branch], until: Until | int) -> None:
        """Steps branches of this engine in common batches; see `thrifty.call.advance`."""
        mine: list[LocalBranch] = [b for b in branches if isinstance(b, LocalBranch)]
        if len(mine) != len(branches) or any(b.engine is not self for b in mine):
            raise InvalidInput("advance takes branches of one engine: call it once for each engine")
        if isinstance(until, int):
            await self.scheduler.drawn(mine, until)
            return
        while any(b.finish is None for b in mine):
            await self.scheduler.drawn(mine, 1)
            if until(branches):
                return

    async def embed(self, texts: Sequence[str], account: Account, labels: Labels) -> Embeddings:
        """Refused: a language model is no embedder."""
        raise Unsupported(f"model {self.model} makes no embeddings: use an embedder, such as local:minilm")

    async def score(
        self, texts: Sequence[str], account: Account, labels: Labels, context: str | Sequence[str] = ""
    ) -> Scores:
        """See `thrifty.engine.score`: one forward pass over each context and text, between other calls' steps."""
        return await score.score(self, texts, account, labels, context)

    async def aclose(self) -> None:
        """Ends the model's thread; what still runs fails. Idempotent."""
        await asyncio.to_thread(self.scheduler.stop)

    # -- details -----------------------------------------------------------------------------------------------

    def tab(self, call: Call, prompt: Spend, labels: Labels, limit: int | None) -> Tab:
        """Opens the bill of one branch: `prompt` and its first tranche held, Work bounded from above."""
        layers, before = self.runner.layers, prompt.cached

        def bound(output: int) -> Work:
            end = prompt.input + output
            reads = end * (end + 1) // 2 - before * (before + 1) // 2
            return Work(prompt.input - before, layers * (reads + 1), max(1, output))

        return Tab.open(
            call.account,
            prompt,
            labels=labels,
            limit=limit,
            keep=call.keep,
            on_exceed=call.on_exceed,
            prices=self.prices,
            bound=bound,
            tranche=self.tranche,
        )

    def _begin(self, call: Call, opened: bool) -> tuple[LocalBranch, Prompt]:
        check_call(call)
        for policy in call.policies:
            if isinstance(policy, VisionPolicy) and "vision" not in self.capabilities:
                who = policy.method or type(policy).__name__
                raise Unsupported(f"model {self.model} sees no images, so the vision policy of {who!r} cannot act")
            if not isinstance(policy, (DecodePolicy, CachePolicy, AttentionPolicy, VisionPolicy)):
                raise Unsupported(f"{type(policy).__name__} is no kind of policy that the local engine knows")
        prompt = self.prompter(call)
        size = self.prompter.size(prompt)
        bill = Spend(input=size, visual=size - len(prompt.tokens) + len(prompt.images), calls=1)
        tab = self.tab(call, bill, labels_for(call, self.name, self.model, self.prices), call.sampling.max_tokens)
        seed = call.sampling.seed
        try:
            family = Family(self, call.account)
            sampler = Sampler(call.sampling, self._seeds.getrandbits(63) if seed is None else seed)
            branch = LocalBranch(call, self, tab, sampler, family, thinking=prompt.thinking, opened=opened)
        except BaseException:
            tab.release()
            raise
        return branch, prompt

    async def _prefill(self, branch: LocalBranch, prompt: Prompt) -> None:
        n = self.prompter.size(prompt)
        branch.family.claim((n if n > BLOCK else BLOCK) * self.entry_nbytes)
        branch.store = self.runner.store(branch.cachers, branch.readers)
        await self.scheduler.prefill(branch, partial(branch.first_row, prompt))

    async def _stream(self, branch: LocalBranch, call: Call) -> None:
        """Draws at most AHEAD tokens before the caller has taken what there is: that is the backpressure."""
        if call.emit is None:
            return
        loop = asyncio.get_running_loop()
        fresh = asyncio.Event()

        def ping() -> None:
            call_in(loop, fresh.set)

        failures: list[BaseException] = []

        def over(error: BaseException | None) -> None:
            if error is not None:
                failures.append(error)
            ping()

        turn = Turn(branch, AHEAD, over, ping)
        self.scheduler.begin([turn])
        try:
            while True:
                await fresh.wait()
                fresh.clear()
                with branch.lock:
                    delta, taken = branch.delta(), len(branch.tokens)
                if delta is not None:
                    await call.emit(delta)
                if turn.over:
                    break
                self.scheduler.extend(turn, taken + AHEAD)
        finally:
            self.scheduler.drop([turn])
        if failures:
            raise failures[0]


class LocalEmbedder:
    """A sentence embedder in this process; it makes vectors and no text.

    Every text is billed in full, as a server bills it, so that what a call costs does not depend on what ran before
    it. A text that was seen before is not computed again: that shows in Work."""

    name = "local"

    def __init__(self, embedder: Embedder, model: str, *, prices: Prices | None = None) -> None:
        self.embedder, self.model, self.prices = embedder, model, prices
        self.dtype = embedder.dtype
        self.capabilities = frozenset({"embed"})

    @classmethod
    def load(cls, name: str | Path, *, prices: Prices | None = None, dtype: str = "float32") -> LocalEmbedder:
        """An embedder by folder or embedded name. Raises InvalidInput, Unsupported."""
        return cls(Embedder(_folder(name), dtype), _short(name), prices=prices)

    def identity(self) -> Mapping[str, Any]:
        """What results are keyed by. JSON-ready."""
        return {"engine": self.name, "model": self.model, "dtype": self.dtype}

    def count(self, call: Call) -> int:
        raise self._refusal()

    async def generate(self, call: Call) -> Answer:
        """Refused."""
        raise self._refusal()

    async def open(self, call: Call) -> Branch:
        """Refused."""
        raise self._refusal()

    async def advance(self, branches: Sequence[Branch], until: Until | int) -> None:
        """Refused."""
        raise self._refusal()

    async def embed(self, texts: Sequence[str], account: Account, labels: Labels) -> Embeddings:
        """Unit vectors float32 [N, D]; holds and settles the tokens of all texts."""
        counts = await asyncio.to_thread(self.embedder.count, texts)
        mine = stamped(labels, self.name, self.model, self.prices)
        spend = self._priced(Spend(input=sum(counts), calls=1), labels)
        hold = account.hold(spend, labels=mine)
        try:
            found = await asyncio.to_thread(self.embedder.encode_counted, texts)
        except BaseException:
            hold.release()
            raise
        await hold.settle_async(spend, Work(target_passes=1 if any(found.computed) else 0))
        return Embeddings(found.vectors, spend)

    async def aclose(self) -> None:
        """Nothing to free."""

    def _priced(self, spend: Spend, labels: Labels) -> Spend:
        return spend if self.prices is None else self.prices.with_price(spend, self.model, labels.role)

    def _refusal(self) -> Unsupported:
        return Unsupported(f"model {self.model} makes vectors and no text: use a language model, such as local:smollm2")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers' while a model is loaded."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _folder(name: str | Path) -> str | Path:
    """Where a model is: an embedded one's folder, else what was given."""
    return embedded.path(name) if isinstance(name, str) and embedded.known(name) else name


def _short(name: str | Path) -> str:
    path = Path(name)
    return path.name if path.is_dir() else str(name)


def _stop_at_exit(scheduler: Scheduler) -> None:
    """A thread inside the model while the interpreter goes down crashes it: stop it first."""
    known = weakref.ref(scheduler)

    def stop() -> None:
        there = known()
        if there is not None:
            there.stop()

    atexit.register(stop)
    weakref.finalize(scheduler, atexit.unregister, stop)
