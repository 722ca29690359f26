"""The embedder against a plain computation, one text at a time, and its cache against a simple model of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from thrifty.engines.local import embedded  # noqa: E402
from thrifty.engines.local.embedder import Embedder  # noqa: E402
from thrifty.errors import InvalidInput  # noqa: E402

TEXTS = [
    "Lists are mutable.",
    "",
    "A generator is a function which returns a generator iterator. " * 3,
    "naïve café 東京",
    "Lists can be changed in place.",
    "x",
    "word " * 600,
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a small vocabulary of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lists", "are", "mutable", ".", "a", "x", "word"]
    words += ["generator", "is", "function", "can", "be", "changed", "in", "place"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def plain(folder: Path, text: str, max_tokens: int) -> tuple[Any, int]:
    """One text alone, without padding or masks: the oracle."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state[0].double().numpy()
    mean = hidden.sum(axis=0) / len(hidden)
    return mean / np.sqrt((mean**2).sum()), len(hidden)


def check(folder: Path, dtype: str, max_tokens: int, tolerance: float) -> None:
    embedder = Embedder(folder, dtype, batch_tokens=600)
    got = embedder.encode_counted(TEXTS)
    assert got.vectors.dtype == np.float32 and got.vectors.shape == (len(TEXTS), embedder.dimensions)
    for row, text in enumerate(TEXTS):
        vector, tokens = plain(folder, text, max_tokens)
        assert np.abs(got.vectors[row] - vector).max() < tolerance, text[:20]
        assert got.tokens[row] == tokens
        assert np.linalg.norm(got.vectors[row]) == pytest.approx(1, abs=1e-5)
    assert got.truncated == (False,) * 6 + (True,)
    assert embedder.count(TEXTS) == got.tokens and embedder.count([]) == ()


def test_tiny_equals_the_plain_computation(tiny: Path) -> None:
    check(tiny, "float32", 64, 1e-5)


@pytest.mark.real
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_minilm_equals_the_plain_computation(dtype: str, tolerance: float) -> None:
    check(embedded.path("minilm"), dtype, 256, tolerance)


@pytest.mark.real
def test_minilm_puts_like_texts_together() -> None:
    vectors = Embedder(embedded.path("minilm")).encode(
        ["How do I sort a list?", "Ordering the items of a sequence.", "The cat sat on the mat."]
    )
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_what_was_computed_and_what_was_cached(tiny: Path) -> None:
    embedder = Embedder(tiny)
    first = embedder.encode_counted(["a x", "lists", "a x"])
    assert first.computed == (True, True, False)
    assert first.computed_tokens == 4 + 3
    second = embedder.encode_counted(["lists", "mutable", "a x"])
    assert second.computed == (False, True, False)
    assert second.tokens == (3, 3, 4)
    assert np.array_equal(second.vectors[0], first.vectors[1])
    assert np.array_equal(first.vectors[0], first.vectors[2])


def test_nothing_and_nonsense(tiny: Path) -> None:
    embedder = Embedder(tiny)
    assert embedder.encode([]).shape == (0, 16)
    assert np.isfinite(embedder.encode([""])).all()
    for wrong in ("one text", ["a", 1], [None]):
        with pytest.raises(InvalidInput, match="a list of texts"):
            embedder.encode(wrong)  # type: ignore[arg-type]


def test_the_cache_is_bounded_and_drops_the_least_recently_used(tiny: Path) -> None:
    entry = Embedder(tiny)._entry_bytes
    embedder = Embedder(tiny, cache_bytes=3 * entry)
    model: OrderedDict[str, None] = OrderedDict()  # a simple cache of three
    rng = np.random.default_rng(0)
    for _ in range(60):
        text = str(rng.choice(["a", "x", "word", "lists", "are"]))
        (computed,) = embedder.encode_counted([text]).computed
        assert computed == (text not in model)
        model[text] = None
        model.move_to_end(text)
        if len(model) > 3:
            model.popitem(last=False)
        assert embedder.cached_bytes == len(model) * entry <= 3 * entry
    none = Embedder(tiny, cache_bytes=0)
    assert none.encode_counted(["a"]).computed == none.encode_counted(["a"]).computed == (True,)
    # More texts at once than the cache holds.
    many = embedder.encode_counted(["a", "x", "word", "lists", "are", "mutable", "a"])
    assert np.array_equal(many.vectors[0], many.vectors[6])
    assert embedder.cached_bytes == 3 * entry


def test_threads_get_the_same_vectors_and_each_text_is_computed_once(tiny: Path) -> None:
    texts = [f"a {'x ' * i}" for i in range(20)]
    expected = Embedder(tiny).encode(texts)
    embedder = Embedder(tiny)
    results: list[Any] = [None] * 8
    start = threading.Barrier(8)

    def run(i: int) -> None:
        order = np.random.default_rng(i).permutation(len(texts))
        start.wait()
        got = embedder.encode_counted([texts[j] for j in order])
        vectors = np.zeros_like(got.vectors)
        vectors[order] = got.vectors
        results[i] = (vectors, sum(got.computed))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.abs(vectors - expected).max() < 1e-5 for vectors, _ in results)
    assert sum(computed for _, computed in results) == len(texts)


def test_bad_folders_and_settings(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"config\.json is missing"):
        Embedder(tmp_path)
    with pytest.raises(InvalidInput, match="float32 or bfloat16"):
        Embedder(tiny, "int8")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="cannot be read as a model"):
        Embedder(tmp_path)
