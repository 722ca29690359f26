"""The sandbox against programs that mean harm. Each attack is run for real; each has a control that shows it works.

Every test runs under tight limits. The fork bomb is only run after `test_processes_are_limited` has shown, with a
handful of forks, that the limit binds for this user.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from thrifty.bench import sandbox
from thrifty.bench.sandbox import Limits, run
from thrifty.errors import InvalidInput

LACKS = asyncio.run(sandbox.missing())
isolated = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
SMALL = Limits(cpu_seconds=3, wall_seconds=8, memory_bytes=256 << 20, processes=6)


async def test_it_isolates_or_says_why() -> None:
    outcome = await run("print('ran')")
    if LACKS is None:
        assert (outcome.status, outcome.stdout, outcome.isolated) == ("passed", "ran\n", True)
    else:
        assert outcome.status == "refused" and outcome.stdout == "" and "\n" not in outcome.reason


@isolated
async def test_a_correct_program_passes() -> None:
    outcome = await run(
        "import sys, json, math, tempfile\n"
        "with open('notes.txt', 'w') as f: f.write('kept for the run')\n"
        "with tempfile.NamedTemporaryFile() as f: f.write(b'x')\n"
        "print(json.dumps([open('notes.txt').read(), math.factorial(10), sys.stdin.read()]))\n"
        "print('to stderr', file=sys.stderr)",
        stdin="ünïcode 輸入",
        limits=SMALL,
    )
    assert outcome.status == "passed" and outcome.exit_code == 0 and 0 < outcome.seconds < 8
    assert json.loads(outcome.stdout) == ["kept for the run", 3628800, "ünïcode 輸入"]
    assert outcome.stderr == "to stderr\n"


@isolated
@pytest.mark.parametrize("source, code", [("raise SystemExit(7)", 7), ("1/0", 1), ("import os; os.abort()", -6)])
async def test_a_program_that_fails_is_failed(source: str, code: int) -> None:
    outcome = await run(source, limits=SMALL)
    assert (outcome.status, outcome.exit_code) == ("failed", code)


@isolated
async def test_processes_are_limited() -> None:
    source = (
        "import os, time\nn = 0\ntry:\n    while n < 20:\n        if os.fork() == 0:\n"
        "            time.sleep(2); os._exit(0)\n        n += 1\nexcept BlockingIOError:\n    pass\nprint(n)"
    )
    outcome = await run(source, limits=Limits(processes=4, cpu_seconds=2, wall_seconds=6))
    assert outcome.stdout == "3\n"  # and the program itself is the fourth


@isolated
async def test_a_fork_bomb_ends_and_leaves_nothing() -> None:
    await test_processes_are_limited()
    mark = f"bomb-{uuid.uuid4().hex}"
    source = (
        f"mark = {mark!r}\nimport ctypes, os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "ctypes.CDLL(None).prctl(15, mark[:15].encode(), 0, 0, 0)\n"  # a name to look for outside
        "while True:\n    try: os.fork(); os.setsid()\n    except OSError: pass"
    )
    outcome = await run(source, limits=Limits(processes=6, cpu_seconds=2, wall_seconds=1.5))
    assert outcome.status == "timeout"
    assert not _alive(mark[:15])


@isolated
async def test_a_daemon_of_a_double_fork_dies_with_the_run() -> None:
    mark = f"d-{uuid.uuid4().hex}"[:15]
    source = (
        "import ctypes, os, signal, sys, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        for s in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"
        f"        ctypes.CDLL(None).prctl(15, {mark.encode()!r}, 0, 0, 0)\n"
        "        open('up', 'w').close()\n        time.sleep(600)\n    os._exit(0)\n"
        "while not os.path.exists('up'): time.sleep(0.01)\nprint('daemon is up')\n{wait}"
    )
    task = asyncio.create_task(run(source.replace("{wait}", "time.sleep(1)"), limits=SMALL))
    while not _alive(mark):  # the control: it can be seen from outside while it lives
        assert not task.done(), task.result()
        await asyncio.sleep(0.01)
    outcome = await task
    assert (outcome.status, outcome.stdout) == ("passed", "daemon is up\n")
    assert not _alive(mark)


@isolated
async def test_an_allocation_of_10_gb_fails() -> None:
    outcome = await run("b = bytearray(10 << 30)\nprint(len(b))", limits=SMALL)
    assert outcome.status == "memory" and outcome.stdout == ""
    assert (await run("b = bytearray(100 << 20)\nprint(len(b))", limits=SMALL)).stdout == f"{100 << 20}\n"


@isolated
@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import time\ntime.sleep(100)",
    ],
    ids=["busy", "busy, signal ignored", "asleep"],
)
async def test_an_endless_loop_times_out(source: str) -> None:
    outcome = await run(source, limits=Limits(cpu_seconds=1, wall_seconds=5))
    assert outcome.status == "timeout" and outcome.seconds <= 6


@isolated
async def test_secrets_of_the_parent_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THRIFTY_TEST_SECRET", "env-secret")
    secret = tmp_path / "secret"
    secret.write_text("file-secret")
    secret.chmod(0o600)
    public = Path(tempfile.mkdtemp()) / "public"
    public.parent.chmod(0o755)
    public.write_text("public-file")  # readable by all outside, and still not shown inside
    paths = [str(secret), str(public), "/etc/shadow", "/etc/passwd", str(Path.home()), __file__, "/proc/1/environ",
             f"/proc/{os.getpid()}/environ", "/proc/self/environ"]  # fmt: skip
    source = (
        "import os, json\nout = [dict(os.environ)]\n"
        f"for p in {paths!r}:\n    try:\n"
        "        out.append(open(p, 'rb').read().decode() if not os.path.isdir(p) else os.listdir(p))\n"
        "    except OSError as e: out.append(type(e).__name__)\n"
        "for pid in (os.getppid(), 1):\n    try: out.append(open(f'/proc/{pid}/mem', 'rb').read(1).hex())\n"
        "    except OSError as e: out.append(type(e).__name__)\n"
        "print(json.dumps(out))"
    )
    outcome = await run(source, limits=SMALL)
    public.unlink()
    environment, *read = json.loads(outcome.stdout)
    assert set(environment) == {"HOME", "TMPDIR", "LANG"}
    assert "secret" not in outcome.stdout and "public-file" not in outcome.stdout
    for path, content in zip(paths, read, strict=False):
        if path == str(Path.home()):  # it may be the way to the interpreter, and then shows that and nothing else
            assert content == "FileNotFoundError" or len(content) == 1
        else:
            assert content in ("FileNotFoundError", "PermissionError"), path
    assert {"FileNotFoundError"} == set(read[-2:])


@isolated
async def test_nothing_outside_the_folder_can_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    base = os.path.realpath(sys.base_prefix)
    paths = [f"{tmp_path}/x", "/x", "/etc/x", "/usr/x", "/usr/bin/x", "/dev/x", "/old/x", f"{base}/x", "../x"]
    source = (
        "import json, os\nout = {}\n"
        f"for p in {paths!r}:\n    try: open(p, 'w').write('x'); out[p] = 'written'\n"
        "    except OSError as e: out[p] = type(e).__name__\n"
        "open('inside', 'w').write('x'); out['inside'] = os.path.getsize('inside')\nprint(json.dumps(out))"
    )
    outcome = await run(source, limits=SMALL)
    written = json.loads(outcome.stdout)
    assert written.pop("inside") == 1
    assert "written" not in written.values(), written
    assert not any(Path(path).exists() for path in paths[:-1])


@isolated
async def test_the_folder_is_bounded_and_gone_afterwards() -> None:
    before = set(Path(tempfile.gettempdir()).glob("thrifty-sandbox-*"))
    source = (
        "total = 0\ntry:\n    for i in range(100):\n"
        "        with open(f'f{i}', 'wb') as f: total += f.write(b'x' * (1 << 20))\n"
        "except OSError as e: print(e.errno)\n"
        "print(total <= 4 << 20)\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import os; [os.unlink(f) for f in os.listdir('.')]\n"
        "try: open('big', 'wb').write(b'x' * (3 << 20)); print(os.path.getsize('big') <= 2 << 20)\n"
        "except OSError as e: print(e.errno)"
    )
    outcome = await run(source, limits=Limits(disk_bytes=4 << 20, file_bytes=2 << 20))
    assert outcome.status == "passed" and outcome.stdout.splitlines()[:2] == ["28", "True"]  # ENOSPC
    assert outcome.stdout.splitlines()[2] in ("True", "27")  # EFBIG
    assert set(Path(tempfile.gettempdir()).glob("thrifty-sandbox-*")) <= before


@isolated
async def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = (
            "import socket\n"
            f"for host in ('127.0.0.1', '192.0.2.1'):\n"
            f"    try: socket.create_connection((host, {port}), timeout=2); print('connected')\n"
            "    except OSError as e: print(type(e).__name__)"
        )
        control = subprocess.run([sys.executable, "-c", source.replace(", '192.0.2.1'", ",")],
                                 capture_output=True, text=True, check=True)  # fmt: skip
        assert control.stdout == "connected\n"
        server.accept()[0].close()
        outcome = await run(source, limits=SMALL)
        assert outcome.status == "passed" and "connected" not in outcome.stdout
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@isolated
async def test_a_flood_of_output_is_bounded() -> None:
    source = (
        "import sys\nprint('first line')\nfor _ in range(400): sys.stdout.write('x' * 100_000)\nprint('last line')\n"
        "sys.stderr.write('e' * 1_000_000)"
    )
    outcome = await run(source, limits=SMALL)
    assert outcome.status == "passed"
    assert outcome.stdout.startswith("first line\n") and outcome.stdout.endswith("last line\n")
    assert len(outcome.stdout) < SMALL.output_bytes + 100 and "bytes left out" in outcome.stdout
    assert len(outcome.stderr) < SMALL.output_bytes + 100


@isolated
async def test_no_right_can_be_taken_back() -> None:
    source = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(os.getuid() == 0, libc.mount(b'tmpfs', b'/box', b'tmpfs', 0, None), libc.unshare(0x20000),\n"
        "      libc.umount2(b'/usr', 2))\n"
        "import resource\n"
        "try: resource.setrlimit(resource.RLIMIT_NPROC, (4000, 4000)); print('raised')\n"
        "except ValueError: print('kept')\n"
        "import signal\n"
        "try: os.kill(1, signal.SIGKILL)\nexcept PermissionError: pass\nprint('still here')"
    )
    outcome = await run(source, limits=SMALL)
    assert outcome.status == "passed"
    root, *calls = outcome.stdout.splitlines()[0].split()
    assert (root, calls) == ("False", ["-1", "-1", "-1"])
    assert outcome.stdout.splitlines()[1:] == ["kept", "still here"]


@isolated
async def test_cancelling_ends_the_program() -> None:
    mark = f"c-{uuid.uuid4().hex}"[:15]
    task = asyncio.create_task(
        run(f"import ctypes, time\nctypes.CDLL(None).prctl(15, {mark.encode()!r}, 0, 0, 0)\ntime.sleep(60)")
    )
    while not _alive(mark):
        assert not task.done(), task.result()
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _alive(mark)


@isolated
async def test_readable_folders_can_be_read_and_not_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "data").write_text("shown")
    source = f"print(open({str(tmp_path / 'data')!r}).read())\nopen({str(tmp_path / 'new')!r}, 'w')"
    outcome = await run(source, readable=[tmp_path])
    assert outcome.stdout == "shown\n" and outcome.status == "failed" and not (tmp_path / "new").exists()
    with pytest.raises(InvalidInput, match="does not exist"):
        await run("", readable=[tmp_path / "absent"])


@pytest.mark.parametrize("bad", [{"processes": 0}, {"memory_bytes": 5}, {"wall_seconds": 0}, {"cpu_seconds": 1.5},
                                 {"open_files": True}, {"wall_seconds": float("nan")}])  # fmt: skip
def test_absurd_limits_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(bad))):
        Limits(**bad)  # type: ignore[arg-type]


async def test_a_huge_program_is_refused() -> None:
    with pytest.raises(InvalidInput, match="characters"):
        await run("#" * (sandbox.MAX_SOURCE + 1))


# Machines of another kind, made by taking rights away from a process that then starts the tests' programs.

_PRELUDE = """
import asyncio, ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
sys.excepthook = lambda kind, error, trace: sys.stderr.write(f"cannot make the machine: {error}")
def check(done, what):
    if done: raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
"""

_NO_NAMESPACES = (
    _PRELUDE
    + """
uid, gid = os.geteuid(), os.getegid()
check(libc.unshare(0x10000000), "unshare")
for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
    open(f"/proc/self/{name}", "w").write(text)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # an ordinary user's exec drops the rights
"""
)

_ORDINARY_USER = (
    _PRELUDE
    + """
base, room, *rest = sys.argv[1:]
check(libc.unshare(0x20000), "unshare")
check(libc.mount(b"none", b"/", None, 0x44000, None), "private")
check(libc.mount(base.encode(), room.encode(), None, 0x5000, None), "bind")
os.setgroups([]); os.setresgid(54321, 54321, 54321); os.setresuid(54321, 54321, 54321)
python = os.path.join(room, os.path.relpath(os.path.realpath(sys.executable), base))
os.execve(python, [python, *rest], {"PYTHONPATH": os.environ["PYTHONPATH"], "HOME": "/"})
"""
)

_SCENARIOS = """
import asyncio, json, os, sys
from thrifty.bench.sandbox import Limits, run
async def main():
    limits = Limits(cpu_seconds=2, wall_seconds=4, memory_bytes=256 << 20, processes=4)
    programs = json.loads(sys.argv[1])
    unsafe = sys.argv[2] == "unsafe"
    out = {}
    for name, source in programs.items():
        o = await run(source, limits=limits, unsafe=unsafe)
        out[name] = [o.status, o.stdout, o.reason, o.isolated]
    print(json.dumps(out))
asyncio.run(main())
"""


def _elsewhere(machine: list[str], programs: dict[str, str], unsafe: bool = False) -> dict[str, list[object]]:
    source = os.pathsep.join([str(Path(sandbox.__file__).parents[2]), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [sys.executable, "-c", *machine, "-c", _SCENARIOS, json.dumps(programs), "unsafe" if unsafe else "safe"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    if done.stderr.startswith("cannot make the machine"):
        pytest.skip(done.stderr[:200])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.skipif(sys.platform != "linux", reason="makes a Linux machine without namespaces")
def test_without_namespaces_it_refuses_in_one_line_and_runs_only_with_unsafe() -> None:
    mark = f"u-{uuid.uuid4().hex}"[:15]
    daemon = (
        "import ctypes, os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        ctypes.CDLL(None).prctl(15, {mark.encode()!r}, 0, 0, 0)\n        time.sleep(60)\n    os._exit(0)\n"
        "os.wait(); print('ok')"
    )
    programs = {
        "plain": "import os; print(sorted(os.environ), os.getcwd() == os.environ['HOME'])",
        "daemon": daemon,
        "sleep": "import time; time.sleep(60)",
        "allocate": "bytearray(10 << 30)",
    }
    refused = _elsewhere([_NO_NAMESPACES], programs)
    for status, stdout, reason, _ in refused.values():
        assert (status, stdout) == ("refused", "")
        assert "user namespaces" in str(reason) and "unsafe" in str(reason) and "\n" not in str(reason)
    ran = _elsewhere([_NO_NAMESPACES], programs, unsafe=True)
    assert [ran[name][0] for name in programs] == ["passed", "passed", "timeout", "memory"]
    assert ran["plain"][1] == "['HOME', 'LANG', 'TMPDIR'] True\n" and ran["plain"][3] is False
    assert not _alive(mark)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become an ordinary user")
def test_it_holds_for_an_ordinary_user_too() -> None:
    room = Path(tempfile.mkdtemp())
    room.chmod(0o755)
    secret = room.parent / f"secret-{uuid.uuid4().hex}"
    secret.write_text("hidden")
    secret.chmod(0o644)
    forks = ("import os, time\nn = 0\ntry:\n    while n < 20:\n        if os.fork() == 0:\n            time.sleep(2); "
             "os._exit(0)\n        n += 1\nexcept BlockingIOError:\n    pass\nprint(n)")  # fmt: skip
    attempt = "try: print({})\nexcept OSError as e: print(type(e).__name__)"
    mount = "libc.mount(b'tmpfs', b'/usr', b'tmpfs', 0, None)"
    programs = {
        "forks": forks,
        "who": "import os; print(os.getuid())",
        "secret": attempt.format(f"open({str(secret)!r}).read()"),
        "write": attempt.format(f"open({str(room / 'x')!r}, 'w')"),
        "root": attempt.format("open('/x', 'w')"),
        "network": "import socket\n" + attempt.format("socket.create_connection(('127.0.0.1', 9), 1)"),
        "rights": f"import ctypes; libc = ctypes.CDLL(None); print({mount}, libc.unshare(0x20000))",
        "allocate": "bytearray(10 << 30)",
        "sleep": "import time; time.sleep(60)",
    }
    try:
        seen = _elsewhere([_ORDINARY_USER, os.path.realpath(sys.base_prefix), str(room)], programs)
    finally:
        secret.unlink()
        room.rmdir()
    if seen["who"][0] == "refused":
        pytest.skip(f"ordinary users have no namespaces here: {seen['who'][2]}")
    assert {name: seen[name][1] for name in list(programs)[:7]} == {
        "forks": "3\n", "who": "54321\n", "secret": "FileNotFoundError\n", "write": "OSError\n", "root": "OSError\n",
        "network": "OSError\n", "rights": "-1 -1\n",
    }  # fmt: skip
    assert (seen["allocate"][0], seen["sleep"][0]) == ("memory", "timeout")


def _alive(name: str) -> bool:
    """Whether any process of this machine carries the (15 character) name."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == name and "Z" not in comm.with_name("stat").read_text().split(")")[1][:3]:
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def test_alive_sees_a_process() -> None:
    with subprocess.Popen(["sleep", "20"]) as process:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{process.pid}/comm").read_text().strip() != "sleep" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _alive("sleep")
        process.kill()
