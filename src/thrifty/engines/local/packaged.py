"""Models that come with Thrifty itself: small ones of the lab, whose folders are package data. Nothing is fetched.

A folder counts as present when it holds a config, weights and the manifest that the recipe wrote when the model passed
its gates. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thrifty import lab
from thrifty.errors import InvalidInput

MANIFEST = "manifest.json"
"""In the folder: `{"files": {name: {"size": bytes, "sha256": hex}}}`."""


@dataclass(frozen=True)
class PackagedModel:
    """A model of the lab: `recipe` is the folder of the repository that trains it."""

    name: str
    kind: str
    licence: str
    about: str
    recipe: str

    @property
    def folder(self) -> Path:
        return Path(lab.__file__).parent / self.name


MODELS: Mapping[str, PackagedModel] = {
    "thinker": PackagedModel(
        name="thinker",
        kind="language model",
        licence="Apache-2.0",
        about="1.6M parameters, 1,024 tokens of context; thinks in <think> about generated problems",
        recipe="recipes/thinker",
    ),
    "thinker-verifier": PackagedModel(
        name="thinker-verifier",
        kind="step verifier",
        licence="Apache-2.0",
        about="the thinker, taught to check its own thinking line by line; a scorer for think-prm, best-of-n and beam",
        recipe="recipes/think_prm",
    ),
}


def path(name: str, verify: bool = False) -> Path:
    """The folder of a packaged model; with `verify` every file's SHA-256 is compared.

    Raises InvalidInput where this installation has no weights of it, or a file is not as the manifest says.
    """
    model = MODELS[name]
    if not present(name):
        raise InvalidInput(
            f"model {name!r} is not in this installation ({model.folder} holds no weights): train it with "
            f"`python {model.recipe}/train.py --out out/{name}` and give --model out/{name}/model"
        )
    for file, told in _manifest(model.folder).items():
        found = model.folder / file
        if not found.is_file() or found.stat().st_size != told["size"]:
            raise InvalidInput(f"model {name!r} is damaged ({file} is missing or cut): install Thrifty again")
        if verify and hashlib.sha256(found.read_bytes()).hexdigest() != told["sha256"]:
            raise InvalidInput(f"model {name!r} is damaged ({file} has another SHA-256): install Thrifty again")
    return model.folder


def present(name: str) -> bool:
    """Whether the folder has all that makes it a model."""
    folder = MODELS[name].folder
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", MANIFEST))


def size(name: str) -> int:
    """Bytes of its files here; 0 where it is absent."""
    folder = MODELS[name].folder
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if present(name) else 0


def write_manifest(folder: Path) -> None:
    """Lists every file of a model's folder, for `path`."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in (MANIFEST, "__init__.py")
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): {"size": int(told["size"]), "sha256": str(told["sha256"])} for name, told in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{folder / MANIFEST} cannot be read: install Thrifty again") from error
