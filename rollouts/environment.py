"""What a policy acts in: an episode with state of its own, made anew for every rollout. Imports no torch.

An environment is a function `start(task, seed) -> Episode`. The episode sees the text of each assistant turn and
answers with tool results, or with None when the turn was no call: then the rollout is over, and
`outcome()`, plain data, travels with it to the rewards. The same task, seed and turns give the same
results, so that a rollout can be played again anywhere. Next: toolbox.py, ../posttrain/envs/.

Whose fault a failure is decides what it is worth, so that no policy can drop a bad rollout by breaking things:
`Unavailable`, and whatever `start` raises, is the machine's (stop = "error", unscorable); anything else
that `step` or `outcome` raises, the policy's text has brought about (stop = "crash", worth 0).
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from posttrain.schema import Message, Rollout, Stop, Task

Tool = Callable[[Task, str], str | None]
"""The simplest environment: sees the task and the text of an assistant turn; None means it was no call."""

Policy = Callable[[Sequence[Message]], str]
"""The text of the next assistant turn, given the conversation so far."""


class Unavailable(Exception):
    """The environment cannot work through no fault of the policy: a sandbox or a server is missing."""


class Episode(Protocol):
    """One rollout's world. Example: a shop's database, changed by the calls of this rollout alone."""

    def step(self, text: str) -> Sequence[str] | None:
        """The result of every call in an assistant turn, in order; None if there is no call in it."""
        ...

    def outcome(self) -> dict[str, Any]:
        """Plain JSON data on the state now: what the rewards judge. Asked for once, at the end."""
        ...

    def close(self) -> None:
        """Free what the episode holds."""
        ...


Environment = Callable[[Task, int], Episode]
"""Starts an episode of a task with a seed."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stateless:
    """A tool as an environment: no state, an empty outcome."""

    tool: Tool

    def __call__(self, task: Task, seed: int) -> Episode:
        """An episode of the tool."""
        return _ToolEpisode(self.tool, task)


def single_turn(task: Task, seed: int) -> Episode:
    """The environment of tasks without tools: the first turn is the answer."""
    return _ToolEpisode(_no_call, task)


@dataclass(frozen=True, slots=True)
class Failed:
    """Why an episode could not go on."""

    stop: Stop
    reason: str


class Live:
    """An episode that starts when first needed and whose failures are values."""

    def __init__(self, environment: Environment, task: Task, seed: int) -> None:
        self._start = lambda: environment(task, seed)
        self._episode: Episode | None = None

    def step(self, text: str) -> Sequence[str] | Failed | None:
        """As Episode.step."""
        episode = self._started()
        if isinstance(episode, Failed):
            return episode
        return _guard(lambda: episode.step(text), "crash")

    def end(self, why: Stop | Failed) -> tuple[Stop, dict[str, Any]]:
        """How the rollout ended and with which outcome; a failure's outcome is its reason."""
        failed = why if isinstance(why, Failed) else None
        outcome: dict[str, Any] = {}
        if failed is None:
            found = self._outcome()
            failed, outcome = (found, {}) if isinstance(found, Failed) else (None, found)
        if self._episode is not None:
            closed = _guard(self._episode.close, "crash")
            failed = failed or (closed if isinstance(closed, Failed) else None)
        if failed is not None:
            return failed.stop, {failed.stop: failed.reason}
        assert not isinstance(why, Failed), "handled above"
        return why, outcome

    def _outcome(self) -> dict[str, Any] | Failed:
        episode = self._started()
        if isinstance(episode, Failed):
            return episode
        outcome = _guard(episode.outcome, "crash")
        try:
            json.dumps(outcome if not isinstance(outcome, Failed) else None)
        except (TypeError, ValueError) as error:
            return Failed("error", f"the outcome is no plain JSON data: {error}")
        return outcome

    def _started(self) -> Episode | Failed:
        if self._episode is None:
            started = _guard(self._start, "error")
            if isinstance(started, Failed):
                return started
            self._episode = started
        return self._episode


def step_all(turns: Sequence[tuple[Live, str]]) -> list[Sequence[str] | Failed | None]:
    """One step of several episodes, in order; side by side, since a tool may run a program."""
    if len(turns) < 2:
        return [live.step(text) for live, text in turns]
    return list(_threads().map(lambda turn: turn[0].step(turn[1]), turns))


def play(environment: Environment, task: Task, policy: Policy, *, seed: int, max_turns: int) -> Rollout:
    """Let a scripted policy act, without a model or tokens: for solvers, junk and tests of an environment."""
    live, messages = Live(environment, task, seed), list[Message]()
    ended: Stop | Failed | None = None if max_turns else "turns"
    while ended is None:
        text = policy([*task.messages, *messages])
        messages.append({"role": "assistant", "content": text})
        results = live.step(text)
        if isinstance(results, Failed):
            ended = results
        elif not results:
            ended = "eos"
        elif sum(m["role"] == "assistant" for m in messages) >= max_turns:
            ended = "turns"
        else:
            messages += [{"role": "tool", "content": result} for result in results]
    stop, outcome = live.end(ended)
    return Rollout(
        task_id=task.id,
        index=0,
        tokens=np.zeros(0, np.int32),
        sampled=np.zeros(0, np.bool_),
        logprobs=np.zeros(0, np.float32),
        text="\n".join(m["content"] for m in messages if m["role"] == "assistant"),
        messages=tuple(messages),
        stop=stop,
        outcome=outcome,
    )


def replay(environment: Environment, task: Task, rollout: Rollout, *, seed: int) -> Rollout:
    """The rollout's assistant turns played again: equal messages and outcome, or the environment is not fit.

    A last turn that was cut off was not played and is left out; so are tokens and log-probs.
    """
    turns = [str(m["content"]) for m in rollout.messages if m["role"] == "assistant"]
    if rollout.stop == "length" and rollout.messages[-1]["role"] == "assistant":
        turns.pop()
    following = iter(turns)
    return play(environment, task, lambda _: next(following), seed=seed, max_turns=len(turns))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """The threads of this process; more than cores, since a step may wait for a program."""
    return ThreadPoolExecutor(2 * (os.cpu_count() or 1), thread_name_prefix="environment")


class _ToolEpisode:
    def __init__(self, tool: Tool, task: Task) -> None:
        self._tool, self._task = tool, task

    def step(self, text: str) -> Sequence[str] | None:
        result = self._tool(self._task, text)
        return None if result is None else [result]

    def outcome(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return


def _no_call(task: Task, text: str) -> None:
    return


def _guard(call: Callable[[], T], fault: Stop) -> T | Failed:
    """What the call returns, or whose fault its failure is. An environment is a user's code."""
    try:
        return call()
    except Unavailable as error:
        return Failed("error", str(error))
    except Exception as error:
        return Failed(fault, f"{type(error).__name__}: {error}")
