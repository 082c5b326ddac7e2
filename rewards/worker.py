"""A reward process: reads groups from a socket, judges them, reports each rollout as soon as it is judged.

`python -m posttrain.rewards.worker DESCRIPTOR`, started by workers.py only. Next: scorer.py.
"""

import ctypes
import functools
import json
import pickle
import signal
import socket
import sys

from posttrain.rewards.base import PerRollout, Verdict, is_async, judge, load_reward
from posttrain.schema import RewardFn

_PR_SET_PDEATHSIG = 1


def serve(descriptor: int) -> None:
    """Judge until the socket closes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as requests:
        load = functools.cache(_load)
        while size := requests.read(4):
            path, args, task, rollouts = pickle.loads(requests.read(int.from_bytes(size)))
            reward = load(path, json.dumps(args, sort_keys=True))
            one_by_one = isinstance(reward, PerRollout) and not is_async(reward)
            _send(connection, {"together": not one_by_one})
            judge(reward, task, rollouts, functools.partial(_report, connection))


def _load(path: str, args: str) -> RewardFn:
    """Load a reward; what it prepares does not count towards its deadline."""
    reward = load_reward(path, json.loads(args))
    getattr(reward, "prepare", lambda: None)()
    return reward


def _report(connection: socket.socket, place: int, verdict: Verdict) -> None:
    why = verdict.why[:2000]
    _send(connection, {"place": place, "value": verdict.value, "kind": verdict.kind, "why": why})


def _send(connection: socket.socket, message: dict[str, object]) -> None:
    data = json.dumps(message).encode()
    connection.sendall(len(data).to_bytes(4) + data)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
