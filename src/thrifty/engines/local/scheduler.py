"""Continuous batching: one thread runs the model for all branches, whoever asks, from whatever event loop.

The thread's loop first does what was queued (copies for forks, freeing), then prefills one waiting prompt by itself,
then runs one decode step over the branches that have leave to draw, at most `max_batch` of them, in turn. Between the
chunks of a long prompt the others get a step, and a prompt whose branch was closed is read no further. A branch whose
caller is slow to take its stream has no leave and holds up nobody. Whatever goes wrong in one row ends that row: when
a batch fails, its rows are run one by one.

Invariants: the model, and every cache, is used by this thread alone; a Turn is told exactly once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from thrifty.engines.local import sampling
from thrifty.engines.local.branch import LocalBranch
from thrifty.engines.local.runner import Output, Row, Runner
from thrifty.engines.local.turns import Told, Turn, together, told
from thrifty.errors import EngineError, InvalidInput, ThriftyError
from thrifty.policy import CONTINUE, Probe

FOREVER = 2**62


class Scheduler:
    """See the top of the module. `deterministic` runs every row by itself."""

    def __init__(self, runner: Runner, max_batch: int = 16, deterministic: bool = False) -> None:
        self.runner, self.max_batch, self.deterministic = runner, max_batch, deterministic
        self._wake = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._prompts: deque[tuple[LocalBranch, Callable[[], Row], Told]] = deque()
        self._turns: deque[Turn] = deque()
        self._thread: threading.Thread | None = None
        self._last = threading.Lock()
        self._stopping = self._ended = False
        self.steps = 0
        """decode steps run"""
        self.rows = 0
        """rows in them"""

    # -- the callers' side -------------------------------------------------------------------------------------

    def queue(self, job: Callable[[], None]) -> None:
        """Does something on the model's thread before its next step, in the order of asking."""
        with self._wake:
            if not self._ended:
                self._jobs.append(job)
                self._start()
                return
        with self._last:  # the thread has gone: what it left behind is freed here
            self._do(job)

    async def prefill(self, branch: LocalBranch, row: Callable[[], Row]) -> None:
        """Reads a prompt, which `row` makes on the model's thread.

        Raises EngineError, or BudgetExceeded when its memory is refused.
        """

        def start(tell: Told) -> None:
            with self._wake:
                self._refuse_stopped()
                self._prompts.append((branch, row, tell))
                self._start()

        await told(start)

    async def drawn(self, branches: Sequence[LocalBranch], n: int) -> None:
        """Returns when each branch has drawn n more tokens or ended; they run in common batches."""
        for branch in branches:
            if branch.failure is not None:
                raise branch.failure
        live = [b for b in branches if b.finish is None]
        if n <= 0 or not live:
            return
        turns: list[Turn] = []

        def start(tell: Told) -> None:
            one = together(len(live), tell)
            made = [Turn(branch, n, one) for branch in live]
            self.begin(made)
            turns.extend(made)

        try:
            await told(start)
        finally:
            self.drop(turns)

    async def turn(self, branch: LocalBranch, job: Callable[[], Probe | None]) -> None:
        """Does something with a branch's cache in a turn of its own, on the model's thread; a Probe that it returns has
        ended, too, when this returns. Nothing is done for a branch that is closed by then."""
        if branch.failure is not None:
            raise branch.failure
        made: list[Turn] = []

        def start(tell: Told) -> None:
            made.append(Turn(branch, 1, tell, job=job))
            try:
                self.begin(made)
            except BaseException:
                made.clear()
                raise

        try:
            await told(start)
        finally:
            self.drop(made)

    def begin(self, turns: Sequence[Turn]) -> None:
        """Gives leave to draw. Raises InvalidInput when a branch is already being stepped, or a tree of it is open."""
        for turn in turns:
            if turn.job is None:
                turn.branch.no_tree()
        with self._wake:
            self._refuse_stopped()
            if any(turn.branch.busy for turn in turns):
                raise InvalidInput("a step of this branch is awaited already: await one at a time")
            for turn in turns:
                turn.branch.busy = True
            self._turns.extend(turns)
            self._start()

    def extend(self, turn: Turn, upto: int) -> None:
        """Lets a turn draw until its branch has `upto` tokens."""
        with self._wake:
            turn.left = upto - len(turn.branch.tokens)
            self._wake.notify()

    def drop(self, turns: Sequence[Turn]) -> None:
        """Takes leave back; a step under way is finished first by the thread."""
        with self._wake:
            for turn in turns:
                if not turn.over:
                    turn.left, turn.over = 0, True
                    turn.branch.busy = turn.running
                    if turn in self._turns:
                        self._turns.remove(turn)

    def stop(self) -> None:
        """Ends the thread and fails what waits. Idempotent. Blocks until the step under way is done."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
            thread = self._thread
            self._ended = self._ended or thread is None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._fail_all()

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            with self._wake:
                self._stopping = self._ended = True
            self._fail_all()  # nothing, unless this thread dies of an error

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._jobs or self._prompts or any(_ready(t) for t in self._turns)):
                    self._wake.wait()
                if self._stopping and not self._jobs:
                    self._ended = True
                    return
                jobs = list(self._jobs)
                self._jobs.clear()
                prompt = self._prompts.popleft() if self._prompts and not self._stopping else None
            for job in jobs:
                self._do(job)
            if prompt is not None:
                self._prefill(*prompt)
            self._decode()

    def _decode(self) -> None:
        """One step of those that have leave to draw."""
        batch = self._batch()
        if batch:
            self._step(batch)
            self._rest(batch)

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            holder = getattr(job, "__self__", None)
            if not isinstance(holder, LocalBranch):
                raise
            holder.failure = _known(error)

    def _batch(self) -> list[Turn]:
        """The turns of the next step, first come first served; those served go to the end of the line."""
        with self._wake:
            chosen: list[Turn] = []
            if self._jobs:
                return chosen  # a fork asked for before a step must see the cache before that step
            for turn in self._turns:
                if _ready(turn):
                    chosen.append(turn)
                    turn.running = True
                    if len(chosen) == self.max_batch:
                        break
            if len(chosen) == self.max_batch < len(self._turns):
                for turn in chosen:
                    self._turns.remove(turn)
                self._turns.extend(chosen)
            return chosen

    def _rest(self, turns: list[Turn]) -> None:
        """The step is over: turns that were dropped during it let their branches go."""
        with self._wake:
            for turn in turns:
                turn.running = False
                if turn.over:
                    turn.branch.busy = False

    def _prefill(self, branch: LocalBranch, row: Callable[[], Row], tell: Told) -> None:
        with branch.lock:
            branch.begun = not branch.closed
        if branch.closed:
            tell(None)
            return
        begun = time.perf_counter()
        elsewhere = 0.0

        def between() -> None:
            """Lets the others live while a long prompt is read; ends the reading when nobody waits for it."""
            nonlocal elsewhere
            left = time.perf_counter()
            with self._wake:
                jobs = list(self._jobs)
                self._jobs.clear()
            for job in jobs:
                self._do(job)
            if branch.closed or self._stopping:
                raise _NobodyWaits
            self._decode()
            elsewhere += time.perf_counter() - left

        try:
            output = self._forward([row()], between)[0]
            branch.prefilled(output, time.perf_counter() - begun - elsewhere)
        except _NobodyWaits:
            branch.failure = _gone() if self._stopping else None
            tell(branch.failure)
        except Exception as error:
            branch.failure = _known(error)
            tell(branch.failure)
        else:
            tell(None)

    def _step(self, turns: list[Turn]) -> None:
        """One decode step: read what is pending, draw, judge."""
        live: list[Turn] = []
        rows: list[tuple[Turn, Row]] = []
        for turn in turns:
            branch = turn.branch
            if turn.job is not None:
                self._do_job(turn, turn.job)
                continue
            row = None
            try:
                with branch.lock:
                    go = not branch.closed and branch.failure is None and branch.may_draw() and self._fits(branch)
                    if go:
                        row = branch.row()
                        go = branch.finish is None
            except Exception as error:
                self._failed(turn, error)
                continue
            if not go:
                self._over(turn, branch.failure)
                continue
            live.append(turn)
            if row is not None:
                rows.append((turn, row))
        self._read(rows)
        self._draw([t for t in live if not t.over])

    def _do_job(self, turn: Turn, job: Callable[[], Probe | None]) -> None:
        branch = turn.branch
        if branch.closed or branch.failure is not None:
            self._over(turn, branch.failure)
            return
        try:
            probe = job()
            with branch.lock:
                inner = self._probe(turn, None if branch.closed else probe)
        except Exception as error:
            self._failed(turn, error)
        else:
            if inner is None:
                self._over(turn, None)

    def _fits(self, branch: LocalBranch) -> bool:
        """False, with finish reason `length`, when the model's context is full."""
        most, store = self.runner.max_positions, branch.store
        new = len(branch.pending) + (0 if branch.embeds is None else 1)
        if most is not None and store is not None and store.next_position + new > most:
            branch.finish = "length"
            return False
        return True

    def _read(self, rows: list[tuple[Turn, Row]]) -> None:
        """Forward passes: one for all rows but those that run alone; one by one when that fails."""
        alone = [r for r in rows if self.deterministic or r[0].branch.call.sampling.deterministic]
        common = [r for r in rows if r not in alone]
        for group in [common, *([r] for r in alone)]:
            if not group:
                continue
            begun = time.perf_counter()
            try:
                outputs = self._forward([row for _, row in group])
            except Exception as error:
                if len(group) == 1:
                    self._failed(group[0][0], error)
                else:
                    for one in group:
                        self._read([one])
                continue
            share = (time.perf_counter() - begun) / len(group)
            self.steps += 1
            self.rows += len(group)
            for (turn, _), output in zip(group, outputs, strict=True):
                try:
                    turn.branch.stepped(output, share)
                except Exception as error:
                    self._failed(turn, error)

    def _draw(self, turns: list[Turn]) -> None:
        """Draws for all rows at once, then lets each row's policies judge."""
        ready = []
        for turn in turns:
            if turn.branch.closed or turn.branch.finish is not None or turn.branch.logits is None:
                self._over(turn, turn.branch.failure)
            else:
                ready.append(turn)
        if not ready:
            return
        # one copy for all rows, which their policies may then change in place
        logits = torch.stack([t.branch.logits for t in ready if t.branch.logits is not None]).float()
        finite = torch.isfinite(logits.amax(-1)).tolist()  # a NaN is the largest of its row
        kept = []
        for i, turn in enumerate(ready):
            try:
                with turn.branch.lock:
                    turn.branch.shape_logits(logits[i], finite[i])
            except Exception as error:
                self._failed(turn, error)
            else:
                kept.append(i)
        if len(kept) < len(ready):
            ready, logits = [ready[i] for i in kept], logits[kept]
        if not ready:
            return
        tokens = sampling.draw(logits, [t.branch.sampler for t in ready])
        shown = sampling.logprobs(logits, tokens) if any(t.branch.keeps_logprobs for t in ready) else None
        for i, turn in enumerate(ready):
            branch = turn.branch
            try:
                with branch.lock:
                    live = not branch.closed
                    logprob = 0.0 if shown is None else shown[i]
                    inner = self._probe(turn, branch.drew(tokens[i], logprob, logits[i]) if live else None)
            except Exception as error:
                self._failed(turn, error)
                continue
            if inner is None:
                self._drew(turn)

    def _probe(self, turn: Turn, probe: Probe | None) -> Turn | None:
        """Starts a probe if there is one and the budget allows it. Under the branch's lock."""
        branch = turn.branch
        turn.probe = None
        while probe is not None:
            twin = branch.start_probe(probe)
            if twin is not None:
                turn.probe = probe
                inner = Turn(twin, FOREVER, partial(self._probed, turn, probe))
                twin.busy = True
                with self._wake:
                    self._turns.append(inner)
                return inner
            probe = branch.decided(CONTINUE, "")
        return None

    def _probed(self, turn: Turn, probe: Probe, error: BaseException | None) -> None:
        """A probe has ended: its verdict counts, and the branch goes on."""
        branch = turn.branch
        try:
            with branch.lock:
                if error is not None and branch.probe is not None:
                    branch.probe.failure = error
                inner = self._probe(turn, branch.probed(probe))
        except Exception as wrong:
            self._failed(turn, wrong)
            return
        if inner is None:
            self._drew(turn)

    def _drew(self, turn: Turn) -> None:
        """Counts a token and tells who waits for it."""
        with self._wake:
            turn.left -= 1
        if turn.each is not None:
            turn.each()
        if turn.branch.finish is not None or (turn.left <= 0 and turn.each is None):
            self._over(turn, None)

    # -- details -----------------------------------------------------------------------------------------------

    def _forward(self, rows: list[Row], between: Callable[[], None] | None = None) -> list[Output]:
        return self.runner.forward(rows, between)

    def _failed(self, turn: Turn, error: Exception) -> None:
        known = _known(error)
        branch = turn.branch
        with branch.lock:
            branch.failure = known
            if branch.finish is None:
                branch.finish = "error"
        self._over(turn, known)

    def _over(self, turn: Turn, error: BaseException | None) -> None:
        with self._wake:
            if turn.over:
                return
            turn.over = True
            turn.branch.busy = False
            if turn in self._turns:
                self._turns.remove(turn)
        turn.told(error)

    def _start(self) -> None:
        """Under the lock: wakes the thread, or starts it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="thrifty-local", daemon=True)
            self._thread.start()
        self._wake.notify()

    def _refuse_stopped(self) -> None:
        if self._stopping:
            raise EngineError("this engine was closed: load it again")

    def _fail_all(self) -> None:
        gone = _gone()
        with self._wake:
            turns, prompts = list(self._turns), list(self._prompts)
            self._prompts.clear()
        for turn in turns:
            self._failed(turn, gone)
        for branch, _, tell in prompts:
            branch.failure = gone
            tell(gone)


class _NobodyWaits(Exception):
    """Ends the reading of a prompt."""


def _gone() -> EngineError:
    return EngineError("the engine was closed while this was running")


def _ready(turn: Turn) -> bool:
    """May be served now; a closed branch's turn is served too, to be told that it is over."""
    return turn.branch.closed or (turn.left > 0 and turn.probe is None)


def _known(error: Exception) -> Exception:
    """An error of ours as it is; another one as an EngineError that names it."""
    if isinstance(error, ThriftyError):
        return error
    known = EngineError(f"the local engine failed: {type(error).__name__}: {error}")
    known.__cause__ = error
    return known
