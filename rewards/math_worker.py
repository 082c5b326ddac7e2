"""math-verify in a process of its own that is killed when it takes too long.

Parsing text that a model wrote can hang in C code, where no signal helps. The worker starts on first
use, answers one JSON line per question, and ends with its parent (its stdin closes).
"""

import atexit
import contextlib
import functools
import json
import select
import subprocess
import sys
import threading
from typing import Any

TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
"""Importing the parser takes seconds on a busy machine."""
_ATTEMPTS = 2


class MathWorker:
    """One worker process, replaced whenever it hangs or dies."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.timeouts = 0

    def verify(self, reference: str, answer: str) -> bool | None:
        """Whether answer and reference are equal; False if it takes too long; None if workers die."""
        with self._lock:
            for _ in range(_ATTEMPTS):
                verdict = self._ask({"reference": reference, "answer": answer})
                if verdict != "died":
                    return verdict == "equal"
            return None

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(OSError):  # what it has not read is lost with it
            process.communicate()

    def _ask(self, question: dict[str, str]) -> str:
        process = self._process or self._start()
        if process is None:
            return "died"
        assert process.stdin is not None
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

    def _start(self) -> "subprocess.Popen[bytes] | None":
        command = [sys.executable, "-m", "posttrain.rewards.math_worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if not _line(self._process, START_TIMEOUT_S):
            self.close()
        return self._process


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


def _equal(parse: Any, verify: Any, question: dict[str, str]) -> bool:
    gold = parse(f"${question['reference']}$", parsing_timeout=None) or parse(
        question["reference"], parsing_timeout=None
    )
    found = parse(f"${question['answer']}$", parsing_timeout=None) or parse(
        question["answer"], parsing_timeout=None
    )
    return bool(gold and found and verify(gold, found, timeout_seconds=None))


def _serve() -> None:
    from math_verify import parse, verify  # seconds: only in the worker

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            verdict = _equal(parse, verify, json.loads(line))
        except Exception:  # whatever the model's text breaks is a wrong answer
            verdict = False
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _serve()
