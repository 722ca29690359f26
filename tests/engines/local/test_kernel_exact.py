"""The runner against stock transformers: prefill, chunks, mixed batches, forks, for several architectures."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

from thrifty.engines.local.kv import Store, Tails
from thrifty.engines.local.load import attach
from thrifty.engines.local.runner import Row, Runner
from thrifty.errors import InvalidInput

WITHIN = {torch.float32: 1e-4, torch.float64: 1e-6}


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def runner(request: pytest.FixtureRequest, family: str) -> Runner:
    return attach(tiny.model(family, request.param))


@pytest.fixture(scope="module")
def llama() -> Runner:
    return attach(tiny.model("Llama"))


def close(runner: Runner, ours: Tensor | None, stock: Tensor) -> None:
    """Equal within the contract's tolerance, for logits of the size that models have (at most 1 here after scaling)."""
    assert ours is not None and ours.shape == stock.shape
    scale = max(1.0, float(stock.abs().max()))
    assert float((ours - stock).abs().max()) <= WITHIN[runner.dtype] * scale


def grow(runner: Runner, rows: list[tuple[Any, Tensor]], want: Any = "all") -> list[Tensor | None]:
    return [o.logits for o in runner.forward([Row(s, t, want=want) for s, t in rows])]


@pytest.mark.parametrize("n", [1, 100, 128, 129, 300])
def test_prefill_and_chunks_equal_stock(runner: Runner, n: int) -> None:
    tokens = tiny.tokens(n, n)
    stock = tiny.stock(runner.model, tokens)
    close(runner, grow(runner, [(runner.store(), tokens)])[0], stock)
    whole = runner.max_chunk
    try:
        for chunk in (1, 50):
            if n / chunk <= 150:
                runner.max_chunk = chunk
                close(runner, grow(runner, [(runner.store(), tokens)])[0], stock)
    finally:
        runner.max_chunk = whole


def test_a_mixed_batch_equals_each_row_alone(runner: Runner) -> None:
    prompts = [tiny.tokens(n, n) for n in (3, 140, 60, 1)]
    stores = [runner.store() for _ in prompts]
    for store, prompt in zip(stores, prompts, strict=True):
        grow(runner, [(store, prompt)], "none")
    more = [tiny.tokens(n, 50 + n) for n in (1, 1, 20, 150)]
    for ours, prompt, new in zip(grow(runner, list(zip(stores, more, strict=True))), prompts, more, strict=True):
        close(runner, ours, tiny.stock(runner.model, torch.cat([prompt, new]))[len(prompt) :])


def test_a_fork_of_a_fork_equals_stock(runner: Runner) -> None:
    prompt = tiny.tokens(150, 1)
    root = runner.store()
    grow(runner, [(root, prompt)], "none")
    paths = [(root, prompt)]
    for depth in range(3):
        paths += [(store.fork(), tokens) for store, tokens in paths]
        fresh = [tiny.tokens(2 + depth, 7 * depth + i) for i in range(len(paths))]
        outs = grow(runner, [(store, new) for (store, _), new in zip(paths, fresh, strict=True)])
        paths = [(store, torch.cat([old, new])) for (store, old), new in zip(paths, fresh, strict=True)]
        for (_, tokens), new, ours in zip(paths, fresh, outs, strict=True):
            close(runner, ours, tiny.stock(runner.model, tokens)[-len(new) :])


def test_long_decoding_seals_and_merges(llama: Runner) -> None:
    tokens = tiny.tokens(1400, 9)
    store, own = llama.store(), []
    for piece in tokens.split(20):
        own.append(grow(llama, [(store, piece)])[0])
    close(llama, torch.cat([o for o in own if o is not None]), tiny.stock(llama.model, tokens))
    assert len(store.segments) < 5 and store.length() == 1400
    store.close()


def test_a_fork_never_changes_its_parents_bits(llama: Runner) -> None:
    prompt = tiny.tokens(200, 4)

    def run(disturb: bool) -> Tensor:
        parent = llama.store()
        out = [grow(llama, [(parent, prompt)], "last")[0]]
        others = []
        for i in range(300):
            if disturb and i % 60 == 10:
                others.append(parent.fork())
            if disturb and others and i % 3 == 0:
                grow(llama, [(s, torch.tensor([(i * 7 + j) % 90 + 3])) for j, s in enumerate(others)])
            out.append(grow(llama, [(parent, torch.tensor([i % 90 + 3]))])[0])
        for store in [parent, *others]:
            store.close()
        return torch.cat([o for o in out if o is not None])

    assert torch.equal(run(False), run(True))


def test_embeds_equal_their_tokens_and_hidden_is_the_last_position(llama: Runner) -> None:
    tokens = tiny.tokens(30, 2)
    a, b = llama.store(), llama.store()
    first, second = llama.forward(
        [Row(a, tokens[:20], hidden=True), Row(b, embeds=llama.embed(tokens[:20]), want="all", hidden=True)]
    )
    assert first.logits is not None and second.logits is not None and first.hidden is not None
    assert first.logits.shape == (1, tiny.VOCAB) and second.logits.shape == (20, tiny.VOCAB)
    torch.testing.assert_close(first.logits[0], second.logits[-1])
    assert first.hidden.shape == (llama.layers + 1, 48)
    model = llama.model
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        states = model(tokens[None, :20], output_hidden_states=True, use_cache=False).hidden_states
    model.set_attn_implementation("thrifty")
    torch.testing.assert_close(first.hidden, torch.stack([s[0, -1] for s in states]), rtol=1e-4, atol=1e-4)
    one_hot = torch.nn.functional.one_hot(tokens[20], tiny.VOCAB).float()
    soft = llama.forward([Row(a, embeds=llama.mix(one_hot)), Row(b, [int(tokens[20])])])
    torch.testing.assert_close(soft[0].logits, soft[1].logits)


def test_reads_are_counted_with_their_windows() -> None:
    made = attach(tiny.model("Gemma3Text"))  # layers with window 9, none, 9
    out = made.forward([Row(made.store(), tiny.tokens(20))])[0]
    windowed = sum(min(i, 9) for i in range(1, 21))
    assert out.kv_reads == round((2 * windowed + 210) / 3)


def test_a_failing_model_leaves_stores_as_they_were(llama: Runner) -> None:
    store = llama.store()
    grow(llama, [(store, tiny.tokens(40))])
    hook = llama.model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grow(llama, [(store, tiny.tokens(200, 8))])
    hook.remove()
    assert store.length() == store.next_position == 40
    tokens = torch.cat([tiny.tokens(40), tiny.tokens(10, 3)])
    close(llama, grow(llama, [(store, tokens[40:])])[0], tiny.stock(llama.model, tokens)[40:])


def test_bad_rows_are_refused(llama: Runner) -> None:
    store = llama.store()
    with pytest.raises(InvalidInput, match="vocabulary has 0 to 96"):
        llama.forward([Row(store, [5, 97])])
    with pytest.raises(InvalidInput, match="at least one"):
        llama.forward([Row(store, [])])
    with pytest.raises(InvalidInput, match="not both"):
        llama.forward([Row(store)])
    with pytest.raises(InvalidInput, match="fork it first"):
        llama.forward([Row(store, [5]), Row(store, [6])])
    with pytest.raises(InvalidInput, match="this model has 2048"):
        llama.forward([Row(store, [5] * 2049)])
    with pytest.raises(InvalidInput, match="embeds"):
        llama.forward([Row(store, embeds=torch.zeros(3, 7))])


def test_bytes_are_counted_once_where_shared(llama: Runner) -> None:
    store = llama.store()
    grow(llama, [(store, tiny.tokens(1000))])
    entry = llama.entry_nbytes()
    assert entry == 2 * 3 * 2 * 8 * 4
    alone = store.nbytes
    assert alone == 1000 * entry + 1000 * 8  # and each position once, for all layers
    forks = [store.fork() for _ in range(7)]
    grow(llama, [(s, torch.tensor([5])) for s in [store, *forks]])
    tail = 128 * entry + 128 * 8
    assert llama.nbytes([store, *forks]) == alone + 8 * tail
    for s in [store, *forks]:
        s.close()
        s.close()
    assert llama.nbytes([store, *forks]) == 0


@pytest.mark.parametrize("shapes", [[(2, 4, 4), (2, 4, 4)], [(2, 4, 4), (1, 4, 6)], [(2, 4, 6), (1, 8, 8)]])
def test_a_fork_copies_the_tail_of_layers_alike_or_not(shapes: list[tuple[int, int, int]]) -> None:
    store = Store(Tails(2, torch.device("cpu"), slots=2))
    page, slot = store.open_tail().page, store.open_tail().index
    for layer, (heads, width, value_width) in enumerate(shapes):
        page.allocate(layer, heads, width, value_width, torch.zeros(1))
        page.keys[layer][slot].normal_()
        page.values[layer][slot].normal_()
    store.tail = 5
    twin = store.fork()
    fork_of_twin = Store(store.tails).fork()
    assert fork_of_twin.length() == 0
    for layer, (heads, width, value_width) in enumerate(shapes):
        keys, values, _, _ = twin.snapshot(layer)
        assert keys.shape == (heads, 5, width) and values.shape == (heads, 5, value_width)
        assert all(torch.equal(a, b) for a, b in zip(twin.snapshot(layer)[:3], store.snapshot(layer)[:3], strict=True))
        page.keys[layer][slot].zero_()
        assert bool(twin.snapshot(layer)[0].any())
