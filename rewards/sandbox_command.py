"""The command line that starts a sandbox: what a program sees of the machine. Next: bubblewrap.py.

It sees shared libraries, Python with its standard library, packages that are asked for, /dev/null, zero and
urandom, its own /proc, and one writable folder in memory. Everything else of the host is absent.
"""

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from posttrain.rewards.sandbox import Limits, SandboxMissing

SPARE_USER = 64321
"""Numeric user and group that owns nothing; root runs sandboxes as this one."""
PACKAGES = "/packages"
_REACHABLE = "/mnt"


def command(limits: Limits, packages: Sequence[str], boot: str) -> list[str]:
    """Start Python on the source `boot` as process 1 of a new sandbox.

    The spare user need not be able to reach Python (under /root, say). Root therefore binds what the sandbox
    shows to a place that everyone can reach, in a mount namespace of its own, and then changes user.
    Raises SandboxMissing, with what to install, if a tool is missing.
    """
    _require("bwrap", "apt install bubblewrap")
    shown = {**_python(), **{_package(name): f"{PACKAGES}/{name}" for name in packages}}
    before: list[str] = []
    if os.geteuid() == 0:
        before = _as_spare_user([sys.base_prefix, *(p for p in shown if not p.startswith(sys.base_prefix))])
    binds: list[str] = []
    for path, seen_as in shown.items():
        binds += ["--ro-bind", _reachable(path, shown) if before else path, seen_as]
    options = (
        "--unshare-user --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try "
        "--disable-userns --die-with-parent --new-session --as-pid-1 --clearenv --cap-drop ALL "
        "--uid 65534 --gid 65534 --hostname sandbox --proc /proc "
        "--dev-bind /dev/null /dev/null --dev-bind /dev/zero /dev/zero --dev-bind /dev/urandom /dev/urandom "
        f"--perms 0700 --size {limits.disk_bytes} --tmpfs /w --chdir /w --symlink /w /tmp "
        "--setenv HOME /w --setenv LANG C.UTF-8 --setenv PYTHONDONTWRITEBYTECODE 1 "
        "--setenv PYTHONHASHSEED 0 --setenv PYTHONUTF8 1"
    ).split()
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):  # the loader's cache, in /etc, is not shown
        options += ["--setenv", "LD_LIBRARY_PATH", sysconfig.get_config_var("LIBDIR")]
    inside = [*options, *_libraries(), *binds, *_hidden(), "--remount-ro", "/"]
    return [*before, "bwrap", *inside, "--", executable(), "-s", "-S", "-P", "-c", boot]


def executable() -> str:
    """The Python interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _python() -> dict[str, str]:
    """Path -> the same path: interpreter, standard library, its shared library where it has one."""
    files = [executable(), sysconfig.get_path("stdlib")]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        files += map(str, Path(sysconfig.get_config_var("LIBDIR")).glob("libpython*.so*"))
    for file in files:
        if not file.startswith(f"{sys.base_prefix}/"):
            raise SandboxMissing(f"no sandbox: {file} of Python lies outside its prefix {sys.base_prefix}")
    return {file: file for file in files}


def _package(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SandboxMissing(f"no sandbox: it needs the package {name}; pip install 'posttrain[tasks]'")
    return os.path.realpath(next(iter(spec.submodule_search_locations)))


def _hidden() -> list[str]:
    """Packages that are installed into the standard library's folder are not for programs to see."""
    options: list[str] = []
    for name in ("site-packages", "dist-packages"):
        folder = f"{sysconfig.get_path('stdlib')}/{name}"
        if Path(folder).is_dir():
            options += ["--tmpfs", folder, "--remount-ro", folder]
    return options


def _libraries() -> list[str]:
    """Shared libraries of the system, read-only, and nothing else of /usr."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or "-"
    options: list[str] = []
    for top in ("/usr/lib64", "/lib64", "/usr/lib", "/lib"):
        if Path(top).is_symlink():
            options += ["--symlink", str(Path(top).readlink()), top]
            continue
        folder = f"{top}/{multiarch}" if top.endswith("lib") else top
        if Path(folder).is_dir():
            options += ["--ro-bind", folder, folder]
    return options


def _as_spare_user(folders: Sequence[str]) -> list[str]:
    """What goes before the command when root starts it; folder number n is then at /mnt/n."""
    for tool in ("unshare", "mount", "setpriv"):
        _require(tool, "apt install util-linux mount")
    steps = [f"mount -t tmpfs -o mode=755 tmpfs {_REACHABLE}"]
    for n, folder in enumerate(folders):
        steps += [f"mkdir {_REACHABLE}/{n}", f"mount --bind {shlex.quote(folder)} {_REACHABLE}/{n}"]
    steps += [f'exec setpriv --reuid {SPARE_USER} --regid {SPARE_USER} --clear-groups -- "$@"']
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", " && ".join(steps), "sh"]


def _reachable(path: str, shown: dict[str, str]) -> str:
    if path.startswith(sys.base_prefix):
        return f"{_REACHABLE}/0{path.removeprefix(sys.base_prefix)}"
    others = [p for p in shown if not p.startswith(sys.base_prefix)]
    return f"{_REACHABLE}/{1 + others.index(path)}"


def _require(tool: str, advice: str) -> None:
    if shutil.which(tool) is None:
        raise SandboxMissing(f"no sandbox: {tool} is missing; {advice}")
