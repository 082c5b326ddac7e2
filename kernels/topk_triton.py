"""Exact top-k of long rows of integer keys in Triton: one program per row, which it reads about once.

1. A sample of the row gives a floor that the k-th largest key very probably reaches, and few keys do.
2. A bit for every key says whether it reaches the floor; a prefix sum over words of 32 bits, and the places of the
   bits are written down in ascending order.
3. Among these few the k-th largest is sought in registers, two guesses at a time; those above it and the first ones
   equal to it are written out by one more prefix sum.

If too few or too many reach the floor (a sample can deceive; a row can hold one value), the search runs over the
whole row instead: slower, as exact. There is no atomic and no sort: the result is the same for every batch and
launch. A row costs waiting rather than work: what counts is the number of steps of which one needs the other's result.
Next: index_topk_triton.py.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Launch shape."""

    sample: int = 4096
    """Keys that the floor is taken from; shorter rows are taken whole."""
    warps: int = 8

    def few(self, num_kept: int, width: int) -> int:
        """Keys that may reach the floor; the longer a row, the less a sample knows of it."""
        power = triton.next_power_of_2(num_kept)
        return min(max((2 if width <= 32 * power else 4) * power, self.sample), MOST)

    def workspace(self, num_kept: int, width: int) -> int:
        """int32 numbers that a row needs beside its keys: places of the few, a bit for every key."""
        return self.few(num_kept, width) + 32 * triton.cdiv(width + 32, 1024)


SHAPE = Shape()
MOST = 32768
"""Of the few and of a sample: two counts of them fit one number."""
LOWEST = tl.constexpr(-0x80000000)
ALIGN = tl.constexpr(32)
"""Rows are read from a multiple of it on, so that a thread reads neighbours at once."""


@triton.jit
def ordered(score):
    """int32 that orders as fp32 scores do: -0.0 as 0.0, NaN lowest."""
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score == 0.0, 0, key)
    return tl.where(score != score, LOWEST, key)


@triton.jit
def _narrow(low, high, guess, count, wanted, slack):
    """The part of low .. high in which the wanted-th largest lies; count keys are at least guess.

    With wanted .. wanted + slack of them guess is good enough: it separates as the sought one does.
    """
    done = (count >= wanted) & (count <= wanted + slack)
    high = tl.where(done, guess, tl.where(count >= wanted, high, tl.minimum(high, guess - 1)))
    return tl.where(count >= wanted, guess, low), high


@triton.jit
def _threshold(keys, low, wanted, slack):
    """A number that wanted .. wanted + slack keys in registers reach; if none is, the wanted-th largest key.

    low is one that at least wanted of the keys reach.
    """
    low, high = low.to(tl.int64), tl.max(keys, 0).to(tl.int64)
    while low < high:
        third = (high - low) // 3 + 1
        first = low + third
        second = tl.minimum(first + third, high)
        reached = tl.where(keys >= first.to(tl.int32), 1, 0)
        counts = tl.sum(tl.where(keys >= second.to(tl.int32), 0x10001, reached), 0)
        low, high = _narrow(low, high, first, counts & 0xFFFF, wanted, slack)
        low, high = _narrow(low, high, second, (counts >> 16) & 0xFFFF, wanted, slack)
    return low.to(tl.int32)


@triton.jit
def _block(keys_ptr, start, width, BLOCK: tl.constexpr):
    """Keys of a row from `start` on, whether anybody wrote them or not: four at once, which a closer mask would forbid."""
    at = start + tl.arange(0, BLOCK)
    return tl.load(keys_ptr + at, mask=at < width, other=LOWEST)


@triton.jit
def _inside(start, begin, end, BLOCK: tl.constexpr):
    """Which of these keys are among begin .. end - 1."""
    at = start + tl.arange(0, BLOCK)
    return (at >= begin) & (at < end)


@triton.jit
def _threshold_in_memory(keys_ptr, begin, end, width, low, high, wanted, BLOCK: tl.constexpr):
    """A number in low .. high that wanted keys reach; if none is, the wanted-th largest key, which lies there."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    guess = low + 1  # low itself where many equal keys are what is in the way
    while low < high:
        counts = tl.zeros([BLOCK], tl.int32)
        start = begin // ALIGN * ALIGN
        while start < end:
            key = _block(keys_ptr, start, width, BLOCK)
            counts += ((key >= guess.to(tl.int32)) & _inside(start, begin, end, BLOCK)).to(tl.int32)
            start += BLOCK
        low, high = _narrow(low, high, guess, tl.sum(counts, 0), wanted, 0)
        guess = low + (high - low + 1) // 2
    return low.to(tl.int32)


@triton.jit
def _floor(keys_ptr, num, K: tl.constexpr, FEW: tl.constexpr, SAMPLE: tl.constexpr):
    """A key that more than K, and fewer than FEW, of num > SAMPLE keys will probably reach."""
    at = tl.arange(0, SAMPLE)
    apart = num // (SAMPLE // 8)  # groups of 8 neighbours: what the memory delivers at once
    keys = tl.load(keys_ptr + (at // 8) * apart + at % 8)
    share = SAMPLE / num.to(tl.float32)
    rank = K * share + 5 * tl.sqrt(K * share) + 8  # five standard deviations if the keys were independent
    rank = tl.minimum(rank, (0.75 * FEW) * share).to(tl.int32)
    return _threshold(keys, tl.min(keys, 0), rank, rank // 16)


@triton.jit
def _quarters(x):
    """x[0::4], x[1::4], x[2::4], x[3::4]: what a thread reads at once, apart."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _mark(keys_ptr, words_ptr, begin, end, width, floor, BLOCK: tl.constexpr):
    """Which keys reach the floor, as words of 32 bits from begin // ALIGN * ALIGN on; before begin and behind end anything."""
    bit = tl.full([1], 1, tl.int32) << tl.arange(0, 32)
    words_ptr -= begin // ALIGN
    start = begin // ALIGN * ALIGN
    key = _block(keys_ptr, start, width, BLOCK)
    while start < end:
        reached = tl.reshape(key >= floor, [BLOCK // 32, 32])
        key = _block(keys_ptr, start + BLOCK, width, BLOCK)
        at = start // 32 + tl.arange(0, BLOCK // 32)
        tl.store(words_ptr + at, tl.sum(tl.where(reached, bit[None, :], 0), 1), mask=at * 32 < end)
        start += BLOCK


@triton.jit
def _ones(word):
    """Number of bits set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _from(bit):
    """A word with the bits from number `bit` on, which may be negative or beyond 31."""
    return tl.where(bit >= 32, 0, -1 << tl.minimum(tl.maximum(bit, 0), 31))


@triton.jit
def _places(words_ptr, places_ptr, begin, end, FEW: tl.constexpr, WORDS: tl.constexpr):
    """Write the places of the keys that _mark marked, ascending, FEW at most; returns how many there are."""
    found = 0
    words_ptr -= begin // ALIGN
    start = begin // ALIGN
    while start * 32 < end:
        at = start + tl.arange(0, WORDS)
        word = tl.load(words_ptr + at, mask=at * 32 < end, other=0)
        word &= _from(begin - at * 32) & ~_from(end - at * 32)
        ones = _ones(word)
        place = found + tl.cumsum(ones, 0) - ones
        found += tl.sum(ones, 0)
        most = tl.max(ones, 0)
        while most > 0:  # the lowest bit of every word, as a power of two in fp32
            lowest = word & (~word + 1)
            power = lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23
            tl.store(places_ptr + place, at * 32 + (power - 127), mask=(word != 0) & (place < FEW))
            place += 1
            word ^= lowest
            most -= 1
        start += WORDS
    return found


@triton.jit
def _write(key, inside, where, threshold, out_ptr, found, seen, left):
    """Write `where` of the keys above the threshold and of the first `left` ones equal to it.

    found and seen of them precede these keys; returns how many precede the next.
    """
    tie = tl.where((key == threshold) & inside, 0x10000, 0)
    ones = _quarters(tl.where((key > threshold) & inside, 1, tie))  # two counts in one number
    where = _quarters(where)
    num = ones[0] + ones[1] + ones[2] + ones[3]
    before = tl.cumsum(num, 0) - num
    total = tl.sum(num, 0)
    for n in tl.static_range(4):
        rank = seen + ((before >> 16) & 0xFFFF)
        place = found + (before & 0xFFFF) + tl.minimum(rank, left)
        tl.store(out_ptr + place, where[n], mask=(ones[n] == 1) | ((ones[n] > 1) & (rank < left)))
        before += ones[n]
    return found + (total & 0xFFFF), seen + ((total >> 16) & 0xFFFF)


@triton.jit
def _write_row(
    keys_ptr, begin, end, width, threshold, out_ptr, first_key, K: tl.constexpr, BLOCK: tl.constexpr
):
    """The K best of a whole row, given what separates them."""
    counts = tl.zeros([BLOCK], tl.int32)
    start = begin // ALIGN * ALIGN
    while start < end:
        key = _block(keys_ptr, start, width, BLOCK)
        counts += ((key > threshold) & _inside(start, begin, end, BLOCK)).to(tl.int32)
        start += BLOCK
    left = K - tl.sum(counts, 0)
    found, seen = 0, 0
    start = begin // ALIGN * ALIGN
    while start < end:
        key, inside = _block(keys_ptr, start, width, BLOCK), _inside(start, begin, end, BLOCK)
        where = first_key + start + tl.arange(0, BLOCK)
        found, seen = _write(key, inside, where, threshold, out_ptr, found, seen, left)
        start += BLOCK


@triton.jit(do_not_specialize=["first_row", "first_key"])
def _topk_kernel(
    keys_ptr, begin_ptr, end_ptr, work_ptr, out_ptr, first_row, first_key, width, work_size,
    K: tl.constexpr, FEW: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K best keys of one row."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    begin = tl.load(begin_ptr + row) - first_key
    end = tl.load(end_ptr + row) - first_key
    num = end - begin
    keys_ptr += local * width
    places_ptr = work_ptr + local * work_size
    words_ptr = places_ptr + FEW
    out_ptr += row * K
    if num <= K:
        start = 0
        while start < K:
            at = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + at, tl.where(at < num, first_key + begin + at, -1), mask=at < K)
            start += BLOCK
    else:
        floor = tl.full([], LOWEST, tl.int32)
        if num > SAMPLE:
            floor = _floor(keys_ptr + begin, num, K, FEW, SAMPLE)
        _mark(keys_ptr, words_ptr, begin, end, width, floor, 2 * BLOCK)
        tl.debug_barrier()
        few = _places(words_ptr, places_ptr, begin, end, FEW, BLOCK // 4)
        tl.debug_barrier()  # memory that other threads of the program have written
        if (few >= K) & (few <= FEW):
            at = tl.arange(0, FEW)
            place = tl.load(places_ptr + at, mask=at < few, other=0)
            key = tl.load(keys_ptr + place, mask=at < few, other=LOWEST)
            threshold = _threshold(key, floor, K, 0)
            left = K - tl.sum((key > threshold).to(tl.int32), 0)
            _write(key, at < few, first_key + place, threshold, out_ptr, 0, 0, left)
        else:
            low = tl.where(few >= K, floor, LOWEST)
            high = tl.where(few >= K, 0x7FFFFFFF, floor - 1)
            threshold = _threshold_in_memory(keys_ptr, begin, end, width, low, high, K, BLOCK)
            _write_row(keys_ptr, begin, end, width, threshold, out_ptr, first_key, K, BLOCK)


def topk_rows(
    keys: Tensor,
    begin_N: Tensor,
    end_N: Tensor,
    work: Tensor,
    out_NK: Tensor,
    *,
    first_row: int,
    rows: int,
    first_key: int,
    width: int,
    shape: Shape = SHAPE,
) -> None:
    """Write out_NK[first_row : first_row + rows]: the best of the keys begin .. end - 1, ascending, -1 beyond.

    keys is int32, `rows` rows of `width`, the first column being key `first_key`; work is int32 with
    rows * shape.workspace(K, width) numbers.
    """
    K = out_NK.shape[1]
    _topk_kernel[(rows,)](
        keys, begin_N, end_N, work, out_NK, first_row, first_key, width, shape.workspace(K, width),
        K=K, FEW=shape.few(K, width), SAMPLE=shape.sample, BLOCK=512 * shape.warps, num_warps=shape.warps,
    )  # fmt: skip
