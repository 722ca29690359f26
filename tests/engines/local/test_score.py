"""Scores of given texts: against the log-softmax of stock transformers, token by token, window by window."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_chat import make_folder

from thrifty import Account, Budget, BudgetExceeded, EngineError, InvalidInput, Unsupported
from thrifty.engine import Scorer, score
from thrifty.engines.local import score as scoring
from thrifty.engines.local import spans
from thrifty.engines.local.engine import LocalEmbedder, LocalEngine
from thrifty.engines.scripted import PROVIDES, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.ledger.entry import Labels
from thrifty.meter.prices import PriceTable, Rate

WHO = Labels(role="scorer", method="a-method")
TEXT = "the rain in spain falls mainly on the plain, as everybody here knows. " * 4
MIXED = "naïve 漢字 👩‍👩‍👧 שלום عليكم\n\n  \tx = 1;  "


def by_hand(model: Any, start: list[int], context: list[int], text: list[int], room: int = 10**9) -> np.ndarray:
    """One stock forward pass over exactly the tokens that a window reads, for every window."""
    found = np.full(len(text), np.nan)
    for window in scoring.windows(0, len(text), room):
        ids = [*start, *context, *text[window.start : window.stop]]
        with torch.no_grad():
            logs = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        front = len(start) + len(context)
        for i in range(window.new, window.stop):
            at = front + i - window.start
            if at > 0:
                found[i] = float(logs[at - 1, ids[at]])
    return found


def tokens(engine: LocalEngine, text: str) -> list[int]:
    return engine.codec.encode(text)


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalEngine, Any]]:
    """The tiny model in fp64, ours and stock."""
    from transformers import LlamaForCausalLM

    folder = make_folder(tmp_path_factory.mktemp("score") / "model")
    engine = LocalEngine.load(folder, dtype="float64")
    yield engine, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    asyncio.run(engine.aclose())


@pytest.mark.parametrize("text", ["x", TEXT, MIXED, "a" * 300, "\n", " "])
@pytest.mark.parametrize("context", ["", "Where does it rain?\n\n", MIXED])
async def test_each_token_has_the_log_softmax_of_stock(
    double: tuple[LocalEngine, Any], text: str, context: str
) -> None:
    engine, model = double
    found = (await score(engine, [text], Account("t"), WHO, context)).texts[0]
    start = spans.start_of(engine.codec)
    expected = by_hand(model, start, tokens(engine, context), tokens(engine, text))
    assert start and found.logprobs.shape == expected.shape and not np.isnan(expected).any()
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-6)  # stock rounds RMSNorm through fp32
    assert found.spans[0, 0] == 0 and found.spans[-1, 1] == len(text)


async def test_fp32_agrees_too(tiny_engine: LocalEngine, stock: Any) -> None:
    found = (await score(tiny_engine, [TEXT], Account("t"), WHO, "so: ")).texts[0]
    start = spans.start_of(tiny_engine.codec)
    expected = by_hand(stock, start, tokens(tiny_engine, "so: "), tokens(tiny_engine, TEXT))
    np.testing.assert_allclose(found.logprobs, expected, atol=2e-3)  # logits of this model reach 60


async def test_texts_of_several_contexts_come_back_in_their_order(double: tuple[LocalEngine, Any]) -> None:
    engine, model = double
    texts = ["one two", "", TEXT, "three", "one two"]
    contexts = ["Before: ", "A.", "A.", "Before: ", ""]
    scores = await score(engine, texts, Account("t"), WHO, contexts)
    start = spans.start_of(engine.codec)
    for text, context, found in zip(texts, contexts, scores.texts, strict=True):
        expected = by_hand(model, start, tokens(engine, context), tokens(engine, text)) if text else np.zeros(0)
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-6)
    n = {t: len(tokens(engine, t)) for t in {*texts, *contexts}}
    p = {c: len(start) + n[c] for c in contexts}
    assert p["A."] <= scoring.LEAD < p["Before: "]
    assert scores.spend.input == sum(n[t] + p[c] for t, c in zip(texts, contexts, strict=True) if t)
    assert scores.spend.cached == p["Before: "] and scores.spend.calls == 1
    assert scores.work.prefill == sum(n[t] for t in texts) + p["Before: "] + p["A."] + p[""]
    assert scores.work.target_passes == 4 + 1, "one a text, and one for the context that two of them share"


@pytest.mark.parametrize("context", ["", "Where? " * 20])
async def test_windows_read_what_they_say_and_score_each_token_once(
    double: tuple[LocalEngine, Any], monkeypatch: pytest.MonkeyPatch, context: str
) -> None:
    engine, model = double
    text = "".join(f"line {i} says {i * i}; " for i in range(90))
    monkeypatch.setattr(engine.runner, "max_chunk", 50)  # slices end within windows
    scores = await score(engine, [text], Account("t"), WHO, context)
    start, before = spans.start_of(engine.codec), tokens(engine, context)
    room = 512 - len(start) - len(before)
    assert len(tokens(engine, text)) > 2 * room
    expected = by_hand(model, start, before, tokens(engine, text), room)
    np.testing.assert_allclose(scores.texts[0].logprobs, expected, atol=1e-6)
    read = scores.work.prefill - len(start) - len(before)
    assert len(tokens(engine, text)) < read <= len(tokens(engine, text)) * 16 / 15 + 1


@given(st.integers(0, 300), st.integers(2, 70))
def test_windows_cover_every_token_once_and_never_more_than_the_room(n: int, room: int) -> None:
    found = list(scoring.windows(0, n, room))
    assert [i for w in found for i in range(w.new, w.stop)] == list(range(n))
    assert all(w.size <= room and w.start <= w.new for w in found)
    assert all(w.new - w.start == max(1, room // 16) for w in found[1:])


async def test_a_context_that_is_too_long_loses_its_beginning(double: tuple[LocalEngine, Any]) -> None:
    engine, model = double
    context = "".join(f"{i} " for i in range(400))
    scores = await score(engine, ["and so on"], Account("t"), WHO, context)
    start, before, text = spans.start_of(engine.codec), tokens(engine, context), tokens(engine, "and so on")
    kept = before[len(before) - (512 - len(start) - len(text)) :]
    assert scores.cut == len(before) - len(kept) > 0
    np.testing.assert_allclose(scores.texts[0].logprobs, by_hand(model, start, kept, text), atol=1e-6)


def covers(text: str, found: np.ndarray) -> bool:
    """Every character lies in a span, starts never fall, and no token reaches past the text."""
    seen = {i for first, stop in found for i in range(first, stop)}
    starts = found[:, 0].tolist()
    return seen == set(range(len(text))) and starts == sorted(starts) and (found[:, 1] <= len(text)).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.text(max_size=80))
def test_spans_cover_the_text(tiny_parts: tuple[Any, Any], text: str) -> None:
    codec = spans.TextCodec(tiny_parts[1], frozenset())
    ids, found = spans.encode(codec, text)
    assert len(ids) == len(found) and covers(text, found)
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert ids == codec.encode(text)


def test_lone_surrogates_are_read_as_replacement_characters(tiny_parts: tuple[Any, Any]) -> None:
    codec = spans.TextCodec(tiny_parts[1], frozenset())
    ids, found = spans.encode(codec, "a\ud800b")
    assert ids == codec.encode("a\ufffdb") and covers("a\ud800b", found)


async def test_a_long_text_without_a_space_is_read_in_bounded_memory(
    double: tuple[LocalEngine, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = double
    most: list[int] = []
    monkeypatch.setattr(engine.runner, "forward", _watched(engine.runner.forward, most))
    text = unicodedata.normalize("NFC", "né" * 5_000)
    scores = await score(engine, [text], Account("t"), WHO)
    assert not np.isnan(scores.texts[0].logprobs).any() and covers(text, scores.texts[0].spans)
    assert sum(most) == scores.work.prefill and max(most) <= engine.runner.max_chunk
    assert scores.work.kv_bytes_peak <= (512 + 1024 + 128 * 60) * engine.entry_nbytes


def test_long_texts_are_tokenised_in_pieces_that_join_at_white_space(
    tiny_parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "PIECE", 40)
    codec = spans.TextCodec(tiny_parts[1], frozenset())
    ids, found = spans.encode(codec, TEXT)
    assert ids == codec.encode(TEXT) and covers(TEXT, found)
    text = "x" * 1000
    assert covers(text, spans.encode(codec, text)[1])


def _watched(forward: Any, sizes: list[int]) -> Any:
    def watched(rows: Any, between: Any = None) -> Any:
        sizes.append(sum(len(row.tokens) for row in rows))
        return forward(rows, between)

    return watched


# -- what it costs -------------------------------------------------------------------------------------------


async def test_it_settles_what_it_took_under_the_methods_name(tiny_parts: tuple[Any, Any]) -> None:
    prices = PriceTable("p", "2026-01-01", default=Rate.per_million(1, 4, 0.1))
    engine = LocalEngine(*tiny_parts, "tiny", prices=prices)
    ledger = MemoryLedger()
    account = Account("t", ledger=ledger)
    scores = await score(engine, ["a b", "c d"], account, WHO, "q: ")
    (entry,) = ledger.entries()
    assert entry.spend == scores.spend == account.settled and entry.work == scores.work
    assert entry.labels.method == "a-method" and entry.labels.role == "scorer" and entry.labels.engine == "local"
    assert scores.spend.usd > 0 and scores.work.engine_seconds > 0 and not account.held
    await engine.aclose()


@pytest.mark.parametrize("resource", ["input", "tokens", "calls", "prefill", "kv_reads", "target_passes"])
async def test_a_budget_is_reached_exactly_and_never_exceeded(tiny_engine: LocalEngine, resource: str) -> None:
    free = Account("free")
    scores = await score(tiny_engine, [TEXT, "so"], free, WHO, "q: ")
    whole = getattr(scores.spend, resource, None) or getattr(scores.work, resource, 0)
    if resource == "kv_reads":
        whole += whole  # it is held with a bound
    enough = Account("t", Budget(**{resource: whole}))
    again = await score(tiny_engine, [TEXT, "so"], enough, WHO, "q: ")
    np.testing.assert_array_equal(again.texts[0].logprobs, scores.texts[0].logprobs)
    for less in (0, 1, whole // 4, scores.spend.calls - 1 if resource == "calls" else whole // 2 - 1):
        if less >= whole:
            continue
        account = Account("t", Budget(**{resource: less}))
        with pytest.raises(BudgetExceeded):
            await score(tiny_engine, [TEXT, "so"], account, WHO, "q: ")
        assert not account.held and not account.settled and not account.overdraft


async def test_memory_is_claimed_and_given_back(tiny_engine: LocalEngine) -> None:
    account = Account("t", Budget(kv_bytes_peak=1000))
    with pytest.raises(BudgetExceeded, match="kv_bytes_peak"):
        await score(tiny_engine, [TEXT], account, WHO)
    assert not account.held and not account.settled
    account = Account("t", Budget(kv_bytes_peak=10**9))
    await score(tiny_engine, [TEXT], account, WHO)
    account.claim(10**9)  # all of it is free again


async def test_nothing_to_score_costs_nothing(tiny_engine: LocalEngine) -> None:
    account = Account("t", Budget(calls=0))
    scores = await score(tiny_engine, ["", ""], account, WHO, ["a", ""])
    assert [len(t.logprobs) for t in scores.texts] == [0, 0] and not scores.spend
    assert not (await score(tiny_engine, [], account, WHO)).texts


async def test_cancelled_in_the_middle_it_settles_what_was_read(
    double: tuple[LocalEngine, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = double
    monkeypatch.setattr(engine.runner, "max_chunk", 20)
    account = Account("t")
    task = asyncio.ensure_future(score(engine, [TEXT * 20], account, WHO))
    while not account.held:
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    whole = len(tokens(engine, TEXT * 20))
    assert not account.held and 0 < account.settled.input < whole
    assert (await score(engine, ["go on"], Account("t"), WHO)).spend.calls == 1
    await asyncio.sleep(0.01)
    assert all(len(page.free) == page.slots for page in engine.runner.tails.pages)


@pytest.mark.parametrize(("context", "read"), [("", 20 + 20), ("x" * 25, 20 + 6)])
async def test_a_failing_model_is_told_and_what_was_read_is_settled(
    double: tuple[LocalEngine, Any], monkeypatch: pytest.MonkeyPatch, context: str, read: int
) -> None:
    engine, _ = double
    forward, calls = engine.runner.forward, 0

    def failing(rows: Any, between: Any = None) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")
        return forward(rows, between)

    monkeypatch.setattr(engine.runner, "max_chunk", 20)
    monkeypatch.setattr(engine.runner, "forward", failing)
    account = Account("t")
    with pytest.raises(EngineError, match="RuntimeError: out of luck"):
        await score(engine, [TEXT], account, WHO, context)
    assert not account.held and account.settled.input == read and account.settled.calls == 1


async def test_generations_go_on_beside_it(double: tuple[LocalEngine, Any]) -> None:
    from test_engine import ask

    engine, _ = double
    alone = await engine.generate(ask("tell me"))
    together, scores = await asyncio.gather(
        engine.generate(ask("tell me")), score(engine, [TEXT * 10], Account("t"), WHO)
    )
    assert together.text == alone.text and len(scores.texts[0].logprobs)


async def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    engine = LocalEngine.load(make_folder(tmp_path / "m"), dtype="float32")
    await engine.aclose()
    account = Account("t")
    with pytest.raises(EngineError, match="closed"):
        await score(engine, ["a"], account, WHO)
    assert not account.held and not account.settled


# -- who can and who cannot ----------------------------------------------------------------------------------


async def test_who_cannot_score_is_refused_by_name(tiny_engine: LocalEngine) -> None:
    assert isinstance(tiny_engine, Scorer) and "score" in tiny_engine.capabilities
    assert not isinstance(LocalEmbedder, Scorer)
    bare = ScriptedEngine("x", model="box", capabilities=PROVIDES - {"score"})
    account = Account("t")
    with pytest.raises(Unsupported, match="scripted:box gives no log-probabilities of texts: .* local:smollm2"):
        await score(bare, ["a"], account, WHO)
    with pytest.raises(Unsupported, match="use an engine with `score`"):
        await bare.score(["a"], account, WHO)
    with pytest.raises(InvalidInput, match="2 contexts for 1 texts"):
        await score(tiny_engine, ["a"], account, WHO, ["a", "b"])
    assert not account.settled


async def test_the_openai_engine_is_no_scorer() -> None:
    from thrifty.engines.openai.engine import OpenAIEngine

    engine = OpenAIEngine("http://127.0.0.1:9", "gpt")
    with pytest.raises(Unsupported, match="openai:gpt gives no log-probabilities"):
        await score(engine, ["a"], Account("t"), WHO)
    await engine.aclose()


async def test_the_scripted_engine_scores_words() -> None:
    engine = ScriptedEngine("x", logprob=lambda word, context, before: -len(word) - len(context) - len(before) / 100)
    account = Account("t")
    scores = await score(engine, ["a bc", ""], account, WHO, ["q r", "s"])
    assert scores.texts[0].logprobs.tolist() == [-4.0, -6.01] and not len(scores.texts[1].logprobs)
    assert scores.texts[0].spans.tolist() == [[0, 1], [1, 4]]
    assert scores.spend == account.settled and scores.spend.input == 4
