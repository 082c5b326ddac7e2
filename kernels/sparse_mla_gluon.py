"""Sparse MQA-absorbed attention, forward, for many heads on Hopper: the kernel of sparse_mla_triton.py in Gluon.

The function is the same; what differs is that the order of work is written down. Two tiles of kept entries are in
shared memory. While the tensor cores multiply the logits of the next tile, the entries of the tile after it are on
their way into the buffer whose values have just been used, so that the softmax is all that the tensor cores wait
for. Triton's own pipelining keeps two full stages ahead but computes every logit twice (both warp groups all of
them) and reaches half the speed. Compiled only: Gluon has no interpreter, CI compiles it offline. Next: README.md.

Shape letters as in sparse_mla_triton.py.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(math.log2(math.e))
barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # the name before and since Triton 3.7
HEADS = (64, 128)
TILE = 64
"""Heads and kept entries of a tile."""
WARPS = 8


@gluon.constexpr_function
def row_layout(width):
    """Layout in which 8 warps copy rows of so many 2-byte numbers, 16 bytes a thread."""
    lanes = min(32, width // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS, 1], [1, 0])


@gluon.jit
def _copy(
    kv_ptr, rows_wide, rows_narrow, k_smem, k_rot_smem, R: gl.constexpr, P: gl.constexpr,
    wide: gl.constexpr, narrow: gl.constexpr,
):  # fmt: skip
    """Start the copy of a tile of rows of a table; the same rows [BK] for both parts, in their layouts."""
    E: gl.constexpr = R + P
    r = gl.arange(0, R, layout=gl.SliceLayout(0, wide))
    p = gl.arange(0, P, layout=gl.SliceLayout(0, narrow))
    latent = kv_ptr + rows_wide.to(gl.int64)[:, None] * E + r[None, :]
    rotary = kv_ptr + rows_narrow.to(gl.int64)[:, None] * E + R + p[None, :]
    async_copy.async_copy_global_to_shared(k_smem, latent)
    async_copy.async_copy_global_to_shared(k_rot_smem, rotary)
    async_copy.commit_group()


@gluon.jit
def row_slots(slots_row, start, num_slots, missing, K: gl.constexpr, BK: gl.constexpr, layout: gl.constexpr):
    """Slots of a tile in a layout, `missing` for those that are."""
    at = start + gl.arange(0, BK, layout=layout)
    slots = gl.load(slots_row + at, mask=at < K, other=-1)
    return gl.where((slots >= 0) & (slots < num_slots), slots, missing)


@gluon.jit
def forward_kernel(
    q_ptr, kv_ptr, slots_ptr, o_ptr, lse_ptr, scale, num_slots,
    H: gl.constexpr, R: gl.constexpr, P: gl.constexpr, K: gl.constexpr, KB: gl.constexpr,
    BH: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """One query, BH heads."""
    E: gl.constexpr = R + P
    G: gl.constexpr = H // BH
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BK // 2, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, R // 2, 16])
    wide: gl.constexpr = row_layout(R)
    narrow: gl.constexpr = row_layout(P)
    line: gl.constexpr = gl.BlockedLayout([KB // 256], [32], [8], [0])
    smem: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_smem = gl.allocate_shared_memory(dtype, [BH, R], smem)
    q_rot_smem = gl.allocate_shared_memory(dtype, [BH, P], smem)
    k_smem = gl.allocate_shared_memory(dtype, [2, BK, R], smem)
    k_rot_smem = gl.allocate_shared_memory(dtype, [2, BK, P], smem)
    prob_smem = gl.allocate_shared_memory(dtype, [BH, BK], smem)
    row = (gl.program_id(0) // G).to(gl.int64)
    head = gl.program_id(0) % G * BH
    slots_row = slots_ptr + row * K

    # Which entries there are: the last valid place ends the loop, any valid slot stands in for missing ones.
    places = gl.arange(0, KB, layout=line)
    every = row_slots(slots_row, 0, num_slots, -1, K, KB, line)
    stand_in = gl.maximum(gl.max(every, 0), 0)
    tiles = gl.cdiv(gl.max(gl.where(every >= 0, places + 1, 0), 0), BK)

    rows_wide: gl.constexpr = gl.SliceLayout(1, wide)
    rows_narrow: gl.constexpr = gl.SliceLayout(1, narrow)
    # The queries of the heads are rows of a table with E columns, like entries.
    heads = head + gl.arange(0, BH, layout=rows_wide)
    heads_narrow = head + gl.arange(0, BH, layout=rows_narrow)
    _copy(q_ptr + row * (H * E), heads, heads_narrow, q_smem, q_rot_smem, R, P, wide, narrow)
    for tile in gl.static_range(2):
        slots = row_slots(slots_row, tile * BK, num_slots, stand_in, K, BK, rows_wide)
        narrow_slots = row_slots(slots_row, tile * BK, num_slots, stand_in, K, BK, rows_narrow)
        _copy(kv_ptr, slots, narrow_slots, k_smem.index(tile), k_rot_smem.index(tile), R, P, wide, narrow)

    m = gl.full([BH], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([BH, BK], gl.float32, s_layout)
    acc = gl.zeros([BH, R], gl.float32, o_layout)
    zero = gl.zeros([BH, BK], gl.float32, s_layout)
    valid = row_slots(slots_row, 0, num_slots, -1, K, BK, gl.SliceLayout(0, s_layout)) >= 0
    async_copy.wait_group(1)
    logits = warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    logits = warpgroup_mma(q_rot_smem, k_rot_smem.index(0).permute((1, 0)), logits, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    logits = gl.where(valid[None, :], logits * (scale * LOG2E), float("-inf"))
    m = gl.maximum(m, gl.max(logits, 1))
    prob = gl.exp2(logits - m[:, None])
    total += prob
    for tile in range(tiles):
        # prob is that of this tile, acc that of the tiles before it, in terms of the present maximum.
        this = tile % 2
        other = 1 - this
        prob_smem.store(prob.to(dtype))
        valid = row_slots(slots_row, (tile + 1) * BK, num_slots, -1, K, BK, gl.SliceLayout(0, s_layout)) >= 0
        slots = row_slots(slots_row, (tile + 2) * BK, num_slots, stand_in, K, BK, rows_wide)
        narrow_slots = row_slots(slots_row, (tile + 2) * BK, num_slots, stand_in, K, BK, rows_narrow)
        async_copy.wait_group(0)  # the next tile is there
        fence_async_shared()
        acc = warpgroup_mma(prob_smem, k_smem.index(this), acc, is_async=True)
        logits = warpgroup_mma(q_smem, k_smem.index(other).permute((1, 0)), zero, use_acc=False, is_async=True)
        logits = warpgroup_mma(q_rot_smem, k_rot_smem.index(other).permute((1, 0)), logits, is_async=True)
        acc = warpgroup_mma_wait(2, deps=[acc])
        barrier()  # both warp groups are done with this tile's values
        _copy(kv_ptr, slots, narrow_slots, k_smem.index(this), k_rot_smem.index(this), R, P, wide, narrow)
        logits = warpgroup_mma_wait(0, deps=[logits])
        logits = gl.where(valid[None, :], logits * (scale * LOG2E), float("-inf"))
        new_m = gl.maximum(m, gl.max(logits, 1))
        prob = gl.exp2(logits - new_m[:, None])
        shrink = gl.exp2(m - new_m)
        m = new_m
        total = total * shrink[:, None] + prob
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    async_copy.wait_group(0)

    sums = gl.sum(total, 1)
    any_key = sums > 0
    safe = gl.where(any_key, sums, 1.0)
    h = head + gl.arange(0, BH, layout=gl.SliceLayout(1, s_layout))
    lse = gl.where(any_key, (m + gl.log2(safe)) / LOG2E, float("-inf"))
    gl.store(lse_ptr + row * H + h, lse)
    factor = gl.convert_layout(gl.where(any_key, 1.0 / safe, 0.0), gl.SliceLayout(1, o_layout))
    out = gl.convert_layout((acc * factor[:, None]).to(dtype), wide)
    r = gl.arange(0, R, layout=gl.SliceLayout(0, wide))
    gl.store(o_ptr + (row * H + heads[:, None]) * R + r[None, :], out)
