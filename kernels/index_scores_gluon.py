"""Index scores of many keys and queries on Hopper: the kernel `_scores_kernel` of index_topk_triton.py in Gluon.

The function and its bits are the same. A program's keys stay in registers, where the tensor cores read them as well as
in shared memory: with both factors in shared memory its bandwidth is the limit, and queries arrive there beside.
Compiled only, as sparse_mla_gluon.py. Next: index_topk_triton.py.

Shape letters as in index_topk_triton.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from posttrain.kernels.sparse_mla_gluon import barrier, row_layout

HEADS = (32, 64)
SIZES = (64, 128)
KEYS = 128
QUERIES = 32
WARPS = 4
REGISTERS = 168
"""Of a thread, so that three programs share a multiprocessor."""
BUFFERS = 3
"""Queries in shared memory: two on their way, one in the product."""


@gluon.jit
def _seen(
    begin_ptr, end_ptr, first_row, rows, group, key, K: gl.constexpr, BK: gl.constexpr, BQ: gl.constexpr
):
    """First and last + 1 row of BQ that need the scores of BK keys from `key` on: rows that keep not all."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    row = group + gl.arange(0, BQ, layout=line)
    begin = gl.load(begin_ptr + first_row + row, mask=row < rows, other=0)
    end = gl.load(end_ptr + first_row + row, mask=row < rows, other=0)
    sees = (begin < key + BK) & (end > key) & (end - begin > K)
    return gl.min(gl.where(sees, row, 0x7FFFFFFF), 0), gl.max(gl.where(sees, row + 1, 0), 0)


@gluon.jit
def _load_keys(k_ptr, first, num_keys, stride, I: gl.constexpr, BK: gl.constexpr, x_layout: gl.constexpr):
    """Keys from the first one on, each thread with its part of the product's rows."""
    bits: gl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth
    wide: gl.constexpr = row_layout(I, 128 // bits, gl.num_warps())
    key = first + gl.arange(0, BK, layout=gl.SliceLayout(1, wide))
    i = gl.arange(0, I, layout=gl.SliceLayout(0, wide))
    k = gl.load(
        k_ptr + key.to(gl.int64)[:, None] * stride + i[None, :], mask=(key < num_keys)[:, None], other=0.0
    )
    k = gl.convert_layout(k, gl.DotOperandLayout(0, x_layout, 32 // bits))
    barrier()  # the shared memory that this took is others' now
    return k


@gluon.jit
def _copy(q_ptr, w_ptr, row, q_smem, w_smem, J: gl.constexpr, I: gl.constexpr):
    """Start the copy of a query and its weights, all heads."""
    layout: gl.constexpr = row_layout(I, 128 // q_ptr.dtype.element_ty.primitive_bitwidth, gl.num_warps())
    j = gl.arange(0, J, layout=gl.SliceLayout(1, layout))
    i = gl.arange(0, I, layout=gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(q_smem, q_ptr + row * (J * I) + j[:, None] * I + i[None, :])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    async_copy.async_copy_global_to_shared(w_smem, w_ptr + row * J + gl.arange(0, J, layout=line))
    async_copy.commit_group()


@gluon.jit
def _ordered(score):
    """As kth_triton.ordered."""
    bits = score.to(gl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = gl.where(score == 0.0, 0, key)
    return gl.where(score != score, -0x80000000, key)


@gluon.jit(do_not_specialize=["first_row", "rows", "first_key", "num_keys", "width"])
def scores_kernel(
    q_ptr, k_ptr, w_ptr, k_scale_ptr, keys_ptr, begin_ptr, end_ptr,
    first_row, rows, first_key, num_keys, width, stride_key, stride_scale,
    J: gl.constexpr, I: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, BQ: gl.constexpr, BUFFERS: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """BK keys of the window against BQ queries of the chunk, one after another."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    bits: gl.constexpr = dtype.primitive_bitwidth
    x_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, J, 256 // bits])
    group, window = gl.program_id(1) * BQ, gl.program_id(0) * BK
    start, stop = _seen(begin_ptr, end_ptr, first_row, rows, group, first_key + window, K, BK, BQ)
    if start < stop:
        k = _load_keys(k_ptr, first_key + window, num_keys, stride_key, I, BK, x_layout)
        smem: gl.constexpr = gl.NVMMASharedLayout(
            swizzle_byte_width=min(128, I * bits // 8), element_bitwidth=bits, rank=2
        )
        q_smem = gl.allocate_shared_memory(dtype, [BUFFERS, J, I], smem)
        line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        w_smem = gl.allocate_shared_memory(gl.float32, [BUFFERS, J], line)
        first, last = (first_row + start).to(gl.int64), (first_row + stop - 1).to(gl.int64)
        for n in gl.static_range(BUFFERS - 1):
            _copy(q_ptr, w_ptr, gl.minimum(first + n, last), q_smem.index(n), w_smem.index(n), J, I)

        at = window + gl.arange(0, BK, layout=gl.SliceLayout(1, x_layout))
        scale = gl.full([BK], 0.5, gl.float32, gl.SliceLayout(1, x_layout))
        if SCALED:
            scale_at = (first_key + at).to(gl.int64) * stride_scale
            scale *= gl.load(k_scale_ptr + scale_at, mask=first_key + at < num_keys, other=0.0)
        zero = gl.zeros([BK, J], gl.float32, x_layout)
        out = keys_ptr + start.to(gl.int64) * width + at
        for n in range(stop - start):
            async_copy.wait_group(BUFFERS - 2)
            barrier()  # every warp has its part of the query there, and is done with the one before
            fence_async_shared()
            x = warpgroup_mma(
                k, q_smem.index(n % BUFFERS).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            w = w_smem.index(n % BUFFERS).load(gl.SliceLayout(0, x_layout))
            ahead = n + BUFFERS - 1
            buffer = ahead % BUFFERS
            _copy(
                q_ptr,
                w_ptr,
                gl.minimum(first + ahead, last),
                q_smem.index(buffer),
                w_smem.index(buffer),
                J,
                I,
            )
            x = warpgroup_mma_wait(0, deps=[x])
            score = scale * gl.sum((x + gl.abs(x)) * w[None, :], 1)  # product_triton.twice_relu
            gl.store(out, _ordered(score), mask=at < width)
            out += width
        async_copy.wait_group(0)
