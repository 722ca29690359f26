"""The command line as a user without torch has it: real processes, real files, a real server that misbehaves."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "thrifty"]


def thrifty(*args: object, stdin: str = "", timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "NO_COLOR": "1", **env},
    )


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line on standard error, nothing on standard output, the documented exit code."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_this_venv_has_no_torch() -> None:
    import importlib.util

    if importlib.util.find_spec("torch") is not None:
        pytest.skip("torch is installed here: `make blackbox` runs this in a venv without it")
    refused(thrifty("ask", "hello", "--model", "smollm2"), 2, "torch", "thrifty[local]")


def test_a_model_that_is_asked_for_answers_in_the_place_of_the_plans(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[engines]\nanswer = "scripted:echo"\n')
    own = thrifty("ask", "hello", "--plan", plan, "--no-stream")
    assert own.returncode == 0 and "hello" in own.stdout
    nobody = "openai:m@http://127.0.0.1:9/v1"
    refused(thrifty("ask", "hello", "--plan", plan, "--model", nobody), 4, "127.0.0.1:9")


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "transformers", "aiohttp", "sqlalchemy", "rich", "typer", "pydantic")
    code = f"import sys, thrifty; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", ["ask", "run", "frontier", "tune", "verify", "methods", "plan", "ledger", "models"])
def test_every_verb_has_help(verb: str) -> None:
    result = thrifty(verb, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


def test_ask_answers_and_says_what_it_cost() -> None:
    result = thrifty("ask", "one two three", "--model", "scripted:echo")
    assert result.returncode == 0
    assert result.stdout.strip() == "one two three"
    assert "output" in result.stderr


def test_ask_in_json_with_a_ledger(tmp_path: Path) -> None:
    ledger = tmp_path / "spend.db"
    result = thrifty("ask", "a b", "--model", "scripted:echo", "--json", "--ledger", ledger)
    answer = json.loads(result.stdout)
    assert answer["text"] == "a b"
    summary = json.loads(thrifty("ledger", "summary", ledger, "--json").stdout)
    assert sum(row["spend"].get("output", 0) for row in summary) == answer["spend"]["output"] > 0
    assert thrifty("ledger", "verify", ledger).returncode == 0
    export = tmp_path / "spend.jsonl"
    assert thrifty("ledger", "export", ledger, export).returncode == 0
    assert len(export.read_text().splitlines()) == 1


def test_ledger_verify_tells_an_edit(tmp_path: Path) -> None:
    import sqlite3

    ledger = tmp_path / "spend.db"
    thrifty("ask", "a b", "--model", "scripted:echo", "--ledger", ledger)
    with sqlite3.connect(ledger) as db:
        tables = [name for (name,) in db.execute("select name from sqlite_master where type = 'table'")]
        table = next(t for t in tables if t.startswith("entr"))
        db.execute(f"delete from {table}")
    anchored = thrifty("ledger", "verify", ledger)
    assert anchored.returncode in (0, 5)
    assert "cannot" in (anchored.stdout + anchored.stderr)


def test_a_budget_that_is_too_small_is_refused() -> None:
    refused(thrifty("ask", "one two three", "--model", "scripted:echo", "-b", "input=0"), 3, "input")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["ask", " ", "--model", "scripted:echo"], "empty prompt"),
        (["ask", "x", "--model", "scriptd:echo"], "scripted"),
        (["ask", "x", "--model", "scripted:echo", "-b", "outptu=3"], "output"),
        (["ask", "x", "--model", "scripted:echo", "-b", "output=-3"], "output"),
        (["ask", "x", "--model", "scripted:echo", "-b", "output=1e99"], "output"),
        (["ask", "x", "--model", "scripted:echo", "-b", "output"], "NAME=NUMBER"),
        (["ask", "x", "--model", "scripted:echo", "--plan", "no-such-file.toml"], "no-such-file.toml"),
        (["methods", "show", "chain-of-darft"], "chain-of-draft"),
    ],
)
def test_bad_input_is_one_clear_line(args: list[str], word: str) -> None:
    refused(thrifty(*args), 2, word)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('name = "x"\n[[methods]]\nuse = "fixed-kk"\n', ["fixed-k"]),
        ('name = "x"\n[[methods]]\nuse = "fixed-k"\nkk = 2\n', ["'k'"]),
        ('name = "x"\n[[methods]]\nuse = "fixed-k"\nk = -2\n', ["fixed-k", "k = -2"]),
        ('name = "x\n', ["not TOML", "line 1"]),
        ('name = "x"\nbudgets = 3\n', ["budget"]),
        ('name = "x"\n[[methods]]\nuse = "fixed-k"\n[[methods]]\nuse = "chain-of-draft"\n', ["below", "order"]),
    ],
)
def test_plan_check_refuses(tmp_path: Path, toml: str, words: list[str]) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(toml)
    refused(thrifty("plan", "check", path), 2, str(path), *words)


def test_plan_check_names_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('[[methods]]\nuse = "chain-of-draft"\n[[methods]]\nuse = "fixed-k"\nk = 3\n')
    result = thrifty("plan", "check", path, "--json")
    assert json.loads(result.stdout)["methods"] == ["chain-of-draft", "fixed-k"]


def test_run_resumes(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": f"r{i}", "prompt": f"say {i}"}) + "\n" for i in range(20)))
    first = json.loads(thrifty("run", source, "-o", out, "--model", "scripted:echo", "--json").stdout)
    assert (first["done"], first["resumed"]) == (20, 0)
    torn = out.read_text().splitlines()
    out.write_text("\n".join(torn[:12]) + "\n" + torn[12][:30])
    second = json.loads(thrifty("run", source, "-o", out, "--model", "scripted:echo", "--json").stdout)
    assert (second["done"], second["resumed"]) == (20, 12)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == sorted(f"r{i}" for i in range(20))


def test_run_stops_at_its_budget_and_goes_on_later(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(10)))
    limited = thrifty("run", source, "-o", out, "--model", "scripted:echo", "--json", "-b", "calls=4")
    assert limited.returncode == 3
    assert json.loads(limited.stdout)["refused"] == 6
    rest = json.loads(thrifty("run", source, "-o", out, "--model", "scripted:echo", "--json").stdout)
    assert (rest["resumed"], rest["refused"]) == (4, 0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", ["in.jsonl:2", "JSON"]),
        ("[1]", ["in.jsonl:2", "object"]),
        ('{"prompt": ""}', ["in.jsonl:2", "empty prompt"]),
        ('{"prompt": "a", "messages": []}', ["in.jsonl:2", "either"]),
        ('{"prompt": "a", "max_tokens": -1}', ["in.jsonl:2", "max_tokens"]),
    ],
)
def test_run_names_file_and_line(tmp_path: Path, line: str, words: list[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "fine"}\n' + line + "\n")
    refused(thrifty("run", source, "-o", tmp_path / "out.jsonl", "--model", "scripted:echo"), 2, *words)


class _Misbehaving(http.server.BaseHTTPRequestHandler):
    mode = "html"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.mode == "hang":
            time.sleep(30)
            return
        body = b"<html>welcome</html>"
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Misbehaving)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def test_a_server_that_is_down() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    result = thrifty("ask", "x", "--model", f"openai:m@http://127.0.0.1:{port}/v1", THRIFTY_API_KEY="sk-secret")
    refused(result, 4, f"127.0.0.1:{port}")
    assert "sk-secret" not in result.stderr


def test_a_server_that_answers_html(server: http.server.ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    refused(thrifty("ask", "x", "--model", f"openai:m@{url}", "--no-stream"), 4, "HTML")


def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path, server: http.server.ThreadingHTTPServer) -> None:
    server.RequestHandlerClass = type("_Hanging", (_Misbehaving,), {"mode": "hang"})
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    process = subprocess.Popen(
        [*COMMAND, "run", str(source), "-o", str(out), "--model", f"openai:m@{url}"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(200):  # until it is under way: the output is made when the first request is
        if out.exists():
            break
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "run the same command again" in stderr
