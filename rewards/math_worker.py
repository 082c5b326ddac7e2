"""math-verify in a process of its own that is killed when it takes too long.

Parsing text that a model wrote can hang in C code, where no signal helps, or fill the memory. The worker starts
on first use, answers one JSON line per question, and ends with its parent.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
"""Importing the parser takes seconds on a busy machine."""
MEMORY_BYTES = 4 << 30
CACHED = 4096
"""Questions whose verdict is remembered: the samples of a group often give the same answer."""
_ATTEMPTS = 2
_PR_SET_PDEATHSIG = 1


class MathWorker:
    """One worker process, replaced whenever it hangs or dies."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], bool] = {}
        self.timeouts = 0

    def verify(self, reference: str, answer: str) -> bool:
        """Whether answer and reference are equal; False if it takes too long or breaks the parser.

        Raises ChildProcessError if worker after worker dies.
        """
        with self._lock:
            known = self._known.get((reference, answer))
            if known is not None:
                return known
            for _ in range(_ATTEMPTS):
                verdict = self._ask({"reference": reference, "answer": answer})
                if verdict == "timeout":  # not remembered: the machine may have been busy
                    return False
                if verdict != "died":
                    self._remember(reference, answer, verdict == "equal")
                    return verdict == "equal"
            raise ChildProcessError("the process of math-verify dies")

    def start(self) -> None:
        """Start the process now; ChildProcessError if it cannot live."""
        if self._process is None:
            process = subprocess.Popen(
                [sys.executable, "-m", "posttrain.rewards.math_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # sympy warns about texts that are no mathematics
            )
            self._process = process
            if not _line(process, START_TIMEOUT_S):
                self.close()
                raise ChildProcessError("the process of math-verify does not start")

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(OSError):  # what it has not read is lost with it
            process.communicate()

    def _remember(self, reference: str, answer: str, equal: bool) -> None:
        if len(self._known) >= CACHED:
            self._known.clear()
        self._known[reference, answer] = equal

    def _ask(self, question: dict[str, str]) -> str:
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            self.close()
            return "died"
        line = _line(process, self._timeout_s)
        if line is None:  # it hangs: the answer is to blame
            self.timeouts += 1
            self.close()
            return "timeout"
        if not line:
            self.close()
            return "died"
        return "equal" if json.loads(line) else "different"


@functools.cache
def shared_worker() -> MathWorker:
    """The worker of this process."""
    worker = MathWorker()
    atexit.register(worker.close)
    return worker


def _line(process: "subprocess.Popen[bytes]", timeout_s: float) -> bytes | None:
    """One line of output, empty if the process has ended, None if it takes too long."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    return process.stdout.readline() if ready else None


def _equal(parse: Callable[[str], Any], verify: Any, question: dict[str, str]) -> bool:
    gold, found = parse(question["reference"]), parse(question["answer"])
    return bool(gold and found and verify(gold, found, timeout_seconds=None))


def _serve() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also while it computes
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    from math_verify import parse, verify  # seconds: only in the worker

    @functools.lru_cache(CACHED)
    def parsed(text: str) -> Any:
        return parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            verdict = _equal(parsed, verify, json.loads(line))
        except Exception:  # whatever the model's text breaks is a wrong answer
            verdict = False
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _serve()
