"""Head-mean probabilities of dense attention in Triton, a tile of queries and keys at a time, and the lse they need.

p[t, s] = 1/H sum_h exp(scale q[t, h] . k[s, h] - lse[t, h]): the target of the indexer's warm-up (V3.2-Exp 2.1.1).
Attention here has keys per head (not absorbed): a part of its own for each head and a rotary part that the
heads share, so that a pair of tokens costs 192 multiplications per head and not 576. Nothing is differentiated.
Definition: reference.dense_probs. Next: warmup_kl_triton.py.

Shape letters: N queries, S keys, H heads, E head size of queries (own + rotary), C own size, P rotary size.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.index_topk_triton import Chunk, Ranges
from posttrain.kernels.product_triton import block, dot, interpreted

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiles:
    """Launch shape."""

    queries: int = 128
    keys: int = 128
    warps: int = 8
    stages: int = 2


TILES = Tiles()


@triton.jit
def _logits(
    q_ptr, k_ptr, row, key, in_row, in_key, h, k_rot, k_row_stride, k_head_stride,
    H: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Unscaled logits [BQ, BK] of one head."""
    c, p = tl.arange(0, BC), tl.arange(0, BP)
    q_row = q_ptr + (row[:, None] * H + h) * (C + P)
    q = tl.load(q_row + c[None, :], mask=in_row[:, None] & (c < C)[None, :], other=0.0)
    q_rot = tl.load(q_row + C + p[None, :], mask=in_row[:, None] & (p < P)[None, :], other=0.0)
    k_at = key[:, None] * k_row_stride + h * k_head_stride + c[None, :]
    k = tl.load(k_ptr + k_at, mask=in_key[:, None] & (c < C)[None, :], other=0.0)
    return dot(q, tl.trans(k), INTERPRET) + dot(q_rot, tl.trans(k_rot), INTERPRET)


@triton.jit
def _rotary_keys(k_rot_ptr, key, in_key, P: tl.constexpr, BP: tl.constexpr):
    p = tl.arange(0, BP)
    return tl.load(
        k_rot_ptr + key[:, None] * P + p[None, :], mask=in_key[:, None] & (p < P)[None, :], other=0.0
    )


@triton.jit(do_not_specialize=["first_row", "rows", "first_key"])
def _probs_kernel(
    q_ptr, k_ptr, k_rot_ptr, lse_ptr, begin_ptr, end_ptr, out_ptr, scale, k_row_stride, k_head_stride,
    first_row, rows, first_key, width,
    H: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Probabilities of BQ queries of the chunk for BK keys of its window; tiles nobody sees are left as they are."""
    local = tl.program_id(1) * BQ + tl.arange(0, BQ)
    in_row = local < rows
    row = (first_row + local).to(tl.int64)
    begin = tl.load(begin_ptr + row, mask=in_row, other=0)
    end = tl.load(end_ptr + row, mask=in_row, other=0)
    at = tl.program_id(0) * BK + tl.arange(0, BK)
    key = first_key + at
    seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
    first = first_key + tl.program_id(0) * BK
    if tl.max(((begin < end) & (begin < first + BK) & (end > first)).to(tl.int32), 0) > 0:
        in_key = (key < tl.max(end, 0)) & (at < width)
        key_64 = key.to(tl.int64)
        k_rot = _rotary_keys(k_rot_ptr, key_64, in_key, P, BP)
        total = tl.zeros([BQ, BK], tl.float32)
        for h in tl.range(0, H, num_stages=STAGES):
            lse = tl.load(lse_ptr + row * H + h, mask=in_row, other=0.0) * LOG2E
            logits = _logits(
                q_ptr, k_ptr, row, key_64, in_row, in_key, h, k_rot, k_row_stride, k_head_stride,
                H, C, P, BC, BP, INTERPRET,
            )  # fmt: skip
            total += tl.exp2(logits * (scale * LOG2E) - lse[:, None])
        out_at = local.to(tl.int64)[:, None] * width + at[None, :]
        total = tl.where(seen, total * (1.0 / H), 0.0)
        tl.store(out_ptr + out_at, total, mask=in_row[:, None] & (at < width)[None, :])


@triton.jit(do_not_specialize=["num_rows", "longest"])
def _lse_kernel(
    q_ptr, k_ptr, k_rot_ptr, begin_ptr, end_ptr, lse_ptr, scale, k_row_stride, k_head_stride, num_rows,
    longest,
    H: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of BQ queries and one head; sums begin where a query's document does."""
    row = tl.program_id(1).to(tl.int64) * BQ + tl.arange(0, BQ)
    h = tl.program_id(0)
    in_row = row < num_rows
    begin = tl.load(begin_ptr + row, mask=in_row, other=0)
    end = tl.load(end_ptr + row, mask=in_row, other=0)
    begin = tl.where(begin < end, begin, 0x7FFFFFFF)
    m = tl.full([BQ], -1e30, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    document = tl.min(begin, 0)
    while document < 0x7FFFFFFF:  # once, or more often where a document ends between these queries
        mine = begin == document
        stop = tl.max(tl.where(mine, end, 0), 0)
        for step in tl.range(0, longest if INTERPRET else stop - document, BK, num_stages=STAGES):
            key = document + step + tl.arange(0, BK)
            in_key = key < stop
            k_rot = _rotary_keys(k_rot_ptr, key.to(tl.int64), in_key, P, BP)
            logits = _logits(
                q_ptr, k_ptr, row, key.to(tl.int64), in_row, in_key, h, k_rot, k_row_stride, k_head_stride,
                H, C, P, BC, BP, INTERPRET,
            )  # fmt: skip
            seen = mine[:, None] & (key[None, :] < end[:, None])
            logits = tl.where(seen, logits * (scale * LOG2E), float("-inf"))
            new_m = tl.maximum(m, tl.max(logits, 1))
            total = total * tl.exp2(m - new_m) + tl.sum(tl.exp2(logits - new_m[:, None]), 1)
            m = new_m
        document = tl.min(tl.where(begin > document, begin, 0x7FFFFFFF), 0)
    lse = (m + tl.log2(tl.where(total == 0, 1.0, total))) / LOG2E
    lse = tl.where(total == 0, float("-inf"), lse)
    tl.store(lse_ptr + row * H + h, lse, mask=in_row)


def attention_lse(
    q_NHE: Tensor, k_SHC: Tensor, k_rot_SP: Tensor, ranges: Ranges, scale: float, *, tiles: Tiles = TILES
) -> Tensor:
    """Log-sum-exp of the scaled logits, fp32 [N, H], for attention that does not return it; -inf without keys.

    q is [own | rotary] for every head, k has any strides with contiguous heads.
    """
    N, H, _ = q_NHE.shape
    sizes = _check(q_NHE, k_SHC, k_rot_SP, ranges)
    lse_NH = q_NHE.new_empty(N, H, dtype=torch.float32)
    longest = max((chunk.width for chunk in ranges.chunks), default=0)
    if N:
        _lse_kernel[(H, triton.cdiv(N, tiles.queries))](
            q_NHE, k_SHC, k_rot_SP, ranges.begin_N, ranges.end_N, lse_NH, scale, k_SHC.stride(0),
            k_SHC.stride(1), N, longest, **sizes, BQ=tiles.queries, BK=tiles.keys,
            INTERPRET=interpreted(), STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
    return lse_NH


def chunk_probs(
    q_NHE: Tensor,
    k_SHC: Tensor,
    k_rot_SP: Tensor,
    lse_NH: Tensor,
    ranges: Ranges,
    chunk: Chunk,
    scale: float,
    out: Tensor,
    *,
    tiles: Tiles = TILES,
) -> None:
    """Write the probabilities of a chunk, fp32 [rows, width]; what a query does not see is 0 or left as it was."""
    sizes = _check(q_NHE, k_SHC, k_rot_SP, ranges)
    _probs_kernel[(triton.cdiv(chunk.width, tiles.keys), triton.cdiv(chunk.rows, tiles.queries))](
        q_NHE, k_SHC, k_rot_SP, lse_NH, ranges.begin_N, ranges.end_N, out, scale, k_SHC.stride(0), k_SHC.stride(1),
        chunk.first_row, chunk.rows, chunk.first_key, chunk.width, **sizes, BQ=tiles.queries, BK=tiles.keys,
        INTERPRET=interpreted(), STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip


def _check(q_NHE: Tensor, k_SHC: Tensor, k_rot_SP: Tensor, ranges: Ranges) -> dict[str, int]:
    """Sizes as the kernels want them."""
    _, H, E = q_NHE.shape
    S, C, P = len(k_SHC), k_SHC.shape[2], k_rot_SP.shape[1]
    if k_SHC.shape[1] != H or C + P != E or len(k_rot_SP) != S or ranges.num_keys > S:
        raise ValueError(
            f"q {tuple(q_NHE.shape)}, k {tuple(k_SHC.shape)}, rotary k {tuple(k_rot_SP.shape)} and "
            f"{ranges.num_keys} keys do not fit together"
        )
    if not q_NHE.is_contiguous() or not k_rot_SP.is_contiguous() or k_SHC.stride(2) != 1:
        raise ValueError("q and the rotary k must be contiguous, k in its last dimension")
    BC, BP = block(C), block(P)
    return {"H": H, "C": C, "P": P, "BC": BC, "BP": BP}
