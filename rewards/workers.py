"""Processes that rewards run in, so that a kill works: one that hangs or dies is replaced. No torch.

Every worker judges one group at a time. It reports each rollout as soon as it is judged; when the deadline of
a rollout passes it is killed with all its children, and the rollouts that it had not come to go to another
one. Next: worker.py, the other side.
"""

import atexit
import contextlib
import functools
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from posttrain.config import Reward
from posttrain.rewards.base import Verdict
from posttrain.schema import Rollout, Task

START_TIMEOUT_S = 120.0
"""For a worker's start and a reward's import."""
MAX_WORKERS = 8
_MESSAGE_BYTES = 1 << 20


class Workers:
    """A pool of reward processes, started when first needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._all = [_Worker() for _ in range(size)]
        for worker in self._all:
            self._idle.put(worker)

    def judge(self, reward: Reward, task: Task, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """A verdict per rollout: the reward's, or what became of the worker."""
        lean = [replace(rollout, kept=None, experts=None) for rollout in rollouts]  # large, and no reward's
        verdicts: dict[int, Verdict] = {}
        worker = self._idle.get()
        try:
            while len(verdicts) < len(lean):
                waiting = [i for i in range(len(lean)) if i not in verdicts]
                for place, verdict in worker.judge(reward, task, [lean[i] for i in waiting]):
                    verdicts[waiting[place]] = verdict
        finally:
            self._idle.put(worker)
        return [verdicts[i] for i in range(len(lean))]

    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.process.pid for worker in self._all if worker.process is not None]

    def close(self) -> None:
        """End all workers; they start again when needed."""
        for worker in self._all:
            worker.kill()


@functools.cache
def shared_workers(size: int) -> Workers:
    """The pool of this process; size 0 is one worker per core, at most MAX_WORKERS."""
    workers = Workers(size or min(MAX_WORKERS, len(os.sched_getaffinity(0))))
    atexit.register(workers.close)
    return workers


class _Worker:
    """One process, replaced whenever it hangs or dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def judge(self, reward: Reward, task: Task, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts as they come. At least one comes; if the worker fails the rest stays open for another call."""
        open_ones = set(range(len(rollouts)))
        job = _pickled(reward, task, rollouts)
        together: bool | None = None
        try:
            if self.process is None:
                self._start()
            self._send(job)
            together = self._receive(START_TIMEOUT_S)["together"]
            while open_ones:
                message = self._receive(reward.timeout_s)
                open_ones.discard(message["place"])
                yield message["place"], Verdict(message["value"], message["kind"], message["why"])
        except TimeoutError:
            if together is None:
                why = Verdict(None, "died", f"did not load within {START_TIMEOUT_S:g} s")
            else:
                why = Verdict(None, "failed", f"gave no answer within {reward.timeout_s:g} s")
        except OSError as error:
            why = Verdict(None, "died", f"ended its process: {error}")
        else:
            return
        self.kill()
        self._start()  # its imports need not wait for the next group
        for place in [min(open_ones)] if together is False else sorted(open_ones):
            yield place, why

    def kill(self) -> None:
        """End the process and its children."""
        process, self.process = self.process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = _spawner().submit(_spawn, theirs.fileno()).result()

    def _send(self, data: bytes) -> None:
        assert self._socket is not None
        self._socket.settimeout(START_TIMEOUT_S)
        self._socket.sendall(len(data).to_bytes(4) + data)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message; JSON, as the reward has seen what a model wrote."""
        deadline = time.monotonic() + timeout_s
        size = int.from_bytes(self._exactly(4, deadline))
        if size > _MESSAGE_BYTES:
            raise ConnectionError(f"announces a message of {size} bytes")
        try:
            message: dict[str, Any] = json.loads(self._exactly(size, deadline))
        except ValueError:
            raise ConnectionError("sends what is no JSON") from None
        return message

    def _exactly(self, size: int, deadline: float) -> bytes:
        assert self._socket is not None
        data = b""
        while len(data) < size:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise ConnectionError(self._last_words())
            data += piece
        return data

    def _last_words(self) -> str:
        assert self.process is not None
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@functools.cache
def _spawner() -> ThreadPoolExecutor:
    """A thread that lives as long as this process: workers ask the kernel to die with the thread that started them."""
    return ThreadPoolExecutor(1, thread_name_prefix="reward-workers")


def _pickled(reward: Reward, task: Task, rollouts: Sequence[Rollout]) -> bytes:
    try:
        return pickle.dumps((reward.fn, reward.args, task, rollouts))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"reward {reward.fn!r}: task {task.id} cannot be sent to another process: {error}; "
            "keep plain data in its meta, or mark the reward @bounded"
        ) from None


def _spawn(descriptor: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "posttrain.rewards.worker", str(descriptor)]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # what a reward prints is no part of a command's output
        pass_fds=(descriptor,),
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # a group of its own, to be killed as a whole
    )
