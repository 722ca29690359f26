"""The process between Thrifty and an untrusted program. Run by `sandbox.py`, never imported by it.

It is started as `python -I -S -B sandbox_child.py FD` with an empty environment, uses the standard library
only, reads one line of JSON from standard input (the order) and writes lines of JSON to the file descriptor
FD (the report), which the program never gets. Standard input stays open for the life of the caller: its end
means "stop".

Isolated, there are three processes: this one outside; the first process of new pid, mount, network, IPC and
host name namespaces, which builds the file system and waits; and the program, which has no capabilities, an
unused user id when we are root, and limits that its children inherit. When the first process of a pid
namespace dies, the kernel kills all others in it, so nothing outlives the run, however often it forked.

Nothing of the program runs unless every step before it succeeded: a step that fails is reported as `refused`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

# From <linux/sched.h>, <sys/mount.h>, <sys/prctl.h>, <linux/mount.h>; the same on every architecture.
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NAMESPACES = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18)  # fmt: skip
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000

BOX = "/box"  # the program's home, working and temporary folder
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """Something that isolation needs is not available here; the message says what."""


def main() -> None:
    control = int(sys.argv[1])
    os.set_inheritable(control, False)
    order: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    try:
        if order["isolate"]:
            uid = _enter_namespaces()
            pid = _fork(lambda: _first_process(order, control, uid), control)
        else:
            if LINUX:
                _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a double fork orphans comes to us, not to the system
            uid = _unused_id() if os.geteuid() == 0 else None
            pid = _fork(lambda: _program(order, control, uid, order["folder"]), control)
        _supervise(pid, order, control)
    except (Missing, OSError) as error:
        _report(control, refused=str(error))


# The outermost process: it keeps the time and ends the run.


def _supervise(pid: int, order: dict[str, Any], control: int) -> None:
    """Wait for `pid`, for the wall clock or for the caller's end, whichever is first; then nothing is left alive."""
    began = time.monotonic()
    pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
    watched = [0] if pidfd < 0 else [0, pidfd]
    while True:
        left = order["wall_seconds"] - (time.monotonic() - began)
        if left <= 0:
            _report(control, timeout="wall")
            break
        ready, _, _ = select.select(watched, [], [], left if pidfd >= 0 else min(left, 0.01))
        if 0 in ready or pidfd in ready:
            break
        if pidfd < 0 and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
    if order["isolate"]:
        os.kill(pid, signal.SIGKILL)  # still ours: it has not been waited for
        os.waitpid(pid, 0)  # returns when every process of the pid namespace is gone
    else:
        _end_descendants(pid, control, began)


def _end_descendants(pid: int, control: int, began: float) -> None:
    """Kill the program's group and all that became ours; report the program's end."""
    until = time.monotonic() + 5.0
    while time.monotonic() < until:
        # The program itself may have ended well: its status was kept by the kernel, and this kill does not change it.
        for victim in _children() or [pid]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(victim, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        try:
            while True:
                ended, status, usage = os.wait4(-1, os.WNOHANG)
                if ended == 0:
                    break
                if ended == pid:
                    _report_end(control, status, usage, began)
        except ChildProcessError:
            return
        time.sleep(0.002)


def _children() -> list[int]:
    """Our children, by the kernel's list (empty where there is none)."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as lines:
            return [int(word) for word in lines.read().split()]
    except OSError:
        return []


# The first process of the namespaces.


def _enter_namespaces() -> int | None:
    """Enter new namespaces; the user id that the program will get, or None where it keeps ours.

    Root makes them directly and later changes to an unused user, because a limit on processes does not bind
    root. Others, and a root without that right, make them inside a new user namespace in which only they
    exist.
    """
    if not LINUX:
        raise Missing(f"namespaces are Linux's; this is {sys.platform}")
    if os.geteuid() == 0:
        uid = _unused_id()
        try:
            _check(_libc.unshare(NAMESPACES), "unshare")
            return uid
        except Missing:
            _become(uid)
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(NEWUSER | NAMESPACES), "unprivileged user namespaces (unshare)")
    for path, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        try:
            with open(f"/proc/self/{path}", "w") as file:
                file.write(text)
        except OSError as error:
            raise Missing(f"user namespaces (writing {path}: {error.strerror})") from error
    return None


def _first_process(order: dict[str, Any], control: int, uid: int | None) -> NoReturn:
    """As process 1: build the file system, start the program, report its end. Leaving ends everything in here."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the outer process killed: we go, and all go with us
    _build_root(order, uid)
    _prctl(PR_SET_DUMPABLE, 0)  # nothing in here may look into us
    began = time.monotonic()
    pid = _fork(lambda: _program(order, control, uid, BOX), control)
    while True:
        ended, status, usage = os.wait4(-1, 0)
        if ended == pid:
            _report_end(control, status, usage, began)
            os._exit(0)


def _build_root(order: dict[str, Any], uid: int | None) -> None:
    """A root of our own: the system's programs and the interpreter to read, one small folder to write."""
    os.umask(0o022)
    root = order["folder"]
    owner = os.geteuid() if uid is None else uid
    group = os.getegid() if uid is None else uid
    _mount(None, "/", None, MS_REC | MS_PRIVATE, None)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=2000,mode=755")
    bound: list[str] = []
    for path in [*SYSTEM, *order["readable"], "/etc/ld.so.cache", *DEVICES]:
        if any(path == b or path.startswith(b + "/") for b in bound) or not os.path.exists(path):
            continue
        _bind(path, root)
        bound.append(path)
    os.mkdir(root + BOX)
    _mount("tmpfs", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV,
           f"size={order['disk_bytes']},nr_inodes=4096,mode=700,uid={owner},gid={group}")  # fmt: skip
    for place in ("/tmp", "/dev/shm"):
        if not os.path.lexists(root + place):  # something readable may lie below it
            os.symlink(BOX, root + place)
    os.chdir(root)
    os.mkdir("old")
    _check(_libc.pivot_root(b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", MNT_DETACH), "umount")
    os.rmdir("/old")
    _mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)


def _bind(path: str, root: str) -> None:
    """Show `path` below `root`, read-only with all mounted under it; a link stays a link."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, MS_BIND | MS_REC, None)
    if path in DEVICES:
        return  # nodev would switch them off; writing /dev/null changes nothing
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    done = _libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, attributes, len(attributes))
    if done == 0:
        return
    if ctypes.get_errno() != errno.ENOSYS:  # kernels before 5.12 have only the flags of the top mount
        _check(done, f"read-only view of {path}")
    noexec = MS_NOEXEC if os.statvfs(target).f_flag & os.ST_NOEXEC else 0
    _mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | noexec, None)


# The program.


def _program(order: dict[str, Any], control: int, uid: int | None, folder: str) -> NoReturn:
    """Give up every right, set the limits, become the program."""
    os.setsid()
    os.umask(0o077)
    if not order["isolate"] and uid is not None:
        os.chown(folder, uid, uid)
    if uid is not None:
        _become(uid)
    os.chdir(folder)
    for name, text in (("main.py", order["source"]), (".stdin", order["stdin"])):
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    stdin = os.open(".stdin", os.O_RDONLY)
    os.unlink(".stdin")
    os.dup2(stdin, 0)
    if LINUX:
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
    python = order["python"]
    if not os.access(python, os.X_OK):
        raise Missing(f"an interpreter that user {os.geteuid()} can run: {python} is closed to others")
    # In a user namespace the two processes above count as this user's; an unused user has none.
    own = 0 if uid is not None else 2
    _limit_processes(order["processes"] + own, probe=order["isolate"])
    cpu = order["cpu_seconds"]
    for name, soft, hard in (
        ("RLIMIT_CPU", cpu, cpu + 1),  # the soft limit's signal can be caught, the hard one's cannot
        ("RLIMIT_AS", order["memory_bytes"], None),
        ("RLIMIT_FSIZE", order["file_bytes"], None),
        ("RLIMIT_NOFILE", order["open_files"], None),
        ("RLIMIT_CORE", 0, None),
        ("RLIMIT_MEMLOCK", 0, None),
        ("RLIMIT_MSGQUEUE", 0, None),
    ):
        if hasattr(resource, name):
            _limit(getattr(resource, name), soft, soft if hard is None else hard, order["isolate"])
    os.closerange(3, control)  # the report's end closes by itself when the program starts
    os.closerange(control + 1, 4096)
    environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    os.execve(python, [python, "-I", "-B", os.path.join(folder, "main.py")], environment)


def _limit(kind: int, soft: int, hard: int, strict: bool) -> None:
    _, most = resource.getrlimit(kind)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (ValueError, OSError):
        if strict:
            raise


def _limit_processes(count: int, probe: bool) -> None:
    """Set the limit on processes, and first see that it binds: with a limit of none, a fork must fail."""
    _limit(resource.RLIMIT_NPROC, 0, count, probe)
    if probe:
        try:
            pid = os.fork()
        except BlockingIOError:
            pid = -1
        if pid == 0:
            os._exit(0)
        if pid > 0:
            os.waitpid(pid, 0)
            raise Missing(f"a limit on processes that binds user {os.geteuid()}: run as an ordinary user")
    _limit(resource.RLIMIT_NPROC, count, count, probe)


# Small parts.


def _fork(body: Callable[[], NoReturn], control: int) -> int:
    """The id of a child that runs `body` and, whatever happens, never returns from it."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
    except BaseException as error:
        _report(control, refused=f"{error}" if isinstance(error, Missing) else f"{type(error).__name__}: {error}")
    finally:
        os._exit(111)


def _become(uid: int) -> None:
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise Missing(f"the right to change to an unused user ({error.strerror})") from error


def _unused_id() -> int:
    """A random user id that nobody has: processes are counted by user, so each run needs its own."""
    most = 65_536
    try:
        with open("/proc/self/uid_map") as lines:
            most = max(int(line.split()[0]) + int(line.split()[2]) for line in lines)
    except OSError:
        pass
    # systemd's table of ids leaves 0x70000000 to 0x7fffffff unused; its dynamic services use 61184 to 65519.
    low, high = (0x70000000, 0x7FFFFFFF) if most > 0x7FFFFFFF else (61_184, 65_519)
    return random.SystemRandom().randint(low, high)


def _report_end(control: int, status: int, usage: resource.struct_rusage, began: float) -> None:
    code = os.waitstatus_to_exitcode(status)
    _report(control, exit=code, cpu=usage.ru_utime + usage.ru_stime, seconds=time.monotonic() - began)


def _report(control: int, **fields: object) -> None:
    os.write(control, json.dumps(fields).encode() + b"\n")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    done = _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    _check(done, f"mount of {target}")


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")


def _check(done: int, what: str) -> None:
    if done != 0:
        raise Missing(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
