"""Counting the tokens of text with a model's own tokenizer, of any length in bounded memory, without a network.

Ids are those of the model's reference tokenizer. Text that looks like a special token (`<|endoftext|>`) is text, as a
provider takes it from a user. fastokens does the work, several times faster than tiktoken with the same ids; what it
does not read (normalizers such as Anthropic's NFKC) the `tokenizers` library does. Which files: `tokenizer_files`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import orjson

from thrifty.errors import InvalidInput, Unsupported
from thrifty.meter import tokenizer_files

TABLE_DATE = "2026-11-25"
"""When the table of models and their tokenizers was last checked."""

_OLD_CLAUDE = "Anthropic published no tokenizer after Claude 2's: its counts are approximate for later models"
_GEMINI = "Gemini's tokenizer is not published: Gemma 3's stands in for it"
_OLD_MISTRAL = "this model uses an older SentencePiece tokenizer: Tekken stands in for it"
_OLD_GEMMA = "this model uses an older vocabulary: Gemma 3's stands in for it"

# The first that matches decides. A name may stand behind a provider: `openai/gpt-4o`, `us.anthropic.claude-...`.
_MODELS: tuple[tuple[str, str, str], ...] = (
    (r"gpt-oss|gpt-4o|gpt-4\.[15]|gpt-[5-9]|chatgpt|o[1-9](?![0-9a-z])", "o200k", ""),
    (r"gpt-4|gpt-3\.?5|text-embedding-(3|ada)", "cl100k", ""),
    (r"claude-(instant|v?1|v?2)(?![0-9])", "claude", ""),
    (r"claude", "claude", _OLD_CLAUDE),
    (r"deepseek-r1-distill-qwen", "qwen3", ""),
    (r"deepseek-r1-distill-llama", "llama3", ""),
    (r"deepseek", "deepseek", ""),
    (r"qwen|qwq|qvq", "qwen3", ""),
    (r"(meta-)?llama-?3", "llama3", ""),
    (r"(open-)?(mixtral|mistral-7b)", "mistral", _OLD_MISTRAL),
    (r"(open-)?(mistral|ministral|codestral|pixtral|magistral|devstral|voxtral)", "mistral", ""),
    (r"gemma-?[12](?![0-9])", "gemma3", _OLD_GEMMA),
    (r"gemma", "gemma3", ""),
    (r"gemini", "gemma3", _GEMINI),
)

_BLOCK = 1 << 20
"""Bytes read, and about the characters tokenized, at a time."""
_MOST_HELD = 1 << 24
"""Characters held while looking for a place to cut."""

# Between these characters every tokenizer of the table has a token boundary, whatever stands around: none has a token,
# and no pre-tokenizer a piece, that holds both sides.
_CUT = re.compile(r"[!-~]\n(?=[A-Za-z])")
_CUT_IN_LINE = re.compile(r"[a-z](?= [A-Za-z])")


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokenizer of a model. `note` says why its counts are only approximate; empty where they are exact."""

    tokenizer: str
    note: str = ""


@dataclass(slots=True)
class Counted:
    """Tokens of a text. `replaced`: invalid UTF-8 sequences read as U+FFFD. `forced_cuts`: places where a text without
    any safe place to cut was cut all the same; each may add a token or so."""

    tokens: int = 0
    bytes: int = 0
    replaced: int = 0
    forced_cuts: int = 0


def choose(model: str) -> Choice:
    """The tokenizer of a model by its name. Raises InvalidInput for a model that is not in the table.

    >>> choose("openai/gpt-4o-mini").tokenizer, choose("gpt-4-turbo").tokenizer, choose("Qwen/Qwen3-32B").tokenizer
    ('o200k', 'cl100k', 'qwen3')
    """
    name = model.strip().lower()
    for pattern, tokenizer, note in _MODELS:
        if re.search(rf"(?:^|[/.:@])(?:{pattern})", name):
            return Choice(tokenizer, note)
    raise InvalidInput(
        f"no tokenizer is known for model {model!r}: give --tokenizer with one of "
        f"{', '.join(tokenizer_files.FILES)}, or a tokenizer.json"
    )


class Readable(Protocol):
    """A binary stream."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. `cuts`: whether long text may be tokenized in parts cut at safe places, with equal ids."""

    name: str
    backend: Any = field(repr=False)
    folder: Path | None = None
    cuts: bool = True

    @property
    def _fast(self) -> bool:
        if self.backend is None:
            raise InvalidInput("an estimate has no token ids: give a tokenizer")
        return hasattr(self.backend, "encode_batch_flat")  # fastokens has it, its reference has not

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids. `special` reads special tokens in the text as such, for text that a chat template made."""
        text = _sound(text)
        if self._fast:
            return list(self.backend.encode(text, split_special_tokens=not special).ids)
        self.backend.encode_special_tokens = not special
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def count(self, text: str, special: bool = False) -> int:
        """How many tokens a text is."""
        if self.backend is None:
            return estimate(text)
        if not self._fast:
            return len(self.encode(text, special))
        ids, _ = self.backend.encode_batch_flat([_sound(text)], split_special_tokens=not special)
        return len(ids) // 4  # little-endian uint32 each

    def count_text(self, parts: Iterable[str]) -> Counted:
        """Counts one text that comes in parts of any length, in bounded memory where `cuts`."""
        total = Counted()
        for piece, forced in _pieces(parts) if self.cuts else [("".join(parts), False)]:
            total.tokens += self.count(piece)
            total.forced_cuts += forced
        return total

    def count_stream(self, stream: Readable) -> Counted:
        """Counts a binary stream of UTF-8. Invalid sequences are read as U+FFFD, and counted."""
        told = Counted()
        counted = self.count_text(_decoded(stream, told))
        return Counted(counted.tokens, told.bytes, told.replaced, counted.forced_cuts)


ESTIMATE = Tokenizer("estimate", None)
"""Stands where a tokenizer is not here: counts from bytes, and has no ids."""


@lru_cache(maxsize=8)
def load(name: str) -> Tokenizer:
    """A tokenizer of the table, by name.

    Raises InvalidInput for an unknown name or one whose files are not here, Unsupported without the extra `count`.
    """
    folder = tokenizer_files.path(name)
    if name in ("o200k", "cl100k"):
        encoding = f"{name}_base"
        return Tokenizer(name, _fast().from_tiktoken(str(folder / f"{encoding}.tiktoken"), encoding=encoding), folder)
    if name == "mistral":
        return Tokenizer(name, _tekken(folder / "tekken.json"), folder)
    return Tokenizer(name, _json(folder / "tokenizer.json"), folder)


def from_path(path: str | Path) -> Tokenizer:
    """A tokenizer from a `tokenizer.json` or `tekken.json`, or from a folder that holds one.

    Long text is not cut, because nothing is known of its tokens: the whole text is held. Raises InvalidInput for a
    file that is no tokenizer.
    """
    path = Path(path)
    names = ("tokenizer.json", "tekken.json")
    file = path
    if path.is_dir():
        file = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not file.is_file():
        raise InvalidInput(f"{path}: no tokenizer there: give a tokenizer.json, a tekken.json or a folder with one")
    backend = _tekken(file) if file.name.startswith("tekken") else _json(file)
    return Tokenizer(str(path), backend, file.parent, cuts=False)


def estimate(text: str) -> int:
    """Tokens of a text without any tokenizer, from its bytes."""
    from thrifty.engines.openai.usage import estimate as by_bytes

    return by_bytes(text)


# --- cutting long text ---


def _pieces(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The text in pieces of about a block, and whether a piece ends where it need not be a token boundary."""
    held = ""
    for part in parts:
        for start in range(0, len(part), _BLOCK):
            held += part[start : start + _BLOCK]
            if len(held) < _BLOCK:
                continue
            cut = _last_cut(held)
            if cut:
                yield held[:cut], False
                held = held[cut:]
            elif len(held) >= _MOST_HELD:
                yield held, True
                held = ""
    if held:
        yield held, False


def _last_cut(text: str) -> int:
    """The last safe place to cut; 0 where there is none. Looks back in steps, so that a hit near the end is cheap."""
    reach = 1 << 12
    while True:
        start = max(0, len(text) - reach)
        for pattern in (_CUT, _CUT_IN_LINE):
            last = 0
            for match in pattern.finditer(text, start):
                last = match.end()
            if last:
                return last
        if start == 0:
            return 0
        reach *= 16


def _decoded(stream: Readable, told: Counted) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    waiting = b""
    while True:
        block = stream.read(_BLOCK)
        told.bytes += len(block)
        text = decoder.decode(block, final=not block)
        if "\ufffd" in text:
            read = waiting + block  # a U+FFFD that the input itself holds is no replacement
            told.replaced += text.count("\ufffd") - read.count(b"\xef\xbf\xbd")
        waiting = decoder.getstate()[0]  # the start of a character whose end is in the next block
        if text:
            yield text
        if not block:
            return


def _sound(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot hold: they become U+FFFD, as in tiktoken."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# --- reading files ---


def _fast() -> Any:
    try:
        from fastokens import Tokenizer as Fast
    except ImportError as error:
        raise Unsupported("counting needs fastokens: pip install 'thrifty[count]'") from error
    return Fast


def _json(file: Path) -> Any:
    """A tokenizer.json, by fastokens if it reads this one. Truncation and padding of the file are not ours."""
    try:
        backend = _fast().from_file(str(file))
        backend.no_truncation()
        backend.no_padding()
        return backend
    except ValueError:
        pass  # a model or normalizer that it does not have
    try:
        from tokenizers import Tokenizer as Reference
    except ImportError as error:
        raise Unsupported(f"{file} needs the tokenizers library: pip install 'thrifty[count]'") from error
    try:
        reference = Reference.from_file(str(file))
    except Exception as error:  # noqa: BLE001  # the library raises bare Exception
        raise InvalidInput(f"{file}: no tokenizer.json that can be read: {str(error)[:200]}") from error
    reference.no_truncation()
    reference.no_padding()
    return reference


def _tekken(file: Path) -> Any:
    """Mistral's tekken.json: ranks of byte strings and a pattern. fastokens reads ranks from a file, so it is written
    to a temporary one: the default vocabulary less the ids that control tokens take."""
    import tempfile

    try:
        data = orjson.loads(file.read_bytes())
        config = data["config"]
        kept = data["vocab"][: int(config["default_vocab_size"]) - int(config["default_num_special_tokens"])]
        lines = [f"{entry['token_bytes']} {int(entry['rank'])}\n" for entry in kept]
        pattern = str(config["pattern"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{file}: no tekken.json that can be read: {error!r}") from error
    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken", encoding="ascii") as ranks:
        ranks.writelines(lines)
        ranks.flush()
        try:
            return _fast().from_tiktoken(ranks.name, pattern=pattern)
        except ValueError as error:
            raise InvalidInput(f"{file}: no tekken.json that can be read: {str(error)[:200]}") from error
