"""Full tails kept as blocks: exact beside stock, shared by forks, given back, counted once, and bit-equal anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thrifty.engines.local.kv import BLOCK, Store
from thrifty.engines.local.load import attach
from thrifty.engines.local.pages import Pages
from thrifty.engines.local.runner import Row, Runner
from thrifty.policy import CachePolicy, LayerView


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny.model("Llama")


@pytest.fixture
def llama(loaded: Any) -> Runner:
    """Fresh pages for each test."""
    return attach(loaded)


def read(runner: Runner, rows: Sequence[tuple[Store, Tensor]]) -> list[Tensor]:
    """All logits of each row's new tokens, in one forward pass."""
    outs = runner.forward([Row(store, tokens, want="all") for store, tokens in rows])
    return [o.logits for o in outs if o.logits is not None]


def grown(runner: Runner, tokens: Tensor, piece: int = 64) -> Store:
    """A store that has read the tokens piece by piece, so that its tails fill up and become blocks."""
    store = runner.store()
    for part in tokens.split(piece):
        read(runner, [(store, part)])
    return store


def close_to(ours: Tensor, stock: Tensor) -> None:
    assert ours.shape == stock.shape
    assert float((ours - stock).abs().max()) <= 1e-4 * max(1.0, float(stock.abs().max()))


def taken(pages: Pages) -> int:
    return sum(p.slots - len(p.free) for p in pages.pages)


def places(store: Store) -> list[tuple[int, int]]:
    return [(s.slot.page.number, s.slot.index) for s in store.segments if s.slot is not None]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "Gemma3Text", "GptOss"])
def test_a_mixed_batch_of_many_blocks_equals_stock(family: str) -> None:
    """Rows of 5, 4, 1 and no blocks, one of them with a prompt of its own before; windows, caps and sinks with them."""
    runner = attach(tiny.model(family))
    texts = [tiny.tokens(n, n) for n in (BLOCK * 5 + 7, BLOCK * 4, BLOCK + 50, 9)]
    stores = [grown(runner, text) for text in texts]
    prompt = tiny.tokens(300, 3)
    stores.append(runner.store())
    read(runner, [(stores[-1], prompt)])
    later = tiny.tokens(BLOCK * 4, 4)
    for part in later.split(32):
        read(runner, [(stores[-1], part)])
    texts.append(torch.cat([prompt, later]))
    assert [len(places(s)) for s in stores] == [5, 3, 1, 0, 3]
    fresh = [tiny.tokens(n, 90 + n) for n in (1, 1, 3, 1, 1)]
    for _ in range(2):
        outs = read(runner, list(zip(stores, fresh, strict=True)))
        texts = [torch.cat([t, f]) for t, f in zip(texts, fresh, strict=True)]
        for ours, text, new in zip(outs, texts, fresh, strict=True):
            close_to(ours, tiny.stock(runner.model, text)[-len(new) :])


def test_windows_reach_into_blocks() -> None:
    """Windows that end within a block, at its edge, and beyond all of them."""
    text = tiny.tokens(BLOCK * 4 + 20, 2)
    for window in (BLOCK // 2, BLOCK, BLOCK + 21, 3 * BLOCK + 5, 10 * BLOCK):
        runner = attach(tiny.model("Mistral", sliding_window=window))
        stores = [grown(runner, text[:n]) for n in (BLOCK * 4 + 19, BLOCK * 3 - 1, 40)]
        assert len(places(stores[0])) == 4
        outs = read(
            runner, [(s, text[n : n + 1]) for s, n in zip(stores, (BLOCK * 4 + 19, BLOCK * 3 - 1, 40), strict=True)]
        )
        for ours, n in zip(outs, (BLOCK * 4 + 19, BLOCK * 3 - 1, 40), strict=True):
            close_to(ours, tiny.stock(runner.model, text[: n + 1])[-1:])


def test_forks_of_forks_share_blocks_and_go_their_own_ways(llama: Runner) -> None:
    text = tiny.tokens(BLOCK * 3 + 30, 5)
    paths = [(grown(llama, text), text)]
    shared = places(paths[0][0])
    assert len(shared) == 3
    for depth in range(3):
        paths += [(store.fork(), tokens) for store, tokens in paths]
        fresh = [tiny.tokens(BLOCK, 11 * depth + i) for i in range(len(paths))]
        for part in (slice(0, BLOCK - 30), slice(BLOCK - 30, BLOCK)):  # fills each one's tail, and begins the next
            outs = read(llama, [(s, f[part]) for (s, _), f in zip(paths, fresh, strict=True)])
        paths = [(store, torch.cat([old, new])) for (store, old), new in zip(paths, fresh, strict=True)]
        for (_, tokens), ours in zip(paths, outs, strict=True):
            close_to(ours, tiny.stock(llama.model, tokens)[-len(ours) :])
    assert all(places(store)[:3] == shared for store, _ in paths)
    own = [places(store)[3:] for store, _ in paths]
    assert all(len(mine) == 3 for mine in own)
    assert len({mine[2] for mine in own}) == 8 and len({mine[0] for mine in own}) == 2  # as the forks were made
    for store, _ in paths:
        store.close()
    assert taken(llama.tails) == taken(llama.tails.blocks) == 0


def test_a_block_is_given_back_with_its_last_branch_and_used_again(llama: Runner) -> None:
    text = tiny.tokens(BLOCK * 2 + 5, 6)
    root = grown(llama, text)
    held = places(root)
    twin = root.fork()
    root.close()
    root.close()
    assert taken(llama.tails.blocks) == 2 and places(twin) == held
    more = tiny.tokens(7, 1)
    close_to(read(llama, [(twin, more)])[0], tiny.stock(llama.model, torch.cat([text, more]))[-7:])
    twin.close()
    assert taken(llama.tails.blocks) == 0 and not twin.segments
    other = tiny.tokens(BLOCK * 2 + 9, 7)
    again = grown(llama, other)
    assert sorted(places(again)) == sorted(held)
    close_to(read(llama, [(again, more)])[0], tiny.stock(llama.model, torch.cat([other, more]))[-7:])
    again.close()


def test_bits_do_not_depend_on_where_blocks_lie(llama: Runner) -> None:
    """The same two branches, alone in their pages and among others that come and go."""
    texts = [tiny.tokens(BLOCK * 4, 20 + i) for i in range(2)]

    def run(crowd: int) -> list[Tensor]:
        stores = [llama.store() for _ in texts]
        others: list[Store] = []
        outs: list[Tensor] = []
        for k in range(0, BLOCK * 4, 32):
            outs += read(llama, [(s, t[k : k + 32]) for s, t in zip(stores, texts, strict=True)])
            if crowd and k % 128 == 0:
                others += [grown(llama, tiny.tokens(BLOCK + 9, k + j)) for j in range(crowd)]
                others.pop(0).close()
        for i in range(3):
            outs += read(llama, [(s, torch.tensor([5 + i])) for s in stores])
        for store in [*stores, *others]:
            store.close()
        return outs

    alone, crowded = run(0), run(7)
    assert all(torch.equal(a, b) for a, b in zip(alone, crowded, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crowd", [1, 3])
def test_bits_do_not_depend_on_where_open_tails_lie(dtype: torch.dtype, crowd: int) -> None:
    """Rows side by side in their page, and with the tails of other branches among them."""
    llama = attach(tiny.model("Llama", dtype))
    texts = [tiny.tokens(40, 20 + i) for i in range(5)]

    def run(crowd: int) -> list[Tensor]:
        stores, others = [], []
        for text in texts:
            stores.append(grown(llama, text))
            others += [grown(llama, tiny.tokens(30, k)) for k in range(crowd)]
        outs = [out for i in range(40) for out in read(llama, [(s, torch.tensor([5 + i])) for s in stores])]
        for store in [*stores, *others]:
            store.close()
        return outs

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(crowd), strict=True))


class KeepLast(CachePolicy):
    """The last n entries."""

    parts = frozenset({"scores", "counts"})
    when = "online"

    def __init__(self, n: int) -> None:
        self.n = n

    def pattern(self, view: LayerView) -> Tensor:
        total = view.positions.shape[-1]
        return torch.arange(max(0, total - self.n), total)

    def counts(self, total: int, layers: int, stats: Mapping[str, Any]) -> Sequence[int]:
        return [self.n] * layers


@pytest.mark.parametrize("keep", [40, BLOCK * 2 + 50])
def test_eviction_on_shared_blocks_changes_nobody_else(llama: Runner, keep: int) -> None:
    text, more = tiny.tokens(BLOCK * 3 + 20, 8), tiny.tokens(40, 9)
    root = grown(llama, text)
    fork = root.fork(cache=[KeepLast(keep)])
    held = [t.clone() for t in root.snapshot(1)[:3]]
    plain = llama.store()  # its prompt is one segment: no blocks
    read(llama, [(plain, text)])
    alone = plain.fork(cache=[KeepLast(keep)])
    for token in more:
        ours, expected = (read(llama, [(s, token[None])])[0] for s in (fork, alone))
        close_to(ours, expected)
        assert fork.kept() == alone.kept() == keep
    assert all(torch.equal(a, b) for a, b in zip(held, root.snapshot(1)[:3], strict=True))
    close_to(read(llama, [(root, more)])[0], tiny.stock(llama.model, torch.cat([text, more]))[-40:])
    for store in (root, fork, plain, alone):
        store.close()
    assert taken(llama.tails.blocks) == 0


def counted(runner: Runner, stores: Iterable[Store]) -> int:
    """Bytes by counting each place and each array once, from what the stores show."""
    entry = runner.entry_nbytes() + 8
    slots = {(s.slot.page.number, s.slot.index) for x in stores for s in x.segments if s.slot is not None}
    tails = sum(x.slot is not None for x in stores)
    plain = {id(s): s.lengths[0] for x in stores for s in x.segments if s.slot is None}
    return (
        BLOCK * (len(slots) + tails) + sum(-(-n // 8) * 8 * (n > BLOCK) + n * (n <= BLOCK) for n in plain.values())
    ) * entry


def test_bytes_of_shared_blocks_count_once(llama: Runner) -> None:
    root = grown(llama, tiny.tokens(BLOCK * 3 + 1, 3))
    entry = llama.entry_nbytes() + 8
    assert root.nbytes == 4 * BLOCK * entry
    forks = [root.fork() for _ in range(5)]
    assert llama.nbytes([root, *forks]) == (3 + 6) * BLOCK * entry
    read(llama, [(s, tiny.tokens(BLOCK - 1, i)) for i, s in enumerate(forks[:2])])  # fills their tails
    read(llama, [(s, torch.tensor([9])) for s in forks[:2]])
    everyone = [root, *forks]
    assert llama.nbytes(everyone) == counted(llama, everyone) == (3 + 2 + 6) * BLOCK * entry
    root.close()
    assert llama.nbytes(forks) == (3 + 2 + 5) * BLOCK * entry
    for store in forks:
        store.close()
    assert llama.nbytes(everyone) == 0


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.sampled_from([1, 5, 31, 65, 100, 120, 127, 128]), min_size=4, max_size=20))
def test_waste_is_an_eighth_or_one_block(loaded: Any, pieces: list[int]) -> None:
    llama = attach(loaded)
    store = llama.store()
    for i, n in enumerate(pieces):
        read(llama, [(store, tiny.tokens(n, i))])
        used = store.length() * llama.entry_nbytes()
        held = store.nbytes * llama.entry_nbytes() // (llama.entry_nbytes() + 8)  # less the positions
        assert held - used <= max(used / 8, BLOCK * llama.entry_nbytes()) + 1
        small = [s for s in store.segments if s.small]
        assert len(small) < 8 and store.length() == store.next_position
    store.close()
    assert taken(llama.tails) == taken(llama.tails.blocks) == 0


def test_small_segments_merge_with_the_blocks_among_them(llama: Runner) -> None:
    """Long forced texts seal tails early; a run of those becomes one segment, and nothing is lost or moved."""
    sizes = [n for _ in range(9) for n in (10, 120, 8)]  # seals 10, then 128: a small segment and a block in turn
    text = tiny.tokens(sum(sizes), 12)
    store, at, ours = llama.store(), 0, []
    for n in sizes:
        ours += read(llama, [(store, text[at : at + n])])
        at += n
    assert any(s.slot is None and not s.small and s.capacity > 4 * BLOCK for s in store.segments)
    close_to(torch.cat(ours), tiny.stock(llama.model, text))
    assert torch.equal(store.snapshot(0)[2], torch.arange(len(text)))
    store.close()


def test_pages_grow_and_empty_ones_go() -> None:
    pages = Pages(1, torch.device("cpu"), slots=4)
    slots = [pages.take() for _ in range(100)]
    assert [p.slots for p in pages.pages] == [4, 4, 8, 16, 32, 64]
    assert len({(s.page.number, s.index) for s in slots}) == 100
    slots[50].release()
    slots[50].release()
    again = pages.take()
    assert (again.page, again.index) == (slots[50].page, slots[50].index)
    del slots, again
    pages.trim()
    assert len(pages.pages) == 1 and pages.nbytes == 4 * BLOCK * 8
