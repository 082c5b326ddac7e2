"""Exact top-k of long rows of integer keys in Triton: one program per row, which it reads about once.

1. A sample of the row gives a floor that the k-th largest key very probably reaches, and few keys do.
2. Whoever reaches the floor is written down in ascending order: a bit for every key, a prefix sum over the
   words of 32 bits, then the positions of the bits.
3. Among these few the k-th largest is found by bisection, in registers; those above it and the first ones equal
   to it are written out in the same way.

If too few or too many reach the floor (a sample can deceive; a row can hold one value), the bisection runs over
the whole row instead: slower, as exact. There is no atomic and no sort: the result is the same for every batch
and launch. Next: index_topk_triton.py.
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
    many: int = 0
    """With fewer rows than that, a row has four times as many warps."""

    def few(self, num_kept: int, width: int) -> int:
        """Keys that may reach the floor; the longer a row, the less a sample knows of it."""
        power = triton.next_power_of_2(num_kept)
        return max((2 if width <= 32 * power else 4) * power, self.sample)

    def workspace(self, num_kept: int, width: int) -> int:
        """int32 words that a row needs beside its keys: two bitmaps, and the positions of the few."""
        few = self.few(num_kept, width)
        return 2 * triton.cdiv(max(width, few), 512) * 16 + few


SHAPE = Shape()
LOWEST = tl.constexpr(-0x80000000)


@triton.jit
def ordered(score):
    """int32 that orders as fp32 scores do: -0.0 as 0.0, NaN lowest."""
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score == 0.0, 0, key)
    return tl.where(score != score, LOWEST, key)


@triton.jit
def _narrow(low, high, middle, count, wanted, slack):
    """The part of low .. high in which the wanted-th largest lies; count keys are at least middle.

    With wanted .. wanted + slack of them middle is good enough: it separates as the sought one does.
    """
    done = (count >= wanted) & (count <= wanted + slack)
    high = tl.where(done, middle, tl.where(count >= wanted, high, middle - 1))
    return tl.where(count >= wanted, middle, low), high


@triton.jit
def _threshold(keys, wanted, slack):
    """A number that wanted .. wanted + slack keys in registers reach; if none is, the wanted-th largest key."""
    low, high = tl.min(keys, 0).to(tl.int64), tl.max(keys, 0).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0)
        low, high = _narrow(low, high, middle, count, wanted, slack)
    return low.to(tl.int32)


@triton.jit
def _threshold_in_memory(keys_ptr, num, wanted, BLOCK: tl.constexpr):
    """A number that wanted of num keys reach; if none is, the wanted-th largest key."""
    low, high = tl.full([], -0x80000000, tl.int64), tl.full([], 0x7FFFFFFF, tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        counts = tl.zeros([BLOCK], tl.int32)
        start = 0
        while start < num:
            at = start + tl.arange(0, BLOCK)
            key = tl.load(keys_ptr + at, mask=at < num, other=LOWEST)
            counts += ((key >= middle.to(tl.int32)) & (at < num)).to(tl.int32)
            start += BLOCK
        low, high = _narrow(low, high, middle, tl.sum(counts, 0), wanted, 0)
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
    return _threshold(keys, rank, rank // 16)


@triton.jit
def _mark(flags, bits_ptr, start, num, BLOCK: tl.constexpr):
    """Store BLOCK flags as words of 32 bits."""
    bit = tl.full([1], 1, tl.int32) << tl.arange(0, 32)
    words = tl.sum(tl.where(tl.reshape(flags, [BLOCK // 32, 32]), bit[None, :], 0), 1)
    at = start // 32 + tl.arange(0, BLOCK // 32)
    tl.store(bits_ptr + at, words, mask=at * 32 < num)


@triton.jit
def _mark_row(
    keys_ptr, bits_ptr, ties_ptr, num, threshold, BLOCK: tl.constexpr, TIES: tl.constexpr
):  # fmt: skip
    """Mark the keys that reach the threshold; with TIES those above it and those equal to it apart."""
    start = 0
    while start < num:
        at = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + at, mask=at < num, other=LOWEST)
        if TIES:
            _mark(key > threshold, bits_ptr, start, num, BLOCK)
            _mark((key == threshold) & (at < num), ties_ptr, start, num, BLOCK)
        else:
            _mark((key >= threshold) & (at < num), bits_ptr, start, num, BLOCK)
        start += BLOCK


@triton.jit
def _ones(word):
    """Number of bits set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _write(
    bits_ptr, ties_ptr, places_ptr, num, wanted, offset, out_ptr, limit,
    WORDS: tl.constexpr, TIES: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """Write the positions of marked bits, ascending, at most `limit`; returns how many there are.

    With TIES also those of the first ties, wanted bits in all. With MAPPED bit n stands for places[n].
    """
    found = 0
    above = 0
    if TIES:
        start = 0
        while start * 32 < num:
            at = start + tl.arange(0, WORDS)
            above += tl.sum(_ones(tl.load(bits_ptr + at, mask=at * 32 < num, other=0)), 0)
            start += WORDS
    left = wanted - above
    seen = 0
    start = 0
    while start * 32 < num:
        at = start + tl.arange(0, WORDS)
        bits = tl.load(bits_ptr + at, mask=at * 32 < num, other=0)
        counts = _ones(bits)
        place = found + tl.cumsum(counts, 0) - counts
        found += tl.sum(counts, 0)
        if TIES:
            ties = tl.load(ties_ptr + at, mask=at * 32 < num, other=0)
            counts = _ones(ties)
            rank = seen + tl.cumsum(counts, 0) - counts
            seen += tl.sum(counts, 0)
            place += tl.minimum(rank, left)
        for b in tl.static_range(32):
            here = (bits >> b) & 1
            if TIES:
                tie = (ties >> b) & 1
                here = here | (tie & (rank < left).to(tl.int32))
                rank += tie
            where = at * 32 + b
            if MAPPED:
                where = tl.load(places_ptr + where, mask=here != 0, other=0)
            tl.store(out_ptr + place, offset + where, mask=(here != 0) & (place < limit))
            place += here
        start += WORDS
    return found


@triton.jit(do_not_specialize=["first_row", "first_key", "work_size"])
def _topk_kernel(
    keys_ptr, begin_ptr, end_ptr, work_ptr, out_ptr, first_row, first_key, width, work_size,
    K: tl.constexpr, FEW: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The K best keys of one row."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    begin = tl.load(begin_ptr + row)
    num = tl.load(end_ptr + row) - begin
    keys_ptr += local * width + (begin - first_key)
    places_ptr = work_ptr + local * work_size
    bits_ptr = places_ptr + FEW
    ties_ptr = bits_ptr + (work_size - FEW) // 2
    out_ptr += row * K
    if num <= K:
        start = 0
        while start < K:
            at = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + at, tl.where(at < num, begin + at, -1), mask=at < K)
            start += BLOCK
    else:
        floor = tl.full([], -0x80000000, tl.int32)
        if num > SAMPLE:
            floor = _floor(keys_ptr, num, K, FEW, SAMPLE)
        _mark_row(keys_ptr, bits_ptr, ties_ptr, num, floor, BLOCK, False)
        tl.debug_barrier()  # memory that other threads of the program have written
        few = _write(bits_ptr, ties_ptr, places_ptr, num, 0, 0, places_ptr, FEW, WORDS, False, False)
        tl.debug_barrier()
        if (few >= K) & (few <= FEW):
            at = tl.arange(0, FEW)
            place = tl.load(places_ptr + at, mask=at < few, other=0)
            key = tl.load(keys_ptr + place, mask=at < few, other=floor)
            threshold = _threshold(key, K, 0)
            _mark(key > threshold, bits_ptr, 0, few, FEW)
            _mark((key == threshold) & (at < few), ties_ptr, 0, few, FEW)
            tl.debug_barrier()
            _write(bits_ptr, ties_ptr, places_ptr, few, K, begin, out_ptr, K, FEW // 32, True, True)
        else:
            threshold = _threshold_in_memory(keys_ptr, num, K, BLOCK)
            _mark_row(keys_ptr, bits_ptr, ties_ptr, num, threshold, BLOCK, True)
            tl.debug_barrier()
            _write(bits_ptr, ties_ptr, places_ptr, num, K, begin, out_ptr, K, WORDS, True, False)


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
    rows * shape.workspace(K, width) words.
    """
    K = out_NK.shape[1]
    warps = shape.warps if rows >= shape.many else 4 * shape.warps
    _topk_kernel[(rows,)](
        keys, begin_N, end_N, work, out_NK, first_row, first_key, width, shape.workspace(K, width),
        K=K, FEW=shape.few(K, width), SAMPLE=shape.sample, BLOCK=512 * warps, WORDS=32 * warps, num_warps=warps,
    )  # fmt: skip
