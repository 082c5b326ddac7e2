"""The advantage of GRPO: reward minus the mean reward of the group (V3.2 Eq. 5, no division by the spread).

Left out on purpose: dividing by the standard deviation (biased towards too easy and too hard tasks).
Next: packing.py.
"""

from collections.abc import Sequence


def advantages(rewards: Sequence[float]) -> list[float] | None:
    """One advantage per completion; None if all rewards are equal and there is nothing to learn."""
    if len(rewards) < 2 or max(rewards) - min(rewards) < 1e-9:
        return None
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]
