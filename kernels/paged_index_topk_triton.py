"""Index scores and exact top-k of new tokens against a paged cache: the selection of a decoding step, in Triton.

A sequence's keys lie in blocks of a pool, found through its row of a block table; the keys are any strided view
[blocks, block size, I] of a cache. A program scores SPAN keys of one new token with the very tile that
index_topk_triton.py scores with, and the same top-k follows, so that a step selects what the packed training
kernels select, bit for bit, in any batch. No length is read on the host: the grid is that of the longest
sequence allowed, and the calls can be captured in a CUDA graph. Definition: reference.paged with
reference.index_scores and reference.select_topk. Next: paged_mla_triton.py.

Shape letters: B sequences, Q new tokens of each, N = B Q, P blocks in the pool, S tokens of a block, M blocks of
a sequence, J indexer heads, I indexer head size, K kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels import index_topk_triton
from posttrain.kernels.index_topk_triton import score_tile

SPAN = 512
"""Keys that a program scores."""


@triton.jit
def last_seen(lengths_ptr, row, Q: tl.constexpr):
    """Keys that new token row % Q of sequence row // Q sees."""
    return tl.maximum(tl.load(lengths_ptr + row // Q) - (Q - 1 - row % Q), 0)


@triton.jit
def page(table_ptr, sequence, at, there, block_size, stride_table, stride_block, stride_token):
    """Where keys `at` of a sequence lie, as offsets (int64) into the pool; 0 where they are not there."""
    block = tl.load(table_ptr + sequence * stride_table + at // block_size, mask=there, other=0)
    offset = block.to(tl.int64) * stride_block + (at % block_size).to(tl.int64) * stride_token
    return tl.where(there, offset, 0)


@triton.jit
def _paged_scores_kernel(
    q_ptr, keys_ptr, w_ptr, table_ptr, lengths_ptr, scores_ptr,
    block_size, stride_table, stride_block, stride_token, width,
    Q: tl.constexpr, J: tl.constexpr, I: tl.constexpr, K: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr, SPAN: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """SPAN keys of one new token."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SPAN
    end = last_seen(lengths_ptr, row, Q)
    if (first < end) & (end > K):  # with no more than K keys all are kept
        j, i = tl.arange(0, BJ), tl.arange(0, BI)
        q_at = (row * J + j[:, None]) * I + i[None, :]
        q = tl.load(q_ptr + q_at, mask=(j < J)[:, None] & (i < I)[None, :], other=0.0)
        w = tl.load(w_ptr + row * J + j, mask=j < J, other=0.0)
        for start in tl.range(0, SPAN, BK, num_stages=STAGES):
            at = first + start + tl.arange(0, BK)
            there = at < end
            offset = page(
                table_ptr, row // Q, at, there, block_size, stride_table, stride_block, stride_token
            )
            mask = there[:, None] & (i < I)[None, :]
            k = tl.load(keys_ptr + offset[:, None] + i[None, :], mask=mask, other=0.0)
            tl.store(scores_ptr + row * width + at, score_tile(k, q, w, INTERPRET), mask=there)


def topk(
    q_BQJI: Tensor,
    keys_PSI: Tensor,
    w_BQJ: Tensor,
    table_BM: Tensor,
    lengths_B: Tensor,
    num_kept: int,
    *,
    max_length: int,
    shape: index_topk_triton.Shape = index_topk_triton.SHAPE,
) -> Tensor:
    """Positions of the num_kept best keys of every new token: int32 [B, Q, K], ascending, -1 beyond.

    The Q new tokens are the last of a sequence's lengths_B tokens (int32, at most max_length, their keys in the
    cache already); each sees itself and what is before it. A length of 0 is an empty row. w is fp32 and carries
    every factor. keys may be a view with strides; of the table (int32) only entries of blocks in use are read.
    Raises ValueError for shapes and types that do not fit.
    """
    B, Q, J, I = q_BQJI.shape
    check_pages(keys_PSI, table_BM, lengths_B, B, max_length)
    if keys_PSI.shape[2] != I or w_BQJ.shape != (B, Q, J) or w_BQJ.dtype != torch.float32:
        raise ValueError(
            f"q {tuple(q_BQJI.shape)}, keys {tuple(keys_PSI.shape)}, w {tuple(w_BQJ.shape)} {w_BQJ.dtype}"
        )
    N = B * Q
    scores_NL = torch.empty(N, max_length, dtype=torch.float32, device=q_BQJI.device)
    kept_NK = torch.empty(N, num_kept, dtype=torch.int32, device=q_BQJI.device)
    last_Q = torch.arange(1 - Q, 1, dtype=torch.int32, device=q_BQJI.device)
    ends_N = (lengths_B[:, None] + last_Q).clamp(min=0).view(-1)
    if N:
        _paged_scores_kernel[(N, triton.cdiv(max_length, SPAN))](
            q_BQJI.contiguous(), keys_PSI, w_BQJ.contiguous(), table_BM, lengths_B, scores_NL,
            keys_PSI.shape[1], table_BM.stride(0), keys_PSI.stride(0), keys_PSI.stride(1), max_length,
            Q=Q, J=J, I=I, K=num_kept, BJ=max(16, triton.next_power_of_2(J)),
            BI=max(16, triton.next_power_of_2(I)), BK=shape.keys, SPAN=max(SPAN, shape.keys),
            INTERPRET=bool(triton.knobs.runtime.interpret), STAGES=shape.stages, num_warps=shape.warps,
        )  # fmt: skip
        index_topk_triton.topk_rows(scores_NL, torch.zeros_like(ends_N), ends_N, kept_NK)
    return kept_NK.view(B, Q, num_kept)


def check_pages(
    pool_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, num_rows: int, max_length: int
) -> None:
    """ValueError if pool, table and lengths do not describe num_rows sequences of up to max_length tokens."""
    if pool_PSX.stride(2) != 1:
        raise ValueError("the parts of a cache entry must lie side by side (last stride 1)")
    if table_BM.dtype != torch.int32 or lengths_B.dtype != torch.int32 or table_BM.stride(1) != 1:
        raise ValueError(
            f"table {table_BM.dtype}, lengths {lengths_B.dtype}: both are int32, rows contiguous"
        )
    if len(table_BM) != num_rows or lengths_B.shape != (num_rows,):
        raise ValueError(
            f"table {tuple(table_BM.shape)} and lengths {tuple(lengths_B.shape)} for {num_rows} sequences"
        )
    room = table_BM.shape[1] * pool_PSX.shape[1]
    if not 0 < max_length <= room:
        raise ValueError(f"max_length={max_length}: the table's rows hold 1 to {room} tokens")
