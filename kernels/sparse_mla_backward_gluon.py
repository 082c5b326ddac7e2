"""What a query adds to its entries in the backward pass of sparse attention, on Hopper: in Gluon.

The kernel `_dkv_kernel` of sparse_mla_backward_triton.py with the order of work written down: while the tensor
cores multiply a tile, the gradients of the tile before it leave for memory, and the tile after it arrives. With few heads
two neighbouring queries go together (merge_triton.py), so that fewer gradients leave. Compiled only, as
sparse_mla_gluon.py. Next: README.md.

Shape letters as in sparse_mla_triton.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from posttrain.kernels.merge_triton import NONE
from posttrain.kernels.sparse_mla_gluon import barrier, row_layout, row_slots

KEYS = 64
COLUMNS = 128
WARPS = 4
MERGED_HEADS = 64
"""Up to so many the tiles of two queries fit shared memory."""
MERGED_WARPS = 8


@gluon.jit
def _copy(work_row, start, smem, W: gl.constexpr, H: gl.constexpr, K: gl.constexpr, BK: gl.constexpr):
    """Start the copy of W columns of dS | P of BK kept entries."""
    layout: gl.constexpr = row_layout(W, 8, gl.num_warps())
    # Beyond the row's end anything will do: nothing of it is added.
    at = gl.minimum(start + gl.arange(0, BK, layout=gl.SliceLayout(1, layout)), K - 1)
    w = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(smem, work_row + at[:, None] * (2 * H) + w[None, :])
    async_copy.commit_group()


@gluon.jit
def _add(
    dkv_ptr, grad, slots, at_first, c, E: gl.constexpr, BK: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Add the gradients of a tile to their entries, or write them to their rows of the chunk's table."""
    # Whole pieces of rows: memory takes the products' own layout, 32 bytes here and there, half as fast.
    grad = gl.convert_layout(grad, layout)
    mask = (slots >= 0)[:, None]
    if ROWS:
        at = at_first + gl.arange(0, BK, layout=gl.SliceLayout(1, layout))
        gl.store(dkv_ptr + at[:, None] * E + c[None, :], grad.to(dkv_ptr.dtype.element_ty), mask=mask)
    else:
        target = dkv_ptr + slots.to(gl.int64)[:, None] * E + c[None, :]
        gl.atomic_add(target, grad, mask=mask, sem="relaxed")


@gluon.jit
def _load_query(
    q_ptr, do_ptr, row, kept, column, smem,
    H: gl.constexpr, R: gl.constexpr, E: gl.constexpr, BC: gl.constexpr, VALUE: gl.constexpr,
):  # fmt: skip
    """Start the copy of BC columns of Q | dO. Of a query that keeps nothing nothing is read: it may hold anything."""
    layout: gl.constexpr = row_layout(BC, 8, gl.num_warps())
    h = gl.arange(0, H, layout=gl.SliceLayout(1, layout))
    c = column + gl.arange(0, BC, layout=gl.SliceLayout(0, layout))
    head = row * H + h
    mask = ((h >= 0)[:, None] & (c >= 0)[None, :]) & (kept > 0)
    q_at = q_ptr + head[:, None] * E + c[None, :]
    async_copy.async_copy_global_to_shared(smem.slice(0, H, 0), q_at, mask=mask)
    if VALUE:
        do_at = do_ptr + head[:, None] * R + c[None, :]
        async_copy.async_copy_global_to_shared(smem.slice(H, H, 0), do_at, mask=mask)


@gluon.jit(do_not_specialize=["num_slots", "first_row"])
def dkv_kernel(
    q_ptr, slots_ptr, do_ptr, work_ptr, dkv_ptr, num_slots, first_row,
    H: gl.constexpr, R: gl.constexpr, P: gl.constexpr, K: gl.constexpr, KB: gl.constexpr,
    BC: gl.constexpr, BK: gl.constexpr, VALUE: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One query, BC columns: [dS | P]^T [Q | dO] for latent ones (VALUE), dS^T Q for rotary ones."""
    E: gl.constexpr = R + P
    W: gl.constexpr = 2 * H if VALUE else H
    BLOCKS: gl.constexpr = (R if VALUE else P) // BC
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BC, 16])
    wide: gl.constexpr = row_layout(BC, 4, gl.num_warps())
    smem: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    local = (gl.program_id(0) // BLOCKS).to(gl.int64)
    row = first_row + local
    column = (0 if VALUE else R) + gl.program_id(0) % BLOCKS * BC
    slots_row = slots_ptr + row * K
    work_row = work_ptr + local * (K * 2 * H)

    q_do_smem = gl.allocate_shared_memory(dtype, [W, BC], smem)
    _load_query(q_ptr, do_ptr, row, 1, column, q_do_smem, H, R, E, BC, VALUE)
    work_smem = gl.allocate_shared_memory(dtype, [2, BK, W], smem)
    _copy(work_row, 0, work_smem.index(0), W, H, K, BK)
    _copy(work_row, BK, work_smem.index(1), W, H, K, BK)

    line: gl.constexpr = gl.BlockedLayout([KB // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    places = gl.arange(0, KB, layout=line)
    every = row_slots(slots_row, 0, num_slots, -1, K, KB, line)
    tiles = gl.cdiv(gl.max(gl.where(every >= 0, places + 1, 0), 0), BK)

    zero = gl.zeros([BK, BC], gl.float32, out)
    c = column + gl.arange(0, BC, layout=gl.SliceLayout(0, wide))
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    even_slots = row_slots(slots_row, 0, num_slots, -1, K, BK, rows)
    async_copy.wait_group(1)
    fence_async_shared()
    even = warpgroup_mma(work_smem.index(0), q_do_smem, zero, use_acc=False, is_async=True)
    # Two tiles a turn, in registers of their own: ptxas would not overlap them otherwise. Slots come a tile before they
    # are needed, and behind a fence, which would wait for them.
    for tile in range(0, tiles, 2):
        async_copy.wait_group(0)
        grad = warpgroup_mma_wait(0, deps=[even])
        barrier()  # all warps are done with the even tile, and have what they copied of the odd one
        fence_async_shared()
        _copy(work_row, (tile + 2) * BK, work_smem.index(0), W, H, K, BK)
        odd = warpgroup_mma(work_smem.index(1), q_do_smem, zero, use_acc=False, is_async=True)
        odd_slots = row_slots(slots_row, (tile + 1) * BK, num_slots, -1, K, BK, rows)
        _add(dkv_ptr, grad, even_slots, local * K + tile * BK, c, E, BK, ROWS, wide)
        async_copy.wait_group(0)
        grad = warpgroup_mma_wait(0, deps=[odd])
        barrier()
        fence_async_shared()
        _copy(work_row, (tile + 3) * BK, work_smem.index(1), W, H, K, BK)
        even = warpgroup_mma(work_smem.index(0), q_do_smem, zero, use_acc=False, is_async=True)
        even_slots = row_slots(slots_row, (tile + 2) * BK, num_slots, -1, K, BK, rows)
        _add(dkv_ptr, grad, odd_slots, local * K + (tile + 1) * BK, c, E, BK, ROWS, wide)
    async_copy.wait_group(0)
    warpgroup_mma_wait(0, deps=[even])


@gluon.jit
def _copy_pair(
    work_pair, places, work_smem, buffer: gl.constexpr, W: gl.constexpr, H: gl.constexpr, K: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Start the copy of W columns of dS | P of BK entries, of either query; zeros where a query does not keep one."""
    w = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    for which in gl.static_range(2):
        place = (places >> (16 * which)) & 0xFFFF
        at = work_pair + (which * K + place)[:, None] * (2 * H) + w[None, :]
        there = (place != NONE)[:, None] & (w >= 0)[None, :]
        async_copy.async_copy_global_to_shared(work_smem.index(2 * buffer + which), at, mask=there)
    async_copy.commit_group()


@gluon.jit
def _load_pair(
    q_ptr, do_ptr, kept_pair, row, column, smem,
    H: gl.constexpr, R: gl.constexpr, E: gl.constexpr, BC: gl.constexpr, VALUE: gl.constexpr,
):  # fmt: skip
    """_load_query for two queries, each where it keeps anything."""
    for which in gl.static_range(2):
        kept = gl.load(kept_pair + which)
        _load_query(q_ptr, do_ptr, row + which, kept, column, smem.index(which), H, R, E, BC, VALUE)


@gluon.jit
def _multiply(work_smem, buffer: gl.constexpr, q_do_smem, zero):
    """Gradients of a tile's entries, of both queries."""
    grad = warpgroup_mma(work_smem.index(2 * buffer), q_do_smem.index(0), zero, use_acc=False, is_async=True)
    return warpgroup_mma(work_smem.index(2 * buffer + 1), q_do_smem.index(1), grad, is_async=True)


@gluon.jit(do_not_specialize=["num_slots", "first_row"])
def dkv_merged_kernel(
    q_ptr, slots_ptr, places_ptr, num_ptr, kept_ptr, do_ptr, work_ptr, dkv_ptr, num_slots, first_row,
    H: gl.constexpr, R: gl.constexpr, P: gl.constexpr, K: gl.constexpr,
    BC: gl.constexpr, BK: gl.constexpr, VALUE: gl.constexpr,
):  # fmt: skip
    """dkv_kernel for two queries at once: an entry that both keep is added to once."""
    E: gl.constexpr = R + P
    W: gl.constexpr = 2 * H if VALUE else H
    BLOCKS: gl.constexpr = (R if VALUE else P) // BC
    WARPS: gl.constexpr = gl.num_warps()
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, BC // (WARPS // 4), 16])
    wide: gl.constexpr = row_layout(BC, 4, WARPS)
    smem: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    pair = (gl.program_id(0) // BLOCKS).to(gl.int64)
    column = (0 if VALUE else R) + gl.program_id(0) % BLOCKS * BC
    slots_row, places_row = slots_ptr + pair * (2 * K), places_ptr + pair * (2 * K)
    work_pair = work_ptr + 2 * pair * (K * 2 * H)
    num = gl.load(num_ptr + pair)
    q_do_smem = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, W, BC], smem)
    first = first_row + 2 * pair
    _load_pair(q_ptr, do_ptr, kept_ptr + 2 * pair, first, column, q_do_smem, H, R, E, BC, VALUE)
    work_rows: gl.constexpr = row_layout(W, 8, WARPS)
    places: gl.constexpr = gl.SliceLayout(1, work_rows)
    # Of two tiles two queries each.
    work_smem = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [4, BK, W], smem)
    for tile in gl.static_range(2):
        at = _places(places_row, tile * BK, num, BK, places)
        _copy_pair(work_pair, at, work_smem, tile, W, H, K, work_rows)
    even_places = _places(places_row, 2 * BK, num, BK, places)
    odd_places = _places(places_row, 3 * BK, num, BK, places)
    zero = gl.zeros([BK, BC], gl.float32, out)
    c = column + gl.arange(0, BC, layout=gl.SliceLayout(0, wide))
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    even_slots = row_slots(slots_row, 0, num_slots, -1, num, BK, rows)
    async_copy.wait_group(1)
    fence_async_shared()
    even = _multiply(work_smem, 0, q_do_smem, zero)
    for tile in range(0, gl.cdiv(num, BK), 2):  # as in dkv_kernel; places come a turn before they are needed
        async_copy.wait_group(0)
        grad = warpgroup_mma_wait(0, deps=[even])
        barrier()
        fence_async_shared()
        _copy_pair(work_pair, even_places, work_smem, 0, W, H, K, work_rows)
        even_places = _places(places_row, (tile + 4) * BK, num, BK, places)
        odd = _multiply(work_smem, 1, q_do_smem, zero)
        odd_slots = row_slots(slots_row, (tile + 1) * BK, num_slots, -1, num, BK, rows)
        _add(dkv_ptr, grad, even_slots, 0, c, E, BK, False, wide)
        async_copy.wait_group(0)
        grad = warpgroup_mma_wait(0, deps=[odd])
        barrier()
        fence_async_shared()
        _copy_pair(work_pair, odd_places, work_smem, 1, W, H, K, work_rows)
        odd_places = _places(places_row, (tile + 5) * BK, num, BK, places)
        even = _multiply(work_smem, 0, q_do_smem, zero)
        even_slots = row_slots(slots_row, (tile + 2) * BK, num_slots, -1, num, BK, rows)
        _add(dkv_ptr, grad, odd_slots, 0, c, E, BK, False, wide)
    async_copy.wait_group(0)
    warpgroup_mma_wait(0, deps=[even])


@gluon.jit
def _places(places_row, start, num, BK: gl.constexpr, layout: gl.constexpr):
    """Places of a tile's entries in the rows of both queries."""
    at = start + gl.arange(0, BK, layout=layout)
    return gl.load(places_row + at, mask=at < num, other=0x7FFF7FFF)
