"""What careless and unlucky people do to the command line: closed pipes, full disks, foreign files, crashes."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "thrifty"]
ECHO = ["--model", "scripted:echo"]


def thrifty(*args: object, shell: str = "", stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    """A run of the command; `shell` is put behind it, such as `| head -1`."""
    words = [*COMMAND, *map(str, args)]
    command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *words] if shell else words
    return subprocess.run(
        command, input=stdin, capture_output=True, timeout=60, env={**os.environ, "NO_COLOR": "1", **env}
    )


def one_line(result: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    told = result.stderr.decode()
    assert (result.returncode, len(told.strip().splitlines())) == (code, 1), told
    assert told.startswith("thrifty: ")
    for word in words:
        assert word in told


def requests(path: Path, count: int, words: int = 1) -> Path:
    path.write_text("".join(json.dumps({"prompt": "word " * words + str(i)}) + "\n" for i in range(count)))
    return path


@pytest.mark.parametrize(
    ("args", "shell"),
    [
        (["methods", "--json"], "| true"),
        (["ask", "hello", *ECHO], "| true"),
        (["ask", "word " * 20_000, "--max-tokens", "20000", *ECHO], "| head -c 20"),
    ],
)
def test_a_reader_that_leaves(args: list[str], shell: str) -> None:
    result = thrifty(*args, shell=shell)
    assert result.returncode == 141
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr


def test_closed_and_full_streams() -> None:
    assert thrifty("ask", "hi", *ECHO, shell=">&-").returncode == 0
    assert thrifty("ask", "hi", *ECHO, shell="2>&-").stdout == b"hi\n"
    one_line(thrifty("ask", "-", *ECHO, shell="<&-"), 2, "empty prompt")
    if os.path.exists("/dev/full"):
        one_line(thrifty("ask", "hi", *ECHO, shell="> /dev/full"), 1, "standard output")


def test_prompts_that_are_no_text() -> None:
    one_line(thrifty("ask", "-", *ECHO, stdin=b"a\xff"), 2, "standard input", "UTF-8")
    result = subprocess.run([*COMMAND, "ask", b"a\xff", *ECHO], capture_output=True, timeout=60)
    one_line(result, 2, "prompt", "UTF-8")
    assert thrifty("ask", "-", *ECHO, stdin="\ufeffhé 漢".encode()).stdout.decode() == "hé 漢\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_letters(encoding: str) -> None:
    asked = thrifty("ask", "hé 漢字", "--json", *ECHO, PYTHONIOENCODING=encoding)
    assert json.loads(asked.stdout)["text"] == "hé 漢字"
    assert thrifty("ask", "hé 漢字", *ECHO, PYTHONIOENCODING=encoding).returncode == 0
    assert thrifty("methods", PYTHONIOENCODING=encoding, COLUMNS="20").returncode == 0


def test_costs_are_lines_that_programs_can_read() -> None:
    told = thrifty("ask", "one two three", "-b", "output=1", *ECHO, COLUMNS="20").stderr.decode().splitlines()
    assert [line.split()[0] for line in told] == ["input", "budget"]


@pytest.mark.parametrize("content", [b"my notes, without a line end", b'{"prompt": "a"}', b'{"a": 1}\n'])
def test_a_foreign_output_is_never_touched(tmp_path: Path, content: bytes) -> None:
    source, out = requests(tmp_path / "in.jsonl", 1), tmp_path / "mine"
    out.write_bytes(content)
    one_line(thrifty("run", source, "-o", out, *ECHO), 2, str(out), "another output")
    assert out.read_bytes() == content


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    source = requests(tmp_path / "in.jsonl", 1)
    os.mkfifo(tmp_path / "pipe")
    places = [tmp_path, source / "below", tmp_path / "pipe", "/dev/full", "/dev/stdout"]
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked" / "out.jsonl")
    for place in places:
        one_line(thrifty("run", source, "-o", place, *ECHO), 2, "another output")


def test_the_requests_are_not_an_output(tmp_path: Path) -> None:
    source = requests(tmp_path / "in.jsonl", 2)
    before = source.read_bytes()
    one_line(thrifty("run", source, "-o", source, *ECHO), 2, "another output")
    assert source.read_bytes() == before


def test_a_full_disk_leaves_whole_lines_and_a_run_that_goes_on(tmp_path: Path) -> None:
    source, out = requests(tmp_path / "in.jsonl", 100, words=100), tmp_path / "out.jsonl"
    words = [*COMMAND, "run", str(source), "-o", str(out), *ECHO]
    full = subprocess.run(["bash", "-c", 'ulimit -f 20; "$@"', "bash", *words], capture_output=True, timeout=60)
    one_line(full, 1, "cannot be written", "run the same command again")
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < len(kept) < 100
    rest = json.loads(thrifty("run", source, "-o", out, "--json", *ECHO).stdout)
    assert (rest["resumed"], rest["done"]) == (len(kept), 100)
    assert len({json.loads(line)["id"] for line in out.read_text().splitlines()}) == 100


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    source, out = requests(tmp_path / "in.jsonl", 200, words=200), tmp_path / "out.jsonl"
    words = [*COMMAND, "run", str(source), "-o", str(out), "-c", "1", *ECHO]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=60)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 2], [0, 0]), told  # the second may start when the first has ended
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert sorted(ids) == sorted(set(ids)) and len(ids) == 200


class Server(http.server.BaseHTTPRequestHandler):
    """The first part of the path says how it misbehaves."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        mode = self.path.split("/")[1]
        if mode == "slow":
            time.sleep(0.2)
        if mode == "hang":
            time.sleep(20)
        if mode == "cut":
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for word in ("one ", "two "):
                piece = json.dumps({"choices": [{"delta": {"content": word}}]})
                self.wfile.write(f"data: {piece}\n\n".encode())
            return
        usage = {"prompt_tokens": -5, "completion_tokens": 10**30} if mode == "lie" else None
        choice = {"message": {"content": "four words of text"}, "finish_reason": "stop"}
        status, body = 200, json.dumps({"choices": [choice], "usage": usage}).encode()
        if mode == "key":
            status, body = 401, b'{"error": {"message": "bad key sk-secret1"}}'
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{made.server_address[1]}"
    made.shutdown()


def test_a_stream_that_is_cut_is_settled_once(tmp_path: Path, address: str) -> None:
    ledger = tmp_path / "spend.db"
    result = thrifty("ask", "hi", "--model", f"openai:m@http://{address}/cut", "--ledger", ledger)
    assert result.stdout == b"one two \n"
    one_line(result, 4, "cut its stream", "spent: input")
    rows = json.loads(thrifty("ledger", "summary", ledger, "--by", "status", "--json").stdout)
    assert [(row["status"], row["entries"]) for row in rows] == [("estimated", 1)]


def test_a_server_that_lies_about_usage(address: str) -> None:
    told = json.loads(thrifty("ask", "hi", "--json", "--model", f"openai:m@http://{address}/lie").stdout)
    assert told["estimated"] is True
    assert 0 < told["spend"]["output"] < 20


def test_secrets_are_never_shown(tmp_path: Path, address: str) -> None:
    refused = thrifty("ask", "hi", "--model", f"openai:m@http://{address}/key", THRIFTY_API_KEY="sk-secret1")
    one_line(refused, 4, "API key", "***")
    assert b"sk-secret1" not in refused.stderr
    for model in (f"http://u:hunter22@{address}/x", f"openai:m@http://u:hunter22@{address}:1:1", "openai:m@u:hunter22"):
        result = thrifty("ask", "hi", "--model", model)
        one_line(result, 2)
        assert b"hunter22" not in result.stderr
    source, out = requests(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    thrifty("run", source, "-o", out, "--model", f"openai:m@http://u:hunter22@{address}/lie")
    assert b"hunter22" not in out.read_bytes()


def test_dollars_are_limited_on_a_server_with_a_price_table(tmp_path: Path, address: str) -> None:
    ask = ["ask", "hi", "--json", "--model", f"openai:m@http://{address}/fine", "-b"]
    one_line(thrifty(*ask, "usd=1"), 2, "--prices")
    prices = tmp_path / "prices.toml"
    prices.write_text("[models.m]\ninput = 1\noutput = 4\n")
    told = json.loads(thrifty(*ask, "usd=1", "--prices", prices).stdout)["spend"]
    assert told["usd"] == told["input"] * 1000 + told["output"] * 4000
    one_line(thrifty(*ask, "usd=0.000001", "--prices", prices), 3, "usd")


def test_kill_9_in_mid_run_is_resumed(tmp_path: Path, address: str) -> None:
    source, out, ledger = requests(tmp_path / "in.jsonl", 30), tmp_path / "out.jsonl", tmp_path / "spend.db"
    job = ["run", str(source), "-o", str(out), "--ledger", str(ledger), "-c", "2"]
    model = ["--model", f"openai:m@http://{address}/slow"]
    process = subprocess.Popen([*COMMAND, *job, *model], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(300):
        if out.exists() and out.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    kept = out.read_bytes().count(b"\n")
    assert 3 <= kept < 30
    rest = json.loads(thrifty(*job, *model, "-c", "16", "--json").stdout)
    assert (rest["done"], rest["resumed"], rest["failed"]) == (30, kept, 0)
    assert thrifty("ledger", "verify", ledger).returncode == 0
    rows = json.loads(thrifty("ledger", "summary", ledger, "--by", "status", "--json").stdout)
    assert sum(row["entries"] for row in rows) >= 30  # and what was in flight when it died


def test_a_run_that_fails_says_why(tmp_path: Path, address: str) -> None:
    source = requests(tmp_path / "in.jsonl", 2)
    result = thrifty("run", source, "-o", tmp_path / "out.jsonl", "--json", "--model", f"openai:m@http://{address}/key")
    assert json.loads(result.stdout)["failed"] == 2
    one_line(result, 4, "request '", "API key")  # whichever of the two came back first


@pytest.mark.parametrize("args", [["ask", "hi", "--model"], ["plan", "check", "PLAN", "--engine"]])
def test_unknown_engines_are_refused_with_the_nearest(tmp_path: Path, args: list[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text("")
    one_line(thrifty(*[str(plan) if a == "PLAN" else a for a in args], "scriptd:echo"), 2, "scripted")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('[[methods]]\nuse = "self-consistency"\n[engines]\nanswer = "nosuch:model"\n', ["engine kind", "local"]),
        ('[[methods]]\nuse = "first-finish-search"\n[[methods]]\nuse = "self-consistency"\n', ["opens branches"]),
        ('[engines]\nanswr = "smollm2"\n', ["answer"]),
        ('on_exceed = "explode"\n', ["degrade", "refuse"]),
        ("methods = 3\n", ["list"]),
        ("[budget]\noutput = -1\n", ["output", "-1"]),
        ("x = " + "[" * 3000, ["TOML"]),
    ],
)
def test_plan_check(tmp_path: Path, toml: str, words: list[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(toml)
    one_line(thrifty("plan", "check", plan), 2, str(plan), *words)
