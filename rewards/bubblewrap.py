"""The local sandbox: bubblewrap, with a system call filter, from a pool of sandboxes that have started already.

Every program gets a sandbox of its own, unless `uses` says otherwise. A thread keeps a few of them waiting, Python
loaded, so that a small program costs one fork. Needs Linux 5.14 or later with user namespaces, bubblewrap and
libseccomp2; where one is missing nothing runs (SandboxMissing). Next: sandbox_command.py, sandbox_init.py.
"""

import base64
import contextlib
import functools
import json
import marshal
import os
import queue
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from posttrain.rewards import sandbox_child, sandbox_init, seccomp
from posttrain.rewards.sandbox import Limits, Outcome, Program, SandboxMissing, Status
from posttrain.rewards.sandbox_command import PACKAGES, command

START_TIMEOUT_S = 60.0
GRACE_S = 5.0
"""The sandbox enforces its limits itself; this much later the host gives up on it."""
_ATTEMPTS = 2
_HEADER_BYTES = 1 << 16
_BOOT = """
import marshal, os
def exactly(size):
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data)) or os._exit(1)
    return data
init, child, *settings = marshal.loads(exactly(int.from_bytes(exactly(4))))
ours, theirs = {"__name__": "sandbox_init"}, {"__name__": "sandbox_child"}
exec(child, theirs)
exec(init, ours)
ours["serve"](*settings, theirs["run"])
"""


class Bubblewrap:
    """A Sandbox on this machine."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        warm: int = 2,
        uses: int = 1,
        packages: Sequence[str] = (),
        preload: str = "",
    ) -> None:
        """Start the pool; SandboxMissing if this machine cannot isolate code.

        limits: the default, and the largest disk_bytes. warm: sandboxes kept waiting. uses: programs that one
        sandbox runs in turn; it is only used again after one that ended by itself, left no file and tried
        nothing forbidden. packages: installed pure-Python packages that programs may import. preload: our
        source that process 1 runs first, so that programs find its imports loaded.
        """
        self._limits, self._uses = limits or Limits(), uses
        start = command(self._limits, packages, _BOOT)
        self._keeper = _Keeper(start, _boot(preload, packages=bool(packages)), warm=warm)
        test = Program(source="import os; os.waitpid(os.fork() or os._exit(0), 0)")
        outcome = self.run(test, Limits(disk_bytes=self._limits.disk_bytes))
        if outcome.status != "ok":
            self.close()
            raise SandboxMissing(_why(outcome))

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Run a program in a fresh sandbox; a sandbox that dies on its own is replaced once."""
        note = ""
        for _ in range(_ATTEMPTS):
            try:
                session = self._open(limits, fresh=False)
                try:
                    return session.run(program)
                finally:
                    self._keeper.give_back(session.box, uses=self._uses)
            except _Broken as broken:
                note = str(broken)
        return Outcome(status="error", note=note)

    def session(self, limits: Limits | None = None) -> "BubblewrapSession":
        """Open a fresh sandbox for several programs. Raises ChildProcessError if none starts."""
        return self._open(limits, fresh=True)

    def close(self) -> None:
        """End the waiting sandboxes."""
        self._keeper.close()

    def _open(self, limits: Limits | None, *, fresh: bool) -> "BubblewrapSession":
        limits = limits or self._limits
        if limits.disk_bytes > self._limits.disk_bytes:
            raise ValueError(f"disk_bytes={limits.disk_bytes}; this sandbox has {self._limits.disk_bytes}")
        return BubblewrapSession(self._keeper.take(fresh=fresh), limits)


@functools.cache
def shared() -> Bubblewrap:
    """The sandbox of this process; SandboxMissing if there can be none."""
    return Bubblewrap()


class BubblewrapSession:
    """One started sandbox."""

    def __init__(self, box: "_Box", limits: Limits) -> None:
        self.box, self._limits = box, limits

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Run a program. Raises ChildProcessError if the sandbox itself breaks."""
        limits = limits or self._limits
        self.box.clean = False
        nonce = secrets.token_hex(16)
        self.box.send(_request(program, limits))
        self.box.send({"nonce": nonce})
        header, payloads = self.box.receive(limits.wall_s + GRACE_S, 3 * limits.output_bytes)
        if "error" in header:
            raise ValueError(header["error"])
        if header.get("nonce") != nonce or len(payloads) != 3:
            raise _Broken("the sandbox gave a reply that is not its own")
        outcome = _outcome(header, payloads, limits)
        self.box.used(clean=outcome.exit_code is not None and not outcome.denied and not header["files"])
        return outcome

    def write(self, path: str, content: str | bytes) -> None:
        """Write a file of the working directory; ValueError for a path that leads out of it."""
        self.box.send({"do": "write", "path": path, "content": _base64(content)})
        self._reply(0)

    def read(self, path: str) -> bytes:
        """Read a file of the working directory; ValueError if that cannot be."""
        limit = self._limits.output_bytes
        self.box.send({"do": "read", "path": path, "limit": limit})
        return self._reply(limit)[0]

    def close(self) -> None:
        """End the sandbox and everything in it."""
        self.box.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reply(self, limit: int) -> list[bytes]:
        header, payloads = self.box.receive(GRACE_S, limit)
        if "error" in header:
            raise ValueError(header["error"])
        return payloads


class _Broken(ChildProcessError):
    """The sandbox itself failed."""


class _Keeper:
    """A thread that keeps a few sandboxes started. They die when it does, so it lives as long as we."""

    def __init__(self, command: Sequence[str], boot: bytes, *, warm: int) -> None:
        self._command, self._boot = command, boot
        self._again: queue.SimpleQueue[_Box] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Box | OSError] = queue.SimpleQueue()
        self._room = threading.Semaphore(max(1, warm))
        self._closed = False
        self._thread = threading.Thread(target=self._keep, name="sandboxes", daemon=True)
        self._thread.start()

    def take(self, *, fresh: bool) -> "_Box":
        """A started sandbox, which is the caller's to close."""
        if not fresh:
            with contextlib.suppress(queue.Empty):
                return self._again.get_nowait()
        try:
            box = self._ready.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            raise _Broken(f"no sandbox started within {START_TIMEOUT_S:.0f} s") from None
        self._room.release()
        if isinstance(box, OSError):
            raise _Broken(f"no sandbox starts: {box}")
        return box

    def give_back(self, box: "_Box", *, uses: int) -> None:
        """Keep a sandbox for another program if it may be used again; end it otherwise."""
        if box.clean and box.num_used < uses and not self._closed:
            self._again.put(box)
        else:
            box.close()

    def close(self) -> None:
        """End the thread and the sandboxes that wait."""
        self._closed = True
        while not self._again.empty():
            self._again.get().close()
        self._room.release()
        self._thread.join()

    def _keep(self) -> None:
        while True:
            self._room.acquire()
            if self._closed:
                break
            try:
                self._ready.put(_Box(self._command, self._boot))
            except OSError as error:  # no process or descriptor to be had
                self._ready.put(error)
        while not self._ready.empty():  # before the thread ends, or they would be killed instead
            box = self._ready.get()
            if isinstance(box, _Box):
                box.close()


class _Box:
    """A sandbox as a process and a socket to its process 1."""

    def __init__(self, command: Sequence[str], boot: bytes) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._socket.settimeout(START_TIMEOUT_S)
        self._started = False
        self.num_used = 0
        self.clean = False
        with contextlib.suppress(OSError):  # it has died; whoever uses it will see
            self._socket.sendall(len(boot).to_bytes(4) + boot)

    def used(self, *, clean: bool) -> None:
        """Note that a program has run, and whether it left everything as it was."""
        self.num_used += 1
        self.clean = clean

    def send(self, request: Mapping[str, Any]) -> None:
        """Send one request."""
        if not self._started:
            self.receive(START_TIMEOUT_S, 0)
            self._started = True
        data = json.dumps(request).encode()
        try:
            self._socket.sendall(len(data).to_bytes(4) + data)
        except OSError as error:
            raise _Broken(self._last_words(error)) from None

    def receive(self, timeout_s: float, limit: int) -> tuple[dict[str, Any], list[bytes]]:
        """One reply: header and payloads of at most limit bytes together."""
        deadline = time.monotonic() + timeout_s
        try:
            size = int.from_bytes(self._exactly(4, deadline))
            if size > _HEADER_BYTES:
                raise _Broken(f"the sandbox announces a header of {size} bytes")
            header = json.loads(self._exactly(size, deadline))
            if sum(header["sizes"]) > limit:
                raise _Broken(f"the sandbox announces {sum(header['sizes'])} bytes, {limit} are allowed")
            return header, [self._exactly(size, deadline) for size in header["sizes"]]
        except OSError as error:
            raise _Broken(self._last_words(error)) from None

    def close(self) -> None:
        """End it and everything in it."""
        self._socket.close()  # its process 1 then exits, and the kernel kills the rest
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _exactly(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._socket.recv(min(size - len(data), 1 << 16))
            if not piece:
                raise ConnectionError("the sandbox ended")
            data += piece
        return bytes(data)

    def _last_words(self, error: OSError) -> str:
        """What the dying sandbox has printed, or the error."""
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        self._process.poll()
        lines = (self._process.stderr.read(4096) or b"").decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"{error or type(error).__name__}"


def _request(program: Program, limits: Limits) -> dict[str, Any]:
    call = program.call
    return {
        "do": "run",
        "source": program.source,
        "arguments": list(program.arguments),
        "call": call and {"function": call.function, "args": list(call.args), "kwargs": dict(call.kwargs)},
        "stdin": _base64(program.stdin),
        "files": {path: _base64(content) for path, content in program.files.items()},
        "limits": {name: getattr(limits, name) for name in Limits.__slots__},
    }


def _base64(content: str | bytes) -> str:
    data = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    return base64.b64encode(data).decode()


def _outcome(header: Mapping[str, Any], payloads: Sequence[bytes], limits: Limits) -> Outcome:
    stdout, stderr, report = payloads
    said = _said(report)
    code: int | None = os.waitstatus_to_exitcode(header["wait"])
    assert code is not None
    status: Status = "ok"
    note = str(said.get("why", ""))
    if header["stopped"]:
        status = header["stopped"]
    elif code in (-signal.SIGXCPU, -signal.SIGKILL) and header["cpu_s"] >= limits.cpu_s:
        status = "timeout"
    elif code == -signal.SIGXFSZ:
        status = "disk"
    elif code < 0:
        status, note = "killed", signal.Signals(-code).name
    elif code > 0:
        status = "memory" if said.get("exception") == "MemoryError" else "nonzero"
    return Outcome(
        status=status,
        exit_code=code if code >= 0 and not header["stopped"] else None,
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        value=said.get("value"),
        has_value="value" in said,
        seconds=header["seconds"],
        cpu_s=header["cpu_s"],
        denied={seccomp.syscall_name(int(number)): n for number, n in header["denied"].items()},
        note=note,
    )


def _said(report: bytes) -> Mapping[str, Any]:
    """What the program's process says of itself, or nothing if it is not what ours would say."""
    try:
        said = json.loads(report)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _boot(preload: str, *, packages: bool) -> bytes:
    """What process 1 is told to be."""
    code = [
        compile(Path(module.__file__).read_text(), f"{module.__name__}", "exec")
        for module in (sandbox_init, sandbox_child)
        if module.__file__
    ]
    paths = [PACKAGES] if packages else []
    setup = (seccomp.filter_program(), seccomp.syscall_number("seccomp"), paths, preload)
    return marshal.dumps((*code, *setup))


def _why(outcome: Outcome) -> str:
    words = outcome.note or outcome.stderr.strip().rpartition("\n")[2] or outcome.status
    return (
        f"no sandbox: {words}; it needs Linux 5.14 or later and user namespaces (in a container: "
        "allow them, with Docker --security-opt seccomp=unconfined; on Ubuntu the sysctl "
        "kernel.apparmor_restrict_unprivileged_userns=0)"
    )
