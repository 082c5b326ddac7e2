"""Rewards are functions named by import path: load them, wrap them, add them up.

A reward sees a task and all rollouts of its group and returns one number, or None, per rollout. None
means "cannot be judged, through no fault of the candidate" and is never read as 0; what the candidate's
own text breaks scores 0. No registry: the import path is the name. Next: answer.py.
"""

import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.config import Reward
from posttrain.schema import RewardFn, Rollout, Score, Task

_PASSED = 1.0 - 1e-6


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


def per_rollout(function: Callable[[Task, Rollout], float | None]) -> RewardFn:
    """Make a reward of a function that judges one rollout at a time."""

    @functools.wraps(function)
    def over_group(task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [function(task, rollout) for rollout in rollouts]

    return over_group


class Scorer:
    """The rewards of a domain: parts by name and their weighted sum."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        """Load every function; raises ValueError as load_reward does."""
        names = [reward.fn.partition(":")[2] for reward in rewards]
        self._rewards = [
            (reward.fn if names.count(name) > 1 else name, reward.weight, load_reward(reward.fn, reward.args))
            for name, reward in zip(names, rewards, strict=True)
        ]

    def score(self, task: Task, rollouts: Sequence[Rollout]) -> tuple[Score, ...]:
        """One score per rollout; its value is None if any part is."""
        parts: dict[str, list[float | None]] = {}
        notes: list[str] = []
        for name, _, function in self._rewards:
            parts[name], note = _call(name, function, task, rollouts)
            notes += [note] if note else []
        weights = {name: weight for name, weight, _ in self._rewards}
        return tuple(
            _sum({name: values[i] for name, values in parts.items()}, weights, "; ".join(notes))
            for i in range(len(rollouts))
        )

    def passed(self, score: Score) -> bool | None:
        """Whether every part gives full marks (1); None if the score is None."""
        if score.value is None:
            return None
        return all(part is not None and part >= _PASSED for part in score.parts.values())


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


def _call(
    name: str, function: RewardFn, task: Task, rollouts: Sequence[Rollout]
) -> tuple[list[float | None], str]:
    """The numbers of one reward, or Nones and why. A user's code: whatever it raises ends here."""
    nothing: list[float | None] = [None] * len(rollouts)
    try:
        values = function(task, rollouts)
    except Exception as error:
        return nothing, f"{name} raised {type(error).__name__}: {error} (task {task.id})"
    if not isinstance(values, list) or len(values) != len(rollouts):
        return nothing, f"{name} returned no list of {len(rollouts)} numbers (task {task.id})"
    checked = [_number(value) for value in values]
    bad = [value for value, kept in zip(values, checked, strict=True) if value is not None and kept is None]
    return checked, f"{name} returned {bad[0]!r} (task {task.id})" if bad else ""


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _sum(parts: dict[str, float | None], weights: Mapping[str, float], note: str) -> Score:
    known = {name: part for name, part in parts.items() if part is not None}
    if len(known) < len(parts):
        missing = ", ".join(name for name in parts if name not in known)
        return Score(value=None, parts=parts, note=note or f"{missing} gave no score")
    return Score(value=sum(weights[name] * part for name, part in known.items()), parts=parts, note=note)
