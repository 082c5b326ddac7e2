"""What two neighbouring queries of few heads add to their entries in the backward pass of sparse attention, in Triton.

The kernel `_dkv_kernel` of sparse_mla_backward_triton.py for the pairs of merge_triton.py. Adding to memory takes the same
time for any number of heads; with few of them it is nearly all the time there is, and an entry that both queries keep
is added to once. The heads of both stand one over the other in one product, with zeros where a query does not keep an
entry: what is not finite in one query therefore shows in its neighbour's entries too. Next: sparse_mla_backward_gluon.py,
which does so for more heads.

Shape letters as in sparse_mla_triton.py.
"""

import triton
import triton.language as tl

from posttrain.kernels.merge_triton import NONE
from posttrain.kernels.product_triton import dot

HEADS = 32
"""Up to so many."""


@triton.jit(do_not_specialize=["first_row"])
def dkv_merged_few_kernel(
    q_ptr, slots_ptr, places_ptr, num_ptr, kept_ptr, do_ptr, work_ptr, dkv_ptr, first_row,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    VALUE: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what a pair adds to BC columns of its entries: [dS | P]^T [Q | dO] (VALUE), dS^T Q for the rotary ones."""
    E: tl.constexpr = R + P
    BLOCKS: tl.constexpr = tl.cdiv(R if VALUE else P, BC)
    B2: tl.constexpr = 2 * BH if VALUE else BH
    pair = (tl.program_id(0) // BLOCKS).to(tl.int64)
    c = (0 if VALUE else R) + tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    in_c = c < (R if VALUE else E)
    h4 = tl.arange(0, 2 * B2)
    query, h, is_q = h4 // B2, h4 % BH, h4 % B2 < BH
    # Of a query that keeps nothing, or is not there, nothing is read: it may hold anything.
    in_h = (h < H) & (tl.load(kept_ptr + 2 * pair + query) > 0)
    head = (first_row + 2 * pair + query) * H + h
    q_do = tl.load(
        q_ptr + head[:, None] * E + c[None, :], mask=(in_h & is_q)[:, None] & in_c[None, :], other=0.0
    )
    if VALUE:
        do_at = do_ptr + head[:, None] * R + c[None, :]
        q_do += tl.load(do_at, mask=(in_h & (is_q == 0))[:, None] & in_c[None, :], other=0.0)
    work = work_ptr + (2 * pair + query) * (K * 2 * H) + h + H * (is_q == 0)
    num = tl.load(num_ptr + pair)
    for start in tl.range(0, 2 * K if INTERPRET else num, BK, num_stages=STAGES):
        at = start + tl.arange(0, BK)
        slots = tl.load(slots_ptr + pair * (2 * K) + at, mask=at < num, other=-1)
        places = tl.load(places_ptr + pair * (2 * K) + at, mask=at < num, other=NONE | NONE << 16)
        place = (places[:, None] >> (16 * query)[None, :]) & 0xFFFF
        there = (place != NONE) & (h < H)[None, :]
        ds_p = tl.load(work[None, :] + place * (2 * H), mask=there, other=0.0)
        grad = dot(ds_p, q_do, INTERPRET)
        target = dkv_ptr + slots.to(tl.int64)[:, None] * E + c[None, :]
        tl.atomic_add(target, grad, mask=(slots >= 0)[:, None] & in_c[None, :], sem="relaxed")
