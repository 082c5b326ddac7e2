"""Index scores and exact top-k of new tokens against a paged cache: the selection of a decoding step, in Triton.

A program scores SPAN keys of a sequence, found through the block table, with the very tile that
index_topk_triton.py scores with, and the same top-k follows, so that a step selects what the packed training
kernels select, bit for bit, in any batch, from bf16 or from e4m3. No length is read on the host: the grid is that of the longest
sequence allowed, and the calls can be captured in a CUDA graph. Definition: reference.paged with
reference.index_scores and reference.select_topk. Next: pages.py, paged_mla_triton.py.

Shape letters: B sequences, Q new tokens of each, N = B Q, P blocks in the pool, S tokens of a block, M blocks of
a sequence, J indexer heads, I indexer head size, K kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels import topk_triton
from posttrain.kernels.index_topk_triton import SHAPE, Shape, score_tile
from posttrain.kernels.pages import Pages
from posttrain.kernels.product_triton import block, interpreted
from posttrain.kernels.topk_triton import ordered

SPAN = 512
"""Keys that a program scores: a multiple of the tile's."""


@triton.jit
def page(table_ptr, sequence, at, there, block_size, stride_table, stride_block, stride_token):
    """Where keys `at` of a sequence lie, as offsets (int64) into the pool; 0 where they are not there."""
    block = tl.load(table_ptr + sequence * stride_table + at // block_size, mask=there, other=0)
    offset = block.to(tl.int64) * stride_block + (at % block_size).to(tl.int64) * stride_token
    return tl.where(there, offset, 0)


@triton.jit
def _paged_scores_kernel(
    q_ptr, pool_ptr, w_ptr, scale_ptr, table_ptr, lengths_ptr, keys_ptr,
    block_size, stride_table, stride_block, stride_token, stride_scale_block, stride_scale_token, width,
    Q: tl.constexpr, J: tl.constexpr, I: tl.constexpr, K: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr, QD: tl.constexpr, SPAN: tl.constexpr, SCALED: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """SPAN keys of a sequence against QD of its new tokens."""
    sequence = (tl.program_id(0) // tl.cdiv(Q, QD)).to(tl.int64)
    first_new = tl.program_id(0) % tl.cdiv(Q, QD) * QD
    first = tl.program_id(1) * SPAN
    length = tl.load(lengths_ptr + sequence)
    if (first < length) & (length > K):  # with no more than K keys all are kept
        i = tl.arange(0, BI)
        nth, j = tl.arange(0, QD * BJ) // BJ, tl.arange(0, QD * BJ) % BJ
        inside = (j < J) & (first_new + nth < Q)
        row = sequence * Q + first_new
        q_at = (row * J + (nth * J + j)[:, None]) * I + i[None, :]
        q = tl.load(q_ptr + q_at, mask=inside[:, None] & (i < I)[None, :], other=0.0)
        w = tl.load(w_ptr + row * J + nth * J + j, mask=inside, other=0.0)
        n = tl.arange(0, QD)
        end = length - (Q - 1 - first_new - n)  # keys that each new token sees
        for start in tl.range(0, SPAN, BK, num_stages=STAGES):
            at = first + start + tl.arange(0, BK)
            there = at < length
            offset = page(
                table_ptr, sequence, at, there, block_size, stride_table, stride_block, stride_token
            )
            k = tl.load(
                pool_ptr + offset[:, None] + i[None, :], mask=there[:, None] & (i < I)[None, :], other=0.0
            )
            score = score_tile(k, q, w, BK, QD, BJ, INTERPRET)
            if SCALED:
                offset = page(
                    table_ptr, sequence, at, there, block_size, stride_table, stride_scale_block, stride_scale_token
                )  # fmt: skip
                score *= tl.load(scale_ptr + offset, mask=there, other=0.0)[:, None]
            seen = (at[:, None] < end[None, :]) & (first_new + n < Q)[None, :]
            tl.store(keys_ptr + (row + n)[None, :] * width + at[:, None], ordered(score), mask=seen)


def topk(
    q_BQJI: Tensor,
    w_BQJ: Tensor,
    pages: Pages,
    num_kept: int,
    *,
    shape: Shape = SHAPE,
    select: topk_triton.Shape = topk_triton.SHAPE,
) -> Tensor:
    """Positions of the num_kept best keys of every new token: int32 [B, Q, K], ascending, -1 beyond.

    The Q new tokens are the last of each sequence, their keys in the cache already; each sees itself and what is
    before it. w is fp32 and carries every factor, the scales of q among them if it is e4m3; q has the dtype of the
    keys. Raises ValueError for what does not fit.
    """
    B, Q, J, I = q_BQJI.shape
    pool_PSI, table_BM = pages.index_PSI, pages.table_BM
    fits = pool_PSI.shape[2] == I and pool_PSI.dtype == q_BQJI.dtype and len(table_BM) == B
    if not fits or w_BQJ.shape != (B, Q, J) or w_BQJ.dtype != torch.float32:
        raise ValueError(
            f"q {tuple(q_BQJI.shape)} {q_BQJI.dtype}, keys {tuple(pool_PSI.shape)} {pool_PSI.dtype}, "
            f"w {tuple(w_BQJ.shape)} {w_BQJ.dtype} and {len(table_BM)} sequences do not fit together"
        )
    N, width = B * Q, triton.cdiv(pages.max_length, 32) * 32
    kept_NK = torch.empty(N, num_kept, dtype=torch.int32, device=q_BQJI.device)
    work = N * select.few(num_kept, width)
    buffer = torch.empty(N * width + work, dtype=torch.int32, device=q_BQJI.device)
    new_Q = torch.arange(1 - Q, 1, dtype=torch.int32, device=q_BQJI.device)
    end_N = (pages.lengths_B[:, None] + new_Q).clamp(min=0).view(-1)
    BJ = block(J)
    if N:
        scale_PS = w_BQJ[0] if pages.scale_PS is None else pages.scale_PS  # read only where keys have scales
        together = shape.together(BJ)
        _paged_scores_kernel[(B * triton.cdiv(Q, together), triton.cdiv(pages.max_length, SPAN))](
            q_BQJI.contiguous(), pool_PSI, w_BQJ.contiguous(), scale_PS, table_BM, pages.lengths_B, buffer,
            pages.block_size, table_BM.stride(0), pool_PSI.stride(0), pool_PSI.stride(1),
            scale_PS.stride(0), scale_PS.stride(1), width,
            Q=Q, J=J, I=I, K=num_kept, BJ=BJ, BI=block(I), BK=shape.keys,
            QD=together, SPAN=SPAN, SCALED=pages.scale_PS is not None, INTERPRET=interpreted(), STAGES=shape.stages,
            num_warps=shape.warps,
        )  # fmt: skip
        topk_triton.topk_rows(
            buffer, torch.zeros_like(end_N), end_N, buffer[N * width :], kept_NK,
            first_row=0, rows=N, first_key=0, width=width, shape=select,
        )  # fmt: skip
    return kept_NK.view(B, Q, num_kept)
