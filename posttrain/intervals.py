"""95 % confidence intervals for pass rates.

Wilson's score interval (E. B. Wilson, JASA 22, 1927) for yes-or-no results: unlike p +- 1.96 s it stays
inside 0..1 and does not shrink to nothing at 0 or n successes.
"""

import math
import statistics
from collections.abc import Sequence

Z95 = 1.959964


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a share; ValueError for n = 0."""
    if n <= 0:
        raise ValueError("n=0: no interval without a trial")
    assert 0 <= successes <= n, f"{successes} successes of {n}"
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the interval touches 0 or 1; rounding would leave it a hair away.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == n else centre + half


def mean_interval(values: Sequence[float], z: float = Z95) -> tuple[float, float]:
    """Normal interval of the mean of shares, cut to 0..1; one value has the widest.

    For tasks with several samples each: the value of a task is its share of passes, and the spread is
    that between tasks. Equal values give an interval of no width, so read it beside n.
    """
    if not values:
        raise ValueError("no values: no interval")
    if len(values) == 1:
        return 0.0, 1.0
    mean = statistics.fmean(values)
    half = z * statistics.stdev(values) / math.sqrt(len(values))
    return max(0.0, mean - half), min(1.0, mean + half)
