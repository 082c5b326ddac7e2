"""Exact top-k of long rows of integer keys in Triton: one program per row, which it reads about once.

1. A row of at most `wide` keys is held in registers. A longer one shows a sample, which gives a floor that the k-th
   largest key very probably reaches, and few keys do. A bit for every key says whether it does; a prefix sum over words
   of 32 bits, and the places of the bits are written down in ascending order. If too few or too many reach the floor
   (a sample can deceive, the more so where neighbours are alike), a second one is tried.
2. Among the keys in registers the k-th largest is sought, two guesses at a time (kth_triton.py).
3. Those above it and the first ones equal to it are written out by one more prefix sum.

If both floors deceive, or too many keys equal the floor, the search runs over the whole row instead: slower, as exact.
There is no atomic and no sort: the result is the same for every batch and launch. Next: index_topk_triton.py.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.kth_triton import LOWEST, MINUS_INF, kth, rows_of, score_of


@dataclass(frozen=True)
class Shape:
    """Launch shape."""

    sample: int = 4096
    """Keys that the floor of a long row is taken from."""
    narrow: int = 4096
    """Keys in registers where so many suffice; at least twice the kept ones."""
    wide: int = 8192
    """Keys in registers otherwise, at least twice as many; rows longer than that need a floor."""
    warps: int = 8
    registers: int | None = 80
    """Of a thread at most: so that three programs share a multiprocessor. Fewer are too few and go to memory."""

    def widths(self, num_kept: int) -> tuple[int, int]:
        """`narrow` and `wide` where so many keys are kept."""
        narrow = max(2 * triton.next_power_of_2(num_kept), self.narrow)
        return min(narrow, MOST), min(max(2 * narrow, self.wide), MOST)

    def workspace(self, num_kept: int, width: int) -> int:
        """int32 numbers that a row needs beside its keys: places of the few, a bit for every key."""
        return self.widths(num_kept)[1] + 32 * triton.cdiv(width + 32, 1024)


SHAPE = Shape()
MOST = 32768
"""Keys in registers: two counts of them fit one number."""
ALIGN = tl.constexpr(32)
"""Rows are read from a multiple of it on, so that a thread reads neighbours at once."""
TRIES = tl.constexpr(2)
"""Floors before the whole row is searched."""


@triton.jit
def _quarters(x):
    """x[0::4], x[1::4], x[2::4], x[3::4]: what a thread reads at once, apart."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _before(ones):
    """For every fourth of numbers [N] the sum of those before it, [N / 4], and the sum of all.

    By groups of 128, which a warp has to itself: the threads wait for each other over the sums of groups only.
    """
    N: tl.constexpr = ones.shape[0]
    GROUP: tl.constexpr = min(N, 128)
    quad = tl.sum(tl.reshape(ones, [N // GROUP, GROUP // 4, 4]), 2)
    inside = tl.cumsum(quad, 1) - quad
    group = tl.sum(quad, 1)
    return tl.reshape((tl.cumsum(group, 0) - group)[:, None] + inside, [N // 4]), tl.sum(group, 0)


@triton.jit
def _numbers(first, N: tl.constexpr):
    """The quarters of first .. first + N - 1."""
    at = first + 4 * tl.arange(0, N // 4)
    return at, at + 1, at + 2, at + 3


@triton.jit
def _write(kept, where, first, out_ptr):
    """Write first + `where`, which comes in quarters, of the kept; returns how many there are."""
    ones = _quarters(kept.to(tl.int32))
    to, num = _before(kept.to(tl.int32))
    for n in tl.static_range(4):
        tl.store(out_ptr + to, first + where[n], mask=ones[n] != 0)
        to += ones[n]
    return num


@triton.jit
def _cut(equal, left):
    """How many of these must be looked at until `left` of them were true; 0 for left = 0, at most the last that is true."""
    ones, numbers = _quarters(equal.to(tl.int32)), _numbers(1, equal.shape[0])
    rank, _ = _before(equal.to(tl.int32))
    cut = tl.zeros_like(rank)
    for n in tl.static_range(4):
        cut = tl.where((ones[n] != 0) & (rank < left), numbers[n], cut)
        rank += ones[n]
    return tl.max(cut, 0)


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
def _select_row(
    keys_ptr, begin, end, width, first_key, out_ptr, K: tl.constexpr, N: tl.constexpr, T: tl.constexpr
):
    """Write the K best of a row that N keys from a multiple of ALIGN on hold.

    Unless the K-th has equals beyond: returns its key, or that of the K-th, and how many reach it.
    """
    start = begin // ALIGN * ALIGN
    there = _inside(start, begin, end, N)
    key = tl.where(there, _block(keys_ptr, start, width, N), LOWEST)
    low, high = tl.min(tl.where(there, key, 0x7FFFFFFF), 0), tl.max(key, 0)
    score = score_of(key)  # NaN where nothing is, which reaches nothing
    threshold, reach = kth(rows_of(score, T), low, high, end - begin, K, 0, False)
    if reach == K:
        kept = score >= score_of(tl.maximum(threshold, MINUS_INF))
        _write(kept, _numbers(start, N), first_key, out_ptr)
    return threshold, reach


@triton.jit
def _select_few(
    keys_ptr, places_ptr, few, floor, first_key, out_ptr, K: tl.constexpr, N: tl.constexpr, T: tl.constexpr
):
    """The same of the keys at `few` places, of which none is below the floor."""
    at = tl.arange(0, N)
    key = tl.load(keys_ptr + tl.load(places_ptr + at), mask=at < few, other=LOWEST)
    score = score_of(key)
    threshold, reach = kth(rows_of(score, T), floor, tl.max(key, 0), few, K, 0, True)
    if reach == K:
        kept = score >= score_of(tl.maximum(threshold, MINUS_INF))
        tl.debug_barrier()  # so that the places are read again: registers are scarcer
        _write(kept, _quarters(tl.load(places_ptr + at)), first_key, out_ptr)
    return threshold, reach


@triton.jit
def _threshold_in_memory(keys_ptr, begin, end, width, low, high, wanted, BLOCK: tl.constexpr):
    """A key in low .. high that wanted keys reach; if there is none, the wanted-th largest, which lies there."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    guess = low + 1  # low itself where many equal keys are what is in the way
    while low < high:
        counts = tl.zeros([BLOCK], tl.int32)
        start = begin // ALIGN * ALIGN
        while start < end:
            key = _block(keys_ptr, start, width, BLOCK)
            counts += ((key >= guess.to(tl.int32)) & _inside(start, begin, end, BLOCK)).to(tl.int32)
            start += BLOCK
        count = tl.sum(counts, 0)
        low = tl.where(count >= wanted, guess, low)
        high = tl.where(count > wanted, high, tl.where(count == wanted, guess, guess - 1))
        guess = low + (high - low + 1) // 2
    return low.to(tl.int32)


@triton.jit
def _write_row(
    keys_ptr, begin, end, width, threshold, first_key, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """The K best of a row in memory, given what separates them."""
    counts = tl.zeros([BLOCK], tl.int32)
    start = begin // ALIGN * ALIGN
    while start < end:
        key = _block(keys_ptr, start, width, BLOCK)
        counts += ((key > threshold) & _inside(start, begin, end, BLOCK)).to(tl.int32)
        start += BLOCK
    left = K - tl.sum(counts, 0)
    start = begin // ALIGN * ALIGN
    while start < end:
        key, there = _block(keys_ptr, start, width, BLOCK), _inside(start, begin, end, BLOCK)
        equal = there & (key == threshold)
        kept = (there & (key > threshold)) | (equal & (tl.arange(0, BLOCK) < _cut(equal, left)))
        out_ptr += _write(kept, _numbers(start, BLOCK), first_key, out_ptr)
        left -= tl.sum(equal.to(tl.int32), 0)
        start += BLOCK


@triton.jit
def _floor(keys_ptr, begin, end, rank, SAMPLE: tl.constexpr, T: tl.constexpr):
    """A key that about `rank` of SAMPLE keys of a longer row reach."""
    GROUPS: tl.constexpr = SAMPLE // 4  # of neighbours, which one load fetches; eight are alike too often
    group = tl.arange(0, SAMPLE) // 4
    first = (begin + 3) // 4 * 4
    num = end - first - 4
    place = group * (num // GROUPS) + group * (num % GROUPS) // GROUPS
    key = tl.load(keys_ptr + first + place // 4 * 4 + tl.arange(0, SAMPLE) % 4)
    floor, _ = kth(rows_of(score_of(key), T), tl.min(key, 0), tl.max(key, 0), SAMPLE, rank, rank // 16, False)
    return floor


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
def _places(words_ptr, places_ptr, begin, end, MOST: tl.constexpr, WORDS: tl.constexpr):
    """Write the places of the keys that _mark marked, ascending, MOST at most; returns how many there are."""
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
            tl.store(places_ptr + place, at * 32 + (power - 127), mask=(word != 0) & (place < MOST))
            place += 1
            word ^= lowest
            most -= 1
        start += WORDS
    return found


@triton.jit
def _find_few(
    keys_ptr, places_ptr, begin, end, width,
    K: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, SAMPLE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A floor, and how many keys of a long row reach it: from K to WIDE very probably, and their places are written."""
    share = SAMPLE / (end - begin).to(tl.float32)
    # Five standard deviations if keys were independent, and a little more since neighbours are not.
    rank = 1.0625 * K * share + 5 * tl.sqrt(K * share) + 8
    rank = tl.minimum(rank, 0.625 * WIDE * share).to(tl.int32)
    few, tries = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    floor = few
    while ((few < K) | (few > WIDE)) & (tries < TRIES):
        floor = _floor(keys_ptr, begin, end, tl.minimum(rank, SAMPLE - 1), SAMPLE, T)
        _mark(keys_ptr, places_ptr + WIDE, begin, end, width, floor, 16 * T)
        tl.debug_barrier()  # memory that other threads of the program have written
        few = _places(places_ptr + WIDE, places_ptr, begin, end, WIDE, 4 * T)
        tl.debug_barrier()
        rank = rank * NARROW // tl.maximum(few, NARROW // 16) + 1
        tries += 1
    return floor, few


@triton.jit(
    do_not_specialize=["first_row", "first_key"], do_not_specialize_on_alignment=["begin_ptr", "end_ptr"]
)
def _topk_kernel(
    keys_ptr, begin_ptr, end_ptr, work_ptr, out_ptr, first_row, first_key, width, work_size,
    K: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, SAMPLE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The K best keys of one row, with T threads."""
    BLOCK: tl.constexpr = 8 * T
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    begin = tl.load(begin_ptr + row) - first_key
    end = tl.load(end_ptr + row) - first_key
    keys_ptr += local * width
    places_ptr = work_ptr + local * work_size
    out_ptr += row * K
    num, span = end - begin, end - begin // ALIGN * ALIGN
    low, high, reach = tl.full([], LOWEST, tl.int32), tl.full([], 0x7FFFFFFF, tl.int32), K
    if num <= K:
        start = 0
        while start < K:
            at = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + at, tl.where(at < num, first_key + begin + at, -1), mask=at < K)
            start += BLOCK
    elif span <= NARROW:
        low, reach = _select_row(keys_ptr, begin, end, width, first_key, out_ptr, K, NARROW, T)
        high = low
    elif span <= WIDE:
        low, reach = _select_row(keys_ptr, begin, end, width, first_key, out_ptr, K, WIDE, T)
        high = low
    else:
        floor, reach = _find_few(keys_ptr, places_ptr, begin, end, width, K, NARROW, WIDE, SAMPLE, T)
        if reach < K:
            high = floor - 1
        elif reach <= NARROW:
            low, reach = _select_few(keys_ptr, places_ptr, reach, floor, first_key, out_ptr, K, NARROW, T)
            high = low
        elif reach <= WIDE:
            low, reach = _select_few(keys_ptr, places_ptr, reach, floor, first_key, out_ptr, K, WIDE, T)
            high = low
        else:
            low = floor
    if reach != K:
        threshold = _threshold_in_memory(keys_ptr, begin, end, width, low, high, K, BLOCK)
        _write_row(keys_ptr, begin, end, width, threshold, first_key, out_ptr, K, BLOCK)


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

    keys is int32, `rows` rows of `width` numbers of `ordered`, the first column being key `first_key`; work is int32
    with rows * shape.workspace(K, width) numbers.
    """
    K = out_NK.shape[1]
    narrow, wide = shape.widths(K)
    _topk_kernel[(rows,)](
        keys, begin_N, end_N, work, out_NK, first_row, first_key, width, shape.workspace(K, width),
        K=K, NARROW=narrow, WIDE=wide, SAMPLE=shape.sample, T=32 * shape.warps,
        num_warps=shape.warps, maxnreg=shape.registers,
    )  # fmt: skip
