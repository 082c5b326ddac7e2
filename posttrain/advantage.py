"""The advantage of GRPO: reward minus the mean reward of the group (V3.2 Eq. 5), and what shapes the reward before.

Next: packing.py.
"""

from collections.abc import Sequence


def advantages(rewards: Sequence[float], *, divide_by_std: bool = False) -> list[float] | None:
    """One advantage per completion; None if all rewards are equal and there is nothing to learn.

    V3.2 and Dr.GRPO subtract the mean alone. divide_by_std divides by the group's standard deviation (of a sample,
    n - 1; DeepSeekMath 4.1.2), which favours tasks that are almost always or almost never solved.
    """
    if len(rewards) < 2 or max(rewards) - min(rewards) < 1e-9:
        return None
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not divide_by_std:
        return centred
    std = (sum(x * x for x in centred) / (len(centred) - 1)) ** 0.5
    return [x / (std + 1e-4) for x in centred]


def overlong_penalty(num_tokens: int, *, budget: int, buffer: int) -> float:
    """DAPO Eq. 13: 0 up to budget - buffer tokens, then in a straight line to -1 at the budget and beyond."""
    if buffer == 0:
        return 0.0
    return -min(1.0, max(0.0, (num_tokens - (budget - buffer)) / buffer))
