"""`thrifty count` and `thrifty meter` as people type them, in this process, with a small tokenizer of the tests."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from thrifty.cli.app import app
from thrifty.errors import ThriftyError
from thrifty.meter import tokenizers

pytest.importorskip("fastokens")
TABLE = 'name = "mine"\ndate = "2026-11-25"\n[models."gpt-4o"]\ninput = 2.5\noutput = 10\n'
PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 1024, 1024) + b"\x08\x02\0\0\0"


def run(*words: str, stdin: bytes = b"") -> str:
    done = CliRunner().invoke(app, list(words), input=stdin)
    if isinstance(done.exception, ThriftyError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def as_json(*words: str, stdin: bytes = b"") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json", stdin=stdin))
    return found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where o200k is a file of single bytes: every byte is a token, so that a test can count them."""
    from thrifty.meter import tokenizer_files
    from thrifty.meter.tokenizer_files import Member, TokenizerFile

    monkeypatch.setenv("THRIFTY_HOME", str(tmp_path / "home"))
    ranks = "".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    real = tokenizer_files.FILES["o200k"]
    fake = TokenizerFile(
        "o200k", real.about, real.licence, real.package, (Member("x", "o200k_base.tiktoken", len(ranks), ""),)
    )
    monkeypatch.setattr(tokenizer_files, "FILES", {**tokenizer_files.FILES, "o200k": fake})
    place = tokenizer_files.folder("o200k")
    place.mkdir(parents=True)
    (place / "o200k_base.tiktoken").write_text(ranks)
    tokenizers.load.cache_clear()
    yield tmp_path  # type: ignore[misc]
    tokenizers.load.cache_clear()


def test_files_texts_images_and_a_total(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello é")
    (tmp_path / "b.png").write_bytes(PNG + bytes(5000))
    (tmp_path / "prices.toml").write_text(TABLE)
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.png"), "-"]
    found = as_json("count", *names, "-t", "abc", "--prices", str(tmp_path / "prices.toml"), stdin=b"hi\n")
    assert [(i["kind"], i["tokens"], i["bytes"]) for i in found["items"]] == [
        ("text", 3, 3), ("text", 8, 8), ("image", 765, len(PNG) + 5000), ("text", 3, 3),
    ]  # fmt: skip
    assert found["tokens"] == 3 + 8 + 765 + 3 and found["exact"]
    assert found["usd"] == pytest.approx(779 * 2.5e-6) and found["price_table"] == "mine 2026-11-25"
    told = run("count", *names[:2], "--prices", str(tmp_path / "prices.toml"))
    assert "total" in told and "773" in told and "mine 2026-11-25" in told


def test_a_chat_with_tools_and_an_image(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    content = [{"type": "text", "text": "wet?"}, {"type": "image_url", "image_url": {"url": url}}]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {}}}}
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": content}], "tools": [tool]}))
    (item,) = as_json("count", "--chat", str(file))["items"]
    assert item["parts"] == {"text": 4, "visual": 765, "tools": 12 + 7 + 3, "overhead": 3 + 3 + 4}
    assert item["tokens"] == sum(item["parts"].values()) and item["approximate"]
    for broken in ("{", '"text"', '{"messages": []}'):
        file.write_text(broken)
        with pytest.raises(ThriftyError, match=r"chat\.json"):
            run("count", "--chat", str(file))


def test_a_large_file_is_counted_in_parts(tmp_path: Path) -> None:
    import tracemalloc

    line = b"a line of words, and nothing else to see here\n"
    (tmp_path / "big.txt").write_bytes(line * (12_000_000 // len(line)))
    tracemalloc.start()
    found = as_json("count", str(tmp_path / "big.txt"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["tokens"] == found["items"][0]["bytes"] == line.__len__() * (12_000_000 // len(line))
    assert peak < 40_000_000  # not the 12 MB of text and its ids at once, but a few blocks of them


def test_bad_bytes_are_said_and_binaries_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"caf\xe9 au lait")
    found = as_json("count", str(file))
    assert found["tokens"] == 14 and "1 invalid UTF-8" in found["notes"][0]
    for raw in (b"\x7fELF\x02\0\0", bytes(range(128, 256)), b"\xff\xfea\0"):
        file.write_bytes(raw)
        with pytest.raises(ThriftyError, match="x: (a binary file|UTF-16)"):
            run("count", str(file))
    file.write_bytes(b"")
    assert as_json("count", str(file))["tokens"] == 0


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    for words, told in (
        ((), "nothing to count"),
        ((str(tmp_path),), "is a folder"),
        ((str(tmp_path / "none"),), "cannot be read"),
        (("-t", "x", "-m", "phi-4"), "no tokenizer is known"),
        (("-t", "x", "-m", "qwen3-8b"), "thrifty count --get qwen3"),
        (("-t", "x", "--detail", "hgih"), "--detail hgih"),
        (("--get", "qwen"), "did you mean 'qwen3'"),
    ):
        with pytest.raises(ThriftyError, match=told):
            run("count", *words)


def test_an_estimate_is_marked() -> None:
    found = as_json("count", "-t", "x" * 33, "-m", "qwen3-8b", "--estimate")
    assert (found["tokens"], found["exact"]) == (10, False) and "--get qwen3" in found["notes"][0]
    assert as_json("count", "-t", "x" * 33, "--estimate")["exact"]  # it is here: nothing is estimated
    assert "~10" in run("count", "-t", "x" * 33, "-m", "phi-4", "--estimate")


def test_the_list() -> None:
    rows = {row["name"]: row["here"] for row in json.loads(run("count", "--list", "--json"))}
    assert rows["o200k"] is True and rows["gemma3"] is False and len(rows) == 8


def test_counting_opens_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert as_json("count", "-t", "abc")["tokens"] == 3


def test_premium(tmp_path: Path) -> None:
    (tmp_path / "en").write_text("dog\ncat\n")
    (tmp_path / "ru").write_text("пес\nкот\n")
    found = as_json("meter", "premium", f"en={tmp_path / 'en'}", f"ru={tmp_path / 'ru'}")
    assert [(r["language"], r["tokens"], r["premium"]) for r in found["languages"]] == [("en", 6, 1.0), ("ru", 12, 2.0)]
    assert "2.00" in run("meter", "premium", f"en={tmp_path / 'en'}", f"ru={tmp_path / 'ru'}")
    (tmp_path / "ru").write_text("пес\n")
    with pytest.raises(ThriftyError, match="as many segments"):
        run("meter", "premium", f"en={tmp_path / 'en'}", f"ru={tmp_path / 'ru'}")
    with pytest.raises(ThriftyError, match="LANGUAGE=FILE"):
        run("meter", "premium", "en")


def test_profile_and_agents(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    def line(phase: str, got: int, made: int) -> str:
        usage = {"prompt_tokens": got, "completion_tokens": made}
        return json.dumps({"model": "gpt-4o", "usage": usage, "task": "t", "run": 1, "phase": phase, "success": True})

    log.write_text("\n".join([line("Coding", 60, 20), "broken", line("CodeReview", 15, 5), line("Coding", 50, 50)]))
    found = as_json("meter", "profile", str(log), "--chatdev", "--cap", "coding=1")
    assert {s["stage"]: s["tokens"] for s in found["stages"]} == {"coding": 180, "code review": 20}
    assert found["caps"] == [{"stage": "coding", "rounds": 1, "saved": 100, "runs": 1}]
    assert (found["skipped"], found["why"]) == (1, ["line 2: not JSON"])
    assert "100 tokens less (50.0%)" in run("meter", "profile", str(log), "--chatdev", "--cap", "coding=1")
    with pytest.raises(ThriftyError, match="STAGE=ROUNDS"):
        run("meter", "profile", str(log), "--cap", "coding=x")
    (tmp_path / "prices.toml").write_text(TABLE)
    found = as_json("meter", "agents", str(log), "--prices", str(tmp_path / "prices.toml"))
    assert found["total"]["tokens"] == 200 and found["runs"] == 1
    assert sum(found["usd"].values()) == pytest.approx(125 * 2.5e-6 + 75 * 1e-5)
    assert "not in this log" in run("meter", "agents", str(log))


def test_standard_input_is_read_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from thrifty.cli.count import _opened

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with _opened("-") as stream:
        assert stream.read() == b"\xff"
