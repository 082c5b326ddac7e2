"""Where code that a model wrote runs: the nouns and the protocol. Next: bubblewrap.py, the local backend.

A sandbox has no network and no files of the host, an empty environment, and limits on time, memory,
processes, output and disk. What comes out of it is data: a reward compares it with the expected answer
outside, so that no candidate can forge its verdict. Left out: packages beyond Python's standard library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self

Status = Literal["ok", "nonzero", "timeout", "memory", "output", "disk", "killed", "error"]
"""ok: exit code 0. nonzero: another exit code, or an exception. timeout: wall or CPU time. memory, output,
disk: the limit of that name. killed: died of a signal. error: the sandbox itself failed; the only
one that is not the program's doing."""

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may use. A program over a limit is stopped and its Outcome says which."""

    cpu_s: float = 5.0
    """Seconds of CPU, all its processes together."""
    wall_s: float = 10.0
    memory_bytes: int = 512 * MIB
    """Address space of each process, and resident memory of all together."""
    processes: int = 16
    """Processes and threads at the same time; more fail with EAGAIN inside."""
    output_bytes: int = MIB
    """Of stdout and stderr, each, and of the JSON of a value."""
    disk_bytes: int = 64 * MIB
    """Of the working directory; at most one file per 4 KiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call of a function that the program defines, with arguments and result as JSON.

    Example: Call(function="add", args=(1, 2)). A dotted name reaches into modules: "shop.cart.total".
    """

    function: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Python source, run as __main__, or arguments of the Python interpreter.

    Examples: Program(source="print(input())", stdin="hello"),
    Program(source="def f(x): return x + 1", call=Call(function="f", args=(1,))),
    Program(arguments=("-m", "unittest"), files={"test_it.py": "..."}).
    """

    source: str | None = None
    arguments: Sequence[str] = ()
    """Instead of source; the current directory is on the module path in both cases."""
    call: Call | None = None
    """Called after the source has run; what it returns is Outcome.value."""
    stdin: str | bytes = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Relative path -> content, put into the working directory first."""

    def __post_init__(self) -> None:
        if (self.source is None) == (not self.arguments):
            raise ValueError("a program has either source or arguments")
        if self.call is not None and self.source is None:
            raise ValueError("a call needs source (which may be empty)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a program. Everything in it was written by the program: data, never a verdict."""

    status: Status
    exit_code: int | None = None
    """None if it did not end by itself."""
    stdout: str = ""
    """At most output_bytes; what is no UTF-8 is replaced."""
    stderr: str = ""
    value: Any = None
    """What the call returned: None, bool, int, float, str, lists and dicts of these (tuples become lists)."""
    has_value: bool = False
    """Whether the call returned at all, and something that plain JSON can hold."""
    seconds: float = 0.0
    cpu_s: float = 0.0
    denied: Mapping[str, int] = field(default_factory=dict)
    """Forbidden system calls it tried, with how often: {"socket": 1, "ptrace": 2}."""
    note: str = ""
    """Why, where the status alone does not say it."""


class Session(Protocol):
    """A sandbox with a working directory that lives until it is closed; processes live for one run."""

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Run a program in the working directory as earlier runs left it; whatever it leaves running dies."""
        ...

    def write(self, path: str, content: str | bytes) -> None:
        """Write a file of the working directory; ValueError for a path that leads out of it."""
        ...

    def read(self, path: str) -> bytes:
        """Read a file of at most output_bytes; ValueError if there is none or the path leads out."""
        ...

    def close(self) -> None:
        """End it and everything in it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Sandbox(Protocol):
    """A place to run programs; safe to use from several threads."""

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Run a program in a fresh sandbox of its own. Never raises for what the program does."""
        ...

    def session(self, limits: Limits | None = None) -> Session:
        """Open a sandbox for several programs, as an episode of an agent needs."""
        ...

    def close(self) -> None:
        """End everything."""
        ...


class SandboxMissing(ValueError):
    """This machine cannot isolate code; the message is one line with what to install or allow."""
