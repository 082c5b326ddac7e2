"""The local sandbox: bubblewrap, with a system call filter, from a pool of sandboxes that have started already.

Every program gets a sandbox of its own. A thread keeps a few of them waiting, Python loaded, so that a
small program costs one fork. Needs Linux 5.14 or later with user namespaces, bubblewrap and libseccomp2; where
one is missing nothing runs (SandboxMissing). As root, everything runs as the spare user SPARE_USER.
Next: seccomp.py, sandbox_init.py.
"""

import base64
import contextlib
import functools
import json
import marshal
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from posttrain.rewards import sandbox_child, sandbox_init, seccomp
from posttrain.rewards.sandbox import Limits, Outcome, Program, SandboxMissing, Status

SPARE_USER = 64321
"""Numeric user and group that owns nothing; only used by root."""
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

    def __init__(self, limits: Limits | None = None, *, warm: int = 2) -> None:
        """limits: the default, and the largest disk_bytes; warm: sandboxes kept waiting.

        Raises SandboxMissing if this machine cannot isolate code.
        """
        self._limits = limits or Limits()
        self._keeper = _Keeper(_command(self._limits), warm=warm)
        outcome = self.run(Program(source="import os; os.waitpid(os.fork() or os._exit(0), 0)"))
        if outcome.status != "ok":
            self.close()
            raise SandboxMissing(_why(outcome))

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Run a program in a fresh sandbox; a sandbox that dies on its own is replaced once."""
        note = ""
        for _ in range(_ATTEMPTS):
            try:
                with self.session(limits) as session:
                    return session.run(program)
            except _Broken as broken:
                note = str(broken)
        return Outcome(status="error", note=note)

    def session(self, limits: Limits | None = None) -> "BubblewrapSession":
        """Open a sandbox for several programs."""
        limits = limits or self._limits
        if limits.disk_bytes > self._limits.disk_bytes:
            raise ValueError(f"disk_bytes={limits.disk_bytes}; this sandbox has {self._limits.disk_bytes}")
        return BubblewrapSession(self._keeper.take(), limits)

    def close(self) -> None:
        """End the waiting sandboxes."""
        self._keeper.close()


@functools.cache
def shared() -> Bubblewrap:
    """The sandbox of this process; SandboxMissing if there can be none."""
    return Bubblewrap()


class BubblewrapSession:
    """One started sandbox."""

    def __init__(self, box: "_Box", limits: Limits) -> None:
        self._box, self._limits = box, limits

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Run a program. Raises ChildProcessError if the sandbox itself breaks."""
        limits = limits or self._limits
        nonce = secrets.token_hex(16)
        self._box.send(_request(program, limits))
        self._box.send({"nonce": nonce})
        header, payloads = self._box.receive(limits.wall_s + GRACE_S, 3 * limits.output_bytes)
        if "error" in header:
            raise ValueError(header["error"])
        if header.get("nonce") != nonce or len(payloads) != 3:
            raise _Broken("the sandbox gave a reply that is not its own")
        return _outcome(header, payloads, limits)

    def write(self, path: str, content: str | bytes) -> None:
        """Write a file of the working directory; ValueError for a path that leads out of it."""
        self._box.send({"do": "write", "path": path, "content": _base64(content)})
        self._reply(0)

    def read(self, path: str) -> bytes:
        """Read a file of the working directory; ValueError if that cannot be."""
        limit = self._limits.output_bytes
        self._box.send({"do": "read", "path": path, "limit": limit})
        return self._reply(limit)[0]

    def close(self) -> None:
        """End the sandbox and everything in it."""
        self._box.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reply(self, limit: int) -> list[bytes]:
        header, payloads = self._box.receive(GRACE_S, limit)
        if "error" in header:
            raise ValueError(header["error"])
        return payloads


class _Broken(ChildProcessError):
    """The sandbox itself failed."""


class _Keeper:
    """A thread that keeps a few sandboxes started. They die when it does, so it lives as long as we."""

    def __init__(self, command: Sequence[str], *, warm: int) -> None:
        self._command = command
        self._boot = _boot()
        self._ready: queue.Queue[_Box] = queue.Queue(maxsize=max(1, warm))
        self._closed = False
        self._thread = threading.Thread(target=self._keep, name="sandboxes", daemon=True)
        self._thread.start()

    def take(self) -> "_Box":
        """A started sandbox, which is the caller's to close."""
        try:
            return self._ready.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            raise _Broken(f"no sandbox started within {START_TIMEOUT_S:.0f} s") from None

    def close(self) -> None:
        """End the thread and the sandboxes that wait."""
        self._closed = True
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01).close()
            except queue.Empty:
                continue
        while not self._ready.empty():
            self._ready.get().close()

    def _keep(self) -> None:
        while not self._closed:
            self._ready.put(_Box(self._command, self._boot))


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
        with contextlib.suppress(OSError):  # it has died; whoever uses it will see
            self._socket.sendall(len(boot).to_bytes(4) + boot)

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


# ---- the command ----


@functools.cache
def _boot() -> bytes:
    """What process 1 is told to be."""
    code = [
        compile(Path(module.__file__).read_text(), f"{module.__name__}", "exec")
        for module in (sandbox_init, sandbox_child)
        if module.__file__
    ]
    return marshal.dumps((*code, seccomp.filter_program(), seccomp.syscall_number("seccomp")))


def _command(limits: Limits) -> list[str]:
    """The command line that starts a sandbox."""
    _require("bwrap", "apt install bubblewrap")
    prefix, python = _python()
    seccomp.filter_program()
    options = (
        "--unshare-user --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try "
        "--disable-userns --die-with-parent --new-session --as-pid-1 --clearenv --cap-drop ALL "
        "--uid 65534 --gid 65534 --hostname sandbox --proc /proc "
        "--dev-bind /dev/null /dev/null --dev-bind /dev/zero /dev/zero --dev-bind /dev/urandom /dev/urandom "
        f"--perms 0700 --size {limits.disk_bytes} --tmpfs /w --chdir /w --symlink /w /tmp "
        "--setenv HOME /w --setenv LANG C.UTF-8 --setenv PYTHONDONTWRITEBYTECODE 1 "
        "--setenv PYTHONHASHSEED 0 --setenv PYTHONUTF8 1"
    ).split()
    command = ["bwrap", *options, *_libraries(), *python, "--remount-ro", "/"]
    return [*prefix, *command, "--", sys.executable and _executable(), "-s", "-S", "-P", "-c", _BOOT]


def _libraries() -> list[str]:
    """Shared libraries of the system, read-only, and nothing else of /usr."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    options: list[str] = []
    for folder in ("/usr/lib64", f"/usr/lib/{multiarch}", "/lib64", f"/lib/{multiarch}"):
        top = "/" + folder.split("/")[1]
        if Path(top).is_symlink():
            if top not in options:
                options += ["--symlink", str(Path(top).readlink()), top]
        elif not folder.endswith("/") and Path(folder).is_dir():
            options += ["--ro-bind", folder, folder]
    return options


def _executable() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _python() -> tuple[list[str], list[str]]:
    """What goes before the command, and the options that show Python's own files, without site-packages.

    The spare user need not be able to reach Python (under /root, say). Root therefore first binds
    it to a place that everyone can reach, in a mount namespace of its own, and then changes user.
    """
    base, stdlib = sys.base_prefix, sysconfig.get_path("stdlib")
    files = [_executable(), stdlib]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        folder = sysconfig.get_config_var("LIBDIR")
        files += [str(path) for path in Path(folder).glob("libpython*.so*")]
    prefix: list[str] = []
    seen_at = base
    if os.geteuid() == 0:
        for tool in ("unshare", "mount", "setpriv"):
            _require(tool, "apt install util-linux")
        seen_at = "/mnt"
        script = (
            f'mount --bind "$0" {seen_at} && '
            f'exec setpriv --reuid {SPARE_USER} --regid {SPARE_USER} --clear-groups -- "$@"'
        )
        prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, base]
    options: list[str] = []
    for file in files:
        if not file.startswith(base + "/"):
            raise SandboxMissing(f"no sandbox: {file} of Python lies outside its prefix {base}")
        options += ["--ro-bind", seen_at + file.removeprefix(base), file]
    for hidden in ("site-packages", "dist-packages"):
        if Path(stdlib, hidden).is_dir():
            options += ["--tmpfs", f"{stdlib}/{hidden}", "--remount-ro", f"{stdlib}/{hidden}"]
    return prefix, options


def _require(tool: str, advice: str) -> None:
    if shutil.which(tool) is None:
        raise SandboxMissing(f"no sandbox: {tool} is missing; {advice}")


def _why(outcome: Outcome) -> str:
    words = outcome.note or outcome.stderr.strip().rpartition("\n")[2] or outcome.status
    return (
        f"no sandbox: {words}; it needs Linux 5.14 or later and user namespaces (in a container: "
        "allow them, with Docker --security-opt seccomp=unconfined; on Ubuntu the sysctl "
        "kernel.apparmor_restrict_unprivileged_userns=0)"
    )
