"""Rewards are functions named by import path: load them, wrap them, call them.

A reward sees a task and all rollouts of its group and returns one number, or None, per rollout; it may be
async. None means "cannot be judged, through no fault of the candidate" and is never read as 0. No
registry: the import path is the name. Next: scorer.py, which decides what a failure means; answer.py.
"""

import asyncio
import functools
import importlib
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from posttrain.rewards.sandbox import SandboxMissing
from posttrain.schema import RewardFn, Rollout, Task

Kind = Literal["judged", "failed", "died", "unscorable", "blamed"]
"""judged: a number, or None on purpose. failed: an exception, no finite number, no answer in time. died: the
worker's process did. unscorable: the reward said so, or returned what no reward may return. blamed: 0 for a
failure that was the candidate's doing (see scorer.py)."""


class Unscorable(Exception):
    """Raise it in a reward where the candidate is not to blame: a judge that cannot be reached."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one call of a reward says about one rollout."""

    value: float | None
    kind: Kind = "judged"
    why: str = ""


def load_object(path: str, what: str) -> Any:
    """The object at "package.module:name"; ValueError in one line if there is none."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"{what} {path!r}: write it as package.module:function")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {path!r} does not load: {error}") from error


def load_reward(path: str, args: Mapping[str, Any] | None = None) -> RewardFn:
    """A reward function; with args the object is called with them and returns it.

    Raises ValueError if it does not load, is not callable or does not take the args.
    """
    found = load_object(path, "reward")
    if args:
        try:
            found = found(**args)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {path!r} with args {dict(args)}: {error}") from error
    if not callable(found):
        raise ValueError(f"reward {path!r} is {type(found).__name__}, not a function")
    function: RewardFn = found
    return function


AnyReward = TypeVar("AnyReward", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Mark:
    """What a reward may return in place of a number: the number with a note, kept with the rollout."""

    value: float | None
    note: str = ""


OneResult = float | Mark | None
OneFn = Callable[[Task, Rollout], OneResult | Awaitable[OneResult]]


class PerRollout:
    """A reward made of a function that judges one rollout at a time."""

    def __init__(self, one: OneFn) -> None:
        self.one = one
        functools.update_wrapper(self, one)

    def __call__(self, task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Judge a group; raises whatever the function raises."""
        found = [_wait_for(self.one(task, rollout)) for rollout in rollouts]
        return [one.value if isinstance(one, Mark) else one for one in found]


def per_rollout(function: OneFn) -> PerRollout:
    """Make a reward of a function, or async function, that judges one rollout at a time.

    One rollout that breaks or outlasts it leaves its neighbours' scores alone.
    """
    return PerRollout(function)


def bounded_if(promise: Callable[[Task], bool]) -> Callable[[AnyReward], AnyReward]:
    """Vouch for a reward on some tasks: little time and memory on any text, so that it runs where it is called.

    All others run in worker processes that are killed at their deadline.
    """

    def vouch(reward: AnyReward) -> AnyReward:
        reward.is_bounded = promise  # type: ignore[attr-defined]
        return reward

    return vouch


def bounded(reward: AnyReward) -> AnyReward:
    """Vouch for a reward on every task."""
    return bounded_if(_always)(reward)


def is_bounded(reward: RewardFn, task: Task | None) -> bool:
    """Whether the reward's author has vouched for it on this task (None: on every one)."""
    promise = getattr(reward, "is_bounded", None)
    return promise is _always or (promise is not None and task is not None and promise(task))


def _always(task: Task) -> bool:
    return True


def judge(
    reward: RewardFn, task: Task, rollouts: Sequence[Rollout], emit: Callable[[int, Verdict], None]
) -> None:
    """Call a reward and emit a verdict per rollout, as soon as it is known. Raises nothing of the reward's."""
    if not isinstance(reward, PerRollout):
        for i, verdict in enumerate(_of_group(reward, task, rollouts)):
            emit(i, verdict)
    elif is_async(reward):
        asyncio.run(_all_at_once(reward, task, rollouts, emit))
    else:
        for i, rollout in enumerate(rollouts):
            emit(i, _of_one(reward, task, rollout))


def is_async(reward: RewardFn) -> bool:
    """Whether a per-rollout reward judges its rollouts at the same time."""
    return isinstance(reward, PerRollout) and inspect.iscoroutinefunction(reward.one)


def reference_rollout(task: Task, index: int = 0) -> Rollout:
    """The task's reference answer (or nothing, where it has none) as if the policy had written it."""
    text = task.answer or ""
    return Rollout(
        task_id=task.id,
        index=index,
        tokens=np.zeros(1, np.int32),
        sampled=np.ones(1, np.bool_),
        logprobs=np.zeros(1, np.float32),
        text=text,
        messages=({"role": "assistant", "content": text},),
    )


def final_answer(text: str) -> str:
    """What follows the last word "answer", or the last \\boxed{...}, or else the whole text.

    Thinking is passed over. Example: final_answer("<think> 2 + 2 = 4 </think> answer 4") == "4"
    """
    text = text.rpartition("</think>")[2]
    boxed = text.rfind("\\boxed{")
    words = list(re.finditer(r"\banswer\b\s*(?:is\b)?\s*:?", text, re.IGNORECASE))
    if boxed >= 0 and (not words or boxed > words[-1].start()):
        return _braces(text, boxed + len("\\boxed{"))
    return text[words[-1].end() :].strip() if words else text.strip()


def _braces(text: str, start: int) -> str:
    """The text up to the brace that closes the one before start."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i].strip()
    return ""


def _of_group(reward: RewardFn, task: Task, rollouts: Sequence[Rollout]) -> list[Verdict]:
    try:
        values: Any = _wait_for(reward(task, rollouts))
    except Exception as error:  # a user's code: whatever it raises ends here
        return [_raised(error)] * len(rollouts)
    if not isinstance(values, list) or len(values) != len(rollouts):
        wrong = Verdict(None, "unscorable", f"returned no list of {len(rollouts)} numbers")
        return [wrong] * len(rollouts)
    return [_checked(value) for value in values]


def _of_one(reward: PerRollout, task: Task, rollout: Rollout) -> Verdict:
    try:
        return _checked(_wait_for(reward.one(task, rollout)))
    except Exception as error:
        return _raised(error)


async def _all_at_once(
    reward: PerRollout, task: Task, rollouts: Sequence[Rollout], emit: Callable[[int, Verdict], None]
) -> None:
    async def one(i: int, rollout: Rollout) -> None:
        try:
            value = await reward.one(task, rollout)  # type: ignore[misc]
        except Exception as error:
            emit(i, _raised(error))
        else:
            emit(i, _checked(value))

    await asyncio.gather(*(one(i, rollout) for i, rollout in enumerate(rollouts)))


def _raised(error: Exception) -> Verdict:
    if isinstance(error, Unscorable | SandboxMissing):
        return Verdict(None, "unscorable", str(error))
    if isinstance(error, ChildProcessError):  # a sandbox or a process of the reward's own
        return Verdict(None, "died", str(error))
    return Verdict(None, "failed", f"raised {type(error).__name__}: {error}")


def _checked(value: object) -> Verdict:
    if isinstance(value, Mark):
        verdict = _checked(value.value)
        return replace(verdict, why=value.note) if verdict.kind == "judged" else verdict
    if value is None:
        return Verdict(None)
    if isinstance(value, int | float | np.number):
        number = float(value)
        return Verdict(number) if math.isfinite(number) else Verdict(None, "failed", f"returned {number}")
    return Verdict(None, "unscorable", f"returned {type(value).__name__}, not a number")


def _wait_for(value: Any) -> Any:
    return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value
