"""Sparse MQA-absorbed attention of new tokens over kept entries of a paged cache, in Triton: a decoding step.

The kept entries of a row are cut into parts of a fixed size, so that one sequence can keep a whole GPU busy; a
second kernel puts the parts together in ascending order. On Hopper the parts are the Gluon kernel's of
sparse_mla_gluon.py: where the batch fills the GPU, a program takes several of them, and puts them together if it has all.
The size is an argument, never a matter of the batch, and every rounding is written down: a row's bits do not depend on
what is decoded beside it. Nothing is read on the host, so a step can be captured in a CUDA graph. Entries that are not
kept, unused blocks and unused table entries are never read. Definition: reference.paged with reference.sparse_mla. Next:
sparse_mla_triton.py, ../model/decode.py.

Shape letters: B sequences, Q new tokens of each, N = B Q, P blocks in the pool, S tokens of a block, M blocks of
a sequence, H heads, E entry size = R + rotary, R latent (value) size, K kept, C parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels import sparse_mla_gluon
from posttrain.kernels.paged_index_topk_triton import page
from posttrain.kernels.pages import Pages
from posttrain.kernels.product_triton import block, dot, interpreted
from posttrain.kernels.sparse_mla_triton import LOG2E, MANY, Tiles, fits_gluon

PART = 512
"""Kept entries of a part, at least."""
FEW_HEADS = Tiles(heads=32)
MULTIPROCESSORS = 132
"""Of an H100 or H200, each of which has room for one program of the Gluon kernel."""
START = 3
"""Tiles that fit the time in which such a program starts and ends."""
STORE, MERGE, COMBINE = 2, 4, 3
"""Tiles that fit the time in which a part is written down, in which it is put together with those before, and in which the
second kernel puts all together: 128 KB go through the L2 from every multiprocessor at once."""
ENOUGH = 96
"""Programs that keep a GPU busy: more parts than that only cost their putting together."""


@triton.jit
def _last_kept(kept_ptr, first, num_slots, K: tl.constexpr, PART: tl.constexpr):
    """One past the last valid place of a part; 0 for an empty one."""
    at = tl.arange(0, PART)
    position = tl.load(kept_ptr + first + at, mask=first + at < K, other=-1)
    return tl.max(tl.where((position >= 0) & (position < num_slots), at + 1, 0), 0)


@triton.jit(do_not_specialize=["num_slots"])
def _part_kernel(
    q_ptr, pool_ptr, table_ptr, kept_ptr, acc_ptr, m_ptr, total_ptr, scale,
    num_slots, stride_table, stride_block, stride_token,
    Q: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One new token, BH heads, PART kept entries: online softmax, left unnormalised."""
    E: tl.constexpr = R + P
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h = tl.program_id(2) * BH + tl.arange(0, BH)
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    in_h, in_r, in_p = h < H, r < R, p < P
    q_row = q_ptr + (row * H + h[:, None]) * E
    q = tl.load(q_row + r[None, :], mask=in_h[:, None] & in_r[None, :], other=0.0)
    q_rot = tl.load(q_row + R + p[None, :], mask=in_h[:, None] & in_p[None, :], other=0.0)
    m = tl.full([BH], -1e30, tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BR], tl.float32)
    end = PART if INTERPRET else _last_kept(kept_ptr + row * K, part * PART, num_slots, K, PART)
    for start in tl.range(0, end, BK, num_stages=STAGES):
        at = part * PART + start + tl.arange(0, BK)
        position = tl.load(kept_ptr + row * K + at, mask=at < K, other=-1)
        valid = (position >= 0) & (position < num_slots)
        block, place = page(table_ptr, row // Q, position, valid, stride_table, PAGE)
        entry = pool_ptr + (block * stride_block + place * stride_token)[:, None]
        k = tl.load(entry + r[None, :], mask=valid[:, None] & in_r[None, :], other=0.0)
        k_rot = tl.load(entry + R + p[None, :], mask=valid[:, None] & in_p[None, :], other=0.0)
        logits = dot(q, tl.trans(k), INTERPRET) + dot(q_rot, tl.trans(k_rot), INTERPRET)
        logits = tl.where(valid[None, :], logits * (scale * LOG2E), float("-inf"))
        new_m = tl.maximum(m, tl.max(logits, 1))
        prob = tl.exp2(logits - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        total = total * shrink + tl.sum(prob, 1)
        acc = acc * shrink[:, None] + dot(prob.to(k.dtype), k, INTERPRET)
        m = new_m
    out = (row * PARTS + part) * H + h
    tl.store(m_ptr + out, m, mask=in_h)
    tl.store(total_ptr + out, total, mask=in_h)
    tl.store(acc_ptr + out[:, None] * R + r[None, :], acc, mask=in_h[:, None] & in_r[None, :])


@triton.jit
def _combine_kernel(
    acc_ptr, m_ptr, total_ptr, o_ptr, lse_ptr,
    H: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One head of one new token: its parts, in order."""
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r = tl.arange(0, BR)
    at = row * PARTS * H + h
    m, total = tl.load(m_ptr + at), tl.load(total_ptr + at)
    acc = tl.load(acc_ptr + at * R + r, mask=r < R, other=0.0)
    for _ in range(1, PARTS):
        at += H
        part_m, part_total = tl.load(m_ptr + at), tl.load(total_ptr + at)
        part_acc = tl.load(acc_ptr + at * R + r, mask=r < R, other=0.0)
        new_m = tl.maximum(m, part_m)
        old, new = tl.exp2(m - new_m), tl.exp2(part_m - new_m)
        # The rounding is written down: the Gluon kernel may do the same instead.
        total = tl.fma(total, old, part_total * new)
        acc = tl.fma(acc, tl.zeros_like(acc) + old, part_acc * new)
        m = new_m
    safe = tl.where(total > 0, total, 1.0)
    out = acc * tl.where(total > 0, 1.0 / safe, 0.0)
    tl.store(o_ptr + (row * H + h) * R + r, out.to(o_ptr.dtype.element_ty), mask=r < R)
    tl.store(lse_ptr + row * H + h, tl.where(total > 0, (m + tl.log2(safe)) / LOG2E, float("-inf")))


def attend(
    q_BQHE: Tensor,
    pages: Pages,
    kept_BQK: Tensor,
    scale: float,
    value_size: int,
    *,
    part: int = PART,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Latent output [B, Q, H, R] in q's dtype and log-sum-exp fp32 [B, Q, H] over the kept positions.

    kept is int32, positions in the sequence, in any order; -1 is none, and a row without any gives zeros and
    -inf. `part` is a power of two; smaller parts serve small batches, larger ones move fewer bytes. Raises
    ValueError for what does not fit.
    """
    B, Q, H, E = q_BQHE.shape
    pool_PSE, table_BM, K, R = pages.entries_PSE, pages.table_BM, kept_BQK.shape[-1], value_size
    if pool_PSE.shape[2] != E or not 0 < R < E or kept_BQK.shape != (B, Q, K) or len(table_BM) != B:
        raise ValueError(
            f"q {tuple(q_BQHE.shape)}, pool {tuple(pool_PSE.shape)}, kept {tuple(kept_BQK.shape)}, value size "
            f"{R} and {len(table_BM)} sequences do not fit together"
        )
    if kept_BQK.dtype != torch.int32:
        raise ValueError(f"kept is {kept_BQK.dtype}, not int32")
    by_gluon = tiles is None and _fits_gluon(q_BQHE, pages, value_size)
    if tiles is None:
        tiles = FEW_HEADS if FEW_HEADS.heads >= H else MANY
    if part < tiles.keys or part & (part - 1):
        raise ValueError(f"part={part} is not a power of two of at least {tiles.keys}")
    N, BH, parts = B * Q, min(tiles.heads, block(H)), triton.cdiv(K, part)
    acc_NCHR = q_BQHE.new_empty(N, parts, H, R, dtype=torch.float32)
    m_NCH, total_NCH = (q_BQHE.new_empty(N, parts, H, dtype=torch.float32) for _ in range(2))
    o_BQHR = q_BQHE.new_empty(B, Q, H, R)
    lse_BQH = q_BQHE.new_empty(B, Q, H, dtype=torch.float32)
    if not N:
        return o_BQHR, lse_BQH
    q_BQHE, kept_BQK = q_BQHE.contiguous(), kept_BQK.contiguous()
    out = (acc_NCHR, m_NCH, total_NCH)
    if by_gluon:
        if _parts_by_gluon(q_BQHE, pages, kept_BQK, scale, part, out, (o_BQHR, lse_BQH)):
            return o_BQHR, lse_BQH
    else:
        _part_kernel[(N, parts, triton.cdiv(H, BH))](
            q_BQHE, pool_PSE, table_BM, kept_BQK, *out, scale,
            pages.room, table_BM.stride(0), pool_PSE.stride(0), pool_PSE.stride(1),
            Q=Q, H=H, R=R, P=E - R, K=K, BH=BH, BR=block(R), BP=block(E - R), BK=tiles.keys,
            PART=part, PARTS=parts, PAGE=pages.page, INTERPRET=interpreted(),
            STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
    _combine_kernel[(N, H)](
        acc_NCHR, m_NCH, total_NCH, o_BQHR, lse_BQH, H=H, R=R, BR=block(R), PARTS=parts, num_warps=2
    )
    return o_BQHR, lse_BQH


def _parts_by_gluon(
    q_BQHE: Tensor, pages: Pages, kept_BQK: Tensor, scale: float, part: int, parts_out: tuple[Tensor, ...],
    out: tuple[Tensor, ...],
) -> bool:  # fmt: skip
    """The same parts; True if their programs have put them together as well."""
    (_, Q, H, E), K = q_BQHE.shape, kept_BQK.shape[-1]
    N, parts, _, R = parts_out[0].shape
    pool_PSE, table_BM = pages.entries_PSE, pages.table_BM
    gluon = sparse_mla_gluon
    count = _parts_together(N * (H // gluon.TILE), parts, part)
    gluon.part_kernel[(N, parts // count, H // gluon.TILE)](
        q_BQHE, pool_PSE, table_BM, kept_BQK, *parts_out, *out, scale, pages.room, table_BM.stride(0),
        pool_PSE.stride(0) // 8, pool_PSE.stride(1) // 8,
        Q=Q, H=H, R=R, P=E - R, K=K, PART=part, PARTS=parts, COUNT=count, PAGE=pages.page,
        KB=max(triton.next_power_of_2(count * part), 32 * gluon.WARPS), BH=gluon.TILE, BK=gluon.TILE,
        num_warps=gluon.WARPS,
    )  # fmt: skip
    return count == parts


def _parts_together(rows: int, parts: int, part: int) -> int:
    """Parts that a program takes one after another, for so many rows of heads: a matter of time, not of results.

    Few long programs lose less in starting, if there are enough of them.
    """

    def cost(count: int) -> int:
        rounds = triton.cdiv(rows * (parts // count), MULTIPROCESSORS)
        whole = count == parts
        tiles = (
            START + count * part // sparse_mla_gluon.TILE + (MERGE * (count - 1) if whole else STORE * count)
        )
        return rounds * tiles + (0 if whole else COMBINE)

    return min((n for n in range(1, parts + 1) if parts % n == 0), key=cost)


def part_size(max_rows: int, num_heads: int, num_kept: int) -> int:
    """Kept entries of a part for an engine that decodes about so many rows: as large as leaves few multiprocessors idle.

    It follows from the engine and not from a batch, whose rows would else have other bits.
    """
    part = max(PART, triton.next_power_of_2(num_kept))
    groups = max_rows * triton.cdiv(num_heads, sparse_mla_gluon.TILE)
    while part > PART and groups * triton.cdiv(num_kept, part) < ENOUGH:
        part //= 2
    return part


def _fits_gluon(q_BQHE: Tensor, pages: Pages, value_size: int) -> bool:
    """Whether the Gluon kernel can copy entries 16 bytes at a time, and count the copies that the pool is made of."""
    pool_PSE = pages.entries_PSE
    by_8 = pool_PSE.stride(0) % 8 == 0 and pool_PSE.stride(1) % 8 == 0 and pool_PSE.data_ptr() % 16 == 0
    counted = len(pool_PSE) * pool_PSE.stride(0) // 8 < 2**31
    return by_8 and counted and fits_gluon(q_BQHE.flatten(0, 1), value_size, q_BQHE.shape[3] - value_size)
