"""The k-th largest of scores in registers: what topk_triton.py separates the kept from the others by.

Two guesses a round, counted by all threads together. They are made between counts that are known, as if scores were spread
evenly there. Where that does not help, at thirds of the integers between; now and then at the lowest and the highest
score left, which ends the search among equal ones. Scores of an indexer take some five rounds, nothing more than 34. The
result does not depend on the guesses: it is exact. Next: topk_triton.py.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-0x80000000)
"""The key of NaN."""
MINUS_INF = tl.constexpr(-0x7F800001)
"""The key of -inf, the next one that a score can have."""
HUGE = tl.constexpr(1e30)
"""Scores beyond it are none to interpolate between."""
TURNS = tl.constexpr(12)
"""Rounds before thirds alone are left: 22 more at most."""


@triton.jit
def ordered(score):
    """int32 that orders as fp32 scores do: -0.0 as 0.0, NaN lowest."""
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score == 0.0, 0, key)
    return tl.where(score != score, LOWEST, key)


@triton.jit
def score_of(key):
    """The score that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _near(score):
    """A key next to a score, or any where there is none."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _finite(key):
    """The score that has this key, or the nearest one to interpolate from."""
    return tl.minimum(tl.maximum(score_of(tl.maximum(key, MINUS_INF)), -HUGE), HUGE)


@triton.jit
def rows_of(x, T: tl.constexpr):
    """[R, T, 4], of which each of T threads has R times four."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = min(T, N // 4)
    return tl.reshape(x, [N // (4 * C), C, 4])


@triton.jit
def _counts(score, first, second):
    """How many scores [R, T, 4] reach the key `first`, plus 0x10000 times how many reach `second`.

    Counted in fp32, of which a multiprocessor adds twice as many as integers; in a thread as long as possible.
    """
    first, second = score_of(tl.maximum(first, MINUS_INF)), score_of(tl.maximum(second, MINUS_INF))
    one = tl.sum(tl.sum(tl.where(score >= first, 1.0, 0.0), 2), 0).to(tl.int32)
    two = tl.sum(tl.sum(tl.where(score >= second, 1.0, 0.0), 2), 0).to(tl.int32)
    return tl.sum(one + (two << 16), 0)


@triton.jit
def _thirds(low, high):
    """Two keys that cut low .. high into three."""
    third = ((high.to(tl.int64) - low) // 3).to(tl.int32)
    return low + third + 1, high - third


@triton.jit
def _between(low, high, reach, beyond, target, early):
    """Two keys about the one that target of the scores reach, if those between low and high are spread evenly.

    As far apart as chance asks for; farther while the scores between are so many that their density may change.
    """
    num = (reach - beyond).to(tl.float32)
    apart = tl.minimum(0.35 * tl.sqrt(num) + tl.where(early, 0.0625 * num, 0.0), num / 6)
    middle = reach.to(tl.float32) - target
    bottom = _finite(low)
    slope = (_finite(high) - bottom) / num
    first = bottom + slope * tl.maximum(middle - apart, 0.0)
    return _near(first), _near(bottom + slope * tl.minimum(middle + apart, num))


@triton.jit
def _start(score, low, high, num, wanted, TAIL: tl.constexpr):
    """Two keys to begin with: as if scores were normal or, with TAIL, fell off exponentially from low on."""
    mean = tl.sum(tl.where(tl.abs(score) < HUGE, score, 0.0)) / num
    share = wanted / num  # below 1
    bottom = _finite(low)
    if TAIL:
        spread = tl.maximum(mean - bottom, 0.0)
        middle = bottom - spread * tl.log(share)
        apart = 0.05 * spread
    else:
        spread = (_finite(high) - bottom) / 8  # about a standard deviation of thousands
        middle = mean - spread * tl.log(share / (1.0 - share)) / 1.7
        apart = 0.1 * spread
    return _near(middle - apart), _near(middle + apart)


@triton.jit
def kth(score, low, high, num, wanted, slack, TAIL: tl.constexpr):
    """A key that wanted .. wanted + slack scores [R, T, 4] reach; if there is none, the wanted-th largest.

    low and high are the lowest and the highest of their num keys, num >= wanted. Also returns how many reach the key.
    """
    reach, beyond, thirds = num, 0, False
    turn = tl.full([], 0, tl.int32)
    high = tl.where(reach <= wanted + slack, low, high)
    first, second = low, low
    if low < high:
        first, second = _start(score, low, high, num, wanted, TAIL)
    while low < high:
        first = tl.minimum(tl.maximum(first, low + 1), high)
        second = tl.minimum(tl.maximum(second, first), high)
        counts = _counts(score, first, second)
        one, two = counts & 0xFFFF, (counts >> 16) & 0xFFFF
        before = reach - beyond
        high = tl.where(two >= wanted, high, tl.where(one >= wanted, second, first) - 1)
        beyond = tl.where(two >= wanted, beyond, tl.where(one >= wanted, two, one))
        low = tl.where(two >= wanted, second, tl.where(one >= wanted, first, low))
        reach = tl.where(two >= wanted, two, tl.where(one >= wanted, one, reach))
        high = tl.where((reach <= wanted + slack) | (high < MINUS_INF), low, high)
        turn += 1
        even = (turn == 1) | thirds | (2 * (reach - beyond) <= before)
        if ((turn == 6) | (turn == 9)) & (low < high):
            low, high = _ends(score, low, high)
            first, second, thirds = low + 1, high, True
        elif even & (turn < TURNS):
            first, second = _between(low, high, reach, beyond, wanted + 0.5 + 0.5 * slack, turn == 1)
            thirds = False
        else:
            first, second = _thirds(low, high)
            thirds = True
    return low, reach


@triton.jit
def _ends(score, low, high):
    """The lowest and the highest key among low .. high."""
    lowest = tl.min(tl.where(score >= score_of(tl.maximum(low, MINUS_INF)), score, float("inf")))
    highest = tl.max(tl.where(score <= score_of(high), score, -float("inf")))
    return tl.where(low == LOWEST, low, _near(lowest)), _near(highest)
