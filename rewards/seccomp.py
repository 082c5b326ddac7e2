"""The system calls that no sandboxed program may make, as a filter for the kernel.

Forbidden calls are answered with EPERM by the sandbox's own process 1, which counts them. What is allowed is
everything else: namespaces, an empty file system and an unprivileged user carry the isolation; the filter
takes away ways to the kernel's rarely used parts and memory that no limit would count.
Next: sandbox_init.py.
"""

import functools
import os
import socket
from typing import Any

from posttrain.rewards.sandbox import SandboxMissing

_FORBIDDEN = (
    # other processes
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp "
    # namespaces, mounts, roots
    "unshare setns mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick "
    "mount_setattr open_by_handle_at name_to_handle_at quotactl swapon swapoff "
    # the machine
    "bpf perf_event_open userfaultfd fanotify_init kexec_load kexec_file_load init_module finit_module "
    "delete_module reboot acct syslog settimeofday clock_settime clock_adjtime adjtimex sethostname "
    "setdomainname iopl ioperm personality lookup_dcookie "
    # the priority of process 1, which is of the same user
    "setpriority sched_setscheduler sched_setattr sched_setparam sched_setaffinity ioprio_set "
    # keys and asynchronous calls that pass the filter by
    "add_key request_key keyctl io_uring_setup io_uring_enter io_uring_register seccomp "
    # memory that neither RLIMIT_AS nor the size of the working directory counts
    "memfd_create memfd_secret shmget shmat msgget semget mq_open"
).split()
_NEW_NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
"""CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET."""
_ENOSYS = 38


@functools.cache
def filter_program() -> bytes:
    """The filter as BPF instructions; SandboxMissing without pyseccomp or libseccomp2."""
    library = _library()
    filter = library.SyscallFilter(library.ALLOW)
    for name in _FORBIDDEN:
        if library.resolve_syscall(library.system_arch(), name) >= 0:  # not every machine has every call
            filter.add_rule(library.NOTIFY, name)
    for flag in _NEW_NAMESPACES:
        filter.add_rule(library.NOTIFY, "clone", library.Arg(0, library.MASKED_EQ, flag, flag))
    filter.add_rule(library.ERRNO(_ENOSYS), "clone3")  # its flags are in memory; libc then uses clone
    filter.add_rule(library.NOTIFY, "socket", library.Arg(0, library.NE, socket.AF_UNIX))
    filter.add_rule(library.NOTIFY, "prlimit64", library.Arg(0, library.NE, 0))  # of process 1, for instance
    reading, writing = os.pipe()
    with open(reading, "rb") as source:
        with open(writing, "wb") as sink:
            filter.export_bpf(sink)
        return source.read()


@functools.cache
def syscall_number(name: str) -> int:
    """The number of a system call on this machine."""
    library = _library()
    return int(library.resolve_syscall(library.system_arch(), name))


@functools.cache
def syscall_name(number: int) -> str:
    """The name of a system call on this machine."""
    library = _library()
    name = library.resolve_syscall(library.system_arch(), number)
    return name.decode() if isinstance(name, bytes) else str(name)


def _library() -> Any:
    try:
        import pyseccomp  # optional, and needs a C library
    except (ImportError, RuntimeError) as error:
        raise SandboxMissing(
            f"no sandbox: {error}; pip install 'posttrain[sandbox]' and apt install libseccomp2"
        ) from None
    return pyseccomp
