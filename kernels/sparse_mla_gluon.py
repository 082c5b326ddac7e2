"""Sparse MQA-absorbed attention, forward, for many heads on Hopper: the kernel of sparse_mla_triton.py in Gluon.

The function is the same; what differs is that the order of work is written down. Four warps copy kept entries into
two buffers of shared memory; eight others multiply. A buffer is handed back as soon as its values have been used, so
that the copies hide behind the logits of the other one and the softmax. Triton's own pipelining computes every logit
twice (both warp groups all of them), issues copies from the warps that multiply, and reaches half the speed.
Compiled only: Gluon has no interpreter, CI compiles it offline. Next: README.md.

Shape letters as in sparse_mla_triton.py.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(math.log2(math.e))
barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # the name before and since Triton 3.7
HEADS = (64, 128)
TILE = 64
"""Heads and kept entries of a tile."""
WARPS = 8
PRODUCER_WARPS = gl.constexpr(4)
PRODUCER_REGISTERS = gl.constexpr(56)
"""Per thread; the warps that multiply have 224. Neither spills in its loop over tiles."""


@gluon.constexpr_function
def row_layout(width, size, warps):
    """Layout of a tile of rows of that width: as many threads side by side as fit, `size` numbers each."""
    lanes = min(32, width // size)
    return gl.BlockedLayout([1, size], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def row_slots(slots_row, start, num_slots, missing, K, BK: gl.constexpr, layout: gl.constexpr):
    """Slots of a tile of a row of K in a layout, `missing` for those that are."""
    at = start + gl.arange(0, BK, layout=layout)
    slots = gl.load(slots_row + at, mask=at < K, other=-1)
    return gl.where((slots >= 0) & (slots < num_slots), slots, missing)


@gluon.jit
def _rows(
    slots_row, start, num_slots, stand_in, K, table_row, stride_block, stride_token,
    BK: gl.constexpr, PAGE: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Where a tile's entries are: the slots themselves, or with PAGE what the sequence's table of blocks makes of them."""
    slots = row_slots(slots_row, start, num_slots, stand_in, K, BK, layout)
    if PAGE > 0:
        slots = gl.load(table_row + slots // PAGE) * stride_block + slots % PAGE * stride_token
    return slots


@gluon.jit
def _copy(kv_ptr, stride, rows_wide, rows_narrow, k_smem, k_rot_smem, R: gl.constexpr, P: gl.constexpr):
    """Start the copy of a tile of rows of a table; the same rows [BK] for both parts, in their layouts."""
    r = gl.arange(0, R, layout=gl.SliceLayout(0, row_layout(R, 8, gl.num_warps())))
    p = gl.arange(0, P, layout=gl.SliceLayout(0, row_layout(P, 8, gl.num_warps())))
    latent = kv_ptr + rows_wide.to(gl.int64)[:, None] * stride + r[None, :]
    rotary = kv_ptr + rows_narrow.to(gl.int64)[:, None] * stride + R + p[None, :]
    async_copy.async_copy_global_to_shared(k_smem, latent)
    async_copy.async_copy_global_to_shared(k_rot_smem, rotary)


@gluon.jit
def _producer(
    kv_ptr, unit, slots_row, num_slots, stand_in, tiles, K, table_row, stride_block, stride_token,
    k_smem, k_rot_smem, full, empty,
    R: gl.constexpr, P: gl.constexpr, BK: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Copy one tile after another into the buffers that are handed back; `unit` numbers are one row or stride."""
    wide: gl.constexpr = gl.SliceLayout(1, row_layout(R, 8, gl.num_warps()))
    narrow: gl.constexpr = gl.SliceLayout(1, row_layout(P, 8, gl.num_warps()))
    for tile in range(tiles):
        buffer = tile % 2
        rows_wide = _rows(
            slots_row, tile * BK, num_slots, stand_in, K, table_row, stride_block, stride_token, BK, PAGE, wide
        )  # fmt: skip
        rows_narrow = _rows(
            slots_row, tile * BK, num_slots, stand_in, K, table_row, stride_block, stride_token, BK, PAGE, narrow
        )  # fmt: skip
        mbarrier.wait(empty.index(buffer), (tile // 2 + 1) % 2)
        _copy(kv_ptr, unit, rows_wide, rows_narrow, k_smem.index(buffer), k_rot_smem.index(buffer), R, P)
        async_copy.mbarrier_arrive(full.index(buffer), increment_count=False)


@gluon.jit
def _consumer(
    slots_row, num_slots, first, last, K, scale, q_smem, q_rot_smem, k_smem, k_rot_smem, prob_smem, full, empty,
    R: gl.constexpr, BH: gl.constexpr, BK: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Online softmax over tiles first .. last - 1: sum of values, probabilities [BH, BK] still to be summed, maximum."""
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = q_smem.dtype
    m = gl.full([BH], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([BH, BK], gl.float32, s_layout)
    acc = gl.zeros([BH, R], gl.float32, o_layout)
    zero = gl.zeros([BH, BK], gl.float32, s_layout)
    prob = zero
    slots = row_slots(slots_row, first * BK, num_slots, -1, K, BK, columns)
    for tile in range(first, last):
        # Logits of this tile, then values of this tile with the probabilities they give.
        buffer = tile % 2
        valid = slots >= 0
        mbarrier.wait(full.index(buffer), tile // 2 % 2)
        fence_async_shared()
        logits = warpgroup_mma(
            q_smem, k_smem.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        logits = warpgroup_mma(q_rot_smem, k_rot_smem.index(buffer).permute((1, 0)), logits, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        logits = gl.where(valid[None, :], logits * (scale * LOG2E), float("-inf"))
        new_m = gl.maximum(m, gl.max(logits, 1))
        prob = gl.exp2(logits - new_m[:, None])
        shrink = gl.exp2(m - new_m)
        m = new_m
        total = total * shrink[:, None] + prob
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        prob_smem.store(prob.to(dtype))
        fence_async_shared()
        barrier()
        acc = warpgroup_mma(prob_smem, k_smem.index(buffer), acc, is_async=True)
        # Of the next tile: here they come while values are summed, and no fence waits for them.
        slots = row_slots(slots_row, (tile + 1) * BK, num_slots, -1, K, BK, columns)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()  # both warp groups are done with the buffer
        mbarrier.arrive(empty.index(buffer), count=1)

    return acc, total, m


@gluon.jit
def _finish(
    acc, sums, m, o_row, lse_row,
    R: gl.constexpr, BH: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Divide and store; o_row and lse_row are those of the first head."""
    any_key = sums > 0
    safe = gl.where(any_key, sums, 1.0)
    lse = gl.where(any_key, (m + gl.log2(safe)) / LOG2E, float("-inf"))
    gl.store(lse_row + gl.arange(0, BH, layout=gl.SliceLayout(1, s_layout)), lse)
    factor = gl.convert_layout(gl.where(any_key, 1.0 / safe, 0.0), gl.SliceLayout(1, o_layout))
    wide: gl.constexpr = row_layout(R, 8, gl.num_warps())
    out = gl.convert_layout((acc * factor[:, None]).to(o_row.dtype.element_ty), wide)
    h = gl.arange(0, BH, layout=gl.SliceLayout(1, wide))
    r = gl.arange(0, R, layout=gl.SliceLayout(0, wide))
    gl.store(o_row + h[:, None] * R + r[None, :], out)


@gluon.jit
def _consume_parts(
    slots_row, num_slots, tiles, K, scale, q_smem, q_rot_smem, k_smem, k_rot_smem, prob_smem, full, empty,
    acc_row, m_row, total_row,
    R: gl.constexpr, H: gl.constexpr, PART: gl.constexpr, COUNT: gl.constexpr, BH: gl.constexpr, BK: gl.constexpr,
    WHOLE: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """The softmax of COUNT parts, each by itself: written down, or with WHOLE put together.

    What waits for the next part waits in memory, near the multiprocessor: registers hold one sum of values.
    """
    m = gl.full([BH], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([BH], gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([BH, R], gl.float32, o_layout)
    for part in range(COUNT):
        first = part * (PART // BK)
        before_m, before_total = m, total
        acc, total_tile, m = _consumer(
            slots_row, num_slots, first, gl.minimum(first + PART // BK, tiles), K, scale, q_smem, q_rot_smem, k_smem,
            k_rot_smem, prob_smem, full, empty, R, BH, BK, s_layout, o_layout,
        )  # fmt: skip
        total = gl.sum(total_tile, 1)
        if WHOLE and COUNT > 1:
            if part > 0:  # as _combine_kernel does it, bit for bit
                new_m = gl.maximum(before_m, m)
                old = gl.exp2(before_m - new_m)
                new = gl.exp2(m - new_m)
                total = gl.fma(before_total, old, total * new)
                m = new_m
                old = gl.convert_layout(old, gl.SliceLayout(1, o_layout))
                new = gl.convert_layout(new, gl.SliceLayout(1, o_layout))
                before = _take(acc_row, R, BH, o_layout)
                acc = gl.fma(before, gl.zeros_like(acc) + old[:, None], acc * new[:, None])
            if part < COUNT - 1:
                _keep(acc_row, acc, R, BH)
        if not WHOLE:
            heads = part * H + gl.arange(0, BH, layout=gl.SliceLayout(1, s_layout))
            gl.store(m_row + heads, m)
            gl.store(total_row + heads, total)
            gl.store(_sums(acc_row, part, H, R, BH, o_layout), acc)
    return acc, total, m


@gluon.jit
def _keep(memory, acc, R: gl.constexpr, BH: gl.constexpr):
    """Write sums of values down as the threads hold them, 16 bytes of each side by side: for _take alone."""
    line: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    # [warp, half, row | warp, step, column, number] of the accumulators of wgmma, 16 rows and half the columns a warp.
    parts = acc.reshape([BH // 16, 2, 8, 2, R // 16, 4, 2]).permute((4, 3, 0, 2, 5, 1, 6))
    flat = gl.convert_layout(parts.reshape([BH * R]), line, assert_trivial=True)
    gl.store(memory + gl.arange(0, BH * R, layout=line), flat)


@gluon.jit
def _take(memory, R: gl.constexpr, BH: gl.constexpr, layout: gl.constexpr):
    """What _keep wrote, in each thread what it wrote itself."""
    line: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    flat = gl.load(memory + gl.arange(0, BH * R, layout=line))
    parts = flat.reshape([R // 16, 2, BH // 16, 8, 4, 2, 2]).permute((2, 5, 3, 1, 0, 4, 6))
    return gl.convert_layout(parts.reshape([BH, R]), layout, assert_trivial=True)


@gluon.jit
def _sums(acc_row, part, H: gl.constexpr, R: gl.constexpr, BH: gl.constexpr, layout: gl.constexpr):
    """Where the sums of values of BH heads are."""
    h = part * H + gl.arange(0, BH, layout=gl.SliceLayout(1, layout))
    r = gl.arange(0, R, layout=gl.SliceLayout(0, layout))
    return acc_row + h[:, None] * R + r[None, :]


@gluon.jit
def _buffers(dtype: gl.constexpr, R: gl.constexpr, P: gl.constexpr, BH: gl.constexpr, BK: gl.constexpr):
    """Shared memory: two parts of the queries, of two buffers of entries; probabilities; who is done with a buffer."""
    smem: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [BH, R], smem)
    q_rot_smem = gl.allocate_shared_memory(dtype, [BH, P], smem)
    k_smem = gl.allocate_shared_memory(dtype, [2, BK, R], smem)
    k_rot_smem = gl.allocate_shared_memory(dtype, [2, BK, P], smem)
    prob_smem = gl.allocate_shared_memory(dtype, [BH, BK], smem)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(full.index(buffer), count=32 * PRODUCER_WARPS)
        mbarrier.init(empty.index(buffer), count=1)
    return q_smem, q_rot_smem, k_smem, k_rot_smem, prob_smem, full, empty


@gluon.jit
def _begin(
    q_row, head, q_smem, q_rot_smem, slots_row, num_slots, K,
    R: gl.constexpr, P: gl.constexpr, BH: gl.constexpr, KB: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Load queries of BH heads, rows of a table with R + P columns like entries.

    Returns the number of tiles up to the last entry that there is, and the slot of any, which stands in for missing ones.
    """
    heads_wide = head + gl.arange(0, BH, layout=gl.SliceLayout(1, row_layout(R, 8, gl.num_warps())))
    heads_narrow = head + gl.arange(0, BH, layout=gl.SliceLayout(1, row_layout(P, 8, gl.num_warps())))
    _copy(q_row, R + P, heads_wide, heads_narrow, q_smem, q_rot_smem, R, P)
    async_copy.commit_group()
    line: gl.constexpr = gl.BlockedLayout([KB // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    every = row_slots(slots_row, 0, num_slots, -1, K, KB, line)
    places = gl.arange(0, KB, layout=line)
    tiles = gl.cdiv(gl.max(gl.where(every >= 0, places + 1, 0), 0), BK)
    stand_in = gl.maximum(gl.max(every, 0), 0)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    return tiles, stand_in


@gluon.jit(do_not_specialize=["num_slots"])
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
    row = (gl.program_id(0) // G).to(gl.int64)
    head = gl.program_id(0) % G * BH
    slots_row = slots_ptr + row * K
    q_smem, q_rot_smem, k_smem, k_rot_smem, prob_smem, full, empty = _buffers(
        q_ptr.dtype.element_ty, R, P, BH, BK
    )
    tiles, stand_in = _begin(
        q_ptr + row * (H * E), head, q_smem, q_rot_smem, slots_row, num_slots, K, R, P, BH, KB, BK
    )
    acc, total, m = gl.warp_specialize(
        [
            (
                _consumer,
                (slots_row, num_slots, 0, tiles, K, scale, q_smem, q_rot_smem, k_smem, k_rot_smem, prob_smem, full,
                 empty, R, BH, BK, s_layout, o_layout),
            ),
            (
                _producer,
                (kv_ptr, E, slots_row, num_slots, stand_in, tiles, K, slots_row, 0, 0, k_smem, k_rot_smem, full, empty,
                 R, P, BK, 0),
            ),
        ],
        [PRODUCER_WARPS],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
    _finish(
        acc,
        gl.sum(total, 1),
        m,
        o_ptr + (row * H + head) * R,
        lse_ptr + row * H + head,
        R,
        BH,
        s_layout,
        o_layout,
    )


@gluon.jit(do_not_specialize=["num_slots"])
def part_kernel(
    q_ptr, pool_ptr, table_ptr, kept_ptr, acc_ptr, m_ptr, total_ptr, o_ptr, lse_ptr, scale,
    num_slots, stride_table, stride_block, stride_token,
    Q: gl.constexpr, H: gl.constexpr, R: gl.constexpr, P: gl.constexpr, K: gl.constexpr, PART: gl.constexpr,
    PARTS: gl.constexpr, COUNT: gl.constexpr, PAGE: gl.constexpr, KB: gl.constexpr, BH: gl.constexpr,
    BK: gl.constexpr,
):  # fmt: skip
    """One new token, BH heads, COUNT of its PARTS parts of PART kept positions: left unnormalised, but if they are all.

    Strides of the pool are in units of 8 numbers, the size of a copy.
    """
    WHOLE: gl.constexpr = COUNT == PARTS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BK // 2, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, R // 2, 16])
    row = gl.program_id(0).to(gl.int64)
    part = row * PARTS + gl.program_id(1) * COUNT
    head = gl.program_id(2) * BH
    first = gl.program_id(1) * (COUNT * PART)
    num = gl.minimum(K - first, COUNT * PART)
    kept_row = kept_ptr + row * K + first
    table_row = table_ptr + row // Q * stride_table
    acc_row = acc_ptr + (part * H + head) * R
    m_row = m_ptr + part * H + head
    total_row = total_ptr + part * H + head
    q_smem, q_rot_smem, k_smem, k_rot_smem, prob_smem, full, empty = _buffers(
        q_ptr.dtype.element_ty, R, P, BH, BK
    )
    tiles, stand_in = _begin(
        q_ptr + row * (H * (R + P)), head, q_smem, q_rot_smem, kept_row, num_slots, num, R, P, BH, KB, BK
    )
    acc, total, m = gl.warp_specialize(
        [
            (
                _consume_parts,
                (kept_row, num_slots, tiles, num, scale, q_smem, q_rot_smem, k_smem, k_rot_smem, prob_smem, full, empty,
                 acc_row, m_row, total_row, R, H, PART, COUNT, BH, BK, WHOLE, s_layout, o_layout),
            ),
            (
                _producer,
                (pool_ptr, 8, kept_row, num_slots, stand_in, tiles, num, table_row, stride_block, stride_token,
                 k_smem, k_rot_smem, full, empty, R, P, BK, PAGE),
            ),
        ],
        [PRODUCER_WARPS],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
    if WHOLE:
        _finish(
            acc, total, m, o_ptr + (row * H + head) * R, lse_ptr + row * H + head, R, BH, s_layout, o_layout
        )
