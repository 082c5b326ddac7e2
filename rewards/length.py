"""Rewards for length, as published; V3.2 has a length penalty for reasoning and agents but does not say which (report 3).

Those that depend on correctness are made of a reward that says what is correct (its import path, 1 = correct); length
is the number of sampled tokens. The plain penalty, for all alike, is style.length_penalty. Every factory returns a
reward to be named in a recipe: { fn = "posttrain.rewards.length:kimi", args = { correct = "posttrain.rewards.answer:exact" } }.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.rewards.base import Verdict, bounded_if, is_bounded, judge, load_reward
from posttrain.schema import RewardFn, Rollout, Task

_CORRECT = 1.0 - 1e-6
_OfGroup = Callable[[Sequence[int], Sequence[bool]], list[float]]
"""Numbers of tokens, and which are correct -> values."""


def kimi(*, correct: str, args: Mapping[str, Any] | None = None) -> RewardFn:
    """Relative to the group: 0.5 for the shortest to -0.5 for the longest; a wrong answer gains nothing.

    Kimi k1.5 (arXiv 2501.12599, 2.3.3): lambda = 0.5 - (len - min) / (max - min); lambda if correct, min(0, lambda) if
    not; 0 for all if every length is the same.
    """

    def of_group(lengths: Sequence[int], rights: Sequence[bool]) -> list[float]:
        low, high = min(lengths), max(lengths)
        if low == high:
            return [0.0] * len(lengths)
        values = [0.5 - (length - low) / (high - low) for length in lengths]
        return [value if right else min(0.0, value) for value, right in zip(values, rights, strict=True)]

    return _made(of_group, correct, args)


def cosine(
    *,
    correct: str,
    limit: int,
    right: tuple[float, float],
    wrong: tuple[float, float],
    exceeded: float,
    args: Mapping[str, Any] | None = None,
) -> RewardFn:
    """Half a cosine over the length, from (value at 0 tokens) to (value at the limit), each for right and wrong.

    Yeo et al. (arXiv 2502.03373, section 4): right answers are worth less the longer they are, wrong ones lose less,
    so that it pays to go on thinking; `exceeded` at the limit and beyond. The form replaces the outcome reward.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: need at least 1")

    def of_group(lengths: Sequence[int], rights: Sequence[bool]) -> list[float]:
        values = []
        for length, is_right in zip(lengths, rights, strict=True):
            start, end = right if is_right else wrong
            curve = end + 0.5 * (start - end) * (1 + math.cos(math.pi * length / limit))
            values.append(curve if length < limit else exceeded)
        return values

    return _made(of_group, correct, args)


def target_exact(*, correct: str, alpha: float, args: Mapping[str, Any] | None = None) -> RewardFn:
    """Correctness minus alpha for every token away from the length asked for, task.meta["num_tokens"].

    L1 (arXiv 2503.04697, LCPO-Exact): 1(correct) - alpha |n_asked - n|. The form replaces the outcome reward.
    """
    return _targeted(lambda gap, is_right: float(is_right) - alpha * abs(gap), correct, args)


def target_max(
    *, correct: str, alpha: float, delta: float, args: Mapping[str, Any] | None = None
) -> RewardFn:
    """Correctness times a factor that falls once the length asked for, task.meta["num_tokens"], is exceeded.

    L1 (arXiv 2503.04697, LCPO-Max): 1(correct) clip(alpha (n_asked - n) + delta, 0, 1).
    """
    return _targeted(
        lambda gap, is_right: float(is_right) * min(1.0, max(0.0, alpha * gap + delta)), correct, args
    )


def shorter_than_usual(*, correct: str, alpha: float, args: Mapping[str, Any] | None = None) -> RewardFn:
    """Correct answers lose up to alpha, the more the longer they are among the group's correct ones.

    Arora and Zanette (arXiv 2502.04463): 1(correct) (1 - alpha sigmoid((len - mean) / std)), over correct answers.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha}: need 0 <= alpha < 1")

    def of_group(lengths: Sequence[int], rights: Sequence[bool]) -> list[float]:
        known = [length for length, is_right in zip(lengths, rights, strict=True) if is_right]
        mean = sum(known) / max(1, len(known))
        std = math.sqrt(sum((length - mean) ** 2 for length in known) / max(1, len(known)))
        scaled = [(length - mean) / (std or 1.0) for length in lengths]
        return [
            float(is_right) * (1 - alpha / (1 + math.exp(-z)))
            for z, is_right in zip(scaled, rights, strict=True)
        ]

    return _made(of_group, correct, args)


def _targeted(value: Callable[[int, bool], float], correct: str, args: Mapping[str, Any] | None) -> RewardFn:
    def reward(task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
        asked = task.meta.get("num_tokens")
        if not isinstance(asked, int):
            raise ValueError(f"task {task.id} asks for no length (num_tokens in meta)")
        rights = _rights(base, task, rollouts)
        return [
            None if is_right is None else value(asked - rollout.num_sampled, is_right)
            for rollout, is_right in zip(rollouts, rights, strict=True)
        ]

    base = load_reward(correct, args)
    return bounded_if(lambda task: is_bounded(base, task))(reward)


def _made(of_group: _OfGroup, correct: str, args: Mapping[str, Any] | None) -> RewardFn:
    """A reward over the rollouts whose correctness is known; None for the others."""

    def reward(task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
        rights = _rights(base, task, rollouts)
        known = {i: is_right for i, is_right in enumerate(rights) if is_right is not None}
        found = of_group([rollouts[i].num_sampled for i in known], list(known.values())) if known else []
        values = dict(zip(known, found, strict=True))
        return [values.get(i) for i in range(len(rollouts))]

    base = load_reward(correct, args)
    return bounded_if(lambda task: is_bounded(base, task))(reward)


def _rights(base: RewardFn, task: Task, rollouts: Sequence[Rollout]) -> list[bool | None]:
    """Whether each is correct; a failure on its text counts as wrong, an unscorable one stays so."""
    found: dict[int, Verdict] = {}
    judge(base, task, rollouts, found.__setitem__)
    verdicts = [found[i] for i in range(len(rollouts))]
    return [
        None
        if v.kind == "unscorable" or (v.kind == "judged" and v.value is None)
        else (v.value or 0.0) >= _CORRECT
        for v in verdicts
    ]
