"""Cache and attention policies, alone and in batches, against an oracle: stock layers, a mask per layer and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor
from transformers import AttentionInterface

from thrifty.engines.local.evict import best
from thrifty.engines.local.kv import Store
from thrifty.engines.local.load import attach
from thrifty.engines.local.policy_view import StoreView
from thrifty.engines.local.runner import Row, Runner
from thrifty.errors import InvalidInput, Unsupported
from thrifty.policy import AttentionPolicy, CachePolicy, LayerView

LAYERS, KV_HEADS = 3, 2


class KeepLast(CachePolicy):
    """The first `sinks` and the last entries, `n` in all: known from positions alone."""

    parts = frozenset({"scores", "counts"})

    def __init__(self, n: int, sinks: int = 0, when: Any = "online", positions: Any = "keep", every: int = 1) -> None:
        self.n, self.sinks, self.when, self.positions, self.every = n, sinks, when, positions, every

    def pattern(self, view: LayerView) -> Tensor:
        total = view.positions.shape[-1]
        recent = range(max(self.sinks, total - (self.n - self.sinks)), total)
        return torch.tensor([*range(min(self.sinks, total)), *recent])

    def counts(self, total: int, layers: int, stats: Mapping[str, Any]) -> Sequence[int]:
        return [self.n] * layers


class LowKeys(CachePolicy):
    """Entries whose key is small (a head's own choice), the last one always."""

    def __init__(self, when: Any = "after_prefill") -> None:
        self.when = when

    def scores(self, view: LayerView) -> Tensor:
        scores = -view.keys.norm(dim=-1)
        scores[..., -1] = torch.inf
        return scores


class Counts(CachePolicy):
    """How many each layer keeps."""

    parts = frozenset({"counts"})

    def __init__(self, counts: Sequence[int], when: Any = "after_prefill") -> None:
        self.each, self.when = list(counts), when

    def counts(self, total: int, layers: int, stats: Mapping[str, Any]) -> Sequence[int]:
        return self.each


class SkipLayer(AttentionPolicy):
    def __init__(self, layer: int) -> None:
        self.layer = layer

    def skip(self, layer: int, layers: int) -> bool:
        return layer == self.layer


class ReadLast(AttentionPolicy):
    def __init__(self, n: int) -> None:
        self.n = n

    def read(self, view: LayerView) -> Tensor:
        total = view.positions.shape[-1]
        return torch.arange(max(0, total - self.n), total)


# -- the oracle ------------------------------------------------------------------------------------------------

_now: dict[str, Any] = {}


def _masked_softmax(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    layer, group = module.layer_idx, query.shape[1] // key.shape[1]
    _now["keys"][layer], _now["queries"][layer] = key[0], query[0]
    seen = _now["seen"][layer].repeat_interleave(group, 0)  # [H_q, n, n]
    logits = query[0] @ key[0].repeat_interleave(group, 0).transpose(1, 2) * module.scaling
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    out = weights @ value[0].repeat_interleave(group, 0)
    return (torch.zeros_like(out) if layer in _now["skip"] else out).transpose(0, 1)[None], None


AttentionInterface.register("oracle_of_tests", _masked_softmax)


def oracle(runner: Runner, tokens: Tensor, seen: list[Tensor], skip: Sequence[int] = (), at: Any = None) -> Tensor:
    """All logits under `seen[layer]` [H_kv, n, n]; keys and queries of the run are left in `_now`."""
    _now.update(seen=seen, skip=skip, keys={}, queries={})
    runner.model.set_attn_implementation("oracle_of_tests")
    try:
        with torch.no_grad():
            return runner.model(tokens[None], position_ids=at, use_cache=False).logits[0]
    finally:
        runner.model.set_attn_implementation("thrifty")


def everything(n: int) -> list[Tensor]:
    """A causal mask for each layer and head."""
    return [torch.ones(KV_HEADS, n, n).tril().bool() for _ in range(LAYERS)]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return attach(tiny.model("Llama", torch.float64))


def feed(runner: Runner, store: Store, prompt: Tensor, rest: Tensor) -> Tensor:
    """Logits after the prompt and after each of the rest, one forward pass a token."""
    outs = [runner.forward([Row(store, prompt)])[0].logits]
    outs += [runner.forward([Row(store, t[None])])[0].logits for t in rest]
    return torch.cat([o for o in outs if o is not None])


# -- cache policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "sinks"), [(1, 0), (16, 0), (16, 4), (150, 4), (500, 4)])
@pytest.mark.parametrize("length", [20, 200])
def test_keeping_the_last_while_decoding_equals_a_window_with_sinks(
    runner: Runner, n: int, sinks: int, length: int
) -> None:
    tokens = tiny.tokens(length + 160, length)
    seen = everything(len(tokens))
    for layer in seen:
        for i in range(length, len(tokens)):
            layer[:, i, sinks : max(sinks, i - (n - sinks))] = False
    store = runner.store([KeepLast(n, sinks)])
    ours = feed(runner, store, tokens[:length], tokens[length:])
    torch.testing.assert_close(ours, oracle(runner, tokens, seen)[length - 1 :], rtol=0, atol=1e-6)
    assert store.kept() == min(n, len(tokens)) and store.next_position == len(tokens)
    assert store.length() <= store.kept() + 128
    entry = runner.entry_nbytes()
    held = (min(n, len(tokens)) + 2 * 128) * (entry + 8 + LAYERS * KV_HEADS)
    assert store.nbytes <= held


def test_eviction_after_the_prefill_frees_memory_and_layers_differ(runner: Runner) -> None:
    tokens, keep = tiny.tokens(330, 5), [100, 40, 7]
    prompt = 300
    full = runner.store()
    runner.forward([Row(full, tokens[:prompt])])
    oracle(runner, tokens[:prompt], everything(prompt))
    seen = everything(len(tokens))
    for layer, count in enumerate(keep):
        norms = _now["keys"][layer].norm(dim=-1)
        norms[:, -1] = -torch.inf
        for head in range(KV_HEADS):
            ranked = sorted(range(prompt), key=lambda i, row=norms[head]: (float(row[i]), i))  # type: ignore[misc]
            seen[layer][head, prompt:, ranked[count:]] = False
    store = runner.store([LowKeys(), Counts(keep)])
    ours = feed(runner, store, tokens[:prompt], tokens[prompt:])
    torch.testing.assert_close(ours, oracle(runner, tokens, seen)[prompt - 1 :], rtol=0, atol=1e-6)
    after = runner.store([LowKeys(), Counts(keep)])
    out = runner.forward([Row(after, tokens[:prompt])])[0]
    assert [after.kept(layer) for layer in range(LAYERS)] == keep and out.evicted == 3 * prompt - sum(keep)
    assert after.nbytes < 0.25 * full.nbytes
    assert after.next_position == prompt


@pytest.mark.parametrize("when", ["after_prefill", "online"])
def test_chunks_and_calls_keep_the_same_set(runner: Runner, when: Any) -> None:
    tokens = tiny.tokens(260, 6)
    stores = [runner.store([LowKeys(when), Counts([50, 30, 20], when)]) for _ in range(3)]
    runner.forward([Row(stores[0], tokens)])
    before, runner.max_chunk = runner.max_chunk, 33
    runner.forward([Row(stores[1], tokens)])
    runner.max_chunk = before
    runner.forward([Row(stores[2], tokens[:99], want="none", final=False)])
    assert stores[2].kept() == 99
    runner.forward([Row(stores[2], tokens[99:])])
    for layer in range(LAYERS):
        positions = [s.snapshot(layer)[2] for s in stores]
        assert positions[0].shape[-1] == [50, 30, 20][layer]
        assert torch.equal(positions[0], positions[1]) and torch.equal(positions[0], positions[2])


def test_heads_that_choose_while_decoding_equal_a_simulation(runner: Runner) -> None:
    prompt, keep = 30, 12
    tokens = tiny.tokens(60, 11)
    store = runner.store([LowKeys("online"), Counts([keep] * LAYERS, "online")])
    ours = feed(runner, store, tokens[:prompt], tokens[prompt:])
    seen = everything(len(tokens))
    alive = [[list(range(prompt)) for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    for i in range(prompt, len(tokens)):
        oracle(runner, tokens[:i], [m[:, :i, :i] for m in seen])
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                norms, own = _now["keys"][layer][head].norm(dim=-1), alive[layer][head]
                ranked = sorted(own[:-1], key=lambda j, row=norms: (float(row[j]), j))  # type: ignore[misc]
                own = sorted([*ranked[: keep - 1], own[-1]])
                seen[layer][head, i] = False
                seen[layer][head, i, [*own, i]] = True
                alive[layer][head] = [*own, i]
    torch.testing.assert_close(ours, oracle(runner, tokens, seen)[prompt - 1 :], rtol=0, atol=1e-6)


def test_a_batch_under_different_policies_equals_each_row_alone(runner: Runner) -> None:
    tokens = tiny.tokens(220, 3)

    def rows() -> list[Store]:
        return [
            runner.store([KeepLast(20, 2)]),
            runner.store(),
            runner.store([LowKeys(), Counts([60, 50, 40])]),
            runner.store([KeepLast(140)]),
            runner.store(attention=[SkipLayer(1)]),
            runner.store(attention=[ReadLast(30)]),
            runner.store(),
        ]

    together, alone = rows(), rows()
    apart = torch.stack([feed(runner, s, tokens[:170], tokens[170:]) for s in alone], dim=1)
    joint = [[o.logits for o in runner.forward([Row(s, tokens[:170]) for s in together])]]
    joint += [[o.logits for o in runner.forward([Row(s, t[None]) for s in together])] for t in tokens[170:]]
    for ours, expected in zip(joint, apart, strict=True):
        torch.testing.assert_close(torch.cat([t for t in ours if t is not None]), expected, rtol=0, atol=1e-9)


def test_a_fork_under_eviction_goes_its_own_way(runner: Runner) -> None:
    tokens = tiny.tokens(200, 8)
    whole = feed(runner, runner.store([KeepLast(40, 4)]), tokens[:90], tokens[90:])
    store = runner.store([KeepLast(40, 4)])
    feed(runner, store, tokens[:90], tokens[90:140])
    fork = store.fork()
    feed(runner, store, tiny.tokens(3, 1), tiny.tokens(150, 2))  # the parent goes elsewhere
    outs = [runner.forward([Row(fork, t[None])])[0].logits for t in tokens[140:]]
    torch.testing.assert_close(torch.cat([o for o in outs if o is not None]), whole[51:], rtol=0, atol=1e-9)


def test_forks_of_one_prompt_evict_without_touching_it(runner: Runner) -> None:
    prompt = tiny.tokens(400, 8)
    root = runner.store()
    runner.forward([Row(root, prompt)])
    fork = root.fork(cache=[KeepLast(50)])
    before = [t.clone() for t in root.segments[0].keys]
    runner.forward([Row(fork, [5])])
    assert fork.kept() == 50 and root.kept() == 400
    assert all(torch.equal(a, b) for a, b in zip(before, root.segments[0].keys, strict=True))
    assert fork.nbytes < root.nbytes / 2


def test_renumbering_equals_the_kept_text_at_its_new_places(runner: Runner) -> None:
    """Keys after the first layer carry their old context, so only layer 0 has a closed form: turned keys. (Stock
    computes its angles in fp32, so fp64 models agree to fp32 rounding.)"""
    tokens = tiny.tokens(120, 8)
    store = runner.store([KeepLast(30, 4, when="after_prefill", positions="renumber")])
    runner.forward([Row(store, tokens)])
    assert store.next_position == 30 == store.kept()
    kept = torch.cat([tokens[:4], tokens[-26:]])
    fresh = runner.store()
    runner.forward([Row(fresh, kept)])
    for layer in range(LAYERS):
        assert torch.equal(store.snapshot(layer)[2], torch.arange(30))
    torch.testing.assert_close(store.snapshot(0)[0], fresh.snapshot(0)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(store.snapshot(0)[1], fresh.snapshot(0)[1], rtol=0, atol=1e-9)
    runner.forward([Row(store, [7])])
    assert store.next_position == 31


# -- attention policies ----------------------------------------------------------------------------------------


def test_skipping_a_layer_zeroes_its_attention(runner: Runner) -> None:
    tokens = tiny.tokens(150, 2)
    store = runner.store(attention=[SkipLayer(1)])
    out = runner.forward([Row(store, tokens[:140])])[0]
    expected = oracle(runner, tokens, everything(150), skip=[1])
    ours = torch.cat([out.logits, feed(runner, store, tokens[140:141], tokens[141:])])  # type: ignore[list-item]
    torch.testing.assert_close(ours, expected[139:], rtol=0, atol=1e-6)
    assert out.kv_reads == round(140 * 141 / 2 * 2 / 3)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GptOss"])
def test_reading_the_last_entries_only(family: str) -> None:
    made = attach(tiny.model(family, torch.float64))
    tokens, last = tiny.tokens(160, 2), 5
    plain = made.store()
    ruled = made.store(attention=[ReadLast(last)])
    made.forward([Row(plain, tokens[:140]), Row(ruled, tokens[:140])])
    evicting = plain.fork(cache=[KeepLast(last - 1)])
    evicting.prefilled = False
    evicting.segments, evicting.slot, evicting.tail = [], None, 0
    evicting.next_position = evicting.seen = 0
    made.forward([Row(evicting, tokens[:140])])
    for token in tokens[140:]:  # reading the last 5 is keeping the last 4 and oneself
        a, b = made.forward([Row(ruled, token[None]), Row(evicting, token[None])])
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-9)
        assert a.kv_reads <= last
    assert ruled.kept() == 160


# -- the view --------------------------------------------------------------------------------------------------


class Watch(CachePolicy):
    """Keeps all, and what it saw."""

    window = 8

    def __init__(self) -> None:
        self.saw: list[tuple[Any, ...]] = []

    def scores(self, view: LayerView) -> Tensor:
        view.state["calls"] = view.state.get("calls", 0) + 1
        self.saw.append((view.layer, view.keys, view.queries(8), view.positions, view.mask, view.prefilling))
        self.saw[-1] += (view.rerotate(view.positions + 3),)
        return view.keys.sum(-1)

    def counts(self, total: int, layers: int, stats: Mapping[str, Any]) -> Sequence[int]:
        assert total == 150 and stats["lengths"] == [150] * layers
        return [149] * layers


@pytest.mark.parametrize("chunk", [512, 148, 30])
def test_a_policy_sees_keys_queries_and_positions(runner: Runner, chunk: int) -> None:
    tokens, policy = tiny.tokens(150, 3), Watch()
    before, runner.max_chunk = runner.max_chunk, chunk
    store = runner.store([policy])
    runner.forward([Row(store, tokens)])
    runner.max_chunk = before
    oracle(runner, tokens, everything(150))
    keys, queries = dict(_now["keys"]), dict(_now["queries"])
    oracle(runner, tokens, everything(150), at=torch.arange(3, 153)[None])
    assert len(policy.saw) == LAYERS
    for layer, k, q, positions, mask, prefilling, turned in policy.saw:
        torch.testing.assert_close(k[0], keys[layer], rtol=0, atol=1e-9)
        torch.testing.assert_close(q[0], queries[layer][:, -8:], rtol=0, atol=1e-9)
        torch.testing.assert_close(turned[0], _now["keys"][layer], rtol=0, atol=1e-4)
        assert torch.equal(positions, torch.arange(150)[None]) and bool(mask.all()) and mask.shape == (1, 150)
        assert prefilling
    assert [s["calls"] for s in store.state] == [1] * LAYERS
    fork = store.fork()
    fork.state[0]["calls"] = 9
    assert store.state[0]["calls"] == 1


def test_ties_break_by_the_lower_index_and_counts_clamp(runner: Runner) -> None:
    class Flat(CachePolicy):
        def scores(self, view: LayerView) -> Tensor:
            return torch.zeros(view.keys.shape[:3])

    store = runner.store([Flat(), Counts([5, 1000, 0])])
    runner.forward([Row(store, tiny.tokens(140))])
    assert [store.kept(i) for i in range(3)] == [5, 140, 0]
    assert store.snapshot(0)[2].tolist() == [0, 1, 2, 3, 4]
    out = runner.forward([Row(store, [5])])[0].logits
    assert out is not None and bool(torch.isfinite(out).all())
    assert best(torch.tensor([[1.0, 1.0, 2.0, 1.0]]), 3).tolist() == [[0, 1, 2]]


def _answers(scores: Callable[[LayerView], Tensor], counts: Any = None) -> CachePolicy:
    policy = Counts(counts or [5] * LAYERS)
    policy.parts = frozenset({"scores", "counts"})  # type: ignore[misc]
    policy.scores = scores  # type: ignore[method-assign]
    return policy


def test_wrong_answers_of_policies_are_refused(runner: Runner) -> None:
    def run(policy: CachePolicy) -> None:
        runner.forward([Row(runner.store([policy]), tiny.tokens(40))])

    with pytest.raises(InvalidInput, match=r"must be \[B, H_kv, T\] = \(1, 2, 40\)"):
        run(_answers(lambda view: view.keys))
    with pytest.raises(InvalidInput, match="3 whole numbers"):
        run(_answers(lambda view: view.keys.sum(-1), [5, 5]))
    with pytest.raises(InvalidInput, match="none says which"):
        run(Counts([5, 5, 5]))
    wrong = KeepLast(5)
    wrong.pattern = lambda view: torch.tensor([3, 2])  # type: ignore[method-assign]
    with pytest.raises(InvalidInput, match="ascending"):
        run(wrong)


def test_positions_that_cannot_be_turned_are_refused() -> None:
    made = attach(tiny.model("GptOss"))
    assert made.rotation.works is False
    with pytest.raises(Unsupported, match="GptOssForCausalLM's keys cannot be turned"):
        made.forward([Row(made.store([KeepLast(9, positions="renumber")]), tiny.tokens(40))])


def test_a_view_of_nothing_is_empty(runner: Runner) -> None:
    view = StoreView(runner.store(), 0, runner.rotation)
    assert view.length == 0 and view.positions.shape == (1, 0)
