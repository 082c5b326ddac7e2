"""Process 1 of a sandbox: runs programs there, holds them to their limits, tells the host what came of it.

It is sent to the sandbox as code and sees Python's standard library alone, so it imports nothing of ours.
Requests and replies go through file descriptor 0, a socket that no program inherits. As process 1 it
cannot be killed from inside, and when it ends the kernel kills everything else there.
Next: sandbox_child.py.
"""

import base64
import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

RunSource = Callable[[str, dict[str, Any] | None], int]
TICK_S = 0.05
"""How often memory, CPU time and disk of a running program are looked at."""
BYTES_PER_FILE = 4096
"""Every file counts at least this much of the disk limit, also an empty one."""
WORK = "/w"
_NOTIFY_RECEIVE, _NOTIFY_SEND = 0xC0502100, 0xC0182101
_NOTIFICATION, _NOTIFICATION_ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_EPERM = 1


def serve(filter: bytes, seccomp_number: int, paths: list[str], preload: str, run_source: RunSource) -> None:
    """Answer requests until the host closes the socket; run_source is what a forked process does with source."""
    sys.path += paths
    exec(preload, {})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should the machine run out of memory, this goes first
    listener = _forbid(filter, seccomp_number)
    _send({"ready": True})
    while True:
        request = _receive()
        try:
            if request["do"] == "run":
                _run(request, listener, run_source)
            else:
                {"read": _read, "write": _write}[request["do"]](request)
        except OSError as error:
            _send({"error": f"{type(error).__name__}: {error}"})


def _forbid(filter: bytes, seccomp_number: int) -> int:
    """Load the system call filter; forbidden calls then wait for an answer on the returned descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(filter, len(filter))
    program = struct.pack("=HxxxxxxQ", len(filter) // 8, ctypes.addressof(buffer))
    set_filter, new_listener = 1, 8
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody reads this process's memory
    listener = libc.syscall(seccomp_number, set_filter, new_listener, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses the system call filter")
    return int(listener)


# ---- the host's side of the talk ----


def _receive() -> Any:
    size = int.from_bytes(_exactly(4))
    return json.loads(_exactly(size))


def _exactly(size: int) -> bytes:
    pieces = []
    while size:
        piece = os.read(0, min(size, 1 << 20))
        if not piece:
            os._exit(0)  # the host is gone, or done with this sandbox
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _send(header: dict[str, Any], *payloads: bytes) -> None:
    text = json.dumps(header | {"sizes": [len(p) for p in payloads]}).encode()
    message = memoryview(b"".join([len(text).to_bytes(4), text, *payloads]))
    while message:
        message = message[os.write(0, message) :]


# ---- files ----


def _inside(path: str) -> str:
    """The absolute path of a file in the working directory; PermissionError if it lies elsewhere."""
    full = "" if "\0" in path else os.path.realpath(os.path.join(WORK, path))
    if not full.startswith(f"{WORK}/"):
        raise PermissionError(f"{path!r} leads out of the working directory")
    return full


def _write(request: dict[str, Any]) -> None:
    _put(request["path"], base64.b64decode(request["content"]))
    _send({})


def _put(path: str, content: bytes) -> None:
    full = _inside(path)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    # What a program left there may be a FIFO, which would keep us waiting.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_NOFOLLOW
    with open(os.open(full, flags, 0o600), "wb") as file:
        file.write(content)


def _read(request: dict[str, Any]) -> None:
    # Whatever lies there may be a FIFO or grow while it is read.
    descriptor = os.open(_inside(request["path"]), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        content = file.read(request["limit"] + 1)
    if len(content) > request["limit"]:
        raise PermissionError(f"{request['path']!r} has more than {request['limit']} bytes")
    _send({}, content)


# ---- programs ----


def _run(request: dict[str, Any], listener: int, run_source: RunSource) -> None:
    """Run one program and report. The nonce is read when the program has been forked, so it cannot know it."""
    try:
        for path, content in request["files"].items():
            _put(path, base64.b64decode(content))
        run = _Program(request, listener, run_source)
    finally:
        nonce = _receive()["nonce"]
    run.supervise()
    exits = _kill_everything()
    run.drain()
    header, payloads = run.report(exits[run.pid])
    _send(header | {"nonce": nonce}, *payloads)


class _Program:
    """A running program: its process, its pipes, what it has used."""

    def __init__(self, request: dict[str, Any], listener: int, run_source: RunSource) -> None:
        self._limits, self._listener = request["limits"], listener
        self._stdin = memoryview(base64.b64decode(request["stdin"]))
        self._began = time.monotonic()
        self._cpu_before = _cpu_of_the_dead()
        self._stopped = ""
        self._denied: dict[int, int] = {}
        inner_in, self._in = os.pipe()
        pipes = [os.pipe() for _ in range(3)]
        self._out = [reading for reading, _ in pipes]
        self._taken: dict[int, bytearray] = {reading: bytearray() for reading in self._out}
        self.pid = os.fork()
        if self.pid == 0:
            _become(request, run_source, inner_in, *(writing for _, writing in pipes))
        for descriptor in (inner_in, *(writing for _, writing in pipes)):
            os.close(descriptor)
        for descriptor in (self._in, *self._out):
            os.set_blocking(descriptor, False)
        self._exit = os.pidfd_open(self.pid)

    def supervise(self) -> None:
        """Move bytes and watch the limits until the program's first process has ended."""
        poller = select.poll()
        for descriptor in (*self._out, self._listener, self._exit, 0):
            poller.register(descriptor, select.POLLIN)
        poller.register(self._in, select.POLLOUT)
        next_look = self._began + TICK_S
        while not self._stopped:
            for descriptor, _ in poller.poll(TICK_S * 1000):
                if descriptor == self._exit:
                    return
                if descriptor == 0:
                    os._exit(0)  # the host says nothing while a program runs: it has gone away
                if descriptor == self._listener:
                    self._deny()
                elif not (self._feed() if descriptor == self._in else self._take(descriptor)):
                    poller.unregister(descriptor)
            now = time.monotonic()
            if now >= next_look:
                self._look(now)
                next_look = now + TICK_S

    def drain(self) -> None:
        """Take what is left in the pipes: every writer is dead."""
        for descriptor in self._out:
            while len(self._taken[descriptor]) <= self._limits["output_bytes"] and self._take(descriptor):
                pass
        for descriptor in (self._in, *self._out, self._exit):
            if descriptor >= 0:
                os.close(descriptor)

    def report(self, wait_status: int) -> tuple[dict[str, Any], list[bytes]]:
        """What became of it: header and stdout, stderr, value."""
        limit = self._limits["output_bytes"]
        over = any(len(taken) > limit for taken in self._taken.values())
        header = {
            "stopped": self._stopped or ("output" if over else ""),
            "wait": wait_status,
            "seconds": time.monotonic() - self._began,
            "cpu_s": _cpu_of_the_dead() - self._cpu_before,
            "denied": self._denied,
            "files": _is_used(WORK),
        }
        return header, [bytes(taken[:limit]) for taken in self._taken.values()]

    def _feed(self) -> bool:
        """Write to the program's stdin; False when all is written or nobody reads."""
        try:
            if self._stdin:
                self._stdin = self._stdin[os.write(self._in, self._stdin[:65536]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            self._stdin = self._stdin[:0]
        if self._stdin:
            return True
        os.close(self._in)
        self._in = -1
        return False

    def _take(self, descriptor: int) -> bool:
        """Read from a pipe; False when it is empty and nobody can write to it."""
        try:
            piece = os.read(descriptor, 65536)
        except BlockingIOError:
            return True
        self._taken[descriptor] += piece
        if len(self._taken[descriptor]) > self._limits["output_bytes"]:
            self._stopped = self._stopped or "output"
        return bool(piece)

    def _deny(self) -> None:
        """Answer one forbidden system call."""
        buffer = bytearray(_NOTIFICATION.size)
        with contextlib.suppress(OSError):  # the caller was killed meanwhile
            fcntl.ioctl(self._listener, _NOTIFY_RECEIVE, buffer)
            id, _, _, number, *_ = _NOTIFICATION.unpack(buffer)
            self._denied[number] = self._denied.get(number, 0) + 1
            fcntl.ioctl(self._listener, _NOTIFY_SEND, _NOTIFICATION_ANSWER.pack(id, 0, -_EPERM, 0))

    def _look(self, now: float) -> None:
        """Stop the program if it is over a limit that no rlimit holds."""
        cpu, resident = _usage_of_the_living()
        disk = os.statvfs(WORK)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        files = disk.f_files - disk.f_ffree
        cpu += _cpu_of_the_dead() - self._cpu_before
        if now - self._began > self._limits["wall_s"] or cpu > self._limits["cpu_s"]:
            self._stopped = "timeout"
        elif resident > self._limits["memory_bytes"]:
            self._stopped = "memory"
        elif max(used, files * BYTES_PER_FILE) > self._limits["disk_bytes"]:
            self._stopped = "disk"


def _is_used(folder: str) -> bool:
    """Whether a folder holds anything, or can no longer be read."""
    try:
        return bool(os.listdir(folder))
    except OSError:
        return True


def _kill_everything() -> dict[int, int]:
    """Kill every process but this one, even those that fork meanwhile; process id -> wait status."""
    exits = {}
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            while True:
                pid, status = os.waitpid(-1, 0)
                exits[pid] = status
        except ChildProcessError:
            return exits


def _cpu_of_the_dead() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _usage_of_the_living() -> tuple[float, int]:
    """CPU seconds and resident bytes of all processes but this one."""
    ticks = pages = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                ticks += sum(map(int, fields[11:15]))
                pages += int(fields[21])
    return ticks / os.sysconf("SC_CLK_TCK"), pages * resource.getpagesize()


# ---- the program's own process ----


def _become(request: dict[str, Any], run_source: RunSource, *descriptors: int) -> None:
    """Turn a fresh fork into the program: pipes in place of everything, limits, then its code. Never returns."""
    code = 1
    try:
        for target, descriptor in enumerate(descriptors):  # stdin, stdout, stderr, report
            os.dup2(descriptor, target)
        os.closerange(len(descriptors), 1024)
        _limit(request["limits"])
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: it may look at itself
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(WORK)
        if request["arguments"]:
            os.close(3)
            os.execve(sys.executable, ["python", "-s", "-S", *request["arguments"]], dict(os.environ))
        code = run_source(request["source"], request["call"])
    finally:
        os._exit(code)


def _limit(limits: dict[str, Any]) -> None:
    cpu = int(limits["cpu_s"]) + 1
    for what, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"] + 1),  # and this sandbox's process 1
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (value, value))
