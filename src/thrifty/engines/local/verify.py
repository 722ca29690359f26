"""Trees of candidate tokens, read by a branch in one pass: what speculative methods stand on (`thrifty.call.verify`).

Each path from the root to a leaf becomes a row of one packed forward pass, on a fork of the branch's cache: the past
is shared by reference, so its entries are read once, and nothing is masked. Nodes that several paths have in common
are computed once a path. `accept` walks down on the model's thread and treats every token as one that was drawn
there: policies change its logits and judge it, it is held before it is taken, stops end it. The fork that holds the
walked path is cut to its length and becomes the branch's cache.

Invariants: the branch's own cache, tokens and limits do not change before `accept`; a path lies wholly in the open tail
of its fork, so cutting is a matter of lengths; `accept` leaves the branch as a step leaves it: the last token pending.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thrifty.call import ROOT, Choose, Tree
from thrifty.engines.local import sampling
from thrifty.engines.local.kv import BLOCK, Store
from thrifty.engines.local.runner import Row
from thrifty.errors import BudgetExceeded, EngineError, InvalidInput, ThriftyError, Unsupported
from thrifty.policy import Policy, Probe
from thrifty.spend import Work

if TYPE_CHECKING:
    from thrifty.engines.local.branch import LocalBranch

DEPTH = 32
"""Tokens on the longest path."""


class Reading:
    """Implements `thrifty.call.Verified` for one LocalBranch. Made by `LocalBranch.verify`."""

    def __init__(self, branch: LocalBranch) -> None:
        refuse(branch)
        self.branch = branch
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._logits: dict[int, Tensor] = {}
        self._stem: Store | None = None
        self._lead = 0
        """entries of the forks that stand between the branch's cache and the first node: what was pending"""
        self._forks: list[Store] = []
        self._places: dict[int, Store] = {}
        """a store that holds the path to a node, and may hold more after it"""
        self._closed = False
        self._failure: Exception | None = None

    @property
    def tree(self) -> Tree:
        return Tree(tuple(self._tokens), tuple(self._parents))

    def logits(self, node: int) -> Tensor:
        """[V], in the model's dtype. Raises InvalidInput for a node that was not read."""
        found = self._logits.get(node)
        if found is None:
            raise InvalidInput(f"node {node} of the tree was not read: {ROOT} to {len(self._tokens) - 1} were")
        return found

    def known(self, node: int) -> bool:
        """Whether a node was read."""
        return node in self._logits

    async def grow(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        self._refuse_closed()
        old = len(self._tokens)
        Tree((*self._tokens, *tokens), (*self._parents, *parents))  # refuses what is none
        self._tokens.extend(tokens)
        self._parents.extend(parents)
        deepest = max((self.depth(i) for i in range(old, len(self._tokens))), default=0)
        try:
            if deepest > DEPTH:
                raise InvalidInput(f"a path of {deepest} candidate tokens: {DEPTH} at most can be verified at once")
            await self._do(lambda: self._read(old))
        except Exception:
            del self._tokens[old:], self._parents[old:]
            raise
        except BaseException:  # cancelled, and perhaps still being read
            self.close()
            raise

    async def accept(self, choose: Choose) -> int:
        self._refuse_closed()
        before = len(self._logits)
        drawn: list[int] = []
        try:
            if before:
                await self.branch.engine.scheduler.turn(self.branch, lambda: self._walk(choose, drawn))
        finally:
            self.close()
        return len(drawn)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self.branch.reading is self:
            self.branch.reading = None
        self.branch.engine.scheduler.queue(self.free)

    def depth(self, node: int) -> int:
        """Tokens on the path to a node.

        The root's is 0.
        """
        n = 0
        while node != ROOT:
            node, n = self._parents[node], n + 1
        return n

    # -- the model's thread ------------------------------------------------------------------------------------

    def free(self) -> None:
        """Gives the forks' memory back."""
        forks, self._forks, self._places, self._logits = self._forks, [], {}, {}
        for store in forks:
            store.close()
        if forks:
            self.branch.family.measure()

    def adopt(self, node: int) -> None:
        """Makes the cache that ends with this node the branch's own, and frees all others. Under the branch's lock."""
        store, branch = self._places[node], self.branch
        if store is not self._stem and branch.store is self._stem is not None:
            self._cut(store, node)
            self._forks.remove(store)
            self._stem.close()
            branch.store = store
        self.free()

    def _read(self, first: int) -> None:
        """Reads the nodes from `first` on."""
        branch = self.branch
        with branch.lock:
            if branch.closed or branch.finish is not None or self._closed:
                return
            self._begin()
            rows, paths = self._rows(first)
        if not rows:
            return
        started = time.perf_counter()
        outputs = branch.engine.runner.forward(rows)
        seconds = time.perf_counter() - started
        scheduler = branch.engine.scheduler
        scheduler.steps, scheduler.rows = scheduler.steps + 1, scheduler.rows + len(rows)
        for row, path, output in zip(rows, paths, outputs, strict=True):
            if output.logits is None:
                raise EngineError("the model gave no logits")
            last = len(output.logits) - len(path)
            for node, logits in zip(path, output.logits[last:], strict=True):
                self._logits.setdefault(node, logits)
                self._places.setdefault(node, row.store)
        with branch.lock:
            branch.count_tree(sum(o.kv_reads for o in outputs), seconds)

    def _begin(self) -> None:
        """Once: makes sure that what is pending and the longest path fit the open tail of a fork."""
        branch = self.branch
        if self._stem is not None:
            if branch.store is not self._stem:
                raise InvalidInput("the branch went on since its tree was read: verify again")
            return
        if branch.waiting > BLOCK - DEPTH:  # a long forced text: read as a step would read it
            row = branch.row() if branch.may_draw() else None
            if row is None:
                raise branch.tab.refusal or EngineError("there is no cache to read into")
            started = time.perf_counter()
            output = branch.engine.runner.forward([row])[0]
            branch.stepped(output, time.perf_counter() - started)
        store = branch.store
        if store is None:
            raise EngineError("there is no cache to read into")
        if store.tail + branch.waiting + DEPTH > BLOCK:
            branch.family.claim(store.tail * branch.engine.entry_nbytes)
            store.seal()
        self._stem, self._lead = store, branch.waiting
        if branch.logits is not None:
            self._logits[ROOT], self._places[ROOT] = branch.logits, store

    def _rows(self, first: int) -> tuple[list[Row], list[list[int]]]:
        """A row for each leaf among the new nodes, and the nodes that its last logits are about."""
        inner = set(self._parents[first:])
        leaves = [i for i in range(first, len(self._tokens)) if i not in inner]
        if not leaves and ROOT not in self._logits:
            leaves = [ROOT]
        paths = [self._path(leaf) for leaf in leaves]
        if not paths:
            return [], []
        heads = [ROOT if ROOT in path else self._parents[path[0]] for path in paths]
        ends = self._ends()
        news: list[tuple[Store | None, int, list[int]]] = []  # the fork to go on with, if any
        for head, path in zip(heads, paths, strict=True):
            own = None if ROOT in path else ends.pop(head, None)
            news.append((own, head, path))
        self._cover(news)
        made: list[Store] = []
        try:
            for own, head, path in news:  # forks before any row goes on with a store
                made.append(own if own is not None else self._fork(head, ROOT in path))
        except BaseException:
            for store in made:
                if store not in self._forks:
                    store.close()
            raise
        self._forks.extend(s for s in made if s not in self._forks)
        return [self._row(s, p) for s, p in zip(made, paths, strict=True)], paths

    def _path(self, leaf: int) -> list[int]:
        """The nodes to be read for a leaf, top down: `ROOT` first where what is pending has not been read."""
        path: list[int] = []
        node = leaf
        while node not in self._logits:
            path.append(node)
            if node == ROOT:
                break
            node = self._parents[node]
        return path[::-1]

    def _ends(self) -> dict[int, Store]:
        """For each node at which a fork ends, that fork: one row may go on with it as it is."""
        deepest: dict[int, int] = {}
        for node, store in self._places.items():
            if store is not self._stem:
                best = deepest.get(id(store))
                if best is None or self.depth(node) > self.depth(best):
                    deepest[id(store)] = node
        return {node: self._places[node] for node in deepest.values()}

    def _fork(self, head: int, pending: bool) -> Store:
        branch, source = self.branch, self._stem if pending else self._places[head]
        if source is None:
            raise EngineError("there is no cache to fork")
        store = source.fork(cache=branch.cachers, attention=branch.readers)
        if source is not self._stem:
            self._cut(store, head)
        return store

    def _cut(self, store: Store, node: int) -> None:
        """Cuts a fork behind a node."""
        if self._stem is None:
            return
        extra = store.next_position - self._stem.next_position - self._lead - self.depth(node)
        store.tail -= extra
        store.next_position -= extra
        store.seen -= extra

    def _row(self, store: Store, path: Sequence[int]) -> Row:
        """`final` is left out: policies that act after the prefill have acted, and none acts on candidates."""
        branch, nodes = self.branch, [self._tokens[i] for i in path if i != ROOT]
        if path[0] != ROOT:
            return Row(store, nodes, want="all", final=False)
        tokens = [*branch.pending, *nodes]
        if branch.embeds is None:
            return Row(store, tokens, want="all", final=False)
        parts = [branch.embeds]
        if tokens:
            parts.append(branch.engine.runner.embed(tokens))
        return Row(store, None, torch.cat([p.to(parts[0]) for p in parts]), want="all", final=False)

    def _cover(self, news: Sequence[tuple[Store | None, int, list[int]]]) -> None:
        """Claims the memory and holds the work of one pass. Raises BudgetExceeded, with nothing taken."""
        branch, stem = self.branch, self._stem
        if stem is None:
            return
        reads = longest = 0
        for _, head, path in news:
            pending = ROOT in path
            n = len(path) + (self._lead - 1 if pending else 0)
            before = max(stem.kept(layer) for layer in range(stem.layers))
            before += 0 if pending else self._lead + self.depth(head)
            reads += n * before + n * (n + 1) // 2 + 1
            longest = max(longest, self._lead + self.depth(path[-1]))
        most = branch.engine.runner.max_positions
        if most is not None and stem.next_position + longest > most:
            raise InvalidInput(
                f"{stem.next_position + longest} positions are needed: this model has {most}; give shorter paths"
            )
        forks = sum(own is None for own, _, _ in news)
        branch.family.claim(forks * BLOCK * branch.engine.entry_nbytes)
        try:
            branch.cover_tree(reads)
        except BudgetExceeded:
            branch.family.claim(-forks * BLOCK * branch.engine.entry_nbytes)
            raise

    def _walk(self, choose: Choose, drawn: list[int]) -> Probe | None:
        """Draws down the tree; see `accept`. A probe that must run first is returned."""
        branch, node, base = self.branch, ROOT, ROOT
        probe: Probe | None = None
        with branch.lock:
            if branch.closed or self._closed or branch.store is not self._stem:
                return None
            try:
                while branch.may_draw():
                    logits = self.logits(node).float().clone()
                    branch.shape_logits(logits, bool(torch.isfinite(logits.amax())))
                    token, child = choose(node, logits)
                    if child is not None and (self._parents[child] != node or self._tokens[child] != token):
                        raise InvalidInput(
                            f"token {token} is not node {child}, a child of {node}: choose a child or None"
                        )
                    base, branch.pending, branch.embeds = node, [], None
                    shown = sampling.logprobs(logits[None], [token])[0] if branch.keeps_logprobs else 0.0
                    drawn.append(token)
                    probe = branch.drew(token, shown, logits)
                    plain = branch.pending == [token] and branch.embeds is None
                    if child is None or probe is not None or branch.finish is not None or not plain:
                        break
                    node = child
            finally:
                if drawn:
                    self.adopt(base)
        return probe

    # -- details -----------------------------------------------------------------------------------------------

    async def _do(self, what: Callable[[], None]) -> None:
        """Does something in a turn of the branch's own; what goes wrong does not end the branch."""
        self._failure = None

        def job() -> Probe | None:
            try:
                what()
            except ThriftyError as error:
                self._failure = error
            except Exception as error:
                self._failure = EngineError(f"the local engine failed: {type(error).__name__}: {error}")
                self._failure.__cause__ = error
            return None

        await self.branch.engine.scheduler.turn(self.branch, job)
        if self._failure is not None:
            raise self._failure

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InvalidInput("this tree was accepted or closed before: verify again")


def refuse(branch: LocalBranch) -> None:
    """Raises Unsupported where a policy must see decoding token by token: it reads or drops entries then, or asks for
    the states of each position, which a tree does not give."""
    who: list[Policy] = [p for p in branch.cachers if p.when == "online"]
    who += [*branch.readers, *(p for p in branch.decoders if "hidden" in p.needs)]
    if who:
        names = ", ".join(sorted({p.method or type(p).__name__ for p in who}))
        raise Unsupported(
            f"{names} must see every decode step, so no tree of candidates can be verified: leave one of the two out"
        )


def beyond(work: Work, bound: Work) -> Work:
    """What of `work` lies beyond `bound`, field by field, of the fields that are held and can be foreseen."""
    return Work(
        kv_reads=max(0, work.kv_reads - bound.kv_reads),
        target_passes=max(0, work.target_passes - bound.target_passes),
        draft_passes=max(0, work.draft_passes - bound.draft_passes),
    )
