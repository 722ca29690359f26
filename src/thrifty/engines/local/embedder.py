"""A sentence embedder: MiniLM, or any BERT-like folder, with mean pooling and unit length.

`encode` is what context methods rank passages with. Texts are computed in batches of like length; what was computed
is kept in a cache by content, bounded in bytes, and the result says which texts were computed and which were not.
Thread-safe.

Invariants: a row depends on its own text alone (up to rounding in a batch); every row has length 1; rows come back in
the order of the texts.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_TOKENS = 256
"""Tokens a text may have where the folder does not say (special tokens included); what is over is cut off."""


@dataclass(frozen=True)
class Encoded:
    """What `encode_counted` found, by text.

    `vectors`: float32 `[N, D]`, unit length. `tokens` `[N]`: of the text as computed, special tokens included.
    `truncated` `[N]`: the text was longer. `computed` `[N]`: this call ran the model for it (the first of several
    equal texts); the others came from the cache.
    """

    vectors: npt.NDArray[np.float32]
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]
    computed: tuple[bool, ...]

    @property
    def computed_tokens(self) -> int:
        """Tokens that this call ran through the model."""
        return sum(tokens for tokens, new in zip(self.tokens, self.computed, strict=True) if new)


@dataclass(frozen=True)
class _Entry:
    vector: npt.NDArray[np.float32]
    tokens: int
    truncated: bool


class Embedder:
    """Mean-pooled, normalised sentence vectors of a local model folder.

    Args:
        folder: a transformers folder with a tokenizer (`embedded.path("minilm")`).
        dtype: "float32" or "bfloat16"; results are float32 either way.
        batch_tokens: most tokens, padding included, in one forward pass.
        cache_bytes: bound of the cache; 0 keeps nothing.

    Raises InvalidInput for a folder without a model or an unknown dtype, Unsupported without the extra `local`.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: str = "float32",
        *,
        batch_tokens: int = 4096,
        cache_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise Unsupported(
                "an embedder needs torch and transformers: install the extra `local` (pip install 'thrifty[local]')"
            ) from error
        if dtype not in ("float32", "bfloat16"):
            raise InvalidInput(f"embedder dtype {dtype!r}: it is float32 or bfloat16")
        if batch_tokens < 1 or cache_bytes < 0:
            raise InvalidInput("embedder: batch_tokens must be at least 1 and cache_bytes at least 0")
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise InvalidInput(f"{self.folder}: no model in this folder (config.json is missing)")
        self.dtype = dtype
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(
                self.folder, dtype=getattr(torch, dtype), local_files_only=True
            ).eval()
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{self.folder}: cannot be read as a model: {error}") from error
        self.dimensions: int = int(self._model.config.hidden_size)
        self.max_tokens = _max_tokens(self.folder, int(self._model.config.max_position_embeddings))
        self._batch_tokens, self._cache_bytes = batch_tokens, cache_bytes
        self._cache: OrderedDict[bytes, _Entry] = OrderedDict()
        # The cache has a lock of its own, so that texts already known never wait for a forward pass.
        self._lock, self._compute = threading.Lock(), threading.Lock()

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The vectors alone: float32 `[N, D]`."""
        return self.encode_counted(texts).vectors

    def encode_counted(self, texts: Sequence[str]) -> Encoded:
        """The vectors, with tokens by text and which texts were computed. Raises InvalidInput for what is no text."""
        import numpy as np

        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InvalidInput("an embedder encodes a list of texts")
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        found = self._cached(keys)
        first: dict[bytes, int] = {}  # where each text that is not known stands first
        if any(key not in found for key in keys):
            with self._compute:
                found |= self._cached([key for key in keys if key not in found])  # another thread was faster
                for index, key in enumerate(keys):
                    if key not in found:
                        first.setdefault(key, index)
                fresh = dict(zip(first, self._run([texts[index] for index in first.values()]), strict=True))
                self._keep(fresh)
                found |= fresh
        own = set(first.values())
        vectors = np.zeros((len(keys), self.dimensions), dtype=np.float32)
        for row, key in enumerate(keys):
            vectors[row] = found[key].vector
        return Encoded(
            vectors=vectors,
            tokens=tuple(found[key].tokens for key in keys),
            truncated=tuple(found[key].truncated for key in keys),
            computed=tuple(row in own for row in range(len(keys))),
        )

    def count(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Tokens of each text as it would be computed: special tokens included, at most `max_tokens`."""
        ids = self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
        return tuple(min(len(row), self.max_tokens) for row in ids)

    @property
    def cached_bytes(self) -> int:
        """Bytes that the cached vectors take."""
        with self._lock:
            return len(self._cache) * self._entry_bytes

    @property
    def _entry_bytes(self) -> int:
        return 4 * self.dimensions + 64  # the vector, its key, its counts

    def _cached(self, keys: Sequence[bytes]) -> dict[bytes, _Entry]:
        found: dict[bytes, _Entry] = {}
        with self._lock:
            for key in keys:
                if (entry := self._cache.get(key)) is not None:
                    self._cache.move_to_end(key)
                    found[key] = entry
        return found

    def _keep(self, fresh: dict[bytes, _Entry]) -> None:
        room = self._cache_bytes // self._entry_bytes
        with self._lock:
            for key, entry in fresh.items():
                self._cache[key] = entry
                self._cache.move_to_end(key)
            while len(self._cache) > room:
                self._cache.popitem(last=False)

    def _run(self, texts: list[str]) -> list[_Entry]:
        """Run the model: texts of like length together, at most `batch_tokens` a pass, padding included."""
        import torch

        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        cut = [len(row) > self.max_tokens for row in ids]
        for row, text in enumerate(texts):
            if cut[row]:
                ids[row] = self._tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        entries: dict[int, _Entry] = {}
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        begin = 0
        while begin < len(order):
            end = begin + 1
            while end < len(order) and len(ids[order[end]]) * (end + 1 - begin) <= self._batch_tokens:
                end += 1
            rows = order[begin:end]
            padded = self._tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            with torch.inference_mode():
                hidden = self._model(
                    input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
                ).last_hidden_state.float()  # [B, T, D]
                mask = padded["attention_mask"].unsqueeze(-1).float()  # [B, T, 1]
                mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)  # [B, D]
                unit = torch.nn.functional.normalize(mean, dim=1).numpy()
            for row, vector in zip(rows, unit, strict=True):
                entries[row] = _Entry(vector.copy(), len(ids[row]), cut[row])
            begin = end
        return [entries[row] for row in range(len(ids))]


def _max_tokens(folder: Path, positions: int) -> int:
    """What the folder's `sentence_bert_config.json` says, else MAX_TOKENS; never more than the model's positions."""
    file = folder / "sentence_bert_config.json"
    said: Any = None
    if file.is_file():
        try:
            said = json.loads(file.read_text(encoding="utf-8")).get("max_seq_length")
        except (ValueError, AttributeError) as error:
            raise InvalidInput(f"{file}: not a JSON object: {error}") from error
    return min(said if isinstance(said, int) and said > 2 else MAX_TOKENS, positions)
