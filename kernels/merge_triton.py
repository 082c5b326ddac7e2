"""Entries that two neighbouring queries keep, each once, in Triton: so that their gradients are added to memory once.

The kept slots of a query are ascending, with missing ones at the end, as the selection writes them. Where an entry of
one row stands among those of the other is found by bisection, all entries at once; a prefix sum counts the ones that
both have. Rows that are not like that (holes, duplicates, another order) are put one behind the other, nothing
merged: slower, as right. Next: sparse_mla_backward_triton.py.

Shape letters: N queries, P = ceil(N / 2) pairs, K kept, U = 2 K places of a pair.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

NONE = tl.constexpr(0x7FFF)
"""In place of a place: the query does not keep that entry."""
MOST = 0x7FFF
"""Kept entries of a row: two places fit one number."""


@dataclass(frozen=True)
class Merged:
    """The entries of every pair of queries 2 p and 2 p + 1. An odd last query is a pair with an empty row."""

    slots_PU: Tensor
    """int32, the first num of them; in rows that were not merged -1 is a missing one."""
    places_PU: Tensor
    """int32: place in the first row | place in the second one << 16, either of which may be NONE."""
    num_P: Tensor
    """int32."""
    kept_P2: Tensor
    """int32: how many the two rows keep; 0 for one that is empty, or not there."""


@triton.jit
def _row(slots_ptr, there, num_slots, K: tl.constexpr, KB: tl.constexpr):
    """A row's slots, which exist, how many, and whether they ascend from the first place on without a gap."""
    at = tl.arange(0, KB)
    slots = tl.load(slots_ptr + at, mask=(at < K) & there, other=-1)
    after = tl.load(slots_ptr + at + 1, mask=(at + 1 < K) & there, other=-1)
    valid = (slots >= 0) & (slots < num_slots)
    num = tl.sum(valid.to(tl.int32), 0)
    wrong = (valid != (at < num)) | ((at + 1 < num) & (after <= slots))
    return slots, valid, num, tl.max(wrong.to(tl.int32), 0) == 0


@triton.jit
def _below(slots, row_ptr, num, BITS: tl.constexpr):
    """How many of the num < 2^BITS ascending slots of a row are less than each of `slots`."""
    found = tl.zeros_like(slots)
    for n in tl.static_range(BITS):
        probe = found + (1 << (BITS - 1 - n))
        less = tl.load(row_ptr + probe - 1, mask=probe <= num, other=0) < slots
        found = tl.where(less & (probe <= num), probe, found)
    return found


@triton.jit(do_not_specialize=["num_queries", "num_slots"])
def _merge_kernel(
    slots_ptr, out_ptr, places_ptr, num_ptr, kept_ptr, num_queries, num_slots,
    K: tl.constexpr, KB: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    first_ptr, second_ptr = slots_ptr + pair * (2 * K), slots_ptr + pair * (2 * K) + K
    out_ptr += pair * (2 * K)
    places_ptr += pair * (2 * K)
    at = tl.arange(0, KB)
    first, in_first, num_first, first_ascends = _row(first_ptr, True, num_slots, K, KB)
    second, in_second, num_second, second_ascends = _row(
        second_ptr, 2 * pair + 1 < num_queries, num_slots, K, KB
    )
    tl.store(kept_ptr + 2 * pair, num_first)
    tl.store(kept_ptr + 2 * pair + 1, num_second)
    if first_ascends & second_ascends:
        below = _below(first, second_ptr, num_second, BITS)
        other = tl.load(second_ptr + below, mask=in_first & (below < num_second), other=-1)
        both = (in_first & (other == first)).to(tl.int32)
        where = at + below - (tl.cumsum(both, 0) - both)
        tl.store(out_ptr + where, first, mask=in_first)
        tl.store(places_ptr + where, at | (tl.where(both != 0, below, NONE) << 16), mask=in_first)
        shared = tl.sum(both, 0)
        below = _below(second, first_ptr, num_first, BITS)
        other = tl.load(first_ptr + below, mask=in_second & (below < num_first), other=-1)
        both = (in_second & (other == second)).to(tl.int32)
        where = at + below - (tl.cumsum(both, 0) - both)
        alone = in_second & (both == 0)
        tl.store(out_ptr + where, second, mask=alone)
        tl.store(places_ptr + where, (at << 16) | NONE, mask=alone)
        tl.store(num_ptr + pair, num_first + num_second - shared)
    else:
        tl.store(out_ptr + at, tl.where(in_first, first, -1), mask=at < K)
        tl.store(out_ptr + K + at, tl.where(in_second, second, -1), mask=at < K)
        # A second row that is not there has no place that may be read either.
        tl.store(places_ptr + at, tl.where(in_first, at, NONE) | (NONE << 16), mask=at < K)
        tl.store(places_ptr + K + at, (tl.where(in_second, at, NONE) << 16) | NONE, mask=at < K)
        tl.store(num_ptr + pair, 2 * K)


def merge(slots_NK: Tensor, num_slots: int) -> Merged:
    """Merge rows 2 p and 2 p + 1 of int32 slots, contiguous, of which anything outside 0 .. num_slots - 1 is missing."""
    N, K = slots_NK.shape
    if K > MOST or slots_NK.dtype != torch.int32 or not slots_NK.is_contiguous():
        raise ValueError(
            f"slots {tuple(slots_NK.shape)} {slots_NK.dtype}: contiguous int32, at most {MOST} a row"
        )
    P = triton.cdiv(N, 2)
    found = Merged(*(slots_NK.new_empty(P, *size) for size in ((2 * K,), (2 * K,), (), (2,))))
    if P:
        _merge_kernel[(P,)](
            slots_NK, found.slots_PU, found.places_PU, found.num_P, found.kept_P2, N, num_slots,
            K=K, KB=triton.next_power_of_2(K), BITS=K.bit_length(), num_warps=8,
        )  # fmt: skip
    return found
